//! What is trained, by name, in one row: parameters lie one behind the other, and so do their gradients and moments, so
//! that clipping, the optimizer and an all-reduce see one buffer.

use espalier_qwen3::{Config, LayerTensors, Matrix, MlpTensors, Vector};

use super::settings::{Bits, LoraSettings, Projection, Settings, Trained};

/// Elements below which a tensor's moments are kept in full.
const EIGHT_BITS_FROM: usize = 4096;
use espalier_kernels::train::BLOCK_8BIT;

/// Where a parameter's moments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moments {
    /// In full, from this element on.
    Full(usize),
    /// In 8 bits: from this byte and from this block on.
    Eight {
        /// The first code.
        start: usize,
        /// The first scale.
        block: usize,
    },
}

/// A tensor that is trained.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameter {
    /// As it is exported.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Its first element in the row of all.
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Whether weight decay is for it.
    pub(crate) decays: bool,
    pub(crate) moments: Moments,
}

/// All of them, and what their moments take.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub(crate) parameters: Vec<Parameter>,
    /// Elements.
    pub(crate) len: usize,
    /// Elements with moments in full.
    pub(crate) full: usize,
    /// Elements with moments in 8 bits.
    pub(crate) eight: usize,
    /// Blocks of those.
    pub(crate) blocks: usize,
    bits: Option<Bits>,
}

/// An adapter of projections of one input.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Adapted {
    pub(crate) rank: usize,
    pub(crate) scale: f64,
    /// The `A`s, one under the other: first element.
    pub(crate) a: usize,
    pub(crate) parts: Vec<AdaptedPart>,
}

/// Of one projection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdaptedPart {
    /// Its first output among those of all projections of the input.
    pub(crate) column: usize,
    pub(crate) outputs: usize,
    /// `B`: first element.
    pub(crate) b: usize,
}

impl Adapted {
    /// Ranks of all parts.
    pub(crate) fn ranks(&self) -> usize {
        self.rank * self.parts.len()
    }
}

/// What is trained of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Role {
    Frozen,
    /// All of it, from this element on.
    Full(usize),
    Adapted(Adapted),
}

/// What is trained of a layer. Norms: where they begin, in the order input, q, k, after attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerRoles {
    pub(crate) qkv: Role,
    pub(crate) o: Role,
    pub(crate) gate_up: Role,
    pub(crate) down: Role,
    pub(crate) norms: Option<[usize; 4]>,
}

impl LayerRoles {
    /// Roles of the matrices, in the order of the forward.
    pub(crate) fn matrices(&self) -> [&Role; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Ranks of all adapters of the layer.
    pub(crate) fn ranks(&self) -> usize {
        let ranks = self.matrices().map(Role::ranks);
        ranks.iter().sum()
    }
}

impl Role {
    pub(crate) fn ranks(&self) -> usize {
        match self {
            Self::Adapted(adapted) => adapted.ranks(),
            Self::Frozen | Self::Full(_) => 0,
        }
    }
}

/// What is trained of a model.
#[derive(Debug)]
pub(crate) struct Roles {
    pub(crate) embedding: Option<usize>,
    pub(crate) head: Option<usize>,
    pub(crate) final_norm: Option<usize>,
    pub(crate) layers: Vec<LayerRoles>,
}

impl Layout {
    /// Lays out what `settings` train of a model.
    pub(crate) fn new(config: &Config, settings: &Settings) -> (Self, Roles) {
        let mut layout = Self {
            bits: Some(settings.optimizer.bits),
            ..Self::default()
        };
        let roles = match &settings.trained {
            Trained::Lora(lora) => layout.adapters(config, lora),
            Trained::Full => layout.everything(config),
        };
        (layout, roles)
    }

    fn push(&mut self, name: String, shape: Vec<usize>, decays: bool) -> usize {
        let len: usize = shape.iter().product();
        let start = self.len;
        let moments = if self.bits == Some(Bits::Eight) && len >= EIGHT_BITS_FROM {
            let moments = Moments::Eight {
                start: self.eight,
                block: self.blocks,
            };
            self.eight += len;
            self.blocks += len.div_ceil(BLOCK_8BIT);
            moments
        } else {
            self.full += len;
            Moments::Full(self.full - len)
        };
        self.parameters.push(Parameter {
            name,
            shape,
            start,
            len,
            decays,
            moments,
        });
        self.len += len;
        start
    }

    fn adapters(&mut self, config: &Config, lora: &LoraSettings) -> Roles {
        let layers = (0..config.layers)
            .map(|index| {
                let tensors = config.layer_tensors(index);
                use Projection::{Down, Gate, K, O, Q, Up, V};
                let qkv = self.adapt(lora, &tensors.qkv, &[Q, K, V]);
                let o = self.adapt(lora, &tensors.o, &[O]);
                let (gate_up, down) = match &tensors.mlp {
                    MlpTensors::Dense(mlp) => (
                        self.adapt(lora, &mlp.gate_up, &[Gate, Up]),
                        self.adapt(lora, &mlp.down, &[Down]),
                    ),
                    MlpTensors::Sparse { .. } => (Role::Frozen, Role::Frozen),
                };
                LayerRoles {
                    qkv,
                    o,
                    gate_up,
                    down,
                    norms: None,
                }
            })
            .collect();
        Roles {
            embedding: None,
            head: None,
            final_norm: None,
            layers,
        }
    }

    /// Adapters of projections that share an input: all `A`s, then all `B`s.
    fn adapt(&mut self, lora: &LoraSettings, matrix: &Matrix, all: &[Projection]) -> Role {
        let mut column = 0;
        let mut chosen = Vec::new();
        for ((name, outputs), projection) in matrix.parts.iter().zip(all) {
            if lora.targets.contains(projection) {
                let module = name.strip_suffix(".weight").unwrap_or(name);
                chosen.push((format!("base_model.model.{module}"), column, *outputs));
            }
            column += outputs;
        }
        if chosen.is_empty() {
            return Role::Frozen;
        }
        let a = self.len;
        for (module, ..) in &chosen {
            let shape = vec![lora.rank, matrix.inputs];
            self.push(format!("{module}.lora_A.weight"), shape, true);
        }
        let parts = chosen
            .iter()
            .map(|(module, column, outputs)| {
                let shape = vec![*outputs, lora.rank];
                AdaptedPart {
                    column: *column,
                    outputs: *outputs,
                    b: self.push(format!("{module}.lora_B.weight"), shape, true),
                }
            })
            .collect();
        Role::Adapted(Adapted {
            rank: lora.rank,
            scale: lora.scale(),
            a,
            parts,
        })
    }

    fn everything(&mut self, config: &Config) -> Roles {
        let embedding = self.matrix(&config.embedding());
        let layers = (0..config.layers)
            .map(|index| self.layer(&config.layer_tensors(index)))
            .collect();
        let final_norm = self.vector(&config.final_norm());
        let head = config.lm_head().map(|head| self.matrix(&head));
        Roles {
            embedding: Some(embedding),
            head,
            final_norm: Some(final_norm),
            layers,
        }
    }

    fn layer(&mut self, tensors: &LayerTensors) -> LayerRoles {
        let norms = [
            &tensors.input_norm,
            &tensors.q_norm,
            &tensors.k_norm,
            &tensors.post_norm,
        ];
        let norms = norms.map(|norm| self.vector(norm));
        let qkv = Role::Full(self.matrix(&tensors.qkv));
        let o = Role::Full(self.matrix(&tensors.o));
        let (gate_up, down) = match &tensors.mlp {
            MlpTensors::Dense(mlp) => (
                Role::Full(self.matrix(&mlp.gate_up)),
                Role::Full(self.matrix(&mlp.down)),
            ),
            MlpTensors::Sparse { .. } => (Role::Frozen, Role::Frozen),
        };
        LayerRoles {
            qkv,
            o,
            gate_up,
            down,
            norms: Some(norms),
        }
    }

    fn matrix(&mut self, matrix: &Matrix) -> usize {
        let start = self.len;
        for (name, rows) in &matrix.parts {
            self.push(name.clone(), vec![*rows, matrix.inputs], true);
        }
        start
    }

    fn vector(&mut self, vector: &Vector) -> usize {
        self.push(vector.name.clone(), vec![vector.len], false)
    }
}
