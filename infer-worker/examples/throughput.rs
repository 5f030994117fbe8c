//! Measures the engine on a GPU beside the baseline's workloads, with random weights; JSON lines on standard output.
//! `throughput --model 0.6b --tests b1,bench,agent`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use espalier_infer_worker::bench::{Plan, Shape, Workload, run};
use espalier_kernels::cuda::Options;

/// What to measure.
#[derive(Parser)]
struct Arguments {
    /// 0.6b or 4b.
    #[arg(long, default_value = "0.6b", value_parser = shape)]
    model: Shape,
    /// Of bench, b1 and agent.
    #[arg(long, value_delimiter = ',', default_value = "b1,bench,agent", value_parser = workload)]
    tests: Vec<Workload>,
    /// The GPU's number.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Folders with NVRTC and cuBLASLt, where the loader does not find them.
    #[arg(long)]
    libraries: Vec<PathBuf>,
    /// How often bench and agent are run.
    #[arg(long, default_value_t = 2)]
    repeats: u32,
}

fn shape(name: &str) -> Result<Shape, String> {
    Shape::of(name).ok_or_else(|| "must be 0.6b or 4b".to_owned())
}

fn workload(name: &str) -> Result<Workload, String> {
    Workload::of(name).ok_or_else(|| "must be bench, b1 or agent".to_owned())
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let plan = Plan {
        shape: arguments.model,
        workloads: arguments.tests,
        device: Options {
            ordinal: arguments.device,
            libraries: arguments.libraries,
            ..Options::default()
        },
        repeats: arguments.repeats,
    };
    let ended = run(&plan, &mut |line| println!("{line}")).await;
    let Err(error) = ended else {
        return ExitCode::SUCCESS;
    };
    eprint!("error: {error}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        eprint!(": {cause}");
        source = cause.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
