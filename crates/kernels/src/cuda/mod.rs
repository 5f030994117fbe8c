//! The ops on a GPU: CUDA C++ compiled at run time, matrix products by cuBLASLt, and training's attention by cuDNN where
//! it is found. Nothing of CUDA is needed to build this;
//! what is there at run time is looked for ([`library`]), said ([`report`]) and opened ([`Device::open`]).
//!
//! # Numbers
//! Activations, weights and the KV cache are bf16; sums, norms, the softmax, logits and the router are fp32. Each op rounds
//! once, where it writes. The attention of many tokens also rounds the weights of the softmax, as its products need them.
//! No op adds in an order that differs from run to run.
//!
//! # What is checked
//! Each launch checks that its buffers are as long as its shape says. What the numbers in them point at — rows, blocks,
//! slots — is the caller's promise: a wrong one reads or writes another place of the device's memory, or ends the device
//! with an error, as it would in any program; it never touches memory of the host. Ids are checked on the device.
//!
//! # Graphs
//! All metadata are in buffers, and unused rows are marked in them ([`NONE`], length 0), so that one recorded graph serves
//! every step of its size.

pub(crate) mod buffer;
pub(crate) mod compile;
pub(crate) mod cudnn;
pub(crate) mod device;
pub(crate) mod error;
mod graph;
pub mod library;
pub(crate) mod linear;
mod mark;
mod ops;
pub mod report;

pub use buffer::{Buffer, Element, Pinned, Readback};
pub use compile::{
    Cache, File, GROUPS, HEAD_DIMS, Module, architecture, compile, nvrtc_architectures,
    nvrtc_version,
};
pub use device::{Device, Options};
pub use error::CudaError;
pub use graph::Graph;
pub use linear::{Linear, Out};
pub use mark::Mark;
pub use ops::*;
