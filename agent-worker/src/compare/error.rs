//! What goes wrong with a comparison, and what it means for the attempt.

use espalier_core::error::{ErrorClass, FieldError};
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;
use espalier_runtime::traces::TracesError;

/// Why an attempt left no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompareError {
    #[error("the job is no comparison, and nothing else is done here")]
    NoComparison,
    /// What only this worker can tell to be wrong.
    #[error(transparent)]
    Refused(#[from] FieldError),
    #[error(
        "nothing can be compared: `{before}` has {found_before} rollouts and `{after}` has {found_after}, {why}"
    )]
    Empty {
        before: String,
        after: String,
        found_before: u64,
        found_after: u64,
        why: FieldError,
    },
    #[error("the training `{job}` has left no steps to plot: {reason}")]
    Training { job: String, reason: String },
    #[error("`{path}` must have the size and sha256 of its manifest")]
    Scores { path: String },
    #[error("the report cannot be encoded")]
    Encode(#[source] serde_json::Error),
    #[error("traces cannot be read")]
    Traces(#[from] TracesError),
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl CompareError {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::NoComparison
            | Self::Refused(_)
            | Self::Empty { .. }
            | Self::Training { .. }
            | Self::Scores { .. }
            | Self::Traces(TracesError::TooMany) => ErrorClass::Invalid,
            // A trace of somebody else may bring its reader down, on every try.
            Self::Encode(_) | Self::Blocking(_) => ErrorClass::Handler,
            Self::Publish(error) => error.class(),
            Self::Traces(_) | Self::Store(_) => ErrorClass::Infra,
        }
    }
}

impl OfStore for CompareError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) | Self::Traces(TracesError::Store(error)) => Some(error),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
