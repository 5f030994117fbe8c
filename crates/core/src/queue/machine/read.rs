//! Reading: one job, one batch, pages of them, and the whole in numbers. Nothing here changes anything.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Duration;

use super::super::batch::Batch;
use super::super::{
    BatchSeq, BatchView, EndedJob, JobFilter, JobKind, JobSeq, JobView, QueueStats, Refusal,
    StatLine, StateName,
};
use super::Machine;
use crate::id::{BatchId, JobId, JobKey, ProjectId};
use crate::time::Timestamp;

impl Machine {
    /// The digest of a chunk that was taken.
    pub fn chunk_digest(&self, project: &ProjectId, batch: &BatchId, n: u32) -> Option<[u8; 32]> {
        let seq = self.find_batch(project, batch).ok()?;
        self.batches[&seq].chunks.get(&n).map(|row| row.digest)
    }

    /// One job.
    pub fn job(&self, key: &JobKey) -> Option<JobView> {
        self.find_job(key).and_then(|seq| self.view_of_job(seq))
    }

    /// One batch.
    pub fn batch(&self, project: &ProjectId, batch: &BatchId) -> Result<BatchView, Refusal> {
        let seq = self.find_batch(project, batch)?;
        Ok(self.view_of_batch(&self.batches[&seq]))
    }

    /// Batches of a project by name, after `after`.
    pub fn batches(
        &self,
        project: &ProjectId,
        after: Option<&BatchId>,
        limit: usize,
    ) -> Vec<BatchView> {
        let Some(seq) = self.project_by_id.get(project) else {
            return Vec::new();
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = (from, Bound::Unbounded);
        let batches = self.projects[seq].batches.range::<BatchId, _>(range);
        batches
            .take(limit)
            .map(|(_, seq)| self.view_of_batch(&self.batches[seq]))
            .collect()
    }

    /// Batches of a project opened before `before`, the newest first.
    pub fn batches_newest(
        &self,
        project: &ProjectId,
        before: Option<BatchSeq>,
        limit: usize,
    ) -> Vec<BatchView> {
        let Some(seq) = self.project_by_id.get(project) else {
            return Vec::new();
        };
        let to = before.map_or(Bound::Unbounded, Bound::Excluded);
        let batches = self.projects[seq].in_order.range((Bound::Unbounded, to));
        batches
            .rev()
            .take(limit)
            .map(|seq| self.view_of_batch(&self.batches[seq]))
            .collect()
    }

    /// Jobs of a batch that pass `filter`, by name, after `after`.
    pub fn jobs(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        filter: &JobFilter,
        after: Option<&JobId>,
        limit: usize,
    ) -> Result<Vec<JobView>, Refusal> {
        let (jobs, _) = self.jobs_among((project, batch), filter, after, limit, usize::MAX)?;
        Ok(jobs)
    }

    /// Jobs of a batch that ended after the end number `after`, in the order of their ends.
    pub fn ended_after(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<EndedJob>, Refusal> {
        let seq = self.find_batch(project, batch)?;
        let range = (Bound::Excluded(after), Bound::Unbounded);
        let ended = self.batches[&seq].ended.range(range).take(limit);
        Ok(ended
            .filter_map(|(seq, job)| {
                let job = self.view_of_job(*job)?;
                Some(EndedJob { seq: *seq, job })
            })
            .collect())
    }

    /// The numbers under which a backend keeps what a job was submitted with.
    pub fn numbers_of(&self, key: &JobKey) -> Option<(BatchSeq, JobSeq)> {
        let seq = self.find_job(key)?;
        Some((self.jobs[&seq].batch, seq))
    }

    /// Jobs of a project that wait: blocked, delayed or ready.
    pub fn waiting(&self, project: &ProjectId) -> u64 {
        let Some(seq) = self.project_by_id.get(project) else {
            return 0;
        };
        let states = [StateName::Blocked, StateName::Delayed, StateName::Ready];
        let of_kinds = self.projects[seq].counters.iter();
        of_kinds
            .flat_map(|counters| states.map(|state| counters.get(state)))
            .sum()
    }

    /// How many jobs of each kind wait for a moment that is at most `within` from `now`, of the first `limit` of them.
    pub fn due_soon(
        &self,
        now: Timestamp,
        within: Duration,
        limit: usize,
    ) -> BTreeMap<JobKind, u64> {
        let until = now + within;
        let delayed = self.delayed.iter().take(limit);
        let mut due = BTreeMap::new();
        for (_, seq) in delayed.take_while(|(at, _)| *at <= until) {
            *due.entry(self.jobs[seq].kind).or_default() += 1;
        }
        due
    }

    /// The whole queue in numbers, as of `now`.
    pub fn stats(&self, now: Timestamp) -> QueueStats {
        let mut lines = Vec::new();
        for seq in self.project_by_id.values() {
            let project = &self.projects[seq];
            for kind in JobKind::ALL {
                let counters = project.counters[kind.index()];
                if counters.total() == 0 {
                    continue;
                }
                let heads = self.ready.heads(kind, *seq);
                let oldest = heads.map(|head| self.jobs[&head].changed_at).min();
                lines.push(StatLine {
                    project: project.id.clone(),
                    kind,
                    counters,
                    oldest_ready: oldest.map(|since| now.since(since)),
                });
            }
        }
        let open = self.batches.values().filter(|b| b.completed_at.is_none());
        QueueStats {
            lines,
            batches_open: open.count() as u64,
            stale_fences: self.stale_fences,
            expired_leases: self.expired_leases,
        }
    }

    pub(super) fn passes(&self, seq: JobSeq, filter: &JobFilter) -> bool {
        let job = &self.jobs[&seq];
        (filter.states.is_empty() || filter.states.contains(&job.state.name()))
            && (filter.kinds.is_empty() || filter.kinds.contains(&job.kind))
            && filter
                .labels
                .iter()
                .all(|(key, value)| job.has_label(key, value))
    }

    pub(super) fn view_of_job(&self, seq: JobSeq) -> Option<JobView> {
        let job = self.jobs.get(&seq)?;
        let rare = job.rare.as_deref().cloned().unwrap_or_default();
        let deps = rare.deps.iter().filter_map(|dep| self.jobs.get(dep));
        let max_runtime = Duration::from_micros(job.max_runtime_us);
        Some(JobView {
            key: self.key_of(job),
            seq,
            batch_seq: job.batch,
            kind: job.kind,
            priority: job.priority,
            state: job.state.clone(),
            needs: self.lanes.needs(job.lane).cloned().unwrap_or_default(),
            deps: deps.map(|dep| self.key_of(dep)).collect(),
            labels: rare.labels,
            waits_for: job.waits_for,
            attempts: job.starts,
            budgets: job.budgets,
            submitted_at: job.submitted_at,
            changed_at: job.changed_at,
            not_before: rare.not_before,
            max_runtime: (!max_runtime.is_zero()).then_some(max_runtime),
            traceparent: rare.traceparent,
            error: rare.error,
            spec_digest: job.digest,
        })
    }

    pub(super) fn view_of_batch(&self, batch: &Batch) -> BatchView {
        BatchView {
            project: self.projects[&batch.project].id.clone(),
            batch: batch.id.clone(),
            seq: batch.seq,
            params_digest: batch.params_digest,
            opened_at: batch.opened_at,
            closed: batch.closed,
            cancelled: batch.cancelled,
            completed_at: batch.completed_at,
            counters: batch.counters,
            last_end: batch.ended.last_key_value().map_or(0, |(seq, _)| *seq),
        }
    }
}
