//! A Redis and coordinators for one measurement, as real processes on loopback with fresh data; what they used of the
//! processor, and what Redis says of itself. They end with the measurement.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use espalier_core::trace::sha256_hex;
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::Tasks;
use tokio::process::Command;

use super::super::process::{Process, free_port};
use crate::client::{Client, Target};
use crate::exit::Problem;

/// The project of measurements that need only one.
pub const PROJECT: &str = "bench";
const WORKER_TOKEN: &str = "bench-worker";
/// How long a process may take to serve.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// What runs.
pub struct Setup<'a> {
    /// The binary of the coordinator.
    pub coordinator: &'a Path,
    /// How many of them.
    pub coordinators: usize,
    /// Projects that somebody submits to.
    pub projects: Vec<String>,
    /// The lease that workers get; absent: what suits the kind of job.
    pub lease_ttl: Option<Duration>,
}

/// A Redis alone.
pub struct RedisServer {
    process: Process,
    port: u16,
    // Removed with everything in it when the measurement ends.
    folder: tempfile::TempDir,
}

/// A Redis, coordinators, and ways to them.
pub struct Stack {
    pub redis: RedisServer,
    coordinators: Vec<Process>,
    urls: Vec<String>,
    tasks: Tasks,
}

/// Seconds of processor time since some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuSeconds {
    pub redis: f64,
    pub coordinators: f64,
    pub this_process: f64,
}

impl RedisServer {
    /// An empty one, with an append-only file that is synced every second.
    pub async fn start() -> Result<Self, Problem> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
        command.args(["--appendonly", "yes", "--appendfsync", "everysec"]);
        command.args(["--save", ""]).arg("--dir").arg(folder.path());
        let process = Process::start("redis-server", command, folder.path().join("redis.log"))?;
        let mut server = Self {
            process,
            port,
            folder,
        };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let served = server
            .process
            .wait_until(READY_LIMIT, async || listens(address).await);
        served.await?;
        Ok(server)
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// What `redis-cli` prints for a command.
    pub async fn ask(&self, command: &[&str]) -> Result<String, Problem> {
        let port = self.port.to_string();
        let output = Command::new("redis-cli")
            .args(["-p", &port])
            .args(command)
            .output()
            .await?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A number of `INFO`.
    pub async fn info(&self, section: &str, field: &str) -> Result<u64, Problem> {
        let text = self.ask(&["INFO", section]).await?;
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|rest| rest.strip_prefix(':')?.trim().parse().ok());
        number.ok_or_else(|| Problem::failed(format!("Redis does not tell its `{field}`")))
    }

    /// Its data.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Stack {
    /// Starts everything and waits until it answers.
    pub async fn start(setup: &Setup<'_>) -> Result<Self, Problem> {
        let redis = RedisServer::start().await?;
        let config = redis.folder().join("coordinator.toml");
        std::fs::write(&config, configuration(setup, redis.folder()))?;
        let mut stack = Self {
            redis,
            coordinators: Vec::new(),
            urls: Vec::new(),
            tasks: Tasks::new(Shutdown::new()),
        };
        for n in 0..setup.coordinators {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            let mut command = Command::new(setup.coordinator);
            command.arg("--config").arg(&config);
            command.args(["--queue", &stack.redis.url()]);
            command.args(["--listen", &address.to_string()]);
            let log = stack.redis.folder().join(format!("coordinator-{n}.log"));
            let mut process = Process::start("espalier-coordinator", command, log)?;
            let served = process.wait_until(READY_LIMIT, async || listens(address).await);
            served.await?;
            stack.coordinators.push(process);
            stack.urls.push(format!("http://{address}"));
        }
        Ok(stack)
    }

    /// As one who submits to `project`, at coordinator `n` or one that stands in for it.
    pub async fn client(&self, project: &str, n: usize) -> Result<Client, Problem> {
        Client::connect(&self.target(&client_token(project), n), None).await
    }

    /// As a worker, at coordinator `n` or one that stands in for it.
    pub fn worker(&self, n: usize) -> Target {
        self.target(WORKER_TOKEN, n)
    }

    fn target(&self, token: &str, n: usize) -> Target {
        Target {
            url: self.urls[n % self.urls.len()].clone(),
            token: Some(Secret::new(token)),
            origin: "this measurement".to_owned(),
        }
    }

    /// Runs something beside it. What still runs when the stack is dropped ends with the command.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// What was used so far.
    pub fn cpu(&self) -> CpuSeconds {
        let of = |process: &Process| {
            let pid = process.pid();
            pid.map_or(0.0, |pid| cpu_seconds(&pid.to_string()))
        };
        CpuSeconds {
            redis: of(&self.redis.process),
            coordinators: self.coordinators.iter().map(of).sum(),
            this_process: cpu_seconds("self"),
        }
    }
}

impl CpuSeconds {
    /// What was used since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            redis: self.redis - earlier.redis,
            coordinators: self.coordinators - earlier.coordinators,
            this_process: self.this_process - earlier.this_process,
        }
    }
}

/// Whether somebody listens there.
async fn listens(address: SocketAddr) -> bool {
    tokio::net::TcpStream::connect(address).await.is_ok()
}

/// Tokens of coordinators that only this machine reaches, for a few seconds.
fn client_token(project: &str) -> String {
    format!("bench-{project}-client")
}

fn configuration(setup: &Setup<'_>, folder: &Path) -> String {
    let mut text = format!("store_url = \"file://{}/store\"\n", folder.display());
    if let Some(ttl) = setup.lease_ttl {
        text += &format!("lease_ttl_ms = {}\n", ttl.as_millis());
    }
    let mut token = |name: &str, token: &str, project: &str, roles: &str| {
        let sha256 = sha256_hex(token.as_bytes());
        text += &format!(
            "[[tokens]]\nname = \"{name}\"\nsha256 = \"{sha256}\"\nproject = \"{project}\"\nroles = [{roles}]\n"
        );
    };
    token("worker", WORKER_TOKEN, "*", "\"worker\"");
    for project in &setup.projects {
        let roles = "\"submit\", \"read\"";
        token(
            &format!("{project}-client"),
            &client_token(project),
            project,
            roles,
        );
    }
    text
}

/// User and system time of a process, which Linux tells in hundredths of a second (`proc(5)`, fields 14 and 15).
fn cpu_seconds(pid: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2);
    ticks.filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn processor_time_is_read() {
        let began = cpu_seconds("self");
        let started = Instant::now();
        let mut spins = 0_u64;
        while cpu_seconds("self") <= began && started.elapsed() < Duration::from_secs(20) {
            spins += 1;
        }
        assert!(cpu_seconds("self") > began, "after {spins} looks");
        assert_eq!(cpu_seconds("nobody"), 0.0);
    }

    #[test]
    fn the_configuration_is_one_that_a_coordinator_takes() {
        let setup = Setup {
            coordinator: Path::new("espalier-coordinator"),
            coordinators: 1,
            projects: vec!["a".to_owned(), "b".to_owned()],
            lease_ttl: Some(Duration::from_secs(2)),
        };
        let text = configuration(&setup, Path::new("/folder"));
        let text = format!("data_dir = \"/folder\"\n{text}");
        let config: espalier_coordinator::CoordinatorConfig = toml::from_str(&text).unwrap();
        config.validate().unwrap();
        assert_eq!(config.tokens.len(), 3);
        assert_eq!(config.lease_ttl(), Some(Duration::from_secs(2)));
    }
}
