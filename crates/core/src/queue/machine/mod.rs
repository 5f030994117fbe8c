//! The machine: all jobs of a queue with their indexes, and the commands that change them.
//!
//! Every change of a job's state goes through [`Machine::set_state`], which keeps the indexes, the counters and the
//! list of changed rows in step; the commands in the files beside decide only which state comes next. The backend
//! that owns a machine gives it the time with each command, stores what [`Machine::take_changes`] hands out before
//! it answers anybody, and calls nothing from two threads.

mod cancel;
#[cfg(test)]
mod check;
mod finish;
mod insert;
mod lease;
mod load;
mod pages;
#[cfg(test)]
mod property;
mod purge;
mod read;
mod step;
mod submit;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use super::batch::Batch;
use super::job::Job;
use super::lane::Lanes;
use super::record::{self, BatchRow, Changes, MetaRow, ROW_VERSION, RingNumber, RingRow};
use super::ring::{Ready, RingKey};
use super::{BatchSeq, BatchView, Counters, Event, JobKind, JobSeq, NewBatch, ProjectSeq, Refusal};
use crate::error::FieldError;
use crate::id::{BatchId, Fence, JobKey, ProjectId};
use crate::time::Timestamp;
use lease::Repeats;

pub use load::Loading;
pub use pages::Cursor;

/// What an operator may set. Not stored: it comes with the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Shares of projects where several wait: twice the weight, twice the grants. From 1 to 1,000.
    pub weights: BTreeMap<ProjectId, u32>,
    /// The weight of a project that is not listed.
    pub weight_default: u32,
    /// Most batches of a project that are not closed: such a batch is never complete, and so never forgotten.
    pub open_batches_max: usize,
}

impl MachineConfig {
    /// A batch for every step of many pipelines at once.
    pub const OPEN_BATCHES_MAX_DEFAULT: usize = 1_000;
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            weights: BTreeMap::new(),
            weight_default: 100,
            open_batches_max: Self::OPEN_BATCHES_MAX_DEFAULT,
        }
    }
}

/// Hashes job numbers, which nobody outside chooses, faster than a keyed hash does.
#[derive(Clone, Copy, Debug, Default)]
struct SeqHasher(u64);

impl Hasher for SeqHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, n: u64) {
        let product = (self.0 ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = product ^ (product >> 32);
    }
}

type BySeq<T> = HashMap<JobSeq, T, BuildHasherDefault<SeqHasher>>;

#[derive(Clone, Debug)]
struct Project {
    id: ProjectId,
    batches: BTreeMap<BatchId, BatchSeq>,
    /// The same in the order in which they were opened.
    in_order: BTreeSet<BatchSeq>,
    /// How many of them are not closed.
    open: usize,
    counters: [Counters; JobKind::ALL.len()],
}

impl Project {
    fn add_batch(&mut self, id: BatchId, seq: BatchSeq, closed: bool) {
        self.batches.insert(id, seq);
        self.in_order.insert(seq);
        self.open += usize::from(!closed);
    }
}

/// Rows that changed since they were last taken.
#[derive(Clone, Debug, Default)]
struct Dirty {
    /// Each once: the job's own flag says that it is here.
    jobs: Vec<JobSeq>,
    jobs_deleted: Vec<JobSeq>,
    batches: BTreeSet<BatchSeq>,
    chunks: BTreeSet<(BatchSeq, u32)>,
    meta: bool,
}

/// A queue of jobs, all of it in memory. See the module.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    config: MachineConfig,
    /// The latest time that a command came with. Time does not go back here, whatever the clock does.
    now: Timestamp,
    jobs: BySeq<Box<Job>>,
    batches: BTreeMap<BatchSeq, Batch>,
    /// Those that are being removed, page by page.
    purging: BTreeSet<BatchSeq>,
    projects: BTreeMap<ProjectSeq, Project>,
    project_by_id: BTreeMap<ProjectId, ProjectSeq>,
    lanes: Lanes,
    ready: Ready,
    delayed: BTreeSet<(Timestamp, JobSeq)>,
    deadlines: BTreeSet<(Timestamp, JobSeq)>,
    /// Job → jobs that name it as a dependency, in the order of their numbers.
    dependents: BySeq<BTreeSet<JobSeq>>,
    /// Jobs that ended in the present command and whose dependents have not been looked at.
    just_ended: Vec<JobSeq>,
    repeats: Repeats,
    last_fence: Fence,
    next_job: u64,
    next_batch: u32,
    next_project: u32,
    next_end: u64,
    stale_fences: u64,
    expired_leases: u64,
    dirty: Dirty,
    events: Vec<Event>,
    woken_lanes: BTreeSet<(JobKind, u32)>,
}

impl Machine {
    /// An empty queue.
    pub fn new(config: MachineConfig) -> Self {
        Self {
            config,
            next_end: 1,
            ..Self::default()
        }
    }

    /// Opens a batch, or finds the same one open already.
    pub fn open_batch(&mut self, now: Timestamp, new: &NewBatch) -> Result<BatchView, Refusal> {
        self.advance(now);
        if let Ok(seq) = self.find_batch(&new.project, &new.batch) {
            let view = self.view_of_batch(&self.batches[&seq]);
            if view.params_digest != new.params_digest {
                return Err(FieldError::new(
                    "batch",
                    &new.batch,
                    "is open already with other parameters",
                )
                .into());
            }
            return Ok(view);
        }
        let known = self.project_by_id.get(&new.project);
        let open = known.map_or(0, |seq| self.projects[seq].open);
        if open >= self.config.open_batches_max {
            return Err(Refusal::TooManyOpenBatches {
                project: new.project.clone(),
                max: self.config.open_batches_max,
            });
        }
        let project = self.project_of(&new.project);
        let seq = BatchSeq(self.next_batch);
        self.next_batch += 1;
        self.dirty.meta = true;
        self.dirty.batches.insert(seq);
        if let Some(project) = self.projects.get_mut(&project) {
            project.add_batch(new.batch.clone(), seq, false);
        }
        let batch = Batch {
            seq,
            project,
            id: new.batch.clone(),
            params_digest: new.params_digest,
            opened_at: self.now,
            closed: false,
            cancelled: false,
            completed_at: None,
            purging: false,
            counters: Counters::default(),
            jobs: BTreeMap::new(),
            ended: BTreeMap::new(),
            chunks: BTreeMap::new(),
        };
        let view = self.view_of_batch(&batch);
        self.batches.insert(seq, batch);
        Ok(view)
    }

    /// Lets a batch take no more chunks.
    pub fn close_batch(
        &mut self,
        now: Timestamp,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<BatchView, Refusal> {
        self.advance(now);
        let seq = self.find_batch(project, batch)?;
        self.close(seq);
        Ok(self.view_of_batch(&self.batches[&seq]))
    }

    /// Rows that changed since the last call. Until they are stored, no answer may leave the process.
    pub fn take_changes(&mut self) -> Changes {
        let dirty = std::mem::take(&mut self.dirty);
        let mut jobs: Vec<_> = dirty.jobs_deleted.into_iter().map(|j| (j, None)).collect();
        for seq in dirty.jobs {
            let Some(job) = self.jobs.get_mut(&seq) else {
                continue;
            };
            job.dirty = false;
            jobs.push((seq, Some(load::job_row(job, &self.lanes))));
        }
        let batches = dirty.batches.into_iter().map(|seq| {
            let row = self.batches.get(&seq).map(|batch| self.batch_row(batch));
            (seq, row.map(|row| record::encode(&row)))
        });
        let chunks = dirty.chunks.into_iter().map(|(batch, n)| {
            let row = self.batches.get(&batch).and_then(|b| b.chunks.get(&n));
            ((batch, n), row.map(record::encode))
        });
        let (batches, chunks) = (batches.collect(), chunks.collect());
        let rings = self.ready.take_dirty().into_iter().map(|key| {
            let row = self.ready.vtime(key).map(|vtime| RingRow {
                v: ROW_VERSION,
                vtime,
            });
            (ring_number(key), row.map(|row| record::encode(&row)))
        });
        Changes {
            jobs,
            batches,
            chunks,
            rings: rings.collect(),
            meta: dirty.meta.then(|| record::encode(&self.meta_row())),
        }
    }

    /// What happened since the last call, in order; ready lanes are named once each, first.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events: Vec<_> = std::mem::take(&mut self.woken_lanes)
            .into_iter()
            .map(|(kind, lane)| Event::Ready {
                kind,
                needs: self.lanes.needs(lane).cloned().unwrap_or_default(),
            })
            .collect();
        events.append(&mut self.events);
        events
    }

    fn meta_row(&self) -> MetaRow {
        MetaRow {
            v: ROW_VERSION,
            last_fence: self.last_fence,
            next_job: self.next_job,
            next_batch: self.next_batch,
            next_project: self.next_project,
            next_end: self.next_end,
        }
    }

    fn batch_row(&self, batch: &Batch) -> BatchRow {
        BatchRow {
            v: ROW_VERSION,
            project: self.projects[&batch.project].id.clone(),
            project_seq: batch.project,
            batch: batch.id.clone(),
            params_digest: batch.params_digest,
            opened_at: batch.opened_at,
            closed: batch.closed,
            cancelled: batch.cancelled,
            completed_at: batch.completed_at,
            purging: batch.purging,
        }
    }

    /// The latest time that this machine, or the rows that it was read from, came by.
    pub fn newest_time(&self) -> Timestamp {
        self.now
    }

    /// Takes in the time of a command.
    fn advance(&mut self, now: Timestamp) -> Timestamp {
        self.now = self.now.max(now);
        self.now
    }

    fn project_of(&mut self, id: &ProjectId) -> ProjectSeq {
        if let Some(seq) = self.project_by_id.get(id) {
            return *seq;
        }
        let seq = ProjectSeq(self.next_project);
        self.next_project += 1;
        self.dirty.meta = true;
        self.add_project(seq, id.clone());
        seq
    }

    fn add_project(&mut self, seq: ProjectSeq, id: ProjectId) {
        self.project_by_id.insert(id.clone(), seq);
        let project = Project {
            id,
            batches: BTreeMap::new(),
            in_order: BTreeSet::new(),
            open: 0,
            counters: Default::default(),
        };
        self.projects.insert(seq, project);
    }

    fn weight(&self, project: ProjectSeq) -> u32 {
        let listed = self
            .projects
            .get(&project)
            .and_then(|project| self.config.weights.get(&project.id));
        listed.copied().unwrap_or(self.config.weight_default)
    }

    fn find_batch(&self, project: &ProjectId, batch: &BatchId) -> Result<BatchSeq, Refusal> {
        let found = self
            .project_by_id
            .get(project)
            .and_then(|seq| self.projects[seq].batches.get(batch));
        found.copied().ok_or_else(|| Refusal::UnknownBatch {
            project: project.clone(),
            batch: batch.clone(),
        })
    }

    fn find_job(&self, key: &JobKey) -> Option<JobSeq> {
        let batch = self.find_batch(&key.project, &key.batch).ok()?;
        self.batches[&batch].jobs.get(&key.job).copied()
    }

    fn key_of(&self, job: &Job) -> JobKey {
        let batch = &self.batches[&job.batch];
        JobKey::new(
            self.projects[&batch.project].id.clone(),
            batch.id.clone(),
            job.id.clone(),
        )
    }

    fn mark_dirty(&mut self, seq: JobSeq) {
        if let Some(job) = self.jobs.get_mut(&seq)
            && !job.dirty
        {
            job.dirty = true;
            self.dirty.jobs.push(seq);
        }
    }

    fn close(&mut self, seq: BatchSeq) {
        if let Some(batch) = self.batches.get_mut(&seq)
            && !batch.closed
        {
            batch.closed = true;
            self.dirty.batches.insert(seq);
            if let Some(project) = self.projects.get_mut(&batch.project) {
                project.open -= 1;
            }
        }
        self.complete_if_done(seq);
    }

    fn complete_if_done(&mut self, seq: BatchSeq) {
        let Some(batch) = self.batches.get_mut(&seq) else {
            return;
        };
        if !batch.is_done() || batch.completed_at.is_some() {
            return;
        }
        batch.completed_at = Some(self.now);
        self.dirty.batches.insert(seq);
    }
}

fn ring_number((kind, project): RingKey) -> RingNumber {
    let project = project.map_or(0, |project| u64::from(project.0) + 1);
    (kind.index() as u8, project)
}
