//! Measures the engine: steps over models of exact shapes with drawn weights, and beside them what the machine reaches by
//! itself in the same run.
//!
//! Not part of training. `espalier bench train` shows what it finds, each case out of a process of its own, so that memory
//! is that of the case alone.

mod cases;
mod resident;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

pub use cases::{CPU, Case, GPU};
use espalier_kernels::cpu::Pool;
use espalier_kernels::cuda::{Device as Gpu, Options as DeviceOptions};
use espalier_kernels::train::{Cuda, spin};
use espalier_qwen3::{Config, Cut};
use serde_json::{Value, json};

use crate::data::{DataError, Packed, Samples};
use crate::engine::{Device, Engine, EngineError, Precision, Settings, StepReport};
use resident::Resident;

const LR: f64 = 1e-4;
/// Rounds of the spin that says what the machine reaches, each of some hundredths of a second.
const SPINS: usize = 3;
const SPIN_ROUNDS: u64 = 20_000;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The engine did not start, or a step failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Samples were refused.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The GPU cannot be used.
    #[error("the device cannot be measured")]
    Device(#[from] espalier_kernels::cuda::CudaError),
    /// The memory of this process is not known.
    #[error("cannot read the memory of this process")]
    Memory(#[source] std::io::Error),
    /// Steps that are no training, so that their time means nothing.
    #[error("{what} must be {rule}, got {value}")]
    Wrong {
        /// Of the steps.
        what: &'static str,
        /// What it must be.
        rule: String,
        /// What it is.
        value: f64,
    },
}

/// What hears a fact as soon as it is known: an object whose fields stand beside those of earlier ones, or in their place.
pub type Tell<'a> = dyn FnMut(Value) + 'a;

/// A case with its samples.
struct Run<'a> {
    case: &'a Case,
    config: Config,
    samples: Samples,
    rounds: usize,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case, rounds: usize) -> Result<Self, BenchError> {
        Ok(Self {
            case,
            config: case.config(),
            samples: case.samples()?,
            rounds,
        })
    }

    /// One step, out of samples as training takes them: seconds, and what it did.
    fn step(&self, engine: &mut Engine) -> Result<(f64, StepReport), BenchError> {
        let began = Instant::now();
        let packed: Vec<Packed> = (0..self.samples.len())
            .map(|index| self.samples.pack(&[index]))
            .collect();
        let micros: Vec<_> = packed.iter().map(Packed::documents).collect();
        let report = engine.step(&micros, LR)?;
        let seconds = began.elapsed().as_secs_f64();
        let norm = report.grad_norm;
        need(norm > 0.0, "the gradient's norm", norm, || {
            "above 0".to_owned()
        })?;
        Ok((seconds, report))
    }

    /// A step that warms up, then those that count, with `peak`, the operations that the machine does in a second, and
    /// `memory`, the bytes that were taken, asked after each. What the first did.
    fn steps(
        &self,
        engine: &mut Engine,
        peak: &mut dyn FnMut() -> f64,
        memory: &mut dyn FnMut(&Engine) -> Result<u64, BenchError>,
        tell: &mut Tell<'_>,
    ) -> Result<StepReport, BenchError> {
        let (seconds, first) = self.step(engine)?;
        let uniform = (self.config.real_vocab_size as f64).ln();
        tell(json!({"first_step_s": seconds, "first_loss": first.loss, "uniform_loss": uniform}));
        let near = (0.5 * uniform..2.0 * uniform).contains(&first.loss);
        need(near, "the loss of drawn weights", first.loss, || {
            format!("near {uniform}, that of a guess")
        })?;
        let (mut times, mut reached) = (Vec::new(), peak());
        let planned = engine.plan().bytes.device();
        let mut last = first;
        for _ in 0..self.rounds {
            let (seconds, report) = self.step(engine)?;
            times.push(seconds);
            last = report;
            reached = reached.max(peak());
            let best = times.iter().copied().fold(f64::INFINITY, f64::min);
            let taken = memory(engine)?;
            tell(json!({
                "steps_s": times,
                "step_s": best,
                "tokens_per_s": report.tokens as f64 / best,
                "executed_flop": report.flops,
                "flop_per_s": report.flops as f64 / best,
                "peak_flop_per_s": reached,
                "share_of_peak": report.flops as f64 / best / reached,
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "memory_bytes": taken,
                "memory_apart": taken.abs_diff(planned) as f64 / planned as f64,
            }));
        }
        need(last.loss < first.loss, "the loss", last.loss, || {
            format!("below that of the first step, {}", first.loss)
        })?;
        Ok(first)
    }

    /// Whether the first step on the CPU has the loss and the gradient's norm of `first`, as far as bf16 tells.
    fn as_on_cpu(&self, first: &StepReport, tell: &mut Tell<'_>) -> Result<(), BenchError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let settings = self.case.settings(Precision::F32);
        let source = Cut::new(&self.config);
        let device = Device::Cpu { threads };
        let mut engine = Engine::new(self.config.clone(), &source, &settings, device)?;
        let (_, exact) = self.step(&mut engine)?;
        tell(json!({"cpu_loss": exact.loss, "cpu_grad_norm": exact.grad_norm}));
        for (what, got, exact, apart) in [
            ("the first loss", first.loss, exact.loss, 0.01),
            (
                "the first gradient's norm",
                first.grad_norm,
                exact.grad_norm,
                0.05,
            ),
        ] {
            need((got - exact).abs() <= apart * exact, what, got, || {
                format!("that of the CPU, {exact}")
            })?;
        }
        Ok(())
    }

    fn begin(&self, engine: &Engine, began: Instant, tell: &mut Tell<'_>) {
        let plan = engine.plan();
        let keeps: BTreeSet<_> = plan.keeps.iter().map(|keep| keep.name()).collect();
        tell(json!({
            "trained": self.case.trained(),
            "tokens": self.samples.tokens(),
            "load_s": began.elapsed().as_secs_f64(),
            "attention": plan.attention.name(),
            "keeps": keeps,
            "planned_bytes": plan.bytes.device(),
        }));
    }
}

fn need(
    holds: bool,
    what: &'static str,
    value: f64,
    rule: impl FnOnce() -> String,
) -> Result<(), BenchError> {
    match holds {
        true => Ok(()),
        false => Err(BenchError::Wrong {
            what,
            rule: rule(),
            value,
        }),
    }
}

/// Measures a case on the CPU. `memory_bytes` is what this process has taken since the call, so it must have done nothing
/// larger before.
///
/// # Errors
/// The first thing that goes wrong. What was told before stands.
pub fn on_cpu(
    case: &Case,
    threads: usize,
    rounds: usize,
    tell: &mut Tell<'_>,
) -> Result<(), BenchError> {
    let run = Run::new(case, rounds)?;
    let pool = Arc::new(Pool::new(threads));
    tell(json!({"threads": threads, "instructions": pool.isa().name()}));
    let (before, began) = (Resident::now().map_err(BenchError::Memory)?, Instant::now());
    let settings = case.settings(Precision::F32);
    let source = Cut::new(&run.config);
    let device = Device::Cpu { threads };
    let mut engine = Engine::new(run.config.clone(), &source, &settings, device)?;
    drop(source);
    run.begin(&engine, began, tell);
    let mut peak = || {
        let rate = |_| {
            let began = Instant::now();
            spin(&pool, SPIN_ROUNDS) as f64 / began.elapsed().as_secs_f64()
        };
        (0..SPINS).map(rate).fold(0.0, f64::max)
    };
    let mut memory = |_: &Engine| {
        let now = Resident::now().map_err(BenchError::Memory)?;
        Ok(now.taken_since(&before))
    };
    run.steps(&mut engine, &mut peak, &mut memory, tell)?;
    Ok(())
}

/// What a GPU gives.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Operations of bf16 products that it does in a second.
    pub peak_flop_per_s: f64,
    /// Memory that training may take of it; none: all that is free.
    pub memory_bytes: Option<u64>,
}

/// Measures a case on a GPU. `memory_bytes` is what the engine counts, `device_bytes` what the driver does.
///
/// # Errors
/// As [`on_cpu`].
pub fn on_gpu(
    case: &Case,
    options: &DeviceOptions,
    limits: Limits,
    rounds: usize,
    tell: &mut Tell<'_>,
) -> Result<(), BenchError> {
    let run = Run::new(case, rounds)?;
    // Sees the memory of the whole device, whoever takes it.
    let witness = Gpu::open(options)?;
    let (free, _) = witness.memory()?;
    let began = Instant::now();
    let source = Cut::new(&run.config);
    tell(json!({"draw_s": began.elapsed().as_secs_f64()}));
    let began = Instant::now();
    let gpu = Cuda::open(options)?;
    tell(json!({"open_s": began.elapsed().as_secs_f64()}));
    let began = Instant::now();
    let settings = Settings {
        memory_budget_bytes: limits.memory_bytes,
        ..case.settings(Precision::Bf16)
    };
    let mut engine = Engine::on_gpu(run.config.clone(), &source, &settings, gpu)?;
    drop(source);
    run.begin(&engine, began, tell);
    let mut memory = |engine: &Engine| Ok(engine.memory().device_peak);
    let measured = run.steps(
        &mut engine,
        &mut || limits.peak_flop_per_s,
        &mut memory,
        tell,
    );
    let (left, _) = witness.memory()?;
    tell(json!({"device_bytes": free.saturating_sub(left)}));
    let first = measured?;
    match case.is_small() {
        true => run.as_on_cpu(&first, tell),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_tells_its_figures() {
        let mut facts = serde_json::Map::new();
        let mut tell = |fact: Value| match fact {
            Value::Object(fields) => facts.extend(fields),
            other => panic!("{other}"),
        };
        on_cpu(&cases::TINY, 2, 2, &mut tell).unwrap();
        let number = |name: &str| facts[name].as_f64().unwrap();
        assert_eq!(facts["tokens"], 64);
        assert_eq!(facts["steps_s"].as_array().unwrap().len(), 2);
        assert!(number("loss") < number("first_loss"));
        assert!(number("grad_norm") > 0.0 && number("share_of_peak") > 0.0);
        let rate = number("executed_flop") / number("step_s");
        assert!((number("flop_per_s") / rate - 1.0).abs() < 1e-9);
        assert!(number("memory_bytes") > 0.0 && number("planned_bytes") > 0.0);
    }
}
