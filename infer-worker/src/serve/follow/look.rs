//! What the store says of adapters that are followed: which version counts, which one is newest, and their records.
//! Nothing is loaded here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use espalier_adapters::{AdaptersError, Latest, Listed, find, list, list_one};
use espalier_core::adapter::{AdapterKind, AdapterVersion, LatestEntry};
use espalier_core::id::AdapterName;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{DeadlineExceeded, with_deadline};
use espalier_runtime::telemetry::error_chain;
use futures::{StreamExt as _, stream};

use super::option::{Followed, Which};
use super::roles::Roles;
use crate::serve::base::Base;

/// How long a listing may take, and reading what is new of one adapter.
const READ_LIMIT: Duration = Duration::from_secs(120);
/// Adapters that are read at once.
const READS_MAX: usize = 16;

/// What one option follows, and what was seen of it.
pub(super) struct Watcher {
    /// The option.
    pub of: Followed,
    /// Its place among all.
    pub place: usize,
    store: Store,
    base: Arc<Base>,
    /// What was read is not read again: entries and records are written once.
    known: BTreeMap<AdapterName, Seen>,
}

/// Why the store says nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    #[error(transparent)]
    Adapters(#[from] AdaptersError),
    #[error(transparent)]
    Late(#[from] DeadlineExceeded),
}

/// What the store says of an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// The entry that counts.
    pub entry: Option<LatestEntry>,
    /// Why a newer one cannot be read.
    pub entry_error: Option<String>,
    /// The number of the newest version.
    pub newest: Option<u32>,
    /// The records of the versions that have a role.
    pub records: BTreeMap<u32, AdapterVersion>,
    /// Those of them that are not served, and why.
    pub refused: BTreeMap<u32, String>,
}

impl Seen {
    /// What the versions are for.
    pub(super) fn roles(&self) -> Roles {
        Roles::of(self.entry.as_ref(), self.newest)
    }

    /// Whether any version can be served.
    fn is_served(&self) -> bool {
        let mut records = self.records.keys();
        records.any(|version| !self.refused.contains_key(version))
    }
}

impl Watcher {
    pub(super) fn new(of: Followed, place: usize, store: Store, base: Arc<Base>) -> Self {
        Self {
            of,
            place,
            store,
            base,
            known: BTreeMap::new(),
        }
    }

    /// Looks once. What cannot be read of one adapter is said of that one; of all, those that can be served are told.
    pub(super) async fn look(&mut self) -> Result<Vec<(AdapterName, Seen)>, LookError> {
        let listing = async {
            match &self.of.which {
                Which::All => list(&self.store, &self.of.project).await,
                Which::One(name) => {
                    let one = list_one(&self.store, &self.of.project, name).await;
                    Ok(one?.into_iter().collect())
                }
            }
        };
        let listed = with_deadline("infer.follow_list", READ_LIMIT, listing).await??;
        let watcher = &*self;
        let reads = listed.into_iter().map(|listed| watcher.see(listed));
        let seen: Vec<(AdapterName, Seen)> =
            stream::iter(reads).buffered(READS_MAX).collect().await;
        self.known = seen.into_iter().collect();
        let all = self.known.iter();
        let told = all.filter(|(_, seen)| self.of.name().is_some() || seen.is_served());
        Ok(told
            .map(|(name, seen)| (name.clone(), seen.clone()))
            .collect())
    }

    async fn see(&self, listed: Listed) -> (AdapterName, Seen) {
        let known = self.known.get(&listed.name);
        let entry = with_deadline("infer.follow_entry", READ_LIMIT, self.entry(&listed, known));
        let (entry, entry_error) = match entry.await.map_err(LookError::from).flatten() {
            Ok(entry) => (entry, None),
            Err(error) => (
                known.and_then(|seen| seen.entry.clone()),
                Some(error_chain(&error)),
            ),
        };
        let mut seen = Seen {
            entry,
            entry_error,
            newest: listed.versions.last().copied(),
            ..Seen::default()
        };
        for version in seen.roles().versions() {
            match self.record(&listed.name, version, known).await {
                Ok(record) => {
                    if let Some(why) = self.refusal(&record).await {
                        seen.refused.insert(version, why);
                    }
                    seen.records.insert(version, record);
                }
                Err(error) => drop(seen.refused.insert(version, error_chain(&error))),
            }
        }
        (listed.name, seen)
    }

    async fn entry(
        &self,
        listed: &Listed,
        known: Option<&Seen>,
    ) -> Result<Option<LatestEntry>, LookError> {
        let known = known.and_then(|seen| seen.entry.as_ref());
        let seq = listed.latest_seq;
        if seq == 0 || known.is_some_and(|entry| entry.seq == seq) {
            return Ok(known.cloned());
        }
        let latest = Latest {
            store: &self.store,
            project: &self.of.project,
            name: &listed.name,
        };
        Ok(Some(latest.entry(seq).await?))
    }

    async fn record(
        &self,
        name: &AdapterName,
        version: u32,
        known: Option<&Seen>,
    ) -> Result<AdapterVersion, LookError> {
        if let Some(record) = known.and_then(|seen| seen.records.get(&version)) {
            return Ok(record.clone());
        }
        let record = find(&self.store, &self.of.project, name, Some(version));
        Ok(with_deadline("infer.follow_record", READ_LIMIT, record).await??)
    }

    /// Why a version is not served here. One that was named is only held against the shapes of the model, when it is loaded.
    async fn refusal(&self, record: &AdapterVersion) -> Option<String> {
        let n = record.n;
        if record.kind == AdapterKind::Full {
            return Some(format!(
                "v{n} is a whole model, and only adapters are followed"
            ));
        }
        if self.of.name().is_some() {
            return None;
        }
        match self.base.is(&record.base).await {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "v{n} was trained on {}, which is not the model that is served",
                record.base.name
            )),
            Err(error) => Some(error_chain(&error)),
        }
    }
}
