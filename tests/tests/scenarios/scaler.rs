//! Workers that come when jobs wait and go when none do: processes beside the coordinator, and what KEDA is told.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use espalier_core::id::JobKey;
use espalier_proto::keda::external_scaler_client::ExternalScalerClient;
use espalier_proto::keda::{GetMetricsRequest, ScaledObjectRef};
use espalier_proto::status::field_error;
use espalier_proto::v1::{DrainWorkerRequest, JobState, ListWorkersRequest};
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::cluster::{Cluster, Setup, WORKER_TOKEN};
use espalier_tests::harness::history::{End, Ended, History};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::process::{Signal, binary};
use espalier_tests::harness::trail::Trail;
use espalier_tests::harness::wait_for;
use espalier_tests::harness::world::AHEAD_MAX;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
const STOP_DEADLINE: Duration = Duration::from_secs(40);
const LEASE_TTL_MS: u64 = 30_000;
const SLOTS: u32 = 2;

/// A cluster whose coordinator starts workers, and the trail of all processes that come from it.
struct Scaled {
    cluster: Cluster,
    trail: Trail,
    _temp_dir: TempDir,
}

impl Scaled {
    /// One coordinator that starts what `pools` says, in which `{worker}` stands for the configuration of an agent worker.
    async fn start(pools: &str) -> Self {
        let temp_dir = TempDir::new().unwrap();
        let trail = Trail::new(temp_dir.path().join("t"));
        let variables = trail
            .variables()
            .map(|(name, value)| (name.to_owned(), value));
        let setup = Setup {
            lease_ttl_ms: LEASE_TTL_MS,
            environment: variables.into(),
            more: format!("[scaler]\ninterval_s = 1\n{pools}"),
            ..Setup::new("embedded", &model::start().await)
        };
        let cluster = Cluster::start_with(setup).await;
        cluster.write_worker_config("agent", SLOTS);
        Self {
            cluster,
            trail,
            _temp_dir: temp_dir,
        }
    }

    /// What runs of the binary `name`, by process id, with the instance that each is.
    fn running(&self, name: &str) -> BTreeMap<u32, String> {
        let program = binary(name).display().to_string();
        let processes = self.trail.processes().into_iter();
        let of_program = processes.filter(|(_, line)| line.starts_with(&program));
        // One that has just ended has no environment.
        of_program
            .filter_map(|(pid, _)| Some((pid, instance_of(pid)?)))
            .collect()
    }

    fn agents(&self) -> BTreeMap<u32, String> {
        self.running("espalier-agent-worker")
    }

    async fn wait_until_agents(&self, what: &str, is_so: impl Fn(usize) -> bool) {
        wait_for(what, DEADLINE, || async {
            let agents = self.agents();
            assert_eq!(names(&agents).len(), agents.len(), "doubles: {agents:?}");
            if is_so(agents.len()) {
                Ok(())
            } else {
                Err(agents)
            }
        })
        .await;
    }

    /// How often the coordinator has logged `line` of instances of `pool`.
    fn logged(&self, line: &str, pool: &str) -> usize {
        let log = self.cluster.coordinators[0].process.log();
        let name = format!("\"instance\":\"local-{pool}-");
        let lines = log
            .lines()
            .filter(|l| l.contains(line) && l.contains(&name));
        lines.count()
    }
}

fn names(agents: &BTreeMap<u32, String>) -> BTreeSet<&String> {
    agents.values().collect()
}

fn instance_of(pid: u32) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let name = variables.find_map(|v| v.strip_prefix(b"ESPALIER_INSTANCE="))?;
    String::from_utf8(name.to_vec()).ok()
}

fn agents(max: u32) -> String {
    let program = binary("espalier-agent-worker");
    format!(
        "[[scaler.local.pools]]\nname = \"agents\"\nkinds = [\"rollout\"]\njobs_per_worker = {SLOTS}\nmax = {max}\n\
         idle_s = 2\ngrace_s = 20\ncommand = [{program:?}, \"--config\", \"{{folder}}/agent.toml\"]\n\
         env = {{ ESPALIER_AGENT_WORKER_DATA_DIR = \"{{folder}}/{{instance}}\" }}\n"
    )
}

/// Rollouts that are each at work for so long.
fn sleepers(count: usize, ms: u64) -> Vec<Value> {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": ms}}, {"answer": "done"}]);
    let job = |n| toy_job(&format!("job-{n:03}"), &steps, "done");
    (0..count).map(job).collect()
}

/// Every job was solved at its first attempt, by what the queue and what the coordinator says.
fn check(cluster: &Cluster, batch: &str, result: &BatchResult, count: usize) {
    assert_eq!(result.solved(), count, "{:#?}", result.unsolved());
    for (id, job) in &result.jobs {
        let spent = (job.attempts, job.handler_failures, job.infra_failures);
        assert_eq!(spent, (1, 0, 0), "{id}");
    }
    let broken = broken(cluster, batch, result, false);
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The rules of any history that were broken.
fn broken(cluster: &Cluster, batch: &str, result: &BatchResult, torn: bool) -> Vec<String> {
    let keys: Vec<JobKey> = result
        .jobs
        .keys()
        .map(|id| cluster.key(batch, id))
        .collect();
    let mut end = End {
        counts: result.batch.counts.unwrap(),
        ..End::default()
    };
    for (id, job) in &result.jobs {
        let ended = Ended {
            state: job.state(),
            attempts: job.attempts,
            handler_failures: job.handler_failures,
            infra_failures: job.infra_failures,
        };
        end.jobs.insert(cluster.key(batch, id), ended);
    }
    let mut history = History {
        chunks: vec![keys],
        events: cluster.history(torn),
        holes: torn,
    };
    history.events.retain(|e| e.job().batch.as_str() == batch);
    assert!(
        !history.events.is_empty(),
        "the coordinator told no history"
    );
    history.broken(&end, AHEAD_MAX)
}

#[tokio::test]
async fn agent_workers_come_and_go_with_the_jobs() {
    let scaled = Scaled::start(&agents(20)).await;
    assert!(scaled.agents().is_empty());
    let mut client = scaled.cluster.client().await;
    // More than are done before the last of them is up.
    client.submit("b", &sleepers(44, 4_000)).await;
    scaled
        .wait_until_agents("20 agent workers", |n| n == 20)
        .await;
    let result = client.wait("b", DEADLINE).await;
    check(&scaled.cluster, "b", &result, 44);
    scaled.wait_until_agents("all to be gone", |n| n == 0).await;
    assert_eq!(scaled.logged("an instance was asked for", "agents"), 20);
    wait_for("the end of all to be told", DEADLINE, || async {
        let told = scaled.logged("\"why\":\"idle\"", "agents");
        if told == 20 { Ok(()) } else { Err(told) }
    })
    .await;
    // The same again, from nothing.
    client.submit("again", &sleepers(2, 10)).await;
    let result = client.wait("again", DEADLINE).await;
    check(&scaled.cluster, "again", &result, 2);
    scaled.wait_until_agents("all to be gone", |n| n == 0).await;
}

#[tokio::test]
async fn a_worker_that_has_a_job_stays_whatever_is_wanted() {
    let scaled = Scaled::start(&agents(4)).await;
    let mut client = scaled.cluster.client().await;
    let long = toy_job(
        "long",
        &json!([{"tool": "sleep", "arguments": {"ms": 45_000}}, {"answer": "done"}]),
        "done",
    );
    // Among others, so that it is not the first slot's.
    let mut jobs = sleepers(8, 500);
    jobs.insert(5, long);
    client.submit("b", &jobs).await;
    client.wait_until_succeeded("b", 8, DEADLINE).await;
    scaled.wait_until_agents("one to be left", |n| n == 1).await;
    let job = client.job(&scaled.cluster.key("b", "long")).await;
    assert_eq!(job.state(), JobState::Leased, "{job:?}");
    // An operator drains it, so that there is nothing that would keep it but its job.
    drain_all(&scaled.cluster).await;
    let result = client.wait("b", DEADLINE).await;
    check(&scaled.cluster, "b", &result, 9);
    scaled.wait_until_agents("all to be gone", |n| n == 0).await;
}

/// Drains all workers, as an operator.
async fn drain_all(cluster: &Cluster) {
    let mut operator = cluster.operator_client().await.admin;
    let workers = operator.list_workers(ListWorkersRequest::default()).await;
    let workers = workers.unwrap().into_inner().workers;
    assert!(!workers.is_empty());
    for worker in workers {
        let instance = &worker.instance;
        assert!(instance.starts_with("local-agents-"), "{instance}");
        let worker = worker.worker;
        operator
            .drain_worker(DrainWorkerRequest { worker })
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_training_is_never_a_victim() {
    let program = binary("espalier-train-worker");
    let scaled = Scaled::start(&format!(
        "[[scaler.local.pools]]\nname = \"trainers\"\nkinds = [\"train\"]\nmax = 3\nidle_s = 1\n\
         command = [{program:?}, \"--coordinator-url\", \"http://{{address}}\", \"--store-url\", \"file://{{folder}}/store\", \
         \"--allow-local-models\", \"--cpu-threads\", \"1\", \"--device\", \"cpu\"]\n\
         env = {{ ESPALIER_TRAIN_WORKER_TOKEN = {WORKER_TOKEN:?}, HOME = \"{{folder}}/{{instance}}\" }}\n"
    ))
    .await;
    let uploads = scaled.cluster.object("default/uploads");
    std::fs::create_dir_all(&uploads).unwrap();
    std::fs::write(uploads.join("rows.jsonl"), rows(60)).unwrap();
    let jobs = [
        training("short-1", 4),
        training("long", 400),
        training("short-2", 4),
    ];
    let mut client = scaled.cluster.client().await;
    let answer = client.submit("b", &jobs).await;
    assert_eq!(answer.accepted, 3, "{:?}", answer.rejected);
    client.wait_until_succeeded("b", 2, DEADLINE).await;
    wait_for("the idle ones to be gone", DEADLINE, || async {
        let trainers = scaled.running("espalier-train-worker");
        if trainers.len() == 1 {
            Ok(())
        } else {
            Err(trainers)
        }
    })
    .await;
    let job = client.job(&scaled.cluster.key("b", "long")).await;
    assert_eq!(job.state(), JobState::Leased, "{job:?}");
    let result = client.wait("b", DEADLINE).await;
    let states = (
        result.count(JobState::Succeeded),
        result.jobs["long"].attempts,
    );
    assert_eq!(states, (3, 1), "{:?}", result.jobs["long"]);
    wait_for("the last one to be gone", DEADLINE, || async {
        let trainers = scaled.running("espalier-train-worker");
        if trainers.is_empty() {
            Ok(())
        } else {
            Err(trainers)
        }
    })
    .await;
}

fn training(id: &str, steps: u64) -> Value {
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qwen3/tests/golden/tiny-dense");
    let settings = json!({
        "max_steps": steps, "batch": 2, "accumulation": 2, "rank": 4, "lr": 5e-3, "warmup_steps": 2,
    });
    json!({"id": id, "train": {"base": model, "rows": "rows.jsonl", "adapter": id, "settings": settings}})
}

fn rows(count: usize) -> String {
    let row = |n: usize| {
        let ids: Vec<usize> = (0..40 + n % 9).map(|k| (n * 7 + k * 13) % 500).collect();
        json!({"id": format!("s{n}"), "ids": ids, "supervised": [[8, ids.len()]]}).to_string()
    };
    (0..count).map(|n| row(n) + "\n").collect()
}

#[tokio::test]
async fn kill_9_of_the_coordinator_leaves_neither_orphans_nor_doubles() {
    let mut scaled = Scaled::start(&agents(6)).await;
    let mut client = scaled.cluster.client().await;
    client.submit("b", &sleepers(60, 1_000)).await;
    scaled
        .wait_until_agents("6 agent workers", |n| n == 6)
        .await;
    client.wait_until_succeeded("b", 6, DEADLINE).await;
    let before = scaled.agents();
    scaled.cluster.coordinators[0].process.kill();
    scaled.cluster.restart_coordinator(0).await;
    // Doubles are looked for at each look.
    wait_for("those of the first life to be gone", DEADLINE, || async {
        let now = scaled.agents();
        assert_eq!(names(&now).len(), now.len(), "doubles: {now:?}");
        assert!(now.len() <= 6, "too many: {now:?}");
        let left = now.keys().filter(|pid| before.contains_key(pid)).count();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    let mut client = scaled.cluster.client().await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 60, "{:#?}", result.unsolved());
    let broken = broken(&scaled.cluster, "b", &result, true);
    assert!(broken.is_empty(), "{broken:#?}");
    scaled.wait_until_agents("all to be gone", |n| n == 0).await;

    // Nobody comes to life again: what there is ends by itself.
    client.submit("more", &sleepers(12, 1_000)).await;
    scaled
        .wait_until_agents("some agent workers", |n| n > 0)
        .await;
    scaled.cluster.coordinators[0].process.kill();
    scaled.trail.wait_until_cold(STOP_DEADLINE).await;
}

#[tokio::test]
async fn a_coordinator_that_ends_in_order_takes_its_workers_with_it() {
    let mut scaled = Scaled::start(&agents(2)).await;
    let mut client = scaled.cluster.client().await;
    client.submit("b", &sleepers(40, 500)).await;
    client.wait_until_succeeded("b", 2, DEADLINE).await;
    let coordinator = &mut scaled.cluster.coordinators[0].process;
    assert!(coordinator.terminate(STOP_DEADLINE).await.success());
    scaled.trail.wait_until_cold(STOP_DEADLINE).await;
    scaled.cluster.restart_coordinator(0).await;
    let result = scaled.cluster.client().await.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 40, "{:#?}", result.unsolved());
    let failed = result
        .jobs
        .values()
        .filter(|job| job.handler_failures + job.infra_failures > 0);
    assert_eq!(failed.count(), 0, "a stop in good order spends no attempt");
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_told_and_does_not_make_the_coordinator_busy() {
    let scaled = Scaled::start(
        "[[scaler.local.pools]]\nname = \"none\"\nkinds = [\"rollout\"]\nmax = 2\ncommand = [\"espalier-no-such-worker\"]\n",
    )
    .await;
    let mut client = scaled.cluster.client().await;
    client.submit("b", &sleepers(4, 10)).await;
    wait_for("the failure to be told", DEADLINE, || async {
        let told = scaled.logged("the program does not exist", "none");
        if told >= 2 { Ok(()) } else { Err(told) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(
        scaled.logged("an instance was asked for", "none") <= 4,
        "it waits in between"
    );
    assert_eq!(client.counts("b").await.ready, 4);
}

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// As the chart of this repository says it.
fn object(kinds: &str, jobs_per_replica: &str) -> ScaledObjectRef {
    let metadata = [
        (
            "scalerAddress",
            "release-espalier-coordinator-keda.ml.svc:7412",
        ),
        ("kinds", kinds),
        ("jobsPerReplica", jobs_per_replica),
    ];
    ScaledObjectRef {
        name: "release-espalier-agent-worker".to_owned(),
        namespace: "ml".to_owned(),
        scaler_metadata: metadata
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    }
}

/// How many replicas KEDA makes of what it is told.
async fn replicas(keda: &mut ExternalScalerClient<Channel>, object: &ScaledObjectRef) -> f64 {
    let spec = keda.get_metric_spec(object.clone()).await.unwrap();
    let spec = spec.into_inner().metric_specs.remove(0);
    assert_eq!(spec.target_size as f64, spec.target_size_float);
    let request = GetMetricsRequest {
        scaled_object_ref: Some(object.clone()),
        metric_name: spec.metric_name,
    };
    let metrics = keda.get_metrics(request).await.unwrap().into_inner();
    let value = &metrics.metric_values[0];
    assert_eq!(value.metric_value as f64, value.metric_value_float);
    (value.metric_value_float / spec.target_size_float).ceil()
}

#[tokio::test]
async fn keda_is_told_when_there_are_jobs_and_how_many_replicas_they_need() {
    let listen = free_address();
    let mut cluster = Cluster::start_with(Setup {
        more: format!("[scaler.keda]\nlisten = \"{listen}\"\n"),
        ..Setup::new("embedded", &model::start().await)
    })
    .await;
    let mut keda = wait_for("KEDA's port", DEADLINE, || {
        ExternalScalerClient::connect(format!("http://{listen}"))
    })
    .await;
    let rollouts = object("rollout", "2");
    let is_active = async |keda: &mut ExternalScalerClient<Channel>, object: &ScaledObjectRef| {
        let answer = keda.is_active(object.clone()).await.unwrap();
        answer.into_inner().result
    };
    assert!(!is_active(&mut keda, &rollouts).await);
    assert_eq!(replicas(&mut keda, &rollouts).await, 0.0);
    let stream = keda.stream_is_active(rollouts.clone()).await.unwrap();
    let mut stream = stream.into_inner();
    let next = async |stream: &mut tonic::Streaming<_>| {
        let next = tokio::time::timeout(DEADLINE, stream.message()).await;
        let next: Option<espalier_proto::keda::IsActiveResponse> = next.unwrap().unwrap();
        next.map(|told| told.result)
    };
    assert_eq!(next(&mut stream).await, Some(false), "at once");

    let mut client = cluster.client().await;
    client.submit("b", &sleepers(40, 100)).await;
    assert_eq!(next(&mut stream).await, Some(true), "when it changes");
    assert_eq!(replicas(&mut keda, &rollouts).await, 20.0);
    assert!(is_active(&mut keda, &rollouts).await);
    let others = object("curate,compare,export", "1");
    assert!(
        !is_active(&mut keda, &others).await,
        "of other kinds there is none"
    );

    let worker = cluster.worker("w", 8);
    let result = client.wait("b", DEADLINE).await;
    check(&cluster, "b", &result, 40);
    assert_eq!(next(&mut stream).await, Some(false));
    assert_eq!(replicas(&mut keda, &rollouts).await, 0.0);

    let refused = keda.is_active(object("rollout", "many")).await.unwrap_err();
    let field = field_error(&refused).unwrap();
    let said = (refused.code(), &*field.field, &*field.value);
    let expected = (
        Code::InvalidArgument,
        "scalerMetadata.jobsPerReplica",
        "many",
    );
    assert_eq!(said, expected);
    let large = object(&"rollout,".repeat(4_000), "1");
    let refused = keda.is_active(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");

    worker.process.signal(Signal::KILL);
    cluster.coordinators[0].process.signal(Signal::TERM);
    assert_eq!(next(&mut stream).await, None, "it ends in order");
    assert!(
        cluster.coordinators[0]
            .process
            .wait(DEADLINE)
            .await
            .success()
    );
}
