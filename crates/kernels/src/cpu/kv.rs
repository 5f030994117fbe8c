//! The paged KV cache in f32 or bf16, and the op that fills it: per-head RMSNorm and RoPE of q and k, and the write of k and v.
//!
//! A block holds 16 tokens. Keys lie `[block, head, element, token]`, so that one vector is 16 tokens' element; values
//! lie `[block, head, token, element]`.

#![expect(unsafe_code, reason = "threads write tokens of one cache")]

use std::io;

use half::bf16;

use super::elementwise::inverse_rms;
use super::pool::{Parts, Pool};
use super::simd::{Kernel, Lanes, dispatch};
use crate::buffer::{Buffer, Plain};

/// Tokens of a KV block.
pub const BLOCK_TOKENS: usize = 16;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvForm {
    /// 4 bytes a number.
    F32,
    /// 2 bytes a number, rounded to nearest even as it is written.
    Bf16,
}

impl KvForm {
    /// Bytes of a number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<u16>(),
        }
    }
}

/// A number of the cache.
pub(crate) trait Element: Copy + Send + Sync {
    fn of(x: f32) -> Self;
    /// # Safety
    /// 16 of them can be read there.
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::V;
}

impl Element for f32 {
    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::V {
        // SAFETY: by contract.
        unsafe { lanes.load(from) }
    }
}

/// A bf16 by its bits.
impl Element for u16 {
    fn of(x: f32) -> Self {
        bf16::from_f32(x).to_bits()
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::V {
        // SAFETY: by contract.
        unsafe { lanes.load_bf16_16(from) }
    }
}

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
    /// How they are kept.
    pub form: KvForm,
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
        self.layers * self.block_len() * 2 * self.form.bytes()
    }
}

/// Keys and values of all layers.
pub struct KvCache {
    shape: KvShape,
    data: Data,
}

enum Data {
    F32(Pages<f32>),
    Bf16(Pages<u16>),
}

struct Pages<E: Plain> {
    keys: Buffer<E>,
    values: Buffer<E>,
}

/// Keys and values of one layer.
pub(crate) enum Layer<'a> {
    F32(&'a [f32], &'a [f32]),
    Bf16(&'a [u16], &'a [u16]),
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
        let data = match shape.form {
            KvForm::F32 => Data::F32(Pages {
                keys: Buffer::zeroed(len)?,
                values: Buffer::zeroed(len)?,
            }),
            KvForm::Bf16 => Data::Bf16(Pages {
                keys: Buffer::zeroed(len)?,
                values: Buffer::zeroed(len)?,
            }),
        };
        Ok(Self { shape, data })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn layer(&self, layer: usize) -> Layer<'_> {
        let len = self.shape.layer_len();
        let range = layer * len..(layer + 1) * len;
        match &self.data {
            Data::F32(all) => Layer::F32(&all.keys[range.clone()], &all.values[range]),
            Data::Bf16(all) => Layer::Bf16(&all.keys[range.clone()], &all.values[range]),
        }
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
    let len = kv.layer_len();
    let range = layer * len..(layer + 1) * len;
    let tokens = Tokens {
        pool,
        shape,
        kv,
        turns,
        places,
    };
    match &mut cache.data {
        Data::F32(all) => {
            tokens.write(qkv, &mut all.keys[range.clone()], &mut all.values[range]);
        }
        Data::Bf16(all) => {
            tokens.write(qkv, &mut all.keys[range.clone()], &mut all.values[range]);
        }
    }
}

/// Tokens that go into a layer of the cache, each into a place of its own.
struct Tokens<'a> {
    pool: &'a Pool,
    shape: &'a QkvShape<'a>,
    kv: KvShape,
    turns: &'a [f32],
    places: &'a [Place],
}

impl Tokens<'_> {
    fn write<E: Element>(&self, qkv: &mut [f32], keys: &mut [E], values: &mut [E]) {
        let dim = self.kv.head_dim;
        let width = (self.shape.heads + 2 * self.kv.heads) * dim;
        let (qkv, keys, values) = (Parts::new(qkv), Parts::new(keys), Parts::new(values));
        self.pool.split(self.places.len(), &|range| {
            for token in range {
                let place = self.places[token];
                assert!((place.offset as usize) < BLOCK_TOKENS);
                // SAFETY: a token is one thread's.
                let row = unsafe { qkv.part(token * width..(token + 1) * width) };
                dispatch(
                    self.pool.isa(),
                    Turn {
                        shape: self.shape,
                        kv: self.kv,
                        row,
                        turns: &self.turns[token * dim..][..dim],
                    },
                );
                let (_, row) = row.split_at(self.shape.heads * dim);
                let (k, v) = row.split_at(self.kv.heads * dim);
                for head in 0..self.kv.heads {
                    let at = (place.block as usize * self.kv.heads + head) * dim * BLOCK_TOKENS;
                    for (element, k) in k[head * dim..][..dim].iter().enumerate() {
                        let at = at + element * BLOCK_TOKENS + place.offset as usize;
                        // SAFETY: no other token has this place, so no other thread this element.
                        unsafe { keys.part(at..at + 1)[0] = E::of(*k) };
                    }
                    let at = at + place.offset as usize * dim;
                    // SAFETY: as above.
                    let to = unsafe { values.part(at..at + dim) };
                    for (to, v) in to.iter_mut().zip(&v[head * dim..][..dim]) {
                        *to = E::of(*v);
                    }
                }
            }
        });
    }
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
