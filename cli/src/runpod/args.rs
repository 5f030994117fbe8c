//! Options of `espalier runpod up`, and the pool that they describe.

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};
use espalier_coordinator::scaler::runpod::config::{BUDGET_MAX, NetworkVolume, Volume};
use espalier_coordinator::scaler::runpod::{Cloud, RunpodConfig, RunpodPool};
use espalier_runtime::config::{Environment, Secret};

use super::{Account, NAME_DEFAULT};
use crate::exit::Problem;

/// The port that an inference worker serves at.
const SERVE_PORT: &str = "8000/http";
/// The folder of the agent worker's image that it may write to.
const AGENT_FOLDER: &str = "/var/lib/espalier";
/// Where a pod's port 8000 is on the internet.
const SERVE_URL: &str = "https://${RUNPOD_POD_ID}-8000.proxy.runpod.net/v1";

/// Options of `up`.
#[derive(Args, Clone, Debug)]
pub struct Up {
    /// What the pods run
    #[arg(value_name = "WORKER", value_enum)]
    pub worker: Worker,
    /// Name of these pods, for `status` and `down`; not that of a coordinator's scaler, which would take them for its own
    #[arg(long, value_name = "NAME", default_value = NAME_DEFAULT)]
    pub name: String,
    /// How many pods there are to be
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub count: u32,
    /// The image, such as registry.example/espalier/train-worker:0.1.0
    #[arg(long, value_name = "IMAGE", required_unless_present = "template")]
    pub image: Option<String>,
    /// Id of a template of RunPod's, whose settings are taken where no option says otherwise
    #[arg(long, value_name = "ID")]
    pub template: Option<String>,
    /// Arguments of the image's entrypoint
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub args: Option<String>,
    /// A type of GPU, as RunPod's catalogue calls it; repeated: the first that there is
    #[arg(long = "gpu", value_name = "TYPE", required = true)]
    pub gpus: Vec<String>,
    /// GPUs of a pod, of which its worker uses the first
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub gpu_count: u32,
    /// Most that a pod may cost, in $ an hour
    #[arg(long, value_name = "USD")]
    pub max_price: Option<f64>,
    /// A variable of the workers; without a value, that of this terminal. May be repeated
    #[arg(long = "env", value_name = "NAME[=VALUE]", value_parser = variable)]
    pub env: Vec<Variable>,
    /// Whose machines
    #[arg(long, value_enum, default_value = "secure")]
    pub cloud: Machines,
    /// A data center to choose from, such as EU-RO-1; may be repeated [any]
    #[arg(long = "data-center", value_name = "ID")]
    pub data_centers: Vec<String>,
    /// Lowest CUDA version of the machine's driver, such as 12.8
    #[arg(long, value_name = "VERSION")]
    pub cuda_min: Option<String>,
    /// GB of the container's disk
    #[arg(long, value_name = "GB")]
    pub disk_gb: Option<u32>,
    /// A disk of the machine that is not wiped when the container starts anew, such as 50:/workspace
    #[arg(long, value_name = "GB:FOLDER", value_parser = volume)]
    pub volume: Option<Mount>,
    /// A network volume, such as 3k8x2v:/models
    #[arg(long, value_name = "ID:FOLDER", value_parser = volume, conflicts_with = "volume")]
    pub network_volume: Option<Mount>,
    /// A port that can be reached, such as 22/tcp; may be repeated [infer: 8000/http]
    #[arg(long = "port", value_name = "PORT/KIND")]
    pub ports: Vec<String>,
    /// Id of the credentials for a private registry, from RunPod's settings
    #[arg(long, value_name = "ID")]
    pub registry: Option<String>,
    /// Put the account's SSH keys into the pods, for images with an SSH server
    #[arg(long)]
    pub ssh: bool,
    /// Seconds to wait until the pods run; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub wait: u64,
    /// Where the account is.
    #[command(flatten)]
    pub account: Account,
}

/// What a pod runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Worker {
    /// Rollouts
    Agent,
    /// Serving of models
    Infer,
    /// Training
    Train,
}

/// Whose machines pods are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Machines {
    /// RunPod's own data centers
    Secure,
    /// Others'
    Community,
}

/// A variable, whose value may be that of the terminal.
#[derive(Clone, Debug)]
pub struct Variable {
    name: String,
    value: Option<Secret>,
}

fn variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    match name.is_empty() || value.is_some_and(str::is_empty) {
        true => Err("must be NAME=VALUE, or the NAME of a variable of this terminal".to_owned()),
        false => Ok(Variable {
            name: name.to_owned(),
            value: value.map(Secret::new),
        }),
    }
}

/// What is mounted, and where.
#[derive(Clone, Debug)]
pub struct Mount {
    what: String,
    path: String,
}

fn volume(text: &str) -> Result<Mount, String> {
    let parts = text.split_once(':');
    let parts = parts.filter(|(what, path)| !what.is_empty() && path.starts_with('/'));
    let (what, path) = parts.ok_or("must have a colon and an absolute folder at its end")?;
    Ok(Mount {
        what: what.to_owned(),
        path: path.to_owned(),
    })
}

impl Worker {
    /// Name of the pool, which is a part of the pods' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Infer => "infer",
            Self::Train => "train",
        }
    }

    /// Variables without which the worker ends at its start, or serves whoever comes along. An inference worker needs some
    /// where it `is_registered` with coordinators.
    fn needs(self, is_registered: bool) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Agent => &[
                (
                    "ESPALIER_AGENT_WORKER_COORDINATOR_URL",
                    "whom to take jobs from, as pods reach it",
                ),
                ("ESPALIER_AGENT_WORKER_STORE_URL", "where results go"),
                (
                    "ESPALIER_AGENT_WORKER_TOKEN",
                    "what it shows the coordinator",
                ),
                (
                    "ESPALIER_AGENT_WORKER_MODEL_NAME",
                    "the model of jobs that name none",
                ),
            ],
            Self::Infer => match is_registered {
                false => &INFER_NEEDS[..2],
                true => &INFER_NEEDS,
            },
            Self::Train => &[
                (
                    "ESPALIER_TRAIN_WORKER_COORDINATOR_URL",
                    "whom to take jobs from, as pods reach it",
                ),
                (
                    "ESPALIER_TRAIN_WORKER_STORE_URL",
                    "where data sets are and adapters go",
                ),
                (
                    "ESPALIER_TRAIN_WORKER_TOKEN",
                    "what it shows the coordinator",
                ),
            ],
        }
    }
}

/// Without it nobody is told of a worker that serves.
const INFER_COORDINATOR: &str = "ESPALIER_INFER_WORKER_COORDINATOR_URL";
/// What an inference worker needs: the first two in any case.
const INFER_NEEDS: [(&str, &str); 5] = [
    ("ESPALIER_INFER_WORKER_MODEL", "what it serves"),
    (
        "ESPALIER_INFER_WORKER_API_KEY",
        "what requests must show: a pod's port is open to the internet",
    ),
    (
        "ESPALIER_INFER_WORKER_API_KEY_NAME",
        "how agent workers call that key in their model_keys",
    ),
    (
        "ESPALIER_INFER_WORKER_STORE_URL",
        "where requests and answers of jobs are",
    ),
    (
        "ESPALIER_INFER_WORKER_TOKEN",
        "what it shows the coordinator",
    ),
];

impl Up {
    /// The account and its one pool. `environment` is the terminal's.
    ///
    /// # Errors
    /// Names the option, its value and the rule.
    pub fn config(&self, key: Secret, environment: &Environment) -> Result<RunpodConfig, Problem> {
        let pool = self.pool(environment)?;
        let config = RunpodConfig {
            name: self.name.clone(),
            api_key: key,
            url: self.account.api_url.clone(),
            // Each pod has its price, and nobody but who gave the command decides how many there are.
            max_per_hour: BUDGET_MAX,
            max_per_day: BUDGET_MAX,
            pools: vec![pool],
        };
        config.validate_account()?;
        Ok(config)
    }

    fn pool(&self, environment: &Environment) -> Result<RunpodPool, Problem> {
        let mut pool = RunpodPool::new(self.worker.name(), self.image.clone(), self.gpus.clone());
        pool.template = self.template.clone();
        pool.args = self.args.clone();
        pool.gpu_count = self.gpu_count;
        pool.max_price = self.max_price;
        pool.cloud = match self.cloud {
            Machines::Secure => Cloud::Secure,
            Machines::Community => Cloud::Community,
        };
        pool.data_centers = self.data_centers.clone();
        pool.cuda_min = self.cuda_min.clone();
        pool.disk_gb = self.disk_gb;
        pool.volume = self.volume.as_ref().map(Mount::volume).transpose()?;
        pool.network_volume = self.network_volume.as_ref().map(Mount::network);
        pool.ports = self.ports.clone();
        pool.registry = self.registry.clone();
        pool.ssh = self.ssh;
        pool.env = self.variables(environment)?;
        match self.worker {
            Worker::Agent => {
                let folder = pool.env.entry("ESPALIER_AGENT_WORKER_DATA_DIR".to_owned());
                folder.or_insert_with(|| Secret::new(AGENT_FOLDER));
            }
            Worker::Infer => self.serve(&mut pool),
            Worker::Train => {}
        }
        pool.validate_pod()?;
        Ok(pool)
    }

    /// What a worker that serves needs so that it is reached.
    fn serve(&self, pool: &mut RunpodPool) {
        let host = pool.env.entry("ESPALIER_INFER_WORKER_HOST".to_owned());
        host.or_insert_with(|| Secret::new("0.0.0.0"));
        if !pool.ports.iter().any(|port| port == SERVE_PORT) {
            pool.ports.push(SERVE_PORT.to_owned());
        }
        if pool.env.contains_key(INFER_COORDINATOR) {
            let told = pool
                .env
                .entry("ESPALIER_INFER_WORKER_ADVERTISE_URL".to_owned());
            told.or_insert_with(|| Secret::new(SERVE_URL));
        }
    }

    fn variables(&self, environment: &Environment) -> Result<BTreeMap<String, Secret>, Problem> {
        let mut variables = BTreeMap::new();
        for variable in &self.env {
            let name = &variable.name;
            let value = variable.value.clone().or_else(|| {
                let set = environment.get(name).filter(|value| !value.is_empty());
                set.map(Secret::new)
            });
            let value = value.ok_or_else(|| {
                Problem::refused(format!(
                    "`--env {name}` has no value, and this terminal has no such variable"
                ))
                .fix(format!("export {name}=…, or give `--env {name}=…`"))
            })?;
            variables.insert(name.clone(), value);
        }
        // A template may have what is missing.
        let needs = self
            .worker
            .needs(variables.contains_key(INFER_COORDINATOR))
            .iter()
            .filter(|_| self.template.is_none());
        let missing = needs.filter(|(name, _)| !variables.contains_key(*name));
        let missing: Vec<String> = missing
            .map(|(name, what)| format!("{name} ({what})"))
            .collect();
        match missing.is_empty() {
            true => Ok(variables),
            false => Err(Problem::refused(format!(
                "`--env` must have what the worker cannot do without: {}",
                missing.join(", ")
            ))),
        }
    }
}

impl Mount {
    fn volume(&self) -> Result<Volume, Problem> {
        let size_gb = self.what.parse().map_err(|_| {
            Problem::refused(format!(
                "`--volume` must begin with a number of GB, got `{}`",
                self.what
            ))
        })?;
        Ok(Volume {
            size_gb,
            path: self.path.clone(),
        })
    }

    fn network(&self) -> NetworkVolume {
        NetworkVolume {
            id: self.what.clone(),
            path: self.path.clone(),
        }
    }
}
