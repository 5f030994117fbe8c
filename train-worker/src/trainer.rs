//! What a job asks of the engine that computes. The process knows it through these traits alone, so that a job can be
//! tested without a model.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use espalier_core::error::ErrorClass;
use espalier_core::spec::{LoraTarget, Optimizer, TrainMethod, TrainSettings};
use espalier_kernels::DeviceChoice;
use espalier_kernels::cpu::Pool;
use espalier_kernels::train::peak_flops;
use espalier_qwen3::Config;
use espalier_qwen3_text::{Tokenizer, TokenizerError};
use espalier_runtime::memory;

use crate::engine::{
    AdamW, Bits, Device, DocumentLoss, Documents, Engine, EngineError, Export, LoraSettings, Plan,
    Projection, Settings, State, StepReport, Trained,
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

    /// See [`Engine::token_losses`].
    ///
    /// # Errors
    /// What was refused.
    fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError>;

    /// See [`Engine::state`].
    ///
    /// # Errors
    /// The device has failed, so that it means nothing.
    fn state(&mut self) -> Result<State, EngineError>;

    /// See [`Engine::restore`].
    ///
    /// # Errors
    /// It is of another model or of other settings; then nothing was changed.
    fn restore(&mut self, state: State) -> Result<(), EngineError>;

    /// See [`Engine::export`].
    ///
    /// # Errors
    /// The device has failed, so that it means nothing.
    fn export(&mut self) -> Result<Export, EngineError>;

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

    fn token_losses(&mut self, documents: Documents<'_>) -> Result<Vec<f32>, EngineError> {
        Self::token_losses(self, documents)
    }

    fn state(&mut self) -> Result<State, EngineError> {
        let state = Self::state(self);
        self.check_device().map(|()| state)
    }

    fn restore(&mut self, state: State) -> Result<(), EngineError> {
        Self::restore(self, state)
    }

    fn export(&mut self) -> Result<Export, EngineError> {
        let export = Self::export(self);
        self.check_device().map(|()| export)
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
#[derive(Debug)]
pub struct EngineLoader {
    device: Device,
    /// See [`Load::peak_flops`]: measured by the first load where nobody says.
    peak_flops: OnceLock<f64>,
}

impl EngineLoader {
    /// On the device that is asked for, which is said in the log. Blocks: the driver of a GPU may take seconds.
    ///
    /// # Errors
    /// The GPU that is named cannot be used.
    pub fn open(
        choice: DeviceChoice,
        threads: Option<u32>,
        peak_flops: Option<f64>,
    ) -> Result<Self, EngineError> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.map_or_else(cores, |threads| threads as usize);
        let (device, no_gpu) = Device::choose(choice, threads)?;
        match (device, no_gpu) {
            (Device::Cuda { .. }, _) => tracing::info!(%device, "trains on a GPU"),
            (Device::Cpu { .. }, Some(why)) => {
                tracing::info!(%device, threads, why, "no GPU is used");
            }
            (Device::Cpu { .. }, None) => tracing::info!(%device, threads, "trains on the CPU"),
        }
        Ok(Self {
            device,
            peak_flops: peak_flops.map_or_else(OnceLock::new, OnceLock::from),
        })
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// See [`Load::peak_flops`]. Measures the CPU, which takes some tenths of a second, unless it is known.
    pub fn measure(&self) -> Option<f64> {
        if let Device::Cpu { threads } = self.device {
            let measure = || peak_flops(&Pool::new(threads));
            self.peak_flops.get_or_init(measure);
        }
        self.peak_flops()
    }
}

impl Load for EngineLoader {
    fn load(
        &self,
        folder: &Path,
        config: &Config,
        settings: &TrainSettings,
        tokens: usize,
    ) -> Result<Box<dyn Trainer>, EngineError> {
        let mut told = engine_settings(settings, config, tokens, self.device);
        if matches!(self.device, Device::Cpu { .. }) {
            told.memory_budget_bytes = Some(budget(config, settings, tokens, self.device)?.bytes);
        }
        self.measure();
        let loaded = Engine::load(folder, config.clone(), &told, self.device);
        let engine = loaded.map_err(|error| unasked(error, settings, self.device))?;
        let plan = engine.plan();
        tracing::info!(
            device = %self.device,
            attention = plan.attention.name(),
            budget_bytes = told.memory_budget_bytes,
            memory_bytes = plan.bytes.device(),
            host_bytes = plan.bytes.host,
            micro_batch_tokens = tokens,
            "the model is loaded"
        );
        Ok(Box::new(engine))
    }

    fn peak_flops(&self) -> Option<f64> {
        self.peak_flops.get().copied()
    }
}

/// The settings of a job as the engine has them, for micro-batches of at most `tokens` tokens.
fn engine_settings(
    settings: &TrainSettings,
    config: &Config,
    tokens: usize,
    device: Device,
) -> Settings {
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
        precision: device.precision(),
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

/// The tokenizer of a base model: its own, or Qwen3's where it brings none. Rows of token ids do without.
pub type OfBase = Result<Tokenizer, Arc<TokenizerError>>;

/// The configuration and the tokenizer of the model in `folder`.
///
/// # Errors
/// The configuration cannot be read, or is of no model that is known here.
pub fn config(folder: &Path) -> Result<(Config, OfBase), TrainError> {
    let path = folder.join("config.json");
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(CONFIG_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|source| TrainError::Read { path, source })?;
    let mut config = Config::parse(&text)?;
    let tokenizer = Tokenizer::of_folder(folder).map_err(Arc::new);
    if let Ok(tokenizer) = &tokenizer {
        // Where it has more ids than the model, data sets are refused when they are read.
        config.real_vocab_size = config.vocab_size.min(tokenizer.vocabulary() as usize);
    }
    Ok((config, tokenizer))
}

/// Memory that a training may take of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// How much.
    pub bytes: u64,
    /// Whether its settings say so; else it is what is free now.
    pub is_asked: bool,
}

/// What a training on `device` may take. Where its settings say nothing, it is what is free: on a GPU all but a twentieth, which
/// it is at most where they say more; on the CPU all but a tenth, and but for a copy of what is trained, which a checkpoint
/// is on its way to the store.
///
/// # Errors
/// The settings do not fit the model, or the GPU does not answer.
pub fn budget(
    config: &Config,
    settings: &TrainSettings,
    tokens: usize,
    device: Device,
) -> Result<Budget, EngineError> {
    let asked = settings.memory_budget_bytes;
    let bytes = match (device, asked) {
        (Device::Cuda { ordinal }, _) => {
            Engine::free_bytes(ordinal)?.min(asked.unwrap_or(u64::MAX))
        }
        (Device::Cpu { .. }, Some(asked)) => asked,
        (Device::Cpu { .. }, None) => {
            let told = engine_settings(settings, config, tokens, device);
            told.check(config)?;
            let copy = Plan::choose(config, &told, tokens, None)?.bytes.trained;
            let free = memory::available();
            (free - free / 10).saturating_sub(copy)
        }
    };
    Ok(Budget {
        bytes,
        is_asked: asked == Some(bytes),
    })
}

/// The plan of a training on `device` whose micro-batches have at most `tokens` tokens, within that budget. Loads nothing.
///
/// # Errors
/// The settings do not fit the model, or no plan fits the budget.
pub fn plan(
    config: &Config,
    settings: &TrainSettings,
    tokens: usize,
    device: Device,
    budget: Budget,
) -> Result<Plan, EngineError> {
    let told = engine_settings(settings, config, tokens, device);
    told.check(config)?;
    let plan = Plan::choose(config, &told, tokens, Some(budget.bytes));
    plan.map_err(|error| unasked(error.into(), settings, device))
}

/// A plan that does not fit, though what was asked for would have been enough, is for a device with more memory.
fn unasked(error: EngineError, settings: &TrainSettings, device: Device) -> EngineError {
    let asked = settings.memory_budget_bytes.unwrap_or(u64::MAX);
    match error {
        EngineError::Plan(source) if source.least() <= asked => EngineError::Free {
            device: device.to_string(),
            source,
        },
        EngineError::Plan(source) => EngineError::Plan(source.within(asked)),
        other => other,
    }
}

/// What an error of the engine means for the attempt.
pub fn class_of(error: &EngineError) -> ErrorClass {
    match error {
        EngineError::NoGpu { .. } | EngineError::Open { .. } => ErrorClass::Infra,
        EngineError::Device(failed) if failed.is_lost => ErrorClass::Infra,
        // What an op refuses is refused again.
        EngineError::Device(_) => ErrorClass::Handler,
        // Another worker may have more.
        EngineError::Memory(_) | EngineError::Free { .. } => ErrorClass::Handler,
        EngineError::State { .. } => ErrorClass::Handler,
        EngineError::Setting { .. }
        | EngineError::Weights(_)
        | EngineError::Plan(_)
        | EngineError::Document { .. }
        | EngineError::Micro { .. }
        | EngineError::NothingSupervised { .. }
        | EngineError::LossNotFinite { .. }
        | EngineError::GradientNotFinite { .. } => ErrorClass::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::TrainSettingsDraft;

    use super::*;

    /// A model that no machine has the memory for.
    fn giant() -> Config {
        let json = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 65536, "intermediate_size": 262144,
            "num_hidden_layers": 1000, "num_attention_heads": 512, "num_key_value_heads": 64, "head_dim": 128,
            "rope_theta": 1000000, "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;
        Config::parse(json).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_the_settings_fault_only_where_they_say_how_much_there_is() {
        let device = Device::Cpu { threads: 1 };
        let planned = |mib: Option<i64>| {
            let draft = TrainSettingsDraft {
                memory_budget_mib: mib,
                ..TrainSettingsDraft::default()
            };
            let settings = draft.check().unwrap();
            let budget = budget(&giant(), &settings, 512, device).unwrap();
            assert_eq!(budget.is_asked, mib.is_some());
            plan(&giant(), &settings, 512, device, budget).unwrap_err()
        };
        let asked = planned(Some(64));
        assert!(asked.to_string().contains("got 64;"), "{asked}");
        assert_eq!(class_of(&asked), ErrorClass::Invalid);
        let free = planned(None);
        assert_eq!(
            free.to_string(),
            "training needs more memory than is free on cpu"
        );
        let source = std::error::Error::source(&free).unwrap().to_string();
        assert!(source.contains("must be at least"), "{source}");
        // Another worker may have more.
        assert_eq!(class_of(&free), ErrorClass::Handler);
        // On a GPU that others use, less is free than was asked for.
        let capped = |asked: u64| {
            let mut settings = TrainSettingsDraft::default().check().unwrap();
            settings.memory_budget_bytes = Some(asked);
            let free = Budget {
                bytes: 64 << 20,
                is_asked: false,
            };
            plan(&giant(), &settings, 512, device, free).unwrap_err()
        };
        assert_eq!(class_of(&capped(u64::MAX)), ErrorClass::Handler);
        let hopeless = capped(128 << 20);
        assert!(hopeless.to_string().contains("got 128;"), "{hopeless}");
        assert_eq!(class_of(&hopeless), ErrorClass::Invalid);
    }
}
