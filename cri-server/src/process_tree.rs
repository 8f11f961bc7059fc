//! Owns ending an exec with everything that it started. Its process leads a session, so its
//! descendants are those whose chain of parents leads to it, and those that were orphaned but
//! kept the session. Only pids of the container's own cgroup are considered.

use std::collections::{BTreeMap, BTreeSet};

use rustix::process::{Pid, Signal};

/// Parent and session of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kinship {
    parent: i32,
    session: i32,
}

/// Rounds after which a fork bomb is left to the container's own limits.
const ROUNDS: usize = 50;

/// Kills the tree of `leader`; `processes` lists the pids of the container.
pub fn kill(leader: u32, processes: impl Fn() -> Vec<i32>) {
    let Ok(leader) = i32::try_from(leader) else {
        return;
    };
    let mut known = BTreeSet::from([leader]);
    for _ in 0..ROUNDS {
        let table = processes()
            .into_iter()
            .filter_map(|pid| Some((pid, kinship(pid)?)))
            .collect();
        let tree = tree(leader, &known, &table);
        if tree.is_empty() {
            return;
        }
        // Stopped first, so that none of them forks while the others are being killed.
        for signal in [Signal::STOP, Signal::KILL] {
            for pid in tree.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
        known.extend(tree);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The processes of the table that belong to the tree.
fn tree(leader: i32, known: &BTreeSet<i32>, table: &BTreeMap<i32, Kinship>) -> Vec<i32> {
    let mut members = known.clone();
    loop {
        let before = members.len();
        for (pid, kin) in table {
            if kin.session == leader || members.contains(&kin.parent) {
                members.insert(*pid);
            }
        }
        if members.len() == before {
            break;
        }
    }
    members
        .into_iter()
        .filter(|pid| table.contains_key(pid))
        .collect()
}

/// proc_pid_stat(5): the fields after the command, which may hold anything but ends at the last
/// parenthesis. Zombies are dead already.
fn kinship(pid: i32) -> Option<Kinship> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse(&text)
}

fn parse(stat: &str) -> Option<Kinship> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Kinship { parent, session })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_command_is_parsed() {
        let stat = "7 (a) R 1 2 (b)) S 5 6 4 0 -1 0";
        let kin = Kinship {
            parent: 5,
            session: 4,
        };
        assert_eq!(parse(stat), Some(kin));
        assert_eq!(parse("7 (x) Z 5 6 4 0"), None);
    }

    #[test]
    fn tree_holds_descendants_and_orphans_of_the_session() {
        let kin = |parent, session| Kinship { parent, session };
        let table = BTreeMap::from([
            (1, kin(0, 1)),
            (10, kin(99, 10)),
            (11, kin(10, 10)),
            (12, kin(11, 12)),
            (13, kin(1, 10)),
            (20, kin(1, 1)),
        ]);
        let tree = tree(10, &BTreeSet::from([10]), &table);
        assert_eq!(tree, [10, 11, 12, 13]);
    }
}
