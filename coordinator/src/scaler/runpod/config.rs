//! `[scaler.runpod]`: the account, what may be spent, and the pools of pods.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_core::error::FieldError;
use espalier_core::queue::JobKind;
use espalier_runtime::config::Secret;
use serde::{Deserialize, Serialize};

use super::wire::{
    Mounts, NetworkMount, NewGpu, NewPod, POOL_VARIABLE, PersistentMount, SCALER_VARIABLE,
};
use crate::scaler::config::{check_name, check_pools};
use crate::scaler::plan::Pool;
use crate::scaler::provider::INSTANCE_VARIABLE;

/// Where RunPod's API is.
pub const URL_DEFAULT: &str = "https://api.runpod.io";
/// Most variables of a pool: RunPod takes 50 of a pod, and the scaler has three.
const VARIABLES_MAX: usize = 47;
/// Smallest disk of a machine that RunPod gives, in GB.
const VOLUME_GB_MIN: u32 = 10;
/// Largest disk that is asked for, in GB.
const DISK_GB_MAX: u32 = 16_384;
/// Most that may be allowed, in $: more is a slip of the pen.
pub const BUDGET_MAX: f64 = 1e6;
/// Variables that the scaler sets.
const OWN_VARIABLES: [&str; 3] = [SCALER_VARIABLE, POOL_VARIABLE, INSTANCE_VARIABLE];

/// Workers in pods of RunPod.
///
/// ```toml
/// [scaler.runpod]
/// name = "espalier"
/// api_key = { env = "RUNPOD_API_KEY" }
/// max_per_hour = 5.0
/// max_per_day = 40.0
///
/// [[scaler.runpod.pools]]
/// name = "train"
/// kinds = ["train"]
/// max = 2
/// image = "registry.example/espalier/train-worker:0.1.0"
/// gpus = ["NVIDIA RTX A5000", "NVIDIA L4"]
/// env = { ESPALIER_TRAIN_WORKER_COORDINATOR_URL = "https://jobs.example:7411" }
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunpodConfig {
    /// Tells pods of this scaler from all others of the account, `a-z`, `0-9` and `-`: every pod that says it is of this
    /// scaler is counted and, where it is not needed, ended. Two queues on one account need two names.
    #[serde(default = "default_name")]
    pub name: String,
    /// The key of the account, with the right to read and write pods: text, `{ file = "…" }` or `{ env = "NAME" }`.
    pub api_key: Secret,
    /// Where the API is [https://api.runpod.io].
    #[serde(default = "default_url")]
    pub url: String,
    /// Most that all pods together may cost, in $ an hour. No pod is asked for that would cost more.
    pub max_per_hour: f64,
    /// Most that may be spent from midnight to midnight UTC, in $.
    pub max_per_day: f64,
    /// Kinds of pods.
    pub pools: Vec<RunpodPool>,
}

/// Pods that are alike.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunpodPool {
    /// Part of the pods' names, `a-z`, `0-9` and `-`.
    pub name: String,
    /// Kinds of jobs whose number decides how many pods there are.
    pub kinds: BTreeSet<JobKind>,
    /// Jobs, waiting and running, for each of which that many there is to be a pod; from 1 to 10,000 [1].
    #[serde(default = "default_jobs_per_worker")]
    pub jobs_per_worker: u32,
    /// Pods that there are without a job too [0].
    #[serde(default)]
    pub min: u32,
    /// Most pods, from 1 to 1,000.
    pub max: u32,
    /// Seconds after which a pod without a job goes, where fewer are wanted; up to 86,400 [300].
    #[serde(default = "default_idle_s")]
    pub idle_s: u64,
    /// Seconds that a pod may be without a connection to a coordinator, at its start or later, before it is given up; from 1 to
    /// 86,400 [1200, since an image of some GB comes first].
    #[serde(default = "default_start_s")]
    pub start_s: u64,
    /// The image, whose worker takes its options from `env` and `args`; may be absent where `template` has one.
    #[serde(default)]
    pub image: Option<String>,
    /// Id of a template of RunPod's; what stands here comes before what it has.
    #[serde(default)]
    pub template: Option<String>,
    /// Arguments of the image's entrypoint.
    #[serde(default)]
    pub args: Option<String>,
    /// Types of GPU as RunPod's catalogue has them, the best first: a pod gets the first that there is and that the budget
    /// allows.
    pub gpus: Vec<String>,
    /// GPUs of a pod, from 1 to 16 [1].
    #[serde(default = "default_gpu_count")]
    pub gpu_count: u32,
    /// `secure`, which is RunPod's own data centers, or `community`, which is machines of others [secure].
    #[serde(default)]
    pub cloud: Cloud,
    /// Data centers to choose from, such as `EU-RO-1` [any].
    #[serde(default)]
    pub data_centers: Vec<String>,
    /// Lowest CUDA version of a machine's driver, such as `12.8` [any].
    #[serde(default)]
    pub cuda_min: Option<String>,
    /// Most that one pod may cost, in $ an hour [`max_per_hour`].
    #[serde(default)]
    pub max_price: Option<f64>,
    /// The environment of the workers: each value is text, `{ file = "…" }` or `{ env = "NAME" }`. It can be read by whoever
    /// may read the account's pods.
    #[serde(default)]
    pub env: BTreeMap<String, Secret>,
    /// GB of the container's disk, which goes with the pod [what RunPod gives].
    #[serde(default)]
    pub disk_gb: Option<u32>,
    /// A disk of the machine that is not wiped when the container starts anew.
    #[serde(default)]
    pub volume: Option<Volume>,
    /// A network volume, in whose data center the pods then are.
    #[serde(default)]
    pub network_volume: Option<NetworkVolume>,
    /// Ports that can be reached, as `8000/http` or `22/tcp`.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Id of the credentials for a private registry, from RunPod's settings.
    #[serde(default)]
    pub registry: Option<String>,
    /// Whether RunPod puts the account's SSH keys into the pods, for images that have an SSH server [false].
    #[serde(default)]
    pub ssh: bool,
}

/// Whose machines pods are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all(deserialize = "snake_case", serialize = "SCREAMING_SNAKE_CASE"))]
pub enum Cloud {
    /// RunPod's own data centers.
    #[default]
    Secure,
    /// Machines of others.
    Community,
}

impl Cloud {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Secure => "SECURE",
            Self::Community => "COMMUNITY",
        }
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Secure => "secure",
            Self::Community => "community",
        }
    }
}

/// A disk of a pod's machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// GB, 10 or more.
    pub size_gb: u32,
    /// Where it is mounted.
    pub path: String,
}

/// A network volume.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkVolume {
    /// Its id.
    pub id: String,
    /// Where it is mounted.
    pub path: String,
}

fn default_name() -> String {
    "espalier".to_owned()
}

fn default_url() -> String {
    URL_DEFAULT.to_owned()
}

fn default_jobs_per_worker() -> u32 {
    1
}

fn default_idle_s() -> u64 {
    300
}

fn default_start_s() -> u64 {
    1_200
}

fn default_gpu_count() -> u32 {
    1
}

impl RunpodConfig {
    /// Checks what the types cannot say. Fields are named as seen from `[scaler.runpod]`.
    ///
    /// # Errors
    /// Names field, value and rule.
    pub fn validate(&self) -> Result<(), FieldError> {
        self.validate_account()?;
        check_pools(self.pools.iter().map(RunpodPool::pool))?;
        for (i, pool) in self.pools.iter().enumerate() {
            let within = format!("pools[{i}]");
            pool.validate_pod().map_err(|error| error.under(&within))?;
        }
        Ok(())
    }

    /// Checks all but the pools.
    ///
    /// # Errors
    /// Names field, value and rule.
    pub fn validate_account(&self) -> Result<(), FieldError> {
        check_name("name", &self.name)?;
        check_url(&self.url)?;
        check_budget("max_per_hour", self.max_per_hour)?;
        check_budget("max_per_day", self.max_per_day)
    }

    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&RunpodPool> {
        self.pools.iter().find(|pool| pool.name == name)
    }
}

impl RunpodPool {
    /// A pool of pods with `image` on the first of `gpus` that there is, with every default and no jobs.
    pub fn new(name: impl Into<String>, image: Option<String>, gpus: Vec<String>) -> Self {
        Self {
            name: name.into(),
            kinds: BTreeSet::new(),
            jobs_per_worker: default_jobs_per_worker(),
            min: 0,
            max: 0,
            idle_s: default_idle_s(),
            start_s: default_start_s(),
            image,
            template: None,
            args: None,
            gpus,
            gpu_count: default_gpu_count(),
            cloud: Cloud::default(),
            data_centers: Vec::new(),
            cuda_min: None,
            max_price: None,
            env: BTreeMap::new(),
            disk_gb: None,
            volume: None,
            network_volume: None,
            ports: Vec::new(),
            registry: None,
            ssh: false,
        }
    }

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

    /// Checks what a pod is to be; what concerns the number of pods is the scaler's.
    ///
    /// # Errors
    /// Names field, value and rule.
    pub fn validate_pod(&self) -> Result<(), FieldError> {
        if self.image.is_none() && self.template.is_none() {
            let rule = "must be given, or a `template` that has one";
            return Err(FieldError::new("image", "nothing", rule));
        }
        for (field, text) in [
            ("image", &self.image),
            ("template", &self.template),
            ("registry", &self.registry),
        ] {
            check_word(field, text.as_deref())?;
        }
        self.validate_gpus()?;
        self.validate_disks()?;
        for (i, port) in self.ports.iter().enumerate() {
            check_port(&format!("ports[{i}]"), port)?;
        }
        for (i, center) in self.data_centers.iter().enumerate() {
            check_word(&format!("data_centers[{i}]"), Some(center))?;
        }
        self.validate_env()
    }

    fn validate_gpus(&self) -> Result<(), FieldError> {
        if self.gpus.is_empty() {
            let rule = "must have at least one type of GPU, such as `NVIDIA L4`";
            return Err(FieldError::new("gpus", "nothing", rule));
        }
        for (i, gpu) in self.gpus.iter().enumerate() {
            let field = format!("gpus[{i}]");
            if gpu.trim().is_empty() {
                return Err(FieldError::new(field, gpu, "must be a type of GPU"));
            }
            if self.gpus[..i].contains(gpu) {
                return Err(FieldError::new(field, gpu, "must be unique"));
            }
        }
        if !(1..=16).contains(&self.gpu_count) {
            return Err(FieldError::new(
                "gpu_count",
                self.gpu_count,
                "must be in 1..=16",
            ));
        }
        if let Some(price) = self.max_price {
            check_budget("max_price", price)?;
        }
        let Some(cuda) = &self.cuda_min else {
            return Ok(());
        };
        let parts = cuda.split_once('.');
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        match parts.is_some_and(|(major, minor)| is_number(major) && is_number(minor)) {
            true => Ok(()),
            false => Err(FieldError::new("cuda_min", cuda, "must be such as `12.8`")),
        }
    }

    fn validate_disks(&self) -> Result<(), FieldError> {
        let check = |field: &str, size: u32, min: u32| match (min..=DISK_GB_MAX).contains(&size) {
            true => Ok(()),
            false => {
                let rule = format!("must be in {min}..={DISK_GB_MAX}");
                Err(FieldError::new(field, size, rule))
            }
        };
        if let Some(size) = self.disk_gb {
            check("disk_gb", size, 1)?;
        }
        if let Some(volume) = &self.volume {
            check("volume.size_gb", volume.size_gb, VOLUME_GB_MIN)?;
            check_path("volume.path", &volume.path)?;
        }
        if let Some(volume) = &self.network_volume {
            if self.volume.is_some() {
                let rule = "must not be given beside `volume`: a pod has one of the two";
                return Err(FieldError::new("network_volume", &volume.id, rule));
            }
            check_word("network_volume.id", Some(&volume.id))?;
            check_path("network_volume.path", &volume.path)?;
        }
        Ok(())
    }

    fn validate_env(&self) -> Result<(), FieldError> {
        if self.env.len() > VARIABLES_MAX {
            let rule = format!("must have at most {VARIABLES_MAX} variables");
            return Err(FieldError::new("env", self.env.len(), rule));
        }
        for name in self.env.keys() {
            let is_word = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if !is_word || name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
                let rule = "must have names of letters, digits and `_`";
                return Err(FieldError::new("env", name, rule));
            }
            if OWN_VARIABLES.contains(&name.as_str()) {
                let rule = "must not set what the scaler sets itself";
                return Err(FieldError::new("env", name, rule));
            }
        }
        self.validate_authorities()
    }

    /// A worker speaks TLS with authorities that it is told: without, the pod would never connect.
    fn validate_authorities(&self) -> Result<(), FieldError> {
        if self.template.is_some() {
            return Ok(());
        }
        for (worker, ca) in [
            ("AGENT", "TLS__CA"),
            ("INFER", "COORDINATOR_CA"),
            ("TRAIN", "COORDINATOR_CA"),
        ] {
            let name = |key: &str| format!("ESPALIER_{worker}_WORKER_{key}");
            let url = self.env.get(&name("COORDINATOR_URL")).map(Secret::expose);
            let is_secure = url.is_some_and(|url| url.contains("https://"));
            if is_secure && !self.env.contains_key(&name(ca)) {
                let rule = format!(
                    "must be given beside an address with https, such as /etc/ssl/certs/ca-certificates.crt, got {}",
                    name("COORDINATOR_URL")
                );
                return Err(FieldError::new(
                    format!("env.{}", name(ca)),
                    "nothing",
                    rule,
                ));
            }
        }
        Ok(())
    }

    /// The pod `instance` of the scaler `scaler`, with GPUs of the type `gpu`.
    pub fn pod(&self, scaler: &str, instance: &str, gpu: &str) -> NewPod {
        let own = [
            (SCALER_VARIABLE, scaler),
            (POOL_VARIABLE, &self.name),
            (INSTANCE_VARIABLE, instance),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), Secret::new(value)));
        let mut env = self.env.clone();
        env.extend(own);
        NewPod {
            name: instance.to_owned(),
            image: self.image.clone(),
            template_id: self.template.clone(),
            args: self.args.clone(),
            disk: self.disk_gb,
            ports: self.ports.clone(),
            env,
            registry: self.registry.clone(),
            cloud: self.cloud,
            data_center_ids: self.data_centers.clone(),
            gpu: NewGpu {
                id: gpu.to_owned(),
                count: self.gpu_count,
                min_cuda_version: self.cuda_min.clone(),
            },
            mounts: self.mounts(),
            start_ssh: self.ssh,
        }
    }

    fn mounts(&self) -> Option<Mounts> {
        let network = self.network_volume.as_ref().map(|volume| {
            Mounts::Network([NetworkMount {
                volume_id: volume.id.clone(),
                path: volume.path.clone(),
            }])
        });
        network.or_else(|| {
            let volume = self.volume.as_ref()?;
            Some(Mounts::Persistent(PersistentMount {
                size: volume.size_gb,
                path: volume.path.clone(),
            }))
        })
    }
}

/// The key goes there: nobody else may read it on its way.
pub(super) fn check_url(url: &str) -> Result<(), FieldError> {
    let parsed = reqwest::Url::parse(url).ok();
    let is_safe = parsed.as_ref().is_some_and(|url| match url.scheme() {
        "https" => true,
        "http" => matches!(url.host_str(), Some("127.0.0.1" | "[::1]" | "localhost")),
        _ => false,
    });
    let bare = parsed.is_some_and(|url| {
        url.username().is_empty() && url.password().is_none() && url.query().is_none()
    });
    match is_safe && bare {
        true => Ok(()),
        false => {
            let rule = "must be `https://…` without a name and a query, or `http://` on loopback";
            Err(FieldError::new("url", "what is written", rule))
        }
    }
}

fn check_budget(field: &str, value: f64) -> Result<(), FieldError> {
    match value > 0.0 && value <= BUDGET_MAX {
        true => Ok(()),
        false => {
            let rule = format!("must be above 0 and at most {BUDGET_MAX}, in $");
            Err(FieldError::new(field, value, rule))
        }
    }
}

fn check_word(field: &str, text: Option<&str>) -> Result<(), FieldError> {
    match text {
        Some(text) if text.is_empty() || text.contains(char::is_whitespace) => {
            Err(FieldError::new(field, text, "must be one word"))
        }
        _ => Ok(()),
    }
}

fn check_path(field: &str, path: &str) -> Result<(), FieldError> {
    match path.starts_with('/') && path.len() > 1 {
        true => Ok(()),
        false => Err(FieldError::new(field, path, "must be an absolute folder")),
    }
}

fn check_port(field: &str, port: &str) -> Result<(), FieldError> {
    let parts = port.split_once('/');
    let parts = parts.and_then(|(number, kind)| Some((number.parse::<u16>().ok()?, kind)));
    match parts {
        Some((1.., "http" | "tcp")) => Ok(()),
        _ => Err(FieldError::new(
            field,
            port,
            "must be such as `8000/http` or `22/tcp`",
        )),
    }
}

#[cfg(test)]
mod tests;
