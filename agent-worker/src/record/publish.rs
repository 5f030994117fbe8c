//! The end of a recording: blobs and trace first, then the manifest, created once.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::{FileEntry, Manifest, Outcome, RolloutSummary, SCHEMA_VERSION, Trace};
use espalier_runtime::store::{Created, Patience};
use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::traces;

use super::{Claim, Found, RecordError, Recorder, find_published};

/// How long somebody at a terminal waits for a store that is away.
const NO_LEASE_PATIENCE: Duration = Duration::from_secs(120);
/// How often a manifest that does not verify is reported within one publication: a second time only if another worker
/// without a lease wrote one meanwhile.
const REPORTS_MAX: u32 = 2;

/// Whom the recorder asks before it makes a result visible.
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

/// The gate of a recording that no lease protects: a conversation in a terminal.
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

/// A result that everybody can see.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// Object path of the manifest.
    pub manifest: String,
    /// What it says of the rollout.
    pub summary: RolloutSummary,
    /// Whether an earlier attempt had published, and this one took that over.
    pub adopted: bool,
}

impl Recorder {
    /// Ends the recording and publishes it. Waits for a store that is away; the caller drops the future when the
    /// attempt has to stop.
    ///
    /// A result that an earlier attempt published is verified and taken over in place of this one, if it is one of the
    /// same spec.
    pub async fn publish(
        self,
        outcome: Outcome,
        gate: &impl Gate,
    ) -> Result<Published, RecordError> {
        let patience = gate.patience();
        // Boxed: the wait holds it a second time.
        let work = Box::pin(self.publish_patiently(outcome, gate));
        match patience {
            Some(patience) => with_deadline("record.publish", patience, work).await?,
            None => work.await,
        }
    }

    async fn publish_patiently(
        mut self,
        outcome: Outcome,
        gate: &impl Gate,
    ) -> Result<Published, RecordError> {
        self.outcome(&outcome).await?;
        let trace = self.take_trace(outcome)?;
        let summary = trace.summary();
        let packed = tasks::blocking("record.compress", move || pack(&trace)).await??;
        self.until_stored("blobs", || self.shipment.ship_blobs())
            .await?;
        let path = layout::trace(&self.key, self.fence);
        let entry = FileEntry::of(&path, &packed);
        self.until_stored("trace", || async {
            Ok(self.context.store.put(&path, packed.clone()).await?)
        })
        .await?;
        let manifest = self.manifest(entry, summary);
        let published = self.create(&manifest, gate).await?;
        self.shipment.published();
        Ok(published)
    }

    fn take_trace(&mut self, outcome: Outcome) -> Result<Arc<Trace>, RecordError> {
        let header = self
            .header
            .take()
            .ok_or(espalier_core::trace::TraceError::NoHeader)?;
        Ok(Arc::new(Trace {
            header: *header,
            messages: std::mem::take(&mut self.messages),
            model_calls: std::mem::take(&mut self.model_calls),
            tool_calls: std::mem::take(&mut self.tool_calls),
            outcome,
        }))
    }

    fn manifest(&self, trace: FileEntry, summary: RolloutSummary) -> Manifest {
        let mut files = vec![trace];
        files.extend(self.blobs.values().cloned());
        Manifest {
            schema_version: SCHEMA_VERSION,
            job: self.key.clone(),
            attempt: self.attempt,
            fence: self.fence,
            spec_sha256: self.spec.clone(),
            created_at_us: self.context.clock.now(),
            files,
            parents: vec![layout::job(&self.key)],
            summary,
        }
    }

    async fn create(
        &self,
        manifest: &Manifest,
        gate: &impl Gate,
    ) -> Result<Published, RecordError> {
        let path = layout::manifest(&self.key);
        let content =
            Bytes::from(serde_json::to_vec_pretty(manifest).map_err(RecordError::Encode)?);
        let mut reports = 0;
        loop {
            let create = || async {
                if !gate.may_publish() {
                    return Err(RecordError::Stopped);
                }
                Ok(self.context.store.create(&path, content.clone()).await?)
            };
            if self.until_stored("manifest", create).await? == Created::New {
                return Ok(Published {
                    manifest: path,
                    summary: manifest.summary.clone(),
                    adopted: false,
                });
            }
            let reason = match self.look().await? {
                Found::Published(found) => {
                    return Ok(Published {
                        manifest: path,
                        // After a lost answer it is this attempt's own.
                        adopted: found.fence != manifest.fence,
                        summary: found.summary,
                    });
                }
                Found::OfAnotherSpec(found) => return Err(self.claim().refuse(found)),
                Found::Invalid { reason } => reason,
                Found::Nothing => "it went away while it was read".to_owned(),
            };
            reports += 1;
            if reports > REPORTS_MAX || !gate.report_invalid(&reason).await {
                return Err(RecordError::InvalidManifest {
                    job: self.key.to_string(),
                    reason,
                });
            }
        }
    }

    fn claim(&self) -> Claim<'_> {
        Claim {
            key: &self.key,
            fence: self.fence,
            spec: self.spec.as_ref(),
        }
    }

    async fn look(&self) -> Result<Found, RecordError> {
        let find = || find_published(&self.context.store, self.claim());
        self.until_stored("adoption", find).await
    }

    /// Does `work` again and again while the store may come back. The lease is kept meanwhile, and the gate's patience
    /// or the attempt's longest runtime ends the wait.
    async fn until_stored<T, F>(
        &self,
        what: &'static str,
        work: impl Fn() -> F,
    ) -> Result<T, RecordError>
    where
        F: Future<Output = Result<T, RecordError>>,
    {
        patiently(&self.key, what, work).await
    }
}

/// Does `work` again and again while the store may come back. The caller ends the wait.
pub(super) async fn patiently<T, F>(
    key: &JobKey,
    what: &'static str,
    work: impl Fn() -> F,
) -> Result<T, RecordError>
where
    F: Future<Output = Result<T, RecordError>>,
{
    let mut patience = Patience::new(key, what);
    loop {
        let error = match work().await {
            Err(RecordError::Store(error)) => error,
            done => return done,
        };
        if !patience.after(&error).await {
            return Err(error.into());
        }
    }
}

fn pack(trace: &Trace) -> Result<Bytes, RecordError> {
    let json = serde_json::to_vec(trace).map_err(RecordError::Encode)?;
    compress(&json)
}

/// `bytes` as traces are packed.
pub(super) fn compress(bytes: &[u8]) -> Result<Bytes, RecordError> {
    let packed = traces::compress(bytes).map_err(|source| RecordError::Disk {
        operation: "compress",
        path: "steps".into(),
        source,
    })?;
    Ok(packed.into())
}
