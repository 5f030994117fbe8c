//! Telemetry: structured logs on stderr, and traces, metrics and logs over OTLP where an endpoint is configured.

mod metrics;
pub mod names;

use std::error::Error;

pub use metrics::{Metrics, metrics};

/// An error and everything beneath it in one line, for the one place that logs it.
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
