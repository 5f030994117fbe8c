//! The guide to operations holds: its night is submitted, watched, upgraded and read in a shell, by the guide's own words.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_proto::v1::{Job, ListWorkersRequest};
use espalier_tests::harness::cluster::{Cluster, OPERATOR_TOKEN, Setup};
use espalier_tests::harness::guide::{self, blocks};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::process::Process;
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::wait_for;
use serde_json::json;

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
const ROLLOUTS: usize = 60;
/// The guide's.
const SLOTS: u32 = 8;

/// The file of the night: each rollout is at work for a second.
fn night() -> String {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": 1_000}}, {"answer": "done"}]);
    let job = |n: usize| {
        let job = toy_job(&format!("job-{n:02}"), &steps, "done");
        // Texts are written in TOML as in JSON.
        let (id, prompt) = (&job["id"], &job["prompt"]);
        format!("[[jobs]]\nid = {id}\nprompt = {prompt}\n")
    };
    let defaults = "[defaults]\nmcp = [\"toy\"]\ntask_kind = \"toy\"\nverify = { answer = { equals = \"done\" } }\n";
    let jobs: String = (0..ROLLOUTS).map(job).collect();
    format!("{defaults}{jobs}")
}

/// The reader's shell, in the folder of the cluster.
fn shell(cluster: &Cluster, name: &str, words: &str) -> Process {
    let mut command = guide::shell(words);
    command.current_dir(cluster.folder.path());
    // Whose token, where and on which store is what `user` says.
    let user = cluster.user();
    command.envs(
        user.get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    command.env("OPERATOR_TOKEN", OPERATOR_TOKEN);
    Process::start(name, command, cluster.folder.path())
}

async fn done(mut shell: Process) -> String {
    let status = shell.wait(DEADLINE).await;
    assert!(status.success(), "{status:?}: {}", shell.log());
    shell.log()
}

/// The one worker, as soon as the first coordinator has heard of it.
async fn worker_of(cluster: &Cluster) -> String {
    let operator = cluster.operator_client().await.admin;
    wait_for("the worker", DEADLINE, || async {
        let mut operator = operator.clone();
        let workers = operator.list_workers(ListWorkersRequest::default()).await;
        let workers = workers.unwrap().into_inner().workers;
        match &workers[..] {
            [worker] => Ok(worker.worker.clone()),
            _ => Err(workers),
        }
    })
    .await
}

#[tokio::test]
async fn a_night_goes_as_the_guide_says() {
    let redis = RedisServer::start().await;
    let mut cluster = Cluster::start_with(Setup {
        coordinators: 2,
        ..Setup::new(&redis.url(), &model::start().await)
    })
    .await;
    std::fs::write(cluster.folder.path().join("night.toml"), night()).unwrap();
    let mut worker = cluster.worker("old", SLOTS);
    let worker_id = worker_of(&cluster).await;
    let says = blocks("operations", "sh");

    // The addresses and tokens are the test's, and there is no terminal whose keys end it.
    let evening = says[0].lines().filter(|line| !line.starts_with("export "));
    let evening: Vec<&str> = evening.collect();
    let evening = evening
        .join("\n")
        .replace("espalier top", "espalier top --once");
    let said = done(shell(&cluster, "evening", &evening)).await;
    assert!(
        said.contains(" of 60") && said.contains("workers: 1 at"),
        "{said}"
    );
    let client = cluster.client().await;
    client.wait_until_succeeded("night", 4, DEADLINE).await;

    let old = cluster.coordinators[0].process.pid().to_string();
    let release = says[1]
        .replace("COORDINATOR", &old)
        .replace("coordinator.toml", "coordinator-0.toml");
    let release = release.replace("WORKER", &worker_id);
    let mut release = shell(&cluster, "release", &release);
    // A shell whose child it is has its end in hand; this one is the test's.
    let ended = cluster.coordinators[0].process.wait(DEADLINE).await;
    assert!(ended.success(), "{ended:?}");
    let status = release.wait(DEADLINE).await;
    assert!(status.success(), "{}", release.log());
    wait_for("the drained worker to have no job", DEADLINE, || async {
        let said = done(shell(
            &cluster,
            "look",
            "ESPALIER_TOKEN=$OPERATOR_TOKEN espalier workers",
        ))
        .await;
        if said.contains("0 of 8") {
            Ok(())
        } else {
            Err(said)
        }
    })
    .await;
    worker.terminate(DEADLINE).await;
    let _new = cluster.worker("new", SLOTS);

    let said = done(shell(&cluster, "morning", "espalier watch night")).await;
    assert!(said.contains(&ROLLOUTS.to_string()), "{said}");
    let result = cluster.client().await.wait("night", DEADLINE).await;
    assert_eq!(result.solved(), ROLLOUTS, "{:#?}", result.unsolved());
    let failures = |job: &Job| job.handler_failures + job.infra_failures;
    assert_eq!(result.jobs.values().map(failures).sum::<u32>(), 0);
}
