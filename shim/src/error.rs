//! The shim's one error type. Its kind is what the wire shows as a gRPC code.
//!
//! Owns: kinds, and how an error reads. Never decides what to do about one.

use std::fmt;
use std::io;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Invalid,
    NotFound,
    AlreadyExists,
    Precondition,
    Unsupported,
    /// The runtime refused; the text is its own.
    Runtime,
    Internal,
    Unavailable,
}

impl Kind {
    /// Of an error that another process has told us.
    pub fn from_code(code: i32) -> Kind {
        let known = [
            Kind::Invalid,
            Kind::NotFound,
            Kind::AlreadyExists,
            Kind::Precondition,
            Kind::Unsupported,
            Kind::Runtime,
            Kind::Unavailable,
        ];
        let found = known.into_iter().find(|kind| kind.code() == code);
        found.unwrap_or(Kind::Internal)
    }

    /// The gRPC code: <https://grpc.io/docs/guides/status-codes/>.
    pub fn code(self) -> i32 {
        match self {
            Kind::Invalid => 3,
            Kind::NotFound => 5,
            Kind::AlreadyExists => 6,
            Kind::Precondition => 9,
            Kind::Unsupported => 12,
            Kind::Runtime => 2,
            Kind::Internal => 13,
            Kind::Unavailable => 14,
        }
    }
}

#[derive(Debug)]
pub struct Error {
    kind: Kind,
    operation: &'static str,
    subject: String,
    source: Option<String>,
}

impl Error {
    pub fn new(kind: Kind, operation: &'static str, subject: impl Into<String>) -> Self {
        Error {
            kind,
            operation,
            subject: subject.into(),
            source: None,
        }
    }

    /// The whole text of an error, as another process has told it.
    pub fn told(kind: Kind, text: String) -> Self {
        Error::new(kind, "", text)
    }

    /// A failed system call or file operation.
    pub fn io(
        operation: &'static str,
        subject: impl Into<String>,
        e: impl Into<io::Error>,
    ) -> Self {
        Error::new(Kind::Internal, operation, subject).source(e.into())
    }

    pub fn source(mut self, source: impl fmt::Display) -> Self {
        self.source = Some(source.to_string());
        self
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation)?;
        if !self.subject.is_empty() {
            let space = if self.operation.is_empty() { "" } else { " " };
            write!(f, "{space}{}", self.subject)?;
        }
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

pub fn not_found(what: &'static str, id: &str) -> Error {
    Error::new(Kind::NotFound, what, format!("{id}: not found"))
}
