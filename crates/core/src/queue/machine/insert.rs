//! How new jobs enter a batch. Chunks and spawned jobs come this way.

use std::collections::BTreeSet;

use super::super::batch::Batch;
use super::super::job::{Job, Rare};
use super::super::lane::Lane;
use super::super::plan::{self, Dep, Known};
use super::super::{
    BatchSeq, Budgets, DeadReason, ItemResult, JobSeq, JobState, LANES_MAX, NewJob,
    PROJECT_LANES_MAX, StateName,
};
use super::Machine;
use crate::id::{Fence, JobId, JobKey};

/// The verdicts on some new jobs of a machine's batch.
pub(super) type Plan = plan::Plan<JobSeq>;

/// A machine as new jobs of one batch see it.
struct Seen<'a> {
    machine: &'a Machine,
    batch: &'a Batch,
    /// Lanes that the project has not had jobs in.
    lanes_new: BTreeSet<Lane>,
}

impl Known for Seen<'_> {
    type Job = JobSeq;

    fn digest(&self, id: &JobId) -> Option<[u8; 32]> {
        let seq = self.batch.jobs.get(id)?;
        Some(self.machine.jobs[seq].digest)
    }

    fn find(&self, key: &JobKey) -> Option<JobSeq> {
        self.machine.find_job(key)
    }

    fn enter_lane(&mut self, job: &NewJob) -> bool {
        if job.needs.is_empty() {
            return true;
        }
        let lane = Lane {
            kind: job.kind,
            needs: job.needs.clone(),
        };
        let (lanes, project) = (&self.machine.lanes, self.batch.project);
        if self.lanes_new.contains(&lane) || lanes.has(project, &lane) {
            return true;
        }
        let added = self.lanes_new.len();
        let fits = lanes.with_needs(project) + added < PROJECT_LANES_MAX
            && (lanes.contains(&lane) || lanes.len() + added < LANES_MAX);
        if fits {
            self.lanes_new.insert(lane);
        }
        fits
    }
}

impl Machine {
    /// Looks at every new job by itself, then at what they depend on.
    pub(super) fn plan(&self, batch: BatchSeq, jobs: &[NewJob]) -> Plan {
        let batch = &self.batches[&batch];
        let project = &self.projects[&batch.project].id;
        let mut seen = Seen {
            machine: self,
            batch,
            lanes_new: BTreeSet::new(),
        };
        plan::plan(&mut seen, project, &batch.id, jobs)
    }

    /// Lets the accepted jobs of `plan` enter. Returns their positions and numbers, by position.
    pub(super) fn insert(
        &mut self,
        batch: BatchSeq,
        jobs: Vec<NewJob>,
        plan: &Plan,
    ) -> Vec<(usize, JobSeq)> {
        let mut numbers: Vec<Option<JobSeq>> = vec![None; jobs.len()];
        let mut added = Vec::with_capacity(plan.order.len());
        for (n, number) in numbers.iter_mut().enumerate() {
            if plan.verdicts[n] == ItemResult::Accepted {
                let seq = JobSeq(self.next_job);
                self.next_job += 1;
                *number = Some(seq);
                added.push((n, seq));
            }
        }
        self.dirty.meta |= !added.is_empty();
        for (n, job) in jobs.into_iter().enumerate() {
            let Some(seq) = numbers[n] else { continue };
            let deps = plan.deps[n].iter().filter_map(|dep| match dep {
                Dep::Here(other) => numbers[*other],
                Dep::There(seq) => Some(*seq),
            });
            let deps = deps.collect();
            self.insert_one(batch, seq, job, deps);
        }
        let in_order = plan.order.iter().filter_map(|n| numbers[*n]);
        for seq in in_order {
            self.settle_new(seq);
        }
        self.settle_dependents();
        added
    }

    fn insert_one(&mut self, batch_seq: BatchSeq, seq: JobSeq, new: NewJob, deps: Vec<JobSeq>) {
        for dep in &deps {
            self.dependents.entry(*dep).or_default().insert(seq);
        }
        let lane = Lane {
            kind: new.kind,
            needs: new.needs,
        };
        let lane = self.lanes.enter(lane, self.batches[&batch_seq].project);
        let rare = Rare {
            deps,
            not_before: new.not_before,
            labels: new.labels,
            traceparent: new.traceparent,
            error: None,
        };
        let max_runtime_us = new.max_runtime.map_or(0, |max| {
            u64::try_from(max.as_micros()).unwrap_or(u64::MAX).max(1)
        });
        let job = Job {
            id: new.id.clone(),
            batch: batch_seq,
            lane,
            kind: new.kind,
            priority: new.priority,
            budgets: Budgets {
                max_attempts: new.max_attempts,
                max_infra: new.max_infra,
                failures: 0,
                infra: 0,
            },
            starts: 0,
            state: JobState::Blocked,
            submitted_at: self.now,
            changed_at: self.now,
            settled: Fence(0),
            max_runtime_us,
            digest: new.spec_digest,
            waits_for: 0,
            dirty: true,
            rare: (rare != Rare::default()).then(|| Box::new(rare)),
        };
        self.jobs.insert(seq, Box::new(job));
        self.dirty.jobs.push(seq);
        if let Some(batch) = self.batches.get_mut(&batch_seq) {
            batch.jobs.insert(new.id, seq);
            batch.counters.add(StateName::Blocked);
            if let Some(project) = self.projects.get_mut(&batch.project) {
                project.counters[new.kind.index()].add(StateName::Blocked);
            }
        }
    }

    /// Gives a job that has just entered its first state. What it depends on has one already.
    fn settle_new(&mut self, seq: JobSeq) {
        let job = &self.jobs[&seq];
        let waits_for = self.unmet(job.deps());
        let doomed = job.deps().iter().any(|dep| self.ended_badly(*dep));
        let cancelled = self.batches[&job.batch].cancelled;
        if let Some(job) = self.jobs.get_mut(&seq) {
            job.waits_for = waits_for;
        }
        if cancelled {
            return self.end(seq, JobState::Cancelled);
        }
        if doomed {
            return self.end(seq, |end| JobState::Dead {
                end,
                reason: DeadReason::Dependency,
            });
        }
        self.set_waiting(seq);
    }

    /// How many of `deps` have not succeeded. One that was purged had not, or it would have been taken out.
    pub(super) fn unmet(&self, deps: &[JobSeq]) -> u32 {
        let unmet = |dep: &&JobSeq| {
            let job = self.jobs.get(dep);
            !job.is_some_and(|job| matches!(job.state, JobState::Succeeded(_)))
        };
        deps.iter().filter(unmet).count() as u32
    }

    /// Whether a dependency can no longer succeed unless it is requeued.
    pub(super) fn ended_badly(&self, dep: JobSeq) -> bool {
        self.jobs
            .get(&dep)
            .is_none_or(|job| matches!(job.state, JobState::Dead { .. } | JobState::Cancelled(_)))
    }
}
