//! One worker process: what it runs, what it has finished and not been thanked for, and when it must stop.

use std::collections::BTreeMap;

use espalier_core::error::ErrorClass;
use espalier_core::id::{Fence, JobKey, WorkerId};
use espalier_core::queue::Outcome;

/// How long a lease lasts.
pub const TTL_MS: u64 = 6_000;
/// Part of the lease that a worker keeps in hand.
const MARGIN_MS: u64 = TTL_MS / 5;

/// An attempt that runs.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// By the worker's own clock, counted from when it asked: stop then, whatever was not answered.
    pub stop_at_ms: u64,
}

/// A worker.
#[derive(Clone, Debug)]
pub struct Worker {
    pub id: WorkerId,
    /// The coordinator that its stream leads to, if any.
    pub coordinator: Option<usize>,
    /// How many streams it has had: what is on its way on an older one is lost.
    pub stream: u64,
    pub running: BTreeMap<(JobKey, Fence), Attempt>,
    /// Results that were not acknowledged yet.
    pub results: BTreeMap<(JobKey, Fence), Outcome>,
    pub slots: usize,
    /// Does nothing until then: SIGSTOP, or a machine that stalls.
    pub paused_until_ms: u64,
    /// Lease requests so far; the number makes a repetition one request.
    pub requests: u64,
    /// The lease request that was not answered yet, with how many jobs it asked for.
    pub asking: Option<(u64, u32)>,
}

impl Worker {
    pub fn new(number: u64, slots: usize) -> Self {
        Self {
            id: WorkerId::new(format!("w{number}")).unwrap(),
            coordinator: None,
            stream: 0,
            running: BTreeMap::new(),
            results: BTreeMap::new(),
            slots,
            paused_until_ms: 0,
            requests: 0,
            asking: None,
        }
    }

    /// Room for more, while no request for it is open.
    pub fn room(&self) -> u32 {
        self.slots
            .saturating_sub(self.running.len() + self.results.len()) as u32
    }

    /// Takes note of a lease that was asked for, or renewed, at `asked_ms`.
    pub fn hold(&mut self, lease: (JobKey, Fence), asked_ms: u64) {
        let stop_at_ms = asked_ms + TTL_MS - MARGIN_MS;
        self.running.insert(lease, Attempt { stop_at_ms });
    }

    /// Gives up what was not renewed in time: somebody else may have it soon.
    pub fn stop_overdue(&mut self, now_ms: u64) {
        self.running
            .retain(|_, attempt| attempt.stop_at_ms > now_ms);
    }
}

/// How an attempt ends that could not publish.
pub fn failed(class: ErrorClass) -> Outcome {
    Outcome::Failed {
        class,
        message: "it broke".to_owned(),
        log_tail: String::new(),
        retry_after: None,
    }
}
