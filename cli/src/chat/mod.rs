//! `espalier chat`: an agent in the terminal. The loop is the worker's own, with a person in place of a list of
//! prompts, and the trace is like any other.

mod terminal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use espalier_agent_worker::{Agent, AgentWorkerConfig, Conversed, Deps};
use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::{
    JobDraft, LimitsDraft, McpUseDraft, PromptDraft, RolloutSpec, ToolPolicy, Work,
};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::Tasks;
use espalier_runtime::telemetry::{self, error_chain};
use serde_json::json;

use crate::client::{ServedModel, UpFile, store_dir};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::names;
use crate::output::{note, plain};
use crate::rollout_args::RolloutArgs;
use crate::servers::{self, Ready};
use crate::up::{Settings, Up};
use terminal::Terminal;

/// The batch of every chat's trace.
const BATCH: &str = "chat";
/// How long a chat may take to end in order after a signal.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// A person ends a chat; these only bound it, at the largest values that a job may have.
const WALL_S: i64 = 86_400;
const TURNS: i64 = 1_000;
const TOKENS: i64 = 100_000_000;

/// Options of `chat`.
#[derive(Args, Clone, Debug)]
pub struct Chat {
    /// The model, the MCP servers and their browsers.
    #[command(flatten)]
    pub rollouts: RolloutArgs,
    /// Runs tools without asking
    #[arg(long)]
    pub yes: bool,
    /// File with a system text that is part of the task
    #[arg(long, value_name = "FILE")]
    pub system: Option<PathBuf>,
    /// File with a system text that helps now and is left out of training
    #[arg(long, value_name = "FILE")]
    pub hints: Option<PathBuf>,
    /// Object store for the trace [default: that of `up` in the data folder]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// The model's settings and more as TOML, as for `up`
    #[arg(long, value_name = "FILE", env = "ESPALIER_UP_CONFIG")]
    pub config: Option<PathBuf>,
}

impl Chat {
    fn settings(&self, context: &Context) -> Result<Settings, Problem> {
        let up = Up {
            rollouts: RolloutArgs {
                served: served(context)?,
                ..self.rollouts.clone()
            },
            store: self.store.clone(),
            config: self.config.clone(),
            ..Up::default()
        };
        let mut settings = Settings::load(&up, &context.environment)?;
        // A person reads this terminal; what is not a fault would only disturb.
        if !context.environment.contains_key("ESPALIER_LOG") {
            "warn".clone_into(&mut settings.telemetry.log_filter);
        }
        Ok(settings)
    }
}

/// The model of the `up` that runs on the data folder, where it serves one.
fn served(context: &Context) -> Result<Option<ServedModel>, Problem> {
    let up = context.up_file()?.filter(UpFile::is_of_the_living);
    Ok(up.and_then(|up| up.model))
}

/// Runs the command.
pub async fn run(context: &Context, args: &Chat) -> Outcome {
    let settings = args.settings(context)?;
    let telemetry = telemetry::init(&settings.telemetry, "espalier-chat")
        .map_err(|error| Problem::refused(error_chain(&error)))?;
    let outcome = Box::pin(converse(context, args, &settings)).await;
    telemetry.shutdown(FLUSH_LIMIT).await;
    outcome
}

async fn converse(context: &Context, args: &Chat, settings: &Settings) -> Outcome {
    let shutdown = Shutdown::from_signals(END_LIMIT)?;
    let data_dir = context.data_dir()?;
    let store_url = match (&settings.store_url, context.up_file()?) {
        (Some(url), _) => url.clone(),
        (None, Some(up)) => up.store,
        (None, None) => format!("file://{}", store_dir(&data_dir).display()),
    };
    let ready = find_servers(context, settings, &shutdown).await?;
    let job = ChatJob::new(context, args, &ready.servers.names())?;
    let config = AgentWorkerConfig {
        model_extra: settings.extra.clone(),
        playwright_dir: ready.playwright_dir,
        ..AgentWorkerConfig::new(
            data_dir.join("chat"),
            store_url.as_str(),
            settings.served_elsewhere()?.clone(),
            settings.model.as_str(),
        )
    };
    let deps = Deps {
        store: Store::open(&store_url).await?,
        mcp: ready.servers.config,
        environment: context.environment.clone(),
        clock: Arc::new(SystemClock),
        temp_dir: std::env::temp_dir(),
    };
    let agent = Agent::start(&config, &deps, &shutdown)
        .await
        .map_err(|error| Problem::failed(error_chain(&error)))?;
    let mut terminal = Terminal::new(context.out);
    let talking = agent.converse(
        job.key.clone(),
        job.fence,
        (&job.draft, &job.rollout),
        &mut terminal,
        shutdown.drain_token(),
    );
    let talked = Box::pin(talking).await;
    shutdown.drain();
    agent.end().await;
    let conversed = talked.map_err(|error| Problem::failed(error_chain(&error)))?;
    report(context, &job.key, &store_url, &conversed)
}

/// The conversation as a job, which no queue knows.
struct ChatJob {
    key: JobKey,
    fence: Fence,
    draft: JobDraft,
    rollout: RolloutSpec,
}

impl ChatJob {
    fn new(context: &Context, args: &Chat, servers: &[String]) -> Result<Self, Problem> {
        let now = SystemClock.now();
        let draft = draft(args, servers)?;
        let spec = draft.check().map_err(|errors| {
            let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
            Problem::refused(texts.join("; "))
        })?;
        let Work::Rollout(rollout) = spec.work else {
            return Err(Problem::failed("a conversation is a rollout"));
        };
        let job = format!("chat-{}", names::stamp(now)).parse()?;
        Ok(Self {
            key: JobKey::new(context.project()?, BATCH.parse()?, job),
            fence: Fence(now.0),
            draft,
            rollout: *rollout,
        })
    }
}

fn report(context: &Context, key: &JobKey, store_url: &str, conversed: &Conversed) -> Outcome {
    if let Some(error) = &conversed.broken {
        note(format!(
            "the conversation broke off: {}",
            error_chain(error)
        ));
        if let Some(words) = error.last_words() {
            let words: Vec<String> = words.lines().map(plain).collect();
            note(format!("the server last said:\n{}", words.join("\n")));
        }
    }
    let manifest = &conversed.published.manifest;
    context.out.show(
        || json!({"job": key, "manifest": manifest, "store": store_url}),
        || format!("\ntrace: espalier traces show {}/{}", key.batch, key.job),
    )?;
    Ok(if conversed.broken.is_some() {
        Exit::Failed
    } else {
        Exit::Ok
    })
}

/// Looks at the servers before the first word, so that a fault is not found in the middle of a conversation.
async fn find_servers(
    context: &Context,
    settings: &Settings,
    shutdown: &Shutdown,
) -> Result<Ready, Problem> {
    let tasks = Tasks::new(shutdown.clone());
    let ready = Box::pin(servers::prepare(settings, &context.environment, &tasks)).await?;
    for (name, probed) in &ready.found {
        note(format!("{name}: {}", probed.text()));
    }
    Ok(ready)
}

fn draft(args: &Chat, servers: &[String]) -> Result<JobDraft, Problem> {
    let ask = if args.yes {
        Vec::new()
    } else {
        vec!["*".to_owned()]
    };
    Ok(JobDraft {
        // What is said comes from the terminal; a job without a prompt would be refused.
        prompt: PromptDraft::One("(chat)".to_owned()),
        system: read(args.system.as_deref())?,
        hints: read(args.hints.as_deref())?,
        mcp: servers.iter().cloned().map(McpUseDraft::Named).collect(),
        tools: Some(ToolPolicy {
            ask,
            ..ToolPolicy::default()
        }),
        limits: Some(LimitsDraft {
            turns: Some(TURNS),
            tokens: Some(TOKENS),
            wall_s: Some(WALL_S),
            ask_s: Some(WALL_S),
            ..LimitsDraft::default()
        }),
        ..JobDraft::default()
    })
}

fn read(file: Option<&Path>) -> Result<Option<String>, Problem> {
    let Some(file) = file else { return Ok(None) };
    std::fs::read_to_string(file)
        .map(Some)
        .map_err(|error| Problem::refused(format!("cannot read {}: {error}", file.display())))
}
