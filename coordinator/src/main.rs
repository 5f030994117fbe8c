//! The process `espalier-coordinator`: configuration, telemetry and signals around [`espalier_coordinator::run`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use espalier_coordinator::{CoordinatorConfig, Deps};
use espalier_runtime::config::{self, ENV_PREFIX};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::telemetry;
use tokio::net::TcpListener;

/// A configuration that cannot be used, as `sysexits.h` numbers it.
const EXIT_USAGE: u8 = 64;
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// Time for the drain itself to end in order before the process lets go of everything.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

/// Accepts, orders and leases jobs.
#[derive(Parser)]
#[command(name = "espalier-coordinator", version)]
struct Arguments {
    /// The configuration, in TOML; every key can be set as ESPALIER_… too.
    #[arg(long, env = "ESPALIER_CONFIG")]
    config: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match load(&arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("espalier-coordinator: {error:#}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match serve(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("espalier-coordinator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(arguments: &Arguments) -> anyhow::Result<CoordinatorConfig> {
    let environment = config::environment()?;
    let mut config: CoordinatorConfig =
        config::load(arguments.config.as_deref(), ENV_PREFIX, &environment)?;
    config.telemetry = config.telemetry.or_from(&environment);
    config.validate()?;
    Ok(config)
}

async fn serve(config: CoordinatorConfig) -> anyhow::Result<()> {
    let telemetry = telemetry::init(&config.telemetry, "espalier-coordinator")?;
    let served = serve_until_signal(config).await;
    telemetry.shutdown(FLUSH_LIMIT).await;
    served
}

async fn serve_until_signal(config: CoordinatorConfig) -> anyhow::Result<()> {
    let shutdown = Shutdown::from_signals(config.drain_limit() + DRAIN_MARGIN)
        .context("signals cannot be listened to")?;
    let deps = Deps::open(&config).await?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    espalier_coordinator::run(config, listener, deps, shutdown).await?;
    Ok(())
}
