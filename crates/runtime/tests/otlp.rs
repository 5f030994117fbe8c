//! Telemetry against a real OTLP receiver. One test, in a process of its own, because telemetry starts once.

#![expect(clippy::unwrap_used, reason = "the receiver is part of the test")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use espalier_runtime::telemetry::{self, TelemetryConfig, TelemetryError, names};
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{
    LogsService, LogsServiceServer,
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing::Instrument;

const LIMIT: Duration = Duration::from_secs(10);

/// Keeps whatever arrives.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Received>>);

#[derive(Default)]
struct Received {
    spans: Vec<Span>,
    metrics: Vec<Metric>,
    logs: Vec<LogRecord>,
    resources: Vec<Vec<KeyValue>>,
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = self.0.lock().unwrap();
        for group in request.into_inner().resource_spans {
            received
                .resources
                .extend(group.resource.map(|resource| resource.attributes));
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.spans.extend(spans);
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let groups = request.into_inner().resource_metrics.into_iter();
        let metrics = groups
            .flat_map(|group| group.scope_metrics)
            .flat_map(|scope| scope.metrics);
        self.0.lock().unwrap().metrics.extend(metrics);
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let groups = request.into_inner().resource_logs.into_iter();
        let logs = groups
            .flat_map(|group| group.scope_logs)
            .flat_map(|scope| scope.log_records);
        self.0.lock().unwrap().logs.extend(logs);
        Ok(Response::new(Default::default()))
    }
}

async fn serve(sink: Sink, tasks: &Tasks) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(sink.clone()))
        .add_service(MetricsServiceServer::new(sink.clone()))
        .add_service(LogsServiceServer::new(sink))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tasks.spawn("sink", OnFailure::Log, server);
    endpoint
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_metrics_and_logs_arrive() {
    let (sink, tasks) = (Sink::default(), Tasks::new(Shutdown::new()));
    let endpoint = serve(sink.clone(), &tasks).await;
    let config = TelemetryConfig {
        otlp_endpoint: Some(endpoint),
        log_filter: "off".to_owned(),
        resource: [("deployment".to_owned(), "test".to_owned())].into(),
        ..TelemetryConfig::default()
    };
    let running = telemetry::init(&config, "espalier-test").unwrap();
    let again = telemetry::init(&TelemetryConfig::default(), "espalier-test");
    assert!(matches!(again, Err(TelemetryError::AlreadyStarted)));

    let submission = tracing::info_span!("submit");
    let cause = submission.in_scope(telemetry::inject_traceparent).unwrap();
    let attempt = tracing::info_span!("attempt", { names::attribute::JOB } = "j1");
    telemetry::link_to(&attempt, cause);
    let child = tracing::info_span!("chat");
    telemetry::continue_from(&child, cause);
    let reasons = names::attribute::GEN_AI_RESPONSE_FINISH_REASONS;
    telemetry::record_texts(&child, reasons, &["stop"]);
    async { tracing::warn!(job_id = "j1", "lease expired") }
        .instrument(attempt.clone())
        .await;
    tracing::warn!(target: "h2::client", "the transport talks about itself");
    tracing::debug!("not for export");
    drop((submission, attempt, child));
    telemetry::metrics().wait_timed_out("test.wait");

    running.flush(LIMIT).await;
    running.shutdown(LIMIT).await;
    assert_all_arrived(&sink.0.lock().unwrap(), &cause.trace_id());
}

fn assert_all_arrived(received: &Received, trace_id: &str) {
    let span = |name: &str| {
        let found = received.spans.iter().find(|span| span.name == name);
        found.unwrap_or_else(|| panic!("no span {name}"))
    };
    assert_eq!(received.spans.len(), 3);
    let submission = span(names::span::SUBMIT);
    assert_eq!(hex(&submission.trace_id), trace_id);
    let attempt = span(names::span::ATTEMPT);
    assert_ne!(attempt.trace_id, submission.trace_id);
    assert_eq!(attempt.links[0].span_id, submission.span_id);
    assert_eq!(text(&attempt.attributes, names::attribute::JOB), Some("j1"));
    let child = span(names::span::CHAT);
    assert_eq!(child.parent_span_id, submission.span_id);
    let is_reasons =
        |pair: &&KeyValue| pair.key == names::attribute::GEN_AI_RESPONSE_FINISH_REASONS;
    let reasons = child.attributes.iter().find(is_reasons);
    let reasons = format!("{:?}", reasons.and_then(|pair| pair.value.as_ref()));
    assert!(
        reasons.contains("ArrayValue") && reasons.contains("stop"),
        "{reasons}"
    );

    let resource = &received.resources[0];
    assert_eq!(
        text(resource, names::resource::SERVICE_NAME),
        Some("espalier-test")
    );
    assert_eq!(text(resource, "deployment"), Some("test"));

    let metrics: Vec<&str> = received
        .metrics
        .iter()
        .map(|metric| &*metric.name)
        .collect();
    assert!(
        metrics.contains(&names::metric::WAIT_TIMEOUTS),
        "{metrics:?}"
    );

    let bodies: Vec<String> = received
        .logs
        .iter()
        .map(|log| format!("{:?}", log.body))
        .collect();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert!(bodies[0].contains("lease expired"), "{bodies:?}");
    assert_eq!(received.logs[0].trace_id, attempt.trace_id);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
