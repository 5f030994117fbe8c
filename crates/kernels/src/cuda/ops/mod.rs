//! Launches of the kernels, with their shapes. Each op is a struct of its buffers and numbers with `launch`; `tokens` and
//! `rows` may be smaller than the buffers, which are as long as the largest step.

mod attention;
mod lora;
mod moe;
mod rows;
mod sampler;

pub use attention::{
    DecodeAttention, Paged, PrefillAttention, QkNormRopeStore, SpreadTables, decode_splits,
};
pub use lora::{LoraExpand, LoraShrink};
pub use moe::{MoeCombine, MoeGroup, MoeLinear, MoeRoute, Source};
pub use rows::{AddRmsNorm, Embed, FROM_DRAWN, GatherRows, SiluMul};
pub use sampler::{Sample, SampleRow, TOP_MAX};

use super::error::CudaError;

/// No row, slot, mask or id.
pub const NONE: u32 = u32::MAX;
/// Tokens of a block of the KV cache.
pub const BLOCK_TOKENS: usize = 16;

/// Refuses a buffer that is too short.
pub(super) fn need(
    operation: &'static str,
    name: &'static str,
    len: usize,
    least: usize,
) -> Result<(), CudaError> {
    let rule = || format!("must hold at least {least} values");
    (len >= least)
        .then_some(())
        .ok_or_else(|| CudaError::Shape {
            operation,
            name,
            rule: rule(),
            got: len,
        })
}

/// Refuses a number that breaks a rule.
fn rule(
    operation: &'static str,
    name: &'static str,
    got: usize,
    rule: &str,
    kept: bool,
) -> Result<(), CudaError> {
    kept.then_some(()).ok_or_else(|| CudaError::Shape {
        operation,
        name,
        rule: rule.to_owned(),
        got,
    })
}

/// Kernels that move 16 bytes at a time need rows of whole ones.
fn eights(operation: &'static str, name: &'static str, got: usize) -> Result<(), CudaError> {
    rule(
        operation,
        name,
        got,
        "must be a multiple of 8, not 0",
        got > 0 && got.is_multiple_of(8),
    )
}

/// A count as kernels take it.
fn small(operation: &'static str, name: &'static str, got: usize) -> Result<u32, CudaError> {
    let rule = || "must be less than 2^31".to_owned();
    u32::try_from(got)
        .ok()
        .filter(|n| *n < 1 << 31)
        .ok_or_else(|| CudaError::Shape {
            operation,
            name,
            rule: rule(),
            got,
        })
}

/// Threads of a block for a row of `columns`, 8 a thread: whole warps, 1,024 at most.
fn threads_for(columns: usize) -> u32 {
    (columns.div_ceil(8).next_multiple_of(32)).min(1024) as u32
}
