//! One job: what a client says of it, the state it is in, and what the end of an attempt makes of it.
//!
//! The decisions here look at one job only. Indexes, order and dependencies are the machine's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{BatchSeq, JobSeq, LOG_TAIL_BYTES_MAX, MESSAGE_BYTES_MAX};
use crate::error::{ErrorClass, FieldError};
use crate::id::{Fence, JobId, JobKey, WorkerId};
use crate::time::Timestamp;

/// What sort of work a job is; the sort of slot that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// An agent with tools works on a task.
    Rollout,
    /// Batch inference.
    Generate,
    /// A dataset becomes an adapter.
    Train,
    /// Traces become a dataset.
    Curate,
    /// Evaluation results become a report.
    Compare,
    /// An adapter is merged or pushed.
    Export,
}

impl JobKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::Rollout,
        Self::Generate,
        Self::Train,
        Self::Curate,
        Self::Compare,
        Self::Export,
    ];

    /// The name in records, requests and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rollout => "rollout",
            Self::Generate => "generate",
            Self::Train => "train",
            Self::Curate => "curate",
            Self::Compare => "compare",
            Self::Export => "export",
        }
    }

    /// How long a lease lasts without renewal, where the worker asks for nothing else.
    pub fn lease_ttl(self) -> Duration {
        Duration::from_secs(match self {
            Self::Generate => 30,
            Self::Train => 120,
            Self::Rollout | Self::Curate | Self::Compare | Self::Export => 60,
        })
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for JobKind {
    type Err = FieldError;

    fn from_str(value: &str) -> Result<Self, FieldError> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == value);
        found.ok_or_else(|| {
            FieldError::new(
                "kind",
                value,
                "must be one of rollout, generate, train, curate, compare, export",
            )
        })
    }
}

/// A job as a client submits it, less its spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJob {
    /// The name within the batch.
    pub id: JobId,
    /// The sort of work.
    pub kind: JobKind,
    /// 0 to 9; higher goes first.
    pub priority: u8,
    /// Tags that a worker must offer, such as `mcp:browser`.
    pub needs: BTreeSet<String>,
    /// Jobs of the same project that must succeed first.
    pub deps: Vec<JobKey>,
    /// Not to be granted before this moment.
    pub not_before: Option<Timestamp>,
    /// Failures of the handler, counting the last, after which the job is dead.
    pub max_attempts: u16,
    /// Failures of infrastructure, counting the last, after which the job is dead.
    pub max_infra: u16,
    /// Longest time of one attempt; a longer one is ended and counts as a failure of the handler.
    pub max_runtime: Option<Duration>,
    /// For filters and for cancelling many.
    pub labels: BTreeMap<String, String>,
    /// Digest of the whole submission: the same id with the same digest is the same job.
    pub spec_digest: [u8; 32],
    /// W3C trace context of the submitter.
    pub traceparent: Option<String>,
}

impl NewJob {
    /// Handler failures that a job may have unless it says otherwise.
    pub const MAX_ATTEMPTS_DEFAULT: u16 = 3;
    /// Infrastructure failures that a job may have unless it says otherwise.
    pub const MAX_INFRA_DEFAULT: u16 = 20;
    /// Priority unless the job says otherwise.
    pub const PRIORITY_DEFAULT: u8 = 5;

    /// A job with every default.
    pub fn new(id: JobId, kind: JobKind, spec_digest: [u8; 32]) -> Self {
        Self {
            id,
            kind,
            priority: Self::PRIORITY_DEFAULT,
            needs: BTreeSet::new(),
            deps: Vec::new(),
            not_before: None,
            max_attempts: Self::MAX_ATTEMPTS_DEFAULT,
            max_infra: Self::MAX_INFRA_DEFAULT,
            max_runtime: None,
            labels: BTreeMap::new(),
            spec_digest,
            traceparent: None,
        }
    }
}

/// What a job may still spend, and what it has spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budgets {
    /// Handler failures after which the job is dead.
    pub max_attempts: u16,
    /// Infrastructure failures after which the job is dead.
    pub max_infra: u16,
    /// Handler failures so far.
    pub failures: u16,
    /// Infrastructure failures so far.
    pub infra: u16,
}

/// A grant that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who holds it.
    pub worker: WorkerId,
    /// Its number; only a finish with this one is accepted.
    pub fence: Fence,
    /// When it was granted.
    pub granted_at: Timestamp,
    /// When it ends unless renewed.
    pub deadline: Timestamp,
    /// How much a renewal adds to the present, in microseconds.
    pub ttl_us: u64,
    /// When the attempt has run too long, whatever is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_until: Option<Timestamp>,
    /// Since when the job had been ready.
    pub ready_since: Timestamp,
    /// Somebody wants the job cancelled; the worker is told at its next renewal at the latest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancel_requested: bool,
    /// What the worker last said of its progress. Not stored.
    #[serde(skip)]
    pub progress: Option<Box<str>>,
}

impl Lease {
    /// The deadline that a renewal at `now` gives.
    pub(super) fn renewed(&self, now: Timestamp) -> Timestamp {
        let deadline = now + Duration::from_micros(self.ttl_us);
        self.run_until.map_or(deadline, |end| end.min(deadline))
    }
}

/// When a job ended, and its place in the order of ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The moment.
    pub at: Timestamp,
    /// Grows with every end in the queue, so that a watcher can resume after the last one it saw.
    pub seq: u64,
}

/// Why a job is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// A worker found that the job cannot succeed as written.
    Invalid,
    /// `max_attempts` handler failures.
    Attempts,
    /// `max_infra` infrastructure failures.
    Infra,
    /// A job that it depends on is dead or was cancelled.
    Dependency,
}

impl DeadReason {
    /// The name in records and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Attempts => "attempts",
            Self::Infra => "infra",
            Self::Dependency => "dependency",
        }
    }
}

/// Where a job is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum JobState {
    /// Waits for other jobs.
    Blocked,
    /// Waits for a moment.
    Delayed {
        /// The moment.
        until: Timestamp,
    },
    /// Waits for a worker.
    Ready,
    /// A worker has it.
    Leased(Box<Lease>),
    /// Done.
    Succeeded(End),
    /// Given up; an operator may requeue it.
    Dead {
        /// When.
        end: End,
        /// Why.
        reason: DeadReason,
    },
    /// Somebody cancelled it.
    Cancelled(End),
}

impl JobState {
    /// The state without its details.
    pub fn name(&self) -> StateName {
        match self {
            Self::Blocked => StateName::Blocked,
            Self::Delayed { .. } => StateName::Delayed,
            Self::Ready => StateName::Ready,
            Self::Leased(_) => StateName::Leased,
            Self::Succeeded(_) => StateName::Succeeded,
            Self::Dead { .. } => StateName::Dead,
            Self::Cancelled(_) => StateName::Cancelled,
        }
    }

    /// When and where in the order the job ended, if it did.
    pub fn end(&self) -> Option<End> {
        match self {
            Self::Succeeded(end) | Self::Cancelled(end) | Self::Dead { end, .. } => Some(*end),
            _ => None,
        }
    }
}

/// The names of the states, for filters and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateName {
    /// See [`JobState::Blocked`].
    Blocked,
    /// See [`JobState::Delayed`].
    Delayed,
    /// See [`JobState::Ready`].
    Ready,
    /// See [`JobState::Leased`].
    Leased,
    /// See [`JobState::Succeeded`].
    Succeeded,
    /// See [`JobState::Dead`].
    Dead,
    /// See [`JobState::Cancelled`].
    Cancelled,
}

impl StateName {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Blocked,
        Self::Delayed,
        Self::Ready,
        Self::Leased,
        Self::Succeeded,
        Self::Dead,
        Self::Cancelled,
    ];

    /// The name in requests, answers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Blocked => "blocked",
            Self::Delayed => "delayed",
            Self::Ready => "ready",
            Self::Leased => "leased",
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens to the job by itself.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Dead | Self::Cancelled)
    }
}

/// Why the last attempt of a job did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptError {
    /// What sort of failure it was.
    pub class: ErrorClass,
    /// One line for people.
    pub message: String,
    /// The last lines of the attempt's log.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub log_tail: String,
}

impl AttemptError {
    /// Cuts `message` at its end and `log_tail` at its beginning to what a job may keep.
    pub fn new(class: ErrorClass, message: &str, log_tail: &str) -> Self {
        let message_end = message.floor_char_boundary(MESSAGE_BYTES_MAX);
        let excess = log_tail.len().saturating_sub(LOG_TAIL_BYTES_MAX);
        let tail_start = log_tail.ceil_char_boundary(excess);
        Self {
            class,
            message: message[..message_end].to_owned(),
            log_tail: log_tail[tail_start..].to_owned(),
        }
    }
}

/// A job as the machine holds it. What most jobs lack is in `rare`, to keep a million of them small.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub id: JobId,
    pub batch: BatchSeq,
    pub lane: u32,
    pub kind: JobKind,
    pub priority: u8,
    pub budgets: Budgets,
    /// Grants so far.
    pub starts: u32,
    pub state: JobState,
    pub submitted_at: Timestamp,
    pub changed_at: Timestamp,
    /// The fence of the last attempt whose finish was accepted.
    pub settled: Fence,
    /// Zero for no limit.
    pub max_runtime_us: u64,
    pub digest: [u8; 32],
    /// Dependencies that have not succeeded.
    pub waits_for: u32,
    /// Listed among the machine's changes already.
    pub dirty: bool,
    pub rare: Option<Box<Rare>>,
}

/// The parts of a job that most jobs lack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rare {
    pub deps: Vec<JobSeq>,
    pub not_before: Option<Timestamp>,
    pub labels: BTreeMap<String, String>,
    pub traceparent: Option<String>,
    pub error: Option<AttemptError>,
}

impl Job {
    pub(super) fn deps(&self) -> &[JobSeq] {
        self.rare.as_ref().map_or(&[], |rare| &rare.deps)
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        match &self.state {
            JobState::Leased(lease) => Some(lease),
            _ => None,
        }
    }

    pub(super) fn has_label(&self, key: &str, value: &str) -> bool {
        let rare = self.rare.as_ref();
        rare.and_then(|rare| rare.labels.get(key))
            .is_some_and(|held| held == value)
    }

    pub(super) fn set_error(&mut self, error: AttemptError) {
        self.rare.get_or_insert_default().error = Some(error);
    }
}

/// What follows from an attempt that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Ready,
    RetryAfter(Duration),
    Dead(DeadReason),
    Cancelled,
}

/// Spends the budget that `class` counts against and says what follows. `salt` spreads retries in time: the same
/// salt gives the same delay.
pub(super) fn after_failure(
    budgets: &mut Budgets,
    class: ErrorClass,
    retry_after: Option<Duration>,
    salt: u64,
) -> Next {
    let (spent, max, reason, free) = match class {
        ErrorClass::Invalid => return Next::Dead(DeadReason::Invalid),
        ErrorClass::Preempted => return Next::Ready,
        ErrorClass::Cancelled => return Next::Cancelled,
        ErrorClass::Handler => (
            &mut budgets.failures,
            budgets.max_attempts,
            DeadReason::Attempts,
            0,
        ),
        // A worker was lost: that says nothing about the next one.
        ErrorClass::Infra => (&mut budgets.infra, budgets.max_infra, DeadReason::Infra, 1),
    };
    *spent = spent.saturating_add(1);
    if *spent >= max {
        return Next::Dead(reason);
    }
    let asked = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
    match backoff(*spent - free, salt).max(asked) {
        Duration::ZERO => Next::Ready,
        wait => Next::RetryAfter(wait),
    }
}

const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A worker passes on what a model endpoint asks for; an hour is the most that is believed.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// The wait before the try after failure number `failures` (from 1): doubles from 1 s to 5 min, less up to half of it.
/// No wait after none.
/// Whole milliseconds and products below 2^53, so that a script which has only doubles comes to the same.
fn backoff(failures: u16, salt: u64) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else {
        return Duration::ZERO;
    };
    let doublings = u32::from(doublings).min(16);
    let whole = BACKOFF_FIRST
        .saturating_mul(1 << doublings)
        .min(BACKOFF_MAX);
    let half_ms = whole.as_millis() as u64 / 2;
    Duration::from_millis(half_ms + half_ms * spread(salt) / SPREAD_MODULUS)
}

/// 2^31 - 1, a prime.
const SPREAD_MODULUS: u64 = 0x7FFF_FFFF;

/// Spreads neighbours evenly below [`SPREAD_MODULUS`]: two steps of the generator of Park, Miller and Stockmeyer 1993.
fn spread(x: u64) -> u64 {
    let step = |x: u64| x * 48_271 % SPREAD_MODULUS;
    step(step(x % SPREAD_MODULUS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Budgets {
        Budgets {
            max_attempts: 3,
            max_infra: 20,
            failures: 0,
            infra: 0,
        }
    }

    #[test]
    fn each_budget_is_spent_by_its_own_class() {
        let mut budgets = fresh();
        for _ in 0..2 {
            assert!(matches!(
                after_failure(&mut budgets, ErrorClass::Handler, None, 1),
                Next::RetryAfter(_)
            ));
        }
        assert_eq!(
            after_failure(&mut budgets, ErrorClass::Infra, None, 1),
            Next::Ready,
            "the first lost worker costs no wait"
        );
        for _ in 0..18 {
            assert!(matches!(
                after_failure(&mut budgets, ErrorClass::Infra, None, 1),
                Next::RetryAfter(_)
            ));
        }
        assert_eq!(
            after_failure(&mut budgets, ErrorClass::Preempted, None, 1),
            Next::Ready
        );
        assert_eq!((budgets.failures, budgets.infra), (2, 19));
        let mut other = budgets;
        assert_eq!(
            after_failure(&mut budgets, ErrorClass::Handler, None, 1),
            Next::Dead(DeadReason::Attempts)
        );
        assert_eq!(
            after_failure(&mut other, ErrorClass::Infra, None, 1),
            Next::Dead(DeadReason::Infra)
        );
        assert_eq!(
            after_failure(&mut fresh(), ErrorClass::Invalid, None, 1),
            Next::Dead(DeadReason::Invalid)
        );
    }

    #[test]
    fn backoff_doubles_with_jitter_up_to_a_limit() {
        for failures in 1..40 {
            let whole = Duration::from_secs(1 << (failures - 1).min(16)).min(BACKOFF_MAX);
            let spread: BTreeSet<_> = (0..50).map(|salt| backoff(failures, salt)).collect();
            assert!(
                spread
                    .iter()
                    .all(|wait| *wait <= whole && *wait >= whole / 2)
            );
            assert!(spread.len() > 40, "jitter spreads: {spread:?}");
            assert_eq!(backoff(failures, 7), backoff(failures, 7));
        }
    }

    #[test]
    fn retry_after_is_obeyed_within_reason() {
        let wait = |asked| after_failure(&mut fresh(), ErrorClass::Handler, Some(asked), 1);
        assert_eq!(
            wait(Duration::from_secs(40)),
            Next::RetryAfter(Duration::from_secs(40))
        );
        assert_eq!(
            wait(Duration::from_secs(1 << 40)),
            Next::RetryAfter(RETRY_AFTER_MAX)
        );
    }

    #[test]
    fn errors_are_cut_at_characters() {
        let error = AttemptError::new(
            ErrorClass::Handler,
            &"é".repeat(4_000),
            &format!("x{}end", "é".repeat(4_000)),
        );
        assert!(error.message.len() <= MESSAGE_BYTES_MAX);
        assert!(error.log_tail.len() <= LOG_TAIL_BYTES_MAX);
        assert!(error.log_tail.ends_with("end"));
    }

    #[test]
    fn a_job_stays_small() {
        assert!(size_of::<Job>() <= 208, "{}", size_of::<Job>());
    }
}
