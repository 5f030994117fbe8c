//! What counters say of the time between two looks: jobs granted and ended a second. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use espalier_proto::v1;

use super::look::{Look, done, open};
use crate::output::total;

/// Rates are over as much time, where there are looks of it: a single second says little of jobs that take minutes.
const WINDOW: Duration = Duration::from_secs(10);
/// Most looks that are kept: one a second, and some to spare.
const LOOKS_MAX: usize = 16;

/// Looks of the last seconds, oldest first.
#[derive(Debug, Default)]
pub struct History(VecDeque<Look>);

impl History {
    /// Adds a look, and says what came about since the oldest that counts.
    pub fn add(&mut self, look: Look) -> Rates {
        // The oldest stays until the one after it is old enough to take its place.
        while self
            .0
            .get(1)
            .is_some_and(|second| look.at - second.at >= WINDOW)
            || self.0.len() >= LOOKS_MAX
        {
            self.0.pop_front();
        }
        let rates = match self.0.front() {
            Some(before) => Rates::between(before, &look),
            None => Rates::default(),
        };
        self.0.push_back(look);
        rates
    }
}

/// Jobs a second. What was not there in both looks has no rate.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// Grants of all workers.
    pub grants: Option<f64>,
    /// Ends of all projects.
    pub ends: Option<f64>,
    queues: BTreeMap<(String, i32), f64>,
    batches: BTreeMap<(String, String), f64>,
    workers: BTreeMap<String, f64>,
}

impl Rates {
    /// Between two looks. A counter that went back, as of jobs that were forgotten, counts as one that stood still.
    pub fn between(before: &Look, after: &Look) -> Self {
        let seconds = (after.at - before.at).as_secs_f64();
        if seconds <= 0.0 {
            return Self::default();
        }
        let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
        let queues = |look: &Look| by(&look.queues, queue_key, queue_ends);
        let batches = |look: &Look| by(&look.batches, batch_key, done);
        let queues = changes(&queues(before), &queues(after), rate);
        let workers = granted(before, after, rate);
        Self {
            grants: after
                .workers
                .as_ref()
                .map(|_| total(workers.values().copied())),
            ends: Some(total(queues.values().copied())),
            queues,
            batches: changes(&batches(before), &batches(after), rate),
            workers,
        }
    }

    /// Ends of a project's jobs of a kind.
    pub fn ends_of(&self, queue: &v1::QueueStats) -> Option<f64> {
        self.queues.get(&queue_key(queue)).copied()
    }

    /// Ends in a batch.
    pub fn of_batch(&self, batch: &v1::Batch) -> Option<f64> {
        self.batches.get(&batch_key(batch)).copied()
    }

    /// Grants to a worker.
    pub fn of_worker(&self, worker: &v1::Worker) -> Option<f64> {
        self.workers.get(&worker.worker).copied()
    }

    /// Seconds that a batch takes from now on if it goes on like this; none while nothing of it ends.
    pub fn left_s(&self, batch: &v1::Batch) -> Option<f64> {
        let rate = self.of_batch(batch).filter(|rate| *rate > 0.0)?;
        Some(open(batch) as f64 / rate)
    }
}

/// Of each worker. A worker that reconnected counts anew, and one that is new has counted from nothing.
fn granted(before: &Look, after: &Look, rate: impl Fn(u64, u64) -> f64) -> BTreeMap<String, f64> {
    let known = before.workers.iter().flatten();
    let known: BTreeMap<&str, &v1::Worker> = known.map(|w| (w.worker.as_str(), w)).collect();
    let workers = after.workers.iter().flatten();
    workers
        .map(|worker| {
            let same = known.get(worker.worker.as_str());
            let same = same.filter(|before| before.connected_at_us == worker.connected_at_us);
            let before = same.map_or(0, |before| before.granted);
            (worker.worker.clone(), rate(before, worker.granted))
        })
        .collect()
}

fn by<T, K: Ord>(
    things: &[T],
    key: impl Fn(&T) -> K,
    counter: impl Fn(&T) -> u64,
) -> BTreeMap<K, u64> {
    things
        .iter()
        .map(|thing| (key(thing), counter(thing)))
        .collect()
}

fn changes<K: Ord + Clone>(
    before: &BTreeMap<K, u64>,
    after: &BTreeMap<K, u64>,
    rate: impl Fn(u64, u64) -> f64,
) -> BTreeMap<K, f64> {
    let both = after.iter().filter_map(|(key, after)| {
        let before = before.get(key)?;
        Some((key.clone(), rate(*before, *after)))
    });
    both.collect()
}

fn queue_key(queue: &v1::QueueStats) -> (String, i32) {
    (queue.project.clone(), queue.kind)
}

fn queue_ends(queue: &v1::QueueStats) -> u64 {
    queue.succeeded + queue.dead + queue.cancelled
}

fn batch_key(batch: &v1::Batch) -> (String, String) {
    (batch.project.clone(), batch.batch.clone())
}

#[cfg(test)]
pub mod tests {
    use tokio::time::Instant;

    use super::*;

    /// A look `second` seconds after the first, by when `ended` of 100 jobs have ended and `granted` were granted.
    pub fn look(start: Instant, second: u64, ended: u64, granted: u64) -> Look {
        let counts = v1::Counts {
            ready: 100 - ended,
            succeeded: ended,
            ..Default::default()
        };
        Look {
            at: start + Duration::from_secs(second),
            now_us: 60_000_000 + second * 1_000_000,
            queues: vec![v1::QueueStats {
                project: "shop".to_owned(),
                kind: v1::JobKind::Rollout.into(),
                ready: 100 - ended,
                succeeded: ended,
                ..Default::default()
            }],
            batches: vec![v1::Batch {
                batch: "b".to_owned(),
                project: "shop".to_owned(),
                counts: Some(counts),
                ..Default::default()
            }],
            open_questions: 0,
            dollars_per_hour: None,
            workers: Some(vec![v1::Worker {
                worker: "w".to_owned(),
                coordinator: "0198-aaaaaaaaaaaa".to_owned(),
                connected_at_us: 1,
                last_seen_us: 60_000_000,
                capacity: 4,
                granted,
                ..Default::default()
            }]),
        }
    }

    #[test]
    fn rates_come_from_the_counters_of_two_looks() {
        let start = Instant::now();
        let (before, after) = (look(start, 0, 10, 12), look(start, 4, 30, 40));
        let rates = Rates::between(&before, &after);
        assert_eq!((rates.ends, rates.grants), (Some(5.0), Some(7.0)));
        assert_eq!(rates.ends_of(&after.queues[0]), Some(5.0));
        assert_eq!(rates.left_s(&after.batches[0]), Some(14.0));
        assert_eq!(Rates::between(&before, &before), Rates::default());
    }

    #[test]
    fn counters_that_begin_again_are_no_negative_work() {
        let start = Instant::now();
        let (before, mut after) = (look(start, 0, 30, 40), look(start, 2, 10, 8));
        assert_eq!(Rates::between(&before, &after).grants, Some(0.0));
        assert_eq!(Rates::between(&before, &after).ends, Some(0.0));
        assert_eq!(
            Rates::between(&before, &after).left_s(&after.batches[0]),
            None
        );
        after.workers.as_mut().unwrap()[0].connected_at_us = 2;
        assert_eq!(Rates::between(&before, &after).grants, Some(4.0));
        after.workers = None;
        assert_eq!(Rates::between(&before, &after).grants, None);
    }

    #[test]
    fn the_window_is_about_ten_seconds_long() {
        let start = Instant::now();
        let mut history = History::default();
        assert_eq!(history.add(look(start, 0, 0, 0)), Rates::default());
        // One a second for 20 s, then three.
        for second in 1..=20 {
            history.add(look(start, second, second, 0));
        }
        let mut last = Rates::default();
        for second in 21..=30 {
            last = history.add(look(start, second, 20 + 3 * (second - 20), 0));
        }
        assert_eq!(last.ends, Some(3.0));
        let mut seldom = History::default();
        seldom.add(look(start, 0, 0, 0));
        assert_eq!(seldom.add(look(start, 60, 30, 0)).ends, Some(0.5));
        assert_eq!(seldom.add(look(start, 120, 90, 0)).ends, Some(1.0));
    }
}
