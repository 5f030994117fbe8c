//! The process `espalier-infer-worker`: options, telemetry and signals around [`espalier_infer_worker::serve::run`].

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use espalier_infer_worker::config::Options;
use espalier_infer_worker::serve;
use espalier_runtime::config::{self, Environment};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::{tasks, telemetry};
use tokio::net::TcpListener;

/// Options that cannot be used, as `sysexits.h` numbers it.
const EXIT_USAGE: u8 = 64;
/// How long telemetry may take to leave at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// Beyond the time for answers: the engine and the tasks end.
const DRAIN_MARGIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let options = Options::parse();
    let environment = match load(&options) {
        Ok(environment) => environment,
        Err(error) => {
            eprintln!("espalier-infer-worker: {error:#}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let served = tasks::block_on(Box::pin(serve(options, environment)));
    match served.map_err(anyhow::Error::from).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("espalier-infer-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(options: &Options) -> anyhow::Result<Environment> {
    options.check().map_err(anyhow::Error::msg)?;
    Ok(config::environment()?)
}

async fn serve(options: Options, environment: Environment) -> anyhow::Result<()> {
    let telemetry = telemetry::init(&options.telemetry(&environment), "espalier-infer-worker")?;
    let served = serve_until_signal(options, environment).await;
    telemetry.shutdown(FLUSH_LIMIT).await;
    served
}

async fn serve_until_signal(options: Options, environment: Environment) -> anyhow::Result<()> {
    let shutdown = Shutdown::from_signals(options.drain_limit() + DRAIN_MARGIN)
        .context("signals cannot be listened to")?;
    let address = (options.host, options.port);
    // Before the model, which takes long: a port that is taken is said at once.
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", address.0, address.1))?;
    serve::run(&options, &environment, listener, shutdown).await?;
    Ok(())
}
