//! Measures the engine on a GPU, without HTTP: random weights of Qwen3's exact shapes, the workloads of vLLM's baseline,
//! and what the device itself reaches in the same run. On the CPU: the executor alone.
//!
//! Not part of serving. `espalier bench infer` shows what it finds.

mod alone;
mod device;
mod random;
mod workloads;

use std::time::{Duration, Instant};

pub use espalier_kernels::cuda::Options as DeviceOptions;
pub use espalier_qwen3::Shape;
use espalier_qwen3::{Cut, ModelError};
use serde_json::{Value, json};

use crate::engine::{Engine, EngineConfig, Request};
use crate::executor::cuda::{CudaExecutor, CudaOptions, LoadError};
use crate::executor::{Executor, ExecutorError};
use crate::scheduler::{Config, Scheduler, Unexpected};

pub use alone::Alone;
pub use device::Ceilings;
pub use workloads::Workload;

/// Tokens of a sequence, as in the baseline.
const MODEL_LEN: u32 = 16_384;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The model's shape.
    pub shape: Shape,
    /// In this order.
    pub workloads: Vec<Workload>,
    /// The device.
    pub device: DeviceOptions,
    /// How often `bench` and `agent` are run.
    pub repeats: u32,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The executor did not start.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] ExecutorError),
    /// What the device can do was not measured.
    #[error("the device cannot be measured")]
    Device(#[from] espalier_kernels::cuda::CudaError),
    /// The model was not loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There is no memory for keys and values, or no thread.
    #[error("no memory for keys and values, or no thread")]
    Memory(#[source] std::io::Error),
    /// The engine answered something else than was asked for.
    #[error("the engine gave a wrong answer: {0}")]
    Answer(String),
}

impl From<Unexpected> for BenchError {
    fn from(error: Unexpected) -> Self {
        Self::Answer(error.to_string())
    }
}

fn scheduler_config() -> Config {
    Config {
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        max_model_len: MODEL_LEN as usize,
        prefix_caching: true,
        weight_version: 0,
    }
}

/// What a device reaches by itself.
///
/// # Errors
/// When it cannot be used.
pub fn ceilings(options: &DeviceOptions) -> Result<Ceilings, BenchError> {
    Ok(device::measure(options)?)
}

/// Measures, and tells each result as it comes.
///
/// # Errors
/// The first thing that goes wrong. What was told before it stands.
pub async fn run(plan: &Plan, tell: &mut (dyn FnMut(Value) + Send)) -> Result<(), BenchError> {
    let ceilings = ceilings(&plan.device)?;
    tell(json!({
        "test": "ceilings",
        "copy_bytes_per_s": ceilings.bytes_per_s,
        "bf16_flop_per_s": ceilings.flop_per_s,
    }));
    let (config, began) = (plan.shape.config(), Instant::now());
    let options = CudaOptions {
        device: plan.device.clone(),
        ..CudaOptions::new(MODEL_LEN)
    };
    let source = Cut::new(&config);
    let drawn_s = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let mut executor = CudaExecutor::load(&config, &source, &options)?;
    drop(source);
    let memory = executor.memory();
    tell(json!({
        "test": "start",
        "model": plan.shape.name(),
        "weights_drawn_s": drawn_s,
        "start_s": began.elapsed().as_secs_f64(),
        "weights_bytes": memory.weights,
        "steps_bytes": memory.steps,
        "adapters_bytes": memory.adapters,
        "kv_blocks": memory.blocks,
    }));
    tell(graphs_equal_launches(&mut executor)?);
    for line in workloads::op_times(&mut executor, plan.shape, &ceilings)? {
        tell(line);
    }
    let engine_config = EngineConfig {
        event_buffer: 4096,
        ..EngineConfig::new(scheduler_config())
    };
    let (engine, _port) = Engine::start(executor, engine_config)
        .map_err(|error| BenchError::Answer(error.to_string()))?;
    for workload in &plan.workloads {
        for line in workload.run(&engine, plan, &ceilings).await? {
            tell(line);
        }
    }
    engine.stop(Duration::from_secs(10)).await;
    Ok(())
}

/// A few greedy answers twice, from graphs and launched op by op. They must be the same.
fn graphs_equal_launches(executor: &mut CudaExecutor) -> Result<Value, BenchError> {
    let prompts = workloads::check_prompts();
    let requests = || {
        let request = |prompt: &Vec<u32>| Request::new(prompt.clone(), 64);
        prompts.iter().map(request).collect()
    };
    let (replayed, replayed_s) = offline(executor, requests())?;
    executor.use_graphs(false);
    let (launched, launched_s) = offline(executor, requests())?;
    executor.use_graphs(true);
    if replayed != launched {
        let reason = "graphs and launches one by one draw different ids";
        return Err(BenchError::Answer(reason.to_owned()));
    }
    Ok(json!({
        "test": "graphs equal launches",
        "answers": prompts.len(),
        "ids": replayed.iter().map(Vec::len).sum::<usize>(),
        "first_ids": replayed.iter().filter_map(|ids| ids.first()).collect::<Vec<_>>(),
        "graphs_s": replayed_s,
        "launches_s": launched_s,
    }))
}

/// Runs requests to their end on this thread. Ids of each answer, and seconds.
fn offline(
    executor: &mut CudaExecutor,
    requests: Vec<Request>,
) -> Result<(Vec<Vec<u32>>, f64), BenchError> {
    let refused = |error: &dyn std::error::Error| BenchError::Answer(error.to_string());
    let config = Config {
        prefix_caching: false,
        ..scheduler_config()
    };
    let mut scheduler =
        Scheduler::new(config, executor.limits()).map_err(|error| refused(&error))?;
    let mut ids = std::collections::BTreeMap::new();
    for request in requests {
        let id = scheduler.add(request).map_err(|error| refused(&error))?;
        ids.insert(id, Vec::new());
    }
    let began = Instant::now();
    while !scheduler.is_idle() {
        while let Some(step) = scheduler.decide() {
            executor.submit(step)?;
        }
        let done = executor.poll(Duration::from_secs(60))?;
        let done = done.ok_or_else(|| BenchError::Answer("a step did not end".to_owned()))?;
        for (request, event) in scheduler.apply(done)? {
            if let crate::engine::Event::Token { id, .. } = event {
                ids.entry(request).or_default().push(id);
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok((ids.into_values().collect(), seconds))
}
