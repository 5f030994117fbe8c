//! A real Redis as a process of its own, with an append-only file, that can be killed, paused and started again.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use crate::ports::Ports;
use crate::process::{Process, Signal};
use crate::{installed, wait_for};

/// Ready in 0.6 s on a quiet machine; two busy cores and a long append-only file take longer.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// A server that is paused does not answer; the wait for it has to end.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// A running Redis on loopback. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct RedisServer {
    process: Process,
    settings: Vec<(String, String)>,
    ports: Ports,
    folder: TempDir,
}

impl RedisServer {
    /// Starts an empty one, synced to disk every second, without password.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with further settings of `redis.conf`, such as `("maxmemory", "64mb")`; they win over the usual ones.
    pub async fn start_with(settings: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let ports = Ports::claim();
        let settings: Vec<(String, String)> = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let process = spawn(folder.path(), &ports, &settings);
        let mut server = Self {
            process,
            settings,
            ports,
            folder,
        };
        server.wait_until_ready().await;
        server
    }

    /// Starts a replica of `primary` and waits until it has its data. `promote` ends that; a restart brings it back.
    pub async fn start_replica(primary: &Self) -> Self {
        let of = format!("127.0.0.1 {}", primary.port());
        let replica = Self::start_with(&[("replicaof", &of)]).await;
        replica.wait_until_in_sync().await;
        replica
    }

    /// Waits until this replica has its primary's data.
    pub async fn wait_until_in_sync(&self) {
        wait_for("the replica to be in sync", READY_DEADLINE, || async {
            let info = self.cli(&["INFO", "replication"]).await;
            let up = info.contains("master_link_status:up");
            up.then_some(()).ok_or(info)
        })
        .await;
    }

    /// Its address, as `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// Its port; the same after a restart.
    pub fn port(&self) -> u16 {
        self.ports.port(0)
    }

    /// The folder of its data and its log, which outlives a kill.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs one command with `redis-cli` and gives what it printed: for looking and for faults, not for load.
    ///
    /// # Panics
    /// Where there is no answer within 5 s.
    pub async fn cli(&self, command: &[&str]) -> String {
        let answer = timeout(ANSWER_DEADLINE, cli(self.port(), command)).await;
        answer.unwrap_or_else(|_| panic!("redis does not answer {command:?}"))
    }

    /// Makes a replica a primary.
    pub async fn promote(&self) {
        let answer = self.cli(&["REPLICAOF", "NO", "ONE"]).await;
        assert_eq!(answer.trim(), "OK");
    }

    /// Kills it with SIGKILL and waits for its end. The data on disk stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port and data, after killing it if it still runs, and waits until it serves.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = spawn(self.folder.path(), &self.ports, &self.settings);
        self.wait_until_ready().await;
    }

    /// Stops it where it is, as a machine that stalls; connections stay open.
    pub fn pause(&self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.signal(Signal::CONT);
    }

    async fn wait_until_ready(&mut self) {
        let (port, process) = (self.ports.port(0), &mut self.process);
        wait_for("redis to be ready", READY_DEADLINE, || {
            let ended = process.ended();
            assert!(ended.is_none(), "redis ended: {}", process.log());
            async move {
                // While it loads its data it answers with an error.
                let answer = timeout(ANSWER_DEADLINE, cli(port, &["PING"])).await;
                match answer {
                    Ok(pong) if pong.trim() == "PONG" => Ok(()),
                    other => Err(other),
                }
            }
        })
        .await;
    }
}

fn spawn(folder: &Path, ports: &Ports, settings: &[(String, String)]) -> Process {
    let port = ports.port(0).to_string();
    let mut command = Command::new(installed("redis-server"));
    command.args(["--port", &port, "--bind", "127.0.0.1", "--daemonize", "no"]);
    command.arg("--dir").arg(folder);
    command.args(["--appendonly", "yes", "--appendfsync", "everysec"]);
    // No snapshots: a fork in the middle of a test only takes time.
    command.args(["--save", ""]);
    for (name, value) in settings {
        command.arg(format!("--{name}")).args(value.split(' '));
    }
    Process::start("redis", command, folder)
}

async fn cli(port: u16, command: &[&str]) -> String {
    let output = tokio::process::Command::new(installed("redis-cli"))
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        .args(command)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("redis-cli comes with redis-server");
    let said = if output.status.success() {
        output.stdout
    } else {
        output.stderr
    };
    String::from_utf8_lossy(&said).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_survives_a_kill() {
        let mut server = RedisServer::start().await;
        assert_eq!(server.cli(&["SET", "a", "1"]).await.trim(), "OK");
        let url = server.url();
        server.kill();
        assert!(server.cli(&["PING"]).await.contains("Connection refused"));
        server.restart().await;
        assert_eq!(server.cli(&["GET", "a"]).await.trim(), "1");
        assert_eq!(server.url(), url);
    }

    #[tokio::test]
    async fn a_paused_server_answers_when_it_goes_on() {
        let server = RedisServer::start().await;
        server.pause();
        let answer = cli(server.port(), &["PING"]);
        tokio::pin!(answer);
        assert!(
            timeout(Duration::from_millis(200), &mut answer)
                .await
                .is_err()
        );
        server.resume();
        assert_eq!(answer.await.trim(), "PONG");
    }

    #[tokio::test]
    async fn settings_are_taken_and_a_full_server_refuses() {
        let server = RedisServer::start_with(&[("maxmemory", "1mb")]).await;
        let big = "x".repeat(100_000);
        let mut answer = String::new();
        for n in 0..20 {
            answer = server.cli(&["SET", &format!("k{n}"), &big]).await;
        }
        assert!(answer.contains("OOM"), "{answer}");
    }

    #[tokio::test]
    async fn a_replica_follows_and_can_be_promoted() {
        let mut primary = RedisServer::start().await;
        primary.cli(&["SET", "a", "1"]).await;
        let replica = RedisServer::start_replica(&primary).await;
        assert_eq!(replica.cli(&["GET", "a"]).await.trim(), "1");
        primary.kill();
        replica.promote().await;
        assert_eq!(replica.cli(&["SET", "a", "2"]).await.trim(), "OK");
    }
}
