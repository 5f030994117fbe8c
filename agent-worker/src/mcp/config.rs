//! The `mcpServers` file that Claude Desktop and Cursor read, with Espalier's own keys beside theirs.
//!
//! ```json
//! {"mcpServers": {
//!   "browser": {"preset": "playwright", "espalier": {"isolation": "shared", "contexts_max": 8}},
//!   "notes": {"command": "notes-mcp", "args": ["--db", "n.db"], "env": {"TOKEN": "${NOTES_TOKEN}"}},
//!   "search": {"url": "https://search.example/mcp", "headers": {"authorization": "Bearer ${KEY}"}}
//! }}
//! ```
//! Only `mcpServers` is read at the top: the files of desktop programs hold other things too. Within a server unknown
//! keys are refused, since a misspelt limit would pass for its default.
//!
//! Nothing here reads the environment or starts anything: `${NAME}` is looked up in the map that the caller brings.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::spec::McpServer;
use espalier_runtime::config::expand;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policy::DeniedByServer;

/// Largest file, in bytes: thousands of servers would fit.
const FILE_BYTES_MAX: usize = 1024 * 1024;
/// Most characters in the name of a server: it has to leave room for the tool in a name of 64.
const NAME_CHARS_MAX: usize = 40;
/// Keys of the programs whose file this is, which mean nothing here.
const FOREIGN_KEYS: &[&str] = &[
    "alwaysAllow",
    "autoApprove",
    "description",
    "disabled",
    "icon",
    "name",
    "type",
];
/// Most browser contexts in one server: with more of them one crash takes too many rollouts along.
const CONTEXTS_MAX: u64 = 8;
const OWN_KEYS: &[&str] = &[
    "command", "args", "env", "cwd", "url", "headers", "preset", "espalier",
];

/// The servers that jobs may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct McpConfig {
    /// By name.
    pub servers: BTreeMap<String, ServerConfig>,
}

/// One server and the limits around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// What it is and how it is reached.
    pub kind: ServerKind,
    /// Limits.
    pub options: ServerOptions,
}

/// What a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerKind {
    /// A child process on pipes: one per rollout.
    Stdio(StdioServer),
    /// Streamable HTTP: one connection per rollout.
    Http(HttpServer),
    /// The pinned Playwright MCP, started and pooled by the host.
    Playwright(PlaywrightOptions),
}

/// A child process on pipes. `Debug` shows no values of its environment and no arguments.
#[derive(Clone, PartialEq, Eq)]
pub struct StdioServer {
    /// Program, looked up in `PATH` unless it holds a slash.
    pub command: String,
    /// Arguments.
    pub args: Vec<String>,
    /// Added to the few variables that a server inherits.
    pub env: BTreeMap<String, String>,
    /// Working folder, see [`McpConfig::seen_from`]; a private temporary one where there is none.
    pub cwd: Option<PathBuf>,
}

/// A streamable HTTP server. `Debug` shows no more of its address than the host, and no header values.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpServer {
    /// Address.
    pub url: String,
    /// Sent with each request.
    pub headers: BTreeMap<String, String>,
}

impl fmt::Debug for StdioServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StdioServer")
            .field("command", &self.command)
            .field("args", &self.args.len())
            .field("env", &self.env.keys())
            .field("cwd", &self.cwd)
            .finish()
    }
}

impl fmt::Debug for HttpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = reqwest::Url::parse(&self.url).ok();
        f.debug_struct("HttpServer")
            .field(
                "url",
                &address.map(|address| address.origin().ascii_serialization()),
            )
            .field("headers", &self.headers.keys())
            .finish()
    }
}

/// Settings of the browser preset. Servers with equal settings are shared within a project.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlaywrightOptions {
    /// Shows the browser's windows.
    pub headed: bool,
    /// The browser; the first of `chromium`, `chromium-browser`, `google-chrome` in `PATH` where absent.
    pub chromium: Option<PathBuf>,
    /// Node.js; `node` in `PATH` where absent.
    pub node: Option<PathBuf>,
    /// The folder that holds `node_modules/@playwright/mcp`; the host's where absent.
    pub playwright_dir: Option<PathBuf>,
    /// Proxy for everything that pages load, such as `http://proxy:3128`: the place for egress control.
    pub proxy: Option<String>,
    /// More arguments for the browser.
    pub chromium_args: Vec<String>,
}

/// Whether rollouts share a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// One server for several rollouts of one project, one browser context for each.
    #[default]
    Shared,
    /// One server for each rollout.
    Process,
}

/// Limits around one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Whether rollouts share it; only the browser preset can be shared.
    pub isolation: Isolation,
    /// Most rollouts on one shared server at a time.
    pub contexts_max: u32,
    /// Rollouts after which a shared server is replaced, against what browsers leak.
    pub recycle_after: u32,
    /// Longest that one call may take.
    pub call_timeout: Duration,
    /// Longest that start and handshake may take.
    pub start_timeout: Duration,
    /// How long a shared server stays without a rollout.
    pub idle_stop: Duration,
    /// Globs over tools that no job may use.
    pub deny_default: Vec<String>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            isolation: Isolation::Shared,
            contexts_max: 8,
            recycle_after: 200,
            call_timeout: Duration::from_secs(60),
            start_timeout: Duration::from_secs(30),
            idle_stop: Duration::from_secs(60),
            deny_default: Vec::new(),
        }
    }
}

/// Everything that is wrong with an `mcpServers` file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct ConfigError(pub Vec<FieldError>);

impl McpConfig {
    /// Reads the text of a file. `env` is what `${NAME}` stands for.
    pub fn parse(text: &str, env: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let one = |error| ConfigError(vec![error]);
        if text.len() > FILE_BYTES_MAX {
            let rule = format!("must have at most {FILE_BYTES_MAX} bytes");
            return Err(one(FieldError::new("mcpServers", text.len(), rule)));
        }
        let file: Value = serde_json::from_str(text).map_err(|error| {
            one(FieldError::new(
                "mcpServers",
                "",
                format!("must be JSON: {error}"),
            ))
        })?;
        let Some(entries) = file.get("mcpServers").and_then(Value::as_object) else {
            let rule = "must be an object of servers";
            return Err(one(FieldError::new("mcpServers", "", rule)));
        };
        let mut servers = BTreeMap::new();
        let mut errors = Vec::new();
        for (name, entry) in entries {
            match parse_entry(name, entry, env) {
                Ok(Some(server)) => drop(servers.insert(name.clone(), server)),
                Ok(None) => {}
                Err(error) if error.field.is_empty() => errors.push(FieldError {
                    field: format!("mcpServers.{name}"),
                    ..error
                }),
                Err(error) => errors.push(error.under(&format!("mcpServers.{name}"))),
            }
        }
        if errors.is_empty() {
            Ok(Self { servers })
        } else {
            Err(ConfigError(errors))
        }
    }

    /// Lets relative working folders begin at `folder`, that of the file, for servers that `is_of_file` holds for.
    #[must_use]
    pub fn seen_from(mut self, folder: &Path, is_of_file: impl Fn(&str) -> bool) -> Self {
        for (name, server) in &mut self.servers {
            if let ServerKind::Stdio(StdioServer { cwd: Some(cwd), .. }) = &mut server.kind
                && is_of_file(name)
            {
                *cwd = folder.join(&*cwd);
            }
        }
        self
    }
}

impl ServerConfig {
    /// A server that a job brought along. Nothing is expanded: a job must not read the worker's environment.
    pub fn inline(server: &McpServer) -> Result<Self, FieldError> {
        let kind = kind_of(server)?;
        Ok(Self {
            kind,
            options: ServerOptions::default(),
        })
    }
}

/// One entry as it stands in the file. `None`: the entry is switched off.
fn parse_entry(
    name: &str,
    entry: &Value,
    env: &BTreeMap<String, String>,
) -> Result<Option<ServerConfig>, FieldError> {
    check_name(name)?;
    let Some(keys) = entry.as_object() else {
        return Err(FieldError::new("", entry, "must be an object"));
    };
    for key in keys.keys() {
        if !OWN_KEYS.contains(&key.as_str()) && !FOREIGN_KEYS.contains(&key.as_str()) {
            let rule = format!("is unknown; the keys are {}", OWN_KEYS.join(", "));
            return Err(FieldError::new(key, "…", rule));
        }
    }
    if keys.get("disabled") == Some(&Value::Bool(true)) {
        return Ok(None);
    }
    if let Some(kind @ ("sse" | "ws")) = keys.get("type").and_then(Value::as_str) {
        return Err(FieldError::new("type", kind, "must be stdio or http"));
    }
    let own: serde_json::Map<String, Value> = keys
        .iter()
        .filter(|(key, _)| {
            matches!(
                key.as_str(),
                "command" | "args" | "env" | "cwd" | "url" | "headers"
            )
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let mut server: McpServer = serde_json::from_value(Value::Object(own)).map_err(|_| {
        let rule = "must hold text: command, cwd and url a string, args a list, env and headers an object of strings";
        FieldError::new("", name, rule)
    })?;
    expand_all("env", &mut server.env, env)?;
    expand_all("headers", &mut server.headers, env)?;

    let (mut options, playwright) = parse_own(keys.get("espalier"))?;
    let kind = match keys.get("preset").map(|preset| (preset, preset.as_str())) {
        Some((_, Some("playwright"))) if server == McpServer::default() => {
            ServerKind::Playwright(playwright)
        }
        Some((_, Some("playwright"))) => {
            let rule = "must stand without command, args, env, cwd, url and headers";
            return Err(FieldError::new("preset", "playwright", rule));
        }
        Some((other, _)) => return Err(FieldError::new("preset", other, "must be playwright")),
        None if playwright != PlaywrightOptions::default() => {
            let rule = "may hold settings of the browser only beside `preset`";
            return Err(FieldError::new("espalier", "…", rule));
        }
        None => kind_of(&server)?,
    };
    if !matches!(kind, ServerKind::Playwright(_)) {
        options.isolation = Isolation::Process;
    }
    Ok(Some(ServerConfig { kind, options }))
}

fn check_name(name: &str) -> Result<(), FieldError> {
    let good = !name.trim().is_empty()
        && name.chars().count() <= NAME_CHARS_MAX
        && !name.chars().any(|c| c.is_control() || c == '/');
    if good {
        return Ok(());
    }
    let rule = format!(
        "must be a name of 1 to {NAME_CHARS_MAX} characters without / and control characters"
    );
    Err(FieldError::new("", name, rule))
}

fn kind_of(server: &McpServer) -> Result<ServerKind, FieldError> {
    use espalier_core::spec::McpTransport;
    match server.transport()? {
        McpTransport::Stdio => Ok(ServerKind::Stdio(StdioServer {
            command: server.command.clone().unwrap_or_default(),
            args: server.args.clone(),
            env: server.env.clone(),
            cwd: server.cwd.as_ref().map(PathBuf::from),
        })),
        McpTransport::Http => Ok(ServerKind::Http(HttpServer {
            url: server.url.clone().unwrap_or_default(),
            headers: server.headers.clone(),
        })),
    }
}

/// The key `espalier` of an entry: limits, and beside them the settings of the browser.
#[derive(Deserialize)]
#[serde(default)]
struct OwnKeys {
    isolation: Isolation,
    contexts_max: u32,
    recycle_after: u32,
    call_timeout_s: u64,
    start_timeout_s: u64,
    idle_stop_s: u64,
    deny_default: Vec<String>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Default for OwnKeys {
    fn default() -> Self {
        let options = ServerOptions::default();
        Self {
            isolation: options.isolation,
            contexts_max: options.contexts_max,
            recycle_after: options.recycle_after,
            call_timeout_s: options.call_timeout.as_secs(),
            start_timeout_s: options.start_timeout.as_secs(),
            idle_stop_s: options.idle_stop.as_secs(),
            deny_default: options.deny_default,
            rest: BTreeMap::new(),
        }
    }
}

fn parse_own(value: Option<&Value>) -> Result<(ServerOptions, PlaywrightOptions), FieldError> {
    let Some(value) = value else {
        return Ok(Default::default());
    };
    let refuse = |error: serde_json::Error| {
        FieldError::new("espalier", value, format!("is not understood: {error}"))
    };
    let own: OwnKeys = serde_json::from_value(value.clone()).map_err(refuse)?;
    let rest = own.rest.into_iter().collect();
    let playwright: PlaywrightOptions =
        serde_json::from_value(Value::Object(rest)).map_err(refuse)?;
    let numbers = [
        ("contexts_max", u64::from(own.contexts_max), CONTEXTS_MAX),
        ("recycle_after", u64::from(own.recycle_after), 1_000_000),
        ("call_timeout_s", own.call_timeout_s, 3600),
        ("start_timeout_s", own.start_timeout_s, 600),
        ("idle_stop_s", own.idle_stop_s, 86_400),
    ];
    for (key, number, max) in numbers {
        if !(1..=max).contains(&number) {
            let rule = format!("must be 1 to {max}");
            return Err(FieldError::new(key, number, rule).under("espalier"));
        }
    }
    // A glob that only failed in a rollout would pass for the job's fault.
    DeniedByServer::new(&own.deny_default).map_err(|error| error.under("espalier"))?;
    let options = ServerOptions {
        isolation: own.isolation,
        contexts_max: own.contexts_max,
        recycle_after: own.recycle_after,
        call_timeout: Duration::from_secs(own.call_timeout_s),
        start_timeout: Duration::from_secs(own.start_timeout_s),
        idle_stop: Duration::from_secs(own.idle_stop_s),
        deny_default: own.deny_default,
    };
    Ok((options, playwright))
}

fn expand_all(
    field: &str,
    values: &mut BTreeMap<String, String>,
    env: &BTreeMap<String, String>,
) -> Result<(), FieldError> {
    for (key, value) in values {
        *value = expand(value, env).map_err(|name| {
            let rule = "must name a variable that is set";
            FieldError::new(format!("{field}.{key}"), format!("${{{name}}}"), rule)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> BTreeMap<String, String> {
        [("KEY".to_owned(), "s3cret-value".to_owned())].into()
    }

    fn error_of(entry: &str) -> FieldError {
        let text = format!("{{\"mcpServers\": {{\"x\": {entry}}}}}");
        McpConfig::parse(&text, &env()).unwrap_err().0.remove(0)
    }

    #[test]
    fn reads_what_claude_desktop_reads() {
        let text = r#"{"globalShortcut": "", "mcpServers": {
            "notes": {"command": "notes", "args": ["-v"], "env": {"A": "x ${KEY} y"}, "type": "stdio", "autoApprove": []},
            "search": {"url": "http://h/mcp", "headers": {"authorization": "Bearer ${KEY}"}},
            "off": {"command": "x", "disabled": true},
            "browser": {"preset": "playwright", "espalier": {"isolation": "process", "contexts_max": 2, "headed": true}}
        }}"#;
        let config = McpConfig::parse(text, &env()).unwrap();
        let names: Vec<_> = config.servers.keys().map(String::as_str).collect();
        assert_eq!(names, ["browser", "notes", "search"]);
        let ServerKind::Stdio(notes) = &config.servers["notes"].kind else {
            panic!("{config:?}");
        };
        assert_eq!(notes.env["A"], "x s3cret-value y");
        assert_eq!(
            config.servers["notes"].options.isolation,
            Isolation::Process
        );
        let browser = &config.servers["browser"];
        assert_eq!(browser.options.contexts_max, 2);
        assert_eq!(browser.options.isolation, Isolation::Process);
        assert!(matches!(&browser.kind, ServerKind::Playwright(p) if p.headed));
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn a_relative_folder_is_seen_from_the_file() {
        let text = r#"{"mcpServers": {"own": {"command": "a", "cwd": "tools"}, "other": {"command": "a", "cwd": "tools"},
            "absolute": {"command": "a", "cwd": "/tools"}, "private": {"command": "a"}}}"#;
        let config = McpConfig::parse(text, &env()).unwrap();
        let config = config.seen_from(Path::new("/etc/agents"), |name| name != "other");
        let cwd = |name: &str| match &config.servers[name].kind {
            ServerKind::Stdio(server) => server.cwd.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(cwd("own"), Some("/etc/agents/tools".into()));
        assert_eq!(cwd("other"), Some("tools".into()));
        assert_eq!(cwd("absolute"), Some("/tools".into()));
        assert_eq!(cwd("private"), None);
    }

    #[test]
    fn refuses_with_field_value_and_rule() {
        for (entry, field, part) in [
            (
                r#"{"command": "x", "tiemout": 5}"#,
                "mcpServers.x.tiemout",
                "is unknown",
            ),
            (
                r#"{"command": "x", "url": "http://y"}"#,
                "mcpServers.x.url",
                "must be absent",
            ),
            (r#"{}"#, "mcpServers.x.command", "must be given"),
            (r#"{"url": "ftp://y"}"#, "mcpServers.x.url", "ftp://y"),
            (
                r#"{"url": "http://y", "type": "sse"}"#,
                "mcpServers.x.type",
                "sse",
            ),
            (
                r#"{"command": "x", "env": {"A": "${NOPE}"}}"#,
                "mcpServers.x.env.A",
                "${NOPE}",
            ),
            (
                r#"{"preset": "selenium"}"#,
                "mcpServers.x.preset",
                "selenium",
            ),
            (
                r#"{"preset": "playwright", "command": "x"}"#,
                "mcpServers.x.preset",
                "must stand without",
            ),
            (
                r#"{"command": "x", "espalier": {"contexts_max": 0}}"#,
                "mcpServers.x.espalier.contexts_max",
                "1 to 8",
            ),
            (
                r#"{"preset": "playwright", "espalier": {"contexts_max": 9}}"#,
                "mcpServers.x.espalier.contexts_max",
                "1 to 8",
            ),
            (
                r#"{"command": "x", "espalier": {"deny_default": ["ok", "a}"]}}"#,
                "mcpServers.x.espalier.deny_default[1]",
                "must be a glob",
            ),
            (
                r#"{"command": "x", "espalier": {"contexts": 1}}"#,
                "mcpServers.x.espalier",
                "contexts",
            ),
            (
                r#"{"command": "x", "espalier": {"headed": true}}"#,
                "mcpServers.x.espalier",
                "beside `preset`",
            ),
        ] {
            let error = error_of(entry);
            assert_eq!(error.field, field, "{entry}");
            assert!(error.to_string().contains(part), "{entry}: {error}");
        }
    }

    #[test]
    fn a_refused_value_of_env_is_not_shown() {
        let error = error_of(r#"{"command": "x", "env": {"PIN": 12345678}}"#);
        assert!(!error.to_string().contains("12345678"), "{error}");
        let error = error_of(r#"{"command": "x", "token": "s3cret"}"#);
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }

    #[test]
    fn every_error_of_a_file_is_reported() {
        let text = r#"{"mcpServers": {"a": {}, "b": {"url": "x"}, "c/d": {"command": "x"}}}"#;
        assert_eq!(McpConfig::parse(text, &env()).unwrap_err().0.len(), 3);
        assert!(McpConfig::parse("[]", &env()).is_err());
        assert!(McpConfig::parse("{", &env()).is_err());
    }

    #[test]
    fn an_inline_server_reads_no_environment() {
        let server = McpServer {
            command: Some("x".into()),
            env: [("A".to_owned(), "${KEY}".to_owned())].into(),
            ..McpServer::default()
        };
        let ServerKind::Stdio(stdio) = ServerConfig::inline(&server).unwrap().kind else {
            panic!("stdio expected");
        };
        assert_eq!(stdio.env["A"], "${KEY}");
    }
}
