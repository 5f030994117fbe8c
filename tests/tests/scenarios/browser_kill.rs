//! An agent worker that is killed in the middle of browser rollouts, beside a coordinator and a second worker that are
//! processes of their own. No rollout is lost or counted twice, the death is charged to the infrastructure, and neither
//! node nor Chromium nor a profile stays behind.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_proto::v1;
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::cluster::{Cluster, Worker};
use espalier_tests::harness::practice::{self, SEED};
use espalier_tests::harness::{model, wait_for};
use espalier_tests::scripted_model::Config;
use serde_json::Value;

/// Sixteen rollouts in browsers on two cores that others use too.
const DEADLINE: Duration = Duration::from_secs(180);
/// How long the processes of a killed worker may stay: the removal of its files may need ten tries, a second apart.
const GONE_DEADLINE: Duration = Duration::from_secs(20);
/// Short enough to wait for its end, long enough for a worker that starts browsers on two busy cores to renew it.
const LEASE_TTL_MS: u64 = 4_000;
const ROLLOUTS: usize = 16;
const SLOTS: u32 = 6;
/// Finished before the kill.
const FINISHED: u64 = 3;

/// Waits until `worker` has a browser at work, with its profile on disk.
async fn wait_until_browsing(worker: &Worker) {
    wait_for("node, Chromium and a profile", DEADLINE, || async {
        let (processes, files) = (worker.trail.processes(), worker.trail.files());
        let runs = |part: &str| processes.iter().any(|(_, line)| line.contains(part));
        let profile = |file: &PathBuf| file.ends_with("Default");
        let seen = (runs("cli.js"), runs("chromium"), files.iter().any(profile));
        if seen == (true, true, true) {
            Ok(())
        } else {
            Err((seen, processes))
        }
    })
    .await;
}

/// Of the leases that a killed worker held, those whose result it had not published.
fn unpublished(cluster: &Cluster, held: BTreeMap<JobKey, Fence>) -> BTreeMap<JobKey, Fence> {
    let published = |key: &JobKey| cluster.object(&layout::manifest(key)).exists();
    held.into_iter()
        .filter(|(key, _)| !published(key))
        .collect()
}

/// Every rollout ended well and once, and no attempt was charged to the task.
fn check(cluster: &Cluster, result: &BatchResult) {
    let expected = v1::Counts {
        succeeded: ROLLOUTS as u64,
        ..v1::Counts::default()
    };
    assert_eq!(result.batch.counts, Some(expected));
    assert_eq!(result.solved(), ROLLOUTS, "{:#?}", result.unsolved());
    for (id, job) in &result.jobs {
        let key = cluster.key("b", id);
        assert_eq!(job.manifest, layout::manifest(&key));
        let manifest = cluster.manifest(&key);
        assert!(cluster.has_trace(&key, manifest.fence));
        let aside = |entry: &String| entry.starts_with("manifest.invalid");
        assert!(!objects(cluster, &key).iter().any(aside), "{key}");
        assert_eq!(job.handler_failures, 0, "{job:?}");
        assert_eq!(job.attempts, 1 + job.infra_failures, "{job:?}");
    }
}

/// Names of what lies in the folder of a job.
fn objects(cluster: &Cluster, key: &JobKey) -> Vec<String> {
    let folder = std::fs::read_dir(cluster.object(&layout::job(key))).expect("the job has objects");
    let names = folder.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).collect()
}

#[tokio::test]
async fn kill_9_of_a_worker_in_the_middle_of_16_browser_rollouts_loses_nothing_and_leaves_nothing()
{
    let thinking = Config {
        seed: SEED,
        mistakes: 0.0,
        think_ms: 150,
    };
    let cluster = Cluster::start(&model::start_with(thinking).await, LEASE_TTL_MS).await;
    let mut a = cluster.worker("a", SLOTS);
    let mut client = cluster.client().await;
    let tasks = practice::start(ROLLOUTS).await;
    let id = |task: &Value| task["id"].as_str().expect("a task has an id").to_owned();
    let keys: Vec<JobKey> = tasks
        .iter()
        .map(|task| cluster.key("b", &id(task)))
        .collect();
    client.submit("b", &tasks).await;
    client.wait_until_succeeded("b", FINISHED, DEADLINE).await;
    wait_until_browsing(&a).await;
    a.process.kill();

    // A lost connection ends no lease, so that what the worker held can be read after its death.
    let held = client.leases(&keys).await;
    let mut b = cluster.worker("b", SLOTS);
    a.trail.wait_until_cold(GONE_DEADLINE).await;
    let lost = unpublished(&cluster, held);
    assert!(lost.len() > 2, "the worker was in the middle: {lost:?}");

    let result = client.wait("b", DEADLINE).await;
    check(&cluster, &result);
    for (key, fence) in lost {
        let job = &result.jobs[&key.job.to_string()];
        assert!(job.infra_failures > 0, "the death was charged: {job:?}");
        assert!(cluster.manifest(&key).fence > fence, "{key} was done again");
    }
    b.terminate(DEADLINE).await;
}
