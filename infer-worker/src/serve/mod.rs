//! One inference worker from start to end: model, engine and API together, and a drain in order.

mod adapters;
mod backend;
mod base;
mod device;
mod follow;
mod gauges;
mod memory;
#[cfg(test)]
mod tests;
mod text;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::fetch::{FetchError, Fetcher, Source, Wanted};
use espalier_runtime::ids::UuidIds;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::tasks::{BlockingFailed, OnFailure, Tasks, Unfinished, blocking};
use espalier_runtime::worker::WorkerError;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::api::backend::{AdapterError, Model};
use crate::api::{self, Api, Parts};
use crate::config::Options;
use crate::engine::Health;
use crate::executor::cuda::LoadError;
use crate::grammar::GrammarError;
use crate::jobs::{self, Answering};
use crate::load::{ModelError, ModelFiles};

pub use follow::{Followed, Which};

pub use device::{DTYPE_AUTO, DeviceFound, Library, Survey, survey};

use adapters::Adapters;
use backend::Served;
use base::Base;
use device::DeviceError;
use follow::Follower;
use text::Text;

/// How long gauges may take to end: they wait for nothing.
const TASKS_END_LIMIT: Duration = Duration::from_secs(5);

/// Time between two lines of a log that tell of nothing but waiting.
const SIGN_EVERY: Duration = Duration::from_secs(10);
/// How long the API goes on after the engine failed.
const FAILED_NOTICE: Duration = Duration::from_secs(5);
/// How long refusals may take to reach their readers after that.
const FAILED_END_LIMIT: Duration = Duration::from_secs(5);

/// Why a worker could not start, or did not end in order.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The model's files cannot be had.
    #[error("the model cannot be fetched")]
    Fetch(#[from] FetchError),
    /// They are no model that is served here.
    #[error("the model cannot be served")]
    Model(#[from] ModelError),
    /// It does not run on this machine.
    #[error("the model does not run here")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The vocabulary cannot be used for grammars.
    #[error("grammars cannot be made for the model")]
    Grammar(#[from] GrammarError),
    /// An adapter of the command line was not loaded.
    #[error("an adapter cannot be loaded")]
    Adapter(#[from] AdapterError),
    /// The store of jobs cannot be used.
    #[error("the object store of jobs cannot be used")]
    Store(#[from] StoreError),
    /// Jobs cannot be taken with these settings.
    #[error("jobs cannot be taken")]
    Jobs(#[from] WorkerError),
    /// Answers that did not end in time.
    #[error("answers were broken off")]
    Unfinished(#[from] Unfinished),
    /// The engine failed.
    #[error("the engine failed: {0}")]
    Engine(Arc<str>),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl RunError {
    /// Whether the model takes more memory of a GPU than it may use.
    pub fn is_of_gpu_memory(&self) -> bool {
        let Self::Device(error) = self else {
            return false;
        };
        matches!(
            error.downcast_ref(),
            Some(DeviceError::Cuda(LoadError::Memory(_)))
        )
    }
}

/// A model that runs, and is not served yet.
pub struct Worker {
    served: Arc<Served>,
    api: Api,
    drain_limit: Duration,
    sequences_max: usize,
    jobs: Option<jobs::Source>,
    advertise_url: Option<String>,
    api_key_name: Option<String>,
}

impl Worker {
    /// Fetches and loads the model and its adapters, and starts the engine. `store` is that of jobs and of what is
    /// followed. What draining means to it is that it is healthy no more.
    ///
    /// # Errors
    /// It could not start.
    pub async fn start(
        options: &Options,
        environment: &Environment,
        store: Option<&Store>,
        shutdown: &Shutdown,
    ) -> Result<Self, RunError> {
        let jobs = options.jobs.source(environment, store, shutdown);
        let served = Arc::new(start(options, environment, store, shutdown).await?);
        let api = api_of(&served, options.api_key.clone(), options.seed);
        Ok(Self {
            served,
            api,
            drain_limit: options.drain_limit(),
            sequences_max: options.max_num_seqs as usize,
            jobs,
            advertise_url: options.advertise_url.clone(),
            api_key_name: options.api_key_name.clone(),
        })
    }

    /// What answers jobs, and what other workers are told: that the API is at `url`, under the key that they know by that
    /// name.
    pub fn answering(&self, url: String, api_key_name: Option<String>) -> Answering {
        Answering {
            offline: self.api.offline(),
            health: self.served.engine.watch_health(),
            sequences_max: self.sequences_max,
            serving: self.served.adapters.serving(url, api_key_name),
        }
    }

    /// With coordinators: what answers their jobs, and is told to them.
    fn taking(&self, address: &str) -> Option<(Answering, jobs::Source)> {
        let source = self.jobs.clone()?;
        let url = self.advertise_url.clone();
        let url = url.unwrap_or_else(|| format!("http://{address}/v1"));
        Some((self.answering(url, self.api_key_name.clone()), source))
    }

    /// Serves until `shutdown` drains; then finishes the answers that run, for at most `--shutdown-timeout`.
    ///
    /// # Errors
    /// Answers were broken off, or the engine failed.
    pub async fn serve(self, listener: TcpListener, shutdown: Shutdown) -> Result<(), RunError> {
        let address = listener.local_addr().map(|address| address.to_string());
        let address = address.unwrap_or_default();
        let taking = self.taking(&address);
        let served = self.served;
        let ends = Shutdown::new();
        let tasks = Tasks::new(ends.clone());
        let gauges = gauges::run(Arc::clone(&served), ends.clone());
        tasks.spawn("infer.gauges", OnFailure::Log, gauges);
        if let Some(follower) = &served.follower {
            let follow = follow::run(Arc::clone(follower), Arc::clone(&served), ends.clone());
            tasks.spawn("infer.follow", OnFailure::Log, follow);
        }
        tracing::info!(
            address,
            model = served.base.name,
            context_tokens = served.context_tokens,
            "serving"
        );
        let taking = take_jobs(taking, &shutdown);
        let router = self.api.router();
        let stops = Shutdown::new();
        let serving = async {
            tokio::select! {
                ended = api::serve(listener, router, stops.clone(), self.drain_limit) => ended,
                never = stop(&stops, &shutdown, served.engine.watch_health()) => match never {},
            }
        };
        let (ended, taken) = tokio::join!(serving, taking);
        // Nobody is left who would read what still runs.
        let health = served.engine.stop(Duration::ZERO).await;
        tracing::info!(health = %health, "engine stopped");
        ends.abort();
        tasks.join_all(TASKS_END_LIMIT).await?;
        match health {
            Health::Failed(reason) => Err(RunError::Engine(reason)),
            _ => {
                taken?;
                Ok(ended?)
            }
        }
    }
}

/// Stops the API when the process is told to end, or when the engine has failed: then what runs and what comes is refused
/// for a while, so that whoever looks learns why, and nothing is waited for.
async fn stop(
    stops: &Shutdown,
    shutdown: &Shutdown,
    mut health: watch::Receiver<Health>,
) -> Infallible {
    let failed = async {
        let failed = health.wait_for(|health| matches!(health, Health::Failed(_)));
        if failed.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = shutdown.draining() => {
            stops.drain();
            shutdown.aborted().await;
        }
        () = failed => {
            tokio::time::sleep(FAILED_NOTICE).await;
            stops.drain();
            tokio::time::sleep(FAILED_END_LIMIT).await;
        }
    }
    stops.abort();
    std::future::pending().await
}

/// The API in front of `served`.
fn api_of(served: &Arc<Served>, api_key: Option<Secret>, seed: Option<u64>) -> Api {
    Api::new(Parts {
        backend: Arc::<Served>::clone(served),
        api_key,
        clock: Arc::new(SystemClock),
        ids: Arc::new(UuidIds),
        seed,
    })
}

/// Takes jobs, if there is somebody to take them from. Settings that cannot work end the process: somebody wants its jobs done.
async fn take_jobs(
    taking: Option<(Answering, jobs::Source)>,
    shutdown: &Shutdown,
) -> Result<(), WorkerError> {
    let Some((answering, source)) = taking else {
        return Ok(());
    };
    let taken = Box::pin(jobs::run(answering, source)).await;
    if taken.is_err() {
        shutdown.drain();
    }
    taken
}

/// Starts a worker and serves it until `shutdown` drains.
///
/// # Errors
/// As for [`Worker::start`] and [`Worker::serve`].
pub async fn run(
    options: &Options,
    environment: &Environment,
    listener: TcpListener,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let starting = async {
        let store = match &options.jobs.store_url {
            Some(url) => Some(Store::open(url).await?),
            None => None,
        };
        Worker::start(options, environment, store.as_ref(), &shutdown).await
    };
    let worker = tokio::select! {
        worker = starting => worker?,
        () = shutdown.draining() => return Ok(()),
    };
    worker.serve(listener, shutdown).await
}

async fn start(
    options: &Options,
    environment: &Environment,
    store: Option<&Store>,
    shutdown: &Shutdown,
) -> Result<Served, RunError> {
    let not_here = |error| RunError::Device(Box::new(error));
    device::check(options).await.map_err(not_here)?;
    let fetcher = Fetcher::new(environment, options.download_dir.as_deref());
    let source = Source::parse(&options.model, options.revision.as_deref()).await?;
    let folder = fetcher.fetch(&source, Wanted::Model).await?;
    let files = read(&folder).await?;
    let running = with_signs_of_life(device::start(options, &files)).await;
    let running = running.map_err(not_here)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let base = Model {
        name: options.base_name().to_owned(),
        created_s: clock.now().since(Timestamp::default()).as_secs(),
        adapter: None,
    };
    let max = options.max_loras as usize;
    let known = Arc::new(Base::new(&base.name, &options.model, folder));
    let follower = store.and_then(|store| follower(options, store, &known));
    let adapters = Adapters::new(known, max, fetcher, running.load_weights, clock);
    let served = Served {
        engine: running.engine,
        text: blocking("text.load", move || Text::new(files)).await??,
        adapters,
        follower,
        base,
        context_tokens: running.context_tokens,
        shutdown: shutdown.clone(),
        open: options.is_open(),
    };
    for source in &options.adapters {
        served.adapters.load(source.clone()).await?;
    }
    Ok(served)
}

/// What follows adapters, beside the serving; none where nothing is to be followed.
fn follower(options: &Options, store: &Store, base: &Arc<Base>) -> Option<Arc<Follower>> {
    if options.follow.is_empty() {
        return None;
    }
    let scratch = options.download_dir.clone();
    let follower = Follower::new(
        store.clone(),
        Arc::clone(base),
        Duration::from_secs(options.follow_every.into()),
        scratch.unwrap_or_else(std::env::temp_dir),
        options.follow.clone(),
    );
    Some(Arc::new(follower))
}

/// Says every now and then that weights are still being loaded: large ones take minutes.
async fn with_signs_of_life<T>(loading: impl Future<Output = T>) -> T {
    let mut loading = std::pin::pin!(loading);
    let began = Instant::now();
    loop {
        match tokio::time::timeout(SIGN_EVERY, loading.as_mut()).await {
            Ok(loaded) => return loaded,
            Err(_) => tracing::info!(seconds = began.elapsed().as_secs(), "loading the weights"),
        }
    }
}

async fn read(folder: &Path) -> Result<ModelFiles, RunError> {
    let folder = folder.to_owned();
    Ok(blocking("model.read", move || ModelFiles::read(&folder)).await??)
}
