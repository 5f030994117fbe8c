//! Launches of the ops on single rows.

#![expect(unsafe_code, reason = "kernels are launched by address")]

use super::super::{BufferId, Heads, Kind, Mat, Rotation, Slice};
use super::{Cuda, count};
use crate::cuda::compile::{File, Module};
use crate::cuda::device::Arg;
use crate::cuda::error::CudaError;

/// Chunks of rows whose sums are made side by side.
const CHUNKS_MAX: usize = 64;
/// As the kernel has it.
const ROTATE_BLOCKS: usize = 512;
/// As the kernel has it.
const ROTATE_DIM_MAX: usize = 256;

/// Threads of a block for a row of `columns`, 8 a thread: whole warps, 1,024 at most.
fn threads_for(columns: usize) -> u32 {
    count(columns.div_ceil(8).next_multiple_of(32).clamp(32, 1024))
}

/// Whether all rows are whole 16 bytes and begin at such; `width` is what is moved of each.
pub(super) fn whole(width: usize, mats: &[Mat], addresses: &[u64]) -> u32 {
    let rows = mats.iter().all(|mat| mat.stride.is_multiple_of(8));
    let starts = addresses.iter().all(|address| address.is_multiple_of(16));
    u32::from(width.is_multiple_of(8) && rows && starts)
}

/// Room that the ops on rows take for themselves: bytes.
pub(super) fn room_bytes(tokens: usize, hidden: usize, dim: usize) -> u64 {
    let norm = tokens + CHUNKS_MAX * hidden;
    let rotate = ROTATE_BLOCKS * 2 * dim;
    4 * norm.max(rotate) as u64
}

impl Cuda {
    fn launch_rows(
        &self,
        name: &'static str,
        grid: (usize, usize),
        block: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let grid = (count(grid.0), count(grid.1), 1);
        // SAFETY: callers give the kernel's arguments; matrices lie in their buffers, as the arena has checked.
        unsafe {
            self.device
                .launch(Module::plain(File::TrainRows), name, grid, block, args)
        }
    }

    /// `gather` or `scatter`; `rows` of the table that ids name.
    pub(super) fn pick(
        &self,
        name: &'static str,
        rows: Slice,
        from: Mat,
        to: Mat,
    ) -> Result<(), CudaError> {
        assert!(from.cols == to.cols);
        let (each, table) = match name {
            "gather" => (to, from),
            _ => (from, to),
        };
        assert!(rows.len == each.rows);
        let (to_at, from_at) = (
            self.arena.narrow(&self.device, to),
            self.arena.narrow(&self.device, from),
        );
        let args = [
            Arg::Address(to_at),
            Arg::Address(from_at),
            Arg::Address(self.arena.slice(&self.device, rows, Kind::Ids)),
            Arg::U32(count(table.rows)),
            Arg::U32(count(to.cols)),
            Arg::U32(count(to.stride)),
            Arg::U32(count(from.stride)),
            Arg::U32(whole(to.cols, &[to, from], &[to_at, from_at])),
        ];
        self.launch_rows(name, (each.rows, 1), threads_for(to.cols), &args)
    }

    pub(super) fn add_rows(
        &self,
        ids: BufferId,
        d_out: Mat,
        d_table: Mat,
    ) -> Result<(), CudaError> {
        assert!(d_out.cols == d_table.cols);
        let table = Slice::new(d_table.buffer, d_table.start, d_table.span());
        let args = [
            Arg::Address(self.arena.slice(&self.device, table, Kind::Exact)),
            Arg::Address(self.arena.narrow(&self.device, d_out)),
            Arg::Address(self.arena.first(&self.device, ids, d_out.rows, Kind::Ids)),
            Arg::U32(count(d_out.rows)),
            Arg::U32(count(d_table.rows)),
            Arg::U32(count(d_out.cols)),
            Arg::U32(count(d_table.stride)),
            Arg::U32(count(d_out.stride)),
        ];
        self.launch_rows("embed_grad", (d_out.rows, 1), 256, &args)
    }

    pub(super) fn rms_norm(
        &self,
        eps: f64,
        x: Mat,
        weight: Slice,
        y: Mat,
    ) -> Result<(), CudaError> {
        assert!(x.rows == y.rows && x.cols == y.cols && weight.len == x.cols);
        let at = [
            self.arena.narrow(&self.device, y),
            self.arena.narrow(&self.device, x),
            self.arena.slice(&self.device, weight, Kind::Weights),
        ];
        let [y_at, x_at, weight_at] = at.map(Arg::Address);
        let args = [
            y_at,
            x_at,
            weight_at,
            Arg::U32(count(x.cols)),
            Arg::U32(count(y.stride)),
            Arg::U32(count(x.stride)),
            Arg::F32(eps as f32),
            Arg::U32(whole(x.cols, &[x, y], &at)),
        ];
        self.launch_rows("rms_norm", (x.rows, 1), threads_for(x.cols), &args)
    }

    pub(super) fn rms_norm_grad(
        &mut self,
        eps: f64,
        [x, d_y, d_x]: [Mat; 3],
        weight: Slice,
        d_weight: Option<Slice>,
    ) -> Result<(), CudaError> {
        assert!(x.cols == d_y.cols && x.cols == d_x.cols && weight.len == x.cols);
        assert!(x.rows == d_y.rows && x.rows == d_x.rows);
        let chunk_rows = x.rows.div_ceil(CHUNKS_MAX).max(1);
        let chunks = x.rows.div_ceil(chunk_rows);
        let scales = match d_weight {
            Some(_) => self.room(4 * (x.rows + chunks * x.cols))?,
            None => 0,
        };
        let at = [d_x, x, d_y].map(|mat| self.arena.narrow(&self.device, mat));
        let weight = self.arena.slice(&self.device, weight, Kind::Weights);
        let [d_x_at, x_at, d_y_at] = at;
        let args = [
            Arg::Address(d_x_at),
            Arg::Address(scales),
            Arg::Address(x_at),
            Arg::Address(weight),
            Arg::Address(d_y_at),
            Arg::U32(count(x.cols)),
            Arg::U32(count(d_x.stride)),
            Arg::U32(count(x.stride)),
            Arg::U32(count(d_y.stride)),
            Arg::F32(eps as f32),
            Arg::U32(whole(
                x.cols,
                &[x, d_x, d_y],
                &[d_x_at, x_at, d_y_at, weight],
            )),
        ];
        self.launch_rows("rms_norm_grad", (x.rows, 1), threads_for(x.cols), &args)?;
        let Some(d_weight) = d_weight else {
            return Ok(());
        };
        let parts = scales + 4 * x.rows as u64;
        let args = [
            Arg::Address(parts),
            Arg::Address(x_at),
            Arg::Address(d_y_at),
            Arg::Address(scales),
            Arg::U32(count(x.rows)),
            Arg::U32(count(chunk_rows)),
            Arg::U32(count(x.cols)),
            Arg::U32(count(x.stride)),
            Arg::U32(count(d_y.stride)),
        ];
        self.launch_rows(
            "norm_weight_grad",
            (x.cols.div_ceil(128), chunks),
            128,
            &args,
        )?;
        self.add_columns(d_weight, parts, chunks, x.cols)
    }

    /// Adds sums of columns of `parts`, rows `stride` apart, to exact numbers.
    fn add_columns(
        &self,
        to: Slice,
        parts: u64,
        rows: usize,
        stride: usize,
    ) -> Result<(), CudaError> {
        let args = [
            Arg::Address(self.arena.slice(&self.device, to, Kind::Exact)),
            Arg::Address(parts),
            Arg::U32(count(rows)),
            Arg::U32(count(to.len)),
            Arg::U32(count(stride)),
        ];
        self.launch_rows("add_columns", (to.len.div_ceil(32), 1), 1024, &args)
    }

    /// What both directions of rotation read.
    fn turning(&self, heads: &Heads, with: &Rotation, tokens: usize) -> [Arg; 4] {
        assert!(with.q_norm.len == heads.dim && with.k_norm.len == heads.dim);
        assert!(heads.dim <= ROTATE_DIM_MAX, "{} elements a head", heads.dim);
        let turns = self.arena.len(with.turns);
        [
            self.arena.slice(&self.device, with.q_norm, Kind::Weights),
            self.arena.slice(&self.device, with.k_norm, Kind::Weights),
            self.arena
                .first(&self.device, with.turns, turns, Kind::Exact),
            self.arena
                .first(&self.device, with.positions, tokens, Kind::Ids),
        ]
        .map(Arg::Address)
    }

    pub(super) fn turn(
        &self,
        heads: &Heads,
        with: &Rotation,
        qkv: Mat,
        qk: Mat,
    ) -> Result<(), CudaError> {
        assert!(qkv.cols == heads.qkv_width() && qk.cols == heads.qk_width());
        let all = heads.q + heads.kv;
        let mut args = vec![
            Arg::Address(self.arena.narrow(&self.device, qk)),
            Arg::Address(self.arena.narrow(&self.device, qkv)),
        ];
        args.extend(self.turning(heads, with, qk.rows));
        for number in [qk.rows, heads.q, all, heads.dim, qk.stride, qkv.stride] {
            args.push(Arg::U32(count(number)));
        }
        args.push(Arg::F32(heads.eps as f32));
        self.launch_rows("rotate", ((qk.rows * all).div_ceil(8), 1), 256, &args)
    }

    pub(super) fn turn_grad(
        &mut self,
        heads: &Heads,
        with: &Rotation,
        [qkv, d_qkv]: [Mat; 2],
        d_norms: Option<[Slice; 2]>,
    ) -> Result<(), CudaError> {
        assert!(qkv.cols == heads.qkv_width() && d_qkv.cols == heads.qkv_width());
        let (all, dim) = (heads.q + heads.kv, heads.dim);
        let parts = match d_norms {
            Some(_) => self.room(4 * ROTATE_BLOCKS * 2 * dim)?,
            None => 0,
        };
        let mut args = vec![
            Arg::Address(self.arena.narrow(&self.device, d_qkv)),
            Arg::Address(parts),
            Arg::Address(self.arena.narrow(&self.device, qkv)),
        ];
        args.extend(self.turning(heads, with, qkv.rows));
        for number in [qkv.rows, heads.q, all, dim, d_qkv.stride, qkv.stride] {
            args.push(Arg::U32(count(number)));
        }
        args.push(Arg::F32(heads.eps as f32));
        self.launch_rows("rotate_grad", (ROTATE_BLOCKS, 1), 256, &args)?;
        let Some([q, k]) = d_norms else {
            return Ok(());
        };
        self.add_columns(q, parts, ROTATE_BLOCKS, 2 * dim)?;
        self.add_columns(k, parts + 4 * dim as u64, ROTATE_BLOCKS, 2 * dim)
    }

    /// `swiglu` or `swiglu_grad`.
    pub(super) fn gate(&self, name: &'static str, gate_up: Mat, out: Mat) -> Result<(), CudaError> {
        assert!(gate_up.cols == 2 * out.cols && gate_up.rows == out.rows);
        let (gate_up_at, out_at) = (
            self.arena.narrow(&self.device, gate_up),
            self.arena.narrow(&self.device, out),
        );
        let eights = out.cols.div_ceil(8);
        let args = [
            Arg::Address(out_at),
            Arg::Address(gate_up_at),
            Arg::U32(count(out.rows)),
            Arg::U32(count(out.cols)),
            Arg::U32(count(eights)),
            Arg::U32(count(out.stride)),
            Arg::U32(count(gate_up.stride)),
            Arg::U32(whole(out.cols, &[gate_up, out], &[gate_up_at, out_at])),
        ];
        let blocks = (out.rows * eights).div_ceil(256);
        self.launch_rows(name, (blocks, 1), 256, &args)
    }

    pub(super) fn losses(
        &self,
        logits: Mat,
        classes: usize,
        targets: Slice,
        losses: Slice,
        grad: Option<f64>,
    ) -> Result<(), CudaError> {
        assert!(targets.len == logits.rows && losses.len == logits.rows);
        assert!((1..=logits.cols).contains(&classes));
        let at = self.arena.narrow(&self.device, logits);
        let args = [
            Arg::Address(at),
            Arg::Address(self.arena.slice(&self.device, losses, Kind::Exact)),
            Arg::Address(self.arena.slice(&self.device, targets, Kind::Ids)),
            Arg::U32(count(classes)),
            Arg::U32(count(logits.cols)),
            Arg::U32(count(logits.stride)),
            Arg::F32(grad.unwrap_or(0.0) as f32),
            Arg::U32(u32::from(grad.is_some())),
            // The last of a row are moved one by one, if they are no whole 16 bytes.
            Arg::U32(whole(0, &[logits], &[at])),
        ];
        self.launch_rows(
            "cross_entropy",
            (logits.rows, 1),
            threads_for(logits.cols),
            &args,
        )
    }
}
