//! The runtime's one error type: what kind, which operation, on what, and why.
//!
//! `Display` prints this link only; `{:#}` prints the whole chain joined by ": ". `main` is the
//! only place that prints an error.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn StdError + Send + Sync + 'static>;

/// What callers may match on. Everything else about an error is text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A command line or a config.json that cannot be right.
    Invalid,
    /// A request that is right but that this build or this host cannot serve.
    Unsupported,
    /// The container, or a named thing, does not exist.
    NotFound,
    /// The container exists already.
    Exists,
    /// The container's status does not allow the request.
    State,
    /// The container's program could not be executed.
    Exec,
    /// A hook failed or timed out.
    Hook,
    /// The kernel or the file system refused.
    System,
    /// A promise inside the runtime was broken.
    Internal,
}

/// One link of an error chain.
pub struct Error {
    kind: Kind,
    operation: Cow<'static, str>,
    subject: String,
    source: Option<Source>,
}

impl Error {
    /// `operation` is lower case without a full stop; `subject` is the path, id or field it was
    /// about and may be empty.
    pub fn new(
        kind: Kind,
        operation: impl Into<Cow<'static, str>>,
        subject: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            operation: operation.into(),
            subject: subject.into(),
            source: None,
        }
    }

    /// A failed system call or file operation: the operation names the call and its arguments.
    pub fn system(
        operation: impl Into<Cow<'static, str>>,
        subject: impl Into<String>,
        source: impl Into<Source>,
    ) -> Self {
        Self::new(Kind::System, operation, subject).source(source)
    }

    pub fn invalid(operation: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Invalid, operation, "")
    }

    pub fn unsupported(operation: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Unsupported, operation, "")
    }

    #[must_use]
    pub fn source(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Puts an outer link around this error, keeping its kind.
    #[must_use]
    pub fn context(self, operation: impl Into<Cow<'static, str>>) -> Self {
        let kind = self.kind;
        Self::new(kind, operation, "").source(self)
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The first OS error number in the chain.
    pub fn errno(&self) -> Option<i32> {
        let mut next: Option<&(dyn StdError + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                return io.raw_os_error();
            }
            if let Some(errno) = error.downcast_ref::<rustix::io::Errno>() {
                return Some(errno.raw_os_error());
            }
            if let Some(errno) = error.downcast_ref::<nix::errno::Errno>() {
                return Some(*errno as i32);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.operation)?;
        if !self.subject.is_empty() {
            if !self.operation.is_empty() {
                f.write_str(" ")?;
            }
            f.write_str(&self.subject)?;
        }
        if f.alternate() {
            // A link without text of its own only gives its source a kind.
            let mut separator = if self.operation.is_empty() && self.subject.is_empty() {
                ""
            } else {
                ": "
            };
            let mut next = StdError::source(self);
            while let Some(error) = next {
                match error.downcast_ref::<Error>() {
                    Some(own) => write!(f, "{separator}{own}")?,
                    None => write!(f, "{separator}{}", plain(error))?,
                }
                separator = ": ";
                next = error.source();
            }
        }
        Ok(())
    }
}

/// An OS error's text without Rust's "(os error N)" and in lower case, as engines match it.
fn plain(error: &(dyn StdError + 'static)) -> String {
    let number = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::raw_os_error)
        .or_else(|| {
            error
                .downcast_ref::<rustix::io::Errno>()
                .map(|e| e.raw_os_error())
        })
        .or_else(|| error.downcast_ref::<nix::errno::Errno>().map(|e| *e as i32));
    match number {
        Some(number) => errno_text(number),
        None => error.to_string(),
    }
}

/// "no such file or directory" for ENOENT and so on, in Go's and therefore runc's spelling.
pub fn errno_text(number: i32) -> String {
    nix::errno::Errno::from_raw(number).desc().to_lowercase()
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self:#}", self.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternate_display_joins_the_chain() {
        let io = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = Error::system("open(O_PATH)", "/a/b", io).context("create container");
        assert_eq!(error.to_string(), "create container");
        assert_eq!(
            format!("{error:#}"),
            "create container: open(O_PATH) /a/b: no such file or directory"
        );
        assert_eq!(error.errno(), Some(libc::ENOENT));
        assert_eq!(error.kind(), Kind::System);
    }
}
