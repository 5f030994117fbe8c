//! The ops on the CPU, in f32: the same test bodies as on a GPU.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod ops;
mod train;

use espalier_kernels::cpu::kv::{BLOCK_TOKENS, Place};
use espalier_kernels::cpu::lora::{LoraPair, lora_add};
use espalier_kernels::cpu::moe::{self, Experts};
use espalier_kernels::cpu::sampler::draw;
use espalier_kernels::cpu::{
    Form, KvCache, KvForm, KvShape, PackedLinear, Pool, QkvShape, RowSource, Span, add_rms_norm,
    attention, linear, norm_rope_write, silu_mul,
};

use espalier_kernels::sampling::{Penalties, Sampling, Seen};
use ops::{AdaptersCase, AttentionCase, Drawn, ExpertsCase, How, Ops, seen};

struct Cpu(Pool);

impl Cpu {
    fn packed(&self, depth: usize, weight: &[f32]) -> PackedLinear {
        PackedLinear::pack(&self.0, Form::F32, depth, &[RowSource::F32(weight)]).unwrap()
    }
}

impl Ops for Cpu {
    fn round(&self, x: f32) -> f32 {
        x
    }

    /// f32 keeps 24 bits; a chain of some thousand additions loses five of them in the mean.
    fn unit(&self) -> f64 {
        2e-5
    }

    fn add_rms_norm(
        &self,
        residual: &[f32],
        x: Option<&[f32]>,
        weight: &[f32],
        eps: f32,
    ) -> (Vec<f32>, Vec<f32>) {
        let (mut sum, mut out) = (residual.to_vec(), vec![f32::NAN; residual.len()]);
        add_rms_norm(&self.0, &mut sum, x, weight, eps, &mut out);
        (sum, out)
    }

    fn silu_mul(&self, gate_up: &[f32], width: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; gate_up.len() / 2];
        silu_mul(&self.0, gate_up, width, &mut out);
        out
    }

    fn linear(
        &self,
        x: &[f32],
        weight: &[f32],
        rows: usize,
        width: usize,
        depth: usize,
    ) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows * width];
        linear(&self.0, x, &self.packed(depth, weight), &mut out);
        out
    }

    fn attention(&self, case: &AttentionCase) -> Vec<Vec<f32>> {
        let (sequences, dim) = (case.qkv.len(), case.head_dim);
        let (width, head) = (case.width(), case.heads * dim);
        let blocks_of = |s: usize| case.positions(s).div_ceil(BLOCK_TOKENS);
        let each = (0..sequences).map(blocks_of).max().unwrap();
        // Blocks of a sequence are none of its neighbour's.
        let table = |s: usize| -> Vec<u32> {
            let blocks = (0..each).map(|b| b * sequences + (s + b) % sequences);
            blocks.map(|block| block as u32).collect()
        };
        let tables: Vec<Vec<u32>> = (0..sequences).map(table).collect();
        let mut cache = KvCache::new(KvShape {
            layers: 1,
            blocks: sequences * each,
            heads: case.kv_heads,
            head_dim: dim,
            form: KvForm::F32,
        })
        .unwrap();
        let (shape, turns) = (
            QkvShape {
                heads: case.heads,
                q_norm: &case.q_weight,
                k_norm: &case.k_weight,
                eps: case.eps,
            },
            case.turns(),
        );
        let mut outs: Vec<Vec<f32>> = (0..sequences)
            .map(|s| vec![f32::NAN; case.positions(s) * head])
            .collect();
        for step in &case.steps {
            let (mut qkv, mut own, mut places) = (Vec::new(), Vec::new(), Vec::new());
            let mut spans = Vec::new();
            for (s, start, tokens) in step.iter().copied() {
                spans.push(Span {
                    row: places.len(),
                    tokens,
                    start,
                    blocks: &tables[s],
                });
                for position in start..start + tokens {
                    qkv.extend_from_slice(&case.qkv[s][position * width..][..width]);
                    own.extend_from_slice(&turns[position * dim..][..dim]);
                    places.push(Place {
                        block: tables[s][position / BLOCK_TOKENS],
                        offset: (position % BLOCK_TOKENS) as u32,
                    });
                }
            }
            norm_rope_write(&self.0, &shape, &mut qkv, &own, &places, &mut cache, 0);
            let mut out = vec![f32::NAN; places.len() * head];
            let scale = 1.0 / (dim as f32).sqrt();
            attention(
                &self.0, &qkv, width, case.heads, scale, &spans, &cache, 0, &mut out,
            );
            for ((s, start, tokens), span) in step.iter().copied().zip(&spans) {
                let from = &out[span.row * head..][..tokens * head];
                outs[s][start * head..][..tokens * head].copy_from_slice(from);
            }
        }
        outs
    }

    fn experts(&self, case: &ExpertsCase) -> Vec<f32> {
        let routes = moe::route(&case.logits, case.experts, case.chosen, case.renormalise);
        let packed = |matrices: &[f32], len: usize, depth| -> Vec<PackedLinear> {
            let each = matrices.chunks(len);
            each.map(|matrix| self.packed(depth, matrix)).collect()
        };
        let (hidden, width) = (case.hidden, case.width);
        let experts = Experts {
            gate_up: packed(&case.gate_up, 2 * width * hidden, hidden),
            down: packed(&case.down, hidden * width, width),
        };
        let mut out = vec![f32::NAN; case.tokens * hidden];
        moe::experts(&self.0, &case.x, &routes, &experts, &mut out);
        out
    }

    fn adapters(&self, case: &AdaptersCase) -> Vec<f32> {
        let (a_len, b_len) = (case.rank * case.depth, case.width * case.rank);
        let pair = |slot: usize| LoraPair {
            a: self.packed(case.depth, &case.a[slot * a_len..][..a_len]),
            b: self.packed(case.rank, &case.b[slot * b_len..][..b_len]),
            scale: case.scales[slot],
            offset: case.start,
        };
        let mut y = case.y.clone();
        assert_eq!(case.slots.len(), case.tokens);
        let rows = y.chunks_mut(case.y_width).zip(case.x.chunks(case.depth));
        for ((y, x), slot) in rows.zip(&case.slots) {
            if let Some(slot) = slot {
                lora_add(&self.0, x, &pair(*slot as usize), y, case.y_width);
            }
        }
        y
    }

    fn sample(&self, logits: &[f32], columns: usize, ids_end: usize, how: &[How]) -> Vec<Drawn> {
        let rows = logits.chunks(columns).zip(how);
        rows.map(|(logits, how)| {
            let logits = &mut logits[..ids_end].to_vec();
            let drawn = draw(&self.0, logits, &sampling(how, columns));
            match drawn {
                Ok(drawn) => Drawn {
                    id: Some(drawn.id),
                    logprob: drawn.logprob,
                    top: drawn.top,
                },
                Err(_) => Drawn {
                    id: None,
                    logprob: 0.0,
                    top: Vec::new(),
                },
            }
        })
        .collect()
    }
}

/// The case in the terms of those who draw.
fn sampling(how: &How, columns: usize) -> Sampling {
    let allowed = how.allowed.as_ref().map(|ids| {
        let mut bits = vec![0u32; columns.div_ceil(32)];
        for id in ids {
            bits[*id as usize / 32] |= 1 << (id % 32);
        }
        bits.into()
    });
    let seen = seen(how)
        .into_iter()
        .map(|(id, in_answer)| Seen { id, in_answer });
    Sampling {
        temperature: how.temperature,
        top_k: how.top_k,
        top_p: how.top_p,
        min_p: how.min_p,
        seed: how.seed,
        step: how.step,
        penalties: Some(Penalties {
            presence: how.presence,
            frequency: how.frequency,
            repetition: how.repetition,
            seen: seen.collect(),
        }),
        bias: Some(how.bias.as_slice().into()),
        allowed,
        logprobs: u8::try_from(how.top_count).ok(),
    }
}

/// A test of its own for each body, under its name.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                let body = ops::TESTS.iter().find(|(name, _)| *name == stringify!($name));
                body.unwrap().1(&Cpu(Pool::new(2)));
            }
        )*

        #[test]
        fn every_body_has_a_test_here() {
            let names: Vec<&str> = ops::TESTS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

tests!(
    rms_norm_is_that_of_f64,
    silu_mul_is_that_of_f64,
    linear_is_that_of_f64,
    experts_are_those_of_f64,
    adapters_are_those_of_f64,
    attention_in_one_piece,
    attention_in_chunks_then_one_by_one,
    attention_of_many_rows_at_once,
    attention_over_a_long_row,
    greedy_takes_the_first_of_the_largest,
    draws_follow_the_exact_distribution,
    seeds_reproduce_in_any_batch,
    padding_and_masked_ids_are_never_drawn,
    penalties_and_biases_change_the_logits,
    logprobs_are_those_of_the_model,
    rows_without_an_id_say_so,
);

#[test]
fn training_ops_are_those_of_f64() {
    for (name, body) in train::TESTS {
        let backend = espalier_kernels::train::Cpu::<f32>::new(std::sync::Arc::new(Pool::new(2)));
        println!("{name}");
        // As for the other ops; where a device that rounds to bf16 is allowed a hundredth of that, f32 needs all of it.
        body(&mut train::Bench::new(Box::new(backend), 2e-4));
    }
}
