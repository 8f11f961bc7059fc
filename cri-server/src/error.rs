//! Owns the crate's one error type and the only function that turns it into a gRPC status.
//! Never logs.

use std::fmt;
use std::io;
use std::sync::Arc;

use tonic::{Code, Status};

/// What a client can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong; the text names the field.
    InvalidArgument,
    /// The named thing does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The thing exists and is in a state that does not allow the request.
    FailedPrecondition,
    /// A well-formed request for something that is not supported; the text names the field.
    Unimplemented,
    /// Credentials are missing or refused.
    Unauthenticated,
    /// Credentials are known and not enough.
    PermissionDenied,
    /// A peer (registry, shim) cannot be reached now.
    Unavailable,
    /// Time ran out.
    DeadlineExceeded,
    /// A disk or a table is full.
    ResourceExhausted,
    /// A system call or a child process failed, or a defect of ours.
    Internal,
}

type Source = Arc<dyn std::error::Error + Send + Sync + 'static>;

/// Kind, operation, subject and source. Cheap to clone, because joined jobs all get the same one.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    operation: String,
    subject: String,
    source: Option<Source>,
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause: `operation` is the text, `subject` the id, path or field.
    pub fn new(kind: Kind, operation: impl Into<String>, subject: impl Into<String>) -> Self {
        Error {
            kind,
            operation: operation.into(),
            subject: subject.into(),
            source: None,
        }
    }

    /// A field of a request has a value that cannot be.
    pub fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Error::new(Kind::InvalidArgument, field, why)
    }

    /// A field of a request asks for something that is not supported.
    pub fn unsupported(field: impl Into<String>, why: impl Into<String>) -> Self {
        Error::new(Kind::Unimplemented, field, why)
    }

    /// No such sandbox, container or image.
    pub fn not_found(what: &str, id: &str) -> Self {
        Error::new(Kind::NotFound, format!("{what} {id:?}"), "not found")
    }

    /// The thing is in the wrong state.
    pub fn state(subject: impl Into<String>, why: impl Into<String>) -> Self {
        Error::new(Kind::FailedPrecondition, subject, why)
    }

    /// A failed system call; a full disk keeps its meaning.
    pub fn io(
        operation: impl Into<String>,
        subject: impl fmt::Display,
        cause: impl Into<io::Error>,
    ) -> Self {
        let cause = cause.into();
        let kind = match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
            _ => Kind::Internal,
        };
        Error::new(kind, operation, subject.to_string()).because(cause)
    }

    /// Adds the cause.
    pub fn because(
        mut self,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
    ) -> Self {
        self.source = Some(Arc::from(cause.into()));
        self
    }

    /// The same failure seen from one step further out.
    pub fn within(self, operation: impl Into<String>, subject: impl Into<String>) -> Self {
        Error::new(self.kind, operation, subject).because(self)
    }

    /// What a client can do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.operation)?;
        if !self.subject.is_empty() {
            write!(f, ": {}", self.subject)?;
        }
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

/// Display prints the whole chain, because it ends up in one gRPC status; so there is no
/// `source()` for a printer to repeat.
impl std::error::Error for Error {}

impl From<coracle_image_store::Error> for Error {
    fn from(error: coracle_image_store::Error) -> Self {
        use coracle_image_store::ErrorKind as Store;
        let kind = match error.kind() {
            Store::InvalidReference => Kind::InvalidArgument,
            Store::NotFound => Kind::NotFound,
            Store::Unauthenticated => Kind::Unauthenticated,
            Store::PermissionDenied => Kind::PermissionDenied,
            Store::RegistryUnavailable => Kind::Unavailable,
            Store::Unsupported => Kind::Unimplemented,
            Store::DeadlineExceeded => Kind::DeadlineExceeded,
            Store::NoSpace => Kind::ResourceExhausted,
            Store::Corrupt | Store::Io | Store::Internal => Kind::Internal,
            Store::SignatureInvalid => Kind::FailedPrecondition,
        };
        Error::new(kind, error.to_string(), "")
    }
}

/// The one place where an error becomes a gRPC status.
pub fn to_status(error: &Error) -> Status {
    let code = match error.kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Internal => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// Errors of several clean-up steps that were all tried.
#[derive(Debug, Default)]
pub struct Collected(Vec<Error>);

impl Collected {
    /// Keeps the error of a step, if it failed.
    pub fn push(&mut self, step: Result<()>) {
        if let Err(error) = step {
            self.0.push(error);
        }
    }

    /// All failures as one error, or success.
    pub fn finish(mut self, operation: &str, subject: &str) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        if self.0.len() == 1 {
            return Err(self.0.remove(0).within(operation, subject));
        }
        let kind = self.0[0].kind;
        let texts: Vec<String> = self.0.iter().map(Error::to_string).collect();
        Err(Error::new(kind, operation, subject).because(texts.join("; ")))
    }
}
