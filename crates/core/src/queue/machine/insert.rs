//! Which of some new jobs may enter a batch, and how they do. Chunks and spawned jobs come this way.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::super::batch::Batch;
use super::super::job::{Job, Rare};
use super::super::lane::Lane;
use super::super::{
    BatchSeq, Budgets, DEPS_MAX, DeadReason, ItemResult, JobSeq, JobState, LABELS_MAX, LANES_MAX,
    NEEDS_MAX, NewJob, PRIORITY_MAX, StateName, TAG_BYTES_MAX,
};
use super::Machine;
use crate::error::FieldError;
use crate::id::{Fence, JobId, JobKey, ProjectId};

/// The longest traceparent that W3C Trace Context version 00 allows is 55 bytes; later versions may add some.
const TRACEPARENT_BYTES_MAX: usize = 128;

/// What is known of some new jobs before any of them enters.
pub(super) struct Plan {
    /// One verdict for each job.
    pub verdicts: Vec<ItemResult>,
    /// For each accepted job what it depends on.
    deps: Vec<Vec<Dep>>,
    /// The accepted jobs, each after the accepted ones that it depends on.
    order: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dep {
    /// Another of the new jobs.
    Here(usize),
    /// A job that is in the queue.
    There(JobSeq),
}

impl Plan {
    /// Rejects what would be accepted; what is there stays as it is.
    pub fn refuse_new(&mut self, error: &FieldError) {
        for verdict in &mut self.verdicts {
            if *verdict == ItemResult::Accepted {
                *verdict = ItemResult::Rejected(error.clone());
            }
        }
    }
}

impl Machine {
    /// Looks at every new job by itself, then at what they depend on.
    pub(super) fn plan(&self, batch: BatchSeq, jobs: &[NewJob]) -> Plan {
        let batch = &self.batches[&batch];
        let project = &self.projects[&batch.project].id;
        let mut first_by_id: HashMap<&JobId, usize> = HashMap::with_capacity(jobs.len());
        let mut verdicts = Vec::with_capacity(jobs.len());
        let mut lanes_new = BTreeSet::new();
        for (n, job) in jobs.iter().enumerate() {
            let first = *first_by_id.entry(&job.id).or_insert(n);
            let verdict = if first < n {
                Err(FieldError::new(
                    "id",
                    &job.id,
                    "must be unique within the chunk",
                ))
            } else {
                self.check_new(batch, job, &mut lanes_new)
            };
            verdicts.push(verdict.unwrap_or_else(ItemResult::Rejected));
        }
        let mut plan = Plan {
            deps: vec![Vec::new(); jobs.len()],
            order: Vec::new(),
            verdicts,
        };
        for (n, job) in jobs.iter().enumerate() {
            if plan.verdicts[n] != ItemResult::Accepted {
                continue;
            }
            match self.find_deps(batch, project, job, &first_by_id) {
                Ok(deps) => plan.deps[n] = deps,
                Err(error) => plan.verdicts[n] = ItemResult::Rejected(error),
            }
        }
        plan.sort_out(jobs);
        plan
    }

    fn check_new(
        &self,
        batch: &Batch,
        job: &NewJob,
        lanes_new: &mut BTreeSet<Lane>,
    ) -> Result<ItemResult, FieldError> {
        if let Some(seq) = batch.jobs.get(&job.id) {
            if self.jobs[seq].digest == job.spec_digest {
                return Ok(ItemResult::AlreadyThere);
            }
            return Err(FieldError::new(
                "id",
                &job.id,
                "is taken in this batch by a job with another spec",
            ));
        }
        check_fields(job)?;
        if job.needs.is_empty() {
            return Ok(ItemResult::Accepted);
        }
        let lane = Lane {
            kind: job.kind,
            needs: job.needs.clone(),
        };
        let known = self.lanes.contains(&lane) || lanes_new.contains(&lane);
        if !known && self.lanes.len() + lanes_new.len() >= LANES_MAX {
            let needs: Vec<_> = job.needs.iter().map(String::as_str).collect();
            let rule = format!("is one combination too many: a queue has at most {LANES_MAX}");
            return Err(FieldError::new("needs", needs.join(" "), rule));
        }
        lanes_new.insert(lane);
        Ok(ItemResult::Accepted)
    }

    fn find_deps(
        &self,
        batch: &Batch,
        project: &ProjectId,
        job: &NewJob,
        here: &HashMap<&JobId, usize>,
    ) -> Result<Vec<Dep>, FieldError> {
        let find = |key: &JobKey| {
            if key.project != *project {
                return Err("must be in the project of the job");
            }
            if let Some(seq) = self.find_job(key) {
                return Ok(Dep::There(seq));
            }
            let here = here.get(&key.job).filter(|_| key.batch == batch.id);
            here.map(|n| Dep::Here(*n))
                .ok_or("must be in the queue already or in the same chunk")
        };
        let mut deps = Vec::with_capacity(job.deps.len());
        for (n, key) in job.deps.iter().enumerate() {
            let dep = find(key).map_err(|rule| FieldError::new(format!("deps[{n}]"), key, rule))?;
            deps.push(dep);
        }
        deps.sort_unstable();
        deps.dedup();
        Ok(deps)
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
            self.dependents.entry(*dep).or_default().push(seq);
        }
        let lane = self.lanes.enter(Lane {
            kind: new.kind,
            needs: new.needs,
        });
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

impl Plan {
    /// Orders the accepted jobs by their dependencies, and rejects those that depend on a rejected one or on
    /// themselves.
    fn sort_out(&mut self, jobs: &[NewJob]) {
        let mut needed_by: Vec<Vec<usize>> = vec![Vec::new(); jobs.len()];
        let mut waits_for = vec![0usize; jobs.len()];
        for (n, deps) in self.deps.iter().enumerate() {
            for dep in deps {
                // A twin of a job that is in the queue was found there, so that these are accepted or rejected ones.
                if let Dep::Here(other) = dep {
                    needed_by[*other].push(n);
                    waits_for[n] += 1;
                }
            }
        }
        let rejected = |v: &ItemResult| matches!(v, ItemResult::Rejected(_));
        let bad: Vec<_> = (0..jobs.len())
            .filter(|n| rejected(&self.verdicts[*n]))
            .collect();
        self.reject_dependents(bad, &needed_by, jobs);

        let mut next: VecDeque<_> = (0..jobs.len())
            .filter(|n| self.verdicts[*n] == ItemResult::Accepted && waits_for[*n] == 0)
            .collect();
        let mut placed = vec![false; jobs.len()];
        while let Some(n) = next.pop_front() {
            placed[n] = true;
            self.order.push(n);
            for dependent in &needed_by[n] {
                waits_for[*dependent] -= 1;
                if waits_for[*dependent] == 0 && !rejected(&self.verdicts[*dependent]) {
                    next.push_back(*dependent);
                }
            }
        }
        let left: Vec<_> = (0..jobs.len())
            .filter(|n| self.verdicts[*n] == ItemResult::Accepted && !placed[*n])
            .collect();
        self.reject_cycles(left, &needed_by, jobs);
    }

    /// `left` are the jobs of cycles and those behind them. Those that nothing in `left` needs are behind.
    fn reject_cycles(&mut self, left: Vec<usize>, needed_by: &[Vec<usize>], jobs: &[NewJob]) {
        let mut in_cycle = vec![false; jobs.len()];
        left.iter().for_each(|n| in_cycle[*n] = true);
        let mut users = vec![0usize; jobs.len()];
        for n in &left {
            users[*n] = needed_by[*n].iter().filter(|d| in_cycle[**d]).count();
        }
        let mut behind: Vec<_> = left.iter().copied().filter(|n| users[*n] == 0).collect();
        while let Some(n) = behind.pop() {
            in_cycle[n] = false;
            for dep in &self.deps[n] {
                if let Dep::Here(other) = dep
                    && in_cycle[*other]
                {
                    users[*other] -= 1;
                    if users[*other] == 0 {
                        behind.push(*other);
                    }
                }
            }
        }
        let cyclic: Vec<_> = left.into_iter().filter(|n| in_cycle[*n]).collect();
        for n in &cyclic {
            let rule = "must not depend on itself, directly or through other jobs";
            let error = FieldError::new("deps", &jobs[*n].id, rule);
            self.verdicts[*n] = ItemResult::Rejected(error);
        }
        self.reject_dependents(cyclic, needed_by, jobs);
    }

    /// Rejects every accepted job that depends on one of `bad`, directly or not.
    fn reject_dependents(
        &mut self,
        mut bad: Vec<usize>,
        needed_by: &[Vec<usize>],
        jobs: &[NewJob],
    ) {
        while let Some(n) = bad.pop() {
            for dependent in &needed_by[n] {
                if self.verdicts[*dependent] == ItemResult::Accepted {
                    let rule = "must not name a job that was rejected";
                    let error = FieldError::new("deps", &jobs[n].id, rule);
                    self.verdicts[*dependent] = ItemResult::Rejected(error);
                    bad.push(*dependent);
                }
            }
        }
    }
}

fn check_fields(job: &NewJob) -> Result<(), FieldError> {
    at_most("priority", u64::from(job.priority), u64::from(PRIORITY_MAX))?;
    at_most("needs", job.needs.len() as u64, NEEDS_MAX as u64)?;
    at_most("labels", job.labels.len() as u64, LABELS_MAX as u64)?;
    at_most("deps", job.deps.len() as u64, DEPS_MAX as u64)?;
    for (field, budget) in [
        ("max_attempts", job.max_attempts),
        ("max_infra", job.max_infra),
    ] {
        if budget == 0 {
            return Err(FieldError::new(field, budget, "must be at least 1"));
        }
    }
    for tag in &job.needs {
        check_text("needs", tag)?;
    }
    for (key, value) in &job.labels {
        check_text("labels", key)?;
        if !value.is_empty() {
            check_text(&format!("labels.{key}"), value)?;
        }
    }
    if let Some(traceparent) = &job.traceparent
        && traceparent.len() > TRACEPARENT_BYTES_MAX
    {
        return Err(FieldError::new(
            "traceparent",
            traceparent,
            format!("must have at most {TRACEPARENT_BYTES_MAX} bytes"),
        ));
    }
    if job.max_runtime.is_some_and(|max| max.is_zero()) {
        return Err(FieldError::new(
            "max_runtime",
            "0",
            "must be more than zero",
        ));
    }
    Ok(())
}

fn at_most(field: &str, found: u64, max: u64) -> Result<(), FieldError> {
    if found <= max {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        found,
        format!("must be at most {max}"),
    ))
}

fn check_text(field: &str, text: &str) -> Result<(), FieldError> {
    let clean = !text.is_empty() && !text.chars().any(char::is_control);
    if clean && text.len() <= TAG_BYTES_MAX {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        text.escape_debug(),
        format!("must be 1 to {TAG_BYTES_MAX} bytes without control characters"),
    ))
}
