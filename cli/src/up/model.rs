//! The model server of `espalier up`, for whoever names a model and no endpoint: an inference worker in the same process,
//! on a loopback port and under a key of its own.

use std::net::Ipv4Addr;

use espalier_core::id::ProjectId;
use espalier_infer_worker::config::Options;
use espalier_infer_worker::jobs::Answering;
use espalier_infer_worker::serve::{Followed, Which, Worker};
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_runtime::telemetry::error_chain;
use tokio::net::TcpListener;

use super::{Settings, fresh_token};
use crate::context::PROJECT_DEFAULT;
use crate::exit::Problem;
use crate::output::note;

/// A model that this process serves.
pub(super) struct Here {
    /// What answers jobs and is told to workers.
    pub(super) answering: Answering,
    /// What lets them in, which they know by the name of [`KEY_NAME`].
    pub(super) key: Secret,
}

/// The name of the key among the worker's own.
pub(super) const KEY_NAME: &str = "up";

/// Loads the model and serves it until `ends` drains, with the adapters that `store` has for it.
pub(super) async fn start(
    settings: &Settings,
    environment: &Environment,
    store: &Store,
    tasks: &Tasks,
    ends: &Shutdown,
) -> Result<Here, Problem> {
    note(format!(
        "loading {}; `--model-url` names an endpoint instead",
        settings.model
    ));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let key = Secret::new(fresh_token());
    let mut options = Options::of(&settings.model).map_err(Problem::refused)?;
    options.api_key = Some(key.clone());
    options.follow = vec![Followed {
        project: ProjectId::new(PROJECT_DEFAULT)?,
        which: Which::All,
    }];
    let worker = Worker::start(&options, environment, Some(store), ends).await;
    let worker = worker.map_err(|error| Problem::failed(error_chain(&error)))?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let answering = worker.answering(url, Some(KEY_NAME.to_owned()));
    tasks.spawn(
        "up.model",
        OnFailure::ShutDown,
        worker.serve(listener, ends.clone()),
    );
    Ok(Here { answering, key })
}
