//! What a command made happen that somebody outside wants to know at once. Events are hints: whoever misses one
//! finds the same in the machine's state.

use std::collections::BTreeSet;

use super::JobKind;
use crate::id::{Fence, JobKey, WorkerId};

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
    /// Events may have been lost on the way here: whoever acts on events asks for everything. Not the machine's.
    Missed,
    /// A coordinator tells all others something; opaque. Not the machine's.
    Notice(Vec<u8>),
}
