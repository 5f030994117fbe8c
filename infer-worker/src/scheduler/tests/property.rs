//! Random requests under random limits and delays: everybody gets the answer that they would get alone.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
struct Ask {
    /// The prompt is a part of a few long texts, so that prefixes are shared.
    text: u32,
    prompt: usize,
    max_tokens: u32,
    stops: bool,
    adapter: Option<u32>,
    seed: u64,
    batch: bool,
    penalties: bool,
    grammar: bool,
    /// Steps after which it arrives, and how many after that it is aborted or held.
    arrives: usize,
    aborts: Option<usize>,
    holds: Option<usize>,
}

fn ask() -> impl Strategy<Value = Ask> {
    let shape = (0..3u32, 1..120usize, 1..40u32, prop::bool::weighted(0.3));
    let kind = (
        prop::option::weighted(0.4, 1..4u32),
        0..3u64,
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.15),
    );
    let when = (
        0..40usize,
        prop::option::weighted(0.15, 0..30usize),
        prop::option::weighted(0.15, 0..30usize),
    );
    (shape, kind, when).prop_map(|(shape, kind, when)| Ask {
        text: shape.0,
        prompt: shape.1,
        max_tokens: shape.2,
        stops: shape.3,
        adapter: kind.0,
        seed: kind.1,
        batch: kind.2,
        penalties: kind.3,
        grammar: kind.4,
        arrives: when.0,
        aborts: when.1,
        holds: when.2,
    })
}

impl Ask {
    fn request(&self) -> Request {
        let mut request = Request::new(ids(self.prompt, self.text), self.max_tokens);
        let adapter = |slot| Arc::new(Adapter::new(AdapterSlot(slot), fake::digest(slot)));
        request.adapter = self.adapter.map(adapter);
        request.sampling.seed = self.seed;
        request.sampling.penalties = self.penalties.then(|| Penalties {
            presence: 0.5,
            frequency: 0.5,
            repetition: 1.0,
            seen: History::default(),
        });
        if self.grammar {
            request.grammar = Some(Box::new(Parity(0)));
        }
        if self.stops {
            request.stop_ids = Arc::new([3, 17]);
        }
        if self.batch {
            request.priority = Priority::Batch;
        }
        request
    }
}

#[derive(Clone, Debug)]
struct Setting {
    config: Config,
    limits: Limits,
    /// How many steps are decided before the next result is taken, over and over.
    delays: Vec<usize>,
}

fn setting() -> impl Strategy<Value = Setting> {
    let sizes = (1..10usize, 0..60usize, 11..40u32);
    let kind = (
        any::<bool>(),
        1..3u32,
        prop::collection::vec(0..3usize, 1..20),
    );
    (sizes, kind).prop_map(
        |((seqs, more, kv_blocks), (prefix_caching, flight, delays))| {
            let max_num_batched_tokens = seqs + more;
            Setting {
                config: Config {
                    prefix_caching,
                    ..config(seqs, max_num_batched_tokens, 165)
                },
                limits: Limits {
                    kv_blocks,
                    tokens: max_num_batched_tokens as u32,
                    rows: seqs as u32,
                    vocab: VOCAB,
                    steps_in_flight: flight,
                    adapters: u32::MAX,
                },
                delays,
            }
        },
    )
}

/// Plays it all, and gives who was asked for what.
fn play(setting: &Setting, asks: &[Ask]) -> (World, Vec<Option<RequestId>>) {
    let mut world = World::new(setting.config, setting.limits);
    let mut added = vec![None; asks.len()];
    for turn in 0.. {
        for (ask, id) in asks.iter().zip(&mut added) {
            if ask.arrives == turn {
                *id = Some(world.add(ask.request()));
            }
            let Some(id) = *id else { continue };
            if ask.holds.is_some_and(|after| ask.arrives + after == turn) {
                world.scheduler.hold(id);
            }
            if ask
                .holds
                .is_some_and(|after| ask.arrives + after + ask.prompt % 10 == turn)
            {
                world.scheduler.resume(id);
            }
            if ask.aborts.is_some_and(|after| ask.arrives + after == turn) {
                world.scheduler.abort(id);
            }
        }
        let late = setting.delays[turn % setting.delays.len()];
        let decided = world.decide();
        while world.fake.in_flight() > late {
            world.finish_one();
        }
        // Nothing new to run and nothing due yet: the executor takes its time, but not for ever.
        if !decided {
            world.finish_one();
        }
        check_blocks(&world);
        if turn > 80 && world.scheduler.is_idle() {
            world.check_empty();
            return (world, added);
        }
        assert!(turn < 20_000, "no end: {:?}", world.scheduler.counters());
    }
    unreachable!("turns do not end");
}

/// The uses of each block add up to those of sequences and of what is leaving.
fn check_blocks(world: &World) {
    let scheduler = &world.scheduler;
    let mut users: HashMap<BlockId, u32> = HashMap::new();
    let leaving = scheduler.leaving.iter().flat_map(|l| &l.blocks);
    for block in scheduler
        .sequences
        .values()
        .flat_map(|s| &s.blocks)
        .chain(leaving)
    {
        *users.entry(*block).or_default() += 1;
    }
    let pool = &scheduler.pool;
    for block in (0..pool.total()).map(BlockId) {
        assert_eq!(
            pool.users(block),
            users.get(&block).copied().unwrap_or(0),
            "{block:?}"
        );
    }
    let states = |state| {
        scheduler
            .sequences
            .values()
            .filter(move |s| s.state == state)
            .count()
    };
    assert_eq!(states(State::Running), scheduler.running.len());
    assert_eq!(states(State::Waiting), scheduler.waiting.len());
    assert_eq!(states(State::Held), scheduler.counters().held);
}

/// Plays requests that share nothing: whether each is of a batch, when it arrives, and the length of its prompt.
fn play_alone(
    setting: &Setting,
    kinds: &[(bool, usize, usize)],
) -> (World, Vec<Option<RequestId>>) {
    let ask = |(i, (batch, arrives, prompt)): (usize, &(bool, usize, usize))| Ask {
        text: 100 + i as u32,
        prompt: *prompt,
        max_tokens: 10,
        stops: false,
        adapter: None,
        seed: 0,
        batch: *batch,
        penalties: false,
        grammar: false,
        arrives: *arrives,
        aborts: None,
        holds: None,
    };
    let asks: Vec<Ask> = kinds.iter().enumerate().map(ask).collect();
    let config = Config {
        prefix_caching: false,
        ..setting.config
    };
    let setting = Setting {
        config,
        ..setting.clone()
    };
    play(&setting, &asks)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn everybody_gets_the_answer_that_they_would_get_alone(
        setting in setting(),
        asks in prop::collection::vec(ask(), 1..16),
    ) {
        let (world, added) = play(&setting, &asks);
        for (ask, id) in asks.iter().zip(added) {
            let answer = &world.answers[&id.unwrap()];
            let expected = alone(&ask.request(), setting.config.max_model_len);
            if ask.aborts.is_some() && answer.end.is_none() {
                prop_assert!(expected.ids.starts_with(&answer.ids));
            } else {
                prop_assert_eq!(&answer.ids, &expected.ids);
                prop_assert_eq!(answer.end, expected.end);
            }
        }
    }

    /// Prompts that share nothing, nobody preempted: the order of admission is by class and arrival, and a batch
    /// request lets no more online requests go first than the rule says.
    #[test]
    fn nobody_is_passed_over(
        setting in setting(),
        kinds in prop::collection::vec((any::<bool>(), 0..60usize, 1..100usize), 1..60),
    ) {
        let (world, added) = play_alone(&setting, &kinds);
        let place = |id: &RequestId| world.fake.first_rows.iter().position(|s| *s == id.seq());
        let places = |batch: bool| {
            let of_kind = kinds.iter().zip(&added).filter(move |(kind, _)| kind.0 == batch);
            let mut ids: Vec<RequestId> = of_kind.map(|(_, id)| id.unwrap()).collect();
            ids.sort();
            ids.iter().map(|id| (*id, place(id).unwrap())).collect::<Vec<_>>()
        };
        let (online, batch) = (places(false), places(true));
        prop_assert!(online.is_sorted_by_key(|(_, place)| *place), "{online:?}");
        prop_assert!(batch.is_sorted_by_key(|(_, place)| *place), "{batch:?}");
        for (ahead, (id, place)) in batch.iter().enumerate() {
            let later = online.iter().filter(|(other, at)| other > id && at < place).count();
            prop_assert!(later <= (ahead + 1) * ONLINE_PER_BATCH as usize, "{later} before {id:?}");
        }
    }

    /// However many batch requests wait: of those that did not run yet when an online request came, so few begin before
    /// it as the rule says. One may have had its turn already, and one may be about to.
    #[test]
    fn an_online_request_waits_for_few_batch_requests(
        setting in setting(),
        kinds in prop::collection::vec((prop::bool::weighted(0.8), 0..60usize, 1..100usize), 1..100),
    ) {
        let (world, added) = play_alone(&setting, &kinds);
        let is_batch: HashMap<_, _> = kinds.iter().zip(&added).map(|(kind, id)| (id.unwrap().seq(), kind.0)).collect();
        let online = kinds.iter().filter(|kind| !kind.0).count();
        let admitted = online + world.scheduler.counters().preemptions as usize;
        for id in added.iter().map(|id| id.unwrap()).filter(|id| !is_batch[&id.seq()]) {
            let rows = &world.fake.first_rows;
            let place = rows.iter().position(|seq| *seq == id.seq()).unwrap();
            let before = rows[world.begun_before[&id]..place].iter().filter(|seq| is_batch[seq]).count();
            prop_assert!(before <= 2 + admitted / ONLINE_PER_BATCH as usize, "{before} before {id:?}");
        }
    }
}
