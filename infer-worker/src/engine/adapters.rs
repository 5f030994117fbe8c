//! How adapters get into a running engine, and out of it.
//!
//! A version of an adapter is loaded beside the others while steps run. Requests hold it, and so does whoever gives
//! names to adapters: a new version takes the name over at once, requests that run under the old one end under it, and
//! the executor forgets it when nobody holds it any more.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_runtime::tasks::with_deadline;
use tokio::sync::oneshot;

use super::{Adapter, Engine, Health, lock};
use crate::blocks::AdapterDigest;
use crate::executor::{AdapterSlot, ExecutorError};

/// Adapters that wait to be loaded, at most: each holds its weights in memory.
const LOADS_MAX: usize = 16;

/// How long the engine's thread may take until it has loaded an adapter: it does between two steps.
const LOAD_LIMIT: Duration = Duration::from_secs(120);

/// An adapter that was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// It does not fit.
    #[error("the executor did not take the adapter")]
    Refused(#[source] ExecutorError),
    /// Too many are being loaded.
    #[error("{} adapters wait to be loaded", LOADS_MAX)]
    Busy,
    /// The engine does not run, or did not get to it in time.
    #[error("the engine does not load adapters: {0}")]
    Stopped(Health),
}

/// An adapter to load.
pub(super) struct Load<A> {
    pub slot: AdapterSlot,
    pub digest: AdapterDigest,
    pub weights: A,
    pub reply: oneshot::Sender<Result<Arc<Adapter>, ExecutorError>>,
}

/// Adapters to load, shared by the port and the thread.
pub(super) type Loads<A> = Arc<Mutex<VecDeque<Load<A>>>>;

/// Loads adapters into an engine. Clones share it.
pub struct AdapterPort<A> {
    engine: Engine,
    loads: Loads<A>,
    last_slot: Arc<AtomicU32>,
}

impl<A> Clone for AdapterPort<A> {
    fn clone(&self) -> Self {
        Self {
            engine: self.engine.clone(),
            loads: Arc::clone(&self.loads),
            last_slot: Arc::clone(&self.last_slot),
        }
    }
}

impl<A: Send + 'static> AdapterPort<A> {
    pub(super) fn new(engine: Engine) -> (Self, Loads<A>) {
        let loads = Loads::default();
        let port = Self {
            engine,
            loads: Arc::clone(&loads),
            last_slot: Arc::default(),
        };
        (port, loads)
    }

    /// Loads an adapter whose files have the digest `digest`. It is there until the last clone of the handle is dropped,
    /// those in requests included.
    ///
    /// # Errors
    /// It does not fit, or the engine does not run. The engine goes on as before.
    pub async fn load(
        &self,
        digest: AdapterDigest,
        weights: A,
    ) -> Result<Arc<Adapter>, AdapterError> {
        let stopped = || AdapterError::Stopped(self.engine.health());
        if self.ended() {
            return Err(stopped());
        }
        let (reply, loaded) = oneshot::channel();
        let slot = AdapterSlot(self.last_slot.fetch_add(1, Ordering::Relaxed) + 1);
        {
            let mut loads = lock(&self.loads);
            if loads.len() >= LOADS_MAX {
                return Err(AdapterError::Busy);
            }
            loads.push_back(Load {
                slot,
                digest,
                weights,
                reply,
            });
        }
        self.engine.wake();
        // An engine that ended clears the list after it said so: whatever came later is cleared here.
        if self.ended() {
            lock(&self.loads).clear();
        }
        match with_deadline("infer.adapter_load", LOAD_LIMIT, loaded).await {
            Ok(Ok(Ok(adapter))) => Ok(adapter),
            Ok(Ok(Err(error))) => Err(AdapterError::Refused(error)),
            _ => Err(stopped()),
        }
    }

    fn ended(&self) -> bool {
        matches!(self.engine.health(), Health::Stopped | Health::Failed(_))
    }
}
