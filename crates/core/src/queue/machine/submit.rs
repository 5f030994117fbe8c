//! Chunks of jobs enter an open batch, each job once.

use super::super::record::ROW_VERSION;
use super::super::{BatchSeq, CHUNK_JOBS_MAX, ChunkAnswer, ChunkRow, ItemResult, NewJob, Refusal};
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
}
