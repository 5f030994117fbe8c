//! Ops on single rows: embedding, norms, SiLU·mul.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use half::bf16;

use super::{eights, need, small, threads_for};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::{File, Module};
use crate::cuda::device::{Arg, Device};
use crate::cuda::error::CudaError;

/// Set in an id of [`Embed`]: the rest is the place in `drawn` that holds the id.
pub const FROM_DRAWN: u32 = 1 << 31;

/// `out[i] = table[ids[i]]`. An id that the table does not have, or a place that `drawn` does not have, gives zeroes.
pub struct Embed<'a> {
    /// `[tokens, hidden]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[tokens]`; with [`FROM_DRAWN`] the place in `drawn`.
    pub ids: &'a Buffer<u32>,
    /// What the sampler drew, by place.
    pub drawn: &'a Buffer<u32>,
    /// `[vocabulary, hidden]`.
    pub table: &'a Buffer<bf16>,
    /// Rows of `out`.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
}

impl Embed<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "embed";
        eights(op, "hidden", self.hidden)?;
        need(op, "out", self.out.len(), self.tokens * self.hidden)?;
        need(op, "ids", self.ids.len(), self.tokens)?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.ids.address(device)),
            Arg::Address(self.drawn.address(device)),
            Arg::Address(self.table.address(device)),
            Arg::U32(small(op, "hidden", self.hidden)?),
            Arg::U32(small(op, "table", self.table.len() / self.hidden)?),
            Arg::U32(small(op, "drawn", self.drawn.len())?),
        ];
        let grid = (small(op, "tokens", self.tokens)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe {
            device.launch(
                Module::plain(File::Embed),
                "embed",
                grid,
                threads_for(self.hidden),
                &args,
            )
        }
    }
}

/// `out[i] = table[rows[i]]`: of which rows logits are wanted. A row that is not there gives zeroes.
pub struct GatherRows<'a> {
    /// `[count, hidden]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[count]`.
    pub rows: &'a Buffer<u32>,
    /// `[.., hidden]`.
    pub table: &'a Buffer<bf16>,
    /// Rows of `out`.
    pub count: usize,
    /// Columns.
    pub hidden: usize,
}

impl GatherRows<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "gather_rows";
        eights(op, "hidden", self.hidden)?;
        need(op, "out", self.out.len(), self.count * self.hidden)?;
        need(op, "rows", self.rows.len(), self.count)?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.rows.address(device)),
            Arg::Address(self.table.address(device)),
            Arg::U32(small(op, "hidden", self.hidden)?),
            Arg::U32(small(op, "table", self.table.len() / self.hidden)?),
        ];
        let grid = (small(op, "count", self.count)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe {
            device.launch(
                Module::plain(File::Embed),
                "gather_rows",
                grid,
                threads_for(self.hidden),
                &args,
            )
        }
    }
}

/// `residual += x`, then `out = weight · residual / rms(residual)`.
pub struct AddRmsNorm<'a> {
    /// `[rows, hidden]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[rows, hidden]`.
    pub residual: &'a mut Buffer<bf16>,
    /// `[rows, hidden]`; nothing: the norm alone, and `residual` stays as it is.
    pub x: Option<&'a Buffer<bf16>>,
    /// `[hidden]`.
    pub weight: &'a Buffer<bf16>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub hidden: usize,
    /// Added to the mean of the squares.
    pub eps: f32,
}

impl AddRmsNorm<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "add_rms_norm";
        let all = self.rows * self.hidden;
        eights(op, "hidden", self.hidden)?;
        need(op, "out", self.out.len(), all)?;
        need(op, "residual", self.residual.len(), all)?;
        need(op, "x", self.x.map_or(all, Buffer::len), all)?;
        need(op, "weight", self.weight.len(), self.hidden)?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.residual.address(device)),
            Arg::Address(self.x.map_or(0, |x| x.address(device))),
            Arg::Address(self.weight.address(device)),
            Arg::U32(small(op, "hidden", self.hidden)?),
            Arg::F32(self.eps),
        ];
        let grid = (small(op, "rows", self.rows)?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked; it asks whether `x` is null.
        unsafe {
            device.launch(
                Module::plain(File::Norm),
                "add_rms_norm",
                grid,
                threads_for(self.hidden),
                &args,
            )
        }
    }
}

/// `out = silu(gate) · up`.
pub struct SiluMul<'a> {
    /// `[rows, width]`.
    pub out: &'a mut Buffer<bf16>,
    /// `[rows, 2 width]`: of each row `width` of gate, then `width` of up.
    pub gate_up: &'a Buffer<bf16>,
    /// Rows.
    pub rows: usize,
    /// Columns of `out`.
    pub width: usize,
}

impl SiluMul<'_> {
    /// Launches it.
    ///
    /// # Errors
    /// When a buffer does not fit.
    pub fn launch(self, device: &Device) -> Result<(), CudaError> {
        let op = "silu_mul";
        let all = self.rows * self.width;
        eights(op, "width", self.width)?;
        need(op, "out", self.out.len(), all)?;
        need(op, "gate_up", self.gate_up.len(), 2 * all)?;
        let args = [
            Arg::Address(self.out.address(device)),
            Arg::Address(self.gate_up.address(device)),
            Arg::U32(small(op, "rows", self.rows)?),
            Arg::U32(small(op, "width", self.width)?),
        ];
        let grid = (small(op, "rows", all.div_ceil(8 * 256))?, 1, 1);
        // SAFETY: the arguments are the kernel's, and the lengths were checked.
        unsafe { device.launch(Module::plain(File::Mlp), "silu_mul", grid, 256, &args) }
    }
}
