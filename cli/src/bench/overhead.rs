//! What a turn costs beside model and tools, read from stored traces.
//!
//! A turn goes from the start of its model call to the start of the next one. The model call and the tool calls of
//! the turn, which are answered one after the other, have their own durations in the trace; what is left is ours:
//! recording durably, shaping, building the next request. Durations are whole milliseconds, rounded down, so each
//! call adds up to 1 ms to what counts as ours and nothing is taken from it.
//!
//! What happens inside a call and is ours too (the request's JSON, the MCP client) counts as the call's. The last turn
//! of a trace has no next model call and is left out: judging and publishing follow it.

use espalier_core::trace::{ModelCall, Trace};

/// The bound of the issue: this much a turn,
const BOUND_BASE_US: f64 = 5_000.0;
/// and this much a character of the turn's tool results (0.6 ms per 1,000 characters).
const BOUND_CHAR_US: f64 = 0.6;

/// What one turn cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    /// Beside model and tools.
    pub ours_us: u64,
    /// Characters of the turn's tool results, as the model was shown them: at most those of the raw results, so the
    /// bound made of them is the stricter one.
    pub result_chars: usize,
}

impl Turn {
    /// The cost as a share of what it may be.
    pub fn share_of_bound(&self) -> f64 {
        self.ours_us as f64 / (BOUND_BASE_US + BOUND_CHAR_US * self.result_chars as f64)
    }
}

/// The turns of a trace that called tools and were followed by another one.
pub fn turns(trace: &Trace) -> Vec<Turn> {
    let pairs = trace.model_calls.windows(2);
    pairs
        .filter_map(|pair| turn(trace, &pair[0], &pair[1]))
        .collect()
}

fn turn(trace: &Trace, call: &ModelCall, next: &ModelCall) -> Option<Turn> {
    let tools: Vec<_> = trace
        .tool_calls
        .iter()
        .filter(|tool| (call.message..next.message).contains(&tool.message))
        .collect();
    if tools.is_empty() {
        return None;
    }
    let elsewhere_ms: u64 = tools.iter().map(|tool| tool.latency_ms).sum();
    let whole_us = next.started_at_us.0.checked_sub(call.started_at_us.0)?;
    let shown = |message: usize| trace.messages.get(message).map_or("", |m| m.content());
    Some(Turn {
        ours_us: whole_us.saturating_sub((call.latency_ms + elsewhere_ms) * 1_000),
        result_chars: tools
            .iter()
            .map(|tool| shown(tool.message).chars().count())
            .sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A trace of three model calls; the first calls two tools, the second one, the third answers.
    fn trace() -> Trace {
        let model = |message: usize, started: u64| {
            json!({"message": message, "model": "m", "finish_reason": "stop", "prompt_tokens": 0,
                "completion_tokens": 0, "started_at_us": started, "latency_ms": 10})
        };
        let tool = |message: usize, started: u64, latency: u64| {
            json!({"message": message, "call_id": "c", "name": "t", "arguments": {}, "decision": "allowed",
                "is_error": false, "shown_tokens": 1, "truncated": false, "started_at_us": started,
                "latency_ms": latency})
        };
        let says = json!({"role": "assistant", "content": ""});
        let result = |chars: usize| json!({"role": "tool", "tool_call_id": "c", "content": "ä".repeat(chars)});
        let sampling = json!({"thinking": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0,
            "presence_penalty": 0.0, "completion_tokens_max": 64});
        let trace = json!({
            "schema_version": 1, "id": "x", "job": "p/b/j", "attempt": 1, "fence": 1, "started_at_us": 0,
            "task": {}, "tools": [],
            "provenance": {"espalier_version": "0", "model": "m", "sampling": sampling,
                "tools_sha256": "", "mcp_servers": []},
            "messages": [{"role": "user", "content": "hi"}, says, result(600), result(400), says, result(0), says],
            "model_calls": [model(1, 1_000_000), model(4, 1_050_000), model(6, 1_070_000)],
            "tool_calls": [tool(2, 1_012_000, 20), tool(3, 1_034_000, 14), tool(5, 1_062_000, 7)],
            "outcome": {"stop": "answered", "ended_at_us": 2_000_000, "totals": espalier_core::trace::Totals::default()},
        });
        serde_json::from_value(trace).unwrap()
    }

    #[test]
    fn ours_is_what_model_and_tools_leave() {
        let turns = turns(&trace());
        let expected = [(6_000, 1_000), (3_000, 0)];
        assert_eq!(
            turns
                .iter()
                .map(|t| (t.ours_us, t.result_chars))
                .collect::<Vec<_>>(),
            expected
        );
        assert!((turns[0].share_of_bound() - 6.0 / 5.6).abs() < 1e-9);
    }

    #[test]
    fn a_turn_without_tools_is_left_out() {
        let mut trace = trace();
        trace.tool_calls.clear();
        assert!(turns(&trace).is_empty());
    }
}
