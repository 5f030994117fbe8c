//! The pure heart of Espalier: what a job, a lease, a trace and an object path are, and the rules they obey.
//!
//! Nothing here does IO, reads a clock, draws a random number or knows an async runtime: all of that comes in as
//! arguments. Every other crate depends on this one; this one depends on none of them.

pub mod adapter;
pub mod answers;
pub mod chat;
pub mod compare;
pub mod dataset;
pub mod error;
pub mod id;
pub mod layout;
pub mod pipeline;
pub mod plot;
pub mod queue;
pub mod spec;
pub mod time;
pub mod trace;
pub mod training;
