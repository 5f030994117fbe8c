use std::collections::BTreeSet;
use std::sync::Condvar;

use futures::FutureExt as _;

use super::*;
use crate::executor::{Done, ExecutorError, Step, Ticket};
use crate::scheduler::tests::fake::{self, Fake};
use crate::scheduler::tests::{alone, config, ids, limits};

const SOON: Duration = Duration::from_secs(20);

/// What a test does to its executor while it runs.
#[derive(Default)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    paused: bool,
    fails: bool,
    panics: bool,
    adapters: BTreeSet<u32>,
    steps: usize,
}

impl Control {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    fn get<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&lock(&self.state))
    }
}

/// The scheduler's fake, as an executor.
struct Toy {
    fake: Fake,
    limits: Limits,
    submitted: u64,
    control: Arc<Control>,
}

impl Executor for Toy {
    type Adapter = Result<(), String>;

    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, ExecutorError> {
        let used = step.rows.iter().filter_map(|row| row.adapter);
        for slot in used {
            assert!(
                self.control.get(|s| s.adapters.contains(&slot.0)),
                "{slot:?} is not loaded"
            );
        }
        self.fake.submit(step);
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn poll(&mut self, wait: Duration) -> Result<Option<Done>, ExecutorError> {
        let mut state = lock(&self.control.state);
        if state.paused {
            let waited = self.control.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.fails {
            return Err(ExecutorError::Device("it fell off the bus".into()));
        }
        let panics = state.panics;
        state.steps += usize::from(!state.paused);
        let paused = state.paused;
        drop(state);
        assert!(!panics, "the executor is broken");
        Ok(if paused { None } else { self.fake.finish_one() })
    }

    fn load_adapter(
        &mut self,
        slot: AdapterSlot,
        adapter: Self::Adapter,
    ) -> Result<(), ExecutorError> {
        adapter.map_err(ExecutorError::Adapter)?;
        let places = self.limits.adapters as usize;
        self.control.set(|s| {
            assert!(s.adapters.insert(slot.0));
            assert!(s.adapters.len() <= places, "there is no place for {slot:?}");
        });
        Ok(())
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), ExecutorError> {
        self.control.set(|s| assert!(s.adapters.remove(&slot.0)));
        Ok(())
    }
}

struct World {
    engine: Engine,
    port: AdapterPort<Result<(), String>>,
    control: Arc<Control>,
}

fn world(change: impl FnOnce(&mut EngineConfig)) -> World {
    let control = Arc::new(Control::default());
    let toy = Toy {
        fake: Fake::new(limits(200)),
        limits: limits(200),
        submitted: 0,
        control: Arc::clone(&control),
    };
    let mut engine = EngineConfig::new(config(8, 256, 1000));
    change(&mut engine);
    let (engine, port) = Engine::start(toy, engine).unwrap();
    World {
        engine,
        port,
        control,
    }
}

/// All events: the ids, and why it ended.
async fn answer(mut events: mpsc::Receiver<Event>) -> (Vec<u32>, Option<FinishReason>) {
    let mut ids = vec![];
    let all = async {
        while let Some(event) = events.recv().await {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Finished { reason, .. } => return Some(reason),
            }
        }
        None
    };
    let end = tokio::time::timeout(SOON, all).await.expect("it ends");
    (ids, end)
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(SOON, wait)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn many_at_once_get_the_answers_that_they_would_get_alone() {
    let world = world(|_| {});
    let request = |salt: u32| Request::new(ids(20 + salt as usize, salt % 5), 10 + salt % 20);
    let mut pending = vec![];
    for salt in 0..100 {
        pending.push((salt, world.engine.submit(request(salt)).await.unwrap()));
    }
    for (salt, events) in pending {
        let expected = alone(&request(salt), 1000);
        assert_eq!(answer(events).await, (expected.ids, expected.end), "{salt}");
    }
    until("all are counted", || {
        world.engine.snapshot().at_length == 100
    })
    .await;
    let snapshot = world.engine.snapshot();
    assert_eq!((snapshot.queued, snapshot.requests), (0, 0));
    assert_eq!(snapshot.scheduler.kv_blocks_used, 0);
    assert!(snapshot.scheduler.step_rows > 0);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_at_once() {
    let world = world(|config| config.max_queue = 3);
    let too_long = world.engine.submit(Request::new(ids(1000, 1), 1)).await;
    assert_eq!(
        too_long.unwrap_err(),
        EngineError::TooLong {
            prompt_tokens: 1000,
            max_model_len: 1000
        }
    );
    let invalid = world
        .engine
        .submit(Request::new(vec![], 1))
        .await
        .unwrap_err();
    assert_eq!(invalid, EngineError::Invalid(Refused::EmptyPrompt));
    let four = (0..4).map(|salt| Request::new(ids(9, salt), 5)).collect();
    let full = world.engine.submit_all(four).await.unwrap_err();
    assert_eq!(full.to_string(), "the queue is full: 3 requests wait");
    assert_eq!(world.engine.snapshot().queued, 0, "none of them was taken");
}

#[tokio::test]
async fn a_batch_takes_no_place_of_online_requests() {
    let world = world(|config| {
        config.max_queue = 3;
        config.scheduler.max_num_seqs = 1;
    });
    world.control.set(|s| s.paused = true);
    let batch = |salt| Request {
        priority: Priority::Batch,
        ..Request::new(ids(9, salt), 5)
    };
    let first = world.engine.submit(batch(0)).await.unwrap();
    until("it runs", || world.engine.snapshot().queued == 0).await;
    let mut pending = vec![first];
    for salt in 1..4 {
        pending.push(world.engine.submit(batch(salt)).await.unwrap());
    }
    let full = world.engine.submit(batch(4)).await.unwrap_err();
    assert_eq!(full, EngineError::Full { max_queue: 3 });
    for salt in 5..8 {
        let online = world.engine.submit(Request::new(ids(9, salt), 5)).await;
        pending.push(online.unwrap());
    }
    let full = world.engine.submit(Request::new(ids(9, 8), 5)).await;
    assert_eq!(full.unwrap_err(), EngineError::Full { max_queue: 3 });
    assert_eq!(world.engine.snapshot().queued, 6);
    world.control.set(|s| s.paused = false);
    for events in pending {
        assert_eq!(answer(events).await.1, Some(FinishReason::Length));
    }
}

#[tokio::test]
async fn the_queue_is_bounded_and_opens_again() {
    let world = world(|config| {
        config.max_queue = 3;
        config.scheduler.max_num_seqs = 2;
    });
    world.control.set(|s| s.paused = true);
    // Both at once: the first alone would take both steps that may be in flight.
    let two = (0..2).map(|salt| Request::new(ids(9, salt), 5)).collect();
    let mut pending = world.engine.submit_all(two).await.unwrap();
    until("both run", || world.engine.snapshot().queued == 0).await;
    for salt in 2..5 {
        pending.push(
            world
                .engine
                .submit(Request::new(ids(9, salt), 5))
                .await
                .unwrap(),
        );
    }
    let full = world
        .engine
        .submit(Request::new(ids(9, 9), 5))
        .await
        .unwrap_err();
    assert_eq!(full, EngineError::Full { max_queue: 3 });
    assert_eq!(
        (world.engine.snapshot().queued, world.engine.refused_full()),
        (3, 1)
    );
    world.control.set(|s| s.paused = false);
    for events in pending {
        assert_eq!(answer(events).await.1, Some(FinishReason::Length));
    }
    world
        .engine
        .submit(Request::new(ids(9, 9), 5))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_dropped_receiver_aborts_and_frees_the_blocks() {
    let world = world(|config| config.scheduler.max_num_seqs = 1);
    world.control.set(|s| s.paused = true);
    let running = world
        .engine
        .submit(Request::new(ids(100, 1), 800))
        .await
        .unwrap();
    let waiting = world
        .engine
        .submit(Request::new(ids(100, 2), 800))
        .await
        .unwrap();
    until("it runs", || world.engine.snapshot().scheduler.running == 1).await;
    drop(waiting);
    until("the waiting one is gone", || {
        world.engine.snapshot().requests == 1
    })
    .await;
    drop(running);
    until("the running one is gone", || {
        world.engine.snapshot().requests == 0
    })
    .await;
    world.control.set(|s| s.paused = false);
    until("the blocks are free", || {
        world.engine.snapshot().scheduler.kv_blocks_used == 0
    })
    .await;
    assert_eq!(world.engine.snapshot().aborted, 2);
    assert!(world.control.get(|s| s.steps) < 10, "nobody wanted more");
}

#[tokio::test]
async fn a_slow_reader_stops_nobody_and_gets_its_whole_answer() {
    let world = world(|config| {
        config.event_buffer = 16;
        config.scheduler.max_num_seqs = 1;
    });
    let request = || Request::new(ids(100, 1), 200);
    let mut slow = world.engine.submit(request()).await.unwrap();
    let first = slow.recv().await.unwrap();
    until("it is set aside, and no step uses its blocks", || {
        let now = world.engine.snapshot().scheduler;
        (now.held, now.kv_blocks_used) == (1, 0)
    })
    .await;
    assert!(slow.len() <= 16);
    assert_eq!(world.engine.snapshot().queued, 1);
    let other = world
        .engine
        .submit(Request::new(ids(50, 2), 300))
        .await
        .unwrap();
    assert_eq!(answer(other).await.1, Some(FinishReason::Length));

    let (rest, end) = answer(slow).await;
    let Event::Token { id, .. } = first else {
        panic!("{first:?}")
    };
    let mut whole = vec![id];
    whole.extend(rest);
    assert_eq!(
        (whole, end),
        (alone(&request(), 1000).ids, Some(FinishReason::Length))
    );
    assert!(world.engine.snapshot().set_aside > 0);
}

#[tokio::test]
async fn a_reader_that_reads_nothing_is_given_up() {
    let world = world(|config| {
        config.event_buffer = 16;
        config.reader_patience = Duration::from_millis(50);
    });
    let never_read = world
        .engine
        .submit(Request::new(ids(100, 1), 200))
        .await
        .unwrap();
    until("it is aborted", || world.engine.snapshot().aborted == 1).await;
    let (ids, end) = answer(never_read).await;
    assert!((13..16).contains(&ids.len()), "{}", ids.len());
    assert_eq!(end, Some(FinishReason::Abort));
    until("it left the queue", || world.engine.snapshot().queued == 0).await;
}

#[tokio::test]
async fn a_failed_executor_ends_all_requests_and_is_told() {
    let world = world(|config| config.scheduler.max_num_seqs = 1);
    world.control.set(|s| s.paused = true);
    let running = world
        .engine
        .submit(Request::new(ids(100, 1), 800))
        .await
        .unwrap();
    let waiting = world
        .engine
        .submit(Request::new(ids(100, 2), 800))
        .await
        .unwrap();
    world.control.set(|s| s.fails = true);
    assert_eq!(answer(running).await, (vec![], Some(FinishReason::Error)));
    assert_eq!(answer(waiting).await, (vec![], Some(FinishReason::Error)));
    let error = world
        .engine
        .submit(Request::new(ids(9, 1), 5))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the engine takes no requests: it failed: the device failed: it fell off the bus"
    );
    assert!(matches!(world.engine.stop(SOON).await, Health::Failed(_)));
    let load = world.port.load([1; 32], Ok(())).await.unwrap_err();
    assert!(matches!(load, AdapterError::Stopped(_)));
}

#[tokio::test]
async fn a_step_that_does_not_end_is_a_failure() {
    let world = world(|config| config.step_limit = Duration::from_millis(50));
    world.control.set(|s| s.paused = true);
    let events = world
        .engine
        .submit(Request::new(ids(100, 1), 8))
        .await
        .unwrap();
    assert_eq!(answer(events).await, (vec![], Some(FinishReason::Error)));
    let health = world.engine.health().to_string();
    assert_eq!(health, "it failed: a step did not end within 50ms");
}

#[tokio::test]
async fn a_panic_of_the_executor_leaves_nobody_waiting() {
    let world = world(|_| {});
    world.control.set(|s| s.panics = true);
    let events = world
        .engine
        .submit(Request::new(ids(100, 1), 8))
        .await
        .unwrap();
    assert_eq!(answer(events).await, (vec![], None));
    // Known before any client hears of the end.
    assert!(matches!(world.engine.health(), Health::Failed(_)));
}

#[tokio::test]
async fn stopping_finishes_what_is_there() {
    let world = world(|config| config.scheduler.max_num_seqs = 1);
    let mut pending = vec![];
    for salt in 0..5 {
        pending.push(
            world
                .engine
                .submit(Request::new(ids(30, salt), 50))
                .await
                .unwrap(),
        );
    }
    assert_eq!(world.engine.stop(SOON).await, Health::Stopped);
    let late = world
        .engine
        .submit(Request::new(ids(9, 1), 5))
        .await
        .unwrap_err();
    assert_eq!(late, EngineError::Stopped(Health::Stopped));
    for events in pending {
        assert_eq!(answer(events).await.1, Some(FinishReason::Length));
    }
}

#[tokio::test]
async fn stopping_ends_at_its_deadline() {
    let world = world(|_| {});
    world.control.set(|s| s.paused = true);
    let events = world
        .engine
        .submit(Request::new(ids(30, 1), 50))
        .await
        .unwrap();
    assert_eq!(
        world.engine.stop(Duration::from_millis(50)).await,
        Health::Stopped
    );
    assert_eq!(answer(events).await, (vec![], Some(FinishReason::Abort)));
}

#[tokio::test]
async fn the_thread_ends_with_the_last_handle() {
    let World { engine, port, .. } = world(|_| {});
    let events = engine.submit(Request::new(ids(30, 1), 800)).await.unwrap();
    let mut health = engine.watch_health();
    drop((engine, port));
    let (_, end) = answer(events).await;
    assert!(matches!(
        end,
        Some(FinishReason::Abort | FinishReason::Length)
    ));
    let ended = health.wait_for(|health| *health == Health::Stopped);
    tokio::time::timeout(SOON, ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_new_version_waits_for_the_place_of_an_old_one() {
    let world = world(|_| {});
    let load = |digest| world.port.load(fake::digest(digest), Ok(()));
    let (old, other) = (load(1).await.unwrap(), load(2).await.unwrap());
    world.control.set(|s| s.paused = true);
    let request = Request {
        adapter: Some(Arc::clone(&old)),
        ..Request::new(ids(50, 1), 5)
    };
    let events = world.engine.submit(request).await.unwrap();
    until("it runs", || world.engine.snapshot().scheduler.running == 1).await;
    drop(old);
    let mut new = std::pin::pin!(load(3));
    assert!(new.as_mut().now_or_never().is_none());
    world.control.set(|s| s.paused = false);
    answer(events).await;
    let new = tokio::time::timeout(SOON, new).await.unwrap().unwrap();
    assert_eq!(
        world.control.get(|s| s.adapters.clone()),
        BTreeSet::from([other.slot().0, new.slot().0])
    );
}

#[tokio::test]
async fn a_version_that_finds_no_place_in_time_is_told_so() {
    let world = world(|config| config.adapter_patience = Duration::from_millis(30));
    let load = |digest| world.port.load(fake::digest(digest), Ok(()));
    let held = [load(1).await.unwrap(), load(2).await.unwrap()];
    let AdapterError::Refused(reason) = load(3).await.unwrap_err() else {
        panic!("another error");
    };
    assert!(
        reason.to_string().contains("all 2 places are taken"),
        "{reason}"
    );
    drop(held);
    load(4).await.unwrap();
    assert_eq!(world.engine.health(), Health::Running);
}

/// The thread sleeps for a second when nothing runs; whoever waits for a place must not.
#[tokio::test]
async fn an_adapter_that_is_dropped_wakes_the_engine() {
    let world = world(|_| {});
    let began = Instant::now();
    for digest in 1..=20 {
        world.port.load(fake::digest(digest), Ok(())).await.unwrap();
        until("it is gone", || {
            world.control.get(|s| s.adapters.is_empty())
        })
        .await;
    }
    let spent = began.elapsed();
    assert!(spent < Duration::from_secs(15), "{spent:?}");
}

#[tokio::test]
async fn adapters_come_and_go_while_requests_run() {
    let world = world(|_| {});
    let old = world.port.load(fake::digest(1), Ok(())).await.unwrap();
    let request = |adapter: &Arc<Adapter>| Request {
        adapter: Some(Arc::clone(adapter)),
        ..Request::new(ids(50, 1), 300)
    };
    let expected = alone(&request(&old), 1000).ids;
    world.control.set(|s| s.paused = true);
    let events = world.engine.submit(request(&old)).await.unwrap();
    until("it runs", || world.engine.snapshot().scheduler.running == 1).await;
    let new = world.port.load(fake::digest(2), Ok(())).await.unwrap();
    assert_ne!(old.slot(), new.slot());
    drop(old);
    assert_eq!(
        world.control.get(|s| s.adapters.len()),
        2,
        "a request runs under it"
    );
    world.control.set(|s| s.paused = false);
    assert_eq!(answer(events).await.0, expected);
    let newer = world
        .engine
        .submit(Request::new(ids(50, 1), 5))
        .await
        .unwrap();
    answer(newer).await;
    until("the old one is gone", || {
        world.control.get(|s| s.adapters.len()) == 1
    })
    .await;

    let refused = world
        .port
        .load([9; 32], Err("rank 512 is above 64".into()))
        .await;
    assert!(
        matches!(refused, Err(AdapterError::Refused(_))),
        "{refused:?}"
    );
    assert_eq!(world.engine.health(), Health::Running);
}

#[test]
fn bounds_that_are_too_low_are_refused() {
    let toy = Toy {
        fake: Fake::new(limits(200)),
        limits: limits(200),
        submitted: 0,
        control: Arc::default(),
    };
    let config = EngineConfig {
        event_buffer: 2,
        ..EngineConfig::new(config(8, 256, 1000))
    };
    let error = Engine::start(toy, config).err().unwrap();
    assert_eq!(
        error.to_string(),
        "`event_buffer` must be at least 16, got 2"
    );
}
