//! The steps that every command is made of: a job moves from state to state, and what ends shows its effect on
//! those that wait for it. All indexes and counters are kept in step here and nowhere else.

use super::super::job::Job;
use super::super::ring::Place;
use super::super::{DeadReason, End, JobSeq, JobState, ProjectSeq};
use super::Machine;

impl Machine {
    /// Moves a job to a state: out of the indexes of the old one, into those of the new one, and on in the counters.
    pub(super) fn set_state(&mut self, seq: JobSeq, to: JobState) {
        let Some(job) = self.jobs.get_mut(&seq) else {
            return;
        };
        let Some(batch) = self.batches.get_mut(&job.batch) else {
            return;
        };
        let place = place_of(job, batch.project);
        match &job.state {
            JobState::Blocked => {}
            JobState::Ready => self.ready.remove(place, seq),
            JobState::Delayed { until } => {
                self.delayed.remove(&(*until, seq));
            }
            JobState::Leased(lease) => {
                self.deadlines.remove(&(lease.deadline, seq));
            }
            JobState::Succeeded(end) | JobState::Cancelled(end) | JobState::Dead { end, .. } => {
                batch.ended.remove(&end.seq);
            }
        }
        match &to {
            JobState::Blocked => {}
            JobState::Ready => {
                self.ready.push(place, seq);
                self.woken_lanes.insert((job.kind, job.lane));
            }
            JobState::Delayed { until } => {
                self.delayed.insert((*until, seq));
            }
            JobState::Leased(lease) => {
                self.deadlines.insert((lease.deadline, seq));
            }
            JobState::Succeeded(end) | JobState::Cancelled(end) | JobState::Dead { end, .. } => {
                batch.ended.insert(end.seq, seq);
            }
        }
        let (from_name, to_name) = (job.state.name(), to.name());
        job.state = to;
        job.changed_at = self.now;
        batch.counters.remove(from_name);
        batch.counters.add(to_name);
        if let Some(project) = self.projects.get_mut(&batch.project) {
            project.counters[job.kind.index()].remove(from_name);
            project.counters[job.kind.index()].add(to_name);
        }
        let batch_seq = job.batch;
        if !to_name.is_terminal() && batch.completed_at.take().is_some() {
            self.dirty.batches.insert(batch_seq);
        }
        self.mark_dirty(seq);
    }

    /// Ends a job. Its dependents are looked at by [`Machine::settle_dependents`], which ends every command.
    pub(super) fn end(&mut self, seq: JobSeq, how: impl FnOnce(End) -> JobState) {
        let end = End {
            at: self.now,
            seq: self.next_end,
        };
        self.next_end += 1;
        self.dirty.meta = true;
        self.set_state(seq, how(end));
        self.just_ended.push(seq);
        if let Some(batch) = self.jobs.get(&seq).map(|job| job.batch) {
            self.complete_if_done(batch);
        }
    }

    /// Lets what ended in this command show its effect: dependents become ready, or die with it, and so on.
    pub(super) fn settle_dependents(&mut self) {
        while let Some(ended) = self.just_ended.pop() {
            let Some(list) = self.dependents.get(&ended) else {
                continue;
            };
            let list: Vec<JobSeq> = list.iter().copied().collect();
            let succeeded = matches!(self.jobs[&ended].state, JobState::Succeeded(_));
            for seq in list {
                let Some(job) = self.jobs.get_mut(&seq) else {
                    continue;
                };
                job.waits_for -= u32::from(succeeded);
                if !matches!(job.state, JobState::Blocked) {
                    continue;
                }
                // A batch that was cancelled as a whole is cancelled page by page.
                let cancelled = self.batches[&job.batch].cancelled;
                if !succeeded && cancelled {
                    self.end(seq, JobState::Cancelled);
                } else if !succeeded {
                    self.end(seq, |end| JobState::Dead {
                        end,
                        reason: DeadReason::Dependency,
                    });
                } else if job.waits_for == 0 {
                    self.set_waiting(seq);
                }
            }
        }
    }

    /// Puts a job where it has to wait: for other jobs, for a moment, or for a worker.
    pub(super) fn set_waiting(&mut self, seq: JobSeq) {
        let Some(job) = self.jobs.get(&seq) else {
            return;
        };
        let not_before = job.rare.as_ref().and_then(|rare| rare.not_before);
        let state = match not_before {
            _ if job.waits_for > 0 => JobState::Blocked,
            Some(until) if until > self.now => JobState::Delayed { until },
            _ => JobState::Ready,
        };
        self.set_state(seq, state);
    }
}

pub(super) fn place_of(job: &Job, project: ProjectSeq) -> Place {
    Place {
        kind: job.kind,
        priority: job.priority,
        lane: job.lane,
        project,
    }
}
