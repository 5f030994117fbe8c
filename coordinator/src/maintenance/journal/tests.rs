//! A real Redis that loses what it acknowledged, and what is given to it again.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use espalier_core::queue::{
    ItemResult, JobFilter, JobKind, LeaseRequest, MachineConfig, NewBatch, NewJob, StateName,
};
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::faults::{Fault, Faults};
use espalier_runtime::store::{Store, StoreLimits};
use espalier_runtime::tasks::Tasks;
use espalier_testbed::redis::RedisServer;
use espalier_testbed::wait_for;

use super::*;
use crate::queue::{Acknowledge, Chunk, Redis, RedisConfig, Submission};

const DEADLINE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(86_400);

struct World {
    server: RedisServer,
    queue: Arc<Redis>,
    journal: Journal,
    store: Store,
    faults: Faults,
}

impl World {
    async fn start() -> Self {
        let server = RedisServer::start_with(&[("appendfsync", "always")]).await;
        let config = RedisConfig {
            url: Secret::new(server.url()),
            name: "test".to_owned(),
            shards: 1,
            acknowledge: Acknowledge::Fast,
            machine: MachineConfig::default(),
            clock: None,
        };
        let queue = Redis::open(config, &Tasks::new(Shutdown::new())).await;
        let (queue, faults) = (Arc::new(queue.unwrap()), Faults::new(|_, _| None));
        let store = Store::open("memory://").await.unwrap();
        let store = store.with_faults(faults.clone());
        let of = Arc::clone(&queue) as Arc<dyn Queue>;
        Self {
            journal: journal(of, store.clone()),
            server,
            queue,
            store,
            faults,
        }
    }

    fn journal_queue(&self) -> Arc<dyn Queue> {
        Arc::clone(&self.queue) as Arc<dyn Queue>
    }

    fn round(&self, drive: bool, later: Duration) -> Round<'_> {
        Round {
            queue: self.queue.as_ref(),
            journal: &self.journal,
            now: self.queue.clock().now() + later,
            keep: DAY,
            drive,
        }
    }

    /// One round, now.
    async fn go(&self, drive: bool) -> Done {
        self.later(drive, Duration::ZERO).await
    }

    /// One round, as it is `later`.
    async fn later(&self, drive: bool, later: Duration) -> Done {
        let (mut driven, mut done) = (BTreeSet::new(), Done::default());
        let round = self.round(drive, later);
        round.run(&mut driven, &mut done).await.unwrap();
        Done { next: None, ..done }
    }

    async fn open(&self, batch: &str) {
        self.journal.open_batch(opening(batch)).await.unwrap();
    }

    /// All is gone but that the batch was opened.
    async fn lose_all_of(&self, batch: &str) {
        self.lose_all().await;
        self.queue.open_batch(opening(batch)).await.unwrap();
    }

    async fn submit(&self, batch: &str, n: u32, jobs: &[NewJob]) -> Vec<ItemResult> {
        let submitted = self.journal.submit(chunk(batch, n, jobs), None);
        submitted.await.unwrap().items
    }

    async fn close(&self, batch: &str) {
        let closed = self.journal.close_batch(project(), batch.parse().unwrap());
        closed.await.unwrap();
    }

    async fn batch(&self, batch: &str) -> Option<BatchView> {
        let found = self.queue.batch(project(), batch.parse().unwrap());
        found.await.unwrap()
    }

    async fn jobs(&self, batch: &str) -> Vec<String> {
        let filter = JobFilter::default();
        let batch = batch.parse().unwrap();
        let jobs = self.queue.jobs(project(), batch, filter, None, 1_000);
        let jobs = jobs.await.unwrap().into_iter();
        jobs.map(|job| job.job.key.job.to_string()).collect()
    }

    async fn cancel(&self, batch: &str) {
        let which = Selector::Batch(project(), batch.parse().unwrap());
        self.journal.cancel(which).await.unwrap();
    }

    async fn objects(&self) -> Vec<String> {
        let listed = self.store.list("_journal", None, 1_000).await.unwrap();
        listed.into_iter().map(|object| object.path).collect()
    }

    /// All that the server has is gone.
    async fn lose_all(&self) {
        assert_eq!(self.server.cli(&["FLUSHALL"]).await.trim(), "OK");
    }
}

fn journal(queue: Arc<dyn Queue>, store: Store) -> Journal {
    let shutdown = Shutdown::new();
    let tasks = Tasks::new(shutdown.clone());
    Journal::start(queue, store, "test", true, &tasks, &shutdown)
}

fn project() -> ProjectId {
    "p".parse().unwrap()
}

fn opening(batch: &str) -> OpenBatch {
    OpenBatch {
        batch: NewBatch {
            project: project(),
            batch: batch.parse().unwrap(),
            params_digest: [3; 32],
        },
        defaults: Bytes::from_static(b"defaults"),
    }
}

fn job(id: &str) -> NewJob {
    NewJob::new(id.parse().unwrap(), JobKind::Rollout, [1; 32])
}

fn after(id: &str, dep: &str) -> NewJob {
    let deps = vec![dep.parse().unwrap()];
    NewJob { deps, ..job(id) }
}

fn chunk(batch: &str, n: u32, jobs: &[NewJob]) -> Chunk {
    let submission = |job: &NewJob| Submission {
        job: job.clone(),
        spec: Bytes::from(format!("spec of {}", job.id)),
    };
    Chunk {
        project: project(),
        batch: batch.parse().unwrap(),
        n,
        digest: [n as u8; 32],
        jobs: jobs.iter().map(submission).collect(),
    }
}

#[tokio::test]
async fn a_batch_that_is_gone_is_given_again_once() {
    let world = World::start().await;
    world.open("late").await;
    world.open("b").await;
    world.submit("b", 0, &[job("a1"), job("a2")]).await;
    world.submit("b", 1, &[after("a3", "p/b/a1")]).await;
    // Across batches, and against the order in which they were opened.
    world.submit("late", 0, &[after("x", "p/b/a3")]).await;
    world.close("b").await;
    let before = world.batch("b").await.unwrap();
    assert_eq!(world.go(true).await, Done::default(), "nothing is missing");

    world.lose_all().await;
    assert!(world.batch("b").await.is_none());
    let done = world.go(false).await;
    assert_eq!((done.opened, done.jobs, done.removed), (2, 4, 0));
    let now = world.batch("b").await.unwrap();
    assert_eq!((now.closed, now.counters), (true, before.counters));
    assert_eq!(now.params_digest, before.params_digest);
    assert!(!world.batch("late").await.unwrap().closed);
    assert_eq!(world.jobs("late").await, ["x"]);
    let spec = world
        .queue
        .spec("p/b/a3".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (&spec.spec[..], &spec.defaults[..]),
        (&b"spec of a3"[..], &b"defaults"[..])
    );
    assert_eq!(world.go(true).await, Done::default(), "once");
}

#[tokio::test]
async fn a_server_that_went_back_gets_what_it_lacks() {
    let mut world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a")]).await;
    let saved = tempfile::tempdir().unwrap();
    let data = world.server.folder().join("appendonlydir");
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        std::fs::create_dir_all(to).unwrap();
        for file in std::fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    copy(&data, saved.path());
    world.submit("b", 1, &[job("b")]).await;
    world.close("b").await;
    assert_eq!(world.queue.restarts(), Some(0));

    world.server.kill();
    std::fs::remove_dir_all(&data).unwrap();
    copy(saved.path(), &data);
    world.server.restart().await;
    let looked = wait_for("the restart to be noticed", DEADLINE, || async {
        let seen = (world.queue.restarts(), world.queue.condition().await);
        (seen == (Some(1), Condition::Serving))
            .then_some(())
            .ok_or(seen)
    });
    looked.await;
    assert_eq!(world.jobs("b").await, ["a"]);
    let done = world.go(true).await;
    assert_eq!((done.opened, done.jobs), (0, 1));
    assert_eq!(world.jobs("b").await, ["a", "b"]);
    assert!(world.batch("b").await.unwrap().closed);
}

#[tokio::test]
async fn an_ended_batch_leaves_nothing_and_is_not_run_again() {
    let world = World::start().await;
    for batch in ["ended", "cancelled", "purged"] {
        world.open(batch).await;
        world.submit(batch, 0, &[job("a")]).await;
    }
    world
        .queue
        .cancel(Selector::Job("p/ended/a".parse().unwrap()))
        .await
        .unwrap();
    world.close("ended").await;
    assert!(world.batch("ended").await.unwrap().completed_at.is_some());
    world.cancel("cancelled").await;
    assert_eq!(world.go(false).await.removed, 0, "the end may be lost yet");
    // The queue's clock here may be a moment behind the server's.
    let settled = SETTLED + Duration::from_secs(1);
    assert_eq!(world.later(false, settled).await.removed, 2);
    let left = ["chunks-0000000000-0000000000", "open"]
        .map(|name| format!("_journal/q-test/p/purged/{name}"));
    assert_eq!(world.objects().await, left);

    // As long as it lives it does not look old; what has grown old was forgotten by the queue.
    let written = || async { world.store.head(&left[1]).await.unwrap().modified };
    let before = written().await;
    world.later(false, DAY / 3).await;
    assert_eq!(written().await, before);
    world.later(false, DAY * 2 / 3).await;
    assert!(written().await > before);
    world.lose_all().await;
    let removed = Done {
        removed: 1,
        ..Done::default()
    };
    assert_eq!(world.later(false, DAY).await, removed);
    assert!(world.batch("purged").await.is_none());
    assert_eq!(world.objects().await, [""; 0]);
}

#[tokio::test]
async fn what_was_cancelled_or_never_opened_is_not_given_again() {
    let world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a")]).await;
    world.cancel("b").await;
    let nowhere = world.journal.submit(chunk("nowhere", 0, &[job("a")]), None);
    assert!(matches!(nowhere.await, Err(QueueError::Refused(_))));
    let closed = world
        .journal
        .close_batch(project(), "nowhere".parse().unwrap());
    assert!(matches!(closed.await, Err(QueueError::Refused(_))));
    assert!(
        !world
            .objects()
            .await
            .iter()
            .any(|path| path.contains("nowhere"))
    );
    world.lose_all().await;
    assert_eq!(
        world.go(true).await,
        Done {
            removed: 1,
            ..Done::default()
        }
    );
    assert!(world.batch("b").await.is_none() && world.batch("nowhere").await.is_none());
}

#[tokio::test]
async fn what_the_queue_refused_is_not_given_to_it_later() {
    let world = World::start().await;
    world.open("b").await;
    let first = world
        .submit("b", 0, &[job("a"), after("early", "p/b/z")])
        .await;
    assert!(matches!(
        first[..],
        [ItemResult::Accepted, ItemResult::Rejected(_)]
    ));
    world.submit("b", 1, &[job("z")]).await;
    let other = Chunk {
        digest: [9; 32],
        ..chunk("b", 0, &[job("other")])
    };
    let refused = world.journal.submit(other, Some([0; 32])).await;
    assert!(matches!(refused, Err(QueueError::Refused(_))));
    world.close("b").await;
    let late = world
        .journal
        .submit(chunk("b", 2, &[job("late")]), None)
        .await;
    assert!(matches!(late, Err(QueueError::Refused(_))));
    world.lose_all().await;
    assert_eq!(world.go(true).await.jobs, 2);
    assert_eq!(world.jobs("b").await, ["a", "z"]);
}

#[tokio::test]
async fn nothing_is_acknowledged_that_only_the_queue_holds() {
    let world = World::start().await;
    world.open("b").await;
    world.faults.set(|operation, path| {
        let writes = matches!(operation, "put" | "create");
        (writes && path.starts_with("_journal")).then_some(Fault::Denied)
    });
    for _ in 0..2 {
        let answer = world.journal.submit(chunk("b", 0, &[job("a")]), None).await;
        let error = answer.unwrap_err().to_string();
        assert!(
            error.contains("could not be kept in the object store memory://"),
            "{error}"
        );
    }
    world.faults.set(|_, _| None);
    let items = world.submit("b", 0, &[job("a")]).await;
    assert_eq!(items, [ItemResult::AlreadyThere]);
    world.lose_all().await;
    assert_eq!(world.go(true).await.jobs, 1);
}

#[tokio::test]
async fn what_was_under_way_while_the_server_was_replaced_is_not_acknowledged() {
    let mut world = World::start().await;
    world.open("b").await;
    let tries = AtomicU64::new(0);
    world.faults.set(move |operation, _| {
        let is_first = operation == "create" && tries.fetch_add(1, Ordering::Relaxed) == 0;
        is_first.then_some(Fault::Hang)
    });
    // The second try comes long after the restart was noticed.
    let limits = StoreLimits {
        try_timeout: Duration::from_secs(6),
        ..StoreLimits::default()
    };
    let store = world.store.clone().with_limits(limits);
    let journal = journal(world.journal_queue(), store);
    let submitting = journal.submit(chunk("b", 0, &[job("a")]), None);
    let queue = Arc::clone(&world.queue);
    let replacing = async {
        wait_for("the queue to have the job", DEADLINE, || async {
            let found = queue.job("p/b/a".parse().unwrap()).await.unwrap();
            found.ok_or("not there")
        })
        .await;
        world.server.restart().await;
    };
    let (answer, ()) = tokio::join!(submitting, replacing);
    assert_eq!(world.queue.restarts(), Some(1));
    let error = answer.unwrap_err().to_string();
    assert!(error.contains("restarted or replaced"), "{error}");
}

#[tokio::test]
async fn a_chunk_is_one_write_after_the_queue() {
    let world = World::start().await;
    world.open("b").await;
    world.go(true).await;
    let puts = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&puts);
    world.faults.set(move |_, _| {
        counted.fetch_add(1, Ordering::Relaxed);
        None
    });
    let jobs: Vec<NewJob> = (0..2_000).map(|n| job(&format!("j{n}"))).collect();
    world.submit("b", 0, &jobs).await;
    assert_eq!(puts.load(Ordering::Relaxed), 1);

    // A store that does not answer holds up the answer, and not the queue.
    world.faults.set(|_, _| Some(Fault::Hang));
    let hanging = world.journal.submit(chunk("b", 1, &[job("beside")]), None);
    let there = wait_for("the job to be in the queue", DEADLINE, || async {
        let found = world
            .queue
            .job("p/b/beside".parse().unwrap())
            .await
            .unwrap();
        found.ok_or("not there")
    });
    let found = tokio::select! {
        answer = hanging => panic!("{answer:?}"),
        found = there => found,
    };
    assert_eq!(found.job.state.name(), StateName::Ready);
}

#[tokio::test]
async fn a_batch_is_closed_with_all_that_was_acknowledged() {
    let world = World::start().await;
    for batch in ["closed", "cancelled"] {
        world.open(batch).await;
        world.submit(batch, 0, &[job("a"), job("b")]).await;
        world.submit(batch, 1, &[job("c")]).await;
    }
    // Before a drive, after which the queue may know a part of a chunk.
    world.lose_all_of("closed").await;
    let part = chunk("closed", 0, &[job("a")]);
    world.queue.submit(part).await.unwrap();
    world.close("closed").await;
    assert_eq!(world.jobs("closed").await, ["a", "b", "c"]);
    world.go(true).await;

    // After one, where a loss was not noticed yet.
    assert!(world.journal.is_whole());
    world.lose_all_of("cancelled").await;
    world.cancel("cancelled").await;
    let counters = world.batch("cancelled").await.unwrap().counters;
    assert_eq!(counters.get(StateName::Cancelled), 3);
    assert!(world.batch("closed").await.is_none());
    let closed = world
        .journal
        .close_batch(project(), "closed".parse().unwrap());
    let error = closed.await.unwrap_err();
    assert!(matches!(error, QueueError::Refused(_)), "{error}");
}

#[tokio::test]
async fn what_a_batch_ended_without_stays_in_the_journal() {
    let world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a")]).await;
    world.lose_all_of("b").await;
    let closed = world.queue.close_batch(project(), "b".parse().unwrap());
    assert!(closed.await.unwrap().completed_at.is_some());
    assert_eq!(world.later(true, SETTLED).await, Done::default());
    assert_eq!(world.objects().await.len(), 2);
}

#[tokio::test]
async fn a_chunk_that_comes_again_with_less_takes_nothing_away() {
    let world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a"), job("b")]).await;
    // The door takes less of the same chunk now.
    world.submit("b", 0, &[job("a")]).await;
    world.lose_all_of("b").await;
    world.submit("b", 0, &[job("a")]).await;
    assert_eq!(world.go(true).await.jobs, 1);
    // And more.
    world.submit("b", 0, &[job("a"), job("c")]).await;
    world.lose_all().await;
    assert_eq!(world.go(true).await.jobs, 3);
    assert_eq!(world.jobs("b").await, ["a", "b", "c"]);
}

#[tokio::test]
async fn of_two_chunks_with_one_number_the_one_that_was_taken_is_kept() {
    let world = World::start().await;
    world.open("b").await;
    world.go(true).await;
    world.submit("b", 0, &[job("a")]).await;
    let other = || Chunk {
        digest: [9; 32],
        ..chunk("b", 0, &[job("other")])
    };
    // Neither was there when it was asked what was.
    let refused = world.journal.submit(other(), None).await;
    assert!(matches!(refused, Err(QueueError::Refused(_))));
    world.lose_all_of("b").await;
    // A coordinator that has not driven yet.
    let journal = journal(world.journal_queue(), world.store.clone());
    let refused = journal.submit(other(), None).await;
    assert!(matches!(refused, Err(QueueError::Refused(_))));
    world.go(true).await;
    assert_eq!(world.jobs("b").await, ["a"]);
}

#[tokio::test]
async fn what_the_queue_did_not_answer_is_not_carried_out_later() {
    let mut world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a")]).await;
    let objects = world.objects().await;
    world.server.kill();
    let batch = || "b".parse().unwrap();
    let cancelled = world.journal.cancel(Selector::Batch(project(), batch()));
    cancelled.await.unwrap_err();
    let closed = world.journal.close_batch(project(), batch());
    closed.await.unwrap_err();
    let submitted = world.journal.submit(chunk("b", 1, &[job("b")]), None);
    submitted.await.unwrap_err();
    assert_eq!(world.objects().await, objects);
}

#[tokio::test]
async fn a_cancel_is_kept_until_what_runs_has_stopped() {
    let world = World::start().await;
    world.open("b").await;
    world.submit("b", 0, &[job("a")]).await;
    assert_eq!(lease(&world).await, ["p/b/a"]);
    world.cancel("b").await;
    assert_eq!(world.later(false, SETTLED).await.removed, 0);
    // The cancel is lost, and the rest is not.
    world.lose_all_of("b").await;
    world
        .queue
        .submit(chunk("b", 0, &[job("a")]))
        .await
        .unwrap();
    world.go(true).await;
    assert!(world.batch("b").await.unwrap().cancelled);
}

#[tokio::test]
async fn an_entry_that_cannot_be_read_stands_in_the_way_of_its_batch_only() {
    let world = World::start().await;
    for batch in ["bad", "good"] {
        world.open(batch).await;
        world.submit(batch, 0, &[job("a")]).await;
        world.submit(batch, 1, &[job("b")]).await;
        world.close(batch).await;
    }
    world.lose_all().await;
    let bad = "p/bad/chunks-0000000000-0000000000";
    world
        .faults
        .set(move |_, path| path.ends_with(bad).then_some(Fault::Denied));
    let (mut driven, mut done) = (BTreeSet::new(), Done::default());
    let round = world.round(true, Duration::ZERO);
    let error = round.run(&mut driven, &mut done).await.unwrap_err();
    assert!(matches!(error, RoundError::Entries(1)), "{error}");
    assert_eq!((done.opened, done.jobs), (2, 3));
    let closed = |found: Option<BatchView>| found.unwrap().closed;
    assert!(closed(world.batch("good").await) && !closed(world.batch("bad").await));
    assert!(!world.journal.is_whole());

    // The next one goes on with what is left.
    world
        .faults
        .set(|_, path| path.contains("/good/chunk").then_some(Fault::Denied));
    let mut done = Done::default();
    round.run(&mut driven, &mut done).await.unwrap();
    assert_eq!(done.jobs, 1);
    assert!(closed(world.batch("bad").await) && world.journal.is_whole());
}

#[tokio::test]
async fn whoever_waits_for_others_is_told_so() {
    let world = World::start().await;
    world.open("b").await;
    world.go(true).await;
    world
        .faults
        .set(|operation, _| (operation == "create").then_some(Fault::Hang));
    world.journal.leave_room_for_one();
    let submit = |n: u32| {
        let jobs = [job(&format!("j{n}"))];
        world.journal.submit(chunk("b", n, &jobs), None)
    };
    let other = submit(0);
    let late = async {
        tokio::task::yield_now().await;
        submit(1).await
    };
    let answer = tokio::select! {
        biased;
        answer = late => answer,
        other = other => panic!("{other:?}"),
    };
    let error = answer.unwrap_err().to_string();
    assert!(
        error.contains("128 MiB of chunks are on their way"),
        "{error}"
    );
}

#[tokio::test]
async fn chunks_that_come_while_others_are_written_are_written_together() {
    let world = World::start().await;
    for batch in ["b", "other"] {
        world.open(batch).await;
    }
    world.go(true).await;
    let writes = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&writes);
    world.faults.set(move |_, _| {
        counted.fetch_add(1, Ordering::Relaxed);
        Some(Fault::Late(Duration::from_millis(300)))
    });
    let shared = &world;
    let submitted = (0..400).map(|n| {
        let batch = if n % 2 == 0 { "b" } else { "other" };
        let id = format!("j{n}");
        async move { shared.submit(batch, n / 2, &[job(&id)]).await }
    });
    futures::future::join_all(submitted).await;
    let writes = writes.load(Ordering::Relaxed);
    assert!(writes < 20, "{writes} writes of 400 chunks");

    world.faults.set(|_, _| None);
    world.lose_all().await;
    let done = world.go(true).await;
    assert_eq!((done.opened, done.jobs), (2, 400));
    world.close("b").await;
    assert_eq!(world.batch("b").await.unwrap().counters.total(), 200);
}

/// Of the chunks of one object the queue took another under one number since it lost them.
#[tokio::test]
async fn a_chunk_that_is_refused_takes_no_other_of_its_object_with_it() {
    let world = World::start().await;
    world.open("b").await;
    world.go(true).await;
    let late = Some(Fault::Late(Duration::from_millis(200)));
    world.faults.set(move |_, _| late);
    let world = &world;
    let submitted = (0..5).map(|n| async move {
        let job = job(&format!("j{n}"));
        world.submit("b", n, &[job]).await
    });
    futures::future::join_all(submitted).await;
    world.faults.set(|_, _| None);
    let objects = world.objects().await;
    assert!(objects.len() < 5, "no two chunks lie together: {objects:?}");
    world.lose_all_of("b").await;
    let other = Chunk {
        digest: [9; 32],
        ..chunk("b", 2, &[job("other")])
    };
    world.queue.submit(other).await.unwrap();
    assert_eq!(world.go(true).await.jobs, 4);
    assert_eq!(world.jobs("b").await, ["j0", "j1", "j3", "j4", "other"]);
}

#[test]
fn a_drive_comes_at_the_start_after_a_restart_and_once_more() {
    let start = Instant::now();
    let at = |secs: u64| start + Duration::from_secs(secs);
    let mut plan = Plan::new(Some(0), start);
    let nothing = Done::default();
    assert!(plan.is_due(Some(0), start) && plan.drive);
    plan.note(&nothing, false, start);
    assert!(!plan.is_due(Some(0), start), "not at once after a failure");
    assert!(plan.is_due(Some(0), at(4)) && plan.drive);
    plan.driven.insert((project(), "b".parse().unwrap()));
    plan.note(&nothing, true, at(4));
    assert!(!plan.is_due(Some(0), at(33)));
    assert!(plan.is_due(Some(0), at(34)) && plan.drive && plan.driven.is_empty());
    plan.note(&nothing, true, at(34));
    assert!(!plan.is_due(Some(0), at(333)));
    assert!(plan.is_due(Some(0), at(334)) && !plan.drive);
    let next = Some(Duration::from_secs(7));
    plan.note(&Done { next, ..nothing }, true, at(334));
    assert!(!plan.is_due(Some(0), at(340)));
    assert!(plan.is_due(Some(0), at(341)) && !plan.drive);
    assert!(plan.is_due(Some(1), at(341)) && plan.drive);
}

#[test]
fn entries_are_judged_by_what_the_queue_knows_and_by_their_age() {
    let at = |days: u64| Timestamp::from_ms(1_000_000_000_000 + days * 86_400_000);
    let kept = Kept {
        opened: Some(at(0)),
        newest: at(1),
        ..Kept::default()
    };
    let unopened = Kept {
        opened: None,
        ..kept.clone()
    };
    for (kept, day, expected) in [
        (&kept, 1, Todo::Drive),
        (&kept, 30, Todo::Drive),
        (&kept, 31, Todo::Remove),
        (&unopened, 1, Todo::Leave),
        (&unopened, 31, Todo::Remove),
    ] {
        let verdict = verdict(kept, None, at(day), DAY * 30, false);
        assert_eq!(verdict, expected, "day {day}");
    }
}

/// A server that lost batches gives their numbers to others.
#[tokio::test]
async fn a_grant_names_the_batch_that_has_the_number_now() {
    let mut world = World::start().await;
    world.open("before").await;
    world.submit("before", 0, &[job("a")]).await;
    assert_eq!(lease(&world).await, ["p/before/a"]);
    world.cancel("before").await;
    world.server.kill();
    std::fs::remove_dir_all(world.server.folder().join("appendonlydir")).unwrap();
    world.server.restart().await;
    let opened = wait_for("the server to be back", DEADLINE, || async {
        let request = OpenBatch {
            batch: NewBatch {
                project: project(),
                batch: "after".parse().unwrap(),
                params_digest: [4; 32],
            },
            defaults: Bytes::from_static(b"others"),
        };
        world.queue.open_batch(request).await
    });
    assert_eq!(opened.await.seq.0, 1);
    world
        .queue
        .submit(chunk("after", 0, &[job("a")]))
        .await
        .unwrap();
    assert_eq!(lease(&world).await, ["p/after/a"]);
}

async fn lease(world: &World) -> Vec<String> {
    let request = LeaseRequest {
        worker: "w".parse().unwrap(),
        request: 0,
        kind: JobKind::Rollout,
        offers: Default::default(),
        n: 10,
        ttl: None,
    };
    let granted = world.queue.lease(request).await.unwrap();
    granted
        .iter()
        .map(|one| one.grant.key.to_string())
        .collect()
}
