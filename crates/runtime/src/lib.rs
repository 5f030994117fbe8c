//! What every Espalier process is made of: configuration, supervised tasks, shutdown, telemetry, the object store,
//! gRPC channels, the model client, the hub's client, the worker loop, and the frame around all of it.
//!
//! Nothing here knows what a process is for. The coordinator and the workers build on these modules; the rules and
//! types of the domain are in `espalier-core`.

pub mod backoff;
pub mod clock;
pub mod config;
pub mod datasets;
pub mod fetch;
pub mod health;
pub mod hub;
pub mod ids;
pub mod memory;
pub mod model;
pub mod net;
pub mod process;
mod progress;
pub mod publish;
pub mod shutdown;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod traces;
pub mod worker;
