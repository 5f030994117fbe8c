//! A real OTLP receiver: gRPC services that keep what they are sent.

use std::sync::{Arc, Mutex, PoisonError};

use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use opentelemetry_proto::tonic::collector::logs::v1 as logs;
use opentelemetry_proto::tonic::collector::metrics::v1 as metrics;
use opentelemetry_proto::tonic::collector::trace::v1 as traces;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{Metric, NumberDataPoint, metric, number_data_point};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

#[derive(Debug, Default)]
struct Kept {
    spans: Vec<Span>,
    metrics: Vec<Metric>,
    logs: Vec<String>,
}

/// A receiver that keeps everything; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    kept: Arc<Mutex<Kept>>,
}

impl Sink {
    /// Starts a receiver and gives its address.
    pub async fn start() -> (Self, String) {
        let sink = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound port"));
        let server = Server::builder()
            .add_service(traces::trace_service_server::TraceServiceServer::new(
                sink.clone(),
            ))
            .add_service(metrics::metrics_service_server::MetricsServiceServer::new(
                sink.clone(),
            ))
            .add_service(logs::logs_service_server::LogsServiceServer::new(
                sink.clone(),
            ))
            .serve_with_incoming(TcpListenerStream::new(listener));
        Tasks::new(Shutdown::new()).spawn("otlp_sink", OnFailure::Log, server);
        (sink, url)
    }

    /// Every span so far.
    pub fn spans(&self) -> Vec<Span> {
        self.lock().spans.clone()
    }

    /// The name of every metric so far, sorted, each once.
    pub fn metric_names(&self) -> Vec<String> {
        let kept = self.lock();
        let mut names: Vec<String> = kept.metrics.iter().map(|m| m.name.clone()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// The largest value so far of the gauge or counter `name`, where its attribute `key` is `value`; none before the
    /// first.
    pub fn largest(&self, name: &str, key: &str, value: &str) -> Option<f64> {
        let kept = self.lock();
        let named = kept.metrics.iter().filter(|metric| metric.name == name);
        let fits =
            |point: &&NumberDataPoint| attribute(&point.attributes, key).as_deref() == Some(value);
        let points = named.flat_map(points).filter(fits);
        points.filter_map(number).reduce(f64::max)
    }

    /// How often the histogram `name` was recorded so far, whatever its attributes.
    pub fn recorded(&self, name: &str) -> u64 {
        let kept = self.lock();
        let named = kept.metrics.iter().filter(|metric| metric.name == name);
        let counts = named.filter_map(|metric| match &metric.data {
            Some(metric::Data::Histogram(histogram)) => {
                Some(histogram.data_points.iter().map(|point| point.count).sum())
            }
            _ => None,
        });
        counts.max().unwrap_or(0)
    }

    /// The text of every log record so far.
    pub fn log_texts(&self) -> Vec<String> {
        self.lock().logs.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn points(metric: &Metric) -> &[NumberDataPoint] {
    match &metric.data {
        Some(metric::Data::Gauge(gauge)) => &gauge.data_points,
        Some(metric::Data::Sum(sum)) => &sum.data_points,
        _ => &[],
    }
}

fn number(point: &NumberDataPoint) -> Option<f64> {
    match point.value? {
        number_data_point::Value::AsDouble(number) => Some(number),
        number_data_point::Value::AsInt(number) => Some(number as f64),
    }
}

/// The text of attribute `name`, whatever its type.
pub fn attribute(attributes: &[KeyValue], name: &str) -> Option<String> {
    let value = attributes
        .iter()
        .find(|pair| pair.key == name)?
        .value
        .as_ref()?;
    Some(text(value))
}

fn text(value: &AnyValue) -> String {
    match &value.value {
        Some(any_value::Value::StringValue(s)) => s.clone(),
        Some(any_value::Value::IntValue(i)) => i.to_string(),
        Some(any_value::Value::BoolValue(b)) => b.to_string(),
        Some(any_value::Value::DoubleValue(d)) => d.to_string(),
        other => format!("{other:?}"),
    }
}

#[tonic::async_trait]
impl traces::trace_service_server::TraceService for Sink {
    async fn export(
        &self,
        request: Request<traces::ExportTraceServiceRequest>,
    ) -> Result<Response<traces::ExportTraceServiceResponse>, Status> {
        let scopes = request
            .into_inner()
            .resource_spans
            .into_iter()
            .flat_map(|resource| resource.scope_spans);
        self.lock()
            .spans
            .extend(scopes.flat_map(|scope| scope.spans));
        Ok(Response::new(traces::ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl metrics::metrics_service_server::MetricsService for Sink {
    async fn export(
        &self,
        request: Request<metrics::ExportMetricsServiceRequest>,
    ) -> Result<Response<metrics::ExportMetricsServiceResponse>, Status> {
        let scopes = request
            .into_inner()
            .resource_metrics
            .into_iter()
            .flat_map(|resource| resource.scope_metrics);
        self.lock()
            .metrics
            .extend(scopes.flat_map(|scope| scope.metrics));
        Ok(Response::new(
            metrics::ExportMetricsServiceResponse::default(),
        ))
    }
}

#[tonic::async_trait]
impl logs::logs_service_server::LogsService for Sink {
    async fn export(
        &self,
        request: Request<logs::ExportLogsServiceRequest>,
    ) -> Result<Response<logs::ExportLogsServiceResponse>, Status> {
        let scopes = request
            .into_inner()
            .resource_logs
            .into_iter()
            .flat_map(|resource| resource.scope_logs);
        let records = scopes.flat_map(|scope| scope.log_records);
        self.lock()
            .logs
            .extend(records.filter_map(|record| record.body.as_ref().map(text)));
        Ok(Response::new(logs::ExportLogsServiceResponse::default()))
    }
}
