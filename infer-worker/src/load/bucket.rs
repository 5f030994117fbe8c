//! An object store: objects under a prefix, fetched in pieces into a folder of the cache.
//!
//! A file of the cache counts as long as the object has the size and the time that it had when it was fetched, which a
//! note beside the files says. A download that broke off goes on where it stopped, if the object is still the same.

use std::collections::BTreeMap;
use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use espalier_runtime::store::{ObjectMeta, Store};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::Mutex;

use super::progress::Progress;
use super::{LoadError, Place};

/// What is asked for at once, in bytes. Each piece has a deadline and retries of its own.
const PIECE_BYTES: u64 = 32 << 20;
const NOTE: &str = "fetched.json";

/// A prefix of a bucket, and the folder for what is fetched of it.
pub(super) struct Bucket {
    url: String,
    store: Store,
    folder: PathBuf,
    /// What the files in the folder were, by name.
    note: Mutex<BTreeMap<String, Version>>,
}

/// What an object was when it was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    bytes: u64,
    modified_us: u64,
}

impl Version {
    fn of(meta: &ObjectMeta) -> Self {
        Self {
            bytes: meta.size,
            modified_us: meta.modified.0,
        }
    }
}

impl Bucket {
    pub(super) fn open(url: &str, cache: &Path) -> Result<Self, LoadError> {
        Self::over(url, Store::open_to_read(url)?, cache)
    }

    fn over(url: &str, store: Store, cache: &Path) -> Result<Self, LoadError> {
        // A name for people, and a digest, because two URLs may end alike.
        let digest = Sha256::digest(url);
        let digest: String = digest[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let last = url.rsplit('/').next().unwrap_or_default();
        let folder = cache.join(format!("{last}-{digest}"));
        let file_error = |source| LoadError::File {
            path: folder.clone(),
            source,
        };
        std::fs::create_dir_all(&folder).map_err(file_error)?;
        // A note that cannot be read says nothing: all is fetched again.
        let note = std::fs::read(folder.join(NOTE)).unwrap_or_default();
        let note = serde_json::from_slice(&note).unwrap_or_default();
        Ok(Self {
            url: url.to_owned(),
            store,
            folder,
            note: Mutex::new(note),
        })
    }

    async fn find(&self, file: &str) -> Result<Option<PathBuf>, LoadError> {
        let meta = match self.store.head(file).await {
            Ok(meta) => meta,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (path, version) = (self.folder.join(file), Version::of(&meta));
        let known = self.note.lock().await.get(file).copied();
        let there = tokio::fs::metadata(&path).await.map(|there| there.len());
        if known == Some(version) && there.is_ok_and(|bytes| bytes == version.bytes) {
            return Ok(Some(path));
        }
        self.download(file, version).await?;
        Ok(Some(path))
    }

    async fn download(&self, file: &str, version: Version) -> Result<(), LoadError> {
        let path = self.folder.join(file);
        // Named by what it is a part of, so that only the same object is gone on with.
        let part = self.folder.join(format!(
            "{file}.{}-{}.part",
            version.bytes, version.modified_us
        ));
        let written = self.write_part(file, &part, version).await;
        let at_part = |source| LoadError::File {
            path: part.clone(),
            source,
        };
        written?;
        let after = Version::of(&self.store.head(file).await?);
        if after != version {
            tokio::fs::remove_file(&part).await.map_err(at_part)?;
            return Err(LoadError::Damaged {
                place: self.url.clone(),
                file: file.to_owned(),
                what: "what it was at the start",
                expected: format!("{} bytes of {}", version.bytes, version.modified_us),
                found: format!("{} bytes of {}", after.bytes, after.modified_us),
            });
        }
        tokio::fs::rename(&part, &path).await.map_err(at_part)?;
        let mut note = self.note.lock().await;
        note.insert(file.to_owned(), version);
        let text = serde_json::to_vec(&*note).unwrap_or_default();
        let noted = tokio::fs::write(self.folder.join(NOTE), text).await;
        noted.map_err(at_part)
    }

    async fn write_part(&self, file: &str, part: &Path, version: Version) -> Result<(), LoadError> {
        let at_part = |source| LoadError::File {
            path: part.to_owned(),
            source,
        };
        let mut options = tokio::fs::OpenOptions::new();
        let opened = options
            .create(true)
            .truncate(false)
            .write(true)
            .open(part)
            .await;
        let mut to = opened.map_err(at_part)?;
        let done = to
            .metadata()
            .await
            .map_err(at_part)?
            .len()
            .min(version.bytes);
        to.seek(SeekFrom::Start(done)).await.map_err(at_part)?;
        let mut progress = Progress::new(file, Arc::new(AtomicU64::new(0)));
        progress.begin(version.bytes);
        progress.more(done);
        let mut at = done;
        while at < version.bytes {
            let end = version.bytes.min(at + PIECE_BYTES);
            let piece = self.store.get_range(file, at..end).await?;
            if piece.len() as u64 != end - at {
                return Err(LoadError::Damaged {
                    place: self.url.clone(),
                    file: file.to_owned(),
                    what: "a piece",
                    expected: format!("{} bytes", end - at),
                    found: format!("{} bytes", piece.len()),
                });
            }
            to.write_all(&piece).await.map_err(at_part)?;
            progress.more(piece.len() as u64);
            at = end;
        }
        to.sync_all().await.map_err(at_part)?;
        progress.end();
        Ok(())
    }
}

impl Place for Bucket {
    fn name(&self) -> String {
        self.url.clone()
    }

    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, LoadError>> {
        self.find(file).boxed()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use espalier_runtime::store::faults::{Fault, Faults};
    use tempfile::TempDir;

    use super::*;

    async fn bucket(store: &Store, cache: &TempDir) -> Bucket {
        Bucket::over("s3://models/tiny", store.clone(), cache.path()).unwrap()
    }

    #[tokio::test]
    async fn what_was_fetched_is_fetched_again_only_when_it_changed() {
        let (store, cache) = (
            Store::open("memory://").await.unwrap(),
            TempDir::new().unwrap(),
        );
        store
            .put("a.json", Bytes::from_static(b"one"))
            .await
            .unwrap();
        let path = bucket(&store, &cache)
            .await
            .get("a.json")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        std::fs::write(&path, b"ONE").unwrap();
        let again = bucket(&store, &cache)
            .await
            .get("a.json")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            std::fs::read(again).unwrap(),
            b"ONE",
            "it was fetched again"
        );
        store
            .put("a.json", Bytes::from_static(b"three"))
            .await
            .unwrap();
        bucket(&store, &cache).await.get("a.json").await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        assert_eq!(bucket(&store, &cache).await.get("b").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_download_goes_on_where_it_broke_off() {
        let (store, cache) = (
            Store::open("memory://").await.unwrap(),
            TempDir::new().unwrap(),
        );
        let content: Vec<u8> = (0..PIECE_BYTES * 2 + 5).map(|i| (i / 1000) as u8).collect();
        store.put("w", Bytes::from(content.clone())).await.unwrap();
        let mut ranges = 0;
        let faults = Faults::new(move |operation, _| {
            ranges += usize::from(operation == "get");
            (operation == "get" && ranges > 1).then_some(Fault::Denied)
        });
        let faulty = store.clone().with_faults(faults);
        let broken = bucket(&faulty, &cache).await.get("w").await;
        assert!(matches!(broken, Err(LoadError::Store(_))), "{broken:?}");
        // The first piece is not asked for again: it would fail.
        let mut asked = 0;
        let faults = Faults::new(move |operation, _| {
            asked += usize::from(operation == "get");
            (asked > 2).then_some(Fault::Denied)
        });
        let path = bucket(&store.with_faults(faults), &cache)
            .await
            .get("w")
            .await
            .unwrap()
            .unwrap();
        assert!(
            std::fs::read(path).unwrap() == content,
            "not the same bytes"
        );
    }
}
