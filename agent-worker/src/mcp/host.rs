//! The host of one worker process: it resolves the servers that a rollout names, connects them and offers their tools.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpUse, ToolPolicy};
use espalier_runtime::tasks::Tasks;
use futures::future::try_join_all;
use rmcp::model::Tool;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::brief::brief;
use super::browser;
use super::child::find_program;
use super::config::{McpConfig, ServerConfig, ServerKind};
use super::convert::{RawTool, convert};
use super::error::McpError;
use super::inline::SNAPSHOT_TOOL;
use super::launcher::Launcher;
use super::policy::{CompiledPolicy, DeniedByServer, Verdict};
use super::shared::SharedServers;
use super::toolbox::{Link, Toolbox, Warning, warnings};

/// What a host is made from.
pub struct McpHostConfig {
    /// The servers that jobs may name.
    pub servers: McpConfig,
    /// Whether jobs may bring servers of their own: that lets them run any command here.
    pub allow_inline: bool,
    /// The folder that holds `node_modules/@playwright/mcp`, where a server does not say.
    pub playwright_dir: Option<PathBuf>,
    /// Where the host's private folder is made. Its path has to be short: Unix sockets live below it.
    pub temp_dir: PathBuf,
    /// The process's environment: programs are looked up in its `PATH`, and servers inherit a few variables.
    pub env: BTreeMap<String, String>,
    /// The set that the host's tasks belong to.
    pub tasks: Tasks,
}

/// The MCP host. Clones share it.
#[derive(Clone)]
pub struct McpHost {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub servers: McpConfig,
    pub allow_inline: bool,
    pub playwright_dir: Option<PathBuf>,
    pub launcher: Arc<Launcher>,
    pub shared: Arc<SharedServers>,
    pub closing: CancellationToken,
    pub browser_builds: Mutex<HashMap<PathBuf, Option<String>>>,
}

/// A server that a rollout uses, found.
pub(super) struct Resolved {
    pub name: String,
    pub config: ServerConfig,
    pub is_inline: bool,
}

impl McpHost {
    /// Makes the host's private folder and starts its guardian; servers start when rollouts need them.
    pub fn new(config: McpHostConfig) -> std::io::Result<Self> {
        let launcher = Arc::new(Launcher::new(&config.temp_dir, config.env, config.tasks)?);
        let closing = CancellationToken::new();
        let shared = Arc::new(SharedServers::new(Arc::clone(&launcher), closing.clone()));
        let inner = Inner {
            servers: config.servers,
            allow_inline: config.allow_inline,
            playwright_dir: config.playwright_dir,
            launcher,
            shared,
            closing,
            browser_builds: Mutex::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The servers that jobs may name.
    pub fn server_names(&self) -> Vec<String> {
        self.inner.servers.servers.keys().cloned().collect()
    }

    /// Ids of the server processes that run now: for measurements and tests.
    pub fn process_ids(&self) -> Vec<i32> {
        self.inner.launcher.process_ids()
    }

    /// Connects the servers of a rollout and offers their tools. `rollout` is its name in logs.
    pub async fn connect(
        &self,
        project: &ProjectId,
        rollout: &str,
        uses: &[McpUse],
        policy: &ToolPolicy,
        cancel: CancellationToken,
    ) -> Result<Toolbox, McpError> {
        let opened = self.inner.open(project, uses, policy, cancel.clone());
        let toolbox = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(McpError::Cancelled),
            () = self.inner.closing.cancelled() => Err(McpError::ShuttingDown),
            opened = opened => opened,
        }?;
        for warning in toolbox.warnings() {
            tracing::warn!(rollout, %warning, "tools");
        }
        Ok(toolbox)
    }

    /// Ends every server. `false`: something had not ended in time, and was killed.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        self.inner.closing.cancel();
        self.inner.launcher.shut_down(deadline).await
    }
}

impl Inner {
    fn resolve(&self, uses: &[McpUse]) -> Result<Vec<Resolved>, McpError> {
        let mut names = BTreeSet::new();
        let mut resolved = Vec::new();
        for (i, used) in uses.iter().enumerate() {
            if !names.insert(used.name()) {
                return Err(FieldError::new(
                    format!("mcp[{i}]"),
                    used.name(),
                    "must be named once",
                )
                .into());
            }
            resolved.push(
                self.resolve_one(used)
                    .map_err(|error| error.under(&format!("mcp[{i}]")))?,
            );
        }
        Ok(resolved)
    }

    fn resolve_one(&self, used: &McpUse) -> Result<Resolved, FieldError> {
        match used {
            McpUse::Named(name) => match self.servers.servers.get(name) {
                Some(config) => Ok(Resolved {
                    name: name.clone(),
                    config: config.clone(),
                    is_inline: false,
                }),
                None => {
                    let known: Vec<_> = self.servers.servers.keys().map(String::as_str).collect();
                    let rule = format!("must be a server of this worker ({})", known.join(", "));
                    Err(FieldError::new("server", name, rule))
                }
            },
            McpUse::Inline { name, .. } if !self.allow_inline => {
                let rule = "must be configured on the worker; this one allows no servers of a job's own (`allow_inline_mcp`)";
                Err(FieldError::new("server", name, rule))
            }
            McpUse::Inline { name, server } => {
                let config = ServerConfig::inline(server)?;
                if let ServerKind::Stdio(stdio) = &config.kind
                    && find_program(&stdio.command, &self.launcher.env).is_none()
                {
                    let rule = "must be a program that the worker can find";
                    return Err(FieldError::new("command", &stdio.command, rule));
                }
                Ok(Resolved {
                    name: name.clone(),
                    config,
                    is_inline: true,
                })
            }
        }
    }

    async fn open(
        &self,
        project: &ProjectId,
        uses: &[McpUse],
        policy: &ToolPolicy,
        cancel: CancellationToken,
    ) -> Result<Toolbox, McpError> {
        let resolved = self.resolve(uses)?;
        let compiled = CompiledPolicy::new(policy)?;
        let denied = resolved
            .iter()
            .map(|server| DeniedByServer::new(&server.config.options.deny_default))
            .collect::<Result<Vec<_>, _>>()?;
        let opening = resolved.iter().map(|server| self.open_one(project, server));
        let links = try_join_all(opening).await?;
        let lists = links.iter().zip(&resolved).map(|(link, server)| {
            link.connection
                .list_tools(server.config.options.start_timeout)
        });
        let lists = try_join_all(lists).await?;

        let mut listed = sort_out(&links, lists, policy);
        // Nobody is asked for what the operator denies.
        for (server, denied) in resolved.iter().zip(&denied) {
            if denied.denies(SNAPSHOT_TOOL) {
                listed.browsers.remove(&server.name);
            }
        }
        // Names are given before the policy is asked, so that they do not depend on it.
        let mut tools = convert(listed.raw);
        tools.retain_mut(|tool| {
            let server = resolved
                .iter()
                .zip(&denied)
                .find(|(server, _)| server.name == tool.server);
            let verdict = server.map_or(Verdict::Deny, |(_, denied)| {
                compiled.verdict(denied, tool.name(), &tool.raw_name)
            });
            tool.needs_approval = verdict == Verdict::Ask;
            verdict != Verdict::Deny
        });
        if policy.is_brief() {
            tools
                .iter_mut()
                .for_each(|tool| brief(&mut tool.def.function));
        }
        Ok(Toolbox {
            inlined: match policy.has_inline_snapshots() {
                true => listed.browsers,
                false => BTreeSet::new(),
            },
            warnings: [listed.unwatched, warnings(&tools, listed.named_in_vain)].concat(),
            links,
            tools,
            cancel,
            closing: self.closing.clone(),
        })
    }
}

/// What the servers offer, before the policy is asked.
struct Listed {
    raw: Vec<RawTool>,
    /// Tools that the policy names and that are never offered.
    named_in_vain: Vec<String>,
    unwatched: Vec<Warning>,
    /// Servers that tell of pages as Playwright MCP does.
    browsers: BTreeSet<String>,
}

fn sort_out(links: &[Link], lists: Vec<Vec<Tool>>, policy: &ToolPolicy) -> Listed {
    let mut listed = Listed {
        raw: Vec::new(),
        named_in_vain: Vec::new(),
        unwatched: Vec::new(),
        browsers: BTreeSet::new(),
    };
    for (link, list) in links.iter().zip(lists) {
        let server = link.connection.server();
        let is_ours = link.connection.is_browser();
        let is_browser =
            is_ours || browser::offers_browser(list.iter().map(|tool| tool.name.as_ref()));
        if is_browser && !is_ours {
            let server = server.to_owned();
            listed.unwatched.push(Warning::UnwatchedBrowser { server });
        }
        if is_browser && list.iter().any(|tool| tool.name == SNAPSHOT_TOOL) {
            listed.browsers.insert(server.to_owned());
        }
        for tool in list {
            let name = tool.name.into_owned();
            if is_browser && browser::NEVER_OFFERED.contains(&name.as_str()) {
                if policy.allow.contains(&name) || policy.ask.contains(&name) {
                    listed.named_in_vain.push(name);
                }
                continue;
            }
            listed.raw.push(RawTool {
                server: server.to_owned(),
                name,
                description: tool.description.unwrap_or_default().into_owned(),
                schema: tool.input_schema.as_ref().clone(),
            });
        }
    }
    listed
}
