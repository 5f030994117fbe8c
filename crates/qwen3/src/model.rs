//! A loaded model and its forward pass over a ragged batch with a paged KV cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_kernels::cpu::kv::{BLOCK_TOKENS, Place};
use espalier_kernels::cpu::lora::lora_add;
use espalier_kernels::cpu::moe::{self, Experts};
use espalier_kernels::cpu::{
    Form, KvCache, KvForm, KvShape, PackedLinear, Pool, QkvShape, Span, add, add_rms_norm,
    attention, linear, norm_rope_write, silu_mul,
};

use crate::checkpoint::{Checkpoint, CheckpointError, TensorSource};
use crate::config::{Config, ConfigError};
use crate::lora::{Lora, Site};
use crate::rotary::Rotary;
use crate::tensors::{Gated, Matrix, MlpTensors, Vector};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `config.json` is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An id of the batch is not in the vocabulary.
    #[error("token id {id} must be below {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
}

enum Mlp {
    Dense {
        gate_up: PackedLinear,
        down: PackedLinear,
    },
    Sparse {
        router: PackedLinear,
        experts: Experts,
    },
}

struct Layer {
    input_norm: Vec<f32>,
    qkv: PackedLinear,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    o: PackedLinear,
    post_norm: Vec<f32>,
    mlp: Mlp,
}

/// A model in memory, and the threads that run it.
pub struct Model {
    config: Config,
    pool: Arc<Pool>,
    /// Rows of tokens; also the LM head where there is no other.
    embedding: PackedLinear,
    lm_head: Option<PackedLinear>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    rotary: Rotary,
    kv_form: KvForm,
}

/// Which logits of a part are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: a chunk of a prompt that goes on.
    Nothing,
    /// Of the last token.
    Last,
    /// Of every token.
    All,
}

/// One sequence's tokens of a step.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The tokens.
    pub ids: &'a [u32],
    /// Position of the first.
    pub start: usize,
    /// Blocks of positions `0..start + ids.len()`.
    pub blocks: &'a [u32],
    /// The adapter, if any.
    pub lora: Option<&'a Lora>,
    /// Which logits to compute.
    pub want: Want,
}

/// Logits of the wanted tokens, in the order of the batch, over the real vocabulary.
pub struct Logits {
    values: Vec<f32>,
    stride: usize,
    width: usize,
}

impl Logits {
    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.stride
    }

    /// Each row.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values
            .chunks_mut(self.stride)
            .map(|row| &mut row[..self.width])
    }

    /// One row.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.stride..][..self.width]
    }
}

impl Model {
    /// Loads a checkpoint's folder.
    ///
    /// # Errors
    /// When its configuration or weights are refused.
    pub fn load(folder: &Path, form: Form, pool: Arc<Pool>) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path, source })?;
        let config = Config::parse(&text)?;
        Ok(Self::from_source(
            config,
            &Checkpoint::open(folder)?,
            form,
            pool,
        )?)
    }

    /// Packs a source's tensors.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape or kind.
    pub fn from_source(
        config: Config,
        source: &dyn TensorSource,
        form: Form,
        pool: Arc<Pool>,
    ) -> Result<Self, CheckpointError> {
        let load = Loader {
            source,
            form,
            pool: &pool,
        };
        let embedding = load.linear(&config.embedding())?;
        let lm_head = match config.lm_head() {
            None => None,
            Some(matrix) => Some(load.linear(&matrix)?),
        };
        let layers = (0..config.layers)
            .map(|i| load.layer(&config, i))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding,
            lm_head,
            layers,
            final_norm: load.vector(&config.final_norm())?,
            rotary: Rotary::new(&config.rope, config.head_dim),
            kv_form: form.kv(),
            config,
            pool,
        })
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its threads.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The shape of a cache with that many blocks of 16 tokens.
    #[must_use]
    pub fn kv_shape(&self, blocks: usize) -> KvShape {
        KvShape {
            layers: self.config.layers,
            blocks,
            heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            form: self.kv_form,
        }
    }

    /// Bytes of weights that a decode step of a dense model reads.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding).bytes();
        let layers = self.layers.iter().map(|layer| {
            let mlp = match &layer.mlp {
                Mlp::Dense { gate_up, down } => gate_up.bytes() + down.bytes(),
                Mlp::Sparse { router, experts } => {
                    let all = experts.gate_up.iter().chain(&experts.down);
                    router.bytes() + all.map(PackedLinear::bytes).sum::<usize>()
                }
            };
            layer.qkv.bytes() + layer.o.bytes() + mlp
        });
        head + layers.sum::<usize>()
    }

    /// Runs one step: writes keys and values of all tokens into the cache and gives the wanted logits.
    ///
    /// # Errors
    /// When an id is not in the vocabulary; then nothing was written.
    ///
    /// # Panics
    /// When blocks do not cover a part's positions or are outside the cache, or two tokens have one place.
    pub fn forward(&self, cache: &mut KvCache, parts: &[Part<'_>]) -> Result<Logits, ModelError> {
        let hidden = self.config.hidden_size;
        let vocab = self.config.vocab_size;
        let ids = || parts.iter().flat_map(|part| part.ids.iter().copied());
        if let Some(id) = ids().find(|id| *id as usize >= vocab) {
            return Err(ModelError::Token { id, vocab });
        }
        let mut x = vec![0.0; ids().count() * hidden];
        for (id, row) in ids().zip(x.chunks_mut(hidden)) {
            self.embedding.row_into(id as usize, row);
        }
        self.run_layers(cache, parts, &mut x);
        let mut last = Vec::new();
        let mut start = 0;
        for part in parts {
            let end = start + part.ids.len();
            let from = match part.want {
                Want::Nothing => end,
                Want::Last => end - 1,
                Want::All => start,
            };
            last.extend_from_slice(&x[from * hidden..end * hidden]);
            start = end;
        }
        let mut normed = vec![0.0; last.len()];
        let eps = self.config.rms_norm_eps;
        add_rms_norm(
            &self.pool,
            &mut last,
            None,
            &self.final_norm,
            eps,
            &mut normed,
        );
        let mut values = vec![0.0; normed.len() / hidden * vocab];
        if !values.is_empty() {
            linear(
                &self.pool,
                &normed,
                self.lm_head.as_ref().unwrap_or(&self.embedding),
                &mut values,
            );
        }
        Ok(Logits {
            values,
            stride: vocab,
            width: self.config.real_vocab_size,
        })
    }

    /// The layers alone: `x` is `[tokens, hidden_size]`, and becomes their output before the last norm.
    ///
    /// # Panics
    /// As [`Model::forward`].
    pub fn run_layers(&self, cache: &mut KvCache, parts: &[Part<'_>], x: &mut [f32]) {
        let batch = self.lay_out(parts);
        let tokens = batch.places.len();
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let mut room = Room {
            normed: vec![0.0; tokens * hidden],
            qkv: vec![0.0; tokens * self.config.qkv_width()],
            heads: vec![0.0; tokens * self.config.heads * self.config.head_dim],
            gate_up: Vec::new(),
            mixed: Vec::new(),
            delta: vec![0.0; tokens * hidden],
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let before = (index > 0).then_some(room.delta.as_slice());
            add_rms_norm(
                &self.pool,
                x,
                before,
                &layer.input_norm,
                eps,
                &mut room.normed,
            );
            self.attend(index, &batch, cache, &mut room);
            add_rms_norm(
                &self.pool,
                x,
                Some(&room.delta),
                &layer.post_norm,
                eps,
                &mut room.normed,
            );
            match &layer.mlp {
                Mlp::Dense { gate_up, down } => self.dense(index, gate_up, down, &batch, &mut room),
                Mlp::Sparse { router, experts } => self.sparse(router, experts, &mut room),
            }
        }
        add(x, &room.delta);
    }

    fn lay_out<'a>(&self, parts: &[Part<'a>]) -> Batch<'a> {
        let mut batch = Batch::default();
        for part in parts {
            let row = batch.places.len();
            for position in part.start..part.start + part.ids.len() {
                batch.places.push(Place {
                    block: part.blocks[position / BLOCK_TOKENS],
                    offset: (position % BLOCK_TOKENS) as u32,
                });
                self.rotary.push(position, &mut batch.turns);
            }
            batch.spans.push(Span {
                row,
                tokens: part.ids.len(),
                start: part.start,
                blocks: part.blocks,
            });
            let Some(lora) = part.lora else { continue };
            match batch.adapted.last_mut() {
                Some((last, rows)) if std::ptr::eq(*last, lora) && rows.end == row => {
                    rows.end = batch.places.len();
                }
                _ => batch.adapted.push((lora, row..batch.places.len())),
            }
        }
        batch
    }

    fn attend(&self, index: usize, batch: &Batch<'_>, cache: &mut KvCache, room: &mut Room) {
        let layer = &self.layers[index];
        let config = &self.config;
        self.project(
            &room.normed,
            &layer.qkv,
            &mut room.qkv,
            batch,
            index,
            Site::Qkv,
        );
        let shape = QkvShape {
            heads: config.heads,
            q_norm: &layer.q_norm,
            k_norm: &layer.k_norm,
            eps: config.rms_norm_eps,
        };
        norm_rope_write(
            &self.pool,
            &shape,
            &mut room.qkv,
            &batch.turns,
            &batch.places,
            cache,
            index,
        );
        attention(
            &self.pool,
            &room.qkv,
            config.qkv_width(),
            config.heads,
            1.0 / (config.head_dim as f32).sqrt(),
            &batch.spans,
            cache,
            index,
            &mut room.heads,
        );
        self.project(
            &room.heads,
            &layer.o,
            &mut room.delta,
            batch,
            index,
            Site::O,
        );
    }

    fn dense(
        &self,
        index: usize,
        gate_up: &PackedLinear,
        down: &PackedLinear,
        batch: &Batch<'_>,
        room: &mut Room,
    ) {
        let width = down.inputs();
        let tokens = batch.places.len();
        room.gate_up.resize(tokens * 2 * width, 0.0);
        room.mixed.resize(tokens * width, 0.0);
        self.project(
            &room.normed,
            gate_up,
            &mut room.gate_up,
            batch,
            index,
            Site::GateUp,
        );
        silu_mul(&self.pool, &room.gate_up, width, &mut room.mixed);
        self.project(&room.mixed, down, &mut room.delta, batch, index, Site::Down);
    }

    fn sparse(&self, router: &PackedLinear, experts: &Experts, room: &mut Room) {
        let Some(moe) = &self.config.moe else { return };
        let tokens = room.normed.len() / self.config.hidden_size;
        let mut logits = vec![0.0; tokens * moe.experts];
        linear(&self.pool, &room.normed, router, &mut logits);
        let routes = moe::route(&logits, moe.experts, moe.top_k, moe.renormalise);
        moe::experts(&self.pool, &room.normed, &routes, experts, &mut room.delta);
    }

    /// A projection, with each row's adapter.
    fn project(
        &self,
        x: &[f32],
        weights: &PackedLinear,
        y: &mut [f32],
        batch: &Batch<'_>,
        layer: usize,
        site: Site,
    ) {
        linear(&self.pool, x, weights, y);
        let (inputs, outputs) = (weights.inputs(), weights.outputs());
        for (lora, rows) in &batch.adapted {
            let x = &x[rows.start * inputs..rows.end * inputs];
            let y = &mut y[rows.start * outputs..rows.end * outputs];
            for pair in lora.pairs(layer, site) {
                lora_add(&self.pool, x, pair, y, outputs);
            }
        }
    }
}

#[derive(Default)]
struct Batch<'a> {
    places: Vec<Place>,
    turns: Vec<f32>,
    spans: Vec<Span<'a>>,
    /// Rows that an adapter is for.
    adapted: Vec<(&'a Lora, std::ops::Range<usize>)>,
}

/// What a layer writes and the next one overwrites.
struct Room {
    normed: Vec<f32>,
    qkv: Vec<f32>,
    heads: Vec<f32>,
    gate_up: Vec<f32>,
    mixed: Vec<f32>,
    delta: Vec<f32>,
}

struct Loader<'a> {
    source: &'a dyn TensorSource,
    form: Form,
    pool: &'a Pool,
}

impl Loader<'_> {
    fn vector(&self, vector: &Vector) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.source.tensor(&vector.name, &[vector.len])?.to_vec())
    }

    fn linear(&self, matrix: &Matrix) -> Result<PackedLinear, CheckpointError> {
        let k = matrix.inputs;
        let tensors = matrix
            .parts
            .iter()
            .map(|(name, rows)| self.source.tensor(name, &[*rows, k]))
            .collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<_> = tensors.iter().map(|tensor| tensor.rows()).collect();
        PackedLinear::pack(self.pool, self.form, k, &rows).map_err(|source| {
            CheckpointError::Memory {
                what: matrix.parts[0].0.clone(),
                source,
            }
        })
    }

    fn layer(&self, config: &Config, index: usize) -> Result<Layer, CheckpointError> {
        let tensors = config.layer_tensors(index);
        Ok(Layer {
            input_norm: self.vector(&tensors.input_norm)?,
            qkv: self.linear(&tensors.qkv)?,
            q_norm: self.vector(&tensors.q_norm)?,
            k_norm: self.vector(&tensors.k_norm)?,
            o: self.linear(&tensors.o)?,
            post_norm: self.vector(&tensors.post_norm)?,
            mlp: match &tensors.mlp {
                MlpTensors::Dense(gated) => Mlp::Dense {
                    gate_up: self.linear(&gated.gate_up)?,
                    down: self.linear(&gated.down)?,
                },
                MlpTensors::Sparse { router, experts } => self.sparse(router, experts)?,
            },
        })
    }

    fn sparse(&self, router: &Matrix, tensors: &[Gated]) -> Result<Mlp, CheckpointError> {
        let mut experts = Experts {
            gate_up: Vec::new(),
            down: Vec::new(),
        };
        for expert in tensors {
            experts.gate_up.push(self.linear(&expert.gate_up)?);
            experts.down.push(self.linear(&expert.down)?);
        }
        // The router decides; it is small, and stays as exact as the checkpoint.
        let exact = Self {
            form: Form::F32,
            ..*self
        };
        Ok(Mlp::Sparse {
            router: exact.linear(router)?,
            experts,
        })
    }
}
