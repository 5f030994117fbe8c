//! The training engine: a model on a device, steps of an optimizer over micro-batches of tokens, and what came of them.
//!
//! The schedule of forward and backward is written once, over [`espalier_kernels::train::Backend`]; which activations it
//! keeps and which it computes again is the plan's choice and does not change a result. It knows nothing of files of
//! samples, of jobs or of checkpoints: tokens come in, named tensors go out.

mod backward;
mod buffers;
mod export;
mod forward;
mod head;
mod layout;
mod model;
mod plan;
mod settings;
mod state;
mod step;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use espalier_kernels::cpu::Pool;
use espalier_kernels::cuda::{CudaError, Options};
use espalier_kernels::train::{Cpu, Cuda, DeviceFailed, MemoryUse, OutOfMemory};
use espalier_qwen3::{Checkpoint, CheckpointError, Config, TensorSource};

pub use export::{Export, ExportTensor, ExportType};
pub use plan::{Keep, Plan, PlanError, PlannedBytes};
pub use settings::{AdamW, Bits, Device, LoraSettings, Precision, Projection, Settings, Trained};
pub use state::{State, StateTensor, StateValues};
use step::Trainer;

/// Tokens of a micro-batch: documents end to end, none of which sees another.
#[derive(Debug, Clone, Copy)]
pub struct Documents<'a> {
    /// Tokens.
    pub ids: &'a [u32],
    /// Where documents end: ascending, the last is the number of tokens.
    pub ends: &'a [usize],
    /// Whether a token is a target: of each. A document's first token has nothing to be predicted from.
    pub supervised: &'a [bool],
}

/// Loss of a document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DocumentLoss {
    /// Sum of -log p over its supervised tokens.
    pub sum: f64,
    /// How many they are.
    pub tokens: u64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean of -log p over the supervised tokens of all micro-batches, before the step.
    pub loss: f64,
    /// How many they are.
    pub supervised_tokens: u64,
    /// All tokens.
    pub tokens: u64,
    /// Norm of the gradient of all that is trained, before clipping.
    pub grad_norm: f64,
    /// Floating-point operations of products that were executed, those done twice included.
    pub flops: u64,
}

/// Why an engine does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A setting is out of range.
    #[error("`{field}` {rule}, got {value}")]
    Setting {
        /// Its name.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// Weights are missing or of another shape.
    #[error("the checkpoint's weights")]
    Weights(#[from] CheckpointError),
    /// No plan fits.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No plan fits what is free, and no smaller budget was set.
    #[error("training needs more memory than is free on {device}")]
    Free {
        /// Where.
        device: String,
        /// What is free, and what would fit.
        #[source]
        source: PlanError,
    },
    /// The device has not the room that the plan counted on.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// There is no such GPU here, or it cannot be used.
    #[error("cannot train on cuda:{ordinal}: {reason}")]
    NoGpu {
        /// Its number.
        ordinal: usize,
        /// Why.
        reason: String,
    },
    /// The GPU cannot be opened.
    #[error("cannot train on cuda:{ordinal}")]
    Open {
        /// Its number.
        ordinal: usize,
        /// Why.
        #[source]
        source: CudaError,
    },
    /// An op failed; the engine is of no more use.
    #[error(transparent)]
    Device(#[from] DeviceFailed),
    /// A micro-batch cannot be trained on.
    #[error("micro-batch {micro}, document {document}: {rule}")]
    Document {
        /// Which micro-batch of the step.
        micro: usize,
        /// Which document of it.
        document: usize,
        /// What it must be, and what it is.
        rule: String,
    },
    /// A micro-batch is not made of documents.
    #[error("micro-batch {micro}: {rule}")]
    Micro {
        /// Which of the step.
        micro: usize,
        /// What it must be, and what it is.
        rule: String,
    },
    /// A step without a target.
    #[error("a step must have a supervised token, got {tokens} tokens without one")]
    NothingSupervised {
        /// Tokens of the step.
        tokens: usize,
    },
    /// The loss of a document is no number; nothing was changed.
    #[error("micro-batch {micro}, document {document}: the loss is not finite ({loss})")]
    LossNotFinite {
        /// Which micro-batch of the step.
        micro: usize,
        /// Which document of it.
        document: usize,
        /// What it is.
        loss: f64,
    },
    /// The gradient is no number; nothing was changed.
    #[error("the gradient's norm is not finite ({norm})")]
    GradientNotFinite {
        /// What it is.
        norm: f64,
    },
    /// A state is of another engine.
    #[error("state tensor {name}: {rule}")]
    State {
        /// Which tensor.
        name: String,
        /// What it must be, and what it is.
        rule: String,
    },
}

/// What an engine does on whatever device.
trait Training: Send {
    fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError>;
    fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError>;
    fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError>;
    fn state(&mut self) -> State;
    fn restore(&mut self, state: State) -> Result<(), EngineError>;
    fn adopt(&mut self, source: &dyn TensorSource) -> Result<(), EngineError>;
    fn export(&mut self) -> Export;
    fn plan(&self) -> &Plan;
    fn memory(&self) -> MemoryUse;
    fn check_device(&mut self) -> Result<(), EngineError>;
}

fn open(ordinal: usize) -> Result<Cuda, EngineError> {
    let options = Options {
        ordinal,
        ..Options::default()
    };
    Cuda::open(&options).map_err(|source| EngineError::Open { ordinal, source })
}

/// What kernels take beside buffers is not known before they run, nor is what others of the device do.
fn left_by_kernels(free: u64) -> u64 {
    const LEAST: u64 = 512 << 20;
    free.saturating_sub((free / 20).max(LEAST))
}

/// A model that is trained.
pub struct Engine {
    run: Box<dyn Training>,
}

impl Engine {
    /// Loads the weights of a checkpoint's folder and draws an adapter, where one is trained: `A` uniformly within
    /// `1 / sqrt(inputs)`, `B` zero, as PEFT does.
    ///
    /// # Errors
    /// When settings or weights are refused, or memory is too small.
    pub fn load(
        checkpoint: &Path,
        config: Config,
        settings: &Settings,
        device: Device,
    ) -> Result<Self, EngineError> {
        Self::new(config, &Checkpoint::open(checkpoint)?, settings, device)
    }

    /// The same from any source of weights.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn new(
        config: Config,
        source: &dyn TensorSource,
        settings: &Settings,
        device: Device,
    ) -> Result<Self, EngineError> {
        settings.check(&config)?;
        match device {
            Device::Cpu { threads } => {
                Precision::F32.only(settings, "the CPU")?;
                let backend = Cpu::<f32>::new(Arc::new(Pool::new(threads)));
                let run = Box::new(Trainer::new(config, source, settings, backend)?);
                Ok(Self { run })
            }
            Device::Cuda { ordinal } => Self::on_gpu(config, source, settings, open(ordinal)?),
        }
    }

    /// What training may take of a GPU where no budget is set. Opens it.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn free_bytes(ordinal: usize) -> Result<u64, EngineError> {
        Ok(left_by_kernels(open(ordinal)?.free_bytes()?))
    }

    /// The same on a GPU that was opened. The plan may take what is free there, within the budget where one is set.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn on_gpu(
        config: Config,
        source: &dyn TensorSource,
        settings: &Settings,
        gpu: Cuda,
    ) -> Result<Self, EngineError> {
        settings.check(&config)?;
        Precision::Bf16.only(settings, "a GPU")?;
        let most = Cuda::HEAD_DIM_MAX;
        if config.head_dim > most {
            return Err(EngineError::Setting {
                field: "head_dim",
                value: config.head_dim.to_string(),
                rule: format!("must be at most {most} on a GPU"),
            });
        }
        let free = left_by_kernels(gpu.free_bytes()?);
        let budget = settings
            .memory_budget_bytes
            .map_or(free, |asked| asked.min(free));
        let settings = Settings {
            memory_budget_bytes: Some(budget),
            ..settings.clone()
        };
        let run = Box::new(Trainer::new(config, source, &settings, gpu)?);
        Ok(Self { run })
    }

    /// One step of the optimizer over micro-batches, at learning rate `lr`: gradients of all are added up and divided by
    /// the number of supervised tokens of all.
    ///
    /// # Errors
    /// When a micro-batch is refused, or loss or gradient is not finite; weights and optimizer are as they were.
    pub fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError> {
        self.run.step(micros, lr)
    }

    /// The loss of each document.
    ///
    /// # Errors
    /// When the documents are refused. A loss that is not finite is no error here.
    pub fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError> {
        self.run.evaluate(documents)
    }

    /// -log p of each supervised token in nats, in their order, at temperature 1 and over all ids that have logits.
    ///
    /// # Errors
    /// As [`Engine::evaluate`].
    pub fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError> {
        self.run.token_losses(documents)
    }

    /// Everything that training changes, bit for bit.
    pub fn state(&mut self) -> State {
        self.run.state()
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// When it is of another model or other settings; then the engine is as it was.
    pub fn restore(&mut self, state: State) -> Result<(), EngineError> {
        self.run.restore(state)
    }

    /// Begins from what is there: an adapter's tensors by PEFT's names, or weights by a checkpoint's. Moments are as they
    /// were.
    ///
    /// # Errors
    /// When a tensor is missing, of another shape or not finite; then the engine is as it was.
    pub fn adopt(&mut self, source: &dyn TensorSource) -> Result<(), EngineError> {
        self.run.adopt(source)
    }

    /// What was trained: an adapter as PEFT names it, or weights as the checkpoint does.
    pub fn export(&mut self) -> Export {
        self.run.export()
    }

    /// What activations are kept, and what that takes.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.run.plan()
    }

    /// Memory in use and at its peak.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.run.memory()
    }

    /// Whether the device is well: to be asked after [`Engine::state`] and [`Engine::export`], before they are kept.
    ///
    /// # Errors
    /// When it has failed, now and ever after.
    pub fn check_device(&mut self) -> Result<(), EngineError> {
        self.run.check_device()
    }
}
