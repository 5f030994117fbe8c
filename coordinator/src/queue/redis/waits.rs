//! Writes that wait for a replica: they count when it has them, and hold up nobody else when it stalls.

use std::time::{Duration, Instant};

use espalier_core::queue::RenewReply;
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;
use futures::future::join_all;

use super::faults::{chunk, lease, open_batch, success};
use super::tests::try_open_as;
use super::topologies::cluster_server;
use super::{Acknowledge, ConnectError, Redis, Unfit};
use crate::queue::{FinishAck, Granted, Queue, QueueError, Renewal};

const DEADLINE: Duration = Duration::from_secs(30);
/// Far less than a write may wait for a replica, and plenty for an answer on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A turn, a connection and an answer, each at its longest, which a busy machine makes of some.
const WRITE_LIMIT: Duration = Duration::from_secs(12);

async fn replicated(server: &RedisServer) -> Redis {
    let opened = try_open_as(&server.url(), Acknowledge::Replicated).await;
    opened.unwrap()
}

async fn renew(queue: &Redis, granted: &Granted) -> RenewReply {
    let renewal = Renewal {
        key: granted.grant.key.clone(),
        fence: granted.grant.fence,
        progress: None,
    };
    queue.renew(vec![renewal]).await.unwrap()[0]
}

#[tokio::test]
async fn a_replica_that_stalls_holds_up_writes_and_nothing_else() {
    let primary = RedisServer::start().await;
    let replica = RedisServer::start_replica(&primary).await;
    let queue = replicated(&primary).await;
    open_batch(&queue, "b").await.unwrap();
    queue.submit(chunk("b", 0, 2, 100)).await.unwrap();
    let granted = lease(&queue, 1).await.unwrap().remove(0);

    replica.pause();
    let began = Instant::now();
    let writes = join_all((1..=8).map(|n| queue.submit(chunk("b", n, 1, 100))));
    let others = async {
        for _ in 0..8 {
            let asked = Instant::now();
            let renewed = renew(&queue, &granted).await;
            assert!(matches!(renewed, RenewReply::Held { .. }));
            let read = queue.job(granted.grant.key.clone()).await.unwrap();
            assert!(read.is_some());
            assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let (written, ()) = tokio::join!(writes, others);
    assert!(began.elapsed() < WRITE_LIMIT, "{:?}", began.elapsed());
    for answer in written {
        let error = answer.unwrap_err();
        assert!(matches!(error, QueueError::Unavailable { .. }), "{error}");
        assert!(
            error.to_string().contains("did not reach a replica"),
            "{error}"
        );
    }

    replica.resume();
    let acks = wait_for("the replica to take writes", DEADLINE, || {
        queue.finish(vec![success(&granted)])
    });
    assert!(matches!(
        acks.await[..],
        [FinishAck::Accepted | FinishAck::AlreadyFinished]
    ));
    for n in 1..=8 {
        queue.submit(chunk("b", n, 1, 100)).await.unwrap();
    }
}

#[tokio::test]
async fn what_was_answered_is_at_the_replica() {
    let mut primary = RedisServer::start().await;
    let replica = RedisServer::start_replica(&primary).await;
    let queue = replicated(&primary).await;
    open_batch(&queue, "b").await.unwrap();
    // Scripts that the server forgot are loaded on the connection that needs them.
    assert_eq!(primary.cli(&["SCRIPT", "FLUSH"]).await.trim(), "OK");
    let writes = join_all((0..20).map(|n| queue.submit(chunk("b", n, 10, 100))));
    for answer in writes.await {
        answer.unwrap();
    }
    primary.kill();
    replica.promote().await;
    let ready = replica.cli(&["HGET", "{test:0}:b:1", "name"]).await;
    assert_eq!(ready.trim(), "p/b");
    let jobs = replica.cli(&["EVAL", "return #redis.call('KEYS', '{test:0}:j:*')", "0"]);
    assert_eq!(jobs.await.trim(), "200");
}

#[tokio::test]
async fn writes_find_a_server_that_was_killed_and_started_again() {
    let mut primary = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let _replica = RedisServer::start_replica(&primary).await;
    let queue = replicated(&primary).await;
    open_batch(&queue, "b").await.unwrap();
    for answer in join_all((0..4).map(|n| queue.submit(chunk("b", n, 1, 100)))).await {
        answer.unwrap();
    }
    primary.restart().await;
    let again = wait_for("writes to go on", DEADLINE, || {
        queue.submit(chunk("b", 4, 1, 100))
    });
    assert_eq!(again.await.items.len(), 1);
}

#[tokio::test]
async fn a_cluster_is_refused_where_writes_would_wait() {
    let (_server, url) = cluster_server().await;
    let refused = try_open_as(&url, Acknowledge::Replicated)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, ConnectError::Unfit(Unfit::Cluster { .. })),
        "{refused}"
    );
    let refused = refused.to_string();
    assert!(
        refused.contains("`queue_acknowledge = replicated`"),
        "{refused}"
    );
    try_open_as(&url, Acknowledge::Fast).await.unwrap();
}
