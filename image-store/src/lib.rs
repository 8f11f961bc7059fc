//! Pulls, verifies, unpacks and keeps OCI images, and makes overlayfs snapshots of them.
//!
//! On disk, under the root (mode 0700):
//! ```text
//! VERSION  lock
//! staging/<n>/            layers and snapshots being made; emptied at open
//! layers/<key>/{fs/,layer.json}
//! images/<id>.json        the only commit point of an image
//! snapshots/<key>/{snapshot.json,upper/,work/}
//! gc/<n>/                 renamed away, deleted in the background
//! ```
//! Code, in the order data flows: `reference` and `digest` parse names; `pull` drives one pull;
//! `registry` fetches; `layer` gets layers into staging, `unpack` turns their streams into
//! directories; `commit` makes them an image; `content` keeps records; `snapshot` makes container
//! file systems; `gc` deletes; `lock` keeps a second daemon out; `store` is the public face.
#![forbid(unsafe_code)]

mod api;
mod commit;
mod content;
mod digest;
mod error;
mod gc;
mod layer;
mod lock;
mod pull;
mod reference;
mod registry;
mod snapshot;
mod store;
mod unpack;

pub use api::{
    Auth, FsInfo, Image, ImageConfig, LayerInfo, PullRequest, PullTimes, Snapshot, StoreConfig,
    Usage,
};
pub use digest::{Algorithm, Digest, ImageId};
pub use error::{Error, ErrorKind, Result};
pub use store::ImageStore;
