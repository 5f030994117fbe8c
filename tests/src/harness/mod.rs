//! What scenarios are made of: real processes, a client, an OTLP receiver, and waits that say what they waited for.
//!
//! What must hold whatever happened is judged by `history` and `world`; all else is judged by the scenarios in
//! `tests/tests/scenarios`. What may happen to a `world` is in `faults`.

pub mod client;
pub mod cluster;
pub mod disk;
pub mod faults;
pub mod guide;
pub mod history;
pub mod model;
pub mod otlp;
pub mod pipeline;
pub mod practice;
pub mod serving;
pub mod soak;
pub mod store;
pub mod tiny;
pub mod toy;
pub mod trail;
pub mod up;
pub mod world;

pub use espalier_testbed::{hosts, hub, ports, process, proxy, redis, runpod, s3, wait_for};
