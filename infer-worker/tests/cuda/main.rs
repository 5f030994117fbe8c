//! The executor on a GPU against the model in f32 on the CPU. Where there is no GPU, all of it shows as ignored.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod adapters;
mod drawing;
mod failures;
mod greedy;
mod reference;
#[path = "../../../crates/kernels/tests/cuda/runner.rs"]
mod runner;
mod serve;

use runner::{Needs, Test};

fn main() -> std::process::ExitCode {
    let all = [
        greedy::TESTS,
        adapters::TESTS,
        drawing::TESTS,
        failures::TESTS,
    ];
    let tests = all.into_iter().flatten().map(|(name, run)| Test {
        name,
        needs: Needs::Device,
        run: Box::new(run),
    });
    runner::run(tests.collect())
}
