//! Plays the steps that a prompt line `SCRIPT: […]` gives, one a turn.
//!
//! A step is one of `{"tool": …, "arguments": {…}}`, `{"parallel": [steps with a tool]}` and `{"answer": "…"}`; each
//! may carry a `"think"`. `"arguments"` given as a string is sent as it is, whether it is JSON or not, and `{{last}}`
//! in an answer stands for the newest tool result. Which step is due follows from the conversation alone.

use serde_json::Value;

use super::chat::{Call, Reply, Request, Role};

/// The reply of the script in the newest prompt; `None` when it has none.
pub(super) fn play(request: &Request) -> Option<Reply> {
    let (_, text) = request.prompt().split_once("SCRIPT:")?;
    let parsed = serde_json::Deserializer::from_str(text)
        .into_iter::<Vec<Value>>()
        .next();
    let steps = match parsed {
        Some(Ok(steps)) => steps,
        Some(Err(error)) => {
            return Some(Reply::say(
                "",
                format!("the script cannot be read: {error}"),
            ));
        }
        None => return Some(Reply::say("", "the script is empty")),
    };
    let Some(step) = steps.get(request.turns_since_prompt()) else {
        return Some(Reply::say("", "the script is over"));
    };
    Some(reply(request, step))
}

fn reply(request: &Request, step: &Value) -> Reply {
    let thought = step["think"]
        .as_str()
        .unwrap_or("The next step of the script.");
    if let Some(answer) = step["answer"].as_str() {
        return Reply::say(thought, answer.replace("{{last}}", last_result(request)));
    }
    let calls = match step["parallel"].as_array() {
        Some(steps) => steps.iter().map(|step| call(request, step)).collect(),
        None => vec![call(request, step)],
    };
    Reply {
        thought: thought.to_owned(),
        calls,
        ..Reply::default()
    }
}

fn call(request: &Request, step: &Value) -> Call {
    let arguments = match &step["arguments"] {
        Value::String(raw) => raw.clone(),
        Value::Null => "{}".to_owned(),
        other => other.to_string(),
    };
    Call {
        tool: request.offered(step["tool"].as_str().unwrap_or_default()),
        arguments,
    }
}

fn last_result(request: &Request) -> &str {
    request
        .messages
        .iter()
        .rev()
        .find(|m| m.role == Role::Tool)
        .map_or("", |m| m.content.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PROMPT: &str = r#"Add them.
SCRIPT: [{"tool":"add","arguments":{"a":1,"b":2},"think":"sum"},
 {"parallel":[{"tool":"echo","arguments":"{bad"},{"tool":"fail"}]}, {"answer":"it is {{last}}"}]
FAULT: none of it"#;

    fn at(turns: usize) -> Reply {
        let mut messages = vec![json!({"role": "user", "content": PROMPT})];
        for turn in 0..turns {
            messages.push(json!({"role": "assistant", "content": ""}));
            messages.push(json!({"role": "tool", "content": format!("result {turn}")}));
        }
        let tools = json!([{"function": {"name": "toy__add"}}]);
        play(&Request::parse(
            &json!({"messages": messages, "tools": tools}),
        ))
        .unwrap()
    }

    #[test]
    fn one_step_is_played_a_turn() {
        assert_eq!(at(0).thought, "sum");
        assert_eq!(at(0).calls[0].tool, "toy__add");
        assert_eq!(at(0).calls[0].arguments, r#"{"a":1,"b":2}"#);
        let parallel = at(1).calls;
        assert_eq!(parallel.len(), 2);
        assert_eq!(parallel[0].arguments, "{bad");
        assert_eq!(parallel[1].arguments, "{}");
        assert_eq!(at(2).content, "it is result 1");
        assert_eq!(at(3).content, "the script is over");
    }

    #[test]
    fn a_broken_script_says_so_and_no_script_is_none() {
        let request =
            |text: &str| Request::parse(&json!({"messages": [{"role": "user", "content": text}]}));
        let broken = play(&request("SCRIPT: [{")).unwrap();
        assert!(broken.content.starts_with("the script cannot be read"));
        assert!(play(&request("What is it?")).is_none());
    }
}
