//! The services of clients and operators: the only part, with the sessions of workers, that sees generated types.
//!
//! Handlers admit the caller, turn the request into domain types, ask the queue, and turn the answer back. What they
//! share is [`Shared`]; rules of jobs are in `espalier-core`, rules of the queue behind its trait.

mod admin;
pub mod door;
mod jobs;
mod models;
pub mod page;
mod questions;
pub mod stored;
mod submit;
pub mod trace;
pub mod view;
pub mod watch;

use std::collections::BTreeSet;
use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{BatchView, Refusal};
use espalier_core::time::Timestamp;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::clock::Clock;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{BlockingFailed, Tasks};
use espalier_runtime::telemetry;

use crate::auth::Auth;
use crate::config::CoordinatorConfig;
use crate::journal::Journal;
use crate::peers::Peers;
use crate::questions::Questions;
use crate::queue::{Queue, QueueError};
use crate::registry::Registry;

pub use admin::AdminApi;
pub use jobs::JobApi;
pub use models::ModelApi;

/// What all services of one coordinator share.
pub struct Shared {
    /// The configuration, checked.
    pub config: Arc<CoordinatorConfig>,
    /// Who may call.
    pub auth: Arc<Auth>,
    /// The jobs.
    pub queue: Arc<dyn Queue>,
    /// The way in for what the queue must not lose.
    pub journal: Journal,
    /// Large specs, manifests and traces.
    pub store: Store,
    /// The other coordinators of the queue.
    pub peers: Peers,
    /// The workers that are connected here.
    pub registry: Arc<Registry>,
    /// Where models are served, for all workers.
    pub endpoints: tokio::sync::watch::Sender<v1::Endpoints>,
    /// What rollouts of those ask.
    pub questions: Arc<Questions>,
    /// Turns of those who read traces.
    pub trace_readers: trace::Readers,
    /// Places of those who watch batches.
    pub watch_places: watch::Places,
    /// The queue's time.
    pub clock: Arc<dyn Clock>,
    /// Where streams run.
    pub tasks: Tasks,
    /// Running, draining or aborted.
    pub shutdown: Shutdown,
}

impl Shared {
    /// The present moment, by the queue's clock.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The workers of all coordinators, ordered by id. One that has just moved is where it came to last.
    pub async fn workers(&self) -> Result<Vec<v1::Worker>, QueueError> {
        let others = self.peers.workers().await?;
        let mut all = (*others).clone();
        for mut worker in self.registry.list() {
            worker.coordinator = self.peers.me().to_string();
            let newer = all.get(&worker.worker);
            if newer.is_none_or(|other| other.connected_at_us <= worker.connected_at_us) {
                all.insert(worker.worker.clone(), worker);
            }
        }
        Ok(all.into_values().collect())
    }

    /// Names of MCP servers that a job may use: those of the configuration and of workers, wherever they are connected.
    pub async fn mcp_servers(&self) -> Result<BTreeSet<String>, QueueError> {
        let mut names = self.registry.mcp_servers();
        names.extend(self.config.mcp_servers.iter().cloned());
        names.extend(self.peers.servers().await?.iter().cloned());
        Ok(names)
    }
}

/// What a client has to know of a queue's error.
pub fn queue_error(error: QueueError) -> ApiError {
    match error {
        QueueError::Refused(Refusal::UnknownBatch { batch, .. }) => no_batch(&batch),
        QueueError::Refused(Refusal::UnknownJob(key)) => no_job(&key),
        QueueError::Refused(Refusal::BatchClosed { batch, .. }) => ApiError::Conflict(format!(
            "batch `{batch}` is closed and takes no more jobs; open another one"
        )),
        QueueError::Refused(refusal @ Refusal::TooManyOpenBatches { .. }) => ApiError::Exhausted(
            format!("{refusal}; close some, or raise `open_batches_max` of the coordinator"),
        ),
        QueueError::Refused(Refusal::Field(field)) => ApiError::Field(field),
        QueueError::Unavailable {
            reason,
            retry_after,
        } => {
            tracing::error!(reason, "the queue is unavailable");
            ApiError::Unavailable(format!(
                "the queue is unavailable: {reason}; try again in {} ms",
                retry_after.as_millis()
            ))
        }
        QueueError::Closed => ApiError::Unavailable("the coordinator is shutting down".to_owned()),
    }
}

/// Work off the async threads that failed is a fault of ours.
pub fn blocking_error(error: BlockingFailed) -> ApiError {
    tracing::error!(error = %error, "blocking work failed");
    ApiError::Internal("an internal rule failed; the log has the details".to_owned())
}

/// There is no such batch, or it is another project's.
pub fn no_batch(batch: &BatchId) -> ApiError {
    ApiError::NotFound {
        what: "batch",
        name: batch.to_string(),
    }
}

/// The queue does not know a batch: there is none, or it was lost and is about to be given to the queue again.
async fn missing_batch(shared: &Shared, project: &ProjectId, batch: &BatchId) -> ApiError {
    match shared.journal.has(project, batch).await {
        Ok(false) => no_batch(batch),
        Ok(true) => ApiError::Unavailable(format!(
            "the queue has lost batch `{batch}` and is being given it again; try again in a moment"
        )),
        Err(error) => {
            let error = telemetry::error_chain(&error);
            tracing::warn!(%project, %batch, error, "whether a batch was lost cannot be told");
            ApiError::Unavailable(format!(
                "the queue does not know batch `{batch}`, and whether it was lost cannot be told now: the object \
                 store {} does not answer; try again",
                shared.store.url()
            ))
        }
    }
}

/// The batch of the caller's project that a request names.
async fn find_batch(
    shared: &Shared,
    project: ProjectId,
    name: &str,
) -> Result<BatchView, ApiError> {
    let batch = BatchId::new(name)?;
    let found = shared.queue.batch(project.clone(), batch.clone()).await;
    match found.map_err(queue_error)? {
        Some(found) => Ok(found),
        None => Err(missing_batch(shared, &project, &batch).await),
    }
}

/// There is no such job, or it is another project's.
pub fn no_job(key: &JobKey) -> ApiError {
    ApiError::NotFound {
        what: "job",
        name: format!("{}/{}", key.batch, key.job),
    }
}

/// The job that a request names within the caller's project.
fn job_key(project: ProjectId, batch: &str, id: &str) -> Result<JobKey, FieldError> {
    Ok(JobKey::new(project, BatchId::new(batch)?, JobId::new(id)?))
}
