//! The crash sweep over `coracle`: SIGKILL at every system call of every command that changes
//! something, and a failing system call at a sample of them. `make sweep` does all of both, with
//! every error.

use anyhow::{Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::need_root;
use coracle_integration::sweep::{Asked, ERRORS, Fault, Reach, Verb, sweep};

fn check(asked: &[Asked]) -> Result<()> {
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let mut wrong = Vec::new();
    for asked in asked {
        let found = sweep(&bench, &coracle, asked)?;
        let name = asked.verb.name();
        println!("{name} ({:?}): {}", asked.reach, found.summary());
        ensure!(found.cases > 10, "{name}: only {} cases", found.cases);
        wrong.extend(found.wrong);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    bench.finish()
}

fn killed(verbs: &[(Verb, Reach)]) -> Result<()> {
    let asked: Vec<Asked> = verbs
        .iter()
        .map(|(verb, reach)| Asked {
            verb: *verb,
            faults: vec![Fault::Kill],
            reach: *reach,
            stride: 1,
            first: 0,
            rotate: false,
        })
        .collect();
    check(&asked)
}

#[test]
fn create_killed_at_every_call_leaves_nothing() -> Result<()> {
    need_root!();
    killed(&[
        (Verb::Create, Reach::Runtime),
        (Verb::Create, Reach::Everyone),
    ])
}

#[test]
fn run_killed_at_every_call_leaves_nothing() -> Result<()> {
    need_root!();
    killed(&[(Verb::Run, Reach::Runtime), (Verb::Run, Reach::Everyone)])
}

#[test]
fn exec_delete_and_update_killed_at_every_call_leave_nothing() -> Result<()> {
    need_root!();
    killed(&[
        (Verb::Exec, Reach::Runtime),
        (Verb::Exec, Reach::Everyone),
        (Verb::Delete, Reach::Runtime),
        (Verb::Update, Reach::Runtime),
    ])
}

/// One call in `STRIDE`, with one of the errors in turn: 5 has no divisor in common with it.
const STRIDE: usize = 3;

#[test]
fn failing_calls_are_told_and_leave_nothing() -> Result<()> {
    need_root!();
    let asked = |verb| Asked {
        verb,
        faults: ERRORS.map(Fault::Error).to_vec(),
        reach: Reach::Everyone,
        stride: STRIDE,
        first: 0,
        rotate: true,
    };
    check(&Verb::ALL.map(asked))
}
