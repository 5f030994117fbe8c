//! How adapters get into a running engine, and out of it.
//!
//! A version of an adapter is loaded beside the others while steps run. Requests hold it, and so does whoever gives
//! names to adapters: a new version takes the name over at once, requests that run under the old one end under it, and
//! the executor forgets it when nobody holds it any more. Where old versions have all places, a new one waits for one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use espalier_runtime::tasks::with_deadline;
use tokio::sync::oneshot;

use super::{Adapter, Command, Engine, Health, lock};
use crate::blocks::AdapterDigest;
use crate::executor::{AdapterSlot, ExecutorError};

/// Adapters that wait to be loaded, at most: each holds its weights in memory.
const LOADS_MAX: usize = 16;

/// How long the engine's thread may take to load an adapter that has a place: it does between two steps.
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
    /// Since when it waits.
    pub since: Instant,
    /// Told of the slot when nobody holds the adapter any more.
    pub on_drop: Box<dyn Fn(AdapterSlot) + Send + Sync>,
    pub reply: oneshot::Sender<Result<Arc<Adapter>, ExecutorError>>,
}

/// Adapters to load, shared by the port and the thread.
pub(super) type Loads<A> = Arc<Mutex<VecDeque<Load<A>>>>;

/// Loads adapters into an engine. Clones share it.
pub struct AdapterPort<A> {
    engine: Engine,
    loads: Loads<A>,
    last_slot: Arc<AtomicU32>,
    /// Of adapters, which hold it weakly: they are no handles of the engine.
    waker: Arc<SyncSender<Command>>,
}

impl<A> Clone for AdapterPort<A> {
    fn clone(&self) -> Self {
        Self {
            engine: self.engine.clone(),
            loads: Arc::clone(&self.loads),
            last_slot: Arc::clone(&self.last_slot),
            waker: Arc::clone(&self.waker),
        }
    }
}

impl<A: Send + 'static> AdapterPort<A> {
    pub(super) fn new(engine: Engine) -> (Self, Loads<A>) {
        let loads = Loads::default();
        let port = Self {
            waker: Arc::new(engine.commands.clone()),
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
    /// It does not fit, no place came free in time, or the engine does not run. The engine goes on as before.
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
                since: Instant::now(),
                on_drop: self.on_drop(),
                reply,
            });
        }
        self.engine.wake();
        // An engine that ended clears the list after it said so: whatever came later is cleared here.
        if self.ended() {
            lock(&self.loads).clear();
        }
        let limit = self.engine.shared.config.adapter_patience + LOAD_LIMIT;
        match with_deadline("infer.adapter_load", limit, loaded).await {
            Ok(Ok(Ok(adapter))) => Ok(adapter),
            Ok(Ok(Err(error))) => Err(AdapterError::Refused(error)),
            _ => Err(stopped()),
        }
    }

    /// Tells the thread of an adapter that nobody holds any more, also when it sleeps: its place may be waited for.
    fn on_drop(&self) -> Box<dyn Fn(AdapterSlot) + Send + Sync> {
        let (shared, waker) = (Arc::clone(&self.engine.shared), Arc::downgrade(&self.waker));
        Box::new(move |slot| {
            lock(&shared.dropped_adapters).push(slot);
            if let Some(waker) = waker.upgrade() {
                // A full channel is no harm: the thread is awake then.
                let _ = waker.try_send(Command::Wake);
            }
        })
    }

    fn ended(&self) -> bool {
        matches!(self.engine.health(), Health::Stopped | Health::Failed(_))
    }
}
