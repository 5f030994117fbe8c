//! A coordinator in this process on a port of its own, and clients and workers that speak real gRPC to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use espalier_coordinator::{CoordinatorConfig, Deps, Role, RunError, Scope, TokenConfig};
use espalier_core::spec::parse_line;
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_proto::v1::admin_service_client::AdminServiceClient;
use espalier_proto::v1::coordinator_message::Message as Heard;
use espalier_proto::v1::job_service_client::JobServiceClient;
use espalier_proto::v1::worker_message::Message as Said;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::config::Secret;
use espalier_runtime::net::{self, AuthorizedChannel};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_testbed::redis::RedisServer;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Longer than anything here takes, shorter than the runner's patience.
const SOON: Duration = Duration::from_secs(20);

pub type Jobs = JobServiceClient<AuthorizedChannel>;
pub type Admin = AdminServiceClient<AuthorizedChannel>;

/// Tokens of the test coordinator; the name of each is what it may do.
pub const SHOP: &str = "shop-all";
pub const BANK: &str = "bank-all";
pub const READER: &str = "shop-read";
pub const WORKER: &str = "worker";
pub const ADMIN: &str = "admin";
pub const BANK_ADMIN: &str = "bank-admin";

pub struct Coordinator {
    pub address: SocketAddr,
    pub store: Store,
    pub shutdown: Shutdown,
    deps: Deps,
    ended: oneshot::Receiver<Result<(), RunError>>,
    _tasks: Tasks,
    folder: tempfile::TempDir,
    clock: Arc<dyn Clock>,
}

pub fn config(folder: &std::path::Path) -> CoordinatorConfig {
    let project = |name: &str| Scope::Project(name.parse().unwrap());
    let all = [Role::Submit, Role::Read];
    let mut config = CoordinatorConfig::new(
        folder,
        "memory://",
        vec![
            TokenConfig::of(SHOP, SHOP, project("shop"), &all),
            TokenConfig::of(BANK, BANK, project("bank"), &all),
            TokenConfig::of(READER, READER, project("shop"), &[Role::Read]),
            TokenConfig::of(WORKER, WORKER, Scope::All, &[Role::Worker]),
            TokenConfig::of(ADMIN, ADMIN, Scope::All, &[Role::Admin]),
            TokenConfig::of(BANK_ADMIN, BANK_ADMIN, project("bank"), &[Role::Admin]),
        ],
    );
    config.mcp_servers.insert("browser".to_owned());
    config
}

impl Coordinator {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut CoordinatorConfig)) -> Self {
        Self::start_at(Arc::new(SystemClock), change).await
    }

    /// Starts with a clock of the test's own.
    pub async fn start_at(
        clock: Arc<dyn Clock>,
        change: impl FnOnce(&mut CoordinatorConfig),
    ) -> Self {
        let store = Store::open("memory://").await.unwrap();
        Self::start_in(tempfile::tempdir().unwrap(), store, clock, change).await
    }

    /// Starts on the queue file of `folder`, which an earlier coordinator may have left.
    async fn start_in(
        folder: tempfile::TempDir,
        store: Store,
        clock: Arc<dyn Clock>,
        change: impl FnOnce(&mut CoordinatorConfig),
    ) -> Self {
        let mut config = config(folder.path());
        change(&mut config);
        let deps = Deps::with_store(&config, store, Arc::clone(&clock))
            .await
            .unwrap();
        Self::run(folder, config, deps, clock).await
    }

    /// Starts another coordinator of the same queue. The first of them to end closes the queue for all.
    pub async fn beside(&self, change: impl FnOnce(&mut CoordinatorConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        change(&mut config);
        Self::run(folder, config, self.deps.clone(), Arc::clone(&self.clock)).await
    }

    /// Starts one on the queue in `redis`, beside any others there are.
    pub async fn start_on(
        redis: &RedisServer,
        change: impl FnOnce(&mut CoordinatorConfig),
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.queue = Secret::new(redis.url());
        change(&mut config);
        let store = Store::open("memory://").await.unwrap();
        let tasks = Tasks::new(Shutdown::new());
        let deps = Deps::with_redis(&config, store, &tasks).await.unwrap();
        let clock = Arc::clone(&deps.clock);
        Self::run(folder, config, deps, clock).await
    }

    async fn run(
        folder: tempfile::TempDir,
        config: CoordinatorConfig,
        deps: Deps,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let store = deps.store.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(Shutdown::new());
        let (report, ended) = oneshot::channel();
        let run = espalier_coordinator::run(config, listener, deps.clone(), shutdown.clone());
        tasks.spawn("test.coordinator", OnFailure::Log, async move {
            let _ = report.send(run.await);
        });
        Self {
            address,
            store,
            shutdown,
            deps,
            ended,
            _tasks: tasks,
            folder,
            clock,
        }
    }

    pub fn channel(&self, token: &str) -> AuthorizedChannel {
        let endpoint = format!("http://{}", self.address);
        net::channel(&endpoint, None, Some(&Secret::new(token))).unwrap()
    }

    pub fn jobs(&self, token: &str) -> Jobs {
        JobServiceClient::new(self.channel(token)).max_encoding_message_size(64 << 20)
    }

    pub fn admin(&self) -> Admin {
        AdminServiceClient::new(self.channel(ADMIN))
    }

    /// Connects a worker with room for `capacity` jobs, which offers the browser.
    pub async fn worker(&self, id: &str, capacity: u32) -> Worker {
        let mut worker = self.greet(hello(id, capacity)).await;
        let Heard::Welcome(welcome) = worker.hear().await else {
            panic!("must begin with Welcome");
        };
        worker.welcome = welcome;
        worker
    }

    pub async fn greet(&self, hello: v1::Hello) -> Worker {
        let (said, stream) = mpsc::channel(64);
        say(&said, Said::Hello(hello)).await;
        let heard = WorkerServiceClient::new(self.channel(WORKER))
            .max_decoding_message_size(net::MESSAGE_BYTES_MAX)
            .session(ReceiverStream::new(stream))
            .await
            .unwrap()
            .into_inner();
        Worker {
            said,
            heard,
            welcome: v1::Welcome::default(),
        }
    }

    /// Drains, and waits for `run` to return.
    pub async fn end(self) -> Result<(), RunError> {
        self.shutdown.drain();
        soon(self.ended).await.unwrap()
    }

    /// Ends in order and starts again on the same file and store.
    pub async fn restart(self) -> Self {
        self.shutdown.drain();
        soon(self.ended).await.unwrap().unwrap();
        Self::start_in(self.folder, self.store, self.clock, |_| {}).await
    }
}

pub fn hello(id: &str, capacity: u32) -> v1::Hello {
    v1::Hello {
        worker: id.to_owned(),
        tags: vec!["mcp:browser".to_owned()],
        kinds: vec![v1::JobKind::Rollout.into()],
        capacity,
        held: Vec::new(),
        version: "test".to_owned(),
        process: String::new(),
        instance: String::new(),
    }
}

async fn say(said: &mpsc::Sender<v1::WorkerMessage>, message: Said) {
    let message = v1::WorkerMessage {
        message: Some(message),
    };
    said.send(message).await.unwrap();
}

pub struct Worker {
    said: mpsc::Sender<v1::WorkerMessage>,
    heard: Streaming<v1::CoordinatorMessage>,
    pub welcome: v1::Welcome,
}

impl Worker {
    pub async fn say(&self, message: Said) {
        say(&self.said, message).await;
    }

    pub async fn credit(&self, jobs: u32) {
        let kind = v1::JobKind::Rollout.into();
        self.say(Said::Credit(v1::Credit { kind, jobs })).await;
    }

    /// The next message, which comes soon.
    pub async fn hear(&mut self) -> Heard {
        let heard = soon(self.heard.message()).await.unwrap();
        heard.expect("the stream goes on").message.unwrap()
    }

    /// How the stream ends.
    pub async fn end(mut self) -> Result<(), tonic::Status> {
        drop(self.said);
        while soon(self.heard.message()).await?.is_some() {}
        Ok(())
    }

    /// Collects grants until there are `n`.
    pub async fn grants(&mut self, n: usize) -> Vec<v1::Grant> {
        let mut granted = Vec::new();
        while granted.len() < n {
            match self.hear().await {
                Heard::Grants(grants) => granted.extend(grants.grants),
                other => panic!("expected grants, heard {other:?}"),
            }
        }
        granted
    }

    /// Reports one result and returns what the coordinator makes of it.
    pub async fn report(
        &mut self,
        lease: v1::Lease,
        outcome: v1::result::Outcome,
    ) -> v1::ResultAck {
        let result = v1::Result {
            lease: Some(lease),
            outcome: Some(outcome),
        };
        let results = vec![result];
        self.say(Said::Results(v1::Results { results })).await;
        loop {
            if let Heard::ResultAcks(mut acks) = self.hear().await {
                assert_eq!(acks.acks.len(), 1);
                return acks.acks.remove(0);
            }
        }
    }
}

pub fn success(lease: &v1::Lease) -> v1::result::Outcome {
    let key: espalier_core::id::JobKey = lease.job.parse().unwrap();
    v1::result::Outcome::Success(v1::Success {
        manifest: espalier_core::layout::manifest(&key),
        summary: Some(v1::RolloutSummary {
            reward: Some(1.0),
            stop: "answered".to_owned(),
            ..v1::RolloutSummary::default()
        }),
        spawn: Vec::new(),
    })
}

/// A job from a line of JSON, as the CLI reads it.
pub fn job(line: &str) -> v1::JobSpec {
    draft_to_wire(&parse_line(line.as_bytes()).unwrap())
}

pub fn plain(id: &str) -> v1::JobSpec {
    job(&format!(
        r#"{{"id":"{id}","prompt":"do it","mcp":["browser"]}}"#
    ))
}

pub async fn open(jobs: &mut Jobs, batch: &str) -> v1::Batch {
    let request = v1::OpenBatchRequest {
        batch: batch.to_owned(),
        defaults: None,
    };
    let answer = jobs.open_batch(request).await.unwrap().into_inner();
    answer.batch.unwrap()
}

pub async fn submit(
    client: &mut Jobs,
    batch: &str,
    chunk: u32,
    jobs: Vec<v1::JobSpec>,
) -> v1::SubmitChunkResponse {
    let batch = batch.to_owned();
    let request = v1::SubmitChunkRequest { batch, chunk, jobs };
    client.submit_chunk(request).await.unwrap().into_inner()
}

/// Looks at a batch until `wanted` holds.
pub async fn until(client: &mut Jobs, batch: &str, wanted: impl Fn(v1::Counts) -> bool) {
    let looking = async {
        loop {
            let batch = batch.to_owned();
            let seen = client.get_batch(v1::GetBatchRequest { batch }).await;
            if wanted(seen.unwrap().into_inner().counts.unwrap()) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    soon(looking).await;
}

pub async fn get_job(client: &mut Jobs, batch: &str, id: &str) -> v1::Job {
    let request = v1::GetJobRequest {
        batch: batch.to_owned(),
        id: id.to_owned(),
    };
    client.get_job(request).await.unwrap().into_inner()
}

/// The refused field of an error.
pub fn field(status: &tonic::Status) -> String {
    let error = espalier_proto::status::field_error(status);
    error
        .unwrap_or_else(|| panic!("no field in {status:?}"))
        .field
}

pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future)
        .await
        .expect("must come soon")
}
