//! The data folder of `up`: one process at a time, and the file by which other commands find it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::client::UpFile;
use crate::exit::Problem;

/// The file whose lock says that the folder is taken. The kernel lets go of it however the process ends.
const LOCK_FILE: &str = "up.lock";
/// The file of the clients' token.
const TOKEN_FILE: &str = "token";

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

    /// The token of clients, the same for every `up` on this folder: a client that waits out a restart keeps it.
    pub fn token(&self, fresh: impl FnOnce() -> String) -> Result<String, Problem> {
        let path = self.folder.join(TOKEN_FILE);
        match std::fs::read_to_string(&path) {
            Ok(token) if !token.trim().is_empty() => return Ok(token.trim().to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let message = format!("cannot read {}: {error}", path.display());
                return Err(Problem::failed(message));
            }
        }
        let token = fresh();
        write_private(&path, &token)?;
        Ok(token)
    }

    /// Tells the other commands. Whole or not at all, and for the owner's eyes only: it holds a token.
    pub fn announce(&self, up: &UpFile) -> Result<(), Problem> {
        let text = format!("{:#}\n", serde_json::json!(up));
        write_private(&UpFile::path(&self.folder), &text)
    }

    /// Takes the announcement back.
    pub fn withdraw(&self) {
        let path = UpFile::path(&self.folder);
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "the announcement is gone already");
        }
    }
}

/// Writes a file that only its owner may read, whole or not at all.
fn write_private(path: &Path, text: &str) -> Result<(), Problem> {
    let staged = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&staged)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&staged, path)
    };
    write().map_err(|error| Problem::failed(format!("cannot write {}: {error}", path.display())))
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
            admin_token: "a".to_owned(),
            store: "memory://".to_owned(),
            project: "default".to_owned(),
            pid: 42,
            model: None,
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
    fn the_token_stays_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::take(folder.path()).unwrap();
        assert_eq!(place.token(|| "a".to_owned()).unwrap(), "a");
        assert_eq!(place.token(|| "b".to_owned()).unwrap(), "a");
        let mode = std::fs::metadata(folder.path().join(TOKEN_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
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
