//! Angles of the rotary embedding, with and without YaRN.

use crate::config::{Config, Rope, Yarn};

impl Config {
    /// `[positions, head_dim]`: of each position `head_dim / 2` cosines, then as many sines.
    #[must_use]
    pub fn turns(&self, positions: usize) -> Vec<f32> {
        let rotary = Rotary::new(&self.rope, self.head_dim);
        let mut turns = Vec::with_capacity(positions * self.head_dim);
        for position in 0..positions {
            rotary.push(position, &mut turns);
        }
        turns
    }
}

/// Frequencies of a model's heads.
pub(crate) struct Rotary {
    frequencies: Vec<f32>,
    factor: f64,
}

impl Rotary {
    pub(crate) fn new(rope: &Rope, head_dim: usize) -> Self {
        let bases =
            (0..head_dim / 2).map(|i| rope.theta.powf((2.0 * i as f64) / head_dim as f64) as f32);
        let frequencies = match &rope.yarn {
            None => bases.map(|base| 1.0 / base).collect(),
            Some(yarn) => {
                let ramp = ramp(yarn, rope.theta, head_dim);
                bases
                    .zip(ramp)
                    .map(|(base, ramp)| {
                        let stretched = 1.0 / (yarn.factor as f32 * base);
                        stretched * ramp + 1.0 / base * (1.0 - ramp)
                    })
                    .collect()
            }
        };
        Self {
            frequencies,
            factor: rope.yarn.map_or(1.0, |yarn| yarn.attention_factor),
        }
    }

    /// Appends `head_dim / 2` cosines, then as many sines.
    pub(crate) fn push(&self, position: usize, turns: &mut Vec<f32>) {
        let angles = || {
            self.frequencies
                .iter()
                .map(|f| f64::from(position as f32 * f))
        };
        turns.extend(angles().map(|angle| (angle.cos() * self.factor) as f32));
        turns.extend(angles().map(|angle| (angle.sin() * self.factor) as f32));
    }
}

/// How much each frequency is stretched: 0 where it turns often within the original positions, 1 where rarely.
fn ramp(yarn: &Yarn, theta: f64, head_dim: usize) -> Vec<f32> {
    let dim = head_dim as f64;
    let index_of = |turns: f64| {
        let positions = yarn.original_positions as f64;
        dim * (positions / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
    };
    let low = index_of(yarn.beta_fast).floor().max(0.0);
    let high = index_of(yarn.beta_slow).ceil().min(dim - 1.0);
    let width = if high > low { high - low } else { 0.001 };
    (0..head_dim / 2)
        .map(|i| ((i as f64 - low) / width).clamp(0.0, 1.0) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_leaves_fast_frequencies_and_divides_slow_ones() {
        let plain = Rotary::new(
            &Rope {
                theta: 1e6,
                yarn: None,
            },
            128,
        );
        let yarn = Yarn {
            factor: 4.0,
            original_positions: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.1,
        };
        let long = Rotary::new(
            &Rope {
                theta: 1e6,
                yarn: Some(yarn),
            },
            128,
        );
        // 32,768 positions are 32 turns at i = 23.6 and one at i = 39.6.
        for i in 0..64 {
            let share = long.frequencies[i] / plain.frequencies[i];
            match i {
                0..=23 => assert_eq!(share, 1.0, "{i}"),
                24..=39 => assert!(share < 1.0 && share > 0.25, "{i}: {share}"),
                _ => assert!((share - 0.25).abs() < 1e-6, "{i}: {share}"),
            }
        }
        let mut turns = Vec::new();
        long.push(0, &mut turns);
        assert_eq!((turns[0], turns[64]), (1.1, 0.0));
    }
}
