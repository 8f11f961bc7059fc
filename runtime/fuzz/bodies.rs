//! What each fuzz target does with its input. Shared with `runtime/tests/fuzz_regressions.rs`, which
//! feeds them what once went wrong.
//!
//! None of them touches a file or a process: they are the pure half of the runtime.
#![allow(dead_code)]

use std::path::Path;

use coracle::cgroup::{CgroupMode, PlanOptions};
use coracle::host::HostFacts;
use coracle::plan::{Input, LaunchOptions, Plan};
use coracle::seccomp::{self, Abi};
use coracle::spec::CheckedSpec;
use coracle_oci::ContainerId;
use coracle_oci::record::{CgroupRecord, ContainerRecord, IntentRecord};
use coracle_oci::spec::LinuxSeccomp;
use coracle_oci::state::{State, StateReport, Status};

/// The longest program that the kernel takes (BPF_MAXINSNS).
const MAX_PROGRAM: usize = 4096;

/// config.json to Plan and to the cgroup's plan, as root and as nobody.
pub fn config(data: &[u8]) {
    for euid in [0, 65534] {
        let host = HostFacts {
            cgroup: CgroupMode::V2 {
                mountpoint: "/sys/fs/cgroup".into(),
                own: "/".into(),
            },
            euid,
            egid: euid,
            apparmor: true,
            selinux: false,
            in_user_namespace: euid != 0,
            setgroups: euid == 0,
        };
        let Ok(spec) = CheckedSpec::check(data, &host) else {
            continue;
        };
        let id = ContainerId::parse("fuzz").expect("a valid id");
        let options = PlanOptions {
            rootless: euid != 0,
        };
        let _ = coracle::cgroup::plan(spec.spec(), &id, &host.cgroup, options);
        let _ = Plan::new(Input {
            id: &id,
            bundle: Path::new("/bundle"),
            spec: &spec,
            host: &host,
            cgroup: &CgroupRecord::None,
            options: &LaunchOptions::default(),
        });
    }
}

/// A seccomp profile to a program that the kernel would take: forward jumps inside it, a verdict
/// at its end.
pub fn seccomp(data: &[u8]) {
    let Ok(profile) = serde_json::from_slice::<LinuxSeccomp>(data) else {
        return;
    };
    for native in [Abi::X86_64, Abi::Aarch64] {
        let Ok(compiled) = seccomp::compile(&profile, native) else {
            continue;
        };
        let program = &compiled.program;
        assert!(!program.is_empty() && program.len() <= MAX_PROGRAM);
        for (at, step) in program.iter().enumerate() {
            let left = program.len() - at - 1;
            // <linux/bpf_common.h>: BPF_JMP with BPF_JA, then the conditional ones.
            match step.code {
                0x05 => assert!((step.k as usize) < left, "jump at {at}"),
                code if code & 0x07 == 0x05 => assert!(
                    usize::from(step.jt) < left && usize::from(step.jf) < left,
                    "jump at {at}"
                ),
                _ => {}
            }
        }
        let last = program.last().expect("it is not empty");
        assert_eq!(last.code, 0x06, "the program does not end in a verdict");
    }
}

/// A container's /etc/passwd: what becomes HOME is one clean line.
pub fn passwd(data: &[u8]) {
    for uid in [0, 1000, u32::MAX] {
        if let Some(home) = coracle::init::program::home_in(data, uid) {
            assert!(!home.is_empty() && home.iter().all(|byte| *byte >= b' '));
        }
    }
}

/// What `list`, `state` and `delete` read back from the state root.
pub fn record(data: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<ContainerRecord>(data) {
        for status in [Status::Created, Status::Stopped] {
            let _ = serde_json::to_vec(&State::new(&record, status)).expect("a state is JSON");
            let _ =
                serde_json::to_vec(&StateReport::new(&record, status)).expect("a state is JSON");
        }
        let text = serde_json::to_vec(&record).expect("a record is JSON");
        let again: ContainerRecord = serde_json::from_slice(&text).expect("it reads back");
        assert_eq!(serde_json::to_vec(&again).ok(), Some(text));
    }
    let _ = serde_json::from_slice::<IntentRecord>(data);
}
