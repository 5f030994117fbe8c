//! Adoption: a result that an earlier attempt published is verified, file by file, and taken over.
//!
//! A worker may die between creating the manifest and telling the coordinator, and one that lost its lease may create
//! it before the next attempt ends. Whoever holds the lease then finishes with what is there, if it is the result of
//! the same spec: a batch's name may have been used before, and its old results stay.

use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::Manifest;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{self, with_deadline};
use futures::{StreamExt, TryStreamExt};

use super::RecordError;
use super::publish::patiently;

/// Files read at once: enough to hide latency, few enough that blobs of 16 MB fit into memory.
const READS_MAX: usize = 4;

/// An attempt that looks for a result, and what makes one its own.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// The job.
    pub key: &'a JobKey,
    /// The attempt's lease.
    pub fence: Fence,
    /// What the job asks for; none for a recording that no job asked for.
    pub spec: Option<&'a SpecDigest>,
}

impl Claim<'_> {
    /// Whether the result that `manifest` publishes may be taken over.
    fn covers(&self, manifest: &Manifest) -> bool {
        match (self.spec, &manifest.spec_sha256) {
            (Some(asked), Some(found)) => asked == found,
            // What nobody asked for belongs to the attempt alone that published it and lost the answer.
            (None, None) => self.fence == manifest.fence,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    /// The end of an attempt that found a result of something else under its name.
    pub fn refuse(&self, found: Option<SpecDigest>) -> RecordError {
        RecordError::NameUsed {
            job: self.key.clone(),
            found,
            asked: self.spec.cloned(),
        }
    }
}

/// What lies where the result of a job is published.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// No manifest.
    Nothing,
    /// A manifest all of whose files are as it says.
    Published(Box<Manifest>),
    /// A manifest of something else that had the same name. It stays where it is, whether its files are whole or not.
    OfAnotherSpec(Option<SpecDigest>),
    /// A manifest that cannot be trusted. Only the coordinator moves it aside.
    Invalid {
        /// The file or rule.
        reason: String,
    },
}

/// Longest that an attempt waits at its start for a store that is away.
const START_PATIENCE: Duration = Duration::from_secs(600);

/// [Looks](find_published) at the start of an attempt, and waits for a store that is away for up to half of the time
/// that the attempt may take: an attempt that could not begin is not to blame for taking too long.
pub async fn find_at_start(
    store: &Store,
    claim: Claim<'_>,
    max_runtime: Duration,
) -> Result<Found, RecordError> {
    let patience = START_PATIENCE.min(max_runtime / 2);
    let find = patiently(claim.key, "adoption", || find_published(store, claim));
    with_deadline("record.start", patience, find).await?
}

/// Looks for a published result that `claim` covers and verifies every file of it.
///
/// # Errors
/// The store did not answer: nothing is known.
pub async fn find_published(store: &Store, claim: Claim<'_>) -> Result<Found, RecordError> {
    let key = claim.key;
    let bytes = match store.get(&layout::manifest(key)).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Ok(Found::Nothing),
        Err(error) => return Err(error.into()),
    };
    let manifest = match Manifest::parse(&bytes, key) {
        Ok(manifest) => manifest,
        Err(error) => {
            let reason = error.to_string();
            return Ok(Found::Invalid { reason });
        }
    };
    if !claim.covers(&manifest) {
        return Ok(Found::OfAnotherSpec(manifest.spec_sha256));
    }
    let mut checks = futures::stream::iter(manifest.files.clone())
        .map(|file| async move {
            let bytes = match store.get(&file.path).await {
                Ok(bytes) => bytes,
                Err(error) if error.is_not_found() => {
                    return Ok(Some(format!("`{}` is missing", file.path)));
                }
                Err(error) => return Err(RecordError::from(error)),
            };
            let path = file.path.clone();
            let holds = tasks::blocking("record.verify", move || file.holds(&bytes)).await?;
            Ok((!holds).then(|| format!("`{path}` is not what the manifest says")))
        })
        .buffer_unordered(READS_MAX);
    while let Some(fault) = checks.try_next().await? {
        if let Some(reason) = fault {
            return Ok(Found::Invalid { reason });
        }
    }
    drop(checks);
    Ok(Found::Published(Box::new(manifest)))
}
