//! `GET /metrics` in Prometheus' text format, under the names that vLLM's dashboards know.
//!
//! These numbers are of this process and are read by whoever asks; what is exported over OTLP is the runtime's telemetry.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::backend::Load;
use super::observe::Progress;

/// Upper ends of buckets, in seconds, as vLLM has them.
const FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];
const BETWEEN_TOKENS_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0,
];
const WHOLE_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0,
];

/// Counters of what the API did.
pub(super) struct Metrics {
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    /// By reason: a small closed set.
    finished: Mutex<BTreeMap<&'static str, u64>>,
    /// By status.
    failed: Mutex<BTreeMap<u16, u64>>,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            finished: Mutex::default(),
            failed: Mutex::default(),
            first_token: Histogram::new(FIRST_TOKEN_S),
            between_tokens: Histogram::new(BETWEEN_TOKENS_S),
            whole: Histogram::new(WHOLE_S),
        }
    }
}

impl Metrics {
    pub(super) fn prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens
            .fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// Another token of an answer.
    pub(super) fn token(&self, progress: &mut Progress) {
        let now = Instant::now();
        self.generation_tokens.fetch_add(1, Ordering::Relaxed);
        match progress.token(now) {
            None => self.first_token.record(now - progress.began),
            Some(last) => self.between_tokens.record(now - last),
        }
    }

    pub(super) fn finished(&self, reason: &'static str, took: Duration) {
        *lock(&self.finished).entry(reason).or_default() += 1;
        self.whole.record(took);
    }

    pub(super) fn failed(&self, status: u16) {
        *lock(&self.failed).entry(status).or_default() += 1;
    }

    pub(super) fn render(&self, load: &Load, model: &str) -> String {
        let mut page = Page::new(model);
        page.value("vllm:num_requests_running", "gauge", load.running as f64);
        page.value("vllm:num_requests_waiting", "gauge", load.waiting as f64);
        page.value("vllm:kv_cache_usage_perc", "gauge", load.kv_share);
        page.value(
            "vllm:prefix_cache_queries_total",
            "counter",
            load.prefix_queries as f64,
        );
        page.value(
            "vllm:prefix_cache_hits_total",
            "counter",
            load.prefix_hits as f64,
        );
        page.value(
            "vllm:num_preemptions_total",
            "counter",
            load.preemptions as f64,
        );
        let loaded = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        page.value(
            "vllm:prompt_tokens_total",
            "counter",
            loaded(&self.prompt_tokens),
        );
        page.value(
            "vllm:generation_tokens_total",
            "counter",
            loaded(&self.generation_tokens),
        );
        page.kind("vllm:request_success_total", "counter");
        for (reason, count) in lock(&self.finished).iter() {
            page.line(
                "vllm:request_success_total",
                &format!("finished_reason=\"{reason}\""),
                *count as f64,
            );
        }
        page.kind("vllm:request_failure_total", "counter");
        for (status, count) in lock(&self.failed).iter() {
            page.line(
                "vllm:request_failure_total",
                &format!("status=\"{status}\""),
                *count as f64,
            );
        }
        page.histogram("vllm:time_to_first_token_seconds", &self.first_token);
        page.histogram("vllm:inter_token_latency_seconds", &self.between_tokens);
        page.histogram("vllm:e2e_request_latency_seconds", &self.whole);
        page.text
    }
}

/// Nothing panics under these locks, so a poisoned one is still good.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Histogram {
    ends_s: &'static [f64],
    /// One more than there are ends.
    counts: Vec<AtomicU64>,
    sum_us: AtomicU64,
}

impl Histogram {
    fn new(ends_s: &'static [f64]) -> Self {
        Self {
            ends_s,
            counts: (0..=ends_s.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_us: AtomicU64::new(0),
        }
    }

    fn record(&self, value: Duration) {
        let bucket = self
            .ends_s
            .partition_point(|end| *end < value.as_secs_f64());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us
            .fetch_add(value.as_micros() as u64, Ordering::Relaxed);
    }
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn new(model: &str) -> Self {
        let model = model
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n");
        Self {
            text: String::new(),
            model: format!("model_name=\"{model}\""),
        }
    }

    // A `String` takes all that is written to it.
    fn kind(&mut self, name: &str, kind: &str) {
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, label: &str, value: f64) {
        let comma = if label.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "{name}{{{}{comma}{label}}} {value}", self.model);
    }

    fn value(&mut self, name: &str, kind: &str, value: f64) {
        self.kind(name, kind);
        self.line(name, "", value);
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        self.kind(name, "histogram");
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (i, in_bucket) in histogram.counts.iter().enumerate() {
            count += in_bucket.load(Ordering::Relaxed);
            let end = histogram
                .ends_s
                .get(i)
                .map_or("+Inf".to_owned(), f64::to_string);
            self.line(&bucket, &format!("le=\"{end}\""), count as f64);
        }
        let sum_s = histogram.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        self.line(&format!("{name}_sum"), "", sum_s);
        self.line(&format!("{name}_count"), "", count as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let metrics = Metrics::default();
        let mut progress = Progress::new(Instant::now());
        metrics.token(&mut progress);
        metrics.token(&mut progress);
        metrics.finished("stop", Duration::from_millis(700));
        metrics.finished("stop", Duration::from_secs(10_000));
        let page = metrics.render(&Load::default(), "m\"1");
        for line in [
            "vllm:generation_tokens_total{model_name=\"m\\\"1\"} 2",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\\\"1\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\\\"1\"} 1",
            "vllm:request_success_total{model_name=\"m\\\"1\",finished_reason=\"stop\"} 2",
            "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\\\"1\",le=\"0.5\"} 0",
            "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\\\"1\",le=\"0.8\"} 1",
            "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\\\"1\",le=\"960\"} 1",
            "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\\\"1\",le=\"+Inf\"} 2",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }
}
