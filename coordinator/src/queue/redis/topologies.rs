//! The queue in several shards, on a Cluster, and behind Sentinels.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use espalier_core::time::Timestamp;
use espalier_runtime::clock::ManualClock;
use espalier_testbed::ports::Ports;
use espalier_testbed::process::Process;
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;
use futures::FutureExt;
use tempfile::TempDir;

use super::faults::{chunk, lease, open_batch, success};
use super::tests::{START, open};
use crate::queue::conformance::{Fixture, scenarios};
use crate::queue::{FinishAck, Queue};

const DEADLINE: Duration = Duration::from_secs(30);

fn fixture(
    server: RedisServer,
    url: String,
    queue: Arc<dyn Queue>,
    clock: Arc<ManualClock>,
) -> Fixture {
    let (server, same_clock) = (Arc::new(server), Arc::clone(&clock));
    let reopen = move |old: Arc<dyn Queue>, _| {
        let (url, clock, server) = (url.clone(), Arc::clone(&same_clock), Arc::clone(&server));
        async move {
            drop((old, server));
            open(&url, Some(clock), 4).await as Arc<dyn Queue>
        }
        .boxed()
    };
    Fixture {
        queue,
        clock,
        reopen: Box::new(reopen),
    }
}

/// Four shards on one server.
async fn sharded() -> Fixture {
    let server = RedisServer::start_with(&[("appendfsync", "no")]).await;
    let (url, clock) = (server.url(), Arc::new(ManualClock::new(START)));
    let queue = open(&url, Some(clock.clone()), 4).await;
    fixture(server, url, queue, clock)
}

/// A Cluster of one node that has all slots, and its address.
pub async fn cluster_server() -> (RedisServer, String) {
    let settings = [
        ("appendfsync", "no"),
        ("cluster-enabled", "yes"),
        ("cluster-announce-ip", "127.0.0.1"),
    ];
    let server = RedisServer::start_with(&settings).await;
    let answer = server.cli(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    assert_eq!(answer.await.trim(), "OK");
    wait_for("the cluster to be whole", DEADLINE, || async {
        let info = server.cli(&["CLUSTER", "INFO"]).await;
        let whole = info.contains("cluster_state:ok");
        whole.then_some(()).ok_or(info)
    })
    .await;
    let url = format!("redis+cluster://127.0.0.1:{}", server.port());
    (server, url)
}

/// Four shards on a Cluster.
async fn cluster() -> Fixture {
    let (server, url) = cluster_server().await;
    let clock = Arc::new(ManualClock::new(START));
    let queue = open(&url, Some(clock.clone()), 4).await;
    fixture(server, url, queue, clock)
}

mod in_shards {
    use super::*;

    scenarios!(super::sharded,
        cancel: a_label_cancels_across_batches,
        deps: dependencies_reach_across_batches,
        deps: spawned_jobs_join_with_the_finish,
        finish: one_bad_finish_spoils_no_other,
        lease: a_lost_reply_is_repeated_for_a_while,
        lease: an_expired_lease_goes_to_another_with_a_greater_fence,
        lease: an_outage_is_not_a_mass_expiry,
        order: delayed_jobs_wait_for_their_moment,
        read: complete_batches_are_purged_and_no_others,
        read: statistics_count_by_project_and_kind,
        submit: each_job_is_judged_alone,
    );
}

mod on_a_cluster {
    use super::*;

    scenarios!(super::cluster,
        cancel: running_jobs_are_asked_to_stop,
        deps: dependencies_reach_across_batches,
        finish: a_repeated_finish_is_one_finish,
        lease: a_renewed_lease_holds,
        order: a_wake_up_names_the_lane,
        read: statistics_count_by_project_and_kind,
        submit: a_chunk_again_has_no_second_effect,
    );
}

/// A Sentinel that follows one primary, and promotes its replica on its own word.
struct Sentinel {
    ports: Ports,
    _process: Process,
    _folder: TempDir,
}

impl Sentinel {
    fn start(primary: &RedisServer) -> Self {
        let (folder, ports) = (TempDir::new().unwrap(), Ports::claim());
        let config = folder.path().join("sentinel.conf");
        let settings = format!(
            "port {}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n",
            ports.port(0),
            primary.port()
        );
        fs::write(&config, settings).unwrap();
        let mut command = Command::new("redis-server");
        command.arg(&config).arg("--sentinel");
        Self {
            _process: Process::start("sentinel", command, folder.path()),
            ports,
            _folder: folder,
        }
    }

    fn url(&self) -> String {
        format!("redis+sentinel://127.0.0.1:{}/main", self.ports.port(0))
    }
}

#[tokio::test]
async fn after_a_failover_the_link_follows_and_fences_grow() {
    let mut primary = RedisServer::start().await;
    let replica = RedisServer::start_replica(&primary).await;
    let sentinel = Sentinel::start(&primary);
    let url = sentinel.url();
    let queue = wait_for("the sentinel to know the primary", DEADLINE, || {
        super::tests::try_open(&url, None, 1)
    })
    .await;
    open_batch(&queue, "b").await.unwrap();
    // A grant whose reply is lost with the link keeps its job: there is more than one for who leases again.
    queue.submit(chunk("b", 0, 8, 100)).await.unwrap();
    let first = lease(&queue, 1).await.unwrap().remove(0);
    wait_for(
        "the replica to have it, and the sentinel to know it",
        DEADLINE,
        || async {
            let held = replica.cli(&["ZCARD", "{test:0}:leased"]).await;
            let known = sentinel_cli(&sentinel, &["SENTINEL", "REPLICAS", "main"]).await;
            let is_known = known.contains(&replica.port().to_string());
            (held.trim() == "1" && is_known)
                .then_some(())
                .ok_or((held, known))
        },
    )
    .await;
    primary.kill();
    let acks = wait_for("the replica in place of the primary", DEADLINE, || {
        queue.finish(vec![success(&first)])
    });
    assert_eq!(acks.await, [FinishAck::Accepted]);
    // The link may be replaced once more, which whoever leases is told to try again.
    let second = wait_for("a lease from it", DEADLINE, || lease(&queue, 1));
    let second = second.await.remove(0);
    assert!(second.grant.fence > first.grant.fence);
    assert!(second.grant.deadline > Timestamp(0));
    assert_eq!(replica.cli(&["ROLE"]).await.lines().next(), Some("master"));
}

async fn sentinel_cli(sentinel: &Sentinel, command: &[&str]) -> String {
    let output = tokio::process::Command::new("redis-cli")
        .args(["-p", &sentinel.ports.port(0).to_string()])
        .args(command)
        .output()
        .await
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}
