//! Weights that are drawn, not read: models of the exact shapes for measurements and golden tests.

use espalier_kernels::cpu::RowSource;
use half::bf16;

use crate::checkpoint::{CheckpointError, Tensor, TensorSource};
use crate::config::Config;

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
        draw.offset + bf16::from_f32(x * draw.scale).to_f32()
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

/// One run of random bf16 that all matrices are cut from, for models of whose numbers too many would have to be drawn:
/// uniform, of deviation 0.02 as before training. Norms are one.
pub struct Cut {
    bytes: Vec<u8>,
}

impl Cut {
    /// Draws as many numbers as the largest matrix of the model has.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let wide = config
            .vocab_size
            .max(config.intermediate_size)
            .max(config.heads * config.head_dim);
        let mut bytes = vec![0_u8; 2 * wide * config.hidden_size];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = bytes.len().div_ceil(threads).next_multiple_of(8);
        std::thread::scope(|scope| {
            for (seed, part) in (1..).zip(bytes.chunks_mut(share)) {
                scope.spawn(move || fill(seed, part));
            }
        });
        Self { bytes }
    }
}

/// Four numbers of each word of xorshift, in ±0.0346.
fn fill(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for (pair, bits) in word.chunks_mut(2).zip(0..) {
            let unit = f32::from((state >> (16 * bits)) as u16) / 32_768.0 - 1.0;
            let rounded = bf16::from_f32(unit * 0.0346).to_le_bytes();
            pair.copy_from_slice(&rounded[..pair.len()]);
        }
    }
}

impl TensorSource for Cut {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let count: usize = shape.iter().product();
        if name.contains("norm") {
            return Ok(Tensor::Owned(vec![1.0; count]));
        }
        // Every tensor begins elsewhere.
        let hash = name.bytes().fold(7_usize, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(usize::from(byte))
        });
        let held = self.bytes.len() / 2;
        let start = match held.checked_sub(count) {
            Some(room) => 2 * (hash % (room + 1)),
            None => return Err(CheckpointError::MissingTensor(name.to_owned())),
        };
        let bytes = &self.bytes[start..start + 2 * count];
        Ok(Tensor::Mapped(RowSource::Bf16Bytes(bytes)))
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shape;

    #[test]
    fn cut_weights_are_of_the_size_before_training_and_differ() {
        let config = Config {
            vocab_size: 64,
            hidden_size: 32,
            intermediate_size: 96,
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            ..Shape::Small.config()
        };
        let cut = Cut::new(&config);
        let read = |name: &str| cut.tensor(name, &[96, 32]).map(|tensor| tensor.to_vec());
        let values = read("up").unwrap();
        let deviation = (values.iter().map(|x| x * x).sum::<f32>() / 3072.0).sqrt();
        assert!((deviation - 0.02).abs() < 0.001, "{deviation}");
        assert!(values.iter().sum::<f32>().abs() < 4.0);
        let small = |name: &str| cut.tensor(name, &[16, 32]).unwrap().to_vec();
        assert_ne!(small("layers.0.q"), small("layers.1.q"));
        assert!(cut.tensor("more", &[97, 32]).is_err());
    }
}
