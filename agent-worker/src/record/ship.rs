//! Brings steps and blobs to the store while the rollout goes on. A store that is away holds nothing up: what waits
//! lies on this machine's disk.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_runtime::store::{AWAY_BACKOFF, Store};
use espalier_runtime::tasks::{self, with_deadline};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::RecordError;
use super::log::StepLog;
use super::publish::compress;

/// A segment is written this long after its first step at the latest.
const SEGMENT_EVERY: Duration = Duration::from_secs(10);
/// A segment is written as soon as this many bytes of steps wait.
const SEGMENT_BYTES: u64 = 1 << 20;
/// How long the last steps of an attempt that publishes nothing are tried to be brought to the store.
const LAST_SEGMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Blobs that are uploaded at once: hides the latency of a remote store, and bounds memory by as many answers.
const UPLOADS_MAX: usize = 8;

/// What one attempt has to bring to the store.
pub(super) struct Shipment {
    store: Store,
    log: Arc<StepLog>,
    key: JobKey,
    fence: Fence,
    state: Mutex<State>,
    wake: Notify,
    ended: CancellationToken,
    published: AtomicBool,
}

#[derive(Default)]
struct State {
    blobs: VecDeque<String>,
    segments: u32,
    shipped: u64,
    oldest: Option<Instant>,
}

/// What is due now.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Blobs,
    Segment { n: u32, from: u64 },
    Wait(Option<Instant>),
}

impl Shipment {
    pub(super) fn new(store: Store, log: Arc<StepLog>, key: JobKey, fence: Fence) -> Self {
        Self {
            store,
            log,
            key,
            fence,
            state: Mutex::default(),
            wake: Notify::new(),
            ended: CancellationToken::new(),
            published: AtomicBool::new(false),
        }
    }

    /// There are new lines.
    pub(super) fn written(&self) {
        let mut state = self.lock();
        let first = state.oldest.is_none();
        state.oldest.get_or_insert_with(Instant::now);
        let full = self.log.written() - state.shipped >= SEGMENT_BYTES;
        drop(state);
        if first || full {
            self.wake.notify_one();
        }
    }

    /// There is a new blob.
    pub(super) fn add_blob(&self, sha256: String) {
        self.lock().blobs.push_back(sha256);
        self.wake.notify_one();
    }

    /// No more comes. The files of this machine go away.
    pub(super) fn end(&self) {
        self.ended.cancel();
    }

    /// The trace is published: the last steps need not go to the store by themselves.
    pub(super) fn published(&self) {
        self.published.store(true, Ordering::SeqCst);
    }

    /// Works until [`end`](Self::end), then cleans up.
    pub(super) async fn run(&self) {
        // Dropping a PUT half-way is harmless: objects appear whole or not at all.
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = self.ship() => {}
        }
        if !self.published.load(Ordering::SeqCst) {
            let (n, from) = {
                let state = self.lock();
                (state.segments, state.shipped)
            };
            let last = self.ship_segment(n, from);
            if let Ok(Err(error)) =
                with_deadline("record.last_segment", LAST_SEGMENT_TIMEOUT, last).await
            {
                tracing::debug!(job = %self.key, error = %error, "last steps not stored");
            }
        }
        self.log.remove().await;
    }

    /// Uploads the blobs that still wait. Called before publication, by the publisher, until it succeeds.
    pub(super) async fn ship_blobs(&self) -> Result<(), RecordError> {
        loop {
            let waiting: Vec<String> = {
                let state = self.lock();
                state.blobs.iter().take(UPLOADS_MAX).cloned().collect()
            };
            if waiting.is_empty() {
                return Ok(());
            }
            let uploads = waiting.iter().map(|sha256| self.ship_blob(sha256));
            futures::future::try_join_all(uploads).await?;
        }
    }

    async fn ship(&self) {
        let mut failures = 0;
        loop {
            let done = match self.due(Instant::now()) {
                Due::Blobs => self.ship_blobs().await,
                Due::Segment { n, from } => self.ship_segment(n, from).await,
                Due::Wait(until) => {
                    self.wait(until).await;
                    continue;
                }
            };
            match done {
                Ok(()) => failures = 0,
                Err(error) => {
                    failures += 1;
                    let error = espalier_runtime::telemetry::error_chain(&error);
                    tracing::warn!(job = %self.key, failures, error, "steps wait on this machine for the store");
                    tokio::time::sleep(AWAY_BACKOFF.jittered(failures)).await;
                }
            }
        }
    }

    async fn wait(&self, until: Option<Instant>) {
        match until {
            Some(at) => tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep_until(at) => {}
            },
            None => self.wake.notified().await,
        }
    }

    fn due(&self, now: Instant) -> Due {
        let state = self.lock();
        if !state.blobs.is_empty() {
            return Due::Blobs;
        }
        let Some(oldest) = state.oldest else {
            return Due::Wait(None);
        };
        let full = self.log.written() - state.shipped >= SEGMENT_BYTES;
        if full || now >= oldest + SEGMENT_EVERY {
            let (n, from) = (state.segments, state.shipped);
            return Due::Segment { n, from };
        }
        Due::Wait(Some(oldest + SEGMENT_EVERY))
    }

    /// Both the background and the publisher may be at one blob: creating is idempotent.
    async fn ship_blob(&self, sha256: &str) -> Result<(), RecordError> {
        let path = layout::blob(&self.key.project, sha256);
        match self.log.read_blob(sha256).await {
            Ok(content) => drop(self.store.create(&path, content).await?),
            Err(error) if self.has_left(sha256) => {
                tracing::trace!(error = %error, "blob was brought to the store meanwhile");
            }
            Err(error) => return Err(error),
        }
        self.lock().blobs.retain(|waiting| waiting != sha256);
        self.log.remove_blob(sha256).await;
        Ok(())
    }

    fn has_left(&self, sha256: &str) -> bool {
        !self.lock().blobs.iter().any(|waiting| waiting == sha256)
    }

    async fn ship_segment(&self, n: u32, from: u64) -> Result<(), RecordError> {
        let to = self.log.written();
        if to == from {
            return Ok(());
        }
        let lines = self.log.read(from, to).await?;
        let packed = tasks::blocking("record.compress", move || compress(&lines)).await??;
        let path = layout::segment(&self.key, self.fence, n);
        self.store.put(&path, packed).await?;
        let mut state = self.lock();
        state.segments = n + 1;
        state.shipped = to;
        state.oldest = (self.log.written() > to).then(Instant::now);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that may panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
