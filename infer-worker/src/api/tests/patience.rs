//! How long answers are waited for. The clock stands still but for waits, so there are no sockets here.

use std::sync::atomic::Ordering;

use axum::body::{Body, to_bytes};
use axum::http::Request;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use tokio::time::Instant;

use super::*;

/// Status and body of the answer to a chat.
async fn chat(backend: &Arc<Scripted>, script: &str) -> (u16, Value) {
    let router = api(backend, None, Duration::from_secs(60)).router();
    let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
    let request = request.body(Body::from(chat_body(script, json!({})).to_string()));
    let service = TowerToHyperService::new(router);
    let response = service.call(request.unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test(start_paused = true)]
async fn an_answer_may_wait_while_the_engine_goes_on() {
    let backend = Arc::new(Scripted::default());
    let go = async {
        tokio::time::sleep(Duration::from_secs(3_000)).await;
        backend.go.notify_one();
    };
    let ((status, body), ()) = tokio::join!(chat(&backend, "silent"), go);
    assert_eq!(status, 200, "{body}");
}

#[tokio::test(start_paused = true)]
async fn a_wait_too_long_is_not_said_to_be_the_engines_end() {
    let began = Instant::now();
    let (status, body) = chat(&Arc::default(), "silent").await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (503, &json!("wait_too_long"))
    );
    assert!(began.elapsed() >= Duration::from_secs(3_600));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_stands_still_is_found_out() {
    let backend = Arc::new(Scripted::default());
    backend.goes_on.store(false, Ordering::SeqCst);
    let began = Instant::now();
    let (status, body) = chat(&backend, "silent").await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (503, &json!("engine_hangs"))
    );
    let waited = began.elapsed().as_secs();
    assert!((600..700).contains(&waited), "{waited}");
}
