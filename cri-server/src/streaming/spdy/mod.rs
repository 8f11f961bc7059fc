//! SPDY/3.1, as much of it as crictl, critest and the kubelet speak.
//!
//! `frame` and `headers` are pure: bytes to frames and back. `connection` owns the socket and two
//! tasks, the reading one in `reader`, and gives out streams. There is no flow control in this
//! dialect (the clients send no WINDOW_UPDATE and heed none): a stream that is not drained stops
//! the reading of the socket.

pub mod connection;
pub mod frame;
pub mod headers;
mod reader;
