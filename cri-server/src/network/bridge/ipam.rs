//! Address leases: one symbolic link per address, its target the sandbox that holds it.
//!
//! ```text
//! <state_dir>/leases/10.88.0.7 -> 4f1c…   symlink(2) makes name and owner in one atomic step
//! ```
//! symlink(2) fails when the name exists, so an address has one owner whatever crashes when. The
//! directory lies under /run on purpose: a reboot takes the namespaces, and the leases with them;
//! therefore nothing is synced to disk. Memory mirrors the directory; this process is its only
//! writer (`Bridge` holds the lock file).

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::error::{NetworkError, NetworkErrorKind, Result};
use super::super::subnet::Subnet;

pub(super) struct Leases {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    owners: BTreeMap<IpAddr, String>,
    /// The address given out last, per family: the next search starts after it, so that an
    /// address rests before it is used again.
    last: [Option<IpAddr>; 2],
}

impl Leases {
    pub(super) fn open(dir: PathBuf) -> Result<Leases> {
        fs::create_dir_all(&dir)
            .map_err(|e| NetworkError::io("create directory", dir.display(), e))?;
        let mut state = State::default();
        let mut newest = [None; 2];
        let entries =
            fs::read_dir(&dir).map_err(|e| NetworkError::io("read leases", dir.display(), e))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(ip) = name.to_str().and_then(|n| n.parse::<IpAddr>().ok()) else {
                continue;
            };
            let Ok(owner) = fs::read_link(entry.path()) else {
                continue;
            };
            let made = entry.metadata().ok().and_then(|m| m.modified().ok());
            let family = usize::from(ip.is_ipv6());
            if made >= newest[family] {
                newest[family] = made;
                state.last[family] = Some(ip);
            }
            state
                .owners
                .insert(ip, owner.to_string_lossy().into_owned());
        }
        Ok(Leases {
            dir,
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next free address of the subnet.
    pub(super) fn allocate(&self, subnet: &Subnet, owner: &str) -> Result<IpAddr> {
        let mut state = self.lock();
        let offsets = subnet.pod_offsets();
        let (first, last) = (*offsets.start(), *offsets.end());
        let family = usize::from(!subnet.is_ipv4());
        let mut at = match state.last[family] {
            Some(ip) if subnet.contains(ip) => subnet.offset(ip).wrapping_add(1),
            _ => first,
        };
        // Among one more address than there are leases, one is free.
        for _ in 0..=state.owners.len() {
            if !offsets.contains(&at) {
                at = first;
            }
            let ip = subnet.host(at);
            if !state.owners.contains_key(&ip) {
                self.link(&mut state, ip, owner)?;
                state.last[family] = Some(ip);
                return Ok(ip);
            }
            at += 1;
        }
        let held = state
            .owners
            .keys()
            .filter(|ip| subnet.contains(**ip))
            .count();
        Err(NetworkError::new(
            NetworkErrorKind::Exhausted,
            "lease an address of",
            subnet.to_string(),
        )
        .cause(format!(
            "all {} addresses are held ({held} leases)",
            last - first + 1
        )))
    }

    /// This very address, asked for by the pod.
    pub(super) fn claim(&self, subnet: &Subnet, ip: IpAddr, owner: &str) -> Result<IpAddr> {
        if !subnet.contains(ip) || !subnet.pod_offsets().contains(&subnet.offset(ip)) {
            let why = format!("not an address for pods of {subnet}");
            return Err(NetworkError::invalid("lease address", ip.to_string(), why));
        }
        let mut state = self.lock();
        if let Some(holder) = state.owners.get(&ip) {
            let why = format!("held by sandbox {holder}");
            return Err(NetworkError::new(
                NetworkErrorKind::Conflict,
                "lease address",
                ip.to_string(),
            )
            .cause(why));
        }
        self.link(&mut state, ip, owner)?;
        Ok(ip)
    }

    fn link(&self, state: &mut State, ip: IpAddr, owner: &str) -> Result<()> {
        let path = self.dir.join(ip.to_string());
        symlink(owner, &path).map_err(|e| NetworkError::io("write lease", path.display(), e))?;
        state.owners.insert(ip, owner.to_owned());
        Ok(())
    }

    /// Frees all of the owner's addresses; none is fine. Keeps going past a failure and tells it.
    pub(super) fn release(&self, owner: &str) -> Result<()> {
        let mut state = self.lock();
        let held: Vec<IpAddr> = state
            .owners
            .iter()
            .filter(|(_, o)| *o == owner)
            .map(|(ip, _)| *ip)
            .collect();
        let mut outcome = Ok(());
        for ip in held {
            let path = self.dir.join(ip.to_string());
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    outcome = Err(NetworkError::io("remove lease", path.display(), error));
                }
                _ => {
                    state.owners.remove(&ip);
                }
            }
        }
        outcome
    }

    pub(super) fn held_by(&self, owner: &str) -> bool {
        self.lock().owners.values().any(|held| held == owner)
    }

    pub(super) fn owners(&self) -> HashSet<String> {
        self.lock().owners.values().cloned().collect()
    }

    /// A leased address outside the subnets: they were changed under running pods.
    pub(super) fn outside(&self, subnets: &[Subnet]) -> Option<(IpAddr, String)> {
        let state = self.lock();
        let mut all = state.owners.iter();
        all.find(|(ip, _)| !subnets.iter().any(|s| s.contains(**ip)))
            .map(|(ip, owner)| (*ip, owner.clone()))
    }

    /// Any leased IPv4 address: it tells the subnet of the time before a restart.
    pub(super) fn any_ipv4(&self) -> Option<IpAddr> {
        self.lock().owners.keys().find(|ip| ip.is_ipv4()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn leases_rotate_persist_and_run_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases");
        let net = subnet("10.7.0.0/29");
        let leases = Leases::open(path.clone()).unwrap();
        let given: Vec<String> = (0..3)
            .map(|i| leases.allocate(&net, &format!("s{i}")).unwrap().to_string())
            .collect();
        assert_eq!(given, ["10.7.0.2", "10.7.0.3", "10.7.0.4"]);
        leases.release("s0").unwrap();
        leases.release("s0").unwrap();

        // A new process sees the same leases and goes on behind the newest.
        let leases = Leases::open(path.clone()).unwrap();
        assert_eq!(
            leases.owners(),
            HashSet::from(["s1".to_owned(), "s2".to_owned()])
        );
        assert_eq!(leases.allocate(&net, "s3").unwrap().to_string(), "10.7.0.5");
        assert_eq!(leases.allocate(&net, "s4").unwrap().to_string(), "10.7.0.6");
        assert_eq!(leases.allocate(&net, "s5").unwrap().to_string(), "10.7.0.2");
        let error = leases.allocate(&net, "s6").unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::Exhausted);
        assert_eq!(
            error.to_string(),
            "lease an address of 10.7.0.0/29: all 5 addresses are held (5 leases)"
        );
        leases.release("s2").unwrap();
        assert_eq!(leases.allocate(&net, "s6").unwrap().to_string(), "10.7.0.4");
    }

    #[test]
    fn claimed_address_must_be_free_and_inside() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path().join("leases")).unwrap();
        let net = subnet("10.7.0.0/24");
        let ip = "10.7.0.9".parse().unwrap();
        leases.claim(&net, ip, "a").unwrap();
        assert_eq!(
            leases.claim(&net, ip, "b").unwrap_err().kind(),
            NetworkErrorKind::Conflict
        );
        for bad in ["10.7.1.9", "10.7.0.0", "10.7.0.1", "10.7.0.255", "fd00::1"] {
            let error = leases.claim(&net, bad.parse().unwrap(), "b").unwrap_err();
            assert_eq!(error.kind(), NetworkErrorKind::Invalid, "{bad}");
        }
        assert_eq!(leases.outside(&[subnet("10.8.0.0/24")]).unwrap().1, "a");
        assert!(leases.outside(&[net]).is_none());
    }

    #[test]
    fn two_families_are_counted_apart() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path().join("leases")).unwrap();
        let (v4, v6) = (subnet("10.7.0.0/24"), subnet("fd00:7::/64"));
        for i in 2..4u8 {
            let owner = i.to_string();
            assert_eq!(
                leases.allocate(&v4, &owner).unwrap().to_string(),
                format!("10.7.0.{i}")
            );
            assert_eq!(
                leases.allocate(&v6, &owner).unwrap().to_string(),
                format!("fd00:7::{i}")
            );
        }
    }
}
