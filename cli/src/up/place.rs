//! The data folder of `up`: one process at a time, and the file by which other commands find it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::client::UpFile;
use crate::exit::Problem;

/// The file whose lock says that the folder is taken. The kernel lets go of it however the process ends.
const LOCK_FILE: &str = "up.lock";

/// The folder, held.
#[derive(Debug)]
pub struct Place {
    folder: PathBuf,
    _lock: File,
}

impl Place {
    /// Makes the folder if it is missing, for its owner only, and takes it.
    pub fn take(folder: &Path) -> Result<Self, Problem> {
        let cannot = |what: &str, error: std::io::Error| {
            Problem::failed(format!("cannot {what} {}: {error}", folder.display()))
                .fix("name another folder with --data-dir")
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| cannot("make", error))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(folder.join(LOCK_FILE))
            .map_err(|error| cannot("write to", error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                folder: folder.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(taken(folder)),
            Err(TryLockError::Error(error)) => Err(cannot("lock", error)),
        }
    }

    /// Tells the other commands. Whole or not at all, and for the owner's eyes only: it holds a token.
    pub fn announce(&self, up: &UpFile) -> Result<(), Problem> {
        let path = UpFile::path(&self.folder);
        let staged = path.with_extension("json.new");
        let write = || {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&staged)?;
            writeln!(file, "{:#}", serde_json::json!(up))?;
            file.sync_all()?;
            std::fs::rename(&staged, &path)
        };
        write()
            .map_err(|error| Problem::failed(format!("cannot write {}: {error}", path.display())))
    }

    /// Takes the announcement back.
    pub fn withdraw(&self) {
        let path = UpFile::path(&self.folder);
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "the announcement is gone already");
        }
    }
}

fn taken(folder: &Path) -> Problem {
    let who = match UpFile::read(folder) {
        Ok(Some(up)) => format!(" (process {}, {})", up.pid, up.url),
        _ => String::new(),
    };
    Problem::refused(format!(
        "another `espalier up`{who} uses {}",
        folder.display()
    ))
    .fix("use that one, stop it, or name another folder with --data-dir")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use std::os::unix::fs::PermissionsExt;

    fn up() -> UpFile {
        UpFile {
            url: "http://127.0.0.1:7411".to_owned(),
            token: "t".to_owned(),
            store: "memory://".to_owned(),
            project: "default".to_owned(),
            pid: 42,
        }
    }

    #[test]
    fn a_folder_is_taken_once() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("a/b");
        let place = Place::take(&folder).unwrap();
        place.announce(&up()).unwrap();
        let problem = Place::take(&folder).unwrap_err();
        assert_eq!(problem.exit, Exit::Refused);
        assert!(
            problem.message.contains("process 42"),
            "{}",
            problem.message
        );
        drop(place);
        assert!(Place::take(&folder).is_ok());
    }

    #[test]
    fn the_announcement_is_private_and_can_be_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::take(folder.path()).unwrap();
        place.announce(&up()).unwrap();
        let path = UpFile::path(folder.path());
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(UpFile::read(folder.path()).unwrap().unwrap().pid, 42);
        place.withdraw();
        assert!(UpFile::read(folder.path()).unwrap().is_none());
    }
}
