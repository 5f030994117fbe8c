//! One coordinator from start to end: services on a listener, maintenance beside them, and a drain in good order.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::CoordinatorId;
use espalier_core::queue::MachineConfig;
use espalier_proto::v1;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::ids::{IdSource, UuidIds};
use espalier_runtime::net::{self, MESSAGE_BYTES_MAX, NetError};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::tasks::{self, BlockingFailed, Tasks};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;

use crate::api::{self, AdminApi, JobApi, ModelApi, Shared, trace};
use crate::auth::{Auth, Gate};
use crate::config::CoordinatorConfig;
use crate::endpoints;
use crate::journal::Journal;
use crate::maintenance;
use crate::peers::Peers;
use crate::questions::Questions;
use crate::queue::{ConnectError, Embedded, EmbeddedConfig, OpenError, Queue, Redis, RedisConfig};
use crate::registry::Registry;
use crate::scaler;
use crate::session::WorkerApi;

/// How long tasks may take to end once everything lets go.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Bytes in flight on one stream and on one connection: a chunk of jobs need not wait for window updates.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Largest request of the services that ask for names and numbers only: health and reflection, which are open to
/// everybody, those of models, and those of operators.
const SMALL_REQUEST_BYTES_MAX: usize = 16 << 10;

/// What a coordinator works with, made from its configuration or by a test.
#[derive(Clone)]
pub struct Deps {
    /// The jobs.
    pub queue: Arc<dyn Queue>,
    /// Large specs, manifests and traces; the same that the workers use.
    pub store: Store,
    /// The queue's time: deadlines and delays are the queue's, so that no other clock may be held against them.
    pub clock: Arc<dyn Clock>,
}

impl Deps {
    /// Opens queue and store as `config` names them, the embedded queue on the machine's clock. What keeps a shared
    /// queue connected runs in `tasks`.
    pub async fn open(config: &CoordinatorConfig, tasks: &Tasks) -> Result<Self, RunError> {
        let store = Store::open(&config.store_url).await?;
        match config.is_embedded() {
            true => Self::with_store(config, store, Arc::new(SystemClock)).await,
            false => Self::with_redis(config, store, tasks).await,
        }
    }

    /// Opens the embedded queue beside a store that is open already, as `espalier up` shares one with its worker.
    pub async fn with_store(
        config: &CoordinatorConfig,
        store: Store,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RunError> {
        if !config.is_embedded() {
            let rule = "must be `embedded` where this process brings the queue";
            return Err(FieldError::new("queue", "an address", rule).into());
        }
        let mut embedded = EmbeddedConfig::new(config.queue_file(), clock);
        embedded.machine = machine(config);
        let opened = tasks::blocking("queue.open", move || Embedded::open(embedded)).await?;
        let queue = opened?;
        Ok(Self {
            clock: queue.clock(),
            queue: Arc::new(queue),
            store,
        })
    }

    /// Opens the queue in Redis beside a store that is open already.
    pub async fn with_redis(
        config: &CoordinatorConfig,
        store: Store,
        tasks: &Tasks,
    ) -> Result<Self, RunError> {
        let redis = RedisConfig {
            url: config.queue.clone(),
            name: config.queue_name.clone(),
            shards: config.queue_shards,
            acknowledge: config.queue_acknowledge,
            machine: machine(config),
            clock: None,
        };
        let queue = Redis::open(redis, tasks).await?;
        Ok(Self {
            clock: queue.clock(),
            queue: Arc::new(queue),
            store,
        })
    }
}

/// The shares of projects, as the queue's rules take them.
fn machine(config: &CoordinatorConfig) -> MachineConfig {
    let mut machine = MachineConfig {
        open_batches_max: config.open_batches_max,
        ..MachineConfig::default()
    };
    for (project, settings) in &config.projects {
        machine.weights.insert(project.clone(), settings.weight);
    }
    machine
}

/// Why a coordinator did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration breaks a rule.
    #[error("the configuration is refused")]
    Config(#[from] FieldError),
    /// The queue cannot be opened.
    #[error("the queue cannot be opened")]
    Queue(#[from] OpenError),
    /// The queue in Redis cannot be used.
    #[error("the queue cannot be opened")]
    Redis(#[from] ConnectError),
    /// The store cannot be opened, or ignores create-if-absent.
    #[error("the object store cannot be used")]
    Store(#[from] StoreError),
    /// TLS or the listener cannot be used.
    #[error("the port cannot be served")]
    Net(#[from] NetError),
    /// Reflection could not be built from the descriptors.
    #[error("the descriptors of the services are damaged")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server failed.
    #[error("the server failed")]
    Serve(#[from] tonic::transport::Error),
    /// Opening the queue did not come back.
    #[error("an internal task failed")]
    Blocking(#[from] BlockingFailed),
    /// Workers cannot be made.
    #[error("scaling cannot begin")]
    Scaler(#[from] scaler::StartError),
    /// A task without which the process is of no use ended.
    #[error("task `{0}` failed; the log has the details")]
    Task(&'static str),
}

/// Serves on `listener` until `shutdown` drains, then lets workers and clients go in good order, within the
/// configured limit, and closes the queue. In a process with a worker, drain the worker first: it hands its results
/// to this coordinator.
pub async fn run(
    config: CoordinatorConfig,
    listener: TcpListener,
    deps: Deps,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    config.validate()?;
    let server = net::server(config.tls.as_ref())?
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    warn_if_open(&config, &listener);
    let shared = share(config, deps, shutdown)?;
    let (health, router) = services(server, &shared).await?;
    maintenance::start(&shared, health.clone());
    scaler::start(&shared).await?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "coordinator serves");
    }

    let served = serve(router, listener, &shared, health).await;
    shared.shutdown.abort();
    if let Err(unfinished) = shared.tasks.join_all(END_LIMIT).await {
        tracing::warn!(error = %unfinished, "tasks were cut off");
    }
    shared.queue.close().await;
    served?;
    match shared.tasks.first_failure() {
        Some(task) => Err(RunError::Task(task)),
        None => Ok(()),
    }
}

/// The parts of a coordinator have a shutdown of their own: its abort ends them when serving has ended, without
/// ending whatever else runs in the process.
fn share(
    config: CoordinatorConfig,
    deps: Deps,
    outer: Shutdown,
) -> Result<Arc<Shared>, FieldError> {
    let shutdown = Shutdown::new();
    let tasks = Tasks::new(shutdown.clone());
    let inner = shutdown.clone();
    tasks.spawn("serve.shutdown", tasks::OnFailure::ShutDown, async move {
        tokio::select! {
            () = outer.draining() => {}
            // A failed task drains this coordinator, and with it the process: it is of no use without.
            () = inner.draining() => outer.drain(),
        }
        inner.drain();
        tokio::select! {
            () = outer.aborted() => inner.abort(),
            () = inner.aborted() => {}
        }
    });
    let tokens = config.tokens.iter().map(|token| token.name.clone());
    let watch_places = api::watch::Places::new(tokens, config.watches_max);
    let me = CoordinatorId::new(UuidIds.fresh())?;
    Ok(Arc::new(Shared {
        peers: Peers::new(me, Arc::clone(&deps.queue)),
        journal: Journal::start(
            Arc::clone(&deps.queue),
            deps.store.clone(),
            &config.queue_name,
            config.queue_journal,
            &tasks,
            &shutdown,
        ),
        auth: Arc::new(Auth::new(config.tokens.clone())),
        endpoints: watch::Sender::new(endpoints::to_wire(
            &config.model_endpoints,
            &config.worker_key_names,
            [].into_iter(),
        )),
        config: Arc::new(config),
        queue: deps.queue,
        store: deps.store,
        registry: Arc::new(Registry::default()),
        questions: Arc::new(Questions::default()),
        trace_readers: trace::Readers::default(),
        watch_places,
        clock: deps.clock,
        tasks,
        shutdown,
    }))
}

fn warn_if_open(config: &CoordinatorConfig, listener: &TcpListener) {
    let reachable = listener
        .local_addr()
        .is_ok_and(|address| !address.ip().is_loopback());
    if reachable && config.tls.is_none() {
        tracing::warn!(
            "tokens travel unencrypted: set `tls`, or listen on loopback behind a proxy"
        );
    }
}

async fn services(
    mut server: tonic::transport::Server,
    shared: &Arc<Shared>,
) -> Result<(HealthReporter, Router), RunError> {
    use v1::admin_service_server::AdminServiceServer;
    use v1::job_service_server::JobServiceServer;
    use v1::model_service_server::ModelServiceServer;
    use v1::worker_service_server::WorkerServiceServer;
    let (health, health_service) = tonic_health::server::health_reporter();
    maintenance::report(&health, true, true).await;
    let health_service = health_service.max_decoding_message_size(SMALL_REQUEST_BYTES_MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(espalier_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?
        .max_decoding_message_size(SMALL_REQUEST_BYTES_MAX);
    let gate = Gate(Arc::clone(&shared.auth));
    let jobs = JobServiceServer::new(JobApi(Arc::clone(shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let workers = WorkerServiceServer::new(WorkerApi(Arc::clone(shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let admin = AdminServiceServer::new(AdminApi(Arc::clone(shared)))
        .max_decoding_message_size(SMALL_REQUEST_BYTES_MAX);
    let models = ModelServiceServer::new(ModelApi(Arc::clone(shared)))
        .max_decoding_message_size(SMALL_REQUEST_BYTES_MAX);
    let router = server
        .add_service(health_service)
        .add_service(reflection)
        .add_service(InterceptedService::new(jobs, gate.clone()))
        .add_service(InterceptedService::new(models, gate.clone()))
        .add_service(InterceptedService::new(workers, gate.clone()))
        .add_service(InterceptedService::new(admin, gate));
    Ok((health, router))
}

async fn serve(
    router: Router,
    listener: TcpListener,
    shared: &Shared,
    health: HealthReporter,
) -> Result<(), RunError> {
    let drained = async {
        shared.shutdown.draining().await;
        // Before the port closes, so that whoever asks meanwhile goes elsewhere.
        maintenance::report(&health, false, false).await;
        tracing::info!("coordinator drains");
    };
    let incoming = net::incoming(listener);
    let serving = router.serve_with_incoming_shutdown(incoming, drained);
    let too_long = async {
        shared.shutdown.draining().await;
        tokio::select! {
            () = tokio::time::sleep(shared.config.drain_limit()) => {}
            () = shared.shutdown.aborted() => {}
        }
    };
    tokio::select! {
        served = serving => Ok(served?),
        () = too_long => {
            tracing::warn!("connections were cut off: draining took too long");
            Ok(())
        }
    }
}
