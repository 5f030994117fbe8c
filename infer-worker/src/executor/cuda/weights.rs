//! Weights on the device, in bf16, straight from where they lie: a checkpoint's mapped files go through two pieces of
//! pinned memory, one of which is filled while the other is copied. No second copy is made on the host.

use espalier_kernels::bf16;
use espalier_kernels::cpu::RowSource;
use espalier_kernels::cuda::{Buffer, Device, Pinned};
use espalier_qwen3::{Config, Gated, LayerTensors, Matrix, MlpTensors, TensorSource, Vector};

use super::LoadError;

/// Elements of a piece of pinned memory: 16 MiB, which a copy fills in a third of a millisecond.
const PIECE: usize = 8 << 20;

/// What follows attention.
pub(super) enum Mlp {
    Dense {
        /// `[2 width, hidden]`.
        gate_up: Buffer<bf16>,
        /// `[hidden, width]`.
        down: Buffer<bf16>,
    },
    Sparse {
        /// `[experts, hidden]`.
        router: Buffer<bf16>,
        /// `[experts, 2 width, hidden]`.
        gate_up: Buffer<bf16>,
        /// `[experts, hidden, width]`.
        down: Buffer<bf16>,
    },
}

/// A layer's weights, as checkpoints hold them: `[outputs, inputs]`.
pub(super) struct Layer {
    pub input_norm: Buffer<bf16>,
    pub qkv: Buffer<bf16>,
    pub q_norm: Buffer<bf16>,
    pub k_norm: Buffer<bf16>,
    pub o: Buffer<bf16>,
    pub post_norm: Buffer<bf16>,
    pub mlp: Mlp,
}

/// A model's weights.
pub(super) struct Weights {
    /// `[vocab, hidden]`.
    pub embedding: Buffer<bf16>,
    /// `[vocab, hidden]`, unless it is the embedding.
    pub lm_head: Option<Buffer<bf16>>,
    pub layers: Vec<Layer>,
    pub final_norm: Buffer<bf16>,
}

impl Weights {
    pub fn load(
        device: &Device,
        config: &Config,
        source: &dyn TensorSource,
    ) -> Result<Self, LoadError> {
        let mut upload = Upload {
            device,
            source,
            pieces: [device.pinned(PIECE)?, device.pinned(PIECE)?],
            next: 0,
        };
        let layers = (0..config.layers).map(|index| upload.layer(&config.layer_tensors(index)));
        let layers = layers.collect::<Result<_, _>>()?;
        let lm_head = match config.lm_head() {
            Some(matrix) => Some(upload.matrix(&matrix)?),
            None => None,
        };
        Ok(Self {
            layers,
            lm_head,
            embedding: upload.matrix(&config.embedding())?,
            final_norm: upload.vector(&config.final_norm())?,
        })
    }

    /// The LM head.
    pub fn head(&self) -> &Buffer<bf16> {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Bytes of all weights of a model, and of those that each decode step reads: of the embedding only a few rows are,
/// unless it is the LM head too.
pub(super) fn bytes(config: &Config) -> (usize, usize) {
    let gated = |gated: &Gated| gated.gate_up.count() + gated.down.count();
    let layer = |index| {
        let tensors = config.layer_tensors(index);
        let mlp = match &tensors.mlp {
            MlpTensors::Dense(mlp) => gated(mlp),
            MlpTensors::Sparse { router, experts } => {
                router.count() + experts.iter().map(gated).sum::<usize>()
            }
        };
        mlp + tensors.qkv.count() + tensors.o.count() + 2 * tensors.input_norm.len
    };
    let layers: usize = (0..config.layers).map(layer).sum();
    let head = config.embedding().count();
    let untied = config.lm_head().map_or(0, |head| head.count());
    let size = size_of::<bf16>();
    ((layers + head + untied) * size, (layers + head) * size)
}

struct Upload<'a> {
    device: &'a Device,
    source: &'a dyn TensorSource,
    pieces: [Pinned<bf16>; 2],
    next: usize,
}

impl Upload<'_> {
    fn layer(&mut self, tensors: &LayerTensors) -> Result<Layer, LoadError> {
        Ok(Layer {
            input_norm: self.vector(&tensors.input_norm)?,
            qkv: self.matrix(&tensors.qkv)?,
            q_norm: self.vector(&tensors.q_norm)?,
            k_norm: self.vector(&tensors.k_norm)?,
            o: self.matrix(&tensors.o)?,
            post_norm: self.vector(&tensors.post_norm)?,
            mlp: match &tensors.mlp {
                MlpTensors::Dense(mlp) => Mlp::Dense {
                    gate_up: self.matrix(&mlp.gate_up)?,
                    down: self.matrix(&mlp.down)?,
                },
                MlpTensors::Sparse { router, experts } => Mlp::Sparse {
                    router: self.matrix(router)?,
                    gate_up: self.stacked(experts.iter().map(|expert| &expert.gate_up))?,
                    down: self.stacked(experts.iter().map(|expert| &expert.down))?,
                },
            },
        })
    }

    fn vector(&mut self, vector: &Vector) -> Result<Buffer<bf16>, LoadError> {
        let mut buffer = self.device.zeroed(vector.len)?;
        let tensor = self.source.tensor(&vector.name, &[vector.len])?;
        self.copy(&tensor.rows(), &mut buffer, 0)?;
        Ok(buffer)
    }

    fn matrix(&mut self, matrix: &Matrix) -> Result<Buffer<bf16>, LoadError> {
        self.stacked(std::iter::once(matrix))
    }

    /// Matrices one behind the other.
    fn stacked<'m>(
        &mut self,
        matrices: impl Iterator<Item = &'m Matrix> + Clone,
    ) -> Result<Buffer<bf16>, LoadError> {
        let mut buffer = self
            .device
            .zeroed(matrices.clone().map(Matrix::count).sum())?;
        let mut start = 0;
        for matrix in matrices {
            for (name, rows) in &matrix.parts {
                let tensor = self.source.tensor(name, &[*rows, matrix.inputs])?;
                self.copy(&tensor.rows(), &mut buffer, start)?;
                start += rows * matrix.inputs;
            }
        }
        Ok(buffer)
    }

    /// All numbers of a tensor, to `start` and on.
    fn copy(
        &mut self,
        from: &RowSource<'_>,
        to: &mut Buffer<bf16>,
        start: usize,
    ) -> Result<(), LoadError> {
        for done in (0..from.count()).step_by(PIECE) {
            let len = PIECE.min(from.count() - done);
            let piece = &mut self.pieces[self.next];
            from.bf16_into(done, &mut piece.values()?[..len]);
            self.device.upload(to, start + done, piece, len)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }
}
