//! Owns the crate's one error type. Never logs and never decides what a caller should do beyond
//! naming the kind.
//!
//! `Display` prints the whole chain (operation, subject, cause) because the text ends up in one
//! gRPC status; `source()` is therefore empty, so that no printer repeats a cause.

use std::fmt;
use std::sync::Arc;

/// What went wrong, as far as a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The text is no image reference, image id or snapshot key.
    InvalidReference,
    /// The image, blob or snapshot does not exist where it was looked for.
    NotFound,
    /// The registry wants credentials, or refused the ones given.
    Unauthenticated,
    /// The registry knows the caller and refuses.
    PermissionDenied,
    /// The registry cannot be reached, or answers with server errors.
    RegistryUnavailable,
    /// Content that is not what its digest, size or media type promises.
    Corrupt,
    /// A signature policy refused the image.
    SignatureInvalid,
    /// The disk is full.
    NoSpace,
    /// Well-formed content that this store does not support.
    Unsupported,
    /// No progress for longer than the configured time.
    DeadlineExceeded,
    /// A system call failed.
    Io,
    /// A defect of this crate.
    Internal,
}

impl ErrorKind {
    /// The stable lower-case name used in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::InvalidReference => "invalid reference",
            ErrorKind::NotFound => "not found",
            ErrorKind::Unauthenticated => "unauthenticated",
            ErrorKind::PermissionDenied => "permission denied",
            ErrorKind::RegistryUnavailable => "registry unavailable",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::SignatureInvalid => "signature invalid",
            ErrorKind::NoSpace => "no space",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::DeadlineExceeded => "deadline exceeded",
            ErrorKind::Io => "i/o",
            ErrorKind::Internal => "internal",
        }
    }
}

type Source = Arc<dyn std::error::Error + Send + Sync + 'static>;

/// An error of the image store. Cheap to clone: joined pulls all get the same one.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    subject: String,
    source: Option<Source>,
}

/// What fallible operations of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(
        kind: ErrorKind,
        operation: &'static str,
        subject: impl Into<String>,
    ) -> Self {
        Error {
            kind,
            operation,
            subject: subject.into(),
            source: None,
        }
    }

    /// Adds the cause.
    pub(crate) fn because(
        mut self,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
    ) -> Self {
        self.source = Some(Arc::from(cause.into()));
        self
    }

    /// A failed system call. A full disk and an exhausted quota become `NoSpace`.
    pub(crate) fn io(
        operation: &'static str,
        subject: impl Into<String>,
        cause: impl Into<std::io::Error>,
    ) -> Self {
        let cause = cause.into();
        let kind = match cause.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::NoSpace
            }
            _ => ErrorKind::Io,
        };
        Error::new(kind, operation, subject).because(cause)
    }

    /// The same failure seen from one step further out.
    pub(crate) fn within(self, operation: &'static str, subject: impl Into<String>) -> Self {
        let kind = self.kind;
        Error::new(kind, operation, subject).because(self)
    }

    /// What went wrong, as far as a caller can act on it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation)?;
        if !self.subject.is_empty() {
            if !self.operation.is_empty() {
                f.write_str(" ")?;
            }
            f.write_str(&self.subject)?;
        }
        let Some(source) = &self.source else {
            return Ok(());
        };
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(source.as_ref());
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_chain_prints_each_cause_once() {
        let low = Error::io(
            "mkdir",
            "layers/x",
            std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()),
        );
        assert_eq!(low.kind(), ErrorKind::NoSpace);
        let high = low.within("pull image", "a/b:c");
        assert_eq!(high.kind(), ErrorKind::NoSpace);
        assert_eq!(
            high.to_string(),
            "pull image a/b:c: mkdir layers/x: No space left on device (os error 28)"
        );
        assert!(std::error::Error::source(&high).is_none());
    }
}
