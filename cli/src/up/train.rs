//! The train worker of `espalier up`: a training takes the processor for as long as it runs, so that it is one at a time,
//! and rollouts go on beside it.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::config::Secret;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::net::Addresses;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::telemetry::error_chain;
use espalier_train_worker::trainer::EngineLoader;
use espalier_train_worker::{Permissions, Source};

use super::{Ending, Parts};
use crate::exit::Problem;

/// Takes `train` jobs until `shutdown` drains. Whoever may submit here is the user of this machine, whose folders jobs
/// may name.
pub(super) fn worker(
    parts: &Parts<'_>,
    grace: Duration,
    loader: EngineLoader,
    shutdown: Shutdown,
) -> Result<Ending, Problem> {
    let source = Source {
        coordinators: Addresses::parse(&parts.up.url)
            .map_err(|error| Problem::failed(error_chain(&error)))?,
        tls: None,
        token: Some(Secret::new(parts.tokens.worker.as_str())),
        store: parts.store.clone(),
    };
    let permissions = Permissions {
        allow_local_models: true,
        grace,
        once: None,
        health_listen: None,
    };
    let fetcher = Fetcher::new(parts.environment, None);
    Ok(Box::pin(async move {
        let loader = Arc::new(loader);
        let ran = espalier_train_worker::run(source, permissions, fetcher, loader, shutdown).await;
        ran.map_err(|error| Problem::failed(error_chain(&error)))
    }))
}
