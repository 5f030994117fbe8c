//! A server process: started in a group of its own with a small environment, watched, and ended with its whole group.
//!
//! It knows nothing of MCP; what goes over the pipes is `connection`'s.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_runtime::process::INHERITED;
use espalier_runtime::tasks::{OnFailure, Tasks, with_deadline};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{oneshot, watch};

use super::guardian::Guardian;
use super::redact::Secrets;

/// How much of a server's standard error is kept for its last words.
const STDERR_BYTES_KEPT: usize = 4096;
/// How long a server may take to end after it was asked to.
const TERMINATE_GRACE: Duration = Duration::from_secs(4);
/// How long the kernel may take to end a killed one.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// How long the pipe of a process that has ended may stay open.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);
/// What a server inherits on top of what any child does.
const INHERITED_TOO: [&str; 2] = ["WAYLAND_DISPLAY", "XAUTHORITY"];

/// The variables that a server gets from the worker's environment.
pub(super) fn inherited(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kept = |name: &&str| Some(((*name).to_owned(), env.get(*name)?.clone()));
    let names = INHERITED.iter().chain(&INHERITED_TOO);
    names.filter_map(kept).collect()
}

/// What is started.
#[derive(Clone)]
pub(super) struct Launch {
    pub program: PathBuf,
    pub args: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    pub cwd: PathBuf,
    /// What must not show in its last words.
    pub secrets: Secrets,
}

/// The pipes of a server that talks on them.
pub(super) struct Pipes {
    pub stdin: ChildStdin,
    pub stdout: ChildStdout,
}

/// A running server process. Dropping it kills the group.
#[derive(Debug)]
pub(super) struct ServerProcess {
    group: Pid,
    exited: watch::Receiver<Option<String>>,
    last_words: Arc<LastWords>,
}

impl ServerProcess {
    /// Starts `launch`. `piped`: its input and output are returned; otherwise both are closed.
    pub(super) fn start(
        launch: &Launch,
        piped: bool,
        guardian: Arc<Guardian>,
        tasks: &Tasks,
    ) -> std::io::Result<(Self, Option<Pipes>)> {
        let stdio = || if piped { Stdio::piped() } else { Stdio::null() };
        let mut child = Command::new(&launch.program)
            .args(&launch.args)
            .env_clear()
            .envs(&launch.env)
            .current_dir(&launch.cwd)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let group = id.and_then(Pid::from_raw).ok_or_else(|| {
            std::io::Error::other("the process ended before it could be registered")
        })?;
        if let Err(error) = guardian.add(group.as_raw_nonzero().get()) {
            kill_group(group, Signal::KILL);
            return Err(error);
        }
        let last_words = Arc::new(LastWords::new(launch.secrets.clone()));
        let (all_read, heard) = oneshot::channel::<()>();
        if let Some(stderr) = child.stderr.take() {
            let kept = Arc::clone(&last_words);
            tasks.spawn_apart("mcp_server_stderr", OnFailure::Ignore, async move {
                kept.read(stderr).await;
                drop(all_read);
            });
        }
        let pipes = match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Some(Pipes { stdin, stdout }),
            _ => None,
        };
        let (tell, exited) = watch::channel(None);
        // A shared server outlives the rollout that started it.
        tasks.spawn_apart(
            "mcp_server_wait",
            OnFailure::Log,
            wait(child, group, guardian, heard, tell),
        );
        let process = Self {
            group,
            exited,
            last_words,
        };
        Ok((process, pipes))
    }

    /// How it ended, once it has.
    pub(super) fn exit_status(&self) -> Option<String> {
        self.exited.borrow().clone()
    }

    /// Waits for its end.
    pub(super) async fn exited(&self) -> String {
        let mut exited = self.exited.clone();
        match exited.wait_for(Option::is_some).await {
            Ok(status) => status.clone().unwrap_or_default(),
            Err(_) => "its watch ended".to_owned(),
        }
    }

    /// The end of what it wrote to its standard error, without secrets.
    pub(super) fn last_words(&self) -> String {
        self.last_words.text()
    }

    /// What must not show in an error about it.
    pub(super) fn secrets(&self) -> &Secrets {
        &self.last_words.secrets
    }

    /// The process group, which is also the id of its first process.
    pub(super) fn group(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// Ends it: asks, and kills what does not go. `false`: something is still there.
    pub(super) async fn stop(&self) -> bool {
        self.signal(Signal::TERM);
        if with_deadline("mcp_server_terminate", TERMINATE_GRACE, self.exited())
            .await
            .is_ok()
        {
            return true;
        }
        self.kill();
        with_deadline("mcp_server_kill", KILL_GRACE, self.exited())
            .await
            .is_ok()
    }

    /// Ends it at once.
    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // The id of a process that was waited for may belong to another one by now.
        if self.exit_status().is_none() {
            kill_group(self.group, signal);
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn kill_group(group: Pid, signal: Signal) {
    // The one error that can be is that the group has ended.
    let _ = kill_process_group(group, signal);
}

async fn wait(
    mut child: Child,
    group: Pid,
    guardian: Arc<Guardian>,
    heard: oneshot::Receiver<()>,
    tell: watch::Sender<Option<String>>,
) {
    let status = match child.wait().await {
        Ok(status) => status.to_string(),
        Err(error) => format!("wait failed: {error}"),
    };
    // What the server started and left behind.
    kill_group(group, Signal::KILL);
    guardian.remove(group.as_raw_nonzero().get());
    // Its end is told after its last words were heard; a grandchild that left the group may hold the pipe open.
    let _ = with_deadline("mcp_server_last_words", LAST_WORDS_LIMIT, heard).await;
    let _ = tell.send(Some(status));
}

/// The bounded end of a server's standard error.
#[derive(Debug)]
struct LastWords {
    heard: Mutex<Heard>,
    secrets: Secrets,
}

#[derive(Debug, Default)]
struct Heard {
    bytes: VecDeque<u8>,
    /// Whether there was more before.
    is_cut: bool,
}

impl LastWords {
    fn new(secrets: Secrets) -> Self {
        Self {
            heard: Mutex::default(),
            secrets,
        }
    }

    async fn read(self: Arc<Self>, mut from: impl AsyncRead + Unpin) {
        let mut buffer = [0; 1024];
        // The kernel starts no program with a longer value than 128 KiB.
        let kept = STDERR_BYTES_KEPT + self.secrets.longest();
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let mut heard = self.heard();
            heard.bytes.extend(&buffer[..count]);
            let surplus = heard.bytes.len().saturating_sub(kept);
            heard.bytes.drain(..surplus);
            heard.is_cut |= surplus > 0;
        }
    }

    fn text(&self) -> String {
        let (bytes, is_cut) = {
            let heard = self.heard();
            (Vec::from_iter(heard.bytes.iter().copied()), heard.is_cut)
        };
        let text = String::from_utf8_lossy(&bytes);
        if !is_cut {
            return self.secrets.redact(&text).trim().to_owned();
        }
        // Of a secret that the cut goes through only an end is left, which nobody recognises: it ends before as many
        // bytes as the longest secret has.
        let unsure = &bytes[..self.secrets.longest().min(bytes.len())];
        let from = String::from_utf8_lossy(unsure).len();
        let shown = self.secrets.redact_from(&text, from);
        let shown = shown.trim();
        // The first line has lost its beginning.
        let whole_lines = shown.split_once('\n').map(|(_, rest)| rest);
        whole_lines.unwrap_or(shown).to_owned()
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The program that `command` means: as it is if it holds a slash, else the first in `PATH`.
pub(super) fn find_program(command: &str, env: &BTreeMap<String, String>) -> Option<PathBuf> {
    if command.contains('/') {
        let path = PathBuf::from(command);
        return is_program(&path).then_some(path);
    }
    let path = env.get("PATH")?;
    std::env::split_paths(path)
        .map(|dir| dir.join(command))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_runtime::shutdown::Shutdown;

    fn launch(script: &str) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into(),
            cwd: "/".into(),
            secrets: Secrets::new(&["hunter2-secret".to_owned()]),
        }
    }

    fn start(script: &str) -> (ServerProcess, Option<Pipes>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let guardian = Arc::new(Guardian::start(dir.path()).unwrap());
        let tasks = Tasks::new(Shutdown::new());
        let (process, pipes) =
            ServerProcess::start(&launch(script), true, guardian, &tasks).unwrap();
        (process, pipes, dir)
    }

    #[tokio::test]
    async fn last_words_are_bounded_and_without_secrets() {
        let (process, _pipes, _dir) = start(
            "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done >&2; echo hunter2-secret >&2; exit 3",
        );
        assert_eq!(process.exited().await, "exit status: 3");
        let words = process.last_words();
        assert!(words.ends_with("***"), "{words}");
        assert!(
            words.len() <= STDERR_BYTES_KEPT && words.contains("line 2999"),
            "{words}"
        );
        assert!(words.starts_with("line "), "{words}");
    }

    #[tokio::test]
    async fn no_end_of_a_secret_is_left_where_the_last_words_are_cut() {
        for script in [
            // The cut goes through the secret, on a line without an end and on one with.
            "printf '%s' hunter2-secret >&2; head -c 4090 /dev/zero | tr '\\0' x >&2",
            "printf '%s' hunter2-secret >&2; head -c 4090 /dev/zero | tr '\\0' x >&2; echo >&2",
            "head -c 9000 /dev/zero | tr '\\0' x >&2; echo hunter2-secret >&2",
        ] {
            let (process, _pipes, _dir) = start(script);
            process.exited().await;
            let words = process.last_words();
            assert!(words.contains("xxx"), "{script}: {words}");
            assert!(!words.contains("cret"), "{script}: {words}");
        }
    }

    #[tokio::test]
    async fn stop_ends_the_whole_group_even_where_term_is_ignored() {
        let (process, pipes, _dir) = start("trap '' TERM; sleep 600 & echo $!; wait");
        let mut pipes = pipes.unwrap();
        let mut line = [0; 16];
        let count = pipes.stdout.read(&mut line).await.unwrap();
        let grandchild: i32 = std::str::from_utf8(&line[..count])
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert!(process.stop().await);
        let grandchild = Pid::from_raw(grandchild).unwrap();
        let gone = async {
            // A zombie that nobody waits for counts as gone.
            while std::fs::read_to_string(format!("/proc/{}/stat", grandchild.as_raw_nonzero()))
                .is_ok_and(|stat| !stat.contains(") Z "))
            {
                tokio::task::yield_now().await;
            }
        };
        with_deadline("test", Duration::from_secs(5), gone)
            .await
            .unwrap();
    }

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let env = [("PATH".to_owned(), "/nowhere:/bin".to_owned())].into();
        assert_eq!(find_program("sh", &env), Some("/bin/sh".into()));
        assert_eq!(find_program("/bin/sh", &env), Some("/bin/sh".into()));
        assert_eq!(find_program("no-such-program", &env), None);
        assert_eq!(find_program("/etc/passwd", &env), None, "not executable");
    }

    #[test]
    fn a_server_does_not_inherit_the_workers_secrets() {
        let env = [
            ("PATH", "/bin"),
            ("ESPALIER_TOKEN", "s"),
            ("AWS_SECRET_ACCESS_KEY", "s"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        assert_eq!(inherited(&env).into_keys().collect::<Vec<_>>(), ["PATH"]);
    }
}
