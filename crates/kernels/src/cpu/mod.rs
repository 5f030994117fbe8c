//! The ops on the CPU, over ragged `[tokens, width]` activations in f32.
//!
//! # Order of sums
//! A result depends on its own row and on nothing else: not on the number of rows, of threads or of chunks, nor on the
//! instruction set. That holds bit for bit, because every sum has one order:
//! - [`linear()`]: each output is one chain of fused multiply-adds over k, ascending. Vectors run over outputs. In
//!   [`Form::Bf16Pairs`] the chain is of pairs of k, with one instruction, which only some machines have.
//! - [`attention()`]: each score is one such chain over the head's elements; a row's sum of weights has 16 lanes by
//!   `position % 16`, added up by one tree; its mix of values is one chain over positions, ascending from 0. So decode,
//!   chunked, cached and whole prefill agree.
//! - Norms: 16 lanes by `index % 16`, added up by the same tree.
//! - [`moe`]: a token's experts are added by ascending index.
//!
//! Multiply-adds are fused on every path (`f32::mul_add`; in software where the machine has none), and `exp` is this
//! crate's own, so AVX-512, AVX2 and the portable path give the same bits.

pub mod attention;
pub mod elementwise;
pub mod kv;
pub mod linear;
pub mod lora;
pub mod moe;
pub mod pool;
pub mod sampler;
pub(crate) mod simd;

pub use attention::{Span, attention};
pub use elementwise::{add, add_rms_norm, rms_norm, silu_mul};
pub use kv::{KvCache, KvForm, KvShape, QkvShape, norm_rope_write};
pub use linear::{Form, PackedLinear, RowSource, linear};
pub use pool::{Isa, Pool};
