//! Paged attention for decode, prefill and anything between: a ragged batch of spans, each some tokens of one sequence
//! that look at all tokens of theirs before them. Heads of q that share a head of keys are read together.
//!
//! A row's scores are all kept (no online rescaling): its maximum is exact, and its sums have the order that the module
//! above states, whatever else is computed beside it.

#![expect(
    clippy::needless_range_loop,
    reason = "one index names a row or register of several arrays"
)]
#![expect(
    unsafe_code,
    reason = "blocks are read, and rows written, through pointers"
)]

use super::kv::{BLOCK_TOKENS, Element, KvCache, KvShape, Layer};
use super::pool::{Parts, Pool};
use super::simd::{Kernel, Lanes, dispatch, exp, tree};

/// Tokens of one sequence in a ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// The row of its first token.
    pub row: usize,
    /// How many.
    pub tokens: usize,
    /// The position of its first token.
    pub start: usize,
    /// Blocks of positions `0..start + tokens`.
    pub blocks: &'a [u32],
}

/// One thread's unit: some tokens of a span under one head of keys.
struct Tile<'a> {
    span: Span<'a>,
    first: usize,
    tokens: usize,
    kv_head: usize,
}

/// Rows (tokens × heads of q per head of keys) that read keys together.
const TILE_ROWS: usize = 8;

/// `out[t] = softmax(q[t] · Kᵀ · scale) · V` for each token and head. A row of `q` is `q_stride` wide and starts with the
/// heads; a row of `out` is `heads · head_dim`.
///
/// # Panics
/// When lengths do not fit, a block is outside the cache, or spans are not in the order of their rows.
#[expect(clippy::too_many_arguments, reason = "the op's operands")]
pub fn attention(
    pool: &Pool,
    q: &[f32],
    q_stride: usize,
    heads: usize,
    scale: f32,
    spans: &[Span<'_>],
    cache: &KvCache,
    layer: usize,
    out: &mut [f32],
) {
    let kv = cache.shape();
    let group = heads / kv.heads;
    assert!(group * kv.heads == heads && heads * kv.head_dim <= q_stride);
    let mut next_row = 0;
    for span in spans {
        // No two threads write one row.
        assert!(span.row >= next_row, "spans are in the order of their rows");
        next_row = span.row + span.tokens;
        let end = span.start + span.tokens;
        assert!(
            span.blocks.len() * BLOCK_TOKENS >= end,
            "{end} positions need more blocks"
        );
        assert!(
            span.blocks
                .iter()
                .all(|block| (*block as usize) < kv.blocks)
        );
        assert!((span.row + span.tokens) * q_stride <= q.len());
        assert!((span.row + span.tokens) * heads * kv.head_dim <= out.len());
    }
    let step = Step {
        pool,
        q,
        q_stride,
        heads,
        group,
        scale,
        kv,
        tiles: tiles_of(spans, kv.heads, (TILE_ROWS / group).max(1)),
    };
    match cache.layer(layer) {
        Layer::F32(keys, values) => step.run(keys, values, out),
        Layer::Bf16(keys, values) => step.run(keys, values, out),
    }
}

/// All tiles of a layer's step.
struct Step<'a> {
    pool: &'a Pool,
    q: &'a [f32],
    q_stride: usize,
    heads: usize,
    group: usize,
    scale: f32,
    kv: KvShape,
    tiles: Vec<Tile<'a>>,
}

impl Step<'_> {
    fn run<E: Element>(&self, keys: &[E], values: &[E], out: &mut [f32]) {
        let cost = |tile: &Tile<'_>| (tile.span.start + tile.first + tile.tokens) * tile.tokens;
        let total: usize = self.tiles.iter().map(cost).sum();
        let out = Parts::new(out);
        self.pool.run(&|index| {
            let threads = self.pool.threads();
            let mut scores = Vec::new();
            let mut done = 0;
            for tile in &self.tiles {
                // A tile is the thread's in whose share of the cost its start falls.
                let owner = (done * threads / total.max(1)).min(threads - 1);
                done += cost(tile);
                if owner == index {
                    let call = Call {
                        step: self,
                        keys,
                        values,
                        out: &out,
                        tile,
                        scores: &mut scores,
                    };
                    dispatch(self.pool.isa(), call);
                }
            }
        });
    }
}

fn tiles_of<'a>(spans: &[Span<'a>], kv_heads: usize, tokens: usize) -> Vec<Tile<'a>> {
    let mut tiles = Vec::new();
    for span in spans {
        for kv_head in 0..kv_heads {
            for first in (0..span.tokens).step_by(tokens) {
                tiles.push(Tile {
                    span: *span,
                    first,
                    tokens: tokens.min(span.tokens - first),
                    kv_head,
                });
            }
        }
    }
    tiles
}

struct Call<'a, E> {
    step: &'a Step<'a>,
    keys: &'a [E],
    values: &'a [E],
    out: &'a Parts<'a, f32>,
    tile: &'a Tile<'a>,
    scores: &'a mut Vec<f32>,
}

impl<E: Element> Kernel for Call<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let rows = self.tile.tokens * self.step.group;
        let most = if L::WIDE { 8 } else { L::ROWS };
        let length = self.positions().next_multiple_of(BLOCK_TOKENS);
        let mut scores = std::mem::take(self.scores);
        scores.resize(rows * length, 0.0);
        for first in (0..rows).step_by(most) {
            let part = &mut scores[first * length..];
            match most.min(rows - first) {
                1 => self.score::<L, 1>(lanes, first, length, part),
                2 if L::ROWS >= 2 => self.score::<L, 2>(lanes, first, length, part),
                3 if L::ROWS >= 3 => self.score::<L, 3>(lanes, first, length, part),
                4 if L::WIDE => self.score::<L, 4>(lanes, first, length, part),
                5 if L::WIDE => self.score::<L, 5>(lanes, first, length, part),
                6 if L::WIDE => self.score::<L, 6>(lanes, first, length, part),
                7 if L::WIDE => self.score::<L, 7>(lanes, first, length, part),
                8 if L::WIDE => self.score::<L, 8>(lanes, first, length, part),
                // At least one row, and at most `most`.
                _ => {}
            }
        }
        let mut inverse = vec![0.0; rows];
        for (row, inverse) in inverse.iter_mut().enumerate() {
            let seen = self.seen(row);
            *inverse = softmax(&mut scores[row * length..][..length], seen, self.step.scale);
        }
        let most = L::ROWS.min(4);
        for first in (0..rows).step_by(most) {
            let part = &scores[first * length..];
            match most.min(rows - first) {
                1 => self.mix_all::<L, 1>(lanes, first, length, part, &inverse[first..]),
                2 if L::ROWS >= 2 => {
                    self.mix_all::<L, 2>(lanes, first, length, part, &inverse[first..])
                }
                3 if L::ROWS >= 3 => {
                    self.mix_all::<L, 3>(lanes, first, length, part, &inverse[first..])
                }
                4 if L::WIDE => self.mix_all::<L, 4>(lanes, first, length, part, &inverse[first..]),
                _ => {}
            }
        }
        *self.scores = scores;
    }
}

impl<E: Element> Call<'_, E> {
    /// Positions that the tile's last token sees.
    fn positions(&self) -> usize {
        self.tile.span.start + self.tile.first + self.tile.tokens
    }

    /// Positions that a row sees. Rows are tokens, and under each the heads of the group.
    fn seen(&self, row: usize) -> usize {
        self.tile.span.start + self.tile.first + row / self.step.group + 1
    }

    /// Token in the batch and head of q of a row.
    fn place(&self, row: usize) -> (usize, usize) {
        (
            self.tile.span.row + self.tile.first + row / self.step.group,
            self.tile.kv_head * self.step.group + row % self.step.group,
        )
    }

    #[inline(always)]
    fn score<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        first: usize,
        length: usize,
        scores: &mut [f32],
    ) {
        let kv = self.step.kv;
        let mut q = [self.step.q.as_ptr(); ROWS];
        for (r, q) in q.iter_mut().enumerate() {
            let (token, head) = self.place(first + r);
            *q = self.step.q[token * self.step.q_stride + head * kv.head_dim..][..kv.head_dim]
                .as_ptr();
        }
        assert!(scores.len() >= ROWS * length);
        for at in 0..length / BLOCK_TOKENS {
            let block = self.tile.span.blocks[at] as usize;
            let start = (block * kv.heads + self.tile.kv_head) * kv.head_dim * BLOCK_TOKENS;
            let keys = self.keys[start..start + kv.head_dim * BLOCK_TOKENS].as_ptr();
            // SAFETY: each q has `head_dim` elements, the block as many vectors, a row of scores `length` places.
            unsafe {
                let mut acc = [lanes.zero(); ROWS];
                for d in 0..kv.head_dim {
                    let k = E::load(lanes, keys.add(d * BLOCK_TOKENS));
                    for r in 0..ROWS {
                        acc[r] = lanes.fma(lanes.splat(*q[r].add(d)), k, acc[r]);
                    }
                }
                for (r, acc) in acc.iter().enumerate() {
                    lanes.store(
                        scores.as_mut_ptr().add(r * length + at * BLOCK_TOKENS),
                        *acc,
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn mix_all<L: Lanes, const ROWS: usize>(
        &self,
        lanes: L,
        first: usize,
        length: usize,
        weights: &[f32],
        inverse: &[f32],
    ) {
        let dim = self.step.kv.head_dim;
        let mut at = 0;
        while L::WIDE && at + 64 <= dim {
            self.mix::<L, ROWS, 4>(lanes, first, length, weights, inverse, at);
            at += 64;
        }
        while at < dim {
            self.mix::<L, ROWS, 1>(lanes, first, length, weights, inverse, at);
            at += 16;
        }
    }

    /// `VECTORS` times 16 elements of `ROWS` rows, from element `from` on.
    #[inline(always)]
    fn mix<L: Lanes, const ROWS: usize, const VECTORS: usize>(
        &self,
        lanes: L,
        first: usize,
        length: usize,
        weights: &[f32],
        inverse: &[f32],
        from: usize,
    ) {
        let kv = self.step.kv;
        let positions = self.positions();
        assert!(weights.len() >= ROWS * length && from + VECTORS * 16 <= kv.head_dim);
        // SAFETY: a block holds 16 tokens of `head_dim` elements; rows of `out` are this tile's alone.
        unsafe {
            let mut acc = [[lanes.zero(); VECTORS]; ROWS];
            for at in 0..length / BLOCK_TOKENS {
                let block = self.tile.span.blocks[at] as usize;
                let start = (block * kv.heads + self.tile.kv_head) * kv.head_dim * BLOCK_TOKENS;
                let values = self.values[start..start + kv.head_dim * BLOCK_TOKENS].as_ptr();
                let tokens = BLOCK_TOKENS.min(positions - at * BLOCK_TOKENS);
                for t in 0..tokens {
                    let mut v = [lanes.zero(); VECTORS];
                    for (i, v) in v.iter_mut().enumerate() {
                        *v = E::load(lanes, values.add(t * kv.head_dim + from + i * 16));
                    }
                    for r in 0..ROWS {
                        let w = *weights.as_ptr().add(r * length + at * BLOCK_TOKENS + t);
                        let w = lanes.splat(w);
                        for i in 0..VECTORS {
                            acc[r][i] = lanes.fma(w, v[i], acc[r][i]);
                        }
                    }
                }
            }
            for r in 0..ROWS {
                let (token, head) = self.place(first + r);
                let at = (token * self.step.heads + head) * kv.head_dim + from;
                let out = self.out.part(at..at + VECTORS * 16).as_mut_ptr();
                for i in 0..VECTORS {
                    lanes.store(
                        out.add(i * 16),
                        lanes.mul(acc[r][i], lanes.splat(inverse[r])),
                    );
                }
            }
        }
    }
}

/// Turns the first `seen` scores into `exp(scale · (s - max))` and the others into 0; gives 1 / their sum.
#[inline(always)]
fn softmax(scores: &mut [f32], seen: usize, scale: f32) -> f32 {
    let (seen, unseen) = scores.split_at_mut(seen);
    unseen.fill(0.0);
    let mut most = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = seen.as_chunks::<16>();
    for chunk in chunks {
        for (most, s) in most.iter_mut().zip(chunk) {
            *most = if *s > *most { *s } else { *most };
        }
    }
    let most = most
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut lanes = [0.0_f32; 16];
    let (chunks, rest) = seen.as_chunks_mut::<16>();
    for chunk in chunks {
        for (lane, s) in lanes.iter_mut().zip(chunk) {
            *s = exp((*s - most) * scale);
            *lane += *s;
        }
    }
    for (lane, s) in lanes.iter_mut().zip(rest) {
        *s = exp((*s - most) * scale);
        *lane += *s;
    }
    1.0 / tree(lanes)
}

#[cfg(test)]
mod tests;
