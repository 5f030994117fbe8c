//! Judges a run by what was said in it: what a client was acknowledged, what coordinators granted and how attempts
//! ended, and what the queue says in the end. Pure: [`log`] reads the lines, the scenarios ask for the verdict.
//!
//! Moments are of no use here, since lines of several processes have no common clock. Fences have an order: they grow
//! over all grants of a queue. So grants are put in the order of their fences.
//!
//! A history may have holes. A process that is killed takes its last lines with it, and an answer of the queue that
//! was lost is in no log. What is missing proves nothing then; two lines that contradict each other always do.

mod fairness;
pub mod log;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::id::JobKey;
use espalier_proto::v1::{Counts, JobState};
use serde::Deserialize;

/// One line of a coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum Event {
    /// The queue granted a job.
    Granted(Grant),
    /// The queue was told how an attempt ended, and answered.
    Finished(Finish),
}

impl Event {
    /// Whom it is about.
    pub fn job(&self) -> &JobKey {
        match self {
            Self::Granted(grant) => &grant.job,
            Self::Finished(finish) => &finish.job,
        }
    }
}

/// A lease that began.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Grant {
    /// Of which job.
    pub job: JobKey,
    /// Its number.
    pub fence: u64,
    /// Which grant of the job it is, from 1.
    pub attempt: u32,
    /// Whose it is.
    pub worker: String,
}

/// The end of an attempt, as a worker told it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Finish {
    /// Of which job.
    pub job: JobKey,
    /// Under which lease.
    pub fence: u64,
    /// Who told it.
    pub worker: String,
    /// `succeeded`, `released`, or the class of the failure.
    pub outcome: String,
    /// What the queue said to it.
    pub verdict: Verdict,
}

/// The queue's answer to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It counts.
    Accepted,
    /// The lease had been ended before. By this end, or by one that gave back a grant which was in doubt.
    Known,
    /// The lease was not the job's present one.
    Stale,
    /// It breaks a rule.
    Refused,
}

/// What the queue says of a job in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Where it is.
    pub state: JobState,
    /// Grants of it.
    pub attempts: u32,
    /// Failures of its own.
    pub handler_failures: u32,
    /// Failures of what it stands on, leases that ran out included.
    pub infra_failures: u32,
}

/// What the queue says in the end.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Every job that ended.
    pub jobs: BTreeMap<JobKey, Ended>,
    /// The counters of their batches, added up.
    pub counts: Counts,
}

/// What was said in a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Jobs that a client was told are taken; those of one chunk of a batch together.
    pub chunks: Vec<Vec<JobKey>>,
    /// What coordinators said.
    pub events: Vec<Event>,
    /// A coordinator was killed, or answers of the queue were lost, so that lines may be missing.
    pub holes: bool,
}

/// What is known of one job.
#[derive(Default)]
struct Job<'a> {
    /// In the order of their fences.
    grants: BTreeMap<u64, &'a Grant>,
    finishes: Vec<&'a Finish>,
}

impl Job<'_> {
    fn count(&self, outcome: &str, verdicts: &[Verdict]) -> usize {
        self.finishes
            .iter()
            .filter(|f| f.outcome == outcome && verdicts.contains(&f.verdict))
            .count()
    }

    /// The lease under which its result was accepted, where that was seen.
    fn success(&self) -> Option<u64> {
        let mut finishes = self.finishes.iter();
        let accepted = finishes.find(|f| f.is_success() && f.verdict == Verdict::Accepted);
        accepted.map(|finish| finish.fence)
    }
}

impl Finish {
    fn is_success(&self) -> bool {
        self.outcome == "succeeded"
    }
}

impl History {
    /// Every rule that was broken, in words. Of two projects whose jobs were ready at the same time, none got more than
    /// `unfair_max` grants ahead of the other.
    pub fn broken(&self, end: &End, unfair_max: u64) -> Vec<String> {
        let mut broken = Vec::new();
        let jobs = self.jobs(&mut broken);
        self.nothing_is_lost(&jobs, end, &mut broken);
        for (key, job) in &jobs {
            check_fences(key, job, &mut broken);
            self.check_ends(key, job, &mut broken);
            if let Some(ended) = end.jobs.get(key) {
                self.check_counters(key, job, ended, &mut broken);
            }
        }
        check_sums(end, &mut broken);
        fairness::check(self, unfair_max, &mut broken);
        broken
    }

    /// What was said of each job. Says which fence was given twice.
    fn jobs(&self, broken: &mut Vec<String>) -> BTreeMap<&JobKey, Job<'_>> {
        let mut jobs: BTreeMap<&JobKey, Job<'_>> = BTreeMap::new();
        let mut owners: BTreeMap<u64, &Grant> = BTreeMap::new();
        for event in &self.events {
            match event {
                Event::Granted(grant) => {
                    if let Some(other) = owners.insert(grant.fence, grant) {
                        broken.push(format!("a fence was given twice: {grant:?} and {other:?}"));
                    }
                    let job = jobs.entry(&grant.job).or_default();
                    job.grants.insert(grant.fence, grant);
                }
                Event::Finished(finish) => {
                    jobs.entry(&finish.job).or_default().finishes.push(finish);
                }
            }
        }
        jobs
    }

    fn nothing_is_lost(
        &self,
        jobs: &BTreeMap<&JobKey, Job<'_>>,
        end: &End,
        broken: &mut Vec<String>,
    ) {
        let acknowledged: BTreeSet<&JobKey> = self.chunks.iter().flatten().collect();
        let lost = acknowledged
            .iter()
            .filter(|key| !end.jobs.contains_key(**key));
        broken.extend(lost.map(|key| format!("{key} was acknowledged and has not ended")));
        let unknown = jobs.keys().filter(|key| !end.jobs.contains_key(**key));
        broken.extend(unknown.map(|key| format!("{key} was granted and has not ended")));
        for (key, ended) in &end.jobs {
            let job = jobs.get(key);
            let told = job.is_some_and(|job| {
                job.count("succeeded", &[Verdict::Accepted, Verdict::Known]) > 0
            });
            let succeeded = ended.state == JobState::Succeeded;
            if succeeded && !told && !self.holes {
                broken.push(format!("{key} succeeded, and nobody was told so"));
            }
            if !succeeded && job.is_some_and(|job| job.success().is_some()) {
                broken.push(format!("the accepted result of {key} is lost: {ended:?}"));
            }
        }
    }

    /// Ends belong to grants, each lease ends once, and there is one result.
    fn check_ends(&self, key: &JobKey, job: &Job<'_>, broken: &mut Vec<String>) {
        if job.count("succeeded", &[Verdict::Accepted]) > 1 {
            broken.push(format!("two results of {key} were accepted"));
        }
        let mut ended = BTreeSet::new();
        for finish in &job.finishes {
            let accepted = finish.verdict == Verdict::Accepted;
            match job.grants.get(&finish.fence) {
                Some(grant) if accepted && grant.worker != finish.worker => {
                    broken.push(format!("{finish:?} was accepted, and it is {grant:?}"));
                }
                None if accepted && !self.holes => {
                    broken.push(format!("{finish:?} was accepted, and nobody granted it"));
                }
                _ => {}
            }
            if accepted && !ended.insert(finish.fence) {
                broken.push(format!("a lease ended twice: {finish:?}"));
            }
        }
        let Some(success) = job.success() else { return };
        for grant in job.grants.range(success + 1..).map(|(_, grant)| grant) {
            broken.push(format!("{grant:?} came after the result under {success}"));
        }
        for finish in &job.finishes {
            let after = finish.fence > success
                && matches!(finish.verdict, Verdict::Accepted | Verdict::Known);
            let denied = finish.fence == success && finish.verdict == Verdict::Stale;
            if after || denied {
                broken.push(format!("{finish:?} contradicts the result under {success}"));
            }
        }
    }

    fn check_counters(&self, key: &JobKey, job: &Job<'_>, ended: &Ended, broken: &mut Vec<String>) {
        let newest = job.grants.values().map(|grant| grant.attempt).max();
        if newest.unwrap_or(0) > ended.attempts {
            broken.push(format!("{key} was granted more often than {ended:?} says"));
        }
        let failures = u64::from(ended.handler_failures) + u64::from(ended.infra_failures);
        let result = u64::from(ended.state == JobState::Succeeded);
        if failures + result > u64::from(ended.attempts) {
            broken.push(format!(
                "{key} ended more often than it was granted: {ended:?}"
            ));
        }
        let accepted = |outcome| job.count(outcome, &[Verdict::Accepted]);
        let told = job.count("handler", &[Verdict::Accepted, Verdict::Known]);
        let handler = ended.handler_failures as usize;
        if accepted("handler") > handler || (told < handler && !self.holes) {
            broken.push(format!("{key} failed {told} times, and has {ended:?}"));
        }
        if accepted("infra") > ended.infra_failures as usize {
            broken.push(format!("failures of {key} were forgotten: {ended:?}"));
        }
    }
}

/// Each grant of a job has a greater fence than the one before it.
fn check_fences(key: &JobKey, job: &Job<'_>, broken: &mut Vec<String>) {
    let grants: Vec<&&Grant> = job.grants.values().collect();
    for pair in grants.windows(2) {
        if pair[0].attempt >= pair[1].attempt {
            broken.push(format!(
                "fences of {key} did not grow: {:?}, {:?}",
                pair[0], pair[1]
            ));
        }
    }
}

/// The counters of the batches are those of their jobs.
fn check_sums(end: &End, broken: &mut Vec<String>) {
    let mut counts = Counts::default();
    for ended in end.jobs.values() {
        match ended.state {
            JobState::Succeeded => counts.succeeded += 1,
            JobState::Dead => counts.dead += 1,
            JobState::Cancelled => counts.cancelled += 1,
            other => broken.push(format!("{other:?} is no end")),
        }
    }
    if counts != end.counts {
        broken.push(format!(
            "the counters are {:?}, and the jobs {counts:?}",
            end.counts
        ));
    }
}
