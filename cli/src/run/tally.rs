//! What the rollouts of a batch came to so far, out of the events of the batch. Pure.

use std::collections::{BTreeMap, HashMap};

use espalier_core::pipeline::{ProbeBuckets, StepCounts};
use espalier_proto::v1;

use super::drafts::task;
use crate::json as shown;
use crate::output::count;

/// Sums over the jobs that have ended. One that ended twice, because somebody retried it, counts as it ended last.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    counts: v1::Counts,
    ended: HashMap<String, Ended>,
}

#[derive(Clone, Debug)]
struct Ended {
    state: v1::JobState,
    /// Why it died.
    error: Option<String>,
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

    /// Whether what was seen to end is what a batch counts.
    ///
    /// # Errors
    /// It is not, in words: sums of it would be wrong, and must not be written down.
    pub fn check(&self, batch: &v1::Counts) -> Result<(), String> {
        for (state, counted) in [
            (v1::JobState::Succeeded, batch.succeeded),
            (v1::JobState::Dead, batch.dead),
            (v1::JobState::Cancelled, batch.cancelled),
        ] {
            let seen = self.ended.values().filter(|ended| ended.state == state);
            let seen = seen.count() as u64;
            if seen != counted {
                let state = shown::state(state);
                return Err(format!(
                    "{} jobs were seen to end as {state}, and the batch counts {}",
                    count(seen),
                    count(counted)
                ));
            }
        }
        Ok(())
    }

    /// How often the tasks of `jobs` were solved, and those that every judged sample solved, by name. Nobody knows of a sample
    /// that is dead whether it would have been solved: its task is not always solved.
    pub fn buckets(&self, jobs: &[v1::JobSpec]) -> (ProbeBuckets, Vec<String>) {
        let mut tasks: BTreeMap<&str, Samples> = BTreeMap::new();
        for job in jobs {
            let samples = tasks.entry(task(job)).or_default();
            let ended = self.ended.get(job.id());
            match ended.filter(|ended| ended.state == v1::JobState::Succeeded) {
                Some(ended) => {
                    samples.solved += u64::from(ended.solved == Some(true));
                    samples.judged += u64::from(ended.solved.is_some());
                }
                None => samples.is_whole = false,
            }
        }
        let (mut buckets, mut always) = (ProbeBuckets::default(), Vec::new());
        for (task, samples) in tasks {
            match (samples.solved, samples.judged) {
                (_, 0) => buckets.unjudged += 1,
                (0, _) => buckets.never += 1,
                (solved, judged) if solved == judged && samples.is_whole => {
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
        let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
        for error in self
            .ended
            .values()
            .filter_map(|ended| ended.error.as_deref())
        {
            *errors.entry(error).or_default() += 1;
        }
        let most = errors.into_iter().max_by_key(|(_, jobs)| *jobs);
        most.map(|(error, _)| error)
    }
}

/// The samples of a task.
struct Samples {
    solved: u64,
    judged: u64,
    /// Whether none is dead.
    is_whole: bool,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            solved: 0,
            judged: 0,
            is_whole: true,
        }
    }
}

fn ended(job: &v1::Job) -> Ended {
    let state = job.state();
    let summary = job.summary.as_ref();
    let summary = summary.filter(|_| state == v1::JobState::Succeeded);
    let error = job.last_error.as_ref();
    let error = error.filter(|_| state == v1::JobState::Dead);
    Ended {
        state,
        error: error.map(|error| error.message.clone()),
        solved: summary.and_then(|summary| summary.reward).map(|r| r >= 1.0),
        prompt_tokens: summary.map_or(0, |summary| summary.prompt_tokens),
        completion_tokens: summary.map_or(0, |summary| summary.completion_tokens),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A job that ended with a verdict, or died.
    pub fn job(id: &str, reward: Option<f64>, dead: Option<&str>) -> v1::Job {
        let summary = v1::RolloutSummary {
            reward,
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

    /// As it was submitted: the first character names the task.
    fn spec(id: &str) -> v1::JobSpec {
        let rollout = v1::RolloutSpec {
            task_id: Some(id[..1].to_owned()),
            ..v1::RolloutSpec::default()
        };
        v1::JobSpec {
            id: Some(id.to_owned()),
            rollout: Some(rollout),
            ..v1::JobSpec::default()
        }
    }

    fn event(counts: v1::Counts, ended: Vec<v1::Job>) -> v1::BatchEvent {
        v1::BatchEvent {
            batch: Some(v1::Batch {
                counts: Some(counts),
                ..v1::Batch::default()
            }),
            ended,
            ..v1::BatchEvent::default()
        }
    }

    #[test]
    fn verdicts_tokens_and_buckets_are_summed() {
        let mut tally = Tally::default();
        let counts = v1::Counts {
            leased: 2,
            succeeded: 6,
            dead: 3,
            ..v1::Counts::default()
        };
        let ended = vec![
            job("a0", Some(1.0), None),
            job("a1", Some(1.0), None),
            job("b0", Some(1.0), None),
            job("b1", Some(0.5), None),
            job("c0", None, None),
            job("d0", None, Some("no model")),
            job("d1", None, Some("no model")),
            job("e0", Some(1.0), None),
            job("e1", None, Some("no browser")),
        ];
        tally.take(&event(counts, ended));
        assert_eq!((tally.jobs(), tally.over(), tally.running()), (11, 9, 2));
        let sums = tally.counts();
        assert_eq!((sums.solved, sums.judged), (4, 5));
        assert_eq!((sums.prompt_tokens, sums.completion_tokens), (600, 60));
        assert_eq!((sums.succeeded, sums.dead), (6, 3));
        let jobs = ["a0", "a1", "b0", "b1", "c0", "d0", "d1", "e0", "e1"].map(spec);
        let (buckets, always) = tally.buckets(&jobs);
        let expected = ProbeBuckets {
            always: 1,
            sometimes: 2,
            never: 0,
            unjudged: 2,
        };
        assert_eq!((buckets, always), (expected, vec!["a".to_owned()]));
        assert_eq!(tally.error(), Some("no model"));
        // Retried, and done.
        let again = v1::BatchEvent {
            ended: ["d0", "d1"].map(|id| job(id, Some(0.0), None)).to_vec(),
            ..v1::BatchEvent::default()
        };
        tally.take(&again);
        assert_eq!(tally.buckets(&jobs).0.never, 1);
        assert_eq!(tally.counts().judged, 7);
        assert_eq!(tally.error(), Some("no browser"));
    }

    #[test]
    fn sums_of_a_part_of_a_batch_are_not_written_down() {
        let counts = v1::Counts {
            succeeded: 2,
            dead: 1,
            ..v1::Counts::default()
        };
        let mut tally = Tally::default();
        tally.take(&event(counts, vec![job("a0", Some(1.0), None)]));
        let why = tally.check(&counts).unwrap_err();
        assert!(why.contains("1 jobs") && why.contains("counts 2"), "{why}");
        let rest = vec![job("a1", None, None), job("a2", None, Some("lost"))];
        tally.take(&event(counts, rest));
        assert_eq!(tally.check(&counts), Ok(()));
    }
}
