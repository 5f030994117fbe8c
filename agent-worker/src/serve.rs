//! One agent worker from start to end: servers, recorder and endpoint around the worker loop, and a drain in order.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::{JobDraft, RolloutSpec};
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::config::Environment;
use espalier_runtime::health::{self, Health, ListenError};
use espalier_runtime::model::{ModelClient, ModelError};
use espalier_runtime::publish::{NoLease, Published};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::tasks::{self, BlockingFailed, OnFailure, Tasks};
use espalier_runtime::worker::{self, Handler, ProcessId, WorkerConfig, WorkerDeps, WorkerError};
use tokio_util::sync::CancellationToken;

use crate::compare::CompareHandler;
use crate::config::{AgentWorkerConfig, McpSettingsError};
use crate::curate::CurateHandler;
use crate::export::ExportHandler;
use crate::handler::RolloutHandler;
use crate::mcp::{McpConfig, McpHost, McpHostConfig};
use crate::record::{RecordContext, RecordError, Recorder, Spool, ship_leftovers};
use crate::rollout::{self, Conversation, Hooks, Order, RolloutError, Services};

/// How long servers may take to end, browsers included.
const SERVERS_END_LIMIT: Duration = Duration::from_secs(10);
/// How long tasks may take to end once nothing runs any more.
const TASKS_END_LIMIT: Duration = Duration::from_secs(10);

/// What a worker works with, made from its configuration or by a test.
#[derive(Clone)]
pub struct Deps {
    /// Where results go; the same that the coordinator uses.
    pub store: Store,
    /// The servers that jobs may name.
    pub mcp: McpConfig,
    /// The process's environment, which servers inherit a part of.
    pub environment: Environment,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Where the host's sockets lie; its path has to be short.
    pub temp_dir: PathBuf,
}

impl Deps {
    /// Opens the store and reads the servers as `config` names them.
    pub async fn open(
        config: &AgentWorkerConfig,
        environment: Environment,
    ) -> Result<Self, RunError> {
        let store = Store::open(&config.store_url).await?;
        Self::with_store(config, store, environment)
    }

    /// The same beside a store that is open already, as `espalier up` shares one with its coordinator.
    pub fn with_store(
        config: &AgentWorkerConfig,
        store: Store,
        environment: Environment,
    ) -> Result<Self, RunError> {
        Ok(Self {
            store,
            mcp: config.mcp(&environment)?,
            environment,
            clock: Arc::new(SystemClock),
            temp_dir: std::env::temp_dir(),
        })
    }
}

/// Why a worker could not start, or did not end in order.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A key breaks its rule.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// The MCP servers cannot be used.
    #[error(transparent)]
    Mcp(#[from] McpSettingsError),
    /// The MCP host could not be made.
    #[error("the MCP host cannot start")]
    Host(#[source] std::io::Error),
    /// The store cannot be used.
    #[error("the object store cannot be used")]
    Store(#[from] StoreError),
    /// The model's settings cannot work.
    #[error("the model's endpoint cannot be used")]
    Model(#[from] ModelError),
    /// The data folder cannot be used.
    #[error("the data folder cannot be used")]
    Record(#[from] RecordError),
    /// The client for HTTP hooks could not be made.
    #[error("the client for verifier hooks cannot be made")]
    Hooks(#[from] reqwest::Error),
    /// The embedded tokenizer could not be read.
    #[error("the tokenizer cannot be loaded: {reason}")]
    Tokenizer {
        /// Why.
        reason: String,
    },
    /// The loop could not begin.
    #[error("the worker loop cannot start")]
    Worker(#[from] WorkerError),
    /// The port of its health cannot be had.
    #[error(transparent)]
    Health(#[from] ListenError),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

/// A conversation that was published.
#[derive(Debug)]
pub struct Conversed {
    /// Where its trace is.
    pub published: Published,
    /// What broke it off, if something did.
    pub broken: Option<RolloutError>,
}

/// An agent worker that is ready to run rollouts, from a coordinator or from a terminal.
pub struct Agent {
    services: Services,
    record: RecordContext,
    tasks: Tasks,
}

impl Agent {
    /// Takes the data folder, loads the tokenizer and makes the MCP host. Servers start with the first rollout.
    pub async fn start(
        config: &AgentWorkerConfig,
        deps: &Deps,
        shutdown: &Shutdown,
    ) -> Result<Self, RunError> {
        config.validate()?;
        let tasks = Tasks::new(shutdown.clone());
        let record = RecordContext {
            store: deps.store.clone(),
            spool: Spool::open(&config.data_dir).await?,
            clock: Arc::clone(&deps.clock),
            tasks: tasks.clone(),
        };
        let leftovers = ship_leftovers(record.clone(), shutdown.drain_token());
        tasks.spawn_apart("record.leftovers", OnFailure::Log, leftovers);
        let tokenizer = tasks::blocking("tokenizer.load", || Tokenizer::shared().cloned()).await?;
        let tokenizer = tokenizer.map_err(|error| RunError::Tokenizer {
            reason: error.to_string(),
        })?;
        let services = Services {
            mcp: McpHost::new(McpHostConfig {
                servers: deps.mcp.clone(),
                allow_inline: config.allow_inline_mcp,
                playwright_dir: config.playwright_dir.clone(),
                temp_dir: deps.temp_dir.clone(),
                env: deps.environment.clone(),
                tasks: tasks.clone(),
            })
            .map_err(RunError::Host)?,
            model: match &config.model {
                Some(endpoint) => ModelClient::new(endpoint.clone())?,
                None => ModelClient::told(config.model_keys.clone()),
            },
            model_name: config.model_name.clone(),
            extra: config.model_extra.clone(),
            tokenizer,
            hooks: Hooks::new(config.http_hook_hosts.clone())?,
            store: deps.store.clone(),
            clock: Arc::clone(&deps.clock),
        };
        Ok(Self {
            services,
            record,
            tasks,
        })
    }

    /// The MCP host, for measurements and tests.
    pub fn mcp(&self) -> &McpHost {
        &self.services.mcp
    }

    /// Runs one rollout without a coordinator and publishes its trace: `espalier chat`. `key` and `fence` are the
    /// caller's to choose; a fence of microseconds since the epoch is never given twice.
    ///
    /// A conversation that breaks off, because the model is away or the person has had enough, is published too.
    ///
    /// # Errors
    /// The rollout could not begin, or its trace cannot be published.
    pub async fn converse<C: Conversation>(
        &self,
        key: JobKey,
        fence: Fence,
        job: (&JobDraft, &RolloutSpec),
        conversation: &mut C,
        cancel: CancellationToken,
    ) -> Result<Conversed, RolloutError> {
        // Without a digest: what is said is not in the draft, and no job may take it for its result.
        let mut recorder = Recorder::open(self.record.clone(), key, 1, fence, None).await?;
        let (draft, spec) = job;
        let order = Order {
            spec,
            verify: draft.verify.as_ref(),
            labels: &draft.labels,
        };
        let run = rollout::run(&self.services, order, &mut recorder, conversation, cancel);
        let (outcome, broken) = match Box::pin(run).await {
            Ok(outcome) => (outcome, None),
            Err(error) if recorder.has_begun() => (recorder.broken_off(), Some(error)),
            Err(error) => return Err(error),
        };
        let published = recorder.publish(outcome, &NoLease).await?;
        Ok(Conversed { published, broken })
    }

    /// Ends servers and background work, and waits for them.
    pub async fn end(self) {
        if !self.services.mcp.shutdown(SERVERS_END_LIMIT).await {
            tracing::warn!("an MCP server did not end in time and was killed");
        }
        if let Err(unfinished) = self.tasks.join_all(TASKS_END_LIMIT).await {
            tracing::warn!(error = %unfinished, "not everything ended in time");
        }
    }
}

/// Runs an agent worker until `shutdown` drains and everything it holds is finished or handed back.
///
/// # Errors
/// It could not start. A coordinator that is away is no error.
pub async fn run(
    config: AgentWorkerConfig,
    deps: Deps,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let agent = Agent::start(&config, &deps, &shutdown).await?;
    let mut tags = config.tags.clone();
    tags.extend(
        agent
            .services
            .mcp
            .server_names()
            .iter()
            .map(|name| format!("mcp:{name}")),
    );
    let handler = RolloutHandler::new(agent.services.clone(), agent.record.clone());
    let worker = WorkerConfig {
        process: ProcessId::default(),
        coordinators: config.coordinator_url.clone(),
        tls: config.tls.clone(),
        token: config.token.clone(),
        tags,
        slots: config.slots,
        grace: config.grace(),
        tell_every: None,
        once: None,
    };
    let health = Health::default();
    let served = match config.health_listen {
        Some(address) => Some(health::serve(address, health.clone(), &agent.tasks).await?),
        None => None,
    };
    let loop_deps = WorkerDeps {
        store: deps.store.clone(),
        health,
        tasks: agent.tasks.clone(),
    };
    let cpu = WorkerConfig {
        tags: config.tags.clone(),
        slots: config.cpu_slots,
        // What was sent is not sent again, and what else was done the next attempt does again, perhaps elsewhere.
        grace: Duration::ZERO,
        ..worker.clone()
    };
    let curate = CurateHandler::new(&config, &deps);
    let curating = in_slots(curate, cpu.clone(), loop_deps.clone(), shutdown.clone());
    let compare = CompareHandler::new(deps.store.clone(), Arc::clone(&deps.clock));
    let comparing = in_slots(compare, cpu.clone(), loop_deps.clone(), shutdown.clone());
    let export = ExportHandler::new(&config, &deps).await;
    let exporting = in_slots(export, cpu, loop_deps.clone(), shutdown.clone());
    let rollouts = in_slots(handler, worker, loop_deps, shutdown);
    let ended = tokio::try_join!(
        Box::pin(rollouts),
        Box::pin(curating),
        Box::pin(comparing),
        Box::pin(exporting)
    );
    let ended = ended.map(drop);
    drop(served);
    agent.end().await;
    Ok(ended?)
}

/// Takes jobs of one kind, unless there is no slot for them.
async fn in_slots<H: Handler>(
    handler: H,
    config: WorkerConfig,
    deps: WorkerDeps,
    shutdown: Shutdown,
) -> Result<(), WorkerError> {
    match config.slots {
        0 => Ok(()),
        _ => worker::run(Arc::new(handler), config, deps, shutdown).await,
    }
}
