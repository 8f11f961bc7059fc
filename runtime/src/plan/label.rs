//! `linux.mountLabel`: the SELinux context of the filesystems that are made for a container. Pure.
//!
//! proc, sysfs and cgroup filesystems have the policy's own labels, bind mounts those of what they
//! show; all others get this one.

use std::ffi::{CStr, CString};

use coracle_oci::spec::Linux;

use super::{MountKind, c_string};
use crate::error::Result;

/// The label, if the config has one.
pub(super) fn of(linux: Option<&Linux>) -> Result<Option<CString>> {
    linux
        .and_then(|linux| linux.mount_label().as_ref())
        .filter(|label| !label.is_empty())
        .map(|label| c_string("linux.mountLabel", label.as_bytes()))
        .transpose()
}

/// Puts the label where the mount takes it.
pub(super) fn set(kind: &mut MountKind, label: &CStr) -> Result<()> {
    match kind {
        MountKind::Fs(source) if source.fstype == c"mqueue" => {
            source.root_label = Some(label.to_owned());
        }
        MountKind::Fs(source) if source.fstype == c"tmpfs" || source.fstype == c"devpts" => {
            let context = (c"context".to_owned(), Some(label.to_owned()));
            source.options.push(context);
        }
        MountKind::Legacy { flags, data, .. } if *flags & libc::MS_REMOUNT == 0 => {
            // Quoted: the categories of a label are separated by commas as well.
            let mut all = data.to_bytes().to_vec();
            if !all.is_empty() {
                all.push(b',');
            }
            all.extend_from_slice(b"context=\"");
            all.extend_from_slice(label.to_bytes());
            all.push(b'"');
            *data = c_string("linux.mountLabel", &all)?;
        }
        MountKind::CgroupV1 { label: slot, .. } => *slot = Some(label.to_owned()),
        MountKind::Fs(_)
        | MountKind::Legacy { .. }
        | MountKind::Bind(_)
        | MountKind::CgroupV2 { .. } => {}
    }
    Ok(())
}
