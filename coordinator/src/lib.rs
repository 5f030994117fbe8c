//! The coordinator: accepts jobs, orders them, leases them to workers, and counts what became of them.

pub mod queue;
