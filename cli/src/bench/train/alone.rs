//! One case in this process: what is found is told as lines of JSON.

use espalier_infer_worker::bench::{DeviceOptions, ceilings};
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_train_worker::bench::{CPU, GPU, Limits, on_cpu, on_gpu};
use espalier_train_worker::engine::Device;
use serde_json::{Value, json};

use super::{DATA, TrainArgs, data};
use crate::exit::{Exit, Outcome, Problem};
use crate::output::Out;

/// Measures the first of the cases that were chosen.
pub async fn alone(out: Out, args: &TrainArgs) -> Outcome {
    let args = args.clone();
    let measured = blocking("bench.train", move || measure(out, &args)).await;
    measured.map_err(|error| Problem::failed(error.to_string()))??;
    Ok(Exit::Ok)
}

fn measure(out: Out, args: &TrainArgs) -> Result<(), Problem> {
    let name = args.chosen()?.first().copied().unwrap_or(DATA).to_owned();
    let rounds = args.rounds as usize;
    // A reader that is gone has no use for the rest, and ends this process.
    let mut tell = |fact: Value| drop(out.event(&fact));
    match args.device()? {
        Device::Cpu { threads } => match CPU.iter().find(|case| case.name == name) {
            Some(case) => on_cpu(case, threads, rounds, &mut tell).map_err(failed),
            None => data::measure(threads, rounds, &mut tell),
        },
        Device::Cuda { ordinal } => {
            let options = DeviceOptions {
                ordinal,
                libraries: args.libraries.clone(),
                kernels: args.kernels.clone(),
                ..DeviceOptions::default()
            };
            let reached = ceilings(&options).map_err(failed)?;
            tell(
                json!({"peak_flop_per_s": reached.flop_per_s, "copy_bytes_per_s": reached.bytes_per_s}),
            );
            let case = GPU.iter().find(|case| case.name == name);
            let case = case.ok_or_else(|| Problem::refused(format!("there is no case {name}")))?;
            let limits = Limits {
                peak_flop_per_s: reached.flop_per_s,
                memory_bytes: args.memory.map(|gib| u64::from(gib) << 30),
            };
            on_gpu(case, &options, limits, rounds, &mut tell).map_err(failed)
        }
    }
}

fn failed(error: impl std::error::Error + 'static) -> Problem {
    Problem::failed(error_chain(&error))
}
