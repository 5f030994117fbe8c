//! Weights that are drawn, not read: models of the exact shapes for measurements and golden tests.

use crate::checkpoint::{CheckpointError, Tensor, TensorSource};

/// How a tensor is drawn: `offset + scale · x`, where x in [-1, 1) comes from the seed and the element's place, and
/// `scale · x` is rounded to bf16.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// Names the numbers.
    pub seed: u64,
    /// Place of the first element under that seed.
    pub start: u64,
    /// Size of the numbers.
    pub scale: f32,
    /// Added to each.
    pub offset: f32,
}

/// Draws `count` numbers: element i is splitmix64 of `seed · 2^40 + start + i`, its top 24 bits as a number in [-1, 1).
#[must_use]
pub fn hashed(draw: Draw, count: usize) -> Vec<f32> {
    let first = (draw.seed << 40).wrapping_add(draw.start);
    let at = |i: u64| {
        let z = first.wrapping_add(i).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let z = z ^ (z >> 31);
        let x = (z >> 40) as f32 / (1 << 23) as f32 - 1.0;
        draw.offset + half::bf16::from_f32(x * draw.scale).to_f32()
    };
    (0..count as u64).map(at).collect()
}

/// A source of drawn tensors: `of` says how each is drawn, by name and shape.
pub struct Seeded<F>(pub F);

impl Seeded<fn(&str, &[usize]) -> Option<Draw>> {
    /// Any model: each tensor under a seed of its own name, of a size that keeps activations near one.
    #[must_use]
    pub fn any() -> Self {
        Self(|name, shape| {
            let seed = name
                .bytes()
                .fold(7_u64, |seed, byte| seed.wrapping_mul(31) + u64::from(byte));
            let norm = name.contains("norm");
            let inputs = *shape.last().unwrap_or(&1) as f32;
            Some(Draw {
                seed: seed % (1 << 24),
                start: 0,
                scale: if norm { 0.25 } else { 2.0 / inputs.sqrt() },
                offset: if norm { 1.0 } else { 0.0 },
            })
        })
    }
}

impl<F: Fn(&str, &[usize]) -> Option<Draw>> TensorSource for Seeded<F> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let draw = (self.0)(name, shape);
        let draw = draw.ok_or_else(|| CheckpointError::MissingTensor(name.to_owned()))?;
        Ok(Tensor::Owned(hashed(draw, shape.iter().product())))
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}
