//! The paged KV cache in f32, and the op that fills it: per-head RMSNorm and RoPE of q and k, and the write of k and v.
//!
//! A block holds 16 tokens. Keys lie `[block, head, element, token]`, so that one vector is 16 tokens' element; values
//! lie `[block, head, token, element]`.

#![expect(unsafe_code, reason = "threads write tokens of one cache")]

use std::io;

use super::elementwise::inverse_rms;
use super::pool::{Parts, Pool};
use super::simd::{Kernel, Lanes, dispatch};
use crate::buffer::Buffer;

/// Tokens of a KV block.
pub const BLOCK_TOKENS: usize = 16;

/// The shape of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Blocks of 16 tokens.
    pub blocks: usize,
    /// Heads of keys and values.
    pub heads: usize,
    /// Elements of a head: a multiple of 16.
    pub head_dim: usize,
}

impl KvShape {
    fn layer_len(&self) -> usize {
        self.blocks * self.block_len()
    }

    fn block_len(&self) -> usize {
        self.heads * self.head_dim * BLOCK_TOKENS
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.layers * self.block_len() * 2 * size_of::<f32>()
    }
}

/// Keys and values of all layers.
pub struct KvCache {
    shape: KvShape,
    keys: Buffer<f32>,
    values: Buffer<f32>,
}

impl KvCache {
    /// Zeroed blocks; memory is taken from the system as they are first written.
    ///
    /// # Errors
    /// When the system has no room for them.
    ///
    /// # Panics
    /// When `head_dim` is not a multiple of 16.
    pub fn new(shape: KvShape) -> io::Result<Self> {
        assert!(shape.head_dim.is_multiple_of(16), "{shape:?}");
        let len = shape.layers * shape.layer_len();
        Ok(Self {
            shape,
            keys: Buffer::zeroed(len)?,
            values: Buffer::zeroed(len)?,
        })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Keys and values of a layer.
    pub(crate) fn layer(&self, layer: usize) -> (&[f32], &[f32]) {
        let len = self.shape.layer_len();
        let range = layer * len..(layer + 1) * len;
        (&self.keys[range.clone()], &self.values[range])
    }

    fn layer_mut(&mut self, layer: usize) -> (&mut [f32], &mut [f32]) {
        let len = self.shape.layer_len();
        let range = layer * len..(layer + 1) * len;
        (&mut self.keys[range.clone()], &mut self.values[range])
    }
}

/// How a row of packed q, k and v is laid out, and what its heads are normed with.
pub struct QkvShape<'a> {
    /// Heads of q.
    pub heads: usize,
    /// Weight of q's RMSNorm, `head_dim` wide.
    pub q_norm: &'a [f32],
    /// Weight of k's RMSNorm, `head_dim` wide.
    pub k_norm: &'a [f32],
    /// Of both norms.
    pub eps: f32,
}

/// Where a token's key and value go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The block.
    pub block: u32,
    /// The token's position in it.
    pub offset: u32,
}

/// For each token: norms and turns its q heads in place, and writes its key (normed and turned) and value into the cache.
/// `qkv` is `[tokens, (heads + 2 · kv heads) · head_dim]`; `turns` is `[tokens, head_dim]`: cosines of the first half of a
/// head, then sines.
///
/// # Panics
/// When lengths do not fit, a place is outside the cache, or two tokens have the same place.
pub fn norm_rope_write(
    pool: &Pool,
    shape: &QkvShape<'_>,
    qkv: &mut [f32],
    turns: &[f32],
    places: &[Place],
    cache: &mut KvCache,
    layer: usize,
) {
    let kv = cache.shape();
    let width = (shape.heads + 2 * kv.heads) * kv.head_dim;
    assert_eq!(qkv.len(), places.len() * width);
    assert_eq!(turns.len(), places.len() * kv.head_dim);
    let mut sorted: Vec<(u32, u32)> = places.iter().map(|p| (p.block, p.offset)).collect();
    sorted.sort_unstable();
    assert!(
        sorted.windows(2).all(|pair| pair[0] != pair[1]),
        "two tokens in one place"
    );
    let (keys, values) = cache.layer_mut(layer);
    let (qkv, keys, values) = (Parts::new(qkv), Parts::new(keys), Parts::new(values));
    pool.split(places.len(), &|range| {
        for token in range {
            let place = places[token];
            assert!((place.offset as usize) < BLOCK_TOKENS);
            // SAFETY: a token is one thread's.
            let row = unsafe { qkv.part(token * width..(token + 1) * width) };
            dispatch(
                pool.isa(),
                Turn {
                    shape,
                    kv,
                    row,
                    turns: &turns[token * kv.head_dim..][..kv.head_dim],
                },
            );
            let (_, row) = row.split_at(shape.heads * kv.head_dim);
            let (k, v) = row.split_at(kv.heads * kv.head_dim);
            for head in 0..kv.heads {
                let at = (place.block as usize * kv.heads + head) * kv.head_dim * BLOCK_TOKENS;
                let k = &k[head * kv.head_dim..][..kv.head_dim];
                for (element, k) in k.iter().enumerate() {
                    let at = at + element * BLOCK_TOKENS + place.offset as usize;
                    // SAFETY: no other token has this place, so no other thread this element.
                    unsafe { keys.part(at..at + 1)[0] = *k };
                }
                let at = at + place.offset as usize * kv.head_dim;
                // SAFETY: as above.
                let to = unsafe { values.part(at..at + kv.head_dim) };
                to.copy_from_slice(&v[head * kv.head_dim..][..kv.head_dim]);
            }
        }
    });
}

struct Turn<'a> {
    shape: &'a QkvShape<'a>,
    kv: KvShape,
    row: &'a mut [f32],
    turns: &'a [f32],
}

impl Kernel for Turn<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let dim = self.kv.head_dim;
        let heads = self
            .row
            .chunks_mut(dim)
            .take(self.shape.heads + self.kv.heads);
        let (cos, sin) = self.turns.split_at(dim / 2);
        for (index, head) in heads.enumerate() {
            let is_q = index < self.shape.heads;
            let weight = if is_q {
                self.shape.q_norm
            } else {
                self.shape.k_norm
            };
            let scale = inverse_rms(head, self.shape.eps);
            let (low, high) = head.split_at_mut(dim / 2);
            let (w_low, w_high) = weight.split_at(dim / 2);
            let pairs = low.iter_mut().zip(high).zip(w_low.iter().zip(w_high));
            for (((a, b), (wa, wb)), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                let (x, y) = (wa * (*a * scale), wb * (*b * scale));
                *a = x * c - y * s;
                *b = y * c + x * s;
            }
        }
    }
}
