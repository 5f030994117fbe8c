//! Chunks of jobs enter an open batch, each job once; complete batches are forgotten.

use std::collections::{BTreeMap, BTreeSet};

use super::super::record::ROW_VERSION;
use super::super::{
    BatchSeq, CHUNK_JOBS_MAX, ChunkAnswer, ChunkRow, ItemResult, JobSeq, JobState, NewJob, Refusal,
};
use super::Machine;
use crate::error::FieldError;
use crate::id::{BatchId, ProjectId};
use crate::time::Timestamp;

impl Machine {
    /// Adds chunk `n` to a batch, whose content has `digest`. Each job is accepted, found there already, or rejected
    /// by itself. The same chunk again is judged again, job by job: what it brought before is there already. A closed
    /// batch takes only chunks that it knows, and of those nothing new.
    pub fn submit(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
        n: u32,
        digest: [u8; 32],
        jobs: Vec<NewJob>,
    ) -> Result<ChunkAnswer, Refusal> {
        self.advance(now);
        let seq = self.find_batch(project, batch)?;
        if jobs.len() > CHUNK_JOBS_MAX {
            return Err(FieldError::new(
                "jobs",
                jobs.len(),
                format!("must be at most {CHUNK_JOBS_MAX} in one chunk"),
            )
            .into());
        }
        let known = self.batches[&seq].chunks.get(&n);
        let repeated = known.is_some();
        if known.is_some_and(|row| row.digest != digest) {
            let rule = "was submitted before with other jobs; give new jobs a new number";
            return Err(FieldError::new("chunk", n, rule).into());
        }
        let closed = self.batches[&seq].closed;
        if closed && !repeated {
            return Err(Refusal::BatchClosed {
                project: project.clone(),
                batch: batch.clone(),
            });
        }
        let mut plan = self.plan(seq, &jobs);
        if closed {
            let error = FieldError::new("batch", batch, "is closed and takes no new jobs");
            plan.refuse_new(&error);
        }
        let added = self.insert(seq, jobs, &plan);
        let items = plan.verdicts;
        // A chunk of which nothing is in the queue leaves nothing behind.
        let is_there = |item: &ItemResult| !matches!(item, ItemResult::Rejected(_));
        if !repeated && items.iter().any(is_there) {
            self.keep_chunk(seq, n, digest);
        }
        Ok(ChunkAnswer {
            items,
            repeated,
            added,
        })
    }

    fn keep_chunk(&mut self, seq: BatchSeq, n: u32, digest: [u8; 32]) {
        let row = ChunkRow {
            v: ROW_VERSION,
            digest,
        };
        if let Some(batch) = self.batches.get_mut(&seq) {
            batch.chunks.insert(n, row);
            self.dirty.chunks.insert((seq, n));
        }
    }

    /// Forgets a complete batch with all its jobs. Returns how many those were.
    pub fn purge_batch(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<u64, Refusal> {
        self.advance(now);
        let seq = self.find_batch(project, batch)?;
        if self.batches[&seq].completed_at.is_none() {
            let rule = "must be complete before it can be purged";
            return Err(FieldError::new("batch", batch, rule).into());
        }
        let Some(gone) = self.batches.remove(&seq) else {
            return Ok(0);
        };
        self.take_out_met_deps(seq, &gone.jobs);
        for job_seq in gone.jobs.values() {
            self.dependents.remove(job_seq);
        }
        for job_seq in gone.jobs.values() {
            let Some(job) = self.jobs.remove(job_seq) else {
                continue;
            };
            self.lanes.leave(job.lane, gone.project);
            for dep in job.deps() {
                if let Some(list) = self.dependents.get_mut(dep) {
                    list.retain(|dependent| dependent != job_seq);
                }
            }
            if let Some(project) = self.projects.get_mut(&gone.project) {
                project.counters[job.kind.index()].remove(job.state.name());
            }
            self.dirty.jobs_deleted.push(*job_seq);
        }
        let chunks = gone.chunks.keys().map(|n| (seq, *n));
        self.dirty.chunks.extend(chunks);
        self.dirty.batches.insert(seq);
        let last_of_project = self.projects.get_mut(&gone.project).is_some_and(|project| {
            project.batches.remove(batch);
            project.batches.is_empty()
        });
        if last_of_project {
            self.projects.remove(&gone.project);
            self.project_by_id.remove(project);
            self.ready.forget(gone.project);
        }
        Ok(gone.jobs.len() as u64)
    }

    /// Jobs of other batches may depend on succeeded jobs of a batch that goes: what has been met needs no mention.
    /// What ended badly stays, and a job that names it stays dead.
    fn take_out_met_deps(&mut self, batch: BatchSeq, jobs: &BTreeMap<crate::id::JobId, JobSeq>) {
        let succeeded: BTreeSet<JobSeq> = jobs
            .values()
            .filter(|seq| matches!(self.jobs[seq].state, JobState::Succeeded(_)))
            .copied()
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
