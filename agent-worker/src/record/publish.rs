//! The end of a recording: blobs and trace first, then the manifest, created once.

use std::sync::Arc;

use bytes::Bytes;
use espalier_core::layout;
use espalier_core::trace::{FileEntry, Manifest, Outcome, RolloutSummary, SCHEMA_VERSION, Trace};
use espalier_runtime::publish::{self, Claim, Gate, Published, patiently};
use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::traces;

use super::{RecordError, Recorder};

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
        let replay = trace.header.provenance.replay.iter();
        let parents = replay.map(|source| layout::manifest(&source.job));
        let parents = [layout::job(&self.key)]
            .into_iter()
            .chain(parents)
            .collect();
        let packed = tasks::blocking("record.compress", move || pack(&trace)).await??;
        self.until_stored("blobs", || self.shipment.ship_blobs())
            .await?;
        let path = layout::trace(&self.key, self.fence);
        let entry = FileEntry::of(&path, &packed);
        self.until_stored("trace", || async {
            Ok(self.context.store.put(&path, packed.clone()).await?)
        })
        .await?;
        let manifest = self.manifest(entry, summary, parents);
        let claim = self.claim();
        let published = publish::create(&self.context.store, claim, &manifest, gate).await?;
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

    fn manifest(
        &self,
        trace: FileEntry,
        summary: RolloutSummary,
        parents: Vec<String>,
    ) -> Manifest {
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
            parents,
            summary: summary.into(),
        }
    }

    fn claim(&self) -> Claim<'_> {
        Claim {
            key: &self.key,
            fence: self.fence,
            spec: self.spec.as_ref(),
        }
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
