//! The model over one step: embedding, layers, LM head and sampler, as launches on the device's stream. The same launches
//! are done one by one and recorded in graphs.

use espalier_kernels::bf16;
use espalier_kernels::cuda::{
    AddRmsNorm, Buffer, CudaError, DecodeAttention, Device, Embed, GatherRows, Linear, Mark,
    MoeCombine, MoeGroup, MoeLinear, MoeRoute, Out, Paged, PrefillAttention, QkNormRopeStore,
    Sample, SiluMul, Source, SpreadTables, TOP_MAX,
};
use espalier_qwen3::{Config, Moe, Site};

use super::adapters::Adapters;
use super::inputs::{Inputs, Results};
use super::room::{Cache, LOGITS_ROWS, Room, splits};
use super::weights::{Layer, Mlp, Weights};

/// Everything that a step's launches read and write, but its inputs and results.
pub(super) struct Forward {
    pub config: Config,
    pub weights: Weights,
    pub room: Room,
    pub caches: Vec<Cache>,
    pub adapters: Option<Adapters>,
    /// `[positions, head_dim]`.
    pub turns: Buffer<f32>,
    /// What was drawn, by place: the next step reads it.
    pub drawn: Buffer<u32>,
    /// Blocks of a sequence of full length.
    pub table_blocks: usize,
}

/// Notes when kinds of ops ended, where that is asked for.
pub(super) struct Probe(Option<Vec<(&'static str, Mark)>>);

impl Probe {
    /// Notes nothing.
    pub fn off() -> Self {
        Self(None)
    }

    /// Notes from now on.
    pub fn on(device: &Device) -> Result<Self, CudaError> {
        Ok(Self(Some(vec![("start", device.mark()?)])))
    }

    /// What was launched since the last call is of this kind.
    fn ended(&mut self, device: &Device, kind: &'static str) -> Result<(), CudaError> {
        if let Some(marks) = &mut self.0 {
            marks.push((kind, device.mark()?));
        }
        Ok(())
    }

    /// Milliseconds of each op, in their order.
    pub fn times(&self) -> Result<Vec<(&'static str, f32)>, CudaError> {
        let marks = self.0.as_deref().unwrap_or_default();
        let between =
            |pair: &[(&'static str, Mark)]| Ok((pair[1].0, pair[0].1.ms_until(&pair[1].1)?));
        marks.windows(2).map(between).collect()
    }
}

impl Forward {
    /// Launches a step. `is_adapted`: some of its tokens have adapters.
    pub fn launch(
        &mut self,
        device: &Device,
        inputs: &Inputs,
        results: &Buffer<u32>,
        is_adapted: bool,
        probe: &mut Probe,
    ) -> Result<(), CudaError> {
        let shape = inputs.shape;
        let (tokens, hidden, eps) = (
            shape.tokens,
            self.config.hidden_size,
            self.config.rms_norm_eps,
        );
        SpreadTables {
            tables: &mut self.room.tables,
            starts: &inputs.starts,
            blocks: &inputs.tail,
            rows: shape.rows,
            table_blocks: self.table_blocks,
        }
        .launch(device)?;
        Embed {
            out: &mut self.room.x,
            ids: &inputs.ids,
            drawn: &self.drawn,
            table: &self.weights.embedding,
            tokens,
            hidden,
        }
        .launch(device)?;
        probe.ended(device, "embedding")?;
        for index in 0..self.config.layers {
            let mut at = At {
                device,
                inputs,
                config: &self.config,
                room: &mut self.room,
                adapters: self.adapters.as_mut().filter(|_| is_adapted),
                index,
                probe,
            };
            let layer = &self.weights.layers[index];
            at.norm(&layer.input_norm, index > 0)?;
            at.attend(
                layer,
                &mut self.caches[index],
                &self.turns,
                self.table_blocks,
            )?;
            at.norm(&layer.post_norm, true)?;
            match &layer.mlp {
                Mlp::Dense { gate_up, down } => at.dense(gate_up, down)?,
                Mlp::Sparse {
                    router,
                    gate_up,
                    down,
                } => {
                    if let Some(moe) = &self.config.moe {
                        at.sparse(moe, router, gate_up, down)?;
                    }
                }
            }
        }
        AddRmsNorm {
            out: &mut self.room.normed,
            residual: &mut self.room.x,
            x: Some(&self.room.delta),
            weight: &self.weights.final_norm,
            rows: tokens,
            hidden,
            eps,
        }
        .launch(device)?;
        GatherRows {
            out: &mut self.room.last,
            rows: &inputs.wanted,
            table: &self.room.normed,
            count: shape.draws,
            hidden,
        }
        .launch(device)?;
        probe.ended(device, "norms")?;
        for first in (0..shape.draws).step_by(LOGITS_ROWS) {
            let count = LOGITS_ROWS.min(shape.draws - first);
            self.draw(device, inputs, results, first..first + count, probe)?;
        }
        Ok(())
    }

    /// Logits and ids of some of the draws.
    fn draw(
        &mut self,
        device: &Device,
        inputs: &Inputs,
        results: &Buffer<u32>,
        draws: std::ops::Range<usize>,
        probe: &mut Probe,
    ) -> Result<(), CudaError> {
        let (first, rows) = (draws.start, draws.len());
        let (hidden, columns) = (self.config.hidden_size, self.config.vocab_size);
        let at = Results::new(inputs.shape.draws);
        Linear {
            x: &self.room.last.part(first * hidden, rows * hidden)?,
            weight: self.weights.head(),
            out: Out::F32(&mut self.room.logits),
            rows,
            width: columns,
            depth: hidden,
        }
        .launch(device)?;
        probe.ended(device, "LM head")?;
        let top = (first * TOP_MAX, rows * TOP_MAX);
        Sample {
            ids: &mut results.part(first, rows)?,
            logprobs: &mut results.part(at.logprobs + first, rows)?,
            top_ids: &mut results.part(at.top_ids + top.0, top.1)?,
            top_logprobs: &mut results.part(at.top_logprobs + top.0, top.1)?,
            drawn: &mut self.drawn,
            work: &mut self.room.work,
            logits: &self.room.logits,
            how: &inputs.how.part(first, rows)?,
            masks: &inputs.tail,
            pairs: &inputs.pairs,
            rows,
            columns,
            ids_end: self.config.real_vocab_size,
        }
        .launch(device)?;
        probe.ended(device, "sampler")
    }

    /// Multiplies the LM head so many times: work that the device is busy with while the host launches what is measured.
    pub fn keep_busy(
        &mut self,
        device: &Device,
        times: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        for _ in 0..times {
            Linear {
                x: &self.room.last,
                weight: self.weights.head(),
                out: Out::F32(&mut self.room.logits),
                rows: rows.min(LOGITS_ROWS),
                width: self.config.vocab_size,
                depth: self.config.hidden_size,
            }
            .launch(device)?;
        }
        Ok(())
    }
}

/// A layer of a step.
struct At<'a> {
    device: &'a Device,
    inputs: &'a Inputs,
    config: &'a Config,
    room: &'a mut Room,
    adapters: Option<&'a mut Adapters>,
    index: usize,
    probe: &'a mut Probe,
}

impl At<'_> {
    fn tokens(&self) -> usize {
        self.inputs.shape.tokens
    }

    /// Adds what the block before gave, if there was one, and norms.
    fn norm(&mut self, weight: &Buffer<bf16>, add: bool) -> Result<(), CudaError> {
        AddRmsNorm {
            out: &mut self.room.normed,
            residual: &mut self.room.x,
            x: add.then_some(&self.room.delta),
            weight,
            rows: self.inputs.shape.tokens,
            hidden: self.config.hidden_size,
            eps: self.config.rms_norm_eps,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "norms")
    }

    fn attend(
        &mut self,
        layer: &Layer,
        cache: &mut Cache,
        turns: &Buffer<f32>,
        table_blocks: usize,
    ) -> Result<(), CudaError> {
        let config = self.config;
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let (hidden, tokens) = (config.hidden_size, self.tokens());
        Linear {
            x: &self.room.normed,
            weight: &layer.qkv,
            out: Out::Bf16(&mut self.room.qkv),
            rows: tokens,
            width: config.qkv_width(),
            depth: hidden,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "qkv")?;
        self.adapt(Site::Qkv)?;
        QkNormRopeStore {
            q: &mut self.room.q,
            k_cache: &mut cache.keys,
            v_cache: &mut cache.values,
            qkv: &self.room.qkv,
            q_weight: &layer.q_norm,
            k_weight: &layer.k_norm,
            turns,
            rows: &self.inputs.token_rows,
            positions: &self.inputs.positions,
            tables: &self.room.tables,
            table_blocks,
            tokens,
            heads,
            kv_heads,
            head_dim,
            eps: config.rms_norm_eps,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "q and k, KV write")?;
        self.attention(cache, table_blocks)?;
        Linear {
            x: &self.room.heads,
            weight: &layer.o,
            out: Out::Bf16(&mut self.room.delta),
            rows: tokens,
            width: hidden,
            depth: heads * head_dim,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "o")?;
        self.adapt(Site::O)
    }

    fn attention(&mut self, cache: &Cache, table_blocks: usize) -> Result<(), CudaError> {
        let config = self.config;
        let shape = self.inputs.shape;
        let paged = Paged {
            q: &self.room.q,
            k_cache: &cache.keys,
            v_cache: &cache.values,
            tables: &self.room.tables,
            table_blocks,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        if shape.decodes > 0 {
            DecodeAttention {
                out: &mut self.room.heads,
                parts: &mut self.room.parts,
                lse: &mut self.room.lse,
                paged,
                lengths: &self.inputs.lengths,
                rows: shape.decodes,
                splits: splits(self.device, config, shape.decodes, table_blocks),
            }
            .launch(self.device)?;
            self.probe.ended(self.device, "attention of answers")?;
        }
        if shape.tiles > 0 {
            PrefillAttention {
                out: &mut self.room.heads,
                paged,
                tiles: &self.inputs.tiles,
                count: shape.tiles,
                tokens: shape.tokens,
            }
            .launch(self.device)?;
            self.probe.ended(self.device, "attention of prompts")?;
        }
        Ok(())
    }

    fn dense(&mut self, gate_up: &Buffer<bf16>, down: &Buffer<bf16>) -> Result<(), CudaError> {
        let (hidden, width) = (self.config.hidden_size, self.config.intermediate_size);
        let tokens = self.tokens();
        Linear {
            x: &self.room.normed,
            weight: gate_up,
            out: Out::Bf16(&mut self.room.gate_up),
            rows: tokens,
            width: 2 * width,
            depth: hidden,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "gate and up")?;
        self.adapt(Site::GateUp)?;
        self.silu_mul(tokens, width)?;
        Linear {
            x: &self.room.mixed,
            weight: down,
            out: Out::Bf16(&mut self.room.delta),
            rows: tokens,
            width: hidden,
            depth: width,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "down")?;
        self.adapt(Site::Down)
    }

    fn silu_mul(&mut self, rows: usize, width: usize) -> Result<(), CudaError> {
        SiluMul {
            out: &mut self.room.mixed,
            gate_up: &self.room.gate_up,
            rows,
            width,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "SiLU")
    }

    fn sparse(
        &mut self,
        moe: &Moe,
        router: &Buffer<bf16>,
        gate_up: &Buffer<bf16>,
        down: &Buffer<bf16>,
    ) -> Result<(), CudaError> {
        let (hidden, width) = (self.config.hidden_size, moe.intermediate_size);
        let (tokens, experts, chosen) = (self.tokens(), moe.experts, moe.top_k);
        let pairs = tokens * chosen;
        self.route(moe, router)?;
        MoeLinear {
            out: &mut self.room.gate_up,
            x: &self.room.normed,
            matrices: gate_up,
            offsets: &self.room.offsets,
            order: &self.room.order,
            source: Source::Token { chosen },
            pairs,
            experts,
            width: 2 * width,
            depth: hidden,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "gate and up")?;
        self.silu_mul(pairs, width)?;
        MoeLinear {
            out: &mut self.room.answers,
            x: &self.room.mixed,
            matrices: down,
            offsets: &self.room.offsets,
            order: &self.room.order,
            source: Source::Place,
            pairs,
            experts,
            width: hidden,
            depth: width,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "down")?;
        MoeCombine {
            out: &mut self.room.delta,
            y: &self.room.answers,
            weights: &self.room.expert_weights,
            places: &self.room.places,
            tokens,
            chosen,
            hidden,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "sum of experts")
    }

    /// Which experts each token goes to, and in which order they are computed.
    fn route(&mut self, moe: &Moe, router: &Buffer<bf16>) -> Result<(), CudaError> {
        let (tokens, experts, chosen) = (self.tokens(), moe.experts, moe.top_k);
        Linear {
            x: &self.room.normed,
            weight: router,
            out: Out::F32(&mut self.room.router),
            rows: tokens,
            width: experts,
            depth: self.config.hidden_size,
        }
        .launch(self.device)?;
        MoeRoute {
            ids: &mut self.room.expert_ids,
            weights: &mut self.room.expert_weights,
            logits: &self.room.router,
            tokens,
            experts,
            chosen,
            renormalise: moe.renormalise,
        }
        .launch(self.device)?;
        MoeGroup {
            offsets: &mut self.room.offsets,
            order: &mut self.room.order,
            places: &mut self.room.places,
            ids: &self.room.expert_ids,
            pairs: tokens * chosen,
            experts,
        }
        .launch(self.device)?;
        self.probe.ended(self.device, "routing")
    }

    /// Adds what adapters say to what a site has just computed.
    fn adapt(&mut self, site: Site) -> Result<(), CudaError> {
        let tokens = self.tokens();
        let Some(adapters) = self.adapters.as_deref_mut() else {
            return Ok(());
        };
        let room = &mut *self.room;
        let (x, y) = match site {
            Site::Qkv => (&room.normed, &mut room.qkv),
            Site::O => (&room.heads, &mut room.delta),
            Site::GateUp => (&room.normed, &mut room.gate_up),
            Site::Down => (&room.mixed, &mut room.delta),
        };
        let slots = &self.inputs.slots;
        adapters.add(self.device, self.index, site, slots, x, y, tokens)?;
        self.probe.ended(self.device, "adapters")
    }
}
