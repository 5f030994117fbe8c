//! Two coordinators and two workers on one Redis, of which each part is killed, paused and cut off while 200 rollouts
//! run. After each round: no acknowledged job lost, one accepted result a job, counters that add up, and manifests that
//! hold what they name.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_tests::harness::client::Client;
use espalier_tests::harness::cluster::{Cluster, Worker};
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::proxy::{Direction, Network, Proxy};
use espalier_tests::harness::redis::RedisServer;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(180);
/// Far shorter than any of the faults, so that leases would end if nothing were done about it.
const LEASE_MS: u64 = 2_000;
const JOBS: usize = 200;

struct World {
    redis: RedisServer,
    /// Between the coordinators and Redis.
    to_redis: Proxy,
    cluster: Cluster,
    workers: Vec<Worker>,
    client: Client,
}

impl World {
    /// Everything runs, and the batch `b` is submitted. Redis syncs each write: with `everysec` one that is killed in the
    /// middle of a sync has lost what it held back, which `docs/decisions/redis.md` says.
    async fn start() -> Self {
        let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
        let to_redis = Proxy::start(([127, 0, 0, 1], redis.port()).into()).await;
        let queue = format!("redis://{}", to_redis.address());
        let cluster = Cluster::start_on(&queue, 2, &model::start().await, LEASE_MS).await;
        let workers = vec![cluster.worker("one", 8), cluster.worker("two", 8)];
        let mut client = cluster.client().await;
        let accepted = client.submit("b", &jobs()).await.accepted;
        assert_eq!(accepted as usize, JOBS);
        Self {
            redis,
            to_redis,
            cluster,
            workers,
            client,
        }
    }

    async fn after(&self, succeeded: u64) {
        self.client
            .wait_until_succeeded("b", succeeded, DEADLINE)
            .await;
    }

    /// What must hold at the end, whatever happened on the way.
    async fn check(mut self) {
        let result = self.client.wait("b", DEADLINE).await;
        let counts = result.batch.counts.as_ref().unwrap();
        assert_eq!(result.jobs.len(), JOBS, "a job was lost");
        assert_eq!(counts.succeeded as usize, JOBS, "{counts:?}");
        let others = [
            counts.blocked,
            counts.delayed,
            counts.ready,
            counts.leased,
            counts.dead,
            counts.cancelled,
        ];
        assert_eq!(others, [0; 6], "{counts:?}");
        assert_eq!(result.solved(), JOBS, "{:#?}", result.unsolved());
        for job in result.jobs.values() {
            assert_eq!(
                job.handler_failures, 0,
                "{} spent an attempt of its own",
                job.id
            );
            self.cluster.manifest(&self.cluster.key("b", &job.id));
        }
        for worker in &mut self.workers {
            let ended = worker.process.terminate(Duration::from_secs(60)).await;
            assert!(ended.success(), "{ended:?}: {}", worker.process.log());
        }
    }
}

/// Sums, and now and then a rollout that is at work for a second, so that some are whenever something happens.
fn jobs() -> Vec<Value> {
    let sleep = json!([{"tool": "sleep", "arguments": {"ms": 1000}}, {"answer": "done"}]);
    let job = |n: usize| match n % 10 {
        0 => toy_job(&format!("job-{n:04}"), &sleep, "done"),
        _ => sum_job(&format!("job-{n:04}"), n),
    };
    (0..JOBS).map(job).collect()
}

#[tokio::test]
async fn a_redis_that_is_killed_and_started_again_loses_nothing() {
    let mut world = World::start().await;
    for succeeded in [20, 90] {
        world.after(succeeded).await;
        world.redis.kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.redis.restart().await;
    }
    world.check().await;
}

/// Longer than the silence that counts as an outage: leases are prolonged by it, and nobody's result is refused for it.
#[tokio::test]
async fn a_redis_that_stalls_ends_no_lease() {
    let world = World::start().await;
    world.after(20).await;
    world.redis.pause();
    tokio::time::sleep(Duration::from_secs(12)).await;
    world.redis.resume();
    world.check().await;
}

#[tokio::test]
async fn a_coordinator_that_is_killed_leaves_its_workers_to_the_other() {
    let mut world = World::start().await;
    world.after(20).await;
    world.cluster.coordinators[1].process.kill();
    world.after(90).await;
    world.cluster.restart_coordinator(1).await;
    world.after(110).await;
    world.cluster.coordinators[0].process.kill();
    world.client = world
        .cluster
        .client_at(world.cluster.coordinators[1].address)
        .await;
    world.check().await;
}

#[tokio::test]
async fn a_coordinator_that_is_paused_goes_on_without_a_second_result() {
    let world = World::start().await;
    for (number, succeeded) in [(0, 20), (1, 60)] {
        world.after(succeeded).await;
        let process = &world.cluster.coordinators[number].process;
        process.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_secs(4)).await;
        process.signal(Signal::CONT);
    }
    world.check().await;
}

#[tokio::test]
async fn workers_that_die_or_pause_past_their_leases_cost_time_only() {
    let mut world = World::start().await;
    world.after(20).await;
    world.workers[0].process.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_secs(4)).await;
    world.workers[0].process.signal(Signal::CONT);
    world.after(60).await;
    world.workers[1].process.kill();
    world.workers[1] = world.cluster.worker("three", 8);
    world.check().await;
}

/// Commands that were carried out and whose answers never come, connections that break, an answer a quarter of a second.
#[tokio::test]
async fn a_bad_network_to_redis_costs_time_only() {
    let world = World::start().await;
    let silent = Network {
        to_client: Direction {
            stopped: true,
            ..Direction::default()
        },
        ..Network::default()
    };
    for (succeeded, network) in [
        (15, silent),
        (45, Network::partitioned()),
        (75, Network::slow(Duration::from_millis(250))),
    ] {
        world.after(succeeded).await;
        world.to_redis.set(network);
        tokio::time::sleep(Duration::from_secs(3)).await;
        world.to_redis.cut();
        world.to_redis.heal();
    }
    world.check().await;
}

/// A worker whose results arrive and whose acknowledgements do not says the same again and is believed once.
#[tokio::test]
async fn a_worker_that_hears_no_answers_is_believed_once() {
    let mut world = World::start().await;
    let proxy = Proxy::start(world.cluster.coordinators[0].address).await;
    world
        .workers
        .push(world.cluster.worker_at(&[proxy.address()], "behind", 8));
    for succeeded in [40, 80, 120] {
        world.after(succeeded).await;
        let deaf = Network {
            to_client: Direction {
                stopped: true,
                ..Direction::default()
            },
            ..Network::default()
        };
        proxy.set(deaf);
        tokio::time::sleep(Duration::from_millis(700)).await;
        proxy.cut();
        proxy.heal();
    }
    world.check().await;
}

#[tokio::test]
async fn a_full_redis_takes_nothing_new_and_brings_what_it_has_to_its_end() {
    let mut world = World::start().await;
    world.after(20).await;
    world
        .redis
        .cli(&["CONFIG", "SET", "maxmemory", "1mb"])
        .await;
    let refused = "jobs of another batch";
    let started = std::time::Instant::now();
    loop {
        let error = world.client.try_submit("late", &jobs()[..1]).await;
        match error {
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
                assert!(status.message().contains("maxmemory"), "{status}");
                break;
            }
            Ok(_) => assert!(
                started.elapsed() < Duration::from_secs(10),
                "{refused} are taken"
            ),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.after(JOBS as u64).await;
    world.redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    let started = std::time::Instant::now();
    while let Err(status) = world.client.try_submit("later", &jobs()[..1]).await {
        assert!(started.elapsed() < Duration::from_secs(10), "{status}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.client.wait("later", DEADLINE).await;
    world.check().await;
}
