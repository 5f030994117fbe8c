use espalier_core::trace::Trace;
use serde_json::json;

use super::*;

/// A trace of two calls, the second of which extends the first.
fn trace() -> Trace {
    let call = |message: usize, prompt: Value, completion: Value, finish: &str| {
        json!({"message": message, "model": "m", "prompt": prompt, "completion_ids": completion, "finish_reason": finish,
            "prompt_tokens": 3, "completion_tokens": 2, "started_at_us": 0, "latency_ms": 1})
    };
    let calls = [
        call(
            1,
            json!({"keep": 0, "append": [1, 2, 3]}),
            json!([4, 151_645]),
            "stop",
        ),
        call(
            3,
            json!({"extends": 0, "keep": 5, "append": [6]}),
            json!([7]),
            "stop",
        ),
        call(
            5,
            json!({"extends": 1, "keep": 2, "append": [6]}),
            json!([8]),
            "length",
        ),
    ];
    let said = |content: &str| json!({"role": "assistant", "content": content});
    let asked = |content: &str| json!({"role": "user", "content": content});
    let trace = json!({
        "schema_version": 1, "id": "p/b/j@3", "job": "p/b/j", "attempt": 1, "fence": 3, "started_at_us": 1_750_000_000_000_000_u64,
        "task": {"task_id": "t1", "task_kind": "shop", "split": "eval"},
        "labels": {"quality": "good"},
        "provenance": {"espalier_version": "0", "model": "Qwen/Qwen3-4B", "tools_sha256": "", "mcp_servers": [],
            "sampling": {"thinking": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0,
                "presence_penalty": 0.0, "completion_tokens_max": 100}},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        "messages": [asked("a"), said("b"), asked("c"), said("d"), asked("e"), said("f")],
        "model_calls": calls, "tool_calls": [],
        "outcome": {"stop": "answered", "ended_at_us": 0, "verdict": {"reward": 0.5, "checks": []},
            "totals": {"turns": 3, "tool_calls": 2, "tool_errors": 1, "prompt_tokens": 100, "completion_tokens": 20, "wall_ms": 1500}},
    });
    Trace::from_json(trace.to_string().as_bytes()).unwrap()
}

#[test]
fn a_trace_gives_its_facts_and_ids() {
    let source = Source::of_trace(&trace()).unwrap();
    assert_eq!(source.id, "p/b/j@3");
    assert_eq!(source.timestamp, "2025-06-15T15:06:40.000000Z");
    assert_eq!(source.tools[0]["function"]["name"], "f");
    let facts = &source.facts;
    assert_eq!(
        (facts.reward, facts.tokens, facts.wall_s),
        (Some(0.5), 120, 1.5)
    );
    assert_eq!(
        (facts.stop.as_deref(), facts.split),
        (Some("answered"), Some(Split::Eval))
    );
    assert_eq!(source.task_key(), "task:t1");
    let prompts: Vec<_> = source
        .calls
        .iter()
        .map(|call| call.prompt.clone().unwrap())
        .collect();
    assert_eq!(
        prompts,
        [vec![1, 2, 3], vec![1, 2, 3, 4, 151_645, 6], vec![1, 2, 6]]
    );
    let completions: Vec<_> = source
        .calls
        .iter()
        .map(|call| (call.completion.clone(), call.is_ended))
        .collect();
    assert_eq!(
        completions,
        [(vec![4, 151_645], true), (vec![7], true), (vec![8], false)]
    );
}

#[test]
fn prompts_that_do_not_add_up_are_refused() {
    let mut trace = trace();
    trace.model_calls[1].prompt.as_mut().unwrap().extends = Some(7);
    let error = Source::of_trace(&trace).unwrap_err().to_string();
    assert_eq!(
        error,
        "`model_calls[1].prompt.extends` must be an earlier call with a prompt, got 7"
    );
}

#[test]
fn without_a_task_the_question_names_it() {
    let mut source = Source::of_trace(&trace()).unwrap();
    source.facts.task_id = None;
    let key = source.task_key();
    assert!(
        key.starts_with("asked:ca978112ca1bbdcafac231b39a23dc4d"),
        "{key}"
    );
}
