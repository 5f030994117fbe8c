//! What goes wrong with publishing, and what it means for the attempt.

use espalier_core::error::ErrorClass;
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::spec::SpecDigest;

use crate::store::StoreError;
use crate::tasks::{BlockingFailed, DeadlineExceeded};

/// A result that is not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store does not take or give back an object.
    #[error("cannot publish the result")]
    Store(#[from] StoreError),
    /// A published manifest is there and its files are not what it says.
    #[error("the published manifest of `{job}` is invalid: {reason}")]
    InvalidManifest {
        /// The job.
        job: String,
        /// The file or rule.
        reason: String,
    },
    /// The batch's name was used before, for other jobs, and a result of theirs is there.
    #[error(
        "batch name already used: the store holds a result of another spec for job `{}` of batch `{}` in project `{}` \
         (spec sha256 {}, this job's {}); use another batch name, or delete `{}` from the store and retry the job",
        job.job, job.batch, job.project, shown(found.as_ref()), shown(asked.as_ref()), layout::job(job)
    )]
    NameUsed {
        /// The job.
        job: JobKey,
        /// What the published result was asked for; none: no job asked for it.
        found: Option<SpecDigest>,
        /// What this job asks for.
        asked: Option<SpecDigest>,
    },
    /// The attempt must not publish: its lease is gone or it was told to stop.
    #[error("stopped before the result was published")]
    Stopped,
    /// A manifest that is not JSON: a number that JSON cannot hold.
    #[error("the manifest cannot be encoded")]
    Encode(#[source] serde_json::Error),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    /// The store was away for longer than anybody waits for it.
    #[error("the store was away for too long")]
    Late(#[from] DeadlineExceeded),
}

impl PublishError {
    /// What the queue has to know.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Encode(_) => ErrorClass::Handler,
            Self::Stopped => ErrorClass::Preempted,
            // No further attempt finds another name: the job is over until a person acts.
            Self::NameUsed { .. } => ErrorClass::Invalid,
            Self::Store(_) | Self::InvalidManifest { .. } | Self::Blocking(_) | Self::Late(_) => {
                ErrorClass::Infra
            }
        }
    }
}

fn shown(digest: Option<&SpecDigest>) -> &str {
    digest.map_or("none", SpecDigest::short)
}

/// An error that may be the store's, which may come back.
pub trait OfStore {
    /// The store's error, if it is one.
    fn of_store(&self) -> Option<&StoreError>;
}

impl OfStore for StoreError {
    fn of_store(&self) -> Option<&StoreError> {
        Some(self)
    }
}

impl OfStore for PublishError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}
