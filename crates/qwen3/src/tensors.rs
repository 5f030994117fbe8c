//! Which tensors a checkpoint has, by name and shape, and how they are packed: projections of one input lie one under the
//! other. Whoever loads weights, onto whatever device, goes by this.

use crate::config::Config;

/// A tensor of one dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vector {
    /// Its name.
    pub name: String,
    /// Its elements.
    pub len: usize,
}

/// Matrices of one width, one under the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    /// Name and rows of each tensor; each is `[rows, inputs]`.
    pub parts: Vec<(String, usize)>,
    /// Columns.
    pub inputs: usize,
}

impl Matrix {
    fn one(name: String, outputs: usize, inputs: usize) -> Self {
        Self {
            parts: vec![(name, outputs)],
            inputs,
        }
    }

    /// Rows of all together.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows).sum()
    }

    /// Elements.
    #[must_use]
    pub fn count(&self) -> usize {
        self.outputs() * self.inputs
    }
}

/// A gated MLP: of a layer, or of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gated {
    /// Gate, then up.
    pub gate_up: Matrix,
    /// Down.
    pub down: Matrix,
}

/// What follows attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MlpTensors {
    /// One MLP.
    Dense(Gated),
    /// Experts.
    Sparse {
        /// Decides which experts a token goes to.
        router: Matrix,
        /// All of one shape.
        experts: Vec<Gated>,
    },
}

/// The tensors of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTensors {
    /// Before attention.
    pub input_norm: Vector,
    /// q, k, v.
    pub qkv: Matrix,
    /// Of each head of q.
    pub q_norm: Vector,
    /// Of each head of k.
    pub k_norm: Vector,
    /// From heads to the residual stream.
    pub o: Matrix,
    /// Before the MLP.
    pub post_norm: Vector,
    /// The MLP.
    pub mlp: MlpTensors,
}

impl Config {
    /// Rows of tokens; also the LM head where there is no other.
    #[must_use]
    pub fn embedding(&self) -> Matrix {
        let name = "model.embed_tokens.weight".to_owned();
        Matrix::one(name, self.vocab_size, self.hidden_size)
    }

    /// The LM head, unless it is the embedding.
    #[must_use]
    pub fn lm_head(&self) -> Option<Matrix> {
        let name = "lm_head.weight".to_owned();
        (!self.tied).then(|| Matrix::one(name, self.vocab_size, self.hidden_size))
    }

    /// After the last layer.
    #[must_use]
    pub fn final_norm(&self) -> Vector {
        Vector {
            name: "model.norm.weight".to_owned(),
            len: self.hidden_size,
        }
    }

    /// The tensors of layer `index`.
    #[must_use]
    pub fn layer_tensors(&self, index: usize) -> LayerTensors {
        let name = |rest: &str| format!("model.layers.{index}.{rest}.weight");
        let vector = |rest, len| Vector {
            name: name(rest),
            len,
        };
        let (hidden, dim) = (self.hidden_size, self.head_dim);
        let (q, kv) = (self.heads * dim, self.kv_heads * dim);
        LayerTensors {
            input_norm: vector("input_layernorm", hidden),
            qkv: Matrix {
                parts: vec![
                    (name("self_attn.q_proj"), q),
                    (name("self_attn.k_proj"), kv),
                    (name("self_attn.v_proj"), kv),
                ],
                inputs: hidden,
            },
            q_norm: vector("self_attn.q_norm", dim),
            k_norm: vector("self_attn.k_norm", dim),
            o: Matrix::one(name("self_attn.o_proj"), hidden, q),
            post_norm: vector("post_attention_layernorm", hidden),
            mlp: match &self.moe {
                Some(moe) if moe.sparse[index] => MlpTensors::Sparse {
                    router: Matrix::one(name("mlp.gate"), moe.experts, hidden),
                    experts: (0..moe.experts)
                        .map(|expert| {
                            let at = |which: &str| name(&format!("mlp.experts.{expert}.{which}"));
                            gated(at, hidden, moe.intermediate_size)
                        })
                        .collect(),
                },
                _ => MlpTensors::Dense(gated(
                    |which| name(&format!("mlp.{which}")),
                    hidden,
                    self.intermediate_size,
                )),
            },
        }
    }
}

fn gated(name: impl Fn(&str) -> String, hidden: usize, width: usize) -> Gated {
    Gated {
        gate_up: Matrix {
            parts: vec![(name("gate_proj"), width), (name("up_proj"), width)],
            inputs: hidden,
        },
        down: Matrix::one(name("down_proj"), hidden, width),
    }
}
