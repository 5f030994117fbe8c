//! Input, window and output by themselves: a store in memory, and an API whose model says what its prompt tells it to.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::answers::{GenerateSummary, LINE_BYTES_MAX};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::{SpecDigest, parse_line};
use espalier_runtime::ids::SequentialIds;
use espalier_runtime::net::Addresses;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::Store;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::error::GenerateError;
use super::handler::{self, Ends};
use super::input::{Input, Line};
use super::output::Output;
use super::window::{Answered, Window};
use super::{Answering, Source, run};
use crate::api::tests::scripted_offline;
use crate::engine::Health;

const PATH: &str = "p/uploads/a.jsonl";

fn key() -> JobKey {
    "p/b/j".parse().unwrap()
}

fn spec(name: &str) -> SpecDigest {
    let line = json!({"generate": {"requests": name}}).to_string();
    SpecDigest::of(&parse_line(line.as_bytes()).unwrap())
}

async fn store_with(text: &[u8]) -> Store {
    let store = Store::open("memory://").await.unwrap();
    store.put(PATH, Bytes::copy_from_slice(text)).await.unwrap();
    store
}

async fn input(store: &Store) -> Input {
    Input::open(store, &key(), PATH.to_owned()).await.unwrap()
}

async fn all(input: &Input, n: u64, start: u64, end: u64) -> Vec<Line> {
    let mut lines = input.lines(n, start, end);
    let mut all = Vec::new();
    while let Some(line) = lines.next().await.unwrap() {
        all.push(line);
    }
    all
}

#[tokio::test]
async fn lines_are_found_whatever_lies_between_them() {
    // Longer than one read of the store.
    let long = "x".repeat(5 << 20);
    let text = format!("a\n\n  \nb\r\n{long}\nlast");
    let store = store_with(text.as_bytes()).await;
    let lines = all(&input(&store).await, 7, 0, u64::MAX).await;
    let said: Vec<Bytes> = lines.iter().map(|l| l.content.clone().unwrap()).collect();
    assert_eq!(
        said,
        ["a".into(), "b\r".into(), Bytes::from(long), "last".into()]
    );
    let numbers: Vec<u64> = lines.iter().map(|line| line.n).collect();
    assert_eq!(numbers, [7, 8, 9, 10]);
    assert_eq!((lines[0].end, lines[1].end), (2, 9));
    assert_eq!(lines[3].end, text.len() as u64);
    // From the end of a line on it is the same.
    let rest = all(&input(&store).await, 9, lines[1].end, u64::MAX).await;
    let same = |a: &Line, b: &Line| (a.n, a.end, a.digest) == (b.n, b.end, b.digest);
    assert!(rest.iter().zip(&lines[2..]).all(|(a, b)| same(a, b)));
    assert_eq!(rest.len(), 2);
    let blank = store_with(b"\n \n").await;
    assert!(all(&input(&blank).await, 0, 0, u64::MAX).await.is_empty());
}

#[tokio::test]
async fn a_line_that_is_too_long_is_passed_over_and_not_kept() {
    let mut text = vec![b'x'; LINE_BYTES_MAX + (6 << 20)];
    text.extend(b"\nnext\n");
    let store = store_with(&text).await;
    let lines = all(&input(&store).await, 0, 0, u64::MAX).await;
    assert_eq!(lines[0].content, Err((LINE_BYTES_MAX + (6 << 20)) as u64));
    assert_eq!(lines[1].content, Ok("next".into()));
    assert_eq!(lines.len(), 2);
}

#[tokio::test]
async fn a_file_that_is_missing_or_changes_is_named() {
    let store = store_with(b"a\n").await;
    let there = input(&store).await;
    let said = there.lines_sha256().await.unwrap();
    there.check_says(&said).await.unwrap();
    // Whoever uploads it once more changes nothing, nor does a line end.
    for same in [&b"a\n"[..], b"a"] {
        store.put(PATH, Bytes::from_static(same)).await.unwrap();
        there.check_says(&said).await.unwrap();
    }
    store
        .put(PATH, Bytes::from_static(b"other\n"))
        .await
        .unwrap();
    let changed = there.check_says(&said).await.unwrap_err();
    assert!(
        matches!(changed, GenerateError::Changed { .. }),
        "{changed}"
    );
    store.delete(PATH).await.unwrap();
    let missing = Input::open(&store, &key(), PATH.to_owned()).await.err();
    assert!(matches!(missing, Some(GenerateError::Missing { .. })));
}

/// A window of `places` in front of the scripted API, and how its engine does.
fn window(places: usize) -> (Window, watch::Sender<Health>) {
    let (health, seen) = watch::channel(Health::Running);
    let window = Window {
        answering: Answering {
            offline: scripted_offline(),
            health: seen,
            sequences_max: places,
            serving: watch::Sender::default().subscribe(),
        },
        ids: Arc::new(SequentialIds::new("line")),
        places: Arc::new(Semaphore::new(places)),
        places_max: places,
        model: None,
    };
    (window, health)
}

fn chat(id: &str, script: &str) -> String {
    let body = json!({"messages": [{"role": "user", "content": script}]});
    json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body})
        .to_string()
}

/// Answers `texts` as the lines of a file.
async fn answer(window: &Window, texts: &[String]) -> Result<Vec<Value>, GenerateError> {
    let store = store_with(texts.join("\n").as_bytes()).await;
    let lines = all(&input(&store).await, 0, 0, u64::MAX).await;
    let (lines_in, received) = mpsc::channel(1);
    let (answers_in, mut answers) = mpsc::channel::<Answered>(1);
    let feed = async {
        for line in lines {
            let _ = lines_in.send(line).await;
        }
        drop(lines_in);
        Ok(())
    };
    let take = async {
        let mut taken = Vec::new();
        while let Some(answered) = answers.recv().await {
            taken.push(serde_json::from_slice(&answered.text).unwrap());
        }
        Ok(taken)
    };
    let working =
        async { tokio::try_join!(feed, window.answer_all(0, received, answers_in), take) };
    let ((), (), taken) = tokio::time::timeout(Duration::from_secs(60), working)
        .await
        .expect("it ends")?;
    Ok(taken)
}

#[tokio::test]
async fn every_line_is_answered_in_its_place() {
    let (mut window, _health) = window(3);
    window.model = Some("toy".to_owned());
    let mut texts: Vec<String> = (0..40)
        .map(|n| chat(&format!("c{n}"), &format!("say {n}")))
        .collect();
    texts[5] = "{}".to_owned();
    texts[17] = "not json".to_owned();
    texts[20] = texts[20].replace("\"messages\"", "\"model\":\"other\",\"messages\"");
    let answers = answer(&window, &texts).await.unwrap();
    assert_eq!(answers.len(), 40);
    for (n, answer) in answers.iter().enumerate() {
        match n {
            5 | 17 => {
                assert_eq!(answer["error"]["code"], "invalid_line", "{answer}");
                assert_eq!(
                    (&answer["custom_id"], &answer["response"]),
                    (&Value::Null, &Value::Null)
                );
            }
            20 => {
                assert_eq!(answer["response"]["status_code"], 404, "{answer}");
                let error = &answer["response"]["body"]["error"];
                assert_eq!(error["code"], "model_not_found");
            }
            n => {
                assert_eq!(answer["custom_id"], format!("c{n}"));
                let response = &answer["response"];
                assert_eq!(response["status_code"], 200);
                let body = &response["body"];
                assert_eq!(body["choices"][0]["message"]["content"], format!("say {n}"));
                assert_eq!(response["request_id"], body["id"]);
            }
        }
    }
}

#[tokio::test]
async fn a_job_whose_own_model_is_gone_gets_no_answers_of_that() {
    let (mut window, _health) = window(2);
    window.model = Some("gone".to_owned());
    let other = |id: &str, model: &str| {
        let named = format!("\"model\":{},\"messages\"", json!(model));
        chat(id, "say 1").replace("\"messages\"", &named)
    };
    // A line that names another one is answered as over HTTP.
    let texts = [other("a", "toy"), other("b", "never heard of")];
    let answers = answer(&window, &texts).await.unwrap();
    let status = |n: usize| answers[n]["response"]["status_code"].clone();
    assert_eq!((status(0), status(1)), (json!(200), json!(404)));
    for gone in [chat("c", "say 2"), other("c", "gone")] {
        let ended = answer(&window, &[other("a", "toy"), gone]).await;
        assert!(
            matches!(&ended, Err(GenerateError::NotServed { model }) if model == "gone"),
            "{ended:?}"
        );
    }
}

#[tokio::test]
async fn what_a_batch_asks_to_be_told_is_bounded_before_it_is_made() {
    let (window, _health) = window(2);
    let told = |top: u32| {
        let more = format!("\"logprobs\":true,\"top_logprobs\":{top},\"n\":128,\"messages\"");
        chat("a", "say 1").replace("\"messages\"", &more)
    };
    let limited = |top: u32| told(top).replace("\"n\"", "\"max_tokens\":300,\"n\"");
    let answers = answer(&window, &[limited(20), limited(0)]).await.unwrap();
    let refused = &answers[0]["response"];
    assert_eq!(refused["status_code"], 400, "{refused}");
    assert_eq!(refused["body"]["error"]["param"], "top_logprobs");
    assert_eq!(answers[1]["response"]["status_code"], 200);
}

#[tokio::test]
async fn an_engine_that_fails_gives_the_job_back_and_no_wrong_answers() {
    let (window, health) = window(2);
    health.send_replace(Health::Failed("the GPU fell off".into()));
    let ended = answer(&window, &[chat("a", "stopped")]).await;
    assert!(matches!(ended, Err(GenerateError::Engine(_))), "{ended:?}");
    // One answer that breaks while the engine runs is that line's alone.
    health.send_replace(Health::Running);
    let answers = answer(&window, &[chat("a", "broken"), chat("b", "fine")]).await;
    let answers = answers.unwrap();
    assert_eq!(answers[0]["response"]["status_code"], 500);
    assert_eq!(answers[1]["response"]["status_code"], 200);
}

#[tokio::test]
async fn a_process_whose_engine_failed_takes_no_more_jobs() {
    let (window, health) = window(2);
    let source = Source {
        // Nobody listens there, and nobody has to: the loop would try for ever.
        coordinators: Addresses::parse("http://127.0.0.1:1").unwrap(),
        tls: None,
        token: None,
        store: Store::open("memory://").await.unwrap(),
        shutdown: Shutdown::new(),
    };
    let mut taking = Box::pin(run(window.answering.clone(), source));
    assert!(futures::poll!(&mut taking).is_pending());
    health.send_replace(Health::Failed("the GPU fell off".into()));
    let ended = tokio::time::timeout(Duration::from_secs(60), taking).await;
    ended.expect("it ends").unwrap();
}

fn output(store: &Store, fence: u64, spec: SpecDigest) -> Output {
    Output::new(store.clone(), key(), Fence(fence), spec)
}

fn answered(line: &Line, by: &str) -> Answered {
    Answered {
        line: line.clone(),
        text: format!("{by} {}\n", line.n).into_bytes(),
        summary: GenerateSummary {
            lines: 1,
            failed: 0,
            prompt_tokens: 2,
            completion_tokens: 3,
        },
        request_bytes: 0,
    }
}

/// Answers `lines` as `by` would, `piece` at a time.
async fn fill(output: &mut Output, lines: &[Line], piece: usize, by: &str) {
    for lines in lines.chunks(piece) {
        for line in lines {
            output.push(answered(line, by));
        }
        output.store_pending().await.unwrap();
    }
}

/// What the pieces of an attempt say together.
async fn said(store: &Store, output: &Output) -> String {
    let mut text = String::new();
    for file in output.files() {
        let bytes = store.get(&file.path).await.unwrap();
        assert!(file.holds(&bytes));
        text.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    text
}

#[tokio::test]
async fn a_later_attempt_goes_on_after_what_earlier_ones_have_stored() {
    let store = store_with(b"a\nb\n\nc\nd\ne\nf\n").await;
    let input = input(&store).await;
    let lines = all(&input, 0, 0, u64::MAX).await;
    let mut first = output(&store, 1, spec("a"));
    fill(&mut first, &lines[..4], 2, "first").await;
    // The second takes both pieces over, and adds one.
    let mut second = output(&store, 2, spec("a"));
    second.take_over(&input).await.unwrap();
    assert_eq!((second.summary().lines, second.end()), (4, lines[3].end));
    fill(&mut second, &lines[4..5], 1, "second").await;
    // The third was killed while it took over: it has less than those before it.
    let mut third = output(&store, 3, spec("a"));
    let record = layout::answers_record(&key(), Fence(2), 1);
    let kept = store.get(&record).await.unwrap();
    store.delete(&record).await.unwrap();
    third.take_over(&input).await.unwrap();
    store.put(&record, kept).await.unwrap();
    assert_eq!(
        third.summary().lines,
        4,
        "the first has what the second lost"
    );
    let mut fourth = output(&store, 4, spec("a"));
    fourth.take_over(&input).await.unwrap();
    let expected = "first 0\nfirst 1\nfirst 2\nfirst 3\nsecond 4\n";
    assert_eq!(said(&store, &fourth).await, expected);
    let summary = fourth.summary();
    assert_eq!((summary.lines, summary.completion_tokens), (5, 15));
    let rest = all(&input, summary.lines, fourth.end(), u64::MAX).await;
    assert_eq!(rest.len(), 1);
    assert_eq!((rest[0].n, &rest[0].content), (5, &Ok("f".into())));
}

#[tokio::test]
async fn small_pieces_are_joined_when_they_are_taken_over() {
    let text: String = (0..100).map(|n| format!("{n}\n")).collect();
    let store = store_with(text.as_bytes()).await;
    let input = input(&store).await;
    let lines = all(&input, 0, 0, u64::MAX).await;
    let mut first = output(&store, 1, spec("a"));
    fill(&mut first, &lines[..90], 1, "first").await;
    let mut second = output(&store, 2, spec("a"));
    second.take_over(&input).await.unwrap();
    assert_eq!((first.files().len(), second.files().len()), (90, 1));
    assert_eq!(said(&store, &second).await, said(&store, &first).await);
    assert_eq!(
        (second.summary(), second.end()),
        (first.summary(), first.end())
    );
    fill(&mut second, &lines[90..], 4, "second").await;
    let mut third = output(&store, 3, spec("a"));
    third.take_over(&input).await.unwrap();
    assert_eq!(third.files().len(), 1);
    assert_eq!(said(&store, &third).await, said(&store, &second).await);
    // However often it is taken over, it is what all the lines say.
    assert_eq!(third.lines_sha256(), input.lines_sha256().await.unwrap());
    // Of what a torn piece is joined with, the ones before it count.
    let torn = layout::answers(&key(), Fence(1), 40);
    store.put(&torn, Bytes::from_static(b"torn")).await.unwrap();
    for fence in [2, 3] {
        for n in 0..4 {
            let record = layout::answers_record(&key(), Fence(fence), n);
            store.delete(&record).await.unwrap();
        }
    }
    let mut fourth = output(&store, 4, spec("a"));
    fourth.take_over(&input).await.unwrap();
    assert_eq!((fourth.summary().lines, fourth.files().len()), (40, 1));
}

/// Runs the storing of answers that come through the sender, in an attempt that is to hand on now.
async fn handing_on(
    store: &Store,
    answers: mpsc::Receiver<Answered>,
    stored: watch::Sender<u64>,
) -> Result<(), GenerateError> {
    let mut output = output(store, 1, spec("a"));
    let stopped = CancellationToken::new();
    let ends = Ends {
        stopped: &stopped,
        hand_on_at: Instant::now(),
    };
    let ended = handler::store(&mut output, answers, ends, |_| ()).await;
    stored.send_replace(output.summary().lines);
    ended
}

#[tokio::test]
async fn a_job_is_handed_on_at_its_time_if_it_got_ahead() {
    let store = store_with(b"a\nb\nc\n").await;
    let lines = all(&input(&store).await, 0, 0, u64::MAX).await;
    let (answers_in, answers) = mpsc::channel(8);
    let (told, stored) = watch::channel(0);
    let mut storing = Box::pin(handing_on(&store, answers, told));
    // Without an answer there is nothing to hand on.
    assert!(futures::poll!(&mut storing).is_pending());
    for line in &lines[..2] {
        answers_in.send(answered(line, "now")).await.unwrap();
    }
    let ended = storing.await;
    assert!(matches!(ended, Err(GenerateError::HandedOn)), "{ended:?}");
    assert_eq!(*stored.borrow(), 2);
    // A job whose last answers are there is done.
    let (answers_in, answers) = mpsc::channel(8);
    let (told, stored) = watch::channel(0);
    for line in &lines {
        answers_in.send(answered(line, "now")).await.unwrap();
    }
    drop(answers_in);
    handing_on(&store, answers, told).await.unwrap();
    assert_eq!(*stored.borrow(), 3);
}

#[test]
fn a_job_is_handed_on_a_little_before_its_time_is_over() {
    let began = Instant::now();
    for (max_runtime_s, after_ms) in [
        (1, 500),
        (3, 2_000),
        (20, 18_000),
        (3_600, 3_240_000),
        (86_400, 85_800_000),
    ] {
        let at = handler::hand_on_at(began, Duration::from_secs(max_runtime_s));
        assert_eq!(at - began, Duration::from_millis(after_ms));
    }
}

#[tokio::test]
async fn pieces_of_something_else_are_not_taken_over() {
    let text = b"a\nb\nc\nd\n";
    for (what, expected) in [
        ("nothing", 4),
        ("another spec", 0),
        ("other requests", 2),
        ("a torn piece", 2),
        ("no record", 2),
        ("a later attempt", 0),
    ] {
        let store = store_with(text).await;
        let lines = all(&input(&store).await, 0, 0, u64::MAX).await;
        let asked = spec(if what == "another spec" { "b" } else { "a" });
        let fence = if what == "a later attempt" { 9 } else { 1 };
        let mut earlier = output(&store, fence, asked);
        fill(&mut earlier, &lines, 2, "earlier").await;
        match what {
            "other requests" => store.put(PATH, Bytes::from_static(b"a\nb\nc\nD\n")).await,
            "a torn piece" => {
                let path = layout::answers(&key(), Fence(1), 1);
                store.put(&path, Bytes::from_static(b"torn")).await
            }
            "no record" => {
                store
                    .delete(&layout::answers_record(&key(), Fence(1), 1))
                    .await
            }
            _ => Ok(()),
        }
        .unwrap();
        let mut later = output(&store, 2, spec("a"));
        later.take_over(&input(&store).await).await.unwrap();
        assert_eq!(later.summary().lines, expected, "{what}");
    }
}
