//! What each op must compute, for whoever computes it: one body a test, the exact result in f64, a stated tolerance.
//!
//! Tolerances are ‖out − exact‖ / ‖exact‖ in units of the backend's rounding, times the roundings that an op makes on the
//! way from rounded inputs.

mod attention;
mod layers;
mod sampling;

/// One way to compute the ops. Numbers come and go as f32; a backend that stores bf16 is given what bf16 can hold.
pub trait Ops {
    /// The nearest number that inputs can have.
    fn round(&self, x: f32) -> f32;
    /// Relative error of one rounding of a vector, by its norm, with room for the order of sums.
    fn unit(&self) -> f64;

    /// `residual + x` (as stored), and its norm times `weight`.
    fn add_rms_norm(
        &self,
        residual: &[f32],
        x: Option<&[f32]>,
        weight: &[f32],
        eps: f32,
    ) -> (Vec<f32>, Vec<f32>);
    /// `silu(gate) · up`, of rows `[gate, up]` of twice `width`.
    fn silu_mul(&self, gate_up: &[f32], width: usize) -> Vec<f32>;
    /// `x[rows, depth] · weight[width, depth]ᵀ`, not rounded at the end.
    fn linear(
        &self,
        x: &[f32],
        weight: &[f32],
        rows: usize,
        width: usize,
        depth: usize,
    ) -> Vec<f32>;
    /// Attention of all steps of a case; by sequence `[positions, heads, head_dim]`.
    fn attention(&self, case: &AttentionCase) -> Vec<Vec<f32>>;
    /// A block of experts on `x`, with routing by `logits`.
    fn experts(&self, case: &ExpertsCase) -> Vec<f32>;
    /// `y` with the adapters of its tokens added to columns from `start` on.
    fn adapters(&self, case: &AdaptersCase) -> Vec<f32>;
    /// Draws for rows of `columns` logits.
    fn sample(&self, logits: &[f32], columns: usize, ids_end: usize, how: &[How]) -> Vec<Drawn>;
}

pub type Body = fn(&dyn Ops);

pub const TESTS: &[(&str, Body)] = &[
    ("rms_norm_is_that_of_f64", layers::rms_norm),
    ("silu_mul_is_that_of_f64", layers::silu_mul),
    ("linear_is_that_of_f64", layers::linear),
    ("experts_are_those_of_f64", layers::experts),
    ("adapters_are_those_of_f64", layers::adapters),
    ("attention_in_one_piece", attention::in_one_piece),
    (
        "attention_in_chunks_then_one_by_one",
        attention::in_chunks_then_one_by_one,
    ),
    (
        "attention_of_many_rows_at_once",
        attention::of_many_rows_at_once,
    ),
    ("attention_over_a_long_row", attention::over_a_long_row),
    ("greedy_takes_the_first_of_the_largest", sampling::greedy),
    ("draws_follow_the_exact_distribution", sampling::chi_square),
    ("seeds_reproduce_in_any_batch", sampling::seeds),
    ("padding_and_masked_ids_are_never_drawn", sampling::never),
    (
        "penalties_and_biases_change_the_logits",
        sampling::penalties,
    ),
    ("logprobs_are_those_of_the_model", sampling::logprobs),
    ("rows_without_an_id_say_so", sampling::nothing),
];

pub struct AttentionCase {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f32,
    pub theta: f64,
    /// `[head_dim]` each.
    pub q_weight: Vec<f32>,
    pub k_weight: Vec<f32>,
    /// By sequence: `[positions, heads + 2 kv_heads, head_dim]`.
    pub qkv: Vec<Vec<f32>>,
    /// Each step: rows of (sequence, first position, tokens).
    pub steps: Vec<Vec<(usize, usize, usize)>>,
}

impl AttentionCase {
    /// By position `head_dim / 2` cosines, then as many sines.
    pub fn turns(&self) -> Vec<f32> {
        let positions = self.qkv.iter().map(|s| s.len()).max().unwrap_or(0) / self.width();
        let half = self.head_dim / 2;
        let angle = |p: usize, i: usize| {
            p as f64 * self.theta.powf(-(2.0 * i as f64) / self.head_dim as f64)
        };
        let row = |p| {
            (0..half)
                .map(move |i| angle(p, i).cos())
                .chain((0..half).map(move |i| angle(p, i).sin()))
        };
        (0..positions).flat_map(row).map(|x| x as f32).collect()
    }

    /// Elements of a token of `qkv`.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    pub fn positions(&self, sequence: usize) -> usize {
        self.qkv[sequence].len() / self.width()
    }
}

pub struct ExpertsCase {
    pub tokens: usize,
    pub experts: usize,
    pub chosen: usize,
    pub hidden: usize,
    pub width: usize,
    pub renormalise: bool,
    /// `[tokens, experts]`.
    pub logits: Vec<f32>,
    /// `[tokens, hidden]`.
    pub x: Vec<f32>,
    /// `[experts, 2 width, hidden]`.
    pub gate_up: Vec<f32>,
    /// `[experts, hidden, width]`.
    pub down: Vec<f32>,
}

pub struct AdaptersCase {
    pub tokens: usize,
    pub depth: usize,
    pub rank: usize,
    pub width: usize,
    pub y_width: usize,
    pub start: usize,
    /// By token; nothing: no adapter.
    pub slots: Vec<Option<u32>>,
    pub scales: Vec<f32>,
    /// `[tokens, depth]`.
    pub x: Vec<f32>,
    /// `[tokens, y_width]`.
    pub y: Vec<f32>,
    /// `[slots, rank, depth]`.
    pub a: Vec<f32>,
    /// `[slots, width, rank]`.
    pub b: Vec<f32>,
}

#[derive(Debug, Clone)]
pub struct How {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub seed: u64,
    pub step: u32,
    pub top_count: u32,
    pub repetition: f32,
    pub presence: f32,
    pub frequency: f32,
    pub prompt: Vec<u32>,
    pub written: Vec<u32>,
    pub bias: Vec<(u32, f32)>,
    pub allowed: Option<Vec<u32>>,
}

impl How {
    pub fn at(temperature: f32) -> Self {
        Self {
            temperature,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            step: 0,
            top_count: 0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            prompt: Vec::new(),
            written: Vec::new(),
            bias: Vec::new(),
            allowed: None,
        }
    }
}

/// Ids of the prompt and of what was written, each once, and how often the latter has it.
pub fn seen(how: &How) -> Vec<(u32, u32)> {
    let ids: std::collections::BTreeSet<u32> =
        how.prompt.iter().chain(&how.written).copied().collect();
    let times = |id: u32| how.written.iter().filter(|written| **written == id).count() as u32;
    ids.into_iter().map(|id| (id, times(id))).collect()
}

#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Nothing where no id can be drawn.
    pub id: Option<u32>,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// Numbers that look random and are the same in every run: about normal, of deviation 1.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| self.unit()).sum();
        sum - 6.0
    }

    /// `len` of them, of deviation `scale`, as the backend can store them.
    pub fn stored(&mut self, ops: &dyn Ops, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| ops.round(self.normal() * scale)).collect()
    }
}

/// The norm of the error over the norm of what is exact must be within `roundings` units.
pub fn close(what: &str, ops: &dyn Ops, got: &[f32], exact: &[f64], roundings: f64) {
    assert_eq!(got.len(), exact.len(), "{what}");
    assert!(
        got.iter().all(|x| x.is_finite()),
        "{what}: not a number among the results"
    );
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(exact).map(|(g, e)| f64::from(*g) - e))
        / norm(&mut exact.iter().copied());
    let allowed = ops.unit() * roundings;
    assert!(
        error <= allowed,
        "{what}: off by {error:.2e}, {allowed:.2e} allowed"
    );
}
