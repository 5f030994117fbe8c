//! A batch: a group of jobs that is opened, filled chunk by chunk, closed and counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BatchSeq, ChunkRow, JobSeq, ProjectSeq, StateName};
use crate::id::{BatchId, JobId, ProjectId};
use crate::time::Timestamp;

/// A batch as a client opens it, less the defaults of its jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBatch {
    /// The tenant.
    pub project: ProjectId,
    /// The name within the project.
    pub batch: BatchId,
    /// Digest of all that the client said when it opened the batch: the same id with the same digest is the same
    /// batch.
    pub params_digest: [u8; 32],
}

/// Jobs by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters([u64; 7]);

impl Counters {
    /// Jobs in `state`.
    pub fn get(&self, state: StateName) -> u64 {
        self.0[state as usize]
    }

    /// All jobs.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Jobs that something may still happen to.
    pub fn active(&self) -> u64 {
        let open = StateName::ALL.into_iter().filter(|s| !s.is_terminal());
        open.map(|state| self.get(state)).sum()
    }

    pub(super) fn add(&mut self, state: StateName) {
        self.0[state as usize] += 1;
    }

    pub(super) fn remove(&mut self, state: StateName) {
        self.0[state as usize] -= 1;
    }
}

/// In the order of [`StateName::ALL`].
impl From<[u64; 7]> for Counters {
    fn from(counts: [u64; 7]) -> Self {
        Self(counts)
    }
}

/// A batch as the machine holds it.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub seq: BatchSeq,
    pub project: ProjectSeq,
    pub id: BatchId,
    pub params_digest: [u8; 32],
    pub opened_at: Timestamp,
    pub closed: bool,
    pub cancelled: bool,
    pub completed_at: Option<Timestamp>,
    /// Nobody finds it by its name any more, and its jobs are being removed.
    pub purging: bool,
    pub counters: Counters,
    pub jobs: BTreeMap<JobId, JobSeq>,
    /// End number → job.
    pub ended: BTreeMap<u64, JobSeq>,
    /// Chunks of which something is in the queue.
    pub chunks: BTreeMap<u32, ChunkRow>,
}

impl Batch {
    pub(super) fn is_done(&self) -> bool {
        self.closed && self.counters.active() == 0
    }
}
