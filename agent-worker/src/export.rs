//! What an agent worker does with a granted export, in its `cpu` slots: take over a result that is there already, or bring
//! the version out and publish where it is.
//!
//! An attempt that was killed after the hub had made its commit is followed by one that finds all of it there, and makes
//! none. The token is the worker's own: no spec, record or message holds one.

use std::sync::Arc;
use std::time::Duration;

use espalier_adapters::{AdaptersError, BaseCheck, Exported, Exporter, Order, Watch};
use espalier_core::error::ErrorClass;
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Summary};
use espalier_proto::v1;
use espalier_runtime::clock::Clock;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::publish::{
    self, ByLease, Claim, OfStore, PublishError, Published, patiently, stopped_outcome,
};
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::tasks::BlockingFailed;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome};

use crate::config::AgentWorkerConfig;
use crate::serve::Deps;

/// How often people are told how far a job is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Does exports.
pub(crate) struct ExportHandler {
    exporter: Exporter,
    store: Store,
    clock: Arc<dyn Clock>,
}

/// Why an attempt left no result.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("the job is no export, and nothing else is done here")]
    NoExport,
    #[error(transparent)]
    Adapters(#[from] AdaptersError),
    #[error("cannot use the object store")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
    #[error("stopped before it was done")]
    Stopped,
}

impl ExportError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::NoExport => ErrorClass::Invalid,
            Self::Adapters(error) => error.class(),
            Self::Publish(error) => error.class(),
            Self::Store(_) | Self::Blocking(_) => ErrorClass::Infra,
            Self::Stopped => ErrorClass::Preempted,
        }
    }
}

impl OfStore for ExportError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Publish(error) => error.of_store(),
            _ => None,
        }
    }
}

impl ExportHandler {
    /// With the token and the folders of the configuration. What killed attempts left in its folder goes away.
    pub(crate) async fn new(config: &AgentWorkerConfig, deps: &Deps) -> Self {
        let scratch = config.data_dir.join("exports");
        if let Err(error) = tokio::fs::remove_dir_all(&scratch).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %scratch.display(), %error, "leftovers of exports stay");
        }
        let hub = config.hub_settings(&deps.environment);
        let fetcher = Fetcher::new(&deps.environment, None).with_hub(hub.clone());
        Self {
            exporter: Exporter {
                store: deps.store.clone(),
                fetcher,
                hub,
                scratch,
                bases: match config.allow_base_folders {
                    true => BaseCheck::Any,
                    false => BaseCheck::NoFolders,
                },
            },
            store: deps.store.clone(),
            clock: Arc::clone(&deps.clock),
        }
    }

    async fn attempt(&self, grant: &Grant, context: &JobContext) -> Result<Published, ExportError> {
        let Some(export) = grant.spec.export() else {
            return Err(ExportError::NoExport);
        };
        let spec = publish::spec_digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&spec),
        };
        let max_runtime = grant.spec.max_runtime;
        let adopted = publish::adopt(&self.store, claim, max_runtime, context).await?;
        if let Some(published) = adopted {
            return Ok(published);
        }
        let order = Order {
            project: &grant.key.project,
            adapter: &export.adapter,
            merged: export.merged,
            to: &export.to,
        };
        let exported = self.export(order, context).await?;
        context.lease().publishing();
        let record = self.write_record(grant, &exported).await?;
        let adapter = &export.adapter;
        let parent = layout::adapter_version(&grant.key.project, &adapter.name, adapter.version);
        let manifest = self.manifest(grant, &spec, record, parent, exported);
        let gate = ByLease(context);
        Ok(publish::create(&self.store, claim, &manifest, &gate).await?)
    }

    /// Brings it out, and tells how far it is.
    async fn export(
        &self,
        order: Order<'_>,
        context: &JobContext,
    ) -> Result<Exported, ExportError> {
        let (watch, stopped) = (Watch::default(), context.lease().stopped());
        let mut work = Box::pin(self.exporter.run(order, &watch));
        loop {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {
                    watch.stop.cancel();
                    return Err(ExportError::Stopped);
                }
                done = &mut work => return Ok(done?),
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    context.lease().progress(&watch.line());
                }
            }
        }
    }

    /// The one file of the result: what was brought where.
    async fn write_record(
        &self,
        grant: &Grant,
        exported: &Exported,
    ) -> Result<FileEntry, ExportError> {
        let content = serde_json::to_vec_pretty(&exported.summary).map_err(PublishError::Encode)?;
        let path = layout::export_record(&grant.key, grant.fence);
        let entry = FileEntry::of(&path, &content);
        let content = bytes::Bytes::from(content);
        let put = || async { Ok::<_, ExportError>(self.store.put(&path, content.clone()).await?) };
        patiently(&grant.key, "export", put).await?;
        Ok(entry)
    }

    fn manifest(
        &self,
        grant: &Grant,
        spec: &SpecDigest,
        record: FileEntry,
        parent: String,
        exported: Exported,
    ) -> Manifest {
        Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: Some(spec.clone()),
            created_at_us: self.clock.now(),
            files: vec![record],
            parents: vec![parent],
            summary: Summary::Export(exported.summary),
        }
    }
}

impl Handler for ExportHandler {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Export
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        match Box::pin(self.attempt(&grant, &context)).await {
            Ok(published) => published.into(),
            Err(ExportError::Stopped | ExportError::Publish(PublishError::Stopped)) => {
                stopped_outcome(&context)
            }
            Err(error) => JobOutcome::failed(error.class(), error_chain(&error)),
        }
    }
}
