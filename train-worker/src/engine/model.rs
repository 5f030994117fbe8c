//! A model's weights on the device, and beside them what training changes.

use espalier_kernels::cpu::RowSource;
use espalier_kernels::train::{
    Backend, BufferId, ExpertWeights, Heads, Kind, Mat, MoeShape, OutOfMemory, Slice,
};
use espalier_qwen3::{
    CheckpointError, Config, LayerTensors, Matrix, MlpTensors, TensorSource, Vector,
};

use super::EngineError;
use super::layout::{LayerRoles, Layout, Role, Roles};

/// Rows that are copied to the device at a time.
const ROWS_AT_A_TIME: usize = 256;

/// A matrix and what is trained of it.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[outputs, inputs]`.
    pub(crate) weight: Mat,
    pub(crate) role: Role,
    /// Its first column among the layer's `X · Aᵀ`.
    pub(crate) xa: usize,
}

/// What follows attention.
#[derive(Debug, Clone)]
pub(crate) enum Mlp {
    Dense { gate_up: Linear, down: Linear },
    Sparse { router: Mat, experts: ExpertWeights },
}

/// A layer.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Weights of norms: input, q, k, after attention.
    pub(crate) norms: [Slice; 4],
    /// Their gradients.
    pub(crate) d_norms: Option<[Slice; 4]>,
    pub(crate) qkv: Linear,
    pub(crate) o: Linear,
    pub(crate) mlp: Mlp,
}

/// What training changes, each in one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flat {
    /// Masters.
    pub(crate) values: BufferId,
    /// As they are multiplied: the masters themselves where weights are exact.
    pub(crate) compute: BufferId,
    pub(crate) grads: BufferId,
    pub(crate) m: BufferId,
    pub(crate) v: BufferId,
    pub(crate) m_codes: BufferId,
    pub(crate) v_codes: BufferId,
    pub(crate) m_max: BufferId,
    pub(crate) v_max: BufferId,
}

impl Flat {
    fn new<B: Backend>(backend: &mut B, layout: &Layout) -> Result<Self, OutOfMemory> {
        let values = backend.alloc(Kind::Exact, layout.len)?;
        let compute = match backend.weights_are_exact() {
            true => values,
            false => backend.alloc(Kind::Weights, layout.len)?,
        };
        Ok(Self {
            values,
            compute,
            grads: backend.alloc(Kind::Exact, layout.len)?,
            m: backend.alloc(Kind::Exact, layout.full)?,
            v: backend.alloc(Kind::Exact, layout.full)?,
            m_codes: backend.alloc(Kind::Bytes, layout.eight)?,
            v_codes: backend.alloc(Kind::Bytes, layout.eight)?,
            m_max: backend.alloc(Kind::Exact, layout.blocks)?,
            v_max: backend.alloc(Kind::Exact, layout.blocks)?,
        })
    }

    /// Bytes of it on a device with elements of these sizes.
    pub(crate) fn bytes(layout: &Layout, weights: u64, exact: u64, weights_are_exact: bool) -> u64 {
        let len = layout.len as u64;
        let copies = if weights_are_exact { 0 } else { len * weights };
        let moments = 2 * (layout.full + layout.blocks) as u64 * exact + 2 * layout.eight as u64;
        2 * len * exact + copies + moments
    }
}

/// A model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) embedding: Mat,
    pub(crate) d_embedding: Option<Mat>,
    /// Rows of the real vocabulary, and some of its padding: see [`head_rows`].
    pub(crate) head: Mat,
    pub(crate) d_head: Option<Mat>,
    pub(crate) final_norm: Slice,
    pub(crate) d_final_norm: Option<Slice>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) flat: Flat,
}

struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    source: &'a dyn TensorSource,
    flat: Flat,
}

impl Model {
    /// Copies weights to the device.
    pub(crate) fn load<B: Backend>(
        backend: &mut B,
        config: &Config,
        source: &dyn TensorSource,
        layout: &Layout,
        roles: &Roles,
    ) -> Result<Self, EngineError> {
        let flat = Flat::new(backend, layout)?;
        let mut loader = Loader {
            backend,
            source,
            flat,
        };
        let hidden = config.hidden_size;
        let embedding = loader.matrix(&config.embedding(), roles.embedding)?;
        let d_embedding = roles
            .embedding
            .map(|start| Mat::at(flat.grads, start, config.vocab_size, hidden));
        let (head, d_head) = match config.lm_head() {
            None => (embedding, d_embedding),
            Some(matrix) => (
                loader.matrix(&matrix, roles.head)?,
                roles
                    .head
                    .map(|start| Mat::at(flat.grads, start, config.vocab_size, hidden)),
            ),
        };
        let rows = |mat: Mat| mat.slice_rows(0, head_rows(config));
        let final_norm = loader.vector(&config.final_norm(), roles.final_norm)?;
        let layers = roles.layers.iter().enumerate();
        let layers = layers
            .map(|(index, roles)| loader.layer(&config.layer_tensors(index), roles))
            .collect::<Result<_, _>>()?;
        backend.round_all(&flat, layout.len);
        Ok(Self {
            embedding,
            d_embedding,
            head: rows(head),
            d_head: d_head.map(rows),
            final_norm,
            d_final_norm: roles
                .final_norm
                .map(|start| Slice::new(flat.grads, start, hidden)),
            layers,
            flat,
        })
    }

    /// Bytes of what is frozen, on a device with weights of this size.
    pub(crate) fn frozen_bytes(config: &Config, roles: &Roles, weights: u64) -> u64 {
        let mut count = 0;
        let mut matrix = |matrix: &Matrix, trained: bool| {
            count += if trained { 0 } else { matrix.count() as u64 };
        };
        matrix(&config.embedding(), roles.embedding.is_some());
        if let Some(head) = config.lm_head() {
            matrix(&head, roles.head.is_some());
        }
        for (index, roles) in roles.layers.iter().enumerate() {
            let tensors = config.layer_tensors(index);
            let full = |role: &Role| matches!(role, Role::Full(_));
            matrix(&tensors.qkv, full(&roles.qkv));
            matrix(&tensors.o, full(&roles.o));
            match &tensors.mlp {
                MlpTensors::Dense(mlp) => {
                    matrix(&mlp.gate_up, full(&roles.gate_up));
                    matrix(&mlp.down, full(&roles.down));
                }
                MlpTensors::Sparse { router, experts } => {
                    matrix(router, false);
                    for expert in experts {
                        matrix(&expert.gate_up, false);
                        matrix(&expert.down, false);
                    }
                }
            }
        }
        count * weights
    }
}

/// Masters to what is multiplied.
pub(crate) trait RoundAll {
    fn round_all(&mut self, flat: &Flat, len: usize);
}

impl<B: Backend> RoundAll for B {
    fn round_all(&mut self, flat: &Flat, len: usize) {
        if flat.values != flat.compute {
            self.round(
                Slice::new(flat.values, 0, len),
                Slice::new(flat.compute, 0, len),
            );
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    /// Copies the parts of a matrix, to the row of what is trained or to a buffer of its own.
    fn matrix(&mut self, matrix: &Matrix, trained: Option<usize>) -> Result<Mat, EngineError> {
        let (master, mat) = match trained {
            Some(start) => (
                self.flat.values,
                Mat::at(self.flat.compute, start, matrix.outputs(), matrix.inputs),
            ),
            None => {
                let buffer = self.backend.alloc(Kind::Weights, matrix.count())?;
                (buffer, Mat::dense(buffer, matrix.outputs(), matrix.inputs))
            }
        };
        self.fill(matrix, master, mat.start)?;
        Ok(mat)
    }

    fn fill(
        &mut self,
        matrix: &Matrix,
        buffer: BufferId,
        mut start: usize,
    ) -> Result<(), CheckpointError> {
        let width = matrix.inputs;
        for (name, rows) in &matrix.parts {
            let tensor = self.source.tensor(name, &[*rows, width])?;
            if let RowSource::Bf16Bytes(bytes) = tensor.rows() {
                self.backend.write_bf16(buffer, start, bytes);
                start += rows * width;
                continue;
            }
            let mut values = Vec::new();
            for first in (0..*rows).step_by(ROWS_AT_A_TIME) {
                let count = ROWS_AT_A_TIME.min(rows - first);
                values.resize(count * width, 0.0);
                for (row, to) in values.chunks_mut(width).enumerate() {
                    tensor.rows().row_into(first + row, to);
                }
                self.backend.write(buffer, start, &values);
                start += values.len();
            }
        }
        Ok(())
    }

    fn vector(&mut self, vector: &Vector, trained: Option<usize>) -> Result<Slice, EngineError> {
        let values = self.source.tensor(&vector.name, &[vector.len])?.to_vec();
        let (master, slice) = match trained {
            Some(start) => (
                self.flat.values,
                Slice::new(self.flat.compute, start, vector.len),
            ),
            None => {
                let buffer = self.backend.alloc(Kind::Weights, vector.len)?;
                (buffer, Slice::new(buffer, 0, vector.len))
            }
        };
        self.backend.write(master, slice.start, &values);
        Ok(slice)
    }

    fn linear(
        &mut self,
        matrix: &Matrix,
        role: &Role,
        xa: &mut usize,
    ) -> Result<Linear, EngineError> {
        let start = match role {
            Role::Full(start) => Some(*start),
            Role::Frozen | Role::Adapted(_) => None,
        };
        let first = *xa;
        *xa += role.ranks();
        Ok(Linear {
            weight: self.matrix(matrix, start)?,
            role: role.clone(),
            xa: first,
        })
    }

    fn layer(&mut self, tensors: &LayerTensors, roles: &LayerRoles) -> Result<Layer, EngineError> {
        let vectors = [
            &tensors.input_norm,
            &tensors.q_norm,
            &tensors.k_norm,
            &tensors.post_norm,
        ];
        let mut norms = Vec::new();
        for (i, vector) in vectors.into_iter().enumerate() {
            norms.push(self.vector(vector, roles.norms.map(|starts| starts[i]))?);
        }
        let norms = [norms[0], norms[1], norms[2], norms[3]];
        let grads = self.flat.grads;
        let d_norms = roles
            .norms
            .map(|starts| std::array::from_fn(|i| Slice::new(grads, starts[i], norms[i].len)));
        let mut xa = 0;
        let qkv = self.linear(&tensors.qkv, &roles.qkv, &mut xa)?;
        let o = self.linear(&tensors.o, &roles.o, &mut xa)?;
        let mlp = match &tensors.mlp {
            MlpTensors::Dense(mlp) => Mlp::Dense {
                gate_up: self.linear(&mlp.gate_up, &roles.gate_up, &mut xa)?,
                down: self.linear(&mlp.down, &roles.down, &mut xa)?,
            },
            MlpTensors::Sparse { router, experts } => Mlp::Sparse {
                router: self.matrix(router, None)?,
                experts: ExpertWeights {
                    gate_up: self.stack(experts.iter().map(|expert| &expert.gate_up))?,
                    down: self.stack(experts.iter().map(|expert| &expert.down))?,
                },
            },
        };
        Ok(Layer {
            norms,
            d_norms,
            qkv,
            o,
            mlp,
        })
    }

    /// Matrices of experts, one under the other.
    fn stack<'m>(
        &mut self,
        matrices: impl Iterator<Item = &'m Matrix>,
    ) -> Result<Mat, EngineError> {
        let parts: Vec<_> = matrices
            .flat_map(|matrix| matrix.parts.iter().map(|part| (part, matrix.inputs)))
            .collect();
        let inputs = parts.first().map_or(1, |(_, inputs)| *inputs);
        let all = Matrix {
            parts: parts.into_iter().map(|(part, _)| part.clone()).collect(),
            inputs,
        };
        self.matrix(&all, None)
    }
}

/// Rows of the LM head that are multiplied: those of the real vocabulary, and of its padding as many as make whole eights
/// of them, where there are. Devices multiply matrices of other widths more slowly.
pub(crate) fn head_rows(config: &Config) -> usize {
    let eights = config.real_vocab_size.next_multiple_of(8);
    eights.min(config.vocab_size)
}

/// Shape of a model's attention.
pub(crate) fn heads_of(config: &Config) -> Heads {
    Heads {
        q: config.heads,
        kv: config.kv_heads,
        dim: config.head_dim,
        eps: f64::from(config.rms_norm_eps),
    }
}

/// Shape of a model's experts.
pub(crate) fn moe_shape(config: &Config) -> Option<MoeShape> {
    config.moe.as_ref().map(|moe| MoeShape {
        experts: moe.experts,
        top_k: moe.top_k,
        width: moe.intermediate_size,
        renormalise: moe.renormalise,
    })
}
