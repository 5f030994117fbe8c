use espalier_core::id::{BatchId, ProjectId};
use espalier_core::queue::{MachineConfig, NewBatch};
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::Tasks;
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;

use super::super::core::LAYOUT;
use super::super::{ConnectError, Redis, RedisConfig, Unfit};
use super::*;
use crate::queue::{OpenBatch, Queue};

/// A look a second, each at most two seconds long, and two busy cores.
const SEEN_DEADLINE: Duration = Duration::from_secs(20);

async fn open(server: &RedisServer, acknowledge: Acknowledge) -> Result<Redis, ConnectError> {
    let config = RedisConfig {
        url: Secret::new(server.url()),
        name: "test".to_owned(),
        shards: 1,
        acknowledge,
        machine: MachineConfig::default(),
        clock: None,
    };
    Redis::open(config, &Tasks::new(Shutdown::new())).await
}

fn batch(name: &str) -> OpenBatch {
    OpenBatch {
        batch: NewBatch {
            project: ProjectId::new("p").unwrap(),
            batch: BatchId::new(name).unwrap(),
            params_digest: [0; 32],
        },
        defaults: bytes::Bytes::new(),
    }
}

async fn wait_until(queue: &Redis, what: &str, wanted: fn(&Condition) -> bool) {
    wait_for(what, SEEN_DEADLINE, || async {
        let seen = queue.condition().await;
        wanted(&seen).then_some(()).ok_or(seen)
    })
    .await;
}

#[test]
fn the_servers_time_counts_and_does_not_go_back() {
    let clock = ServerClock::new(None);
    let before = SystemClock.now();
    clock.set(before + Duration::from_secs(3_600));
    let ahead = clock.now();
    assert!(ahead >= before + Duration::from_secs(3_600));
    clock.set(before);
    assert!(clock.now() >= ahead);
}

#[tokio::test]
async fn a_server_that_evicts_or_cannot_wait_for_its_disk_is_refused() {
    let server = RedisServer::start_with(&[("maxmemory-policy", "allkeys-lru")]).await;
    let refused = open(&server, Acknowledge::Fast).await.unwrap_err();
    let evicts = matches!(refused, ConnectError::Unfit(Unfit::Evicts { .. }));
    assert!(evicts, "{refused}");

    server
        .cli(&["CONFIG", "SET", "maxmemory-policy", "noeviction"])
        .await;
    open(&server, Acknowledge::Fast).await.unwrap();
    let version = server.cli(&["INFO", "server"]).await;
    if version.contains("redis_version:7.0") {
        let refused = open(&server, Acknowledge::Durable).await.unwrap_err();
        assert!(
            refused.to_string().contains("appendfsync everysec"),
            "{refused}"
        );
    }
    server
        .cli(&["CONFIG", "SET", "appendfsync", "always"])
        .await;
    let queue = open(&server, Acknowledge::Durable).await.unwrap();
    queue.open_batch(batch("b")).await.unwrap();
}

#[tokio::test]
async fn above_four_fifths_of_its_memory_new_work_is_refused_and_the_rest_goes_on() {
    let server = RedisServer::start_with(&[("maxmemory", "20mb")]).await;
    let queue = open(&server, Acknowledge::Fast).await.unwrap();
    queue.open_batch(batch("b")).await.unwrap();
    let big = "x".repeat(100_000);
    for n in 0..170 {
        server.cli(&["SET", &format!("filler{n}"), &big]).await;
    }
    wait_until(&queue, "it to be full", |seen| {
        matches!(seen, Condition::Full { .. })
    })
    .await;
    let refused = queue.open_batch(batch("c")).await.unwrap_err().to_string();
    assert!(
        refused.contains("of 20 MiB") && refused.contains("maxmemory"),
        "{refused}"
    );
    queue.tick(10).await.unwrap();
    server.cli(&["CONFIG", "SET", "maxmemory", "100mb"]).await;
    wait_until(&queue, "it to serve", |seen| *seen == Condition::Serving).await;
    queue.open_batch(batch("c")).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_away_is_known_at_once_and_one_that_is_another_is_told() {
    let mut server = RedisServer::start().await;
    let queue = open(&server, Acknowledge::Fast).await.unwrap();
    let mut events = queue.events();
    server.pause();
    wait_until(&queue, "it to be away", |seen| {
        matches!(seen, Condition::Away { .. })
    })
    .await;
    let asked = tokio::time::timeout(Duration::from_secs(1), queue.open_batch(batch("b")));
    let refused = asked.await.expect("without asking the server").unwrap_err();
    assert!(refused.to_string().contains("did not answer"), "{refused}");
    server.resume();
    wait_until(&queue, "it to serve", |seen| *seen == Condition::Serving).await;

    // It comes back empty.
    server.cli(&["FLUSHALL"]).await;
    server.restart().await;
    let told = async {
        loop {
            if let Ok(Event::Missed) = events.recv().await {
                return;
            }
        }
    };
    tokio::time::timeout(SEEN_DEADLINE, told)
        .await
        .expect("listeners are told");
    wait_for("it to take work", SEEN_DEADLINE, || {
        queue.open_batch(batch("b"))
    })
    .await;
    // It is told again how many shards there are, and their layout.
    wait_for("the shard to be joined", SEEN_DEADLINE, || async {
        let known = server.cli(&["HMGET", "{test:0}:m", "shards", "v"]).await;
        let fields: Vec<&str> = known.split_whitespace().collect();
        let joined = fields == ["1", &LAYOUT.to_string()];
        joined.then_some(()).ok_or(known)
    })
    .await;
}
