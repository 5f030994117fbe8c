//! Telemetry as a real OTLP receiver sees it: one rollout is one trace, linked to its submission, under the names of
//! the conventions, and without a word of what was said.

use std::collections::BTreeSet;
use std::time::Duration;

use espalier_runtime::telemetry::names::{attribute, metric, operation, span};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::otlp::{Sink, attribute as value_of};
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::json;
use tempfile::TempDir;

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const SECRET: &str = "the-quick-brown-secret";

#[tokio::test]
async fn one_rollout_is_one_trace_linked_to_its_submission() {
    let (sink, address) = Sink::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str())];
    let folder = TempDir::new().unwrap();
    let mut up = Up::start_in(
        folder,
        &toy_servers(),
        &model::start().await,
        &[],
        &environment,
    )
    .await;
    let mut client = up.client().await;
    let token = up.file().token;
    let steps = json!([{"tool": "echo", "arguments": {"text": SECRET}}, {"answer": "{{last}}"}]);
    let mut job = toy_job("j", &steps, SECRET);
    job["traceparent"] = TRACEPARENT.into();
    client.submit("b", &[job]).await;
    let result = client.wait("b", Duration::from_secs(60)).await;
    assert_eq!(result.solved(), 1, "{:?}", result.jobs);
    let trace = client.trace("b", "j").await;
    assert!(
        up.process
            .terminate(Duration::from_secs(60))
            .await
            .success()
    );
    // The queue is measured when a process starts, and every few seconds after.
    up.restart().await;
    assert!(
        up.process
            .terminate(Duration::from_secs(60))
            .await
            .success()
    );

    let spans = sink.spans();
    let of_operation = |name: &str| {
        let fits = |s: &&_| {
            value_of(attributes_of(s), attribute::GEN_AI_OPERATION_NAME).as_deref() == Some(name)
        };
        spans.iter().filter(fits).collect::<Vec<_>>()
    };
    let rollout = of_operation(operation::INVOKE_AGENT);
    assert_eq!(rollout.len(), 1, "{:?}", names(&spans));
    let trace_id = &rollout[0].trace_id;
    assert_eq!(
        hex(trace_id),
        trace
            .header
            .otel_trace_id
            .expect("the trace object names its OpenTelemetry trace")
    );
    let (chats, tools) = (
        of_operation(operation::CHAT),
        of_operation(operation::EXECUTE_TOOL),
    );
    assert_eq!((chats.len(), tools.len()), (2, 1));
    assert!(
        chats.iter().chain(&tools).all(|s| s.trace_id == *trace_id),
        "one rollout is one trace"
    );
    assert_eq!(
        value_of(&tools[0].attributes, attribute::GEN_AI_TOOL_NAME).as_deref(),
        Some("echo")
    );
    assert_eq!(
        value_of(&chats[0].attributes, attribute::GEN_AI_REQUEST_MODEL).as_deref(),
        Some("scripted")
    );
    for name in [span::VERIFY, span::PUBLISH] {
        let found = spans
            .iter()
            .filter(|s| s.name == name && s.trace_id == *trace_id)
            .count();
        assert_eq!(
            found,
            1,
            "{name} is a part of the rollout's trace: {:?}",
            names(&spans)
        );
    }
    let linked = spans
        .iter()
        .filter(|s| s.trace_id == *trace_id)
        .flat_map(|s| &s.links);
    let linked: Vec<String> = linked.map(|link| hex(&link.trace_id)).collect();
    assert!(
        linked.contains(&TRACEPARENT[3..35].to_owned()),
        "the lease links to the submission: {linked:?}"
    );

    let found: BTreeSet<String> = sink.metric_names().into_iter().collect();
    let expected = [
        metric::QUEUE_DEPTH,
        metric::LEASE_GRANTS,
        metric::JOB_FINISHES,
        metric::GEN_AI_TOKEN_USAGE,
        metric::GEN_AI_EXECUTE_TOOL_DURATION,
        metric::ROLLOUT_TURNS,
    ];
    for name in expected {
        assert!(found.contains(name), "{name} is not in {found:?}");
    }
    assert!(!sink.log_texts().is_empty(), "logs are exported too");
    for secret in [SECRET, token.as_str()] {
        assert!(
            !format!("{spans:?}{:?}", sink.log_texts()).contains(secret),
            "what was said is not telemetry"
        );
        assert!(!up.process.log().contains(secret), "nor is it logged");
    }
}

#[tokio::test]
async fn a_job_without_a_trace_context_links_to_the_call_that_brought_it() {
    let (sink, address) = Sink::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str())];
    let folder = TempDir::new().unwrap();
    let model = model::start().await;
    let mut up = Up::start_in(folder, &toy_servers(), &model, &[], &environment).await;
    let mut client = up.client().await;
    let job = toy_job("j", &json!([{"answer": "done"}]), "done");
    client.submit("b", &[job]).await;
    assert_eq!(client.wait("b", Duration::from_secs(60)).await.solved(), 1);
    let ended = up.process.terminate(Duration::from_secs(60)).await;
    assert!(ended.success());

    let spans = sink.spans();
    let submit: Vec<_> = spans.iter().filter(|s| s.name == span::SUBMIT).collect();
    assert_eq!(submit.len(), 1, "{:?}", names(&spans));
    let chat = spans.iter().find(|s| {
        value_of(&s.attributes, attribute::GEN_AI_PROVIDER_NAME).as_deref() == Some("openai")
    });
    let rollout = &chat.expect("a model call").trace_id;
    let links = spans
        .iter()
        .filter(|s| s.trace_id == *rollout)
        .flat_map(|s| &s.links);
    let linked: Vec<&[u8]> = links.map(|link| link.span_id.as_slice()).collect();
    assert!(linked.contains(&submit[0].span_id.as_slice()), "{linked:?}");
}

fn attributes_of(
    span: &opentelemetry_proto::tonic::trace::v1::Span,
) -> &[opentelemetry_proto::tonic::common::v1::KeyValue] {
    &span.attributes
}

fn names(spans: &[opentelemetry_proto::tonic::trace::v1::Span]) -> Vec<&str> {
    spans.iter().map(|s| s.name.as_str()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
