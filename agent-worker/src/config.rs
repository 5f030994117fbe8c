//! The configuration of an agent worker: one TOML file, every key also as
//! `ESPALIER_AGENT_WORKER_…`, unknown keys refused.
//!
//! `main` loads it, `espalier up` builds it in code; [`AgentWorkerConfig::validate`] runs before anything starts.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::hub::{HubConfig, HubSettings};
use espalier_runtime::model::ModelEndpoint;
use espalier_runtime::net::{Addresses, ClientTls};
use espalier_runtime::telemetry::TelemetryConfig;
use espalier_runtime::worker::SLOTS_MAX;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::mcp::{self, McpConfig};

/// Every key as a variable begins with this.
pub const ENV_PREFIX: &str = "ESPALIER_AGENT_WORKER_";
/// Largest `mcp_config` file, in bytes: hundreds of servers.
const MCP_FILE_BYTES_MAX: u64 = 1 << 20;

/// An agent worker's configuration.
///
/// ```toml
/// coordinator_url = "http://127.0.0.1:7411"
/// token = { file = "/run/secrets/espalier-worker" }
/// data_dir = "/var/lib/espalier-worker"
/// store_url = "file:///var/lib/espalier/store"
/// model_name = "Qwen/Qwen3-4B"
/// mcp_config = "/etc/espalier/mcp.json"
/// slots = 8
///
/// [model]
/// base_url = "http://localhost:8000/v1"
/// ```
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentWorkerConfig {
    /// Addresses of the coordinators, as a list or with commas between them; a name may stand for several. The worker
    /// speaks to any one of them.
    #[serde(default = "default_coordinator_url")]
    pub coordinator_url: Addresses,
    /// Token with role `worker`.
    #[serde(default)]
    pub token: Option<Secret>,
    /// How the coordinator's certificate is checked; needed with `https://`.
    #[serde(default)]
    pub tls: Option<ClientTls>,
    /// Folder of this process alone, where steps are kept until the store has them.
    pub data_dir: PathBuf,
    /// The object store that the coordinator uses as well.
    pub store_url: String,
    /// Where the model is served. Absent: at the endpoints that the coordinator names.
    #[serde(default)]
    pub model: Option<ModelEndpoint>,
    /// Keys of the endpoints that the coordinator names, each under the name by which it asks for it.
    #[serde(default)]
    pub model_keys: BTreeMap<String, Secret>,
    /// The model's name there, for jobs that name none.
    pub model_name: String,
    /// More fields of every request to it, such as `repetition_penalty`.
    #[serde(default)]
    pub model_extra: Map<String, Value>,
    /// File with `mcpServers`, in the form that Claude Desktop and Cursor read.
    #[serde(default)]
    pub mcp_config: Option<PathBuf>,
    /// The same entries in this file, by name; they come on top.
    #[serde(default)]
    pub mcp_servers: Map<String, Value>,
    /// Whether jobs may bring servers of their own: that lets whoever may submit run any command here.
    #[serde(default)]
    pub allow_inline_mcp: bool,
    /// Folder that holds `node_modules/@playwright/mcp`.
    #[serde(default)]
    pub playwright_dir: Option<PathBuf>,
    /// Rollouts at once.
    #[serde(default = "default_slots")]
    pub slots: u32,
    /// Jobs of each kind that takes cores, data sets, comparisons and exports, at once beside the rollouts; 0: none are taken.
    #[serde(default = "default_cpu_slots")]
    pub cpu_slots: u32,
    /// How exports reach the Hugging Face hub, where that differs from what the environment says.
    #[serde(default)]
    pub hub: HubConfig,
    /// Whether exports may read a base model, and data sets a tokenizer, from a folder of this machine, which is whatever
    /// whoever trained or asks for a data set named.
    #[serde(default)]
    pub allow_base_folders: bool,
    /// What the worker offers beyond its MCP servers, for jobs that need it.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Hosts (`host` or `host:port`) whose HTTP hooks verifiers may ask.
    #[serde(default)]
    pub http_hook_hosts: Vec<String>,
    /// How long running rollouts may go on when the process drains, in seconds.
    #[serde(default = "default_grace_s")]
    pub grace_s: u64,
    /// Where `/health` and `/ready` are served over plain HTTP, such as `127.0.0.1:7414`. Absent: nowhere.
    #[serde(default)]
    pub health_listen: Option<SocketAddr>,
    /// Logs, traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// Servers and further fields may hold secrets as plain text: their names alone are shown.
impl fmt::Debug for AgentWorkerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn names(map: &Map<String, Value>) -> Vec<&str> {
            map.keys().map(String::as_str).collect()
        }
        f.debug_struct("AgentWorkerConfig")
            .field("coordinator_url", &self.coordinator_url)
            .field("token", &self.token)
            .field("tls", &self.tls)
            .field("data_dir", &self.data_dir)
            .field("store_url", &self.store_url)
            .field("model", &self.model)
            .field("model_keys", &self.model_keys.keys())
            .field("model_name", &self.model_name)
            .field("model_extra", &names(&self.model_extra))
            .field("mcp_config", &self.mcp_config)
            .field("mcp_servers", &names(&self.mcp_servers))
            .field("allow_inline_mcp", &self.allow_inline_mcp)
            .field("playwright_dir", &self.playwright_dir)
            .field("slots", &self.slots)
            .field("cpu_slots", &self.cpu_slots)
            .field("hub", &self.hub)
            .field("allow_base_folders", &self.allow_base_folders)
            .field("tags", &self.tags)
            .field("http_hook_hosts", &self.http_hook_hosts)
            .field("grace_s", &self.grace_s)
            .field("health_listen", &self.health_listen)
            .field("telemetry", &self.telemetry)
            .finish()
    }
}

fn default_coordinator_url() -> Addresses {
    Addresses::of(SocketAddr::from((Ipv4Addr::LOCALHOST, 7411)))
}

fn default_slots() -> u32 {
    8
}

/// Such a job takes every core for much of its time.
fn default_cpu_slots() -> u32 {
    1
}

fn default_grace_s() -> u64 {
    30
}

/// Why the MCP servers of a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum McpSettingsError {
    /// The file cannot be read.
    #[error("`mcp_config` file `{}` cannot be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("`mcp_config` file `{}` {rule}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The rule that it breaks.
        rule: String,
    },
    /// Entries break rules.
    #[error("MCP servers: {0}")]
    Entries(#[from] mcp::ConfigError),
}

impl AgentWorkerConfig {
    /// A configuration with every default.
    pub fn new(
        data_dir: impl Into<PathBuf>,
        store_url: impl Into<String>,
        model: impl Into<Option<ModelEndpoint>>,
        model_name: impl Into<String>,
    ) -> Self {
        Self {
            coordinator_url: default_coordinator_url(),
            token: None,
            tls: None,
            data_dir: data_dir.into(),
            store_url: store_url.into(),
            model: model.into(),
            model_keys: BTreeMap::new(),
            model_name: model_name.into(),
            model_extra: Map::new(),
            mcp_config: None,
            mcp_servers: Map::new(),
            allow_inline_mcp: false,
            playwright_dir: None,
            slots: default_slots(),
            cpu_slots: default_cpu_slots(),
            hub: HubConfig::default(),
            allow_base_folders: false,
            tags: Vec::new(),
            http_hook_hosts: Vec::new(),
            grace_s: default_grace_s(),
            health_listen: None,
            telemetry: TelemetryConfig::default(),
        }
    }

    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), FieldError> {
        if !(1..=SLOTS_MAX).contains(&self.slots) {
            let rule = format!("must be in 1..={SLOTS_MAX}");
            return Err(FieldError::new("slots", self.slots, rule));
        }
        if self.cpu_slots > SLOTS_MAX {
            let rule = format!("must be at most {SLOTS_MAX}");
            return Err(FieldError::new("cpu_slots", self.cpu_slots, rule));
        }
        if self.grace_s > 3_600 {
            return Err(FieldError::new(
                "grace_s",
                self.grace_s,
                "must be in 0..=3600",
            ));
        }
        if self.model_name.trim().is_empty() {
            return Err(FieldError::new(
                "model_name",
                &self.model_name,
                "must not be empty",
            ));
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err(FieldError::new("data_dir", "", "must not be empty"));
        }
        Ok(())
    }

    /// How long running rollouts may go on when the process drains.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s)
    }

    /// How the hub is reached. What is fetched is kept in the data folder, unless the environment names another.
    pub fn hub_settings(&self, environment: &Environment) -> HubSettings {
        let mut hub = self.hub.over(HubSettings::new(environment));
        hub.cache
            .get_or_insert_with(|| self.data_dir.join("models"));
        hub
    }

    /// The MCP servers of the file and of `mcp_servers`. `environment` is what `${NAME}` stands for. Reads the file.
    pub fn mcp(&self, environment: &Environment) -> Result<McpConfig, McpSettingsError> {
        let mut servers = match &self.mcp_config {
            Some(file) => read_servers(file)?,
            None => Map::new(),
        };
        servers.extend(self.mcp_servers.clone());
        let text = serde_json::json!({ "mcpServers": servers }).to_string();
        let variables: BTreeMap<String, String> = environment.clone();
        let config = McpConfig::parse(&text, &variables)?;
        let folder = self.mcp_config.as_deref().and_then(Path::parent);
        Ok(match folder {
            Some(folder) => config.seen_from(folder, |name| !self.mcp_servers.contains_key(name)),
            None => config,
        })
    }
}

fn read_servers(file: &PathBuf) -> Result<Map<String, Value>, McpSettingsError> {
    let unreadable = |source| McpSettingsError::Read {
        file: file.clone(),
        source,
    };
    let refuse = |rule: String| McpSettingsError::File {
        file: file.clone(),
        rule,
    };
    let bytes = std::fs::metadata(file).map_err(unreadable)?.len();
    if bytes > MCP_FILE_BYTES_MAX {
        return Err(refuse(format!(
            "must have at most {MCP_FILE_BYTES_MAX} bytes, has {bytes}"
        )));
    }
    let text = std::fs::read_to_string(file).map_err(unreadable)?;
    let mut value: Value =
        serde_json::from_str(&text).map_err(|error| refuse(format!("must be JSON: {error}")))?;
    match value.get_mut("mcpServers").map(Value::take) {
        Some(Value::Object(servers)) => Ok(servers),
        _ => Err(refuse("must hold an object `mcpServers`".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_runtime::config::load;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    const NEEDED: [(&str, &str); 4] = [
        ("ESPALIER_AGENT_WORKER_STORE_URL", "memory://"),
        (
            "ESPALIER_AGENT_WORKER_MODEL__BASE_URL",
            "http://localhost:8000/v1",
        ),
        ("ESPALIER_AGENT_WORKER_MODEL_NAME", "qwen3"),
        ("ESPALIER_AGENT_WORKER_SLOTS", "3"),
    ];

    #[test]
    fn a_configuration_can_come_from_the_environment_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("worker.toml");
        std::fs::write(
            &file,
            "data_dir = \"/x\"\n[mcp_servers.notes]\ncommand = \"notes\"\n",
        )
        .unwrap();
        let environment = environment(&NEEDED);
        let config: AgentWorkerConfig = load(Some(&file), ENV_PREFIX, &environment).unwrap();
        assert_eq!((config.slots, config.grace_s), (3, 30));
        assert_eq!(
            config.model.as_ref().unwrap().base_url,
            "http://localhost:8000/v1"
        );
        config.validate().unwrap();
        let servers = config.mcp(&environment).unwrap().servers;
        assert_eq!(servers.keys().collect::<Vec<_>>(), ["notes"]);
    }

    #[test]
    fn servers_of_a_file_and_of_the_configuration_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mcp.json");
        std::fs::write(
            &file,
            r#"{"mcpServers": {"a": {"command": "a"}, "b": {"command": "b"}}}"#,
        )
        .unwrap();
        let mut config =
            AgentWorkerConfig::new("/x", "memory://", ModelEndpoint::new("http://m/v1"), "m");
        config.mcp_config = Some(file.clone());
        config
            .mcp_servers
            .insert("b".to_owned(), serde_json::json!({"url": "http://b/mcp"}));
        let servers = config.mcp(&Environment::new()).unwrap().servers;
        assert_eq!(servers.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert!(matches!(servers["b"].kind, mcp::ServerKind::Http(_)));

        std::fs::write(&file, "[]").unwrap();
        let error = config.mcp(&Environment::new()).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("must hold an object `mcpServers`"),
            "{error}"
        );
    }

    #[test]
    fn secrets_of_servers_are_not_shown() {
        let mut config =
            AgentWorkerConfig::new("/x", "memory://", ModelEndpoint::new("http://m/v1"), "m");
        let entry = serde_json::json!({"command": "a", "env": {"KEY": "hunter2"}});
        config.mcp_servers.insert("notes".to_owned(), entry);
        config
            .model_extra
            .insert("user".to_owned(), "hunter2".into());
        let shown = format!("{config:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("notes") && shown.contains("user"), "{shown}");
    }

    #[test]
    fn values_out_of_range_are_refused() {
        let good =
            AgentWorkerConfig::new("/x", "memory://", ModelEndpoint::new("http://m/v1"), "m");
        let refused = |change: fn(&mut AgentWorkerConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err().field
        };
        assert_eq!(refused(|c| c.slots = 0), "slots");
        assert_eq!(refused(|c| c.grace_s = 9_999), "grace_s");
        assert_eq!(refused(|c| c.model_name = " ".into()), "model_name");
    }
}
