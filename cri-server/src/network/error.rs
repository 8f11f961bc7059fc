//! The error of the pod network: what was tried, on what, and why it failed.
//!
//! Owns the kinds that callers match on. Never logs.

use std::error::Error;
use std::fmt;

/// What a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkErrorKind {
    /// The configuration (ours or a CNI file) or the pod's request is wrong.
    Invalid,
    /// Something else already holds what was asked for: a port, an address, a subnet.
    Conflict,
    /// No address is left.
    Exhausted,
    /// The network cannot serve pods at present.
    NotReady,
    /// A CNI plugin failed.
    Plugin,
    /// A CNI plugin did not answer in time.
    Timeout,
    /// The kernel refused.
    Kernel,
    /// A file could not be read or written.
    Io,
}

/// Prints as `operation subject: cause`; the cause is part of the text, so that no caller loses it.
#[derive(Debug)]
pub struct NetworkError {
    kind: NetworkErrorKind,
    operation: &'static str,
    subject: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

pub type Result<T> = std::result::Result<T, NetworkError>;

impl NetworkError {
    pub fn new(
        kind: NetworkErrorKind,
        operation: &'static str,
        subject: impl Into<String>,
    ) -> Self {
        NetworkError {
            kind,
            operation,
            subject: subject.into(),
            cause: None,
        }
    }

    #[must_use]
    pub fn cause(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    pub fn kind(&self) -> NetworkErrorKind {
        self.kind
    }

    pub(crate) fn invalid(
        operation: &'static str,
        subject: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        NetworkError::new(NetworkErrorKind::Invalid, operation, subject).cause(why.into())
    }

    pub(crate) fn io(
        operation: &'static str,
        subject: impl fmt::Display,
        error: impl Into<std::io::Error>,
    ) -> Self {
        NetworkError::new(NetworkErrorKind::Io, operation, subject.to_string()).cause(error.into())
    }

    pub(crate) fn kernel(
        operation: &'static str,
        subject: impl fmt::Display,
        error: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        NetworkError::new(NetworkErrorKind::Kernel, operation, subject.to_string()).cause(error)
    }
}

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation)?;
        if !self.subject.is_empty() {
            write!(f, " {}", self.subject)?;
        }
        match &self.cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

impl Error for NetworkError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        // The cause itself is printed above; what lies beneath it is the chain.
        self.cause.as_ref().and_then(|cause| cause.source())
    }
}
