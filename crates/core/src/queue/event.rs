//! What a command made happen that somebody outside wants to know at once. Events are hints: whoever misses one
//! finds the same in the machine's state.

use std::collections::BTreeSet;

use super::{DeadReason, JobKind, StateName};
use crate::id::{BatchId, Fence, JobKey, ProjectId, WorkerId};

/// Why a lease was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevokeReason {
    /// It was not renewed in time.
    Expired,
    /// The attempt ran longer than the job allows.
    RanTooLong,
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// At least one job of this lane became ready.
    Ready {
        /// The sort of work.
        kind: JobKind,
        /// Tags that a worker must offer.
        needs: BTreeSet<String>,
    },
    /// A job ended.
    Ended {
        /// Which.
        key: JobKey,
        /// The sort of work.
        kind: JobKind,
        /// How.
        state: StateName,
        /// Why, where it is dead.
        reason: Option<DeadReason>,
        /// Its place in the order of ends.
        seq: u64,
    },
    /// The holder of a lease should stop: the job was cancelled.
    CancelRequested {
        /// Who holds it.
        worker: WorkerId,
        /// Which job.
        key: JobKey,
        /// Under which lease.
        fence: Fence,
    },
    /// A lease is no more; its holder should stop.
    Revoked {
        /// Who held it.
        worker: WorkerId,
        /// Which job.
        key: JobKey,
        /// Under which lease.
        fence: Fence,
        /// Why.
        reason: RevokeReason,
    },
    /// A batch is closed and all its jobs have ended.
    BatchCompleted {
        /// The tenant.
        project: ProjectId,
        /// Which.
        batch: BatchId,
    },
}
