//! Ops on single rows: norms, rotary embedding, SwiGLU, and their backwards. Rows are shared out in blocks of fixed size;
//! sums over rows add up the blocks' sums in order.

#![expect(unsafe_code, reason = "threads write rows of one slice")]

use std::ops::Range;

use super::super::Heads;
use super::super::real::Real;
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

/// Rows that one thread takes at a time.
const BLOCK: usize = 32;

/// Rows of a matrix that is read.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) stride: usize,
    pub(crate) cols: usize,
}

impl<'a, T> Table<'a, T> {
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..row * self.stride + self.cols]
    }
}

/// Rows of a matrix that threads write, each its own.
pub(crate) struct TableMut<'a, T> {
    parts: Parts<'a, T>,
    stride: usize,
    cols: usize,
}

impl<'a, T> TableMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T], stride: usize, cols: usize) -> Self {
        Self {
            parts: Parts::new(data),
            stride,
            cols,
        }
    }

    /// # Safety
    /// No other reference to this row lives.
    #[inline(always)]
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that rows do not overlap"
    )]
    pub(crate) unsafe fn row(&self, row: usize) -> &mut [T] {
        // SAFETY: by contract.
        unsafe {
            self.parts
                .part(row * self.stride..row * self.stride + self.cols)
        }
    }
}

/// Calls `job` for each block of rows.
pub(crate) fn blocks(pool: &Pool, rows: usize, job: &(dyn Fn(usize, Range<usize>) + Sync)) {
    pool.each(rows.div_ceil(BLOCK), &|block| {
        job(block, block * BLOCK..rows.min((block + 1) * BLOCK));
    });
}

/// As [`blocks`], where each block also has sums of `width` numbers; they are added to `total` in order.
fn blocks_with_sums<T: Real>(
    pool: &Pool,
    rows: usize,
    width: usize,
    total: &mut [T],
    job: &(dyn Fn(Range<usize>, &mut [T]) + Sync),
) {
    let mut sums = vec![T::ZERO; rows.div_ceil(BLOCK) * width];
    let parts = Parts::new(&mut sums);
    blocks(pool, rows, &|block, range| {
        // SAFETY: each block is taken once.
        job(range, unsafe {
            parts.part(block * width..(block + 1) * width)
        });
    });
    for sums in sums.chunks(width.max(1)) {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += *sum;
        }
    }
}

/// Adds up terms in 16 lanes by `index % 16`, then by one tree.
#[inline(always)]
pub(crate) fn sum<T: Real>(count: usize, term: impl Fn(usize) -> (T, T)) -> T {
    let mut lanes = [T::ZERO; 16];
    let whole = count / 16 * 16;
    for first in (0..whole).step_by(16) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            let (a, b) = term(first + i);
            *lane = a.fma(b, *lane);
        }
    }
    for (i, lane) in lanes.iter_mut().enumerate().take(count - whole) {
        let (a, b) = term(whole + i);
        *lane = a.fma(b, *lane);
    }
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            let other = lanes[i + width];
            lanes[i] += other;
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn inverse_rms<T: Real>(x: &[T], eps: T) -> T {
    let squares = sum(x.len(), |i| (x[i], x[i]));
    T::ONE / (squares / T::of(x.len() as f64) + eps).sqrt()
}

/// Adds the gradient of one normed row to `d_x`, and that of the weight to `d_weight`.
#[inline(always)]
fn norm_row_grad<T: Real>(
    x: &[T],
    weight: &[T],
    eps: T,
    d_y: &[T],
    d_x: &mut [T],
    d_weight: &mut [T],
) {
    let n = x.len();
    let (weight, d_y, d_x) = (&weight[..n], &d_y[..n], &mut d_x[..n]);
    let r = inverse_rms(x, eps);
    let dot = sum(n, |i| (d_y[i] * weight[i], x[i]));
    let back = dot * r * r * r / T::of(n as f64);
    for i in 0..n {
        d_x[i] += d_y[i] * weight[i] * r - x[i] * back;
    }
    for ((d_weight, d_y), x) in d_weight.iter_mut().zip(d_y).zip(x) {
        *d_weight += *d_y * (*x * r);
    }
}

struct Norm<'a, T> {
    rows: Range<usize>,
    x: Table<'a, T>,
    weight: &'a [T],
    eps: T,
    y: &'a TableMut<'a, T>,
}

impl<T: Real> Kernel for Norm<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for row in self.rows {
            let x = self.x.row(row);
            // SAFETY: each row is one block's.
            let y = unsafe { self.y.row(row) };
            let r = inverse_rms(x, self.eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight) {
                *y = *w * (*x * r);
            }
        }
    }
}

/// See [`super::super::Backend::norm`].
pub(crate) fn norm<T: Real>(
    pool: &Pool,
    rows: usize,
    eps: T,
    x: Table<'_, T>,
    weight: &[T],
    y: &TableMut<'_, T>,
) {
    blocks(pool, rows, &|_, rows| {
        dispatch(
            pool.isa(),
            Norm {
                rows,
                x,
                weight,
                eps,
                y,
            },
        );
    });
}

struct NormGrad<'a, T> {
    rows: Range<usize>,
    x: Table<'a, T>,
    weight: &'a [T],
    eps: T,
    d_y: Table<'a, T>,
    d_x: &'a TableMut<'a, T>,
    d_weight: &'a mut [T],
}

impl<T: Real> Kernel for NormGrad<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for row in self.rows {
            // SAFETY: each row is one block's.
            let d_x = unsafe { self.d_x.row(row) };
            norm_row_grad(
                self.x.row(row),
                self.weight,
                self.eps,
                self.d_y.row(row),
                d_x,
                self.d_weight,
            );
        }
    }
}

/// See [`super::super::Backend::norm_grad`]; `d_weight` is empty where it is not wanted.
#[expect(clippy::too_many_arguments, reason = "one op's operands")]
pub(crate) fn norm_grad<T: Real>(
    pool: &Pool,
    rows: usize,
    eps: T,
    x: Table<'_, T>,
    weight: &[T],
    d_y: Table<'_, T>,
    d_x: &TableMut<'_, T>,
    d_weight: &mut [T],
) {
    let width = d_weight.len();
    blocks_with_sums(pool, rows, width, d_weight, &|rows, d_weight| {
        dispatch(
            pool.isa(),
            NormGrad {
                rows,
                x,
                weight,
                eps,
                d_y,
                d_x,
                d_weight,
            },
        );
    });
}

/// What rotation takes of each row.
pub(crate) struct Turning<'a, T> {
    pub(crate) heads: Heads,
    pub(crate) q_norm: &'a [T],
    pub(crate) k_norm: &'a [T],
    pub(crate) turns: &'a [T],
    pub(crate) positions: &'a [u32],
}

impl<T: Real> Turning<'_, T> {
    /// Cosines and sines of a row.
    #[inline(always)]
    fn turn(&self, row: usize) -> (&[T], &[T]) {
        let dim = self.heads.dim;
        let at = self.positions[row] as usize * dim;
        self.turns[at..at + dim].split_at(dim / 2)
    }

    #[inline(always)]
    fn weight(&self, head: usize) -> &[T] {
        if head < self.heads.q {
            self.q_norm
        } else {
            self.k_norm
        }
    }
}

struct Rotate<'a, T> {
    rows: Range<usize>,
    with: &'a Turning<'a, T>,
    qkv: Table<'a, T>,
    qk: &'a TableMut<'a, T>,
}

impl<T: Real> Kernel for Rotate<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let dim = self.with.heads.dim;
        let half = dim / 2;
        let eps = T::of(self.with.heads.eps);
        for row in self.rows {
            let (cos, sin) = self.with.turn(row);
            let qkv = self.qkv.row(row);
            // SAFETY: each row is one block's.
            let qk = unsafe { self.qk.row(row) };
            for (head, (x, y)) in qkv
                .chunks_exact(dim)
                .zip(qk.chunks_exact_mut(dim))
                .enumerate()
            {
                let weight = self.with.weight(head);
                let r = inverse_rms(x, eps);
                let (low, high) = y.split_at_mut(half);
                for i in 0..half {
                    let a = weight[i] * (x[i] * r);
                    let b = weight[half + i] * (x[half + i] * r);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

/// See [`super::super::Backend::rotate`].
pub(crate) fn rotate<T: Real>(
    pool: &Pool,
    rows: usize,
    with: &Turning<'_, T>,
    qkv: Table<'_, T>,
    qk: &TableMut<'_, T>,
) {
    blocks(pool, rows, &|_, rows| {
        dispatch(
            pool.isa(),
            Rotate {
                rows,
                with,
                qkv,
                qk,
            },
        );
    });
}

struct RotateGrad<'a, T> {
    rows: Range<usize>,
    with: &'a Turning<'a, T>,
    qkv: Table<'a, T>,
    d: &'a TableMut<'a, T>,
    d_norms: &'a mut [T],
}

impl<T: Real> Kernel for RotateGrad<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let heads = self.with.heads;
        let (dim, half) = (heads.dim, heads.dim / 2);
        let eps = T::of(heads.eps);
        let (d_q_norm, d_k_norm) = self.d_norms.split_at_mut(dim);
        let mut d_y = vec![T::ZERO; dim];
        for row in self.rows {
            let (cos, sin) = self.with.turn(row);
            let qkv = self.qkv.row(row);
            // SAFETY: each row is one block's.
            let d = unsafe { self.d.row(row) };
            let both = qkv.chunks_exact(dim).zip(d.chunks_exact_mut(dim));
            for (head, (x, d)) in both.enumerate().take(heads.q + heads.kv) {
                for i in 0..half {
                    d_y[i] = d[i] * cos[i] + d[half + i] * sin[i];
                    d_y[half + i] = d[half + i] * cos[i] - d[i] * sin[i];
                }
                d.fill(T::ZERO);
                let d_weight = if head < heads.q {
                    &mut *d_q_norm
                } else {
                    &mut *d_k_norm
                };
                norm_row_grad(x, self.with.weight(head), eps, &d_y, d, d_weight);
            }
        }
    }
}

/// See [`super::super::Backend::rotate_grad`]; gradients of both norms' weights, one behind the other, are added to
/// `d_norms`.
pub(crate) fn rotate_grad<T: Real>(
    pool: &Pool,
    rows: usize,
    with: &Turning<'_, T>,
    qkv: Table<'_, T>,
    d: &TableMut<'_, T>,
    d_norms: &mut [T],
) {
    let width = 2 * with.heads.dim;
    blocks_with_sums(pool, rows, width, d_norms, &|rows, d_norms| {
        dispatch(
            pool.isa(),
            RotateGrad {
                rows,
                with,
                qkv,
                d,
                d_norms,
            },
        );
    });
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

struct Swiglu<'a, T> {
    rows: Range<usize>,
    gate_up: Table<'a, T>,
    out: &'a TableMut<'a, T>,
}

impl<T: Real> Kernel for Swiglu<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for row in self.rows {
            // SAFETY: each row is one block's.
            let out = unsafe { self.out.row(row) };
            let (gate, up) = self.gate_up.row(row).split_at(out.len());
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = *gate * sigmoid(*gate) * *up;
            }
        }
    }
}

/// See [`super::super::Backend::swiglu`].
pub(crate) fn swiglu<T: Real>(
    pool: &Pool,
    rows: usize,
    gate_up: Table<'_, T>,
    out: &TableMut<'_, T>,
) {
    blocks(pool, rows, &|_, rows| {
        dispatch(pool.isa(), Swiglu { rows, gate_up, out });
    });
}

struct SwigluGrad<'a, T> {
    rows: Range<usize>,
    gate_up: &'a TableMut<'a, T>,
    d_out: &'a TableMut<'a, T>,
}

impl<T: Real> Kernel for SwigluGrad<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for row in self.rows {
            // SAFETY: each row is one block's.
            let (gate_up, d_out) = unsafe { (self.gate_up.row(row), self.d_out.row(row)) };
            let (gate, up) = gate_up.split_at_mut(d_out.len());
            for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
                let (g, u, d) = (*gate, *up, *d_out);
                let s = sigmoid(g);
                let silu = g * s;
                *d_out = silu * u;
                *up = d * silu;
                *gate = d * u * (s + silu * (T::ONE - s));
            }
        }
    }
}

/// See [`super::super::Backend::swiglu_grad`].
pub(crate) fn swiglu_grad<T: Real>(
    pool: &Pool,
    rows: usize,
    gate_up: &TableMut<'_, T>,
    d_out: &TableMut<'_, T>,
) {
    blocks(pool, rows, &|_, rows| {
        dispatch(
            pool.isa(),
            SwigluGrad {
                rows,
                gate_up,
                d_out,
            },
        );
    });
}
