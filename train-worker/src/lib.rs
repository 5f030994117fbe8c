//! Training: from a data set to an adapter.
//!
//! ```text
//! job ─► prepare: base model, samples, engine, checkpoint ─► run: step, measure, report ─► publish: adapter, version
//!                                                             │ snapshots, beside the steps
//!                                                             └► checkpoint ─► store
//! ```
//! [`engine`] computes and knows nothing of jobs; the rest of the crate is the process around it, which knows the engine
//! through [`trainer`] alone.

mod attempt;
pub mod bench;
mod checkpoint;
pub mod config;
mod data;
pub mod engine;
pub mod error;
mod handler;
mod report;
mod schedule;
mod serve;
pub mod trainer;

pub use serve::{Permissions, RunError, Source, run};
