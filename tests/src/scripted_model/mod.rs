//! The scripted model: an OpenAI-compatible server that plays rules where a language model would think.
//!
//! It reads the newest accessibility snapshot out of the conversation, as a model does, and knows nothing else of the
//! practice site: no state is kept between requests, so a conversation can be resumed, replayed or cut anywhere. It
//! errs on purpose, as a pure function of its seed, the prompt, the turn and the request's sampling seed. A prompt
//! line `SCRIPT: […]` plays given steps instead, and faults can be ordered by a prompt line `FAULT: …` or over
//! `/control`. It is no model: what it cannot parse it does not understand. The demo and the tests run it.

mod chat;
mod faults;
mod history;
mod http;
#[cfg(test)]
mod http_tests;
mod mistakes;
mod policy;
mod script;
mod snapshot;
mod wire;

use std::future::Future;

use tokio::net::TcpListener;

pub use faults::{Fault, Order};
pub use http::Counters;

/// How a scripted model behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Decides which turns go wrong.
    pub seed: u64,
    /// Share of turns that go wrong, 0 to 1.
    pub mistakes: f64,
    /// Time to pretend to think before each answer.
    pub think_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 7,
            mistakes: 0.15,
            think_ms: 0,
        }
    }
}

/// Serves the model on `listener` until `shutdown` resolves. Answers that are hanging on purpose are dropped then.
pub async fn serve(
    listener: TcpListener,
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> std::io::Result<()> {
    tokio::select! {
        ended = async { axum::serve(listener, http::router(config)).await } => ended,
        () = shutdown => Ok(()),
    }
}

/// Decides one turn for a request body of `/v1/chat/completions`, without mistakes, faults or HTTP: the assistant
/// message that it would send.
pub fn answer(request: &serde_json::Value) -> serde_json::Value {
    let request = chat::Request::parse(request);
    let reply = http::decide(&request);
    wire::message(&reply, "reasoning_content")
}
