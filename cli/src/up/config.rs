//! What `espalier up` is told: options, then `--config espalier.toml`, whose every key can be set as
//! `ESPALIER_UP_…` too.
//!
//! ```toml
//! slots = 8
//! mcp = "mcp.json"
//!
//! [model]
//! name = "Qwen/Qwen3-4B"
//!
//! [model.endpoint]
//! base_url = "http://localhost:8000/v1"
//! api_key = { env = "OPENAI_API_KEY" }
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use espalier_core::error::FieldError;
use espalier_runtime::config::{Environment, Secret, load};
use espalier_runtime::model::ModelEndpoint;
use espalier_runtime::telemetry::TelemetryConfig;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::devices::Asked;
use crate::exit::Problem;
use crate::rollout_args::RolloutArgs;

/// Every key of the file as a variable begins with this. Not `ESPALIER_` alone, so that the variables of scripts and
/// other commands are none of ours.
const ENV_PREFIX: &str = "ESPALIER_UP_";
/// Where the coordinator listens unless told otherwise.
const LISTEN_DEFAULT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7411);
/// Rollouts at once unless told otherwise: a browser context of each takes about a quarter of a core.
const SLOTS_DEFAULT: u32 = 8;
/// How long running rollouts may go on after SIGTERM.
const GRACE_DEFAULT_S: u64 = 30;

/// How a model and its endpoint are named.
const EXAMPLE: &str = "name it: --model-url http://localhost:8000/v1 --model Qwen/Qwen3-4B";

/// Options of `up`.
#[derive(Args, Clone, Debug, Default)]
pub struct Up {
    /// The model, the MCP servers and their browsers.
    #[command(flatten)]
    pub rollouts: RolloutArgs,
    /// Where the coordinator listens; port 0 takes a free one [default: 127.0.0.1:7411]
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<SocketAddr>,
    /// What computes where.
    #[command(flatten)]
    pub devices: Asked,
    /// Rollouts at once [default: 8]
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// Lets jobs bring MCP servers of their own, which are commands that run here [default: only if it listens on loopback]
    #[arg(long)]
    pub allow_inline_mcp: bool,
    /// Object store for traces [default: file://DATA_DIR/store]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Seconds that a lease lasts without a sign of life [default: what suits the kind of job]
    #[arg(long, value_name = "S", hide_short_help = true)]
    pub lease_ttl_s: Option<u64>,
    /// File that gets the coordinator's address once everything serves
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub ready_file: Option<PathBuf>,
    /// All of this and more as TOML; options win over the file
    #[arg(long, value_name = "FILE", env = "ESPALIER_UP_CONFIG")]
    pub config: Option<PathBuf>,
}

/// The file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct UpFileConfig {
    listen: Option<SocketAddr>,
    slots: Option<u32>,
    store_url: Option<String>,
    allow_inline_mcp: Option<bool>,
    mcp: Option<PathBuf>,
    headed: bool,
    playwright_dir: Option<PathBuf>,
    lease_ttl_ms: Option<u64>,
    grace_s: Option<u64>,
    /// What trainings run on.
    pub(super) train_device: Option<String>,
    /// Hosts whose HTTP hooks verifiers may ask.
    http_hook_hosts: Vec<String>,
    pub(super) model: ModelConfig,
    telemetry: TelemetryConfig,
}

/// The `[model]` section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ModelConfig {
    /// The model of jobs that name none.
    name: Option<String>,
    /// More fields of every request.
    extra: Map<String, Value>,
    /// Where it is served.
    endpoint: Option<ModelEndpoint>,
    /// What it runs on where it is served here.
    pub(super) device: Option<String>,
    /// Share of a GPU's memory, likewise.
    pub(super) gpu_memory_utilization: Option<f64>,
    /// Longest prompt and answer together, likewise.
    pub(super) max_model_len: Option<u32>,
}

/// Everything that `up` needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the coordinator listens.
    pub listen: SocketAddr,
    /// Rollouts at once.
    pub slots: u32,
    /// The object store; none: a folder in the data folder.
    pub store_url: Option<String>,
    /// Whether jobs may bring MCP servers of their own.
    pub allow_inline_mcp: bool,
    /// The file of MCP servers.
    pub mcp: Option<PathBuf>,
    /// Whether browsers show their windows.
    pub headed: bool,
    /// The folder that holds the Playwright MCP.
    pub playwright_dir: Option<PathBuf>,
    /// How long a lease lasts.
    pub lease_ttl_ms: Option<u64>,
    /// How long running rollouts may go on while draining.
    pub grace: Duration,
    /// Hosts whose HTTP hooks verifiers may ask.
    pub http_hook_hosts: Vec<String>,
    /// Where the model is served; none: here.
    pub endpoint: Option<ModelEndpoint>,
    /// The model of jobs that name none.
    pub model: String,
    /// More fields of every request.
    pub extra: Map<String, Value>,
    /// What computes where.
    pub devices: Asked,
    /// Logs, traces and metrics.
    pub telemetry: TelemetryConfig,
    /// File that gets the address.
    pub ready_file: Option<PathBuf>,
}

impl Settings {
    /// Where the model is served, for those that serve none.
    ///
    /// # Errors
    /// No endpoint is named.
    pub fn served_elsewhere(&self) -> Result<&ModelEndpoint, Problem> {
        let endpoint = self.endpoint.as_ref();
        endpoint.ok_or_else(|| {
            let fix =
                format!("{EXAMPLE}, or start `espalier up` with a model that it serves itself");
            Problem::refused("no model endpoint is named").fix(fix)
        })
    }

    /// Whether other machines can reach it.
    pub fn is_open(&self) -> bool {
        !self.listen.ip().is_loopback()
    }

    /// Joins options, file and environment.
    pub fn load(args: &Up, environment: &Environment) -> Result<Self, Problem> {
        let file: UpFileConfig = load(args.config.as_deref(), ENV_PREFIX, environment)?;
        let rollouts = args.rollouts.clone();
        let devices = args.devices.or_of_file(&file)?;
        let (endpoint, model, extra) = model(&rollouts, file.model, environment)?;
        let slots = args.slots.or(file.slots).unwrap_or(SLOTS_DEFAULT);
        if !(1..=espalier_runtime::worker::SLOTS_MAX).contains(&slots) {
            let rule = format!("must be in 1..={}", espalier_runtime::worker::SLOTS_MAX);
            return Err(FieldError::new("slots", slots, rule).into());
        }
        let lease_ttl_ms = args
            .lease_ttl_s
            .map(|s| s.saturating_mul(1000))
            .or(file.lease_ttl_ms);
        let listen = args.listen.or(file.listen).unwrap_or(LISTEN_DEFAULT);
        // On loopback only who is on this machine submits, and may run commands anyway. From elsewhere a job must not
        // be remote code execution unless the owner says so.
        let inline = args.allow_inline_mcp.then_some(true);
        let inline = inline.or(file.allow_inline_mcp);
        Ok(Self {
            listen,
            allow_inline_mcp: inline.unwrap_or(listen.ip().is_loopback()),
            slots,
            store_url: args.store.clone().or(file.store_url),
            mcp: rollouts.mcp.or(file.mcp),
            headed: rollouts.headed || file.headed,
            playwright_dir: rollouts.playwright_dir.or(file.playwright_dir),
            lease_ttl_ms,
            grace: Duration::from_secs(file.grace_s.unwrap_or(GRACE_DEFAULT_S)),
            http_hook_hosts: file.http_hook_hosts,
            endpoint,
            model,
            extra,
            devices,
            telemetry: file.telemetry.or_from(environment),
            ready_file: args.ready_file.clone(),
        })
    }
}

/// Where the model is served, its name, and more fields of every request.
type NamedModel = (Option<ModelEndpoint>, String, Map<String, Value>);

fn model(
    args: &RolloutArgs,
    file: ModelConfig,
    environment: &Environment,
) -> Result<NamedModel, Problem> {
    let mut endpoint = match (file.endpoint, &args.model_url) {
        (Some(endpoint), Some(url)) => Some(ModelEndpoint {
            base_url: url.clone(),
            ..endpoint
        }),
        (endpoint, url) => endpoint.or_else(|| url.clone().map(ModelEndpoint::new)),
    };
    let mut name = args.model.clone().or(file.name);
    let mut is_named = true;
    if let (None, Some(served)) = (&endpoint, &args.served) {
        endpoint = Some(served.endpoint());
        name = Some(args.model.clone().unwrap_or_else(|| served.name.clone()));
        is_named = false;
    }
    let name = name.ok_or_else(|| Problem::refused("no model is named").fix(EXAMPLE))?;
    if let (Some(variable), false) = (&args.api_key_env, is_named) {
        let rule = "must be given with an endpoint: that of `espalier up` brings its own key";
        return Err(FieldError::new("--api-key-env", variable, rule).into());
    }
    if let (Some(variable), Some(endpoint)) = (&args.api_key_env, &mut endpoint) {
        let key = environment.get(variable).filter(|key| !key.is_empty());
        let missing = || {
            let rule = "must name an environment variable that is set";
            FieldError::new("--api-key-env", variable, rule)
        };
        endpoint.api_key = Some(Secret::new(key.ok_or_else(missing)?));
    }
    Ok((endpoint, name, file.extra))
}

#[cfg(test)]
mod tests {
    use espalier_infer_worker::config::Device;

    use super::*;
    use crate::client::ServedModel;
    use crate::exit::Exit;

    fn settings(args: &Up, toml: &str, environment: &[(&str, &str)]) -> Result<Settings, Problem> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("espalier.toml");
        std::fs::write(&file, toml).unwrap();
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let args = Up {
            config: Some(file),
            ..args.clone()
        };
        Settings::load(&args, &environment)
    }

    #[test]
    fn options_win_over_the_file_and_the_file_over_defaults() {
        let toml = "slots = 3\n[model]\nname = \"m\"\n[model.endpoint]\nbase_url = \"http://a/v1\"\nmax_retries = 1\napi_key = { env = \"KEY\" }\n";
        let args = Up {
            rollouts: RolloutArgs {
                model_url: Some("http://b/v1".to_owned()),
                ..RolloutArgs::default()
            },
            ..Up::default()
        };
        let found = settings(
            &args,
            toml,
            &[("KEY", "s3cret"), ("ESPALIER_UP_GRACE_S", "5")],
        )
        .unwrap();
        assert_eq!((found.slots, found.model.as_str()), (3, "m"));
        assert_eq!(
            found
                .endpoint
                .as_ref()
                .map(|e| (e.base_url.as_str(), e.max_retries)),
            Some(("http://b/v1", 1))
        );
        assert_eq!(
            (found.listen, found.grace),
            (LISTEN_DEFAULT, Duration::from_secs(5))
        );
        assert!(!format!("{found:?}").contains("s3cret"));
    }

    #[test]
    fn jobs_bring_commands_from_loopback_only_unless_it_is_said_otherwise() {
        let inline = |listen: &str, flag: bool, more: &str| {
            let args = Up {
                listen: Some(listen.parse().unwrap()),
                allow_inline_mcp: flag,
                ..Up::default()
            };
            let model = "[model]\nname = \"m\"\n[model.endpoint]\nbase_url = \"http://a/v1\"\n";
            let found = settings(&args, &format!("{more}\n{model}"), &[]).unwrap();
            (found.allow_inline_mcp, found.is_open())
        };
        for (listen, flag, more, expected) in [
            ("127.0.0.1:0", false, "", (true, false)),
            ("[::1]:0", false, "", (true, false)),
            (
                "127.0.0.1:0",
                false,
                "allow_inline_mcp = false",
                (false, false),
            ),
            ("0.0.0.0:0", false, "", (false, true)),
            ("10.0.0.1:0", false, "", (false, true)),
            ("0.0.0.0:0", true, "", (true, true)),
            ("0.0.0.0:0", false, "allow_inline_mcp = true", (true, true)),
        ] {
            assert_eq!(
                inline(listen, flag, more),
                expected,
                "{listen} {flag} {more}"
            );
        }
    }

    #[test]
    fn what_computes_is_said_by_options_or_the_file() {
        let toml = "train_device = \"cpu\"\n[model]\nname = \"m\"\ndevice = \"cuda:1\"\nmax_model_len = 4096";
        let args = Up {
            devices: Asked {
                train_device: Some(Device::Cuda(2)),
                ..Asked::default()
            },
            ..Up::default()
        };
        let found = settings(
            &args,
            toml,
            &[("ESPALIER_UP_MODEL__GPU_MEMORY_UTILIZATION", "0.4")],
        );
        let expected = Asked {
            device: Some(Device::Cuda(1)),
            train_device: Some(Device::Cuda(2)),
            gpu_memory_utilization: Some(0.4),
            max_model_len: Some(4096),
        };
        assert_eq!(found.unwrap().devices, expected);
        for (toml, field) in [
            ("train_device = \"tpu\"", "train_device"),
            ("[model]\ndevice = \"gpu0\"", "device"),
            (
                "[model]\ngpu_memory_utilization = 1.5",
                "gpu_memory_utilization",
            ),
            ("[model]\nmax_model_len = 8", "max_model_len"),
        ] {
            let message = settings(&Up::default(), toml, &[]).unwrap_err().message;
            assert!(message.contains(&format!("`{field}`")), "{toml}: {message}");
        }
    }

    #[test]
    fn what_is_served_elsewhere_is_served_as_that_place_says() {
        for (field, toml) in [
            ("max_model_len", "max_model_len = 4096"),
            ("device", "device = \"cpu\""),
            ("gpu_memory_utilization", "gpu_memory_utilization = 0.5"),
        ] {
            let toml = format!(
                "[model]\nname = \"m\"\n{toml}\n[model.endpoint]\nbase_url = \"http://a/v1\""
            );
            let found = settings(&Up::default(), &toml, &[]).unwrap();
            let message = found.devices.check_is_elsewhere().unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{message}");
        }
        let trains = Asked {
            train_device: Some(Device::Cpu),
            ..Asked::default()
        };
        assert!(trains.check_is_elsewhere().is_ok());
    }

    #[test]
    fn a_chat_asks_the_model_that_is_served_unless_an_endpoint_is_named() {
        let chat = |model: Option<&str>, toml: &str| {
            let rollouts = RolloutArgs {
                model: model.map(str::to_owned),
                served: Some(ServedModel {
                    name: "of-up".to_owned(),
                    base_url: "http://127.0.0.1:1/v1".to_owned(),
                    api_key: "k3y".to_owned(),
                }),
                ..RolloutArgs::default()
            };
            let args = Up {
                rollouts,
                ..Up::default()
            };
            let found = settings(&args, toml, &[]).unwrap();
            let endpoint = found.served_elsewhere().unwrap().clone();
            (endpoint.base_url, found.model, endpoint.api_key.is_some())
        };
        let is = |url: &str, model: &str, is_keyed| (url.to_owned(), model.to_owned(), is_keyed);
        let here = "http://127.0.0.1:1/v1";
        assert_eq!(chat(None, ""), is(here, "of-up", true));
        assert_eq!(chat(Some("shop@v1"), ""), is(here, "shop@v1", true));
        // The file of an `up` that was told another model by an option.
        let file = "[model]\nname = \"m\"\nmax_model_len = 4096";
        assert_eq!(chat(None, file), is(here, "of-up", true));
        let named = "[model]\nname = \"m\"\n[model.endpoint]\nbase_url = \"http://a/v1\"";
        assert_eq!(chat(None, named), is("http://a/v1", "m", false));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let problem = settings(&Up::default(), "", &[]).unwrap_err();
        assert_eq!(problem.exit, Exit::Refused);
        assert!(problem.fix.unwrap().contains("--model-url"));
        let here = settings(&Up::default(), "[model]\nname = \"m\"", &[]).unwrap();
        assert_eq!(here.served_elsewhere().unwrap_err().exit, Exit::Refused);
        let rollouts = RolloutArgs {
            model_url: Some("http://b/v1".to_owned()),
            model: Some("m".to_owned()),
            ..RolloutArgs::default()
        };
        let args = Up {
            rollouts: rollouts.clone(),
            ..Up::default()
        };
        for (toml, part) in [
            ("slot = 3", "slot"),
            ("slots = 0", "`slots`"),
            ("[model.endpoint]\nbase_ur = \"x\"", "base_ur"),
        ] {
            let message = settings(&args, toml, &[]).unwrap_err().message;
            assert!(message.contains(part), "{toml}: {message}");
        }
        let keyed = Up {
            rollouts: RolloutArgs {
                api_key_env: Some("NO_SUCH".to_owned()),
                ..rollouts
            },
            ..Up::default()
        };
        assert!(
            settings(&keyed, "", &[])
                .unwrap_err()
                .message
                .contains("NO_SUCH")
        );
        // Variables of others are none of ours, nor is the one that names the file.
        for variable in [
            "ESPALIER_TEST_MARK_ab",
            "ESPALIER_COORDINATOR_TLS",
            "ESPALIER_UP_CONFIG",
        ] {
            assert!(
                settings(&args, "", &[(variable, "1")]).is_ok(),
                "{variable}"
            );
        }
    }
}
