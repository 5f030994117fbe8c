//! The CUDA side: every kernel compiles for every architecture, wherever NVRTC is; and where a GPU is, the ops are right.
//! A test whose needs are not met shows as ignored, with the reason.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod attention;
mod compiles;
mod device_tests;
mod on_device;
#[path = "../ops/mod.rs"]
mod ops;
mod runner;
#[path = "../train/mod.rs"]
mod train;

use espalier_kernels::train::Attention;
use runner::{Needs, Test};

fn main() -> std::process::ExitCode {
    let compile = compiles::TESTS.iter().map(|(name, run)| Test {
        name,
        needs: Needs::Nvrtc,
        run: Box::new(run),
    });
    let shared = ops::TESTS.iter().map(|(name, body)| Test {
        name,
        needs: Needs::Device,
        run: Box::new(move || body(&on_device::Cuda::open())),
    });
    let training = train::TESTS.iter().map(|(name, body)| Test {
        name,
        needs: Needs::Device,
        run: Box::new(move || body(&mut on_device::training(Attention::Own))),
    });
    let attention = attention::TESTS.iter().map(|(name, run)| Test {
        name,
        needs: Needs::Cudnn,
        run: Box::new(run),
    });
    let own = device_tests::TESTS.iter().map(|(name, run)| Test {
        name,
        needs: Needs::Device,
        run: Box::new(run),
    });
    let all = compile.chain(shared).chain(training).chain(attention);
    runner::run(all.chain(own).collect())
}
