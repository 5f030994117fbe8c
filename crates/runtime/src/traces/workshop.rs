//! The workshop's trace files, `{id?, timestamp, model, messages, tools}`: read into traces of ours, and written
//! again.
//!
//! The file says less than a trace: no token ids, no times of calls, no verdict. Reading mends what its writer got
//! wrong: `arguments` become objects (text that is none is kept as `malformed`), and whitespace alone becomes "".
//! Writing gives `arguments` as JSON text again, as OpenAI's API and the workshop's tools expect it; a system message
//! keeps its mark as a hint, so that reading back what was written gives the same conversation.

use chrono::{DateTime, NaiveDateTime, Utc};
use espalier_core::chat::{self, Message, ToolCall, ToolDef};
use espalier_core::error::FieldError;
use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::{Sampling, Task};
use espalier_core::time::Timestamp;
use espalier_core::trace::{
    Decision, Header, Outcome, Provenance, SCHEMA_VERSION, StopReason, ToolCallRecord, Totals,
    Trace, sha256_hex,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Largest file that is read, in bytes: the largest known one has 100 KiB.
pub const FILE_BYTES_MAX: usize = 64 << 20;
/// How the workshop writes a time, taken as UTC.
const TIME_FORMAT: &str = "%Y%m%d_%H%M%S";
/// What the workshop's agent told the model when its user said no.
const REJECTED: &str = "User rejected tool call.";

/// The file as it is written.
#[derive(Debug, Serialize)]
struct Written<'t> {
    id: &'t str,
    timestamp: String,
    model: &'t str,
    messages: Vec<Value>,
    tools: &'t [ToolDef],
}

/// The file as it is found. Unknown keys are ignored: the files come from many hands.
#[derive(Debug, Deserialize)]
struct Found {
    #[serde(default)]
    id: Option<String>,
    timestamp: String,
    model: String,
    messages: Vec<Value>,
    #[serde(default)]
    tools: Vec<Value>,
}

/// The trace in the workshop's form.
pub fn write(trace: &Trace) -> Value {
    let written = Written {
        id: &trace.header.id,
        timestamp: write_time(trace.header.started_at_us),
        model: &trace.header.provenance.model,
        messages: trace.messages.iter().map(write_message).collect(),
        tools: &trace.header.tools,
    };
    json!(written)
}

fn write_message(message: &Message) -> Value {
    let mut value = json!(message);
    if let Message::Assistant { tool_calls, .. } = message
        && !tool_calls.is_empty()
    {
        value["tool_calls"] = tool_calls.iter().map(write_call).collect();
    }
    value
}

fn write_call(call: &ToolCall) -> Value {
    let function = &call.function;
    let arguments = match &function.malformed {
        Some(text) => text.clone(),
        None => Value::Object(function.arguments.clone()).to_string(),
    };
    json!({
        "id": call.id,
        "type": "function",
        "function": {"name": function.name, "arguments": arguments},
    })
}

/// Reads one file as the trace of `job`. `sampling` stands in for what the file does not say.
///
/// # Errors
/// Names the part of the file that is not in the workshop's form.
pub fn read(bytes: &[u8], job: JobKey, sampling: Sampling) -> Result<Trace, FieldError> {
    if bytes.len() > FILE_BYTES_MAX {
        let rule = format!("must have at most {FILE_BYTES_MAX} bytes");
        return Err(FieldError::new("file", bytes.len(), rule));
    }
    let found: Found = serde_json::from_slice(bytes).map_err(|error| {
        let rule = format!("must be {{timestamp, model, messages, tools}}: {error}");
        FieldError::new("file", String::from_utf8_lossy(bytes), rule)
    })?;
    let started = read_time(&found.timestamp)?;
    let messages = chat::read_messages(&Value::Array(found.messages))?;
    let tools = chat::read_tools(&Value::Array(found.tools))?;
    let tool_calls = call_records(&messages, started);
    let fence = Fence(1);
    Ok(Trace {
        header: Header {
            schema_version: SCHEMA_VERSION,
            id: found.id.unwrap_or_else(|| format!("{job}@{fence}")),
            job,
            attempt: 1,
            fence,
            started_at_us: started,
            otel_trace_id: None,
            task: Task::default(),
            labels: Default::default(),
            provenance: provenance(found.model, sampling, &tools),
            tools,
            verify: None,
        },
        outcome: outcome(&messages, &tool_calls, started),
        messages,
        model_calls: Vec::new(),
        tool_calls,
    })
}

fn provenance(model: String, sampling: Sampling, tools: &[ToolDef]) -> Provenance {
    Provenance {
        espalier_version: env!("CARGO_PKG_VERSION").to_owned(),
        model,
        sampling,
        tools_sha256: sha256_hex(json!(tools).to_string().as_bytes()),
        mcp_servers: Vec::new(),
        browser: None,
        tokenizer_sha256: None,
        replay: Vec::new(),
    }
}

fn outcome(messages: &[Message], calls: &[ToolCallRecord], started: Timestamp) -> Outcome {
    let answered = matches!(messages.last(), Some(Message::Assistant { tool_calls, .. }) if tool_calls.is_empty());
    let turns = messages.iter().filter(|m| m.role() == "assistant").count();
    let errors = calls.iter().filter(|call| call.is_error).count();
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Outcome {
        stop: if answered {
            StopReason::Answered
        } else {
            StopReason::UserExit
        },
        ended_at_us: started,
        final_url: None,
        verdict: None,
        totals: Totals {
            turns: small(turns),
            tool_calls: small(calls.len()),
            tool_errors: small(errors),
            ..Totals::default()
        },
    }
}

/// What the conversation alone says of its tool calls; times and sizes are unknown and stay 0.
fn call_records(messages: &[Message], started: Timestamp) -> Vec<ToolCallRecord> {
    let mut records = Vec::new();
    let calls: Vec<&ToolCall> = messages
        .iter()
        .filter_map(|message| match message {
            Message::Assistant { tool_calls, .. } => Some(tool_calls),
            _ => None,
        })
        .flatten()
        .collect();
    for (index, message) in messages.iter().enumerate() {
        let Message::Tool {
            tool_call_id,
            content,
        } = message
        else {
            continue;
        };
        let Some(call) = calls.iter().find(|call| call.id == *tool_call_id) else {
            continue;
        };
        let decision = decision(call, content);
        records.push(ToolCallRecord {
            message: index,
            call_id: call.id.clone(),
            name: call.function.name.clone(),
            server: None,
            tool: None,
            arguments: call.function.arguments.clone(),
            is_error: decision != Decision::Allowed,
            decision,
            raw: None,
            images: Vec::new(),
            shown_tokens: 0,
            truncated: false,
            started_at_us: started,
            latency_ms: 0,
        });
    }
    records
}

fn decision(call: &ToolCall, answer: &str) -> Decision {
    if answer == REJECTED {
        Decision::Rejected
    } else if answer == format!("Tool {} not found", call.function.name) {
        Decision::Unknown
    } else if call.function.malformed.is_some() {
        Decision::Malformed
    } else {
        Decision::Allowed
    }
}

fn read_time(text: &str) -> Result<Timestamp, FieldError> {
    let time = NaiveDateTime::parse_from_str(text, TIME_FORMAT)
        .map(|naive| naive.and_utc())
        .or_else(|_| DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Utc)));
    time.ok()
        .and_then(|time| u64::try_from(time.timestamp_micros()).ok())
        .map(Timestamp)
        .ok_or_else(|| {
            let rule = "must be YYYYMMDD_HHMMSS or RFC 3339, from 1970 on";
            FieldError::new("timestamp", text, rule)
        })
}

fn write_time(time: Timestamp) -> String {
    i64::try_from(time.0)
        .ok()
        .and_then(DateTime::from_timestamp_micros)
        .map(|time| time.format(TIME_FORMAT).to_string())
        .unwrap_or_default()
}
