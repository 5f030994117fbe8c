//! `espalier chat`: an agent in the terminal. The loop is the worker's own, with a person in place of a list of
//! prompts, and the trace is like any other.

mod terminal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use espalier_agent_worker::{Agent, AgentWorkerConfig, Deps};
use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::{JobDraft, LimitsDraft, McpUseDraft, PromptDraft, ToolPolicy};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::Tasks;
use espalier_runtime::telemetry::{self, error_chain};
use serde_json::json;

use crate::client::store_dir;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::note;
use crate::servers::{self, Servers};
use crate::submit::stamp;
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
    /// OpenAI-compatible endpoint, up to and including the version
    #[arg(long, value_name = "URL")]
    pub model_url: Option<String>,
    /// Name of the model at that endpoint
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Environment variable that holds the endpoint's API key
    #[arg(long, value_name = "VAR")]
    pub api_key_env: Option<String>,
    /// MCP servers, in the form that Claude Desktop and Cursor read [default: a built-in server `browser`]
    #[arg(long, value_name = "FILE")]
    pub mcp: Option<PathBuf>,
    /// Shows the windows of browsers
    #[arg(long)]
    pub headed: bool,
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
    /// Folder that holds node_modules/@playwright/mcp
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub playwright_dir: Option<PathBuf>,
    /// The model's settings and more as TOML, as for `up`
    #[arg(long, value_name = "FILE", env = "ESPALIER_CONFIG")]
    pub config: Option<PathBuf>,
}

impl Chat {
    fn settings(&self, context: &Context) -> Result<Settings, Problem> {
        let up = Up {
            model_url: self.model_url.clone(),
            model: self.model.clone(),
            api_key_env: self.api_key_env.clone(),
            mcp: self.mcp.clone(),
            headed: self.headed,
            playwright_dir: self.playwright_dir.clone(),
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
    let now = SystemClock.now();
    let data_dir = context.data_dir()?;
    let store_url = match (&settings.store_url, context.up_file()?) {
        (Some(url), _) => url.clone(),
        (None, Some(up)) => up.store,
        (None, None) => format!("file://{}", store_dir(&data_dir).display()),
    };
    let (servers, playwright_dir) = find_servers(context, settings, &shutdown).await?;
    let draft = draft(args, &servers.names())?;
    let spec = draft.check().map_err(|errors| {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Problem::refused(texts.join("; "))
    })?;
    let config = AgentWorkerConfig {
        model_extra: settings.extra.clone(),
        playwright_dir,
        ..AgentWorkerConfig::new(
            data_dir.join("chat"),
            store_url.as_str(),
            settings.endpoint.clone(),
            settings.model.as_str(),
        )
    };
    let deps = Deps {
        store: Store::open(&store_url).await?,
        mcp: servers.config.clone(),
        environment: context.environment.clone(),
        clock: Arc::new(SystemClock),
        temp_dir: std::env::temp_dir(),
    };
    let agent = Agent::start(&config, &deps, &shutdown)
        .await
        .map_err(|error| Problem::failed(error_chain(&error)))?;
    let key = JobKey::new(
        context.project()?,
        BATCH.parse()?,
        format!("chat-{}", stamp(now)).parse()?,
    );
    let mut terminal = Terminal::new(context.out);
    let cancel = shutdown.drain_token();
    let talking = agent.converse(
        key.clone(),
        Fence(now.0),
        (&draft, &spec),
        &mut terminal,
        cancel,
    );
    let talked = Box::pin(talking).await;
    shutdown.drain();
    agent.end().await;
    match talked {
        Ok(conversed) => {
            if let Some(error) = &conversed.broken {
                note(format!(
                    "the conversation broke off: {}",
                    error_chain(error)
                ));
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
        Err(error) => Err(Problem::failed(error_chain(&error))),
    }
}

/// Looks at the servers before the first word, so that a fault is not found in the middle of a conversation.
async fn find_servers(
    context: &Context,
    settings: &Settings,
    shutdown: &Shutdown,
) -> Result<(Servers, Option<PathBuf>), Problem> {
    let environment = &context.environment;
    let asked = Servers::load(settings.mcp.as_deref(), settings.headed, environment)?;
    let playwright_dir = servers::playwright_dir(settings.playwright_dir.as_deref(), environment);
    let tasks = Tasks::new(shutdown.clone());
    let probing = Box::pin(servers::probe_all(
        asked,
        playwright_dir.clone(),
        environment,
        &tasks,
    ));
    let (servers, found, remarks) = probing.await?;
    for remark in remarks {
        note(format!("warning: {remark}"));
    }
    for (name, probed) in found {
        note(format!("{name}: {}", probed.text()));
    }
    Ok((servers, playwright_dir))
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
