//! What a job asks of the engine that computes. The process knows it through these traits alone, so that a job can be
//! tested without a model.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use espalier_core::error::ErrorClass;
use espalier_core::spec::{LoraTarget, Optimizer, TrainMethod, TrainSettings};
use espalier_qwen3::Config;

use crate::engine::{
    AdamW, Bits, Device, DocumentLoss, Documents, Engine, EngineError, Export, LoraSettings, Plan,
    Precision, Projection, Settings, State, StepReport, Trained,
};
use crate::error::TrainError;

/// Largest configuration, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Trains one model. Equal calls have equal results, bit for bit, on one machine. Calls block.
pub trait Trainer: Send {
    /// See [`Engine::step`].
    ///
    /// # Errors
    /// What was refused or is not finite; weights and optimizer are as they were.
    fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError>;

    /// See [`Engine::evaluate`].
    ///
    /// # Errors
    /// What was refused.
    fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError>;

    /// See [`Engine::state`].
    fn state(&mut self) -> State;

    /// See [`Engine::restore`].
    ///
    /// # Errors
    /// It is of another model or of other settings; then nothing was changed.
    fn restore(&mut self, state: State) -> Result<(), EngineError>;

    /// See [`Engine::export`].
    fn export(&mut self) -> Export;

    /// Memory that it holds, in bytes.
    fn memory(&self) -> u64;
}

impl Trainer for Engine {
    fn step(&mut self, micros: &[Documents<'_>], lr: f64) -> Result<StepReport, EngineError> {
        Self::step(self, micros, lr)
    }

    fn evaluate(&mut self, documents: Documents<'_>) -> Result<Vec<DocumentLoss>, EngineError> {
        Self::evaluate(self, documents)
    }

    fn state(&mut self) -> State {
        Self::state(self)
    }

    fn restore(&mut self, state: State) -> Result<(), EngineError> {
        Self::restore(self, state)
    }

    fn export(&mut self) -> Export {
        Self::export(self)
    }

    fn memory(&self) -> u64 {
        let memory = Self::memory(self);
        memory.device + memory.host
    }
}

/// Makes trainers.
pub trait Load: Send + Sync + 'static {
    /// Reads the model in `folder` for micro-batches of at most `tokens` tokens. Blocks for as long as that takes.
    ///
    /// # Errors
    /// The model cannot be read, the settings do not fit it, or there is too little memory.
    fn load(
        &self,
        folder: &Path,
        config: &Config,
        settings: &TrainSettings,
        tokens: usize,
    ) -> Result<Box<dyn Trainer>, EngineError>;

    /// Floating-point operations that this machine does in a second where nothing but products runs; none: not known.
    fn peak_flops(&self) -> Option<f64>;
}

/// The engine of this crate, on a device.
#[derive(Clone, Copy, Debug)]
pub struct EngineLoader {
    /// Where it computes.
    pub device: Device,
    /// See [`Load::peak_flops`].
    pub peak_flops: Option<f64>,
}

impl Load for EngineLoader {
    fn load(
        &self,
        folder: &Path,
        config: &Config,
        settings: &TrainSettings,
        tokens: usize,
    ) -> Result<Box<dyn Trainer>, EngineError> {
        let settings = engine_settings(settings, config, tokens);
        let engine = Engine::load(folder, &settings, self.device)?;
        let attention = engine.plan().attention.name();
        tracing::info!(device = %self.device, attention, "the model is loaded");
        Ok(Box::new(engine))
    }

    fn peak_flops(&self) -> Option<f64> {
        self.peak_flops
    }
}

/// The settings of a job as the engine has them, for micro-batches of at most `tokens` tokens.
pub fn engine_settings(settings: &TrainSettings, config: &Config, tokens: usize) -> Settings {
    Settings {
        trained: trained(&settings.method, config),
        optimizer: AdamW {
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.eps,
            weight_decay: settings.weight_decay,
            bits: match settings.optimizer {
                Optimizer::AdamW => Bits::Fp32,
                Optimizer::AdamW8Bit => Bits::Eight,
            },
        },
        clip_norm: settings.clip_norm.map(|norm| norm as f32),
        seed: settings.seed,
        precision: Precision::F32,
        memory_budget_bytes: settings.memory_budget_bytes,
        tokens_max: tokens,
    }
}

fn trained(method: &TrainMethod, config: &Config) -> Trained {
    let TrainMethod::Lora {
        rank,
        alpha,
        rslora,
        targets,
    } = method
    else {
        return Trained::Full;
    };
    let named = targets.iter().copied().map(projection).collect();
    Trained::Lora(LoraSettings {
        rank: *rank,
        alpha: *alpha,
        rslora: *rslora,
        targets: match targets.is_empty() {
            true => LoraSettings::default_targets(config),
            false => named,
        },
    })
}

fn projection(target: LoraTarget) -> Projection {
    match target {
        LoraTarget::Q => Projection::Q,
        LoraTarget::K => Projection::K,
        LoraTarget::V => Projection::V,
        LoraTarget::O => Projection::O,
        LoraTarget::Gate => Projection::Gate,
        LoraTarget::Up => Projection::Up,
        LoraTarget::Down => Projection::Down,
    }
}

/// The configuration of the model in `folder`.
///
/// # Errors
/// It cannot be read, or is of no model that is known here.
pub fn config(folder: &Path) -> Result<Config, TrainError> {
    let path = folder.join("config.json");
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(CONFIG_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|source| TrainError::Read { path, source })?;
    Ok(Config::parse(&text)?)
}

/// The plan of a training whose micro-batches have at most `tokens` tokens. Loads nothing.
///
/// # Errors
/// The settings do not fit the model, or no plan fits the budget.
pub fn plan(config: &Config, settings: &TrainSettings, tokens: usize) -> Result<Plan, EngineError> {
    let settings = engine_settings(settings, config, tokens);
    settings.check(config)?;
    let budget = settings.memory_budget_bytes;
    Ok(Plan::choose(config, &settings, tokens, budget)?)
}

/// What an error of the engine means for the attempt.
pub fn class_of(error: &EngineError) -> ErrorClass {
    match error {
        EngineError::Read { .. } | EngineError::Open { .. } | EngineError::Device(_) => {
            ErrorClass::Infra
        }
        // Another worker may have more.
        EngineError::Memory(_) => ErrorClass::Handler,
        EngineError::State { .. } => ErrorClass::Handler,
        EngineError::Setting { .. }
        | EngineError::Config(_)
        | EngineError::Weights(_)
        | EngineError::Plan(_)
        | EngineError::Document { .. }
        | EngineError::Micro { .. }
        | EngineError::NothingSupervised { .. }
        | EngineError::LossNotFinite { .. }
        | EngineError::GradientNotFinite { .. } => ErrorClass::Invalid,
    }
}
