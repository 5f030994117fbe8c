//! The process `espalier-train-worker`: its options, and what they make of [`espalier_train_worker::run`].

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use espalier_runtime::config::{self, ConfigError, Environment};
use espalier_runtime::process::{self, Told};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks;
use espalier_train_worker::config::Options;

/// Beyond the time for a checkpoint: results are acknowledged and tasks end.
const DRAIN_MARGIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let options = Options::parse();
    process::run("espalier-train-worker", || load(options), serve)
}

fn load(options: Options) -> Result<Told<(Options, Environment)>, ConfigError> {
    let environment = config::environment()?;
    Ok(Told {
        telemetry: options.telemetry(&environment),
        drain_limit: options.grace() + DRAIN_MARGIN,
        config: (options, environment),
    })
}

async fn serve(
    (options, environment): (Options, Environment),
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let source = options.source(&environment).await?;
    let fetcher = options.fetcher(&environment);
    let opening = options.clone();
    let loader = tasks::blocking("train.device", move || opening.loader()).await??;
    let loader = Arc::new(loader);
    espalier_train_worker::run(source, options.permissions(), fetcher, loader, shutdown).await?;
    Ok(())
}
