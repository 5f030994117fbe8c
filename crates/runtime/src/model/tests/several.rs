//! Endpoints that a coordinator tells of: which one answers, and what follows when one does not.

use std::collections::BTreeSet;

use super::*;

fn served(name: &str, settings: &ModelEndpoint) -> Served {
    Served {
        name: name.to_owned(),
        model: "qwen3".to_owned(),
        base_url: settings.base_url.clone(),
        api_key_name: Some("main".to_owned()),
        weight: 1,
        healthy: true,
        vllm_extensions: true,
        logprobs: true,
        project: None,
    }
}

fn told(served: &[Served]) -> ModelClient {
    let keys = [("main".to_owned(), Secret::new(KEY))];
    let mut client = ModelClient::told(keys.into());
    client.backoff = Backoff {
        first: Duration::from_millis(1),
        max: Duration::from_millis(2),
    };
    client.update(served);
    client
}

async fn ask(client: &ModelClient, affinity: &str) -> Result<ChatTurn, ModelError> {
    let messages = [Message::User {
        content: "hi".to_owned(),
    }];
    let request = ChatRequest {
        model: "qwen3",
        messages: &messages,
        tools: &[],
        sampling: &sampling(),
        extra: &Map::new(),
        vllm_extra: &Map::new(),
        affinity,
        project: "p",
    };
    client.chat(&request, &CancellationToken::new()).await
}

/// Answers to more calls than any test makes.
fn answers() -> Vec<Reply> {
    (0..200).map(|_| Reply::Json(200, hello())).collect()
}

/// An endpoint at which nobody listens.
async fn dead() -> ModelEndpoint {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    ModelEndpoint::new(url)
}

#[tokio::test]
async fn a_rollout_stays_at_one_endpoint_and_rollouts_are_spread() {
    let (one, at_one) = start(answers()).await;
    let (two, at_two) = start(answers()).await;
    let client = told(&[served("one", &at_one), served("two", &at_two)]);
    let mut used = BTreeSet::new();
    for n in 0..20 {
        let affinity = format!("p/b/j{n}");
        let first = ask(&client, &affinity).await.unwrap().endpoint;
        for _ in 0..3 {
            assert_eq!(ask(&client, &affinity).await.unwrap().endpoint, first);
        }
        used.insert(first);
    }
    assert_eq!(used.len(), 2, "{used:?}");
    assert_eq!(one.requests() + two.requests(), 80);
    let headers = one.0.lock().unwrap().requests[0].0.clone();
    assert_eq!(headers[AUTHORIZATION], format!("Bearer {KEY}"));
}

#[tokio::test]
async fn of_two_models_of_one_name_that_of_the_own_project_answers() {
    let (_own, at_own) = start(answers()).await;
    let (other, at_other) = start(answers()).await;
    let of = |name: &str, settings: &ModelEndpoint, project: &str| Served {
        project: Some(project.to_owned()),
        ..served(name, settings)
    };
    let foreign = of("other", &at_other, "q");
    let client = told(&[of("own", &at_own, "p"), foreign.clone()]);
    for n in 0..20 {
        let turn = ask(&client, &format!("p/b/j{n}")).await.unwrap();
        assert_eq!(turn.endpoint, "own");
    }
    assert_eq!(other.requests(), 0);
    // Who has none of their own may ask for it all the same.
    let turn = ask(&told(&[foreign]), "p/b/j").await.unwrap();
    assert_eq!(turn.endpoint, "other");
}

#[tokio::test]
async fn no_rollout_fails_when_one_of_two_endpoints_dies() {
    let (alive, at_alive) = start(answers()).await;
    let dead = dead().await;
    let client = told(&[served("alive", &at_alive), served("dead", &dead)]);
    let mut retries = 0;
    for n in 0..50 {
        let turn = ask(&client, &format!("p/b/j{n}")).await.unwrap();
        assert_eq!(turn.endpoint, "alive");
        retries += turn.retries;
    }
    assert_eq!(alive.requests(), 50);
    // Three failures in a row show it; then it is left out, but for a probe now and then.
    assert!(
        (3..=8).contains(&retries),
        "{retries} tries at a dead endpoint"
    );
}

#[tokio::test]
async fn what_is_wrong_with_one_endpoint_is_not_wrong_with_all() {
    for fault in [
        Reply::Json(401, json!({"error": "who are you"})),
        Reply::Json(404, json!({"error": "no such model"})),
        Reply::Headers(429, "retry-after", "60".to_owned()),
        Reply::Broken(hello_events()[..1].to_vec()),
    ] {
        let (_, faulty) = start([fault]).await;
        let (_, good) = start([Reply::Json(200, hello()), Reply::Json(200, hello())]).await;
        let client = told(&[served("faulty", &faulty), served("good", &good)]);
        // An affinity whose first endpoint is the faulty one.
        let mut n = 0;
        let turn = loop {
            let turn = ask(&client, &format!("j{n}")).await.unwrap();
            if turn.retries > 0 {
                break turn;
            }
            n += 1;
            assert!(n < 2, "the good one has two answers: {turn:?}");
        };
        assert_eq!((turn.endpoint.as_str(), turn.retries), ("good", 1));
    }
    // What is wrong with the request is wrong everywhere.
    let bad = || Reply::Json(400, json!({"error": "no"}));
    let ((one, at_one), (two, at_two)) = (start([bad()]).await, start([bad()]).await);
    let client = told(&[served("one", &at_one), served("two", &at_two)]);
    assert_eq!(ask(&client, "j").await.unwrap_err().as_str(), "bad_request");
    assert_eq!(one.requests() + two.requests(), 1);
}

#[tokio::test]
async fn the_tries_at_all_endpoints_together_are_those_of_one_call() {
    let (one, two) = (dead().await, dead().await);
    let client = told(&[served("one", &one), served("two", &two)]);
    let error = ask(&client, "j").await.unwrap_err();
    assert_eq!(error.as_str(), "connect");
    let tries = client.endpoints();
    let tries: u32 = tries.iter().map(|member| member.failures()).sum();
    assert_eq!(tries, 1 + max_retries());
}

#[tokio::test]
async fn the_list_may_change_and_says_who_is_healthy() {
    let (_, settings) = start(answers()).await;
    let keyless = Served {
        api_key_name: Some("other".to_owned()),
        ..served("keyless", &settings)
    };
    let of_another = Served {
        model: "other".to_owned(),
        ..served("another", &settings)
    };
    let client = told(&[keyless, of_another]);
    let error = ask(&client, "j").await.unwrap_err();
    assert_eq!(
        (error.as_str(), error.class()),
        ("no_endpoint", ErrorClass::Infra)
    );

    let ill = Served {
        healthy: false,
        ..served("ill", &settings)
    };
    client.update(std::slice::from_ref(&ill));
    assert_eq!(
        ask(&client, "j").await.unwrap().endpoint,
        "ill",
        "better than none"
    );
    client.update(&[ill, served("well", &settings)]);
    for n in 0..10 {
        let turn = ask(&client, &format!("j{n}")).await.unwrap();
        assert_eq!(turn.endpoint, "well");
    }
    assert!(!format!("{client:?}").contains(KEY));
    // One that is named no more is better than none, for a while.
    client.update(&[served("well", &dead().await)]);
    assert_eq!(ask(&client, "j").await.unwrap().endpoint, "ill");
    // A client of one endpoint stays with it.
    let fixed = super::client(&settings);
    fixed.update(&[]);
    assert_eq!(ask(&fixed, "j").await.unwrap().endpoint, "");
}

#[tokio::test]
async fn an_endpoint_that_is_named_no_more_is_the_last_resort_until_it_is_forgotten_or_back() {
    let (_, settings) = start(answers()).await;
    let one = served("one", &settings);
    let client = told(std::slice::from_ref(&one));
    client.update(&[]);
    assert_eq!(ask(&client, "j").await.unwrap().endpoint, "one");
    client.update(&[one.clone(), served("two", &dead().await)]);
    let client = &client;
    let homes = (0..8).map(|n| async move { ask(client, &format!("j{n}")).await.unwrap().retries });
    let homes = futures::future::join_all(homes).await;
    assert!(
        homes.contains(&0),
        "it is no last resort any more: {homes:?}"
    );

    client.update(&[]);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    assert_eq!(ask(client, "j").await.unwrap_err().as_str(), "no_endpoint");
    client.update(&[one]);
    assert_eq!(ask(client, "j").await.unwrap().endpoint, "one");
}
