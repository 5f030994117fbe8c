//! What happened to each job of a measurement: how often it was granted, and how often a result of it was accepted.
//! A queue that is fast because it loses or repeats jobs is not fast.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

/// Counts of jobs that are numbered from 0. Workers share it.
#[derive(Debug)]
pub struct Ledger {
    began: Instant,
    granted: Vec<AtomicU32>,
    /// Microseconds from the beginning to the first grant of each job; 0: not granted yet.
    granted_at_us: Vec<AtomicU64>,
    accepted: Vec<AtomicU32>,
    /// Results that were not accepted.
    turned_down: AtomicU32,
    /// Results accepted so far, for whoever waits for all of them.
    done: watch::Sender<usize>,
}

impl Ledger {
    /// For `jobs` jobs.
    pub fn new(jobs: usize) -> Self {
        let zeros = || (0..jobs).map(|_| AtomicU32::new(0)).collect();
        Self {
            began: Instant::now(),
            granted: zeros(),
            granted_at_us: (0..jobs).map(|_| AtomicU64::new(0)).collect(),
            accepted: zeros(),
            turned_down: AtomicU32::new(0),
            done: watch::Sender::new(0),
        }
    }

    /// Job `n` was granted; a number beyond the jobs is somebody else's.
    pub fn granted(&self, n: Option<usize>) {
        count(&self.granted, n);
        if let Some(slot) = n.and_then(|n| self.granted_at_us.get(n)) {
            let now_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            // A later grant of the same job finds the first one there.
            let _ = slot.compare_exchange(0, now_us.max(1), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// When each of `jobs` was first granted; none for one that was not.
    pub fn grants(&self, jobs: std::ops::Range<usize>) -> Vec<Option<Instant>> {
        let slots = self.granted_at_us.get(jobs).unwrap_or_default();
        let moments = slots.iter().map(|slot| match slot.load(Ordering::Relaxed) {
            0 => None,
            us => Some(self.began + Duration::from_micros(us)),
        });
        moments.collect()
    }

    /// A result of job `n` was accepted, or not. Call [`Ledger::tell`] after a message of these.
    pub fn answered(&self, n: Option<usize>, accepted: bool) {
        if accepted {
            count(&self.accepted, n);
        } else {
            self.turned_down.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells those who wait that `more` results were accepted.
    pub fn tell(&self, more: usize) {
        self.done.send_modify(|done| *done += more);
    }

    /// How many results were accepted, now and later.
    pub fn done(&self) -> watch::Receiver<usize> {
        self.done.subscribe()
    }

    /// Whether every job was granted once and accepted once, and nothing was turned down.
    pub fn is_exact(&self) -> bool {
        let once = |counts: &[AtomicU32]| counts.iter().all(|n| n.load(Ordering::Relaxed) == 1);
        once(&self.granted) && once(&self.accepted) && self.turned_down.load(Ordering::Relaxed) == 0
    }

    /// The counts, for the report.
    pub fn to_json(&self) -> Value {
        let having = |counts: &[AtomicU32], rule: fn(u32) -> bool| {
            let counts = counts.iter().map(|n| n.load(Ordering::Relaxed));
            counts.filter(|n| rule(*n)).count()
        };
        json!({
            "jobs": self.accepted.len(),
            "granted_once": having(&self.granted, |n| n == 1),
            "granted_again": having(&self.granted, |n| n > 1),
            "accepted_once": having(&self.accepted, |n| n == 1),
            "accepted_again": having(&self.accepted, |n| n > 1),
            "lost": having(&self.accepted, |n| n == 0),
            "turned_down": self.turned_down.load(Ordering::Relaxed),
        })
    }
}

fn count(counts: &[AtomicU32], n: Option<usize>) {
    if let Some(slot) = n.and_then(|n| counts.get(n)) {
        slot.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(granted: &[usize], accepted: &[usize]) -> Ledger {
        let ledger = Ledger::new(2);
        granted.iter().for_each(|n| ledger.granted(Some(*n)));
        accepted
            .iter()
            .for_each(|n| ledger.answered(Some(*n), true));
        ledger
    }

    #[test]
    fn the_first_grant_counts() {
        let ledger = ledger(&[1], &[]);
        let first = ledger.grants(0..2);
        assert!(first[0].is_none() && first[1].is_some());
        ledger.granted(Some(1));
        assert_eq!(ledger.grants(1..2), first[1..]);
        assert!(ledger.grants(1..3).is_empty());
    }

    #[test]
    fn exact_means_once_each() {
        assert!(ledger(&[0, 1], &[1, 0]).is_exact());
        let lost = ledger(&[0, 1], &[0]);
        assert!(!lost.is_exact());
        assert_eq!(lost.to_json()["lost"], 1);
        let twice = ledger(&[0, 1], &[0, 1, 1]);
        assert!(!twice.is_exact());
        assert_eq!(twice.to_json()["accepted_again"], 1);
        assert!(!ledger(&[0, 1, 1], &[0, 1]).is_exact());
        let refused = ledger(&[0, 1], &[0, 1]);
        refused.answered(Some(1), false);
        assert!(!refused.is_exact());
    }
}
