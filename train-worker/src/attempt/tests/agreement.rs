//! What was served, held against what training computes, over whole attempts.

use espalier_core::adapter::{Agreement, Difference, TrainSummary};
use espalier_core::chat::Message;
use espalier_core::time::Timestamp;
use espalier_core::trace::{AdapterRef, ModelCall, PromptTokens, Trace};
use espalier_runtime::traces::Traces;

use super::*;

/// `ab` and the like in Qwen3's ids, of which the tiny model has 512.
const SAID: [u32; 3] = [64, 65, 66];

/// A rollout of one call, whose sampled tokens all have the same log-probability.
async fn roll_out(store: &Store, job: &str, logprob: f32, adapter: Option<&str>) {
    let golden = include_str!("../../../../crates/core/tests/golden/trace-v1.json");
    let mut trace = Trace::from_json(golden.as_bytes()).unwrap();
    trace.header.job = format!("p/{job}").parse().unwrap();
    trace.messages = vec![Message::assistant("abc".to_owned(), None, vec![])];
    trace.tool_calls = Vec::new();
    trace.model_calls = vec![ModelCall {
        adapter: adapter.map(|name| AdapterRef {
            name: name.to_owned(),
            sha256: None,
        }),
        prompt: Some(PromptTokens::tell(&[7, 8, 9], None)),
        completion_ids: Some(SAID.to_vec()),
        logprobs: Some(vec![logprob; SAID.len()]),
        ..ModelCall::default()
    }];
    let traces = Traces::new(store.clone(), trace.header.job.project.clone());
    traces.publish(trace, vec![], Timestamp(1)).await.unwrap();
}

/// The job that is held against these batches.
fn against(batches: &[&str]) -> JobDraft {
    let mut job = job("");
    let named = batches.iter().map(|batch| (*batch).to_owned());
    job.train.as_mut().unwrap().agreement = named.collect();
    job
}

fn came_to(published: &Published) -> TrainSummary {
    published.summary.train().unwrap().clone()
}

#[tokio::test]
async fn what_was_served_is_compared_once_before_the_first_step() {
    let store = store().await;
    roll_out(&store, "base/1", -0.25, None).await;
    roll_out(&store, "base/2", -7.0, Some("shop")).await;
    roll_out(&store, "more/1", -0.5, None).await;
    let job = against(&["base", "more"]);
    let loader = fake();
    loader.fail_at.store(6, Ordering::SeqCst);
    attempt(&workshop(&store, loader), &job, 1)
        .await
        .unwrap_err();
    // The next attempt goes on, and has its predecessor's word.
    for name in ["base/jobs/1", "more/jobs/1"] {
        let manifest = format!("p/batches/{name}/manifest.json");
        store.delete(&manifest).await.unwrap();
    }
    let published = attempt(&workshop(&store, fake()), &job, 2).await.unwrap();
    let expected = Difference {
        traces: 2,
        tokens: 6,
        mean: 0.125,
        max: 0.25,
    };
    assert_eq!(
        came_to(&published).agreement,
        Some(Agreement::Measured(expected))
    );
    let record = store.get("p/adapters/shop/v1.json").await.unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let agreement = &record["training"]["agreement"];
    assert_eq!(
        (&agreement["mean"], &agreement["tokens"]),
        (&0.125.into(), &6.into())
    );
}

#[tokio::test]
async fn a_process_that_ends_compares_no_more() {
    let store = store().await;
    for n in 1..=2 {
        roll_out(&store, &format!("base/{n}"), -0.25, None).await;
    }
    let loader = fake();
    let draining = workshop(&store, loader.clone());
    *loader.drain_at.lock().unwrap() = Some((0, draining.shutdown.clone()));
    let error = attempt(&draining, &against(&["base"]), 1).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, TrainError::Preempted { step: 0 }),
        "{error}"
    );
}

#[tokio::test]
async fn nothing_to_compare_is_no_fault() {
    let store = store().await;
    roll_out(&store, "tuned/1", -0.25, Some("shop")).await;
    for (batches, why) in [
        (
            &["tuned", "none"][..],
            Some("`p/tuned/1`: the adapter `shop` answered"),
        ),
        (&["none"], Some("batch `none` holds no rollout")),
        (&[], None),
    ] {
        let job = against(batches);
        let fence = 1 + batches.len() as u64;
        let published = attempt(&workshop(&store, fake()), &job, fence).await;
        let expected = why.map(Agreement::unmeasured);
        assert_eq!(came_to(&published.unwrap()).agreement, expected);
        store.delete(&layout::manifest(&key())).await.unwrap();
    }
}

#[tokio::test]
async fn the_engine_computes_the_base_model_before_its_first_step() {
    let store = store().await;
    roll_out(&store, "base/1", -6.0, None).await;
    let published = attempt(&workshop(&store, engine()), &against(&["base"]), 1).await;
    let agreement = came_to(&published.unwrap()).agreement.unwrap();
    let difference = agreement.difference().unwrap();
    assert_eq!((difference.traces, difference.tokens), (1, 3));
    // A model of random weights knows nothing: each of 512 ids is about as likely.
    let chance = 512_f64.ln() - 6.0;
    assert!((difference.mean - chance).abs() < 2.0, "{agreement}");
}
