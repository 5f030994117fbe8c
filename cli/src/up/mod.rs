//! `espalier up`: coordinator, agent worker, embedded queue and file store in one process, over real gRPC on
//! loopback, so that what works here works on many machines. Where no endpoint is named, the model is served in the
//! process too, over real HTTP on loopback.
//!
//! ```text
//! take the data folder → look at the MCP servers → store → listen → model → queue → worker → up.json
//! SIGTERM: no more jobs → running rollouts end or go back → worker gone → model and coordinator gone → up.json gone
//! ```
//! The order of the drain matters: the worker asks the model until its rollouts have ended, and hands its last results to
//! the coordinator, so that those two go last.

mod config;
mod devices;
mod model;
mod place;
mod train;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use espalier_agent_worker::AgentWorkerConfig;
use espalier_coordinator::{CoordinatorConfig, Role, Scope, TokenConfig};
use espalier_core::id::ProjectId;
use espalier_infer_worker::jobs;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::net::Addresses;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{OnFailure, Tasks, blocking};
use espalier_runtime::telemetry::{self, error_chain};
use espalier_train_worker::trainer::EngineLoader;
use rand::RngExt;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, Target, UpFile, store_dir};
use crate::context::{Context, PROJECT_DEFAULT};
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{facts, note};
use crate::servers::{self, Probed, Servers};
pub use config::{Settings, Up};
use devices::Devices;
use place::Place;

/// Beyond the grace of rollouts: last results are acknowledged, servers end, the queue is closed.
const DRAIN_MARGIN: Duration = Duration::from_secs(40);
/// How long everything may take to end once it was told to.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a token: nobody guesses 256 bits.
const TOKEN_BYTES: usize = 32;

/// Runs the command.
pub async fn run(context: &Context, args: &Up) -> Outcome {
    let settings = Settings::load(args, &context.environment)?;
    if settings.endpoint.is_some() {
        settings.devices.check_is_elsewhere()?;
    }
    let place = Place::take(&context.data_dir()?)?;
    let telemetry = telemetry::init(&settings.telemetry, "espalier-up")
        .map_err(|error| Problem::refused(error_chain(&error)))?;
    let outcome = Box::pin(serve(context, settings, &place)).await;
    place.withdraw();
    telemetry.shutdown(FLUSH_LIMIT).await;
    outcome
}

async fn serve(context: &Context, settings: Settings, place: &Place) -> Outcome {
    let shutdown = Shutdown::from_signals(settings.grace + DRAIN_MARGIN)?;
    let tasks = Tasks::new(shutdown.clone());
    let starting = Box::pin(start(context, &settings, place, &tasks, &shutdown));
    let started = tokio::select! {
        started = starting => started,
        () = shutdown.draining() => Err(Problem::failed("stopped before it was up")),
    };
    let served = match started {
        Ok(started) => until_drained(context, &settings, place, &started, &shutdown).await,
        Err(problem) => Err(problem),
    };
    shutdown.drain();
    end(&tasks, &shutdown, settings.grace + DRAIN_MARGIN).await;
    match (served, tasks.first_failure()) {
        (Ok(_), Some(task)) => Err(Problem::failed(format!(
            "`{task}` failed; the log above says why"
        ))),
        (served, _) => served,
    }
}

/// Tells the other commands and the person, and waits for the end.
async fn until_drained(
    context: &Context,
    settings: &Settings,
    place: &Place,
    started: &Started,
    shutdown: &Shutdown,
) -> Outcome {
    place.announce(&started.up)?;
    if let Some(file) = &settings.ready_file {
        std::fs::write(file, &started.up.url).map_err(|error| {
            Problem::failed(format!("cannot write {}: {error}", file.display()))
        })?;
    }
    warn_if_open(settings);
    greet(context, settings, started)?;
    shutdown.draining().await;
    note("draining: running rollouts end or go back to the queue; once more to stop at once");
    Ok(Exit::Ok)
}

/// Waits for the tasks; an abort shortens the wait.
async fn end(tasks: &Tasks, shutdown: &Shutdown, drain_limit: Duration) {
    let ended = tokio::select! {
        ended = tasks.join_all(drain_limit + END_LIMIT) => ended,
        () = async { shutdown.aborted().await; tokio::time::sleep(END_LIMIT).await } => tasks.join_all(Duration::ZERO).await,
    };
    if let Err(unfinished) = ended {
        tracing::warn!(error = %unfinished, "not everything ended in time");
    }
}

/// What runs.
struct Started {
    up: UpFile,
    devices: Devices,
    servers: Vec<(String, Probed)>,
}

/// Starts everything and proves that the coordinator answers.
async fn start(
    context: &Context,
    settings: &Settings,
    place: &Place,
    tasks: &Tasks,
    shutdown: &Shutdown,
) -> Result<Started, Problem> {
    let environment = &context.environment;
    let data_dir = context.data_dir()?;
    let ready = Box::pin(servers::prepare(settings, environment, tasks)).await?;
    // What the worker needs until its end, or until it turns out that there will be none.
    let last = Shutdown::new();
    let unless_started = DrainOnDrop(Some(last.clone()));
    // Before the model, which takes long: what else is wrong is said at once.
    let store_url = store_url(settings, &data_dir);
    let store = Store::open(&store_url).await?;
    let listener = listen(settings).await?;
    let mut devices = Devices::find(settings.devices, settings.endpoint.is_none()).await?;
    let here = match &settings.endpoint {
        Some(_) => None,
        None => {
            let starting = model::start(settings, &mut devices, environment, &store, tasks, &last);
            Some(Box::pin(starting).await?)
        }
    };
    let open = move || EngineLoader::open(devices.train, None, None);
    let loader = blocking("up.train.device", open)
        .await
        .map_err(|error| Problem::failed(error_chain(&error)))?
        .map_err(|error| Problem::failed(error_chain(&error)))?;
    let tokens = Tokens {
        client: place.token(fresh_token)?,
        admin: fresh_token(),
        worker: fresh_token(),
    };
    let up = UpFile {
        url: format!("http://{}", listener.local_addr()?),
        token: tokens.client.clone(),
        admin_token: tokens.admin.clone(),
        store: store_url,
        project: PROJECT_DEFAULT.to_owned(),
        pid: std::process::id(),
        model: here.as_ref().map(|here| here.served.clone()),
    };
    let parts = Parts {
        up: &up,
        tokens: &tokens,
        store,
        servers: ready.servers,
        playwright_dir: ready.playwright_dir,
        data_dir: &data_dir,
        environment,
    };
    let coordinator = coordinator(settings, &parts, listener, last.clone()).await?;
    let rollouts = worker(settings, &parts, here, shutdown.clone())?;
    let trainings = train::worker(&parts, settings.grace, loader, shutdown.clone())?;
    // A half that fails drains all; the other one ends what it does first.
    let worker: Ending = Box::pin(async {
        let (rollouts, trainings) = tokio::join!(rollouts, trainings);
        rollouts.and(trainings)
    });
    run_in_order(tasks, shutdown, last, coordinator, worker);
    unless_started.disarm();
    let target = Target {
        url: up.url.clone(),
        token: Some(Secret::new(tokens.client)),
        origin: "this process".to_owned(),
    };
    Client::connect(&target, None).await?;
    Ok(Started {
        up,
        devices,
        servers: ready.found,
    })
}

/// Drains what was started when the rest was not, however that came.
struct DrainOnDrop(Option<Shutdown>);

impl DrainOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        if let Some(shutdown) = &self.0 {
            shutdown.drain();
        }
    }
}

/// What both halves are made from.
struct Parts<'a> {
    up: &'a UpFile,
    tokens: &'a Tokens,
    store: Store,
    servers: Servers,
    playwright_dir: Option<PathBuf>,
    data_dir: &'a Path,
    environment: &'a Environment,
}

/// Who may call the coordinator.
struct Tokens {
    /// Of clients: the data folder's.
    client: String,
    /// Of the operator: gone with this process, as the worker's is.
    admin: String,
    /// Of the worker.
    worker: String,
}

fn fresh_token() -> String {
    let bytes: [u8; TOKEN_BYTES] = rand::rng().random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn store_url(settings: &Settings, data_dir: &Path) -> String {
    let default = || format!("file://{}", store_dir(data_dir).display());
    settings.store_url.clone().unwrap_or_else(default)
}

async fn listen(settings: &Settings) -> Result<TcpListener, Problem> {
    TcpListener::bind(settings.listen).await.map_err(|error| {
        Problem::refused(format!("cannot listen on {}: {error}", settings.listen))
            .fix("choose another address with --listen; 127.0.0.1:0 takes a free port")
    })
}

type Ending = std::pin::Pin<Box<dyn Future<Output = Result<(), Problem>> + Send>>;

async fn coordinator(
    settings: &Settings,
    parts: &Parts<'_>,
    listener: TcpListener,
    shutdown: Shutdown,
) -> Result<Ending, Problem> {
    let project = ProjectId::new(PROJECT_DEFAULT)?;
    let project = Scope::Project(project);
    let roles = [Role::Submit, Role::Read];
    let tokens = vec![
        TokenConfig::of("up", &parts.tokens.client, project, &roles),
        TokenConfig::of("admin", &parts.tokens.admin, Scope::All, &[Role::Admin]),
        TokenConfig::of("worker", &parts.tokens.worker, Scope::All, &[Role::Worker]),
    ];
    let config = CoordinatorConfig {
        listen: settings.listen,
        mcp_servers: parts.servers.names().into_iter().collect(),
        allow_inline_mcp: settings.allow_inline_mcp,
        lease_ttl_ms: settings.lease_ttl_ms,
        worker_key_names: [model::KEY_NAME.to_owned()].into(),
        ..CoordinatorConfig::new(parts.data_dir, parts.up.store.as_str(), tokens)
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let deps = espalier_coordinator::Deps::with_store(&config, parts.store.clone(), clock)
        .await
        .map_err(|error| Problem::failed(error_chain(&error)))?;
    Ok(Box::pin(async move {
        let ran = espalier_coordinator::run(config, listener, deps, shutdown).await;
        ran.map_err(|error| Problem::failed(error_chain(&error)))
    }))
}

/// Rollouts, and jobs for the model that is served here.
fn worker(
    settings: &Settings,
    parts: &Parts<'_>,
    here: Option<model::Here>,
    shutdown: Shutdown,
) -> Result<Ending, Problem> {
    let coordinator_url =
        Addresses::parse(&parts.up.url).map_err(|error| Problem::failed(error_chain(&error)))?;
    let token = Some(Secret::new(parts.tokens.worker.as_str()));
    // Rollouts use the model to their end.
    let after_rollouts = Shutdown::new();
    let source = jobs::Source {
        coordinators: coordinator_url.clone(),
        tls: None,
        token: token.clone(),
        store: parts.store.clone(),
        shutdown: after_rollouts.clone(),
    };
    let key = |here: &model::Here| {
        let key = Secret::new(here.served.api_key.as_str());
        (model::KEY_NAME.to_owned(), key)
    };
    let config = AgentWorkerConfig {
        coordinator_url,
        token,
        model_extra: settings.extra.clone(),
        allow_inline_mcp: settings.allow_inline_mcp,
        playwright_dir: parts.playwright_dir.clone(),
        slots: settings.slots,
        // It is the user's own machine.
        allow_base_folders: true,
        http_hook_hosts: settings.http_hook_hosts.clone(),
        grace_s: settings.grace.as_secs(),
        model_keys: here.iter().map(key).collect(),
        ..AgentWorkerConfig::new(
            parts.data_dir.join("worker"),
            parts.up.store.as_str(),
            settings.endpoint.clone(),
            settings.model.as_str(),
        )
    };
    config.validate()?;
    let deps = espalier_agent_worker::Deps {
        store: parts.store.clone(),
        mcp: parts.servers.config.clone(),
        environment: parts.environment.clone(),
        clock: Arc::new(SystemClock),
        temp_dir: std::env::temp_dir(),
    };
    Ok(Box::pin(async move {
        let rollouts = Box::pin(async {
            let ran = espalier_agent_worker::run(config, deps, shutdown.clone()).await;
            after_rollouts.drain();
            ran.map_err(|error| Problem::failed(error_chain(&error)))
        });
        let answers = Box::pin(async {
            let Some(here) = here else { return Ok(()) };
            let ran = jobs::run(here.answering, source).await;
            ran.map_err(|error| Problem::failed(error_chain(&error)))
        });
        tokio::try_join!(rollouts, answers).map(drop)
    }))
}

/// Runs both halves; those that the worker needs are told to end, by `last`, when it has ended.
fn run_in_order(
    tasks: &Tasks,
    shutdown: &Shutdown,
    last: Shutdown,
    coordinator: Ending,
    worker: Ending,
) {
    let (outer, aborting) = (shutdown.clone(), last.clone());
    let (whole, gone) = (shutdown.clone(), CancellationToken::new());
    tasks.spawn("up.coordinator", OnFailure::ShutDown, async move {
        let aborted = async {
            outer.aborted().await;
            aborting.abort();
        };
        let ((), ran) = tokio::join!(
            async {
                tokio::select! {
                    () = aborted => {}
                    () = gone.cancelled() => {}
                }
            },
            async {
                let ran = coordinator.await;
                gone.cancel();
                ran
            }
        );
        // Without a coordinator the rest is of no use, however it ended.
        whole.drain();
        ran
    });
    tasks.spawn("up.worker", OnFailure::ShutDown, async move {
        let ran = worker.await;
        last.drain();
        ran
    });
}

/// Says what is given away to who can reach the port.
fn warn_if_open(settings: &Settings) {
    if !settings.is_open() {
        return;
    }
    note(
        "warning: other machines can reach this coordinator, and tokens travel unencrypted: \
         listen on loopback, behind a proxy that speaks TLS",
    );
    if settings.allow_inline_mcp {
        note("warning: jobs may bring commands, which run on this machine (allow_inline_mcp)");
    }
}

/// Where things are and what to do next.
fn greet(context: &Context, settings: &Settings, started: &Started) -> Result<(), Problem> {
    let Started {
        up,
        devices,
        servers,
    } = started;
    let is_here = settings.endpoint.is_none();
    if context.out.json {
        let servers: Vec<&str> = servers.iter().map(|(name, _)| name.as_str()).collect();
        return Ok(context.out.event(&json!({
            "url": up.url, "store": up.store, "project": up.project, "pid": up.pid,
            "model": settings.model, "slots": settings.slots, "mcp_servers": servers,
            "device": is_here.then(|| devices.serve.to_string()), "train_device": devices.train.to_string(),
        }))?);
    }
    let mut rows = vec![
        ("coordinator", up.url.clone()),
        (
            "model",
            match &settings.endpoint {
                Some(endpoint) => format!("{} at {}", settings.model, endpoint.base_url),
                None => format!("{}, served here on {}", settings.model, devices.serving()),
            },
        ),
        ("rollouts", format!("{} at once", settings.slots)),
        ("training", format!("on {}", devices.train)),
        ("store", up.store.clone()),
    ];
    rows.extend(
        servers
            .iter()
            .map(|(name, probed)| ("server", format!("{name}: {}", probed.text()))),
    );
    context.out.line(facts(&rows))?;
    note("next: espalier submit tasks.jsonl --watch");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_and_different() {
        assert_eq!(fresh_token().len(), 2 * TOKEN_BYTES);
        assert_ne!(fresh_token(), fresh_token());
    }
}
