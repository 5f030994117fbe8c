//! The engine on a GPU: vLLM's workloads on random weights, and what vLLM reaches.

use std::path::PathBuf;

use clap::Args;
use espalier_infer_worker::bench::{DeviceOptions, Plan, Shape, Workload, run};
use espalier_runtime::telemetry::error_chain;
use serde_json::{Value, json};

use super::super::figures::{Bound, Figures, Headline};
use crate::exit::Problem;
use crate::output::note;

/// The bound of the issue, in times of vLLM's figure.
const RATIO_MIN: f64 = 0.3;

/// Options that concern a GPU alone.
#[derive(Args, Clone, Debug)]
pub struct GpuArgs {
    /// On a GPU: 0.6b or 4b
    #[arg(long, value_name = "SHAPE", default_value = "0.6b", value_parser = shape)]
    pub shape: Shape,
    /// On a GPU: of b1, bench and agent
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "b1,bench,agent", value_parser = workload)]
    pub workloads: Vec<Workload>,
    /// On a GPU: folders with NVRTC and cuBLASLt, where the loader does not find them
    #[arg(long, value_name = "FOLDER")]
    pub libraries: Vec<PathBuf>,
}

fn shape(name: &str) -> Result<Shape, String> {
    Shape::of(name).ok_or_else(|| "must be 0.6b or 4b".to_owned())
}

fn workload(name: &str) -> Result<Workload, String> {
    Workload::of(name).ok_or_else(|| "must be b1, bench or agent".to_owned())
}

/// vLLM 0.26 on an H100 with 80 GB, measured with the same workloads.
struct Peer {
    test: &'static str,
    /// The field of our figure.
    field: &'static str,
    unit: &'static str,
    small: f64,
    medium: f64,
    /// Times: less is better.
    is_time: bool,
}

const PEERS: [Peer; 3] = [
    Peer {
        test: "b1",
        field: "tokens_per_s",
        unit: "tokens/s",
        small: 584.0,
        medium: 227.0,
        is_time: false,
    },
    Peer {
        test: "bench",
        field: "output_tokens_per_s",
        unit: "tokens/s",
        small: 18_641.0,
        medium: 10_170.0,
        is_time: false,
    },
    Peer {
        test: "agent",
        field: "total_s",
        unit: "s",
        small: 14.5,
        medium: 24.1,
        is_time: true,
    },
];

/// Measures on the GPU of that number.
pub async fn measure(ordinal: u32, args: &GpuArgs, repeats: u32) -> Result<Figures, Problem> {
    let plan = Plan {
        shape: args.shape,
        workloads: args.workloads.clone(),
        device: DeviceOptions {
            ordinal: ordinal as usize,
            libraries: args.libraries.clone(),
            ..DeviceOptions::default()
        },
        repeats,
    };
    let mut lines = Vec::new();
    let mut tell = |line: Value| {
        note(format!(
            "measured: {}",
            line["test"].as_str().unwrap_or_default()
        ));
        lines.push(line);
    };
    let ended = run(&plan, &mut tell).await;
    ended.map_err(|error| Problem::failed(error_chain(&error)))?;
    let headlines = headlines(args.shape, &lines);
    Ok(Figures {
        values: json!({ "device": format!("cuda:{ordinal}"), "lines": lines }),
        headlines,
    })
}

/// The best of each workload, beside vLLM's best.
fn headlines(shape: Shape, lines: &[Value]) -> Vec<Headline> {
    let mut headlines = Vec::new();
    for peer in &PEERS {
        let of_test = lines.iter().filter(|line| line["test"] == peer.test);
        let values = of_test.filter_map(|line| line[peer.field].as_f64());
        let best = match peer.is_time {
            true => values.min_by(f64::total_cmp),
            false => values.max_by(f64::total_cmp),
        };
        let Some(best) = best else { continue };
        let theirs = match shape {
            Shape::Small => peer.small,
            Shape::Medium => peer.medium,
        };
        let ratio = match peer.is_time {
            true => theirs / best,
            false => best / theirs,
        };
        let name = format!("{} {}", shape.name(), peer.test);
        headlines.push(Headline::new(name.clone(), best, peer.unit));
        let times = Headline::new(
            format!("{name}, in times of vLLM 0.26 on an H100"),
            ratio,
            "",
        );
        headlines.push(times.bound(Bound::AtLeast(RATIO_MIN)));
    }
    let steps = lines.iter().filter(|line| line["test"] == "op times");
    headlines.extend(steps.filter_map(|line| {
        let what = format!(
            "{} {}, of the roofline",
            shape.name(),
            line["step"].as_str()?
        );
        Some(Headline::new(what, line["share_of_roofline"].as_f64()?, ""))
    }));
    headlines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_repeat_is_held_against_vllm() {
        let lines = [
            json!({"test": "agent", "total_s": 29.0}),
            json!({"test": "agent", "total_s": 58.0}),
            json!({"test": "b1", "tokens_per_s": 146.0}),
            json!({"test": "op times", "step": "decode of 1 at 256", "share_of_roofline": 0.5}),
        ];
        let values: Vec<f64> = headlines(Shape::Small, &lines)
            .iter()
            .map(|one| one.value)
            .collect();
        assert_eq!(values, [146.0, 0.25, 29.0, 0.5, 0.5]);
    }
}
