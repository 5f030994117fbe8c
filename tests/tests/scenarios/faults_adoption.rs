//! Two workers that want the same job: one that died after it published, one that was paused past its lease, and results
//! that an old lease left behind. Coordinator and workers are processes of their own. Whatever the order, each job has
//! exactly one result, and it verifies.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::{SpecDigest, parse_line};
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Trace};
use espalier_proto::v1::{self, JobState};
use espalier_tests::harness::client::BatchResult;
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::model::{self, completions, toy_job};
use espalier_tests::harness::process::Signal;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(40);
/// Short enough to wait for its end.
const LEASE_TTL_MS: u64 = 3_000;
/// Long enough to do without a coordinator for some seconds of a busy machine.
const LONG_LEASE_TTL_MS: u64 = 8_000;

/// A job that sleeps in its tool and answers.
fn nap(id: &str, sleep_ms: u64) -> Value {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": sleep_ms}}, {"answer": "done"}]);
    let mut job = toy_job(id, &steps, "done");
    // Lost leases are what these tests make; they must not use up a job.
    job["max_infra"] = 20.into();
    job
}

fn naps(count: usize, sleep_ms: u64) -> Vec<Value> {
    (0..count)
        .map(|n| nap(&format!("nap-{n:02}"), sleep_ms))
        .collect()
}

/// Every job succeeded and is solved, once; the counters say the same; every manifest verifies. Gives the manifests.
fn check(
    cluster: &Cluster,
    batch: &str,
    result: &BatchResult,
    count: usize,
) -> BTreeMap<JobKey, Manifest> {
    let expected = v1::Counts {
        succeeded: count as u64,
        ..v1::Counts::default()
    };
    assert_eq!(result.batch.counts, Some(expected));
    assert_eq!(result.count(JobState::Succeeded), count);
    assert_eq!(result.solved(), count, "{:#?}", result.jobs);
    let keys = result.jobs.keys().map(|id| cluster.key(batch, id));
    keys.map(|key| (key.clone(), cluster.manifest(&key)))
        .collect()
}

#[tokio::test]
async fn a_result_whose_worker_died_before_it_reported_is_taken_over() {
    let model_url = model::start().await;
    let mut cluster = Cluster::start(&model_url, LONG_LEASE_TTL_MS).await;
    let key = cluster.key("b", "nap");
    let mut a = cluster.worker("a", 1);
    let mut client = cluster.client().await;
    client.submit("b", &[nap("nap", 500)]).await;
    let fence = a.wait_until_at_tool(&key, DEADLINE).await;
    // Killed, not paused: a paused coordinator would read the report from its socket when it goes on.
    cluster.coordinators[0].process.kill();
    cluster.wait_until_published(&key, DEADLINE).await;
    a.kill(DEADLINE).await;
    let asked = completions(&model_url).await;
    cluster.restart_coordinator(0).await;
    let mut client = cluster.client().await;
    assert_ne!(client.job(&key).await.state(), JobState::Succeeded);

    let mut b = cluster.worker("b", 1);
    let result = client.wait("b", DEADLINE).await;
    let manifests = check(&cluster, "b", &result, 1);
    assert_eq!(
        manifests[&key].fence, fence,
        "the result is the dead worker's"
    );
    assert!(result.jobs["nap"].attempts >= 2, "{:?}", result.jobs);
    assert_eq!(
        completions(&model_url).await,
        asked,
        "nothing was done twice"
    );
    let trace = client.trace("b", "nap").await;
    assert_eq!((trace.header.job, trace.header.fence), (key, fence));
    b.terminate(DEADLINE).await;
}

/// Where the others are with the jobs of a paused worker when it goes on.
enum Others {
    AtWork,
    Done,
}

/// A worker is paused in the middle of its rollouts until its leases are over, and then goes on.
async fn pause_and_go_on(others: Others) {
    const JOBS: usize = 6;
    let cluster = Cluster::start(&model::start().await, LEASE_TTL_MS).await;
    let a = cluster.worker("a", 4);
    let mut client = cluster.client().await;
    // Long enough that the first still naps when the last has begun, however busy the machine is.
    client.submit("b", &naps(JOBS, 6_000)).await;
    let mut lost = BTreeMap::new();
    for n in 0..4 {
        let key = cluster.key("b", &format!("nap-{n:02}"));
        let fence = a.wait_until_at_tool(&key, DEADLINE).await;
        lost.insert(key, fence);
    }
    a.process.signal(Signal::STOP);
    let mut b = cluster.worker("b", 6);
    match others {
        Others::Done => {
            client
                .wait_until_succeeded("b", JOBS as u64, DEADLINE)
                .await
        }
        Others::AtWork => {
            for (key, fence) in &lost {
                assert!(b.wait_until_at_tool(key, DEADLINE).await > *fence);
            }
        }
    }
    a.process.signal(Signal::CONT);
    let result = client.wait("b", DEADLINE).await;
    let manifests = check(&cluster, "b", &result, JOBS);
    for (key, fence) in &lost {
        assert!(manifests[key].fence > *fence, "{key} was done again");
    }

    // The worker that was paused is as good as before.
    b.terminate(DEADLINE).await;
    client.submit("c", &naps(4, 10)).await;
    let result = client.wait("c", DEADLINE).await;
    check(&cluster, "c", &result, 4);
    for (key, manifest) in manifests {
        assert_eq!(cluster.manifest(&key), manifest, "results stay as they are");
        let lost = lost.get(&key);
        let published = lost.is_some_and(|fence| cluster.has_trace(&key, *fence));
        assert!(!published, "{key} was published under a lost lease");
    }
}

#[tokio::test]
async fn a_worker_that_was_paused_goes_on_after_others_did_its_jobs() {
    pause_and_go_on(Others::Done).await;
}

#[tokio::test]
async fn a_worker_that_was_paused_goes_on_while_others_do_its_jobs() {
    pause_and_go_on(Others::AtWork).await;
}

/// What an attempt under `fence` at the job of `line` would have published for `key`, made from the trace of a job that
/// did the same. Stores the trace and gives the manifest.
fn forge(cluster: &Cluster, donor: &Trace, key: &JobKey, fence: Fence, line: &Value) -> Manifest {
    let mut trace = donor.clone();
    trace.header.id = format!("{key}@{fence}");
    trace.header.job = key.clone();
    trace.header.fence = fence;
    let json = serde_json::to_vec(&trace).expect("a trace is JSON");
    let packed = zstd::encode_all(&json[..], 3).expect("bytes compress");
    let path = layout::trace(key, fence);
    put(cluster, &path, &packed);
    let blobs = cluster.manifest(&donor.header.job).files.into_iter();
    let blobs = blobs.filter(|file| file.path.contains("/blobs/"));
    Manifest {
        schema_version: SCHEMA_VERSION,
        job: key.clone(),
        attempt: 1,
        fence,
        spec_sha256: Some(digest(line)),
        created_at_us: trace.outcome.ended_at_us,
        files: std::iter::once(FileEntry::of(path, &packed))
            .chain(blobs)
            .collect(),
        parents: vec![layout::job(key)],
        summary: trace.summary().into(),
    }
}

/// The digest of a job as the worker computes it.
fn digest(line: &Value) -> SpecDigest {
    SpecDigest::of(&parse_line(line.to_string().as_bytes()).expect("a job line"))
}

/// Puts the manifest where it is published, and gives its bytes.
fn publish(cluster: &Cluster, manifest: &Manifest) -> Vec<u8> {
    let bytes = serde_json::to_vec(manifest).expect("a manifest is JSON");
    put(cluster, &layout::manifest(&manifest.job), &bytes);
    bytes
}

/// Stores an object, whole at once as a store does.
fn put(cluster: &Cluster, path: &str, bytes: &[u8]) {
    let to = cluster.object(path);
    let folder = to.parent().expect("objects lie in folders");
    let aside = cluster.folder.path().join("forged");
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&aside, bytes))
        .and_then(|()| std::fs::rename(&aside, &to))
        .expect("the test's folder is writable");
}

#[tokio::test]
async fn what_an_old_lease_published_meanwhile_is_taken_over_or_moved_aside() {
    let cluster = Cluster::start(&model::start().await, LEASE_TTL_MS).await;
    let mut client = cluster.client().await;
    let mut a = cluster.worker("a", 2);
    client.submit("donor", &[nap("nap", 10)]).await;
    client.wait("donor", DEADLINE).await;
    let donor = client.trace("donor", "nap").await;

    let (good, bad) = (cluster.key("b", "good"), cluster.key("b", "bad"));
    let early = cluster.key("b", "early");
    // A broken one that is there before the job begins at all.
    let jobs = [nap("good", 4_000), nap("bad", 4_000), nap("early", 10)];
    let mut broken = forge(&cluster, &donor, &early, Fence(0), &jobs[2]);
    broken.files[0].sha256 = "0".repeat(64);
    let planted_early = publish(&cluster, &broken);
    client.submit("b", &jobs).await;
    let old = a.wait_until_at_tool(&good, DEADLINE).await;
    let old_of_bad = a.wait_until_at_tool(&bad, DEADLINE).await;
    a.kill(DEADLINE).await;
    let mut b = cluster.worker("b", 3);
    let newer = b.wait_until_at_tool(&good, DEADLINE).await;
    let newer_of_bad = b.wait_until_at_tool(&bad, DEADLINE).await;
    assert!(old < newer && old_of_bad < newer_of_bad);
    // The old leases' results appear while the newer attempts are at work.
    publish(&cluster, &forge(&cluster, &donor, &good, old, &jobs[0]));
    let mut broken = forge(&cluster, &donor, &bad, old_of_bad, &jobs[1]);
    broken.files[0].sha256 = "0".repeat(64);
    let planted = publish(&cluster, &broken);

    let result = client.wait("b", DEADLINE).await;
    let manifests = check(&cluster, "b", &result, 3);
    assert_eq!(manifests[&good].fence, old, "what was there first counts");
    assert!(
        cluster.has_trace(&good, newer),
        "the newer attempt came to its end"
    );
    assert_eq!(client.trace("b", "good").await.header.fence, old);
    assert_eq!(manifests[&bad].fence, newer_of_bad);
    let aside = cluster.object(&layout::manifest_aside(&bad, newer_of_bad));
    assert_eq!(std::fs::read(aside).unwrap(), planted);
    let aside = layout::manifest_aside(&early, manifests[&early].fence);
    assert_eq!(
        std::fs::read(cluster.object(&aside)).unwrap(),
        planted_early
    );
    assert!(
        cluster.coordinators[0]
            .process
            .log()
            .contains("bad manifest set aside"),
        "people are told"
    );
    b.terminate(DEADLINE).await;
}

/// Asserts that the job ended for good, in its first attempt, because of a result of the spec with digest `found`.
fn check_refused(job: &v1::Job, line: &Value, found: &Value) {
    let error = job.last_error.clone().unwrap_or_default();
    assert_eq!(job.state(), JobState::Dead, "{job:?}");
    assert_eq!(error.class(), v1::ErrorClass::Invalid, "{error:?}");
    assert_eq!(job.attempts, 1, "it cannot get better: {error:?}");
    let (found, asked) = (digest(found), digest(line));
    for part in [
        "batch name already used",
        &format!("job `{}` of batch `b` in project `default`", job.id),
        &format!(
            "spec sha256 {}, this job's {}",
            found.short(),
            asked.short()
        ),
        &format!("delete `default/batches/b/jobs/{}/`", job.id),
    ] {
        assert!(error.message.contains(part), "{part}: {}", error.message);
    }
}

#[tokio::test]
async fn a_result_of_another_job_that_had_the_same_name_is_not_taken_over() {
    let model_url = model::start().await;
    let mut cluster = Cluster::start(&model_url, LONG_LEASE_TTL_MS).await;
    let mut a = cluster.worker("a", 3);
    let mut client = cluster.client().await;
    let old = [nap("same", 10), nap("other", 10)];
    client.submit("b", &old).await;
    let result = client.wait("b", DEADLINE).await;
    let before = check(&cluster, "b", &result, 2);
    let donor = client.trace("b", "other").await;
    let asked = completions(&model_url).await;

    cluster.forget_batches().await;
    client = cluster.client().await;
    let new = [nap("same", 10), nap("other", 20), nap("late", 4_000)];
    client.submit("b", &new).await;
    // This one's old result appears when it is in the middle of its work.
    let late = cluster.key("b", "late");
    let fence = a.wait_until_at_tool(&late, DEADLINE).await;
    let zombie = Fence(fence.0 + 1_000);
    let planted = publish(&cluster, &forge(&cluster, &donor, &late, zombie, &old[1]));
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.jobs["same"].state(), JobState::Succeeded);
    check_refused(&result.jobs["other"], &new[1], &old[1]);
    check_refused(&result.jobs["late"], &new[2], &old[1]);
    for (key, manifest) in &before {
        assert_eq!(cluster.manifest(key), *manifest, "it stays as it is");
    }
    let now = std::fs::read(cluster.object(&layout::manifest(&late))).unwrap();
    assert_eq!(now, planted, "it stays as it is");
    let done = completions(&model_url).await - asked;
    assert_eq!(
        done, 2,
        "the model heard of nothing but the two turns of `late`"
    );

    // The way out that the message names.
    let other = cluster.key("b", "other");
    std::fs::remove_dir_all(cluster.object(&layout::job(&other))).unwrap();
    let retry = v1::RetryRequest {
        batch: "b".to_owned(),
        ids: vec!["other".to_owned()],
    };
    client.jobs.retry(retry).await.unwrap();
    client.wait_until_succeeded("b", 2, DEADLINE).await;
    let manifest = cluster.manifest(&other);
    assert_eq!(manifest.spec_sha256, Some(digest(&new[1])));
    a.terminate(DEADLINE).await;
}

#[tokio::test]
async fn kill_9_of_a_worker_and_then_of_the_coordinator_loses_nothing() {
    const JOBS: usize = 16;
    let mut cluster = Cluster::start(&model::start().await, LONG_LEASE_TTL_MS).await;
    let mut a = cluster.worker("a", 16);
    let mut client = cluster.client().await;
    client.submit("b", &naps(JOBS, 3_000)).await;
    let keys: Vec<JobKey> = (0..JOBS)
        .map(|n| cluster.key("b", &format!("nap-{n:02}")))
        .collect();
    for key in &keys {
        a.wait_until_at_tool(key, DEADLINE).await;
    }
    a.kill(DEADLINE).await;

    let mut b = cluster.worker("b", 8);
    client.wait_until_succeeded("b", 2, DEADLINE).await;
    let before = client.leases(&keys).await;
    assert!(!before.is_empty(), "the worker is in the middle");
    cluster.coordinators[0].process.kill();
    cluster.restart_coordinator(0).await;
    client = cluster.client().await;
    let after = client.leases(&keys).await;
    for (key, fence) in &before {
        let same = after.get(key).is_none_or(|now| now == fence);
        assert!(same, "{key} kept its lease: {before:?}, {after:?}");
    }
    let result = client.wait("b", DEADLINE).await;
    check(&cluster, "b", &result, JOBS);
    for key in before.keys() {
        let attempts = result.jobs[&key.job.to_string()].attempts;
        assert_eq!(attempts, 2, "{key}: one for each worker");
    }
    b.terminate(DEADLINE).await;
}
