//! A real S3 server, SeaweedFS, as a process of its own, that can be killed, paused and started again.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::ports::Ports;
use crate::process::{Process, Signal};
use crate::{installed, wait_for};

/// Ready in 0.7 s on a quiet machine.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// A server that is paused does not answer; the wait for it has to end.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// The bucket that is there from the start.
pub const BUCKET: &str = "espalier";
/// The access key that has all rights.
pub const ACCESS_KEY: &str = "access-key-of-a-test";
/// Its secret.
pub const SECRET_KEY: &str = "secret-key-of-a-test";
/// Any region will do for the server; signatures name one.
pub const REGION: &str = "us-east-1";

/// Names of the services, with the place of their port in the block.
const SERVICES: [(&str, u16); 5] = [
    ("s3", 0),
    ("master", 1),
    ("volume", 2),
    ("filer", 3),
    ("admin", 4),
];

/// A running S3 server on loopback. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct S3Server {
    process: Process,
    ip: IpAddr,
    ports: Ports,
    folder: TempDir,
}

impl S3Server {
    /// Starts one with the empty bucket [`BUCKET`].
    pub async fn start() -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST.into()).await
    }

    /// The same at an address of the host on which this thread is.
    pub async fn start_at(ip: IpAddr) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let ports = Ports::claim();
        let process = spawn(folder.path(), ip, &ports);
        let mut server = Self {
            process,
            ip,
            ports,
            folder,
        };
        server.wait_until_ready().await;
        server
    }

    /// Where it listens; the same after a restart.
    pub fn address(&self) -> SocketAddr {
        (self.ip, self.ports.port(0)).into()
    }

    /// The endpoint for clients, such as `http://127.0.0.1:12000`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// The URL of a store of Espalier's under `prefix` in the bucket.
    pub fn store_url(prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What a process needs in its environment to reach it.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        Self::environment_at(&self.endpoint())
    }

    /// The same, over a proxy in front of it.
    pub fn environment_at(endpoint: &str) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL", endpoint.to_owned()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", REGION.to_owned()),
        ]
    }

    /// Kills it with SIGKILL and waits for its end. The data on disk stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same ports and data, after killing it if it still runs, and waits until it serves.
    ///
    /// A kill, because a server that was asked to end still answers for two seconds and would be taken for the new one.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = spawn(self.folder.path(), self.ip, &self.ports);
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
        let (address, process) = (self.address(), &mut self.process);
        wait_for("the S3 server to be ready", READY_DEADLINE, || {
            let ended = process.ended();
            assert!(ended.is_none(), "it ended: {}", process.log());
            async move {
                match timeout(ANSWER_DEADLINE, health(address)).await {
                    Ok(Ok(status)) if status.contains(" 200 ") => Ok(()),
                    other => Err(other),
                }
            }
        })
        .await;
    }
}

fn spawn(folder: &Path, ip: IpAddr, ports: &Ports) -> Process {
    let data = folder.join("data");
    std::fs::create_dir_all(&data).expect("the test's folder is writable");
    let mut command = Command::new(installed("weed"));
    command
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        .arg("mini")
        .arg(format!("-dir={}", data.display()))
        .arg(format!("-ip={ip}"))
        .arg(format!("-ip.bind={ip}"))
        .arg(format!("-bucket={BUCKET}"))
        .args(["-master.telemetry=false", "-admin.ui=false"])
        .args(["-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"])
        .arg(format!(
            "-filer.localSocket={}",
            folder.join("filer.sock").display()
        ));
    for (service, n) in SERVICES {
        command.arg(format!("-{service}.port={}", ports.port(n)));
    }
    Process::start("seaweedfs", command, folder)
}

/// The status line of its answer to a health check.
async fn health(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; 32];
    let length = stream.read(&mut start).await?;
    let start = String::from_utf8_lossy(&start[..length]);
    Ok(start.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_serves_again_after_a_kill_and_a_pause() {
        let mut server = S3Server::start().await;
        server.kill();
        assert!(health(server.address()).await.is_err());
        server.restart().await;
        server.pause();
        let answer = health(server.address());
        tokio::pin!(answer);
        assert!(
            timeout(Duration::from_millis(200), &mut answer)
                .await
                .is_err()
        );
        server.resume();
        assert!(answer.await.unwrap().contains(" 200 "));
    }
}
