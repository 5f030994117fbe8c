//! What goes wrong with versions of adapters, and what it means for a job.

use std::io;
use std::path::{Path, PathBuf};

use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::spec::AdapterRef;
use espalier_qwen3::{ConfigError, LoraError, MergeError};
use espalier_runtime::fetch::FetchError;
use espalier_runtime::hub::HubError;
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks::BlockingFailed;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum AdaptersError {
    /// The project has no adapter of this name.
    #[error("there is no adapter `{name}` in project `{project}`")]
    NoAdapter {
        /// The name.
        name: String,
        /// The project.
        project: String,
    },
    /// The adapter has no such version.
    #[error("there is no version {0}")]
    NoVersion(AdapterRef),
    /// There is no version to go back to.
    #[error("no version of `{0}` was latest before the one that is now")]
    NothingBefore(String),
    /// There is nothing that a canary could stand beside.
    #[error("no version of `{0}` is latest, beside which another one could have a share")]
    NothingLatest(String),
    /// Somebody else took every number that was tried.
    #[error("no free entry of `{0}` was found: others move it at the same time")]
    Contended(String),
    /// What is asked for breaks a rule.
    #[error(transparent)]
    Refused(FieldError),
    /// The record of a version is broken.
    #[error("the record of the version cannot be used")]
    Record(#[from] FieldError),
    /// A file of a version is not what its record says.
    #[error(
        "{path} must have SHA-256 {expected}, has {found}: the object store lost or changed it"
    )]
    Damaged {
        /// Object path.
        path: String,
        /// By the record.
        expected: String,
        /// As it was read.
        found: String,
    },
    /// What is to be written is there.
    #[error("{} is there already: name another folder, or remove it", .0.display())]
    Exists(PathBuf),
    /// A file that must be there is not.
    #[error("{} has no {file}", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The file.
        file: String,
    },
    /// A version has no such file: it is no adapter.
    #[error("{version} has no {file}")]
    NoAdapterFile {
        /// The version.
        version: AdapterRef,
        /// The file.
        file: String,
    },
    /// No model is named as the base.
    #[error(
        "adapter_config.json names no base model in `base_model_name_or_path`: name it with --base"
    )]
    NoBase,
    /// The base is a folder, which is not read for others.
    #[error(
        "the base model `{0}` is a folder: an export job fetches bases from the hub and from buckets only"
    )]
    BaseFolder(String),
    /// The base is not the one that the adapter was trained on.
    #[error(
        "the base model `{name}` must have digest {expected}, has {found}: it is not the one that was trained on"
    )]
    OtherBase {
        /// What the record calls it.
        name: String,
        /// By the record.
        expected: String,
        /// As it was fetched.
        found: String,
    },
    /// What was trained as a whole has no base that it could be merged with.
    #[error("{0} is a whole model: push it without --merged")]
    Whole(AdapterRef),
    /// The adapter cannot be served.
    #[error("the adapter cannot be served")]
    Adapter(#[from] LoraError),
    /// The base's configuration is refused.
    #[error("the base model cannot be used")]
    BaseConfig(#[from] ConfigError),
    /// Base and adapter do not become one model.
    #[error("base and adapter cannot be merged")]
    Merge(#[from] MergeError),
    /// A file of this machine cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The base model cannot be had.
    #[error("the base model cannot be fetched")]
    Fetch(#[from] FetchError),
    /// The object store.
    #[error("the object store cannot be used")]
    Store(#[from] StoreError),
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A record that cannot be encoded: a number that JSON cannot hold.
    #[error("the record cannot be encoded")]
    Encode(#[source] serde_json::Error),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl AdaptersError {
    pub(crate) fn file(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File {
            path: path.to_owned(),
            source,
        }
    }

    /// What it means for a job.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Fetch(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Hub(error) => error.class(),
            Self::File { .. } | Self::Blocking(_) | Self::Contended(_) => ErrorClass::Infra,
            Self::Merge(MergeError::File { .. }) => ErrorClass::Infra,
            Self::Merge(MergeError::Stopped) => ErrorClass::Preempted,
            Self::Damaged { .. } | Self::Encode(_) => ErrorClass::Handler,
            Self::NoAdapter { .. }
            | Self::NoVersion(_)
            | Self::NothingBefore(_)
            | Self::NothingLatest(_)
            | Self::Refused(_)
            | Self::Record(_)
            | Self::Exists(_)
            | Self::Missing { .. }
            | Self::NoAdapterFile { .. }
            | Self::NoBase
            | Self::BaseFolder(_)
            | Self::OtherBase { .. }
            | Self::Whole(_)
            | Self::Adapter(_)
            | Self::BaseConfig(_)
            | Self::Merge(_) => ErrorClass::Invalid,
        }
    }
}
