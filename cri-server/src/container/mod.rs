//! Owns containers: what is known of one ([`Container`]), and one file for each thing that can be
//! done with it.

pub mod attach;
pub mod config;
pub mod create;
pub mod exec;
pub mod logs;
pub mod remove;
pub mod start;
pub mod state;
pub mod stats;
pub mod stop;
pub mod update;
pub mod watch;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch as channel;

use crate::error::Result;
use crate::id::{ContainerId, SandboxId};
use crate::spec_builder::document::User;
use crate::store::records::{Records, Table};
use config::{ContainerConfig, Resources};
use state::ContainerState;

/// What never changes in the life of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fixed {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox_id: SandboxId,
    /// What was asked for.
    pub config: ContainerConfig,
    /// Id of the image.
    pub image_id: String,
    /// A digest reference of the image, or its id.
    pub image_ref: String,
    /// Who its first process runs as.
    pub user: User,
    /// The signal that stops it.
    pub stop_signal: i32,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The boot it belongs to.
    pub boot_id: String,
    /// Directory of config.json and the root file system.
    pub bundle: PathBuf,
    /// Directory of image volumes.
    pub volumes: PathBuf,
    /// The log file; none: output is dropped.
    pub log_path: Option<PathBuf>,
    /// Its cgroup.
    pub cgroups_path: String,
}

/// What does change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Live {
    /// Life cycle.
    pub state: ContainerState,
    /// Limits in force.
    pub resources: Option<Resources>,
}

/// The record on disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Constant part.
    pub fixed: Fixed,
    /// Changing part.
    pub live: Live,
}

/// One container.
pub struct Container {
    /// Constant part.
    pub fixed: Fixed,
    live: channel::Sender<Live>,
    saving: Mutex<()>,
    /// Serialises start, update and removal. Stop and reads never take it for long.
    pub step: tokio::sync::Mutex<()>,
    /// The last look at its cpu time, for a rate.
    pub cpu_sample: Mutex<Option<stats::CpuSample>>,
}

impl Container {
    /// A container in memory.
    pub fn new(record: ContainerRecord) -> Container {
        Container {
            fixed: record.fixed,
            live: channel::Sender::new(record.live),
            saving: Mutex::default(),
            step: tokio::sync::Mutex::default(),
            cpu_sample: Mutex::default(),
        }
    }

    /// The id as text.
    pub fn id(&self) -> &str {
        self.fixed.id.as_str()
    }

    /// A copy of the changing part.
    pub fn live(&self) -> Live {
        self.live.borrow().clone()
    }

    /// Life cycle.
    pub fn state(&self) -> ContainerState {
        self.live.borrow().state.clone()
    }

    /// Pid of the first process on the host, while it runs.
    pub fn pid(&self) -> Option<u32> {
        match self.live.borrow().state {
            ContainerState::Running { pid, .. } => Some(pid),
            _ => None,
        }
    }

    /// Changes the changing part and writes the record. The change holds in memory even if the
    /// disk refuses it: the kernel is the truth, records are hints for the next start.
    pub fn change(&self, records: &Records, change: impl FnOnce(&mut Live)) -> Result<()> {
        let _order = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        self.live.send_modify(change);
        let record = ContainerRecord {
            fixed: self.fixed.clone(),
            live: self.live(),
        };
        records.save(Table::Containers, self.id(), &record)
    }

    /// Returns when the container has no process (any more).
    pub async fn ended(&self) {
        let mut live = self.live.subscribe();
        let running = |state: &ContainerState| {
            matches!(
                state,
                ContainerState::Running { .. } | ContainerState::Starting
            )
        };
        // The sender lives as long as `self`.
        let _ = live.wait_for(|live| !running(&live.state)).await;
    }
}
