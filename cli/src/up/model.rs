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

use super::devices::Devices;
use super::{Settings, fresh_token};
use crate::client::ServedModel;
use crate::context::PROJECT_DEFAULT;
use crate::exit::Problem;
use crate::output::note;

/// A model that this process serves.
pub(super) struct Here {
    /// What answers jobs and is told to workers.
    pub(super) answering: Answering,
    /// The name and the address, and what lets workers in, which they know by the name of [`KEY_NAME`].
    pub(super) served: ServedModel,
}

/// The name of the key among the worker's own.
pub(super) const KEY_NAME: &str = "up";

/// Loads the model and serves it until `ends` drains, with the adapters that `store` has for it. Where it does not fit beside
/// trainings on its GPU, and nobody asked for that, it has the GPU alone.
pub(super) async fn start(
    settings: &Settings,
    devices: &mut Devices,
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
    let key = fresh_token();
    let load = |devices: Devices| {
        let key = Secret::new(key.as_str());
        async move {
            let options = options(settings, devices, key)?;
            let worker = Worker::start(&options, environment, Some(store), ends).await;
            Ok::<_, Problem>(worker)
        }
    };
    let mut worker = load(*devices).await?;
    if let (Err(error), Some(alone)) = (&worker, devices.yielded())
        && error.is_of_gpu_memory()
    {
        note(format!(
            "the model does not fit into half of the memory of {}: it has that GPU alone, and trainings run on the CPU; \
             --max-model-len, --gpu-memory-utilization and --train-device divide it otherwise",
            devices.serve
        ));
        *devices = alone;
        worker = load(alone).await?;
    }
    let worker = worker.map_err(|error| Problem::failed(error_chain(&error)))?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let answering = worker.answering(url.clone(), Some(KEY_NAME.to_owned()));
    tasks.spawn(
        "up.model",
        OnFailure::ShutDown,
        worker.serve(listener, ends.clone()),
    );
    let served = ServedModel {
        name: settings.model.clone(),
        base_url: url,
        api_key: key,
    };
    Ok(Here { answering, served })
}

/// What the worker is told.
fn options(settings: &Settings, devices: Devices, key: Secret) -> Result<Options, Problem> {
    let mut options = Options::of(&settings.model).map_err(Problem::refused)?;
    options.api_key = Some(key);
    options.device = devices.serve;
    options.max_model_len = settings.devices.max_model_len;
    if let Some(share) = devices.memory_share {
        options.gpu_memory_utilization = share;
    }
    options.follow = vec![Followed {
        project: ProjectId::new(PROJECT_DEFAULT)?,
        which: Which::All,
    }];
    Ok(options)
}
