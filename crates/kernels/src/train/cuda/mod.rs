//! The training ops on a GPU: weights and activations in bf16, all else in fp32. Sums are fp32 and what an op leaves is
//! rounded once; attention also rounds the weights of the softmax and their gradients, as its products need them.
//!
//! Ops are launched in order on one stream and run later; copies to the host and back overlap on a second. No op adds in
//! an order that differs from run to run, so a step repeats bit for bit. After its first step a schedule takes no memory:
//! its buffers are its own, and what ops need for themselves is one room that grew to the largest.
//!
//! The first failure is kept, later ops do nothing, and [`Backend::check`] tells.

mod arena;
mod attention;
mod cudnn;
mod gemm;
mod moe;
mod optimizer;
mod rows;
mod transfer;

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::cpu::attention::pairs;
use super::{
    AdamStep, Attended, Attention, Backend, BufferId, DeviceFailed, ExpertRoom, ExpertWeights,
    Form, Heads, Kind, Mat, MemoryUse, MoeShape, Moments8, OutOfMemory, Rotation, Routes, Slice,
    Store,
};
use crate::cuda::buffer::Buffer;
use crate::cuda::compile::TRAIN_HEAD_DIMS;
use crate::cuda::device::{Device, Options};
use crate::cuda::error::{CudaError, Tried};
use arena::Arena;
use attention::Tiles;
use cudnn::Fused;
use gemm::Gemm;

/// Scratch memory of matrix products.
const PRODUCTS_BYTES: usize = 32 << 20;

const BY_OWN_KERNEL: &str = "attention runs by the own kernel, which is slower than cuDNN's";

fn failed(error: Arc<CudaError>) -> DeviceFailed {
    DeviceFailed {
        is_lost: error.is_lasting(),
        source: Box::new(error),
    }
}

/// A GPU that trains.
pub struct Cuda {
    arena: Arena,
    tiles: Tiles,
    attention: Attention,
    fused: Option<Fused>,
    /// Why cuDNN does not do all that it could, the first reason.
    refused: Option<CudaError>,
    /// Maps of the 8-bit optimizer.
    maps: Option<Buffer<f32>>,
    /// What one op needs for itself.
    room: Option<Buffer<u8>>,
    flops: u64,
    failed: Option<Arc<CudaError>>,
    /// The end of what was launched, for a copy to wait for.
    launched: CudaEvent,
    copies: Arc<CudaStream>,
    // Behind all that lives on it.
    device: Device,
}

/// A count as kernels take it.
///
/// # Panics
/// When it has more than 32 bits: a micro-batch of that size is a mistake of the schedule.
fn count(n: usize) -> u32 {
    match u32::try_from(n) {
        Ok(n) => n,
        Err(_) => panic!("{n} does not fit 32 bits"),
    }
}

impl Cuda {
    /// The most elements of a head that attention takes.
    pub const HEAD_DIM_MAX: usize = TRAIN_HEAD_DIMS[TRAIN_HEAD_DIMS.len() - 1] as usize;

    /// Opens a GPU; scratch memory of matrix products is as training wants it.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open(options: &Options) -> Result<Self, CudaError> {
        let device = Device::open(&Options {
            workspace_bytes: PRODUCTS_BYTES,
            ..options.clone()
        })?;
        let copies = device.context().new_stream().tried("make a stream")?;
        // The backward whose results repeat was seen on Hopper alone.
        let fused = device.is_hopper().then(|| Fused::open(&device)).transpose();
        let (fused, refused) = match fused {
            Ok(fused) => (fused, None),
            Err(error) => {
                tracing::warn!(error = &error as &dyn Error, "{BY_OWN_KERNEL}");
                (None, Some(error))
            }
        };
        Ok(Self {
            attention: match fused {
                Some(_) => Attention::LONG_BY_CUDNN,
                None => Attention::Own,
            },
            fused,
            refused,
            arena: Arena::default(),
            tiles: Tiles::default(),
            maps: None,
            room: None,
            flops: 0,
            failed: None,
            launched: device.context().new_event(None).tried("make an event")?,
            copies,
            device,
        })
    }

    /// What ops take for themselves, at most, for micro-batches of so many tokens: of attention by `way`, with experts of a
    /// token and the width of the residual stream.
    #[must_use]
    pub fn room_bytes(
        tokens: usize,
        heads: &Heads,
        way: Attention,
        experts: usize,
        hidden: usize,
    ) -> u64 {
        let rows = rows::room_bytes(tokens, hidden, heads.dim);
        let squares = 8 * optimizer::SQUARE_BLOCKS as u64;
        let attention = attention::room_bytes(tokens, heads.q.max(experts));
        let fused = cudnn::room_bytes(tokens, heads, way);
        let own = rows.max(attention).max(fused).max(squares);
        own + PRODUCTS_BYTES as u64
    }

    /// Why cuDNN cannot be used, or which shape it has refused, if it has.
    #[must_use]
    pub fn cudnn_problem(&self) -> Option<&CudaError> {
        self.refused.as_ref()
    }

    /// Bytes that are free on the device.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn free_bytes(&self) -> Result<u64, DeviceFailed> {
        let (free, _) = self
            .device
            .memory()
            .map_err(|error| failed(Arc::new(error)))?;
        Ok(free as u64)
    }

    /// Address of so many bytes for one op.
    fn room(&mut self, bytes: usize) -> Result<u64, CudaError> {
        if let Some(room) = self.room.as_ref().filter(|room| room.len() >= bytes) {
            return Ok(room.address(&self.device));
        }
        self.room = None;
        let room = self.device.zeroed(bytes)?;
        Ok(self.room.insert(room).address(&self.device))
    }

    /// Runs an op, unless one has failed.
    fn issue<T>(&mut self, op: impl FnOnce(&mut Self) -> Result<T, CudaError>) -> Option<T> {
        if self.failed.is_some() {
            return None;
        }
        match op(self) {
            Ok(done) => Some(done),
            Err(error) => {
                self.failed = Some(Arc::new(error));
                None
            }
        }
    }
}

impl Backend for Cuda {
    fn element_bytes(&self, kind: Kind) -> u64 {
        arena::element_bytes(kind) as u64
    }

    fn weights_are_exact(&self) -> bool {
        false
    }

    fn alloc(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory> {
        self.arena.alloc(&self.device, kind, len, false)
    }

    fn alloc_host(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory> {
        self.arena.alloc(&self.device, kind, len, true)
    }

    fn free(&mut self, buffer: BufferId) {
        self.arena.release(buffer);
    }

    fn memory(&self) -> MemoryUse {
        let mut memory = self.arena.memory();
        let room = self.room.as_ref().map_or(0, Buffer::len) as u64;
        let maps = self.maps.as_ref().map_or(0, Buffer::len) as u64;
        let fused = self.fused.as_ref().map_or(0, Fused::bytes);
        let own = PRODUCTS_BYTES as u64 + room + 4 * maps + self.tiles.bytes() + fused;
        memory.device_peak += own;
        memory
    }

    fn attend_by(
        &mut self,
        way: Attention,
        heads: &Heads,
        tokens: usize,
    ) -> Result<Attention, OutOfMemory> {
        self.attention = match self.fused {
            Some(_) => way,
            None => Attention::Own,
        };
        let bytes = cudnn::room_bytes(tokens, heads, self.attention);
        match self.room(bytes as usize) {
            Ok(_) => Ok(self.attention),
            Err(error) => Err(OutOfMemory {
                bytes,
                source: std::io::Error::other(error),
            }),
        }
    }

    fn flops(&self) -> u64 {
        self.flops
    }

    fn check(&mut self) -> Result<(), DeviceFailed> {
        match &self.failed {
            None => Ok(()),
            Some(error) => Err(failed(Arc::clone(error))),
        }
    }

    fn write(&mut self, buffer: BufferId, start: usize, values: &[f32]) {
        self.issue(|cuda| cuda.write_numbers(buffer, start, values));
    }

    fn write_bf16(&mut self, buffer: BufferId, start: usize, bytes: &[u8]) {
        self.issue(|cuda| cuda.write_narrow(buffer, start, bytes));
    }

    fn write_ids(&mut self, buffer: BufferId, start: usize, values: &[u32]) {
        self.issue(|cuda| cuda.put_ids(buffer, start, values));
    }

    fn write_bytes(&mut self, buffer: BufferId, start: usize, values: &[u8]) {
        let to = Slice::new(buffer, start, values.len());
        self.issue(|cuda| cuda.put(to, Kind::Bytes, values));
    }

    fn read(&mut self, from: Slice) -> Vec<f32> {
        let values = self.issue(|cuda| cuda.read_numbers(from));
        values.unwrap_or_else(|| vec![f32::NAN; from.len])
    }

    fn read_bytes(&mut self, from: Slice) -> Vec<u8> {
        let bytes = self.issue(|cuda| cuda.get(from, Kind::Bytes));
        bytes.unwrap_or_else(|| vec![0; from.len])
    }

    fn zero(&mut self, to: Slice) {
        self.issue(|cuda| cuda.clear(to));
    }

    fn copy(&mut self, from: Mat, to: Mat) {
        self.issue(|cuda| cuda.copy_rows(from, to));
    }

    fn round(&mut self, from: Slice, to: Slice) {
        self.issue(|cuda| cuda.round_masters(from, to));
    }

    fn offload(&mut self, from: BufferId, to: BufferId) {
        self.issue(|cuda| cuda.shift(from, to, true));
    }

    fn offloaded(&mut self, host: BufferId) {
        self.issue(|cuda| cuda.await_shift(host));
    }

    fn prefetch(&mut self, from: BufferId, to: BufferId) {
        self.issue(|cuda| cuda.shift(to, from, false));
    }

    fn prefetched(&mut self, host: BufferId) {
        self.issue(|cuda| cuda.await_shift(host));
    }

    fn gemm(&mut self, form: Form, scale: f64, a: Mat, b: Mat, to: Mat, store: Store) {
        let gemm = Gemm {
            form,
            scale,
            a,
            b,
            to,
            store,
        };
        self.flops += 2 * gemm.sizes().iter().product::<usize>() as u64;
        self.issue(|cuda| cuda.multiply(&gemm));
    }

    fn embed(&mut self, ids: BufferId, table: Mat, out: Mat) {
        self.gather(Slice::new(ids, 0, out.rows), table, out);
    }

    fn embed_grad(&mut self, ids: BufferId, d_out: Mat, d_table: Mat) {
        self.issue(|cuda| cuda.add_rows(ids, d_out, d_table));
    }

    fn gather(&mut self, rows: Slice, from: Mat, to: Mat) {
        self.issue(|cuda| cuda.pick("gather", rows, from, to));
    }

    fn scatter(&mut self, rows: Slice, from: Mat, to: Mat) {
        self.issue(|cuda| cuda.pick("scatter", rows, from, to));
    }

    fn norm(&mut self, eps: f64, x: Mat, weight: Slice, y: Mat) {
        self.issue(|cuda| cuda.rms_norm(eps, x, weight, y));
    }

    fn norm_grad(
        &mut self,
        eps: f64,
        x: Mat,
        weight: Slice,
        d_y: Mat,
        d_x: Mat,
        d_weight: Option<Slice>,
    ) {
        self.issue(|cuda| cuda.rms_norm_grad(eps, [x, d_y, d_x], weight, d_weight));
    }

    fn rotate(&mut self, heads: &Heads, with: &Rotation, qkv: Mat, qk: Mat) {
        self.issue(|cuda| cuda.turn(heads, with, qkv, qk));
    }

    fn rotate_grad(
        &mut self,
        heads: &Heads,
        with: &Rotation,
        qkv: Mat,
        d_qkv: Mat,
        d_norms: Option<[Slice; 2]>,
    ) {
        self.issue(|cuda| cuda.turn_grad(heads, with, [qkv, d_qkv], d_norms));
    }

    fn attention(&mut self, heads: &Heads, ends: &[usize], with: &Attended) {
        self.flops += 4 * pairs(ends) * heads.q_width() as u64;
        self.issue(|cuda| cuda.attend(heads, ends, with));
    }

    fn attention_grad(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
        d_out: Mat,
        d_qkv: Mat,
    ) {
        // As planned: scores, and gradients of weights, q, k and v. The own kernel makes the first two twice.
        self.flops += 10 * pairs(ends) * heads.q_width() as u64;
        self.issue(|cuda| cuda.attend_grad(heads, ends, with, [d_out, d_qkv]));
    }

    fn swiglu(&mut self, gate_up: Mat, out: Mat) {
        self.issue(|cuda| cuda.gate("swiglu", gate_up, out));
    }

    fn swiglu_grad(&mut self, gate_up: Mat, d_out: Mat) {
        self.issue(|cuda| cuda.gate("swiglu_grad", gate_up, d_out));
    }

    fn route(&mut self, moe: &MoeShape, logits: Mat, routes: &Routes) {
        self.issue(|cuda| cuda.choose(moe, logits, routes));
    }

    fn route_grad(
        &mut self,
        moe: &MoeShape,
        logits: Mat,
        routes: &Routes,
        d_weights: BufferId,
        d_logits: Mat,
    ) {
        self.issue(|cuda| cuda.choose_grad(moe, [logits, d_logits], routes, d_weights));
    }

    fn experts(
        &mut self,
        moe: &MoeShape,
        x: Mat,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        y: Option<Mat>,
    ) {
        let products = x.rows * moe.top_k * moe.width * x.cols;
        self.flops += 2 * (2 + u64::from(y.is_some())) * products as u64;
        self.issue(|cuda| cuda.mix(moe, x, routes, weights, room, gate_up, y));
    }

    fn experts_grad(
        &mut self,
        moe: &MoeShape,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        d_y: Mat,
        d_x: Mat,
        d_weights: BufferId,
    ) {
        self.flops += 2 * 3 * (d_y.rows * moe.top_k * moe.width * d_y.cols) as u64;
        self.issue(|cuda| {
            cuda.mix_grad(moe, routes, weights, room, gate_up, [d_y, d_x], d_weights)
        });
    }

    fn cross_entropy(
        &mut self,
        logits: Mat,
        classes: usize,
        targets: Slice,
        losses: Slice,
        grad: Option<f64>,
    ) {
        self.issue(|cuda| cuda.losses(logits, classes, targets, losses, grad));
    }

    fn sum_squares(&mut self, of: Slice) -> f64 {
        self.issue(|cuda| cuda.squares(of)).unwrap_or(f64::NAN)
    }

    fn adamw(&mut self, step: &AdamStep, value: Slice, grad: Slice, m: Slice, v: Slice) {
        self.issue(|cuda| cuda.adam(step, [value, grad, m, v]));
    }

    fn adamw8(&mut self, step: &AdamStep, value: Slice, grad: Slice, moments: &Moments8) {
        self.issue(|cuda| cuda.adam8(step, value, grad, moments));
    }
}
