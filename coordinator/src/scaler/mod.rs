//! Makes as many workers as the jobs need, and ends those that are not needed.

pub mod provider;

pub use provider::{Instance, InstanceState, Provider, ProviderError};
