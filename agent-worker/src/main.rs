//! The process `espalier-agent-worker`: its configuration, and what it makes of [`espalier_agent_worker::run`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use espalier_agent_worker::config::ENV_PREFIX;
use espalier_agent_worker::{AgentWorkerConfig, Deps};
use espalier_runtime::config::{self, Environment};
use espalier_runtime::net::Addresses;
use espalier_runtime::process::{self, Told};
use espalier_runtime::shutdown::Shutdown;

/// Beyond the grace of rollouts: last results are acknowledged, servers end.
const DRAIN_MARGIN: Duration = Duration::from_secs(40);

const KEYS: &str = "\
Keys of the configuration (each also as a variable: `model_name` is ESPALIER_AGENT_WORKER_MODEL_NAME, and
`model.base_url` is ESPALIER_AGENT_WORKER_MODEL__BASE_URL):
  coordinator_url    addresses of the coordinators, a list or with commas between them [http://127.0.0.1:7411]
  token              token with role `worker`: text, { file = \"…\" } or { env = \"…\" }
  tls.ca, …          authorities, for https://
  data_dir           folder of this process alone
  store_url          the coordinator's object store, such as file:///var/lib/espalier/store
  model.base_url     OpenAI-compatible endpoint, up to /v1; also model.api_key, time-outs and retries
                     [the endpoints that the coordinator names]
  model_keys         keys of the endpoints that the coordinator names, by the names that it uses
  model_name         the model, for jobs that name none; model_extra: more fields of each request
  mcp_config         file with mcpServers; mcp_servers: the same entries here, by name
  allow_inline_mcp   whether jobs may bring commands of their own [false]
  playwright_dir     folder that holds node_modules/@playwright/mcp
  slots              rollouts at once [8]; cpu_slots: data sets, comparisons and exports, of each at
                     once, 0 for none [1]
  hub                endpoint, token and ca for exports to the Hugging Face hub [as HF_TOKEN, … say]
  allow_base_folders whether exports may read base models, and data sets tokenizers, from folders of this machine [false]
  tags               what the worker offers beyond its MCP servers
  http_hook_hosts    hosts whose hooks verifiers may ask
  grace_s            time for running rollouts when the process drains [30]
  health_listen      address where /health and /ready are served over plain HTTP, such as 127.0.0.1:7414 [nowhere]
  telemetry          otlp_endpoint, log_format, log_filter, resource, metric_interval_s";

/// Runs rollouts, and makes data sets, comparisons and exports beside them.
#[derive(Parser)]
#[command(name = "espalier-agent-worker", version, after_help = KEYS)]
struct Arguments {
    /// The configuration, in TOML; every key can be set as ESPALIER_AGENT_WORKER_… too.
    #[arg(long, env = "ESPALIER_AGENT_WORKER_CONFIG")]
    config: Option<PathBuf>,
    /// Addresses of the coordinators, with commas between them, in place of `coordinator_url`.
    #[arg(long, value_name = "URL,…", value_parser = Addresses::parse)]
    coordinator: Option<Addresses>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    process::run("espalier-agent-worker", || load(&arguments), serve)
}

fn load(arguments: &Arguments) -> anyhow::Result<Told<(AgentWorkerConfig, Environment)>> {
    let environment = config::environment()?;
    let mut config: AgentWorkerConfig =
        config::load(arguments.config.as_deref(), ENV_PREFIX, &environment)?;
    config.telemetry = config.telemetry.or_from(&environment);
    if let Some(coordinators) = &arguments.coordinator {
        config.coordinator_url = coordinators.clone();
    }
    config.validate()?;
    config.mcp(&environment)?;
    Ok(Told {
        telemetry: config.telemetry.clone(),
        drain_limit: config.grace() + DRAIN_MARGIN,
        config: (config, environment),
    })
}

async fn serve(
    (config, environment): (AgentWorkerConfig, Environment),
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let deps = Deps::open(&config, environment).await?;
    espalier_agent_worker::run(config, deps, shutdown).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_key() {
        let environment = Environment::from([(format!("{ENV_PREFIX}NO_SUCH"), "1".to_owned())]);
        let refused =
            config::load::<AgentWorkerConfig>(None, ENV_PREFIX, &environment).unwrap_err();
        let refused = refused.to_string();
        let (_, known) = refused.split_once("expected one of").unwrap();
        let (known, _) = known.split_once(", got").unwrap();
        let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
        assert!(known.len() > 10, "{refused}");
        let named = |key: &&str| {
            let mut words = KEYS.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            words.any(|word| word == *key)
        };
        let missing: Vec<_> = known.into_iter().filter(|key| !named(key)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
