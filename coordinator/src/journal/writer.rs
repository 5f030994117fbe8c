//! Writes chunks that the queue took to the object store, those of one batch together: while one write is under way the
//! next ones gather, so that thousands of chunks of one job cost no more requests than the store has time for (group
//! commit). Neighbours become one object.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{self, ChunkRange, JournalEntry};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::{Created, Store, StoreError};
use espalier_runtime::tasks::{self, OnFailure, Tasks, with_deadline};
use espalier_runtime::telemetry;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::record;

/// How long the store may take for one object.
pub const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Batches that are written at once: hides the latency of a store.
const WRITES_MAX: usize = 16;
/// Chunks on their way to the task; a full channel makes their callers wait.
const WAITING_MAX: usize = 1_024;
/// Bytes of chunks in one object, beyond which the next chunk begins another.
const OBJECT_BYTES: usize = 8 << 20;
/// Numbers that may be missing between two chunks of an object: other coordinators take some of a batch.
const GAP_MAX: u32 = 8;
/// How long a batch rests after several chunks that were small, so that a fast store gets few requests too: what
/// `commit_delay` and `commit_siblings` are to PostgreSQL.
const REST: Duration = Duration::from_millis(20);
/// Bytes from which a write is worth its request, and needs no rest.
const WORTH_A_WRITE: usize = 64 << 10;

/// A batch by name.
type Name = (ProjectId, BatchId);

/// What was not kept, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotKept(String);

type Kept = Result<(), NotKept>;

/// What the queue took of a chunk, as [`record::encode_chunk`] has it, and who waits for it.
#[derive(Debug)]
struct Taken {
    n: u32,
    row: Bytes,
    done: oneshot::Sender<Kept>,
}

/// The way of chunks into the store.
#[derive(Debug)]
pub struct Writer {
    taken: mpsc::Sender<(Name, Taken)>,
}

impl Writer {
    /// Starts the task that writes, for the queue with this name.
    pub fn start(store: Store, queue_name: &str, tasks: &Tasks, shutdown: &Shutdown) -> Self {
        let (taken, received) = mpsc::channel(WAITING_MAX);
        let queue_name = queue_name.to_owned();
        let objects = Arc::new(Objects { store, queue_name });
        let shutdown = shutdown.clone();
        tasks.spawn_apart("journal.writer", OnFailure::ShutDown, async move {
            tokio::select! {
                () = write_all(&objects, received) => {}
                () = shutdown.aborted() => {}
            }
        });
        Self { taken }
    }

    /// Comes back when the store has the chunk. One whose caller has gone is written nevertheless.
    pub async fn keep(&self, name: Name, n: u32, row: Bytes) -> Kept {
        let (done, kept) = oneshot::channel();
        let sent = self.taken.send((name, Taken { n, row, done })).await;
        let ended = || NotKept("the coordinator is stopping".to_owned());
        sent.map_err(|_| ended())?;
        kept.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Writes what comes, of each batch one write at a time, until nobody can send any more.
async fn write_all(objects: &Objects, mut taken: mpsc::Receiver<(Name, Taken)>) {
    let mut waiting: HashMap<Name, Vec<Taken>> = HashMap::new();
    let (mut busy, mut writing) = (HashSet::new(), FuturesUnordered::new());
    loop {
        tokio::select! {
            received = taken.recv() => match received {
                Some((name, chunk)) => waiting.entry(name).or_default().push(chunk),
                None => return,
            },
            Some(name) = writing.next() => drop(busy.remove(&name)),
        }
        while let Ok((name, chunk)) = taken.try_recv() {
            waiting.entry(name).or_default().push(chunk);
        }
        let free: Vec<Name> = waiting
            .keys()
            .filter(|name| !busy.contains(*name))
            .take(WRITES_MAX - writing.len())
            .cloned()
            .collect();
        for name in free {
            if let Some(chunks) = waiting.remove(&name) {
                busy.insert(name.clone());
                writing.push(objects.write(name, chunks));
            }
        }
    }
}

/// Where the objects go.
struct Objects {
    store: Store,
    queue_name: String,
}

impl Objects {
    /// Writes chunks of one batch, and rests where that saves requests.
    async fn write(&self, name: Name, chunks: Vec<Taken>) -> Name {
        let bytes: usize = chunks.iter().map(|chunk| chunk.row.len()).sum();
        let rests = chunks.len() > 1 && bytes < WORTH_A_WRITE;
        let writes = groups(chunks);
        join_all(
            writes
                .into_iter()
                .map(|group| self.write_group(&name, group)),
        )
        .await;
        if rests {
            tokio::time::sleep(REST).await;
        }
        name
    }

    async fn write_group(&self, (project, batch): &Name, group: Group) {
        let entry = JournalEntry::Chunks(group.range);
        let path = layout::journal_entry(&self.queue_name, project, batch, entry);
        let written = self.write_object(&path, joined(group.rows));
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
    async fn write_object(&self, path: &str, rows: Bytes) -> Kept {
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

/// Chunks that go into one object.
#[derive(Debug)]
struct Group {
    range: ChunkRange,
    rows: Vec<Bytes>,
    bytes: usize,
    done: Vec<oneshot::Sender<Kept>>,
}

/// Neighbours together, in the order in which they came where a number came twice.
fn groups(mut chunks: Vec<Taken>) -> Vec<Group> {
    chunks.sort_by_key(|chunk| chunk.n);
    let mut groups: Vec<Group> = Vec::new();
    for Taken { n, row, done } in chunks {
        match groups.last_mut() {
            Some(group) if group.takes(n, row.len()) => {
                group.range.last = n;
                group.bytes += row.len();
                group.rows.push(row);
                group.done.push(done);
            }
            _ => groups.push(Group {
                range: ChunkRange::of(n),
                bytes: row.len(),
                rows: vec![row],
                done: vec![done],
            }),
        }
    }
    groups
}

impl Group {
    /// What came twice is never written in two objects at once, which could be two writes of one name.
    fn takes(&self, n: u32, bytes: usize) -> bool {
        let has_room = self.bytes + bytes <= OBJECT_BYTES
            && n - self.range.first < ChunkRange::LEN_MAX
            && n - self.range.last <= GAP_MAX;
        n == self.range.last || has_room
    }
}

/// One chunk is not copied.
fn joined(mut rows: Vec<Bytes>) -> Bytes {
    match rows.len() {
        1 => rows.remove(0),
        _ => rows.concat().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(chunks: &[(u32, usize)]) -> Vec<(u32, u32, usize)> {
        let taken = |(n, bytes): &(u32, usize)| Taken {
            n: *n,
            row: vec![0; *bytes].into(),
            done: oneshot::channel().0,
        };
        let groups = groups(chunks.iter().map(taken).collect());
        let shown = |group: &Group| (group.range.first, group.range.last, group.rows.len());
        groups.iter().map(shown).collect()
    }

    #[test]
    fn neighbours_and_what_came_twice_become_one_object() {
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[(7, 1)]), [(7, 7, 1)]);
        assert_eq!(ranges(&[(5, 1), (3, 1), (4, 1), (3, 1)]), [(3, 5, 4)]);
        // Two coordinators take turns.
        assert_eq!(ranges(&[(0, 1), (2, 1), (4, 1)]), [(0, 4, 3)]);
        assert_eq!(ranges(&[(0, 1), (9, 1)]), [(0, 0, 1), (9, 9, 1)]);
    }

    #[test]
    fn an_object_has_bounds() {
        let big = OBJECT_BYTES;
        let parted = [(0, 0, 1), (1, 1, 2), (2, 2, 1)];
        assert_eq!(ranges(&[(0, big), (1, big), (1, big), (2, big)]), parted);
        let many: Vec<_> = (0..=ChunkRange::LEN_MAX).map(|n| (n, 1)).collect();
        let last = ChunkRange::LEN_MAX - 1;
        let expected = [(0, last, last as usize + 1), (last + 1, last + 1, 1)];
        assert_eq!(ranges(&many), expected);
    }
}
