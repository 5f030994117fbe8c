//! The worker loop: one stream to the coordinator, leases that are kept alive, and jobs that run under them.
//!
//! A worker process gives [`run`] a [`Handler`] for its kind of job. The loop takes grants as slots are free, renews
//! leases, delivers results until they are acknowledged, takes the stream up again when it breaks, and drains. It
//! knows nothing of what a job does.
//!
//! ```text
//! session (one task) ── stream ──► coordinator
//!    │  ▲                book: leases, results, what is due (pure)
//!    ▼  │ events         job: one task a job: decode, run, catch panics
//! ```
//! Invariants:
//! - A lost connection stops nothing; a lease that could not be renewed for 80 % of its time stops its job, by the
//!   monotonic clock, and nothing of that job is reported any more.
//! - A result is sent until it is acknowledged, or until its lease is known to be lost.
//! - A panic of the handler is a failure of the job, never of the process.

mod book;
mod job;
mod lease;
mod session;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey, WorkerId};
use espalier_core::spec::{JobDraft, JobSpec};
use espalier_core::trace::RolloutSummary;
use espalier_proto::v1;

use crate::config::Secret;
use crate::ids::{IdSource, UuidIds};
use crate::net::{ClientTls, NetError};
use crate::shutdown::Shutdown;
use crate::store::Store;
use crate::tasks::Tasks;

pub use job::JobContext;
pub use lease::{Lease, Stop};

/// Most jobs that one worker runs at once: what one message may renew.
pub const SLOTS_MAX: u32 = 1_000;

/// Does one kind of job.
pub trait Handler: Send + Sync + 'static {
    /// The kind of job that it does. Slots are counted per kind, so a process that does several kinds runs a loop for
    /// each.
    fn kind(&self) -> v1::JobKind;

    /// Does a job. The future must end soon after [`JobContext::lease`] is stopped; five seconds later it is dropped.
    fn run(&self, grant: Grant, context: JobContext) -> impl Future<Output = JobOutcome> + Send;
}

/// A job to do, decoded and checked.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The job.
    pub key: JobKey,
    /// The number of the lease.
    pub fence: Fence,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// What is to be done.
    pub spec: JobSpec,
    /// The same as the client wrote it.
    pub draft: JobDraft,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub enum JobOutcome {
    /// The result is published.
    Published {
        /// Object path of its manifest.
        manifest: String,
        /// What tables show of it.
        summary: RolloutSummary,
        /// Encoded specs of jobs that follow from it.
        spawn: Vec<Bytes>,
    },
    /// It failed, in the way that the class says.
    Failed {
        /// The class.
        class: ErrorClass,
        /// In words.
        message: String,
        /// Earliest next try, from now.
        retry_after: Option<Duration>,
    },
    /// It was stopped in good order and goes back.
    Released {
        /// Why.
        reason: String,
    },
}

impl JobOutcome {
    /// A failure that the usual backoff follows.
    pub fn failed(class: ErrorClass, message: impl Into<String>) -> Self {
        Self::Failed {
            class,
            message: message.into(),
            retry_after: None,
        }
    }
}

/// How the worker reaches its coordinator, and how much it takes on.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Address of the coordinator.
    pub coordinator: String,
    /// TLS of the connection.
    pub tls: Option<ClientTls>,
    /// The token with role `worker`.
    pub token: Option<Secret>,
    /// What the worker offers beyond its kind, such as `mcp:browser`.
    pub tags: Vec<String>,
    /// Jobs at once; 1 to [`SLOTS_MAX`].
    pub slots: u32,
    /// How long running jobs may go on once the process drains.
    pub grace: Duration,
}

/// What the loop stands on.
#[derive(Clone)]
pub struct WorkerDeps {
    /// Holds large specs.
    pub store: Store,
    /// The set that jobs run in.
    pub tasks: Tasks,
}

/// Why a worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The coordinator's address or the TLS settings cannot work.
    #[error("the coordinator cannot be addressed")]
    Net(#[from] NetError),
    /// The number of slots breaks its rule.
    #[error("`slots` must be in 1..={SLOTS_MAX}, got `{slots}`")]
    Slots {
        /// The number.
        slots: u32,
    },
}

/// Takes and does jobs until `shutdown` drains, then finishes or hands back what it holds.
///
/// # Errors
/// The settings cannot work. A coordinator that is away is no error: it is tried for ever.
pub async fn run<H: Handler>(
    handler: Arc<H>,
    config: WorkerConfig,
    deps: WorkerDeps,
    shutdown: Shutdown,
) -> Result<(), WorkerError> {
    if !(1..=SLOTS_MAX).contains(&config.slots) {
        return Err(WorkerError::Slots {
            slots: config.slots,
        });
    }
    // Proves the address once; each connection makes a channel of its own, which a balancer may place elsewhere.
    crate::net::channel(
        &config.coordinator,
        config.tls.as_ref(),
        config.token.as_ref(),
    )?;
    let id = fresh_id();
    tracing::info!(worker = %id, slots = config.slots, coordinator = config.coordinator, "worker started");
    session::Session::new(handler, config, deps, shutdown, id)
        .run()
        .await;
    Ok(())
}

/// A restarted process is a new worker: it holds none of the old one's leases.
fn fresh_id() -> WorkerId {
    let mut fresh = UuidIds.fresh();
    loop {
        match WorkerId::new(&fresh) {
            Ok(id) => return id,
            // Cannot be: ids satisfy the rule of names, which a test of theirs holds.
            Err(_) => fresh = UuidIds.fresh(),
        }
    }
}
