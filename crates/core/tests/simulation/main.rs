//! Coordinators, workers, a client, the queue and the object store on a virtual clock: orders of messages, deaths and
//! pauses that real processes rarely meet. The queue is the pure state machine; everybody else is played here by the
//! rules of `ARCHITECTURE.md`: results are kept until they are acknowledged, a manifest is created once, and whoever
//! holds the lease adopts the one that it finds.
//!
//! A seed is a run. A run that breaks a rule names its seed, which plays it again:
//! `ESPALIER_SIMULATION_SEED=7 cargo test -p espalier-core --test simulation`.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod chance;
mod worker;
mod world;

use world::World;

/// Seeds that every test run plays: about a second of work.
const SEEDS: std::ops::Range<u64> = 0..400;

#[test]
fn no_order_of_faults_loses_a_job_or_accepts_two_results() {
    let seeds = match option_env_seed() {
        Some(seed) => seed..seed + 1,
        None => SEEDS,
    };
    let mut seen = world::Seen::default();
    for seed in seeds.clone() {
        let run = std::panic::catch_unwind(|| World::new(seed).run());
        match run {
            Ok(of_run) => seen.add(&of_run),
            Err(_) => panic!("seed {seed} breaks a rule: see above"),
        }
    }
    if seeds == SEEDS {
        seen.check_that_faults_had_an_effect();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test reads which seed to play from its caller"
)]
fn option_env_seed() -> Option<u64> {
    std::env::var("ESPALIER_SIMULATION_SEED").ok()?.parse().ok()
}
