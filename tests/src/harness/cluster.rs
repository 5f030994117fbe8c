//! Coordinators and agent workers as processes of their own, on loopback, over one `file://` store. Each can be killed
//! and paused by itself. One coordinator has a queue of its own; several share one in Redis, which the test brings.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::trace::{Manifest, sha256_hex};
use espalier_runtime::config::Secret;
use espalier_runtime::net::{self, AuthorizedChannel};
use tempfile::TempDir;

use super::client::Client;
use super::disk::SmallDisk;
use super::history::{self, Event};
use super::hosts::{Hosts, There};
use super::process::{Process, binary};
use super::trail::Trail;
use super::wait_for;

/// Long enough for two busy cores; a hang is told apart from slowness by the tests' own deadlines.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The projects that have a client, the usual one first. They weigh the same.
pub const PROJECTS: [&str; 2] = ["default", "other"];
const CLIENT_TOKENS: [&str; 2] = ["client-of-a-test-cluster", "client-of-another-project"];
/// The token of the operators.
pub const OPERATOR_TOKEN: &str = "operator-of-a-test-cluster";
/// Of a coordinator that has a host of its own.
const COORDINATOR_PORT: u16 = 7411;
/// The token of the workers.
pub const WORKER_TOKEN: &str = "worker-of-a-test-cluster";

/// Running coordinators, and what workers need to join them.
#[derive(Debug)]
pub struct Cluster {
    /// Everybody's data and logs.
    pub folder: TempDir,
    /// The coordinators, in the order of their numbers.
    pub coordinators: Vec<Coordinator>,
    setup: Setup,
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `embedded`, or the URL of a Redis, or of a proxy before one.
    pub queue: String,
    /// How many coordinators share it.
    pub coordinators: usize,
    /// What workers ask; empty: the endpoints that coordinators tell of, for the model `tiny`.
    pub model_url: String,
    /// How long leases last.
    pub lease_ttl_ms: u64,
    /// What a write to Redis must have reached before it counts.
    pub acknowledge: &'static str,
    /// The object store, where it is not a folder of the test's.
    pub store_url: Option<String>,
    /// Variables of every process, such as those by which a store is reached.
    pub environment: Vec<(String, String)>,
    /// Further sections of each coordinator's configuration, in which `{folder}` stands for the cluster's folder and
    /// `{address}` for where that coordinator listens.
    pub more: String,
    /// Where everybody has a host of their own: `coordinator-0`, and the name of each worker. Otherwise all are on this one.
    pub hosts: Option<Arc<Hosts>>,
}

impl Setup {
    /// With one coordinator, and leases that no test waits for.
    pub fn new(queue: &str, model_url: &str) -> Self {
        Self {
            queue: queue.to_owned(),
            coordinators: 1,
            model_url: model_url.to_owned(),
            lease_ttl_ms: 30_000,
            acknowledge: "fast",
            store_url: None,
            environment: Vec::new(),
            more: String::new(),
            hosts: None,
        }
    }

    /// What is started while this is held is on the host of that name.
    fn enter(&self, host: &str) -> Option<There> {
        self.hosts.as_ref().map(|hosts| hosts.enter(host))
    }

    fn address(&self, number: usize) -> SocketAddr {
        match &self.hosts {
            Some(hosts) => hosts.address(&host(number), COORDINATOR_PORT),
            None => free_address(),
        }
    }
}

/// The host of a coordinator, and what its log is called.
fn host(number: usize) -> String {
    format!("coordinator-{number}")
}

/// A running coordinator.
#[derive(Debug)]
pub struct Coordinator {
    /// The process; replaced by [`Cluster::restart_coordinator`].
    pub process: Process,
    /// Where it listens, also after a restart.
    pub address: SocketAddr,
}

/// A running agent worker.
#[derive(Debug)]
pub struct Worker {
    /// The process.
    pub process: Process,
    /// What it leaves behind.
    pub trail: Trail,
    data_dir: PathBuf,
}

impl Cluster {
    /// Starts a coordinator with a queue of its own, whose leases last `lease_ttl_ms`. Workers will ask the model at
    /// `model_url`.
    pub async fn start(model_url: &str, lease_ttl_ms: u64) -> Self {
        Self::start_on("embedded", 1, model_url, lease_ttl_ms).await
    }

    /// The same, and tells the OTLP receiver at `receiver` every second.
    pub async fn start_observed(model_url: &str, lease_ttl_ms: u64, receiver: &str) -> Self {
        let more = format!("[telemetry]\notlp_endpoint = {receiver:?}\nmetric_interval_s = 1\n");
        Self::start_with(Setup {
            lease_ttl_ms,
            more,
            ..Setup::new("embedded", model_url)
        })
        .await
    }

    /// Starts `coordinators` of them on the queue at `queue`: the URL of a Redis, or of a proxy before one.
    pub async fn start_on(
        queue: &str,
        coordinators: usize,
        model_url: &str,
        lease_ttl_ms: u64,
    ) -> Self {
        Self::start_with(Setup {
            coordinators,
            lease_ttl_ms,
            ..Setup::new(queue, model_url)
        })
        .await
    }

    /// Starts what `setup` says.
    pub async fn start_with(setup: Setup) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let start = |number| {
            // A restart has to find the same port, so that workers find it again.
            let address = setup.address(number);
            let config = coordinator_config(folder.path(), address, &setup);
            std::fs::write(config_file(folder.path(), number), config)
                .expect("the test's folder is writable");
            let process = spawn_coordinator(folder.path(), number, &setup);
            Coordinator { process, address }
        };
        let mut cluster = Self {
            coordinators: (0..setup.coordinators).map(start).collect(),
            folder,
            setup,
        };
        for coordinator in &mut cluster.coordinators {
            coordinator.wait_until_ready().await;
        }
        cluster
    }

    /// Starts a coordinator again on the same configuration and data, after its process ended.
    pub async fn restart_coordinator(&mut self, number: usize) {
        let coordinator = &mut self.coordinators[number];
        coordinator.process = spawn_coordinator(self.folder.path(), number, &self.setup);
        coordinator.wait_until_ready().await;
    }

    /// Kills the only coordinator and starts it on an empty data folder: it knows none of its batches any more, as after
    /// their retention, and the store is as it was.
    pub async fn forget_batches(&mut self) {
        self.coordinators[0].process.kill();
        std::fs::remove_dir_all(self.folder.path().join("coordinator"))
            .expect("the test's folder is writable");
        self.restart_coordinator(0).await;
    }

    /// Starts a worker with the toy MCP server and with browsers, which knows every coordinator. A name that was used
    /// before takes over that worker's data folder.
    pub fn worker(&self, name: &str, slots: u32) -> Worker {
        self.spawn_worker(name, slots, &self.addresses(), Where::Here)
    }

    /// The same, which also builds data sets and exports: a session of its own for each.
    pub fn worker_with_cpu_slots(&self, name: &str, slots: u32) -> Worker {
        self.spawn_worker(name, slots, &self.addresses(), Where::WithCpuSlots(1))
    }

    /// The same, with coordinators only at `addresses`, such as one of [`Cluster::addresses`] or a proxy before it.
    pub fn worker_at(&self, addresses: &[SocketAddr], name: &str, slots: u32) -> Worker {
        self.spawn_worker(name, slots, addresses, Where::Here)
    }

    /// The same, with its data folder on `disk`.
    pub fn worker_on_disk(&self, name: &str, slots: u32, disk: &SmallDisk) -> Worker {
        self.spawn_worker(name, slots, &self.addresses(), Where::OnDisk(disk))
    }

    /// The same, on a machine whose clock is wrong by `offset`, such as `+1h`. Its monotonic clock is right.
    pub fn worker_with_clock(
        &self,
        addresses: &[SocketAddr],
        name: &str,
        slots: u32,
        offset: &str,
    ) -> Worker {
        self.spawn_worker(name, slots, addresses, Where::WithClock(offset))
    }

    /// Writes the configuration of such a worker to `{folder}/{name}.toml`, for whoever starts it.
    pub fn write_worker_config(&self, name: &str, slots: u32) {
        let config_file = self.folder.path().join(format!("{name}.toml"));
        let data_dir = self.folder.path().join(name);
        let config = self.worker_config(&data_dir, slots, &self.addresses());
        std::fs::write(config_file, config).expect("the test's folder is writable");
    }

    /// A connection for a test that plays a worker of the first coordinator.
    pub fn worker_channel(&self) -> AuthorizedChannel {
        let endpoint = format!("http://{}", self.coordinators[0].address);
        net::channel(&endpoint, None, Some(&Secret::new(WORKER_TOKEN))).expect("an address")
    }

    /// Where the coordinators listen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.coordinators.iter().map(|c| c.address).collect()
    }

    /// A disk of `bytes` for the data folder of a worker; none where [`SmallDisk::mount`] gives none.
    pub fn small_disk(&self, name: &str, bytes: u64) -> Option<SmallDisk> {
        SmallDisk::mount(&self.folder.path().join(name), bytes)
    }

    fn spawn_worker(
        &self,
        name: &str,
        slots: u32,
        addresses: &[SocketAddr],
        machine: Where<'_>,
    ) -> Worker {
        let config_file = self.folder.path().join(format!("{name}.toml"));
        let data_dir = self.folder.path().join(name);
        let trail = Trail::new(self.folder.path().join(format!("{name}.tmp")));
        std::fs::write(
            &config_file,
            self.worker_config(&data_dir, slots, addresses),
        )
        .expect("the test's folder is writable");
        let mut command = Command::new(binary("espalier-agent-worker"));
        command.arg("--config").arg(config_file);
        command.envs(self.setup.environment.iter().cloned());
        trail.lay(&mut command);
        let command = match machine {
            Where::Here => command,
            Where::WithCpuSlots(slots) => {
                command.env("ESPALIER_AGENT_WORKER_CPU_SLOTS", slots.to_string());
                command
            }
            Where::OnDisk(disk) => disk.command(&command),
            Where::WithClock(offset) => {
                command.envs(wrong_clock(offset));
                command
            }
        };
        let _there = self.setup.enter(name);
        Worker {
            process: Process::start(name, command, self.folder.path()),
            trail,
            data_dir,
        }
    }

    /// The command `espalier`, for an operator of the coordinators behind `addresses`.
    pub fn operator(&self, addresses: &[SocketAddr]) -> Command {
        let urls: Vec<String> = addresses.iter().map(|at| format!("http://{at}")).collect();
        let mut command = Command::new(binary("espalier"));
        command
            .env("ESPALIER_URL", urls.join(","))
            .env("ESPALIER_TOKEN", OPERATOR_TOKEN)
            .env("ESPALIER_DATA_DIR", self.folder.path().join("operator"));
        command
    }

    /// Options and environment by which an inference worker takes jobs of this cluster.
    pub fn answering(&self) -> (Vec<String>, Vec<(&'static str, String)>) {
        let urls: Vec<String> = self
            .addresses()
            .iter()
            .map(|at| format!("http://{at}"))
            .collect();
        let options = [
            "--coordinator-url",
            &urls.join(","),
            "--store-url",
            &store_url(self.folder.path(), &self.setup),
        ];
        let token = ("ESPALIER_INFER_WORKER_TOKEN", WORKER_TOKEN.to_owned());
        (options.map(str::to_owned).into(), vec![token])
    }

    /// A train worker of this cluster on the CPU, which reads base models from folders of the test.
    pub fn train_worker(&self, name: &str) -> Process {
        self.train_worker_on(name, "cpu")
    }

    /// The same on another device, or on what it finds.
    pub fn train_worker_on(&self, name: &str, device: &str) -> Process {
        self.train_worker_with(name, device, &[])
    }

    /// The same with further options.
    pub fn train_worker_with(&self, name: &str, device: &str, more: &[&str]) -> Process {
        let urls: Vec<String> = self
            .addresses()
            .iter()
            .map(|at| format!("http://{at}"))
            .collect();
        let mut command = Command::new(binary("espalier-train-worker"));
        command.args(["--coordinator-url", &urls.join(",")]);
        command.args(["--store-url", &self.store_url()]);
        command.args(["--allow-local-models", "--cpu-threads", "2"]);
        command.args(["--device", device]).args(more);
        command.env("ESPALIER_TRAIN_WORKER_TOKEN", WORKER_TOKEN);
        command.env("HOME", self.folder.path());
        command.envs(self.setup.environment.iter().cloned());
        Process::start(name, command, self.folder.path())
    }

    /// Runs `espalier` as such a user, on the store of the cluster.
    ///
    /// # Panics
    /// When it cannot be started.
    pub async fn espalier(&self, words: &[&str]) -> Output {
        let mut command = self.user();
        command.args(words).args(["--store", &self.store_url()]);
        let run = tokio::task::spawn_blocking(move || command.output());
        let run = run.await.expect("the command is awaited");
        run.expect("the command was built with the tests")
    }

    /// The command `espalier`, for a user of the first of [`PROJECTS`].
    pub fn user(&self) -> Command {
        let mut command = Command::new(binary("espalier"));
        command
            .env(
                "ESPALIER_URL",
                format!("http://{}", self.coordinators[0].address),
            )
            .env("ESPALIER_TOKEN", CLIENT_TOKENS[0])
            .env("ESPALIER_DATA_DIR", self.folder.path().join("user"));
        command
    }

    /// Where the objects of the cluster lie.
    pub fn store_url(&self) -> String {
        store_url(self.folder.path(), &self.setup)
    }

    /// A client of the first coordinator that may submit and read.
    pub async fn client(&self) -> Client {
        self.client_at(self.coordinators[0].address).await
    }

    /// The same, of whichever coordinator is behind `address`.
    pub async fn client_at(&self, address: SocketAddr) -> Client {
        Client::connect(&format!("http://{address}"), CLIENT_TOKENS[0]).await
    }

    /// A client of the first coordinator that may look after the system.
    pub async fn operator_client(&self) -> Client {
        let address = self.coordinators[0].address;
        Client::connect(&format!("http://{address}"), OPERATOR_TOKEN).await
    }

    /// A client of each of [`PROJECTS`], of whichever coordinator is behind `address`.
    pub async fn clients_at(&self, address: SocketAddr) -> [Client; 2] {
        let url = format!("http://{address}");
        let [one, other] = CLIENT_TOKENS.map(|token| Client::connect(&url, token));
        [one.await, other.await]
    }

    /// What the coordinators have told of grants and ends, in every life of theirs. With `torn`, one was killed.
    pub fn history(&self, torn: bool) -> Vec<Event> {
        let logs = self.coordinators.iter().map(|c| c.process.log());
        logs.flat_map(|log| history::log::read(&log, torn))
            .collect()
    }

    /// The key of a job of the usual client's.
    pub fn key(&self, batch: &str, job: &str) -> JobKey {
        key(PROJECTS[0], batch, job)
    }

    /// Where the object at `path` lies.
    pub fn object(&self, path: &str) -> PathBuf {
        self.folder.path().join("store").join(path)
    }

    /// The published manifest of a job. Panics if it is not there, or a file of it is not what it says.
    pub fn manifest(&self, key: &JobKey) -> Manifest {
        let path = self.object(&layout::manifest(key));
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let manifest = Manifest::parse(&bytes, key).expect("the manifest reads");
        for file in &manifest.files {
            let bytes = std::fs::read(self.object(&file.path))
                .unwrap_or_else(|error| panic!("{} of {key}: {error}", file.path));
            assert!(file.holds(&bytes), "{} of {key} is damaged", file.path);
        }
        manifest
    }

    /// Whether the attempt under `fence` has stored its trace.
    pub fn has_trace(&self, key: &JobKey, fence: Fence) -> bool {
        self.object(&layout::trace(key, fence)).exists()
    }

    /// Waits until a manifest of the job is there.
    pub async fn wait_until_published(&self, key: &JobKey, deadline: Duration) {
        let path = self.object(&layout::manifest(key));
        let what = format!("{}", path.display());
        wait_for(&what, deadline, || {
            let there = path.exists().then_some(()).ok_or("it is not there");
            async move { there }
        })
        .await;
    }

    fn model_config(&self) -> String {
        match &*self.setup.model_url {
            "" => "model_name = \"tiny\"\n".to_owned(),
            url => format!("model_name = \"scripted\"\n[model]\nbase_url = {url:?}\n"),
        }
    }

    fn worker_config(&self, data_dir: &Path, slots: u32, addresses: &[SocketAddr]) -> String {
        let urls: Vec<String> = addresses.iter().map(|at| format!("http://{at}")).collect();
        format!(
            "coordinator_url = {urls:?}\ntoken = {WORKER_TOKEN:?}\ndata_dir = {data_dir:?}\n\
             store_url = {store:?}\nslots = {slots}\ncpu_slots = 0\nplaywright_dir = {playwright:?}\n{model}\
             [mcp_servers.toy]\ncommand = {toy:?}\n[mcp_servers.browser]\npreset = \"playwright\"\n",
            store = store_url(self.folder.path(), &self.setup),
            model = self.model_config(),
            playwright = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent-worker/playwright"),
            toy = binary("toy-mcp"),
        )
    }
}

impl Coordinator {
    async fn wait_until_ready(&mut self) {
        let (address, process) = (self.address, &mut self.process);
        wait_for("the coordinator to serve", START_DEADLINE, || {
            let ended = process.ended();
            assert!(ended.is_none(), "it ended: {}", process.log());
            let reached = TcpStream::connect(address).map(drop);
            async move { reached }
        })
        .await;
    }
}

impl Worker {
    /// Waits until its rollout of `key` has had its first turn, so that a tool is at work. Gives the lease of the
    /// attempt. The log of steps tells it at once; what a worker says of its progress comes with renewals only.
    pub async fn wait_until_at_tool(&self, key: &JobKey, deadline: Duration) -> Fence {
        let what = format!("{key} to be at its tool");
        wait_for(&what, deadline, || {
            let (seen, attempts) = (self.attempt_at_tool(key), self.attempts());
            async move { seen.ok_or(attempts) }
        })
        .await
    }

    fn attempt_at_tool(&self, key: &JobKey) -> Option<Fence> {
        self.attempts().into_iter().find_map(|folder| {
            let steps = std::fs::read_to_string(folder.join("steps.jsonl")).ok()?;
            let of_job = steps.contains(&format!("\"{key}\""));
            let at_tool = steps.contains("\"model_call\"") && !steps.contains("\"tool_call\"");
            let fence = folder.file_name()?.to_str()?.split_once('-')?.0;
            (of_job && at_tool).then_some(Fence(fence.parse().ok()?))
        })
    }

    /// Folders of the attempts that it is at; each is named by its fence first.
    fn attempts(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.data_dir.join("attempts")) else {
            return Vec::new();
        };
        entries.flatten().map(|entry| entry.path()).collect()
    }

    /// Kills the process, and waits until its MCP servers and their temporary files are gone too.
    pub async fn kill(&mut self, deadline: Duration) {
        self.process.kill();
        self.trail.wait_until_cold(deadline).await;
    }

    /// Lets it drain, and waits until nothing is left of it.
    pub async fn terminate(&mut self, deadline: Duration) {
        let status = self.process.terminate(deadline).await;
        assert!(status.success(), "{status:?}");
        self.trail.wait_until_cold(deadline).await;
    }
}

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
}

/// The machine that a worker is on.
enum Where<'a> {
    Here,
    WithCpuSlots(u32),
    OnDisk(&'a SmallDisk),
    WithClock(&'a str),
}

/// What makes the clock of a process wrong. The loader puts the machine's own folder of libraries for `$LIB`.
fn wrong_clock(offset: &str) -> [(&'static str, String); 3] {
    [
        (
            "LD_PRELOAD",
            "/usr/$LIB/faketime/libfaketimeMT.so.1".to_owned(),
        ),
        ("FAKETIME", offset.to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

/// The key of a job of one of [`PROJECTS`].
pub fn key(project: &str, batch: &str, job: &str) -> JobKey {
    format!("{project}/{batch}/{job}")
        .parse()
        .expect("names of tests are valid")
}

fn store_url(folder: &Path, setup: &Setup) -> String {
    let own = || format!("file://{}", folder.join("store").display());
    setup.store_url.clone().unwrap_or_else(own)
}

fn coordinator_config(folder: &Path, address: SocketAddr, setup: &Setup) -> String {
    let client = |(project, token): (&str, &str)| {
        format!(
            "[[tokens]]\nname = \"client of {project}\"\nsha256 = \"{sha256}\"\nproject = \"{project}\"\n\
             roles = [\"submit\", \"read\"]\n",
            sha256 = sha256_hex(token.as_bytes()),
        )
    };
    let clients: String = PROJECTS
        .into_iter()
        .zip(CLIENT_TOKENS)
        .map(client)
        .collect();
    format!(
        "listen = \"{address}\"\nqueue = {queue:?}\nqueue_acknowledge = {acknowledge:?}\n\
         data_dir = {data_dir:?}\nstore_url = {store:?}\nmcp_servers = [\"toy\", \"browser\"]\n\
         lease_ttl_ms = {lease_ttl_ms}\n{clients}\
         [[tokens]]\nname = \"operators\"\nsha256 = \"{operator}\"\nproject = \"*\"\nroles = [\"admin\"]\n\
         [[tokens]]\nname = \"workers\"\nsha256 = \"{worker}\"\nproject = \"*\"\nroles = [\"worker\"]\n{more}",
        queue = setup.queue,
        acknowledge = setup.acknowledge,
        data_dir = folder.join("coordinator"),
        store = store_url(folder, setup),
        lease_ttl_ms = setup.lease_ttl_ms,
        operator = sha256_hex(OPERATOR_TOKEN.as_bytes()),
        worker = sha256_hex(WORKER_TOKEN.as_bytes()),
        more = setup
            .more
            .replace("{folder}", &folder.display().to_string())
            .replace("{address}", &address.to_string()),
    )
}

fn config_file(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("coordinator-{number}.toml"))
}

fn spawn_coordinator(folder: &Path, number: usize, setup: &Setup) -> Process {
    let mut command = Command::new(binary("espalier-coordinator"));
    command.arg("--config").arg(config_file(folder, number));
    command.env("ESPALIER_LOG", history::log::filter());
    command.envs(setup.environment.iter().cloned());
    let _there = setup.enter(&host(number));
    Process::start(&host(number), command, folder)
}
