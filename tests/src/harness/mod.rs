//! What scenarios are made of: real processes, a client, an OTLP receiver, and waits that say what they waited for.
//!
//! Nothing here judges; the scenarios in `tests/tests` do.

pub mod client;
pub mod cluster;
pub mod disk;
pub mod model;
pub mod otlp;
pub mod practice;
pub mod trail;
pub mod up;

pub use espalier_testbed::{ports, process, proxy, redis, s3, wait_for};
