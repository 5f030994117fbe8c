//! MCP servers on this machine: the `mcpServers` file, the built-in browser, and a look whether each of them works.
//! Used by `up`, `chat` and `doctor`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_agent_worker::mcp::{
    McpConfig, McpError, McpHost, McpHostConfig, PlaywrightOptions, ServerConfig, ServerInfo,
    ServerKind, ServerOptions, Toolbox,
};
use espalier_core::id::ProjectId;
use espalier_core::spec::{McpUse, ToolPolicy};
use espalier_runtime::config::Environment;
use espalier_runtime::tasks::{Tasks, with_deadline};
use tokio_util::sync::CancellationToken;

use crate::exit::Problem;
use crate::output::{note, plain};
use crate::up::Settings;

/// The server that there is without a file.
pub const BROWSER: &str = "browser";
/// Where the locked Playwright MCP lies, seen from the root of a checkout.
const PLAYWRIGHT_DIR: &str = "agent-worker/playwright";
/// Longest that all of one server's start, handshake and tool list may take, whatever the file says.
const PROBE_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest that giving back the servers of a probe may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The servers that were asked for.
#[derive(Clone, Debug)]
pub struct Servers {
    /// Their settings.
    pub config: McpConfig,
    /// Whether nobody asked, so that a missing browser is a remark and no refusal.
    pub built_in: bool,
}

impl Servers {
    /// Those of `file`, or the built-in browser. `headed` shows the windows of every browser.
    pub fn load(
        file: Option<&Path>,
        headed: bool,
        environment: &Environment,
    ) -> Result<Self, Problem> {
        let mut servers = match file {
            None => Self::built_in(),
            Some(file) => Self {
                config: read(file, environment)?,
                built_in: false,
            },
        };
        for server in servers.config.servers.values_mut() {
            if let ServerKind::Playwright(options) = &mut server.kind {
                options.headed |= headed;
            }
        }
        Ok(servers)
    }

    fn built_in() -> Self {
        let browser = ServerConfig {
            kind: ServerKind::Playwright(PlaywrightOptions::default()),
            options: ServerOptions::default(),
        };
        Self {
            config: McpConfig {
                servers: BTreeMap::from([(BROWSER.to_owned(), browser)]),
            },
            built_in: true,
        }
    }

    /// The names that jobs use.
    pub fn names(&self) -> Vec<String> {
        self.config.servers.keys().cloned().collect()
    }
}

fn read(file: &Path, environment: &Environment) -> Result<McpConfig, Problem> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| {
        Problem::refused(format!("cannot read {shown}: {error}")).fix(
            "name a file of the form {\"mcpServers\": {\"notes\": {\"command\": \"notes-mcp\"}}}",
        )
    })?;
    let config = McpConfig::parse(&text, environment)
        .map_err(|error| Problem::refused(format!("{shown}: {error}")))?;
    let folder = file.parent().unwrap_or(Path::new(""));
    Ok(config.seen_from(folder, |_| true))
}

/// The folder with the locked Playwright MCP: as given, or the first of the usual places that has one.
pub fn playwright_dir(given: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if let Some(named) = environment.get("ESPALIER_PLAYWRIGHT_DIR") {
        return Some(PathBuf::from(named));
    }
    // Beside an installed binary, in the checkout that it was built in, or in the one that we stand in.
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let beside = beside.iter().flat_map(|folder| {
        [
            "playwright",
            "../share/espalier/playwright",
            "../../agent-worker/playwright",
        ]
        .map(|part| folder.join(part))
    });
    let here = std::env::current_dir()
        .ok()
        .map(|folder| folder.join(PLAYWRIGHT_DIR));
    let has_package = |folder: &PathBuf| {
        folder
            .join("node_modules/@playwright/mcp/package.json")
            .is_file()
    };
    here.into_iter().chain(beside).find(has_package)
}

/// A host for these servers.
pub fn host(
    config: McpConfig,
    playwright_dir: Option<PathBuf>,
    environment: &Environment,
    tasks: &Tasks,
) -> Result<McpHost, Problem> {
    let config = McpHostConfig {
        servers: config,
        allow_inline: false,
        playwright_dir,
        temp_dir: std::env::temp_dir(),
        env: environment.clone(),
        tasks: tasks.clone(),
    };
    McpHost::new(config).map_err(|error| {
        let folder = std::env::temp_dir();
        Problem::failed(format!(
            "cannot make a private folder in {}: {error}",
            folder.display()
        ))
        .fix("make the folder writable, or name another one in TMPDIR")
    })
}

/// What a server that works said of itself.
#[derive(Clone, Debug)]
pub struct Probed {
    /// Its name, version and browser.
    pub info: Option<ServerInfo>,
    /// How many tools it offers.
    pub tools: usize,
}

/// Starts or reaches a server, lists its tools, and lets go of it.
pub async fn probe(host: &McpHost, name: &str) -> Result<Probed, McpError> {
    let uses = [McpUse::Named(name.to_owned())];
    let policy = ToolPolicy::default();
    let project = ProjectId::new("probe")?;
    let connecting = host.connect(&project, "probe", &uses, &policy, CancellationToken::new());
    let toolbox: Toolbox = with_deadline("cli.probe", PROBE_TIMEOUT, connecting)
        .await
        .map_err(|_| McpError::Deadline {
            server: name.to_owned(),
            what: "start".to_owned(),
            after: PROBE_TIMEOUT,
        })??;
    let probed = Probed {
        info: toolbox.servers().into_iter().next(),
        tools: toolbox.tools().len(),
    };
    // A server that does not let go in time is ended with its host.
    let _ = with_deadline("cli.probe.close", CLOSE_TIMEOUT, toolbox.close()).await;
    Ok(probed)
}

impl Probed {
    /// In a few words.
    pub fn text(&self) -> String {
        let Some(info) = &self.info else {
            return format!("{} tools", self.tools);
        };
        let version = info.package_version.as_ref().unwrap_or(&info.version);
        let browser = info
            .browser
            .as_ref()
            .map(|build| format!(", {build}"))
            .unwrap_or_default();
        let named = format!("{} {version}", info.title);
        format!("{}{browser}, {} tools", named.trim_end(), self.tools)
    }
}

/// Servers that work.
pub struct Ready {
    /// Those that were asked for, without a built-in browser that is not installed.
    pub servers: Servers,
    /// The folder with the locked Playwright MCP.
    pub playwright_dir: Option<PathBuf>,
    /// What was seen of each.
    pub found: Vec<(String, Probed)>,
}

/// Looks at every server that the settings name; those that cannot be used are refused with the reason. A built-in
/// browser that is not installed is left out, with a remark to the person.
pub async fn prepare(
    settings: &Settings,
    environment: &Environment,
    tasks: &Tasks,
) -> Result<Ready, Problem> {
    let mut servers = Servers::load(settings.mcp.as_deref(), settings.headed, environment)?;
    let playwright_dir = playwright_dir(settings.playwright_dir.as_deref(), environment);
    let host = host(
        servers.config.clone(),
        playwright_dir.clone(),
        environment,
        tasks,
    )?;
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    for name in servers.names() {
        match probe(&host, &name).await {
            Ok(probed) => found.push((name, probed)),
            Err(error @ McpError::Missing { .. }) if servers.built_in => {
                servers.config.servers.remove(&name);
                note(format!("warning: no browser: {error}"));
            }
            Err(error) => faults.push(fault(&error)),
        }
    }
    host.shutdown(CLOSE_TIMEOUT).await;
    if faults.is_empty() {
        return Ok(Ready {
            servers,
            playwright_dir,
            found,
        });
    }
    Err(Problem::refused(format!("MCP servers cannot be used: {}", faults.join("; ")))
        .fix("correct the file of --mcp, or install what is missing; `espalier doctor --mcp FILE` looks again"))
}

/// What is wrong with a server, with what it said last.
fn fault(error: &McpError) -> String {
    let Some(words) = error.last_words() else {
        return error.to_string();
    };
    let words: Vec<String> = words.lines().map(plain).collect();
    format!("{error}; it last said:\n{}\n", words.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_there_is_a_browser() {
        let servers = Servers::load(None, true, &Environment::new()).unwrap();
        assert!(servers.built_in);
        let kind = &servers.config.servers[BROWSER].kind;
        assert!(
            matches!(kind, ServerKind::Playwright(options) if options.headed),
            "{kind:?}"
        );
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mcp.json");
        let load = || Servers::load(Some(&file), false, &Environment::new());
        assert!(load().unwrap_err().message.contains("cannot read"));
        std::fs::write(&file, r#"{"mcpServers":{"a":{"comand":"x"}}}"#).unwrap();
        assert!(load().unwrap_err().message.contains("mcpServers.a.comand"));
    }

    #[test]
    fn a_given_folder_wins() {
        let environment =
            Environment::from([("ESPALIER_PLAYWRIGHT_DIR".to_owned(), "/b".to_owned())]);
        let found = |given: Option<&str>| playwright_dir(given.map(Path::new), &environment);
        assert_eq!(found(Some("/a")), Some(PathBuf::from("/a")));
        assert_eq!(found(None), Some(PathBuf::from("/b")));
    }
}
