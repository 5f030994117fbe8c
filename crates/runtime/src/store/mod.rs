//! The object store: whole objects under string paths, create-if-absent, and sorted listing. The only place that
//! knows a backend; every path comes from `espalier_core::layout`.
//!
//! What every backend guarantees, and `tests.rs` checks on each:
//! - `put` and `create` are atomic: a reader sees the whole object or none of it, whatever is killed when.
//! - A `put` or `create` that returned is durable. `file://` writes to a staged file, syncs it, links or renames it
//!   into place and syncs the folder. `s3://` has it when the server says so. `memory://` lasts as long as the
//!   process: for tests.
//! - Of any number of concurrent `create`s of one path, exactly one returns [`Created::New`].
//! - Reads see every write that returned before they began.
//!
//! What is not guaranteed: on `file://` a delete may be undone by a power loss, and a kill between two steps leaves
//! a staged file (`name#1`), which no operation shows; on `s3://` a kill in the middle of a large `put` leaves parts
//! that no operation shows either, and that a lifecycle rule of the bucket removes. Retries are in here; meaning is
//! not: adoption, manifests and retention are their callers'.

mod backend;
mod error;
pub mod faults;
mod parts;
mod patience;
mod s3;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::layout;
use espalier_core::time::Timestamp;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use crate::backoff::Backoff;
use crate::ids::{IdSource, UuidIds};
use crate::tasks::with_deadline;
use crate::telemetry;

use backend::Backend;
pub use error::{StoreError, StoreErrorKind};
use faults::Faults;
use parts::PART_BYTES;
pub use patience::{AWAY_BACKOFF, Patience};

/// Largest object, in bytes. Objects are read whole; a trace of a long rollout is a few megabytes, an adapter or the
/// largest tensor of a small model some hundred.
pub const OBJECT_BYTES_MAX: u64 = 1 << 30;

/// Most objects that one [`Store::list`] returns.
pub const LIST_MAX: usize = 10_000;

/// How long and how often one operation is tried.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// Deadline of one try, to which writing adds a second for each MiB: nothing slower is worth waiting for.
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
    /// When it was last written, by the store's clock. Buckets count whole seconds.
    pub modified: Timestamp,
    /// What the store calls this content: it changes with every write that changes the content, also twice in a second.
    pub etag: Option<String>,
}

/// An open object store. Clones share it.
#[derive(Clone)]
pub struct Store {
    backend: Arc<Backend>,
    url: Arc<str>,
    limits: StoreLimits,
    faults: Option<Faults>,
}

/// Backends know credentials, so that they are not shown.
impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

/// What one request is called, and how much it sends.
#[derive(Clone, Copy)]
struct Request {
    operation: &'static str,
    wait: &'static str,
    bytes: usize,
}

impl Request {
    const fn new(operation: &'static str, wait: &'static str) -> Self {
        Self {
            operation,
            wait,
            bytes: 0,
        }
    }

    const fn of(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }
}

impl Store {
    /// Opens `file:///absolute/folder` (made if missing), `s3://bucket/prefix` or `memory://`, and
    /// [probes](Self::probe) it. What `s3://` needs besides, above all credentials, comes from the usual variables
    /// (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …).
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let store = Self::open_unprobed(url)?;
        match store.probe().await {
            Ok(()) => Ok(store),
            Err(error) => Err(store.backend.explain(error)),
        }
    }

    /// Opens a store only to read from it, without a probe, which would write: what models are loaded from is often not
    /// ours to write to.
    pub fn open_to_read(url: &str) -> Result<Self, StoreError> {
        Self::open_unprobed(url)
    }

    fn open_unprobed(url: &str) -> Result<Self, StoreError> {
        Ok(Self::over(Backend::open(url)?, url))
    }

    fn over(backend: Backend, url: &str) -> Self {
        Self {
            backend: Arc::new(backend),
            url: url.into(),
            limits: StoreLimits::default(),
            faults: None,
        }
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
    /// every job rests: creates an object twice and deletes it. Of a bucket it also finds out how it lists.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let id = UuidIds.fresh();
        let path = layout::probe(&id);
        // That it exists already is the lost reply of a first try: nobody else knows the name.
        self.create(&path, Bytes::from_static(b"probe")).await?;
        let second = self.create(&path, Bytes::from_static(b"probe again")).await;
        let removed = self.delete(&path).await;
        if second? == Created::New {
            return Err(StoreError::refused(
                "probe",
                &*self.url,
                "must honour create-if-absent, but a second create of one object was accepted: results could be \
                 overwritten, so this store cannot be used",
            ));
        }
        removed?;
        match self.backend.is_bucket() {
            true => self.probe_order(&id).await,
            false => Ok(()),
        }
    }

    async fn probe_order(&self, id: &str) -> Result<(), StoreError> {
        const LIST: Request = Request::new("list", "store.list");
        let expected = layout::probe_order(id);
        for path in &expected {
            self.put(path, Bytes::from_static(b"probe")).await?;
        }
        let folder = layout::probe_order_folder(id);
        let listed = self.retry(LIST, &folder, |backend, at| async move {
            backend.as_listed(&at, 2).await
        });
        let listed = listed.await;
        for path in &expected {
            self.delete(path).await?;
        }
        let in_order = listed?.iter().map(|meta| &meta.path).eq(&expected);
        self.backend.note_order(in_order);
        Ok(())
    }

    /// Writes an object that must not be there yet. Never changes one that is.
    ///
    /// Always one request, however large: no other way to write makes its condition and its content one step.
    pub async fn create(&self, path: &str, content: Bytes) -> Result<Created, StoreError> {
        const CREATE: Request = Request::new("create", "store.create");
        check_size("create", path, content.len() as u64)?;
        self.retry(CREATE.of(content.len()), path, |backend, at| {
            let content = content.clone();
            async move {
                let options = PutOptions::from(PutMode::Create);
                match backend.objects.put_opts(&at, content.into(), options).await {
                    Ok(_) => Ok(Created::New),
                    Err(error) if error::says_exists(&error) => Ok(Created::Exists),
                    Err(error) => Err(error),
                }
            }
        })
        .await
    }

    /// Writes an object, replacing one that is there. A large one goes in parts where the backend takes parts.
    pub async fn put(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        const PUT: Request = Request::new("put", "store.put");
        check_size("put", path, content.len() as u64)?;
        if content.len() > PART_BYTES && self.backend.parts.is_some() {
            return self.put_in_parts(path, content).await;
        }
        self.retry(PUT.of(content.len()), path, |backend, at| {
            let content = content.clone();
            async move { backend.objects.put(&at, content.into()).await.map(drop) }
        })
        .await
    }

    /// Reads a whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        const GET: Request = Request::new("get", "store.get");
        let read = self.retry(GET, path, |backend, at| async move {
            let found = backend.objects.get(&at).await?;
            match found.meta.size {
                size if size > OBJECT_BYTES_MAX => Ok(Err(size)),
                _ => found.bytes().await.map(Ok),
            }
        });
        read.await?.map_err(|size| too_large("get", path, size))
    }

    /// Reads the bytes of `range`, of an object that may be larger than [`OBJECT_BYTES_MAX`]: whoever reads one in pieces
    /// bounds the pieces.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        const GET: Request = Request::new("get", "store.get_range");
        check_size("get", path, range.end.saturating_sub(range.start))?;
        self.retry(GET, path, |backend, at| {
            let range = range.clone();
            async move { backend.objects.get_range(&at, range).await }
        })
        .await
    }

    /// What is known of an object, without its content.
    pub async fn head(&self, path: &str) -> Result<ObjectMeta, StoreError> {
        const HEAD: Request = Request::new("head", "store.head");
        self.retry(HEAD, path, |backend, at| async move {
            let meta = backend.objects.head(&at).await?;
            Ok(backend.describe(meta))
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
        const LIST: Request = Request::new("list", "store.list");
        if limit > LIST_MAX {
            let rule = format!("`limit` must be at most {LIST_MAX}, got {limit}");
            return Err(StoreError::refused("list", prefix, rule));
        }
        let after = start_after
            .map(|path| self.backend.locate("list", path))
            .transpose()?;
        self.retry(LIST, prefix, |backend, at| {
            let after = after.clone();
            async move { backend.first_by_path(&at, after.as_ref(), limit).await }
        })
        .await
    }

    /// Removes an object. One that is not there counts as removed.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        const DELETE: Request = Request::new("delete", "store.delete");
        self.retry(DELETE, path, |backend, at| async move {
            match backend.objects.delete(&at).await {
                Err(error) if error::says_missing(&error) => Ok(()),
                other => other,
            }
        })
        .await
    }

    /// Tries `perform` until it succeeds, fails for good, or the tries are used up.
    async fn retry<T, F>(
        &self,
        request: Request,
        path: &str,
        perform: impl Fn(Arc<Backend>, Path) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let at = self.backend.locate(request.operation, path)?;
        let began = Instant::now();
        let mut failures = 0;
        loop {
            let performed = perform(Arc::clone(&self.backend), at.clone());
            let error = match self.once(request, path, performed).await {
                Ok(value) => return Ok(value),
                Err(error) => error.tried_for(began.elapsed()),
            };
            failures += 1;
            let may_pass = matches!(error.kind, StoreErrorKind::Unavailable { .. });
            if !may_pass || failures >= self.limits.tries_max {
                if !error.is_not_found() {
                    telemetry::metrics().store_failed(request.operation, error.kind.as_str());
                }
                return Err(error);
            }
            tokio::time::sleep(self.limits.backoff.jittered(failures)).await;
        }
    }

    async fn once<T>(
        &self,
        request: Request,
        path: &str,
        performed: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let Request {
            operation, wait, ..
        } = request;
        let fault = self
            .faults
            .as_ref()
            .and_then(|faults| faults.decide(operation, path));
        let performed = async {
            match fault {
                Some(fault) => Box::pin(fault.perform(performed)).await,
                None => performed.await,
            }
        };
        let sending = Duration::from_secs((request.bytes >> 20) as u64);
        match with_deadline(wait, self.limits.try_timeout + sending, performed).await {
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

#[cfg(test)]
mod tests;
