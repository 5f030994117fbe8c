//! `generate` jobs: files of requests from the queue, answered by the engine of this process.
//!
//! ```text
//! uploads ─ranges─► input ─lines─► window ─answers, in order─► output ─pieces─► store ─► manifest
//!                                    │▲ a bounded number at once
//!                                  api::Offline, below the requests of clients
//! ```
//! A line is answered by the code that answers it over HTTP. Pieces of answers are in the store every few seconds, each
//! with a record of the lines that it answers: a later attempt takes them over and goes on after them. What is not in the
//! store when a process dies is answered again.
//!
//! It knows `api` and the engine's health, and `serve` starts it. That the process drains, or that the engine fails, ends
//! the jobs that it has: their pieces are stored, and they go back to the queue.

mod error;
mod handler;
mod input;
mod output;
mod resume;
#[cfg(test)]
mod tests;
mod window;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::clock::SystemClock;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::health;
use espalier_runtime::ids::UuidIds;
use espalier_runtime::net::{Addresses, ClientTls};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::Tasks;
use espalier_runtime::worker::{self, ProcessId, Serving, WorkerConfig, WorkerDeps, WorkerError};
use tokio::sync::{Semaphore, watch};

use crate::api::Offline;
use crate::engine::Health;

use handler::GenerateHandler;

/// The token with role `worker`; never on the command line, where others of the machine can read it.
const TOKEN: &str = "ESPALIER_INFER_WORKER_TOKEN";
/// Jobs at once: a long one does not keep another project's short one waiting.
const JOBS_MAX: u32 = 4;
/// How long tasks may take to end once no job runs any more.
const TASKS_END_LIMIT: Duration = Duration::from_secs(10);

/// The options by which a process takes jobs.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct JobOptions {
    /// Addresses of the coordinators, with commas between them. They tell agent workers of this one, and `generate` jobs are
    /// taken from them; the token goes in ESPALIER_INFER_WORKER_TOKEN.
    #[arg(long, value_name = "URL,…", env = "ESPALIER_INFER_WORKER_COORDINATOR_URL", value_parser = Addresses::parse)]
    pub coordinator_url: Option<Addresses>,
    /// PEM file of the authorities that are trusted, for https:// coordinators.
    #[arg(
        long,
        value_name = "FILE",
        env = "ESPALIER_INFER_WORKER_COORDINATOR_CA",
        requires = "coordinator_url"
    )]
    pub coordinator_ca: Option<PathBuf>,
    /// The object store of the coordinators, which holds the requests and gets the answers, and the adapters that are followed,
    /// such as s3://bucket/prefix.
    #[arg(long, value_name = "URL", env = "ESPALIER_INFER_WORKER_STORE_URL")]
    pub store_url: Option<String>,
}

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
    /// Draining it ends the jobs: no more are taken, and those that run go back.
    pub shutdown: Shutdown,
}

impl JobOptions {
    /// The source that the options name, with its files in `store`; none: no jobs are taken.
    pub fn source(
        &self,
        environment: &Environment,
        store: Option<&Store>,
        shutdown: &Shutdown,
    ) -> Option<Source> {
        let (coordinators, store) = (self.coordinator_url.as_ref()?, store?);
        let token = environment.get(TOKEN).filter(|token| !token.is_empty());
        Some(Source {
            coordinators: coordinators.clone(),
            tls: self.coordinator_ca.clone().map(|ca| ClientTls {
                ca,
                server_name: None,
                cert: None,
                key: None,
            }),
            token: token.map(Secret::new),
            store: store.clone(),
            shutdown: shutdown.clone(),
        })
    }
}

/// What answers.
#[derive(Clone)]
pub struct Answering {
    /// The API.
    pub offline: Offline,
    /// How the engine does.
    pub health: watch::Receiver<Health>,
    /// Sequences that the engine runs at once.
    pub sequences_max: usize,
    /// What is served to others.
    pub serving: watch::Receiver<Serving>,
}

/// Takes jobs and answers them until the source's shutdown drains or the engine fails.
///
/// # Errors
/// The settings cannot work. Coordinators that are away are no error: they are tried for ever.
pub async fn run(answering: Answering, source: Source) -> Result<(), WorkerError> {
    let ends = Shutdown::new();
    let tasks = Tasks::new(ends.clone());
    let config = WorkerConfig {
        process: ProcessId::default(),
        coordinators: source.coordinators,
        tls: source.tls,
        token: source.token,
        // Jobs for a model find it by what is served.
        tags: Vec::new(),
        slots: JOBS_MAX,
        // Nobody waits for the lines that run, and what is in the store is not lost.
        grace: Duration::ZERO,
        tell_every: None,
        once: None,
    };
    let deps = WorkerDeps {
        store: source.store.clone(),
        // Of the engine, which jobs and requests share, tells `/health` of the API.
        health: health::Health::default(),
        tasks: tasks.clone(),
    };
    let mut health = answering.health.clone();
    let handler = GenerateHandler {
        // So many run, and the next ones are at hand when an answer ends.
        window: Arc::new(Semaphore::new(window_of(answering.sequences_max))),
        answering,
        store: source.store,
        clock: Arc::new(SystemClock),
        ids: Arc::new(UuidIds),
    };
    let session = worker::run(Arc::new(handler), config, deps, ends.clone());
    let ending = async {
        tokio::select! {
            () = source.shutdown.draining() => {}
            // A failed engine answers nothing any more: another process takes the jobs.
            _ = health.wait_for(|health| *health != Health::Running) => {
                tracing::warn!("the engine does not run: jobs go back to the queue");
            }
        }
        ends.drain();
        source.shutdown.aborted().await;
        ends.abort();
    };
    let mut session = Box::pin(session);
    let ended = tokio::select! {
        ended = &mut session => ended,
        () = ending => session.await,
    };
    ends.abort();
    if let Err(unfinished) = tasks.join_all(TASKS_END_LIMIT).await {
        tracing::warn!(error = %unfinished, "not every job ended in time");
    }
    ended
}

/// Lines that are with the engine at once.
fn window_of(sequences_max: usize) -> usize {
    sequences_max + sequences_max.div_ceil(4)
}
