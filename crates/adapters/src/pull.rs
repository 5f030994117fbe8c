//! A version's files into a folder: each verified by size and digest, and the folder there as a whole or not at all.

use std::fs::{DirEntry, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::adapter::{AdapterKind, AdapterVersion};
use espalier_core::trace::FileEntry;
use espalier_runtime::hub::Meter;
use espalier_runtime::ids::{IdSource as _, UuidIds};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt as _;

use crate::card::{Form, card};
use crate::error::AdaptersError;
use crate::watch::Watch;

/// What is asked for at once, in bytes.
const PIECE_BYTES: u64 = 32 << 20;
/// What the names of folders begin with that go away.
const PREFIX: &str = ".espalier-pull-";
/// How long a folder is left alone in which nothing changes: its owner may not have locked it yet.
const NEW_FOR: Duration = Duration::from_secs(60);
/// The page that goes with a version.
pub(crate) const CARD: &str = "README.md";

/// A folder that goes away with its owner, unless it is kept. It is locked meanwhile, so that others can tell it from one whose
/// owner was killed.
#[derive(Debug)]
pub struct Scratch {
    path: Option<PathBuf>,
    /// Locked as long as it is open.
    _lock: Option<File>,
}

impl Scratch {
    /// A new folder beside `path`.
    pub(crate) fn beside(path: &Path) -> Result<Self, AdaptersError> {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        Self::within(parent.unwrap_or(Path::new(".")))
    }

    /// A new folder in `parent`, which is made too.
    pub(crate) fn within(parent: &Path) -> Result<Self, AdaptersError> {
        let path = parent.join(format!("{PREFIX}{}", UuidIds.fresh()));
        std::fs::create_dir_all(&path).map_err(AdaptersError::file(&path))?;
        // Where there are no locks, nobody gets one, and nothing is cleared.
        let lock = File::open(&path)
            .ok()
            .filter(|lock| lock.try_lock().is_ok());
        Ok(Self {
            path: Some(path),
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// It becomes `path`.
    pub(crate) fn keep_as(mut self, path: &Path) -> Result<(), AdaptersError> {
        if let Some(from) = self.path.take() {
            let renamed = std::fs::rename(&from, path);
            if renamed.is_err() {
                self.path = Some(from);
            }
            renamed.map_err(AdaptersError::file(path))?;
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_dir_all(path)
        {
            tracing::warn!(path = %path.display(), %error, "a folder that is needed no more stays");
        }
    }
}

/// Removes from `parent` the folders of processes that were killed before they could. Blocks.
pub fn clear(parent: &Path) {
    clear_older(parent, NEW_FOR);
}

fn clear_older(parent: &Path, age: Duration) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten().filter(|entry| is_left(entry, age)) {
        let path = entry.path();
        match std::fs::remove_dir_all(&path) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "removed what a process left that was killed")
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a folder that is needed no more stays");
            }
        }
    }
}

/// Whether a folder is one of ours, and its owner is gone.
fn is_left(entry: &DirEntry, age: Duration) -> bool {
    let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
        && entry.file_type().is_ok_and(|kind| kind.is_dir());
    let changed = entry.metadata().and_then(|about| about.modified());
    let is_old = changed.is_ok_and(|at| at.elapsed().is_ok_and(|since| since >= age));
    let is_free = || File::open(entry.path()).is_ok_and(|lock| lock.try_lock().is_ok());
    is_ours && is_old && is_free()
}

/// Makes the folder `to` with the files of a version and its card.
///
/// # Errors
/// The folder is there, a file is damaged or cannot be had: then there is no folder.
pub async fn pull(
    store: &Store,
    version: &AdapterVersion,
    to: &Path,
    watch: &Watch,
) -> Result<(), AdaptersError> {
    if to.exists() {
        return Err(AdaptersError::Exists(to.to_owned()));
    }
    let scratch = Scratch::beside(to)?;
    pull_into(store, version, scratch.path(), watch).await?;
    let card_path = scratch.path().join(CARD);
    if !card_path.exists() {
        let form = match version.kind {
            AdapterKind::Lora => Form::Adapter,
            AdapterKind::Full => Form::Model,
        };
        let written = tokio::fs::write(&card_path, card(version, form)).await;
        written.map_err(AdaptersError::file(&card_path))?;
    }
    scratch.keep_as(to)
}

/// The files of a version in a new folder of `parent`, which goes away with what is given.
///
/// # Errors
/// A file is damaged or cannot be had.
pub async fn pull_within(
    store: &Store,
    version: &AdapterVersion,
    parent: &Path,
    watch: &Watch,
) -> Result<Scratch, AdaptersError> {
    let scratch = Scratch::within(parent)?;
    pull_into(store, version, scratch.path(), watch).await?;
    Ok(scratch)
}

/// The files of a version, into a folder that is there.
pub(crate) async fn pull_into(
    store: &Store,
    version: &AdapterVersion,
    folder: &Path,
    watch: &Watch,
) -> Result<(), AdaptersError> {
    let meter = watch.begin("pulls");
    meter.expect(version.files.iter().map(|file| file.size).sum());
    for file in &version.files {
        // The record was checked: what follows the last slash is a name.
        let name = file.path.rsplit('/').next().unwrap_or_default();
        get(store, file, &folder.join(name), &meter).await?;
    }
    Ok(())
}

async fn get(
    store: &Store,
    file: &FileEntry,
    to: &Path,
    meter: &Meter,
) -> Result<(), AdaptersError> {
    let at_file = AdaptersError::file(to);
    let mut out = tokio::fs::File::create(to).await.map_err(&at_file)?;
    let mut pieces = Verified::new(store, file);
    while let Some(piece) = pieces.next().await? {
        out.write_all(&piece).await.map_err(&at_file)?;
        meter.add(piece.len() as u64);
    }
    out.sync_all().await.map_err(&at_file)
}

/// The bytes of a file of a version, piece by piece, held at their end against what the record says of them.
pub(crate) struct Verified<'a> {
    store: &'a Store,
    file: &'a FileEntry,
    digest: Sha256,
    start: u64,
}

impl<'a> Verified<'a> {
    pub(crate) fn new(store: &'a Store, file: &'a FileEntry) -> Self {
        Self {
            store,
            file,
            digest: Sha256::new(),
            start: 0,
        }
    }

    /// The next piece; none: that was all, and it is what the record says.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, AdaptersError> {
        let (file, start) = (self.file, self.start);
        if start >= file.size {
            return self.check().map(|()| None);
        }
        let end = file.size.min(start + PIECE_BYTES);
        let piece = self.store.get_range(&file.path, start..end).await?;
        // A shorter object gives a shorter piece, and so another digest.
        let (digest, hashed) = (std::mem::take(&mut self.digest), piece.clone());
        let hash = move || digest.chain_update(&hashed);
        self.digest = blocking("adapters.digest", hash).await?;
        self.start = end;
        Ok(Some(piece))
    }

    fn check(&mut self) -> Result<(), AdaptersError> {
        let digest = std::mem::take(&mut self.digest).finalize();
        let found: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        match found == self.file.sha256 {
            true => Ok(()),
            false => Err(AdaptersError::Damaged {
                path: self.file.path.clone(),
                expected: self.file.sha256.clone(),
                found,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_cleared() {
        let parent = tempfile::tempdir().unwrap();
        let held = Scratch::within(parent.path()).unwrap();
        let left = parent.path().join(".espalier-pull-left");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("weights"), "w").unwrap();
        let other = parent.path().join("other");
        std::fs::create_dir(&other).unwrap();
        clear(parent.path());
        assert!(left.exists(), "it may be new");
        clear_older(parent.path(), Duration::ZERO);
        assert!(!left.exists() && other.exists() && held.path().exists());
        let path = held.path().to_owned();
        drop(held);
        assert!(!path.exists());
        clear(&parent.path().join("none"));
    }
}
