//! A worker that takes one job and ends with it: when it asks for no more, and when it is over. Pure; time comes in as
//! arguments.

use tokio::time::Instant;

/// How far such a worker is.
#[derive(Debug)]
pub(super) enum Once {
    /// No job came yet; it waits for one until then.
    Waiting(Instant),
    /// It has had its job.
    Took,
}

impl Once {
    /// Waits for a job until `until`.
    pub(super) fn new(until: Instant) -> Self {
        Self::Waiting(until)
    }

    /// A job was begun.
    pub(super) fn take(&mut self) {
        *self = Self::Took;
    }

    /// Whether a job was begun.
    pub(super) fn took(&self) -> bool {
        matches!(self, Self::Took)
    }

    /// When it no longer waits.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        match self {
            Self::Waiting(until) => Some(*until),
            Self::Took => None,
        }
    }

    /// How many of `free` slots it has jobs for.
    pub(super) fn limit(&self, free: u32) -> u32 {
        match self {
            Self::Waiting(_) => free.min(1),
            Self::Took => 0,
        }
    }

    /// Whether nothing is left to do for it, who holds `held` jobs and results.
    pub(super) fn is_over(&self, now: Instant, held: usize) -> bool {
        match self {
            Self::Waiting(until) => now >= *until && held == 0,
            Self::Took => held == 0,
        }
    }
}
