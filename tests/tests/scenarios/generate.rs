//! Files of requests that an inference worker answers from the queue, on a tiny model with random weights: real
//! coordinator, real worker, real store, and whatever is killed in between.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use espalier_core::answers::Piece;
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_proto::v1::{GetTraceRequest, Job, JobState};
use espalier_tests::harness::cluster::Cluster;
use espalier_tests::harness::serving::{Serving, chat};
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(150);
/// Lines that one sequence of a slow machine does not answer within ten seconds; there are more of them until it cannot.
const FEW_LINES: usize = 25;
/// Nobody asks a model over HTTP here.
const NO_MODEL: &str = "http://127.0.0.1:9/v1";

/// A worker that takes jobs of `cluster`, with so many sequences at once.
async fn worker(cluster: &Cluster, sequences: u32) -> Serving {
    let (mut options, environment) = cluster.answering();
    options.extend(["--max-num-seqs".to_owned(), sequences.to_string()]);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Serving::start_with(&options, &environment).await
}

fn request(id: &str, url: &str, body: &Value) -> Value {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body})
}

/// So many chats, each of so many tokens; every other one is drawn with a seed of its own.
fn chats(count: usize, tokens: usize) -> Vec<Value> {
    let one = |n: usize| {
        let more = match n % 2 {
            0 => json!({"max_tokens": tokens, "ignore_eos": true}),
            _ => {
                json!({"max_tokens": tokens, "ignore_eos": true, "temperature": 1, "seed": n})
            }
        };
        let mut body = chat(&format!("say {n}"), more);
        // The base model answers who names none.
        body.as_object_mut().unwrap().remove("model");
        request(&format!("line-{n}"), "/v1/chat/completions", &body)
    };
    (0..count).map(one).collect()
}

/// Puts `lines` among the uploads of the project, and submits a job for them.
async fn submit(cluster: &Cluster, lines: &[String]) -> JobKey {
    submit_with(cluster, lines, json!({})).await
}

/// The same with more fields of the job.
async fn submit_with(cluster: &Cluster, lines: &[String], more: Value) -> JobKey {
    let folder = cluster.object("default/uploads/nightly");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("r.jsonl"), lines.join("\n")).unwrap();
    let mut job = json!({"id": "j", "generate": {"requests": "nightly/r.jsonl"}});
    let fields = more.as_object().unwrap().clone();
    job.as_object_mut().unwrap().extend(fields);
    let id = job["id"].as_str().unwrap().to_owned();
    let answer = cluster.client().await.submit("b", &[job]).await;
    assert_eq!(answer.accepted, 1, "{:?}", answer.rejected);
    cluster.key("b", &id)
}

fn texts(lines: &[Value]) -> Vec<String> {
    lines.iter().map(Value::to_string).collect()
}

async fn done(cluster: &Cluster, key: &JobKey) -> Job {
    let result = cluster.client().await.wait("b", DEADLINE).await;
    let job = &result.jobs[key.job.as_str()];
    assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
    job.clone()
}

/// The published answers, which verify.
fn answers(cluster: &Cluster, key: &JobKey) -> String {
    let manifest = cluster.manifest(key);
    let read = |path: &str| std::fs::read_to_string(cluster.object(path)).unwrap();
    manifest.files.iter().map(|file| read(&file.path)).collect()
}

fn parsed(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The fences of the attempts at a job, oldest first.
fn attempts(cluster: &Cluster, key: &JobKey) -> Vec<Fence> {
    let Ok(entries) = std::fs::read_dir(cluster.object(layout::job(key).trim_end_matches('/')))
    else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let fences = names.filter_map(|name| Some(Fence(name.strip_prefix("a-")?.parse().ok()?)));
    let mut fences: Vec<Fence> = fences.collect();
    fences.sort_unstable();
    fences
}

/// What the whole pieces of an attempt hold.
fn stored(cluster: &Cluster, key: &JobKey, fence: Fence) -> (u64, String) {
    let (mut lines, mut text) = (0, String::new());
    for n in 0.. {
        let Ok(record) = std::fs::read(cluster.object(&layout::answers_record(key, fence, n)))
        else {
            break;
        };
        let piece = Piece::parse(&record).unwrap();
        lines += piece.summary.lines;
        text += &std::fs::read_to_string(cluster.object(&piece.answers.path)).unwrap();
    }
    (lines, text)
}

/// Waits until a piece of the first attempt is whole.
async fn first_piece(cluster: &Cluster, key: &JobKey) -> Fence {
    wait_for("a piece of answers", DEADLINE, || {
        let attempts = attempts(cluster, key);
        let whole = attempts
            .iter()
            .find(|fence| stored(cluster, key, **fence).0 > 0);
        let found = whole.copied().ok_or(attempts.len());
        async move { found }
    })
    .await
}

/// All lines are there, in order, each with an answer.
fn check_complete(answers: &[Value], lines: &[Value]) {
    let ids = |lines: &[Value]| -> Vec<Value> {
        lines.iter().map(|line| line["custom_id"].clone()).collect()
    };
    assert_eq!(ids(answers), ids(lines));
    for answer in answers {
        assert_eq!(answer["response"]["status_code"], 200, "{answer}");
        assert_eq!(answer["error"], Value::Null);
    }
}

/// The same bodies over HTTP give the same answers, but for their names and what happened to be cached.
async fn check_equal_over_http(serving: &Serving, answers: &[Value], lines: &[Value]) {
    let asked = lines.iter().map(|line| async {
        let url = line["url"].as_str().unwrap();
        serving.ask(url, &line["body"]).await
    });
    let told = futures::future::join_all(asked).await;
    for ((status, body), answer) in told.iter().zip(answers) {
        let of_job = &answer["response"]["body"];
        assert_eq!(*status, 200);
        for field in ["object", "model", "choices"] {
            assert_eq!(of_job[field], body[field], "{answer}");
        }
        for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(of_job["usage"][field], body["usage"][field], "{answer}");
        }
    }
}

#[tokio::test]
async fn a_killed_worker_costs_no_line_that_was_stored_and_no_other_answer() {
    let cluster = Cluster::start(NO_MODEL, 3_000).await;
    let lines = chats(200, 12);
    let mut first = worker(&cluster, 1).await;
    let key = submit(&cluster, &texts(&lines)).await;
    let fence = first_piece(&cluster, &key).await;
    first.process.kill();
    let (before, kept) = stored(&cluster, &key, fence);
    assert!((1..200).contains(&before), "{before} of 200 lines");

    let second = worker(&cluster, 8).await;
    wait_for("a batch that is full", DEADLINE, || async {
        let running = second.metric("vllm:num_requests_running").await;
        if running == 8.0 { Ok(()) } else { Err(running) }
    })
    .await;
    let job = done(&cluster, &key).await;
    assert_eq!((job.attempts, job.infra_failures), (2, 1), "{job:?}");
    let text = answers(&cluster, &key);
    let answers = parsed(&text);
    check_complete(&answers, &lines);
    // The very answers of the first attempt, with their ids, and the others from the second worker.
    assert!(text.starts_with(&kept));
    let again = second.metric("vllm:request_success_total").await;
    assert_eq!(again as u64, 200 - before, "no stored line is done again");
    let summary = job.summary.unwrap().generate.unwrap();
    assert_eq!((summary.lines, summary.failed), (200, 0));
    assert_eq!(summary.completion_tokens, 200 * 12);
    for some in [0..4, 180..200] {
        check_equal_over_http(&second, &answers[some.clone()], &lines[some]).await;
    }
}

#[tokio::test]
async fn a_worker_that_stops_in_good_order_hands_its_job_on_and_spends_no_attempt() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let lines = chats(100, 24);
    let mut first = worker(&cluster, 1).await;
    let key = submit(&cluster, &texts(&lines)).await;
    let fence = first_piece(&cluster, &key).await;
    let status = first.process.terminate(DEADLINE).await;
    assert!(status.success(), "{}", first.process.log());
    let (before, kept) = stored(&cluster, &key, fence);
    let second = worker(&cluster, 8).await;
    let job = done(&cluster, &key).await;
    assert_eq!(
        (job.attempts, job.infra_failures, job.handler_failures),
        (2, 0, 0),
        "{job:?}"
    );
    let text = answers(&cluster, &key);
    assert!(text.starts_with(&kept));
    check_complete(&parsed(&text), &lines);
    let again = second.metric("vllm:request_success_total").await;
    assert_eq!(again as u64, 100 - before);
}

#[tokio::test]
async fn a_job_that_gets_ahead_is_handed_on_before_its_time_is_over() {
    let mut cluster = Cluster::start(NO_MODEL, 30_000).await;
    let serving = worker(&cluster, 1).await;
    let mut count = FEW_LINES;
    let mut answered_before = 0;
    let (key, job, lines) = loop {
        let lines = chats(count, 24);
        // Answers to fewer lines stay.
        let more = json!({"id": format!("of-{count}"), "max_runtime_s": 10});
        let key = submit_with(&cluster, &texts(&lines), more).await;
        let job = done(&cluster, &key).await;
        if job.attempts > 1 {
            break (key, job, lines);
        }
        // It fitted into its time.
        answered_before += count;
        count *= 2;
        cluster.forget_batches().await;
    };
    assert_eq!(
        (job.infra_failures, job.handler_failures),
        (0, 0),
        "{job:?}"
    );
    check_complete(&parsed(&answers(&cluster, &key)), &lines);
    let answered = serving.metric("vllm:request_success_total").await as usize - answered_before;
    assert!(answered >= count);
    // What runs as a job is handed on may be answered again, one sequence each time.
    assert!(answered <= count + 2 * job.attempts as usize);
}

#[tokio::test]
async fn answers_to_other_requests_of_the_same_name_are_not_taken_over() {
    let mut cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = worker(&cluster, 4).await;
    let lines = chats(8, 4);
    let key = submit(&cluster, &texts(&lines)).await;
    done(&cluster, &key).await;
    let before = answers(&cluster, &key);
    // The same requests, written again, have their answers already.
    cluster.forget_batches().await;
    submit(&cluster, &texts(&lines)).await;
    done(&cluster, &key).await;
    assert_eq!(answers(&cluster, &key), before);
    cluster.forget_batches().await;
    submit(&cluster, &texts(&chats(8, 5))).await;
    let result = cluster.client().await.wait("b", DEADLINE).await;
    let job = &result.jobs["j"];
    assert_eq!((job.state(), job.attempts), (JobState::Dead, 1), "{job:?}");
    let said = &job.last_error.as_ref().unwrap().message;
    assert!(said.contains("batch name already used"), "{said}");
    assert_eq!(answers(&cluster, &key), before, "they stay");
}

#[tokio::test]
async fn bad_lines_are_answered_in_their_place() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = worker(&cluster, 4).await;
    let chat_url = "/v1/chat/completions";
    let refused = |id: &str, more: Value| request(id, chat_url, &chat("hello", more)).to_string();
    let completion = json!({"prompt": "Once", "max_tokens": 5, "temperature": 0});
    let lines = [
        refused("good", json!({})),
        "{\"custom_id\": ".to_owned(),
        refused("streams", json!({"stream": true})),
        String::new(),
        refused("other", json!({"model": "elsewhere"})),
        refused("hot", json!({"temperature": -1})),
        request("embeds", "/v1/embeddings", &completion).to_string(),
        request("goes on", "/v1/completions", &completion).to_string(),
    ];
    let key = submit(&cluster, &lines).await;
    let job = done(&cluster, &key).await;
    let summary = job.summary.unwrap().generate.unwrap();
    assert_eq!((summary.lines, summary.failed), (7, 5));
    let answers = parsed(&answers(&cluster, &key));
    let said: Vec<(&Value, &Value, &Value)> = answers
        .iter()
        .map(|answer| {
            let status = &answer["response"]["status_code"];
            (&answer["custom_id"], status, &answer["error"]["code"])
        })
        .collect();
    let (none, bad) = (json!(null), json!("invalid_line"));
    let name = |id: &str| json!(id);
    let expected = [
        (name("good"), json!(200), none.clone()),
        (none.clone(), none.clone(), bad.clone()),
        (name("streams"), none.clone(), bad.clone()),
        (name("other"), json!(404), none.clone()),
        (name("hot"), json!(400), none.clone()),
        (name("embeds"), none.clone(), bad.clone()),
        (name("goes on"), json!(200), none.clone()),
    ];
    let expected: Vec<(&Value, &Value, &Value)> =
        expected.iter().map(|(a, b, c)| (a, b, c)).collect();
    assert_eq!(said, expected);
    let hot = &answers[4]["response"]["body"]["error"];
    assert_eq!(hot["param"], "temperature", "{hot}");
    let mut client = cluster.client().await;
    let trace = GetTraceRequest {
        batch: "b".to_owned(),
        id: "j".to_owned(),
    };
    let no_trace = client.jobs.get_trace(trace).await.unwrap_err();
    assert!(
        no_trace.message().contains("it is no rollout"),
        "{no_trace}"
    );
}

#[tokio::test]
async fn a_project_reads_no_uploads_of_another() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = worker(&cluster, 4).await;
    let key = submit(&cluster, &texts(&chats(1, 4))).await;
    done(&cluster, &key).await;
    let [_, mut other] = cluster.clients_at(cluster.addresses()[0]).await;
    let job = |id: &str, requests: &str| json!({"id": id, "generate": {"requests": requests}});
    let out = [
        job("up", "../../default/uploads/nightly/r.jsonl"),
        job("same", "nightly/r.jsonl"),
    ];
    let answer = other.submit("b", &out).await;
    assert_eq!((answer.accepted, answer.rejected.len()), (1, 1));
    assert_eq!(answer.rejected[0].errors[0].field, "generate.requests");
    let result = other.wait("b", DEADLINE).await;
    let same = &result.jobs["same"];
    assert_eq!((same.state(), same.attempts), (JobState::Dead, 1));
    let said = &same.last_error.as_ref().unwrap().message;
    assert!(said.contains("`other/uploads/nightly/r.jsonl`"), "{said}");
}

#[tokio::test]
async fn online_requests_go_before_a_queue_that_is_full_of_a_job() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let serving = worker(&cluster, 2).await;
    // Each line asks for 64 answers: of three lines at once, nearly 200 wait.
    let mut lines = chats(40, 64);
    for line in &mut lines {
        line["body"]["n"] = json!(64);
    }
    let key = submit(&cluster, &texts(&lines)).await;
    wait_for("a full queue", DEADLINE, || async {
        let waiting = serving.metric("vllm:num_requests_waiting").await;
        if waiting > 120.0 {
            Ok(())
        } else {
            Err(waiting)
        }
    })
    .await;
    let ended = || serving.metric("vllm:request_success_total");
    let before = ended().await;
    for n in 0..3 {
        let answer = serving.chat(&format!("now {n}"), json!({})).await;
        assert_eq!(answer["usage"]["completion_tokens"], 12);
    }
    // Those in their places end, and one of 17 that are admitted is the job's.
    let meanwhile = ended().await - before - 3.0;
    assert!(meanwhile < 30.0, "{meanwhile} answers went before three");
    let job = cluster.client().await.job(&key).await;
    assert_eq!(job.state(), JobState::Leased);
}

#[tokio::test]
async fn a_file_of_requests_becomes_a_file_of_answers() {
    let cluster = Cluster::start(NO_MODEL, 30_000).await;
    let _worker = worker(&cluster, 4).await;
    let folder = cluster.folder.path();
    let (file, output) = (folder.join("r.jsonl"), folder.join("a.jsonl"));
    let generate = || {
        let mut command = cluster.user();
        command.arg("generate").arg(&file).arg("-o").arg(&output);
        command.args([
            "--store",
            &cluster.store_url(),
            "--batch",
            "files",
            "--json",
        ]);
        let ran = command.output().unwrap();
        let said = String::from_utf8(ran.stdout).unwrap();
        let told: Value = serde_json::from_str(&said)
            .unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&ran.stderr)));
        (ran.status.code(), told)
    };
    let mut lines = chats(20, 8);
    // As a file for another service has it: each line names its model.
    for line in &mut lines[10..] {
        line["body"]["model"] = json!("tiny");
    }
    let mut bad = texts(&lines);
    bad[7] = bad[7].replace("POST", "GET");
    std::fs::write(&file, bad.join("\n")).unwrap();
    let (code, said) = generate();
    let refusal = &said["refusals"][0];
    assert_eq!((code, &refusal["place"]), (Some(2), &json!(8)), "{said}");
    assert_eq!(refusal["field"], "method");
    assert!(!output.exists());

    std::fs::write(&file, texts(&lines).join("\n")).unwrap();
    let (code, said) = generate();
    assert_eq!((code, &said["lines"]), (Some(0), &json!(20)), "{said}");
    let text = std::fs::read_to_string(&output).unwrap();
    check_complete(&parsed(&text), &lines);
    // A job for each model.
    for part in ["part-000000", "part-000001"] {
        let manifest = cluster.manifest(&cluster.key("files", part));
        assert_eq!(manifest.summary.generate().unwrap().lines, 10);
        let uploads = "default/uploads/batches/files/";
        assert!(manifest.parents[0].starts_with(uploads), "{manifest:?}");
    }
    // The same command again finds what is there.
    let (code, _) = generate();
    assert_eq!(code, Some(0));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), text);
}
