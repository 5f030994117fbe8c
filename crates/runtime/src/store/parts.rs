//! Large objects in parts, so that a link that breaks costs a part and not the whole, and so that every try has a
//! deadline that fits it. The object is there at once when the last request succeeds, and not at all before it.

use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::PutMultipartOptions;
use object_store::multipart::PartId;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::backend::Backend;
use super::error::{StoreError, classify_io};
use super::{Request, Store};

/// Size of a part, in bytes; smaller objects go in one request. S3 wants at least 5 MiB, and takes 10,000 parts.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Parts on their way at once: enough to fill a link, few enough to leave room for others.
const PARTS_AT_ONCE: usize = 4;

const BEGIN: Request = Request::new("put_begin", "store.put_begin");
const PART: Request = Request::new("put_part", "store.put_part");
const COMPLETE: Request = Request::new("put_complete", "store.put_complete");
const ABORT: Request = Request::new("put_abort", "store.put_abort");

/// Most parts of an object, which is what S3 takes: of larger files parts are larger.
const PARTS_MAX: u64 = 10_000;

/// What an object is to hold.
#[derive(Clone, Copy)]
struct Content<'a> {
    size: u64,
    held: Held<'a>,
}

#[derive(Clone, Copy)]
enum Held<'a> {
    Memory(&'a Bytes),
    File(&'a FilePath),
}

impl Content<'_> {
    fn part_bytes(self) -> u64 {
        (PART_BYTES as u64).max(self.size.div_ceil(PARTS_MAX))
    }

    fn parts(self) -> u64 {
        self.size.div_ceil(self.part_bytes())
    }

    /// The `n`th part.
    async fn part(self, n: u64) -> io::Result<Bytes> {
        let start = n * self.part_bytes();
        let end = self.size.min(start + self.part_bytes());
        match self.held {
            Held::Memory(bytes) => Ok(bytes.slice(start as usize..end as usize)),
            Held::File(path) => {
                let mut file = tokio::fs::File::open(path).await?;
                file.seek(io::SeekFrom::Start(start)).await?;
                let mut part = vec![0; (end - start) as usize];
                file.read_exact(&mut part).await?;
                Ok(part.into())
            }
        }
    }
}

fn unreadable(file: &FilePath, error: io::Error) -> StoreError {
    let kind = classify_io(&error);
    let rule = format!("cannot read {}", file.display());
    StoreError::from_source(PART.operation, &file.display().to_string(), kind, error)
        .with_rule(&rule)
}

impl Store {
    /// Writes an object with what `file` holds, however large, replacing one that is there: only parts of it are in memory.
    /// The object is there at once when all of it is written.
    pub async fn put_file(&self, path: &str, file: &FilePath) -> Result<(), StoreError> {
        let meta = tokio::fs::metadata(file).await;
        let size = meta.map_err(|error| unreadable(file, error))?.len();
        let held = Held::File(file);
        let content = Content { size, held };
        if size <= PART_BYTES as u64 {
            let whole = match size {
                0 => Bytes::new(),
                _ => content
                    .part(0)
                    .await
                    .map_err(|error| unreadable(file, error))?,
            };
            return self.put(path, whole).await;
        }
        match self.backend.parts {
            Some(_) => self.upload_twice(path, content).await,
            None => self.write_parts(path, file, content).await,
        }
    }

    /// Writes an object in parts, replacing one that is there.
    pub(super) async fn put_in_parts(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        let content = Content {
            size: content.len() as u64,
            held: Held::Memory(&content),
        };
        self.upload_twice(path, content).await
    }

    async fn upload_twice(&self, path: &str, content: Content<'_>) -> Result<(), StoreError> {
        match self.upload(path, content).await {
            // Nobody knows the upload any more: it was completed and the answer lost, or somebody cleaned it up.
            // The object is the same either way when it is written again.
            Err(error) if error.is_not_found() => self.upload(path, content).await,
            other => other,
        }
    }

    /// To a backend that writes to a place of its own, and moves it when it is complete.
    async fn write_parts(
        &self,
        path: &str,
        file: &FilePath,
        content: Content<'_>,
    ) -> Result<(), StoreError> {
        let at = self.backend.locate(BEGIN.operation, path)?;
        let options = PutMultipartOptions::default();
        let begin = self.backend.objects.put_multipart_opts(&at, options);
        let mut upload = self.once(BEGIN, path, begin).await?;
        for n in 0..content.parts() {
            let part = content
                .part(n)
                .await
                .map_err(|error| unreadable(file, error))?;
            let request = PART.of(part.len());
            self.once(request, path, upload.put_part(part.into()))
                .await?;
        }
        self.once(COMPLETE, path, upload.complete()).await.map(drop)
    }

    async fn upload(&self, path: &str, content: Content<'_>) -> Result<(), StoreError> {
        let begun = self.retry(BEGIN, path, |backend, at| async move {
            parts_of(&backend)?.create_multipart(&at).await
        });
        let id: Arc<str> = begun.await?.into();
        let uploaded = match self.send_parts(path, &id, content).await {
            Ok(parts) => self.complete(path, &id, parts).await,
            Err(error) => Err(error),
        };
        if uploaded.is_err() {
            // What is left of it costs space and is seen by nobody, so that one failure to remove it is enough.
            let id = Arc::clone(&id);
            let at = self.backend.locate(ABORT.operation, path)?;
            let aborted = async {
                let parts = parts_of(&self.backend)?;
                parts.abort_multipart(&at, &id.to_string()).await
            };
            let _ = self.once(ABORT, path, aborted).await;
        }
        uploaded
    }

    async fn send_parts(
        &self,
        path: &str,
        id: &Arc<str>,
        content: Content<'_>,
    ) -> Result<Vec<PartId>, StoreError> {
        let sent = (0..content.parts()).map(|n| async move {
            let part = content.part(n).await;
            let part = part.map_err(|error| unreadable(FilePath::new(path), error))?;
            self.send_part(path, id, n as usize, part).await
        });
        stream::iter(sent)
            .buffered(PARTS_AT_ONCE)
            .try_collect()
            .await
    }

    async fn send_part(
        &self,
        path: &str,
        id: &Arc<str>,
        n: usize,
        part: Bytes,
    ) -> Result<PartId, StoreError> {
        self.retry(PART.of(part.len()), path, |backend, at| {
            let (id, part) = (id.to_string(), part.clone());
            async move {
                let parts = parts_of(&backend)?;
                parts.put_part(&at, &id, n, part.into()).await
            }
        })
        .await
    }

    async fn complete(
        &self,
        path: &str,
        id: &Arc<str>,
        parts: Vec<PartId>,
    ) -> Result<(), StoreError> {
        self.retry(COMPLETE, path, |backend, at| {
            let (id, sent) = (id.to_string(), parts.clone());
            async move {
                let parts = parts_of(&backend)?;
                parts.complete_multipart(&at, &id, sent).await.map(drop)
            }
        })
        .await
    }
}

fn parts_of(
    backend: &Backend,
) -> object_store::Result<&dyn object_store::multipart::MultipartStore> {
    backend
        .parts
        .as_deref()
        .ok_or_else(|| object_store::Error::NotSupported {
            source: "this backend takes no parts".into(),
        })
}
