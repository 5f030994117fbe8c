//! Writes chunks that the queue took to the object store, all that wait in one go: while one write is under way the next
//! ones gather, so that thousands of chunks of one job cost no more requests than the store has time for (group commit).
//! Neighbours of one batch become one object.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{self, ChunkRange, JournalEntry};
use espalier_runtime::store::{Created, Store, StoreError};
use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::telemetry;
use futures::{StreamExt, stream};
use tokio::sync::oneshot;

use super::record;

/// How long the store may take for one object.
pub const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Objects that are written at once: hides the latency of a store.
const WRITES_MAX: usize = 16;
/// Bytes of chunks in one object, beyond which the next chunk begins another.
const OBJECT_BYTES: usize = 8 << 20;
/// How long those who are not alone wait for more, so that a fast store gets few requests too (PostgreSQL's
/// `commit_delay` and `commit_siblings`).
const GATHER: Duration = Duration::from_millis(20);
/// Bytes above which a write is worth its request as it is.
const WORTH_A_WRITE: usize = 64 << 10;

/// What the queue took of a chunk.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The tenant.
    pub project: ProjectId,
    /// The batch.
    pub batch: BatchId,
    /// Number of the chunk.
    pub n: u32,
    /// What [`record::encode_chunk`] makes of it.
    pub row: Bytes,
}

/// What was not kept, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotKept(String);

type Kept = Result<(), NotKept>;

#[derive(Debug)]
struct Waiting {
    taken: Taken,
    done: oneshot::Sender<Kept>,
}

/// The way of chunks into the store.
#[derive(Debug)]
pub struct Writer {
    store: Store,
    queue_name: String,
    waiting: Mutex<Vec<Waiting>>,
    /// Held by the one who writes for all.
    turn: tokio::sync::Mutex<()>,
}

/// Chunks that go into one object.
#[derive(Debug)]
struct Group {
    project: ProjectId,
    batch: BatchId,
    range: ChunkRange,
    rows: Vec<Bytes>,
    bytes: usize,
    done: Vec<oneshot::Sender<Kept>>,
}

impl Writer {
    /// Of the queue with this name.
    pub fn new(store: Store, queue_name: &str) -> Self {
        Self {
            store,
            queue_name: queue_name.to_owned(),
            waiting: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Comes back when the store has it. Whoever finds nobody writing writes for all who wait; if its client goes in the
    /// middle of that, the others begin again.
    pub async fn keep(&self, taken: Taken) -> Kept {
        loop {
            let (done, mut kept) = oneshot::channel();
            let taken = taken.clone();
            self.lock().push(Waiting { taken, done });
            tokio::select! {
                biased;
                kept = &mut kept => match kept {
                    Ok(kept) => return kept,
                    Err(_) => continue,
                },
                _turn = self.turn.lock() => self.write_all().await,
            }
            // It was among those that were written.
            if let Ok(kept) = kept.await {
                return kept;
            }
        }
    }

    /// No code that may panic runs under this lock.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write_all(&self) {
        if self.is_worth_gathering() {
            tokio::time::sleep(GATHER).await;
        }
        let waiting = std::mem::take(&mut *self.lock());
        let writes = groups(waiting)
            .into_iter()
            .map(|group| self.write_group(group));
        let mut writes = stream::iter(writes).buffer_unordered(WRITES_MAX);
        while writes.next().await.is_some() {}
    }

    fn is_worth_gathering(&self) -> bool {
        let waiting = self.lock();
        let bytes: usize = waiting.iter().map(|one| one.taken.row.len()).sum();
        waiting.len() > 1 && bytes < WORTH_A_WRITE
    }

    async fn write_group(&self, group: Group) {
        let entry = JournalEntry::Chunks(group.range);
        let path = layout::journal_entry(&self.queue_name, &group.project, &group.batch, entry);
        let written = self.write(&path, joined(group.rows));
        let kept = match with_deadline("journal.write", WRITE_LIMIT, written).await {
            Ok(kept) => kept,
            Err(timeout) => Err(NotKept(timeout.to_string())),
        };
        for done in group.done {
            let _ = done.send(kept.clone());
        }
    }

    /// What is kept since a chunk came before was acknowledged, and stays beside it, whatever the door makes of the same
    /// chunk now.
    async fn write(&self, path: &str, rows: Bytes) -> Kept {
        if self.store.create(path, rows.clone()).await? == Created::New {
            return Ok(());
        }
        let kept = self.store.get(path).await?;
        let merged = tasks::blocking("journal.merge", move || record::merged(kept, rows));
        let merged = merged.await.map_err(|error| NotKept(error.to_string()))?;
        match merged.map_err(|error| NotKept(error.to_string()))? {
            Some(merged) => Ok(self.store.put(path, merged).await?),
            None => Ok(()),
        }
    }
}

impl From<StoreError> for NotKept {
    fn from(error: StoreError) -> Self {
        let shown = telemetry::error_chain(&error);
        tracing::error!(error = shown, "the store did not keep what the queue took");
        Self(error.kind.as_str().to_owned())
    }
}

/// One chunk is not copied.
fn joined(mut rows: Vec<Bytes>) -> Bytes {
    match rows.len() {
        1 => rows.remove(0),
        _ => rows.concat().into(),
    }
}

/// Neighbours together, in the order in which they came where a number came twice.
fn groups(mut waiting: Vec<Waiting>) -> Vec<Group> {
    waiting.sort_by(|a, b| {
        let name = |one: &Waiting| {
            (
                one.taken.project.clone(),
                one.taken.batch.clone(),
                one.taken.n,
            )
        };
        name(a).cmp(&name(b))
    });
    let mut groups: Vec<Group> = Vec::new();
    for Waiting { taken, done } in waiting {
        match groups.last_mut() {
            Some(group) if group.takes(&taken) => {
                group.range.last = taken.n;
                group.bytes += taken.row.len();
                group.rows.push(taken.row);
                group.done.push(done);
            }
            _ => groups.push(Group {
                project: taken.project,
                batch: taken.batch,
                range: ChunkRange::of(taken.n),
                bytes: taken.row.len(),
                rows: vec![taken.row],
                done: vec![done],
            }),
        }
    }
    groups
}

impl Group {
    /// One number is never written in two objects of one name at once: what came twice is no reason for another group.
    fn takes(&self, next: &Taken) -> bool {
        if (&self.project, &self.batch) != (&next.project, &next.batch) {
            return false;
        }
        let has_room = self.bytes + next.row.len() <= OBJECT_BYTES
            && next.n - self.range.first < ChunkRange::LEN_MAX;
        match next.n - self.range.last {
            0 => true,
            1 => has_room,
            _ => false,
        }
    }
}
