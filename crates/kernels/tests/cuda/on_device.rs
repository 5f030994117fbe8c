//! The shared tests' view of a GPU: bf16 in and out.

use espalier_kernels::cuda::{
    AddRmsNorm, BLOCK_TOKENS, Buffer, DecodeAttention, Device, Element, Linear, LoraExpand,
    LoraShrink, MoeCombine, MoeGroup, MoeLinear, MoeRoute, NONE, Options, Out, Paged,
    PrefillAttention, QkNormRopeStore, Sample, SampleRow, SiluMul, Source, SpreadTables, TOP_MAX,
    decode_splits,
};
use espalier_kernels::train::{self, Backend};
use half::bf16;

use crate::ops::{AdaptersCase, AttentionCase, Drawn, ExpertsCase, How, Ops, seen};
use crate::runner;
use crate::train::Bench;

pub struct Cuda(pub Device);

pub fn open() -> Device {
    let options = Options {
        libraries: runner::library_folders(),
        ..Options::default()
    };
    Device::open(&options).unwrap()
}

/// A GPU that trains.
pub fn trainer() -> train::Cuda {
    let options = Options {
        libraries: runner::library_folders(),
        ..Options::default()
    };
    train::Cuda::open(&options).unwrap()
}

/// The training ops' view of a GPU.
pub fn training(attention: train::Attention) -> Bench {
    let mut gpu = trainer();
    let any = train::Heads {
        q: 1,
        kv: 1,
        dim: 2,
        eps: 0.0,
    };
    assert_eq!(gpu.attend_by(attention, &any, 0).unwrap(), attention);
    // bf16 keeps 8 bits: a rounding is off by 2^-9 at most, and by about 0.6 of that in the mean.
    Bench::new(Box::new(gpu), 2.2e-3)
}

impl Cuda {
    pub fn open() -> Self {
        Self(open())
    }

    fn narrow(&self, x: &[f32]) -> Buffer<bf16> {
        self.0
            .copied(&x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>())
            .unwrap()
    }

    fn wide(&self, x: &Buffer<bf16>) -> Vec<f32> {
        self.0.read(x).unwrap().iter().map(|x| x.to_f32()).collect()
    }

    /// Outputs begin as something that shows when it is not written.
    fn unwritten(&self, len: usize) -> Buffer<bf16> {
        self.0.copied(&vec![bf16::NAN; len]).unwrap()
    }

    fn copied<T: Element>(&self, x: &[T]) -> Buffer<T> {
        self.0.copied(x).unwrap()
    }

    fn zeroed<T: Element>(&self, len: usize) -> Buffer<T> {
        self.0.zeroed(len).unwrap()
    }
}

impl Ops for Cuda {
    fn round(&self, x: f32) -> f32 {
        bf16::from_f32(x).to_f32()
    }

    /// bf16 keeps 8 bits: a rounding is off by 2^-9 at most, and by about 0.6 of that in the mean.
    fn unit(&self) -> f64 {
        2.2e-3
    }

    fn add_rms_norm(
        &self,
        residual: &[f32],
        x: Option<&[f32]>,
        weight: &[f32],
        eps: f32,
    ) -> (Vec<f32>, Vec<f32>) {
        let (hidden, mut sum, mut out) = (
            weight.len(),
            self.narrow(residual),
            self.unwritten(residual.len()),
        );
        let (x, weight) = (x.map(|x| self.narrow(x)), self.narrow(weight));
        let rows = residual.len() / hidden;
        AddRmsNorm {
            out: &mut out,
            residual: &mut sum,
            x: x.as_ref(),
            weight: &weight,
            rows,
            hidden,
            eps,
        }
        .launch(&self.0)
        .unwrap();
        (self.wide(&sum), self.wide(&out))
    }

    fn silu_mul(&self, gate_up: &[f32], width: usize) -> Vec<f32> {
        let mut out = self.unwritten(gate_up.len() / 2);
        let rows = gate_up.len() / 2 / width;
        SiluMul {
            out: &mut out,
            gate_up: &self.narrow(gate_up),
            rows,
            width,
        }
        .launch(&self.0)
        .unwrap();
        self.wide(&out)
    }

    fn linear(
        &self,
        x: &[f32],
        weight: &[f32],
        rows: usize,
        width: usize,
        depth: usize,
    ) -> Vec<f32> {
        let (x, weight) = (self.narrow(x), self.narrow(weight));
        let mut wide = self.copied(&vec![f32::NAN; rows * width]);
        let out = Out::F32(&mut wide);
        Linear {
            x: &x,
            weight: &weight,
            out,
            rows,
            width,
            depth,
        }
        .launch(&self.0)
        .unwrap();
        let wide = self.0.read(&wide).unwrap();
        // The other form of the result is the same, rounded.
        let mut narrow = self.unwritten(rows * width);
        let out = Out::Bf16(&mut narrow);
        Linear {
            x: &x,
            weight: &weight,
            out,
            rows,
            width,
            depth,
        }
        .launch(&self.0)
        .unwrap();
        let scale = wide.iter().fold(0.0f32, |top, x| top.max(x.abs()));
        for (narrow, wide) in self.wide(&narrow).iter().zip(&wide) {
            assert!(
                (narrow - wide).abs() <= wide.abs() / 200.0 + scale * 1e-5,
                "{narrow} for {wide}"
            );
        }
        wide
    }

    fn attention(&self, case: &AttentionCase) -> Vec<Vec<f32>> {
        let sequences = case.qkv.len();
        let table_blocks = (0..sequences)
            .map(|s| case.positions(s).div_ceil(BLOCK_TOKENS))
            .max()
            .unwrap_or(1);
        let blocks = sequences * table_blocks;
        // Blocks lie about in no order; those of a sequence are none of its neighbour's. What no one wrote is NaN.
        let block = |i: usize| ((i * 7919 + 3) % blocks) as u32;
        let coprime = |n: usize| {
            (1..=n)
                .filter(|d| n.is_multiple_of(*d) && 7919usize.is_multiple_of(*d))
                .count()
                == 1
        };
        assert!(coprime(blocks), "blocks must not repeat");
        let cache_len = blocks * case.kv_heads * BLOCK_TOKENS * case.head_dim;
        let (mut k_cache, mut v_cache) = (self.unwritten(cache_len), self.unwritten(cache_len));
        let weights = (
            self.narrow(&case.q_weight),
            self.narrow(&case.k_weight),
            self.copied(&case.turns()),
        );
        let head = case.heads * case.head_dim;
        let mut outs: Vec<Vec<f32>> = (0..sequences)
            .map(|s| vec![f32::NAN; case.positions(s) * head])
            .collect();
        for step in &case.steps {
            let table = |s: usize| (0..table_blocks).map(move |b| block(s * table_blocks + b));
            let lists: Vec<u32> = step.iter().flat_map(|(s, ..)| table(*s)).collect();
            let starts: Vec<u32> = (0..=step.len())
                .map(|r| (r * table_blocks) as u32)
                .collect();
            let mut tables = self.zeroed(lists.len());
            SpreadTables {
                tables: &mut tables,
                starts: &self.copied(&starts),
                blocks: &self.copied(&lists),
                rows: step.len(),
                table_blocks,
            }
            .launch(&self.0)
            .unwrap();
            let tokens = || {
                step.iter()
                    .enumerate()
                    .flat_map(|(r, (s, start, n))| (*start..start + n).map(move |p| (r, *s, p)))
            };
            let width = case.width();
            let mut qkv: Vec<f32> = tokens()
                .flat_map(|(_, s, p)| case.qkv[s][p * width..][..width].to_vec())
                .collect();
            let mut rows: Vec<u32> = tokens().map(|(r, ..)| r as u32).collect();
            let mut positions: Vec<u32> = tokens().map(|(.., p)| p as u32).collect();
            let count = rows.len();
            // Three tokens that only fill the step up: they must leave no trace.
            qkv.extend(vec![f32::NAN; 3 * width]);
            rows.extend([NONE; 3]);
            positions.extend([0; 3]);
            let mut q = self.unwritten((count + 3) * head);
            QkNormRopeStore {
                q: &mut q,
                k_cache: &mut k_cache,
                v_cache: &mut v_cache,
                qkv: &self.narrow(&qkv),
                q_weight: &weights.0,
                k_weight: &weights.1,
                turns: &weights.2,
                rows: &self.copied(&rows),
                positions: &self.copied(&positions),
                tables: &tables,
                table_blocks,
                tokens: count + 3,
                heads: case.heads,
                kv_heads: case.kv_heads,
                head_dim: case.head_dim,
                eps: case.eps,
            }
            .launch(&self.0)
            .unwrap();
            let mut out = self.unwritten(count * head);
            let paged = Paged {
                q: &q,
                k_cache: &k_cache,
                v_cache: &v_cache,
                tables: &tables,
                table_blocks,
                heads: case.heads,
                kv_heads: case.kv_heads,
                head_dim: case.head_dim,
            };
            if step.iter().all(|(.., n)| *n == 1) {
                let positions_max = step.iter().map(|(_, p, _)| p + 1).max().unwrap_or(1);
                // As the device would split it, and in more parts than there are blocks.
                for splits in [
                    decode_splits(&self.0, count, case.kv_heads, positions_max),
                    7,
                ] {
                    out = self.unwritten(count * head);
                    let lengths: Vec<u32> = step.iter().map(|(_, p, _)| *p as u32 + 1).collect();
                    DecodeAttention {
                        out: &mut out,
                        parts: &mut self.copied(&vec![f32::NAN; count * splits * head]),
                        lse: &mut self.copied(&vec![f32::NAN; count * splits * case.heads]),
                        paged,
                        lengths: &self.copied(&lengths),
                        rows: count,
                        splits,
                    }
                    .launch(&self.0)
                    .unwrap();
                }
            } else {
                let mut tiles = Vec::new();
                let mut first = 0;
                for (row, (_, start, n)) in step.iter().enumerate() {
                    tiles.extend(PrefillAttention::tiles_of(
                        row as u32,
                        first,
                        *n as u32,
                        *start as u32,
                    ));
                    first += *n as u32;
                }
                tiles.push([NONE, 0, 0, 0]);
                PrefillAttention {
                    out: &mut out,
                    paged,
                    count: tiles.len(),
                    tiles: &self.copied(&tiles),
                    tokens: count,
                }
                .launch(&self.0)
                .unwrap();
            }
            let out = self.wide(&out);
            for (i, (_, s, p)) in tokens().enumerate() {
                outs[s][p * head..][..head].copy_from_slice(&out[i * head..][..head]);
            }
        }
        outs
    }

    fn experts(&self, case: &ExpertsCase) -> Vec<f32> {
        let ExpertsCase {
            tokens,
            experts,
            chosen,
            hidden,
            width,
            ..
        } = *case;
        let pairs = tokens * chosen;
        let (mut ids, mut weights) = (self.zeroed(pairs), self.zeroed(pairs));
        let logits = self.copied(&case.logits);
        let renormalise = case.renormalise;
        MoeRoute {
            ids: &mut ids,
            weights: &mut weights,
            logits: &logits,
            tokens,
            experts,
            chosen,
            renormalise,
        }
        .launch(&self.0)
        .unwrap();
        let (mut offsets, mut order, mut places) = (
            self.zeroed(experts + 1),
            self.zeroed(pairs),
            self.zeroed(pairs),
        );
        MoeGroup {
            offsets: &mut offsets,
            order: &mut order,
            places: &mut places,
            ids: &ids,
            pairs,
            experts,
        }
        .launch(&self.0)
        .unwrap();
        let linear = |x: &Buffer<bf16>, matrices: &[f32], source, width, depth| {
            let mut out = self.unwritten(pairs * width);
            let matrices = self.narrow(matrices);
            let (offsets, order) = (&offsets, &order);
            MoeLinear {
                out: &mut out,
                x,
                matrices: &matrices,
                offsets,
                order,
                source,
                pairs,
                experts,
                width,
                depth,
            }
            .launch(&self.0)
            .unwrap();
            out
        };
        let gate_up = linear(
            &self.narrow(&case.x),
            &case.gate_up,
            Source::Token { chosen },
            2 * width,
            hidden,
        );
        let mut inner = self.unwritten(pairs * width);
        SiluMul {
            out: &mut inner,
            gate_up: &gate_up,
            rows: pairs,
            width,
        }
        .launch(&self.0)
        .unwrap();
        let y = linear(&inner, &case.down, Source::Place, hidden, width);
        let mut out = self.unwritten(tokens * hidden);
        MoeCombine {
            out: &mut out,
            y: &y,
            weights: &weights,
            places: &places,
            tokens,
            chosen,
            hidden,
        }
        .launch(&self.0)
        .unwrap();
        self.wide(&out)
    }

    fn adapters(&self, case: &AdaptersCase) -> Vec<f32> {
        let AdaptersCase {
            tokens,
            depth,
            rank,
            width,
            y_width,
            start,
            ..
        } = *case;
        let slots = self.copied(
            &case
                .slots
                .iter()
                .map(|s| s.unwrap_or(NONE))
                .collect::<Vec<_>>(),
        );
        let mut h = self.copied(&vec![f32::NAN; tokens * rank]);
        let (x, a, b) = (
            self.narrow(&case.x),
            self.narrow(&case.a),
            self.narrow(&case.b),
        );
        LoraShrink {
            h: &mut h,
            x: &x,
            a: &a,
            slots: &slots,
            tokens,
            depth,
            rank,
        }
        .launch(&self.0)
        .unwrap();
        let mut y = self.narrow(&case.y);
        let scales = self.copied(&case.scales);
        LoraExpand {
            y: &mut y,
            h: &h,
            h_stride: rank,
            h_start: 0,
            b: &b,
            scales: &scales,
            slots: &slots,
            tokens,
            rank,
            y_stride: y_width,
            start,
            width,
        }
        .launch(&self.0)
        .unwrap();
        self.wide(&y)
    }

    fn sample(&self, logits: &[f32], columns: usize, ids_end: usize, how: &[How]) -> Vec<Drawn> {
        let rows = how.len();
        let words = columns.div_ceil(32);
        let (mut masks, mut pairs) = (Vec::new(), Vec::<[u32; 2]>::new());
        let rows_of = how.iter().enumerate().map(|(n, how)| {
            let mask = how.allowed.as_ref().map_or(NONE, |allowed| {
                let mut bits = vec![0u32; words];
                allowed
                    .iter()
                    .for_each(|id| bits[*id as usize / 32] |= 1 << (id % 32));
                masks.extend(bits);
                (masks.len() / words) as u32 - 1
            });
            let seen_from = pairs.len() as u32;
            pairs.extend(seen(how).iter().map(|(id, times)| [*id, *times]));
            let bias_from = pairs.len() as u32;
            pairs.extend(how.bias.iter().map(|(id, bias)| [*id, bias.to_bits()]));
            SampleRow {
                temperature: how.temperature,
                top_k: how.top_k,
                top_p: how.top_p,
                min_p: how.min_p,
                top_count: how.top_count,
                repetition: how.repetition,
                presence: how.presence,
                frequency: how.frequency,
                seen_from,
                seen_to: bias_from,
                mask,
                bias_from,
                bias_to: pairs.len() as u32,
                feed: n as u32,
                ..SampleRow::GREEDY
            }
            .seeded(how.seed, how.step)
        });
        let rows_of: Vec<SampleRow> = rows_of.collect();
        let (mut ids, mut drawn) = (self.zeroed(rows), self.zeroed(rows));
        let mut logprobs = self.zeroed(rows);
        let (mut top_ids, mut top_logprobs) =
            (self.zeroed(rows * TOP_MAX), self.zeroed(rows * TOP_MAX));
        Sample {
            ids: &mut ids,
            logprobs: &mut logprobs,
            top_ids: &mut top_ids,
            top_logprobs: &mut top_logprobs,
            drawn: &mut drawn,
            work: &mut self.zeroed(rows * columns),
            logits: &self.copied(logits),
            how: &self.copied(&rows_of),
            masks: &self.copied(&masks),
            pairs: &self.copied(&pairs),
            rows,
            columns,
            ids_end,
        }
        .launch(&self.0)
        .unwrap();
        let ids: Vec<u32> = self.0.read(&ids).unwrap();
        assert_eq!(
            ids,
            self.0.read(&drawn).unwrap(),
            "what is fed to the next step is what was drawn"
        );
        let logprobs = self.0.read(&logprobs).unwrap();
        let (top_ids, top_logprobs) = (
            self.0.read(&top_ids).unwrap(),
            self.0.read(&top_logprobs).unwrap(),
        );
        let drawn = |(n, id): (usize, &u32)| {
            let top = (n * TOP_MAX..n * TOP_MAX + how[n].top_count as usize)
                .map(|i| (top_ids[i], top_logprobs[i]));
            Drawn {
                id: (*id != NONE).then_some(*id),
                logprob: logprobs[n],
                top: top.collect(),
            }
        };
        ids.iter().enumerate().map(drawn).collect()
    }
}
