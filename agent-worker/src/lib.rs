//! (scaffold)

pub mod mcp;
pub mod observe;
pub mod record;
pub mod rollout;
pub mod verify;
