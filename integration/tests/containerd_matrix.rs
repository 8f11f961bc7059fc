//! containerd of several releases, and what each of them can do with our shim: one table.
//!
//! A program of its own instead of libtest's: a cell of the table is one test, named
//! `containerd_matrix::<release>::<feature>`, and one daemon serves all cells of a release.

#[path = "containerd_matrix/layers.rs"]
mod layers;
#[path = "containerd_matrix/pods.rs"]
mod pods;
#[path = "containerd_matrix/tasks.rs"]
mod tasks;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use coracle_integration::containerd::{Containerd, RELEASES, Release, Setup};

/// What came of a feature under a release.
#[derive(Clone, Debug)]
pub enum Cell {
    Ok,
    /// It cannot be tried on this machine.
    Skip(String),
    /// The release has no such thing.
    Absent(&'static str),
    Fail(String),
}

/// How the daemon is to run for a feature.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Daemon {
    Plain,
    /// Our shim is in its PATH under the name of containerd's own.
    RuncName,
    Unified,
    Pods,
}

type Feature = (&'static str, Daemon, fn(&mut Containerd) -> Result<Cell>);

const FEATURES: &[Feature] = &[
    ("run_by_name", Daemon::Plain, tasks::run_by_name),
    ("run_by_path", Daemon::Plain, tasks::run_by_path),
    ("bootstrap", Daemon::Plain, tasks::bootstrap),
    ("refused_start", Daemon::Plain, tasks::refused_start),
    ("terminal", Daemon::Plain, tasks::terminal),
    ("detached_ps_kill", Daemon::Plain, tasks::detached),
    ("exec", Daemon::Plain, tasks::exec),
    ("exec_terminal", Daemon::Plain, tasks::exec_terminal),
    ("stdin_half_close", Daemon::Plain, tasks::stdin_half_close),
    ("output_is_whole", Daemon::Plain, tasks::output_is_whole),
    ("pause_and_resume", Daemon::Plain, tasks::pause_and_resume),
    ("kill_all", Daemon::Plain, tasks::kill_all),
    ("many_execs", Daemon::Plain, tasks::many_execs),
    ("metrics_v1", Daemon::Plain, tasks::metrics_v1),
    ("events_in_order", Daemon::Plain, tasks::events_in_order),
    ("out_of_memory_v1", Daemon::Plain, tasks::out_of_memory),
    ("log_to_file", Daemon::Plain, tasks::log_to_file),
    ("log_to_program", Daemon::Plain, tasks::log_to_program),
    ("grouping", Daemon::Plain, tasks::grouping),
    ("options_file", Daemon::Plain, tasks::options_file),
    ("user_namespace", Daemon::Plain, tasks::user_namespace),
    ("many_layers", Daemon::Plain, tasks::many_layers),
    ("runtime_info", Daemon::Plain, tasks::runtime_info),
    ("daemon_restart", Daemon::Plain, tasks::daemon_restart),
    ("metrics_v2", Daemon::Unified, tasks::metrics_v2),
    (
        "run_as_runc_shim",
        Daemon::RuncName,
        tasks::run_as_runc_shim,
    ),
    ("systemd_cgroup", Daemon::RuncName, tasks::systemd_cgroup),
    (
        "checkpoint_and_restore",
        Daemon::RuncName,
        tasks::checkpoint_and_restore,
    ),
    ("pod_by_name", Daemon::Pods, pods::by_name),
    ("pod_by_path", Daemon::Pods, pods::by_path),
    ("pod_with_options", Daemon::Pods, pods::with_options),
    ("pod_sandboxer_shim", Daemon::Pods, pods::sandboxer_shim),
    ("pod_exec", Daemon::Pods, pods::exec),
    ("pod_exec_terminal", Daemon::Pods, pods::exec_terminal),
    ("pod_attach", Daemon::Pods, pods::attach),
    ("pod_stats", Daemon::Pods, pods::stats),
    ("pod_update", Daemon::Pods, pods::update),
    ("pod_out_of_memory", Daemon::Pods, pods::out_of_memory),
    ("pod_port_forward", Daemon::Pods, pods::port_forward),
    ("pod_user_namespace", Daemon::Pods, pods::user_namespace),
    ("pod_daemon_restart", Daemon::Pods, pods::daemon_restart),
    // The last: the daemon is another one after it.
    ("pod_upgrade_to_newest", Daemon::Pods, pods::upgrade),
];

fn setup(daemon: Daemon, release: &Release) -> Result<Setup> {
    let mut setup = Setup::plain();
    match daemon {
        Daemon::Plain => {}
        Daemon::RuncName => setup.shim = Some("containerd-shim-runc-v2"),
        Daemon::Unified => setup.unified = true,
        Daemon::Pods => setup.handlers = pods::handlers(release.number())?,
    }
    Ok(setup)
}

fn test_name(release: &str, feature: &str) -> String {
    format!("containerd_matrix::{release}::{feature}")
}

/// One release's cells, in the order of `FEATURES`; None where it was not asked for.
struct Column {
    head: String,
    cells: Vec<Option<Cell>>,
}

/// Tries the features of one release that are wanted, in one world.
fn column(name: &'static str, wanted: impl Fn(&str) -> bool) -> Column {
    let wanted: Vec<bool> = FEATURES
        .iter()
        .map(|(feature, ..)| wanted(&test_name(name, feature)))
        .collect();
    let all = |cell: Cell| wanted.iter().map(|w| w.then(|| cell.clone())).collect();
    let mut head = name.to_owned();
    if !wanted.contains(&true) {
        return Column {
            head,
            cells: all(Cell::Ok),
        };
    }
    if !rustix::process::geteuid().is_root() {
        return Column {
            head,
            cells: all(Cell::Skip("needs root".to_owned())),
        };
    }
    let release = match Release::find(name) {
        Ok(release) => release,
        Err(why) => {
            return Column {
                head,
                cells: all(Cell::Skip(format!("{why:#}"))),
            };
        }
    };
    head.clone_from(&release.version);
    let cells = match cells(&release, &wanted) {
        Ok(cells) => cells,
        Err(e) => {
            println!("FAILED {name}: {e:#}");
            all(Cell::Fail(format!("{e:#}")))
        }
    };
    Column { head, cells }
}

fn cells(release: &Release, wanted: &[bool]) -> Result<Vec<Option<Cell>>> {
    let mut containerd = Containerd::set(release.clone(), Setup::plain())?;
    let mut cells = Vec::new();
    for ((name, daemon, run), wanted) in FEATURES.iter().zip(wanted) {
        if !wanted {
            cells.push(None);
            continue;
        }
        let started = Instant::now();
        let outcome = containerd
            .become_with(&setup(*daemon, release)?)
            .and_then(|()| run(&mut containerd))
            .and_then(|cell| containerd.nothing_left().map(|()| cell));
        let cell = outcome.unwrap_or_else(|e| {
            containerd.sweep();
            Cell::Fail(format!("{e:#}"))
        });
        let name = test_name(release.name, name);
        let seconds = started.elapsed().as_secs_f32();
        match &cell {
            Cell::Ok => println!("test {name} ... ok ({seconds:.1} s)"),
            Cell::Skip(why) => println!("SKIP {name}: {why}"),
            Cell::Absent(_) => {}
            Cell::Fail(why) => {
                println!("test {name} ... FAILED\n{why}\n{}", containerd.log_tail());
            }
        }
        cells.push(Some(cell));
    }
    if cells.iter().flatten().any(|c| matches!(c, Cell::Fail(_))) {
        // What failed may have left something; the stage removes it.
        return Ok(cells);
    }
    containerd.finish()?;
    Ok(cells)
}

fn table(columns: &[Column]) -> String {
    let mut notes: Vec<String> = Vec::new();
    let mut note = |text: &str| -> usize {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let line: String = lines.join(" ").chars().take(180).collect();
        let known = notes.iter().position(|n| *n == line);
        known.unwrap_or_else(|| {
            notes.push(line);
            notes.len() - 1
        }) + 1
    };
    let mut text = format!("{:<24}", "containerd");
    for column in columns {
        text += &format!("{:>12}", column.head);
    }
    text.push('\n');
    for (row, (feature, ..)) in FEATURES.iter().enumerate() {
        if columns.iter().all(|c| c.cells[row].is_none()) {
            continue;
        }
        text += &format!("{:<24}", feature.replace('_', " "));
        for column in columns {
            let cell = match &column.cells[row] {
                None => String::new(),
                Some(Cell::Ok) => "ok".to_owned(),
                Some(Cell::Skip(why)) => format!("skip [{}]", note(why)),
                Some(Cell::Absent(why)) => format!("- [{}]", note(why)),
                Some(Cell::Fail(why)) => format!("FAIL [{}]", note(why)),
            };
            text += &format!("{cell:>12}");
        }
        text.push('\n');
    }
    for (n, line) in notes.iter().enumerate() {
        text += &format!("[{}] {line}\n", n + 1);
    }
    text
}

fn main() -> ExitCode {
    let started = Instant::now();
    let mut words = std::env::args().skip(1);
    let (mut filters, mut left_out, mut list, mut exact) = (Vec::new(), Vec::new(), false, false);
    // libtest's own, as far as cargo and people pass them on.
    while let Some(word) = words.next() {
        match word.as_str() {
            "--list" => list = true,
            "--exact" => exact = true,
            "--skip" => left_out.extend(words.next()),
            "--test-threads" | "--color" | "--format" | "-Z" => drop(words.next()),
            flag if flag.starts_with('-') => {}
            _ => filters.push(word),
        }
    }
    let holds = |name: &str, part: &String| {
        if exact {
            name == part
        } else {
            name.contains(part.as_str())
        }
    };
    let wanted = |name: &str| {
        (filters.is_empty() || filters.iter().any(|f| holds(name, f)))
            && !left_out.iter().any(|f| holds(name, f))
    };
    let names = RELEASES
        .iter()
        .flat_map(|r| FEATURES.iter().map(move |(f, ..)| test_name(r, f)));
    let names: Vec<String> = names.filter(|n| wanted(n)).collect();
    if list {
        names.iter().for_each(|n| println!("{n}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", names.len());
    let columns: Vec<Column> = RELEASES.into_iter().map(|r| column(r, wanted)).collect();
    if !names.is_empty() {
        println!("\n{}", table(&columns));
    }
    let cells = || columns.iter().flat_map(|c| c.cells.iter().flatten());
    let failed = cells().filter(|c| matches!(c, Cell::Fail(_))).count();
    let absent = cells().filter(|c| matches!(c, Cell::Absent(_))).count();
    println!(
        "test result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; \
         finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        names.len() - failed - absent,
        RELEASES.len() * FEATURES.len() - names.len(),
        started.elapsed().as_secs_f32()
    );
    ExitCode::from(u8::from(failed != 0))
}
