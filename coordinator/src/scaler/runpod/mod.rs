//! Workers in pods of RunPod: a client of its REST v2, and the provider that makes, finds and ends pods with it.
//!
//! [`client`] speaks the API and decides nothing, [`choose`] decides which GPU a pod gets and is pure, [`provider`] joins the two.
//! The scaler takes the provider; `espalier runpod` takes provider and client for pods that no scaler looks after.

pub mod choose;
pub mod client;
pub mod config;
mod error;
pub mod provider;
#[cfg(test)]
mod tests;
pub mod wire;

pub use client::Client;
pub use config::{Cloud, RunpodConfig, RunpodPool};
pub use error::ApiError;
pub use provider::{Runpod, instance};
