//! The coordinator: accepts jobs, orders them, leases them to workers, and counts what became of them.
//!
//! [`run`] is the whole of it on a listener; `main` and `espalier up` call it. `api/` serves clients and operators,
//! `session/` serves workers, `queue/` holds the jobs, `journal/` keeps them
//! in object storage too where the queue may lose them, `maintenance/` does what nobody asks for. It never looks into
//! a rollout: what one is and how it is run is the agent worker's.

pub mod api;
pub mod auth;
pub mod config;
pub mod endpoints;
pub mod health;
mod journal;
mod maintenance;
mod peers;
pub mod prices;
pub mod questions;
pub mod queue;
pub mod registry;
pub mod scaler;
mod serve;
mod session;

pub use auth::{Role, Scope, TokenConfig};
pub use config::{CoordinatorConfig, ProjectConfig};
pub use serve::{Deps, RunError, run};
