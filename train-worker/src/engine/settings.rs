//! What an engine is told: what is trained, by which optimizer, on which device, within how much memory.

use espalier_kernels::cuda::{library, report};
use espalier_kernels::{AUTO_ORDINAL, DeviceChoice};
use espalier_qwen3::Config;

use super::EngineError;

/// A projection of a layer that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// From heads to the residual stream.
    O,
    /// Of the MLP: what is let through.
    Gate,
    /// Of the MLP: what it is let through of.
    Up,
    /// Of the MLP: back to the residual stream.
    Down,
}

impl Projection {
    /// All of a dense layer.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
    /// Those of attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// What PEFT's `target_modules` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The projection of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Its module inside a layer.
    pub(crate) fn module(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }
}

/// A low-rank adapter (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    /// Rank of each pair.
    pub rank: usize,
    /// Scale is `alpha / rank`, or `alpha / sqrt(rank)`.
    pub alpha: f64,
    /// The second of these (Kalajdzievski 2023).
    pub rslora: bool,
    /// What is adapted; experts of a mixture never are.
    pub targets: Vec<Projection>,
}

impl LoraSettings {
    /// What products of `B · A` are multiplied with.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The default targets: all projections of a dense model, attention's of a mixture of experts.
    #[must_use]
    pub fn default_targets(config: &Config) -> Vec<Projection> {
        match config.moe {
            None => Projection::ALL.to_vec(),
            Some(_) => Projection::ATTENTION.to_vec(),
        }
    }
}

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// An adapter; the model is frozen.
    Lora(LoraSettings),
    /// All weights: of small dense models.
    Full,
}

/// How moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// 8 bytes a parameter.
    Fp32,
    /// 2 bytes a parameter, but for tensors of fewer than 4,096 elements.
    Eight,
}

/// AdamW.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Of all that is trained but norms.
    pub weight_decay: f64,
    /// How moments are kept.
    pub bits: Bits,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            bits: Bits::Fp32,
        }
    }
}

/// What is computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// Weights and activations in bf16, masters, gradients and moments in f32. For GPUs.
    Bf16,
}

impl Precision {
    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Refuses settings of another precision: this is what `place` computes in.
    pub(super) fn only(self, settings: &Settings, place: &str) -> Result<(), EngineError> {
        match settings.precision == self {
            true => Ok(()),
            false => {
                let rule = format!("must be {} on {place}", self.name());
                refuse("precision", settings.precision.name(), rule)
            }
        }
    }
}

/// Where it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// On the CPU.
    Cpu {
        /// Threads.
        threads: usize,
    },
    /// On a GPU.
    Cuda {
        /// N of `cuda:N`.
        ordinal: usize,
    },
}

impl Device {
    /// `auto` (the first GPU where it can be used), `cpu`, or `cuda:N`; on the CPU with so many threads.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(text: &str, threads: usize) -> Result<Self, EngineError> {
        match text.parse() {
            Ok(choice) => Ok(Self::choose(choice, threads)?.0),
            Err(rule) => refuse("device", text, rule),
        }
    }

    /// The device that is asked for, on the CPU with so many threads; and where `auto` is the CPU, what is in the way of a
    /// GPU. The driver may take seconds.
    ///
    /// # Errors
    /// The GPU that is named cannot be used.
    pub fn choose(
        choice: DeviceChoice,
        threads: usize,
    ) -> Result<(Self, Option<String>), EngineError> {
        let cpu = Self::Cpu { threads };
        let ordinal = match choice {
            DeviceChoice::Cpu => return Ok((cpu, None)),
            DeviceChoice::Auto => AUTO_ORDINAL as usize,
            DeviceChoice::Cuda(ordinal) => ordinal as usize,
        };
        library::look_in(&[]);
        match (report::look().usable(ordinal), choice) {
            (Ok(_), _) => Ok((Self::Cuda { ordinal }, None)),
            (Err(reason), DeviceChoice::Auto) => Ok((cpu, Some(reason))),
            (Err(reason), _) => Err(EngineError::NoGpu { ordinal, reason }),
        }
    }

    /// What it computes in.
    #[must_use]
    pub fn precision(self) -> Precision {
        match self {
            Self::Cpu { .. } => Precision::F32,
            Self::Cuda { .. } => Precision::Bf16,
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu { .. } => f.write_str("cpu"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// All that an engine is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What is trained.
    pub trained: Trained,
    /// By which optimizer.
    pub optimizer: AdamW,
    /// Gradients are scaled down to this norm of all together.
    pub clip_norm: Option<f32>,
    /// Of what is drawn: the adapter's `A`s.
    pub seed: u64,
    /// What is computed in.
    pub precision: Precision,
    /// What the device may hold of the model, of what is trained and of activations.
    pub memory_budget_bytes: Option<u64>,
    /// The most tokens of a micro-batch.
    pub tokens_max: usize,
}

/// Largest rank: several times what any adapter of such a model needs.
const RANK_MAX: usize = 1024;

impl Settings {
    /// Checks settings against a model.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn check(&self, config: &Config) -> Result<(), EngineError> {
        if !(1..=config.max_positions).contains(&self.tokens_max) {
            let rule = format!("must be from 1 to the model's {}", config.max_positions);
            return refuse("tokens_max", self.tokens_max, rule);
        }
        if self
            .clip_norm
            .is_some_and(|norm| !(norm.is_finite() && norm > 0.0))
        {
            let norm = self.clip_norm.unwrap_or_default();
            return refuse("clip_norm", norm, "must be a finite number above 0");
        }
        self.optimizer.check()?;
        match &self.trained {
            Trained::Lora(lora) => lora.check(config),
            Trained::Full if config.moe.is_some() => {
                let rule = "must be an adapter for a mixture of experts: its experts are frozen";
                refuse("trained", "all weights", rule)
            }
            Trained::Full => Ok(()),
        }
    }
}

impl AdamW {
    fn check(&self) -> Result<(), EngineError> {
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return refuse(field, beta, "must be in [0, 1)");
            }
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return refuse("eps", self.eps, "must be a finite number above 0");
        }
        if !(0.0..=1.0).contains(&self.weight_decay) {
            return refuse("weight_decay", self.weight_decay, "must be in [0, 1]");
        }
        Ok(())
    }
}

impl LoraSettings {
    fn check(&self, config: &Config) -> Result<(), EngineError> {
        if !(1..=RANK_MAX).contains(&self.rank) {
            let rule = format!("must be a whole number from 1 to {RANK_MAX}");
            return refuse("rank", self.rank, rule);
        }
        if !(self.alpha > 0.0 && self.alpha <= 1e6) {
            return refuse(
                "alpha",
                self.alpha,
                "must be a number above 0, at most 1000000",
            );
        }
        let mut sorted = self.targets.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != self.targets.len() {
            return refuse(
                "targets",
                self.target_names(),
                "must name each projection once",
            );
        }
        let dense = (0..config.layers).any(|layer| !config.is_sparse(layer));
        let adapts = |target: &Projection| target.module() == "self_attn" || dense;
        if !self.targets.iter().any(adapts) {
            let rule = "must name a projection that this model has outside of its experts";
            return refuse("targets", self.target_names(), rule);
        }
        Ok(())
    }

    fn target_names(&self) -> String {
        let names: Vec<&str> = self.targets.iter().map(|target| target.name()).collect();
        format!("[{}]", names.join(", "))
    }
}

fn refuse<T>(
    field: &'static str,
    value: impl ToString,
    rule: impl Into<String>,
) -> Result<T, EngineError> {
    Err(EngineError::Setting {
        field,
        value: value.to_string(),
        rule: rule.into(),
    })
}
