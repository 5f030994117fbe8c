//! What can go wrong with the object store, and the one table from a backend's error to a class.

use std::error::Error;
use std::fmt;
use std::io::ErrorKind;
use std::time::Duration;

use espalier_core::error::ErrorClass;

use super::s3::Refusal;

/// The class of a failure: callers decide by it alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// There is no such object.
    NotFound,
    /// Credentials or file permissions do not allow it.
    Denied,
    /// No space or quota is left. Not retried here: space comes back in minutes, if at all.
    Full,
    /// The store did not answer, or failed in a way that may pass; it was tried for this long.
    Unavailable {
        /// Time spent, retries included.
        after: Duration,
    },
    /// The request can never work: a malformed path or URL, an object above the limit, a store without
    /// create-if-absent.
    Invalid,
}

impl StoreErrorKind {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Denied => "denied",
            Self::Full => "full",
            Self::Unavailable { .. } => "unavailable",
            Self::Invalid => "invalid",
        }
    }
}

/// A store operation that failed for good.
#[derive(Debug)]
pub struct StoreError {
    /// What was tried, such as `create`.
    pub operation: &'static str,
    /// On which object, prefix or URL.
    pub path: String,
    /// The class.
    pub kind: StoreErrorKind,
    /// The rule that was broken, or what to do about it, where that is known.
    pub rule: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// Whether the object is just not there.
    pub fn is_not_found(&self) -> bool {
        self.kind == StoreErrorKind::NotFound
    }

    /// What it means for the attempt that ran into it. A missing object is the caller's to judge; here it counts as
    /// a failure of what the attempt stands on.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Infra
    }

    pub(super) fn refused(
        operation: &'static str,
        path: impl Into<String>,
        rule: impl Into<String>,
    ) -> Self {
        Self {
            operation,
            path: path.into(),
            kind: StoreErrorKind::Invalid,
            rule: Some(rule.into()),
            source: None,
        }
    }

    pub(super) fn from_backend(
        operation: &'static str,
        path: &str,
        error: object_store::Error,
    ) -> Self {
        let (kind, rule) = classify(&error);
        Self {
            operation,
            path: path.to_owned(),
            kind,
            rule: rule.map(str::to_owned),
            source: Some(Box::new(error)),
        }
    }

    pub(super) fn from_source(
        operation: &'static str,
        path: &str,
        kind: StoreErrorKind,
        source: impl Error + Send + Sync + 'static,
    ) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            kind,
            rule: None,
            source: Some(Box::new(source)),
        }
    }

    /// The same with what to do about it, unless that is known already.
    pub(super) fn with_rule(mut self, rule: &str) -> Self {
        self.rule.get_or_insert_with(|| rule.to_owned());
        self
    }

    /// Fills in how long it was tried.
    pub(super) fn tried_for(mut self, spent: Duration) -> Self {
        if let StoreErrorKind::Unavailable { after } = &mut self.kind {
            *after = spent;
        }
        self
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "store: {} `{}`: ", self.operation, self.path)?;
        match (&self.rule, self.kind) {
            (Some(rule), _) => f.write_str(rule),
            (None, StoreErrorKind::NotFound) => f.write_str("not found"),
            (None, StoreErrorKind::Denied) => f.write_str("permission denied"),
            (None, StoreErrorKind::Full) => f.write_str("no space left"),
            (None, StoreErrorKind::Unavailable { after }) => {
                write!(f, "unavailable, tried for {:.1} s", after.as_secs_f64())
            }
            (None, StoreErrorKind::Invalid) => f.write_str("invalid request"),
        }
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Whether a create found an object.
pub(super) fn says_exists(error: &object_store::Error) -> bool {
    match Refusal::behind(error) {
        Some(refusal) => refusal.says_exists(),
        None => matches!(error, object_store::Error::AlreadyExists { .. }),
    }
}

/// Whether there is no such object.
pub(super) fn says_missing(error: &object_store::Error) -> bool {
    match Refusal::behind(error) {
        Some(refusal) => refusal.says_missing(),
        None => matches!(error, object_store::Error::NotFound { .. }),
    }
}

fn classify(error: &object_store::Error) -> (StoreErrorKind, Option<&'static str>) {
    use object_store::Error as Backend;
    if let Some(refusal) = Refusal::behind(error) {
        return refusal.meaning();
    }
    let kind = match error {
        Backend::NotFound { .. } => StoreErrorKind::NotFound,
        Backend::PermissionDenied { .. } | Backend::Unauthenticated { .. } => {
            StoreErrorKind::Denied
        }
        Backend::InvalidPath { .. }
        | Backend::NotSupported { .. }
        | Backend::NotImplemented { .. }
        | Backend::Precondition { .. }
        | Backend::NotModified { .. }
        | Backend::AlreadyExists { .. }
        | Backend::UnknownConfigurationKey { .. } => StoreErrorKind::Invalid,
        // The file backend wraps the operating system's errors; everything else may pass.
        other => classify_io(other),
    };
    (kind, None)
}

pub(super) fn classify_io(error: &(dyn Error + 'static)) -> StoreErrorKind {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                    StoreErrorKind::Full
                }
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    StoreErrorKind::Denied
                }
                ErrorKind::NotADirectory
                | ErrorKind::IsADirectory
                | ErrorKind::InvalidFilename
                | ErrorKind::InvalidInput => StoreErrorKind::Invalid,
                // Among them NotFound: a folder that somebody else's delete cleaned up between two steps.
                _ => transient(),
            };
        }
        cause = error.source();
    }
    transient()
}

pub(super) fn transient() -> StoreErrorKind {
    StoreErrorKind::Unavailable {
        after: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_operating_system_find_their_class() {
        for (kind, class) in [
            (ErrorKind::StorageFull, "full"),
            (ErrorKind::QuotaExceeded, "full"),
            (ErrorKind::PermissionDenied, "denied"),
            (ErrorKind::ReadOnlyFilesystem, "denied"),
            (ErrorKind::NotADirectory, "invalid"),
            (ErrorKind::Interrupted, "unavailable"),
        ] {
            let error = object_store::Error::Generic {
                store: "test",
                source: Box::new(std::io::Error::from(kind)),
            };
            let error = StoreError::from_backend("put", "a/b", error);
            assert_eq!(error.kind.as_str(), class, "{kind:?}");
            assert!(error.source().is_some());
            assert!(error.to_string().starts_with("store: put `a/b`: "));
        }
    }
}
