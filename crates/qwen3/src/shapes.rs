//! The exact shapes of Qwen3 models, and what a step of them must read and compute at least.

use crate::{Config, MlpTensors, Rope};

/// A model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Qwen3-0.6B.
    Small,
    /// Qwen3-4B.
    Medium,
}

impl Shape {
    /// By its name: 0.6b, 4b.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        [Self::Small, Self::Medium]
            .into_iter()
            .find(|shape| shape.name() == name)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "0.6b",
            Self::Medium => "4b",
        }
    }

    /// As its `config.json` says.
    #[must_use]
    pub fn config(self) -> Config {
        let (hidden_size, intermediate_size, layers, heads) = match self {
            Self::Small => (1024, 3072, 28, 16),
            Self::Medium => (2560, 9728, 36, 32),
        };
        Config {
            vocab_size: 151_936,
            real_vocab_size: 151_669,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads: 8,
            head_dim: 128,
            rms_norm_eps: 1e-6,
            tied: true,
            max_positions: 40_960,
            rope: Rope {
                theta: 1e6,
                yarn: None,
            },
            moe: None,
        }
    }

    /// Parameters that a token is multiplied with, the LM head among them.
    #[must_use]
    pub fn parameters(self) -> f64 {
        let config = self.config();
        let layer = |index| {
            let tensors = config.layer_tensors(index);
            let mlp = match tensors.mlp {
                MlpTensors::Dense(mlp) => mlp.gate_up.count() + mlp.down.count(),
                MlpTensors::Sparse { .. } => 0,
            };
            tensors.qkv.count() + tensors.o.count() + mlp
        };
        let layers: usize = (0..config.layers).map(layer).sum();
        (layers + config.embedding().count()) as f64
    }

    /// Bytes of keys and values of a token.
    #[must_use]
    pub fn kv_bytes(self) -> f64 {
        let config = self.config();
        (2 * 2 * config.layers * config.kv_heads * config.head_dim) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_model_cards() {
        // 0.6 B with 0.44 B outside of the embedding; 4.0 B with 3.6 B.
        assert!((Shape::Small.parameters() - 0.596e9).abs() < 1e6);
        assert!((Shape::Medium.parameters() - 4.022e9).abs() < 2e6);
        assert_eq!(Shape::Small.kv_bytes(), 112.0 * 1024.0);
        assert_eq!(Shape::Medium.kv_bytes(), 144.0 * 1024.0);
        assert_eq!(Shape::of("4b"), Some(Shape::Medium));
    }
}
