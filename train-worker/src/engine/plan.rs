//! The activation plan: what each layer keeps from forward to backward and what it computes again, chosen so that all fits
//! into a budget with the fewest products done twice.

use espalier_kernels::train::{Attention, Cuda, Kind, PACKED_MAX};
use espalier_qwen3::{Config, MlpTensors};

use super::buffers::Buffers;
use super::layout::{Layout, Role, Roles};
use super::model::{Flat, Model, head_rows, heads_of, moe_shape};
use super::settings::{Precision, Settings};

/// What a layer keeps, from the most to the least. `X · Aᵀ` of its adapters it keeps always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// All that the backward reads.
    All,
    /// All but gate and up.
    NoGateUp,
    /// Its input, and what attention gave.
    Heads,
    /// Its input.
    Input,
    /// Its input, on the host.
    Offloaded,
}

impl Keep {
    /// From the most to the least.
    pub const EVERY: [Self; 5] = [
        Self::All,
        Self::NoGateUp,
        Self::Heads,
        Self::Input,
        Self::Offloaded,
    ];

    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "everything",
            Self::NoGateUp => "all but gate and up",
            Self::Heads => "inputs and attention outputs",
            Self::Input => "inputs",
            Self::Offloaded => "inputs on the host",
        }
    }
}

/// Memory that a plan takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlannedBytes {
    /// Frozen weights.
    pub frozen: u64,
    /// What is trained: masters, gradients, moments.
    pub trained: u64,
    /// Activations and their gradients.
    pub activations: u64,
    /// On the host.
    pub host: u64,
}

impl PlannedBytes {
    /// On the device.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.frozen + self.trained + self.activations
    }
}

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What each layer keeps.
    pub keeps: Vec<Keep>,
    /// What attention runs on.
    pub attention: Attention,
    /// The most tokens of a micro-batch.
    pub tokens: usize,
    /// What it takes.
    pub bytes: PlannedBytes,
    /// Floating-point operations of products for each token.
    pub flops_per_token: u64,
    /// Further ones for each supervised token.
    pub flops_per_supervised_token: u64,
    /// Further ones for each pair of a query and a key that it sees, itself included.
    pub flops_per_pair: u64,
}

/// As budgets are given.
const MIB: u64 = 1 << 20;

/// Why there is no plan.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Even the smallest does not fit.
    #[error(
        "`memory_budget_mib` must be at least {} for {tokens} tokens with {} kept, got {}{}",
        least.div_ceil(MIB),
        keep.name(),
        budget / MIB,
        fitting(*fits)
    )]
    TooLittleMemory {
        /// What there is.
        budget: u64,
        /// What the smallest plan takes.
        least: u64,
        /// For so many tokens.
        tokens: usize,
        /// What its layers keep.
        keep: Keep,
        /// The most tokens that would fit, if any.
        fits: Option<usize>,
    },
}

impl PlanError {
    /// What the smallest plan takes, in bytes.
    #[must_use]
    pub fn least(&self) -> u64 {
        let Self::TooLittleMemory { least, .. } = self;
        *least
    }

    /// The same, said of another budget.
    #[must_use]
    pub fn within(mut self, bytes: u64) -> Self {
        let Self::TooLittleMemory { budget, .. } = &mut self;
        *budget = bytes;
        self
    }
}

fn fitting(tokens: Option<usize>) -> String {
    match tokens {
        Some(tokens) => format!("; micro-batches of {tokens} tokens would fit"),
        None => "; the model and what is trained of it do not fit".to_owned(),
    }
}

struct Planner<'a> {
    config: &'a Config,
    layout: Layout,
    roles: Roles,
    precision: Precision,
    attention: Attention,
}

impl Plan {
    /// The plan with the fewest products done twice that fits `budget` bytes on the device, for micro-batches of at most
    /// `tokens` tokens. Loads nothing.
    ///
    /// # Errors
    /// When none fits; the error says what would.
    pub fn choose(
        config: &Config,
        settings: &Settings,
        tokens: usize,
        budget: Option<u64>,
    ) -> Result<Self, PlanError> {
        Self::choose_with(config, settings, tokens, budget, found(settings))
    }

    /// The same, where attention may run that way or on the own kernel.
    pub(crate) fn choose_with(
        config: &Config,
        settings: &Settings,
        tokens: usize,
        budget: Option<u64>,
        best: Attention,
    ) -> Result<Self, PlanError> {
        let planner = Planner::new(config, settings, best);
        let budget = budget.unwrap_or(u64::MAX);
        if let Some(keeps) = planner.fitting(tokens, budget) {
            return Ok(planner.plan(keeps, tokens));
        }
        // The own kernel of attention needs next to nothing for itself.
        let planner = Planner {
            attention: Attention::Own,
            ..planner
        };
        if let Some(keeps) = planner.fitting(tokens, budget) {
            return Ok(planner.plan(keeps, tokens));
        }
        let keep = planner.leanest();
        let least = |tokens| {
            let keeps = vec![keep; config.layers];
            planner.bytes(&keeps, tokens).device()
        };
        // The most tokens that fit: bytes grow with tokens.
        let (mut fits, mut not) = (0, tokens);
        while not - fits > 1 {
            let middle = fits.midpoint(not);
            match least(middle) <= budget {
                true => fits = middle,
                false => not = middle,
            }
        }
        Err(PlanError::TooLittleMemory {
            budget,
            least: least(tokens),
            tokens,
            keep,
            fits: (fits > 0).then_some(fits),
        })
    }

    /// The plan that keeps so much of each layer, whatever it takes.
    ///
    /// # Panics
    /// When there are more or fewer than the model's layers.
    #[must_use]
    pub fn with(config: &Config, settings: &Settings, tokens: usize, keeps: Vec<Keep>) -> Self {
        assert_eq!(keeps.len(), config.layers);
        Planner::new(config, settings, found(settings)).plan(keeps, tokens)
    }

    /// Floating-point operations of a forward and backward over documents.
    #[must_use]
    pub fn flops(&self, ends: &[usize], supervised: u64) -> u64 {
        let mut start = 0;
        let mut pairs = 0;
        for end in ends {
            let len = (end - start) as u64;
            pairs += len * (len + 1) / 2;
            start = *end;
        }
        self.flops_per_token * start as u64
            + self.flops_per_supervised_token * supervised
            + self.flops_per_pair * pairs
    }
}

/// What attention would run on.
fn found(settings: &Settings) -> Attention {
    match settings.precision {
        Precision::F32 => Attention::Own,
        Precision::Bf16 => Attention::found(),
    }
}

/// The first `lean` layers keep less: what they have on the host is needed last.
fn mixed(layers: usize, more: Keep, less: Keep, lean: usize) -> Vec<Keep> {
    let keep = |layer| if layer < lean { less } else { more };
    (0..layers).map(keep).collect()
}

impl<'a> Planner<'a> {
    fn new(config: &'a Config, settings: &Settings, attention: Attention) -> Self {
        let (layout, roles) = Layout::new(config, settings);
        Self {
            config,
            layout,
            roles,
            precision: settings.precision,
            attention,
        }
    }

    /// What layers may keep, from the most to the least. The memory of the CPU is the host's.
    fn choices(&self) -> &'static [Keep] {
        match self.precision {
            Precision::F32 => &Keep::EVERY[..Keep::EVERY.len() - 1],
            Precision::Bf16 => &Keep::EVERY,
        }
    }

    /// The least that layers may keep.
    fn leanest(&self) -> Keep {
        let choices = self.choices();
        choices[choices.len() - 1]
    }

    /// The most that can be kept within `budget` bytes.
    fn fitting(&self, tokens: usize, budget: u64) -> Option<Vec<Keep>> {
        let layers = self.config.layers;
        let plans = self.choices().windows(2).flat_map(|pair| {
            let (more, less) = (pair[0], pair[1]);
            (0..layers).map(move |lean| mixed(layers, more, less, lean))
        });
        let mut plans = plans.chain([vec![self.leanest(); layers]]);
        plans.find(|keeps| self.bytes(keeps, tokens).device() <= budget)
    }

    fn plan(&self, keeps: Vec<Keep>, tokens: usize) -> Plan {
        let bytes = self.bytes(&keeps, tokens);
        let mut token = 0;
        let mut pair = 0;
        for (index, keep) in keeps.iter().enumerate() {
            token += self.layer_products(index, *keep);
            let again = u64::from(*keep >= Keep::Input);
            let q_width = (self.config.heads * self.config.head_dim) as u64;
            // Forward: scores and mix; backward: scores, and gradients of weights, q, k and v.
            pair += (2 + 2 * again + 5) * q_width;
        }
        let head = (head_rows(self.config) * self.config.hidden_size) as u64;
        let passes = if self.roles.embedding.is_some() { 3 } else { 2 };
        Plan {
            keeps,
            attention: self.attention,
            tokens,
            bytes,
            flops_per_token: 2 * token,
            flops_per_supervised_token: 2 * passes * head,
            flops_per_pair: 2 * pair,
        }
    }

    fn bytes(&self, keeps: &[Keep], tokens: usize) -> PlannedBytes {
        let (weights, exact) = match self.precision {
            Precision::F32 => (4, 4),
            Precision::Bf16 => (2, 4),
        };
        let are_exact = self.precision == Precision::F32;
        let mut device = 0;
        let mut host = 0;
        let mut take = |kind: Kind, len: usize, on_host: bool| {
            let size = match kind {
                Kind::Weights | Kind::Activations => weights,
                Kind::Exact | Kind::Ids => exact,
                Kind::Bytes => 1,
            };
            *(if on_host { &mut host } else { &mut device }) += size * len as u64;
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(_) = Buffers::take(self.config, &self.roles, keeps, tokens, &mut take);
        device += self.room(tokens);
        PlannedBytes {
            frozen: Model::frozen_bytes(self.config, &self.roles, weights),
            trained: Flat::bytes(&self.layout, weights, exact, are_exact),
            activations: device,
            host,
        }
    }

    /// What ops take for themselves: the CPU packs an operand of each product.
    fn room(&self, tokens: usize) -> u64 {
        let config = self.config;
        let chosen = config.moe.as_ref().map_or(0, |moe| moe.top_k);
        match self.precision {
            Precision::F32 => 4 * self.largest_operand(tokens).min(PACKED_MAX) as u64,
            Precision::Bf16 => {
                let heads = heads_of(config);
                Cuda::room_bytes(tokens, &heads, self.attention, chosen, config.hidden_size)
            }
        }
    }

    /// Elements of the largest operand that a product packs: weights, or in gradients of weights their input.
    fn largest_operand(&self, tokens: usize) -> usize {
        let config = self.config;
        let q = config.heads * config.head_dim;
        let dense = config.intermediate_size.max(q).max(config.hidden_size);
        let wide = (2 * config.intermediate_size).max(config.qkv_width());
        let weights = wide.max(head_rows(config)) * config.hidden_size;
        weights.max(tokens * dense).max(q * config.hidden_size)
    }

    /// Multiply-adds of a layer for each token: forward, backward, and what is done again.
    fn layer_products(&self, index: usize, keep: Keep) -> u64 {
        let tensors = self.config.layer_tensors(index);
        let roles = &self.roles.layers[index];
        let count = |matrix: &espalier_qwen3::Matrix| matrix.count() as u64;
        let (qkv, o) = (count(&tensors.qkv), count(&tensors.o));
        let mut sum = 0;
        let mut site = |products: u64, role: &Role, inputs: usize, again: bool, input: bool| {
            sum += site_products(products, role, inputs as u64, again, input);
        };
        // Nothing below the first layer's adapters is trained, so that their input's gradient is not wanted.
        let wanted = index > 0 || self.roles.embedding.is_some();
        let again = keep >= Keep::Heads;
        site(qkv, &roles.qkv, tensors.qkv.inputs, again, wanted);
        site(o, &roles.o, tensors.o.inputs, again, true);
        match &tensors.mlp {
            MlpTensors::Dense(mlp) => {
                let gate_up = count(&mlp.gate_up);
                let again = keep >= Keep::NoGateUp;
                site(gate_up, &roles.gate_up, mlp.gate_up.inputs, again, true);
                let down = count(&mlp.down);
                site(down, &roles.down, mlp.down.inputs, false, true);
                sum
            }
            MlpTensors::Sparse { router, .. } => sum + self.sparse_products(count(router), keep),
        }
    }

    /// Router: forward, again, backward. Experts: gate and up, down, and the same backward.
    fn sparse_products(&self, router: u64, keep: Keep) -> u64 {
        let Some(moe) = moe_shape(self.config) else {
            return 0;
        };
        let one = (moe.top_k * moe.width * self.config.hidden_size) as u64;
        let again = if keep >= Keep::NoGateUp { 2 * one } else { 0 };
        3 * router + 6 * one + again
    }
}

/// Multiply-adds of a matrix for each token.
fn site_products(products: u64, role: &Role, inputs: u64, again: bool, wanted: bool) -> u64 {
    let passes = 1 + u64::from(again) + u64::from(wanted);
    match role {
        Role::Frozen => passes * products,
        Role::Full(_) => (passes + 1) * products,
        Role::Adapted(adapted) => {
            let a = adapted.ranks() as u64 * inputs;
            let parts = adapted.parts.iter().map(|part| part.outputs * adapted.rank);
            let b = parts.sum::<usize>() as u64;
            // A: forward, its gradient, the input's. B: forward, again, its gradient, that of what it reads.
            let a = a * (2 + u64::from(wanted));
            passes * products + a + b * (3 + u64::from(again))
        }
    }
}
