//! Which version is `latest`: read, moved on, and taken back. Every move is an entry that is created once.

use espalier_core::adapter::{Canary, LATEST_RECORD_VERSION, LatestEntry, Why, rollback_to};
use espalier_core::id::{AdapterName, ProjectId};
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_runtime::store::{Created, LIST_MAX, Store};

use crate::error::AdaptersError;
use crate::versions::find;

/// Tries to find a free number, while others take theirs.
const NUMBER_TRIES_MAX: u32 = 16;

/// The entries of one adapter.
#[derive(Clone, Copy, Debug)]
pub struct Latest<'a> {
    /// The store.
    pub store: &'a Store,
    /// The project.
    pub project: &'a ProjectId,
    /// The adapter.
    pub name: &'a AdapterName,
}

impl Latest<'_> {
    /// The number of the newest entry after `seq`, if there is one: one listing of what is new.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn newest_after(&self, seq: u64) -> Result<Option<u64>, AdaptersError> {
        Ok(self.numbers_after(seq).await?.last().copied())
    }

    /// One entry.
    ///
    /// # Errors
    /// It is broken, or cannot be had.
    pub async fn entry(&self, seq: u64) -> Result<LatestEntry, AdaptersError> {
        let path = layout::adapter_latest(self.project, self.name, seq);
        let bytes = self.store.get(&path).await?;
        Ok(LatestEntry::parse(&bytes, self.name, seq)?)
    }

    /// The entry that counts; none where no version was ever made `latest`.
    ///
    /// # Errors
    /// It is broken, or the store does not answer.
    pub async fn current(&self) -> Result<Option<LatestEntry>, AdaptersError> {
        match self.newest_after(0).await? {
            Some(seq) => self.entry(seq).await.map(Some),
            None => Ok(None),
        }
    }

    /// Every entry, in order.
    ///
    /// # Errors
    /// One is broken, or the store does not answer.
    pub async fn log(&self) -> Result<Vec<LatestEntry>, AdaptersError> {
        let mut log = Vec::new();
        for seq in self.numbers_after(0).await? {
            log.push(self.entry(seq).await?);
        }
        Ok(log)
    }

    /// Makes `version` the one that is `latest`. A canary ends with that. Where several do it at once for one comparison, one
    /// of them makes the entry, and the others find it.
    ///
    /// # Errors
    /// There is no such version, or the entry cannot be made.
    pub async fn promote(
        &self,
        version: u32,
        why: Why,
        now: Timestamp,
    ) -> Result<LatestEntry, AdaptersError> {
        find(self.store, self.project, self.name, Some(version)).await?;
        for _ in 0..NUMBER_TRIES_MAX {
            let newest = self.newest_after(0).await?;
            let entry = self.of(newest.unwrap_or(0) + 1, (version, None), why.clone(), now);
            // One that cannot be read is passed over: a version by hand must always be possible.
            if let Some(newest) = newest
                && let Ok(current) = self.entry(newest).await
                && current.is_for(&entry)
            {
                return Ok(current);
            }
            if self.create(&entry).await? {
                return Ok(entry);
            }
        }
        Err(self.contended())
    }

    /// Puts `canary` beside the version that is `latest`, in the place of a canary that is there.
    ///
    /// # Errors
    /// There is no such version, no version or this one is `latest`, or the entry cannot be made.
    pub async fn canary(
        &self,
        canary: Canary,
        why: Why,
        now: Timestamp,
    ) -> Result<LatestEntry, AdaptersError> {
        find(self.store, self.project, self.name, Some(canary.version)).await?;
        for _ in 0..NUMBER_TRIES_MAX {
            let Some(current) = self.current().await? else {
                return Err(AdaptersError::NothingLatest(self.name.to_string()));
            };
            let checked = canary.check(current.version);
            checked.map_err(AdaptersError::Refused)?;
            let served = (current.version, Some(canary));
            let entry = self.of(current.seq + 1, served, why.clone(), now);
            if current.is_for(&entry) {
                return Ok(current);
            }
            if self.create(&entry).await? {
                return Ok(entry);
            }
        }
        Err(self.contended())
    }

    /// Ends the canary; where there is none, goes back to the version that was `latest` before.
    ///
    /// # Errors
    /// There is none, or the entry cannot be made.
    pub async fn rollback(&self, now: Timestamp) -> Result<LatestEntry, AdaptersError> {
        for _ in 0..NUMBER_TRIES_MAX {
            let log = self.log().await?;
            let (Some(last), Some(version)) = (log.last(), rollback_to(&log)) else {
                let name = self.name.to_string();
                return Err(AdaptersError::NothingBefore(name));
            };
            find(self.store, self.project, self.name, Some(version)).await?;
            let from = last.subject();
            let entry = self.of(last.seq + 1, (version, None), Why::Rollback { from }, now);
            // What somebody else did meanwhile is looked at before it is taken back.
            if self.create(&entry).await? {
                return Ok(entry);
            }
        }
        Err(self.contended())
    }

    fn of(
        &self,
        seq: u64,
        (version, canary): (u32, Option<Canary>),
        why: Why,
        created_at_us: Timestamp,
    ) -> LatestEntry {
        LatestEntry {
            record_version: LATEST_RECORD_VERSION,
            name: self.name.clone(),
            seq,
            version,
            canary,
            why,
            created_at_us,
        }
    }

    /// Whether the number was free.
    async fn create(&self, entry: &LatestEntry) -> Result<bool, AdaptersError> {
        let path = layout::adapter_latest(self.project, self.name, entry.seq);
        let content = serde_json::to_vec_pretty(entry).map_err(AdaptersError::Encode)?;
        Ok(self.store.create(&path, content.into()).await? == Created::New)
    }

    fn contended(&self) -> AdaptersError {
        AdaptersError::Contended(self.name.to_string())
    }

    /// Numbers come in the order of their names: all are written with as many digits.
    async fn numbers_after(&self, seq: u64) -> Result<Vec<u64>, AdaptersError> {
        let folder = layout::adapter_latest_entries(self.project, self.name);
        let mut after = (seq > 0).then(|| layout::adapter_latest(self.project, self.name, seq));
        let mut numbers = Vec::new();
        loop {
            let prefix = folder.trim_end_matches('/');
            let page = self.store.list(prefix, after.as_deref(), LIST_MAX).await?;
            let entries = page
                .iter()
                .filter_map(|object| layout::adapter_latest_of(self.project, &object.path));
            numbers.extend(entries.map(|(_, seq)| seq));
            match page.last() {
                Some(last) if page.len() == LIST_MAX => after = Some(last.path.clone()),
                _ => break,
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }
}
