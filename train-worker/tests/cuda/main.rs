//! The whole engine on a GPU, through its public face: what must be near the golden files that the CPU equals, and what
//! must be equal bit for bit. Where no GPU is, each test shows as ignored.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod golden;
#[path = "../../../crates/kernels/tests/cuda/runner.rs"]
mod runner;
mod steps;

use espalier_kernels::cuda::Options;
use espalier_kernels::train::Cuda;
use espalier_qwen3::{Config, TensorSource};
use espalier_train_worker::engine::{
    AdamW, Documents, Engine, EngineError, Precision, Settings, State, StateValues, Trained,
};
use runner::{Needs, Test};

/// An engine on the first GPU; kernels are compiled once for all tests.
fn on_gpu(
    config: Config,
    source: &dyn TensorSource,
    settings: &Settings,
) -> Result<Engine, EngineError> {
    let options = Options {
        libraries: runner::library_folders(),
        kernels: Some(std::env::temp_dir().join("espalier-kernels-of-tests")),
        ..Options::default()
    };
    let gpu = Cuda::open(&options).unwrap();
    Engine::on_gpu(config, source, settings, gpu)
}

fn main() -> std::process::ExitCode {
    let all = golden::TESTS.iter().chain(steps::TESTS);
    let tests = all.map(|(name, run)| Test {
        name,
        needs: Needs::Device,
        run: Box::new(run),
    });
    runner::run(tests.collect())
}

fn settings(trained: Trained) -> Settings {
    Settings {
        trained,
        optimizer: AdamW::default(),
        clip_norm: Some(1.0),
        seed: 7,
        precision: Precision::Bf16,
        memory_budget_bytes: None,
        tokens_max: 512,
    }
}

/// Documents end to end.
struct Sample {
    ids: Vec<u32>,
    ends: Vec<usize>,
    supervised: Vec<bool>,
}

impl Sample {
    fn documents(&self) -> Documents<'_> {
        Documents {
            ids: &self.ids,
            ends: &self.ends,
            supervised: &self.supervised,
        }
    }
}

/// Gradients of each parameter: after a first step without clipping the first moment is `1 - beta1` of them.
fn gradients(state: &State, beta1: f64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let moments = state.tensors.iter().filter_map(|tensor| {
        let name = tensor.name.strip_suffix(".m")?;
        let StateValues::F32(values) = &tensor.values else {
            return None;
        };
        let values = values.iter().map(|m| m / (1.0 - beta1) as f32).collect();
        Some((name.to_owned(), tensor.shape.clone(), values))
    });
    moments.collect()
}

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|x| f64::from(*x) * f64::from(*x));
    squares.sum::<f64>().sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum();
    dot / (norm(a) * norm(b))
}
