//! What goes wrong with a curation, and what it means for the attempt.

use espalier_core::dataset::NOTHING_LEFT;
use espalier_core::error::{ErrorClass, FieldError};
use espalier_dataset::files::FileError;
use espalier_qwen3_text::TokenizerError;
use espalier_runtime::datasets::DatasetsError;
use espalier_runtime::fetch::FetchError;
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;
use espalier_runtime::traces::TracesError;

/// Why an attempt left no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum CurateError {
    #[error("the job is no curation, and nothing else is done here")]
    NoCuration,
    /// What only this worker can tell to be wrong.
    #[error(transparent)]
    Refused(#[from] FieldError),
    #[error("{}: of {sources}, {dropped}", NOTHING_LEFT)]
    Empty { sources: usize, dropped: String },
    #[error(
        "`{file}` must have at most {bytes_max} bytes, has {bytes}: build the data set of fewer sources"
    )]
    TooLarge {
        file: String,
        bytes: u64,
        bytes_max: u64,
    },
    #[error("the tokenizer cannot be had")]
    Fetch(#[from] FetchError),
    #[error("the tokenizer cannot be used")]
    Tokenizer(#[from] TokenizerError),
    #[error("a file of the data set cannot be written")]
    Write(#[from] FileError),
    #[error("the record of the data set cannot be encoded")]
    Encode(#[source] serde_json::Error),
    #[error("traces cannot be read")]
    Traces(#[from] TracesError),
    #[error(transparent)]
    Datasets(#[from] DatasetsError),
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    #[error("stopped before it was done")]
    Stopped,
}

impl CurateError {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::NoCuration
            | Self::Refused(_)
            | Self::Empty { .. }
            | Self::TooLarge { .. }
            | Self::Traces(TracesError::TooMany)
            | Self::Datasets(
                DatasetsError::Missing { .. }
                | DatasetsError::Record(_)
                | DatasetsError::Altered { .. },
            ) => ErrorClass::Invalid,
            // A file of somebody else may bring its reader down, on every try.
            Self::Write(_) | Self::Encode(_) | Self::Blocking(_) => ErrorClass::Handler,
            Self::Fetch(error) => error.class(),
            Self::Tokenizer(TokenizerError::Own(_)) => ErrorClass::Handler,
            Self::Tokenizer(TokenizerError::Read { .. }) => ErrorClass::Infra,
            Self::Tokenizer(_) => ErrorClass::Invalid,
            Self::Publish(error) => error.class(),
            Self::Traces(_) | Self::Datasets(_) | Self::Store(_) => ErrorClass::Infra,
            Self::Stopped => ErrorClass::Preempted,
        }
    }
}

impl OfStore for CurateError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) | Self::Traces(TracesError::Store(error)) => Some(error),
            Self::Datasets(error) => error.of_store(),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
