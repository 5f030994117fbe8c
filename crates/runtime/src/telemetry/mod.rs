//! Telemetry: structured logs on stderr, and traces, metrics and logs over OTLP where an endpoint is configured.
//!
//! `main` calls [`init`] once, keeps the guard, and calls [`Telemetry::shutdown`] after the tasks have ended. All
//! else uses `tracing`'s macros, [`metrics`] and the [`names`]. Prompts, answers, tool arguments and tool results
//! are never put in telemetry: the stored trace is referenced instead.

mod metrics;
pub mod names;
mod traceparent;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::MeterProvider;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{Array, StringValue, Value};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::Deserialize;
use tracing::{Level, Metadata, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::{Filter, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::Environment;
use crate::tasks::{self, BlockingFailed};

pub use metrics::{Metrics, metrics};
pub use traceparent::{TraceParent, continue_from, inject_traceparent, link_to};

/// Deadline of one export: a collector is close by, and a lost batch is better than a process that waits.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is logged on stderr when nothing is configured.
const LOG_FILTER: &str = "info,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn";

/// The target that is neither logged nor exported, whatever the configuration says: `rmcp` writes down whole requests
/// and answers, which hold what was said, and whole addresses, which may hold keys. What goes wrong in it comes back as
/// an error, which is logged without.
const NEVER_TOLD: &str = "rmcp";

/// Targets that are not exported: exporting itself writes to them, which would feed the exporter with its own work.
const TRANSPORT_TARGETS: [&str; 9] = [
    "h2",
    "hyper",
    "hyper_util",
    "tonic",
    "tower",
    "reqwest",
    "rustls",
    "opentelemetry",
    "tracing_opentelemetry",
];

/// How logs look on stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// The `[telemetry]` section of every process.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Where traces, metrics and logs go, by OTLP over gRPC without TLS: `http://localhost:4317`. Nowhere if absent.
    pub otlp_endpoint: Option<String>,
    /// How logs look on stderr.
    pub log_format: LogFormat,
    /// Which logs go to stderr, as `tracing_subscriber::EnvFilter` reads it: `info,espalier_runtime=debug`.
    pub log_filter: String,
    /// More attributes of the resource that the process reports as.
    pub resource: BTreeMap<String, String>,
    /// Time between two exports of metrics, in seconds.
    pub metric_interval_s: u64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            log_format: LogFormat::default(),
            log_filter: LOG_FILTER.to_owned(),
            resource: BTreeMap::new(),
            metric_interval_s: 15,
        }
    }
}

impl TelemetryConfig {
    /// Takes the endpoint from OpenTelemetry's own variable where the configuration names none, and the filter from
    /// `ESPALIER_LOG`, which wins: it is what a person sets for one run.
    pub fn or_from(mut self, environment: &Environment) -> Self {
        if let Some(filter) = environment.get("ESPALIER_LOG") {
            self.log_filter.clone_from(filter);
        }
        self.otlp_endpoint = self
            .otlp_endpoint
            .or_else(|| environment.get("OTEL_EXPORTER_OTLP_ENDPOINT").cloned())
            .filter(|endpoint| !endpoint.is_empty());
        self
    }
}

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter has a mistake.
    #[error("`log_filter` must be a list such as `info,espalier_runtime=debug`, got `{filter}`")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The endpoint is of a kind that the exporter does not speak.
    #[error("`otlp_endpoint` must begin with `http://`, got `{endpoint}`")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
    },
    /// An exporter could not be made.
    #[error("OTLP exporter for `{endpoint}` cannot be made")]
    Exporter {
        /// The endpoint.
        endpoint: String,
        /// Why.
        source: ExporterBuildError,
    },
    /// Another subscriber was there first.
    #[error("telemetry was started before in this process")]
    AlreadyStarted,
}

/// The running telemetry of a process.
#[derive(Debug)]
#[must_use = "what is not flushed at the end is lost"]
pub struct Telemetry {
    export: Option<Export>,
}

/// The providers that export. Clones share them.
#[derive(Clone, Debug)]
struct Export {
    traces: SdkTracerProvider,
    metrics: SdkMeterProvider,
    logs: SdkLoggerProvider,
}

/// Starts logs on stderr and, with an endpoint, export. Once in a process, within a tokio runtime; `service_name` is
/// the role, such as `espalier-coordinator`.
pub fn init(
    config: &TelemetryConfig,
    service_name: &'static str,
) -> Result<Telemetry, TelemetryError> {
    let filter = log_filter(config)?;
    let export = match &config.otlp_endpoint {
        Some(endpoint) => Some(Export::new(endpoint, config, service_name)?),
        None => None,
    };
    let stderr = stderr_layer(config.log_format).with_filter(filter);
    let traces = export.as_ref().map(|export| {
        tracing_opentelemetry::layer()
            .with_tracer(export.traces.tracer("espalier"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(filter_fn(|metadata| {
                metadata.is_span() && is_exported(metadata)
            }))
    });
    let logs = export.as_ref().map(|export| {
        OpenTelemetryTracingBridge::new(&export.logs).with_filter(filter_fn(is_exported))
    });
    Registry::default()
        .with(stderr)
        .with(traces)
        .with(logs)
        .try_init()
        .map_err(|_| TelemetryError::AlreadyStarted)?;
    if let Some(export) = &export {
        metrics::install(&export.metrics.meter("espalier"));
    }
    Ok(Telemetry { export })
}

/// What goes to stderr.
fn log_filter<S>(config: &TelemetryConfig) -> Result<impl Filter<S> + use<S>, TelemetryError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let filter = EnvFilter::try_new(&config.log_filter).map_err(|source| {
        let filter = config.log_filter.clone();
        TelemetryError::Filter { filter, source }
    })?;
    // Not as one more directive: a longer one, such as `rmcp::service=trace`, would win over it.
    Ok(filter.and(filter_fn(|metadata| root_of(metadata) != NEVER_TOLD)))
}

fn stderr_layer<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let terminal = std::io::stderr().is_terminal();
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    match format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Auto if terminal => layer.boxed(),
        LogFormat::Auto | LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

/// Whether a record may leave over OTLP.
fn is_exported(metadata: &Metadata<'_>) -> bool {
    let root = root_of(metadata);
    let from_transport = TRANSPORT_TARGETS.contains(&root) || root.starts_with("opentelemetry");
    *metadata.level() <= Level::INFO && !from_transport && root != NEVER_TOLD
}

/// The crate that a record comes from.
fn root_of<'a>(metadata: &Metadata<'a>) -> &'a str {
    metadata.target().split("::").next().unwrap_or_default()
}

impl Export {
    fn new(
        endpoint: &str,
        config: &TelemetryConfig,
        service_name: &'static str,
    ) -> Result<Self, TelemetryError> {
        if !endpoint.starts_with("http://") {
            let endpoint = endpoint.to_owned();
            return Err(TelemetryError::Endpoint { endpoint });
        }
        let resource = resource(config, service_name);
        Self::build(endpoint, config, resource).map_err(|source| TelemetryError::Exporter {
            endpoint: endpoint.to_owned(),
            source,
        })
    }

    fn build(
        endpoint: &str,
        config: &TelemetryConfig,
        resource: Resource,
    ) -> Result<Self, ExporterBuildError> {
        let spans = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let metrics = MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let logs = LogExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let reader = PeriodicReader::builder(metrics)
            .with_interval(Duration::from_secs(config.metric_interval_s.max(1)))
            .build();
        Ok(Self {
            traces: SdkTracerProvider::builder()
                .with_resource(resource.clone())
                .with_batch_exporter(spans)
                .build(),
            metrics: SdkMeterProvider::builder()
                .with_resource(resource.clone())
                .with_reader(reader)
                .build(),
            logs: SdkLoggerProvider::builder()
                .with_resource(resource)
                .with_batch_exporter(logs)
                .build(),
        })
    }
}

fn resource(config: &TelemetryConfig, service_name: &'static str) -> Resource {
    let more = config
        .resource
        .iter()
        .map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder()
        .with_service_name(service_name)
        .with_attribute(KeyValue::new(
            names::resource::SERVICE_VERSION,
            env!("CARGO_PKG_VERSION"),
        ))
        .with_attribute(KeyValue::new(
            names::resource::SERVICE_INSTANCE_ID,
            uuid::Uuid::now_v7().to_string(),
        ))
        .with_attributes(more)
        .build()
}

impl Telemetry {
    /// Sends what is waiting. Returns after `limit` at the latest, with what was sent by then.
    pub async fn flush(&self, limit: Duration) {
        let Some(Export {
            traces,
            metrics,
            logs,
        }) = self.export.clone()
        else {
            return;
        };
        let flushed = futures::future::join3(
            tasks::blocking("telemetry.flush", move || traces.force_flush()),
            tasks::blocking("telemetry.flush", move || metrics.force_flush()),
            tasks::blocking("telemetry.flush", move || logs.force_flush()),
        );
        if let Ok((traces, metrics, logs)) =
            tasks::with_deadline("telemetry.flush", limit, flushed).await
        {
            report("traces", traces);
            report("metrics", metrics);
            report("logs", logs);
        }
    }

    /// Sends what is waiting and stops exporting. Returns after `limit` at the latest.
    pub async fn shutdown(self, limit: Duration) {
        let Some(Export {
            traces,
            metrics,
            logs,
        }) = self.export
        else {
            return;
        };
        let stopped = futures::future::join3(
            tasks::blocking("telemetry.shutdown", move || {
                traces.shutdown_with_timeout(limit)
            }),
            tasks::blocking("telemetry.shutdown", move || {
                metrics.shutdown_with_timeout(limit)
            }),
            tasks::blocking("telemetry.shutdown", move || {
                logs.shutdown_with_timeout(limit)
            }),
        );
        if let Ok((traces, metrics, logs)) =
            tasks::with_deadline("telemetry.shutdown", limit, stopped).await
        {
            report("traces", traces);
            report("metrics", metrics);
            report("logs", logs);
        }
    }
}

/// Says on stderr what could not be sent: over OTLP nobody would hear it.
fn report(signal: &'static str, outcome: Result<OTelSdkResult, BlockingFailed>) {
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(signal, error = %error, "telemetry could not be sent"),
        Err(error) => tracing::warn!(signal, error = %error, "telemetry could not be sent"),
    }
}

/// Sets an attribute that the conventions define as a list of texts, which `tracing`'s fields cannot hold.
pub fn record_texts(span: &tracing::Span, name: &'static str, texts: &[&str]) {
    let texts: Vec<StringValue> = texts.iter().map(|text| (*text).to_owned().into()).collect();
    span.set_attribute(name, Value::Array(Array::String(texts)));
}

/// Gives a span that runs another name: recording `otel.name` does so only before the span begins.
pub fn rename(span: &tracing::Span, name: String) {
    span.context().span().update_name(name);
}

/// An error and everything beneath it in one line, for the one place that logs it.
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_comes_from_the_configuration_or_from_opentelemetrys_variable() {
        let environment = Environment::from(
            [
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317"),
                ("ESPALIER_LOG", "debug"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        let default = TelemetryConfig::default().or_from(&environment);
        assert_eq!(
            default.otlp_endpoint.as_deref(),
            Some("http://collector:4317")
        );
        assert_eq!(default.log_filter, "debug");
        let configured = TelemetryConfig {
            otlp_endpoint: Some("http://mine:4317".to_owned()),
            ..TelemetryConfig::default()
        };
        let configured = configured.or_from(&environment);
        assert_eq!(
            configured.otlp_endpoint.as_deref(),
            Some("http://mine:4317")
        );
    }

    #[derive(Clone, Default)]
    struct Targets(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Targets {
        fn on_event(
            &self,
            event: &tracing::Event<'_>,
            _: tracing_subscriber::layer::Context<'_, S>,
        ) {
            let target = event.metadata().target().to_owned();
            self.0.lock().unwrap().push(target);
        }
    }

    #[test]
    fn what_may_name_secrets_is_neither_logged_nor_exported() {
        for log in [
            None,
            Some("trace"),
            Some("info,rmcp::transport=trace,rmcp=trace"),
        ] {
            let (logged, exported) = (Targets::default(), Targets::default());
            let environment = log.map(|log| ("ESPALIER_LOG".to_owned(), log.to_owned()));
            let environment = Environment::from_iter(environment);
            let filter = log_filter(&TelemetryConfig::default().or_from(&environment)).unwrap();
            let subscriber = Registry::default()
                .with(logged.clone().with_filter(filter))
                .with(exported.clone().with_filter(filter_fn(is_exported)));
            tracing::subscriber::with_default(subscriber, || {
                tracing::error!(target: "rmcp::transport::worker", "http://host/?key=secret");
                tracing::error!(target: "rmcp", "{}", "a prompt");
                tracing::error!(target: "espalier_test", "x");
            });
            assert_eq!(*logged.0.lock().unwrap(), ["espalier_test"], "{log:?}");
            assert_eq!(*exported.0.lock().unwrap(), ["espalier_test"], "{log:?}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_starts() {
        let filter = TelemetryConfig {
            log_filter: "info,=,=".to_owned(),
            ..TelemetryConfig::default()
        };
        let error = init(&filter, "espalier-test").unwrap_err();
        assert!(error.to_string().contains("info,=,="), "{error}");
        let endpoint = TelemetryConfig {
            otlp_endpoint: Some("collector:4317".to_owned()),
            ..TelemetryConfig::default()
        };
        let error = init(&endpoint, "espalier-test").unwrap_err();
        assert!(error.to_string().contains("collector:4317"), "{error}");
    }

    #[test]
    fn an_error_is_logged_with_its_causes() {
        let inner = std::io::Error::other("disk on fire");
        let outer = TelemetryError::Filter {
            filter: "x".to_owned(),
            source: EnvFilter::try_new("a=b=c=d").unwrap_err(),
        };
        assert_eq!(error_chain(&inner), "disk on fire");
        let chain = error_chain(&outer);
        assert!(
            chain.starts_with("`log_filter`") && chain.contains(": "),
            "{chain}"
        );
    }
}
