//! Operators' commands: cancel what is not done, requeue what is dead.

use super::super::{BatchSeq, Cancelled, Event, JobSeq, JobState, Refusal, Selector, StateName};
use super::Machine;
use super::pages::{Cursor, Place};
use crate::time::Timestamp;

impl Machine {
    /// Cancels what waits; asks the workers of what runs to stop. A batch that is cancelled is closed as well, and
    /// what its running jobs spawn is cancelled on arrival.
    pub fn cancel(&mut self, now: Timestamp, which: &Selector) -> Result<Cancelled, Refusal> {
        self.cancel_some(now, which, &mut Cursor::default(), usize::MAX)
    }

    /// The same, looking at `rows_max` jobs at most. The batch is closed before any of its jobs is looked at.
    pub fn cancel_some(
        &mut self,
        now: Timestamp,
        which: &Selector,
        cursor: &mut Cursor,
        rows_max: usize,
    ) -> Result<Cancelled, Refusal> {
        self.advance(now);
        let first = cursor.place == Place::Start;
        let mut jobs = self.select(which, &mut cursor.place, rows_max)?;
        jobs.retain(|seq| !self.jobs[seq].state.name().is_terminal());
        let whole = match which {
            Selector::Batch(project, batch) => Some(self.find_batch(project, batch)?),
            _ => None,
        };
        if let Some(seq) = whole.filter(|_| first) {
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
        let before = self.cancelled_of(whole);
        self.settle_dependents();
        // What of the batch waited for these is cancelled with them, before its own page.
        done.cancelled += self.cancelled_of(whole) - before;
        Ok(done)
    }

    fn cancelled_of(&self, batch: Option<BatchSeq>) -> u64 {
        let batch = batch.and_then(|seq| self.batches.get(&seq));
        batch.map_or(0, |batch| batch.counters.get(StateName::Cancelled))
    }

    /// Puts dead jobs back with fresh budgets, and with them those that died only because of them. A job stays dead
    /// as long as something that it depends on does, or was cancelled. Returns how many are back.
    pub fn requeue_dead(&mut self, now: Timestamp, which: &Selector) -> Result<u64, Refusal> {
        self.requeue_some(now, which, &mut Cursor::default(), usize::MAX)
    }

    /// The same, looking at `rows_max` jobs at most; those that come back with others may come in a later page.
    pub fn requeue_some(
        &mut self,
        now: Timestamp,
        which: &Selector,
        cursor: &mut Cursor,
        rows_max: usize,
    ) -> Result<u64, Refusal> {
        self.advance(now);
        if cursor.left.is_empty() {
            cursor
                .left
                .extend(self.select(which, &mut cursor.place, rows_max)?);
        }
        let mut back = 0;
        for _ in 0..rows_max {
            let Some(seq) = cursor.left.pop_front() else {
                break;
            };
            if !self.may_come_back(seq) {
                continue;
            }
            if let Some(job) = self.jobs.get_mut(&seq) {
                job.budgets.failures = 0;
                job.budgets.infra = 0;
            }
            self.set_waiting(seq);
            back += 1;
            let dependents = self.dependents.get(&seq).into_iter().flatten().copied();
            let behind = dependents.filter(|dependent| self.died_of_dependency(*dependent));
            cursor.left.extend(behind);
        }
        Ok(back)
    }

    /// Whether a job is dead and nothing that it depends on keeps it so. One whose batch is being forgotten, or that
    /// went with it since it was selected, stays as it is.
    fn may_come_back(&self, seq: JobSeq) -> bool {
        self.jobs.get(&seq).is_some_and(|job| {
            matches!(job.state, JobState::Dead { .. })
                && !self.batches[&job.batch].purging
                && !job.deps().iter().any(|dep| self.ended_badly(*dep))
        })
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
}
