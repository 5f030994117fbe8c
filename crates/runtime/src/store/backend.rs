//! The backends: which one a URL names, where it keeps a path, and what it can do. Only the store uses it.

use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use espalier_core::time::Timestamp;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectStore, Result};

use super::error::{StoreError, StoreErrorKind, classify_io};
use super::{ObjectMeta, s3};

/// An open backend.
pub(super) struct Backend {
    pub objects: Arc<dyn ObjectStore>,
    /// The same, where it takes large objects in parts.
    pub parts: Option<Arc<dyn MultipartStore>>,
    /// What stands before every path in it.
    prefix: Path,
    /// Whether it lists in the order of paths. Not known of a bucket before the probe: S3 promises it, and servers
    /// that keep a tree of folders walk the tree, where the folder `a` comes before `a-b`.
    sorted: AtomicBool,
    /// What to look at when it does not answer.
    unreachable_rule: Option<String>,
}

impl Backend {
    pub fn open(url: &str) -> std::result::Result<Self, StoreError> {
        if url == "memory://" {
            return Ok(Self::memory());
        }
        if let Some(folder) = url.strip_prefix("file://") {
            return Self::folder(url, FilePath::new(folder));
        }
        if url.starts_with("s3://") {
            return s3::open(url, s3::from_environment());
        }
        // It may hold a secret: whatever was meant, it is not shown.
        Err(StoreError::refused(
            "open",
            "store_url",
            "must begin with `file://` or `s3://`, or be `memory://`",
        ))
    }

    fn memory() -> Self {
        let memory = Arc::new(InMemory::new());
        Self {
            objects: Arc::clone(&memory) as _,
            parts: Some(memory),
            prefix: Path::default(),
            sorted: AtomicBool::new(true),
            unreachable_rule: None,
        }
    }

    fn folder(url: &str, folder: &FilePath) -> std::result::Result<Self, StoreError> {
        if !folder.is_absolute() {
            return Err(StoreError::refused(
                "open",
                url,
                "must name an absolute folder, as in `file:///var/lib/espalier`",
            ));
        }
        std::fs::create_dir_all(folder)
            .map_err(|error| StoreError::from_source("open", url, classify_io(&error), error))?;
        let folder = LocalFileSystem::new_with_prefix(folder)
            .map_err(|error| StoreError::from_backend("open", url, error))?;
        Ok(Self {
            objects: Arc::new(folder.with_fsync(true).with_automatic_cleanup(true)),
            parts: None,
            prefix: Path::default(),
            sorted: AtomicBool::new(false),
            unreachable_rule: None,
        })
    }

    pub fn bucket<S>(store: S, prefix: Path, unreachable_rule: String) -> Self
    where
        S: ObjectStore + MultipartStore,
    {
        let store = Arc::new(store);
        Self {
            objects: Arc::clone(&store) as _,
            parts: Some(store),
            prefix,
            sorted: AtomicBool::new(false),
            unreachable_rule: Some(unreachable_rule),
        }
    }

    /// Where `path` lies in the backend.
    pub fn locate(
        &self,
        operation: &'static str,
        path: &str,
    ) -> std::result::Result<Path, StoreError> {
        let path = Path::parse(path)
            .map_err(|error| StoreError::from_backend(operation, path, error.into()))?;
        Ok(self.prefix.parts().chain(path.parts()).collect())
    }

    /// An object as the store's callers know it.
    pub fn describe(&self, meta: object_store::ObjectMeta) -> ObjectMeta {
        let modified_us = u64::try_from(meta.last_modified.timestamp_micros()).unwrap_or(0);
        let inside = meta.location.prefix_match(&self.prefix);
        let path: Option<Path> = inside.map(Iterator::collect);
        ObjectMeta {
            path: path.unwrap_or(meta.location).into(),
            size: meta.size,
            modified: Timestamp(modified_us),
            etag: meta.e_tag,
        }
    }

    /// Whether its order has to be found out.
    pub fn is_bucket(&self) -> bool {
        self.unreachable_rule.is_some()
    }

    /// Takes note of the order in which it lists.
    pub fn note_order(&self, sorted: bool) {
        self.sorted.store(sorted, Ordering::Relaxed);
    }

    /// The paths under `at` in the order in which the backend gives them, `limit` at most.
    pub async fn as_listed(&self, at: &Path, limit: usize) -> Result<Vec<ObjectMeta>> {
        let entries = self.objects.list(Some(at)).take(limit);
        entries
            .map_ok(|meta| self.describe(meta))
            .try_collect()
            .await
    }

    /// The `limit` smallest under `at`, after `after`. Where the order of the backend is another, it cannot begin in
    /// the middle either, and everything under `at` is looked at.
    pub async fn first_by_path(
        &self,
        at: &Path,
        after: Option<&Path>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>> {
        let sorted = self.sorted.load(Ordering::Relaxed);
        let mut entries = match after {
            Some(after) if sorted => self.objects.list_with_offset(Some(at), after),
            _ => self.objects.list(Some(at)),
        };
        let mut smallest = BTreeMap::new();
        while let Some(entry) = entries.try_next().await? {
            if after.is_some_and(|after| entry.location <= *after) {
                continue;
            }
            let meta = self.describe(entry);
            smallest.insert(meta.path.clone(), meta);
            if smallest.len() > limit {
                smallest.pop_last();
                if sorted {
                    break;
                }
            }
        }
        Ok(smallest.into_values().collect())
    }

    /// Says of a store that does not answer what to look at.
    pub fn explain(&self, error: StoreError) -> StoreError {
        match (&self.unreachable_rule, error.kind) {
            (Some(rule), StoreErrorKind::Unavailable { .. }) => error.with_rule(rule),
            _ => error,
        }
    }
}
