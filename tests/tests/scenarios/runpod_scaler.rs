//! A coordinator that makes its workers in pods: as many as the jobs need and the budget allows, none twice whatever RunPod does
//! wrong, and none that is forgotten when the coordinator dies.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use espalier_proto::v1::JobState;
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::process::binary;
use espalier_tests::harness::runpod::{KEY, Runpod, Trouble};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
const SLOTS: u32 = 2;
const IMAGE: &str = "registry.example/espalier/agent-worker:1";
const A5000: &str = "NVIDIA RTX A5000";
const L4: &str = "NVIDIA L4";

/// An account, and a cluster whose coordinator has its agent workers there.
struct World {
    server: Runpod,
    cluster: Cluster,
}

impl World {
    async fn start(max_per_hour: f64, lease_ttl_ms: u64) -> Option<Self> {
        let server = Runpod::start().await?;
        let more = format!(
            "[scaler]\ninterval_s = 1\n\
             [scaler.runpod]\napi_key = {KEY:?}\nurl = {url:?}\nmax_per_hour = {max_per_hour}\nmax_per_day = 100.0\n\
             [[scaler.runpod.pools]]\nname = \"agents\"\nkinds = [\"rollout\"]\njobs_per_worker = {SLOTS}\nmax = 4\n\
             idle_s = 2\nimage = {IMAGE:?}\ngpus = [{A5000:?}, {L4:?}]\n",
            url = server.url
        );
        let cluster = Cluster::start_with(Setup {
            lease_ttl_ms,
            more,
            ..Setup::new("embedded", &model::start().await)
        })
        .await;
        cluster.write_worker_config("agent", SLOTS);
        let folder = cluster.folder.path().to_owned();
        server.image(IMAGE, move |pod| {
            let mut command = Command::new(binary("espalier-agent-worker"));
            command.arg("--config").arg(folder.join("agent.toml"));
            command.env(
                "ESPALIER_AGENT_WORKER_DATA_DIR",
                folder.join(&pod["RUNPOD_POD_ID"]),
            );
            command
        });
        Some(Self { server, cluster })
    }

    /// Names of the pods, none of which there is twice.
    fn names(&self) -> BTreeSet<String> {
        let names = self.server.names();
        let unique: BTreeSet<String> = names.iter().cloned().collect();
        assert_eq!(unique.len(), names.len(), "doubles: {names:?}");
        unique
    }

    async fn until(
        &self,
        what: &str,
        is_so: impl Fn(&BTreeSet<String>) -> bool,
    ) -> BTreeSet<String> {
        wait_for(what, DEADLINE, || async {
            let names = self.names();
            if is_so(&names) { Ok(names) } else { Err(names) }
        })
        .await
    }

    fn log(&self) -> String {
        self.cluster.coordinators[0].process.log()
    }
}

/// Rollouts that are each at work for so long.
fn sleepers(count: usize, ms: u64) -> Vec<Value> {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": ms}}, {"answer": "done"}]);
    let job = |n| toy_job(&format!("job-{n:02}"), &steps, "done");
    (0..count).map(job).collect()
}

fn assert_solved(result: &BatchResult) {
    let solved = result.count(JobState::Succeeded);
    assert_eq!(solved, result.jobs.len(), "{:#?}", result.unsolved());
}

#[tokio::test]
async fn pods_are_as_many_as_jobs_need_and_the_budget_allows() {
    // Four pods are wanted, and two of $0.27 are paid for. The second type of GPU is too dear beside the first pod.
    let Some(world) = World::start(0.6, 30_000).await else {
        return;
    };
    world
        .server
        .put(&json!({"name": "mine", "image": "x", "gpu": {"id": L4}}));
    world
        .server
        .trouble("GET /v2/pods", Trouble::Status(429, Some(1)), 1);
    world.server.trouble("POST", Trouble::CutAfter, 1);
    let mut client = world.cluster.client().await;
    // One pod alone is not done with them while the coordinator waits after a failure.
    client.submit("b", &sleepers(24, 3_000)).await;
    let names = world.until("two pods", |names| names.len() == 3).await;
    let expected = ["espalier-agents-0", "espalier-agents-1", "mine"].map(str::to_owned);
    assert_eq!(names, BTreeSet::from(expected));
    let waits = client.wait("b", DEADLINE);
    tokio::pin!(waits);
    let result = loop {
        tokio::select! {
            result = &mut waits => break result,
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                assert!(world.names().len() <= 3, "over the budget: {:?}", world.names());
            }
        }
    };
    assert_solved(&result);
    for (id, job) in &result.jobs {
        assert_eq!((job.attempts, job.infra_failures), (1, 0), "{id}");
    }
    world
        .until("the pods to be gone", |names| names.len() == 1)
        .await;
    assert_eq!(world.server.names(), ["mine"]);
    assert_eq!(world.server.count("POST"), 2, "a pod was asked for twice");
    assert_eq!(world.server.violations(), Vec::<String>::new());
    assert!(!world.log().contains(KEY), "the key is in the log");
}

#[tokio::test]
async fn a_coordinator_that_dies_leaves_no_pod_behind_and_makes_none_twice() {
    // Whoever takes over ends nothing for twice the time of a lease.
    let Some(mut world) = World::start(10.0, 5_000).await else {
        return;
    };
    let mut client = world.cluster.client().await;
    client.submit("b", &sleepers(16, 4_000)).await;
    let before = world.until("pods", |names| names.len() == 4).await;
    world.cluster.coordinators[0].process.kill();
    world.cluster.restart_coordinator(0).await;
    let mut client = world.cluster.client().await;
    let result = client.wait("b", DEADLINE).await;
    assert_solved(&result);
    assert_eq!(before.len(), 4);
    assert_eq!(world.server.count("POST"), 4, "a pod was asked for twice");
    world.until("the pods to be gone", BTreeSet::is_empty).await;
    assert_eq!(world.server.violations(), Vec::<String>::new());
}
