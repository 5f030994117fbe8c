//! Every numerical op once: `cpu` and `cuda` side by side.
//!
//! This is the one crate that may use `unsafe`: vector instructions, mapped files, and slices that threads share out
//! among themselves. What it offers outside is safe.

pub mod buffer;
pub mod cpu;
pub mod cuda;
mod device;
pub mod sampling;
pub mod train;

pub use device::{AUTO_ORDINAL, DeviceChoice};
pub use half::bf16;
