//! What is over is forgotten: complete batches lose their names, then their jobs, some at a time; batches that were left
//! open are closed.

use std::collections::BTreeSet;

use super::super::{BatchSeq, JobSeq, JobState, Refusal};
use super::Machine;
use crate::error::FieldError;
use crate::id::{BatchId, JobId, ProjectId};
use crate::time::Timestamp;

impl Machine {
    /// Batches that have been complete since `before` or longer, oldest first, at most `limit`.
    pub fn purgeable(&self, before: Timestamp, limit: usize) -> Vec<(ProjectId, BatchId)> {
        let mut due: Vec<_> = self
            .batches
            .values()
            .filter(|batch| !batch.purging)
            .filter_map(|batch| Some((batch.completed_at?, batch)))
            .filter(|(completed_at, _)| *completed_at <= before)
            .collect();
        due.sort_by_key(|(completed_at, batch)| (*completed_at, batch.seq));
        due.truncate(limit);
        due.into_iter()
            .map(|(_, batch)| (self.projects[&batch.project].id.clone(), batch.id.clone()))
            .collect()
    }

    /// Closes batches that are open and in which nothing has happened since `before`: no job of theirs is active, the
    /// last end was earlier, and those without a job were opened earlier. At most `limit`, oldest first.
    pub fn close_idle(
        &mut self,
        now: Timestamp,
        before: Timestamp,
        limit: usize,
    ) -> Vec<(ProjectId, BatchId)> {
        self.advance(now);
        let is_idle = |batch: &&super::Batch| {
            let last = batch.ended.last_key_value();
            let last = last.and_then(|(_, job)| self.jobs.get(job));
            let since = last.map_or(batch.opened_at, |job| job.changed_at);
            !batch.closed && batch.counters.active() == 0 && since <= before
        };
        let idle = self.batches.values().filter(is_idle).take(limit);
        let idle: Vec<BatchSeq> = idle.map(|batch| batch.seq).collect();
        let mut closed = Vec::with_capacity(idle.len());
        for seq in idle {
            self.close(seq);
            let batch = &self.batches[&seq];
            let project = self.projects[&batch.project].id.clone();
            closed.push((project, batch.id.clone()));
        }
        closed
    }

    /// Forgets a complete batch with all its jobs. Returns how many those were.
    pub fn purge_batch(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<u64, Refusal> {
        let seq = self.forget_name(now, project, batch)?;
        let jobs = self.purge_jobs(seq, usize::MAX);
        self.purge_if_empty(seq);
        Ok(jobs as u64)
    }

    /// Takes the name of a complete batch away, so that nobody finds it any more. [`Machine::purge_some`] removes what
    /// is left of it.
    pub fn forget_name(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<BatchSeq, Refusal> {
        self.advance(now);
        let seq = self.find_batch(project, batch)?;
        let Some(found) = self.batches.get_mut(&seq) else {
            return Ok(seq);
        };
        if found.completed_at.is_none() {
            let rule = "must be complete before it can be purged";
            return Err(FieldError::new("batch", batch, rule).into());
        }
        found.purging = true;
        self.purging.insert(seq);
        self.dirty.batches.insert(seq);
        if let Some(project) = self.projects.get_mut(&found.project) {
            project.batches.remove(batch);
            project.in_order.remove(&seq);
        }
        Ok(seq)
    }

    /// Removes some `jobs_max` jobs of batches that have no name any more. Returns whether there are more.
    pub fn purge_some(&mut self, jobs_max: usize) -> bool {
        let mut left = jobs_max;
        while let Some(seq) = self.purging.first().copied()
            && left > 0
        {
            let gone = self.purge_jobs(seq, left);
            self.purge_if_empty(seq);
            // A batch without jobs is work as well.
            left = left.saturating_sub(gone.max(1));
        }
        !self.purging.is_empty()
    }

    /// Removes at most `max` jobs, and as many chunks, which are no more than the jobs. Returns how many jobs went.
    fn purge_jobs(&mut self, batch_seq: BatchSeq, max: usize) -> usize {
        let Some(batch) = self.batches.get_mut(&batch_seq) else {
            return 0;
        };
        let mut gone: Vec<(JobId, JobSeq)> = Vec::new();
        while gone.len() < max
            && let Some(entry) = batch.jobs.pop_first()
        {
            gone.push(entry);
        }
        let mut chunks = 0;
        while chunks < max
            && let Some((n, _)) = batch.chunks.pop_first()
        {
            self.dirty.chunks.insert((batch_seq, n));
            chunks += 1;
        }
        self.take_out_met_deps(batch_seq, gone.iter().map(|(_, seq)| *seq));
        for (_, seq) in &gone {
            self.dependents.remove(seq);
        }
        for (_, seq) in &gone {
            self.purge_job(batch_seq, *seq);
        }
        gone.len()
    }

    fn purge_job(&mut self, batch_seq: BatchSeq, seq: JobSeq) {
        let (Some(job), Some(batch)) = (self.jobs.remove(&seq), self.batches.get_mut(&batch_seq))
        else {
            return;
        };
        self.lanes.leave(job.lane, batch.project);
        for dep in job.deps() {
            if let Some(dependents) = self.dependents.get_mut(dep) {
                dependents.remove(&seq);
            }
        }
        batch.counters.remove(job.state.name());
        if let Some(end) = job.state.end() {
            batch.ended.remove(&end.seq);
        }
        if let Some(project) = self.projects.get_mut(&batch.project) {
            project.counters[job.kind.index()].remove(job.state.name());
        }
        self.dirty.jobs_deleted.push(seq);
    }

    fn purge_if_empty(&mut self, seq: BatchSeq) {
        if self.batches.get(&seq).is_none_or(|b| !b.jobs.is_empty()) {
            return;
        }
        let Some(batch) = self.batches.remove(&seq) else {
            return;
        };
        self.purging.remove(&seq);
        self.dirty.batches.insert(seq);
        let chunks = batch.chunks.keys().map(|n| (seq, *n));
        self.dirty.chunks.extend(chunks);
        let of_project = |other: &BatchSeq| self.batches[other].project == batch.project;
        let has_more = self.purging.iter().any(of_project);
        if let Some(project) = self.projects.get(&batch.project)
            && project.batches.is_empty()
            && !has_more
        {
            self.project_by_id.remove(&project.id);
            self.projects.remove(&batch.project);
            self.ready.forget(batch.project);
        }
    }

    /// Jobs of other batches may depend on succeeded jobs of a batch that goes: what has been met needs no mention.
    /// What ended badly stays, and a job that names it stays dead.
    fn take_out_met_deps(&mut self, batch: BatchSeq, jobs: impl Iterator<Item = JobSeq>) {
        let succeeded: BTreeSet<JobSeq> = jobs
            .filter(|seq| matches!(self.jobs[seq].state, JobState::Succeeded(_)))
            .collect();
        let affected: BTreeSet<JobSeq> = succeeded
            .iter()
            .filter_map(|seq| self.dependents.get(seq))
            .flatten()
            .copied()
            .collect();
        for seq in affected {
            let Some(job) = self.jobs.get_mut(&seq).filter(|job| job.batch != batch) else {
                continue;
            };
            if let Some(rare) = &mut job.rare {
                rare.deps.retain(|dep| !succeeded.contains(dep));
            }
            self.mark_dirty(seq);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{JobKind, MachineConfig, NewBatch, NewJob, PROJECT_LANES_MAX};
    use super::super::check::check;
    use super::*;
    use crate::queue::Selector;

    fn machine_of(jobs: usize) -> (Machine, ProjectId, BatchId) {
        let mut machine = Machine::new(MachineConfig::default());
        let (project, batch): (ProjectId, BatchId) = ("p".parse().unwrap(), "b".parse().unwrap());
        let new = NewBatch {
            project: project.clone(),
            batch: batch.clone(),
            params_digest: [0; 32],
        };
        machine.open_batch(Timestamp(1), &new).unwrap();
        let job = |n: usize| {
            let mut job = NewJob::new(format!("j{n}").parse().unwrap(), JobKind::Rollout, [0; 32]);
            job.needs = [format!("n{}", n % PROJECT_LANES_MAX)].into();
            job
        };
        let jobs = (0..jobs).map(job).collect();
        let (at, digest) = (Timestamp(2), [0; 32]);
        machine
            .submit(at, &project, &batch, 0, digest, jobs)
            .unwrap();
        (machine, project, batch)
    }

    #[test]
    fn a_batch_goes_page_by_page_and_its_name_first() {
        let (mut machine, project, batch) = machine_of(25);
        let all = Selector::Batch(project.clone(), batch.clone());
        machine.cancel(Timestamp(3), &all).unwrap();
        machine.take_changes();
        let now = Timestamp(4);
        machine.forget_name(now, &project, &batch).unwrap();
        assert!(machine.batch(&project, &batch).is_err());
        assert_eq!(machine.purgeable(now, 10), []);
        let mut steps = Vec::new();
        loop {
            let more = machine.purge_some(10);
            check(&machine);
            steps.push(machine.take_changes().jobs.len());
            if !more {
                break;
            }
        }
        assert_eq!(steps, [10, 10, 5]);
        assert!(machine.stats(now).lines.is_empty());
    }

    #[test]
    fn only_batches_in_which_nothing_happens_are_closed() {
        let (mut machine, project, batch) = machine_of(1);
        let idle = |machine: &mut Machine, before| {
            let now = Timestamp(before + 10);
            let closed = machine.close_idle(now, Timestamp(before), 10);
            check(machine);
            closed
        };
        assert_eq!(idle(&mut machine, 30), [], "a job waits");
        let key = crate::id::JobKey::new(project.clone(), batch.clone(), "j0".parse().unwrap());
        machine.cancel(Timestamp(50), &Selector::Job(key)).unwrap();
        assert_eq!(idle(&mut machine, 49), [], "its end was later");
        assert_eq!(idle(&mut machine, 50), [(project.clone(), batch.clone())]);
        let view = machine.batch(&project, &batch).unwrap();
        assert!(view.closed && !view.cancelled);
        assert_eq!(view.completed_at, Some(Timestamp(60)));
    }
}
