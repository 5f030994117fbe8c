//! Training: from a data set to an adapter.

pub mod engine;
