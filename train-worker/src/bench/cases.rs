//! What is measured: models of exact shapes, what is trained of them, and what a step has.

use espalier_qwen3::{Config, Shape};

use super::BenchError;
use crate::data::{Row, Rules, Samples};
use crate::engine::{AdamW, Bits, LoraSettings, Precision, Projection, Settings, Trained};

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    model: Model,
    full: bool,
    /// Micro-batches of a step.
    micros: usize,
    /// Tokens of each, all one document.
    tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Model {
    /// 4 layers, 256 wide, a vocabulary of 4,096: 4 million parameters.
    Small,
    /// 4 layers of Qwen3-0.6B over the same vocabulary.
    Layers,
    /// Qwen3-4B.
    Medium,
}

const fn case(name: &'static str, model: Model, full: bool, micros: usize, tokens: usize) -> Case {
    Case {
        name,
        model,
        full,
        micros,
        tokens,
    }
}

/// On the CPU.
pub const CPU: [Case; 4] = [
    case("256-lora", Model::Small, false, 1, 1024),
    case("256-full", Model::Small, true, 1, 1024),
    case("0.6b-lora", Model::Layers, false, 1, 1024),
    case("0.6b-full", Model::Layers, true, 1, 1024),
];

/// On a GPU.
pub const GPU: [Case; 5] = [
    case("4m-4x1024", Model::Small, true, 4, 1024),
    case("4m-8192", Model::Small, true, 1, 8192),
    case("4b-2048", Model::Medium, false, 1, 2048),
    case("4b-8192", Model::Medium, false, 1, 8192),
    case("4b-32768", Model::Medium, false, 1, 32_768),
];

/// A step of milliseconds.
#[cfg(test)]
pub(super) const TINY: Case = case("tiny", Model::Small, true, 2, 32);

impl Case {
    /// What is trained.
    #[must_use]
    pub fn trained(&self) -> &'static str {
        if self.full { "full" } else { "lora" }
    }

    /// Whether a CPU can check it in seconds.
    pub(super) fn is_small(&self) -> bool {
        self.model == Model::Small
    }

    /// The model.
    #[must_use]
    pub fn config(&self) -> Config {
        const VOCABULARY: usize = 4096;
        let layers = Config {
            vocab_size: VOCABULARY,
            real_vocab_size: VOCABULARY,
            layers: 4,
            ..Shape::Small.config()
        };
        match self.model {
            Model::Small => Config {
                hidden_size: 256,
                intermediate_size: 768,
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                ..layers
            },
            Model::Layers => layers,
            Model::Medium => Shape::Medium.config(),
        }
    }

    /// Adapters as those of the peers in `docs/benchmarks.md`: rank 32 on all projections, moments in 8 bits.
    pub(super) fn settings(&self, precision: Precision) -> Settings {
        let adapter = LoraSettings {
            rank: 32,
            alpha: 32.0,
            rslora: true,
            targets: Projection::ALL.to_vec(),
        };
        Settings {
            trained: match self.full {
                true => Trained::Full,
                false => Trained::Lora(adapter),
            },
            optimizer: AdamW {
                bits: match self.model {
                    Model::Medium => Bits::Eight,
                    Model::Small | Model::Layers => Bits::Fp32,
                },
                ..AdamW::default()
            },
            clip_norm: Some(1.0),
            seed: 1,
            precision,
            memory_budget_bytes: None,
            tokens_max: self.tokens,
        }
    }

    /// A sample for each micro-batch: the loss is of all tokens.
    pub(super) fn samples(&self) -> Result<Samples, BenchError> {
        let config = self.config();
        let rules = Rules {
            vocabulary: config.real_vocab_size,
            max_length: self.tokens,
        };
        let mut samples = Samples::default();
        for micro in 0..self.micros {
            let id = |at: usize| ((at + micro * self.tokens) * 71 % 4096) as u32;
            let row = Row {
                id: format!("micro-batch {micro}"),
                ids: (0..self.tokens).map(id).collect(),
                supervised: vec![[0, self.tokens as u32]],
            };
            samples.push(row, rules, format_args!("drawn, line {}", micro + 1))?;
        }
        Ok(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_cases_apart_and_every_case_makes_its_tokens() {
        let all: Vec<Case> = CPU.into_iter().chain(GPU).collect();
        for (index, case) in all.iter().enumerate() {
            assert!(all[..index].iter().all(|other| other.name != case.name));
            let samples = case.samples().unwrap();
            assert_eq!(samples.len(), case.micros);
            assert_eq!(samples.tokens(), case.micros * case.tokens);
        }
    }
}
