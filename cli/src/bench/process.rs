//! A process that a measurement starts and that ends with it.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::exit::Problem;

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Lines of a log that an error shows.
const LOG_LINES_MAX: usize = 5;

/// A child that dies with its owner.
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it. What it says goes to `log`.
    pub fn start(name: &'static str, mut command: Command, log: PathBuf) -> Result<Self, Problem> {
        let output = std::fs::File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Problem::refused(format!("cannot start {name}: {error}")))?;
        Ok(Self { name, child, log })
    }

    /// Its number, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// What it said so far.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Asks `serves` until it says yes, the process ends or `limit` is over.
    pub async fn wait_until(
        &mut self,
        limit: Duration,
        serves: impl AsyncFn() -> bool,
    ) -> Result<(), Problem> {
        let began = Instant::now();
        while !serves().await {
            let name = self.name;
            if self.child.try_wait()?.is_some() {
                let log = self.log();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(LOG_LINES_MAX)..].join("\n");
                return Err(Problem::failed(format!("{name} ended:\n{tail}")));
            }
            if began.elapsed() > limit {
                let limit = limit.as_secs();
                return Err(Problem::failed(format!(
                    "{name} does not serve after {limit} s"
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Ends it and waits until it is gone.
    pub async fn end(mut self) -> Result<(), Problem> {
        Ok(self.child.kill().await?)
    }
}

/// A port that nobody listens on now.
pub fn free_port() -> Result<u16, Problem> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}
