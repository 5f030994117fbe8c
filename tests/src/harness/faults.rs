//! What may happen to a world, each fault from its beginning to its end, while rollouts are in progress.
//!
//! A fault sees to it that it strikes: rollouts run when it begins, and not all have ended when it is over, unless only
//! one of two alike was hurt, and the other may have done all the rest. Scenarios put faults in an order, over whichever
//! rollouts, and judge the end.

use std::time::Duration;

use espalier_proto::v1::{Counts, Job, JobState};
use tonic::Code;

use super::client::BatchResult;
use super::cluster::{PROJECTS, key};
use super::process::{Process, Signal};
use super::proxy::{Network, Proxy};
use super::redis::RedisServer;
use super::store::FarStore;
use super::world::{BATCH, DEADLINE, World};
use super::{toy, wait_for};

/// How long Redis is dead.
const DEAD: Duration = Duration::from_secs(1);
/// Longer than the silence that counts as an outage of Redis.
const STALLED: Duration = Duration::from_secs(12);
/// How long two servers take themselves for the primary.
const TWO_PRIMARIES: Duration = Duration::from_secs(2);
/// What a slow network adds to each way.
const DELAY: Duration = Duration::from_millis(250);
/// How long it is slow. Rollouts go on meanwhile, and few of them may end.
const DELAYED: Duration = Duration::from_secs(3);
/// How long the object store is away.
pub const STORE_AWAY: Duration = Duration::from_secs(20);
/// How long it crawls.
pub const STORE_CRAWLS: Duration = Duration::from_secs(60);
/// How long the look of the coordinators at the server's memory may take.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);
/// How long no rollout may run while there are some left.
const IDLE_MAX: Duration = Duration::from_secs(20);
const HOUR_US: i64 = 3_600_000_000;

/// Between which parts a network is bad.
#[derive(Clone, Copy, Debug)]
pub enum Link {
    /// Coordinators ask, Redis answers.
    ToRedis,
    /// Workers ask, coordinators answer.
    ToCoordinators,
}

/// Kills a worker. Another one takes its place; what the first left to itself has to go.
pub async fn kill_worker(world: &mut World, number: usize) {
    strike(world, "a worker is killed", async |world| {
        world.kill_worker(number);
        world.replace_worker(number);
    })
    .await;
}

/// Pauses a worker until its leases have ended. The other one goes on.
pub async fn pause_worker(world: &mut World, number: usize) {
    begins(world, "a worker is paused").await;
    pause(&world.workers[number].process, world.past_lease()).await;
}

/// Kills a coordinator. The clients go to the other one.
pub async fn kill_coordinator(world: &mut World, number: usize) {
    strike(world, "a coordinator is killed", async |world| {
        world.kill_coordinator(number);
        world.ask_at(1 - number).await;
    })
    .await;
}

/// Pauses a coordinator until leases of its workers would have ended. The other one goes on.
pub async fn pause_coordinator(world: &mut World, number: usize) {
    begins(world, "a coordinator is paused").await;
    let paused = &world.cluster.coordinators[number].process;
    pause(paused, world.past_lease()).await;
}

/// Kills Redis and starts it again on what it had on disk.
pub async fn kill_redis(world: &mut World) {
    strike(world, "Redis is killed", async |world| {
        world.expect_holes();
        world.redis.kill();
        tokio::time::sleep(DEAD).await;
        world.redis.restart().await;
    })
    .await;
}

/// Stalls Redis for so long that it counts as an outage.
pub async fn stall_redis(world: &mut World) {
    strike(world, "Redis stalls", async |world| {
        world.expect_holes();
        world.redis.pause();
        tokio::time::sleep(STALLED).await;
        world.redis.resume();
    })
    .await;
}

/// Redis has no room for anything new, until all that was taken has ended.
///
/// # Panics
/// If something new is taken meanwhile, or nothing afterwards.
pub async fn fill_redis(world: &mut World) {
    begins(world, "Redis is full").await;
    limit_memory(world, "1mb").await;
    let refused = wait_for("nothing new to be taken", LOOK_DEADLINE, || {
        let mut client = world.clients[0].clone();
        async move {
            match client.try_submit("late", &toy::jobs(1)).await {
                // Who has just been stalled may still be late, and is asked again.
                Err(refused) if refused.message().contains("maxmemory") => Ok(refused),
                other => Err(format!("{other:?}")),
            }
        }
    })
    .await;
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_unfinished("Redis is full", &world.counts().await);
    wait_for("what was taken to end", DEADLINE, || async {
        let counts = world.counts().await;
        (left(&counts) == 0).then_some(()).ok_or(counts)
    })
    .await;
    limit_memory(world, "0").await;
    wait_for("something new to be taken", LOOK_DEADLINE, || {
        let mut client = world.clients[0].clone();
        async move { client.try_submit("later", &toy::jobs(1)).await }
    })
    .await;
    let later = world.clients[0].wait("later", DEADLINE).await;
    assert_eq!(later.solved(), 1, "{:?}", later.unsolved());
}

/// Redis dies, and its replica takes its place. What died comes back as the replica of that.
pub async fn fail_over(world: &mut World) {
    strike(world, "Redis dies before its replica", async |world| {
        world.expect_holes();
        world.redis.kill();
        replica(world).promote().await;
        let old = move_to_replica(world);
        old.restart().await;
        // A write is acknowledged when a replica has it.
        follow(world).await;
    })
    .await;
}

/// The replica takes the place of a Redis that lives on beside it, and takes writes which nobody may acknowledge. It
/// becomes the replica after that.
pub async fn fail_over_beside_the_old(world: &mut World) {
    strike(world, "the replica is promoted", async |world| {
        world.expect_holes();
        replica(world).promote().await;
        tokio::time::sleep(TWO_PRIMARIES).await;
        move_to_replica(world);
        follow(world).await;
    })
    .await;
}

/// The network shows each of its faults, one each time that so many rollouts have succeeded.
pub async fn bad_network(world: &mut World, link: Link, after: [u64; 4]) {
    let [delays, loses_answers, holds_up_requests, parts] = after;
    if matches!(link, Link::ToRedis) {
        world.expect_holes();
    }
    world.after(delays).await;
    delay(world, link).await;
    world.after(loses_answers).await;
    lose_answers(world, link).await;
    world.after(holds_up_requests).await;
    hold_up_requests(world, link).await;
    world.after(parts).await;
    partition(world, link).await;
}

/// Everything arrives late.
pub async fn delay(world: &mut World, link: Link) {
    strike(world, &format!("{link:?} delays"), async |world| {
        disturb(world, link, Network::slow(DELAY));
        tokio::time::sleep(DELAYED).await;
        heal(world, link);
    })
    .await;
}

/// What is asked is done, and the answers are lost: that to a result which was taken among them.
pub async fn lose_answers(world: &mut World, link: Link) {
    strike(world, &format!("{link:?} loses answers"), async |world| {
        hold_up_an_answer(world, link).await;
        tokio::time::sleep(world.past_lease()).await;
        cut(world, link);
        heal(world, link);
    })
    .await;
}

/// What is asked does not arrive until leases have ended; then it does, unless somebody gave it up.
pub async fn hold_up_requests(world: &mut World, link: Link) {
    strike(
        world,
        &format!("{link:?} holds up requests"),
        async |world| {
            disturb(world, link, Network::mute());
            tokio::time::sleep(world.past_lease()).await;
            heal(world, link);
        },
    )
    .await;
}

/// Nobody hears anybody, and what was said meanwhile is lost.
pub async fn partition(world: &mut World, link: Link) {
    strike(world, &format!("{link:?} is cut off"), async |world| {
        disturb(world, link, Network::partitioned());
        tokio::time::sleep(world.past_lease()).await;
        cut(world, link);
        heal(world, link);
    })
    .await;
}

/// The object store is away.
pub async fn lose_store(world: &mut World) {
    strike(world, "the store is away", async |world| {
        far_store(world).be_away(STORE_AWAY).await;
    })
    .await;
}

/// The object store crawls.
pub async fn slow_store(world: &mut World) {
    strike(world, "the store crawls", async |world| {
        far_store(world).crawl(STORE_CRAWLS).await;
    })
    .await;
}

/// Results bear the clocks of their workers: of one that is an hour ahead, and of one that is an hour behind.
///
/// # Panics
/// If a result does not, or one worker had them all.
pub fn assert_wrong_clocks(world: &World, results: &[BatchResult; 2]) {
    let mut wrong = [false; 2];
    for (project, result) in PROJECTS.iter().zip(results) {
        let jobs = result.jobs.values();
        for job in jobs.filter(|job| job.state() == JobState::Succeeded) {
            let manifest = world.cluster.manifest(&key(project, BATCH, &job.id));
            let ahead = manifest.created_at_us.0.cast_signed() - job.ended_at_us.cast_signed();
            let is_hour = (ahead.abs() - HOUR_US).abs() < HOUR_US / 10;
            assert!(is_hour, "a clock was wrong by {ahead} µs, not by an hour");
            wrong[usize::from(ahead > 0)] = true;
        }
    }
    assert_eq!(wrong, [true; 2], "one worker did everything");
}

/// No attempt was spent on what the rollouts stand on: each lease lasted as long as it was needed.
///
/// # Panics
/// If one was.
pub fn assert_no_lease_ended(results: &[BatchResult; 2]) {
    let jobs = results.iter().flat_map(|result| result.jobs.values());
    let spent: Vec<&Job> = jobs.filter(|job| job.infra_failures > 0).collect();
    assert!(spent.is_empty(), "{spent:#?}");
}

/// Does a fault from its beginning to its end, while rollouts are in progress.
async fn strike(world: &mut World, what: &str, fault: impl AsyncFnOnce(&mut World)) {
    begins(world, what).await;
    fault(world).await;
    assert_unfinished(what, &world.counts().await);
}

/// Waits until rollouts run, which they do but for moments.
async fn begins(world: &World, what: &str) {
    let counts = wait_for("rollouts to run", IDLE_MAX, || async {
        let counts = world.counts().await;
        match counts.leased {
            0 => Err(counts),
            _ => Ok(counts),
        }
    })
    .await;
    println!("{what}: {counts:?}");
}

fn assert_unfinished(what: &str, counts: &Counts) {
    println!("not all have ended: {counts:?}");
    assert!(left(counts) > 0, "{what} too late: {counts:?}");
}

/// Jobs that have not ended.
fn left(counts: &Counts) -> u64 {
    counts.blocked + counts.delayed + counts.ready + counts.leased
}

async fn pause(process: &Process, time: Duration) {
    process.signal(Signal::STOP);
    tokio::time::sleep(time).await;
    process.signal(Signal::CONT);
}

async fn limit_memory(world: &World, maxmemory: &str) {
    let set = ["CONFIG", "SET", "maxmemory", maxmemory];
    assert_eq!(world.redis.cli(&set).await.trim(), "OK");
}

fn proxies(world: &World, link: Link) -> &[Proxy] {
    match link {
        Link::ToRedis => std::slice::from_ref(&world.to_redis),
        Link::ToCoordinators => &world.to_coordinators,
    }
}

fn disturb(world: &World, link: Link, network: Network) {
    proxies(world, link).iter().for_each(|p| p.set(network));
}

fn cut(world: &World, link: Link) {
    proxies(world, link).iter().for_each(Proxy::cut);
}

fn heal(world: &World, link: Link) {
    proxies(world, link).iter().for_each(Proxy::heal);
}

/// Holds up what is answered over `link`, until a result was taken and the answer to it is on hold. Until then the
/// answers are let go again and again, so that no lease ends: without its lease, a rollout has no result.
async fn hold_up_an_answer(world: &World, link: Link) {
    let moment = world.past_lease() / 8;
    wait_for("a result whose answer is held up", DEADLINE, || async {
        disturb(world, link, Network::deaf());
        let before = succeeded_behind(world, link).await;
        tokio::time::sleep(moment).await;
        let now = succeeded_behind(world, link).await;
        if now > before {
            return Ok(());
        }
        heal(world, link);
        tokio::time::sleep(moment).await;
        Err(now)
    })
    .await;
}

/// How many jobs have succeeded, in the eyes of whoever answers over `link`, whether or not anybody hears it.
async fn succeeded_behind(world: &World, link: Link) -> u64 {
    match link {
        Link::ToRedis => succeeded_in(&world.redis).await,
        // The clients have a way of their own.
        Link::ToCoordinators => world.counts().await.succeeded,
    }
}

/// The sum over the hashes of all batches, where `S` counts what succeeded: `docs/decisions/redis.md` has the keys.
async fn succeeded_in(redis: &RedisServer) -> u64 {
    let sum = "local sum = 0 \
               for _, batch in ipairs(redis.call('KEYS', '*}:b:*')) do \
                 sum = sum + (redis.call('HGET', batch, 'S') or 0) \
               end \
               return sum";
    let answer = redis.cli(&["EVAL", sum, "0"]).await;
    answer.trim().parse().expect("a number of jobs")
}

fn replica(world: &World) -> &RedisServer {
    world.replica.as_ref().expect("the world is replicated")
}

/// Puts the replica in the place of the primary, for those who ask from now on, and gives the old primary.
fn move_to_replica(world: &mut World) -> &mut RedisServer {
    let replica = world.replica.as_mut().expect("the world is replicated");
    std::mem::swap(&mut world.redis, replica);
    let address = ([127, 0, 0, 1], world.redis.port()).into();
    world.to_redis.retarget(address);
    world.to_redis.cut();
    replica
}

/// Makes a replica of the one that is none now.
async fn follow(world: &World) {
    let port = world.redis.port().to_string();
    let order = ["REPLICAOF", "127.0.0.1", &port];
    let answer = replica(world).cli(&order).await;
    assert_eq!(answer.trim(), "OK");
    replica(world).wait_until_in_sync().await;
}

fn far_store(world: &World) -> &FarStore {
    world.store.as_ref().expect("the world has a far store")
}
