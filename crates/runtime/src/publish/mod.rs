//! Publishing the result of a job, whatever it did: the manifest is created once and written last, under the lease
//! alone, and a result that is there already is verified and taken over.
//!
//! What a result consists of is the worker's: it writes its files first and brings the manifest.

mod adopt;
mod error;

use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::ErrorClass;
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::{Manifest, Summary};

use crate::store::{Created, Patience, Store};
use crate::tasks::{self, BlockingFailed};
use crate::worker::{Grant, JobContext, JobOutcome, Stop};

pub use adopt::{Claim, Found, adopt, find_at_start, find_published, is_published};
pub use error::{OfStore, PublishError};

/// How long somebody at a terminal waits for a store that is away.
const NO_LEASE_PATIENCE: Duration = Duration::from_secs(120);
/// How often a manifest that does not verify is reported within one publication: a second time only if another worker
/// without a lease wrote one meanwhile.
const REPORTS_MAX: u32 = 2;

/// Whom a publisher asks before it makes a result visible.
pub trait Gate: Sync {
    /// Whether the attempt still holds its lease. Asked right before the manifest is created, so that an attempt which
    /// was suspended past its lease publishes nothing.
    fn may_publish(&self) -> bool;

    /// How long publishing waits for a store that is away; none: whoever holds the lease ends the wait.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Reports that the manifest which is there does not verify. True: it was moved aside.
    fn report_invalid(&self, reason: &str) -> impl Future<Output = bool> + Send;
}

/// The gate of a result that no lease protects: a conversation in a terminal.
#[derive(Clone, Copy, Debug)]
pub struct NoLease;

impl Gate for NoLease {
    fn may_publish(&self) -> bool {
        true
    }

    fn patience(&self) -> Option<Duration> {
        Some(NO_LEASE_PATIENCE)
    }

    async fn report_invalid(&self, _reason: &str) -> bool {
        false
    }
}

/// Results become visible under the lease alone.
pub struct ByLease<'a>(pub &'a JobContext);

impl Gate for ByLease<'_> {
    fn may_publish(&self) -> bool {
        self.0.lease().may_publish()
    }

    async fn report_invalid(&self, reason: &str) -> bool {
        self.0.report_bad_manifest(reason).await
    }
}

/// A result that everybody can see.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// Object path of the manifest.
    pub manifest: String,
    /// What it says of the result.
    pub summary: Summary,
    /// Whether an earlier attempt had published, and this one took that over.
    pub adopted: bool,
}

impl From<Published> for JobOutcome {
    fn from(published: Published) -> Self {
        Self::Published {
            manifest: published.manifest,
            summary: published.summary,
            spawn: Vec::new(),
        }
    }
}

/// Creates the manifest of a result whose files are all there. One that an earlier attempt published is verified and
/// taken over in its place, if it is of the same spec.
pub async fn create(
    store: &Store,
    claim: Claim<'_>,
    manifest: &Manifest,
    gate: &impl Gate,
) -> Result<Published, PublishError> {
    let path = layout::manifest(claim.key);
    let content = Bytes::from(serde_json::to_vec_pretty(manifest).map_err(PublishError::Encode)?);
    let mut reports = 0;
    loop {
        let create = || async {
            if !gate.may_publish() {
                return Err(PublishError::Stopped);
            }
            Ok(store.create(&path, content.clone()).await?)
        };
        if patiently(claim.key, "manifest", create).await? == Created::New {
            return Ok(Published {
                manifest: path,
                summary: manifest.summary.clone(),
                adopted: false,
            });
        }
        let look = || find_published(store, claim);
        let reason = match patiently(claim.key, "adoption", look).await? {
            Found::Published(found) => {
                return Ok(Published {
                    manifest: path,
                    // After a lost answer it is this attempt's own.
                    adopted: found.fence != manifest.fence,
                    summary: found.summary,
                });
            }
            Found::OfAnotherSpec(found) => return Err(claim.refuse(found)),
            Found::Invalid { reason } => reason,
            Found::Nothing => "it went away while it was read".to_owned(),
        };
        reports += 1;
        if reports > REPORTS_MAX || !gate.report_invalid(&reason).await {
            return Err(PublishError::InvalidManifest {
                job: claim.key.to_string(),
                reason,
            });
        }
    }
}

/// Does `work` again and again while the store may come back. The caller ends the wait.
pub async fn patiently<T, E, F>(
    key: &JobKey,
    what: &'static str,
    work: impl Fn() -> F,
) -> Result<T, E>
where
    E: OfStore,
    F: Future<Output = Result<T, E>>,
{
    let mut patience = Patience::new(key, what);
    loop {
        let error = match work().await {
            Err(error) => error,
            done => return done,
        };
        let may_pass = match error.of_store() {
            Some(of_store) => patience.after(of_store).await,
            None => false,
        };
        if !may_pass {
            return Err(error);
        }
    }
}

/// What a job asks for. A spec may be as large as a book, and its canonical form is made of a copy.
pub async fn spec_digest(grant: &Grant) -> Result<SpecDigest, BlockingFailed> {
    let draft = grant.draft.clone();
    tasks::blocking("publish.spec_digest", move || SpecDigest::of(&draft)).await
}

/// The outcome of a job that its lease stopped. The loop knows better what a stop means; this is what is left to say.
pub fn stopped_outcome(context: &JobContext) -> JobOutcome {
    let reason = match context.lease().reason() {
        Some(Stop::Cancelled) => return JobOutcome::failed(ErrorClass::Cancelled, "cancelled"),
        Some(Stop::Draining | Stop::Aborted) => "the worker stops",
        _ => "the lease ended",
    };
    JobOutcome::Released {
        reason: reason.to_owned(),
    }
}
