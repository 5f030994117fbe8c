//! The process `espalier-train-worker`: options, telemetry and signals around [`espalier_train_worker::run`].

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use espalier_runtime::config::{self, Environment};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::{tasks, telemetry};
use espalier_train_worker::config::Options;

/// Configuration that cannot be used, as `sysexits.h` numbers it.
const EXIT_USAGE: u8 = 64;
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// Beyond the time for a checkpoint: results are acknowledged and tasks end.
const DRAIN_MARGIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let options = Options::parse();
    let environment = match config::environment() {
        Ok(environment) => environment,
        Err(error) => {
            eprintln!("espalier-train-worker: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let served = tasks::block_on(Box::pin(serve(options, environment)));
    match served.map_err(anyhow::Error::from).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("espalier-train-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: Options, environment: Environment) -> anyhow::Result<()> {
    let telemetry = telemetry::init(&options.telemetry(&environment), "espalier-train-worker")?;
    let served = serve_until_signal(options, environment).await;
    telemetry.shutdown(FLUSH_LIMIT).await;
    served
}

async fn serve_until_signal(options: Options, environment: Environment) -> anyhow::Result<()> {
    let shutdown = Shutdown::from_signals(options.grace() + DRAIN_MARGIN)
        .context("signals cannot be listened to")?;
    let source = options.source(&environment).await?;
    let fetcher = options.fetcher(&environment);
    let opening = options.clone();
    let loader = tasks::blocking("train.device", move || opening.loader()).await??;
    let loader = Arc::new(loader);
    espalier_train_worker::run(source, options.permissions(), fetcher, loader, shutdown).await?;
    Ok(())
}
