//! The MCP host of the worker: it starts or reaches the MCP servers that a rollout names, offers their tools in the
//! form in which models call them, and runs the calls.
//!
//! It is not the agent loop: it does not decide what to call, cut what the model sees or score anything. The rollout
//! loop and the verifiers use it through [`McpHost`] and [`Toolbox`]; nobody else does.
//!
//! ```text
//! mcpServers JSON ─► config ─► host ─► pool ─► playwright ─┐
//!                                 └──────────► child ──────┴─► connection ─► Toolbox::call
//! ```
//! Invariants:
//! - A browser context that was lost is [`McpError::ContextLost`], never a blank page that a model could take for the
//!   site (`connection`).
//! - No server of ours has a TCP port that a page could reach (`docs/decisions/browser-isolation.md`).
//! - Whatever kills this process, no server stays behind (`guardian`).
//! - Every wait has a name and a deadline; every answer a largest size.

mod brief;
mod browser;
mod child;
mod config;
mod connection;
mod convert;
mod error;
mod guardian;
mod host;
mod inline;
mod launcher;
mod open;
mod outcome;
mod playwright;
mod policy;
mod pool;
mod redact;
mod shared;
mod toolbox;

pub use config::{
    ConfigError, HttpServer, Isolation, McpConfig, PlaywrightOptions, ServerConfig, ServerKind,
    ServerOptions, StdioServer,
};
pub use convert::OfferedTool;
pub use error::McpError;
pub use host::{McpHost, McpHostConfig};
pub use outcome::ToolOutcome;
pub use toolbox::{ServerInfo, Toolbox, Warning};
