//! Tells which tasks the OOM killer has struck.
//!
//! v2: one inotify over every memory.events. v1: one eventfd registered with every
//! memory.oom_control. Either only says "look": the truth is the oom_kill counter, which is also
//! read before an exit is reported.
//! Owns: the two descriptors and the last counter of each task.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use rustix::event::EventfdFlags;
use rustix::fs::inotify;

use crate::cgroup::Cgroup;
use crate::poll::{Endpoint, Interest, Poll, Source};

struct Watched {
    cgroup: Cgroup,
    seen: u64,
    descriptor: Option<i32>,
}

#[derive(Default)]
pub struct OomWatch {
    inotify: Option<Endpoint>,
    eventfd: Option<Endpoint>,
    tasks: BTreeMap<String, Watched>,
}

impl OomWatch {
    /// Begins to watch. A cgroup without a memory controller has nothing to tell.
    pub fn add(&mut self, poll: &Poll, id: &str, cgroup: &Cgroup) -> io::Result<()> {
        let Some(file) = cgroup.oom_file() else {
            return Ok(());
        };
        let seen = cgroup.oom_kills().unwrap_or(0);
        let watched = Watched {
            cgroup: cgroup.clone(),
            seen,
            descriptor: None,
        };
        // Known even when the kernel will not notify: the counter is read at the exit.
        self.tasks.insert(id.to_owned(), watched);
        if cgroup.v2.is_some() {
            let set = match &self.inotify {
                Some(set) => set,
                None => {
                    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
                    let mut set = Endpoint::new(inotify::init(flags)?, Source::MemoryEvents);
                    set.watch(poll, Interest::READ)?;
                    self.inotify.insert(set)
                }
            };
            let mask = inotify::WatchFlags::MODIFY;
            let descriptor = match inotify::add_watch(set.fd(), &file, mask) {
                // The memory controller is not in use there.
                Err(rustix::io::Errno::NOENT) => return Ok(()),
                result => result?,
            };
            if let Some(watched) = self.tasks.get_mut(id) {
                watched.descriptor = Some(descriptor);
            }
        } else {
            let event = match &self.eventfd {
                Some(event) => event,
                None => {
                    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
                    let fd = rustix::event::eventfd(0, flags)?;
                    let mut event = Endpoint::new(fd, Source::OomControl);
                    event.watch(poll, Interest::READ)?;
                    self.eventfd.insert(event)
                }
            };
            let control = std::fs::File::open(&file)?;
            let line = format!("{} {}", event.fd().as_raw_fd(), control.as_raw_fd());
            std::fs::write(file.with_file_name("cgroup.event_control"), line)?;
        }
        Ok(())
    }

    pub fn remove(&mut self, id: &str) {
        let Some(watched) = self.tasks.remove(id) else {
            return;
        };
        if let (Some(set), Some(descriptor)) = (&self.inotify, watched.descriptor) {
            // The kernel has removed it already when the cgroup is gone.
            let _ = inotify::remove_watch(set.fd(), descriptor);
        }
        if self.tasks.is_empty() {
            *self = OomWatch::default();
        }
    }

    /// Empties the descriptor that became ready.
    pub fn acknowledge(&self, source: Source) {
        let endpoint = match source {
            Source::MemoryEvents => &self.inotify,
            _ => &self.eventfd,
        };
        if let Some(endpoint) = endpoint {
            let mut buffer = [MaybeUninit::<u8>::uninit(); 1024];
            while rustix::io::read(endpoint.fd(), &mut buffer).is_ok_and(|(got, _)| !got.is_empty())
            {
            }
        }
    }

    /// Tasks struck since the last look.
    pub fn struck(&mut self) -> Vec<String> {
        let ids: Vec<String> = self.tasks.keys().cloned().collect();
        ids.into_iter().filter(|id| self.struck_one(id)).collect()
    }

    /// Whether this task was struck since the last look.
    pub fn struck_one(&mut self, id: &str) -> bool {
        let Some(watched) = self.tasks.get_mut(id) else {
            return false;
        };
        let now = watched.cgroup.oom_kills().unwrap_or(watched.seen);
        let struck = now > watched.seen;
        watched.seen = now;
        struck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unified(dir: &std::path::Path) -> Cgroup {
        Cgroup {
            v2: Some(dir.to_owned()),
            v1: Vec::new(),
        }
    }

    #[test]
    fn a_count_that_grows_in_the_unified_hierarchy_is_a_strike() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |dir: &tempfile::TempDir, kills: u32| {
            let text = format!("low 0\nhigh 0\nmax 9\noom {kills}\noom_kill {kills}\n");
            std::fs::write(dir.path().join("memory.events"), text).unwrap();
        };
        // Struck in an earlier life of its cgroup: not news.
        write(&a, 3);
        write(&b, 0);
        let mut poll = Poll::new().unwrap();
        let mut watch = OomWatch::default();
        watch.add(&poll, "a", &unified(a.path())).unwrap();
        watch.add(&poll, "b", &unified(b.path())).unwrap();
        let none = tempfile::tempdir().unwrap();
        watch.add(&poll, "c", &unified(none.path())).unwrap();
        assert!(watch.struck().is_empty());
        // Other counters of the file change as well.
        for (dir, kills, want) in [(&b, 0, vec![]), (&b, 1, vec!["b"]), (&a, 5, vec!["a"])] {
            write(dir, kills);
            let mut ready = Vec::new();
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            poll.wait(Some(second), &mut ready).unwrap();
            assert!(ready.iter().any(|r| r.source == Source::MemoryEvents));
            watch.acknowledge(Source::MemoryEvents);
            assert_eq!(watch.struck(), want);
            assert!(watch.struck().is_empty());
        }
        watch.remove("b");
        write(&b, 2);
        assert!(watch.struck().is_empty());
    }
}
