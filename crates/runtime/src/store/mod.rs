//! The object store: whole objects under string paths, create-if-absent, and sorted listing. The only place that
//! knows a backend; every path comes from `espalier_core::layout`.
//!
//! What every backend guarantees, and `tests.rs` checks on each:
//! - `put` and `create` are atomic: a reader sees the whole object or none of it, whatever is killed when.
//! - A `put` or `create` that returned is durable. `file://` writes to a staged file, syncs it, links or renames it
//!   into place and syncs the folder. `memory://` lasts as long as the process: for tests.
//! - Of any number of concurrent `create`s of one path, exactly one returns [`Created::New`].
//! - Reads see every write that returned before they began.
//!
//! What is not guaranteed: on `file://` a delete may be undone by a power loss, and a kill between two steps leaves
//! a staged file (`name#1`), which no operation shows. Retries are in here; meaning is not: adoption, manifests and
//! retention are their callers'.

mod error;
pub mod faults;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::layout;
use espalier_core::time::Timestamp;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use crate::backoff::Backoff;
use crate::ids::{IdSource, UuidIds};
use crate::tasks::with_deadline;
use crate::telemetry;

pub use error::{StoreError, StoreErrorKind};
use faults::Faults;

/// Largest object, in bytes. Objects are read whole; a trace of a long rollout is a few megabytes.
pub const OBJECT_BYTES_MAX: u64 = 256 << 20;

/// Most objects that one [`Store::list`] returns.
pub const LIST_MAX: usize = 10_000;

/// How long and how often one operation is tried.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// Deadline of one try. Generous: the largest object over a slow disk or link.
    pub try_timeout: Duration,
    /// Tries in all.
    pub tries_max: u32,
    /// Waits between them.
    pub backoff: Backoff,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            try_timeout: Duration::from_secs(30),
            tries_max: 4,
            backoff: Backoff {
                first: Duration::from_millis(100),
                max: Duration::from_secs(5),
            },
        }
    }
}

/// What [`Store::create`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is new, with the caller's content.
    New,
    /// There was one. After a try whose answer was lost it may be the caller's own, so callers that care read it
    /// back and compare, as adoption does anyway.
    Exists,
}

/// What is known of an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Its path.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, by the store's clock.
    pub modified: Timestamp,
}

/// An open object store. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Arc<dyn ObjectStore>,
    url: Arc<str>,
    limits: StoreLimits,
    faults: Option<Faults>,
}

impl Store {
    /// Opens `file:///absolute/folder` (made if missing) or `memory://`, and [probes](Self::probe) it.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let store = Self::open_unprobed(url)?;
        store.probe().await?;
        Ok(store)
    }

    fn open_unprobed(url: &str) -> Result<Self, StoreError> {
        let backend: Arc<dyn ObjectStore> = if url == "memory://" {
            Arc::new(InMemory::new())
        } else if let Some(folder) = url.strip_prefix("file://") {
            Arc::new(open_folder(url, FilePath::new(folder))?)
        } else {
            return Err(StoreError::refused(
                "open",
                url,
                "must begin with `file://` or be `memory://`",
            ));
        };
        Ok(Self {
            backend,
            url: url.into(),
            limits: StoreLimits::default(),
            faults: None,
        })
    }

    /// The same store with other limits.
    pub fn with_limits(mut self, limits: StoreLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The same store, which shows the faults of a test.
    pub fn with_faults(mut self, faults: Faults) -> Self {
        self.faults = Some(faults);
        self
    }

    /// The URL that it was opened with.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Proves that the store can be written and honours create-if-absent, on which the single accepted result of
    /// every job rests: creates an object twice and deletes it.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let path = layout::probe(&UuidIds.fresh());
        let first = self.create(&path, Bytes::from_static(b"probe")).await?;
        let second = self.create(&path, Bytes::from_static(b"probe again")).await;
        let removed = self.delete(&path).await;
        match (first, second?) {
            (Created::New, Created::Exists) => removed,
            _ => Err(StoreError::refused(
                "probe",
                &*self.url,
                "must honour create-if-absent, but a second create of one object was accepted: results could be \
                 overwritten, so this store cannot be used",
            )),
        }
    }

    /// Writes an object that must not be there yet. Never changes one that is.
    pub async fn create(&self, path: &str, content: Bytes) -> Result<Created, StoreError> {
        check_size("create", path, content.len() as u64)?;
        self.retry("create", "store.create", path, |backend, at| {
            let content = content.clone();
            async move {
                let options = PutOptions::from(PutMode::Create);
                match backend.put_opts(&at, content.into(), options).await {
                    Ok(_) => Ok(Created::New),
                    Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Exists),
                    Err(error) => Err(error),
                }
            }
        })
        .await
    }

    /// Writes an object, replacing one that is there.
    pub async fn put(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        check_size("put", path, content.len() as u64)?;
        self.retry("put", "store.put", path, |backend, at| {
            let content = content.clone();
            async move { backend.put(&at, content.into()).await.map(drop) }
        })
        .await
    }

    /// Reads a whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        let read = self.retry("get", "store.get", path, |backend, at| async move {
            let found = backend.get(&at).await?;
            match found.meta.size {
                size if size > OBJECT_BYTES_MAX => Ok(Err(size)),
                _ => found.bytes().await.map(Ok),
            }
        });
        read.await?.map_err(|size| too_large("get", path, size))
    }

    /// What is known of an object, without its content.
    pub async fn head(&self, path: &str) -> Result<ObjectMeta, StoreError> {
        self.retry("head", "store.head", path, |backend, at| async move {
            backend.head(&at).await.map(describe)
        })
        .await
    }

    /// The first `limit` objects (at most [`LIST_MAX`]) under the folder `prefix`, sorted by path, beginning after
    /// the path `start_after`. An empty prefix is the whole store. Costs a walk over the folder on `file://`.
    pub async fn list(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, StoreError> {
        if limit > LIST_MAX {
            let rule = format!("`limit` must be at most {LIST_MAX}, got {limit}");
            return Err(StoreError::refused("list", prefix, rule));
        }
        let after = start_after.map(|path| parse("list", path)).transpose()?;
        self.retry("list", "store.list", prefix, |backend, at| {
            let after = after.clone();
            async move {
                let entries = match &after {
                    Some(after) => backend.list_with_offset(Some(&at), after),
                    None => backend.list(Some(&at)),
                };
                first_by_path(entries, limit).await
            }
        })
        .await
    }

    /// Removes an object. One that is not there counts as removed.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        self.retry("delete", "store.delete", path, |backend, at| async move {
            match backend.delete(&at).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                other => other,
            }
        })
        .await
    }

    /// Tries `perform` until it succeeds, fails for good, or the tries are used up.
    async fn retry<T, F>(
        &self,
        operation: &'static str,
        wait: &'static str,
        path: &str,
        perform: impl Fn(Arc<dyn ObjectStore>, Path) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let at = parse(operation, path)?;
        let began = Instant::now();
        let mut failures = 0;
        loop {
            let performed = perform(Arc::clone(&self.backend), at.clone());
            let error = match self.once(operation, wait, path, performed).await {
                Ok(value) => return Ok(value),
                Err(error) => error.tried_for(began.elapsed()),
            };
            failures += 1;
            let may_pass = matches!(error.kind, StoreErrorKind::Unavailable { .. });
            if !may_pass || failures >= self.limits.tries_max {
                if !error.is_not_found() {
                    telemetry::metrics().store_failed(operation, error.kind.as_str());
                }
                return Err(error);
            }
            tokio::time::sleep(self.limits.backoff.jittered(failures)).await;
        }
    }

    async fn once<T>(
        &self,
        operation: &'static str,
        wait: &'static str,
        path: &str,
        performed: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let fault = self
            .faults
            .as_ref()
            .and_then(|faults| faults.decide(operation, path));
        let performed = async {
            match fault {
                Some(fault) => fault.perform(performed).await,
                None => performed.await,
            }
        };
        match with_deadline(wait, self.limits.try_timeout, performed).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(StoreError::from_backend(operation, path, error)),
            Err(timeout) => {
                let after = Duration::ZERO;
                let kind = StoreErrorKind::Unavailable { after };
                Err(StoreError::from_source(operation, path, kind, timeout))
            }
        }
    }
}

fn open_folder(url: &str, folder: &FilePath) -> Result<LocalFileSystem, StoreError> {
    if !folder.is_absolute() {
        return Err(StoreError::refused(
            "open",
            url,
            "must name an absolute folder, as in `file:///var/lib/espalier`",
        ));
    }
    std::fs::create_dir_all(folder)
        .map_err(|error| StoreError::from_source("open", url, error::classify_io(&error), error))?;
    let folder = LocalFileSystem::new_with_prefix(folder)
        .map_err(|error| StoreError::from_backend("open", url, error))?;
    Ok(folder.with_fsync(true).with_automatic_cleanup(true))
}

fn parse(operation: &'static str, path: &str) -> Result<Path, StoreError> {
    Path::parse(path).map_err(|error| StoreError::from_backend(operation, path, error.into()))
}

fn check_size(operation: &'static str, path: &str, size: u64) -> Result<(), StoreError> {
    if size <= OBJECT_BYTES_MAX {
        return Ok(());
    }
    Err(too_large(operation, path, size))
}

fn too_large(operation: &'static str, path: &str, size: u64) -> StoreError {
    let rule = format!("an object must be at most {OBJECT_BYTES_MAX} bytes, this one has {size}");
    StoreError::refused(operation, path, rule)
}

fn describe(meta: object_store::ObjectMeta) -> ObjectMeta {
    let modified_us = u64::try_from(meta.last_modified.timestamp_micros()).unwrap_or(0);
    ObjectMeta {
        path: meta.location.into(),
        size: meta.size,
        modified: Timestamp(modified_us),
    }
}

/// Keeps the `limit` smallest of a stream in whatever order it comes: a folder is walked unsorted.
async fn first_by_path(
    mut entries: BoxStream<'_, object_store::Result<object_store::ObjectMeta>>,
    limit: usize,
) -> object_store::Result<Vec<ObjectMeta>> {
    let mut smallest = BTreeMap::new();
    while let Some(entry) = entries.try_next().await? {
        let meta = describe(entry);
        smallest.insert(meta.path.clone(), meta);
        if smallest.len() > limit {
            smallest.pop_last();
        }
    }
    Ok(smallest.into_values().collect())
}

#[cfg(test)]
mod tests;
