//! Files that hold a file system: a loop device is put before them, and the kernel takes it away
//! with the mount.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;

use crate::error::{Error, Result};

/// Another process may take the free device first: tried again this often.
const ATTEMPTS: u32 = 100;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loop {
    pub read_only: bool,
    pub direct_io: bool,
}

/// A device in use by us; the mount is its next user.
pub struct Attached {
    pub path: String,
    _device: File,
}

impl Loop {
    pub fn attach(&self, source: &Path) -> Result<Attached> {
        let failed =
            |e: std::io::Error| Error::io("loop device for", source.display().to_string(), e);
        let mut open = OpenOptions::new();
        open.read(true).write(!self.read_only);
        let file = open.open(source).map_err(failed)?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(failed)?;
        let options = coracle_sys::loopdev::Options {
            read_only: self.read_only,
            direct_io: self.direct_io,
        };
        let name = source.as_os_str().as_encoded_bytes();
        let mut attempt = 0;
        loop {
            let number = coracle_sys::loopdev::free(&control).map_err(failed)?;
            let path = format!("/dev/loop{number}");
            let result = open.open(&path).and_then(|device| {
                coracle_sys::loopdev::attach(&device, &file, name, options)?;
                Ok(device)
            });
            match result {
                Ok(device) => {
                    return Ok(Attached {
                        path,
                        _device: device,
                    });
                }
                Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                    attempt += 1;
                    if attempt == ATTEMPTS {
                        return Err(failed(e));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return Err(failed(e)),
            }
        }
    }
}
