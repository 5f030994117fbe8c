//! What goes wrong while turns are scored, and what it means for the attempt.

use espalier_core::error::ErrorClass;
use espalier_runtime::model::ModelError;
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;

use crate::rollout::ReplayError;
use crate::verify::ProbeError;

/// Why an attempt left no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScoreError {
    #[error("a recorded rollout cannot be used")]
    Recording(#[from] ReplayError),
    #[error("the model did not answer")]
    Model(#[from] ModelError),
    #[error("an answer cannot be compared")]
    Answer(#[from] ProbeError),
    #[error("the scores cannot be encoded")]
    Encode(#[source] serde_json::Error),
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl ScoreError {
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::Recording(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Answer(error) => error.class,
            Self::Encode(_) | Self::Blocking(_) => ErrorClass::Handler,
            Self::Publish(error) => error.class(),
            Self::Store(_) => ErrorClass::Infra,
        }
    }
}

impl OfStore for ScoreError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Recording(error) => error.of_store(),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
