//! Low-rank adapters: `y += scale · (x Aᵀ) Bᵀ`, each token with the adapter of its slot. Put tokens of one slot next to
//! each other: up to 8 of them read the adapter's matrices once.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use half::bf16;

use super::{eights, need, rule, small};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, Module};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

const TOKENS: usize = 8;

/// `h = x Aᵀ` in fp32. Rows of tokens without an adapter are left as they are.
pub struct LoraShrink<'a> {
    /// `[tokens, rank]`.
    pub h: &'a mut Buffer<f32>,
    /// `[tokens, depth]`.
    pub x: &'a Buffer<bf16>,
    /// `[slots, rank, depth]`; an adapter of lower rank is padded with zeroes.
    pub a: &'a Buffer<bf16>,
    /// `[tokens]`; [`super::NONE`]: no adapter.
    pub slots: &'a Buffer<u32>,
    /// Tokens.
    pub tokens: usize,
    /// Columns of `x`.
    pub depth: usize,
    /// Rank of every slot: a multiple of 8.
    pub rank: usize,
}

impl LoraShrink<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "lora_shrink";
        eights(op, "rank", self.rank)?;
        eights(op, "depth", self.depth)?;
        need(op, "h", self.h.len(), self.tokens * self.rank)?;
        need(op, "x", self.x.len(), self.tokens * self.depth)?;
        need(op, "a", self.a.len(), self.rank * self.depth)?;
        need(op, "slots", self.slots.len(), self.tokens)?;
        let args = [
            Arg::Address(self.h.address(device)),
            Arg::Address(self.x.address(device)),
            Arg::Address(self.a.address(device)),
            Arg::Address(self.slots.address(device)),
            Arg::U32(small(op, "tokens", self.tokens)?),
            Arg::U32(small(op, "depth", self.depth)?),
            Arg::U32(small(op, "rank", self.rank)?),
        ];
        let grid = (
            self.tokens.div_ceil(TOKENS) as u32,
            (self.rank / 8) as u32,
            1,
        );
        // SAFETY: the arguments are the kernel's, and the lengths were checked; slots are the caller's.
        unsafe { device.launch(Module::plain(File::Lora), "lora_shrink", grid, 256, &args) }
    }
}

/// `y[.., start..start + width] += scale · h Bᵀ`.
pub struct LoraExpand<'a> {
    /// `[tokens, y_stride]`.
    pub y: &'a mut Buffer<bf16>,
    /// `[tokens, h_stride]`.
    pub h: &'a Buffer<f32>,
    /// Columns of `h`: of several projections of one `x`, one [`LoraShrink`] makes all.
    pub h_stride: usize,
    /// First column of `h` that is this projection's.
    pub h_start: usize,
    /// `[slots, width, rank]`.
    pub b: &'a Buffer<bf16>,
    /// `[slots]`: alpha / rank, or alpha / √rank with rsLoRA.
    pub scales: &'a Buffer<f32>,
    /// `[tokens]`; [`super::NONE`]: no adapter.
    pub slots: &'a Buffer<u32>,
    /// Tokens.
    pub tokens: usize,
    /// Rank of every slot: a multiple of 8.
    pub rank: usize,
    /// Columns of `y`.
    pub y_stride: usize,
    /// First column that is changed: q, k and v lie in one `y`.
    pub start: usize,
    /// How many are.
    pub width: usize,
}

impl LoraExpand<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "lora_expand";
        eights(op, "rank", self.rank)?;
        let inside = self.start + self.width <= self.y_stride;
        rule(
            op,
            "width",
            self.width,
            &format!("must end within {} columns", self.y_stride),
            inside,
        )?;
        need(op, "y", self.y.len(), self.tokens * self.y_stride)?;
        rule(
            op,
            "h_start",
            self.h_start,
            &format!("must leave {} of {} columns", self.rank, self.h_stride),
            self.h_start + self.rank <= self.h_stride,
        )?;
        need(op, "h", self.h.len(), self.tokens * self.h_stride)?;
        need(
            op,
            "b",
            self.b.len(),
            self.scales.len() * self.width * self.rank,
        )?;
        need(op, "slots", self.slots.len(), self.tokens)?;
        let args = [
            Arg::Address(self.y.address(device)),
            Arg::Address(self.h.address(device)),
            Arg::Address(self.b.address(device)),
            Arg::Address(self.scales.address(device)),
            Arg::Address(self.slots.address(device)),
            Arg::U32(small(op, "tokens", self.tokens)?),
            Arg::U32(small(op, "rank", self.rank)?),
            Arg::U32(small(op, "h_stride", self.h_stride)?),
            Arg::U32(small(op, "h_start", self.h_start)?),
            Arg::U32(small(op, "y_stride", self.y_stride)?),
            Arg::U32(small(op, "start", self.start)?),
            Arg::U32(small(op, "width", self.width)?),
        ];
        let grid = (
            self.tokens.div_ceil(TOKENS) as u32,
            self.width.div_ceil(128) as u32,
            1,
        );
        // SAFETY: the arguments are the kernel's, and the lengths were checked; slots are the caller's.
        unsafe { device.launch(Module::plain(File::Lora), "lora_expand", grid, 128, &args) }
    }
}
