//! The instruments of a process, made once with the names, units and buckets that belong to them.
//!
//! Labels are few and closed: projects, kinds, states, outcomes, tool and model names. Ids of jobs or batches are
//! never labels.

use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Gauge, Histogram, Meter, UpDownCounter};

use super::names::{attribute, metric};

/// Bounds of latency histograms in seconds: from a tool on this machine to a rollout of half an hour.
const SECONDS: [f64; 17] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0,
    1800.0,
];

/// Bounds of token histograms, as the conventions for generative AI give them.
const TOKENS: [f64; 11] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
];

/// Every instrument. Fields are public: what is recorded where is decided by the callers.
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "each is documented at its name in `names::metric`"
)]
pub struct Metrics {
    pub queue_depth: Gauge<u64>,
    pub queue_oldest_ready_age: Gauge<f64>,
    pub queue_memory_used: Gauge<f64>,
    pub queue_failovers: Counter<u64>,
    pub queue_redriven: Counter<u64>,
    pub lease_grants: Counter<u64>,
    pub lease_expiries: Counter<u64>,
    pub lease_stale_fences: Counter<u64>,
    pub job_finishes: Counter<u64>,
    pub job_submissions: Counter<u64>,
    pub rollout_verdicts: Counter<u64>,
    pub dataset_conversations: Counter<u64>,
    pub workers_connected: Gauge<u64>,
    pub cost_workers: Counter<f64>,
    pub cost_token_price: Gauge<f64>,
    pub cost_budget: Gauge<f64>,
    pub auth_failures: Counter<u64>,
    pub rollouts_running: UpDownCounter<i64>,
    pub rollout_turns: Counter<u64>,
    pub rollout_turn_overhead: Histogram<f64>,
    pub scaler_instances: Gauge<u64>,
    pub scaler_wanted: Gauge<u64>,
    pub scaler_demand: Gauge<u64>,
    pub scaler_price: Gauge<f64>,
    pub scaler_spent_today: Gauge<f64>,
    pub scaler_budget_day: Gauge<f64>,
    pub scaler_creates: Counter<u64>,
    pub scaler_deletes: Counter<u64>,
    pub scaler_errors: Counter<u64>,
    pub worker_reconnects: Counter<u64>,
    pub wait_timeouts: Counter<u64>,
    pub store_errors: Counter<u64>,
    pub model_retries: Counter<u64>,
    pub token_usage: Histogram<u64>,
    pub chat_duration: Histogram<f64>,
    pub time_to_first_chunk: Histogram<f64>,
    pub execute_tool_duration: Histogram<f64>,
    pub invoke_agent_duration: Histogram<f64>,
    pub mcp_operation_duration: Histogram<f64>,
    pub server_request_duration: Histogram<f64>,
    pub server_time_to_first_token: Histogram<f64>,
    pub server_time_per_output_token: Histogram<f64>,
    pub infer_waiting: Gauge<u64>,
    pub infer_running: Gauge<u64>,
    pub infer_batch_rows: Gauge<u64>,
    pub infer_kv_used: Gauge<f64>,
    pub infer_preemptions: Counter<u64>,
    pub infer_prefix_queries: Counter<u64>,
    pub infer_prefix_hits: Counter<u64>,
    pub coordinator_ready: Gauge<u64>,
    pub trainings_running: UpDownCounter<i64>,
    pub train_step: Gauge<u64>,
    pub train_loss: Gauge<f64>,
    pub train_eval_loss: Gauge<f64>,
    pub train_agreement: Gauge<f64>,
    pub train_grad_norm: Gauge<f64>,
    pub train_tokens: Counter<u64>,
    pub train_tokens_per_second: Gauge<f64>,
    pub train_peak_share: Gauge<f64>,
    pub train_memory: Gauge<u64>,
    pub train_time_left: Gauge<f64>,
}

impl Metrics {
    fn new(meter: &Meter) -> Self {
        let counter =
            |name, unit| -> Counter<u64> { meter.u64_counter(name).with_unit(unit).build() };
        let gauge = |name, unit| -> Gauge<u64> { meter.u64_gauge(name).with_unit(unit).build() };
        let number = |name, unit| -> Gauge<f64> { meter.f64_gauge(name).with_unit(unit).build() };
        let seconds = |name| -> Histogram<f64> {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_boundaries(SECONDS.to_vec())
                .build()
        };
        Self {
            queue_depth: meter
                .u64_gauge(metric::QUEUE_DEPTH)
                .with_unit("{job}")
                .build(),
            queue_oldest_ready_age: meter
                .f64_gauge(metric::QUEUE_OLDEST_READY_AGE)
                .with_unit("s")
                .build(),
            queue_memory_used: meter
                .f64_gauge(metric::QUEUE_MEMORY_USED)
                .with_unit("1")
                .build(),
            queue_failovers: counter(metric::QUEUE_FAILOVERS, "{failover}"),
            queue_redriven: counter(metric::QUEUE_REDRIVEN, "{job}"),
            lease_grants: counter(metric::LEASE_GRANTS, "{lease}"),
            lease_expiries: counter(metric::LEASE_EXPIRIES, "{lease}"),
            lease_stale_fences: counter(metric::LEASE_STALE_FENCES, "{request}"),
            job_finishes: counter(metric::JOB_FINISHES, "{attempt}"),
            job_submissions: counter(metric::JOB_SUBMISSIONS, "{job}"),
            rollout_verdicts: counter(metric::ROLLOUT_VERDICTS, "{rollout}"),
            dataset_conversations: counter(metric::DATASET_CONVERSATIONS, "{conversation}"),
            workers_connected: gauge(metric::WORKERS_CONNECTED, "{worker}"),
            cost_workers: meter
                .f64_counter(metric::COST_WORKERS)
                .with_unit("{USD}")
                .build(),
            cost_token_price: number(metric::COST_TOKEN_PRICE, "{USD}"),
            cost_budget: number(metric::COST_BUDGET, "{USD}"),
            auth_failures: counter(metric::AUTH_FAILURES, "{call}"),
            rollouts_running: meter
                .i64_up_down_counter(metric::ROLLOUTS_RUNNING)
                .with_unit("{rollout}")
                .build(),
            rollout_turns: counter(metric::ROLLOUT_TURNS, "{turn}"),
            rollout_turn_overhead: seconds(metric::ROLLOUT_TURN_OVERHEAD),
            scaler_instances: gauge(metric::SCALER_INSTANCES, "{instance}"),
            scaler_wanted: gauge(metric::SCALER_WANTED, "{instance}"),
            scaler_demand: gauge(metric::SCALER_DEMAND, "{job}"),
            scaler_price: number(metric::SCALER_PRICE, "{USD}"),
            scaler_spent_today: number(metric::SCALER_SPENT_TODAY, "{USD}"),
            scaler_budget_day: number(metric::SCALER_BUDGET_DAY, "{USD}"),
            scaler_creates: counter(metric::SCALER_CREATES, "{instance}"),
            scaler_deletes: counter(metric::SCALER_DELETES, "{instance}"),
            scaler_errors: counter(metric::SCALER_ERRORS, "{error}"),
            worker_reconnects: counter(metric::WORKER_RECONNECTS, "{connection}"),
            wait_timeouts: counter(metric::WAIT_TIMEOUTS, "{timeout}"),
            store_errors: counter(metric::STORE_ERRORS, "{error}"),
            model_retries: counter(metric::MODEL_RETRIES, "{retry}"),
            token_usage: meter
                .u64_histogram(metric::GEN_AI_TOKEN_USAGE)
                .with_unit("{token}")
                .with_boundaries(TOKENS.to_vec())
                .build(),
            chat_duration: seconds(metric::GEN_AI_OPERATION_DURATION),
            time_to_first_chunk: seconds(metric::GEN_AI_TIME_TO_FIRST_CHUNK),
            execute_tool_duration: seconds(metric::GEN_AI_EXECUTE_TOOL_DURATION),
            invoke_agent_duration: seconds(metric::GEN_AI_INVOKE_AGENT_DURATION),
            mcp_operation_duration: seconds(metric::MCP_OPERATION_DURATION),
            server_request_duration: seconds(metric::GEN_AI_SERVER_REQUEST_DURATION),
            server_time_to_first_token: seconds(metric::GEN_AI_SERVER_TIME_TO_FIRST_TOKEN),
            server_time_per_output_token: seconds(metric::GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN),
            infer_waiting: gauge(metric::INFER_WAITING, "{request}"),
            infer_running: gauge(metric::INFER_RUNNING, "{request}"),
            infer_batch_rows: gauge(metric::INFER_BATCH_ROWS, "{row}"),
            infer_kv_used: meter
                .f64_gauge(metric::INFER_KV_USED)
                .with_unit("1")
                .build(),
            infer_preemptions: counter(metric::INFER_PREEMPTIONS, "{preemption}"),
            infer_prefix_queries: counter(metric::INFER_PREFIX_QUERIES, "{token}"),
            infer_prefix_hits: counter(metric::INFER_PREFIX_HITS, "{token}"),
            coordinator_ready: gauge(metric::COORDINATOR_READY, "{coordinator}"),
            trainings_running: meter
                .i64_up_down_counter(metric::TRAININGS_RUNNING)
                .with_unit("{training}")
                .build(),
            train_step: gauge(metric::TRAIN_STEP, "{step}"),
            train_loss: number(metric::TRAIN_LOSS, "1"),
            train_eval_loss: number(metric::TRAIN_EVAL_LOSS, "1"),
            train_agreement: number(metric::TRAIN_AGREEMENT, "1"),
            train_grad_norm: number(metric::TRAIN_GRAD_NORM, "1"),
            train_tokens: counter(metric::TRAIN_TOKENS, "{token}"),
            train_tokens_per_second: number(metric::TRAIN_TOKENS_PER_SECOND, "{token}/s"),
            train_peak_share: number(metric::TRAIN_PEAK_SHARE, "1"),
            train_memory: gauge(metric::TRAIN_MEMORY, "By"),
            train_time_left: number(metric::TRAIN_TIME_LEFT, "s"),
        }
    }

    /// Counts a wait that came to its deadline.
    pub fn wait_timed_out(&self, name: &'static str) {
        self.wait_timeouts
            .add(1, &[KeyValue::new(attribute::WAIT, name)]);
    }

    /// Counts a store operation that failed for good.
    pub fn store_failed(&self, operation: &'static str, class: &'static str) {
        let labels = [
            KeyValue::new(attribute::STORE_OPERATION, operation),
            KeyValue::new(attribute::ERROR_TYPE, class),
        ];
        self.store_errors.add(1, &labels);
    }

    /// Counts a model call that is tried again.
    pub fn model_retried(&self, class: &'static str) {
        self.model_retries
            .add(1, &[KeyValue::new(attribute::ERROR_TYPE, class)]);
    }

    /// Records how long something took, in a histogram of this struct.
    pub fn record(histogram: &Histogram<f64>, took: Duration, labels: &[KeyValue]) {
        histogram.record(took.as_secs_f64(), labels);
    }
}

static EXPORTED: OnceLock<Metrics> = OnceLock::new();
static DISCARDED: OnceLock<Metrics> = OnceLock::new();

/// The process's instruments; before telemetry starts, or without an endpoint, they record nothing.
pub fn metrics() -> &'static Metrics {
    EXPORTED.get().unwrap_or_else(|| {
        // Made before a provider is set, or in a process that never sets one: these stay silent.
        DISCARDED.get_or_init(|| Metrics::new(&opentelemetry::global::meter("espalier")))
    })
}

/// Makes the instruments of `meter` the process's. The first call counts: a process has one telemetry.
pub(super) fn install(meter: &Meter) {
    let _ = EXPORTED.set(Metrics::new(meter));
}
