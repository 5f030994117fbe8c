//! What may happen to a cluster beside the death of its parts: a replica of Redis takes the primary's place, clocks are
//! wrong, and the object store goes away and crawls. 200 rollouts each time.

use std::net::SocketAddr;
use std::time::Duration;

use espalier_tests::harness::cluster::{PROJECTS, Setup, key};
use espalier_tests::harness::model;
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::proxy::{Direction, Network, Proxy};
use espalier_tests::harness::redis::RedisServer;
use espalier_tests::harness::s3::S3Server;
use espalier_tests::harness::world::{LEASE_MS, World, toy_jobs};

const JOBS: usize = 200;
const SLOTS: u32 = 8;
const HOUR_US: i64 = 3_600_000_000;

async fn start(redis: RedisServer, setup: Setup, workers: usize) -> World {
    let setup = Setup {
        lease_ttl_ms: LEASE_MS,
        model_url: model::start().await,
        ..setup
    };
    World::start(redis, setup, workers, SLOTS).await
}

/// Puts `next` in the place of the present primary, for those who ask from now on, and gives the old one.
fn move_to(world: &mut World, next: RedisServer) -> RedisServer {
    let address: SocketAddr = ([127, 0, 0, 1], next.port()).into();
    world.to_redis.retarget(address);
    world.to_redis.cut();
    std::mem::replace(&mut world.redis, next)
}

async fn replicate(replica: &RedisServer, primary: &RedisServer) {
    let port = primary.port().to_string();
    let answer = replica.cli(&["REPLICAOF", "127.0.0.1", &port]).await;
    assert_eq!(answer.trim(), "OK");
    replica.wait_until_in_sync().await;
}

/// Twice: the primary is dead, and then it lives on beside the new one, which takes writes that nobody may acknowledge.
#[tokio::test]
async fn a_promoted_replica_has_everything_that_was_acknowledged() {
    let primary = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let replica = RedisServer::start_replica(&primary).await;
    let setup = Setup {
        acknowledge: "replicated",
        ..Setup::new("", "")
    };
    let mut world = start(primary, setup, 2).await;
    world.submit("b", &toy_jobs(JOBS)).await;
    world.after("b", 20).await;
    world.redis.kill();
    replica.promote().await;
    let mut old = move_to(&mut world, replica);
    // A write is acknowledged when a replica has it.
    old.restart().await;
    replicate(&old, &world.redis).await;

    world.after("b", 90).await;
    old.promote().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let old = move_to(&mut world, old);
    replicate(&old, &world.redis).await;
    world.check("b", JOBS).await;
}

/// Both are paused past their leases on the way, by which everybody's clock matters most.
#[tokio::test]
async fn clocks_of_workers_that_are_wrong_by_an_hour_change_nothing() {
    let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let mut world = start(redis, Setup::new("", ""), 0).await;
    world.add_worker_with_clock("+1h");
    world.add_worker_with_clock("-1h");
    world.submit("b", &toy_jobs(JOBS)).await;
    for (number, succeeded) in [(0, 20), (1, 60)] {
        world.after("b", succeeded).await;
        world.workers[number].process.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_secs(3)).await;
        world.workers[number].process.signal(Signal::CONT);
    }
    for (project, result) in PROJECTS.iter().zip(world.check("b", JOBS).await) {
        let mut wrong = [false; 2];
        for job in result.jobs.values() {
            let manifest = world.cluster.manifest(&key(project, "b", &job.id));
            let published = i64::try_from(manifest.created_at_us.0).unwrap();
            let ahead = published - i64::try_from(job.ended_at_us).unwrap();
            let is_hour = (ahead.abs() - HOUR_US).abs() < HOUR_US / 10;
            assert!(is_hour, "a clock was wrong by {ahead} µs, not by an hour");
            wrong[usize::from(ahead > 0)] = true;
        }
        assert_eq!(wrong, [true; 2], "one worker did everything of {project}");
    }
}

#[tokio::test]
async fn a_store_that_is_away_for_20_s_and_then_crawls_for_a_minute_costs_a_cluster_time_only() {
    let redis = RedisServer::start_with(&[("appendfsync", "always")]).await;
    let server = S3Server::start().await;
    let to_store = Proxy::start(server.address()).await;
    let endpoint = format!("http://{}", to_store.address());
    let environment = S3Server::environment_at(&endpoint);
    // Shorter than both faults, and longer than a machine that is busy makes a renewal wait.
    let setup = Setup {
        lease_ttl_ms: 10_000,
        store_url: Some(S3Server::store_url("cluster")),
        environment: environment.map(|(k, v)| (k.to_owned(), v)).into(),
        ..Setup::new("", &model::start().await)
    };
    let mut world = World::start(redis, setup, 2, SLOTS).await;
    world.submit("b", &toy_jobs(JOBS)).await;
    let crawling = Direction {
        delay: Duration::from_secs(1),
        stopped: false,
        bytes_per_s: Some(1000),
    };
    let away = Network {
        refusing: true,
        ..Network::default()
    };
    let slow = Network {
        refusing: false,
        to_target: crawling,
        to_client: crawling,
    };
    for (succeeded, network, seconds) in [(20, away, 20), (60, slow, 60)] {
        world.after("b", succeeded).await;
        to_store.set(network);
        to_store.cut();
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        to_store.heal();
        // A connection that was stuck is given up at once.
        to_store.cut();
    }
    for result in world.check("b", JOBS).await {
        let spent = |job: &&espalier_proto::v1::Job| job.infra_failures > 0;
        let spent: Vec<_> = result.jobs.values().filter(spent).collect();
        assert!(spent.is_empty(), "{spent:#?}");
    }
}
