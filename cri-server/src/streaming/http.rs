//! The HTTP side: from a request for a URL that we gave out to a SPDY connection.
//!
//! A token is spent only by a request that can be served; one that asks for another protocol may
//! come again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::spdy::connection::Connection;
use super::status::Protocol;
use super::token::Tokens;
use super::{Backend, Request, StreamingConfig, attach, exec, portforward};

/// Connections served at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 2000;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADER: usize = 16 * 1024;
/// exec and attach have five streams; a closed one may linger until the client says so too.
const SESSION_STREAMS: usize = 16;
/// Two for each forwarded connection.
const FORWARD_STREAMS: usize = 512;

const SPDY: &str = "SPDY/3.1";
const PORT_FORWARD_PROTOCOL: &str = "portforward.k8s.io";
const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

pub(super) struct Server<B> {
    pub tokens: Arc<Tokens<Request>>,
    pub backend: B,
    pub config: StreamingConfig,
}

type Answer = Response<Full<Bytes>>;

pub(super) async fn listen<B: Backend>(listener: TcpListener, server: Server<B>) {
    let server = Arc::new(server);
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((socket, _)) => {
                tokio::spawn(http(socket, server.clone(), Arc::new(permit)));
            }
            Err(error) => {
                // Out of fds, most likely: others will be closed.
                tracing::warn!(%error, "streaming server cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn http<B: Backend>(
    socket: TcpStream,
    server: Arc<Server<B>>,
    permit: Arc<OwnedSemaphorePermit>,
) {
    let _ = socket.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
    let service = service_fn(move |request| {
        let (server, permit) = (server.clone(), permit.clone());
        async move { Ok::<_, Infallible>(answer(request, server, permit)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "streaming request not served");
    }
}

/// What a path names; its name in `Request`.
fn fits(kind: &str, request: &Request) -> bool {
    match request {
        Request::Exec(_) => kind == "exec",
        Request::Attach(_) => kind == "attach",
        Request::PortForward(_) => kind == "portforward",
    }
}

fn answer<B: Backend>(
    mut request: hyper::Request<Incoming>,
    server: Arc<Server<B>>,
    permit: Arc<OwnedSemaphorePermit>,
) -> Answer {
    let path = request.uri().path().to_owned();
    let Some((kind, token)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
        return refuse(StatusCode::NOT_FOUND, "no such path");
    };
    let not_found = || {
        refuse(
            StatusCode::NOT_FOUND,
            "no such session, or its url has been used",
        )
    };
    if !server
        .tokens
        .is_good(token, Instant::now(), |request| fits(kind, request))
    {
        return not_found();
    }
    if !matches!(*request.method(), Method::GET | Method::POST) {
        let mut answer = refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and POST are served",
        );
        answer
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, POST"));
        return answer;
    }
    if let Err(answer) = check_upgrade(request.headers()) {
        return *answer;
    }
    let protocol = match negotiate(kind, request.headers()) {
        Ok(protocol) => protocol,
        Err(answer) => return *answer,
    };
    let Some(wanted) = server.tokens.take(token, Instant::now()) else {
        return not_found();
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let session_protocol = protocol
        .as_deref()
        .and_then(Protocol::parse)
        .unwrap_or(Protocol::V1);
    tokio::spawn(async move {
        let socket = match upgrade
            .await
            .map(|upgraded| upgraded.downcast::<TokioIo<TcpStream>>())
        {
            Ok(Ok(parts)) => parts,
            _ => return tracing::debug!("streaming client went before the upgrade"),
        };
        let (early, socket) = (socket.read_buf, socket.io.into_inner());
        session(server, wanted, session_protocol, &early, socket).await;
        drop(permit);
    });
    switch(protocol)
}

async fn session<B: Backend>(
    server: Arc<Server<B>>,
    wanted: Request,
    protocol: Protocol,
    early: &[u8],
    socket: TcpStream,
) {
    let (backend, config) = (server.backend.clone(), &server.config);
    let spdy = |streams| Connection::serve(socket, early, streams);
    match wanted {
        Request::Exec(request) => {
            exec::serve(backend, request, protocol, spdy(SESSION_STREAMS), config).await;
        }
        Request::Attach(request) => {
            attach::serve(backend, request, protocol, spdy(SESSION_STREAMS), config).await;
        }
        Request::PortForward(request) => {
            portforward::serve(backend, request, spdy(FORWARD_STREAMS), config).await;
        }
    }
}

fn check_upgrade(headers: &HeaderMap) -> Result<(), Box<Answer>> {
    let has = |name: HeaderName, wanted: &str| {
        values(headers, &name).any(|value| value.eq_ignore_ascii_case(wanted))
    };
    if has(UPGRADE, "websocket") {
        return Err(Box::new(refuse(
            StatusCode::NOT_IMPLEMENTED,
            "websocket is not supported by this version of coracled, use SPDY/3.1",
        )));
    }
    if !has(CONNECTION, "upgrade") || !has(UPGRADE, SPDY) {
        return Err(Box::new(refuse(
            StatusCode::BAD_REQUEST,
            "unable to upgrade: missing upgrade headers, want Upgrade: SPDY/3.1",
        )));
    }
    Ok(())
}

/// The first of the client's protocols that we speak; None if it named none.
fn negotiate(kind: &str, headers: &HeaderMap) -> Result<Option<String>, Box<Answer>> {
    let spoken: &[&str] = if kind == "portforward" {
        &[PORT_FORWARD_PROTOCOL]
    } else {
        &Protocol::NAMES
    };
    let asked: Vec<&str> = values(headers, &PROTOCOL).collect();
    if asked.is_empty() {
        return Ok(None);
    }
    if let Some(protocol) = asked.iter().find(|protocol| spoken.contains(protocol)) {
        return Ok(Some((*protocol).to_owned()));
    }
    let text = format!(
        "unable to upgrade: unable to negotiate protocol: client supports {asked:?}, \
         server accepts {spoken:?}"
    );
    let mut answer = refuse(StatusCode::FORBIDDEN, &text);
    for protocol in spoken {
        answer
            .headers_mut()
            .append(ACCEPTED, HeaderValue::from_static(protocol));
    }
    Err(Box::new(answer))
}

/// The values of a header that may be given as a list, several times, or both.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

fn refuse(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::from(format!("{text}\n")));
    *answer.status_mut() = status;
    answer
}

fn switch(protocol: Option<String>) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
    if let Some(protocol) = protocol.and_then(|protocol| HeaderValue::from_str(&protocol).ok()) {
        headers.insert(PROTOCOL, protocol);
    }
    answer
}
