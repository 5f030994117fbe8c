//! Chunks of jobs enter an open batch, once each; complete batches are forgotten.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::super::record::ROW_VERSION;
use super::super::{
    BatchSeq, CHUNK_JOBS_MAX, ChunkAnswer, ChunkRow, ItemResult, JobSeq, JobState, NewJob, Refusal,
};
use super::Machine;
use crate::error::FieldError;
use crate::id::{BatchId, ProjectId};
use crate::time::Timestamp;

impl Machine {
    /// Adds chunk `n` to a batch. Each job is accepted, found there already, or rejected by itself; the same chunk
    /// again gets the same answer and has no effect.
    pub fn submit(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
        n: u32,
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
        let digest = digest_of(&jobs);
        if let Some(row) = self.batches[&seq].chunks.get(&n) {
            return recorded_answer(row, n, digest);
        }
        if self.batches[&seq].closed {
            return Err(Refusal::BatchClosed {
                project: project.clone(),
                batch: batch.clone(),
            });
        }
        let plan = self.plan(seq, &jobs);
        let jobs_in_chunk = jobs.len() as u32;
        let added = self.insert(seq, jobs, &plan);
        let others = plan.verdicts.iter().enumerate();
        let others = others.filter(|(_, verdict)| **verdict != ItemResult::Accepted);
        let row = ChunkRow {
            v: ROW_VERSION,
            digest,
            jobs: jobs_in_chunk,
            others: others.map(|(n, v)| (n as u32, v.clone())).collect(),
        };
        if let Some(batch) = self.batches.get_mut(&seq) {
            batch.chunks.insert(n, row);
        }
        self.dirty.chunks.insert((seq, n));
        Ok(ChunkAnswer {
            items: plan.verdicts,
            repeated: false,
            added,
        })
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
            self.lanes.leave(job.lane);
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

/// The same jobs in the same order have the same digest.
fn digest_of(jobs: &[NewJob]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for job in jobs {
        hasher.update((job.id.as_str().len() as u32).to_le_bytes());
        hasher.update(job.id.as_str());
        hasher.update(job.spec_digest);
    }
    hasher.finalize().into()
}

fn recorded_answer(row: &ChunkRow, n: u32, digest: [u8; 32]) -> Result<ChunkAnswer, Refusal> {
    if row.digest != digest {
        let rule = "was submitted before with other jobs; give new jobs a new number";
        return Err(FieldError::new("n", n, rule).into());
    }
    let item = |n| row.others.get(&n).cloned().unwrap_or(ItemResult::Accepted);
    Ok(ChunkAnswer {
        items: (0..row.jobs).map(item).collect(),
        repeated: true,
        added: Vec::new(),
    })
}
