//! Large objects in parts, so that a link that breaks costs a part and not the whole, and so that every try has a
//! deadline that fits it. The object is there at once when the last request succeeds, and not at all before it.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::multipart::PartId;

use super::backend::Backend;
use super::error::StoreError;
use super::{Request, Store};

/// Size of a part, in bytes; smaller objects go in one request. S3 wants at least 5 MiB, and takes 10,000 parts.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Parts on their way at once: enough to fill a link, few enough to leave room for others.
const PARTS_AT_ONCE: usize = 4;

const BEGIN: Request = Request::new("put_begin", "store.put_begin");
const PART: Request = Request::new("put_part", "store.put_part");
const COMPLETE: Request = Request::new("put_complete", "store.put_complete");
const ABORT: Request = Request::new("put_abort", "store.put_abort");

impl Store {
    /// Writes an object in parts, replacing one that is there.
    pub(super) async fn put_in_parts(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        match self.upload(path, &content).await {
            // Nobody knows the upload any more: it was completed and the answer lost, or somebody cleaned it up.
            // The object is the same either way when it is written again.
            Err(error) if error.is_not_found() => self.upload(path, &content).await,
            other => other,
        }
    }

    async fn upload(&self, path: &str, content: &Bytes) -> Result<(), StoreError> {
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
        content: &Bytes,
    ) -> Result<Vec<PartId>, StoreError> {
        let starts = (0..content.len()).step_by(PART_BYTES).enumerate();
        let sent = starts.map(|(n, start)| {
            let end = content.len().min(start + PART_BYTES);
            self.send_part(path, id, n, content.slice(start..end))
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
