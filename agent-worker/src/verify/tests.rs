use std::sync::Mutex;

use espalier_core::spec::VerifyDraft;
use espalier_core::time::Timestamp;
use espalier_core::trace::Decision;

use super::*;

/// Probes whose answers a test writes down.
#[derive(Default)]
struct Scripted {
    page: Option<Result<Value, ProbeError>>,
    tool: String,
    http: Value,
    asked: Mutex<Vec<String>>,
}

impl Probes for Scripted {
    async fn page(&self, script: &str) -> Result<Value, ProbeError> {
        self.asked.lock().unwrap().push(script.to_owned());
        self.page.clone().unwrap()
    }

    async fn mcp_tool(
        &self,
        server: &str,
        tool: &str,
        arguments: &Map<String, Value>,
    ) -> Result<String, ProbeError> {
        self.asked.lock().unwrap().push(format!(
            "{server}/{tool}({})",
            Value::from(arguments.clone())
        ));
        Ok(self.tool.clone())
    }

    async fn mcp_resource(&self, _: &str, uri: &str) -> Result<String, ProbeError> {
        Ok(uri.to_owned())
    }

    async fn http(&self, _: &str, body: &Value) -> Result<Value, ProbeError> {
        self.asked.lock().unwrap().push(body["answer"].to_string());
        Ok(self.http.clone())
    }
}

fn tree(text: Value) -> Verify {
    serde_json::from_value::<VerifyDraft>(text)
        .unwrap()
        .check()
        .unwrap()
}

async fn verdict_of(verify: Value, answer: &str) -> Verdict {
    let evidence = Evidence {
        answer,
        final_url: Some("http://h/confirm?x=1"),
        tool_calls: &[],
    };
    judge(&tree(verify), &evidence, &Offline).await.unwrap()
}

async fn reward(verify: Value, answer: &str) -> f64 {
    verdict_of(verify, answer).await.reward
}

#[tokio::test]
async fn answers_are_compared_by_their_rule() {
    assert_eq!(
        reward(json!({"answer": {"equals": "5"}}), " 5\n").await,
        1.0
    );
    assert_eq!(reward(json!({"answer": {"equals": "5"}}), "5!").await, 0.0);
    assert_eq!(
        reward(json!({"answer": {"contains": "red"}}), "a red one").await,
        1.0
    );
    assert_eq!(
        reward(json!({"answer": {"regex": "^\\d+ items$"}}), "12 items").await,
        1.0
    );
    assert_eq!(
        reward(json!({"answer": {"regex": "^\\d+ items$"}}), "12 items.").await,
        0.0
    );
}

#[tokio::test]
async fn numbers_are_read_as_models_write_them() {
    for (wanted, answer) in [
        (-3.0, "it is \u{2212}3 degrees"),
        (1000.0, "about 1e3 in all"),
        (0.0025, "2.5E-3"),
        (0.0025, "2.5e\u{2212}3 of it"),
        (-1200.0, "-1.2e3."),
        (3.0, "commit 1e3f"),
        (5.0, "it is...5"),
        (0.5, "it is .5"),
    ] {
        let rule = json!({"answer": {"number": wanted, "tolerance": 1e-9}});
        assert_eq!(reward(rule, answer).await, 1.0, "{answer}");
    }
}

#[tokio::test]
async fn the_last_number_counts() {
    let rule = json!({"answer": {"number": 1234.5, "tolerance": 0.1}});
    for good in [
        "It is $1,234.50.",
        "of 3 lamps the price is 1234.55",
        "1,234.5",
    ] {
        assert_eq!(reward(rule.clone(), good).await, 1.0, "{good}");
    }
    for bad in ["1234.5 for 2", "none", "", "-1234.5", "1,2345.9,", "..."] {
        assert_eq!(reward(rule.clone(), bad).await, 0.0, "{bad}");
    }
    assert_eq!(
        reward(json!({"answer": {"number": -3}}), "it is -3 degrees").await,
        1.0
    );
    assert_eq!(
        reward(json!({"answer": {"number": 3}}), "see page-3").await,
        1.0
    );
    assert_eq!(
        reward(json!({"answer": {"number": 12.1}}), "12.10").await,
        1.0
    );
}

#[tokio::test]
async fn json_is_found_in_prose() {
    let rule = json!({"answer": {"json_path": "$.items[*].price", "equals": 5}});
    let prose = "Here you are:\n```json\n{\"items\": [{\"price\": 4}, {\"price\": 5.0}]}\n```";
    assert_eq!(reward(rule.clone(), prose).await, 1.0);
    assert_eq!(reward(rule.clone(), "{\"items\": []}").await, 0.0);
    assert_eq!(reward(rule, "no json {").await, 0.0);
    assert_eq!(
        reward(json!({"answer": {"json_path": "$.a"}}), "[1] {\"a\": null}").await,
        0.0
    );
    assert_eq!(
        reward(json!({"answer": {"json_path": "$.a"}}), "so: {\"a\": null}").await,
        1.0
    );
}

#[tokio::test]
async fn a_call_must_have_been_made_and_have_worked() {
    let record = |name: &str, url: &str, decision, is_error| ToolCallRecord {
        message: 0,
        call_id: "c".into(),
        name: name.into(),
        server: None,
        tool: None,
        arguments: [("url".to_owned(), json!(url)), ("n".to_owned(), json!(5))]
            .into_iter()
            .collect(),
        decision,
        is_error,
        raw: None,
        images: vec![],
        shown_tokens: 0,
        truncated: false,
        started_at_us: Timestamp(0),
        latency_ms: 0,
    };
    let rule = tree(json!({"tool_called": {"name": "browser_*",
        "arguments": {"url": {"contains": "/slow"}, "n": {"equals": "5"}}}}));
    use Decision::{Allowed, Approved, Rejected};
    let cases = [
        ("browser_navigate", "http://h/slow", Allowed, false, 1.0),
        ("browser_navigate", "http://h/slow", Approved, false, 1.0),
        ("browser_navigate", "http://h/fast", Allowed, false, 0.0),
        ("navigate", "http://h/slow", Allowed, false, 0.0),
        ("browser_navigate", "http://h/slow", Rejected, true, 0.0),
        ("browser_navigate", "http://h/slow", Allowed, true, 0.0),
    ];
    for (name, url, decision, is_error, expected) in cases {
        let call = record(name, url, decision, is_error);
        let evidence = Evidence {
            answer: "",
            final_url: None,
            tool_calls: std::slice::from_ref(&call),
        };
        assert_eq!(
            judge(&rule, &evidence, &Offline).await.unwrap().reward,
            expected,
            "{call:?}"
        );
    }
}

#[tokio::test]
async fn combinations_keep_every_reason() {
    let verdict = verdict_of(
        json!({"all": [
            {"url": {"contains": "/confirm"}},
            {"any": [{"answer": {"equals": "no"}}, {"answer": {"equals": "yes"}}]},
            {"weighted": [{"weight": 3.0, "check": {"answer": {"equals": "yes"}}},
                          {"weight": 1.0, "check": {"answer": {"contains": "z"}}}]},
        ]}),
        "yes",
    )
    .await;
    assert_eq!(verdict.reward, 0.75);
    let places: Vec<&str> = verdict.checks.iter().map(|c| c.path.as_str()).collect();
    let expected = [
        "all[0].url",
        "all[1].any[0].answer",
        "all[1].any[1].answer",
        "all[2].weighted[0].answer",
        "all[2].weighted[1].answer",
    ];
    assert_eq!(places, expected);
    assert_eq!(
        verdict.checks[4].reason,
        "the answer does not contain `z`: `yes`"
    );
}

#[tokio::test]
async fn the_world_is_asked_through_probes() {
    let evidence = Evidence {
        answer: "42",
        final_url: None,
        tool_calls: &[],
    };
    let probes = Scripted {
        page: Some(Ok(json!(0.5))),
        tool: "hello world".into(),
        http: json!({"score": 0.25, "reason": "meh"}),
        ..Scripted::default()
    };
    let verify = tree(json!({"all": [
        {"page": {"script": "() => 0.5"}},
        {"mcp": {"server": "notes", "tool": "read", "arguments": {"name": "a"}, "text": {"contains": "world"}}},
        {"mcp": {"server": "notes", "resource": "note://a", "text": {"equals": "note://a"}}},
        {"http": {"url": "http://judge/"}},
    ]}));
    let verdict = judge(&verify, &evidence, &probes).await.unwrap();
    assert_eq!(verdict.reward, 0.25);
    assert_eq!(verdict.checks[3].reason, "meh");
    assert_eq!(
        *probes.asked.lock().unwrap(),
        ["() => 0.5", "notes/read({\"name\":\"a\"})", "\"42\""]
    );
}

#[tokio::test]
async fn a_script_that_throws_scores_nothing_and_a_lost_browser_ends_the_attempt() {
    let evidence = Evidence {
        answer: "",
        final_url: None,
        tool_calls: &[],
    };
    let verify = tree(json!({"page": {"script": "() => x"}}));
    let failing = |class| Scripted {
        page: Some(Err(ProbeError {
            class,
            message: "x is not defined".into(),
        })),
        ..Scripted::default()
    };
    let verdict = judge(&verify, &evidence, &failing(ErrorClass::Handler))
        .await
        .unwrap();
    assert_eq!(
        (verdict.reward, verdict.checks[0].reason.as_str()),
        (0.0, "x is not defined")
    );
    assert_eq!(
        judge(&verify, &evidence, &failing(ErrorClass::Infra))
            .await
            .unwrap_err()
            .class,
        ErrorClass::Infra
    );
    assert_eq!(
        judge(&verify, &evidence, &Offline).await.unwrap_err().class,
        ErrorClass::Invalid
    );
}

#[test]
fn a_weighted_mean_is_a_number_whatever_the_weights() {
    let mean = |weights: &[f64], scores| weighted_mean(weights.iter().copied(), scores);
    assert_eq!(mean(&[3.0, 1.0], &[1.0, 0.0]), 0.75);
    assert_eq!(mean(&[1e308, 1e308], &[1.0, 0.0]), 0.5);
    assert_eq!(mean(&[5e-324, 5e-324], &[1.0, 1.0]), 1.0);
}
