//! An object store: objects under a prefix, fetched in pieces into a folder of the cache.
//!
//! A file of the cache counts as long as the object is what it was when it was fetched, by size, time and ETag, which a
//! note beside the files says. A download that broke off goes on where it stopped, if the object is still the same.

use std::collections::BTreeMap;
use std::io::SeekFrom;
use std::path::{Path, PathBuf};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::Mutex;

use super::{FetchError, Place};
use crate::progress::Progress;
use crate::store::{ObjectMeta, Store};

/// What is asked for at once, in bytes. Each piece has a deadline and retries of its own.
const PIECE_BYTES: u64 = 32 << 20;
const NOTE: &str = "fetched.json";

/// A prefix of a bucket, and the folder for what is fetched of it.
pub(super) struct Bucket {
    url: String,
    store: Store,
    folder: PathBuf,
    bytes_max: u64,
    /// What the files in the folder were, by name.
    note: Mutex<BTreeMap<String, Version>>,
    /// Of these, what was asked for.
    given: Mutex<BTreeMap<String, Version>>,
}

/// What an object was when it was fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    bytes: u64,
    modified_us: u64,
    etag: Option<String>,
}

impl Version {
    fn of(meta: &ObjectMeta) -> Self {
        Self {
            bytes: meta.size,
            modified_us: meta.modified.0,
            etag: meta.etag.clone(),
        }
    }

    /// For the name of a file.
    fn digest(&self) -> String {
        let text = format!("{} {} {:?}", self.bytes, self.modified_us, self.etag);
        short_digest(&text)
    }
}

fn short_digest(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Bucket {
    pub(super) async fn open(url: &str, cache: &Path, bytes_max: u64) -> Result<Self, FetchError> {
        Self::over(url, Store::open_to_read(url)?, cache, bytes_max).await
    }

    async fn over(
        url: &str,
        store: Store,
        cache: &Path,
        bytes_max: u64,
    ) -> Result<Self, FetchError> {
        // A name for people, and a digest, because two URLs may end alike.
        let last = url.rsplit('/').next().unwrap_or_default();
        let folder = cache.join(format!("{last}-{}", short_digest(url)));
        let file_error = |source| FetchError::File {
            path: folder.clone(),
            source,
        };
        let made = tokio::fs::create_dir_all(&folder).await;
        made.map_err(file_error)?;
        // A note that cannot be read says nothing: all is fetched again.
        let note = tokio::fs::read(folder.join(NOTE)).await;
        let note = note.unwrap_or_default();
        let note = serde_json::from_slice(&note).unwrap_or_default();
        Ok(Self {
            url: url.to_owned(),
            store,
            folder,
            bytes_max,
            note: Mutex::new(note),
            given: Mutex::default(),
        })
    }

    async fn find(&self, file: &str) -> Result<Option<PathBuf>, FetchError> {
        let meta = match self.store.head(file).await {
            Ok(meta) => meta,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if meta.size > self.bytes_max {
            return Err(FetchError::TooLarge {
                place: self.url.clone(),
                file: file.to_owned(),
                bytes: meta.size,
                bytes_max: self.bytes_max,
            });
        }
        let (path, version) = (self.folder.join(file), Version::of(&meta));
        let mut given = self.given.lock().await;
        given.insert(file.to_owned(), version.clone());
        drop(given);
        let known = self.note.lock().await.get(file).cloned();
        let there = tokio::fs::metadata(&path).await.map(|there| there.len());
        if known.as_ref() == Some(&version) && there.is_ok_and(|bytes| bytes == version.bytes) {
            return Ok(Some(path));
        }
        self.download(file, version).await?;
        Ok(Some(path))
    }

    async fn download(&self, file: &str, version: Version) -> Result<(), FetchError> {
        let path = self.folder.join(file);
        // Named by what it is a part of, so that only the same object is gone on with.
        let part = self
            .folder
            .join(format!("{file}.{}.part", version.digest()));
        self.write_part(file, &part, version.bytes).await?;
        let at_part = |source| FetchError::File {
            path: part.clone(),
            source,
        };
        if Version::of(&self.store.head(file).await?) != version {
            tokio::fs::remove_file(&part).await.map_err(at_part)?;
            return Err(self.changed(file));
        }
        tokio::fs::rename(&part, &path).await.map_err(at_part)?;
        let mut note = self.note.lock().await;
        note.insert(file.to_owned(), version);
        let text = serde_json::to_vec(&*note).unwrap_or_default();
        let noted = tokio::fs::write(self.folder.join(NOTE), text).await;
        noted.map_err(at_part)
    }

    /// Finds that all files that were given are still what their objects are.
    async fn find_unchanged(&self) -> Result<(), FetchError> {
        let given = self.given.lock().await.clone();
        for (file, version) in &given {
            if Version::of(&self.store.head(file).await?) != *version {
                return Err(self.changed(file));
            }
        }
        Ok(())
    }

    fn changed(&self, file: &str) -> FetchError {
        FetchError::Changed {
            place: self.url.clone(),
            file: file.to_owned(),
        }
    }

    async fn write_part(&self, file: &str, part: &Path, bytes: u64) -> Result<(), FetchError> {
        let at_part = |source| FetchError::File {
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
        let done = to.metadata().await.map_err(at_part)?.len().min(bytes);
        to.seek(SeekFrom::Start(done)).await.map_err(at_part)?;
        let mut progress = Progress::new(file, bytes);
        progress.at(done);
        let mut at = done;
        while at < bytes {
            let end = bytes.min(at + PIECE_BYTES);
            let piece = self.store.get_range(file, at..end).await?;
            if piece.len() as u64 != end - at {
                return Err(FetchError::Damaged {
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

    fn get<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<Option<PathBuf>, FetchError>> {
        self.find(file).boxed()
    }

    fn confirm(&self) -> BoxFuture<'_, Result<(), FetchError>> {
        self.find_unchanged().boxed()
    }
}

#[cfg(test)]
mod tests {
    use crate::store::faults::{Fault, Faults};
    use bytes::Bytes;
    use espalier_core::time::Timestamp;
    use tempfile::TempDir;

    use super::*;
    use crate::fetch::{Wanted, fetch_all};

    async fn bucket(store: &Store, cache: &TempDir) -> Bucket {
        let opened = Bucket::over("s3://models/tiny", store.clone(), cache.path(), 1 << 30);
        opened.await.unwrap()
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
        assert!(matches!(broken, Err(FetchError::Store(_))), "{broken:?}");
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

    #[test]
    fn two_writes_of_a_second_are_two_versions() {
        let meta = |etag: &str| ObjectMeta {
            path: "a".to_owned(),
            size: 1,
            modified: Timestamp::from_ms(1_000),
            etag: Some(etag.to_owned()),
        };
        let (one, two) = (Version::of(&meta("1")), Version::of(&meta("2")));
        assert_ne!(one, two);
        assert_ne!(one.digest(), two.digest());
    }

    #[tokio::test]
    async fn files_of_two_versions_are_not_given_together() {
        let (store, cache) = (
            Store::open("memory://").await.unwrap(),
            TempDir::new().unwrap(),
        );
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            store.put(file, Bytes::from_static(b"one")).await.unwrap();
        }
        // A trainer writes the next version just when the weights are asked for.
        let (trainer, mut wrote) = (store.clone(), false);
        let faults = Faults::new(move |_, path| {
            if path == "adapter_model.safetensors" && !std::mem::replace(&mut wrote, true) {
                let put = trainer.put("adapter_config.json", Bytes::from_static(b"two"));
                put.now_or_never().unwrap().unwrap();
            }
            None
        });
        let place = bucket(&store.clone().with_faults(faults), &cache).await;
        let error = fetch_all(&place, Wanted::Adapter { bytes_max: 1 << 30 })
            .await
            .unwrap_err();
        assert!(
            matches!(&error, FetchError::Changed { file, .. } if file == "adapter_config.json"),
            "{error}"
        );
        let place = bucket(&store, &cache).await;
        let folder = fetch_all(&place, Wanted::Adapter { bytes_max: 1 << 30 })
            .await
            .unwrap();
        let config = std::fs::read(folder.join("adapter_config.json")).unwrap();
        assert_eq!(config, b"two");
    }

    #[tokio::test]
    async fn what_is_too_large_is_not_fetched() {
        let (store, cache) = (
            Store::open("memory://").await.unwrap(),
            TempDir::new().unwrap(),
        );
        store.put("w", Bytes::from_static(b"12345")).await.unwrap();
        let place = Bucket::over("s3://models/tiny", store, cache.path(), 4);
        let error = place.await.unwrap().get("w").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "w of s3://models/tiny must have at most 4 bytes, has 5"
        );
    }
}
