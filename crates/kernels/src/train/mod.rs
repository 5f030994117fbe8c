//! Training: the ops that a hand-scheduled forward and backward is made of, as a trait over arena buffers, and their
//! implementations on the CPU and on a GPU.
//!
//! What is computed in which order is the caller's schedule; a backend knows neither layers nor models. Buffers are named
//! by [`BufferId`] and live on the device; ops are issued in order, may run later, and return nothing. What comes to the
//! host is read on purpose ([`Backend::read`], [`Backend::sum_squares`]). So one schedule drives every device. A device that
//! fails does so once: [`Backend::check`] tells, after what was read.
//!
//! # Numbers
//! A buffer is of one [`Kind`]. On the CPU all numbers are of one type, f32 or f64, whatever their kind. A device that
//! computes in bf16 keeps [`Kind::Weights`] and [`Kind::Activations`] in bf16 and [`Kind::Exact`] in f32; its sums are f32
//! and what an op leaves is rounded once.
//!
//! # Order
//! On the CPU every sum has one order that depends on shapes alone, never on threads or on time: runs repeat bit for bit,
//! and what is computed of a row does not depend on the other rows of a call.

pub mod cpu;
pub mod cuda;
mod real;

pub use cpu::{Cpu, PACKED_MAX, peak_flops, spin};
pub use cuda::Cuda;
pub use real::Real;

/// A buffer of a backend. It is good for the backend that gave it, until it is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub(crate) u32);

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Weights as they are multiplied.
    Weights,
    /// What flows through layers, forward and backward.
    Activations,
    /// Masters, gradients of weights, moments, log-sum-exps, losses, weights of routes, cosines and sines.
    Exact,
    /// Token ids, row numbers, positions, routes: u32.
    Ids,
    /// Moments in 8 bits.
    Bytes,
}

/// A row-major matrix inside a buffer; rows lie `stride` elements apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mat {
    /// Where.
    pub buffer: BufferId,
    /// Its first element.
    pub start: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// From one row to the next.
    pub stride: usize,
}

impl Mat {
    /// The dense matrix at the beginning of a buffer.
    #[must_use]
    pub fn dense(buffer: BufferId, rows: usize, cols: usize) -> Self {
        Self::at(buffer, 0, rows, cols)
    }

    /// A dense matrix from element `start` on.
    #[must_use]
    pub fn at(buffer: BufferId, start: usize, rows: usize, cols: usize) -> Self {
        Self {
            buffer,
            start,
            rows,
            cols,
            stride: cols,
        }
    }

    /// `count` columns from `first` on.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(
            first + count <= self.cols,
            "{first} + {count} of {}",
            self.cols
        );
        Self {
            start: self.start + first,
            cols: count,
            ..self
        }
    }

    /// `count` rows from `first` on.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn slice_rows(self, first: usize, count: usize) -> Self {
        assert!(
            first + count <= self.rows,
            "{first} + {count} of {}",
            self.rows
        );
        Self {
            start: self.start + first * self.stride,
            rows: count,
            ..self
        }
    }

    /// Elements from the first to behind the last.
    #[must_use]
    pub fn span(&self) -> usize {
        match self.rows {
            0 => 0,
            rows => (rows - 1) * self.stride + self.cols,
        }
    }
}

/// Neighbouring elements of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Where.
    pub buffer: BufferId,
    /// The first.
    pub start: usize,
    /// How many.
    pub len: usize,
}

impl Slice {
    /// `len` elements from `start` on.
    #[must_use]
    pub fn new(buffer: BufferId, start: usize, len: usize) -> Self {
        Self { buffer, start, len }
    }
}

/// Which operand of a product is transposed. Each is stored row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `A [m, k] · B [k, n]`.
    Nn,
    /// `A [m, k] · B [n, k]ᵀ`.
    Nt,
    /// `A [k, m]ᵀ · B [k, n]`.
    Tn,
}

/// What a product does to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Replaces it.
    Set,
    /// Is added to it.
    Add,
}

/// What attention runs on, where a device has more than one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// The kernel of this crate.
    Own,
    /// cuDNN, for documents of at least so many tokens, and for shorter ones the kernel of this crate.
    Cudnn {
        /// Tokens.
        from: usize,
    },
}

impl Attention {
    /// cuDNN where it pays: planning takes it a second for each length, and short documents are little work.
    pub const LONG_BY_CUDNN: Self = Self::Cudnn { from: 1024 };

    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own kernel",
            Self::Cudnn { .. } => "cuDNN",
        }
    }

    /// What a GPU of this machine would run.
    #[must_use]
    pub fn found() -> Self {
        match crate::cuda::report::look().attends_by_cudnn() {
            true => Self::LONG_BY_CUDNN,
            false => Self::Own,
        }
    }
}

/// Shape of attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Heads of q.
    pub q: usize,
    /// Heads of k and of v; divides `q`.
    pub kv: usize,
    /// Elements of a head, even.
    pub dim: usize,
    /// Of the norms of q and k.
    pub eps: f64,
}

impl Heads {
    /// Width of q, k and v side by side.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }

    /// Width of q and k side by side.
    #[must_use]
    pub fn qk_width(&self) -> usize {
        (self.q + self.kv) * self.dim
    }

    /// Width of q, and of what attention gives.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.q * self.dim
    }
}

/// Norms of the heads of q and k, and where each row is in its document.
#[derive(Debug, Clone, Copy)]
pub struct Rotation {
    /// Weight of q's norm: `dim`, weights.
    pub q_norm: Slice,
    /// Weight of k's norm: `dim`, weights.
    pub k_norm: Slice,
    /// `[positions, dim]`, exact: of each position `dim / 2` cosines, then as many sines.
    pub turns: BufferId,
    /// Position of each row: ids.
    pub positions: BufferId,
}

/// What attention's backward needs of its forward.
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    /// q and k after [`Backend::rotate`]: `[tokens, qk_width]`, activations.
    pub qk: Mat,
    /// v: `[tokens, kv · dim]`, activations.
    pub v: Mat,
    /// The mix of values: `[tokens, q_width]`, activations.
    pub out: Mat,
    /// Log-sum-exp of each row's scores: `[q, tokens]`, exact.
    pub lse: BufferId,
}

/// Shape of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeShape {
    /// Experts.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Width of an expert.
    pub width: usize,
    /// The chosen weights are divided by their sum.
    pub renormalise: bool,
}

impl MoeShape {
    /// Elements of [`Routes::ids`] for so many tokens.
    #[must_use]
    pub fn ids_len(&self, tokens: usize) -> usize {
        2 * tokens * self.top_k + self.experts + 1
    }
}

/// Where tokens go. A slot is a token's choice: `token · top_k + choice`, choices ascending by expert.
#[derive(Debug, Clone, Copy)]
pub struct Routes {
    /// Expert of each slot; then the slots by expert, within one ascending; then where each expert's begin, and the end.
    pub ids: BufferId,
    /// Weight of each slot: exact.
    pub weights: BufferId,
}

/// Frozen weights of a layer's experts, one under the other.
#[derive(Debug, Clone, Copy)]
pub struct ExpertWeights {
    /// Gate, then up, of each: `[experts · 2 · width, hidden]`.
    pub gate_up: Mat,
    /// `[experts · hidden, width]`.
    pub down: Mat,
}

/// Room that experts need, whose content means nothing between ops.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRoom {
    /// Rows of slots by expert: `tokens · top_k · hidden`, activations.
    pub rows: BufferId,
    /// What goes into their down: `tokens · top_k · width`, activations.
    pub mixed: BufferId,
}

/// Numbers of one AdamW step (Loshchilov and Hutter 2019), as torch computes it: decay first, then the moments' ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of the weight, times `lr`, that is taken off.
    pub weight_decay: f64,
    /// Steps with this one.
    pub step: u64,
    /// What gradients are multiplied with: clipping.
    pub grad_scale: f64,
}

/// Moments in 8 bits: blocks of [`BLOCK_8BIT`] elements share a scale, and codes name values of a fixed map.
#[derive(Debug, Clone, Copy)]
pub struct Moments8 {
    /// Codes of the first moment: bytes.
    pub m: Slice,
    /// Codes of the second moment: bytes.
    pub v: Slice,
    /// Largest magnitude of each block of the first: exact.
    pub m_max: Slice,
    /// Largest value of each block of the second: exact.
    pub v_max: Slice,
}

/// Elements that share a scale in the 8-bit optimizer.
pub const BLOCK_8BIT: usize = 256;

/// Memory that a backend has given out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// On the device, now.
    pub device: u64,
    /// On the device, the most at one time, with what ops took for themselves.
    pub device_peak: u64,
    /// On the host, now: offloaded buffers.
    pub host: u64,
}

/// No room for a buffer.
#[derive(Debug, thiserror::Error)]
#[error("no memory for a buffer of {bytes} bytes")]
pub struct OutOfMemory {
    /// How large it would be.
    pub bytes: u64,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// An op failed: what the device's buffers hold, and what was read since, means nothing.
#[derive(Debug, thiserror::Error)]
#[error("the device that trains has failed")]
pub struct DeviceFailed {
    /// How.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
    /// Whether this process can do nothing more on the device.
    pub is_lost: bool,
}

/// A device that trains. See the module for what kinds of numbers mean.
///
/// # Panics
/// Every method panics when an id is unknown, a kind is not what it takes, shapes do not fit, or an op would write what it
/// reads: these are mistakes of the schedule.
pub trait Backend: Send {
    /// Bytes of an element.
    fn element_bytes(&self, kind: Kind) -> u64;

    /// Whether weights keep all that a master has: then a weight is its own master.
    fn weights_are_exact(&self) -> bool;

    /// A buffer of zeroes on the device.
    ///
    /// # Errors
    /// When there is no room.
    fn alloc(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory>;

    /// A buffer on the host, for [`Backend::offload`] alone.
    ///
    /// # Errors
    /// When there is no room.
    fn alloc_host(&mut self, kind: Kind, len: usize) -> Result<BufferId, OutOfMemory>;

    /// Gives a buffer back.
    fn free(&mut self, buffer: BufferId);

    /// Memory now and at its peak.
    fn memory(&self) -> MemoryUse;

    /// Lets attention run that way from here on, if the device can, and takes the room for micro-batches of so many tokens.
    /// What it gives is the same up to rounding. Says how it runs.
    ///
    /// # Errors
    /// When there is no room.
    fn attend_by(
        &mut self,
        _way: Attention,
        _heads: &Heads,
        _tokens: usize,
    ) -> Result<Attention, OutOfMemory> {
        Ok(Attention::Own)
    }

    /// Floating-point operations of products that were executed since the start: 2 a multiply-add.
    fn flops(&self) -> u64;

    /// Whether all that was read is what ops have computed. Asked after reading, before numbers are believed.
    ///
    /// # Errors
    /// When an op failed, now and ever after.
    fn check(&mut self) -> Result<(), DeviceFailed>;

    /// Writes numbers from `start` on.
    fn write(&mut self, buffer: BufferId, start: usize, values: &[f32]);

    /// Writes numbers from `start` on that lie in memory as little-endian bf16.
    fn write_bf16(&mut self, buffer: BufferId, start: usize, bytes: &[u8]);

    /// Writes ids from `start` on.
    fn write_ids(&mut self, buffer: BufferId, start: usize, values: &[u32]);

    /// Writes bytes from `start` on.
    fn write_bytes(&mut self, buffer: BufferId, start: usize, values: &[u8]);

    /// Numbers, once all ops before have run.
    fn read(&mut self, from: Slice) -> Vec<f32>;

    /// Bytes, once all ops before have run.
    fn read_bytes(&mut self, from: Slice) -> Vec<u8>;

    /// Sets numbers to zero.
    fn zero(&mut self, to: Slice);

    /// Copies numbers between buffers of one kind.
    fn copy(&mut self, from: Mat, to: Mat);

    /// Rounds masters to weights.
    fn round(&mut self, from: Slice, to: Slice);

    /// Begins to move a device buffer's content to a host buffer of the same length and kind. Until
    /// [`Backend::offloaded`] the device buffer must not be written, and its content is undefined afterwards.
    fn offload(&mut self, from: BufferId, to: BufferId);

    /// Orders what follows behind the offload to `host`.
    fn offloaded(&mut self, host: BufferId);

    /// Begins to move content back; `to` may be used after [`Backend::prefetched`].
    fn prefetch(&mut self, from: BufferId, to: BufferId);

    /// Orders what follows behind the prefetch from `host`.
    fn prefetched(&mut self, host: BufferId);

    /// `to = scale · op(a) · op(b)`, or is added to `to`. Operands are weights, activations or exact.
    fn gemm(&mut self, form: Form, scale: f64, a: Mat, b: Mat, to: Mat, store: Store);

    /// Row `i` of `out` is row `ids[i]` of `table`.
    fn embed(&mut self, ids: BufferId, table: Mat, out: Mat);

    /// Row `ids[i]` of `d_table` (exact) gets row `i` of `d_out` added, in ascending order of i.
    fn embed_grad(&mut self, ids: BufferId, d_out: Mat, d_table: Mat);

    /// Row `i` of `to` is row `rows[i]` of `from`; `rows` are ids.
    fn gather(&mut self, rows: Slice, from: Mat, to: Mat);

    /// Row `rows[i]` of `to` becomes row `i` of `from`; no row is named twice.
    fn scatter(&mut self, rows: Slice, from: Mat, to: Mat);

    /// RMSNorm of each row: `y = w · x / sqrt(mean(x²) + eps)`.
    fn norm(&mut self, eps: f64, x: Mat, weight: Slice, y: Mat);

    /// Its backward: adds to `d_x`, and to `d_weight` (exact) where there is one.
    fn norm_grad(
        &mut self,
        eps: f64,
        x: Mat,
        weight: Slice,
        d_y: Mat,
        d_x: Mat,
        d_weight: Option<Slice>,
    );

    /// RMSNorm of each head of q and k, then the rotary embedding (halves of a head turn together): from `qkv`
    /// `[tokens, qkv_width]` to `qk` `[tokens, qk_width]`.
    fn rotate(&mut self, heads: &Heads, with: &Rotation, qkv: Mat, qk: Mat);

    /// Its backward: the first `qk_width` columns of `d_qkv` hold gradients of `qk` and become those of `qkv`. `d_norms`:
    /// gradients of the weights of both norms (exact), added to.
    fn rotate_grad(
        &mut self,
        heads: &Heads,
        with: &Rotation,
        qkv: Mat,
        d_qkv: Mat,
        d_norms: Option<[Slice; 2]>,
    );

    /// Causal attention within each document, scores divided by `sqrt(dim)`; `ends`: where documents end, ascending.
    /// Query head h reads key head `h / (q / kv)`. Writes `out` and `lse`.
    fn attention(&mut self, heads: &Heads, ends: &[usize], with: &Attended);

    /// Its backward: writes all of `d_qkv` `[tokens, qkv_width]`: gradients of `qk`, then of `v`.
    fn attention_grad(
        &mut self,
        heads: &Heads,
        ends: &[usize],
        with: &Attended,
        d_out: Mat,
        d_qkv: Mat,
    );

    /// `out = silu(gate) · up`, where `gate_up` is `[tokens, 2 · width]`.
    fn swiglu(&mut self, gate_up: Mat, out: Mat);

    /// Its backward in place: `gate_up` becomes its own gradient, and `d_out` becomes what the forward gave.
    fn swiglu_grad(&mut self, gate_up: Mat, d_out: Mat);

    /// Softmax over each row of router logits `[tokens, experts]` (exact numbers), the `top_k` most probable (of equals the
    /// lower index).
    fn route(&mut self, moe: &MoeShape, logits: Mat, routes: &Routes);

    /// Its backward: from gradients of the slots' weights (exact) to `d_logits` `[tokens, experts]`, replaced.
    fn route_grad(
        &mut self,
        moe: &MoeShape,
        logits: Mat,
        routes: &Routes,
        d_weights: BufferId,
        d_logits: Mat,
    );

    /// Gate and up of all slots by expert: `gate_up` `[tokens · top_k, 2 · width]`; and, where `y` is given,
    /// `y[t] += Σ weight · down(silu(gate) · up)` over the token's experts, ascending.
    #[expect(clippy::too_many_arguments, reason = "one op's operands")]
    fn experts(
        &mut self,
        moe: &MoeShape,
        x: Mat,
        routes: &Routes,
        weights: &ExpertWeights,
        room: &ExpertRoom,
        gate_up: Mat,
        y: Option<Mat>,
    );

    /// Its backward with frozen experts: adds to `d_x`, replaces `d_weights`; `gate_up` is destroyed.
    #[expect(clippy::too_many_arguments, reason = "one op's operands")]
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
    );

    /// -log softmax of the target among the first `classes` columns of each row of `logits`, into `losses` (exact); with
    /// `grad`, these become `grad · (softmax - one-hot)` and what is behind them zero; without, `logits` mean nothing
    /// afterwards. `targets` are ids.
    fn cross_entropy(
        &mut self,
        logits: Mat,
        classes: usize,
        targets: Slice,
        losses: Slice,
        grad: Option<f64>,
    );

    /// The sum of squares of exact numbers, once all ops before have run.
    fn sum_squares(&mut self, of: Slice) -> f64;

    /// One step with moments in full; everything is exact.
    fn adamw(&mut self, step: &AdamStep, value: Slice, grad: Slice, m: Slice, v: Slice);

    /// One step with moments in 8 bits.
    fn adamw8(&mut self, step: &AdamStep, value: Slice, grad: Slice, moments: &Moments8);
}
