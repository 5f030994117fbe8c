//! Causal attention within documents, forward and backward, in blocks: scores of 48 queries by 64 keys at a time, never
//! more. Blocks are counted from a document's start, so that a document's numbers do not depend on its neighbours.

#![expect(unsafe_code, reason = "tiles read and threads write through pointers")]
#![expect(
    clippy::needless_range_loop,
    reason = "one index names a row of several arrays"
)]

use std::ops::Range;

use super::super::Heads;
use super::super::real::{Real, TILE_COLS, Tile};
use super::gemm::{Operand, Panels, Rows, pack, sweep};
use super::rows::Table;
use crate::cpu::Pool;
use crate::cpu::pool::Parts;
use crate::cpu::simd::{Kernel, Lanes, dispatch};

/// Queries of a block: a multiple of every tile's rows.
const QUERIES: usize = 48;
/// Keys of a block: whole panels.
const KEYS: usize = 64;

/// What both directions read.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a, T> {
    pub(crate) heads: Heads,
    pub(crate) qk: Table<'a, T>,
    pub(crate) v: Table<'a, T>,
    pub(crate) tokens: usize,
}

/// A document with one head of keys.
struct Work {
    rows: Range<usize>,
    kv: usize,
}

fn works(ends: &[usize], kv: usize) -> Vec<Work> {
    let mut works = Vec::new();
    let mut start = 0;
    for end in ends {
        works.extend((0..kv).map(|kv| Work {
            rows: start..*end,
            kv,
        }));
        start = *end;
    }
    works
}

/// Products that causal attention takes for these documents, for each head and element: pairs of query and key.
pub(crate) fn pairs(ends: &[usize]) -> u64 {
    let mut start = 0;
    ends.iter()
        .map(|end| {
            let len = (end - start) as u64;
            start = *end;
            len * (len + 1) / 2
        })
        .sum()
}

/// Copies a head's columns of some rows into panels: of keys (`by_rows`: a panel is 16 rows, in order of the head's
/// elements) or of elements (a panel is 16 elements, in order of rows).
fn pack_head<T: Real>(
    pool: &Pool,
    table: Table<'_, T>,
    rows: Range<usize>,
    column: usize,
    dim: usize,
    by_rows: bool,
) -> Vec<T> {
    let data = &table.data[rows.start * table.stride + column..];
    let (count, depth) = if by_rows {
        (rows.len(), dim)
    } else {
        (dim, rows.len())
    };
    let (row, col) = if by_rows {
        (1, table.stride)
    } else {
        (table.stride, 1)
    };
    let panels = count.div_ceil(TILE_COLS);
    let mut to = vec![T::ZERO; panels * depth * TILE_COLS];
    let operand = Operand { data, row, col };
    for (panel, to) in to.chunks_mut(depth * TILE_COLS).enumerate() {
        let from = panel * TILE_COLS;
        pack(pool, &operand, from..count.min(from + TILE_COLS), depth, to);
    }
    to
}

/// Row `r`, elements of head `head`, of a table.
#[inline(always)]
fn head_rows<T>(table: &Table<'_, T>, rows: Range<usize>, column: usize) -> Rows<T> {
    Rows {
        start: &raw const table.data[rows.start * table.stride + column],
        row: table.stride,
        step: 1,
        count: rows.len(),
    }
}

/// Writes a tile into a dense block.
#[inline(always)]
fn set<T: Real>(to: &mut [T], width: usize, r: usize, c: usize, rows: usize, sums: &Tile<T>) {
    for (i, sums) in sums.iter().enumerate().take(rows) {
        to[(r + i) * width + c..][..TILE_COLS].copy_from_slice(sums);
    }
}

#[inline(always)]
fn add<T: Real>(to: &mut [T], width: usize, r: usize, c: usize, rows: usize, sums: &Tile<T>) {
    for (i, sums) in sums.iter().enumerate().take(rows) {
        let to = &mut to[(r + i) * width + c..][..TILE_COLS];
        for (to, sum) in to.iter_mut().zip(sums) {
            *to += *sum;
        }
    }
}

/// Panels of whole tiles that hold `count` columns from panel `first` on.
#[inline(always)]
fn panels<T>(packed: &[T], first: usize, depth: usize, count: usize) -> Panels<T> {
    Panels {
        start: packed[first * depth * TILE_COLS..].as_ptr(),
        stride: depth * TILE_COLS,
        count: count.div_ceil(TILE_COLS),
    }
}

/// As [`panels`], from row `row` of each on.
#[inline(always)]
fn panels_from<T>(packed: &[T], row: usize, depth: usize, count: usize) -> Panels<T> {
    Panels {
        start: packed[row * TILE_COLS..].as_ptr(),
        stride: depth * TILE_COLS,
        count: count.div_ceil(TILE_COLS),
    }
}

/// See [`super::super::Backend::attention`]; `out` has rows `stride` apart.
pub(crate) fn forward<T: Real>(
    pool: &Pool,
    input: &Input<'_, T>,
    ends: &[usize],
    out: &mut [T],
    stride: usize,
    lse: &mut [T],
) {
    let heads = &input.heads;
    let works = works(ends, heads.kv);
    let (out, lse) = (Parts::new(out), Parts::new(lse));
    pool.each(works.len(), &|item| {
        let work = &works[item];
        let column = (heads.q + work.kv) * heads.dim;
        let keys = pack_head(pool, input.qk, work.rows.clone(), column, heads.dim, true);
        let column = work.kv * heads.dim;
        let values = pack_head(pool, input.v, work.rows.clone(), column, heads.dim, false);
        dispatch(
            pool.isa(),
            Forward {
                input,
                work,
                keys: &keys,
                values: &values,
                out: &out,
                stride,
                lse: &lse,
            },
        );
    });
}

struct Forward<'a, T> {
    input: &'a Input<'a, T>,
    work: &'a Work,
    keys: &'a [T],
    values: &'a [T],
    out: &'a Parts<'a, T>,
    stride: usize,
    lse: &'a Parts<'a, T>,
}

/// Running softmax of a block of queries.
struct Running<T> {
    scores: Vec<T>,
    mix: Vec<T>,
    most: [T; QUERIES],
    sum: [T; QUERIES],
}

impl<T: Real> Kernel for Forward<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let heads = &self.input.heads;
        let group = heads.q / heads.kv;
        let len = self.work.rows.len();
        let mut state = Running {
            scores: vec![T::ZERO; QUERIES * KEYS],
            mix: vec![T::ZERO; QUERIES * heads.dim.next_multiple_of(TILE_COLS)],
            most: [T::ZERO; QUERIES],
            sum: [T::ZERO; QUERIES],
        };
        for head in self.work.kv * group..(self.work.kv + 1) * group {
            for first in (0..len).step_by(QUERIES) {
                self.block(lanes, head, first..len.min(first + QUERIES), &mut state);
            }
        }
    }
}

impl<T: Real> Forward<'_, T> {
    #[inline(always)]
    fn block<L: Lanes>(
        &self,
        lanes: L,
        head: usize,
        queries: Range<usize>,
        state: &mut Running<T>,
    ) {
        let (dim, len) = (self.input.heads.dim, self.work.rows.len());
        let width = dim.next_multiple_of(TILE_COLS);
        let scale = T::of(1.0 / (dim as f64).sqrt());
        let start = self.work.rows.start;
        let rows = start + queries.start..start + queries.end;
        state.most = [T::LOWEST; QUERIES];
        state.sum = [T::ZERO; QUERIES];
        state.mix.fill(T::ZERO);
        for first in (0..queries.end).step_by(KEYS) {
            let count = KEYS.min(queries.end - first);
            let q = head_rows(&self.input.qk, rows.clone(), head * dim);
            let keys = panels(self.keys, first / TILE_COLS, dim, count);
            let scores = &mut state.scores;
            // SAFETY: rows and panels hold `dim` elements.
            unsafe {
                sweep(lanes, q, keys, dim, |r, c, rows, sums| {
                    set(scores, KEYS, r, c, rows, sums);
                });
            }
            for (i, row) in state
                .scores
                .chunks_mut(KEYS)
                .enumerate()
                .take(queries.len())
            {
                let seen = (queries.start + i + 1).saturating_sub(first).min(count);
                let fade = soften(row, seen, scale, &mut state.most[i], &mut state.sum[i]);
                for mix in &mut state.mix[i * width..(i + 1) * width] {
                    *mix *= fade;
                }
            }
            let weights = Rows {
                start: state.scores.as_ptr(),
                row: KEYS,
                step: 1,
                count: queries.len(),
            };
            let values = panels_from(self.values, first, len, dim);
            let mix = &mut state.mix;
            // SAFETY: `count` weights of each row, and as many rows of the values from `first` on.
            unsafe {
                sweep(lanes, weights, values, count, |r, c, rows, sums| {
                    add(mix, width, r, c, rows, sums);
                });
            }
        }
        for (i, mix) in state.mix.chunks(width).enumerate().take(queries.len()) {
            let at = (rows.start + i) * self.stride + head * dim;
            let lse_at = head * self.input.tokens + rows.start + i;
            // SAFETY: this head of this row is this item's alone.
            let (out, lse) = unsafe {
                (
                    self.out.part(at..at + dim),
                    self.lse.part(lse_at..lse_at + 1),
                )
            };
            let inverse = T::ONE / state.sum[i];
            for (out, mix) in out.iter_mut().zip(mix) {
                *out = *mix * inverse;
            }
            lse[0] = state.most[i] + state.sum[i].ln();
        }
    }
}

/// Turns the first `seen` scores of a row into weights relative to the largest so far, the others into zeroes; gives what
/// earlier weights are multiplied with.
#[inline(always)]
fn soften<T: Real>(row: &mut [T], seen: usize, scale: T, most: &mut T, sum: &mut T) -> T {
    let (row, hidden) = row.split_at_mut(seen);
    hidden.fill(T::ZERO);
    if row.is_empty() {
        return T::ONE;
    }
    let mut lanes = [T::LOWEST; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if *x > *lane { *x } else { *lane };
    }
    let largest = lanes.into_iter().fold(T::LOWEST, T::max) * scale;
    let now = most.max(largest);
    let fade = if *most == T::LOWEST {
        T::ZERO
    } else {
        (*most - now).exp()
    };
    for x in row.iter_mut() {
        *x = x.fma(scale, -now).exp();
    }
    *most = now;
    let added = super::rows::sum(row.len(), |i| (row[i], T::ONE));
    *sum = sum.fma(fade, added);
    fade
}

/// What the backward reads beside [`Input`].
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a, T> {
    pub(crate) out: Table<'a, T>,
    pub(crate) lse: &'a [T],
    pub(crate) d_out: Table<'a, T>,
}

/// See [`super::super::Backend::attention_grad`].
pub(crate) fn backward<T: Real>(
    pool: &Pool,
    input: &Input<'_, T>,
    saved: &Saved<'_, T>,
    ends: &[usize],
    d_qkv: &mut [T],
    stride: usize,
) {
    let heads = &input.heads;
    let works = works(ends, heads.kv);
    let d_qkv = Parts::new(d_qkv);
    pool.each(works.len(), &|item| {
        let work = &works[item];
        let (rows, dim) = (work.rows.clone(), heads.dim);
        let (k_column, v_column) = ((heads.q + work.kv) * dim, work.kv * dim);
        let keys = pack_head(pool, input.qk, rows.clone(), k_column, dim, true);
        let turned = pack_head(pool, input.qk, rows.clone(), k_column, dim, false);
        let values = pack_head(pool, input.v, rows, v_column, dim, true);
        dispatch(
            pool.isa(),
            Backward {
                pool,
                input,
                saved,
                work,
                keys: &keys,
                turned: &turned,
                values: &values,
                d_qkv: &d_qkv,
                stride,
            },
        );
    });
}

struct Backward<'a, T> {
    pool: &'a Pool,
    input: &'a Input<'a, T>,
    saved: &'a Saved<'a, T>,
    work: &'a Work,
    /// Panels of keys.
    keys: &'a [T],
    /// Panels of the keys' elements.
    turned: &'a [T],
    /// Panels of values, by key.
    values: &'a [T],
    d_qkv: &'a Parts<'a, T>,
    stride: usize,
}

/// Room of a backward.
struct Room<T> {
    /// Weights of a block, then gradients of its scores.
    weights: Vec<T>,
    d_scores: Vec<T>,
    d_q: Vec<T>,
    /// Of the whole document: `[len, width]`.
    d_k: Vec<T>,
    d_v: Vec<T>,
}

impl<T: Real> Kernel for Backward<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let heads = &self.input.heads;
        let group = heads.q / heads.kv;
        let len = self.work.rows.len();
        let width = heads.dim.next_multiple_of(TILE_COLS);
        // Tiles of keys may reach beyond the last.
        let padded = len.next_multiple_of(KEYS) * width;
        let mut room = Room {
            weights: vec![T::ZERO; QUERIES * KEYS],
            d_scores: vec![T::ZERO; QUERIES * KEYS],
            d_q: vec![T::ZERO; QUERIES * width],
            d_k: vec![T::ZERO; padded],
            d_v: vec![T::ZERO; padded],
        };
        for head in self.work.kv * group..(self.work.kv + 1) * group {
            for first in (0..len).step_by(QUERIES) {
                self.block(lanes, head, first..len.min(first + QUERIES), &mut room);
            }
        }
        let column = (heads.q + self.work.kv) * heads.dim;
        self.store(self.work.rows.clone(), column, &room.d_k, width);
        let column = column + heads.kv * heads.dim;
        self.store(self.work.rows.clone(), column, &room.d_v, width);
    }
}

impl<T: Real> Backward<'_, T> {
    /// Writes a head's gradients.
    #[inline(always)]
    fn store(&self, rows: Range<usize>, column: usize, from: &[T], width: usize) {
        let dim = self.input.heads.dim;
        for (row, from) in rows.zip(from.chunks(width)) {
            let at = row * self.stride + column;
            // SAFETY: this head of this row is this item's alone.
            unsafe { self.d_qkv.part(at..at + dim) }.copy_from_slice(&from[..dim]);
        }
    }

    #[inline(always)]
    fn block<L: Lanes>(&self, lanes: L, head: usize, queries: Range<usize>, room: &mut Room<T>) {
        let (dim, len) = (self.input.heads.dim, self.work.rows.len());
        let width = dim.next_multiple_of(TILE_COLS);
        let start = self.work.rows.start;
        let rows = start + queries.start..start + queries.end;
        let column = head * dim;
        let q = pack_head(self.pool, self.input.qk, rows.clone(), column, dim, false);
        let d_out = pack_head(
            self.pool,
            self.saved.d_out,
            rows.clone(),
            column,
            dim,
            false,
        );
        let mut dots = [T::ZERO; QUERIES];
        for (dot, row) in dots.iter_mut().zip(rows.clone()) {
            let out = &self.saved.out.row(row)[column..column + dim];
            let d_out = &self.saved.d_out.row(row)[column..column + dim];
            *dot = super::rows::sum(dim, |i| (out[i], d_out[i]));
        }
        room.d_q.fill(T::ZERO);
        for first in (0..queries.end).step_by(KEYS) {
            let count = KEYS.min(queries.end - first);
            self.scores(lanes, head, &queries, first..first + count, &dots, room);
            let turn = |block: &[T]| Rows {
                start: block.as_ptr(),
                row: 1,
                step: KEYS,
                count,
            };
            let by_query = Rows {
                start: room.d_scores.as_ptr(),
                row: KEYS,
                step: 1,
                count: queries.len(),
            };
            let (d_q, d_k, d_v) = (&mut room.d_q, &mut room.d_k, &mut room.d_v);
            // SAFETY: blocks hold a weight for each query and key; panels as many rows.
            unsafe {
                let d_out = panels(&d_out, 0, queries.len(), dim);
                sweep(
                    lanes,
                    turn(&room.weights),
                    d_out,
                    queries.len(),
                    |r, c, rows, sums| {
                        add(d_v, width, first + r, c, rows, sums);
                    },
                );
                let q = panels(&q, 0, queries.len(), dim);
                sweep(
                    lanes,
                    turn(&room.d_scores),
                    q,
                    queries.len(),
                    |r, c, rows, sums| {
                        add(d_k, width, first + r, c, rows, sums);
                    },
                );
                let keys = panels_from(self.turned, first, len, dim);
                sweep(lanes, by_query, keys, count, |r, c, rows, sums| {
                    add(d_q, width, r, c, rows, sums);
                });
            }
        }
        self.store(rows, column, &room.d_q, width);
    }

    /// Weights of a block again, and the gradients of its scores.
    #[inline(always)]
    fn scores<L: Lanes>(
        &self,
        lanes: L,
        head: usize,
        queries: &Range<usize>,
        keys: Range<usize>,
        dots: &[T; QUERIES],
        room: &mut Room<T>,
    ) {
        let dim = self.input.heads.dim;
        let scale = T::of(1.0 / (dim as f64).sqrt());
        let start = self.work.rows.start;
        let rows = start + queries.start..start + queries.end;
        let (count, column) = (keys.len(), head * dim);
        let q = head_rows(&self.input.qk, rows.clone(), column);
        let d_out = head_rows(&self.saved.d_out, rows.clone(), column);
        let (weights, d_scores) = (&mut room.weights, &mut room.d_scores);
        // SAFETY: rows and panels hold `dim` elements.
        unsafe {
            let panel = keys.start / TILE_COLS;
            sweep(
                lanes,
                q,
                panels(self.keys, panel, dim, count),
                dim,
                |r, c, rows, sums| {
                    set(weights, KEYS, r, c, rows, sums);
                },
            );
            let values = panels(self.values, panel, dim, count);
            sweep(lanes, d_out, values, dim, |r, c, rows, sums| {
                set(d_scores, KEYS, r, c, rows, sums);
            });
        }
        for i in 0..queries.len() {
            let seen = (queries.start + i + 1)
                .saturating_sub(keys.start)
                .min(count);
            let lse = self.saved.lse[head * self.input.tokens + rows.start + i];
            let weights = &mut room.weights[i * KEYS..(i + 1) * KEYS];
            let d_scores = &mut room.d_scores[i * KEYS..(i + 1) * KEYS];
            for (weight, d) in weights.iter_mut().zip(&mut *d_scores).take(seen) {
                *weight = weight.fma(scale, -lse).exp();
                *d = *weight * (*d - dots[i]) * scale;
            }
            weights[seen..].fill(T::ZERO);
            d_scores[seen..].fill(T::ZERO);
        }
    }
}
