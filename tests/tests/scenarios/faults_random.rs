//! Random faults at random moments over a cluster, round after round. Each round has a few dozen jobs and a seed of its
//! own, from which every decision follows; the history checker judges each.

use std::time::Duration;

use espalier_tests::harness::client::Client;
use espalier_tests::harness::model::{self, sum_job, toy_job};
use espalier_tests::harness::process::Signal;
use espalier_tests::harness::proxy::{Network, Proxy};
use espalier_tests::harness::soak;
use espalier_tests::harness::world::{Parts, World, submit_until_acknowledged};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::time::Instant;

/// Of each project. Chunks come while the faults do.
const CHUNKS: u32 = 3;
const CHUNK_JOBS: usize = 4;
const SLOTS: u32 = 6;
const LEASE_MS: u64 = 1_000;
/// The last fault of a round begins before this.
const BEGIN_MS_MAX: u64 = 700;
/// Around the lease, so that some outlast it.
const LASTS_MS: std::ops::Range<u64> = 100..1_300;

/// What can be hurt, each once a round.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Worker(usize),
    Coordinator(usize),
    Redis,
    ToRedis,
    ToCoordinator(usize),
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// And started again.
    Kill,
    Pause,
    /// Connections are reset, and new ones too while it lasts.
    Refuse,
    Slow,
    /// Nothing arrives where one connected to.
    Mute,
    /// Nothing comes back.
    Deaf,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    part: Part,
    fault: Fault,
    begin: Duration,
    end: Duration,
}

const PARTS: [Part; 8] = [
    Part::Worker(0),
    Part::Worker(1),
    Part::Coordinator(0),
    Part::Coordinator(1),
    Part::Redis,
    Part::ToRedis,
    Part::ToCoordinator(0),
    Part::ToCoordinator(1),
];

/// Two to four parts and what becomes of them. The same for the same numbers.
fn plan(random: &mut StdRng) -> Vec<Planned> {
    let mut parts = PARTS;
    parts.shuffle(random);
    let count = random.random_range(2..=4);
    let one = |part: Part| {
        let faults: &[Fault] = match part {
            Part::Worker(_) | Part::Coordinator(_) | Part::Redis => &[Fault::Kill, Fault::Pause],
            Part::ToRedis | Part::ToCoordinator(_) => {
                &[Fault::Refuse, Fault::Slow, Fault::Mute, Fault::Deaf]
            }
        };
        let begin = Duration::from_millis(random.random_range(0..BEGIN_MS_MAX));
        let lasts = Duration::from_millis(random.random_range(LASTS_MS));
        Planned {
            part,
            fault: *faults.choose(random).expect("there are some"),
            begin,
            end: begin + lasts,
        }
    };
    parts.into_iter().take(count).map(one).collect()
}

/// Plays the plan. What was killed is started again at the end, Redis first: a coordinator that finds no queue ends.
async fn play(world: &mut World, plan: &[Planned]) {
    let started = Instant::now();
    let mut steps: Vec<(Duration, bool, Planned)> = Vec::new();
    for planned in plan {
        steps.push((planned.begin, true, *planned));
        steps.push((planned.end, false, *planned));
    }
    steps.sort_by_key(|(at, ..)| *at);
    for (at, begins, Planned { part, fault, .. }) in steps {
        tokio::time::sleep_until(started + at).await;
        match (fault, begins) {
            (Fault::Kill, true) => kill(world, part),
            (Fault::Kill, false) if part == Part::Redis => world.redis.restart().await,
            (Fault::Kill, false) => {}
            (Fault::Pause, true) => signal(world, part, Signal::STOP),
            (Fault::Pause, false) => signal(world, part, Signal::CONT),
            (_, true) => disturb(proxy(world, part), fault),
            (_, false) => {
                proxy(world, part).cut();
                proxy(world, part).heal();
            }
        }
    }
    let killed = plan.iter().filter(|planned| planned.fault == Fault::Kill);
    for planned in killed {
        match planned.part {
            Part::Coordinator(number) => world.cluster.restart_coordinator(number).await,
            Part::Worker(number) => world.replace_worker(number),
            _ => {}
        }
    }
}

fn kill(world: &mut World, part: Part) {
    match part {
        Part::Worker(number) => world.kill_worker(number),
        Part::Coordinator(number) => world.kill_coordinator(number),
        _ => world.redis.kill(),
    }
}

fn signal(world: &World, part: Part, signal: Signal) {
    match part {
        Part::Worker(number) => world.workers[number].process.signal(signal),
        Part::Coordinator(number) => world.cluster.coordinators[number].process.signal(signal),
        _ if signal == Signal::STOP => world.redis.pause(),
        _ => world.redis.resume(),
    }
}

fn proxy(world: &World, part: Part) -> &Proxy {
    match part {
        Part::ToCoordinator(number) => &world.to_coordinators[number],
        _ => &world.to_redis,
    }
}

fn disturb(proxy: &Proxy, fault: Fault) {
    let network = match fault {
        Fault::Slow => Network::slow(Duration::from_millis(200)),
        Fault::Mute => Network::mute(),
        Fault::Deaf => Network::deaf(),
        _ => Network::refusing(),
    };
    proxy.set(network);
    if network.refusing {
        proxy.cut();
    }
}

/// Sums, and one in four that is at work for a while.
fn chunk(chunk: u32) -> Vec<Value> {
    let steps = json!([{"tool": "sleep", "arguments": {"ms": 400}}, {"answer": "done"}]);
    let id = |n: usize| format!("job-{chunk}-{n}");
    (0..CHUNK_JOBS)
        .map(|n| match n {
            0 => toy_job(&id(n), &steps, "done"),
            _ => sum_job(&id(n), n),
        })
        .collect()
}

/// Submits the chunks of both projects, with a while between them, each to a coordinator of its own.
async fn submit(
    clients: &[Client; 2],
    batch: &str,
    waits: &[Duration],
) -> Vec<(usize, Vec<espalier_core::id::JobKey>)> {
    let mut acknowledged = Vec::new();
    for (n, wait) in (0..CHUNKS).zip(waits) {
        for (project, client) in clients.iter().enumerate() {
            let keys = submit_until_acknowledged(client, project, batch, n, &chunk(n)).await;
            acknowledged.push((project, keys));
        }
        tokio::time::sleep(*wait).await;
    }
    acknowledged
}

/// What Redis says of results may be lost: a worker that dies, or is told that its lease is over, asks no more.
fn loses_answers(plan: &[Planned]) -> bool {
    plan.iter()
        .any(|one| matches!(one.part, Part::Redis | Part::ToRedis))
}

async fn round(world: &mut World, batch: &str, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let plan = plan(&mut random);
    let wait = |_| Duration::from_millis(random.random_range(0..400));
    let waits: Vec<Duration> = (0..CHUNKS).map(wait).collect();
    let clients = world.clients.clone();
    world.close_holes();
    if loses_answers(&plan) {
        world.expect_holes();
    }
    println!("{batch}: {plan:?}");
    let (chunks, ()) = tokio::join!(submit(&clients, batch, &waits), play(world, &plan));
    for (project, keys) in chunks {
        world.acknowledged(keys);
        world.close(project, batch).await;
    }
    for result in world.wait(batch).await {
        assert_eq!(result.jobs.len(), CHUNKS as usize * CHUNK_JOBS);
        assert!(result.unsolved().is_empty(), "{:#?}", result.unsolved());
    }
    world.judge_batch(batch).await;
}

/// `ESPALIER_SOAK_ROUNDS` and `ESPALIER_SOAK_SEED` make more of it, or the same again.
#[tokio::test]
async fn random_faults_break_no_rule() {
    let (rounds, seed) = (soak::rounds(), soak::seed());
    let mut world = World::start(Parts::new(&model::start().await, LEASE_MS, SLOTS)).await;
    let other = world.cluster.clients_at(world.cluster.addresses()[1]).await;
    world.clients[1] = other[1].clone();
    for n in 0..rounds {
        let seed = seed.wrapping_add(n);
        println!("round {n}: ESPALIER_SOAK_SEED={seed} ESPALIER_SOAK_ROUNDS=1 replays it");
        let started = Instant::now();
        Box::pin(round(&mut world, &format!("r{n}"), seed)).await;
        println!("round {n} took {:?}", started.elapsed());
    }
    world.stop_workers().await;
    world.judge();
}

#[test]
fn a_seed_replays_the_decisions_of_its_round() {
    let of = |seed| format!("{:?}", plan(&mut StdRng::seed_from_u64(seed)));
    assert_eq!(of(7), of(7));
    let different: std::collections::BTreeSet<String> = (0..100).map(of).collect();
    assert!(different.len() > 90, "{} plans", different.len());
}
