//! The running model: a thread that owns [scheduler](crate::scheduler) and [executor](crate::executor), and the handle
//! that everything asynchronous has of it.
//!
//! Only token ids go in and come out. The API in front knows text, this knows none.
//!
//! What is bounded, and how:
//!
//! - *Requests that wait* for their first step, or were set aside for a slow reader: [`EngineConfig::max_queue`] of
//!   each [`Priority`], so that a batch takes no place of an online request. One more is [`EngineError::Full`].
//! - *Events* of a request that nobody has read: [`EngineConfig::event_buffer`]. The thread never waits for a reader. A
//!   request whose buffer is nearly full is set aside: it gives up its place and its blocks, and goes on when half of
//!   the buffer has been read. One that is set aside for longer than [`EngineConfig::reader_patience`], or finds the
//!   queue full, is aborted.
//! - *Requests that nobody wants*: a receiver that was dropped aborts its request, within
//!   [`SWEEP_EVERY`] or with its next token.
//! - *Steps*: one that takes longer than [`EngineConfig::step_limit`] means that the executor failed.

mod adapters;
#[cfg(test)]
mod tests;
mod thread;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use espalier_runtime::tasks::{blocking, with_deadline};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

pub use crate::scheduler::{Adapter, Event, FinishReason, Priority, Prompt, Refused, Request};
pub use adapters::{AdapterError, AdapterPort};
pub use thread::SWEEP_EVERY;

use crate::executor::{AdapterSlot, Executor, Limits};
use crate::scheduler::{Config, ConfigError, Counters, Scheduler};

/// Room for commands that are not requests.
const OTHER_COMMANDS_MAX: usize = 64;

/// Tokens of prompts that are prepared by whoever brings them: tens of microseconds.
const PREPARED_HERE_MAX: usize = 4_096;

/// How long a stopped engine may take to say so, beyond the time that it was given.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What an engine keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// What its scheduler keeps to.
    pub scheduler: Config,
    /// Requests of one priority that wait, at most. At least 1.
    pub max_queue: usize,
    /// Events of a request that nobody has read, at most. At least 16.
    pub event_buffer: usize,
    /// How long a request may be set aside because its events are not read.
    pub reader_patience: Duration,
    /// How long a step may take.
    pub step_limit: Duration,
    /// How long an adapter waits for a place where versions that are still used have all.
    pub adapter_patience: Duration,
}

impl EngineConfig {
    /// With defaults for all but the scheduler.
    pub fn new(scheduler: Config) -> Self {
        Self {
            scheduler,
            max_queue: 1024,
            event_buffer: 256,
            reader_patience: Duration::from_secs(300),
            step_limit: Duration::from_secs(120),
            adapter_patience: Duration::from_secs(120),
        }
    }
}

/// An engine that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The executor cannot keep the configuration.
    #[error("the engine cannot be set up so")]
    Config(#[from] ConfigError),
    /// A bound is too low.
    #[error("`{field}` must be at least {least}, got {value}")]
    TooLow {
        /// Of what.
        field: &'static str,
        /// What was asked for.
        value: usize,
        /// What would do.
        least: usize,
    },
    /// No thread.
    #[error("the engine's thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// As many requests wait as may. Later there may be room (429).
    #[error("the queue is full: {max_queue} requests wait")]
    Full {
        /// How many may wait.
        max_queue: usize,
    },
    /// The prompt leaves no room for an answer (413).
    #[error(
        "the prompt has {prompt_tokens} tokens, and with an answer of at least one it must not exceed the model's length of {max_model_len}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of prompt and answer that fit.
        max_model_len: usize,
    },
    /// It can never be served (400).
    #[error(transparent)]
    Invalid(Refused),
    /// The engine stops, has stopped or has failed (503).
    #[error("the engine takes no requests: {0}")]
    Stopped(Health),
}

impl From<Refused> for EngineError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::TooLong {
                prompt_tokens,
                max_model_len,
            } => Self::TooLong {
                prompt_tokens,
                max_model_len,
            },
            other => Self::Invalid(other),
        }
    }
}

/// How an engine does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    Running,
    /// It finishes those that it has.
    Draining,
    /// It ended in good order.
    Stopped,
    /// The executor failed, and so did all requests. Only a new process helps.
    Failed(Arc<str>),
}

impl std::fmt::Display for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("it runs"),
            Self::Draining => f.write_str("it is stopping"),
            Self::Stopped => f.write_str("it has stopped"),
            Self::Failed(reason) => write!(f, "it failed: {reason}"),
        }
    }
}

/// What an engine has done and has to do. Totals only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Requests that wait for their first step, or for their reader.
    pub queued: usize,
    /// Requests that have not ended.
    pub requests: usize,
    /// Requests that ended by a stop id, in total.
    pub stopped: u64,
    /// Requests that ended by their length, in total.
    pub at_length: u64,
    /// Requests that nobody wanted any more, in total.
    pub aborted: u64,
    /// Requests that ended by an error, in total.
    pub failed: u64,
    /// Requests that were set aside for a slow reader, in total.
    pub set_aside: u64,
    /// What the scheduler counts.
    pub scheduler: Counters,
}

/// One request of a submission.
struct Submitted {
    request: Request,
    events: mpsc::Sender<Event>,
    queued: OwnedSemaphorePermit,
}

enum Command {
    Submit(Vec<Submitted>),
    /// There is something to see in [`Shared`].
    Wake,
}

/// What handles and the thread share.
struct Shared {
    config: EngineConfig,
    limits: Limits,
    queues: Queues,
    health: watch::Sender<Health>,
    snapshot: Mutex<Snapshot>,
    /// When the thread ends though requests are left. Set: it drains.
    stop_at: Mutex<Option<Instant>>,
    /// Adapters that nobody holds any more.
    dropped_adapters: Mutex<Vec<AdapterSlot>>,
    refused: AtomicU64,
}

/// Places of requests that wait.
struct Queues {
    online: Arc<Semaphore>,
    batch: Arc<Semaphore>,
}

impl Queues {
    fn new(places: usize) -> Self {
        Self {
            online: Arc::new(Semaphore::new(places)),
            batch: Arc::new(Semaphore::new(places)),
        }
    }

    fn of(&self, priority: Priority) -> Arc<Semaphore> {
        Arc::clone(match priority {
            Priority::Online => &self.online,
            Priority::Batch => &self.batch,
        })
    }
}

/// No code that may panic runs under these locks, and what they hold is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The handle of a running engine. Clones share it; when the last one goes, the engine aborts what it has and ends.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
}

impl Engine {
    /// Starts the thread. The port loads adapters.
    ///
    /// # Errors
    /// The configuration cannot be kept, or there is no thread.
    pub fn start<E>(
        executor: E,
        config: EngineConfig,
    ) -> Result<(Self, AdapterPort<E::Adapter>), StartError>
    where
        E: Executor + 'static,
    {
        let least = [
            ("max_queue", config.max_queue, 1),
            ("event_buffer", config.event_buffer, 16),
        ];
        for (field, value, least) in least {
            if value < least {
                return Err(StartError::TooLow {
                    field,
                    value,
                    least,
                });
            }
        }
        let limits = executor.limits();
        let scheduler = Scheduler::new(config.scheduler, limits)?;
        let (commands, received) = sync_channel(2 * config.max_queue + OTHER_COMMANDS_MAX);
        let shared = Arc::new(Shared {
            config,
            limits,
            queues: Queues::new(config.max_queue),
            health: watch::Sender::new(Health::Running),
            snapshot: Mutex::default(),
            stop_at: Mutex::default(),
            dropped_adapters: Mutex::default(),
            refused: AtomicU64::new(0),
        });
        let engine = Self {
            shared: Arc::clone(&shared),
            commands,
        };
        let (port, loads) = AdapterPort::new(engine.clone());
        std::thread::Builder::new()
            .name("espalier-engine".to_owned())
            .spawn(move || thread::run(executor, scheduler, shared, received, loads))
            .map_err(StartError::Thread)?;
        Ok((engine, port))
    }

    /// Asks for an answer. Its events come until [`Event::Finished`]; a receiver that ends without is one whose engine
    /// died. Dropping the receiver aborts the request.
    ///
    /// # Errors
    /// Why it was not taken. Nothing has happened then.
    pub async fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, EngineError> {
        let mut events = self.submit_all(vec![request]).await?;
        // One request, one receiver.
        events.pop().ok_or_else(|| self.stopped())
    }

    /// Asks for several answers, of which all are taken or none: those to one prompt compute it once.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    pub async fn submit_all(
        &self,
        requests: Vec<Request>,
    ) -> Result<Vec<mpsc::Receiver<Event>>, EngineError> {
        if self.health() != Health::Running {
            return Err(self.stopped());
        }
        let shared = &self.shared;
        for request in &requests {
            shared
                .config
                .scheduler
                .admits(request, shared.limits.vocab)?;
        }
        let count = requests.len().try_into().unwrap_or(u32::MAX);
        // Those of one submission are answers to one client.
        let priority = requests
            .first()
            .map_or_else(Priority::default, |one| one.priority);
        let queue = shared.queues.of(priority);
        let Ok(mut permits) = queue.try_acquire_many_owned(count) else {
            return Err(self.full());
        };
        let requests = self.prepared(requests).await?;
        let (mut submitted, mut receivers) = (Vec::new(), Vec::new());
        for request in requests {
            let (events, receiver) = mpsc::channel(shared.config.event_buffer);
            let Some(queued) = permits.split(1) else {
                return Err(self.full());
            };
            submitted.push(Submitted {
                request,
                events,
                queued,
            });
            receivers.push(receiver);
        }
        match self.commands.try_send(Command::Submit(submitted)) {
            Ok(()) => Ok(receivers),
            Err(TrySendError::Full(_)) => Err(self.full()),
            Err(TrySendError::Disconnected(_)) => Err(self.stopped()),
        }
    }

    /// Makes what is made once for all answers to a prompt, off the engine's thread, and off the caller's too where it
    /// takes longer than to wake another one.
    async fn prepared(&self, requests: Vec<Request>) -> Result<Vec<Request>, EngineError> {
        let version = self.shared.config.scheduler.weight_version;
        let tokens: usize = requests.iter().map(|one| one.prompt.ids().len()).sum();
        let prepare = move || {
            requests.iter().for_each(|request| request.prepare(version));
            requests
        };
        if tokens <= PREPARED_HERE_MAX {
            return Ok(prepare());
        }
        let prepared = blocking("infer.prepare_prompts", prepare).await;
        prepared.map_err(|_| self.stopped())
    }

    /// How it does.
    pub fn health(&self) -> Health {
        self.shared.health.borrow().clone()
    }

    /// Sees every change of [`health`](Self::health).
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.shared.health.subscribe()
    }

    /// What it has done and has to do, as of the last step.
    pub fn snapshot(&self) -> Snapshot {
        let queues = &self.shared.queues;
        let waiting = |queue: &Semaphore| self.shared.config.max_queue - queue.available_permits();
        Snapshot {
            queued: waiting(&queues.online) + waiting(&queues.batch),
            ..*lock(&self.shared.snapshot)
        }
    }

    /// Requests that were not taken because the queue was full, in total.
    pub fn refused_full(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Takes no more requests and finishes those that it has; those that are left after `within` are aborted. Gives the
    /// state that it ended in.
    pub async fn stop(&self, within: Duration) -> Health {
        // A later call can shorten the time, never lengthen it.
        let at = Instant::now() + within;
        {
            let mut stop_at = lock(&self.shared.stop_at);
            *stop_at = Some(stop_at.map_or(at, |earlier| earlier.min(at)));
        }
        self.shared.health.send_if_modified(|health| {
            let runs = *health == Health::Running;
            if runs {
                *health = Health::Draining;
            }
            runs
        });
        self.wake();
        let mut health = self.watch_health();
        let ended = |health: &Health| matches!(health, Health::Stopped | Health::Failed(_));
        let wait = health.wait_for(ended);
        match with_deadline("infer.engine_stop", within + STOP_GRACE, wait).await {
            Ok(Ok(ended)) => ended.clone(),
            _ => self.health(),
        }
    }

    /// A full channel is no harm: the thread is awake then.
    fn wake(&self) {
        let _ = self.commands.try_send(Command::Wake);
    }

    fn full(&self) -> EngineError {
        self.shared.refused.fetch_add(1, Ordering::Relaxed);
        EngineError::Full {
            max_queue: self.shared.config.max_queue,
        }
    }

    fn stopped(&self) -> EngineError {
        EngineError::Stopped(self.health())
    }
}
