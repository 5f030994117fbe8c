//! The scripted model in the test's own process, and job lines that script it.

use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::scripted_model::{Config, serve};

/// Starts a scripted model that makes no mistakes but those that a test orders. Gives the base address that
/// `--model-url` takes. It ends with the test's runtime.
pub async fn start() -> String {
    start_with(Config {
        seed: 7,
        mistakes: 0.0,
        think_ms: 0,
    })
    .await
}

/// The same, with settings.
pub async fn start_with(config: Config) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/v1", listener.local_addr().expect("a bound port"));
    let server = serve(listener, config, std::future::pending());
    Tasks::new(Shutdown::new()).spawn("scripted_model", OnFailure::Log, server);
    url
}

/// Variables by which `espalier up` waits for the model at `url` for a second at most, and tries again once.
pub fn impatient(url: &str) -> [(&str, &str); 4] {
    [
        ("ESPALIER_UP_MODEL__ENDPOINT__BASE_URL", url),
        ("ESPALIER_UP_MODEL__ENDPOINT__FIRST_BYTE_TIMEOUT_MS", "1000"),
        ("ESPALIER_UP_MODEL__ENDPOINT__IDLE_TIMEOUT_MS", "1000"),
        ("ESPALIER_UP_MODEL__ENDPOINT__MAX_RETRIES", "1"),
    ]
}

/// A job over the toy server that plays `steps` and must end with `answer`.
pub fn toy_job(id: &str, steps: &Value, answer: &str) -> Value {
    json!({
        "id": id, "task_id": id, "task_kind": "toy", "mcp": ["toy"],
        "prompt": format!("Do it.\nSCRIPT: {steps}"),
        "verify": {"answer": {"equals": answer}},
    })
}

/// A job that adds two numbers with the toy server and answers with the sum.
pub fn sum_job(id: &str, n: usize) -> Value {
    let steps = json!([{"tool": "add", "arguments": {"a": n, "b": 1}}, {"answer": "{{last}}"}]);
    toy_job(id, &steps, &(n + 1).to_string())
}

/// The same job with a fault of the model ordered in its prompt.
pub fn faulty_job(id: &str, n: usize, fault: &str) -> Value {
    let mut job = sum_job(id, n);
    job["prompt"] = format!(
        "{}\nFAULT: {fault}",
        job["prompt"].as_str().unwrap_or_default()
    )
    .into();
    job
}

/// How many completions the model at `url` has given.
pub async fn completions(url: &str) -> u64 {
    let control = url.replace("/v1", "/control");
    let counters: Value = reqwest::get(control)
        .await
        .expect("the model answers")
        .json()
        .await
        .expect("its counters are JSON");
    counters["completions"]
        .as_u64()
        .expect("it counts completions")
}
