use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::*;
use crate::executor::{AdapterSlot, Done, History, Penalties};
use crate::grammar::{Constraint, GrammarError};

pub(crate) mod fake;
mod property;

use fake::{Fake, VOCAB};

pub(crate) fn limits(kv_blocks: u32) -> Limits {
    Limits {
        kv_blocks,
        tokens: 4096,
        rows: 256,
        vocab: VOCAB,
        steps_in_flight: 2,
        adapters: 2,
    }
}

pub(crate) fn config(max_num_seqs: usize, tokens: usize, max_model_len: usize) -> Config {
    Config {
        max_num_seqs,
        max_num_batched_tokens: tokens,
        max_model_len,
        prefix_caching: true,
        weight_version: 1,
    }
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) ids: Vec<u32>,
    pub(crate) end: Option<FinishReason>,
    pub(crate) cached: u32,
}

/// A scheduler and its executor.
struct World {
    scheduler: Scheduler,
    fake: Fake,
    answers: HashMap<RequestId, Answer>,
    /// How many requests had had a row when each one came.
    begun_before: HashMap<RequestId, usize>,
    ended: Vec<RequestId>,
}

impl World {
    fn new(config: Config, limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(config, limits).unwrap(),
            fake: Fake::new(limits),
            answers: HashMap::new(),
            begun_before: HashMap::new(),
            ended: Vec::new(),
        }
    }

    fn add(&mut self, request: Request) -> RequestId {
        let id = self.scheduler.add(request).unwrap();
        self.answers.insert(id, Answer::default());
        self.begun_before.insert(id, self.fake.first_rows.len());
        id
    }

    /// Submits a step if there is one to submit.
    fn decide(&mut self) -> bool {
        let step = self.scheduler.decide();
        let decided = step.is_some();
        if let Some(step) = step {
            self.fake.submit(step);
        }
        decided
    }

    fn finish_one(&mut self) -> bool {
        let Some(done) = self.fake.finish_one() else {
            return false;
        };
        self.take(done);
        true
    }

    fn take(&mut self, done: Done) {
        for (id, event) in self.scheduler.apply(done).unwrap() {
            let answer = self.answers.get_mut(&id).unwrap();
            assert_eq!(answer.end, None, "{id:?} goes on after its end");
            match event {
                Event::Token {
                    id, cached_tokens, ..
                } => {
                    answer.ids.push(id);
                    answer.cached = cached_tokens;
                }
                Event::Finished {
                    reason,
                    cached_tokens,
                } => {
                    let same = answer.ids.is_empty() || answer.cached == cached_tokens;
                    assert!(same, "{id:?} has another prompt at its end");
                    answer.end = Some(reason);
                    answer.cached = cached_tokens;
                    self.ended.push(id);
                }
            }
        }
    }

    /// Keeps steps in flight until nothing is left to do.
    fn run(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            while self.decide() {}
            assert!(self.finish_one(), "stuck: {:?}", self.scheduler.counters());
            steps += 1;
            assert!(steps < 100_000, "no end");
        }
        self.check_empty();
    }

    fn check_empty(&self) {
        let counters = self.scheduler.counters();
        assert_eq!(counters.kv_blocks_used, 0, "blocks leaked: {counters:?}");
        assert_eq!(
            (counters.waiting, counters.running, counters.held),
            (0, 0, 0)
        );
        assert!(self.scheduler.leaving.is_empty());
    }
}

pub(crate) fn ids(count: usize, salt: u32) -> Vec<u32> {
    let mix = |i: u32| (i.wrapping_mul(2_654_435_761) ^ salt.wrapping_mul(40_503)) >> 7;
    (0..count as u32).map(|i| mix(i) % VOCAB).collect()
}

/// What the model answers when nothing else runs.
pub(crate) fn alone(request: &Request, max_model_len: usize) -> Answer {
    let prompt = request.prompt.ids();
    let mut tokens = prompt.to_vec();
    let limit = max_model_len.min(tokens.len() + request.max_tokens as usize);
    let digest = request.adapter.as_ref().map(|a| *a.digest());
    let mut sampling = request.sampling.clone();
    loop {
        let answer = &tokens[prompt.len()..];
        sampling.step = answer.len() as u32;
        if let Some(penalties) = &mut sampling.penalties {
            let all: BTreeSet<u32> = tokens.iter().copied().collect();
            let count = |id: u32| answer.iter().filter(|a| **a == id).count() as u32;
            let seen = all.into_iter().map(|id| crate::executor::Seen {
                id,
                in_answer: count(id),
            });
            penalties.seen = seen.collect();
        }
        if request.grammar.is_some() {
            sampling.allowed = Some(parity_mask(answer.len()));
        }
        let id = fake::next_id(&tokens, digest, &sampling);
        tokens.push(id);
        let stopped = request.stop_ids.contains(&id);
        if stopped || tokens.len() == limit {
            return Answer {
                ids: tokens[prompt.len()..].to_vec(),
                end: Some(if stopped {
                    FinishReason::Stop
                } else {
                    FinishReason::Length
                }),
                cached: 0,
            };
        }
    }
}

/// Even ids and odd ids in turn.
struct Parity(usize);

fn parity_mask(drawn: usize) -> Arc<[u32]> {
    let word = if drawn.is_multiple_of(2) {
        0x5555_5555
    } else {
        0xaaaa_aaaa
    };
    Arc::new([word, word])
}

impl Constraint for Parity {
    fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        Ok(parity_mask(self.0))
    }

    fn push(&mut self, id: u32) -> Result<(), GrammarError> {
        if id as usize % 2 != self.0 % 2 {
            return Err(GrammarError::Run {
                reason: format!("{id} was not allowed"),
            });
        }
        self.0 += 1;
        Ok(())
    }
}

fn batch(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        priority: Priority::Batch,
        ..Request::new(prompt, max_tokens)
    }
}

#[test]
fn an_answer_ends_at_its_length_and_at_a_stop_id() {
    let request = || Request::new(ids(20, 1), 30);
    let whole = alone(&request(), 1000);
    let mut world = World::new(config(4, 64, 1000), limits(100));
    let a = world.add(request());
    let stop = whole.ids[7];
    let b = world.add(Request {
        stop_ids: Arc::new([stop]),
        ..request()
    });
    let c = world.add(request());
    world.run();
    assert_eq!(world.answers[&a].ids, whole.ids);
    assert_eq!(world.answers[&c].end, Some(FinishReason::Length));
    let first = whole.ids.iter().position(|id| *id == stop).unwrap();
    assert_eq!(world.answers[&b].ids, whole.ids[..=first]);
    assert_eq!(world.answers[&b].end, Some(FinishReason::Stop));
    assert_eq!(
        world.scheduler.counters().dropped_tokens,
        1,
        "seen a step late"
    );
}

#[test]
fn an_answer_ends_at_the_models_length() {
    let mut world = World::new(config(4, 64, 40), limits(3));
    let a = world.add(Request::new(ids(35, 1), 1000));
    world.run();
    assert_eq!(world.answers[&a].ids.len(), 5);
    assert_eq!(world.answers[&a].end, Some(FinishReason::Length));
}

#[test]
fn the_second_step_goes_on_from_what_the_first_draws() {
    let mut world = World::new(config(4, 64, 1000), limits(100));
    world.add(Request::new(ids(20, 1), 30));
    assert!(world.decide() && world.decide() && !world.decide());
    assert_eq!(world.fake.rows["sampled"], 1);
    world.run();
    assert_eq!(world.fake.rows["sampled"], 29);
}

#[test]
fn a_long_prompt_goes_in_chunks_beside_answers() {
    let mut world = World::new(config(4, 32, 1000), limits(100));
    let a = world.add(Request::new(ids(20, 1), 40));
    while world.answers[&a].ids.is_empty() {
        world.decide();
        world.finish_one();
    }
    let long = Request::new(ids(200, 2), 3);
    let expected = alone(&long, 1000);
    let b = world.add(long);
    let before = world.answers[&a].ids.len();
    while world.answers[&b].ids.is_empty() {
        world.decide();
        world.finish_one();
    }
    let meanwhile = world.answers[&a].ids.len() - before;
    assert!(
        (6..=9).contains(&meanwhile),
        "{meanwhile} tokens of the running answer"
    );
    world.run();
    assert_eq!(world.answers[&b].ids, expected.ids);
    assert_eq!(world.fake.rows["chunk"], 6);
}

#[test]
fn several_answers_to_one_prompt_compute_it_once() {
    let mut world = World::new(config(8, 4096, 1000), limits(200));
    let seeds = 0..6;
    let request = |seed| {
        let mut request = Request::new(ids(320, 1), 5);
        request.sampling.seed = seed;
        request
    };
    let added: Vec<_> = seeds.map(|seed| (seed, world.add(request(seed)))).collect();
    world.run();
    for (seed, id) in &added {
        assert_eq!(world.answers[id].ids, alone(&request(*seed), 1000).ids);
    }
    // The last block of the prompt is each one's own, because its last token must run.
    let cached: Vec<u32> = added
        .iter()
        .map(|(_, id)| world.answers[id].cached)
        .collect();
    assert_eq!(cached, [0, 304, 304, 304, 304, 304]);
    let counters = world.scheduler.counters();
    assert_eq!(counters.computed_tokens, 320 + 5 * 16 + 6 * 4);
    assert_eq!(
        (counters.prompt_tokens, counters.cached_tokens),
        (6 * 320, 5 * 304)
    );
}

#[test]
fn a_next_turn_finds_what_the_last_one_computed() {
    let mut world = World::new(config(8, 4096, 1000), limits(200));
    let a = world.add(Request::new(ids(50, 1), 50));
    world.run();
    let mut next = ids(50, 1);
    next.extend(&world.answers[&a].ids);
    next.extend(ids(20, 9));
    let b = world.add(Request::new(next, 5));
    world.run();
    // 99 tokens of the first turn went through the model: six full blocks.
    assert_eq!(world.answers[&b].cached, 96);
}

#[test]
fn blocks_are_of_one_adapter_content_and_one_version_of_weights() {
    let mut world = World::new(config(8, 4096, 1000), limits(200));
    let mut cached = |slot: Option<u32>| {
        let adapter = |slot| Arc::new(Adapter::new(AdapterSlot(slot), fake::digest(slot)));
        let request = Request {
            adapter: slot.map(adapter),
            ..Request::new(ids(100, 1), 5)
        };
        let expected = alone(&request, 1000);
        let id = world.add(request);
        world.run();
        assert_eq!(world.answers[&id].ids, expected.ids);
        world.answers[&id].cached
    };
    assert_eq!(cached(None), 0);
    assert_eq!(cached(Some(1)), 0);
    assert_eq!(cached(Some(3)), 0);
    assert_eq!(
        (cached(Some(1)), cached(Some(2)), cached(None)),
        (96, 96, 96)
    );
}

#[test]
fn out_of_blocks_the_last_to_arrive_gives_way_and_its_answer_stays_the_same() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    let request = |salt| Request::new(ids(40, salt), 100);
    let added: Vec<_> = (0..4).map(|salt| world.add(request(salt))).collect();
    world.run();
    for (salt, id) in (0..).zip(&added) {
        assert_eq!(world.answers[id].ids, alone(&request(salt), 160).ids);
    }
    assert!(world.scheduler.counters().preemptions > 0);
    assert_eq!(world.ended, added, "who came first ends first");
}

#[test]
fn an_online_request_takes_the_place_of_a_batch_request() {
    let mut world = World::new(config(2, 256, 160), limits(100));
    let batches = [
        world.add(batch(ids(40, 1), 100)),
        world.add(batch(ids(40, 2), 100)),
    ];
    for _ in 0..5 {
        world.decide();
        world.finish_one();
    }
    let online = world.add(Request::new(ids(40, 3), 10));
    let mut steps = 0;
    while world.answers[&online].end.is_none() {
        world.decide();
        world.finish_one();
        steps += 1;
    }
    assert!(steps <= 14, "{steps} steps for 10 tokens");
    world.run();
    for (id, salt) in batches.into_iter().zip([1, 2]) {
        assert_eq!(
            world.answers[&id].ids,
            alone(&batch(ids(40, salt), 100), 160).ids
        );
    }
}

#[test]
fn an_online_request_takes_the_blocks_of_batch_requests() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    for salt in 0..3 {
        world.add(batch(ids(60, salt), 60));
    }
    for _ in 0..3 {
        world.decide();
        world.finish_one();
    }
    let online = world.add(Request::new(ids(140, 9), 3));
    let mut steps = 0;
    while world.answers[&online].end.is_none() {
        world.decide();
        world.finish_one();
        steps += 1;
    }
    assert!(steps <= 8, "{steps} steps");
    world.run();
}

#[test]
fn batch_requests_go_on_under_endless_online_load() {
    let mut world = World::new(config(2, 64, 160), limits(12));
    let job = world.add(batch(ids(40, 1), 60));
    let mut online = 0;
    for step in 0..4000 {
        while world.scheduler.counters().waiting < 5 {
            world.add(Request::new(ids(40, step + 7), 10));
            online += 1;
        }
        world.decide();
        world.finish_one();
        if world.answers[&job].end.is_some() {
            assert!(online < 60, "{online} online requests went before");
            return;
        }
    }
    panic!("the batch request starves");
}

#[test]
fn an_aborted_request_gives_back_its_blocks_when_no_step_uses_them() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    let (a, b) = (
        world.add(Request::new(ids(40, 1), 50)),
        world.add(Request::new(ids(40, 2), 50)),
    );
    world.decide();
    world.decide();
    assert!(world.scheduler.abort(a) && !world.scheduler.abort(a));
    assert_eq!(world.scheduler.counters().kv_blocks_used, 6);
    world.finish_one();
    assert_eq!(world.scheduler.counters().kv_blocks_used, 6);
    world.finish_one();
    assert_eq!(world.scheduler.counters().kv_blocks_used, 3);
    world.run();
    assert_eq!(world.answers[&a].end, None);
    assert_eq!(world.answers[&b].ids.len(), 50);
}

#[test]
fn a_held_request_uses_no_blocks_and_goes_on_where_it_was() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    let request = || Request::new(ids(40, 1), 50);
    let a = world.add(request());
    for _ in 0..4 {
        world.decide();
        world.finish_one();
    }
    world.decide();
    world.scheduler.hold(a);
    while world.finish_one() {}
    let so_far = world.answers[&a].ids.len();
    assert_eq!(world.scheduler.counters().kv_blocks_used, 0);
    assert!(!world.decide());
    world.scheduler.resume(a);
    assert_eq!(world.answers[&a].ids.len(), so_far);
    world.run();
    assert_eq!(world.answers[&a].ids, alone(&request(), 160).ids);
}

#[test]
fn a_request_that_is_resumed_at_once_waits_for_what_is_in_flight() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    let request = || Request::new(ids(40, 1), 50);
    let a = world.add(request());
    assert!(world.decide());
    world.scheduler.hold(a);
    world.scheduler.resume(a);
    assert!(!world.decide(), "its next id is not known");
    world.run();
    assert_eq!(world.answers[&a].ids, alone(&request(), 160).ids);
}

#[test]
fn what_can_never_be_served_is_refused_with_the_numbers() {
    let mut scheduler = Scheduler::new(config(8, 256, 160), limits(12)).unwrap();
    let mut refused = |request| scheduler.add(request).unwrap_err().to_string();
    assert_eq!(
        refused(Request::new(vec![], 1)),
        "the prompt must have at least one token"
    );
    assert_eq!(
        refused(Request::new(ids(160, 1), 1)),
        "the prompt has 160 tokens, and with an answer of at least one it must not exceed the model's length of 160"
    );
    assert_eq!(
        refused(Request::new(vec![3, VOCAB], 1)),
        "token ids must be below 40, got 40"
    );
    assert_eq!(
        refused(Request::new(vec![1], 0)),
        "`max_tokens` must be at least 1, got 0"
    );
    assert!(scheduler.is_idle());
}

#[test]
fn a_configuration_that_cannot_be_kept_is_refused_with_what_would_do() {
    let error = |config: Config| config.check(&limits(12)).unwrap_err().to_string();
    assert!(error(config(8, 256, 193)).ends_with("set it to at most 192"));
    assert_eq!(
        error(config(257, 512, 100)),
        "`max_num_seqs` must be at most 256, which is what the executor takes, got 257"
    );
    assert_eq!(
        error(config(64, 63, 100)),
        "`max_num_batched_tokens` must be at least `max_num_seqs` (64), got 63"
    );
    assert_eq!(
        error(config(0, 63, 100)),
        "`max_num_seqs` must be at least 1, got 0"
    );
}

#[test]
fn a_result_of_another_step_is_refused() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    world.add(Request::new(ids(40, 1), 50));
    world.decide();
    let mut done = world.fake.finish_one().unwrap();
    done.drawn[0].seq = SeqId(77);
    assert!(world.scheduler.apply(done).is_err());
}

#[test]
fn a_grammar_that_fails_ends_its_request_only() {
    struct Fails(usize);
    impl Constraint for Fails {
        fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
            Ok(Arc::new([u32::MAX; 2]))
        }
        fn push(&mut self, _: u32) -> Result<(), GrammarError> {
            self.0 += 1;
            if self.0 < 3 {
                Ok(())
            } else {
                Err(GrammarError::Run {
                    reason: "no way on".into(),
                })
            }
        }
    }
    let mut world = World::new(config(8, 256, 160), limits(12));
    let a = world.add(Request {
        grammar: Some(Box::new(Fails(0))),
        ..Request::new(ids(40, 1), 50)
    });
    let b = world.add(Request::new(ids(40, 2), 50));
    world.run();
    assert_eq!(
        (world.answers[&a].ids.len(), world.answers[&a].end),
        (3, Some(FinishReason::Grammar))
    );
    assert_eq!(world.answers[&b].end, Some(FinishReason::Length));
}

#[test]
fn all_grammars_of_a_step_are_told_before_one_is_waited_for() {
    struct Logs(Arc<Mutex<Vec<&'static str>>>);
    impl Constraint for Logs {
        fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
            self.0.lock().unwrap().push("asked");
            Ok(Arc::new([u32::MAX; 2]))
        }
        fn push(&mut self, _: u32) -> Result<(), GrammarError> {
            self.0.lock().unwrap().push("told");
            Ok(())
        }
    }
    let mut world = World::new(config(8, 256, 160), limits(12));
    let log = Arc::new(Mutex::new(vec![]));
    for salt in 0..3 {
        world.add(Request {
            grammar: Some(Box::new(Logs(Arc::clone(&log)))),
            ..Request::new(ids(40, salt), 50)
        });
    }
    log.lock().unwrap().clear();
    world.decide();
    world.finish_one();
    assert_eq!(
        *log.lock().unwrap(),
        ["told", "told", "told", "asked", "asked", "asked"]
    );
}

#[test]
fn a_sequence_without_an_id_ends_alone() {
    let mut world = World::new(config(8, 256, 160), limits(12));
    let a = world.add(Request::new(ids(40, 1), 50));
    let b = world.add(Request::new(ids(40, 2), 50));
    world.decide();
    let mut done = world.fake.finish_one().unwrap();
    done.drawn[0].logprob = f32::NAN;
    world.take(done);
    world.run();
    assert_eq!(
        (&world.answers[&a].ids[..], world.answers[&a].end),
        (&[][..], Some(FinishReason::Error))
    );
    assert_eq!(world.answers[&b].end, Some(FinishReason::Length));
}

/// What a step costs the scheduler itself. Run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost_of_a_step_at_256_sequences() {
    let limits = Limits {
        tokens: 8192,
        ..limits(256 * 80)
    };
    let mut scheduler = Scheduler::new(config(256, 8192, 1200), limits).unwrap();
    for salt in 0..256 {
        scheduler.add(Request::new(ids(1000, salt), 190)).unwrap();
    }
    let draw = |step: &Step| {
        let draws = step.rows.iter().filter(|row| row.sample.is_some());
        let drawn = draws.map(|row| crate::executor::Drawn {
            seq: row.seq,
            id: 1,
            logprob: 0.0,
            top: vec![],
        });
        crate::executor::Done {
            ticket: crate::executor::Ticket(0),
            drawn: drawn.collect(),
        }
    };
    let (mut costs, mut last) = (Vec::new(), None::<Step>);
    while !scheduler.is_idle() {
        let began = std::time::Instant::now();
        let step = scheduler.decide();
        let decided = began.elapsed();
        let done = last.take().map(|step| draw(&step));
        let began = std::time::Instant::now();
        if let Some(done) = done {
            scheduler.apply(done).unwrap();
        }
        if step.as_ref().is_some_and(|step| step.rows.len() == 256) {
            costs.push((decided + began.elapsed()).as_secs_f64() * 1e6);
        }
        last = step;
    }
    costs.sort_by(f64::total_cmp);
    let at = |share: f64| costs[(costs.len() as f64 * share) as usize];
    println!(
        "{} steps: median {:.0} µs, p99 {:.0} µs",
        costs.len(),
        at(0.5),
        at(0.99)
    );
}
