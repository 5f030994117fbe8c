//! Opens one server for one rollout, of whichever kind it is: process or address, shared browser or one of its own.
//! What comes of it is a [`Link`], which holds everything that goes with the rollout. Used by `host` alone.

use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::ProjectId;
use espalier_runtime::tasks::with_deadline;
use rustix::io::Errno;

use super::browser;
use super::child::{Launch, find_program, inherited};
use super::config::{
    HttpServer, Isolation, PlaywrightOptions, ServerKind, ServerOptions, StdioServer,
};
use super::connection::{Connection, Reach};
use super::error::McpError;
use super::host::{Inner, Resolved};
use super::launcher::PrivateDir;
use super::playwright::Installation;
use super::redact::Secrets;
use super::toolbox::{Link, ServerInfo};

/// How long a browser may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

impl Inner {
    /// Opens `server`.
    pub(super) async fn open_one(
        &self,
        project: &ProjectId,
        server: &Resolved,
    ) -> Result<Link, McpError> {
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
            secrets: Secrets::of_command(&stdio.args, stdio.env.values()),
        };
        let started = self.launcher.start(&launch, true);
        let (process, pipes) = started.map_err(|error| not_started(server, stdio, &error))?;
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
        let mut link = match options.isolation {
            Isolation::Shared => {
                self.join_browser(project, name, &installation, browser, options)
                    .await?
            }
            Isolation::Process => {
                self.start_browser(name, &installation, browser, options)
                    .await?
            }
        };
        let opened = link
            .connection
            .open_context(true, options.start_timeout)
            .await;
        if let (Err(_), Some(lease)) = (&opened, &link.lease) {
            lease.doubt();
        }
        opened?;
        link.info.package_version = Some(installation.version.clone());
        link.info.browser = self.browser_build(&installation).await;
        Ok(link)
    }

    /// A connection of its own to a server that rollouts share.
    async fn join_browser(
        &self,
        project: &ProjectId,
        name: &str,
        installation: &Installation,
        browser: &PlaywrightOptions,
        options: &ServerOptions,
    ) -> Result<Link, McpError> {
        let root = self.browser_root(name)?;
        let key = (project.clone(), installation.digest(browser));
        let lease = self
            .shared
            .lease(name, key, installation, browser, options)
            .await?;
        let (socket, process) = lease
            .server()
            .ok_or_else(|| start_failed(name, &std::io::Error::other("it ended at once")))?;
        let connection = Connection::open(
            name,
            Reach::Socket(socket),
            Some(root.path()),
            Some(process),
            options.start_timeout,
        )
        .await
        .inspect_err(|_| lease.doubt())?;
        Ok(Link {
            info: info(&connection),
            connection,
            lease: Some(lease),
            process: None,
            dirs: vec![root],
            call_timeout: options.call_timeout,
        })
    }

    /// A server of the rollout's own.
    async fn start_browser(
        &self,
        name: &str,
        installation: &Installation,
        browser: &PlaywrightOptions,
        options: &ServerOptions,
    ) -> Result<Link, McpError> {
        let failed = |error: std::io::Error| start_failed(name, &error);
        let root = self.browser_root(name)?;
        let dir = self.launcher.private_dir().map_err(failed)?;
        let launch = installation
            .prepare(browser, dir.path(), false, &self.launcher.env)
            .map_err(failed)?;
        let (process, pipes) = self.launcher.start(&launch, true).map_err(failed)?;
        let pipes = pipes.ok_or_else(|| failed(std::io::Error::other("it has no pipes")))?;
        let connection = Connection::open(
            name,
            Reach::Pipes(pipes),
            Some(root.path()),
            Some(Arc::clone(&process)),
            options.start_timeout,
        )
        .await?;
        Ok(Link {
            info: info(&connection),
            connection,
            lease: None,
            process: Some(process),
            dirs: vec![root, dir],
            call_timeout: options.call_timeout,
        })
    }

    /// The folder into which the server puts the files of one rollout's context.
    fn browser_root(&self, name: &str) -> Result<PrivateDir, McpError> {
        self.launcher
            .private_dir()
            .map_err(|error| start_failed(name, &error))
    }

    /// What the browser says about its version; asked until it has answered once. One that is slow to answer on a busy
    /// machine may do better for the next rollout, and no rollout waits for another's question.
    async fn browser_build(&self, installation: &Installation) -> Option<String> {
        let program = installation.chromium();
        if let Some(build) = self.browser_builds.lock().await.get(program) {
            return build.clone();
        }
        let mut command = tokio::process::Command::new(program);
        command
            .arg("--version")
            .env_clear()
            .envs(inherited(&self.launcher.env))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let asked = with_deadline("mcp_browser_version", VERSION_TIMEOUT, command.output()).await;
        let output = asked.ok()?.ok();
        let build = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        let build = build.filter(|build| !build.is_empty());
        let mut builds = self.browser_builds.lock().await;
        builds.insert(program.to_owned(), build.clone());
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

/// A job's own server that is no program here never will be one. All else (too many open files or processes, too little
/// memory, a guardian that is gone) is about this worker and this moment.
fn not_started(server: &Resolved, stdio: &StdioServer, error: &io::Error) -> McpError {
    let is_the_jobs = matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
    ) || error.raw_os_error() == Some(Errno::NOEXEC.raw_os_error());
    if server.is_inline && is_the_jobs {
        let rule = format!("must start: {error}");
        let refused = FieldError::new("command", &stdio.command, rule);
        return refused.under(&server.name).into();
    }
    start_failed(&server.name, error)
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

#[cfg(test)]
mod tests {
    use super::super::config::ServerConfig;
    use super::*;
    use espalier_core::error::ErrorClass;
    use espalier_core::spec::McpServer;

    fn class(is_inline: bool, errno: Errno) -> ErrorClass {
        let entry = McpServer {
            command: Some("tool".into()),
            ..McpServer::default()
        };
        let server = Resolved {
            name: "own".to_owned(),
            config: ServerConfig::inline(&entry).unwrap(),
            is_inline,
        };
        let ServerKind::Stdio(stdio) = &server.config.kind else {
            panic!("stdio expected");
        };
        not_started(&server, stdio, &errno.into()).class()
    }

    #[test]
    fn only_what_is_no_program_is_the_fault_of_the_job() {
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::NOEXEC] {
            assert_eq!(class(true, errno), ErrorClass::Invalid, "{errno}");
            assert_eq!(class(false, errno), ErrorClass::Infra, "{errno}");
        }
        for errno in [
            Errno::MFILE,
            Errno::NFILE,
            Errno::AGAIN,
            Errno::NOMEM,
            Errno::PIPE,
            Errno::TXTBSY,
        ] {
            assert_eq!(class(true, errno), ErrorClass::Infra, "{errno}");
        }
    }
}
