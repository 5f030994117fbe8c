//! Proofs of the engine: gradients against finite differences and against PEFT, and all that must not change a result.

mod golden;
mod gradients;
mod invariance;
mod memory;
mod refusals;

use std::sync::Arc;

use espalier_kernels::cpu::Pool;
use espalier_kernels::train::{Backend, Cpu, Real, Slice};
use espalier_qwen3::{Config, Seeded, TensorSource};

use super::plan::{Keep, Plan};
use super::step::{Micro, Trainer};
use super::*;

/// Two layers; a mixture of experts has the second dense.
pub(super) fn config(moe: bool, tied: bool) -> Config {
    let kind = match moe {
        true => {
            r#""model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "norm_topk_prob": true, "decoder_sparse_step": 1,
            "mlp_only_layers": [1]"#
        }
        false => r#""model_type": "qwen3""#,
    };
    let json = format!(
        r#"{{{kind}, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000,
        "max_position_embeddings": 256, "tie_word_embeddings": {tied}}}"#
    );
    Config::parse(&json).unwrap()
}

pub(super) fn lora(rank: usize, targets: &[Projection]) -> Trained {
    Trained::Lora(LoraSettings {
        rank,
        alpha: 6.0,
        rslora: true,
        targets: targets.to_vec(),
    })
}

pub(super) fn settings(trained: Trained) -> Settings {
    Settings {
        trained,
        optimizer: AdamW::default(),
        clip_norm: Some(1.0),
        seed: 7,
        precision: Precision::F32,
        memory_budget_bytes: None,
        tokens_max: 96,
    }
}

/// Documents of given lengths with ids and targets that depend on the seed.
pub(super) struct Sample {
    pub(super) ids: Vec<u32>,
    pub(super) ends: Vec<usize>,
    pub(super) supervised: Vec<bool>,
}

impl Sample {
    pub(super) fn new(seed: u32, lengths: &[usize]) -> Self {
        let total = lengths.iter().sum();
        let mut state = seed.wrapping_mul(2_654_435_761) + 12345;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let ids = (0..total).map(|_| next() % 61).collect();
        let mut supervised: Vec<bool> = (0..total).map(|_| next() % 3 != 0).collect();
        let mut ends = Vec::new();
        let mut start = 0;
        for length in lengths {
            supervised[start] = false;
            start += length;
            ends.push(start);
        }
        Self {
            ids,
            ends,
            supervised,
        }
    }

    pub(super) fn documents(&self) -> Documents<'_> {
        Documents {
            ids: &self.ids,
            ends: &self.ends,
            supervised: &self.supervised,
        }
    }

    /// Document `index` alone.
    pub(super) fn alone(&self, index: usize) -> Self {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let range = start..self.ends[index];
        Self {
            ids: self.ids[range.clone()].to_vec(),
            ends: vec![range.len()],
            supervised: self.supervised[range].to_vec(),
        }
    }
}

/// A trainer whose adapter's `B`s are not zero.
pub(super) fn trainer<T: Real>(
    config: &Config,
    settings: &Settings,
    keeps: Option<Vec<Keep>>,
    threads: usize,
) -> Trainer<Cpu<T>> {
    let backend = Cpu::new(Arc::new(Pool::new(threads)));
    let keeps = keeps.unwrap_or_else(|| vec![Keep::All; config.layers]);
    let plan = Plan::with(config, settings, settings.tokens_max, keeps);
    let source = Seeded::any();
    let mut made = Trainer::with_plan(config.clone(), &source, settings, backend, plan).unwrap();
    for parameter in &made.layout.parameters {
        if parameter.name.contains("lora_B") {
            let values = source.tensor(&parameter.name, &parameter.shape).unwrap();
            let values: Vec<f32> = values.to_vec().iter().map(|x| x * 0.2).collect();
            made.backend
                .write(made.model.flat.values, parameter.start, &values);
        }
    }
    made
}

/// The loss and all gradients.
pub(super) fn gradients<T: Real>(
    trainer: &mut Trainer<Cpu<T>>,
    micros: &[&Sample],
) -> (f64, Vec<T>) {
    let checked: Vec<Micro<'_>> = micros
        .iter()
        .map(|sample| trainer.check(sample.documents(), 0).unwrap())
        .collect();
    let supervised = micros
        .iter()
        .flat_map(|sample| &sample.supervised)
        .filter(|target| **target)
        .count();
    let loss = trainer.gradients(&checked, supervised as u64).unwrap();
    let all = Slice::new(trainer.model.flat.grads, 0, trainer.layout.len);
    (loss, trainer.backend.exact(all).to_vec())
}
