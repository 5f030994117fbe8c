//! The process: takes `train` jobs, one at a time, until it drains.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use espalier_runtime::clock::SystemClock;
use espalier_runtime::config::Secret;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::health::{self, Health, ListenError};
use espalier_runtime::net::{Addresses, ClientTls};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::Tasks;
use espalier_runtime::worker::{self, ProcessId, WorkerConfig, WorkerDeps, WorkerError};
use tokio::sync::Semaphore;

use crate::attempt::Workshop;
use crate::trainer::Load;

/// How often clients hear how far a training is.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How long tasks may take to end once no job runs any more.
const TASKS_END_LIMIT: Duration = Duration::from_secs(10);

/// Where jobs come from, and where their files lie.
#[derive(Clone, Debug)]
pub struct Source {
    /// Addresses of the coordinators.
    pub coordinators: Addresses,
    /// TLS of the connections.
    pub tls: Option<ClientTls>,
    /// The token with role `worker`.
    pub token: Option<Secret>,
    /// The store.
    pub store: Store,
}

/// What a process may do and how long, beside where its jobs come from.
pub struct Permissions {
    /// Whether jobs may name folders of this machine as base models.
    pub allow_local_models: bool,
    /// How long a training that runs may take to store its checkpoint once the process drains.
    pub grace: Duration,
    /// Ends the process after its first job, or when none came for so long; none: it takes one after the other.
    pub once: Option<Duration>,
    /// Where it serves how it does; none: nowhere.
    pub health_listen: Option<SocketAddr>,
}

/// Why a process ended that was not told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The settings cannot work.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The port of its health cannot be had.
    #[error(transparent)]
    Health(#[from] ListenError),
    /// The device has failed; the job was handed back.
    #[error("the device that trains is lost: start the worker again, or look with `nvidia-smi`")]
    DeviceLost,
}

/// Takes jobs and trains until `shutdown` drains. A training that runs then ends after its step, stores a checkpoint and
/// goes back to the queue. A device that fails drains `shutdown`, and so does the end of the only job of
/// [`Permissions::once`].
///
/// # Errors
/// The settings cannot work, or the device has failed. Coordinators that are away are no error: they are tried for ever.
pub async fn run(
    source: Source,
    permissions: Permissions,
    fetcher: Fetcher,
    loader: Arc<dyn Load>,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let tasks = Tasks::new(shutdown.clone());
    let config = WorkerConfig {
        process: ProcessId::default(),
        coordinators: source.coordinators,
        tls: source.tls,
        token: source.token,
        tags: Vec::new(),
        // A training takes the machine as a whole.
        slots: 1,
        grace: permissions.grace,
        tell_every: Some(TELL_EVERY),
        once: permissions.once,
    };
    let health = Health::default();
    let served = match permissions.health_listen {
        Some(address) => Some(health::serve(address, health.clone(), &tasks).await?),
        None => None,
    };
    let deps = WorkerDeps {
        store: source.store.clone(),
        health,
        tasks: tasks.clone(),
    };
    let device_lost = Arc::<AtomicBool>::default();
    let workshop = Workshop {
        store: source.store,
        clock: Arc::new(SystemClock),
        fetcher,
        loader,
        allow_local_models: permissions.allow_local_models,
        shutdown: shutdown.clone(),
        device_lost: Arc::clone(&device_lost),
        machine: Arc::new(Semaphore::new(1)),
    };
    let ended = Box::pin(worker::run(Arc::new(workshop), config, deps, shutdown)).await;
    drop(served);
    if let Err(unfinished) = tasks.join_all(TASKS_END_LIMIT).await {
        tracing::warn!(error = %unfinished, "not every job ended in time");
    }
    ended?;
    match device_lost.load(Ordering::SeqCst) {
        true => Err(RunError::DeviceLost),
        false => Ok(()),
    }
}
