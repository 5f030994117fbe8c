//! The thread that owns the machine and the file, and the group commit.
//!
//! It takes what waits in its channel, applies it to the machine, commits the rows that changed, and only then lets
//! the answers go. While one commit is under way the next group gathers, so that no timer is needed: alone, a call
//! waits for one sync of the disk; together, many share one.
//!
//! When a commit fails (a full disk, a broken one), the machine is ahead of the file. Nobody has seen that: every
//! call of the group is answered with "unavailable" and what failed, the machine is thrown away and read back from the
//! file. For [`ADMISSION_PAUSE`] after that, calls that bring new work are refused at the door, so that the space which is
//! left serves those that finish work. A panic of the machine is handled in the same way.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_core::queue::{Event, Machine, MachineConfig};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::Clock;
use tokio::sync::{broadcast, mpsc};
use tracing::{error, info, warn};

use super::super::QueueError;
use super::EmbeddedConfig;
use super::store::{OpenDatabase, Payloads, Reader, Store, StoreError};

/// Most calls in one commit: above this, the first of them waits longer than the sharing saves.
const GROUP_CALLS_MAX: usize = 256;
/// Most bytes of payload in one commit: bounds what is held in memory and what a commit takes.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// How long new work is refused after a commit failed.
pub(super) const ADMISSION_PAUSE: Duration = Duration::from_secs(5);
/// How long all calls are refused after the file could not be opened.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// What a call may touch while it is applied.
pub(super) struct Turn<'a> {
    pub machine: &'a mut Machine,
    pub now: Timestamp,
    pub payloads: &'a mut Payloads,
}

/// Answers a call, once its group is on the disk or has failed.
pub(super) type Reply = Box<dyn FnOnce(Result<&Reader, QueueError>) + Send>;

/// Changes the machine, where there is one, and hands back what answers the caller.
pub(super) type Apply = Box<dyn FnOnce(Result<Turn<'_>, QueueError>) -> Reply + Send>;

/// One call.
pub(super) struct Call {
    /// It brings new work, which is refused while the file does not take any.
    pub admits: bool,
    /// Bytes of payload that it brings.
    pub bytes: usize,
    pub apply: Apply,
}

/// The machine and its file, when both are well.
struct Live {
    machine: Machine,
    store: Store,
}

/// The queue's time: the clock's, moved on by as much as the clock was found behind the newest time in the file, so that
/// time goes on from there. A queue whose time stood still would end no lease and no delay.
pub(super) struct QueueClock {
    clock: Arc<dyn Clock>,
    behind_us: AtomicU64,
}

impl QueueClock {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            behind_us: AtomicU64::new(0),
        }
    }

    /// Moves on so far that it is not behind `newest`; returns by how much.
    fn catch_up(&self, newest: Timestamp) -> Duration {
        let behind = newest.since(self.now());
        let behind_us = u64::try_from(behind.as_micros()).unwrap_or(u64::MAX);
        self.behind_us.fetch_add(behind_us, Ordering::Relaxed);
        behind
    }
}

impl Clock for QueueClock {
    fn now(&self) -> Timestamp {
        self.clock.now() + Duration::from_micros(self.behind_us.load(Ordering::Relaxed))
    }
}

impl std::fmt::Debug for QueueClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QueueClock({})", self.now())
    }
}

pub(super) struct Engine {
    open: OpenDatabase,
    /// The file, as callers are told of it.
    path: PathBuf,
    cache_bytes: usize,
    config: MachineConfig,
    clock: Arc<QueueClock>,
    events: broadcast::Sender<Event>,
    live: Option<Live>,
    /// What failed, in words for callers; that the file cannot be opened either is a consequence.
    failure: String,
    /// No new work before this moment.
    admission_from: Timestamp,
    /// The file is not tried before this moment.
    reopen_from: Timestamp,
}

impl Engine {
    /// Opens the file and reads the machine from it.
    pub fn open(
        open: OpenDatabase,
        config: EmbeddedConfig,
        clock: Arc<QueueClock>,
        events: broadcast::Sender<Event>,
    ) -> Result<Self, StoreError> {
        let mut engine = Self {
            open,
            path: config.path,
            cache_bytes: config.cache_bytes,
            config: config.machine,
            clock,
            events,
            live: None,
            failure: String::new(),
            admission_from: Timestamp::default(),
            reopen_from: Timestamp::default(),
        };
        engine.live = Some(engine.load()?);
        Ok(engine)
    }

    fn load(&self) -> Result<Live, StoreError> {
        let store = Store::new((self.open)(self.cache_bytes)?)?;
        let mut machine = store.load(self.config.clone())?;
        let behind = self.clock.catch_up(machine.newest_time());
        if !behind.is_zero() {
            warn!(?behind, "the clock is behind the queue's file");
        }
        machine.refresh_leases(self.clock.now());
        Ok(Live { machine, store })
    }

    /// Serves calls until nobody can make any.
    pub fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        let mut group = Vec::with_capacity(GROUP_CALLS_MAX);
        while let Some(first) = calls.blocking_recv() {
            let mut bytes = first.bytes;
            group.push(first);
            while group.len() < GROUP_CALLS_MAX
                && bytes < GROUP_BYTES_MAX
                && let Ok(call) = calls.try_recv()
            {
                bytes += call.bytes;
                group.push(call);
            }
            self.serve(&mut group);
        }
    }

    fn serve(&mut self, group: &mut Vec<Call>) {
        let now = self.clock.now();
        self.reopen_if_due(now);
        let refusal = (now < self.admission_from).then_some(self.failure.as_str());
        let mut replies = Vec::with_capacity(group.len());
        let calls = std::mem::take(group);
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| match &mut self.live {
            Some(live) => live.apply(now, refusal, calls, &mut replies),
            None => {
                let refuse =
                    |call: Call| (call.apply)(Err(unavailable(&self.failure, REOPEN_PAUSE)));
                replies.extend(calls.into_iter().map(refuse));
                Ok(Vec::new())
            }
        }));
        let failure = match outcome {
            Ok(Ok(events)) => return self.answer(replies, events),
            Ok(Err(error)) => {
                error!(error = %Chain(&error), "a commit of the queue failed");
                self.describe(&error)
            }
            // The panic's own message went to the log by the hook.
            Err(_) => "an internal rule failed; the coordinator's log has the details".to_owned(),
        };
        self.live = None;
        self.failure.clone_from(&failure);
        self.admission_from = now + ADMISSION_PAUSE;
        self.reopen_from = Timestamp::default();
        self.reopen_if_due(now);
        for reply in replies {
            reply(Err(unavailable(&failure, ADMISSION_PAUSE)));
        }
    }

    fn answer(&self, replies: Vec<Reply>, events: Vec<Event>) {
        let reader = match &self.live {
            Some(live) => live.store.reader(),
            None => {
                return replies
                    .into_iter()
                    .for_each(|reply| reply(Err(unavailable(&self.failure, REOPEN_PAUSE))));
            }
        };
        for reply in replies {
            reply(
                reader
                    .as_ref()
                    .map_err(|error| unavailable(&self.describe(error), REOPEN_PAUSE)),
            );
        }
        for event in events {
            // Nobody may be listening; the state says the same.
            let _ = self.events.send(event);
        }
    }

    /// A failure of the file for those who called: what it is, where, and what helps.
    fn describe(&self, error: &StoreError) -> String {
        let path = self.path.display();
        if error.is_full() {
            return format!("the disk of its file {path} is full; free space there");
        }
        format!("its file {path} fails: {}; see to its disk", Chain(error))
    }

    fn reopen_if_due(&mut self, now: Timestamp) {
        if self.live.is_some() || now < self.reopen_from {
            return;
        }
        match self.load() {
            Ok(live) => {
                info!("the queue was read back from its file");
                self.live = Some(live);
            }
            Err(error) => {
                warn!(error = %Chain(&error), "the queue's file cannot be opened");
                self.reopen_from = now + REOPEN_PAUSE;
            }
        }
    }
}

impl Live {
    fn apply(
        &mut self,
        now: Timestamp,
        refusal: Option<&str>,
        calls: Vec<Call>,
        replies: &mut Vec<Reply>,
    ) -> Result<Vec<Event>, StoreError> {
        let mut payloads = Payloads::default();
        for call in calls {
            let turn = match refusal.filter(|_| call.admits) {
                Some(failure) => Err(unavailable(failure, ADMISSION_PAUSE)),
                None => Ok(Turn {
                    machine: &mut self.machine,
                    now,
                    payloads: &mut payloads,
                }),
            };
            replies.push((call.apply)(turn));
        }
        let changes = self.machine.take_changes();
        if !changes.is_empty() || !payloads.is_empty() {
            self.store.commit(&changes, &payloads)?;
        }
        Ok(self.machine.take_events())
    }
}

pub(super) fn unavailable(reason: &str, retry_after: Duration) -> QueueError {
    QueueError::Unavailable {
        reason: reason.to_owned(),
        retry_after,
    }
}

/// An error with what caused it, on one line.
pub(super) struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}
