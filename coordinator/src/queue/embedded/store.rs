//! The redb file: the machine's rows and the payloads beside them, one table each. It knows no rule of the queue.
//!
//! A job's number is the key of its row, spec and result, so that new jobs append and a grant reads by number.

use std::path::Path;

use espalier_core::queue::{BatchSeq, Changes, JobSeq, Loading, Machine, MachineConfig};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use super::super::JobResult;

const JOBS: TableDefinition<u64, &[u8]> = TableDefinition::new("jobs");
const BATCHES: TableDefinition<u32, &[u8]> = TableDefinition::new("batches");
const CHUNKS: TableDefinition<(u32, u32), &[u8]> = TableDefinition::new("chunks");
const RINGS: TableDefinition<(u8, u64), &[u8]> = TableDefinition::new("rings");
const META: TableDefinition<u8, &[u8]> = TableDefinition::new("meta");
const SPECS: TableDefinition<u64, &[u8]> = TableDefinition::new("specs");
const DEFAULTS: TableDefinition<u32, &[u8]> = TableDefinition::new("defaults");
/// Manifest path and summary.
const RESULTS: TableDefinition<u64, (&str, &[u8])> = TableDefinition::new("results");
/// The version of this set of tables; rows carry versions of their own.
const FORMAT: TableDefinition<&str, u32> = TableDefinition::new("format");
const FORMAT_KEY: &str = "version";
const FORMAT_VERSION: u32 = 1;

/// What the file did not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("the queue's file cannot be opened")]
    Open(#[from] redb::DatabaseError),
    #[error("the queue's file cannot be read or written")]
    Io(#[from] redb::Error),
    #[error("the queue's file has format {0}; this program reads format {FORMAT_VERSION}")]
    Format(u32),
    #[error("the queue's file lacks the {table} row {number}")]
    Missing { table: &'static str, number: u64 },
    #[error("a stored row is wrong")]
    Record(#[from] espalier_core::queue::RecordError),
}

impl StoreError {
    /// Whether the disk takes no more.
    pub fn is_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        let kind = match self {
            Self::Io(redb::Error::Io(error)) => error.kind(),
            Self::Open(redb::DatabaseError::Storage(redb::StorageError::Io(error))) => error.kind(),
            _ => return false,
        };
        matches!(kind, StorageFull | QuotaExceeded)
    }
}

macro_rules! io_error {
    ($($type:ty),*) => {
        $(impl From<$type> for StoreError {
            fn from(error: $type) -> Self {
                Self::Io(error.into())
            }
        })*
    };
}

io_error!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

/// Payloads that go to the file in the same commit as the rows.
#[derive(Debug, Default)]
pub(super) struct Payloads {
    pub specs: Vec<(JobSeq, bytes::Bytes)>,
    pub defaults: Vec<(BatchSeq, bytes::Bytes)>,
    pub results: Vec<(JobSeq, JobResult)>,
}

impl Payloads {
    pub fn is_empty(&self) -> bool {
        self.specs.is_empty() && self.defaults.is_empty() && self.results.is_empty()
    }
}

/// How a database is opened; tests put a faulty disk here.
pub(super) type OpenDatabase = Box<dyn Fn(usize) -> Result<Database, redb::DatabaseError> + Send>;

/// Opens or creates the file at `path`.
pub(super) fn in_file(path: &Path) -> OpenDatabase {
    let path = path.to_owned();
    Box::new(move |cache_bytes| {
        Database::builder()
            .set_cache_size(cache_bytes)
            .create(&path)
    })
}

/// An open file.
#[derive(Debug)]
pub(super) struct Store {
    database: Database,
}

impl Store {
    pub fn new(database: Database) -> Result<Self, StoreError> {
        let store = Self { database };
        store.check_format()?;
        Ok(store)
    }

    fn check_format(&self) -> Result<(), StoreError> {
        let read = self.database.begin_read()?;
        match read.open_table(FORMAT) {
            Ok(table) => {
                let found = table.get(FORMAT_KEY)?.map_or(0, |version| version.value());
                return if found == FORMAT_VERSION {
                    Ok(())
                } else {
                    Err(StoreError::Format(found))
                };
            }
            Err(TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let write = self.database.begin_write()?;
        write
            .open_table(FORMAT)?
            .insert(FORMAT_KEY, FORMAT_VERSION)?;
        // Readers need not ask whether a table exists.
        write.open_table(JOBS)?;
        write.open_table(BATCHES)?;
        write.open_table(CHUNKS)?;
        write.open_table(RINGS)?;
        write.open_table(META)?;
        write.open_table(SPECS)?;
        write.open_table(DEFAULTS)?;
        write.open_table(RESULTS)?;
        write.commit()?;
        Ok(())
    }

    /// The machine whose rows are in the file.
    pub fn load(&self, config: MachineConfig) -> Result<Machine, StoreError> {
        let read = self.database.begin_read()?;
        let mut loading = Loading::new(config);
        if let Some(row) = read.open_table(META)?.get(0)? {
            loading.meta(row.value())?;
        }
        for entry in read.open_table(BATCHES)?.iter()? {
            let (seq, row) = entry?;
            loading.batch(BatchSeq(seq.value()), row.value())?;
        }
        for entry in read.open_table(CHUNKS)?.iter()? {
            let (key, row) = entry?;
            let (batch, n) = key.value();
            loading.chunk(BatchSeq(batch), n, row.value())?;
        }
        for entry in read.open_table(RINGS)?.iter()? {
            let (number, row) = entry?;
            loading.ring(number.value(), row.value())?;
        }
        for entry in read.open_table(JOBS)?.iter()? {
            let (seq, row) = entry?;
            loading.job(JobSeq(seq.value()), row.value())?;
        }
        Ok(loading.finish())
    }

    /// Stores all of it or nothing, and returns when it is on the disk.
    pub fn commit(&self, changes: &Changes, payloads: &Payloads) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        {
            let mut jobs = write.open_table(JOBS)?;
            let mut specs = write.open_table(SPECS)?;
            let mut results = write.open_table(RESULTS)?;
            for (seq, spec) in &payloads.specs {
                specs.insert(seq.0, spec.as_ref())?;
            }
            for (seq, result) in &payloads.results {
                results.insert(seq.0, (result.manifest.as_str(), result.summary.as_ref()))?;
            }
            for (seq, row) in &changes.jobs {
                if let Some(row) = row {
                    jobs.insert(seq.0, row.as_slice())?;
                } else {
                    jobs.remove(seq.0)?;
                    specs.remove(seq.0)?;
                    results.remove(seq.0)?;
                }
            }
        }
        commit_batches(&write, changes, payloads)?;
        write.commit()?;
        Ok(())
    }

    /// A view of what is committed.
    pub fn reader(&self) -> Result<Reader, StoreError> {
        Ok(Reader {
            read: self.database.begin_read()?,
        })
    }
}

fn commit_batches(
    write: &redb::WriteTransaction,
    changes: &Changes,
    payloads: &Payloads,
) -> Result<(), StoreError> {
    if !changes.batches.is_empty() || !payloads.defaults.is_empty() {
        let mut batches = write.open_table(BATCHES)?;
        let mut defaults = write.open_table(DEFAULTS)?;
        for (seq, bytes) in &payloads.defaults {
            defaults.insert(seq.0, bytes.as_ref())?;
        }
        for (seq, row) in &changes.batches {
            if let Some(row) = row {
                batches.insert(seq.0, row.as_slice())?;
            } else {
                batches.remove(seq.0)?;
                defaults.remove(seq.0)?;
            }
        }
    }
    if !changes.chunks.is_empty() {
        let mut chunks = write.open_table(CHUNKS)?;
        for ((batch, n), row) in &changes.chunks {
            match row {
                Some(row) => chunks.insert((batch.0, *n), row.as_slice())?,
                None => chunks.remove((batch.0, *n))?,
            };
        }
    }
    if !changes.rings.is_empty() {
        let mut rings = write.open_table(RINGS)?;
        for (number, row) in &changes.rings {
            match row {
                Some(row) => rings.insert(*number, row.as_slice())?,
                None => rings.remove(*number)?,
            };
        }
    }
    if let Some(row) = &changes.meta {
        write.open_table(META)?.insert(0, row.as_slice())?;
    }
    Ok(())
}

/// Reads payloads.
pub(super) struct Reader {
    read: redb::ReadTransaction,
}

impl Reader {
    /// The specs of `jobs`, in order.
    pub fn specs(
        &self,
        jobs: impl Iterator<Item = JobSeq>,
    ) -> Result<Vec<bytes::Bytes>, StoreError> {
        let table = self.read.open_table(SPECS)?;
        jobs.map(|seq| {
            let spec = table.get(seq.0)?.ok_or(StoreError::Missing {
                table: "spec",
                number: seq.0,
            })?;
            Ok(bytes::Bytes::copy_from_slice(spec.value()))
        })
        .collect()
    }

    /// The defaults of a batch.
    pub fn defaults(&self, batch: BatchSeq) -> Result<bytes::Bytes, StoreError> {
        let table = self.read.open_table(DEFAULTS)?;
        let defaults = table.get(batch.0)?.ok_or(StoreError::Missing {
            table: "defaults",
            number: u64::from(batch.0),
        })?;
        Ok(bytes::Bytes::copy_from_slice(defaults.value()))
    }

    /// The results of `jobs`, in order; most jobs that did not succeed have none.
    pub fn results(
        &self,
        jobs: impl Iterator<Item = JobSeq>,
    ) -> Result<Vec<Option<JobResult>>, StoreError> {
        let table = self.read.open_table(RESULTS)?;
        jobs.map(|seq| {
            let found = table.get(seq.0)?;
            Ok(found.map(|found| {
                let (manifest, summary) = found.value();
                JobResult {
                    summary: bytes::Bytes::copy_from_slice(summary),
                    manifest: manifest.to_owned(),
                }
            }))
        })
        .collect()
    }
}
