//! What goes wrong with a training, and what it means for the attempt.

use std::path::PathBuf;
use std::sync::Arc;

use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::spec::DatasetRef;
use espalier_dataset::SampleError;
use espalier_dataset::files::FileError;
use espalier_qwen3::ConfigError;
use espalier_qwen3_text::TokenizerError;
use espalier_runtime::datasets::DatasetsError;
use espalier_runtime::fetch::FetchError;
use espalier_runtime::publish::{OfStore, PublishError};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;

use crate::data::DataError;
use crate::engine::EngineError;
use crate::trainer::class_of;

/// A training that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The job is of another kind.
    #[error("the job is no training, and nothing else is done here")]
    NoTraining,
    /// A value that does not fit the model, or this worker.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The base model cannot be had.
    #[error("the base model cannot be had")]
    Fetch(#[from] FetchError),
    /// A file of the base model cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The base model is none that can be trained.
    #[error("the base model cannot be trained")]
    Config(#[from] ConfigError),
    /// There is nothing to learn from at this place.
    #[error("there is no {what} at `{path}` in the object store")]
    Missing {
        /// Data set or rows.
        what: &'static str,
        /// Object path.
        path: String,
    },
    /// What is there cannot be learned from.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A version of a data set cannot be had whole.
    #[error("data set {dataset} cannot be had")]
    Dataset {
        /// Which.
        dataset: DatasetRef,
        /// Why.
        #[source]
        source: DatasetsError,
    },
    /// A file of a data set is none of rows.
    #[error("data set {dataset} cannot be read")]
    DatasetFile {
        /// Which.
        dataset: DatasetRef,
        /// Which file and row, and why.
        #[source]
        source: Box<FileError>,
    },
    /// A row of a data set is no sample.
    #[error("{place} cannot be learned from")]
    DatasetRow {
        /// Which row of which file of which data set.
        place: String,
        /// Which sample, and why.
        #[source]
        source: SampleError,
    },
    /// A data set does not have the rows that its record speaks of.
    #[error(
        "data set {dataset} must have {expected} rows of `{split}`, as its record says, got {found}"
    )]
    DatasetRows {
        /// Which.
        dataset: DatasetRef,
        /// Of which split.
        split: &'static str,
        /// How many its record names.
        expected: u64,
        /// How many its files have.
        found: u64,
    },
    /// A data set of other tokens than the base model's, or of another chat template than this program's.
    #[error(
        "data set {dataset} must be built for the {what} {own}, which is {whose}, got {found}: build it again with \
         `espalier dataset build --extend {dataset}{options}`"
    )]
    DatasetOfOther {
        /// Which.
        dataset: Box<DatasetRef>,
        /// Tokenizer or chat template.
        what: &'static str,
        /// The digest that it must have.
        own: Box<str>,
        /// Whose that is.
        whose: &'static str,
        /// The digest in the manifest.
        found: Box<str>,
        /// What the command needs beside the data set.
        options: Box<str>,
    },
    /// The tokenizer that the base model brings.
    #[error("the tokenizer of the base model cannot be used")]
    Tokenizer(#[source] Arc<TokenizerError>),
    /// The engine refuses, or has no room.
    #[error("the engine cannot train this")]
    Engine(#[from] EngineError),
    /// Numbers that are none.
    #[error(
        "step {step} has a loss or gradient that is not finite, at {samples}; {}",
        last_good(*checkpoint)
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// The samples that it was made of, as far as they are known.
        samples: String,
        /// After how many steps the last checkpoint was taken.
        checkpoint: Option<u64>,
    },
    /// A file of the result is larger than the store takes.
    #[error("`{file}` must have at most {bytes_max} bytes to be stored, and would have {bytes}")]
    TooLarge {
        /// Which.
        file: String,
        /// Its size.
        bytes: u64,
        /// The store's.
        bytes_max: u64,
    },
    /// What was trained cannot be written as safetensors.
    #[error("what was trained cannot be encoded")]
    Encode(#[from] safetensors::SafeTensorError),
    /// The store does not take or give back an object.
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    /// The result is not visible to anybody.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    /// The process is told to end; the checkpoint is stored.
    #[error("stopped after step {step}, which is stored")]
    Preempted {
        /// Steps that are done.
        step: u64,
    },
    /// The attempt was told to stop.
    #[error("stopped before it was trained")]
    Stopped,
}

fn last_good(checkpoint: Option<u64>) -> String {
    match checkpoint {
        Some(step) => format!("the checkpoint of step {step} is kept"),
        None => "there is no checkpoint before it".to_owned(),
    }
}

impl TrainError {
    /// Whether the device is lost to this process.
    pub fn is_of_device(&self) -> bool {
        matches!(self, Self::Engine(EngineError::Device(failed)) if failed.is_lost)
    }

    /// What the queue has to know.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NoTraining
            | Self::Field(_)
            | Self::Config(_)
            | Self::Missing { .. }
            | Self::Data(_)
            | Self::DatasetFile { .. }
            | Self::DatasetRow { .. }
            | Self::DatasetRows { .. }
            | Self::DatasetOfOther { .. }
            | Self::NotFinite { .. }
            | Self::TooLarge { .. } => ErrorClass::Invalid,
            Self::Dataset { source, .. } => match source {
                DatasetsError::Missing { .. }
                | DatasetsError::Record(_)
                | DatasetsError::Altered { .. } => ErrorClass::Invalid,
                DatasetsError::Store(error) if error.is_not_found() => ErrorClass::Invalid,
                _ => ErrorClass::Infra,
            },
            Self::Fetch(error) => error.class(),
            Self::Engine(error) => class_of(error),
            Self::Publish(error) => error.class(),
            Self::Tokenizer(error) => match **error {
                TokenizerError::Own(_) => ErrorClass::Handler,
                TokenizerError::Read { .. } => ErrorClass::Infra,
                _ => ErrorClass::Invalid,
            },
            Self::Encode(_) => ErrorClass::Handler,
            Self::Read { .. } | Self::Store(_) | Self::Blocking(_) => ErrorClass::Infra,
            Self::Preempted { .. } | Self::Stopped => ErrorClass::Preempted,
        }
    }
}

impl OfStore for TrainError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Dataset { source, .. } => source.of_store(),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}
