//! Recordings that end well, badly, twice, and on stores that misbehave.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use espalier_core::chat::ToolCall;
use espalier_core::error::ErrorClass;
use espalier_core::spec::{Sampling, Task, parse_line};
use espalier_core::trace::{
    Decision, Manifest, Provenance, SCHEMA_VERSION, StopReason, Totals, Trace, TraceError,
};
use espalier_runtime::clock::SystemClock;
use espalier_runtime::publish::{
    Claim, Found, Gate, NoLease, PublishError, find_at_start, find_published,
};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::StoreLimits;
use espalier_runtime::store::faults::{Fault, Faults};
use tempfile::TempDir;

use super::*;

struct World {
    dir: TempDir,
    context: RecordContext,
}

impl World {
    async fn new() -> Self {
        Self::with_store(Store::open("memory://").await.unwrap()).await
    }

    async fn with_store(store: Store) -> Self {
        let dir = TempDir::new().unwrap();
        let context = RecordContext {
            store,
            spool: Spool::open(dir.path()).await.unwrap(),
            clock: Arc::new(SystemClock),
            tasks: Tasks::new(Shutdown::new()),
        };
        Self { dir, context }
    }

    async fn recorder(&self, fence: u64) -> Recorder {
        self.recorder_of(fence, Some(spec("price?"))).await
    }

    async fn recorder_of(&self, fence: u64, spec: Option<SpecDigest>) -> Recorder {
        let fence = Fence(fence);
        let mut recorder = Recorder::open(self.context.clone(), key(), 1, fence, spec)
            .await
            .unwrap();
        recorder.header(header(fence)).await.unwrap();
        let content = "price?".to_owned();
        recorder.message(Message::User { content }).await.unwrap();
        recorder
    }

    /// What an attempt at a job that asks for `spec` finds.
    async fn find(&self, spec: Option<&SpecDigest>) -> Found {
        let (key, fence) = (key(), Fence(9));
        let claim = Claim {
            key: &key,
            fence,
            spec,
        };
        find_published(&self.context.store, claim).await.unwrap()
    }

    async fn manifest(&self) -> Option<Manifest> {
        let bytes = self
            .context
            .store
            .get(&layout::manifest(&key()))
            .await
            .ok()?;
        Some(Manifest::parse(&bytes, &key()).unwrap())
    }

    async fn lines(&self, fence: u64, n: u32) -> Option<String> {
        let path = layout::segment(&key(), Fence(fence), n);
        let packed = self.context.store.get(&path).await.ok()?;
        Some(String::from_utf8(zstd::decode_all(&packed[..]).unwrap()).unwrap())
    }

    async fn all_ended(&self) {
        self.context
            .tasks
            .join_all(Duration::from_secs(20))
            .await
            .unwrap();
    }

    fn attempts(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("attempts"))
            .unwrap()
            .count()
    }
}

fn key() -> JobKey {
    "p/b/j".parse().unwrap()
}

/// What a job with this prompt asks for.
fn spec(prompt: &str) -> SpecDigest {
    let line = serde_json::json!({"prompt": prompt}).to_string();
    SpecDigest::of(&parse_line(line.as_bytes()).unwrap())
}

fn header(fence: Fence) -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        id: format!("{}@{fence}", key()),
        job: key(),
        attempt: 1,
        fence,
        started_at_us: Default::default(),
        otel_trace_id: None,
        task: Task::default(),
        labels: Default::default(),
        provenance: Provenance {
            espalier_version: "0".into(),
            model: "m".into(),
            sampling: Sampling {
                thinking: true,
                temperature: 0.6,
                top_p: 0.95,
                top_k: 20,
                min_p: 0.0,
                presence_penalty: 0.0,
                seed: None,
                completion_tokens_max: 10,
            },
            tools_sha256: String::new(),
            mcp_servers: vec![],
            browser: None,
            tokenizer_sha256: None,
            replay: Vec::new(),
        },
        tools: vec![],
        verify: None,
    }
}

fn outcome(turns: u32) -> Outcome {
    Outcome {
        stop: StopReason::Answered,
        ended_at_us: Default::default(),
        final_url: None,
        verdict: None,
        totals: Totals {
            turns,
            ..Totals::default()
        },
    }
}

/// Holds the lease, or not; moves a bad manifest aside, or not.
struct Always {
    may_publish: bool,
    moves: Option<Store>,
    reports: AtomicU32,
}

fn gate(may_publish: bool) -> Always {
    Always {
        may_publish,
        moves: None,
        reports: AtomicU32::new(0),
    }
}

impl Gate for Always {
    fn may_publish(&self) -> bool {
        self.may_publish
    }

    async fn report_invalid(&self, _reason: &str) -> bool {
        self.reports.fetch_add(1, Ordering::SeqCst);
        match &self.moves {
            Some(store) => store.delete(&layout::manifest(&key())).await.is_ok(),
            None => false,
        }
    }
}

#[tokio::test]
async fn a_published_trace_verifies_and_leaves_nothing_on_this_machine() {
    let world = World::new().await;
    let mut recorder = world.recorder(7).await;
    let raw = Bytes::from_static(b"{\"content\": []}");
    let blob = recorder
        .blob(raw.clone(), "application/json")
        .await
        .unwrap()
        .unwrap();
    let same = recorder
        .blob(raw, "application/json")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(blob, same);
    let call = ToolCall::new("c", "open", Default::default());
    let turn = Message::assistant(String::new(), None, vec![call]);
    recorder.message(turn).await.unwrap();
    let tool = Message::Tool {
        tool_call_id: "c".into(),
        content: "ok".into(),
    };
    let record = ToolCallRecord {
        message: 2,
        call_id: "c".into(),
        name: "open".into(),
        server: None,
        tool: None,
        arguments: Default::default(),
        decision: Decision::Allowed,
        is_error: false,
        raw: Some(blob),
        images: vec![],
        shown_tokens: 1,
        truncated: false,
        started_at_us: Default::default(),
        latency_ms: 1,
    };
    assert_eq!(recorder.tool_call(tool, record).await.unwrap(), 2);
    let published = recorder.publish(outcome(1), &gate(true)).await.unwrap();
    assert!(!published.adopted);
    assert_eq!(published.summary.rollout().unwrap().totals.turns, 1);

    let Found::Published(manifest) = world.find(Some(&spec("price?"))).await else {
        panic!("not published");
    };
    assert_eq!((manifest.fence, manifest.files.len()), (Fence(7), 2));
    let packed = world
        .context
        .store
        .get(&layout::trace(&key(), Fence(7)))
        .await
        .unwrap();
    let trace = Trace::from_json(&zstd::decode_all(&packed[..]).unwrap()).unwrap();
    assert_eq!((trace.messages.len(), trace.tool_calls.len()), (3, 1));
    world.all_ended().await;
    assert_eq!(world.attempts(), 0);
}

#[tokio::test]
async fn a_recording_that_is_dropped_shows_nothing_and_keeps_its_steps() {
    let world = World::new().await;
    drop(world.recorder(7).await);
    world.all_ended().await;
    assert_eq!(world.manifest().await, None);
    assert_eq!(world.attempts(), 0);
    let lines = world.lines(7, 0).await.unwrap();
    assert_eq!(
        Trace::from_lines(&lines),
        Err(TraceError::NoOutcome { messages: 1 })
    );
}

#[tokio::test]
async fn every_step_is_in_the_file_when_the_call_returns() {
    let world = World::new().await;
    let recorder = world.recorder(7).await;
    let file = world
        .context
        .spool
        .folder(&key(), Fence(7))
        .join("steps.jsonl");
    let lines = std::fs::read_to_string(file).unwrap();
    assert_eq!(
        Trace::from_lines(&lines),
        Err(TraceError::NoOutcome { messages: 1 })
    );
    drop(recorder);
}

#[tokio::test]
async fn the_later_attempt_takes_over_what_a_zombie_published_first() {
    let world = World::new().await;
    let (zombie, holder) = (world.recorder(1).await, world.recorder(2).await);
    zombie.publish(outcome(3), &gate(true)).await.unwrap();
    let published = holder.publish(outcome(5), &gate(true)).await.unwrap();
    assert!(published.adopted);
    assert_eq!(
        published.summary.rollout().unwrap().totals.turns,
        3,
        "the summary is of what is published"
    );
    assert_eq!(world.manifest().await.unwrap().fence, Fence(1));
}

#[tokio::test]
async fn a_result_of_another_spec_is_neither_taken_over_nor_reported_nor_tried_again() {
    let (old, new) = (spec("the old prompt"), spec("price?"));
    for (published_as, asked) in [
        (Some(old.clone()), Some(new.clone())),
        // Imported, or said in a terminal: nobody's result but its own.
        (None, Some(new)),
        (Some(old), None),
        (None, None),
    ] {
        let world = World::new().await;
        let before = world.recorder_of(1, published_as.clone()).await;
        before.publish(outcome(3), &gate(true)).await.unwrap();
        // A file that is not whole makes no difference: the coordinator may only move what is a job's own.
        let trace = layout::trace(&key(), Fence(1));
        let torn = Bytes::from_static(b"torn");
        world.context.store.put(&trace, torn).await.unwrap();
        let was = world.manifest().await;

        let found = world.find(asked.as_ref()).await;
        assert_eq!(found, Found::OfAnotherSpec(published_as.clone()));
        let gate = gate(true);
        let later = world.recorder_of(2, asked.clone()).await;
        let error = later.publish(outcome(5), &gate).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Invalid, "{error}");
        assert_eq!(gate.reports.load(Ordering::SeqCst), 0);
        assert_eq!(world.manifest().await, was, "it stays as it is");
        let shown = |spec: &Option<SpecDigest>| {
            let short = spec.as_ref().map(|spec| spec.short().to_owned());
            short.unwrap_or("none".to_owned())
        };
        let expected = format!(
            "batch name already used: the store holds a result of another spec for job `j` of batch `b` in project `p` \
             (spec sha256 {}, this job's {}); use another batch name, or delete `p/batches/b/jobs/j/` from the store \
             and retry the job",
            shown(&published_as),
            shown(&asked),
        );
        assert_eq!(error.to_string(), expected);
    }
}

#[tokio::test]
async fn what_no_job_asked_for_is_known_by_its_fence_after_a_lost_answer() {
    let world = World::new().await;
    let recorder = world.recorder_of(9, None).await;
    recorder.publish(outcome(1), &NoLease).await.unwrap();
    assert!(matches!(world.find(None).await, Found::Published(_)));
    let again = world.recorder_of(9, None).await;
    let published = again.publish(outcome(1), &NoLease).await.unwrap();
    assert!(!published.adopted, "it is its own");
}

#[tokio::test]
async fn a_zombie_that_comes_late_changes_nothing() {
    let world = World::new().await;
    let (zombie, holder) = (world.recorder(1).await, world.recorder(2).await);
    holder.publish(outcome(5), &gate(true)).await.unwrap();
    let refused = world
        .recorder(3)
        .await
        .publish(outcome(9), &gate(false))
        .await
        .unwrap_err();
    assert!(
        matches!(refused, RecordError::Publish(PublishError::Stopped)),
        "{refused}"
    );
    let late = zombie.publish(outcome(3), &gate(true)).await.unwrap();
    assert!(late.adopted);
    assert_eq!(late.summary.rollout().unwrap().totals.turns, 5);
    assert_eq!(world.manifest().await.unwrap().fence, Fence(2));
}

#[tokio::test]
async fn an_attempt_without_its_lease_publishes_nothing() {
    let world = World::new().await;
    let error = world
        .recorder(1)
        .await
        .publish(outcome(1), &gate(false))
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Preempted);
    assert_eq!(world.manifest().await, None);
}

#[tokio::test]
async fn a_manifest_whose_files_changed_is_reported_and_replaced_only_once_moved() {
    let world = World::new().await;
    let store = world.context.store.clone();
    world
        .recorder(1)
        .await
        .publish(outcome(1), &gate(true))
        .await
        .unwrap();
    let trace = layout::trace(&key(), Fence(1));
    store
        .put(&trace, Bytes::from_static(b"torn"))
        .await
        .unwrap();

    let stays = gate(true);
    let error = world
        .recorder(2)
        .await
        .publish(outcome(2), &stays)
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Infra);
    assert!(
        error.to_string().contains("is not what the manifest says"),
        "{error}"
    );
    assert_eq!(stays.reports.load(Ordering::SeqCst), 1);

    let moves = Always {
        moves: Some(store.clone()),
        ..gate(true)
    };
    let published = world
        .recorder(3)
        .await
        .publish(outcome(3), &moves)
        .await
        .unwrap();
    assert!(!published.adopted);
    assert_eq!(world.manifest().await.unwrap().fence, Fence(3));

    store
        .delete(&layout::trace(&key(), Fence(3)))
        .await
        .unwrap();
    let Found::Invalid { reason } = world.find(Some(&spec("price?"))).await else {
        panic!("a missing file went unseen");
    };
    assert!(reason.ends_with("is missing"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_full_or_loses_its_reply_delays_a_result_and_loses_none() {
    let limits = StoreLimits {
        tries_max: 1,
        ..StoreLimits::default()
    };
    for fault in [Fault::Full, Fault::Unavailable, Fault::LoseReply] {
        let faults = Faults::new(|_, _| None);
        let store = Store::open("memory://").await.unwrap();
        let store = store.with_limits(limits).with_faults(faults.clone());
        let world = World::with_store(store).await;
        let mut recorder = world.recorder(1).await;
        recorder
            .blob(Bytes::from_static(b"x"), "text/plain")
            .await
            .unwrap();
        let mut left = 6;
        faults.set(move |operation, _| {
            let writes = matches!(operation, "put" | "create");
            left -= i32::from(writes);
            (writes && left >= 0).then_some(fault)
        });
        let published = recorder.publish(outcome(1), &gate(true)).await.unwrap();
        assert!(!published.adopted, "{fault:?}: its own manifest");
        assert_eq!(world.manifest().await.unwrap().fence, Fence(1));
        world.all_ended().await;
    }
}

/// The store shows `fault` from now on, for `away`.
fn away_for(faults: &Faults, fault: Fault, away: Duration) {
    let back = tokio::time::Instant::now() + away;
    faults.set(move |_, _| (tokio::time::Instant::now() < back).then_some(fault));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_or_slow_holds_no_step_up_and_the_result_comes_soon_after() {
    for (fault, away_s) in [(Fault::Unavailable, 20), (Fault::Hang, 60)] {
        let away = Duration::from_secs(away_s);
        let faults = Faults::new(|_, _| None);
        let store = Store::open("memory://").await.unwrap();
        let world = World::with_store(store.with_faults(faults.clone())).await;
        away_for(&faults, fault, away);
        let began = tokio::time::Instant::now();
        let mut recorder = world.recorder(1).await;
        for n in 0..20 {
            let content = format!("step {n}");
            let raw = Bytes::from(content.clone());
            recorder.message(Message::User { content }).await.unwrap();
            recorder.blob(raw, "text/plain").await.unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(1), "{fault:?}");

        // Long enough for a segment, which cannot be stored yet.
        tokio::time::sleep(Duration::from_secs(15)).await;
        recorder.publish(outcome(1), &gate(true)).await.unwrap();
        let late = began.elapsed().checked_sub(away).unwrap();
        let try_and_wait = StoreLimits::default().try_timeout + Duration::from_secs(15);
        assert!(late < try_and_wait, "{fault:?}: {late:?}");
        let Found::Published(manifest) = world.find(Some(&spec("price?"))).await else {
            panic!("{fault:?}: the result does not verify");
        };
        assert_eq!(manifest.files.len(), 21, "the trace and every blob");
        world.all_ended().await;
        assert_eq!(world.attempts(), 0, "nothing is left on this machine");
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_begins_late_where_the_store_is_away_and_fails_only_when_it_stays_away() {
    let faults = Faults::new(|_, _| None);
    let store = Store::open("memory://").await.unwrap();
    let store = store.with_faults(faults.clone());
    let (key, spec) = (key(), spec("price?"));
    let claim = Claim {
        key: &key,
        fence: Fence(1),
        spec: Some(&spec),
    };
    let max_runtime = Duration::from_secs(300);
    let began = tokio::time::Instant::now();
    away_for(&faults, Fault::Unavailable, Duration::from_secs(20));
    let found = find_at_start(&store, claim, max_runtime).await.unwrap();
    assert_eq!(found, Found::Nothing);
    assert!(began.elapsed() >= Duration::from_secs(20));
    assert!(began.elapsed() < Duration::from_secs(35));

    for (fault, waits) in [(Fault::Hang, true), (Fault::Denied, false)] {
        let began = tokio::time::Instant::now();
        away_for(&faults, fault, Duration::from_secs(86_400));
        let error = find_at_start(&store, claim, max_runtime).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Infra, "{fault:?}");
        let waited = if waits {
            max_runtime / 2
        } else {
            Duration::ZERO
        };
        assert!(began.elapsed() >= waited, "{fault:?}");
        assert!(
            began.elapsed() < waited + Duration::from_secs(1),
            "{fault:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_refuses_ends_the_wait_at_once_and_a_terminal_waits_for_minutes_only() {
    let limits = StoreLimits {
        tries_max: 1,
        ..StoreLimits::default()
    };
    for (fault, waits) in [(Fault::Denied, false), (Fault::Unavailable, true)] {
        let store = Store::open("memory://").await.unwrap();
        let store = store.with_limits(limits);
        let store = store.with_faults(Faults::new(move |operation, _| {
            matches!(operation, "put" | "create").then_some(fault)
        }));
        let world = World::with_store(store).await;
        let recorder = world.recorder(1).await;
        let began = tokio::time::Instant::now();
        let error = recorder.publish(outcome(1), &NoLease).await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Infra);
        assert_eq!(matches!(error, RecordError::Late(_)), waits, "{error:?}");
        assert_eq!(
            began.elapsed() >= Duration::from_secs(60),
            waits,
            "{fault:?}"
        );
        assert!(began.elapsed() <= Duration::from_secs(121), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn segments_bring_the_steps_to_the_store_while_the_rollout_runs() {
    let world = World::new().await;
    let mut recorder = world.recorder(1).await;
    let wait_for = async |n: u32| {
        while world.lines(1, n).await.is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let began = tokio::time::Instant::now();
    wait_for(0).await;
    assert!(
        began.elapsed() >= Duration::from_secs(9),
        "not one object a step"
    );
    let content = "more".to_owned();
    recorder.message(Message::User { content }).await.unwrap();
    wait_for(1).await;
    let (first, second) = (
        world.lines(1, 0).await.unwrap(),
        world.lines(1, 1).await.unwrap(),
    );
    assert_eq!((first.lines().count(), second.lines().count()), (2, 1));
}

#[tokio::test]
async fn a_data_folder_belongs_to_one_process() {
    let dir = TempDir::new().unwrap();
    let spool = Spool::open(dir.path()).await.unwrap();
    let error = Spool::open(dir.path()).await.unwrap_err();
    let text = espalier_runtime::telemetry::error_chain(&error);
    assert!(text.contains("another agent worker uses it"), "{text}");
    drop(spool);
    Spool::open(dir.path()).await.unwrap();
}

/// The data folder of `world` as a kill of its process would leave it, with half a step at its end.
fn killed(world: &World) -> TempDir {
    let left = TempDir::new().unwrap();
    for attempt in std::fs::read_dir(world.dir.path().join("attempts")).unwrap() {
        let attempt = attempt.unwrap();
        let to = left.path().join("attempts").join(attempt.file_name());
        std::fs::create_dir_all(to.join("blobs")).unwrap();
        let mut steps = std::fs::read(attempt.path().join("steps.jsonl")).unwrap();
        steps.extend(br#"{"message":{"role":"as"#);
        std::fs::write(to.join("steps.jsonl"), steps).unwrap();
        std::fs::write(to.join("blobs").join(sha256_hex(b"raw")), "raw").unwrap();
        std::fs::write(to.join("blobs").join(sha256_hex(b"whole")), "who").unwrap();
    }
    left
}

async fn ship(world: &World, left: &TempDir) {
    let context = RecordContext {
        spool: Spool::open(left.path()).await.unwrap(),
        ..world.context.clone()
    };
    ship_leftovers(context, Shutdown::new().drain_token()).await;
}

fn folders(left: &TempDir) -> usize {
    std::fs::read_dir(left.path().join("attempts"))
        .unwrap()
        .count()
}

#[tokio::test]
async fn the_steps_of_a_killed_attempt_reach_the_store_before_they_are_removed() {
    let world = World::new().await;
    let _recorder = world.recorder(7).await;
    let left = killed(&world);
    ship(&world, &left).await;
    let lines = world.lines(7, 0).await.unwrap();
    let error = Trace::from_lines(&lines).unwrap_err();
    assert_eq!(error, TraceError::NoOutcome { messages: 1 });
    let blob = |content: &[u8]| layout::blob(&key().project, &sha256_hex(content));
    let store = &world.context.store;
    assert_eq!(store.get(&blob(b"raw")).await.unwrap(), "raw");
    assert!(
        store.get(&blob(b"whole")).await.is_err(),
        "it is half of one"
    );
    assert_eq!(folders(&left), 0);
    // Nothing of it is a result.
    assert!(world.manifest().await.is_none());
}

#[tokio::test]
async fn steps_that_are_stored_already_are_not_stored_twice() {
    let world = World::new().await;
    let mut recorder = world.recorder(7).await;
    ship(&world, &killed(&world)).await;
    let content = "more".to_owned();
    recorder.message(Message::User { content }).await.unwrap();
    ship(&world, &killed(&world)).await;
    let second = world.lines(7, 1).await.unwrap();
    assert!(
        second.lines().count() == 1 && second.contains("more"),
        "{second}"
    );
    ship(&world, &killed(&world)).await;
    assert!(world.lines(7, 2).await.is_none());
    let (store, key) = (&world.context.store, key());
    let steps = espalier_runtime::traces::read_steps(store, &key, Fence(7)).await;
    let error = Trace::from_lines(&steps.unwrap().text).unwrap_err();
    assert_eq!(error, TraceError::NoOutcome { messages: 2 });
}

#[tokio::test]
async fn steps_that_cannot_be_stored_stay_for_the_next_start() {
    let world = World::new().await;
    let _recorder = world.recorder(7).await;
    let left = killed(&world);
    let stop = Shutdown::new();
    stop.drain();
    let context = RecordContext {
        spool: Spool::open(left.path()).await.unwrap(),
        ..world.context.clone()
    };
    ship_leftovers(context, stop.drain_token()).await;
    assert_eq!(folders(&left), 1);
}
