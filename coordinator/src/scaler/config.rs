//! The section `scaler` of a coordinator's configuration, and the rules that it has to keep.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::queue::JobKind;
use espalier_runtime::config::Secret;
use serde::Deserialize;

use super::plan::Pool;
use super::provider::INSTANCE_VARIABLE;
use super::runpod::RunpodConfig;

/// Most pools of one provider.
const POOLS_MAX: usize = 64;
/// Most instances of one pool.
const INSTANCES_MAX: u32 = 1_000;
/// Longest name of a pool, in bytes: names of instances are names of machines too.
const NAME_BYTES_MAX: usize = 32;

/// Who makes workers when jobs wait, and who is told how many there should be.
///
/// ```toml
/// [scaler]
/// interval_s = 15
///
/// [scaler.keda]
/// listen = "0.0.0.0:7412"
///
/// [[scaler.local.pools]]
/// name = "agents"
/// kinds = ["rollout"]
/// jobs_per_worker = 4
/// max = 20
/// command = ["espalier-agent-worker", "--config", "agent.toml"]
/// env = { ESPALIER_AGENT_WORKER_DATA_DIR = "/var/lib/espalier/{instance}" }
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalerConfig {
    /// Seconds between two looks at jobs and workers, from 1 to 3,600 (default 15).
    #[serde(default = "default_interval_s")]
    pub interval_s: u64,
    /// Answers KEDA, which starts pods in a cluster.
    #[serde(default)]
    pub keda: Option<KedaConfig>,
    /// Starts workers as processes beside the coordinator. For one coordinator with a machine of its own.
    #[serde(default)]
    pub local: Option<LocalConfig>,
    /// Starts workers in pods of RunPod.
    #[serde(default)]
    pub runpod: Option<RunpodConfig>,
}

/// Where KEDA asks. It needs no token and is told numbers only: a network policy or a firewall guards the port.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KedaConfig {
    /// The address, with the coordinator's `tls` where that is set; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// Processes beside the coordinator. They end with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalConfig {
    /// What kinds of processes.
    pub pools: Vec<LocalPool>,
}

/// Processes of one sort.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalPool {
    /// Its name, of `a` to `z`, `0` to `9` and `-`; a part of the names of its instances.
    pub name: String,
    /// The kinds of jobs whose number decides how many instances there are.
    pub kinds: BTreeSet<JobKind>,
    /// Jobs, waiting and running, for each of which that many there is to be an instance; from 1 to 10,000 (default 1).
    #[serde(default = "default_jobs_per_worker")]
    pub jobs_per_worker: u32,
    /// Instances that there are without a job too (default 0).
    #[serde(default)]
    pub min: u32,
    /// Most instances, from 1 to 1,000.
    pub max: u32,
    /// Seconds after which an instance without a job goes, where fewer are wanted; up to 86,400 (default 300).
    #[serde(default = "default_idle_s")]
    pub idle_s: u64,
    /// Seconds that an instance may be without a connection to a coordinator, at its start or later, before it is given
    /// up; from 1 to 86,400 (default 300). While jobs of its may still have leases it is never given up.
    #[serde(default = "default_start_s")]
    pub start_s: u64,
    /// Seconds that a process has to end when it is told to, before it is killed; from 1 to 3,600 (default 60).
    #[serde(default = "default_grace_s")]
    pub grace_s: u64,
    /// The program and its arguments, in which `{instance}` stands for the name of the instance. The program is searched in
    /// `PATH` where it has no slash.
    pub command: Vec<String>,
    /// Variables that it is given, each a text, `{ file = "…" }` or `{ env = "…" }`; `{instance}` stands for the same.
    #[serde(default)]
    pub env: BTreeMap<String, Secret>,
    /// Names of variables that it takes over from the coordinator, besides `PATH`, `HOME`, the locale, proxies and
    /// certificates, and ESPALIER_LOG.
    #[serde(default)]
    pub pass_env: BTreeSet<String>,
}

fn default_interval_s() -> u64 {
    15
}

fn default_jobs_per_worker() -> u32 {
    1
}

fn default_idle_s() -> u64 {
    300
}

fn default_start_s() -> u64 {
    300
}

fn default_grace_s() -> u64 {
    60
}

impl ScalerConfig {
    /// Checks what the types cannot say. `data_dir` is the coordinator's.
    ///
    /// # Errors
    /// The first field that breaks a rule.
    pub fn validate(&self, data_dir: &Path) -> Result<(), FieldError> {
        check_range("interval_s", self.interval_s, 1, 3_600)?;
        if let Some(local) = &self.local {
            if data_dir.as_os_str().is_empty() {
                let rule = "must not be given without `data_dir`: a file there tells whether processes of an earlier coordinator run";
                return Err(FieldError::new("local", "pools", rule));
            }
            let pools = local.pools.iter();
            check_pools(pools.map(LocalPool::pool)).map_err(|e| e.under("local"))?;
            for (i, pool) in local.pools.iter().enumerate() {
                let within = format!("local.pools[{i}]");
                pool.validate().map_err(|e| e.under(&within))?;
            }
        }
        if let Some(runpod) = &self.runpod {
            runpod.validate().map_err(|e| e.under("runpod"))?;
        }
        Ok(())
    }

    /// The time between two looks.
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_s)
    }
}

impl LocalPool {
    /// What a plan has to know of it.
    pub fn pool(&self) -> Pool {
        Pool {
            name: self.name.clone(),
            kinds: self.kinds.clone(),
            jobs_per_worker: self.jobs_per_worker,
            min: self.min,
            max: self.max,
            idle: Duration::from_secs(self.idle_s),
            start: Duration::from_secs(self.start_s),
        }
    }

    fn validate(&self) -> Result<(), FieldError> {
        check_range("grace_s", self.grace_s, 1, 3_600)?;
        if self.command.first().is_none_or(String::is_empty) {
            let rule = "must begin with a program, such as `espalier-agent-worker`";
            return Err(FieldError::new("command", "nothing", rule));
        }
        if let Some(argument) = self.command.iter().find(|word| word.contains('\0')) {
            return Err(FieldError::new(
                "command",
                argument,
                "must have no zero bytes",
            ));
        }
        for name in self.env.keys().chain(&self.pass_env) {
            let field = match self.env.contains_key(name) {
                true => "env",
                false => "pass_env",
            };
            if name.is_empty() || name.contains(['=', '\0']) {
                let rule = "must have names of variables, without `=`";
                return Err(FieldError::new(field, name, rule));
            }
            if name == INSTANCE_VARIABLE {
                let rule =
                    "must leave this variable to the scaler, which sets it for each instance";
                return Err(FieldError::new(field, name, rule));
            }
        }
        Ok(())
    }
}

/// Checks the pools of one provider, from the structure that holds them as `pools`.
///
/// # Errors
/// The first field that breaks a rule.
pub fn check_pools(pools: impl Iterator<Item = Pool>) -> Result<(), FieldError> {
    let (mut names, mut count) = (BTreeSet::new(), 0);
    for (i, pool) in pools.enumerate() {
        count = i + 1;
        let within = format!("pools[{i}]");
        check_pool(&pool).map_err(|e| e.under(&within))?;
        if !names.insert(pool.name.clone()) {
            let field = format!("{within}.name");
            return Err(FieldError::new(field, pool.name, "must be unique"));
        }
    }
    match count {
        0 => {
            let rule = "must have at least one entry; without one, leave the section out";
            Err(FieldError::new("pools", "nothing", rule))
        }
        1..=POOLS_MAX => Ok(()),
        more => {
            let rule = format!("must have at most {POOLS_MAX} entries");
            Err(FieldError::new("pools", more, rule))
        }
    }
}

fn check_pool(pool: &Pool) -> Result<(), FieldError> {
    check_name("name", &pool.name)?;
    if pool.kinds.is_empty() {
        let kinds = JobKind::ALL.map(JobKind::as_str).join("`, `");
        let rule = format!("must name at least one kind of jobs: `{kinds}`");
        return Err(FieldError::new("kinds", "nothing", rule));
    }
    check_range("jobs_per_worker", pool.jobs_per_worker.into(), 1, 10_000)?;
    check_range("max", pool.max.into(), 1, INSTANCES_MAX.into())?;
    if pool.min > pool.max {
        let rule = format!("must be at most `max`, which is {}", pool.max);
        return Err(FieldError::new("min", pool.min, rule));
    }
    check_range("idle_s", pool.idle.as_secs(), 0, 86_400)?;
    check_range("start_s", pool.start.as_secs(), 1, 86_400)
}

/// Checks a name that becomes a part of an instance's.
///
/// # Errors
/// It breaks the rule; the error names `field`.
pub fn check_name(field: &str, name: &str) -> Result<(), FieldError> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let ends = name.starts_with('-') || name.ends_with('-');
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(is_plain) && !ends {
        return Ok(());
    }
    let rule = format!(
        "must be 1 to {NAME_BYTES_MAX} of `a` to `z`, `0` to `9` and `-`, with no `-` at either end"
    );
    Err(FieldError::new(field, name, rule))
}

/// Checks a number.
///
/// # Errors
/// It is out of range.
pub fn check_range(field: &str, value: u64, min: u64, max: u64) -> Result<(), FieldError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let rule = format!("must be in {min}..={max}");
    Err(FieldError::new(field, value, rule))
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_runtime::config::{Environment, load};

    #[derive(Debug, Deserialize)]
    struct Whole {
        scaler: ScalerConfig,
    }

    const GOOD: &str = r#"
        [scaler.keda]
        listen = "127.0.0.1:0"
        [[scaler.local.pools]]
        name = "agents"
        kinds = ["rollout", "curate"]
        max = 20
        command = ["espalier-agent-worker", "--config", "a.toml"]
        env = { ESPALIER_AGENT_WORKER_TOKEN = "hunter2" }
        pass_env = ["AWS_REGION"]
    "#;

    fn parse(text: &str) -> Result<ScalerConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("coordinator.toml");
        std::fs::write(&file, text).unwrap();
        let whole: Whole = load(Some(&file), "ESPALIER_COORDINATOR_", &Environment::new())
            .map_err(|error| error.to_string())?;
        let checked = whole.scaler.validate(Path::new("/var/lib/espalier"));
        checked.map_err(|error| error.to_string())?;
        Ok(whole.scaler)
    }

    #[test]
    fn what_is_left_out_has_a_default_and_secrets_are_not_shown() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.interval(), Duration::from_secs(15));
        let pool = config.local.as_ref().unwrap().pools[0].pool();
        let wanted = Pool {
            name: "agents".to_owned(),
            kinds: [JobKind::Rollout, JobKind::Curate].into(),
            jobs_per_worker: 1,
            min: 0,
            max: 20,
            idle: Duration::from_secs(300),
            start: Duration::from_secs(300),
        };
        assert_eq!(pool, wanted);
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn what_breaks_a_rule_is_named_with_its_value() {
        let cases = [
            (
                "max = 20",
                "max = 0",
                "`local.pools[0].max` must be in 1..=1000, got `0`",
            ),
            (
                "max = 20",
                "max = 2\nmin = 3",
                "`local.pools[0].min` must be at most `max`, which is 2, got `3`",
            ),
            (
                "\"agents\"",
                "\"Agents\"",
                "`local.pools[0].name` must be 1 to 32 of",
            ),
            (
                "[\"rollout\", \"curate\"]",
                "[]",
                "`local.pools[0].kinds` must name at least one kind",
            ),
            ("\"curate\"", "\"cook\"", "unknown variant `cook`"),
            (
                "max = 20",
                "max = 20\njobs_per_worker = 0",
                "`local.pools[0].jobs_per_worker` must be in",
            ),
            (
                "max = 20",
                "max = 20\ngrace_s = 0",
                "`local.pools[0].grace_s` must be in 1..=3600",
            ),
            (
                "max = 20",
                "max = 20\nstart_s = 0",
                "`local.pools[0].start_s` must be in 1..=86400",
            ),
            (
                "max = 20",
                "max = 20\nidle_s = 100000",
                "`local.pools[0].idle_s` must be in 0..=86400",
            ),
            ("max = 20", "max = 20\nworkers = 1", "workers"),
            (
                "\"espalier-agent-worker\"",
                "\"\"",
                "`local.pools[0].command` must begin with a program",
            ),
            (
                "AWS_REGION",
                "A=B",
                "`local.pools[0].pass_env` must have names",
            ),
            (
                "ESPALIER_AGENT_WORKER_TOKEN",
                "ESPALIER_INSTANCE",
                "`local.pools[0].env` must leave",
            ),
            ("127.0.0.1:0", "here", "scaler.keda.listen"),
            (
                "[scaler.keda]",
                "[scaler]\ninterval_s = 0\n[scaler.keda]",
                "`interval_s` must be in 1..=3600",
            ),
        ];
        for (from, to, expected) in cases {
            assert!(GOOD.contains(from), "{from}");
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let (_, pool) = GOOD.split_once("[[scaler").unwrap();
        let twice = parse(&format!("{GOOD}\n[[scaler{pool}")).unwrap_err();
        assert!(
            twice.contains("`local.pools[1].name` must be unique, got `agents`"),
            "{twice}"
        );
        let none = parse("[scaler.local]\npools = []").unwrap_err();
        assert!(
            none.contains("`local.pools` must have at least one entry"),
            "{none}"
        );
    }

    #[test]
    fn processes_need_a_folder() {
        let config = parse(GOOD).unwrap();
        let error = config.validate(Path::new("")).unwrap_err();
        assert_eq!(error.field, "local");
    }
}
