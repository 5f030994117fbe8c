//! What goes wrong with recording, and what it means for the attempt.

use std::path::PathBuf;

use espalier_core::error::ErrorClass;
use espalier_core::trace::TraceError;
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::{BlockingFailed, DeadlineExceeded};

/// A recording that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// This machine's disk does not take or give back the steps.
    #[error("cannot {operation} `{}`", path.display())]
    Disk {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store does not take or give back an object.
    #[error("cannot publish the trace")]
    Store(#[from] StoreError),
    /// The result is not visible to anybody.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A step that is not JSON: a number that JSON cannot hold.
    #[error("a step cannot be encoded")]
    Encode(#[source] serde_json::Error),
    /// The steps do not add up.
    #[error("the steps of the rollout do not add up to a trace")]
    Trace(#[from] TraceError),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    /// The store was away for longer than anybody waits for it.
    #[error("the store was away for too long")]
    Late(#[from] DeadlineExceeded),
}

impl RecordError {
    /// What the queue has to know.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Encode(_) | Self::Trace(_) => ErrorClass::Handler,
            Self::Publish(error) => error.class(),
            Self::Disk { .. } | Self::Store(_) | Self::Blocking(_) | Self::Late(_) => {
                ErrorClass::Infra
            }
        }
    }
}

impl OfStore for RecordError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
