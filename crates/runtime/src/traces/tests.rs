//! Publishing, reading, correcting and the workshop's form, over a store in memory.

use espalier_core::chat::{Message, ToolCall};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::spec::{JobDraft, PromptDraft, Sampling};
use espalier_core::time::Timestamp;
use espalier_core::trace::edits::{Change, Edit, Patch};
use espalier_core::trace::{CheckResult, StopReason, Trace, Verdict};
use serde_json::{Value, json};

use super::{Traces, TracesError, workshop};
use crate::store::faults::{Fault, Faults};
use crate::store::{Created, Store};

const NOW: Timestamp = Timestamp(1_750_000_000_000_000);

fn sampling() -> Sampling {
    let draft = JobDraft {
        prompt: PromptDraft::One("x".to_owned()),
        ..JobDraft::default()
    };
    draft.check().unwrap().rollout().unwrap().sampling.clone()
}

fn key(job: &str) -> JobKey {
    format!("shop/import-1/{job}").parse().unwrap()
}

fn file() -> Value {
    json!({
        "timestamp": "20250529_130900",
        "model": "Qwen/Qwen3-30B-A3B-FP8",
        "messages": [
            {"role": "system", "content": "look at the footer", "hint": true},
            {"role": "user", "content": "price?"},
            {"role": "assistant", "content": "\n\n", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "open", "arguments": "{\"url\": \"a\\u2013b\"}"}},
                {"id": "c2", "type": "function", "function": {"name": "open", "arguments": "{\"url"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            {"role": "tool", "tool_call_id": "c2", "content": "not JSON"},
            {"role": "assistant", "content": "5"}],
        "tools": [{"type": "function", "function": {"name": "open", "description": "opens",
            "parameters": {"type": "object", "properties": {"url": {"type": "string"}}}}}],
    })
}

fn trace(job: &str) -> Trace {
    workshop::read(file().to_string().as_bytes(), key(job), sampling()).unwrap()
}

async fn traces() -> Traces {
    let store = Store::open("memory://").await.unwrap();
    Traces::new(store, "shop".parse().unwrap())
}

#[test]
fn a_workshop_file_is_mended_as_it_is_read() {
    let trace = trace("a");
    assert_eq!(trace.outcome.stop, StopReason::Answered);
    assert_eq!(trace.outcome.totals.turns, 2);
    assert_eq!(trace.outcome.totals.tool_errors, 1);
    let Message::Assistant {
        content,
        tool_calls,
        ..
    } = &trace.messages[2]
    else {
        panic!("{:?}", trace.messages[2]);
    };
    assert_eq!(content, "");
    assert_eq!(tool_calls[0].function.arguments["url"], "a–b");
    assert_eq!(tool_calls[1].function.malformed.as_deref(), Some("{\"url"));
}

#[test]
fn what_was_written_reads_back_the_same() {
    let trace = trace("a");
    let text = workshop::write(&trace).to_string();
    assert!(
        text.contains(r#""arguments":"{\"url\":\"a–b\"}""#),
        "{text}"
    );
    let again = workshop::read(text.as_bytes(), key("a"), sampling()).unwrap();
    assert_eq!(again, trace);
}

#[test]
fn refusals_name_the_place() {
    let mut bad = file();
    bad["messages"][1]["role"] = json!("root");
    let error = workshop::read(bad.to_string().as_bytes(), key("a"), sampling()).unwrap_err();
    assert_eq!(error.field, "messages[1].role");
    bad = file();
    bad["timestamp"] = json!("yesterday");
    let error = workshop::read(bad.to_string().as_bytes(), key("a"), sampling()).unwrap_err();
    assert_eq!(
        (error.field.as_str(), error.value.as_str()),
        ("timestamp", "yesterday")
    );
    assert!(workshop::read(b"{", key("a"), sampling()).is_err());
}

/// The workshop's own files, where this checkout lies beside them.
#[test]
fn the_workshops_own_files_survive_the_round_trip() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/data/workshop-traces"
    );
    let Ok(entries) = std::fs::read_dir(folder) else {
        eprintln!("SKIPPED: {folder} is not there");
        return;
    };
    let files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 4);
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let trace = workshop::read(&bytes, key("w"), sampling()).unwrap();
        let written = workshop::write(&trace);
        let again = workshop::read(written.to_string().as_bytes(), key("w"), sampling()).unwrap();
        assert_eq!(again, trace, "{}", file.display());
        let original: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(written["timestamp"], original["timestamp"]);
        assert_eq!(written["tools"], original["tools"]);
        for (ours, theirs) in written["messages"]
            .as_array()
            .unwrap()
            .iter()
            .zip(original["messages"].as_array().unwrap())
        {
            assert_eq!(ours["role"], theirs["role"]);
            assert_eq!(
                ours["content"].as_str().unwrap().trim(),
                theirs["content"].as_str().unwrap().trim()
            );
        }
    }
}

#[tokio::test]
async fn published_traces_are_listed_and_read() {
    let traces = traces().await;
    for job in ["b", "a"] {
        let published = traces.publish(trace(job), Vec::new(), NOW).await.unwrap();
        assert_eq!(published, Created::New);
    }
    // What an attempt left without a manifest is not seen.
    let stray = layout::trace(&key("c"), Fence(9));
    traces.store.put(&stray, "x".into()).await.unwrap();

    let listed = traces.list(None).await.unwrap();
    let jobs: Vec<&str> = listed.iter().map(|one| one.job.job.as_str()).collect();
    assert_eq!(jobs, ["a", "b"]);
    let loaded = traces.load(&listed[0]).await.unwrap();
    assert_eq!(loaded.trace, trace("a"));
    assert_eq!(loaded.manifest.spec_sha256, None, "no job asked for it");
    let other: espalier_core::id::BatchId = "other".parse().unwrap();
    assert!(traces.list(Some(&other)).await.unwrap().is_empty());

    let again = traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    assert_eq!(again, Created::Exists);
    let missing = traces.find(&key("zz")).await.unwrap();
    let error = traces.load(&missing).await.unwrap_err();
    assert!(matches!(error, TracesError::NotPublished(_)), "{error}");
}

/// Another trace of the same job.
fn variant(job: &str) -> Trace {
    let mut file = file();
    file["messages"][5]["content"] = json!("6");
    workshop::read(file.to_string().as_bytes(), key(job), sampling()).unwrap()
}

#[tokio::test]
async fn of_two_that_publish_at_once_one_counts_and_is_whole() {
    let traces = traces().await;
    let (first, second) = tokio::join!(
        traces.publish(trace("a"), Vec::new(), NOW),
        traces.publish(variant("a"), Vec::new(), NOW),
    );
    let results = [first.unwrap(), second.unwrap()];
    let count = results.iter().filter(|one| **one == Created::New).count();
    assert_eq!(count, 1, "{results:?}");
    let listed = traces.find(&key("a")).await.unwrap();
    let loaded = traces.load(&listed).await.unwrap();
    let winner = if results[0] == Created::New {
        trace("a")
    } else {
        variant("a")
    };
    assert_eq!(loaded.trace.messages, winner.messages);
}

#[tokio::test]
async fn a_file_that_somebody_left_is_never_written_over() {
    let traces = traces().await;
    let path = layout::trace(&key("a"), Fence(1));
    let left = super::pack(&path, &variant("a")).unwrap();
    traces.store.put(&path, left.clone().into()).await.unwrap();
    let published = traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    assert_eq!(published, Created::New);
    assert_eq!(traces.store.get(&path).await.unwrap(), left);
    let listed = traces.find(&key("a")).await.unwrap();
    let loaded = traces.load(&listed).await.unwrap();
    assert_eq!(loaded.trace.header.fence, Fence(2));
    assert_eq!(loaded.trace.messages, trace("a").messages);

    // One's own from before an interruption is taken up.
    let path = layout::trace(&key("b"), Fence(1));
    let own = super::pack(&path, &trace("b")).unwrap();
    traces.store.put(&path, own.into()).await.unwrap();
    traces.publish(trace("b"), Vec::new(), NOW).await.unwrap();
    let listed = traces.find(&key("b")).await.unwrap();
    assert_eq!(
        traces.load(&listed).await.unwrap().trace.header.fence,
        Fence(1)
    );
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_not_taken_for_an_empty_one() {
    let store = Store::open("memory://").await.unwrap();
    let denied = Faults::new(|operation, _| (operation == "head").then_some(Fault::Denied));
    let traces = Traces::new(store.with_faults(denied), "shop".parse().unwrap());
    let error = traces
        .publish(trace("a"), Vec::new(), NOW)
        .await
        .unwrap_err();
    assert!(matches!(error, TracesError::Store(_)), "{error}");
}

#[tokio::test]
async fn an_altered_trace_is_refused() {
    let traces = traces().await;
    traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    let path = layout::trace(&key("a"), Fence(1));
    traces.store.put(&path, "other".into()).await.unwrap();
    let listed = traces.find(&key("a")).await.unwrap();
    let error = traces.load(&listed).await.unwrap_err();
    assert!(matches!(error, TracesError::Altered { .. }), "{error}");
}

fn verdict(reward: f64) -> Change {
    let checks = vec![CheckResult {
        path: "answer".to_owned(),
        score: reward,
        reason: "half right".to_owned(),
    }];
    let verdict = Verdict { reward, checks };
    Change::Verdict { verdict }
}

fn answer(content: &str) -> Change {
    let edit = Edit::Content {
        message: 5,
        content: content.to_owned(),
    };
    Change::Edit { edits: vec![edit] }
}

#[tokio::test]
async fn corrections_are_a_log_whose_newest_verdict_counts() {
    let traces = traces().await;
    traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    let listed = traces.find(&key("a")).await.unwrap();
    let mut loaded = traces.load(&listed).await.unwrap();
    let changes = [verdict(0.25), answer("5 €"), verdict(0.5)];
    for (seen, change) in (0..).zip(changes) {
        let patch = Patch::new(change, "test", NOW, seen);
        let n;
        (n, loaded) = traces.patch(loaded, patch).await.unwrap();
        assert_eq!(n, seen);
    }
    let listed = traces.list(None).await.unwrap();
    assert_eq!(listed[0].patches, 3);
    assert_eq!(listed[0], traces.find(&key("a")).await.unwrap());
    let again = traces.load(&listed[0]).await.unwrap();
    assert_eq!((&again.log, &again.curated), (&loaded.log, &loaded.curated));
    assert_eq!(again.trace, trace("a"), "what was published stays");
    assert_eq!(again.curated.answer(), "5 €");
    assert_eq!(again.curated.reward(), Some(0.5));
    let summary = again.manifest.summary.rollout().unwrap();
    assert_eq!(summary.reward, Some(0.5));
    assert_eq!(summary.reason, "half right");
}

#[tokio::test]
async fn of_two_that_correct_at_once_both_count_unless_they_meet() {
    let traces = traces().await;
    traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    let listed = traces.find(&key("a")).await.unwrap();
    let stale = traces.load(&listed).await.unwrap();
    let by = |who: &str, change| Patch::new(change, who, NOW, 0);
    let (first, second, third) = tokio::join!(
        traces.patch(stale.clone(), by("ann", answer("five"))),
        traces.patch(stale.clone(), by("bob", Change::Drop)),
        traces.patch(stale.clone(), by("cy", verdict(0.5))),
    );
    let mut numbers: Vec<u32> = [first, second, third].map(|r| r.unwrap().0).into();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2]);
    let late = traces.patch(stale, by("di", answer("six"))).await;
    let error = late.unwrap_err();
    assert!(matches!(error, TracesError::Refused { .. }), "{error}");
    let listed = traces.find(&key("a")).await.unwrap();
    let loaded = traces.load(&listed).await.unwrap();
    assert_eq!(loaded.curated.answer(), "five");
    assert!(loaded.curated.standing.dropped);
    assert_eq!(loaded.curated.refused, []);
}

#[tokio::test]
async fn a_log_with_a_gap_is_refused() {
    let traces = traces().await;
    traces.publish(trace("a"), Vec::new(), NOW).await.unwrap();
    let text = serde_json::to_vec(&Patch::new(Change::Drop, "test", NOW, 1)).unwrap();
    let path = layout::patch(&key("a"), 1);
    traces.store.put(&path, text.into()).await.unwrap();
    let listed = traces.find(&key("a")).await.unwrap();
    let error = traces.load(&listed).await.unwrap_err().to_string();
    assert!(
        error.contains("000000.json` is not a correction: it is missing"),
        "{error}"
    );
    let path = layout::patch(&key("a"), 0);
    traces.store.put(&path, "{}".into()).await.unwrap();
    let error = traces.load(&listed).await.unwrap_err();
    assert!(matches!(error, TracesError::Patch { .. }), "{error}");
}

#[test]
fn a_frame_that_is_none_is_refused() {
    assert!(matches!(
        super::unpack("x", b"no frame"),
        Err(TracesError::Packed { .. })
    ));
}

#[test]
fn calls_are_matched_by_their_id() {
    let trace = trace("a");
    let call = ToolCall::new("c1", "open", serde_json::Map::new());
    assert_eq!(trace.tool_calls[0].call_id, call.id);
    assert_eq!(trace.tool_calls[0].message, 3);
}
