//! From rows to a machine, and from a job to its row.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::super::batch::Batch;
use super::super::job::{Job, Rare};
use super::super::lane::{Lane, Lanes};
use super::super::record::{
    self, BatchRow, ChunkRow, JobRow, MetaRow, ROW_VERSION, RecordError, RingNumber, RingRow,
};
use super::super::{BatchSeq, Counters, JobKind, JobSeq, JobState, PRIORITY_MAX, ProjectSeq};
use super::step::place_of;
use super::{Machine, MachineConfig, RingKey};

/// A machine on its way in from its rows. They are given one by one, so that a million of them need not be in
/// memory beside the machine: the one row first, batches before all that belongs to them, virtual times before jobs,
/// jobs in the order of their numbers.
#[derive(Debug)]
pub struct Loading {
    machine: Machine,
}

impl Loading {
    /// Of an empty queue.
    pub fn new(config: MachineConfig) -> Self {
        Self {
            machine: Machine::new(config),
        }
    }

    /// The one row; a queue that never changed has none.
    pub fn meta(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        let meta: MetaRow = record::decode(bytes)?;
        self.machine.last_fence = meta.last_fence;
        self.machine.next_job = meta.next_job;
        self.machine.next_batch = meta.next_batch;
        self.machine.next_project = meta.next_project;
        self.machine.next_end = meta.next_end;
        Ok(())
    }

    /// A batch.
    pub fn batch(&mut self, seq: BatchSeq, bytes: &[u8]) -> Result<(), RecordError> {
        self.machine.load_batch(seq, record::decode(bytes)?);
        Ok(())
    }

    /// A chunk that was taken.
    pub fn chunk(&mut self, seq: BatchSeq, n: u32, bytes: &[u8]) -> Result<(), RecordError> {
        let row: ChunkRow = record::decode(bytes)?;
        let missing = || inconsistent(format!("chunk {n} of batch {}, which is missing", seq.0));
        let batch = self.machine.batches.get_mut(&seq).ok_or_else(missing)?;
        batch.chunks.insert(n, row);
        Ok(())
    }

    /// A virtual time.
    pub fn ring(&mut self, number: RingNumber, bytes: &[u8]) -> Result<(), RecordError> {
        let row: RingRow = record::decode(bytes)?;
        self.machine.ready.restore(ring_key(number)?, row.vtime);
        Ok(())
    }

    /// A job.
    pub fn job(&mut self, seq: JobSeq, bytes: &[u8]) -> Result<(), RecordError> {
        self.machine.load_job(seq, record::decode(bytes)?)
    }

    /// The machine whose rows these were. It equals the one that wrote them but for what is not stored: progress
    /// texts, renewals (see [`Machine::refresh_leases`]) and the memory of recent lease requests.
    pub fn finish(mut self) -> Machine {
        self.machine.count_unmet();
        self.machine
    }
}

impl Machine {
    fn load_batch(&mut self, seq: BatchSeq, row: BatchRow) {
        if !self.projects.contains_key(&row.project_seq) {
            self.add_project(row.project_seq, row.project);
        }
        if row.purging {
            self.purging.insert(seq);
        } else if let Some(project) = self.projects.get_mut(&row.project_seq) {
            project.add_batch(row.batch.clone(), seq, row.closed);
        }
        let batch = Batch {
            seq,
            project: row.project_seq,
            id: row.batch,
            params_digest: row.params_digest,
            opened_at: row.opened_at,
            closed: row.closed,
            cancelled: row.cancelled,
            completed_at: row.completed_at,
            purging: row.purging,
            counters: Counters::default(),
            jobs: BTreeMap::new(),
            ended: BTreeMap::new(),
            chunks: BTreeMap::new(),
        };
        let completed_at = batch.completed_at.unwrap_or_default();
        self.now = self.now.max(batch.opened_at).max(completed_at);
        self.batches.insert(seq, batch);
    }

    fn load_job(&mut self, seq: JobSeq, row: JobRow<'static>) -> Result<(), RecordError> {
        let missing = || {
            inconsistent(format!(
                "job {} of batch {}, which is missing",
                seq.0, row.batch.0
            ))
        };
        let batch = self.batches.get_mut(&row.batch).ok_or_else(missing)?;
        if row.priority > PRIORITY_MAX {
            return Err(inconsistent(format!(
                "job {} has priority {}",
                seq.0, row.priority
            )));
        }
        let job = job_of(row, batch.project, &mut self.lanes);
        let state = job.state.name();
        batch.jobs.insert(job.id.clone(), seq);
        batch.counters.add(state);
        if let Some(project) = self.projects.get_mut(&batch.project) {
            project.counters[job.kind.index()].add(state);
        }
        match &job.state {
            JobState::Blocked => {}
            JobState::Delayed { until } => {
                self.delayed.insert((*until, seq));
            }
            JobState::Ready => self.ready.restore_job(place_of(&job, batch.project), seq),
            JobState::Leased(lease) => {
                self.deadlines.insert((lease.deadline, seq));
            }
            ended => {
                let end = ended.end().map_or(0, |end| end.seq);
                batch.ended.insert(end, seq);
            }
        }
        for dep in job.deps() {
            self.dependents.entry(*dep).or_default().insert(seq);
        }
        self.now = self.now.max(job.changed_at);
        self.jobs.insert(seq, Box::new(job));
        Ok(())
    }

    fn count_unmet(&mut self) {
        let waiting: BTreeSet<JobSeq> = self.dependents.values().flatten().copied().collect();
        for seq in waiting {
            let unmet = self.unmet(self.jobs[&seq].deps());
            if let Some(job) = self.jobs.get_mut(&seq) {
                job.waits_for = unmet;
            }
        }
        // What a purged job was needed for is named by its own row alone.
        let gone = |seq: &JobSeq| !self.jobs.contains_key(seq);
        let stale: Vec<_> = self.dependents.keys().copied().filter(gone).collect();
        for seq in stale {
            self.dependents.remove(&seq);
        }
    }
}

fn inconsistent(what: String) -> RecordError {
    RecordError::Inconsistent(what)
}

fn ring_key((kind, project): RingNumber) -> Result<RingKey, RecordError> {
    let bad = || inconsistent(format!("virtual time of kind {kind}"));
    let kind = *JobKind::ALL.get(usize::from(kind)).ok_or_else(bad)?;
    let project = match project {
        0 => None,
        n => Some(ProjectSeq(u32::try_from(n - 1).map_err(|_| bad())?)),
    };
    Ok((kind, project))
}

fn job_of(row: JobRow<'static>, project: ProjectSeq, lanes: &mut Lanes) -> Job {
    let lane = Lane {
        kind: row.kind,
        needs: row.needs.into_owned(),
    };
    let rare = Rare {
        deps: row.deps.into_owned(),
        not_before: row.not_before,
        labels: row.labels.into_owned(),
        traceparent: row.traceparent.map(Cow::into_owned),
        error: row.error.map(Cow::into_owned),
    };
    Job {
        id: row.id.into_owned(),
        batch: row.batch,
        lane: lanes.enter(lane, project),
        kind: row.kind,
        priority: row.priority,
        budgets: row.budgets,
        starts: row.starts,
        state: row.state.into_owned(),
        submitted_at: row.submitted_at,
        changed_at: row.changed_at,
        settled: row.settled,
        max_runtime_us: row.max_runtime_us,
        digest: row.digest,
        waits_for: 0,
        dirty: false,
        rare: (rare != Rare::default()).then(|| Box::new(rare)),
    }
}

/// The bytes of a job's row.
pub(super) fn job_row(job: &Job, lanes: &Lanes) -> Vec<u8> {
    let none = Rare::default();
    let rare = job.rare.as_deref().unwrap_or(&none);
    let needs = lanes.needs(job.lane);
    record::encode(&JobRow {
        v: ROW_VERSION,
        id: Cow::Borrowed(&job.id),
        batch: job.batch,
        kind: job.kind,
        priority: job.priority,
        needs: needs.map_or_else(Cow::default, Cow::Borrowed),
        budgets: job.budgets,
        starts: job.starts,
        state: Cow::Borrowed(&job.state),
        submitted_at: job.submitted_at,
        changed_at: job.changed_at,
        settled: job.settled,
        max_runtime_us: job.max_runtime_us,
        digest: job.digest,
        deps: Cow::Borrowed(&rare.deps),
        not_before: rare.not_before,
        labels: Cow::Borrowed(&rare.labels),
        traceparent: rare.traceparent.as_deref().map(Cow::Borrowed),
        error: rare.error.as_ref().map(Cow::Borrowed),
    })
}
