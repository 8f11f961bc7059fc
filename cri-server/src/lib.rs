//! cri-server
pub mod netns;
pub mod network;
pub mod proto;
pub mod streaming;
