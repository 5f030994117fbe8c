//! Every numerical op once: `cpu` and `cuda` side by side.
//!
//! This is the one crate that may use `unsafe`: vector instructions, mapped files, and slices that threads share out
//! among themselves. What it offers outside is safe.

pub mod buffer;
pub mod cpu;
pub mod cuda;
pub mod sampling;
pub mod train;

pub use half::bf16;
