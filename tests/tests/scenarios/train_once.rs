//! Training workers that take one job and end with it, as a Kubernetes Job of KEDA's starts them.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_proto::v1::{Job, JobState};
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::process::Process;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(100);
/// Nobody asks a model here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qwen3/tests/golden/tiny-dense")
}

/// Submits trainings of so many steps, named by their place; of none, one whose base model is not there.
async fn submit(cluster: &Cluster, steps: &[Option<u64>]) {
    let folder = cluster.object("default/uploads");
    std::fs::create_dir_all(&folder).unwrap();
    let row =
        |n: usize| json!({"id": format!("s{n}"), "ids": [1, 2, 3, n], "supervised": [[1, 4]]});
    let rows: String = (0..8).map(|n| row(n).to_string() + "\n").collect();
    std::fs::write(folder.join("rows.jsonl"), rows).unwrap();
    let job = |(n, steps): (usize, &Option<u64>)| {
        let base = match steps {
            Some(_) => model(),
            None => "/nonexistent/model".into(),
        };
        let settings = json!({"max_steps": steps.unwrap_or(1), "batch": 2, "rank": 2});
        let train = json!({"base": base, "rows": "rows.jsonl", "adapter": format!("tiny-{n}"), "settings": settings});
        json!({"id": format!("j{n}"), "max_attempts": 1, "train": train})
    };
    let jobs: Vec<Value> = steps.iter().enumerate().map(job).collect();
    let answer = cluster.client().await.submit("b", &jobs).await;
    assert_eq!(
        answer.accepted as usize,
        jobs.len(),
        "{:?}",
        answer.rejected
    );
}

async fn job(cluster: &Cluster, n: usize) -> Job {
    let key = cluster.key("b", &format!("j{n}"));
    cluster.client().await.job(&key).await
}

/// How many jobs there are in a state.
async fn in_state(cluster: &Cluster, jobs: usize, state: JobState) -> usize {
    let mut count = 0;
    for n in 0..jobs {
        count += usize::from(job(cluster, n).await.state() == state);
    }
    count
}

fn once(cluster: &Cluster, name: &str, more: &[&str]) -> Process {
    cluster.train_worker_with(name, "cpu", &[&["--once"], more].concat())
}

async fn ends_well(worker: &mut Process) -> String {
    let status = worker.wait(DEADLINE).await;
    assert!(status.success(), "{status:?}: {}", worker.log());
    worker.log()
}

#[tokio::test]
async fn it_does_one_training_and_leaves_the_next_to_the_next_worker() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    submit(&cluster, &[Some(3), Some(3)]).await;
    ends_well(&mut once(&cluster, "first", &[])).await;
    let ended = in_state(&cluster, 2, JobState::Succeeded).await;
    let waiting = in_state(&cluster, 2, JobState::Ready).await;
    assert_eq!((ended, waiting), (1, 1));
    ends_well(&mut once(&cluster, "second", &[])).await;
    assert_eq!(in_state(&cluster, 2, JobState::Succeeded).await, 2);
    let log = ends_well(&mut once(&cluster, "third", &["--once-wait=1"])).await;
    assert!(log.contains("\"had_a_job\":false"), "{log}");
}

#[tokio::test]
async fn it_ends_well_whatever_became_of_its_training() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    submit(&cluster, &[None]).await;
    let log = ends_well(&mut once(&cluster, "fails", &[])).await;
    assert!(log.contains("\"had_a_job\":true"), "{log}");
    let failed = job(&cluster, 0).await;
    assert_eq!(failed.state(), JobState::Dead, "{failed:?}");
}

#[tokio::test]
async fn it_hands_its_training_back_when_it_is_told_to_end_and_ends_well() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    submit(&cluster, &[Some(100_000)]).await;
    let mut worker = once(&cluster, "stopped", &[]);
    wait_for("the training to run", DEADLINE, || {
        let job = job(&cluster, 0);
        async move {
            let job = job.await;
            let runs = job.state() == JobState::Leased && !job.progress.is_empty();
            runs.then_some(()).ok_or(job)
        }
    })
    .await;
    let status = worker.terminate(DEADLINE).await;
    assert!(status.success(), "{status:?}: {}", worker.log());
    let job = job(&cluster, 0).await;
    let spent = (job.handler_failures, job.infra_failures);
    assert_eq!((job.state(), spent), (JobState::Ready, (0, 0)), "{job:?}");
}
