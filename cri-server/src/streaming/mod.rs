//! The streaming server: the far end of the URLs that Exec, Attach and PortForward answer with.
//!
//! ```text
//! Exec RPC --exec_url--> token --> URL --> client --HTTP upgrade--> http --> spdy::connection
//!                                                                              |
//!        Backend <--SessionIo (pipes), TerminalSize-- exec | attach | portforward
//! ```
//!
//! It knows neither containers nor shims: `Backend` runs processes on the pipes it is given. Every
//! session is one task that ends when the process or the client does. WebSocket is refused.

mod attach;
mod exec;
mod http;
mod portforward;
mod session;
mod spdy;
mod status;
mod token;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::mpsc;

use token::{TokenError, Tokens};

/// Where the server listens and how patient it is.
#[derive(Debug, Clone)]
pub struct StreamingConfig {
    pub listen: SocketAddr,
    /// How long the client may take to open its streams.
    pub stream_creation_timeout: Duration,
    /// A session in which nothing moves for so long is ended.
    pub idle_timeout: Duration,
}

impl StreamingConfig {
    /// The field's customary patience: 30 seconds and 4 hours.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            stream_creation_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(4 * 3600),
        }
    }
}

impl Default for StreamingConfig {
    fn default() -> Self {
        Self::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

/// What an Exec call asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSession {
    pub container_id: String,
    pub cmd: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// What an Attach call asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachSession {
    pub container_id: String,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// What a PortForward call asked for; the client names the ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardSession {
    pub sandbox_id: String,
}

#[derive(Debug)]
enum Request {
    Exec(ExecSession),
    Attach(AttachSession),
    PortForward(PortForwardSession),
}

/// The process's ends of the session's pipes; those not asked for are None.
#[derive(Debug)]
pub struct SessionIo {
    /// To read from. At its end the client has finished, or gone.
    pub stdin: Option<OwnedFd>,
    /// To write to. Writes fail with EPIPE once the client has gone.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// Why a session could not do what was asked; the client reads the text.
#[derive(Debug)]
pub struct SessionError(String);

impl SessionError {
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SessionError {}

/// Who runs the processes and knows the sandboxes.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Runs the process on `io` and returns its exit code. The session waits for it even when the
    /// client has gone: the process then finds its pipes closed.
    fn exec(
        &self,
        session: ExecSession,
        io: SessionIo,
        resize: mpsc::Receiver<TerminalSize>,
    ) -> impl Future<Output = Result<i32, SessionError>> + Send;

    /// Joins `io` to the container's main process until that ends. Dropped when the client goes.
    fn attach(
        &self,
        session: AttachSession,
        io: SessionIo,
        resize: mpsc::Receiver<TerminalSize>,
    ) -> impl Future<Output = Result<(), SessionError>> + Send;

    /// The sandbox's network namespace; None is the host's.
    fn port_forward_netns(&self, sandbox_id: &str) -> Result<Option<PathBuf>, SessionError>;
}

#[derive(Debug)]
pub enum StreamingError {
    /// The call's fields do not fit together.
    Invalid(&'static str),
    /// Too many URLs are out that nobody has come for.
    TooManyPending,
    Io {
        operation: &'static str,
        subject: String,
        source: io::Error,
    },
}

impl fmt::Display for StreamingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) => f.write_str(reason),
            Self::TooManyPending => {
                f.write_str("maximum number of in-flight streaming requests exceeded")
            }
            Self::Io {
                operation,
                subject,
                source,
            } => {
                write!(f, "{operation} {subject}: {source}")
            }
        }
    }
}

impl std::error::Error for StreamingError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// The running server. It stops listening when the last clone goes; sessions go on.
#[derive(Clone)]
pub struct StreamingServer {
    tokens: Arc<Tokens<Request>>,
    address: SocketAddr,
    _listening: Arc<StopOnDrop>,
}

struct StopOnDrop(tokio::task::AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl StreamingServer {
    pub async fn start<B: Backend>(
        config: StreamingConfig,
        backend: B,
    ) -> Result<Self, StreamingError> {
        let failed = |operation| {
            let subject = config.listen.to_string();
            move |source| StreamingError::Io {
                operation,
                subject,
                source,
            }
        };
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(failed("listen on"))?;
        let address = listener
            .local_addr()
            .map_err(failed("read the address of"))?;
        let tokens = Arc::new(Tokens::new());
        let server = http::Server {
            tokens: tokens.clone(),
            backend,
            config,
        };
        let listening = tokio::spawn(http::listen(listener, server)).abort_handle();
        Ok(Self {
            tokens,
            address,
            _listening: Arc::new(StopOnDrop(listening)),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn exec_url(&self, session: ExecSession) -> Result<String, StreamingError> {
        check_streams(session.tty, [session.stdin, session.stdout, session.stderr])?;
        if session.cmd.is_empty() {
            return Err(StreamingError::Invalid("cmd is empty"));
        }
        self.url("exec", Request::Exec(session))
    }

    pub fn attach_url(&self, session: AttachSession) -> Result<String, StreamingError> {
        check_streams(session.tty, [session.stdin, session.stdout, session.stderr])?;
        self.url("attach", Request::Attach(session))
    }

    pub fn portforward_url(&self, session: PortForwardSession) -> Result<String, StreamingError> {
        self.url("portforward", Request::PortForward(session))
    }

    fn url(&self, path: &str, request: Request) -> Result<String, StreamingError> {
        match self.tokens.issue(request, Instant::now()) {
            Ok(token) => Ok(format!("http://{}/{path}/{token}", self.address)),
            Err(TokenError::TooMany) => Err(StreamingError::TooManyPending),
            Err(TokenError::Random(errno)) => Err(StreamingError::Io {
                operation: "getrandom",
                subject: "for a token".to_owned(),
                source: errno.into(),
            }),
        }
    }
}

/// The CRI's rules for Exec and Attach.
fn check_streams(tty: bool, [stdin, stdout, stderr]: [bool; 3]) -> Result<(), StreamingError> {
    if tty && stderr {
        return Err(StreamingError::Invalid(
            "tty and stderr cannot both be true",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(StreamingError::Invalid(
            "one of stdin, stdout, or stderr must be set",
        ));
    }
    Ok(())
}
