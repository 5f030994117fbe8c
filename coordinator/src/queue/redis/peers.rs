//! What coordinators show and tell each other, behind the first shard's keys. Lists have versions, so that one which did
//! not change since it was last read is not read again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use espalier_core::id::CoordinatorId;

use super::core::Core;
use super::decode::{self, Reader};
use super::script::SCRIPTS;
use crate::queue::limits::check_changes;
use crate::queue::{Change, PRESENCE_TTL, QueueError, Shown, Table};

/// The channel of notices.
pub const NOTICES: &str = "notices";

/// The way to the other coordinators.
pub struct Peers {
    core: Arc<Core>,
    /// Lists as they were last read, and in which generation of the link: a server that lost something counts its
    /// versions again.
    read: Mutex<(u64, Lists)>,
}

/// Lists by coordinator.
type Lists = HashMap<Table, HashMap<CoordinatorId, List>>;

/// What one coordinator showed when its list had a version.
#[derive(Clone)]
struct List {
    version: String,
    entries: Arc<Vec<(String, Bytes)>>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers").finish_non_exhaustive()
    }
}

impl Peers {
    /// `core` is the same shard at every coordinator.
    pub fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            read: Mutex::default(),
        }
    }

    pub async fn announce(
        &self,
        by: &CoordinatorId,
        changes: &[Change],
    ) -> Result<bool, QueueError> {
        check_changes(changes)?;
        let mut cmd = self.core.cmd(&SCRIPTS.announce);
        cmd.arg(by.as_str())
            .arg(PRESENCE_TTL.as_micros() as u64)
            .arg(changes.len());
        for change in changes {
            cmd.arg(change.table.as_str()).arg(&change.key);
            match &change.value {
                Some(value) => cmd.arg(1).arg(&value[..]),
                None => cmd.arg(0).arg(""),
            };
        }
        let answer = match changes.is_empty() {
            true => self.core.link.run(&cmd).await?,
            false => self.core.link.write(&cmd).await?,
        };
        Ok(decode::number::<u8>(answer)? == 1)
    }

    pub async fn shown(&self, table: Table) -> Result<Vec<Shown>, QueueError> {
        let generation = self.core.link.generation();
        let known = self.read_in(generation).1.get(&table).cloned();
        let mut known = known.unwrap_or_default();
        let mut cmd = self.core.cmd(&SCRIPTS.shown);
        cmd.arg(table.as_str())
            .arg(PRESENCE_TTL.as_micros() as u64)
            .arg(known.len());
        for (by, list) in &known {
            cmd.arg(by.as_str()).arg(&list.version);
        }
        let mut answer = Reader::of(self.core.link.run(&cmd).await?)?;
        let mut present = HashMap::new();
        while !answer.is_empty() {
            let mut of_one = answer.list()?;
            let by = CoordinatorId::new(of_one.text()?)
                .map_err(|_| decode::unreadable("the id of a coordinator"))?;
            let version = of_one.text()?;
            let list = match of_one.is_empty() {
                false => List {
                    version,
                    entries: Arc::new(entries(of_one.list()?)?),
                },
                true => known
                    .remove(&by)
                    .ok_or_else(|| decode::unreadable("a list that nobody has read"))?,
            };
            present.insert(by, list);
        }
        let shown = present.iter().flat_map(|(by, list)| {
            list.entries.iter().map(|(key, value)| Shown {
                by: by.clone(),
                key: key.clone(),
                value: value.clone(),
            })
        });
        let shown = shown.collect();
        if self.core.link.generation() == generation {
            self.read_in(generation).1.insert(table, present);
        }
        Ok(shown)
    }

    pub async fn tell(&self, notice: &[u8]) -> Result<(), QueueError> {
        let mut cmd = redis::cmd("PUBLISH");
        cmd.arg(self.core.key(NOTICES)).arg(notice);
        self.core.link.run(&cmd).await.map(drop)
    }

    fn read_in(&self, generation: u64) -> MutexGuard<'_, (u64, Lists)> {
        // No code that may panic runs under the lock.
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.0 != generation {
            *read = (generation, Lists::new());
        }
        read
    }
}

fn entries(mut flat: Reader) -> Result<Vec<(String, Bytes)>, QueueError> {
    let mut entries = Vec::with_capacity(flat.len() / 2);
    while !flat.is_empty() {
        entries.push((flat.text()?, flat.bytes()?));
    }
    Ok(entries)
}
