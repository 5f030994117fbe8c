//! As many workers as the jobs need: it asks providers for instances when jobs wait, and ends those that have none to do.
//!
//! ```text
//! demand (queue) ┐
//! instances (provider) ├─► plan (pure) ─► create · drain · delete ─► provider
//! workers (peers) ┘            ▲ memory: since when idle or away, failures
//! ```
//! `plan` decides and `work` performs, one task a provider. Of the coordinators of a queue that may ask a provider, the first one
//! present does. A change of who does harms nothing: instances are named by their slots, and a provider lists those of
//! earlier coordinators too. In a cluster KEDA makes workers, and `keda` tells it how many jobs there are.

pub mod config;
mod demand;
mod keda;
mod ledger;
mod local;
mod memory;
mod plan;
pub mod provider;
pub mod runpod;
mod tell;
mod work;

use std::sync::Arc;

use espalier_runtime::config::environment;
use espalier_runtime::net::NetError;
use espalier_runtime::tasks::OnFailure;

use crate::api::Shared;

pub use config::ScalerConfig;
pub use plan::{Budget, Pool};
pub use provider::{Instance, InstanceState, Provider, ProviderError};

use runpod::{ApiError, Runpod, RunpodPool};

/// A provider, and what is asked of it.
#[derive(Debug)]
pub struct Source {
    /// Its key in the configuration; also the name under which coordinators show that they may ask it.
    pub key: &'static str,
    /// The name of the task.
    pub task: &'static str,
    /// What names of its instances begin with.
    pub prefix: String,
    /// What there is to be of it.
    pub pools: Vec<Pool>,
    /// What all of it may cost.
    pub budget: Budget,
    /// Its instances are of one coordinator, and of no use to another.
    pub is_own: bool,
    /// Who makes them.
    pub provider: Arc<dyn Provider>,
}

/// Keys of the providers that a configuration has.
pub fn keys(config: &ScalerConfig) -> Vec<&'static str> {
    let local = config.local.is_some().then_some(LOCAL);
    let runpod = config.runpod.is_some().then_some(RUNPOD);
    local.into_iter().chain(runpod).collect()
}

const LOCAL: &str = "local";
const RUNPOD: &str = "runpod";

/// The providers of the coordinator.
fn sources(shared: &Shared, config: &ScalerConfig) -> Result<Vec<Source>, StartError> {
    let mut sources = Vec::new();
    if let Some(local) = &config.local {
        // What is no text was refused when the process began.
        let environment = environment().unwrap_or_default();
        let (data_dir, clock) = (&shared.config.data_dir, Arc::clone(&shared.clock));
        sources.push(Source {
            key: LOCAL,
            task: "scaler.local",
            prefix: LOCAL.to_owned(),
            pools: local.pools.iter().map(config::LocalPool::pool).collect(),
            budget: Budget::default(),
            is_own: true,
            provider: Arc::new(local::Local::new(local, data_dir, environment, clock)),
        });
    }
    if let Some(runpod) = &config.runpod {
        sources.push(Source {
            key: RUNPOD,
            task: "scaler.runpod",
            prefix: runpod.name.clone(),
            pools: runpod.pools.iter().map(RunpodPool::pool).collect(),
            budget: Budget {
                per_hour: Some(runpod.max_per_hour),
                per_day: Some(runpod.max_per_day),
            },
            is_own: false,
            provider: Arc::new(Runpod::new(runpod.clone())?),
        });
    }
    Ok(sources)
}

/// Why scaling cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KEDA cannot be answered.
    #[error("KEDA cannot be answered at `scaler.keda.listen`, which is {listen}")]
    Keda {
        /// The address.
        listen: std::net::SocketAddr,
        /// Why.
        source: NetError,
    },
    /// RunPod cannot be asked.
    #[error("RunPod cannot be asked for pods")]
    Runpod(#[from] ApiError),
}

/// Starts what the configuration asks for. It ends when the coordinator drains.
///
/// # Errors
/// KEDA's port cannot be served, or requests to a provider cannot be made.
pub async fn start(shared: &Arc<Shared>) -> Result<(), StartError> {
    let Some(config) = &shared.config.scaler else {
        return Ok(());
    };
    if let Some(keda) = &config.keda {
        let started = keda::start(shared, keda).await;
        started.map_err(|source| StartError::Keda {
            listen: keda.listen,
            source,
        })?;
    }
    for source in sources(shared, config)? {
        let (task, interval) = (source.task, config.interval());
        let work = work::Work::new(Arc::clone(shared), source, interval);
        shared.tasks.spawn(task, OnFailure::ShutDown, work.run());
    }
    Ok(())
}
