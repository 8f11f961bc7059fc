//! The shim's own log: lines in the `log` FIFO of the bundle, which containerd reads, or in
//! `shim.log` where there is no such FIFO.
//!
//! Owns: the open file. Never waits for a reader: a full FIFO loses the line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::log::Stamp;

pub struct Journal {
    fifo: Option<File>,
    /// Opened at the first line: most shims never have anything to say.
    path: PathBuf,
    debug: bool,
    origin: String,
}

impl Journal {
    pub fn open(bundle: &Path, id: &str, namespace: &str, debug: bool) -> Journal {
        // Both ends, so that a reader that goes away is no SIGPIPE and none is waited for.
        let fifo = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32)
            .open(bundle.join("log"))
            .ok()
            .filter(|f| f.metadata().is_ok_and(|m| m.file_type().is_fifo()));
        Journal {
            fifo,
            path: bundle.join("shim.log"),
            debug,
            origin: format!("id={id} namespace={namespace}"),
        }
    }

    fn line(&mut self, level: &str, message: &str) {
        let line = format!(
            "time=\"{}\" level={level} msg={message:?} runtime=io.containerd.coracle.v2 {}\n",
            Stamp::now().text(),
            self.origin
        );
        if let Some(fifo) = &mut self.fifo {
            // Nobody reads: the line is lost, the supervision is not.
            let _ = fifo.write(line.as_bytes());
            return;
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path);
        if let Ok(mut file) = file {
            let _ = file.write(line.as_bytes());
        }
    }

    /// Where somebody reads along, or wants to know it all: no file is made for it.
    pub fn info(&mut self, message: &str) {
        if self.fifo.is_some() || self.debug {
            self.line("info", message);
        }
    }

    pub fn warn(&mut self, message: &str) {
        self.line("warning", message);
    }

    pub fn debug(&mut self, message: &str) {
        if self.debug {
            self.line("debug", message);
        }
    }
}
