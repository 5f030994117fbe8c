//! The client alone.

use std::time::Duration;

use espalier_runtime::config::Secret;
use espalier_runtime::telemetry::error_chain;
use espalier_testbed::runpod::{KEY, Runpod as Server, Trouble};
use espalier_testbed::wait_for;

use super::{A5000, H100, L4, TOKEN, assert_spoken, config};
use crate::scaler::runpod::client::Client;
use crate::scaler::runpod::config::Cloud;
use crate::scaler::runpod::error::ApiError;
use crate::scaler::runpod::wire::{Availability, NewPod, PodStatus};

fn client(server: &Server) -> Client {
    Client::new(&server.url, &Secret::new(KEY)).unwrap()
}

fn pod(server: &Server, name: &str) -> NewPod {
    config(server, &[L4]).pools[0].pod("espalier", name, L4)
}

#[tokio::test]
async fn a_pod_comes_runs_and_goes() {
    let Some(server) = Server::start().await else {
        return;
    };
    server.provisioning(Duration::from_millis(400));
    let client = client(&server);
    let made = client.create(&pod(&server, "a")).await.unwrap();
    assert_eq!(
        (made.name.as_str(), &made.status),
        ("a", &PodStatus::Provisioning)
    );
    let gpu = made.gpu.as_ref().unwrap();
    assert_eq!((gpu.id.as_str(), gpu.count, made.cost), (L4, 1, 0.39));
    assert!(made.is_of("espalier") && !made.is_of("espalie") && !made.is_of(""));
    let mut passed = Vec::new();
    while passed.last() != Some(&PodStatus::Running) {
        let status = client.pod(&made.id).await.unwrap().unwrap().status;
        if passed.last() != Some(&status) {
            passed.push(status);
        }
    }
    let (last, before) = passed.split_last().unwrap();
    assert_eq!(*last, PodStatus::Running);
    assert!(before.ends_with(&[PodStatus::Starting]), "{before:?}");
    assert_eq!(client.pods().await.unwrap().len(), 1);
    client.delete(&made.id).await.unwrap();
    client.delete(&made.id).await.unwrap();
    assert!(client.pod(&made.id).await.unwrap().is_none());
    assert!(client.pods().await.unwrap().is_empty());
    assert_spoken(&server);
}

#[tokio::test]
async fn the_catalogue_has_prices_and_what_is_left() {
    let Some(server) = Server::start().await else {
        return;
    };
    server.stock(H100, "NONE", 0);
    let versioned = format!("{}/v2/", server.url);
    let client = Client::new(&versioned, &Secret::new(KEY)).unwrap();
    let gpus = client.gpus(2, Cloud::Community).await.unwrap();
    let find = |id: &str| gpus.iter().find(|gpu| gpu.id == id).unwrap();
    assert_eq!(find(A5000).price.of(Cloud::Community), 0.16);
    assert_eq!(find(A5000).availability, Availability::Some);
    assert_eq!(find(H100).availability, Availability::None);
    assert_eq!(
        (find(H100).memory, find(H100).max_count.of(Cloud::Secure)),
        (80, 8)
    );
    assert_spoken(&server);
}

#[tokio::test]
async fn a_key_that_is_not_accepted_is_said_and_not_shown() {
    let Some(server) = Server::start().await else {
        return;
    };
    let wrong = Secret::new("rpa_another-key");
    let client = Client::new(&server.url, &wrong).unwrap();
    let error = client.pods().await.unwrap_err();
    let text = error_chain(&error);
    assert_eq!(
        text,
        "listing pods: RunPod refuses with 401: invalid bearer token"
    );
    assert!(!format!("{client:?}{error:?}").contains("another-key"));
    assert!(Client::new(&server.url, &Secret::new("a\nb")).is_err());
}

#[tokio::test]
async fn no_request_leaves_before_the_time_that_was_named() {
    let Some(server) = Server::start().await else {
        return;
    };
    let client = client(&server);
    server.trouble("/v2/pods", Trouble::Status(429, Some(1)), 1);
    let error = client.pods().await.unwrap_err();
    let ApiError::RateLimited { retry_after, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(retry_after, Duration::from_secs(1));
    let error = client.create(&pod(&server, "a")).await.unwrap_err();
    assert!(matches!(error, ApiError::RateLimited { .. }), "{error:?}");
    assert!(!error.may_be_done());
    assert_eq!(server.count("/v2/pods"), 1, "it asked again");
    let client = &client;
    wait_for("the time to pass", Duration::from_secs(10), || async {
        client.pods().await.map_err(|error| error_chain(&error))
    })
    .await;
    assert_eq!(server.count("/v2/pods"), 2);
    server.trouble("/v2/pods", Trouble::Status(429, None), 1);
    let error = client.pods().await.unwrap_err();
    assert!(error_chain(&error).contains("wait for 15 s"), "{error:?}");
}

#[tokio::test]
async fn what_may_be_asked_twice_is_asked_again() {
    let Some(server) = Server::start().await else {
        return;
    };
    let client = client(&server);
    server.trouble("GET /v2/pods", Trouble::Status(503, None), 1);
    server.trouble("GET /v2/pods", Trouble::Cut, 1);
    assert!(client.pods().await.unwrap().is_empty());
    assert_eq!(server.count("GET /v2/pods"), 3);
    server.trouble("GET /v2/pods", Trouble::Cut, 3);
    let error = client.pods().await.unwrap_err();
    let at = format!("listing pods: RunPod cannot be reached at {}: ", server.url);
    let said = error_chain(&error);
    assert!(said.starts_with(&at), "{said}");
    let made = client.create(&pod(&server, "a")).await.unwrap();
    server.trouble("DELETE", Trouble::CutAfter, 1);
    client.delete(&made.id).await.unwrap();
    assert_eq!(server.count("DELETE"), 2);
    assert_spoken(&server);
}

#[tokio::test]
async fn a_pod_is_asked_for_once_whatever_comes_of_it() {
    let Some(server) = Server::start().await else {
        return;
    };
    let client = client(&server).with_deadline(Duration::from_millis(300));
    for (trouble, pods) in [
        (Trouble::Cut, 0),
        (Trouble::CutAfter, 1),
        (Trouble::Status(500, None), 1),
        (Trouble::Hang, 1),
    ] {
        let before = server.count("POST");
        server.trouble("POST", trouble, 1);
        let error = client.create(&pod(&server, "a")).await.unwrap_err();
        assert!(error.may_be_done(), "{trouble:?}: {error:?}");
        assert_eq!(server.count("POST"), before + 1, "{trouble:?}");
        assert_eq!(server.pods().len(), pods, "{trouble:?}");
    }
    for status in [400, 402, 403, 404, 422] {
        server.trouble("POST", Trouble::Status(status, None), 1);
        let error = client.create(&pod(&server, "a")).await.unwrap_err();
        assert!(!error.may_be_done() && !error.passes(), "{error:?}");
        let says = format!("creating a pod: RunPod refuses with {status}: it is so: {status}");
        assert_eq!(error_chain(&error), says);
        assert_eq!(error.is_of_the_gpu(), matches!(status, 400 | 403));
    }
    let nobody = Client::new("http://127.0.0.1:9", &Secret::new(KEY)).unwrap();
    let error = nobody.create(&pod(&server, "a")).await.unwrap_err();
    assert!(!error.may_be_done() && error.passes(), "{error:?}");
    assert_spoken(&server);
}

#[test]
fn the_key_goes_nowhere_where_others_could_read_it() {
    for url in [
        "http://api.runpod.io",
        "https://:hunter2@api.runpod.io",
        "api.runpod.io",
    ] {
        let error = Client::new(url, &Secret::new(KEY)).unwrap_err();
        let said = error_chain(&error);
        assert!(said.contains("`url` must be `https://"), "{said}");
        assert!(!said.contains("hunter2") && !said.contains(KEY), "{said}");
    }
}

#[tokio::test]
async fn a_refusal_names_what_is_wrong_and_hides_what_is_secret() {
    let Some(server) = Server::start().await else {
        return;
    };
    let client = client(&server);
    let mut wrong = pod(&server, "a");
    wrong.disk = Some(0);
    let error = client.create(&wrong).await.unwrap_err();
    let text = error_chain(&error);
    assert!(
        text.contains("refuses with 422: Request validation failed; $.disk: must be at least 1"),
        "{text}"
    );
    // RunPod repeats what it was told where it does not like it.
    let mut wrong = pod(&server, "a");
    wrong.ports = vec![format!("{TOKEN} {KEY}")];
    assert!(
        client.create(&wrong).await.is_ok(),
        "this one it does not look at"
    );
    let said = format!("no port `{TOKEN}`, {KEY}");
    let hidden =
        crate::scaler::runpod::client::redacted(said, [&Secret::new(TOKEN), &Secret::new(KEY)]);
    assert_eq!(hidden, "no port `[redacted]`, [redacted]");
    let odd = client.delete("../pods").await.unwrap_err();
    assert!(error_chain(&odd).contains("must have ids of letters and digits"));
}
