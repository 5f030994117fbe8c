//! What goes wrong with a job, and what it means for the attempt. What goes wrong with a line is its answer.

use espalier_core::error::ErrorClass;
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;

use crate::engine::Health;

/// A job that cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum GenerateError {
    /// The job is of another kind.
    #[error("the job has no requests, and nothing else is done here")]
    NoRequests,
    /// There is no such file.
    #[error("there are no requests at `{path}` in the object store")]
    Missing { path: String },
    /// The file says nothing.
    #[error("`{path}` must have at least one request, and it is empty")]
    Empty { path: String },
    /// The file is another one now.
    #[error("`{path}` must stay as it is until it is answered, and it says something else now")]
    Changed { path: String },
    /// The store does not take or give back an object.
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    /// The result is not visible to anybody.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    /// Nobody answers any more in this process.
    #[error("the engine does not answer: {0}")]
    Engine(Health),
    /// The job's own model was taken out: a worker that serves it goes on.
    #[error("the job's model `{model}` is not served here any more")]
    NotServed { model: String },
    /// The time of the attempt is nearly over, and what it did is stored.
    #[error("handed on before `max_runtime_s` is over")]
    HandedOn,
    /// The attempt was told to stop.
    #[error("stopped before all lines were answered")]
    Stopped,
}

impl GenerateError {
    /// What the queue has to know.
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::NoRequests | Self::Missing { .. } | Self::Empty { .. } | Self::Changed { .. } => {
                ErrorClass::Invalid
            }
            Self::Publish(error) => error.class(),
            Self::Store(_) | Self::Blocking(_) => ErrorClass::Infra,
            Self::Engine(_) | Self::NotServed { .. } | Self::HandedOn | Self::Stopped => {
                ErrorClass::Preempted
            }
        }
    }
}

impl OfStore for GenerateError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
