//! What the model runs on: the one place that knows which executors there are.

mod cuda;
mod survey;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_kernels::AUTO_ORDINAL;
use espalier_kernels::cpu::{Form, KvForm, Pool};
use espalier_kernels::cuda::report;
use espalier_qwen3::{Checkpoint, CheckpointError, Config, Lora, Model, ModelError};
use espalier_runtime::memory::available;
use espalier_runtime::tasks::{BlockingFailed, blocking};
use espalier_runtime::telemetry::error_chain;
use futures::FutureExt as _;

pub use survey::{DeviceFound, Library, Survey, survey};

use super::adapters::{LoadWeights, Loaded, WeightsError};
use super::memory::{self, Gib, MemoryError, Wish, form_name};
use crate::blocks::AdapterDigest;
use crate::config::{Device, Dtype, Options};
use crate::engine::{AdapterPort, Engine, EngineConfig, StartError};
use crate::executor::ExecutorError;
use crate::executor::cpu::{CpuConfig, CpuExecutor};
use crate::executor::cuda::LoadError;
use crate::load::ModelFiles;
use crate::scheduler;

/// Tokens of a step on the CPU without being told: more makes answers wait for prompts, and is no faster.
const CPU_STEP_TOKENS: u32 = 512;
/// How long a step may take on the CPU: a large model, few cores, and all tokens that a step may have.
const CPU_STEP_LIMIT: Duration = Duration::from_secs(600);

/// What `--dtype auto` means, on every device.
pub const DTYPE_AUTO: &str = "bf16";

/// Why a model does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    #[error("the model does not run on the GPU")]
    Cuda(#[from] LoadError),
    #[error("`--dtype` must be auto or bf16 on a GPU, got {0}")]
    Dtype(&'static str),
    #[error("`--device cuda:{ordinal}` cannot be used: {why}")]
    NoGpu { ordinal: u32, why: String },
    #[error("the model's files cannot be read")]
    Files(#[from] CheckpointError),
    #[error("the model cannot be loaded")]
    Model(#[from] ModelError),
    #[error("there is not enough memory")]
    Memory(#[from] MemoryError),
    #[error("no memory for keys and values, or no thread")]
    Executor(#[source] std::io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

/// A model that runs.
pub(super) struct Running {
    pub(super) engine: Engine,
    pub(super) load_weights: LoadWeights,
    pub(super) context_tokens: usize,
}

/// Whether the GPU that `options` name is there: it is told before gigabytes are fetched for it.
pub(super) async fn check(options: &Options) -> Result<(), DeviceError> {
    let Device::Cuda(ordinal) = options.device else {
        return Ok(());
    };
    let look = move || {
        let report = report::look();
        let usable = report.usable(ordinal as usize).map(drop);
        usable.map_err(|why| DeviceError::NoGpu { ordinal, why })
    };
    blocking("device.look", look).await?
}

/// Loads the weights and starts the engine on the device that `options` name.
pub(super) async fn start(options: &Options, files: &ModelFiles) -> Result<Running, DeviceError> {
    match options.device {
        Device::Cpu => start_cpu(options, files).await,
        Device::Cuda(ordinal) => cuda::start(options, files, ordinal).await,
        Device::Auto => match cuda::start(options, files, AUTO_ORDINAL).await {
            Err(DeviceError::Cuda(LoadError::Device(error))) => {
                let why = error_chain(&error);
                tracing::info!(why, "no GPU is used");
                start_cpu(options, files).await
            }
            Err(DeviceError::Dtype(_)) => start_cpu(options, files).await,
            started => started,
        },
    }
}

async fn start_cpu(options: &Options, files: &ModelFiles) -> Result<Running, DeviceError> {
    let form = options.dtype.on_cpu();
    memory::check_weights(&files.config, form, available())?;
    let threads = threads(options.cpu_threads);
    let (folder, config) = (files.folder.clone(), files.config.clone());
    let load = move || -> Result<_, ModelError> {
        let (source, pool) = (Checkpoint::open(&folder)?, Arc::new(Pool::new(threads)));
        Ok(Model::from_source(config, &source, form, pool)?)
    };
    let model = blocking("model.load", load).await??;
    let step_tokens = options
        .max_num_batched_tokens
        .unwrap_or(CPU_STEP_TOKENS.max(options.max_num_seqs));
    let wish = Wish {
        kv_bytes: options.kv_cache_memory_bytes,
        context_tokens: options.max_model_len.map(|tokens| tokens as usize),
        sequences: options.max_num_seqs as usize,
        step_tokens: step_tokens as usize,
    };
    let kv = model.kv_shape(1);
    let block_bytes = kv.block_bytes() as u64;
    let plan = memory::plan(&files.config, block_bytes, wish, available())?;
    tracing::info!(
        device = "cpu",
        kernels = model.pool().isa().name(),
        threads,
        weights = form_name(form),
        products = match form {
            Form::Bf16Pairs => "pairs of bf16 (AVX512_BF16), sums in f32",
            _ => "f32",
        },
        because = match options.dtype {
            Dtype::Auto => "no faster form keeps the checkpoint's numbers; `--dtype q8` is faster, with other numbers",
            _ => "`--dtype` says so",
        },
        weights_read_a_token = %Gib(model.weight_bytes() as u64),
        kv = %Gib(u64::from(plan.kv_blocks) * block_bytes),
        kv_form = match kv.form {
            KvForm::F32 => "f32",
            KvForm::Bf16 => "bf16",
        },
        context_tokens = plan.context_tokens,
        "model loaded"
    );
    let executor = CpuExecutor::start(
        model,
        CpuConfig {
            kv_blocks: plan.kv_blocks,
            tokens: step_tokens,
            rows: options.max_num_seqs,
            steps_in_flight: 1,
            // One more than names: a new version comes before the old one goes.
            adapters: options.max_loras.saturating_add(1),
        },
    );
    let config = EngineConfig {
        max_queue: options.max_queue as usize,
        step_limit: CPU_STEP_LIMIT,
        ..EngineConfig::new(scheduler::Config {
            max_num_seqs: options.max_num_seqs as usize,
            max_num_batched_tokens: step_tokens as usize,
            max_model_len: plan.context_tokens,
            prefix_caching: !options.no_enable_prefix_caching,
            weight_version: 1,
        })
    };
    let (engine, port) = Engine::start(executor.map_err(DeviceError::Executor)?, config)?;
    Ok(Running {
        engine,
        load_weights: adapters(port, files.config.clone(), options.max_lora_rank, |lora| {
            Ok(Box::new(lora))
        }),
        context_tokens: plan.context_tokens,
    })
}

/// Threads that compute: those that were asked for, or one for each core that this process may use.
fn threads(asked: Option<u32>) -> usize {
    match asked {
        Some(threads) => threads as usize,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Reads adapters and lays them out for the executor beside the steps that run, on a thread of their own, so that no
/// answer waits for them.
fn adapters<A: Send + 'static>(
    port: AdapterPort<A>,
    base: Config,
    rank_max: u32,
    lay_out: impl Fn(Lora) -> Result<A, ExecutorError> + Send + Sync + 'static,
) -> LoadWeights {
    let (base, pool, lay_out) = (Arc::new(base), Arc::new(Pool::new(1)), Arc::new(lay_out));
    Box::new(move |folder: PathBuf| {
        let (port, base, pool) = (port.clone(), Arc::clone(&base), Arc::clone(&pool));
        let lay_out = Arc::clone(&lay_out);
        async move {
            let read = move || {
                let lora = Lora::load(&folder, &base, &pool).map_err(|error| refused(&error))?;
                let known = Known::of(&lora, rank_max)?;
                let laid = lay_out(lora).map_err(|error| refused(&error))?;
                Ok::<_, WeightsError>((known, laid))
            };
            let read = blocking("adapter.load", read).await;
            let (known, laid) = read.map_err(|error| refused(&error))??;
            Ok(Loaded {
                handle: port.load(known.digest, laid).await?,
                rank: known.rank,
                made_for: known.made_for,
            })
        }
        .boxed()
    })
}

fn refused(error: &(dyn std::error::Error + 'static)) -> WeightsError {
    WeightsError::Refused(error_chain(error))
}

/// What is said of an adapter when it is loaded.
struct Known {
    digest: AdapterDigest,
    rank: u32,
    made_for: Option<String>,
}

impl Known {
    fn of(lora: &Lora, rank_max: u32) -> Result<Self, WeightsError> {
        let rank = u32::try_from(lora.rank()).unwrap_or(u32::MAX);
        if rank > rank_max {
            return Err(WeightsError::Refused(format!(
                "its rank must be at most {rank_max} (`--max-lora-rank`), got {rank}"
            )));
        }
        Ok(Self {
            digest: lora.digest(),
            rank,
            made_for: lora.base().map(str::to_owned),
        })
    }
}
