//! The model server of `espalier up`, for whoever names a model and no endpoint: an inference worker in the same process,
//! on a loopback port and under a key of its own.

use std::net::Ipv4Addr;

use espalier_infer_worker::config::Options;
use espalier_infer_worker::jobs::Answering;
use espalier_infer_worker::serve::Worker;
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::model::ModelEndpoint;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_runtime::telemetry::error_chain;
use tokio::net::TcpListener;

use super::{Settings, fresh_token};
use crate::exit::Problem;
use crate::output::note;

/// Loads the model and serves it until `ends` drains. Gives where, and what answers jobs.
pub(super) async fn start(
    settings: &Settings,
    environment: &Environment,
    tasks: &Tasks,
    ends: &Shutdown,
) -> Result<(ModelEndpoint, Answering), Problem> {
    note(format!(
        "loading {}; `--model-url` names an endpoint instead",
        settings.model
    ));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let key = Secret::new(fresh_token());
    let mut options = Options::of(&settings.model).map_err(Problem::refused)?;
    options.api_key = Some(key.clone());
    let worker = Worker::start(&options, environment, ends).await;
    let worker = worker.map_err(|error| Problem::failed(error_chain(&error)))?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let answering = worker.answering();
    tasks.spawn(
        "up.model",
        OnFailure::ShutDown,
        worker.serve(listener, ends.clone()),
    );
    let endpoint = ModelEndpoint {
        api_key: Some(key),
        ..ModelEndpoint::new(url)
    };
    Ok((endpoint, answering))
}
