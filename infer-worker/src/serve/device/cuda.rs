//! A model on a GPU.

use std::time::Duration;

use espalier_kernels::{bf16, cuda};
use espalier_qwen3::{Checkpoint, Config};
use espalier_runtime::tasks::blocking;

use super::super::memory::Gib;
use super::{DeviceError, Running, adapters};
use crate::config::{Dtype, Options};
use crate::engine::{Engine, EngineConfig};
use crate::executor::cuda::{CudaExecutor, CudaOptions};
use crate::executor::{BLOCK_TOKENS, Executor as _};
use crate::load::ModelFiles;
use crate::scheduler;

/// How long a step may take on a GPU: the largest takes a second.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Loads the weights onto the GPU `ordinal` and starts the engine on it.
pub(super) async fn start(
    options: &Options,
    files: &ModelFiles,
    ordinal: u32,
) -> Result<Running, DeviceError> {
    match options.dtype {
        Dtype::Auto | Dtype::Bf16 => {}
        Dtype::F32 => return Err(DeviceError::Dtype("f32")),
        Dtype::Q8 => return Err(DeviceError::Dtype("q8")),
    }
    let context = files.config.max_positions;
    let context = options
        .max_model_len
        .map_or(context, |asked| asked as usize);
    let mut asked = wished(options, ordinal, u32::try_from(context).unwrap_or(u32::MAX));
    asked.kv_blocks = options.kv_cache_memory_bytes.map(|bytes| {
        let blocks = bytes / block_bytes(&files.config);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    });
    let (folder, config) = (files.folder.clone(), files.config.clone());
    let load = move || -> Result<_, DeviceError> {
        let executor = CudaExecutor::load(&config, &Checkpoint::open(&folder)?, &asked)?;
        Ok((executor, asked))
    };
    let (executor, asked) = blocking("model.load", load).await??;
    let memory = executor.memory();
    tracing::info!(
        device = format!("cuda:{ordinal}"),
        kernels = executor.kernels(),
        weights = "bf16",
        because = "it is the form that GPUs are served in, and the checkpoint's own",
        weights_bytes = %Gib(memory.weights as u64),
        kv = %Gib((memory.block * memory.blocks) as u64),
        kv_form = "bf16",
        context_tokens = context,
        "model loaded"
    );
    let limits = executor.limits();
    let config = EngineConfig {
        max_queue: options.max_queue as usize,
        step_limit: STEP_LIMIT,
        ..EngineConfig::new(scheduler::Config {
            max_num_seqs: asked.max_num_seqs as usize,
            max_num_batched_tokens: limits.tokens as usize,
            max_model_len: context,
            prefix_caching: !options.no_enable_prefix_caching,
            weight_version: 1,
        })
    };
    let (engine, port) = Engine::start(executor, config)?;
    Ok(Running {
        engine,
        load_weights: adapters(port, files.config.clone(), options.max_lora_rank),
        context_tokens: context,
    })
}

/// Bytes of a KV block: keys and values of all layers, in bf16.
fn block_bytes(config: &Config) -> u64 {
    let token = 2 * config.layers * config.kv_heads * config.head_dim * size_of::<bf16>();
    (BLOCK_TOKENS * token) as u64
}

fn wished(options: &Options, ordinal: u32, context: u32) -> CudaOptions {
    let defaults = CudaOptions::new(context);
    CudaOptions {
        device: cuda::Options {
            ordinal: ordinal as usize,
            ..cuda::Options::default()
        },
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options
            .max_num_batched_tokens
            .unwrap_or(defaults.max_num_batched_tokens),
        gpu_memory_utilization: options.gpu_memory_utilization,
        max_loras: options.max_loras,
        max_lora_rank: options.max_lora_rank,
        ..defaults
    }
}
