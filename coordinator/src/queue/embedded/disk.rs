//! A disk for tests: it forgets what was not synced when the power goes, and it can be full.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, StorageBackend};

use super::store::OpenDatabase;

#[derive(Debug, Default)]
struct State {
    /// What survives a cut of the power.
    synced: Vec<u8>,
    /// What readers see.
    present: Vec<u8>,
    /// What was done since the last sync.
    pending: Vec<Pending>,
    /// Handles of before the last power cut reach nothing.
    generation: u64,
    full: bool,
}

#[derive(Debug)]
enum Pending {
    Write(usize, Vec<u8>),
    SetLen(usize),
}

impl Pending {
    fn apply(self, bytes: &mut Vec<u8>) {
        match self {
            Self::SetLen(len) => bytes.resize(len, 0),
            Self::Write(at, data) => {
                let end = at + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[at..end].copy_from_slice(&data);
            }
        }
    }
}

/// One disk with one file. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk(Arc<Mutex<State>>);

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on writes fail, or work again.
    pub fn set_full(&self, full: bool) {
        self.state().full = full;
    }

    /// The power goes and comes back. Of what was not synced every second write has reached the disk, because disks
    /// keep no order.
    pub fn cut_power(&self) {
        let mut state = self.state();
        let pending = std::mem::take(&mut state.pending);
        for kept in pending.into_iter().step_by(2) {
            kept.apply(&mut state.synced);
        }
        state.present = state.synced.clone();
        state.generation += 1;
    }

    pub fn opener(&self) -> OpenDatabase {
        let disk = self.clone();
        Box::new(move |cache_bytes| {
            let generation = disk.state().generation;
            let handle = Handle {
                disk: disk.clone(),
                generation,
            };
            Database::builder()
                .set_cache_size(cache_bytes)
                .create_with_backend(handle)
        })
    }
}

#[derive(Debug)]
struct Handle {
    disk: Disk,
    generation: u64,
}

impl Handle {
    fn state(&self, writes: bool) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.generation != self.generation {
            return Err(io::Error::other("the power went"));
        }
        if writes && state.full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(state)
    }
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state(false)?.present.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state(false)?;
        let from = offset as usize;
        let bytes = state.present.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state(true)?;
        state.present.resize(len as usize, 0);
        state.pending.push(Pending::SetLen(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state(true)?;
        let pending = std::mem::take(&mut state.pending);
        for done in pending {
            done.apply(&mut state.synced);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state(true)?;
        let write = || Pending::Write(offset as usize, data.to_vec());
        write().apply(&mut state.present);
        state.pending.push(write());
        Ok(())
    }
}
