//! Telemetry whose receiver is not there: the process ends in time all the same. In a process of its own, because
//! telemetry starts once.

#![expect(clippy::unwrap_used, reason = "the address is part of the test")]

use std::net::TcpListener;
use std::time::{Duration, Instant};

use espalier_runtime::telemetry::{self, TelemetryConfig};

/// Accepts connections by the kernel alone and never answers: worse than a closed port.
fn silent_receiver() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    (listener, endpoint)
}

#[test]
fn a_receiver_that_never_answers_delays_the_end_by_no_more_than_the_limit() {
    let (_listener, endpoint) = silent_receiver();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let limit = Duration::from_millis(500);
    let took = runtime.block_on(async {
        let config = TelemetryConfig {
            otlp_endpoint: Some(endpoint),
            log_filter: "off".to_owned(),
            ..TelemetryConfig::default()
        };
        let running = telemetry::init(&config, "espalier-test").unwrap();
        tracing::info_span!("attempt").in_scope(|| tracing::warn!("lost"));
        telemetry::metrics().wait_timed_out("test.wait");
        let began = Instant::now();
        running.flush(limit).await;
        running.shutdown(limit).await;
        began.elapsed()
    });
    assert!(took < 2 * limit + Duration::from_secs(1), "{took:?}");
    let began = Instant::now();
    drop(runtime);
    // Without a runtime the transport is gone, and with it what the exporters' threads wait for.
    let dropped_in = began.elapsed();
    assert!(dropped_in < Duration::from_secs(2), "{dropped_in:?}");
}
