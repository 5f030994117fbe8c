//! One lease as its job sees it: how long it may go on, and why it was stopped.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longest progress text, in bytes.
const PROGRESS_BYTES_MAX: usize = 200;
/// Progress texts that are kept, for the report of a failure: what the job was at when it failed.
const PROGRESS_TEXTS_MAX: usize = 20;

/// Why a job has to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Somebody cancelled it.
    Cancelled,
    /// Another lease was given, or this one is no more.
    Lost,
    /// It could not be renewed in time.
    Expired,
    /// It ran longer than it may.
    TooLong,
    /// The process drains, and the time for finishing is over.
    Draining,
    /// The process lets go of everything.
    Aborted,
}

/// A lease. Clones share it.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    stopped: CancellationToken,
}

#[derive(Debug)]
struct State {
    stop_at: Instant,
    reason: Option<Stop>,
    /// Whether the work is done and only its result has to be stored.
    is_publishing: bool,
    /// Newest last.
    progress: VecDeque<String>,
}

/// When the work under a lease has to stop: a fifth before its end, so that it is over when another may begin.
/// `granted_at` must not be later than the moment from which the coordinator counts.
pub(super) fn stop_at(granted_at: Instant, ttl: Duration) -> Instant {
    granted_at + ttl.mul_f64(0.8)
}

impl Lease {
    pub(super) fn new(stop_at: Instant) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                stop_at,
                reason: None,
                is_publishing: false,
                progress: VecDeque::new(),
            }),
            stopped: CancellationToken::new(),
        }))
    }

    /// Cancelled when the work has to stop.
    pub fn stopped(&self) -> CancellationToken {
        self.0.stopped.child_token()
    }

    /// Why the work has to stop, if it has to.
    pub fn reason(&self) -> Option<Stop> {
        self.lock().reason
    }

    /// Whether a result may still be published. Asks the clock, so that a process which was suspended past the end
    /// of its lease says no before it has heard of it.
    pub fn may_publish(&self) -> bool {
        let state = self.lock();
        state.reason.is_none() && Instant::now() < state.stop_at
    }

    /// Says that the work is done and its result is being stored. What takes long from here on is not its own doing.
    pub fn publishing(&self) {
        self.lock().is_publishing = true;
        self.progress("publishing");
    }

    pub(super) fn is_publishing(&self) -> bool {
        self.lock().is_publishing
    }

    /// Says how far the work is, for people.
    pub fn progress(&self, text: &str) {
        let mut end = text.len().min(PROGRESS_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut state = self.lock();
        if state.progress.len() >= PROGRESS_TEXTS_MAX {
            state.progress.pop_front();
        }
        state.progress.push_back(text[..end].to_owned());
    }

    pub(super) fn current_progress(&self) -> String {
        self.lock().progress.back().cloned().unwrap_or_default()
    }

    /// The last things that the job was at, one a line.
    pub(super) fn last_progress(&self) -> String {
        let state = self.lock();
        let lines: Vec<&str> = state.progress.iter().map(String::as_str).collect();
        lines.join("\n")
    }

    pub(super) fn stop_at(&self) -> Instant {
        self.lock().stop_at
    }

    /// Moves the end. Never back: an answer that overtook another is the older one.
    pub(super) fn extend(&self, stop_at: Instant) {
        let mut state = self.lock();
        state.stop_at = state.stop_at.max(stop_at);
    }

    /// Stops the work. The first reason counts.
    pub(super) fn stop(&self, reason: Stop) {
        self.lock().reason.get_or_insert(reason);
        self.0.stopped.cancel();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that may panic runs under the lock.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn publishing_ends_with_the_clock_even_if_nobody_says_so() {
        let lease = Lease::new(stop_at(Instant::now(), Duration::from_secs(60)));
        assert!(lease.may_publish());
        tokio::time::advance(Duration::from_secs(47)).await;
        assert!(lease.may_publish());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!lease.may_publish());
        lease.extend(Instant::now() + Duration::from_secs(1));
        assert!(lease.may_publish());
    }

    #[tokio::test]
    async fn the_first_reason_counts() {
        let lease = Lease::new(Instant::now() + Duration::from_secs(60));
        let token = lease.stopped();
        lease.stop(Stop::Cancelled);
        lease.stop(Stop::Lost);
        assert!(token.is_cancelled());
        assert_eq!(lease.reason(), Some(Stop::Cancelled));
        assert!(!lease.may_publish());
    }

    #[tokio::test]
    async fn progress_is_cut_at_a_character_and_the_last_of_it_is_kept() {
        let lease = Lease::new(Instant::now());
        assert_eq!(
            (lease.current_progress(), lease.last_progress()),
            Default::default()
        );
        for n in 0..PROGRESS_TEXTS_MAX {
            lease.progress(&format!("step {n}"));
        }
        lease.progress(&"é".repeat(150));
        assert_eq!(lease.current_progress(), "é".repeat(100));
        assert!(lease.last_progress().starts_with("step 1\nstep 2\n"));
    }
}
