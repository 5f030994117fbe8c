//! Adapters that are followed: the store is asked every few seconds which version of each counts and which one is newest,
//! and they are served as they come, without a restart.
//!
//! ```text
//! store ─look─► Seen ─► States ─► names ─► Adapters
//!                 orders │▲ Held
//!                        load: pull, verify, give to the engine
//! ```
//! Of an adapter `shop` the version that is latest answers to `shop`, with a canary beside it where the log says so, and to
//! `shop@vN`; so does the newest one, which can be evaluated before it becomes latest. A version that cannot be had or
//! loaded changes nothing: what was served is served on, the log and `/v1/adapters` say why, and it is tried again, less
//! and less often. What is gone from the store is served on too.
//!
//! One task runs all of it. Each option looks by itself and each version is loaded by itself, so that none waits for
//! another; but one at a time has its weights in memory (`Adapters`).

mod look;
mod option;
mod roles;
mod state;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::{AdaptersError, Watch, clear, pull_within};
use espalier_core::adapter::AdapterVersion;
use espalier_core::id::AdapterName;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{DeadlineExceeded, blocking, with_deadline};
use espalier_runtime::telemetry::error_chain;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};

use super::adapters::{Adapters, Held, Version};
use super::base::Base;
use crate::api::backend::{AdapterError, Following};
use look::{LookError, Seen, Watcher};
use roles::version_name;
use state::{Order, States};

pub use option::{Followed, Which};

/// How long fetching a version and loading it may take.
const LOAD_LIMIT: Duration = Duration::from_secs(1200);

/// Why a version was not loaded.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Adapters(#[from] AdaptersError),
    #[error(transparent)]
    Load(#[from] AdapterError),
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
}

/// What follows adapters.
pub(super) struct Follower {
    store: Store,
    base: Arc<Base>,
    /// Time from one look to the next.
    every: Duration,
    /// Where versions lie while they are read.
    scratch: PathBuf,
    load_limit: Duration,
    options: Vec<Followed>,
    told: Mutex<Vec<Following>>,
}

/// Something has ended.
enum Event {
    Looked(Watcher, Result<Vec<(AdapterName, Seen)>, LookError>),
    Loaded(Box<Order>, Result<Held, LoadError>),
}

impl Follower {
    /// Follows in `store` what `options` name, or what was trained on `base`.
    pub(super) fn new(
        store: Store,
        base: Arc<Base>,
        every: Duration,
        scratch: PathBuf,
        options: Vec<Followed>,
    ) -> Self {
        let told = States::new(&options, every).told();
        Self {
            store,
            base,
            every,
            scratch,
            load_limit: LOAD_LIMIT,
            options,
            told: Mutex::new(told),
        }
    }

    /// Follows until the process aborts.
    pub(super) async fn run(&self, adapters: &Adapters, shutdown: Shutdown) {
        let scratch = self.scratch.clone();
        // It says itself what it cannot remove; the folders take room and nothing else.
        let _ = blocking("infer.follow_clear", move || clear(&scratch)).await;
        let mut states = States::new(&self.options, self.every);
        let mut work: FuturesUnordered<BoxFuture<'_, Event>> = FuturesUnordered::new();
        for (place, of) in self.options.iter().enumerate() {
            let (store, base) = (self.store.clone(), Arc::clone(&self.base));
            let watcher = Watcher::new(of.clone(), place, store, base);
            work.push(look(watcher, Duration::ZERO).boxed());
        }
        loop {
            let event = tokio::select! {
                Some(event) = work.next() => event,
                () = shutdown.aborted() => return,
            };
            match event {
                Event::Looked(watcher, seen) => {
                    learn(&mut states, &watcher, seen);
                    work.push(look(watcher, self.every).boxed());
                }
                Event::Loaded(order, loaded) => {
                    let loaded = loaded.map_err(|error| error_chain(&error));
                    states.loaded(&order, loaded, Instant::now());
                }
            }
            for order in states.settle(adapters, Instant::now()) {
                work.push(self.load(adapters, order).boxed());
            }
            *self.told.lock().unwrap_or_else(PoisonError::into_inner) = states.told();
        }
    }

    /// What is followed, for `/v1/adapters`.
    pub(super) fn told(&self) -> Vec<Following> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.clone()
    }

    async fn load(&self, adapters: &Adapters, order: Order) -> Event {
        let held = self.held(adapters, &order);
        let loaded = Box::pin(with_deadline("infer.follow", self.load_limit, held)).await;
        Event::Loaded(Box::new(order), loaded.map_err(LoadError::from).flatten())
    }

    async fn held(&self, adapters: &Adapters, order: &Order) -> Result<Held, LoadError> {
        let record = &order.record;
        let AdapterVersion { name, n, .. } = record;
        let folder = pull_within(&self.store, record, &self.scratch, &Watch::default()).await?;
        let called = version_name(name, *n);
        let version = Version {
            path: format!("{}/{called}", order.project),
            called,
            number: *n,
        };
        // The folder goes when its numbers are in memory, or of no use.
        Ok(adapters.hold(version, folder.path().to_owned()).await?)
    }
}

/// Looks after a while.
async fn look(mut watcher: Watcher, wait: Duration) -> Event {
    tokio::time::sleep(wait).await;
    let seen = watcher.look().await;
    Event::Looked(watcher, seen)
}

fn learn(
    states: &mut States,
    watcher: &Watcher,
    seen: Result<Vec<(AdapterName, Seen)>, LookError>,
) {
    match seen {
        Ok(seen) => states.saw(&watcher.of, watcher.place, seen),
        Err(error) => states.saw_nothing(&watcher.of, watcher.place, &error_chain(&error)),
    }
}

/// Follows beside the serving.
pub(super) async fn run(
    follower: Arc<Follower>,
    served: Arc<super::backend::Served>,
    shutdown: Shutdown,
) {
    follower.run(&served.adapters, shutdown).await;
}
