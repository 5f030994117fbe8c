//! Looks at the server once a second: whether it is there, has room, is still the same, and what its time is.
//!
//! New work is refused by what was seen last, so that a submission learns at once that the server is away or full.
//! What is under way goes on: it asks the server itself, and asks again.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use espalier_core::queue::Event;
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::{error_chain, metrics};
use tokio::sync::broadcast;
use tokio::time::MissedTickBehavior;

use super::Shards;
use super::link::{Acknowledge, Link};
use super::server::{self, Server};
use crate::queue::{Condition, QueueError};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a look may take; a server that needs longer is as good as away.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// When to try again what was refused.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What was seen last.
#[derive(Debug)]
pub struct Health {
    condition: Mutex<Condition>,
    clock: Arc<ServerClock>,
    /// How often the server was restarted or replaced.
    restarts: AtomicU64,
}

impl Health {
    /// Of a server that has just answered. `clock` stands in for the server's in tests.
    pub fn new(clock: Option<Arc<dyn Clock>>) -> Self {
        Self {
            condition: Mutex::new(Condition::Serving),
            clock: Arc::new(ServerClock::new(clock)),
            restarts: AtomicU64::new(0),
        }
    }

    /// How often the server was restarted or replaced while it was looked at.
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Acquire)
    }

    /// The server's time.
    pub fn clock(&self) -> Arc<ServerClock> {
        Arc::clone(&self.clock)
    }

    /// How it was a moment ago.
    pub fn condition(&self) -> Condition {
        // No code that may panic runs under the lock.
        let seen = self
            .condition
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    /// Refuses new work where there is no room or nobody to take it.
    pub fn admit(&self) -> Result<(), QueueError> {
        match self.condition() {
            Condition::Serving => Ok(()),
            Condition::Full { reason } | Condition::Away { reason } => {
                Err(QueueError::Unavailable {
                    reason,
                    retry_after: RETRY_AFTER,
                })
            }
        }
    }

    /// Notes what was seen.
    pub fn note(&self, server: &Server) {
        self.set(match server.full() {
            Some(reason) => Condition::Full { reason },
            None => Condition::Serving,
        });
        if let Some((used, max)) = server.memory() {
            metrics()
                .queue_memory_used
                .record(used as f64 / max as f64, &[]);
        }
        if let Some(time) = server.time() {
            self.clock.set(time);
        }
    }

    fn set(&self, condition: Condition) {
        let mut seen = self
            .condition
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if std::mem::discriminant(&*seen) != std::mem::discriminant(&condition) {
            match &condition {
                Condition::Serving => tracing::info!("the queue serves again"),
                Condition::Full { reason } => tracing::error!(reason, "the queue is full"),
                Condition::Away { reason } => tracing::error!(reason, "the queue is away"),
            }
        }
        *seen = condition;
    }
}

/// Looks until the process ends.
pub async fn watch(
    link: Arc<Link>,
    acknowledge: Acknowledge,
    health: Arc<Health>,
    first: Server,
    shards: Shards,
    events: broadcast::Sender<Event>,
) {
    let mut identity = first.identity();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let looked = with_deadline("queue.look", LOOK_LIMIT, server::ask(&link, acknowledge));
        let reason = match looked.await {
            Ok(Ok(server)) => {
                let fit = is_fit(&server, &identity, acknowledge, &shards).await;
                if let Err(unfit) = fit {
                    unfit
                } else {
                    changed(&server, &mut identity, &health, &link, &events);
                    health.note(&server);
                    continue;
                }
            }
            Ok(Err(QueueError::Unavailable { reason, .. })) => reason,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("Redis did not answer within {} s", LOOK_LIMIT.as_secs()),
        };
        health.set(Condition::Away { reason });
    }
}

/// Whether a queue may lie on a server that has taken the place of another. It may come back empty, so that it is told
/// of layout, shards and shares again.
async fn is_fit(
    server: &Server,
    identity: &str,
    acknowledge: Acknowledge,
    shards: &Shards,
) -> Result<(), String> {
    if server.identity() == identity {
        return Ok(());
    }
    server
        .check(acknowledge)
        .map_err(|unfit| unfit.to_string())?;
    let joined = with_deadline("queue.join", LOOK_LIMIT, shards.join()).await;
    match joined {
        Ok(joined) => joined.map_err(|error| error_chain(&error)),
        Err(timeout) => Err(timeout.to_string()),
    }
}

/// Says that another server, or another history, has taken the place of the one before: what that one had not passed on
/// is lost. Whoever acts on events asks anew.
fn changed(
    server: &Server,
    identity: &mut String,
    health: &Health,
    link: &Link,
    events: &broadcast::Sender<Event>,
) {
    let present = server.identity();
    if present == *identity {
        return;
    }
    tracing::warn!(
        before = *identity,
        now = present,
        "Redis was restarted or replaced: acknowledged work may be lost, as far as `queue_acknowledge` allows it"
    );
    link.set_synced(server.syncs_each_write());
    *identity = present;
    link.begin_generation();
    health.restarts.fetch_add(1, Ordering::AcqRel);
    metrics().queue_failovers.add(1, &[]);
    // Nobody listens: nobody has missed anything.
    let _ = events.send(Event::Missed);
}

/// The server's clock as it is known here: the machine's own time and by how much the server's is ahead of it. Never goes
/// back, as time does not in the scripts.
pub struct ServerClock {
    base: Arc<dyn Clock>,
    /// Nobody else's clock is asked.
    fixed: bool,
    ahead_us: AtomicI64,
    newest_us: AtomicU64,
}

impl std::fmt::Debug for ServerClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerClock({})", self.now())
    }
}

impl ServerClock {
    fn new(clock: Option<Arc<dyn Clock>>) -> Self {
        Self {
            fixed: clock.is_some(),
            base: clock.unwrap_or_else(|| Arc::new(SystemClock)),
            ahead_us: AtomicI64::new(0),
            newest_us: AtomicU64::new(0),
        }
    }

    fn set(&self, server: Timestamp) {
        if !self.fixed {
            let ahead = i128::from(server.0) - i128::from(self.base.now().0);
            let ahead = i64::try_from(ahead).unwrap_or_default();
            self.ahead_us.store(ahead, Ordering::Relaxed);
        }
    }
}

impl Clock for ServerClock {
    fn now(&self) -> Timestamp {
        let ahead = self.ahead_us.load(Ordering::Relaxed);
        let now = self.base.now().0.saturating_add_signed(ahead);
        if self.fixed {
            return Timestamp(now);
        }
        Timestamp(self.newest_us.fetch_max(now, Ordering::Relaxed).max(now))
    }
}

#[cfg(test)]
mod tests;
