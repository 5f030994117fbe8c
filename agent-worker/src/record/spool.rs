//! The folder of this machine where attempts keep their steps until the store has them. One process owns it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use espalier_core::id::{Fence, JobKey};
use espalier_core::trace::sha256_hex;
use espalier_runtime::tasks;

use super::RecordError;

/// Most folders of killed attempts that one start looks at; the next start goes on. Far above any number of slots.
const LEFTOVERS_MAX: usize = 10_000;

/// The folder. Clones share it; it is given up with the last one.
#[derive(Clone, Debug)]
pub struct Spool {
    attempts: PathBuf,
    /// What killed attempts left, until somebody takes it.
    leftovers: Arc<Mutex<Vec<PathBuf>>>,
    // Held for as long as the process uses the folder; the system lets go of it however the process ends.
    _lock: Arc<File>,
}

impl Spool {
    /// Takes `data_dir` for this process, and notes what killed attempts left there.
    pub async fn open(data_dir: &Path) -> Result<Self, RecordError> {
        let data_dir = data_dir.to_owned();
        let refused = data_dir.clone();
        tasks::blocking("record.open", move || Self::take(&data_dir))
            .await?
            .map_err(|source| RecordError::Disk {
                operation: "use the data folder",
                path: refused,
                source,
            })
    }

    fn take(data_dir: &Path) -> io::Result<Self> {
        let attempts = data_dir.join("attempts");
        fs::create_dir_all(&attempts)?;
        let lock = File::create(data_dir.join("agent-worker.lock"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                io::Error::other("another agent worker uses it; give each its own `data_dir`")
            }
            TryLockError::Error(error) => error,
        })?;
        let entries = fs::read_dir(&attempts)?.take(LEFTOVERS_MAX);
        let leftovers: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        Ok(Self {
            attempts,
            leftovers: Arc::new(Mutex::new(leftovers?)),
            _lock: Arc::new(lock),
        })
    }

    /// The folders of attempts that were killed with an earlier process. Given once.
    pub(super) fn take_leftovers(&self) -> Vec<PathBuf> {
        // No code that may panic runs under the lock.
        let mut leftovers = self
            .leftovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut leftovers)
    }

    /// The folder of an attempt. Its name is short however long the job's is.
    pub(super) fn folder(&self, key: &JobKey, fence: Fence) -> PathBuf {
        let digest = sha256_hex(key.to_string().as_bytes());
        self.attempts.join(format!("{fence}-{}", &digest[..16]))
    }
}
