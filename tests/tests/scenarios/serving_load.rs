//! The inference worker under load and under bad luck: adapters that change while requests run, a thousand clients, ones
//! that read slowly or go, requests that make no sense, and an end in the middle.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use espalier_tests::harness::process::Process;
use espalier_tests::harness::serving::{Serving, chat, command, fingerprint};
use espalier_tests::harness::{tiny, wait_for};
use futures::StreamExt as _;
use futures::future::join_all;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn adapters_change_hands_while_requests_run() {
    let serving = Serving::start(&[]).await;
    let folders = [serving.path("v1"), serving.path("v2")];
    let (mut answers, mut digests) = (Vec::new(), Vec::new());
    for (seed, folder) in (1..).zip(&folders) {
        tiny::write_adapter(folder, seed);
        let (status, loaded) = serving.load_adapter("lora", folder).await;
        assert_eq!(
            (status, &loaded["version"]),
            (200, &json!(seed)),
            "{loaded}"
        );
        let answer = serving
            .chat("swap", json!({"model": "lora", "max_tokens": 40}))
            .await;
        digests.push(fingerprint(&loaded));
        answers.push(answer["choices"].clone());
    }
    let base = serving.chat("swap", json!({"max_tokens": 40})).await["choices"].clone();
    assert!(
        answers[0] != answers[1] && answers[0] != base,
        "the adapters change nothing"
    );
    let serving = Arc::new(serving);
    let stop = Arc::new(AtomicBool::new(false));
    let ask = |model: &'static str| {
        let (serving, stop) = (Arc::clone(&serving), Arc::clone(&stop));
        async move {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let answer = serving
                    .chat("swap", json!({"model": model, "max_tokens": 40}))
                    .await;
                seen.push((
                    answer["system_fingerprint"].clone(),
                    answer["choices"].clone(),
                ));
            }
            seen
        }
    };
    let asking = join_all([ask("lora"), ask("lora"), ask("lora"), ask("tiny")]);
    let swapping = async {
        for round in 0..8 {
            let (status, loaded) = serving.load_adapter("lora", &folders[round % 2]).await;
            assert_eq!(status, 200, "{loaded}");
            let answer = serving.chat("swap", json!({"model": "lora", "max_tokens": 40}));
            let digest = &answer.await["system_fingerprint"];
            assert_eq!(
                digest,
                &fingerprint(&loaded),
                "a request that came after the swap"
            );
        }
        stop.store(true, Ordering::Relaxed);
    };
    let (seen, ()) = tokio::join!(asking, swapping);
    let mut versions = [0, 0];
    for (digest, choices) in seen[..3].iter().flatten() {
        let version = digests.iter().position(|known| known == digest).unwrap();
        versions[version] += 1;
        assert_eq!(choices, &answers[version], "an answer of two versions");
    }
    assert!(versions.iter().all(|count| *count > 0), "{versions:?}");
    assert!(
        seen[3].iter().all(|(_, choices)| *choices == base),
        "the base model changed"
    );
}

#[tokio::test]
async fn a_broken_adapter_is_refused_with_the_reason() {
    let serving = Serving::start(&["--max-loras", "1"]).await;
    let path = serving.path("a");
    tiny::write_adapter(&path, 1);
    let (status, loaded) = serving.load_adapter("good", &path).await;
    assert_eq!((status, loaded.get("warning")), (200, None), "{loaded}");
    let [other, experts, cut] = ["other", "experts", "cut"].map(|name| serving.path(name));
    tiny::write_adapter_of_another(&other);
    tiny::write_adapter_with(&experts, "model.layers.0.mlp.experts.0.up_proj");
    tiny::write_adapter(&cut, 1);
    let file = cut.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    for (name, path, reason) in [
        (
            "good",
            &other,
            "has shape [4, 96], the configuration says [4, 64]",
        ),
        (
            "good",
            &experts,
            "mlp.experts.0.up_proj.lora_A.weight adapts no projection of this model",
        ),
        ("good", &cut, "is truncated or not safetensors"),
        ("good", &serving.path("none"), "is no folder"),
        ("more", &path, "`--max-loras` allows no more"),
    ] {
        let (status, error) = serving.load_adapter(name, path).await;
        assert_eq!(status, 400, "{error}");
        assert!(
            error["error"]["message"].as_str().unwrap().contains(reason),
            "{reason}: {error}"
        );
    }
    assert_eq!(serving.load_adapter("tiny", &path).await.0, 409);
    // A name alone proves nothing where the shapes fit.
    tiny::say_base(&path, "Qwen/Qwen3-8B");
    let (status, loaded) = serving.load_adapter("good", &path).await;
    let warning = loaded["warning"].as_str().unwrap();
    assert!(
        status == 200 && warning.contains("`Qwen/Qwen3-8B`"),
        "{loaded}"
    );
    let answer = serving.chat("still there", json!({"model": "good"})).await;
    assert!(answer["system_fingerprint"].is_string());
    let gone = serving
        .client
        .delete(format!("{}/v1/adapters/good", serving.url))
        .send()
        .await
        .unwrap();
    assert_eq!(gone.status(), 200);
    assert_eq!(
        serving
            .ask("/v1/chat/completions", &chat("x", json!({"model": "good"})))
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn a_thousand_clients_are_all_answered() {
    let serving = Serving::start(&[]).await;
    let ask = |client: usize| {
        let serving = &serving;
        async move {
            let answer = serving
                .chat(&format!("client {client}"), json!({"max_tokens": 4}))
                .await;
            assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
        }
    };
    join_all((0..1_000).map(ask)).await;
    serving.wait_until_idle().await;
    assert_eq!(serving.metric("vllm:request_success_total").await, 1_000.0);
}

#[tokio::test]
async fn a_queue_that_is_full_says_so() {
    let serving = Serving::start(&["--max-num-seqs", "1", "--max-queue", "2"]).await;
    let long = json!({"max_tokens": 400, "ignore_eos": true});
    let ask = |_| {
        serving
            .post("/v1/chat/completions", &chat("wait", long.clone()))
            .send()
    };
    let answers = join_all((0..12).map(ask)).await;
    let mut refused = 0;
    for answer in answers.into_iter().map(Result::unwrap) {
        match answer.status().as_u16() {
            200 => assert!(answer.bytes().await.is_ok()),
            429 => {
                refused += 1;
                assert_eq!(answer.headers()["retry-after"], "1");
            }
            other => panic!("{other}"),
        }
    }
    assert!(refused > 0);
    serving.wait_until_idle().await;
}

#[tokio::test]
async fn a_client_that_goes_frees_what_it_held() {
    let serving = Serving::start(&[]).await;
    let body = chat(
        "on and on",
        json!({"stream": true, "max_tokens": 3_000, "ignore_eos": true}),
    );
    let mut streams = Vec::new();
    for _ in 0..4 {
        let response = serving
            .post("/v1/chat/completions", &body)
            .send()
            .await
            .unwrap();
        let mut stream = response.bytes_stream();
        stream.next().await.unwrap().unwrap();
        streams.push(stream);
    }
    // A stream begins before its first step.
    wait_for("blocks to be held", DEADLINE, || async {
        let held = serving.metric("vllm:kv_cache_usage_perc").await;
        if held > 0.0 { Ok(()) } else { Err(held) }
    })
    .await;
    drop(streams);
    serving.wait_until_idle().await;
}

#[tokio::test]
async fn a_slow_reader_holds_nobody_up() {
    let serving = Serving::start(&[]).await;
    let body = chat(
        "slow",
        json!({"stream": true, "max_tokens": 300, "ignore_eos": true, "logprobs": true}),
    );
    let body = body.to_string();
    let address = serving.url.trim_start_matches("http://").to_owned();
    let mut slow = TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(body.as_bytes()).await.unwrap();
    let mut byte = [0];
    for _ in 0..6 {
        slow.read_exact(&mut byte).await.unwrap();
        serving.chat("quick", json!({"max_tokens": 2})).await;
    }
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).await.unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"));
    serving.wait_until_idle().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_by_name_and_the_worker_stays() {
    let serving = Serving::start(&["--max-model-len", "512"]).await;
    let nameless = json!([{"type": "function", "function": {"description": "x"}}]);
    let broken =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}});
    for (more, status, param, says) in [
        (
            json!({"temperature": "NaN"}),
            400,
            "temperature",
            "got \"NaN\"",
        ),
        (
            json!({"top_p": 0}),
            400,
            "top_p",
            "must be above 1e-37 and at most 1, got 0",
        ),
        (json!({"max_tokens": -5}), 400, "max_tokens", "got -5"),
        (
            json!({"tools": nameless}),
            400,
            "tools[0].function.name",
            "must be a name of 1 to 256 bytes, got \"\"",
        ),
        (
            json!({"response_format": broken}),
            400,
            "response_format",
            "nothing",
        ),
        (
            json!({"prompt_token_ids": [200_000]}),
            400,
            "prompt_token_ids[0]",
            "must be a token id below 151669, got 200000",
        ),
        (
            json!({"messages": [{"role": "user", "content": "word ".repeat(600)}]}),
            413,
            "messages",
            "maximum context length is 512 tokens",
        ),
        (json!({"model": "other"}), 404, "model", "`other`"),
    ] {
        let (found, error) = serving
            .ask("/v1/chat/completions", &chat("x", more.clone()))
            .await;
        assert_eq!(
            (found, error["error"]["param"].as_str()),
            (status, Some(param)),
            "{more}: {error}"
        );
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(says), "{says} is not in {message}");
    }
    let ten_megabytes = chat(&"x".repeat(10 << 20), json!({})).to_string();
    for (body, status, says) in [
        (b"{\"temperature\": NaN}".to_vec(), 400, "`temperature`"),
        (
            b"{\"messages\": \"\xff\xfe\"}".to_vec(),
            400,
            "must be UTF-8, and is not from byte 14 on",
        ),
        (
            ten_megabytes.into_bytes(),
            413,
            "maximum context length is 512 tokens",
        ),
        (
            vec![b'x'; 20 << 20],
            413,
            "the body must have at most 16777216 bytes",
        ),
    ] {
        let request = serving
            .client
            .post(format!("{}/v1/chat/completions", serving.url))
            .header("content-type", "application/json");
        let answer = request.body(body).send().await.unwrap();
        let found = answer.status().as_u16();
        let error: Value = answer.json().await.unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(found == status && message.contains(says), "{says}: {error}");
    }
    serving.chat("still there", json!({})).await;
    assert_eq!(serving.get("/health").await.0, 200);
}

#[tokio::test]
async fn a_worker_that_is_told_to_end_finishes_what_it_has() {
    let mut serving = Serving::start(&["--shutdown-timeout", "60"]).await;
    let body = chat(
        "last words",
        json!({"stream": true, "max_tokens": 300, "ignore_eos": true}),
    );
    let response = serving
        .post("/v1/chat/completions", &body)
        .send()
        .await
        .unwrap();
    let mut stream = response.bytes_stream();
    let mut text = stream.next().await.unwrap().unwrap().to_vec();
    serving
        .process
        .signal(espalier_tests::harness::process::Signal::TERM);
    while let Some(piece) = stream.next().await {
        text.extend_from_slice(&piece.unwrap());
    }
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("\"finish_reason\":\"length\"") && text.contains("[DONE]"),
        "{text}"
    );
    assert!(serving.process.wait(DEADLINE).await.success());
}

#[tokio::test]
async fn an_end_that_takes_too_long_is_cut_short() {
    let mut serving = Serving::start(&["--shutdown-timeout", "0"]).await;
    let body = chat(
        "never",
        json!({"stream": true, "max_tokens": 3_900, "ignore_eos": true}),
    );
    let response = serving
        .post("/v1/chat/completions", &body)
        .send()
        .await
        .unwrap();
    let mut stream = response.bytes_stream();
    stream.next().await.unwrap().unwrap();
    let status = serving.process.terminate(Duration::from_secs(30)).await;
    assert_eq!(status.code(), Some(1), "answers were broken off");
}

/// What the worker says when it cannot start.
async fn refused(change: impl FnOnce(&std::path::Path), options: &[&str]) -> String {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model");
    tiny::write_model(&model);
    change(&model);
    let command: Command = command(folder.path(), &model.display().to_string(), options);
    let mut process = Process::start("infer", command, folder.path());
    let ended = wait_for("the worker to refuse", DEADLINE, || {
        let ended = process.ended();
        async move { ended.ok_or("it runs") }
    })
    .await;
    assert!(!ended.success());
    process.log()
}

#[tokio::test]
async fn a_model_that_cannot_be_served_is_refused_with_the_reason() {
    let edit = |file: &'static str, from: &'static str, to: &'static str| {
        move |model: &std::path::Path| {
            let path = model.join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            std::fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let index = "model.safetensors.index.json";
    let missing =
        |model: &std::path::Path| std::fs::remove_file(model.join(tiny::SHARDS[1])).unwrap();
    let cut = |model: &std::path::Path| {
        let path = model.join(tiny::SHARDS[0]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    let said = |log: String, words: &str| assert!(log.contains(words), "{words} is not in {log}");
    said(refused(missing, &[]).await, "which is not in the folder");
    said(refused(cut, &[]).await, "is truncated or not safetensors");
    said(
        refused(
            edit("config.json", "\"hidden_size\":64", "\"hidden_size\":128"),
            &[],
        )
        .await,
        "has shape",
    );
    said(
        refused(edit("config.json", "\"qwen3\"", "\"gpt2\""), &[]).await,
        "`model_type` must be",
    );
    said(
        refused(edit(index, tiny::SHARDS[1], "../up.safetensors"), &[]).await,
        "which is not in the folder",
    );
    let nothing = |_: &std::path::Path| {};
    let wide = ["--max-model-len", "4000000"];
    said(refused(nothing, &wide).await, "does not fit");
    said(
        refused(nothing, &["--kv-cache-memory-bytes", "1KiB"]).await,
        "are needed",
    );
    said(
        refused(nothing, &["--adapter", "a=/none"]).await,
        "is no folder",
    );
    said(
        refused(nothing, &["--max-num-batched-tokens", "16"]).await,
        "must be at least `--max-num-seqs`",
    );
}
