//! (scaffold)

pub mod observe;
pub mod verify;
