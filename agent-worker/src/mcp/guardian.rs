//! One small process that outlives this one by a moment: when this process ends in any way, kill -9 included, the
//! guardian ends every MCP server that is still registered and removes the host's temporary folder. It made that folder
//! too, so that there is no moment at which nobody would remove it.
//!
//! The kernel's own means (`PR_SET_PDEATHSIG`) is tied to the *thread* that started the child, and async threads come
//! and go. The guardian is tied to a pipe instead: the kernel closes our end with the process, and the guardian reads
//! the end of its input. It is a shell, in a process group of its own, so that a signal to ours does not reach it.

use std::ffi::OsString;
use std::io::{Error, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;

/// Makes the folder and prints its path, then reads `add PGID` and `del PGID`; at the end of its input kills what is
/// left. Browsers end with their server: their control pipe closes. While they do they still write into their profile
/// and make its folders anew, so that after a kill the folder has to have stayed away for two looks.
const SCRIPT: &str = r#"
trap '' HUP INT PIPE TERM
dir=$(mktemp -d -- "$1/esp-mcp-XXXXXX") || exit 1
printf %s "$dir"
exec >/dev/null
groups=
while read -r verb group; do
  case $verb in
    add) groups="$groups $group" ;;
    del) rest=
         for other in $groups; do [ "$other" = "$group" ] || rest="$rest $other"; done
         groups=$rest ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group" 2>/dev/null; done
stayed=
for try in 1 2 3 4 5 6 7 8 9 10 11 12; do
  [ -e "$dir" ] && stayed= || stayed="x$stayed"
  rm -rf -- "$dir" 2>/dev/null
  [ -e "$dir" ] || [ -n "$groups" ] || break
  [ "$stayed" = xx ] && break
  sleep 1
done
"#;

/// The guardian of one host.
#[derive(Debug)]
pub(super) struct Guardian {
    dir: PathBuf,
    input: Mutex<Option<ChildStdin>>,
    process: Mutex<Child>,
}

impl Guardian {
    /// Starts it, with a new folder in `temp_dir` that nobody else may read and that is removed at the end. Blocking,
    /// for as long as a shell takes to make a folder.
    pub(super) fn start(temp_dir: &Path) -> std::io::Result<Self> {
        let mut process = Command::new("/bin/sh")
            .arg("-c")
            .arg(SCRIPT)
            .arg("espalier-guardian")
            .arg(std::path::absolute(temp_dir)?)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let mut dir = Vec::new();
        if let Some(mut stdout) = process.stdout.take() {
            stdout.read_to_end(&mut dir)?;
        }
        if dir.is_empty() {
            process.wait()?;
            let reason = format!("no folder can be made in {}", temp_dir.display());
            return Err(Error::other(reason));
        }
        let input = process.stdin.take();
        Ok(Self {
            dir: OsString::from_vec(dir).into(),
            input: Mutex::new(input),
            process: Mutex::new(process),
        })
    }

    /// The folder that goes with it.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Registers a process group. An error means that nothing would end it after our death: don't keep it.
    pub(super) fn add(&self, group: i32) -> std::io::Result<()> {
        self.tell("add", group)
    }

    /// Takes a group off the list, once it has ended.
    pub(super) fn remove(&self, group: i32) {
        // A guardian that is gone has no list to correct.
        let _ = self.tell("del", group);
    }

    /// A line is far below `PIPE_BUF` and the guardian reads at once: the write neither tears nor waits.
    fn tell(&self, verb: &str, group: i32) -> std::io::Result<()> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        match input.as_mut() {
            Some(pipe) => pipe.write_all(format!("{verb} {group}\n").as_bytes()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Closes the pipe and waits until the guardian has removed the folder. Blocking, for as long as the
    /// script tries.
    pub(super) fn finish(&self) -> std::io::Result<()> {
        drop(
            self.input
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.wait().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn sleeper() -> Child {
        Command::new("sleep")
            .arg("600")
            .process_group(0)
            .spawn()
            .unwrap()
    }

    #[test]
    fn kills_what_is_left_and_removes_the_folder() {
        let temp_dir = tempfile::Builder::new().prefix("a b").tempdir().unwrap();
        let guardian = Guardian::start(temp_dir.path()).unwrap();
        let inside = guardian.dir().to_owned();
        assert_eq!(inside.parent(), Some(temp_dir.path()));
        let mode = std::fs::metadata(&inside).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "nobody else may read it");
        std::fs::create_dir_all(inside.join("c")).unwrap();
        let (mut left, mut removed) = (sleeper(), sleeper());
        for child in [&left, &removed] {
            guardian.add(i32::try_from(child.id()).unwrap()).unwrap();
        }
        guardian.remove(i32::try_from(removed.id()).unwrap());
        guardian.finish().unwrap();
        assert!(!inside.exists());
        assert!(
            left.try_wait().unwrap().is_some(),
            "it was left on the list"
        );
        assert!(
            removed.try_wait().unwrap().is_none(),
            "it was taken off the list"
        );
        removed.kill().unwrap();
        removed.wait().unwrap();
        assert!(guardian.add(1).is_err());
    }
    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let error = Guardian::start(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "no folder can be made in /nowhere");
    }
}
