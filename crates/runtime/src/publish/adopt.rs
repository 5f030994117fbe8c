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
use futures::{StreamExt, TryStreamExt};

use super::{PublishError, Published, patiently};
use crate::store::Store;
use crate::tasks::{self, with_deadline};
use crate::worker::JobContext;

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
    pub fn refuse(&self, found: Option<SpecDigest>) -> PublishError {
        PublishError::NameUsed {
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

/// Whether there is a manifest, whatever it says: who has to read much to know what is its own need not, where there is
/// none. Waits as [`find_at_start`] does.
pub async fn is_published(
    store: &Store,
    key: &JobKey,
    max_runtime: Duration,
) -> Result<bool, PublishError> {
    let path = layout::manifest(key);
    let look = patiently(key, "adoption", || async {
        match store.head(&path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(PublishError::from(error)),
        }
    });
    with_deadline("record.start", start_patience(max_runtime), look).await?
}

/// Half of the time that the attempt may take, and not too long: an attempt that could not begin is not to blame for
/// taking too long.
fn start_patience(max_runtime: Duration) -> Duration {
    START_PATIENCE.min(max_runtime / 2)
}

/// [Looks](find_published) at the start of an attempt, and waits for a store that is away.
pub async fn find_at_start(
    store: &Store,
    claim: Claim<'_>,
    max_runtime: Duration,
) -> Result<Found, PublishError> {
    let find = patiently(claim.key, "adoption", || find_published(store, claim));
    with_deadline("record.start", start_patience(max_runtime), find).await?
}

/// Takes over a result that an earlier attempt published, if there is one, it verifies, and it is of the same spec. What
/// does not verify is reported, and out of the way where this returns none.
pub async fn adopt(
    store: &Store,
    claim: Claim<'_>,
    max_runtime: Duration,
    context: &JobContext,
) -> Result<Option<Published>, PublishError> {
    let key = claim.key;
    match find_at_start(store, claim, max_runtime).await? {
        Found::Nothing => Ok(None),
        Found::Published(manifest) => {
            tracing::info!(job = %key, winner = manifest.fence.0, "took over the result of an earlier attempt");
            Ok(Some(Published {
                manifest: layout::manifest(key),
                summary: manifest.summary,
                adopted: true,
            }))
        }
        Found::OfAnotherSpec(found) => Err(claim.refuse(found)),
        // Moved aside: this attempt may publish its own.
        Found::Invalid { reason } if context.report_bad_manifest(&reason).await => Ok(None),
        Found::Invalid { reason } => Err(PublishError::InvalidManifest {
            job: key.to_string(),
            reason,
        }),
    }
}

/// Looks for a published result that `claim` covers and verifies every file of it.
///
/// # Errors
/// The store did not answer: nothing is known.
pub async fn find_published(store: &Store, claim: Claim<'_>) -> Result<Found, PublishError> {
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
                Err(error) => return Err(PublishError::from(error)),
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
