//! The configuration of a coordinator: one TOML file, every key also as `ESPALIER_COORDINATOR_…`, unknown keys refused.
//!
//! `main` loads it, `espalier up` builds it in code; [`CoordinatorConfig::validate`] runs before a port opens and is
//! the only place for rules over several keys.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::id::ProjectId;
use espalier_core::queue::MachineConfig;
use espalier_runtime::config::Secret;
use espalier_runtime::net::ServerTls;
use espalier_runtime::telemetry::TelemetryConfig;
use serde::Deserialize;

use crate::auth::TokenConfig;
use crate::endpoints::{self, ModelEndpoint};
use crate::prices::Prices;
use crate::queue::Acknowledge;
use crate::scaler::ScalerConfig;

/// Every key as a variable begins with this.
pub const ENV_PREFIX: &str = "ESPALIER_COORDINATOR_";
/// The port where nothing else is said.
pub const PORT_DEFAULT: u16 = 7411;
/// What `queue` says where the jobs lie in a file of this process.
const EMBEDDED: &str = "embedded";
/// Most MCP servers that a configuration may name, which a refusal lists to the client.
const MCP_SERVERS_MAX: usize = 256;

/// A coordinator's configuration.
///
/// ```toml
/// listen = "127.0.0.1:7411"
/// data_dir = "/var/lib/espalier"
/// store_url = "file:///var/lib/espalier/store"
/// mcp_servers = ["browser"]
///
/// [[tokens]]
/// name = "ci"
/// sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
/// project = "shop"
/// roles = ["submit", "read"]
///
/// [[tokens]]
/// name = "workers"
/// sha256 = "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"
/// project = "*"
/// roles = ["worker"]
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorConfig {
    /// Where it listens; port 0 takes a free one. Default: loopback only.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where the jobs are: `embedded`, which is a file in `data_dir` (the default), or the address of a Redis that any
    /// number of coordinators share, such as `redis://:password@host:6379/0`.
    #[serde(default = "default_queue")]
    pub queue: Secret,
    /// Tells queues on one Redis apart; the same at every coordinator of a queue.
    #[serde(default = "default_queue_name")]
    pub queue_name: String,
    /// Parts of the queue that may lie on different nodes of a Redis Cluster, from 1 to 64. Fixed when the queue is
    /// first used.
    #[serde(default = "default_queue_shards")]
    pub queue_shards: u16,
    /// What a write to Redis must have reached before it counts: `fast`, `replicated` or `durable`.
    #[serde(default)]
    pub queue_acknowledge: Acknowledge,
    /// Whether what Redis acknowledged is kept in the object store too, until its batch has ended.
    #[serde(default = "default_queue_journal")]
    pub queue_journal: bool,
    /// Folder of the embedded queue's file; not needed with Redis.
    #[serde(default)]
    pub data_dir: PathBuf,
    /// The object store: `file:///absolute/folder`, `s3://bucket/prefix`, or `memory://` for tests.
    pub store_url: String,
    /// Certificate and key; without them the connection is not encrypted.
    #[serde(default)]
    pub tls: Option<ServerTls>,
    /// Who may call. At least one.
    #[serde(default)]
    pub tokens: Vec<TokenConfig>,
    /// Settings of single projects.
    #[serde(default)]
    pub projects: BTreeMap<ProjectId, ProjectConfig>,
    /// MCP servers that jobs may name, besides those that connected workers announce.
    #[serde(default)]
    pub mcp_servers: BTreeSet<String>,
    /// Whether a job may bring a server of its own, which is a command that a worker runs. Workers decide again.
    #[serde(default)]
    pub allow_inline_mcp: bool,
    /// Jobs of one project that may wait (blocked, delayed or ready); beyond, submissions are refused.
    #[serde(default = "default_jobs_waiting_max")]
    pub jobs_waiting_max: u64,
    /// Batches that one token may watch at once, from 1 to 10,000 (default 64); beyond, `WatchBatch` is refused. Each
    /// asks the queue several times a second.
    #[serde(default = "default_watches_max")]
    pub watches_max: u32,
    /// How long a lease lasts without renewal, in milliseconds; absent: what suits the kind of job.
    #[serde(default)]
    pub lease_ttl_ms: Option<u64>,
    /// Days for which a complete batch is kept in the queue, and the files of attempts that lost.
    #[serde(default = "default_keep_days")]
    pub keep_days: u32,
    /// Most batches of one project that are not closed: such a batch is never complete, and so never forgotten.
    #[serde(default = "default_open_batches_max")]
    pub open_batches_max: usize,
    /// Age at which a worker is asked to move to another stream, a fifth more or less, so that new coordinators get load.
    #[serde(default = "default_session_max_age_s")]
    pub session_max_age_s: u64,
    /// How long a drain may take before connections are cut.
    #[serde(default = "default_drain_limit_s")]
    pub drain_limit_s: u64,
    /// Where models are served, for workers that are configured with no endpoint of their own.
    #[serde(default)]
    pub model_endpoints: Vec<ModelEndpoint>,
    /// Names of keys that workers which serve models may ask others for: each is sent to wherever such a worker says.
    #[serde(default)]
    pub worker_key_names: BTreeSet<String>,
    /// Makes workers when jobs wait, and tells KEDA how many there should be.
    #[serde(default)]
    pub scaler: Option<ScalerConfig>,
    /// What tokens and workers cost, for metrics.
    #[serde(default)]
    pub prices: Prices,
    /// Logs, traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// Settings of one project.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectConfig {
    /// Share of the workers where several projects wait, from 1 to 1,000; a project without an entry has 100.
    pub weight: u32,
}

pub(crate) fn default_listen() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT_DEFAULT))
}

fn default_queue() -> Secret {
    Secret::new(EMBEDDED)
}

fn default_queue_name() -> String {
    "espalier".to_owned()
}

fn default_queue_journal() -> bool {
    true
}

fn default_queue_shards() -> u16 {
    1
}

fn default_jobs_waiting_max() -> u64 {
    1_000_000
}

fn default_watches_max() -> u32 {
    64
}

fn default_open_batches_max() -> usize {
    MachineConfig::OPEN_BATCHES_MAX_DEFAULT
}

fn default_keep_days() -> u32 {
    30
}

fn default_session_max_age_s() -> u64 {
    1_800
}

fn default_drain_limit_s() -> u64 {
    10
}

impl CoordinatorConfig {
    /// A configuration with every default.
    pub fn new(
        data_dir: impl Into<PathBuf>,
        store_url: impl Into<String>,
        tokens: Vec<TokenConfig>,
    ) -> Self {
        Self {
            listen: default_listen(),
            queue: default_queue(),
            queue_name: default_queue_name(),
            queue_shards: default_queue_shards(),
            queue_acknowledge: Acknowledge::default(),
            queue_journal: default_queue_journal(),
            data_dir: data_dir.into(),
            store_url: store_url.into(),
            tls: None,
            tokens,
            projects: BTreeMap::new(),
            mcp_servers: BTreeSet::new(),
            allow_inline_mcp: false,
            jobs_waiting_max: default_jobs_waiting_max(),
            watches_max: default_watches_max(),
            lease_ttl_ms: None,
            keep_days: default_keep_days(),
            open_batches_max: default_open_batches_max(),
            session_max_age_s: default_session_max_age_s(),
            drain_limit_s: default_drain_limit_s(),
            model_endpoints: Vec::new(),
            worker_key_names: BTreeSet::new(),
            scaler: None,
            prices: Prices::default(),
            telemetry: TelemetryConfig::default(),
        }
    }

    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), FieldError> {
        if self.is_embedded() && self.data_dir.as_os_str().is_empty() {
            let rule = "must be given where the queue is embedded; or set `queue` to the address of a Redis";
            return Err(FieldError::new("data_dir", "nothing", rule));
        }
        check_range("jobs_waiting_max", self.jobs_waiting_max, 1, 100_000_000)?;
        check_range("watches_max", u64::from(self.watches_max), 1, 10_000)?;
        check_range("keep_days", u64::from(self.keep_days), 1, 3_650)?;
        check_range(
            "open_batches_max",
            self.open_batches_max as u64,
            1,
            1_000_000,
        )?;
        check_range("session_max_age_s", self.session_max_age_s, 1, 86_400)?;
        check_range("drain_limit_s", self.drain_limit_s, 1, 600)?;
        if let Some(ttl) = self.lease_ttl_ms {
            check_range("lease_ttl_ms", ttl, 100, 3_600_000)?;
        }
        for (project, settings) in &self.projects {
            let field = format!("projects.{project}.weight");
            check_range(&field, u64::from(settings.weight), 1, 1_000)?;
        }
        if self.mcp_servers.len() > MCP_SERVERS_MAX {
            let rule = format!("must have at most {MCP_SERVERS_MAX} names");
            return Err(FieldError::new("mcp_servers", self.mcp_servers.len(), rule));
        }
        endpoints::validate(&self.model_endpoints)?;
        if let Some(scaler) = &self.scaler {
            let checked = scaler.validate(&self.data_dir);
            checked.map_err(|error| error.under("scaler"))?;
        }
        self.prices.validate()?;
        self.validate_tokens()
    }

    fn validate_tokens(&self) -> Result<(), FieldError> {
        if self.tokens.is_empty() {
            let rule = "must have at least one entry: without a token nobody can call";
            return Err(FieldError::new("tokens", "nothing", rule));
        }
        let mut names = BTreeSet::new();
        for (i, token) in self.tokens.iter().enumerate() {
            token
                .validate()
                .map_err(|e| e.under(&format!("tokens[{i}]")))?;
            if !names.insert(&token.name) {
                let field = format!("tokens[{i}].name");
                return Err(FieldError::new(field, &token.name, "must be unique"));
            }
            let same = self.tokens[..i].iter().find(|t| t.sha256 == token.sha256);
            if let Some(other) = same {
                let rule = format!("must not be the token of `{}` too", other.name);
                let field = format!("tokens[{i}].sha256");
                return Err(FieldError::new(field, &token.name, rule));
            }
        }
        Ok(())
    }

    /// Whether the jobs lie in a file of this process, and not in Redis.
    pub fn is_embedded(&self) -> bool {
        self.queue.expose() == EMBEDDED
    }

    /// Path of the embedded queue's file.
    pub fn queue_file(&self) -> PathBuf {
        self.data_dir.join("queue.redb")
    }

    /// The lease that a worker gets, where the configuration has one.
    pub fn lease_ttl(&self) -> Option<Duration> {
        self.lease_ttl_ms.map(Duration::from_millis)
    }

    /// How long a complete batch is kept.
    pub fn keep(&self) -> Duration {
        Duration::from_secs(u64::from(self.keep_days) * 86_400)
    }

    /// How long a drain may take.
    pub fn drain_limit(&self) -> Duration {
        Duration::from_secs(self.drain_limit_s)
    }
}

fn check_range(field: &str, value: u64, min: u64, max: u64) -> Result<(), FieldError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        value,
        format!("must be in {min}..={max}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        data_dir = "/tmp/x"
        store_url = "memory://"
        [[tokens]]
        name = "ci"
        sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
        project = "shop"
        roles = ["submit", "read"]
        [projects.shop]
        weight = 200
    "#;

    fn parse(text: &str) -> Result<CoordinatorConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("coordinator.toml");
        std::fs::write(&file, text).unwrap();
        let environment = espalier_runtime::config::Environment::new();
        let config: CoordinatorConfig =
            espalier_runtime::config::load(Some(&file), ENV_PREFIX, &environment)
                .map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn a_file_gives_a_config_with_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.listen.port(), PORT_DEFAULT);
        assert!(config.listen.ip().is_loopback());
        assert_eq!(config.keep_days, 30);
        assert!(config.is_embedded());
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        let cases = [
            ("keep_day = 3", "keep_day"),
            ("keep_days = 0", "`keep_days` must be in 1..=3650"),
            (
                "open_batches_max = 0",
                "`open_batches_max` must be in 1..=1000000",
            ),
            ("queue_acknowledge = \"never\"", "queue_acknowledge"),
            (
                "[scaler]\ninterval_s = 0",
                "`scaler.interval_s` must be in 1..=3600",
            ),
            ("watches_max = 0", "`watches_max` must be in 1..=10000"),
            (
                "lease_ttl_ms = 5",
                "`lease_ttl_ms` must be in 100..=3600000",
            ),
            ("[projects.\"a/b\"]\nweight = 1", "project"),
            (
                "[projects.b]\nweight = 0",
                "`projects.b.weight` must be in 1..=1000",
            ),
        ];
        for (line, expected) in cases {
            let text = if line.starts_with('[') {
                format!("{GOOD}\n{line}")
            } else {
                format!("{line}\n{GOOD}")
            };
            let error = parse(&text).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
        let without = GOOD.replace("data_dir = \"/tmp/x\"", "");
        let error = parse(&without).unwrap_err();
        assert!(error.contains("`data_dir` must be given"), "{error}");
        assert!(parse(&format!("queue = \"redis://:secret@h\"\n{without}")).is_ok());
        for (from, to, expected) in [
            ("9f86", "zz86", "sha256"),
            ("\"shop\"", "\"*\"", "`tokens[0].project`"),
            ("\"read\"", "\"root\"", "roles"),
            ("[\"submit\", \"read\"]", "[]", "`tokens[0].roles`"),
            ("\"submit\"", "\"worker\"", "`tokens[0].project`"),
        ] {
            let error = parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
        }
        let (_, token) = GOOD.split_once("[[tokens]]").unwrap();
        let (token, _) = token.split_once("[projects").unwrap();
        let twice = format!("{GOOD}[[tokens]]{}", token.replace("ci", "other"));
        let error = parse(&twice).unwrap_err();
        assert!(error.contains("`tokens[1].sha256` must not be"), "{error}");
        let without = GOOD.replace("[[tokens]]", "[ignored]");
        assert!(parse(&without).is_err());
    }
}
