//! The agent worker: runs rollouts, many at once, and records what happens in them.
//!
//! [`run`] is the whole of it; `main` and `espalier up` call it. A granted job goes through `handler` to
//! [`rollout`], which calls the model and the tools ([`mcp`]), shows the model what fits ([`observe`]), writes down
//! every step ([`record`]) and asks the verifiers ([`verify`]). `espalier chat` uses [`Agent::converse`], which is the
//! same loop with a person in place of a list of prompts. A model is asked for the turns of recorded
//! rollouts (`score`) in the slots of rollouts. Data sets are built (`curate`), rollouts compared
//! (`compare`) and adapters brought out (`export`) beside rollouts, in slots of their own. It never looks at the queue: the worker loop of `espalier-runtime` does.

mod compare;
pub mod config;
mod curate;
mod export;
mod handler;
pub mod mcp;
pub mod observe;
pub mod record;
pub mod rollout;
mod score;
mod serve;
#[cfg(test)]
mod testing;
pub mod verify;

pub use config::{AgentWorkerConfig, McpSettingsError};
pub use serve::{Agent, Conversed, Deps, RunError, run};
