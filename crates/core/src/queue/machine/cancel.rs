//! Operators' commands: cancel what is not done, requeue what is dead.

use std::collections::VecDeque;

use super::super::{BatchSeq, Cancelled, Event, JobSeq, JobState, Refusal, Selector, StateName};
use super::Machine;
use crate::id::ProjectId;
use crate::time::Timestamp;

impl Machine {
    /// Cancels what waits; asks the workers of what runs to stop. A batch that is cancelled is closed as well, and
    /// what its running jobs spawn is cancelled on arrival.
    pub fn cancel(&mut self, now: Timestamp, which: &Selector) -> Result<Cancelled, Refusal> {
        self.advance(now);
        let jobs = self.select(which, |state| !state.is_terminal())?;
        if let Selector::Batch(project, batch) = which {
            let seq = self.find_batch(project, batch)?;
            if let Some(batch) = self.batches.get_mut(&seq) {
                batch.cancelled = true;
                self.dirty.batches.insert(seq);
            }
            self.close(seq);
        }
        let mut done = Cancelled::default();
        for seq in jobs {
            if self.jobs[&seq].lease().is_none() {
                self.end(seq, JobState::Cancelled);
                done.cancelled += 1;
            } else {
                self.request_cancel(seq);
                done.requested += 1;
            }
        }
        self.settle_dependents();
        Ok(done)
    }

    /// Puts dead jobs back with fresh budgets, and with them those that died only because of them. A job stays dead
    /// as long as something that it depends on does, or was cancelled. Returns how many are back.
    pub fn requeue_dead(&mut self, now: Timestamp, which: &Selector) -> Result<u64, Refusal> {
        self.advance(now);
        let dead = self.select(which, |state| state == StateName::Dead)?;
        let mut queue = VecDeque::from(dead);
        let mut back = 0;
        while let Some(seq) = queue.pop_front() {
            let job = &self.jobs[&seq];
            let is_dead = matches!(job.state, JobState::Dead { .. });
            if !is_dead || job.deps().iter().any(|dep| self.ended_badly(*dep)) {
                continue;
            }
            if let Some(job) = self.jobs.get_mut(&seq) {
                job.budgets.failures = 0;
                job.budgets.infra = 0;
            }
            self.set_waiting(seq);
            back += 1;
            let dependents = self.dependents.get(&seq).into_iter().flatten().copied();
            queue.extend(dependents.filter(|dependent| self.died_of_dependency(*dependent)));
        }
        Ok(back)
    }

    fn request_cancel(&mut self, seq: JobSeq) {
        let Some(job) = self.jobs.get_mut(&seq) else {
            return;
        };
        let JobState::Leased(lease) = &mut job.state else {
            return;
        };
        if std::mem::replace(&mut lease.cancel_requested, true) {
            return;
        }
        let (worker, fence) = (lease.worker.clone(), lease.fence);
        self.mark_dirty(seq);
        let key = self.key_of(&self.jobs[&seq]);
        self.events
            .push(Event::CancelRequested { worker, key, fence });
    }

    /// The jobs that `which` means and whose state `wanted` lets through, in the order of their submission.
    fn select(
        &self,
        which: &Selector,
        wanted: impl Fn(StateName) -> bool,
    ) -> Result<Vec<JobSeq>, Refusal> {
        let mut found = match which {
            Selector::Job(key) => {
                let unknown = || Refusal::UnknownJob(key.clone());
                vec![self.find_job(key).ok_or_else(unknown)?]
            }
            Selector::Batch(project, batch) => self.jobs_of(self.find_batch(project, batch)?),
            Selector::Label {
                project,
                key,
                value,
            } => {
                let of_project = self.batches_of(project);
                let mut jobs: Vec<_> = of_project.flat_map(|b| self.jobs_of(b)).collect();
                jobs.retain(|seq| self.jobs[seq].has_label(key, value));
                jobs
            }
        };
        found.retain(|seq| wanted(self.jobs[seq].state.name()));
        found.sort_unstable();
        Ok(found)
    }

    fn jobs_of(&self, batch: BatchSeq) -> Vec<JobSeq> {
        self.batches[&batch].jobs.values().copied().collect()
    }

    fn batches_of(&self, project: &ProjectId) -> impl Iterator<Item = BatchSeq> + '_ {
        let project = self.project_by_id.get(project);
        let project = project.and_then(|seq| self.projects.get(seq));
        project
            .into_iter()
            .flat_map(|project| project.batches.values().copied())
    }
}
