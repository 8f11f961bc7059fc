//! One port-forward session: pairs of an error and a data stream, each a connection to a port in
//! the sandbox's network namespace.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::exec::close;
use super::spdy::connection::{Connection, Incoming, Outgoing, Stream};
use super::spdy::frame::Reset;
use super::{Backend, PortForwardSession, SessionError, StreamingConfig};

const CONNECT: Duration = Duration::from_secs(10);
const READ: usize = 32 * 1024;

/// The first stream of a pair, until the second comes.
struct Half {
    stream: Stream,
    kind: Kind,
    port: u16,
    since: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Error,
    Data,
}

struct Pair {
    port: u16,
    error: Outgoing,
    incoming: Incoming,
    outgoing: Outgoing,
}

pub(super) async fn serve<B: Backend>(
    backend: B,
    request: PortForwardSession,
    mut connection: Connection,
    config: &StreamingConfig,
) {
    let mut ended = Box::pin(connection.ended(config.idle_timeout));
    let mut waiting: HashMap<String, Half> = HashMap::new();
    // Dropped with the session, and all forwarding with it.
    let mut forwarding = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.next() => stream,
            Some(_) = forwarding.join_next() => continue,
            () = tokio::time::sleep(config.stream_creation_timeout), if !waiting.is_empty() => {
                expire(&mut waiting, config.stream_creation_timeout).await;
                continue;
            }
            () = &mut ended => break,
        };
        let Some(stream) = stream else { break };
        expire(&mut waiting, config.stream_creation_timeout).await;
        if let Some(pair) = pair_up(stream, &mut waiting).await {
            let (backend, id) = (backend.clone(), request.sandbox_id.clone());
            forwarding.spawn(async move { forward(&backend, &id, pair).await });
        }
    }
    drop((forwarding, waiting));
    close(connection).await;
}

/// Breaks off streams whose other half does not come.
async fn expire(waiting: &mut HashMap<String, Half>, patience: Duration) {
    let late = |half: &Half| half.since.elapsed() >= patience;
    let ids: Vec<_> = waiting
        .iter()
        .filter(|(_, half)| late(half))
        .map(|(id, _)| id.clone())
        .collect();
    for id in ids {
        if let Some(half) = waiting.remove(&id) {
            half.stream.outgoing.reset(Reset::Cancel).await;
        }
    }
}

/// The pair that this stream completes.
async fn pair_up(stream: Stream, waiting: &mut HashMap<String, Half>) -> Option<Pair> {
    let described = describe(&stream);
    let Some((kind, port, id)) = described else {
        stream.outgoing.reset(Reset::ProtocolError).await;
        return None;
    };
    let new = Half {
        stream,
        kind,
        port,
        since: Instant::now(),
    };
    match waiting.remove(&id) {
        None => {
            waiting.insert(id, new);
            None
        }
        Some(old) if old.kind != new.kind && old.port == new.port => {
            let (error, data) = if old.kind == Kind::Error {
                (old, new)
            } else {
                (new, old)
            };
            Some(Pair {
                port,
                error: error.stream.outgoing,
                incoming: data.stream.incoming,
                outgoing: data.stream.outgoing,
            })
        }
        Some(old) => {
            old.stream.outgoing.reset(Reset::ProtocolError).await;
            new.stream.outgoing.reset(Reset::ProtocolError).await;
            None
        }
    }
}

/// A stream's kind, port and pair.
fn describe(stream: &Stream) -> Option<(Kind, u16, String)> {
    let kind = match stream.headers.value("streamtype")? {
        "error" => Kind::Error,
        "data" => Kind::Data,
        _ => return None,
    };
    let port = stream
        .headers
        .value("port")?
        .parse()
        .ok()
        .filter(|port| *port != 0)?;
    let id = match stream.headers.value("requestid") {
        Some(id) => id.to_owned(),
        // Clients older than the header open the error stream, then the data stream.
        None if kind == Kind::Error => format!("stream {}", stream.id),
        None => format!("stream {}", stream.id.checked_sub(2)?),
    };
    Some((kind, port, id))
}

async fn forward<B: Backend>(backend: &B, sandbox_id: &str, pair: Pair) {
    let Pair {
        port,
        mut error,
        incoming,
        outgoing,
    } = pair;
    match connect(backend, sandbox_id, port).await {
        Ok(socket) => {
            copy(socket, incoming, outgoing).await;
            error.finish().await;
        }
        Err(reason) => {
            let text =
                format!("an error occurred forwarding port {port} -> {sandbox_id}: {reason}");
            let _ = error.send(Bytes::from(text)).await;
            error.finish().await;
            outgoing.finish().await;
        }
    }
}

async fn connect<B: Backend>(
    backend: &B,
    sandbox_id: &str,
    port: u16,
) -> Result<TcpStream, SessionError> {
    let netns = backend.port_forward_netns(sandbox_id)?;
    let mut failures = Vec::new();
    for ip in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        let address = SocketAddr::new(ip, port);
        match connect_to(netns.as_deref(), address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => failures.push(format!("dial {address}: {error}")),
        }
    }
    Err(SessionError::new(failures.join("; ")))
}

async fn connect_to(netns: Option<&Path>, address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = match netns {
        None => new_socket(family)?,
        Some(path) => socket_in(File::open(path)?, family).await?,
    };
    let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
    let connected = tokio::time::timeout(CONNECT, socket.connect(address)).await;
    let socket = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let _ = socket.set_nodelay(true);
    Ok(socket)
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

/// A socket of another network namespace: it stays in the one that it was made in. The thread that
/// makes it is its own, and ends: no thread of the runtime ever changes its namespace.
pub(super) async fn socket_in(netns: File, family: AddressFamily) -> io::Result<OwnedFd> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("port-forward".to_owned())
        .spawn(move || {
            let entered =
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network));
            let socket = entered
                .map_err(io::Error::from)
                .and_then(|()| new_socket(family));
            // The session may have ended meanwhile.
            let _ = sender.send(socket);
        })?;
    receiver
        .await
        .unwrap_or_else(|_| Err(io::Error::other("port-forward thread died")))
}

/// Copies both ways, each to its end; a side that breaks off ends both.
async fn copy(socket: TcpStream, incoming: Incoming, outgoing: Outgoing) {
    let (read, write) = socket.into_split();
    let to_port = to_port(incoming, write);
    let to_client = to_client(read, outgoing);
    tokio::pin!(to_port, to_client);
    tokio::select! {
        ended = &mut to_port => if ended.is_ok() {
            let _ = to_client.await;
        },
        ended = &mut to_client => if ended.is_ok() {
            let _ = to_port.await;
        },
    }
}

async fn to_port(mut incoming: Incoming, mut socket: OwnedWriteHalf) -> io::Result<()> {
    while let Some(piece) = incoming.next().await {
        socket.write_all(&piece).await?;
    }
    socket.shutdown().await
}

async fn to_client(mut socket: OwnedReadHalf, mut outgoing: Outgoing) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ);
        let count = tokio::select! {
            count = socket.read_buf(&mut buffer) => count,
            () = outgoing.closed() => return Err(io::ErrorKind::ConnectionAborted.into()),
        };
        match count {
            Ok(0) => break,
            Ok(_) => {
                let sent = outgoing.send(buffer.split().freeze()).await;
                sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))?;
            }
            Err(error) => {
                outgoing.reset(Reset::InternalError).await;
                return Err(error);
            }
        }
    }
    outgoing.finish().await;
    Ok(())
}
