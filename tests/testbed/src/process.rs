//! A child process that dies with its test, and whose log is shown when the test fails.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process, kill_process_group};

use crate::wait_for;

/// A thread stops when it next runs; under load that takes a moment.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The binary `name` of this workspace, built in the profile that the test was built in.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    // target/debug/deps/test-hash -> target/debug
    let folder = test
        .ancestors()
        .nth(2)
        .expect("tests lie in target/PROFILE/deps");
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `make test`, which builds all binaries first",
        path.display()
    );
    path
}

/// A running process, in a process group of its own.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// Kept open, since the folder of a test that failed may be gone before its processes are.
    log: File,
}

impl Process {
    /// Starts `command` with what it prints going to a file in `folder`.
    pub fn start(name: &str, mut command: Command, folder: &Path) -> Self {
        let log = folder.join(format!("{name}.log"));
        let open = || {
            let mut options = File::options();
            let file = options.create(true).append(true).read(true).open(&log);
            file.expect("the test's folder is writable")
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Self {
            name: name.to_owned(),
            child,
            log: open(),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        let (mut file, mut text) = (&self.log, String::new());
        let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
        read.map(|_| text).unwrap_or_default()
    }

    /// Sends a signal to the process alone, not to its children. After [`Signal::STOP`] all of its threads stand still.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal)
            .unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
        if signal == Signal::STOP {
            let since = Instant::now();
            while !is_stopped(pid) {
                assert!(since.elapsed() < STOP_LIMIT, "{} does not stop", self.name);
                std::thread::yield_now();
            }
        }
    }

    /// Ends it at once, as the kernel would, and waits for its end. Its children are left to themselves.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end and waits; panics if it has not ended after `deadline`.
    pub async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(deadline).await
    }

    /// Waits for its end; panics if it has not ended after `deadline`.
    pub async fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        wait_for(&what, deadline, || {
            let ended = self.ended();
            let log_bytes = self.log().len();
            async move { ended.ok_or(format!("{log_bytes} bytes of log")) }
        })
        .await
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}

/// Whether no thread of a process runs any more.
fn is_stopped(pid: Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let stands = |thread: &std::fs::DirEntry| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // After the name, which may hold anything, in brackets.
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
        state.is_none_or(|state| state.starts_with(['T', 't', 'Z', 'X']))
    };
    let mut threads = threads.into_iter().flatten().flatten();
    threads.all(|thread| stands(&thread))
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group, so that a test which failed leaves nothing running.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- the end of what {} logged ---", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}
