//! Telemetry as a real OTLP receiver sees it: one rollout is one trace, linked to its submission, under the names of
//! the conventions, and without a word of what was said.

use std::collections::BTreeSet;
use std::time::Duration;

use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as Heard;
use espalier_proto::v1::worker_message::Message as Said;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use espalier_runtime::telemetry::names::{attribute, metric, operation, provider, span};
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::model::{self, toy_job};
use espalier_tests::harness::otlp::{Sink, attribute as value_of};
use espalier_tests::harness::serving::{Serving, chat};
use espalier_tests::harness::up::{Up, toy_servers};
use espalier_tests::harness::wait_for;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const DEADLINE: Duration = Duration::from_secs(50);
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const SECRET: &str = "the-quick-brown-secret";

#[tokio::test]
async fn one_rollout_is_one_trace_linked_to_its_submission() {
    let (sink, address) = Sink::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str())];
    let folder = TempDir::new().unwrap();
    let model = model::start().await;
    let mut up = Up::start_in(folder, &toy_servers(), &model, &[], &environment).await;
    let mut client = up.client().await;
    let token = up.file().token;
    let steps = json!([{"tool": "echo", "arguments": {"text": SECRET}}, {"answer": "{{last}}"}]);
    let mut job = toy_job("j", &steps, SECRET);
    job["traceparent"] = TRACEPARENT.into();
    client.submit("b", &[job]).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(result.solved(), 1, "{:?}", result.jobs);
    let trace = client.trace("b", "j").await;
    assert!(up.process.terminate(DEADLINE).await.success());
    // The queue is measured when a process starts, and every few seconds after.
    up.restart().await;
    assert!(up.process.terminate(DEADLINE).await.success());

    let trace_id = trace.header.otel_trace_id;
    let trace_id = trace_id.expect("the trace object names its OpenTelemetry trace");
    check_spans(&sink.spans(), &trace_id);
    let found: BTreeSet<String> = sink.metric_names().into_iter().collect();
    let expected = [
        metric::QUEUE_DEPTH,
        metric::LEASE_GRANTS,
        metric::JOB_FINISHES,
        metric::ROLLOUT_VERDICTS,
        metric::WORKERS_CONNECTED,
        metric::COORDINATOR_READY,
        metric::GEN_AI_TOKEN_USAGE,
        metric::GEN_AI_EXECUTE_TOOL_DURATION,
        metric::ROLLOUT_TURNS,
    ];
    for name in expected {
        assert!(found.contains(name), "{name} is not in {found:?}");
    }
    let solved = sink.largest(metric::ROLLOUT_VERDICTS, attribute::VERDICT, "solved");
    assert_eq!(solved, Some(1.0));
    assert!(!sink.log_texts().is_empty(), "logs are exported too");
    for secret in [SECRET, token.as_str()] {
        assert!(
            !format!("{:?}{:?}", sink.spans(), sink.log_texts()).contains(secret),
            "what was said is not telemetry"
        );
        assert!(!up.process.log().contains(secret), "nor is it logged");
    }
}

/// The rollout, its calls and its end are spans of the trace that the trace object names, linked to the submission.
fn check_spans(spans: &[Span], trace_id: &str) {
    let of_operation = |name: &str| -> Vec<&Span> {
        let fits = |span: &&Span| {
            let operation = value_of(&span.attributes, attribute::GEN_AI_OPERATION_NAME);
            operation.as_deref() == Some(name)
        };
        spans.iter().filter(fits).collect()
    };
    let rollout = of_operation(operation::INVOKE_AGENT);
    assert_eq!(rollout.len(), 1, "{:?}", names(spans));
    assert_eq!(hex(&rollout[0].trace_id), trace_id);
    let chats = of_operation(operation::CHAT);
    let tools = of_operation(operation::EXECUTE_TOOL);
    assert_eq!((chats.len(), tools.len()), (2, 1));
    let mut calls = chats.iter().chain(&tools);
    assert!(
        calls.all(|span| hex(&span.trace_id) == trace_id),
        "one rollout is one trace"
    );
    let tool = value_of(&tools[0].attributes, attribute::GEN_AI_TOOL_NAME);
    assert_eq!(tool.as_deref(), Some("echo"));
    let model = value_of(&chats[0].attributes, attribute::GEN_AI_REQUEST_MODEL);
    assert_eq!(model.as_deref(), Some("scripted"));

    let own = |span: &&Span| hex(&span.trace_id) == trace_id;
    for name in [span::VERIFY, span::PUBLISH] {
        let found = spans.iter().filter(own).filter(|s| s.name == name).count();
        let all = names(spans);
        assert_eq!(found, 1, "{name} is a part of the rollout's trace: {all:?}");
    }
    let links = spans.iter().filter(own).flat_map(|span| &span.links);
    let linked: Vec<String> = links.map(|link| hex(&link.trace_id)).collect();
    assert!(
        linked.contains(&TRACEPARENT[3..35].to_owned()),
        "the lease links to the submission: {linked:?}"
    );
}

/// Waits until the receiver has seen more than `least` of `name` for the project.
async fn wait_for_more(sink: &Sink, name: &str, least: f64) {
    let what = format!("{name} to be more than {least}");
    wait_for(&what, DEADLINE, || async {
        let largest = sink.largest(name, attribute::PROJECT, "default");
        let enough = largest.is_some_and(|value| value > least);
        enough.then_some(()).ok_or(largest)
    })
    .await;
}

#[tokio::test]
async fn a_lease_that_ends_a_result_that_comes_late_and_a_job_that_waits_are_seen() {
    let (sink, address) = Sink::start().await;
    let cluster = Cluster::start_observed("http://127.0.0.1:1/v1", 500, &address).await;
    let job = toy_job("j", &json!([{"answer": "done"}]), "done");
    cluster.client().await.submit("b", &[job]).await;

    // A worker that takes the job and says no more until its lease has ended.
    let (say, said) = mpsc::channel(4);
    let tell = async |message| {
        let message = Some(message);
        say.send(v1::WorkerMessage { message }).await.unwrap();
    };
    let kind = v1::JobKind::Rollout.into();
    tell(Said::Hello(v1::Hello {
        worker: "late".to_owned(),
        tags: vec!["mcp:toy".to_owned()],
        kinds: vec![kind],
        capacity: 1,
        ..v1::Hello::default()
    }))
    .await;
    tell(Said::Credit(v1::Credit { kind, jobs: 1 })).await;
    let mut worker = WorkerServiceClient::new(cluster.worker_channel());
    let session = worker.session(ReceiverStream::new(said)).await;
    let mut heard = session.unwrap().into_inner();
    let lease = granted(&mut heard).await;
    for late in [metric::LEASE_EXPIRIES, metric::LEASE_STALE_FENCES] {
        assert_eq!(sink.largest(late, attribute::PROJECT, "default"), None);
    }
    wait_for_more(&sink, metric::LEASE_EXPIRIES, 0.0).await;

    let outcome = v1::result::Outcome::Released(v1::Released::default());
    let result = v1::Result {
        lease: Some(lease),
        outcome: Some(outcome),
    };
    let results = vec![result];
    tell(Said::Results(v1::Results { results })).await;
    wait_for_more(&sink, metric::LEASE_STALE_FENCES, 0.0).await;
    // The job is ready again, and nobody takes it.
    wait_for_more(&sink, metric::QUEUE_OLDEST_READY_AGE, 1.0).await;
    wait_for_more(&sink, metric::QUEUE_DEPTH, 0.0).await;
}

#[tokio::test]
async fn what_workers_cost_and_what_tokens_are_worth_is_told() {
    let (sink, address) = Sink::start().await;
    let more = format!(
        "[telemetry]\notlp_endpoint = {address:?}\nmetric_interval_s = 1\n\
         [prices]\nbudget_per_day = 20.0\nmodels.scripted = {{ input = 0.5, output = 2.0 }}\n\
         workers.train = 3600.0\n"
    );
    let cluster = Cluster::start_with(Setup {
        more,
        ..Setup::new("embedded", "http://127.0.0.1:1/v1")
    })
    .await;
    let mut worker = cluster.train_worker("trainer");
    let largest = |name: &str, key: &str, value: &str| sink.largest(name, key, value);
    // A dollar a second.
    wait_for("some seconds of the worker", DEADLINE, || {
        let cost = largest(metric::COST_WORKERS, attribute::JOB_KIND, "train");
        async move { cost.filter(|cost| *cost > 2.0).ok_or(cost) }
    })
    .await;
    let connected = |kind| largest(metric::WORKERS_CONNECTED, attribute::JOB_KIND, kind);
    assert_eq!(
        (connected("train"), connected("rollout")),
        (Some(1.0), Some(0.0))
    );
    let price = |kind| largest(metric::COST_TOKEN_PRICE, attribute::GEN_AI_TOKEN_TYPE, kind);
    assert_eq!((price("input"), price("output")), (Some(5e-7), Some(2e-6)));
    let rollouts = largest(metric::COST_WORKERS, attribute::JOB_KIND, "rollout");
    assert_eq!(rollouts, None, "what has no price costs nothing");
    let names = sink.metric_names();
    assert!(
        names.iter().any(|name| name == metric::COST_BUDGET),
        "{names:?}"
    );
    assert!(worker.terminate(DEADLINE).await.success());
}

/// The lease of the first job that the worker is given.
async fn granted(heard: &mut Streaming<v1::CoordinatorMessage>) -> v1::Lease {
    let grant = async {
        loop {
            let message = heard.message().await.expect("the session lives");
            let message = message.expect("the session goes on");
            if let Some(Heard::Grants(grants)) = message.message {
                return grants.grants[0].lease.clone().expect("a grant has a lease");
            }
        }
    };
    let grant = tokio::time::timeout(DEADLINE, grant).await;
    grant.expect("the job is granted")
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
    assert_eq!(client.wait("b", DEADLINE).await.solved(), 1);
    let ended = up.process.terminate(DEADLINE).await;
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

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|s| s.name.as_str()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The spans that continue the caller's trace.
fn continued(spans: &[Span]) -> Vec<&Span> {
    let (trace, parent) = (&TRACEPARENT[3..35], &TRACEPARENT[36..52]);
    let fits = |span: &&Span| hex(&span.trace_id) == trace && hex(&span.parent_span_id) == parent;
    spans.iter().filter(fits).collect()
}

#[tokio::test]
async fn a_request_to_a_model_is_a_span_of_its_callers_trace() {
    let (sink, address) = Sink::start().await;
    let mut serving = Serving::start(&["--otlp-traces-endpoint", &address]).await;
    let words = format!("{SECRET} ").repeat(20);
    for more in [
        json!({}),
        json!({"stream": true}),
        json!({"temperature": -1}),
    ] {
        let request = serving.post("/v1/chat/completions", &chat(&words, more));
        let answer = request.header("traceparent", TRACEPARENT).send().await;
        answer.unwrap().bytes().await.unwrap();
    }
    assert!(serving.process.terminate(DEADLINE).await.success());

    let spans = sink.spans();
    let spans = continued(&spans);
    let of = |span: &Span, name: &str| value_of(&span.attributes, name);
    let (failed, answered): (Vec<&Span>, Vec<&Span>) = spans
        .into_iter()
        .partition(|span| of(span, attribute::ERROR_TYPE).is_some());
    assert_eq!((answered.len(), failed.len()), (2, 1));
    for span in answered {
        assert_eq!((&*span.name, span.kind()), ("chat tiny", SpanKind::Server));
        for (name, value) in [
            (attribute::GEN_AI_OPERATION_NAME, operation::CHAT),
            (attribute::GEN_AI_PROVIDER_NAME, provider::ESPALIER),
            (attribute::GEN_AI_REQUEST_MODEL, "tiny"),
            (attribute::GEN_AI_RESPONSE_MODEL, "tiny"),
            (attribute::GEN_AI_USAGE_OUTPUT_TOKENS, "12"),
        ] {
            assert_eq!(of(span, name).as_deref(), Some(value), "{name}");
        }
        let reasons = of(span, attribute::GEN_AI_RESPONSE_FINISH_REASONS).unwrap();
        assert!(reasons.contains("length"), "{reasons}");
    }
    assert_eq!(of(failed[0], attribute::ERROR_TYPE).as_deref(), Some("400"));
    for (name, times) in [
        (metric::GEN_AI_SERVER_REQUEST_DURATION, 3),
        (metric::GEN_AI_SERVER_TIME_TO_FIRST_TOKEN, 2),
        (metric::GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN, 2),
    ] {
        assert_eq!(sink.recorded(name), times, "{name}");
    }
    let largest = |name: &str| sink.largest(name, attribute::GEN_AI_REQUEST_MODEL, "tiny");
    for name in [
        metric::INFER_WAITING,
        metric::INFER_RUNNING,
        metric::INFER_BATCH_ROWS,
        metric::INFER_KV_USED,
        metric::INFER_PREEMPTIONS,
    ] {
        assert!(largest(name).is_some(), "{name}");
    }
    // The second prompt found the first one's blocks.
    let hits = largest(metric::INFER_PREFIX_HITS).unwrap();
    let queries = largest(metric::INFER_PREFIX_QUERIES).unwrap();
    assert!(hits > 0.0 && hits < queries, "{hits} of {queries}");
    let told = format!("{:?}{:?}", sink.spans(), sink.log_texts());
    assert!(!told.contains(SECRET) && !serving.process.log().contains(SECRET));
}
