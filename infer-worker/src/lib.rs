//! Serves Qwen3 and its adapters over an OpenAI-compatible API.

pub mod api;
pub mod bench;
pub mod blocks;
pub mod config;
pub mod engine;
pub mod executor;
pub mod grammar;
pub mod jobs;
pub mod load;
pub mod scheduler;
pub mod serve;
