//! Commands and reads that may concern a million jobs go page by page, so that others get their turn in between.

use std::collections::VecDeque;
use std::ops::Bound;

use super::super::{BatchSeq, JobFilter, JobSeq, JobView, Refusal, Selector};
use super::Machine;
use crate::id::{BatchId, JobId, ProjectId};

/// How far a command on many jobs has come.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    pub(super) place: Place,
    /// Jobs of pages that were looked at, which the command has still to look after.
    pub(super) left: VecDeque<JobSeq>,
}

impl Cursor {
    /// Whether the command has done all that it was asked for.
    pub fn is_at_end(&self) -> bool {
        self.place == Place::End && self.left.is_empty()
    }
}

/// Between which jobs a cursor is, by name of batch and job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Place {
    #[default]
    Start,
    /// Behind a job of a batch.
    Job(BatchId, JobId),
    /// Behind all jobs of a batch.
    Batch(BatchId),
    End,
}

impl Machine {
    /// The jobs that `which` means among the next `rows_max`, in the order of their submission. Moves the cursor.
    pub(super) fn select(
        &self,
        which: &Selector,
        place: &mut Place,
        rows_max: usize,
    ) -> Result<Vec<JobSeq>, Refusal> {
        let (project, only, label) = match which {
            Selector::Job(key) => {
                *place = Place::End;
                let unknown = || Refusal::UnknownJob(key.clone());
                return Ok(vec![self.find_job(key).ok_or_else(unknown)?]);
            }
            Selector::Batch(project, batch) => {
                self.find_batch(project, batch)?;
                (project, Some(batch), None)
            }
            Selector::Label {
                project,
                key,
                value,
            } => (project, None, Some((key, value))),
        };
        let is_meant =
            |seq: &JobSeq| label.is_none_or(|(key, value)| self.jobs[seq].has_label(key, value));
        let mut found = Vec::new();
        let mut left = rows_max;
        while left > 0 {
            let Some((batch, seq, after)) = self.next_batch(project, only, place) else {
                *place = Place::End;
                break;
            };
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            let jobs = self.batches[&seq].jobs.range((from, Bound::Unbounded));
            let page: Vec<(&JobId, &JobSeq)> = jobs.take(left).collect();
            found.extend(page.iter().map(|(_, job)| **job).filter(is_meant));
            *place = match page.last() {
                Some((job, _)) if page.len() == left => Place::Job(batch, (*job).clone()),
                _ => Place::Batch(batch),
            };
            // A batch without jobs is work as well.
            left = left.saturating_sub(page.len().max(1));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The batch at `place`, and the job behind which to go on.
    fn next_batch(
        &self,
        project: &ProjectId,
        only: Option<&BatchId>,
        place: &Place,
    ) -> Option<(BatchId, BatchSeq, Option<JobId>)> {
        let batches = &self.projects[self.project_by_id.get(project)?].batches;
        let from = match place {
            Place::Start => only.map_or(Bound::Unbounded, Bound::Included),
            Place::Job(batch, _) => Bound::Included(batch),
            Place::Batch(_) if only.is_some() => return None,
            Place::Batch(batch) => Bound::Excluded(batch),
            Place::End => return None,
        };
        let (id, seq) = batches.range((from, Bound::Unbounded)).next()?;
        let after = match place {
            Place::Job(batch, job) if batch == id => Some(job.clone()),
            _ => None,
        };
        Some((id.clone(), *seq, after))
    }

    /// The first `limit` jobs that pass `filter` among the next `rows_max` of a batch, by name, after `after`; and the
    /// last one that was looked at, where more may pass behind it.
    pub fn jobs_among(
        &self,
        (project, batch): (&ProjectId, &BatchId),
        filter: &JobFilter,
        after: Option<&JobId>,
        limit: usize,
        rows_max: usize,
    ) -> Result<(Vec<JobView>, Option<JobId>), Refusal> {
        let seq = self.find_batch(project, batch)?;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = (from, Bound::Unbounded);
        let mut found = Vec::new();
        let jobs = self.batches[&seq].jobs.range::<JobId, _>(range);
        for (n, (id, job)) in jobs.enumerate() {
            if found.len() == limit {
                return Ok((found, None));
            }
            if self.passes(*job, filter) {
                found.extend(self.view_of_job(*job));
            }
            if n + 1 == rows_max {
                return Ok((found, Some(id.clone())));
            }
        }
        Ok((found, None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{
        JobKind, LeaseRequest, MachineConfig, NewBatch, NewJob, Outcome, StateName,
    };
    use super::super::check::check;
    use super::*;
    use crate::error::ErrorClass;
    use crate::id::WorkerId;
    use crate::time::Timestamp;

    const NOW: Timestamp = Timestamp(1_000_000);

    /// Two batches of ten jobs; in the first all wait for its last.
    fn machine() -> (Machine, ProjectId, BatchId) {
        let mut machine = Machine::new(MachineConfig::default());
        let project: ProjectId = "p".parse().unwrap();
        let batches: [BatchId; 2] = ["b".parse().unwrap(), "c".parse().unwrap()];
        for (b, batch) in batches.iter().enumerate() {
            let new = NewBatch {
                project: project.clone(),
                batch: batch.clone(),
                params_digest: [0; 32],
            };
            machine.open_batch(NOW, &new).unwrap();
            let job = |n: usize| {
                let id: JobId = format!("j{n}").parse().unwrap();
                let mut job = NewJob::new(id, JobKind::Rollout, [0; 32]);
                job.max_attempts = 1;
                job.labels = [("odd".to_owned(), (n % 2).to_string())].into();
                if n < 9 && b == 0 {
                    job.deps = vec!["p/b/j9".parse().unwrap()];
                }
                job
            };
            let jobs = (0..10).map(job).collect();
            machine
                .submit(NOW, &project, batch, 0, [0; 32], jobs)
                .unwrap();
        }
        let [batch, _] = batches;
        (machine, project, batch)
    }

    /// What each page of a command did.
    fn pages<T>(mut page: impl FnMut(&mut Cursor) -> T) -> Vec<T> {
        let mut cursor = Cursor::default();
        let mut done = Vec::new();
        while !cursor.is_at_end() {
            done.push(page(&mut cursor));
        }
        done
    }

    #[test]
    fn a_batch_is_cancelled_page_by_page_and_none_dies_of_another() {
        let (mut machine, project, batch) = machine();
        let which = Selector::Batch(project.clone(), batch.clone());
        let mut jobs = Vec::new();
        let done = pages(|cursor| {
            let done = machine.cancel_some(NOW, &which, cursor, 4).unwrap();
            check(&machine);
            let view = machine.batch(&project, &batch).unwrap();
            assert!(view.cancelled, "first of all");
            jobs.push(view.counters.active());
            done.cancelled
        });
        assert_eq!(done, [4, 4, 2]);
        assert_eq!(jobs, [6, 2, 0]);
        let view = machine.batch(&project, &batch).unwrap();
        assert_eq!(view.counters.get(StateName::Cancelled), 10);
    }

    #[test]
    fn a_label_is_looked_for_page_by_page_across_batches() {
        let (mut machine, project, _) = machine();
        let which = Selector::Label {
            project,
            key: "odd".to_owned(),
            value: "0".to_owned(),
        };
        let done = pages(|cursor| {
            let done = machine.cancel_some(NOW, &which, cursor, 7).unwrap();
            done.cancelled
        });
        assert!(done.len() > 2, "{done:?}");
        assert_eq!(done.iter().sum::<u64>(), 10);
        check(&machine);
    }

    #[test]
    fn a_page_of_requeued_jobs_brings_the_next_ones_back_in_later_pages() {
        let (mut machine, project, batch) = machine();
        let request = LeaseRequest {
            worker: WorkerId::new("w").unwrap(),
            request: 0,
            kind: JobKind::Rollout,
            offers: Default::default(),
            n: 1,
            ttl: None,
        };
        let grant = machine.lease(NOW, &request).unwrap().remove(0);
        let failed = Outcome::Failed {
            class: ErrorClass::Handler,
            message: String::new(),
            log_tail: String::new(),
            retry_after: None,
        };
        machine.finish(NOW, &grant.key, grant.fence, failed);
        let dead = |machine: &Machine| {
            let view = machine.batch(&project, &batch).unwrap();
            view.counters.get(StateName::Dead)
        };
        assert_eq!(dead(&machine), 10);
        let which = Selector::Batch(project.clone(), batch.clone());
        let back = pages(|cursor| {
            let back = machine.requeue_some(NOW, &which, cursor, 4).unwrap();
            check(&machine);
            assert!(back <= 4);
            back
        });
        assert_eq!((back.iter().sum::<u64>(), dead(&machine)), (10, 0));
    }

    #[test]
    fn a_filter_that_lets_nothing_through_looks_at_a_page_of_rows() {
        let (machine, project, batch) = machine();
        let filter = JobFilter {
            states: vec![StateName::Dead],
            ..JobFilter::default()
        };
        let look = |after: Option<&JobId>, filter: &JobFilter, limit| {
            let of = (&project, &batch);
            let (jobs, next) = machine.jobs_among(of, filter, after, limit, 4).unwrap();
            (jobs.len(), next.map(|id| id.to_string()))
        };
        let next = |id: &str| Some(id.to_owned());
        assert_eq!(look(None, &filter, 100), (0, next("j3")));
        let after: JobId = "j7".parse().unwrap();
        assert_eq!(look(Some(&after), &filter, 100), (0, None));
        let all = JobFilter::default();
        assert_eq!(look(None, &all, 2), (2, None), "the page is full");
        assert_eq!(look(None, &all, 100), (4, next("j3")));
    }
}
