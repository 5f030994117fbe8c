//! The steps of one attempt in a file of this machine, and its blobs beside it until the store has them.
//!
//! All IO runs off the async threads. The file is only ever appended to, by one writer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::tasks;

use super::RecordError;

/// Longest that a step which was written is not yet synced.
const SYNC_DELAY: Duration = Duration::from_millis(200);
/// How often a full or failing disk is tried again: with the waits below about 40 s, in which logs are rotated.
const DISK_TRIES_MAX: u32 = 8;
const DISK_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(200),
    max: Duration::from_secs(15),
};

/// The file of steps.
pub(super) struct StepLog {
    folder: Folder,
    path: PathBuf,
    file: Arc<File>,
    written: AtomicU64,
    syncing: AtomicBool,
}

impl StepLog {
    /// Makes the attempt's folder and the empty file in it. What an earlier process left there is removed.
    pub(super) async fn create(folder: PathBuf) -> Result<Self, RecordError> {
        let path = folder.join("steps.jsonl");
        let file_path = path.clone();
        let (folder, file) = on_disk("make", &path, move || make(&folder, &file_path)).await?;
        Ok(Self {
            folder,
            path,
            file: Arc::new(file),
            written: AtomicU64::new(0),
            syncing: AtomicBool::new(false),
        })
    }

    /// Appends a line; once this returns the line outlives the process.
    pub(super) async fn append(&self, line: Vec<u8>) -> Result<(), RecordError> {
        let before = self.written();
        let (line, file) = (Bytes::from(line), Arc::clone(&self.file));
        let after = before + line.len() as u64;
        on_disk("write", &self.path, move || {
            let written = (&*file).write_all(&line);
            if written.is_err() {
                // Half a line would spoil the next one. Where even this fails the next try fails too.
                let _ = file.set_len(before);
            }
            written
        })
        .await?;
        self.written.store(after, Ordering::SeqCst);
        Ok(())
    }

    /// Bytes of whole lines in the file.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// The bytes from `from` to `to`.
    pub(super) async fn read(&self, from: u64, to: u64) -> Result<Vec<u8>, RecordError> {
        let file = Arc::clone(&self.file);
        on_disk("read", &self.path, move || {
            let length = usize::try_from(to - from).map_err(io::Error::other)?;
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, from).map(|()| bytes)
        })
        .await
    }

    /// Keeps a blob until the store has it.
    pub(super) async fn write_blob(&self, sha256: &str, content: Bytes) -> Result<(), RecordError> {
        let path = self.blob_path(sha256);
        let to = path.clone();
        on_disk("write", &path, move || fs::write(&to, &content)).await
    }

    /// Gives back a blob.
    pub(super) async fn read_blob(&self, sha256: &str) -> Result<Bytes, RecordError> {
        let path = self.blob_path(sha256);
        let from = path.clone();
        on_disk("read", &path, move || fs::read(&from).map(Bytes::from)).await
    }

    /// Lets go of a blob that the store has.
    pub(super) async fn remove_blob(&self, sha256: &str) {
        let path = self.blob_path(sha256);
        // One that stays goes away with the folder.
        let _ = tasks::blocking("record.remove", move || fs::remove_file(path)).await;
    }

    /// Removes everything of the attempt from this machine.
    pub(super) async fn remove(&self) {
        let folder = self.folder.0.clone();
        let removed = tasks::blocking("record.remove", move || fs::remove_dir_all(folder)).await;
        if let Ok(Err(error)) = removed {
            // The next start of the process tries again.
            tracing::warn!(folder = %self.folder.0.display(), error = %error, "recorded steps not removed");
        }
    }

    /// Whether the caller is the one to sync.
    pub(super) fn begin_sync(&self) -> bool {
        !self.syncing.swap(true, Ordering::SeqCst)
    }

    /// Waits a moment, so that one sync serves several steps, and syncs.
    pub(super) async fn sync_after_delay(&self) -> Result<(), RecordError> {
        tokio::time::sleep(SYNC_DELAY).await;
        // Before the sync: a step that comes during it asks for another one.
        self.syncing.store(false, Ordering::SeqCst);
        let file = Arc::clone(&self.file);
        on_disk("sync", &self.path, move || file.sync_data()).await
    }

    fn blob_path(&self, sha256: &str) -> PathBuf {
        self.folder.0.join("blobs").join(sha256)
    }
}

/// Makes an attempt's folder anew, and the file in it.
fn make(folder: &Path, file_path: &Path) -> io::Result<(Folder, File)> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Owned from here: what is made goes away where the file cannot be made, and where nobody waits for it.
    let folder = Folder(folder.to_owned());
    fs::create_dir_all(folder.0.join("blobs"))?;
    let file = OpenOptions::new()
        .create_new(true)
        .read(true)
        .append(true)
        .open(file_path)?;
    Ok((folder, file))
}

/// The attempt's folder, which does not outlive its owner. A recording that ends in order has removed it by then, off
/// the async threads; what is left to do here is one call that finds nothing, or the clean-up after an error.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // The next start of the process removes what stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs `work` off the async threads, and again after a wait while the disk may recover.
async fn on_disk<T, F>(operation: &'static str, path: &Path, work: F) -> Result<T, RecordError>
where
    T: Send + 'static,
    F: Fn() -> io::Result<T> + Send + Sync + 'static,
{
    let work = Arc::new(work);
    let mut failures = 0;
    loop {
        let once = Arc::clone(&work);
        let source = match tasks::blocking("record.disk", move || once()).await? {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        let may_pass = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::Interrupted
        );
        if !may_pass || failures >= DISK_TRIES_MAX {
            return Err(RecordError::Disk {
                operation,
                path: path.to_owned(),
                source,
            });
        }
        tracing::warn!(operation, path = %path.display(), failures, error = %source, "disk is full: trying again");
        tokio::time::sleep(DISK_BACKOFF.jittered(failures)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_that_is_dropped_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("7-abc");
        let log = StepLog::create(folder.clone()).await.unwrap();
        log.append(b"step\n".to_vec()).await.unwrap();
        assert!(folder.join("steps.jsonl").is_file());
        drop(log);
        assert!(!folder.exists());
    }

    #[test]
    fn a_log_that_cannot_be_made_leaves_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("7-abc");
        // A name that is too long: the folder can be made, and the file cannot.
        assert!(make(&folder, &folder.join("x".repeat(300))).is_err());
        assert!(!folder.exists());
    }
}
