//! What a process under test leaves behind: a trail by which its processes and temporary files are found after its end.
//!
//! Only those that start one lay it: `up` and `cluster`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rand::RngExt;
use rustix::process::{Pid, Signal, kill_process};

use super::wait_for;

/// Where the processes and temporary files of one process are found.
#[derive(Debug)]
pub struct Trail {
    user: String,
    temp_dir: PathBuf,
}

impl Trail {
    /// A trail through `temp_dir`, which nobody else uses. Its path has to be short: Unix sockets lie below it.
    pub fn new(temp_dir: PathBuf) -> Self {
        std::fs::create_dir_all(&temp_dir).expect("the test's folder is writable");
        let user = format!("espalier-test-{:016x}", rand::rng().random::<u64>());
        Self { user, temp_dir }
    }

    /// Makes `command` leave it. MCP servers inherit little of the worker's environment; the name of the user is a part
    /// of it.
    pub fn lay(&self, command: &mut Command) {
        command.envs(self.variables());
    }

    /// The variables by which a process leaves it, and those that it starts.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let temp_dir = self.temp_dir.display().to_string();
        [("LOGNAME", self.user.clone()), ("TMPDIR", temp_dir)]
    }

    /// Ids and command lines of what is still there, the process itself included. The children of a browser write their
    /// titles over their environment: they are found by the folder that they work in, their server's.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = format!("LOGNAME={}", self.user);
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| is_marked(*pid, &mark) || works_within(*pid, &self.temp_dir))
            .map(|pid| (pid, command_line(pid)))
            .filter(|(_, line)| !line.is_empty())
            .collect()
    }

    /// Temporary files that are there: the folders of MCP servers, with the profiles of browsers.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.temp_dir.clone()];
        while let Some(folder) = folders.pop() {
            // What is removed meanwhile is not there.
            let Ok(entries) = std::fs::read_dir(&folder) else {
                continue;
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                }
                found.push(entry.path());
            }
        }
        found
    }

    /// Waits until no process is left. Panics if one is left after `deadline`, or a file then.
    pub async fn wait_until_cold(&self, deadline: Duration) {
        wait_for("every process to be gone", deadline, || async {
            let left = self.processes();
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
        // The process that removes them is one of those.
        let left = self.files();
        assert!(left.is_empty(), "temporary files were left: {left:?}");
    }
}

impl Drop for Trail {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                // It may have ended with one that was killed before it.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Whether the environment that it was started with holds `mark`.
fn is_marked(pid: u32, mark: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .windows(mark.len())
        .any(|window| window == mark.as_bytes())
}

/// Whether its folder is `folder` or lies below, though it may be removed by now.
fn works_within(pid: u32, folder: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
}

/// A zombie has none, and counts as gone.
fn command_line(pid: u32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw)
        .replace('\0', " ")
        .trim()
        .to_owned()
}
