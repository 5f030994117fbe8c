//! Which of some new jobs may enter a batch: each is looked at by itself, then by what it depends on.
//!
//! Chunks and spawned jobs come this way in every backend. What is in the queue already is asked through [`Known`];
//! nothing here changes anything.

use std::collections::{HashMap, VecDeque};

use super::{
    DEPS_MAX, ItemResult, LABELS_MAX, LANES_MAX, NEEDS_MAX, NewJob, PRIORITY_MAX,
    PROJECT_LANES_MAX, TAG_BYTES_MAX,
};
use crate::error::FieldError;
use crate::id::{BatchId, JobId, JobKey, ProjectId};

/// The longest traceparent that W3C Trace Context version 00 allows is 55 bytes; later versions may add some.
const TRACEPARENT_BYTES_MAX: usize = 128;

/// What is in the queue, as far as new jobs are concerned.
pub trait Known {
    /// How the queue names a job of its own.
    type Job: Clone + Ord;

    /// The digest of the job of that name in the batch that the new jobs enter.
    fn digest(&self, id: &JobId) -> Option<[u8; 32]>;

    /// A job of the same project.
    fn find(&self, key: &JobKey) -> Option<Self::Job>;

    /// Takes note of the job's pair of kind and needs; false: the project has [`PROJECT_LANES_MAX`] others, or the
    /// queue [`LANES_MAX`]. A queue that finds that out when the job enters says true.
    fn enter_lane(&mut self, job: &NewJob) -> bool;
}

/// What a new job depends on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dep<J> {
    /// Another of the new jobs, by position.
    Here(usize),
    /// A job that is in the queue.
    There(J),
}

/// What is known of some new jobs before any of them enters.
#[derive(Clone, Debug)]
pub struct Plan<J> {
    /// One verdict for each job.
    pub verdicts: Vec<ItemResult>,
    /// For each accepted job what it depends on, without repetition.
    pub deps: Vec<Vec<Dep<J>>>,
    /// The accepted jobs, each after the accepted ones that it depends on.
    pub order: Vec<usize>,
}

/// Looks at every new job of a batch by itself, then at what they depend on.
pub fn plan<K: Known>(
    known: &mut K,
    project: &ProjectId,
    batch: &BatchId,
    jobs: &[NewJob],
) -> Plan<K::Job> {
    let mut here: HashMap<&JobId, usize> = HashMap::with_capacity(jobs.len());
    let mut verdicts = Vec::with_capacity(jobs.len());
    for (n, job) in jobs.iter().enumerate() {
        let first = *here.entry(&job.id).or_insert(n);
        let verdict = if first < n {
            Err(FieldError::new(
                "id",
                &job.id,
                "must be unique within the chunk",
            ))
        } else {
            check_new(known, job)
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
        match find_deps(known, project, batch, job, &here) {
            Ok(deps) => plan.deps[n] = deps,
            Err(error) => plan.verdicts[n] = ItemResult::Rejected(error),
        }
    }
    plan.sort_out(jobs);
    plan
}

/// The refusal of a job whose name in the batch belongs to another.
pub fn name_taken(job: &NewJob) -> FieldError {
    let rule = "is taken in this batch by a job with another spec";
    FieldError::new("id", &job.id, rule)
}

/// The refusal of a job for whose pair of kind and needs there is no room.
pub fn too_many_lanes(job: &NewJob) -> FieldError {
    let needs: Vec<_> = job.needs.iter().map(String::as_str).collect();
    let rule = format!(
        "is one combination too many: a project has at most {PROJECT_LANES_MAX}, a queue {LANES_MAX}"
    );
    FieldError::new("needs", needs.join(" "), rule)
}

/// The refusal of a job whose dependency number `n`, `key`, is not in the queue.
pub fn unknown_dep(n: usize, key: &JobKey) -> FieldError {
    let rule = "must be in the queue already or in the same chunk";
    FieldError::new(format!("deps[{n}]"), key, rule)
}

fn check_new<K: Known>(known: &mut K, job: &NewJob) -> Result<ItemResult, FieldError> {
    match known.digest(&job.id) {
        Some(digest) if digest == job.spec_digest => return Ok(ItemResult::AlreadyThere),
        Some(_) => return Err(name_taken(job)),
        None => {}
    }
    check_fields(job)?;
    if known.enter_lane(job) {
        Ok(ItemResult::Accepted)
    } else {
        Err(too_many_lanes(job))
    }
}

fn find_deps<K: Known>(
    known: &K,
    project: &ProjectId,
    batch: &BatchId,
    job: &NewJob,
    here: &HashMap<&JobId, usize>,
) -> Result<Vec<Dep<K::Job>>, FieldError> {
    let mut deps = Vec::with_capacity(job.deps.len());
    for (n, key) in job.deps.iter().enumerate() {
        if key.project != *project {
            let rule = "must be in the project of the job";
            return Err(FieldError::new(format!("deps[{n}]"), key, rule));
        }
        let dep = match known.find(key) {
            Some(there) => Dep::There(there),
            None => {
                let here = here.get(&key.job).filter(|_| key.batch == *batch);
                Dep::Here(*here.ok_or_else(|| unknown_dep(n, key))?)
            }
        };
        deps.push(dep);
    }
    deps.sort_unstable();
    deps.dedup();
    Ok(deps)
}

impl<J> Plan<J> {
    /// Rejects what would be accepted; what is there stays as it is.
    pub fn refuse_new(&mut self, error: &FieldError) {
        for verdict in &mut self.verdicts {
            if *verdict == ItemResult::Accepted {
                *verdict = ItemResult::Rejected(error.clone());
            }
        }
    }

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
