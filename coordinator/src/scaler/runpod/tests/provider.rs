//! The provider: what the scaler counts on.

use std::time::Duration;

use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_testbed::runpod::{Runpod as Server, Trouble};
use serde_json::json;

use super::{A5000, H100, L4, TOKEN, assert_spoken, config};
use crate::scaler::provider::{InstanceState, Provider, ProviderError};
use crate::scaler::runpod::config::RunpodConfig;
use crate::scaler::runpod::provider::Runpod;

fn provider(config: &RunpodConfig) -> Runpod {
    Runpod::new(config.clone()).unwrap()
}

/// What the first `n` pods were created with.
fn gpus(server: &Server) -> Vec<String> {
    let pods = server.pods().into_iter();
    let gpu =
        |request: serde_json::Value| request["gpu"]["id"].as_str().unwrap_or_default().to_owned();
    pods.map(|pod| gpu(pod.request)).collect()
}

#[tokio::test]
async fn an_instance_is_a_pod_that_says_whose_it_is() {
    let Some(server) = Server::start().await else {
        return;
    };
    server.provisioning(Duration::from_secs(600));
    let provider = provider(&config(&server, &[L4]));
    provider.create("train", "espalier-train-0").await.unwrap();
    let asked = &server.pods()[0].request;
    assert_eq!(asked["name"], "espalier-train-0");
    assert_eq!(
        asked["env"],
        json!({
            "ESPALIER_INSTANCE": "espalier-train-0", "ESPALIER_POOL": "train", "ESPALIER_SCALER": "espalier",
            "ESPALIER_TRAIN_WORKER_TOKEN": TOKEN,
        })
    );
    let [starting] = &provider.list().await.unwrap()[..] else {
        panic!("one instance");
    };
    assert_eq!(
        (starting.pool.as_str(), starting.name.as_str()),
        ("train", "espalier-train-0")
    );
    assert_eq!(
        (&starting.state, starting.price_per_hour),
        (&InstanceState::Starting, 0.39)
    );
    let age = SystemClock.now().since(starting.created_at);
    assert!(
        starting.created_at > Timestamp::default() && age < Duration::from_secs(60),
        "{age:?}"
    );
    server.set_status("espalier-train-0", "RUNNING");
    assert_eq!(
        provider.list().await.unwrap()[0].state,
        InstanceState::Running
    );
    for (status, says) in [
        ("EXITED", "RunPod says `exited`"),
        ("ERROR", "RunPod says `error`"),
    ] {
        server.set_status("espalier-train-0", status);
        let failed = provider.list().await.unwrap().remove(0);
        assert_eq!(failed.state, InstanceState::Failed(says.to_owned()));
    }
    server.set_status("espalier-train-0", "TERMINATED");
    assert!(provider.list().await.unwrap().is_empty());
    server.set_status("espalier-train-0", "RUNNING");
    let instance = provider.list().await.unwrap().remove(0);
    provider.delete(&instance).await.unwrap();
    provider.delete(&instance).await.unwrap();
    assert!(provider.list().await.unwrap().is_empty() && server.pods().is_empty());
    assert_spoken(&server);
}

#[tokio::test]
async fn pods_of_others_are_left_alone() {
    let Some(server) = Server::start().await else {
        return;
    };
    let config = config(&server, &[L4]);
    let foreign = |name: &str, env| {
        server.put(&json!({"name": name, "image": "x", "gpu": {"id": L4}, "env": env}));
    };
    foreign("espalier-train-0", json!({}));
    foreign(
        "other",
        json!({"ESPALIER_SCALER": "other", "ESPALIER_INSTANCE": "espalier-train-1"}),
    );
    let provider = provider(&config);
    assert!(provider.list().await.unwrap().is_empty());
    let refused = provider
        .create("train", "espalier-train-0")
        .await
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("another pod `espalier-train-0` (pod0000001)"),
        "{refused}"
    );
    assert_eq!(server.count("POST"), 0);
    provider.create("train", "espalier-train-1").await.unwrap();
    assert_eq!(provider.list().await.unwrap().len(), 1);
    let refused = provider
        .create("serve", "espalier-serve-0")
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "refused: `serve` is no pool of the configuration"
    );
    assert_spoken(&server);
}

#[tokio::test]
async fn another_coordinator_finds_them_and_makes_no_second() {
    let Some(server) = Server::start().await else {
        return;
    };
    let config = config(&server, &[L4]);
    provider(&config)
        .create("train", "espalier-train-0")
        .await
        .unwrap();
    let next = provider(&config);
    assert_eq!(next.list().await.unwrap()[0].name, "espalier-train-0");
    for _ in 0..2 {
        next.create("train", "espalier-train-0").await.unwrap();
    }
    provider(&config)
        .create("train", "espalier-train-0")
        .await
        .unwrap();
    assert_eq!((server.count("POST"), server.pods().len()), (1, 1));
    assert_spoken(&server);
}

#[tokio::test]
async fn a_lost_reply_makes_no_second_pod() {
    let Some(server) = Server::start().await else {
        return;
    };
    let provider = provider(&config(&server, &[L4]));
    server.trouble("POST", Trouble::CutAfter, 1);
    let lost = provider
        .create("train", "espalier-train-0")
        .await
        .unwrap_err();
    assert!(matches!(lost, ProviderError::Unavailable(_)), "{lost}");
    provider.create("train", "espalier-train-0").await.unwrap();
    assert_eq!((server.count("POST"), server.pods().len()), (1, 1));
    // Where RunPod does not list a pod yet there may be a second one, and both are told by the name that they share.
    server.unlisted_at_first(1);
    server.trouble("POST", Trouble::CutAfter, 1);
    provider
        .create("train", "espalier-train-1")
        .await
        .unwrap_err();
    server.unlisted_at_first(0);
    provider.create("train", "espalier-train-1").await.unwrap();
    let instances = provider.list().await.unwrap();
    let names: Vec<&str> = instances
        .iter()
        .map(|instance| instance.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["espalier-train-0", "espalier-train-1", "espalier-train-1"]
    );
    assert_spoken(&server);
}

#[tokio::test]
async fn the_first_gpu_that_there_is_is_taken() {
    let Some(server) = Server::start().await else {
        return;
    };
    let config = config(&server, &[A5000, L4, H100]);
    provider(&config)
        .create("train", "espalier-train-0")
        .await
        .unwrap();
    server.stock(A5000, "NONE", 0);
    let next = provider(&config);
    next.create("train", "espalier-train-1").await.unwrap();
    assert_eq!(
        (gpus(&server), server.count("POST")),
        (vec![A5000.to_owned(), L4.to_owned()], 2)
    );
    // The catalogue still has it, and it is gone.
    server.stock(L4, "LOW", 0);
    next.create("train", "espalier-train-2").await.unwrap();
    next.create("train", "espalier-train-3").await.unwrap();
    assert_eq!(gpus(&server)[2..], [H100.to_owned(), H100.to_owned()]);
    assert_eq!(server.count("POST"), 5, "L4 was asked for again");
    server.stock(H100, "LOW", 0);
    let none = next.create("train", "espalier-train-4").await.unwrap_err();
    let ProviderError::NoCapacity(says) = &none else {
        panic!("{none:?}");
    };
    assert!(
        says.contains("There are no instances") && says.contains("`NVIDIA L4` is not to be had"),
        "{says}"
    );
    let before = server.count("POST");
    next.create("train", "espalier-train-4").await.unwrap_err();
    assert_eq!(server.count("POST"), before);
    assert_spoken(&server);
}

#[tokio::test]
async fn no_pod_is_made_that_the_budget_does_not_allow() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut config = config(&server, &[H100, L4, A5000]);
    config.max_per_hour = 0.7;
    let provider = provider(&config);
    // H100 costs more than all, then L4 more than what is left.
    provider.create("train", "espalier-train-0").await.unwrap();
    provider.create("train", "espalier-train-1").await.unwrap();
    assert_eq!(gpus(&server), [L4, A5000]);
    let none = provider
        .create("train", "espalier-train-2")
        .await
        .unwrap_err();
    let ProviderError::NoCapacity(says) = &none else {
        panic!("{none:?}");
    };
    assert!(
        says.contains("`NVIDIA H100 80GB HBM3` costs $2.99 an hour, and `max_per_hour` is $0.70"),
        "{says}"
    );
    assert!(
        says.contains("costs $0.27 an hour, and $0.04 are left"),
        "{says}"
    );
    // What others have on the account is not counted, and what has ended costs nothing.
    server.put(&json!({"name": "mine", "image": "x", "gpu": {"id": H100}}));
    let first = provider.list().await.unwrap().remove(0);
    provider.delete(&first).await.unwrap();
    provider.create("train", "espalier-train-2").await.unwrap();
    let cost: f64 = provider
        .list()
        .await
        .unwrap()
        .iter()
        .map(|instance| instance.price_per_hour)
        .sum();
    assert!((cost - 0.66).abs() < 1e-9, "{cost}");
    assert_spoken(&server);
}

#[tokio::test]
async fn a_pod_that_costs_more_than_was_said_is_given_back() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut config = config(&server, &[L4]);
    config.max_per_hour = 1.0;
    let provider = provider(&config);
    provider.create("train", "espalier-train-0").await.unwrap();
    server.price(L4, 0.99, 0.99);
    let dear = provider
        .create("train", "espalier-train-1")
        .await
        .unwrap_err();
    assert!(
        dear.to_string()
            .contains("costs $0.99 an hour, and not $0.39"),
        "{dear}"
    );
    assert_eq!(server.names(), ["espalier-train-0"]);
}

#[tokio::test]
async fn what_no_time_changes_is_refused() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut config = config(&server, &["NVIDIA L40", H100]);
    config.pools[0].max_price = Some(0.5);
    let refused = provider(&config)
        .create("train", "espalier-train-0")
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "refused: `NVIDIA L40` is not in RunPod's catalogue; `NVIDIA H100 80GB HBM3` costs $2.99 an hour, and `max_price` \
         is $0.50"
    );
    config.pools[0].gpus = vec![A5000.to_owned()];
    config.pools[0].gpu_count = 9;
    let refused = provider(&config)
        .create("train", "espalier-train-0")
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("comes at most 8 in a pod"),
        "{refused}"
    );
    assert_eq!(server.count("POST"), 0);
}

#[tokio::test]
async fn refusals_say_what_kind_they_are() {
    let Some(server) = Server::start().await else {
        return;
    };
    let provider = provider(&config(&server, &[L4]));
    for (status, says) in [
        (401, "the key must be one of the account"),
        (402, "the account needs credit"),
        (404, "refuses with 404"),
        (422, "refuses with 422"),
        // The last one: the GPU is taken for gone, as long as the catalogue counts.
        (403, "the key may not make such pods"),
    ] {
        server.trouble("POST", Trouble::Status(status, None), 1);
        let refused = provider
            .create("train", "espalier-train-0")
            .await
            .unwrap_err();
        let ProviderError::Refused(text) = &refused else {
            panic!("{status}: {refused:?}");
        };
        assert!(text.contains(says), "{status}: {text}");
    }
    let next = Runpod::new(config(&server, &[L4])).unwrap();
    server.trouble("POST", Trouble::Status(503, None), 1);
    let away = next.create("train", "espalier-train-0").await.unwrap_err();
    assert!(matches!(away, ProviderError::Unavailable(_)), "{away:?}");
    server.trouble("GET /v2/pods", Trouble::Status(429, Some(7)), 1);
    let limited = next.create("train", "espalier-train-0").await.unwrap_err();
    let retry_after = Duration::from_secs(7);
    assert_eq!(limited, ProviderError::RateLimited { retry_after });
    let limited = next.list().await.unwrap_err();
    assert!(
        matches!(limited, ProviderError::RateLimited { .. }),
        "{limited:?}"
    );
    assert!(server.pods().is_empty());
}
