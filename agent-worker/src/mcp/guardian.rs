//! One small process that outlives this one by a moment: when this process ends in any way, kill -9 included, the
//! guardian ends every MCP server that is still registered and removes the host's temporary folder. It made that folder
//! too, so that there is no moment at which nobody would remove it.
//!
//! The kernel's own means (`PR_SET_PDEATHSIG`) is tied to the *thread* that started the child, and async threads come
//! and go. The guardian is tied to a pipe instead: the kernel closes our end with the process, and the guardian reads
//! the end of its input. It is a shell, in a process group of its own, so that a signal to ours does not reach it. One
//! that was killed all the same is found out with the next server that starts or ends, and another takes its place.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{Error, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;

/// Makes the folder, unless it is given one, and prints its path, then reads `add PGID` and `del PGID`; at the end of its input kills what is
/// left. Browsers end with their server: their control pipe closes. While they do they still write into their profile
/// and make its folders anew, so that after a kill the folder has to have stayed away for two looks.
const SCRIPT: &str = r#"
trap '' HUP INT PIPE TERM
dir=$2
[ -n "$dir" ] || dir=$(mktemp -d -- "$1/esp-mcp-XXXXXX") || exit 1
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
    temp_dir: PathBuf,
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    shell: Shell,
    /// What is on its list.
    groups: BTreeSet<i32>,
}

/// The process.
#[derive(Debug)]
struct Shell {
    process: Child,
    /// None: it was told to finish.
    input: Option<ChildStdin>,
}

impl Guardian {
    /// Starts it, with a new folder in `temp_dir` that nobody else may read and that is removed at the end. Blocking,
    /// for as long as a shell takes to make a folder.
    pub(super) fn start(temp_dir: &Path) -> std::io::Result<Self> {
        let temp_dir = std::path::absolute(temp_dir)?;
        let (shell, dir) = Shell::start(&temp_dir, None)?;
        let groups = BTreeSet::new();
        Ok(Self {
            temp_dir,
            dir,
            state: Mutex::new(State { shell, groups }),
        })
    }

    /// The folder that goes with it.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Registers a process group. An error means that nothing would end it after our death: don't keep it.
    pub(super) fn add(&self, group: i32) -> std::io::Result<()> {
        let mut state = self.state();
        state.groups.insert(group);
        let told = self.tell(&mut state, "add", group);
        if told.is_err() {
            state.groups.remove(&group);
        }
        told
    }

    /// Takes a group off the list, once it has ended.
    pub(super) fn remove(&self, group: i32) {
        let mut state = self.state();
        state.groups.remove(&group);
        // One that has finished has no list to correct.
        let _ = self.tell(&mut state, "del", group);
    }

    /// Where the shell is gone, another one gets the whole list.
    fn tell(&self, state: &mut State, verb: &str, group: i32) -> std::io::Result<()> {
        match state.shell.tell(verb, group) {
            Err(_) if state.shell.input.is_some() => {}
            told => return told,
        }
        tracing::warn!("the guardian of MCP servers was killed: starting another");
        let (shell, _) = Shell::start(&self.temp_dir, Some(&self.dir))?;
        let mut gone = std::mem::replace(&mut state.shell, shell);
        // It has closed its input, and must not act on what it still has on its list.
        let _ = gone.process.kill();
        let _ = gone.process.wait();
        let shell = &mut state.shell;
        state
            .groups
            .iter()
            .try_for_each(|group| shell.tell("add", *group))
    }

    /// Closes the pipe and waits until the guardian has removed the folder. Blocking, for as long as the
    /// script tries.
    pub(super) fn finish(&self) -> std::io::Result<()> {
        let mut state = self.state();
        drop(state.shell.input.take());
        state.shell.process.wait().map(drop)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shell {
    /// Starts a shell with the folder `dir`, or with a new one in `temp_dir`. Returns the folder too.
    fn start(temp_dir: &Path, dir: Option<&Path>) -> std::io::Result<(Self, PathBuf)> {
        let mut process = Command::new("/bin/sh")
            .arg("-c")
            .arg(SCRIPT)
            .arg("espalier-guardian")
            .arg(temp_dir)
            .arg(dir.unwrap_or(Path::new("")))
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
        Ok((Self { process, input }, OsString::from_vec(dir).into()))
    }

    /// A line is far below `PIPE_BUF` and the guardian reads at once: the write neither tears nor waits.
    fn tell(&mut self, verb: &str, group: i32) -> std::io::Result<()> {
        match self.input.as_mut() {
            Some(pipe) => pipe.write_all(format!("{verb} {group}\n").as_bytes()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
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
    fn one_that_was_killed_is_replaced_with_its_list() {
        let temp_dir = tempfile::tempdir().unwrap();
        let guardian = Guardian::start(temp_dir.path()).unwrap();
        let (mut before, mut after) = (sleeper(), sleeper());
        guardian.add(i32::try_from(before.id()).unwrap()).unwrap();
        {
            let mut state = guardian.state();
            state.shell.process.kill().unwrap();
            state.shell.process.wait().unwrap();
        }
        guardian.add(i32::try_from(after.id()).unwrap()).unwrap();
        assert!(guardian.dir().is_dir());
        guardian.finish().unwrap();
        assert!(!guardian.dir().exists());
        for child in [&mut before, &mut after] {
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let error = Guardian::start(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "no folder can be made in /nowhere");
    }
}
