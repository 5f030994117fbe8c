//! What the rollouts of a batch came to so far, out of the events of the batch. Pure.

use std::collections::{BTreeMap, HashMap};

use espalier_core::pipeline::{ProbeBuckets, StepCounts};
use espalier_proto::v1;

/// Sums over the jobs that have ended. One that ended twice, because somebody retried it, counts as it ended last.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    counts: v1::Counts,
    ended: HashMap<String, Ended>,
    /// Why jobs died, and how many of them.
    errors: BTreeMap<String, u64>,
}

#[derive(Clone, Debug)]
struct Ended {
    is_done: bool,
    task: String,
    solved: Option<bool>,
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Tally {
    /// Adds an event.
    pub fn take(&mut self, event: &v1::BatchEvent) {
        if let Some(counts) = event.batch.as_ref().and_then(|batch| batch.counts) {
            self.counts = counts;
        }
        for job in &event.ended {
            if let Some(error) = &job.last_error
                && job.state() == v1::JobState::Dead
            {
                *self.errors.entry(error.message.clone()).or_default() += 1;
            }
            self.ended.insert(job.id.clone(), ended(job));
        }
    }

    /// How many jobs there are, ended or not.
    pub fn jobs(&self) -> u64 {
        let c = &self.counts;
        c.blocked + c.delayed + c.ready + c.leased + c.succeeded + c.dead + c.cancelled
    }

    /// How many have ended.
    pub fn over(&self) -> u64 {
        self.counts.succeeded + self.counts.dead + self.counts.cancelled
    }

    /// How many run now.
    pub fn running(&self) -> u64 {
        self.counts.leased
    }

    /// Sums.
    pub fn counts(&self) -> StepCounts {
        let mut sums = StepCounts {
            jobs: self.jobs(),
            succeeded: self.counts.succeeded,
            dead: self.counts.dead,
            ..StepCounts::default()
        };
        for ended in self.ended.values() {
            sums.solved += u64::from(ended.solved == Some(true));
            sums.judged += u64::from(ended.solved.is_some());
            sums.prompt_tokens += ended.prompt_tokens;
            sums.completion_tokens += ended.completion_tokens;
        }
        sums
    }

    /// How often tasks were solved, and those that every judged sample solved, by name.
    pub fn buckets(&self) -> (ProbeBuckets, Vec<String>) {
        let mut tasks: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for ended in self.ended.values().filter(|ended| ended.is_done) {
            let (solved, judged) = tasks.entry(&ended.task).or_default();
            *solved += u64::from(ended.solved == Some(true));
            *judged += u64::from(ended.solved.is_some());
        }
        let (mut buckets, mut always) = (ProbeBuckets::default(), Vec::new());
        for (task, (solved, judged)) in tasks {
            match (solved, judged) {
                (_, 0) => buckets.unjudged += 1,
                (0, _) => buckets.never += 1,
                (solved, judged) if solved == judged => {
                    buckets.always += 1;
                    always.push(task.to_owned());
                }
                _ => buckets.sometimes += 1,
            }
        }
        (buckets, always)
    }

    /// Why most of the dead ones died.
    pub fn error(&self) -> Option<&str> {
        let most = self.errors.iter().max_by_key(|(_, jobs)| **jobs);
        most.map(|(error, _)| error.as_str())
    }
}

fn ended(job: &v1::Job) -> Ended {
    let is_done = job.state() == v1::JobState::Succeeded;
    let summary = job.summary.as_ref().filter(|_| is_done);
    Ended {
        is_done,
        task: summary.map_or_else(String::new, |summary| summary.task_id.clone()),
        solved: summary.and_then(|summary| summary.reward).map(|r| r >= 1.0),
        prompt_tokens: summary.map_or(0, |summary| summary.prompt_tokens),
        completion_tokens: summary.map_or(0, |summary| summary.completion_tokens),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A job that ended with a verdict, or died.
    pub fn job(id: &str, task: &str, reward: Option<f64>, dead: Option<&str>) -> v1::Job {
        let summary = v1::RolloutSummary {
            reward,
            task_id: task.to_owned(),
            prompt_tokens: 100,
            completion_tokens: 10,
            ..v1::RolloutSummary::default()
        };
        let state = match dead {
            None => v1::JobState::Succeeded,
            Some(_) => v1::JobState::Dead,
        };
        v1::Job {
            id: id.to_owned(),
            state: state.into(),
            summary: dead.is_none().then_some(summary),
            last_error: dead.map(|message| v1::JobError {
                message: message.to_owned(),
                ..v1::JobError::default()
            }),
            ..v1::Job::default()
        }
    }

    #[test]
    fn verdicts_tokens_and_buckets_are_summed() {
        let mut tally = Tally::default();
        let counts = v1::Counts {
            leased: 2,
            succeeded: 5,
            dead: 2,
            ..v1::Counts::default()
        };
        let event = v1::BatchEvent {
            batch: Some(v1::Batch {
                counts: Some(counts),
                ..v1::Batch::default()
            }),
            ended: vec![
                job("a0", "a", Some(1.0), None),
                job("a1", "a", Some(1.0), None),
                job("b0", "b", Some(1.0), None),
                job("b1", "b", Some(0.5), None),
                job("c0", "c", None, None),
                job("d0", "", None, Some("no model")),
                job("d1", "", None, Some("no model")),
            ],
            ..v1::BatchEvent::default()
        };
        tally.take(&event);
        assert_eq!((tally.jobs(), tally.over(), tally.running()), (9, 7, 2));
        let sums = tally.counts();
        assert_eq!((sums.solved, sums.judged), (3, 4));
        assert_eq!((sums.prompt_tokens, sums.completion_tokens), (500, 50));
        assert_eq!((sums.succeeded, sums.dead), (5, 2));
        let (buckets, always) = tally.buckets();
        let expected = ProbeBuckets {
            always: 1,
            sometimes: 1,
            never: 0,
            unjudged: 1,
        };
        assert_eq!((buckets, always), (expected, vec!["a".to_owned()]));
        assert_eq!(tally.error(), Some("no model"));
        // Retried, and done.
        let again = v1::BatchEvent {
            ended: vec![job("d0", "d", Some(0.0), None)],
            ..v1::BatchEvent::default()
        };
        tally.take(&again);
        assert_eq!(tally.buckets().0.never, 1);
        assert_eq!(tally.counts().judged, 5);
    }
}
