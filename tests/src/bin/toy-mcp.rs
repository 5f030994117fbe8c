//! A stdio MCP server for tests: a few useful tools, and a few that misbehave on request.
//!
//! It speaks just enough JSON-RPC by hand, one request after the other, so that it shares no code with the client
//! under test. Notes live in memory, so each rollout sees its own.
//!
//! | tool | does |
//! |---|---|
//! | `echo{text}` | returns the text |
//! | `add{a,b}` | returns the sum |
//! | `note_write{name,text}`, `note_read{name}` | keeps notes; also the resources `note://{name}` |
//! | `fail{message}` | a tool error |
//! | `sleep{ms}` | answers late, and nothing else meanwhile |
//! | `big{bytes}` | returns that many bytes |
//! | `die{message}` | writes to standard error and exits with 7 |
//! | `flood{}` | writes garbage without an end |
//! | `env{name}` | returns a variable of its environment |

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

/// Exit code of `die`.
const DIED: u8 = 7;

fn main() -> ExitCode {
    let mut notes = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let Ok(request) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        let Some(id) = request
            .get("id")
            .filter(|_| request.get("method").is_some())
        else {
            continue;
        };
        let reply = match answer(&request, &mut notes) {
            Answer::Result(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
            Answer::Error(code, message) => {
                json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}})
            }
            Answer::Die => return ExitCode::from(DIED),
        };
        if send(&reply).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}

enum Answer {
    Result(Value),
    Error(i32, String),
    Die,
}

type Notes = BTreeMap<String, String>;

fn answer(request: &Value, notes: &mut Notes) -> Answer {
    let params = &request["params"];
    match request["method"].as_str().unwrap_or_default() {
        "initialize" => Answer::Result(json!({
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}, "resources": {}},
            "serverInfo": {"name": "toy-mcp", "version": "1.0.0"}
        })),
        "ping" => Answer::Result(json!({})),
        "tools/list" => Answer::Result(json!({"tools": tools()})),
        "tools/call" => call(params, notes),
        "resources/list" => Answer::Result(json!({"resources": resources(notes)})),
        "resources/read" => {
            let uri = params["uri"].as_str().unwrap_or_default();
            match uri.strip_prefix("note://").and_then(|name| notes.get(name)) {
                Some(text) => Answer::Result(json!({"contents": [{"uri": uri, "text": text}]})),
                None => Answer::Error(-32002, format!("no resource {uri}")),
            }
        }
        other => Answer::Error(-32601, format!("no method {other}")),
    }
}

fn call(params: &Value, notes: &mut Notes) -> Answer {
    let arguments = &params["arguments"];
    let word = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
    match params["name"].as_str().unwrap_or_default() {
        "echo" => text(word("text")),
        "add" => match (arguments["a"].as_f64(), arguments["b"].as_f64()) {
            (Some(a), Some(b)) => text((a + b).to_string()),
            _ => Answer::Error(-32602, "a and b must be numbers".to_owned()),
        },
        "note_write" => {
            notes.insert(word("name"), word("text"));
            text("written".to_owned())
        }
        "note_read" => match notes.get(&word("name")) {
            Some(note) => text(note.clone()),
            None => failure(format!("no note {}", word("name"))),
        },
        "fail" => failure(word("message")),
        "sleep" => {
            // A wait for a message that nobody sends.
            let (_sender, receiver) = mpsc::channel::<()>();
            let wait = Duration::from_millis(arguments["ms"].as_u64().unwrap_or_default());
            let _ = receiver.recv_timeout(wait);
            text("awake".to_owned())
        }
        "big" => {
            let bytes = arguments["bytes"]
                .as_u64()
                .and_then(|bytes| usize::try_from(bytes).ok());
            text("x".repeat(bytes.unwrap_or_default()))
        }
        "die" => {
            eprintln!("{}", word("message"));
            Answer::Die
        }
        "flood" => {
            while send_raw(&"not json, not json, ".repeat(1000)).is_ok() {}
            Answer::Die
        }
        "env" => text(
            std::env::vars()
                .find(|(name, _)| *name == word("name"))
                .map(|(_, value)| value)
                .unwrap_or_default(),
        ),
        other => Answer::Error(-32602, format!("no tool {other}")),
    }
}

fn tools() -> Vec<Value> {
    let tool = |name: &str, description: &str, properties: &[(&str, &str)]| {
        let schema: serde_json::Map<String, Value> = properties
            .iter()
            .map(|(key, kind)| ((*key).to_owned(), json!({ "type": kind })))
            .collect();
        let required: Vec<_> = properties.iter().map(|(key, _)| key).collect();
        json!({"name": name, "description": description, "inputSchema":
            {"type": "object", "properties": schema, "required": required}})
    };
    vec![
        tool("echo", "Returns the text.", &[("text", "string")]),
        tool(
            "add",
            "Adds two numbers.",
            &[("a", "number"), ("b", "number")],
        ),
        tool(
            "note_write",
            "Keeps a note.",
            &[("name", "string"), ("text", "string")],
        ),
        tool("note_read", "Reads a note.", &[("name", "string")]),
        tool("fail", "Fails.", &[("message", "string")]),
        tool("sleep", "Answers late.", &[("ms", "integer")]),
        tool("big", "Returns many bytes.", &[("bytes", "integer")]),
        tool("die", "Ends the server.", &[("message", "string")]),
        tool("flood", "Writes garbage without an end.", &[]),
        tool(
            "env",
            "Reads a variable of the environment.",
            &[("name", "string")],
        ),
    ]
}

fn resources(notes: &Notes) -> Vec<Value> {
    notes
        .keys()
        .map(|name| json!({"uri": format!("note://{name}"), "name": name}))
        .collect()
}

fn text(text: String) -> Answer {
    Answer::Result(json!({"content": [{"type": "text", "text": text}]}))
}

fn failure(text: String) -> Answer {
    Answer::Result(json!({"content": [{"type": "text", "text": text}], "isError": true}))
}

fn send(message: &Value) -> std::io::Result<()> {
    send_raw(&format!("{message}\n"))
}

fn send_raw(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
