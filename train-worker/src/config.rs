//! The options of the process, checked before anything is opened.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::net::{Addresses, ClientTls};
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::telemetry::TelemetryConfig;

use crate::engine::EngineError;
use crate::serve::{Permissions, Source};
use crate::trainer::EngineLoader;

pub use espalier_kernels::DeviceChoice;

/// The token with role `worker`; never on the command line, where others of the machine can read it.
const TOKEN: &str = "ESPALIER_TRAIN_WORKER_TOKEN";

/// Trains Qwen3 models on data sets: takes `train` jobs, one at a time.
#[derive(Clone, Debug, Parser)]
#[command(name = "espalier-train-worker", version)]
pub struct Options {
    /// Addresses of the coordinators, with commas between them; the token goes in ESPALIER_TRAIN_WORKER_TOKEN.
    #[arg(long, value_name = "URL,…", env = "ESPALIER_TRAIN_WORKER_COORDINATOR_URL", value_parser = Addresses::parse)]
    pub coordinator_url: Addresses,
    /// PEM file of the authorities that are trusted, for https:// coordinators.
    #[arg(
        long,
        value_name = "FILE",
        env = "ESPALIER_TRAIN_WORKER_COORDINATOR_CA"
    )]
    pub coordinator_ca: Option<PathBuf>,
    /// The object store of the coordinators, which holds data sets and gets adapters, such as s3://bucket/prefix.
    #[arg(long, value_name = "URL", env = "ESPALIER_TRAIN_WORKER_STORE_URL")]
    pub store_url: String,
    /// Where base models that are fetched are kept [the hub's cache; ~/.cache/espalier for s3://].
    #[arg(
        long,
        value_name = "FOLDER",
        env = "ESPALIER_TRAIN_WORKER_DOWNLOAD_DIR"
    )]
    pub download_dir: Option<PathBuf>,
    /// Lets jobs name folders of this machine as base models.
    #[arg(long, env = "ESPALIER_TRAIN_WORKER_ALLOW_LOCAL_MODELS")]
    pub allow_local_models: bool,
    /// auto (a GPU where there is one), cpu, or cuda:N.
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        env = "ESPALIER_TRAIN_WORKER_DEVICE"
    )]
    pub device: DeviceChoice,
    /// Threads that compute on the CPU [one for each core that this process may use].
    #[arg(long, value_name = "COUNT", env = "ESPALIER_TRAIN_WORKER_CPU_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpu_threads: Option<u32>,
    /// Operations of matrix products that this machine does in a second, such as 2e12: what the share of its peak is told
    /// by [not told].
    #[arg(long, value_name = "FLOPS", env = "ESPALIER_TRAIN_WORKER_PEAK_FLOPS", value_parser = flops)]
    pub peak_flops: Option<f64>,
    /// Seconds that a training has to end its step and store a checkpoint when the process is told to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, env = "ESPALIER_TRAIN_WORKER_SHUTDOWN_TIMEOUT", value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub shutdown_timeout: u32,
    /// Ends after the first job, whatever became of it, with exit code 0: for a process that is started for each job.
    #[arg(long, env = "ESPALIER_TRAIN_WORKER_ONCE")]
    pub once: bool,
    /// With --once: seconds after which it ends, with exit code 0, where no job came.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, env = "ESPALIER_TRAIN_WORKER_ONCE_WAIT", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub once_wait: u32,
    /// Where /health and /ready are served over plain HTTP, such as 127.0.0.1:7414 [nowhere].
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "ESPALIER_TRAIN_WORKER_HEALTH_LISTEN"
    )]
    pub health_listen: Option<SocketAddr>,
    /// Where traces, metrics and logs go, by OTLP over gRPC, such as http://localhost:4317 [the variable
    /// OTEL_EXPORTER_OTLP_ENDPOINT].
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl Options {
    /// How long a training may take to end.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_timeout.into())
    }

    /// Logs and export.
    pub fn telemetry(&self, environment: &Environment) -> TelemetryConfig {
        let config = TelemetryConfig {
            otlp_endpoint: self.otlp_endpoint.clone(),
            ..TelemetryConfig::default()
        };
        config.or_from(environment)
    }

    /// Opens where jobs come from.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn source(&self, environment: &Environment) -> Result<Source, StoreError> {
        let token = environment.get(TOKEN).filter(|token| !token.is_empty());
        Ok(Source {
            coordinators: self.coordinator_url.clone(),
            tls: self.coordinator_ca.clone().map(|ca| ClientTls {
                ca,
                server_name: None,
                cert: None,
                key: None,
            }),
            token: token.map(Secret::new),
            store: Store::open(&self.store_url).await?,
        })
    }

    /// How long the process waits for its only job; none: it takes one after the other.
    pub fn once(&self) -> Option<Duration> {
        let wait = Duration::from_secs(self.once_wait.into());
        self.once.then_some(wait)
    }

    /// What jobs may do.
    pub fn permissions(&self) -> Permissions {
        Permissions {
            allow_local_models: self.allow_local_models,
            grace: self.grace(),
            once: self.once(),
            health_listen: self.health_listen,
        }
    }

    /// What fetches base models.
    pub fn fetcher(&self, environment: &Environment) -> Fetcher {
        Fetcher::new(environment, self.download_dir.as_deref())
    }

    /// What computes. Blocks: the driver of a GPU may take seconds.
    ///
    /// # Errors
    /// The GPU that is named cannot be used.
    pub fn loader(&self) -> Result<EngineLoader, EngineError> {
        EngineLoader::open(self.device, self.cpu_threads, self.peak_flops)
    }
}

fn flops(text: &str) -> Result<f64, String> {
    let flops = text.parse().ok();
    let flops = flops.filter(|flops: &f64| flops.is_finite() && *flops > 0.0);
    flops.ok_or_else(|| "must be a number above 0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Device;
    use crate::trainer::Load as _;

    fn read(more: &[&str]) -> Result<Options, String> {
        let needed = [
            "worker",
            "--coordinator-url",
            "http://c:1",
            "--store-url",
            "memory://",
        ];
        let options = Options::try_parse_from(needed.iter().chain(more));
        options.map_err(|error| error.to_string())
    }

    #[test]
    fn options_have_defaults_and_rules() {
        let given = ["--device=cpu", "--cpu-threads=3", "--peak-flops=2e12"];
        let options = read(&given).unwrap();
        let loader = options.loader().unwrap();
        assert_eq!(loader.device(), Device::Cpu { threads: 3 });
        assert_eq!(loader.peak_flops(), Some(2e12));
        assert_eq!(read(&[]).unwrap().device, DeviceChoice::Auto);
        assert_eq!(options.grace().as_secs(), 300);
        assert_eq!((options.once(), options.health_listen), (None, None));
        let once = read(&["--once"]).unwrap().once();
        assert_eq!(once, Some(Duration::from_secs(300)));
        let once = read(&["--once", "--once-wait=7"]).unwrap().once();
        assert_eq!(once, Some(Duration::from_secs(7)));
        assert!(!options.permissions().allow_local_models);
        for (bad, said) in [
            (["--cpu-threads", "0"], "--cpu-threads"),
            (["--once-wait", "0"], "--once-wait"),
            (["--health-listen", "7414"], "--health-listen"),
            (["--device", "gpu"], "must be auto, cpu or cuda:N"),
            (["--peak-flops", "nan"], "must be a number above 0"),
            (["--peak-flops", "-1"], "must be a number above 0"),
        ] {
            let joined = format!("{}={}", bad[0], bad[1]);
            let error = read(&[&joined]).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    /// No machine has so many GPUs.
    #[test]
    fn a_gpu_that_is_not_there_is_refused_and_auto_is_what_there_is() {
        let error = read(&["--device=cuda:1000"]).unwrap().loader().unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("cannot train on cuda:1000: "), "{said}");
        let found = read(&["--cpu-threads=2"]).unwrap().loader().unwrap();
        let first = read(&["--device=cuda:0"]).unwrap().loader();
        let expected = first.map_or(Device::Cpu { threads: 2 }, |gpu| gpu.device());
        assert_eq!(found.device(), expected);
    }
}
