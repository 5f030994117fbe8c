//! The job queue as a pure state machine: which job may run next, who holds it, and what its end means for others.
//!
//! ```text
//!  BLOCKED ─deps done─► READY ─grant(fence+)─► LEASED ─ok──────────────► SUCCEEDED
//!  DELAYED ─due───────►  ▲ ▲                    │ ├─fatal / spent──────► DEAD   (requeue by operator)
//!                        │ └─backoff─ DELAYED ◄─┤ └─cancelled──────────► CANCELLED
//!                        └──── lease expired, preempted, released ◄──┘
//! ```
//!
//! [`Machine`] takes commands and the time, and changes itself. What a backend must store comes out of
//! [`Machine::take_changes`], what it must tell workers and watchers out of [`Machine::take_events`]. There is no IO,
//! no clock and no randomness here, and no job's spec or result either: those are bytes that the backend keeps beside
//! the rows. The embedded backend of the coordinator runs this code as it is; it is the oracle for any other backend.

mod batch;
mod event;
mod job;
mod lane;
mod machine;
mod plan;
mod record;
mod request;
mod ring;
mod view;

pub use batch::{Counters, NewBatch};
pub use event::{Event, RevokeReason};
pub use job::{
    AttemptError, Budgets, DeadReason, End, JobKind, JobState, Lease, NewJob, StateName,
};
pub use machine::{Cursor, Loading, Machine, MachineConfig};
pub use plan::{Dep, Known, Plan, name_taken, plan, too_many_lanes, unknown_dep};
pub use record::{BatchRow, Change, Changes, ChunkRow, JobRow, MetaRow, RecordError, RingRow};
pub use request::{
    Cancelled, ChunkAnswer, FinishReply, Grant, ItemResult, LeaseRequest, Outcome, Refusal,
    RenewReply, Selector, Ticked,
};
pub use view::{BatchView, EndedJob, JobFilter, JobView, QueueStats, StatLine};

/// Most jobs in one chunk: bounds the time that one command holds the machine.
pub const CHUNK_JOBS_MAX: usize = 10_000;
/// Most dependencies of one job: enough for a report over one full chunk.
pub const DEPS_MAX: usize = 10_000;
/// Most tags that a job may need: those that a spec may list, and one for each MCP server that it may use.
pub const NEEDS_MAX: usize = 80;
/// Most labels of a job, as many as a spec may have.
pub const LABELS_MAX: usize = 64;
/// Longest tag, label key or label value, in bytes.
pub const TAG_BYTES_MAX: usize = 256;
/// Most distinct pairs of kind and needs at one time among the jobs of one project: a project knows its sorts of
/// workers, and one that makes up needs takes no room of others.
pub const PROJECT_LANES_MAX: usize = 256;
/// Most distinct pairs of kind and needs at one time in a queue, far above what projects come to together: each lease
/// looks at all lanes of its kind.
pub const LANES_MAX: usize = 16_384;
/// Most jobs that one finish may spawn: a round of probing, not a batch of its own.
pub const SPAWN_MAX: usize = 1_000;
/// Most jobs that one lease request may take.
pub const GRANTS_MAX: u32 = 1_000;
/// Most due or expired jobs that a lease moves on its way.
pub const ON_THE_WAY_MAX: usize = 64;
/// Longest error message that a job keeps, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1_024;
/// Longest tail of a log that a job keeps, in bytes.
pub const LOG_TAIL_BYTES_MAX: usize = 4_096;
/// Longest progress text of a running job, in bytes.
pub const PROGRESS_BYTES_MAX: usize = 256;
/// The highest priority; the lowest is 0.
pub const PRIORITY_MAX: u8 = 9;
/// How long the grants of a lease request are repeated to the same request id: longer than a backend may take to say
/// that an answer was lost, and the caller to ask again.
pub const LEASE_REPEAT: std::time::Duration = std::time::Duration::from_secs(30);

/// The number of a job within one queue: never reused, so that rows and order survive a restart.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct JobSeq(pub u64);

/// The number of a batch within one queue: never reused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct BatchSeq(pub u32);

/// The number of a project within one queue: never reused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct ProjectSeq(pub u32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::limits;

    #[test]
    fn a_spec_within_its_limits_meets_no_tighter_one_here() {
        assert_eq!(LABELS_MAX, limits::LIST_MAX);
        assert_eq!(NEEDS_MAX, limits::LIST_MAX + limits::SERVERS_MAX);
        assert_eq!(TAG_BYTES_MAX, limits::NAME_BYTES_MAX);
    }
}
