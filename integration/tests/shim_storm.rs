//! Two hundred containers with execs that come and go all at once: every end is told once, with
//! its own code, and the shims hold nothing more afterwards than before.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::need_root;
use coracle_integration::shim::Shim;
use coracle_integration::shim::events::Events;
use coracle_integration::shim::stand::{Stand, are_hands};
use coracle_integration::wait_for;

const PODS: usize = 10;
const CONTAINERS: usize = 20;
const EXECS: usize = 4;
const HANDS: usize = 4;

fn open_files(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// But for the one that a confined shim has beside it.
fn children(pid: i32) -> Result<Vec<i32>> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let pids = list.split_whitespace().map(str::parse::<i32>);
    let pids = pids.collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(pids.into_iter().filter(|pid| !are_hands(*pid)).collect())
}

fn name(pod: usize, container: usize) -> String {
    format!("p{pod}c{container}")
}

/// The code with which an exec ends.
fn code(container: usize, exec: usize) -> u32 {
    (1 + container * EXECS + exec) as u32
}

/// Everything that is asked of one container, from its start to its kill.
fn live(shim: &Shim, stand: &Stand, pod: usize, n: usize) -> Result<()> {
    let id = name(pod, n);
    shim.create(&stand.task(&id))?;
    shim.start(&id, "")?;
    for exec in 0..EXECS {
        let script = format!("exit {}", code(n, exec));
        let exec = format!("e{exec}");
        shim.exec(&id, &exec, &["/usr/bin/sh", "-c", &script], "")?;
        shim.start(&id, &exec)?;
    }
    // Some of them have ended by now, some run.
    for exec in 0..EXECS {
        let waited = shim.wait(&id, &format!("e{exec}"))?;
        ensure!(
            waited.exit_status == code(n, exec),
            "{id} e{exec}: {waited:?}"
        );
        shim.delete(&id, &format!("e{exec}"))?;
    }
    // The last ones are killed with their container.
    shim.exec(&id, "last", &["/usr/bin/sleep", "1000"], "")?;
    shim.start(&id, "last")?;
    shim.kill(&id, "", 9, false)?;
    ensure!(shim.wait(&id, "")?.exit_status == 137);
    shim.delete(&id, "")?;
    Ok(())
}

#[test]
fn storm_of_containers_and_execs_loses_no_exit_and_leaves_no_descriptor() -> Result<()> {
    need_root!();
    let begun = Instant::now();
    let mut stand = Stand::new()?;
    let events = Events::listen(&stand.dir().join("events"))?;
    stand.launcher.events = events.address();
    let mut shims = Vec::new();
    for pod in 0..PODS {
        let group = format!("p{pod}");
        for n in 0..CONTAINERS {
            stand.write(&group, &name(pod, n), "sleep 1000")?;
        }
        // The first one opens what a shim keeps open from then on.
        let bundle = stand.write(&group, &format!("{group}first"), "exit 0")?;
        let shim = stand.launcher.start(&bundle, &group)?;
        shim.create(&stand.task(&format!("{group}first")))?;
        shim.start(&format!("{group}first"), "")?;
        shim.wait(&format!("{group}first"), "")?;
        shim.delete(&format!("{group}first"), "")?;
        shims.push(shim);
    }
    let before: Vec<usize> = shims
        .iter()
        .map(|shim| open_files(shim.pid()?))
        .collect::<Result<_>>()?;
    let failures = std::thread::scope(|scope| {
        let hands: Vec<_> = (0..HANDS)
            .map(|hand| {
                let (stand, shims) = (&stand, &shims);
                scope.spawn(move || -> Result<()> {
                    let mine = (0..PODS * CONTAINERS).filter(|k| k % HANDS == hand);
                    for k in mine {
                        // Neighbours in time are in different pods, and pods in many hands.
                        let (pod, n) = (k / HANDS % PODS, k / HANDS / PODS * HANDS + hand);
                        live(&shims[pod], stand, pod, n).with_context(|| name(pod, n))?;
                    }
                    Ok(())
                })
            })
            .collect();
        let ends = hands.into_iter().map(|hand| hand.join());
        let failed = |end: std::thread::Result<Result<()>>| match end {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(format!("{e:#}")),
            Err(_) => Some("panicked".to_owned()),
        };
        ends.filter_map(failed).collect::<Vec<_>>()
    });
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    // One for each process: the first of each pod, then the containers, each with its execs.
    let all = PODS + PODS * CONTAINERS * (1 + EXECS + 1);
    wait_for("the last events", Duration::from_secs(10), || {
        Ok((events.exits()?.len() >= all).then_some(()))
    })?;
    let mut told: BTreeMap<(String, String), Vec<u32>> = BTreeMap::new();
    for exit in events.exits()? {
        let of = (exit.container_id, exit.id);
        let last = told.entry((of.0.clone(), of.0.clone()));
        let after_init = matches!(&last, std::collections::btree_map::Entry::Occupied(_));
        ensure!(!after_init, "{of:?} was told after its container's end");
        told.entry(of).or_default().push(exit.exit_status);
    }
    ensure!(told.len() == all, "{} ends of {all}", told.len());
    for pod in 0..PODS {
        for n in 0..CONTAINERS {
            let id = name(pod, n);
            let codes = |exec: &str| told.get(&(id.clone(), exec.to_owned())).cloned();
            ensure!(codes(&id) == Some(vec![137]), "{id}: {:?}", codes(&id));
            ensure!(
                codes("last") == Some(vec![137]),
                "{id}: {:?}",
                codes("last")
            );
            for exec in 0..EXECS {
                let got = codes(&format!("e{exec}"));
                ensure!(got == Some(vec![code(n, exec)]), "{id} e{exec}: {got:?}");
            }
        }
    }
    for (shim, before) in shims.iter().zip(before) {
        let pid = shim.pid()?;
        let left = children(pid)?;
        ensure!(left.is_empty(), "children: {left:?}");
        wait_for(
            "as many open files as before",
            Duration::from_secs(5),
            || Ok((open_files(pid)? <= before).then_some(())),
        )?;
        shim.shut_down()?;
    }
    println!("{all} ends in {:?}", begun.elapsed());
    stand.finish()
}
