//! What the runtime knows about its containers between two commands.
//!
//! ```text
//! <root>/                 0700
//!   <id>/                 0700
//!     lock                held by create, start, delete, update while they change something
//!     intent.json         what create is about to do; stays beside state.json
//!     state.json          the ContainerRecord, replaced atomically
//!     config.json         the bundle's config as it was at create, for exec and update
//!     exec.fifo           there until start: tells created from running
//! ```
//!
//! Both records carry a checksum (`seal`): one changed byte in a cgroup's path would make `delete`
//! kill another container. The files are hints; whether a container runs is asked of the kernel (`status`). What may be
//! done in which status is one pure function (`transition`).

mod container;
mod seal;
mod status;
mod store;
pub mod transition;

pub use container::{Container, open_process, parse_id, wait_exit};
pub use coracle_oci::state::Status;
pub use status::{is_alive, process_start_time, status};
pub use store::{Begun, EXEC_FIFO, Entry, Intent, Lock, Store};
pub use transition::{Decision, Reason, Request, decide};
