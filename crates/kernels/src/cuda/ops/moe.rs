//! Mixture of experts: route, group, multiply each expert's rows by its own matrix, combine.
//!
//! A *pair* is a token and one of its choices: pair `token · chosen + choice`. Its *place* is where it stands when pairs
//! are in the order of their experts.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use half::bf16;

use super::{eights, need, rule, small, threads_for};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, Module};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

const EXPERTS_MAX: usize = 256;
const CHOSEN_MAX: usize = 32;
const M_TILE: usize = 32;
const N_TILE: usize = 64;

fn experts_fit(op: &'static str, experts: usize) -> Result<(), CudaError> {
    rule(
        op,
        "experts",
        experts,
        &format!("must be 1 to {EXPERTS_MAX}"),
        (1..=EXPERTS_MAX).contains(&experts),
    )
}

/// Softmax over the experts, the `chosen` largest.
pub struct MoeRoute<'a> {
    /// `[tokens, chosen]`.
    pub ids: &'a mut Buffer<u32>,
    /// `[tokens, chosen]`.
    pub weights: &'a mut Buffer<f32>,
    /// `[tokens, experts]`.
    pub logits: &'a Buffer<f32>,
    /// Tokens.
    pub tokens: usize,
    /// Experts.
    pub experts: usize,
    /// Experts of a token.
    pub chosen: usize,
    /// Whether the weights of a token add up to 1 (`norm_topk_prob`).
    pub renormalise: bool,
}

impl MoeRoute<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "moe_route";
        experts_fit(op, self.experts)?;
        let most = self.experts.min(CHOSEN_MAX);
        rule(
            op,
            "chosen",
            self.chosen,
            &format!("must be 1 to {most}"),
            (1..=most).contains(&self.chosen),
        )?;
        need(op, "ids", self.ids.len(), self.tokens * self.chosen)?;
        need(op, "weights", self.weights.len(), self.tokens * self.chosen)?;
        need(op, "logits", self.logits.len(), self.tokens * self.experts)?;
        let args = [
            Arg::Address(self.ids.address(device)),
            Arg::Address(self.weights.address(device)),
            Arg::Address(self.logits.address(device)),
            Arg::U32(small(op, "tokens", self.tokens)?),
            Arg::U32(self.experts as u32),
            Arg::U32(self.chosen as u32),
            Arg::U32(u32::from(self.renormalise)),
        ];
        let grid = (self.tokens.div_ceil(4) as u32, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe { device.launch(Module::plain(File::Moe), "moe_route", grid, 128, &args) }
    }
}

/// Puts pairs into the order of their experts.
pub struct MoeGroup<'a> {
    /// `[experts + 1]`: where each expert's pairs begin.
    pub offsets: &'a mut Buffer<u32>,
    /// `[pairs]`: the pair at a place.
    pub order: &'a mut Buffer<u32>,
    /// `[pairs]`: the place of a pair.
    pub places: &'a mut Buffer<u32>,
    /// `[pairs]`.
    pub ids: &'a Buffer<u32>,
    /// Pairs.
    pub pairs: usize,
    /// Experts.
    pub experts: usize,
}

impl MoeGroup<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "moe_group";
        experts_fit(op, self.experts)?;
        need(op, "offsets", self.offsets.len(), self.experts + 1)?;
        need(op, "order", self.order.len(), self.pairs)?;
        need(op, "places", self.places.len(), self.pairs)?;
        need(op, "ids", self.ids.len(), self.pairs)?;
        let args = [
            Arg::Address(self.offsets.address(device)),
            Arg::Address(self.order.address(device)),
            Arg::Address(self.places.address(device)),
            Arg::Address(self.ids.address(device)),
            Arg::U32(small(op, "pairs", self.pairs)?),
            Arg::U32(self.experts as u32),
        ];
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe {
            device.launch(
                Module::plain(File::Moe),
                "moe_group",
                (1, 1, 1),
                EXPERTS_MAX as u32,
                &args,
            )
        }
    }
}

/// Which row of `x` a place reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// That of its token: `x` is `[tokens, depth]`, each token with so many choices.
    Token {
        /// Experts of a token.
        chosen: usize,
    },
    /// Its own: `x` is `[pairs, depth]`.
    Place,
}

/// `out[place] = x[source] · matrixᵀ` with the matrix of the place's expert.
pub struct MoeLinear<'a> {
    /// `[pairs, width]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[.., depth]`, see `source`.
    pub x: &'a Buffer<bf16>,
    /// `[experts, width, depth]`.
    pub matrices: &'a Buffer<bf16>,
    /// Of [`MoeGroup`].
    pub offsets: &'a Buffer<u32>,
    /// Of [`MoeGroup`].
    pub order: &'a Buffer<u32>,
    /// Which row of `x` a place reads.
    pub source: Source,
    /// Pairs.
    pub pairs: usize,
    /// Experts.
    pub experts: usize,
    /// Columns of `out`.
    pub width: usize,
    /// Columns of `x`.
    pub depth: usize,
}

impl MoeLinear<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "moe_linear";
        experts_fit(op, self.experts)?;
        eights(op, "width", self.width)?;
        eights(op, "depth", self.depth)?;
        let (chosen, x_rows) = match self.source {
            Source::Token { chosen } => (chosen, self.pairs / chosen.max(1)),
            Source::Place => (0, self.pairs),
        };
        let is_number = self.source == Source::Place || (1..=CHOSEN_MAX).contains(&chosen);
        rule(
            op,
            "chosen",
            chosen,
            &format!("must be 1 to {CHOSEN_MAX}"),
            is_number,
        )?;
        need(op, "out", self.out.len(), self.pairs * self.width)?;
        need(op, "x", self.x.len(), x_rows * self.depth)?;
        need(
            op,
            "matrices",
            self.matrices.len(),
            self.experts * self.width * self.depth,
        )?;
        need(op, "offsets", self.offsets.len(), self.experts + 1)?;
        need(op, "order", self.order.len(), self.pairs)?;
        // So many tiles there are at most, however the pairs fall.
        let tiles = self.pairs / M_TILE + self.experts.min(self.pairs);
        rule(
            op,
            "pairs",
            self.pairs,
            "must make at most 65535 tiles of 32",
            tiles <= 65_535,
        )?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.x.address(device)),
            Arg::Address(self.matrices.address(device)),
            Arg::Address(self.offsets.address(device)),
            Arg::Address(self.order.address(device)),
            Arg::U32(self.experts as u32),
            Arg::U32(chosen as u32),
            Arg::U32(small(op, "width", self.width)?),
            Arg::U32(small(op, "depth", self.depth)?),
        ];
        let grid = (self.width.div_ceil(N_TILE) as u32, tiles as u32, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe { device.launch(Module::plain(File::Moe), "moe_linear", grid, 128, &args) }
    }
}

/// `out[token]` = the sum over its choices of weight · `y[place]`.
pub struct MoeCombine<'a> {
    /// `[tokens, hidden]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[pairs, hidden]`, by place.
    pub y: &'a Buffer<bf16>,
    /// `[tokens, chosen]`.
    pub weights: &'a Buffer<f32>,
    /// Of [`MoeGroup`].
    pub places: &'a Buffer<u32>,
    /// Tokens.
    pub tokens: usize,
    /// Experts of a token.
    pub chosen: usize,
    /// Columns.
    pub hidden: usize,
}

impl MoeCombine<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "moe_combine";
        let pairs = self.tokens * self.chosen;
        eights(op, "hidden", self.hidden)?;
        need(op, "out", self.out.len(), self.tokens * self.hidden)?;
        need(op, "y", self.y.len(), pairs * self.hidden)?;
        need(op, "weights", self.weights.len(), pairs)?;
        need(op, "places", self.places.len(), pairs)?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.y.address(device)),
            Arg::Address(self.weights.address(device)),
            Arg::Address(self.places.address(device)),
            Arg::U32(small(op, "chosen", self.chosen)?),
            Arg::U32(small(op, "hidden", self.hidden)?),
        ];
        let grid = (small(op, "tokens", self.tokens)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe {
            device.launch(
                Module::plain(File::Moe),
                "moe_combine",
                grid,
                threads_for(self.hidden),
                &args,
            )
        }
    }
}
