//! Real processes, faults and end-to-end scenarios, and what they are made of. Nothing that is shipped depends on it.

pub mod harness;
pub mod scripted_model;
