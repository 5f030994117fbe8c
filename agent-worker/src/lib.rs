//! (scaffold)

pub mod mcp;
pub mod observe;
pub mod record;
pub mod rollout;
#[cfg(test)]
mod testing;
pub mod verify;
