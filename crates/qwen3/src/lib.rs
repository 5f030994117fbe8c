//! Qwen3, dense and mixture of experts: configuration, weights, adapters, and the forward pass on the CPU.
//!
//! # Numerics contract
//! What a program that serves or trains this model computes, on any device:
//! - Weights are those of the checkpoint, or rounded once to the form they are kept in ([`Form`]): bf16 to nearest even;
//!   8 bits as value × scale in f32. Adapters are kept in f32; on CUDA as bf16, `B` with the scale in it.
//! - Norms, rotary embedding, softmax, router, SiLU, logits and log-sum-exp are f32. On the CPU so is everything else, but
//!   keys and values are rounded to bf16 with weights in any form but [`Form::F32`], and inputs of products with weights in
//!   [`Form::Bf16Pairs`]. On CUDA sums are f32 too, and what one op leaves for the next, keys and values among it, is
//!   rounded to bf16 once.
//! - On the CPU every sum has one order (see `espalier_kernels::cpu`), so a sequence's numbers do not depend on the
//!   batch, on chunks, on what was cached or on threads, bit for bit; nor, in one form, on instructions.
//! - On CUDA the order of a sum may depend on how many rows a product has, so numbers that depend on the batch differ in
//!   their last bits of bf16: the most likely id is the same wherever it is ahead by more than that.
//! - RMSNorm is `w · (x / sqrt(mean(x²) + eps))`; q and k are normed per head before RoPE; scores are divided by
//!   `sqrt(head_dim)` after the product.
//! - Frequencies are `1 / theta^(2i / head_dim)` in f32; an angle is position × frequency in f32; its cosine and sine are
//!   rounded to f32 once.
//! - The router takes the softmax of all experts in f32, the `top_k` most probable (of equals the lower index), divides
//!   by their sum where the configuration says so, and adds experts up by ascending index.
//! - An adapted projection is `W·x + scale · B·(A·x)`, where scale is `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
//! - A merged matrix is `W + scale · (B·A)` in f32, rounded to bf16 once.
//! - Ids of the vocabulary's padding have no logits: [`Logits`] ends where the real vocabulary does.

mod checkpoint;
mod config;
mod lora;
mod merge;
mod model;
mod rotary;
mod seeded;
mod shapes;
mod tensors;

pub use checkpoint::{Checkpoint, CheckpointError, Tensor, TensorSource};
pub use config::{Config, ConfigError, Moe, Rope, Yarn};
pub use espalier_kernels::cpu::Form;
pub use lora::{ContentDigest, Lora, LoraError, Site};
pub use merge::{Merge, MergeError, Merged};
pub use model::{Logits, Model, ModelError, Part, Want};
pub use seeded::{Cut, Draw, Seeded, hashed};
pub use shapes::Shape;
pub use tensors::{Gated, LayerTensors, Matrix, MlpTensors, Vector};
