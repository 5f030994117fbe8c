//! One attempt at a training: everything is made ready, steps are done and measured, and the result is published.

mod agree;
mod base;
mod dataset;
mod prepare;
mod publish;
mod rows;
mod run;
mod tell;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use espalier_core::adapter::{Agreement, BaseModel};
use espalier_core::spec::{SpecDigest, TrainSpec};
use espalier_runtime::clock::Clock;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::publish::{ByLease, Claim, Published, adopt, spec_digest};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::worker::{Grant, JobContext};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::checkpoint::{Best, Place, Totals};
use crate::data::{Cursor, Order, Samples};
use crate::error::TrainError;
use crate::report::History;
use crate::trainer::{Load, Trainer};

/// What attempts of this process stand on.
pub(crate) struct Workshop {
    pub(crate) store: Store,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) fetcher: Fetcher,
    pub(crate) loader: Arc<dyn Load>,
    /// Whether jobs may name folders of this machine as base models.
    pub(crate) allow_local_models: bool,
    /// Draining it ends trainings after the step that they are at.
    pub(crate) shutdown: Shutdown,
    /// Whether the device has failed, so that this process can train no more.
    pub(crate) device_lost: Arc<AtomicBool>,
    /// One training has the machine: the next waits until the memory of the one before is free.
    pub(crate) machine: Arc<Semaphore>,
}

/// A training that is ready to go on.
pub(crate) struct Training {
    pub(crate) spec: TrainSpec,
    pub(crate) digest: SpecDigest,
    pub(crate) place: Place,
    pub(crate) base: BaseModel,
    /// Where the base model lies.
    pub(crate) folder: PathBuf,
    /// Object path of what it learns from.
    pub(crate) dataset: String,
    pub(crate) data_sha256: String,
    /// Steps in all.
    pub(crate) steps: u64,
    pub(crate) cursor: Cursor,
    pub(crate) totals: Totals,
    pub(crate) best: Option<Best>,
    /// How near it was to serving, before its first step.
    pub(crate) agreement: Option<Agreement>,
    pub(crate) history: History,
    /// After how many steps the last checkpoint was taken.
    pub(crate) checkpoint: Option<u64>,
    /// In its place but while it computes.
    pub(crate) bench: Option<Bench>,
}

/// What computes, moved to a thread that may block and back.
pub(crate) struct Bench {
    pub(crate) trainer: Box<dyn Trainer>,
    pub(crate) order: Order,
    pub(crate) samples: Samples,
    pub(crate) held_out: Option<Samples>,
    /// Most tokens of a micro-batch.
    pub(crate) tokens_max: usize,
    /// Given back with the memory, however the attempt ends.
    pub(crate) _machine: OwnedSemaphorePermit,
}

impl Workshop {
    /// Trains, or takes over what an earlier attempt published.
    pub(crate) async fn attempt(
        &self,
        grant: &Grant,
        context: &JobContext,
    ) -> Result<Published, TrainError> {
        let Some(train) = grant.spec.train() else {
            return Err(TrainError::NoTraining);
        };
        let digest = spec_digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&digest),
        };
        let max_runtime = grant.spec.max_runtime;
        if let Some(published) = adopt(&self.store, claim, max_runtime, context).await? {
            // It may have ended between its manifest and its version.
            self.version_of_adopted(grant, train).await?;
            return Ok(published);
        }
        let lease = context.lease();
        let tell = |text: &str| lease.progress(text);
        let mut training = Box::pin(self.prepare(grant, train, &digest, &tell)).await?;
        Box::pin(self.run(&mut training, &tell)).await?;
        lease.publishing();
        let gate = ByLease(context);
        Box::pin(self.publish(grant, training, claim, &gate)).await
    }
}

/// Says what an attempt is at, for people.
type Tell<'a> = &'a (dyn Fn(&str) + Send + Sync);
