//! ttrpc: frames of a 10-byte header and a protobuf body over a unix stream socket.
//!
//! `frame` is pure; `connection` is the server's side of one client; the client that forwards
//! events is in `crate::events`.

pub mod connection;
pub mod frame;
