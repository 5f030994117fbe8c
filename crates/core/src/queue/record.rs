//! The machine's rows as they are stored: JSON with a version in each, so that a file can be read by people and by
//! later versions. Golden files beside the tests hold one row of each sort for each version.
//!
//! A backend stores the bytes under the numbers given and gives all of them back to [`super::Loading`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{AttemptError, BatchSeq, Budgets, JobKind, JobSeq, JobState, ProjectSeq};
use crate::id::{BatchId, Fence, JobId, ProjectId};
use crate::time::Timestamp;

/// The version that this code writes.
pub const ROW_VERSION: u16 = 1;

/// A stored row that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not what this code writes.
    #[error("a stored {table} row cannot be read")]
    Unreadable {
        /// Which table.
        table: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A later version wrote it.
    #[error("a stored {table} row has version {found}; this program reads up to {ROW_VERSION}")]
    FromTheFuture {
        /// Which table.
        table: &'static str,
        /// Its version.
        found: u16,
    },
    /// Rows contradict each other.
    #[error("stored rows contradict each other: {0}")]
    Inconsistent(String),
}

/// A row of the job table, under its [`JobSeq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRow<'a> {
    pub(super) v: u16,
    pub(super) id: Cow<'a, JobId>,
    pub(super) batch: BatchSeq,
    pub(super) kind: JobKind,
    pub(super) priority: u8,
    #[serde(default, skip_serializing_if = "is_empty_set")]
    pub(super) needs: Cow<'a, BTreeSet<String>>,
    pub(super) budgets: Budgets,
    pub(super) starts: u32,
    pub(super) state: Cow<'a, JobState>,
    pub(super) submitted_at: Timestamp,
    pub(super) changed_at: Timestamp,
    pub(super) settled: Fence,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) max_runtime_us: u64,
    #[serde(serialize_with = "hex", deserialize_with = "unhex")]
    pub(super) digest: [u8; 32],
    #[serde(default, skip_serializing_if = "is_empty_slice")]
    pub(super) deps: Cow<'a, [JobSeq]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) not_before: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "is_empty_map")]
    pub(super) labels: Cow<'a, BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) traceparent: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<Cow<'a, AttemptError>>,
}

fn is_empty_set(set: &BTreeSet<String>) -> bool {
    set.is_empty()
}

fn is_empty_slice(slice: &[JobSeq]) -> bool {
    slice.is_empty()
}

fn is_empty_map(map: &BTreeMap<String, String>) -> bool {
    map.is_empty()
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde calls"
)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde calls"
)]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A row of the batch table, under its [`BatchSeq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchRow {
    pub(super) v: u16,
    pub(super) project: ProjectId,
    pub(super) project_seq: ProjectSeq,
    pub(super) batch: BatchId,
    #[serde(serialize_with = "hex", deserialize_with = "unhex")]
    pub(super) params_digest: [u8; 32],
    pub(super) opened_at: Timestamp,
    pub(super) closed: bool,
    pub(super) cancelled: bool,
    pub(super) completed_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) purging: bool,
}

/// A chunk that was taken, under its batch and number. What became of its jobs is seen at the jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRow {
    pub(super) v: u16,
    /// Of the chunk as its client sent it.
    #[serde(serialize_with = "hex", deserialize_with = "unhex")]
    pub(super) digest: [u8; 32],
}

/// A virtual time: of a project at one kind and priority, or the clock there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingRow {
    pub(super) v: u16,
    pub(super) vtime: u64,
}

/// What there is one of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaRow {
    pub(super) v: u16,
    pub(super) last_fence: Fence,
    pub(super) next_job: u64,
    pub(super) next_batch: u32,
    pub(super) next_project: u32,
    pub(super) next_end: u64,
}

/// The number of a virtual time: kind, and the project + 1, or 0 for the clock.
pub type RingNumber = (u8, u64);

/// A row to put under its number, or `None` to delete it.
pub type Change<N> = (N, Option<Vec<u8>>);

/// Rows that changed since they were last asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Jobs. Whatever a backend keeps beside a job goes with it.
    pub jobs: Vec<Change<JobSeq>>,
    /// Batches. Whatever a backend keeps beside a batch goes with it.
    pub batches: Vec<Change<BatchSeq>>,
    /// Chunks that were taken.
    pub chunks: Vec<Change<(BatchSeq, u32)>>,
    /// Virtual times.
    pub rings: Vec<Change<RingNumber>>,
    /// The one row.
    pub meta: Option<Vec<u8>>,
}

impl Changes {
    /// Nothing to store.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
            && self.batches.is_empty()
            && self.chunks.is_empty()
            && self.rings.is_empty()
            && self.meta.is_none()
    }
}

/// A sort of row.
pub(super) trait Row: Serialize + for<'de> Deserialize<'de> {
    const TABLE: &'static str;
    fn version(&self) -> u16;
}

macro_rules! row {
    ($type:ty, $table:literal) => {
        impl Row for $type {
            const TABLE: &'static str = $table;
            fn version(&self) -> u16 {
                self.v
            }
        }
    };
}

row!(JobRow<'static>, "job");
row!(BatchRow, "batch");
row!(ChunkRow, "chunk");
row!(RingRow, "ring");
row!(MetaRow, "meta");

/// The bytes of a row.
pub(super) fn encode(row: &impl Serialize) -> Vec<u8> {
    // Every row type has string keys and no fallible serializer, so that there is nothing to fail on.
    serde_json::to_vec(row).unwrap_or_default()
}

/// Reads a row and checks its version.
pub(super) fn decode<R: Row>(bytes: &[u8]) -> Result<R, RecordError> {
    let unreadable = |source| RecordError::Unreadable {
        table: R::TABLE,
        source,
    };
    let row: R = match serde_json::from_slice(bytes) {
        Ok(row) => row,
        Err(source) => return Err(version_error::<R>(bytes).unwrap_or_else(|| unreadable(source))),
    };
    if row.version() > ROW_VERSION {
        return Err(RecordError::FromTheFuture {
            table: R::TABLE,
            found: row.version(),
        });
    }
    Ok(row)
}

/// A later version is the better reason why a row cannot be read than the field that it lacks.
fn version_error<R: Row>(bytes: &[u8]) -> Option<RecordError> {
    #[derive(Deserialize)]
    struct Version {
        v: u16,
    }
    let found = serde_json::from_slice::<Version>(bytes).ok()?.v;
    (found > ROW_VERSION).then_some(RecordError::FromTheFuture {
        table: R::TABLE,
        found,
    })
}

fn hex<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0u8; 64];
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    serializer.serialize_str(std::str::from_utf8(&text).unwrap_or_default())
}

fn unhex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
    let text = Cow::<str>::deserialize(deserializer)?;
    let bad = || serde::de::Error::custom("a digest is 64 hexadecimal digits");
    let mut bytes = [0u8; 32];
    if text.len() != 64 || !text.is_ascii() {
        return Err(bad());
    }
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).map_err(|_| bad())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
