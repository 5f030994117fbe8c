//! The worker loop: a stream to one of the coordinators, leases that are kept alive, and jobs that run under them.
//!
//! A worker process gives [`run`] a [`Handler`] for its kind of job. The loop takes grants as slots are free, renews
//! leases, delivers results until they are acknowledged, drains, and takes the stream up again when it breaks, at whichever
//! coordinator there is: leases and results belong to the queue that all of them share. It knows nothing of what a job
//! does.
//!
//! ```text
//! session (one task) ── links ──► one coordinator, for a moment two
//!    │  ▲                book: leases, results, what is due (pure)
//!    ▼  │ events         job: one task a job: decode, run, catch panics
//! ```
//! Invariants:
//! - A lost connection stops nothing; a lease that could not be renewed for 80 % of its time stops its job, by the
//!   monotonic clock, and nothing of that job is reported any more.
//! - A coordinator that asks its workers to move is left for another stream that is up already; what runs goes on.
//! - A grant beyond the credit that was given is handed back, never run.
//! - A result is sent until it is acknowledged, or until its lease is known to be lost.
//! - A panic of the handler is a failure of the job, never of the process.
//! - A worker that takes one job only asks for no second one, whatever became of the first.

mod book;
mod job;
mod lease;
mod link;
mod once;
pub mod serving;
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
use espalier_core::trace::Summary;
use espalier_proto::v1;
use tokio::sync::watch;

use crate::config::Secret;
use crate::health::Health;
use crate::ids::{IdSource, UuidIds};
use crate::model::Served;
use crate::net::{Addresses, ClientTls, NetError};
use crate::shutdown::Shutdown;
use crate::store::Store;
use crate::tasks::Tasks;

pub use job::JobContext;
pub use lease::{Lease, Stop};
pub use serving::Serving;

/// Most jobs that one worker runs at once: what one message may renew.
pub const SLOTS_MAX: u32 = 1_000;

/// The variable in which a scaler tells a worker which of its instances it is.
pub const INSTANCE_VARIABLE: &str = "ESPALIER_INSTANCE";

/// Does one kind of job.
pub trait Handler: Send + Sync + 'static {
    /// The kind of job that it does. Slots are counted per kind, so a process that does several kinds runs a loop for
    /// each.
    fn kind(&self) -> v1::JobKind;

    /// Does a job. The future must end soon after [`JobContext::lease`] is stopped; five seconds later it is dropped.
    fn run(&self, grant: Grant, context: JobContext) -> impl Future<Output = JobOutcome> + Send;

    /// Hears where models are served, at the beginning and whenever it changes.
    fn endpoints(&self, _served: Vec<Served>) {}

    /// What the process serves to other workers, now and later. None: nothing, ever.
    fn serving(&self) -> Option<watch::Receiver<Serving>> {
        None
    }
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
        summary: Summary,
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

/// What the sessions of one process have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessId(WorkerId);

impl Default for ProcessId {
    /// Of a process that has just started.
    fn default() -> Self {
        Self(fresh_id())
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// How the worker reaches a coordinator, and how much it takes on.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// As which people see it.
    pub process: ProcessId,
    /// Addresses of the coordinators; any of them serves.
    pub coordinators: Addresses,
    /// TLS of the connections.
    pub tls: Option<ClientTls>,
    /// The token with role `worker`.
    pub token: Option<Secret>,
    /// What the worker offers beyond its kind, such as `mcp:browser`.
    pub tags: Vec<String>,
    /// Jobs at once; 1 to [`SLOTS_MAX`].
    pub slots: u32,
    /// How long running jobs may go on once the process drains.
    pub grace: Duration,
    /// How long what a job says of its progress may wait until the coordinator hears of it; none: until its lease is
    /// renewed anyway. For few and long jobs that people watch.
    pub tell_every: Option<Duration>,
    /// Drains the process after its first job, or when none came for so long; none: takes jobs until it is told to end.
    pub once: Option<Duration>,
}

/// What the loop stands on.
#[derive(Clone)]
pub struct WorkerDeps {
    /// Holds large specs.
    pub store: Store,
    /// Told of how the loop does.
    pub health: Health,
    /// The set that jobs run in.
    pub tasks: Tasks,
}

/// Why a worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// An address or the TLS settings cannot work.
    #[error("the coordinators cannot be addressed")]
    Net(#[from] NetError),
    /// The number of slots breaks its rule.
    #[error("`slots` must be in 1..={SLOTS_MAX}, got `{slots}`")]
    Slots {
        /// The number.
        slots: u32,
    },
}

/// Takes and does jobs until `shutdown` drains, then finishes or hands back what it holds. With [`WorkerConfig::once`] it
/// drains `shutdown` itself.
///
/// # Errors
/// The settings cannot work. Coordinators that are away are no error: they are tried for ever.
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
    // Proves the settings once; each connection makes a channel of its own, which a balancer may place elsewhere.
    for address in config.coordinators.iter() {
        crate::net::channel(address, config.tls.as_ref(), config.token.as_ref())?;
    }
    let id = fresh_id();
    tracing::info!(worker = %id, process = %config.process, slots = config.slots, coordinators = %config.coordinators, "worker started");
    session::Session::new(handler, config, deps, shutdown, id, instance())
        .run()
        .await;
    Ok(())
}

/// As a scaler started this process; empty: none did. What is no text was refused when the process began.
fn instance() -> String {
    let mut environment = crate::config::environment().unwrap_or_default();
    environment.remove(INSTANCE_VARIABLE).unwrap_or_default()
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
