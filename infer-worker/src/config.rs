//! The options of the process, under the names that vLLM's users know, checked before anything is opened.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use espalier_core::id::AdapterName;
use espalier_kernels::cpu::Form;
use espalier_runtime::config::{self, Environment, Secret};
use espalier_runtime::telemetry::TelemetryConfig;
use espalier_runtime::worker::serving::check_url;

use crate::api::backend::AdapterSource;
use crate::jobs::JobOptions;
use crate::serve::Followed;

pub use espalier_kernels::DeviceChoice as Device;

/// Least of `--max-model-len`.
pub const MODEL_LEN_MIN: u32 = 16;

/// Serves a Qwen3 model over an OpenAI-compatible API.
#[derive(Clone, Debug, Parser)]
#[command(name = "espalier-infer-worker", version)]
pub struct Options {
    /// A folder with config.json and safetensors, a repository of the Hugging Face hub, or s3://….
    #[arg(long, env = "ESPALIER_INFER_WORKER_MODEL")]
    pub model: String,
    /// Branch, tag or commit of the hub's repository [main].
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// Where what is fetched is kept [the hub's cache; ~/.cache/espalier for s3://].
    #[arg(long, value_name = "FOLDER")]
    pub download_dir: Option<PathBuf>,
    /// What requests call the model [the value of --model].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// The address to listen at; 0.0.0.0 is every one of this machine.
    #[arg(long, env = "ESPALIER_INFER_WORKER_HOST", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// The port; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// What requests must show as a bearer token.
    #[arg(long, env = "ESPALIER_INFER_WORKER_API_KEY", hide_env_values = true, value_parser = api_key)]
    pub api_key: Option<Secret>,
    /// Name of that key in the configuration of agent workers (`model_keys`), which coordinators tell them.
    #[arg(
        long,
        value_name = "NAME",
        env = "ESPALIER_INFER_WORKER_API_KEY_NAME",
        requires = "coordinator_url"
    )]
    pub api_key_name: Option<String>,
    /// Where other workers reach this one, which coordinators tell them [http://HOST:PORT/v1]. `${NAME}` stands for a variable
    /// of the environment: a pod of RunPod is at https://${RUNPOD_POD_ID}-8000.proxy.runpod.net/v1.
    #[arg(
        long,
        value_name = "URL",
        env = "ESPALIER_INFER_WORKER_ADVERTISE_URL",
        requires = "coordinator_url"
    )]
    pub advertise_url: Option<String>,
    /// Longest prompt and answer together, in tokens [the model's].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(i64::from(MODEL_LEN_MIN)..))]
    pub max_model_len: Option<u32>,
    /// Answers that run at once.
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: u32,
    /// Tokens of a step, prompts and answers together [512 on the CPU, 8192 on a GPU].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(16..))]
    pub max_num_batched_tokens: Option<u32>,
    /// Requests that may wait; one more is answered with 429.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_queue: u32,
    /// Memory for keys and values, such as 4GiB or a number of bytes [on the CPU half of what is left beside the model, at
    /// most 16GiB].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Computes every prompt anew.
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// Share of a GPU's memory to use, in (0, 1].
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub gpu_memory_utilization: f64,
    /// An adapter to load at the start, by the name that requests give. May be repeated.
    #[arg(long = "adapter", value_name = "NAME=PATH", value_parser = adapter)]
    pub adapters: Vec<AdapterSource>,
    /// An adapter that is served as it comes into the store: the version that is `latest` under its name, the newest one as
    /// NAME@vN. NAME, or PROJECT/NAME [project default]; `*` in place of NAME is every adapter that was trained on the model.
    /// Takes `--store-url`. May be repeated.
    #[arg(long = "follow", value_name = "[PROJECT/]NAME")]
    pub follow: Vec<Followed>,
    /// Seconds between two looks at what is followed.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub follow_every: u32,
    /// Adapters that may be loaded at once. A GPU keeps room for as many.
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_loras: u32,
    /// Largest rank of an adapter. A GPU keeps room for `--max-loras` of that rank.
    #[arg(long, value_name = "RANK", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_lora_rank: u32,
    /// auto (a GPU where there is one), cpu, or cuda:N.
    #[arg(long, env = "ESPALIER_INFER_WORKER_DEVICE", default_value = "auto")]
    pub device: Device,
    /// How weights are held: auto (bf16, which is what Qwen3's numbers are), f32, bf16, or q8 (half the memory, and on the
    /// CPU faster, but not quite the same numbers).
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Threads that compute on the CPU [one for each core that this process may use].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpu_threads: Option<u32>,
    /// Where the seeds of requests begin that bring none [somewhere else at each start].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Seconds that answers have to end when the process is told to.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub shutdown_timeout: u32,
    /// Where traces, metrics and logs go, by OTLP over gRPC, such as http://localhost:4317 [the variable
    /// OTEL_EXPORTER_OTLP_ENDPOINT].
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
    /// Jobs of the queue.
    #[command(flatten)]
    pub jobs: JobOptions,
}

/// How weights are held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// As the checkpoint has them.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats with 8 bits of exponent.
    #[value(alias = "bfloat16")]
    Bf16,
    /// 8-bit integers with a scale a block.
    Q8,
}

impl Dtype {
    /// The form of weights on the CPU.
    pub fn on_cpu(self) -> Form {
        match self {
            Self::Auto | Self::Bf16 => Form::bf16(),
            Self::F32 => Form::F32,
            Self::Q8 => Form::Q8,
        }
    }
}

impl Options {
    /// Those for `model` with all others as they are without being told.
    ///
    /// # Errors
    /// The text of a rule that `model` breaks.
    pub fn of(model: &str) -> Result<Self, String> {
        let options = Self::try_parse_from(["espalier-infer-worker", "--model", model]);
        options.map_err(|error| error.to_string())
    }

    /// What requests call the base model.
    pub fn base_name(&self) -> &str {
        self.served_model_name.as_deref().unwrap_or(&self.model)
    }

    /// Whether other machines reach it and need no key.
    pub fn is_open(&self) -> bool {
        !self.host.is_loopback() && self.api_key.is_none()
    }

    /// How long answers may run on when the process is told to end.
    pub fn drain_limit(&self) -> Duration {
        Duration::from_secs(self.shutdown_timeout.into())
    }

    /// Logs and export.
    pub fn telemetry(&self, environment: &Environment) -> TelemetryConfig {
        let config = TelemetryConfig {
            otlp_endpoint: self.otlp_traces_endpoint.clone(),
            ..TelemetryConfig::default()
        };
        config.or_from(environment)
    }

    /// Puts variables of the environment where options name them.
    ///
    /// # Errors
    /// Names the option and the variable that is not set.
    pub fn expand(&mut self, environment: &Environment) -> Result<(), String> {
        let Some(url) = &mut self.advertise_url else {
            return Ok(());
        };
        *url = config::expand(url, environment).map_err(|name| {
            format!("`--advertise-url` must name variables that are set, got `${{{name}}}`")
        })?;
        Ok(())
    }

    /// Rules that concern more than one option.
    ///
    /// # Errors
    /// Names the options and the rule.
    pub fn check(&self) -> Result<(), String> {
        let (seqs, tokens) = (self.max_num_seqs, self.max_num_batched_tokens);
        if let Some(tokens) = tokens.filter(|tokens| *tokens < seqs) {
            return Err(format!(
                "`--max-num-batched-tokens` must be at least `--max-num-seqs` ({seqs}), got {tokens}"
            ));
        }
        self.check_registration()?;
        self.check_followed()?;
        let base = self.base_name();
        for (i, adapter) in self.adapters.iter().enumerate() {
            let before = self.adapters[..i]
                .iter()
                .any(|other| other.name == adapter.name);
            if before || adapter.name == base {
                let name = &adapter.name;
                return Err(format!(
                    "`--adapter` must have a name of its own, got `{name}` again"
                ));
            }
        }
        Ok(())
    }
}

impl Options {
    /// What is followed needs a store, and a name that nothing else has.
    fn check_followed(&self) -> Result<(), String> {
        let is_used = self.jobs.coordinator_url.is_some() || !self.follow.is_empty();
        match (&self.jobs.store_url, is_used) {
            (Some(_), false) => {
                return Err(
                    "`--store-url` must be given with `--coordinator-url` or `--follow` alone"
                        .to_owned(),
                );
            }
            (None, _) if !self.follow.is_empty() => {
                return Err(
                    "`--store-url` must be given with `--follow`: it says which version is latest"
                        .to_owned(),
                );
            }
            _ => {}
        }
        for (i, followed) in self.follow.iter().enumerate() {
            let name = followed.name().map(AdapterName::as_str);
            let is_taken = |name: &str| {
                let mut others = self.follow[..i].iter().filter_map(Followed::name);
                let mut adapters = self.adapters.iter();
                name == self.base_name()
                    || others.any(|other| other.as_str() == name)
                    || adapters.any(|adapter| adapter.name == name)
            };
            if self.follow[..i].contains(followed) || name.is_some_and(is_taken) {
                return Err(format!(
                    "`--follow` must have a name of its own, got `{}` again",
                    name.map_or_else(|| followed.to_string(), str::to_owned)
                ));
            }
        }
        Ok(())
    }

    /// Others are told of this worker: they have to reach it, and to be let in.
    fn check_registration(&self) -> Result<(), String> {
        if self.jobs.coordinator_url.is_none() {
            return Ok(());
        }
        if self.jobs.store_url.is_none() {
            return Err("`--store-url` must be given with `--coordinator-url`: jobs of the coordinators have their files \
                there"
                .to_owned());
        }
        if self.host.is_unspecified() && self.advertise_url.is_none() {
            return Err(format!(
                "`--advertise-url` must be given with `--coordinator-url` and `--host {}`: other workers cannot reach that \
                 address",
                self.host
            ));
        }
        if let Some(url) = &self.advertise_url {
            check_url(url).map_err(|error| format!("`--advertise-url` {}", error.rule))?;
        }
        if self.api_key.is_some() && self.api_key_name.is_none() {
            return Err("`--api-key-name` must be given with `--api-key` and `--coordinator-url`: agent workers find the \
                key under that name in their `model_keys`"
                .to_owned());
        }
        Ok(())
    }
}

fn api_key(text: &str) -> Result<Secret, String> {
    match text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        true => Err("must be one word".to_owned()),
        false => Ok(Secret::new(text)),
    }
}

/// A number of bytes, or of KiB, MiB or GiB.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("", 0)];
    let read = |(unit, shift): (&str, u32)| {
        let number: u64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(1 << shift)
    };
    let bytes = units.into_iter().find_map(read).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "must be a number of bytes above 0, or of KiB, MiB or GiB".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok();
    let share = share.filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "must be in (0, 1]".to_owned())
}

fn adapter(text: &str) -> Result<AdapterSource, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok(AdapterSource {
            name: name.to_owned(),
            path: path.to_owned(),
        }),
        _ => Err("must be NAME=PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &[&str]) -> Result<Options, String> {
        let arguments = ["worker", "--model", "m"].iter().chain(more);
        let options = Options::try_parse_from(arguments).map_err(|error| error.to_string())?;
        options.check().map(|()| options)
    }

    #[test]
    fn every_option_is_read() {
        let options = read(&[
            "--served-model-name",
            "q",
            "--host",
            "0.0.0.0",
            "--port",
            "0",
            "--api-key",
            "sk-1",
            "--max-model-len",
            "4096",
            "--max-num-seqs",
            "8",
            "--max-num-batched-tokens",
            "512",
            "--gpu-memory-utilization",
            "0.5",
            "--adapter",
            "a=/x=y",
            "--adapter",
            "b=s3://z",
            "--device",
            "cuda:1",
            "--dtype",
            "bfloat16",
            "--seed",
            "7",
            "--kv-cache-memory-bytes",
            "3MiB",
            "--shutdown-timeout",
            "5",
        ])
        .unwrap();
        assert_eq!((options.base_name(), options.port), ("q", 0));
        assert_eq!(
            (
                options.adapters[0].name.as_str(),
                options.adapters[0].path.as_str()
            ),
            ("a", "/x=y")
        );
        assert_eq!(
            (options.device, options.dtype),
            (Device::Cuda(1), Dtype::Bf16)
        );
        assert_eq!(options.kv_cache_memory_bytes, Some(3 << 20));
        assert_eq!(options.drain_limit(), Duration::from_secs(5));
        assert!(
            !format!("{options:?}").contains("sk-1"),
            "the key is in the log"
        );
        assert_eq!(read(&[]).unwrap().base_name(), "m");
    }

    #[test]
    fn wrong_options_say_the_rule() {
        for (arguments, rule) in [
            (["--device", "gpu"], "must be auto, cpu or cuda:N"),
            (["--device", "cuda:x"], "must be auto, cpu or cuda:N"),
            (["--gpu-memory-utilization", "0"], "must be in (0, 1]"),
            (["--gpu-memory-utilization", "NaN"], "must be in (0, 1]"),
            (["--adapter", "a"], "must be NAME=PATH"),
            (["--adapter", "m=/x"], "name of its own"),
            (["--max-num-seqs", "0"], "0 is not in 1..=4096"),
            (
                ["--max-num-batched-tokens", "16"],
                "must be at least `--max-num-seqs` (256), got 16",
            ),
            (["--api-key", "a b"], "must be one word"),
            (
                ["--kv-cache-memory-bytes", "4 GB"],
                "must be a number of bytes",
            ),
            (["--port", "70000"], "70000 is not in 0..=65535"),
        ] {
            let error = read(&arguments).unwrap_err();
            assert!(error.contains(rule), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn what_is_followed_needs_a_store_and_a_name() {
        let store = ["--store-url", "file:///s"];
        let follow = |more: &[&str]| read(&[&store[..], more].concat());
        let all = ["--follow", "shop", "--follow", "p/clicks", "--follow", "*"];
        let options = follow(&all).unwrap();
        let named: Vec<String> = options.follow.iter().map(ToString::to_string).collect();
        assert_eq!(named, ["default/shop", "p/clicks", "default/*"]);
        for (more, rule) in [
            (&[][..], "`--store-url` must be given with"),
            (&["--follow", "a/b/c"], "must be NAME, PROJECT/NAME"),
            (
                &["--follow", "*", "--follow", "default/*"],
                "got `default/*` again",
            ),
            (&["--follow", "m"], "`--follow` must have a name of its own"),
            (
                &["--follow", "p/a", "--follow", "q/a"],
                "`--follow` must have a name of its own",
            ),
            (
                &["--follow", "a", "--adapter", "a=/x"],
                "`--follow` must have a name of its own",
            ),
            (
                &["--follow", "a", "--follow-every", "0"],
                "0 is not in 1..=3600",
            ),
        ] {
            let error = follow(more).unwrap_err();
            assert!(error.contains(rule), "{more:?}: {error}");
        }
        let error = read(&["--follow", "a"]).unwrap_err();
        assert!(
            error.contains("`--store-url` must be given with `--follow`"),
            "{error}"
        );
    }

    #[test]
    fn a_pod_is_told_by_its_id() {
        let mut environment = Environment::new();
        let mut options = Options::of("m").unwrap();
        options.expand(&environment).unwrap();
        let url = "https://${RUNPOD_POD_ID}-8000.proxy.runpod.net/v1";
        options.advertise_url = Some(url.to_owned());
        let error = options.expand(&environment).unwrap_err();
        assert!(
            error.contains("must name variables that are set, got `${RUNPOD_POD_ID}`"),
            "{error}"
        );
        environment.insert("RUNPOD_POD_ID".to_owned(), "7h9k2m".to_owned());
        options.expand(&environment).unwrap();
        let expanded = options.advertise_url.as_deref();
        assert_eq!(expanded, Some("https://7h9k2m-8000.proxy.runpod.net/v1"));
        check_url(expanded.unwrap()).unwrap();
    }

    #[test]
    fn who_is_told_to_others_can_be_reached_by_them() {
        let told = |more: &[&str]| {
            let coordinators = ["--coordinator-url", "http://c:7411"];
            read(&[&coordinators, more].concat())
        };
        let store = ["--store-url", "file:///s"];
        assert!(told(&store).is_ok());
        for (more, rule) in [
            (&[][..], "`--store-url` must be given"),
            (
                &["--store-url", "file:///s", "--host", "0.0.0.0"],
                "`--advertise-url` must be given",
            ),
            (
                &[
                    "--store-url",
                    "file:///s",
                    "--advertise-url",
                    "10.0.0.7:8000/v1",
                ],
                "`--advertise-url` must be `http://host:port/v1`",
            ),
            (
                &["--store-url", "file:///s", "--api-key", "k"],
                "`--api-key-name` must be given",
            ),
        ] {
            let error = told(more).unwrap_err();
            assert!(error.contains(rule), "{more:?}: {error}");
        }
    }
}
