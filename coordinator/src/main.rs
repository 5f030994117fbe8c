//! The process `espalier-coordinator`: its configuration, and what it makes of [`espalier_coordinator::run`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use espalier_coordinator::config::ENV_PREFIX;
use espalier_coordinator::health::Place;
use espalier_coordinator::{CoordinatorConfig, Deps, health};
use espalier_runtime::config::{self, Environment};
use espalier_runtime::net::OwnTls;
use espalier_runtime::process::{self, Told};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{self, Tasks};
use espalier_runtime::telemetry::error_chain;
use tokio::net::TcpListener;

/// Time for the drain itself to end in order before the process lets go of everything.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

const KEYS: &str = "\
Keys of the configuration (each also as a variable: `lease_ttl_ms` is ESPALIER_COORDINATOR_LEASE_TTL_MS):
  listen             address [127.0.0.1:7411]; without TLS, loopback is advised
  tls                cert and client_ca: PEM files; key: { file = \"…\" }
  queue              `embedded` or the address of a Redis: text, { file = \"…\" } or { env = \"…\" } [embedded]:
                     redis://[user:password@]host:port[/db], redis+sentinel://host:port,host:port/primary,
                     redis+cluster://host:port,host:port; rediss in place of redis for TLS
  queue_name         tells queues on one Redis apart [espalier]
  queue_shards       parts of the queue, more than 1 for a Redis Cluster only; fixed at its first use [1]
  queue_acknowledge  what a write to Redis has reached when it counts: fast, replicated (a replica) or durable (disk)
  queue_journal      whether batches are kept in the object store too, and given again to a Redis that lost them [true]
  data_dir           folder of the embedded queue; not needed with Redis
  store_url          object store, the same as the workers', such as file:///var/lib/espalier/store or s3://bucket/prefix
  tokens             a list of name, sha256, project (\"*\" for workers and operators) and roles (submit, read, worker,
                     admin);
                     printf %s \"$TOKEN\" | sha256sum
  projects.NAME      weight: share of the workers where several projects wait [100]
  mcp_servers        servers that jobs may name before a worker has announced them
  allow_inline_mcp   whether jobs may bring servers of their own [false]
  jobs_waiting_max   waiting jobs of a project, beyond which submissions are refused [1000000]
  open_batches_max   batches of a project that are open at once, beyond which no more are opened [1000]
  watches_max        batches that one token may watch at once [64]
  lease_ttl_ms       how long a lease lasts without renewal [what suits the kind of job]
  keep_days          days for which complete batches are kept in the queue [30]
  session_max_age_s  age at which a worker is asked to move to another stream [1800]
  model_endpoints    endpoints for workers that have none of their own: name, model, url, …
  worker_key_names   names of keys (`model_keys` of agent workers) that workers which serve models may ask for
  prices             dollars for metrics: models.NAME.input and .output of a million tokens, workers.KIND of an hour,
                     budget_per_day [none]
  drain_limit_s      how long a drain may take [10]
  scaler             interval_s; keda: listen; local: pools, a list of name, kinds, jobs_per_worker, min, max, idle_s, start_s,
                     grace_s, command, env and pass_env; runpod: name, api_key, url, max_per_hour, max_per_day and pools,
                     as docs/guides/runpod.md has them
  telemetry          otlp_endpoint, log_format, log_filter, resource, metric_interval_s";

/// Accepts, orders and leases jobs.
#[derive(Parser)]
#[command(name = "espalier-coordinator", version, after_help = KEYS)]
struct Arguments {
    /// The configuration, in TOML; every key can be set as ESPALIER_COORDINATOR_… too.
    #[arg(long, global = true, env = "ESPALIER_COORDINATOR_CONFIG")]
    config: Option<PathBuf>,
    /// `embedded`, or the address of a Redis. One with a password is better given as ESPALIER_COORDINATOR_QUEUE or in the
    /// configuration, where the list of processes does not show it.
    #[arg(long, value_name = "ADDRESS")]
    queue: Option<String>,
    /// The object store, such as s3://bucket/prefix.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Where it listens, such as 0.0.0.0:7411.
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Asks the coordinator of this configuration, on this machine, how it does: exit code 0, or 1 and why
    Health(Ask),
}

/// What `health` asks, and as whom.
#[derive(Args)]
struct Ask {
    /// What has to be served: `liveness`; `espalier.v1.WorkerService`, while the queue is there; or `espalier.v1.JobService`,
    /// while it has room too.
    #[arg(long, value_name = "NAME", default_value = "liveness")]
    service: String,
    /// PEM file of a certificate of `tls.client_ca`, where the configuration has one.
    #[arg(long, value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// The key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
}

impl Arguments {
    /// The environment, in which what the command line says takes the place of the variable of the same key.
    fn over(&self, mut environment: Environment) -> Environment {
        let options = [
            ("QUEUE", &self.queue),
            ("STORE_URL", &self.store),
            ("LISTEN", &self.listen),
        ];
        for (key, option) in options {
            if let Some(value) = option {
                environment.insert(format!("{ENV_PREFIX}{key}"), value.clone());
            }
        }
        environment
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.command {
        Some(Command::Health(ask)) => tell_health(&arguments, ask),
        None => process::run("espalier-coordinator", || load(&arguments), serve),
    }
}

/// Whoever probes reads the exit code, and people the line.
fn tell_health(arguments: &Arguments, ask: &Ask) -> ExitCode {
    match look(arguments, ask) {
        Ok(listen) => {
            println!("{} is served at {listen}", ask.service);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("espalier-coordinator health: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Where it is served.
fn look(arguments: &Arguments, ask: &Ask) -> anyhow::Result<SocketAddr> {
    let environment = arguments.over(config::environment()?);
    let place: Place = config::load(arguments.config.as_deref(), ENV_PREFIX, &environment)?;
    let identity = ask.client_cert.clone().zip(ask.client_key.clone());
    let tls = OwnTls { identity };
    tasks::block_on(health::ask(&place, &ask.service, &tls))??;
    Ok(place.listen)
}

fn load(arguments: &Arguments) -> anyhow::Result<Told<CoordinatorConfig>> {
    let environment = arguments.over(config::environment()?);
    let mut config: CoordinatorConfig =
        config::load(arguments.config.as_deref(), ENV_PREFIX, &environment)?;
    config.telemetry = config.telemetry.or_from(&environment);
    config.validate()?;
    Ok(Told {
        telemetry: config.telemetry.clone(),
        drain_limit: config.drain_limit() + DRAIN_MARGIN,
        config,
    })
}

async fn serve(config: CoordinatorConfig, shutdown: Shutdown) -> anyhow::Result<()> {
    // What keeps the queue connected: without it the process is of no use, so that its failure ends the process.
    let tasks = Tasks::new(shutdown.clone());
    // Boxed: together these states would make the future of `main` too deep for the compiler.
    let deps = Box::pin(Deps::open(&config, &tasks)).await?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    Box::pin(espalier_coordinator::run(config, listener, deps, shutdown)).await?;
    match tasks.first_failure() {
        Some(task) => anyhow::bail!("task `{task}` failed; the log has the details"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_key() {
        let environment = Environment::from([(format!("{ENV_PREFIX}NO_SUCH"), "1".to_owned())]);
        let refused =
            config::load::<CoordinatorConfig>(None, ENV_PREFIX, &environment).unwrap_err();
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
