//! The host of one worker process: it resolves the servers that a rollout names, connects them and offers their tools.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpUse, ToolPolicy};
use espalier_runtime::tasks::{Tasks, with_deadline};
use futures::future::try_join_all;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::browser;
use super::child::{Launch, find_program, inherited};
use super::config::{
    HttpServer, Isolation, McpConfig, PlaywrightOptions, ServerConfig, ServerKind, ServerOptions,
    StdioServer,
};
use super::connection::{Connection, Reach};
use super::convert::{RawTool, convert};
use super::error::McpError;
use super::launcher::Launcher;
use super::playwright::Installation;
use super::policy::{CompiledPolicy, Verdict};
use super::redact::Secrets;
use super::shared::SharedServers;
use super::toolbox::{Link, ServerInfo, Toolbox, Warning, warnings};

/// How long a browser may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

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

struct Inner {
    servers: McpConfig,
    allow_inline: bool,
    playwright_dir: Option<PathBuf>,
    launcher: Arc<Launcher>,
    shared: Arc<SharedServers>,
    closing: CancellationToken,
    browser_builds: Mutex<HashMap<PathBuf, Option<String>>>,
}

/// A server that a rollout uses, found.
struct Resolved {
    name: String,
    config: ServerConfig,
    is_inline: bool,
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
        let policies = resolved
            .iter()
            .map(|server| CompiledPolicy::new(policy, &server.config.options.deny_default))
            .collect::<Result<Vec<_>, _>>()?;
        let opening = resolved.iter().map(|server| self.open_one(project, server));
        let links = try_join_all(opening).await?;
        let lists = links.iter().zip(&resolved).map(|(link, server)| {
            link.connection
                .list_tools(server.config.options.start_timeout)
        });
        let lists = try_join_all(lists).await?;

        let mut raw = Vec::new();
        let mut named_in_vain = Vec::new();
        let mut unwatched = Vec::new();
        for (link, list) in links.iter().zip(lists) {
            let is_ours = link.connection.is_browser();
            let is_browser =
                is_ours || browser::offers_browser(list.iter().map(|tool| tool.name.as_ref()));
            if is_browser && !is_ours {
                unwatched.push(Warning::UnwatchedBrowser {
                    server: link.connection.server().to_owned(),
                });
            }
            for tool in list {
                let name = tool.name.into_owned();
                if is_browser && browser::NEVER_OFFERED.contains(&name.as_str()) {
                    named_in_vain.push(name);
                    continue;
                }
                raw.push(RawTool {
                    server: link.connection.server().to_owned(),
                    name,
                    description: tool.description.unwrap_or_default().into_owned(),
                    schema: tool.input_schema.as_ref().clone(),
                });
            }
        }
        named_in_vain.retain(|name| policy.allow.contains(name) || policy.ask.contains(name));
        // Names are given before the policy is asked, so that they do not depend on it.
        let mut tools = convert(raw);
        tools.retain_mut(|tool| {
            let policy = resolved
                .iter()
                .zip(&policies)
                .find(|(server, _)| server.name == tool.server);
            let verdict = policy.map_or(Verdict::Deny, |(_, policy)| {
                policy.verdict(tool.name(), &tool.raw_name)
            });
            tool.needs_approval = verdict == Verdict::Ask;
            verdict != Verdict::Deny
        });
        Ok(Toolbox {
            warnings: [unwatched, warnings(&tools, named_in_vain)].concat(),
            links,
            tools,
            cancel,
            closing: self.closing.clone(),
        })
    }

    async fn open_one(&self, project: &ProjectId, server: &Resolved) -> Result<Link, McpError> {
        let options = &server.config.options;
        match &server.config.kind {
            ServerKind::Stdio(stdio) => self.open_stdio(server, stdio).await,
            ServerKind::Http(http) => open_http(&server.name, http, options).await,
            ServerKind::Playwright(browser) => {
                self.open_browser(project, &server.name, browser, options)
                    .await
            }
        }
    }

    async fn open_stdio(&self, server: &Resolved, stdio: &StdioServer) -> Result<Link, McpError> {
        let (name, options) = (server.name.as_str(), &server.config.options);
        let program =
            find_program(&stdio.command, &self.launcher.env).ok_or_else(|| McpError::Missing {
                server: name.to_owned(),
                reason: format!("`command` is {}, which is no program here", stdio.command),
            })?;
        let dir = self
            .launcher
            .private_dir()
            .map_err(|error| start_failed(name, &error))?;
        let mut env = inherited(&self.launcher.env);
        env.extend(stdio.env.clone());
        let launch = Launch {
            program,
            args: stdio.args.clone(),
            env,
            cwd: stdio.cwd.clone().unwrap_or_else(|| dir.path().to_owned()),
            secrets: Secrets::new(stdio.env.values()),
        };
        let started = self.launcher.start(&launch, true);
        let (process, pipes) = started.map_err(|error| match server.is_inline {
            true => FieldError::new("command", &stdio.command, format!("must start: {error}"))
                .under(name)
                .into(),
            false => start_failed(name, &error),
        })?;
        let pipes =
            pipes.ok_or_else(|| start_failed(name, &std::io::Error::other("it has no pipes")))?;
        let reach = Reach::Pipes(pipes);
        // Only a browser is told a root: others take it for the files that they may touch.
        let root = browser::is_playwright(&stdio.command, &stdio.args).then(|| dir.path());
        let owned = Some(Arc::clone(&process));
        let mut connection =
            Connection::open(name, reach, root, owned, options.start_timeout).await?;
        if connection.is_browser() {
            connection
                .open_context(false, options.start_timeout)
                .await?;
        }
        Ok(Link {
            info: info(&connection),
            connection,
            lease: None,
            process: Some(process),
            dirs: vec![dir],
            call_timeout: options.call_timeout,
        })
    }

    async fn open_browser(
        &self,
        project: &ProjectId,
        name: &str,
        browser: &PlaywrightOptions,
        options: &ServerOptions,
    ) -> Result<Link, McpError> {
        let installation =
            Installation::find(browser, self.playwright_dir.as_deref(), &self.launcher.env);
        let installation = installation.map_err(|reason| McpError::Missing {
            server: name.to_owned(),
            reason,
        })?;
        let failed = |error: std::io::Error| start_failed(name, &error);
        // The root of the rollout: where the server puts the files of this context.
        let root = self.launcher.private_dir().map_err(failed)?;
        let timeout = options.start_timeout;
        let (connection, lease, process, dirs) = match options.isolation {
            Isolation::Shared => {
                let key = (project.clone(), installation.digest(browser));
                let lease = self
                    .shared
                    .lease(name, key, &installation, browser, options)
                    .await?;
                let (socket, process) = lease
                    .server()
                    .ok_or_else(|| failed(std::io::Error::other("it ended at once")))?;
                let reach = Reach::Socket(socket);
                let opened =
                    Connection::open(name, reach, Some(root.path()), Some(process), timeout).await;
                let connection = opened.inspect_err(|_| lease.doubt())?;
                (connection, Some(lease), None, vec![root])
            }
            Isolation::Process => {
                let dir = self.launcher.private_dir().map_err(failed)?;
                let launch = installation
                    .prepare(browser, dir.path(), false, &self.launcher.env)
                    .map_err(failed)?;
                let (process, pipes) = self.launcher.start(&launch, true).map_err(failed)?;
                let pipes =
                    pipes.ok_or_else(|| failed(std::io::Error::other("it has no pipes")))?;
                let reach = Reach::Pipes(pipes);
                let connection = Connection::open(
                    name,
                    reach,
                    Some(root.path()),
                    Some(Arc::clone(&process)),
                    timeout,
                )
                .await?;
                (connection, None, Some(process), vec![root, dir])
            }
        };
        let mut link = Link {
            info: info(&connection),
            connection,
            lease,
            process,
            dirs,
            call_timeout: options.call_timeout,
        };
        let opened = link.connection.open_context(true, timeout).await;
        if let (Err(_), Some(lease)) = (&opened, &link.lease) {
            lease.doubt();
        }
        opened?;
        link.info.package_version = Some(installation.version.clone());
        link.info.browser = self.browser_build(&installation).await;
        Ok(link)
    }

    /// What the browser says about its version; asked once.
    async fn browser_build(&self, installation: &Installation) -> Option<String> {
        let mut builds = self.browser_builds.lock().await;
        if let Some(build) = builds.get(installation.chromium()) {
            return build.clone();
        }
        let mut command = tokio::process::Command::new(installation.chromium());
        command
            .arg("--version")
            .env_clear()
            .envs(inherited(&self.launcher.env))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let output = with_deadline("mcp_browser_version", VERSION_TIMEOUT, command.output()).await;
        let build = match output {
            Ok(Ok(output)) => Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            _ => None,
        };
        let build = build.filter(|build| !build.is_empty());
        builds.insert(installation.chromium().to_owned(), build.clone());
        build
    }
}

async fn open_http(
    name: &str,
    http: &HttpServer,
    options: &ServerOptions,
) -> Result<Link, McpError> {
    let connection =
        Connection::open(name, Reach::Http(http), None, None, options.start_timeout).await?;
    Ok(Link {
        info: info(&connection),
        connection,
        lease: None,
        process: None,
        dirs: Vec::new(),
        call_timeout: options.call_timeout,
    })
}

fn start_failed(server: &str, error: &std::io::Error) -> McpError {
    McpError::Start {
        server: server.to_owned(),
        reason: error.to_string(),
        stderr: String::new(),
    }
}

fn info(connection: &Connection) -> ServerInfo {
    let peer = connection.peer_info();
    let implementation = peer.as_ref().and_then(|peer| peer.server_info.clone());
    ServerInfo {
        name: connection.server().to_owned(),
        title: implementation
            .as_ref()
            .map(|own| own.name.clone())
            .unwrap_or_default(),
        version: implementation.map(|own| own.version).unwrap_or_default(),
        protocol: peer
            .map(|peer| peer.protocol_version.to_string())
            .unwrap_or_default(),
        package_version: None,
        browser: None,
    }
}
