//! The process `espalier-infer-worker`: its options, and what they make of [`espalier_infer_worker::serve::run`].

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use espalier_infer_worker::config::Options;
use espalier_infer_worker::serve;
use espalier_runtime::config::{self, Environment};
use espalier_runtime::process::{self, Told};
use espalier_runtime::shutdown::Shutdown;
use tokio::net::TcpListener;

/// Beyond the time for answers: the engine and the tasks end.
const DRAIN_MARGIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let options = Options::parse();
    process::run("espalier-infer-worker", || load(options), serve)
}

fn load(mut options: Options) -> anyhow::Result<Told<(Options, Environment)>> {
    let environment = config::environment()?;
    options.expand(&environment).map_err(anyhow::Error::msg)?;
    options.check().map_err(anyhow::Error::msg)?;
    Ok(Told {
        telemetry: options.telemetry(&environment),
        drain_limit: options.drain_limit() + DRAIN_MARGIN,
        config: (options, environment),
    })
}

async fn serve(
    (options, environment): (Options, Environment),
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let address = (options.host, options.port);
    // Before the model, which takes long: a port that is taken is said at once.
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", address.0, address.1))?;
    serve::run(&options, &environment, listener, shutdown).await?;
    Ok(())
}
