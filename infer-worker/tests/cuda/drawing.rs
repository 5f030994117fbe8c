//! How ids are drawn: seeds, masks, biases, penalties, log-probabilities; and ids that are read where the sampler left
//! them.

use std::sync::Arc;
use std::time::Duration;

use espalier_infer_worker::executor::cuda::CudaExecutor;
use espalier_infer_worker::executor::{
    BlockId, Drawn, Executor, Input, Penalties, Row, Sampling, Seen, SeqId, Step,
};
use espalier_infer_worker::scheduler::Request;

use crate::reference::{cases, checkpoint, config};
use crate::serve::{How, load, options, request, serve};

pub const TESTS: &[(&str, fn())] = &[
    ("seeds_reproduce", seeds),
    ("masks_biases_and_penalties_are_kept", options_of_a_draw),
    ("a_row_that_cannot_be_drawn_says_so_alone", nothing_to_draw),
    (
        "lists_that_are_too_long_for_the_arena_have_their_own",
        long_lists,
    ),
    ("the_most_likely_ids_are_told", most_likely),
];

fn open() -> CudaExecutor {
    load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options())
}

fn seeds() {
    let mut executor = open();
    let prompts: Vec<Vec<u32>> = cases("tiny-dense").into_iter().map(|case| case.0).collect();
    let sampled = |prompt: &[u32], seed| {
        let sampling = Sampling {
            temperature: 1.0,
            top_p: 0.95,
            top_k: 100,
            seed,
            ..Sampling::default()
        };
        request(prompt, 40, sampling)
    };
    let batch = |first: u64| -> Vec<Request> {
        (0..8)
            .map(|i| sampled(&prompts[i % prompts.len()], first + i as u64))
            .collect()
    };
    let (one, _) = serve(&mut executor, How::PLAIN, batch(1));
    let (again, _) = serve(&mut executor, How::PLAIN, batch(1));
    assert_eq!(one, again, "the same seeds");
    let (other, _) = serve(&mut executor, How::PLAIN, batch(100));
    assert!(
        one.iter().zip(&other).all(|(a, b)| a.ids != b.ids),
        "other seeds"
    );
    // Others beside it: the same ids.
    let mut mixed = batch(200);
    mixed[3] = sampled(&prompts[3 % prompts.len()], 4);
    let (mixed, _) = serve(&mut executor, How::PLAIN, mixed);
    assert_eq!(mixed[3].ids, one[3].ids, "one seed, others beside it");
}

/// One draw after a prompt.
fn draw(executor: &mut CudaExecutor, sampling: Vec<Sampling>) -> Vec<Drawn> {
    let rows = (0..).zip(sampling).map(|(i, sampling)| Row {
        seq: SeqId(i),
        input: Input::Ids(vec![5, 6, 7, 8]),
        start: 0,
        blocks: vec![BlockId(i as u32)],
        adapter: None,
        sample: Some(sampling),
    });
    executor
        .submit(Step {
            rows: rows.collect(),
        })
        .unwrap();
    let done = executor.poll(Duration::from_secs(30)).unwrap();
    done.unwrap().drawn
}

fn top(count: u8) -> Sampling {
    Sampling {
        logprobs: Some(count),
        ..Sampling::default()
    }
}

fn only(ids: &[u32]) -> Option<Arc<[u32]>> {
    let mut words = vec![0; 16];
    for id in ids {
        words[*id as usize / 32] |= 1 << (id % 32);
    }
    Some(words.into())
}

fn penalties(seen: &[(u32, u32)]) -> Penalties {
    let seen = seen.iter().map(|(id, in_answer)| Seen {
        id: *id,
        in_answer: *in_answer,
    });
    Penalties {
        presence: 0.0,
        frequency: 0.0,
        repetition: 1.0,
        seen: seen.collect(),
    }
}

fn options_of_a_draw() {
    let mut executor = open();
    let plain = draw(&mut executor, vec![top(5)]).remove(0);
    let [first, second, third] = [0, 1, 2].map(|i| plain.top[i]);
    assert_eq!((plain.id, plain.logprob), first);
    let with = |penalties: Penalties| Sampling {
        penalties: Some(penalties),
        ..top(5)
    };
    let behind = first.1 - second.1;
    let ways = vec![
        top(5),
        Sampling {
            bias: Some(Arc::new([(third.0, 50.0)])),
            ..top(5)
        },
        Sampling {
            allowed: only(&[second.0, third.0]),
            ..top(5)
        },
        Sampling {
            allowed: only(&[third.0]),
            temperature: 1.0,
            ..top(5)
        },
        with(Penalties {
            presence: behind + 0.01,
            ..penalties(&[(first.0, 1)])
        }),
        with(Penalties {
            presence: behind + 0.01,
            ..penalties(&[(first.0, 0)])
        }),
        with(Penalties {
            frequency: behind / 2.0 + 0.01,
            ..penalties(&[(first.0, 2)])
        }),
        with(Penalties {
            repetition: 100.0,
            ..penalties(&[(first.0, 0)])
        }),
        // Biases of one id add up.
        Sampling {
            bias: Some(Arc::new([
                (second.0, behind),
                (third.0, 0.0),
                (second.0, 0.01),
            ])),
            ..top(5)
        },
    ];
    let drawn = draw(&mut executor, ways);
    let ids: Vec<u32> = drawn.iter().map(|drawn| drawn.id).collect();
    let expected = [
        first.0, third.0, second.0, third.0, second.0, first.0, second.0,
    ];
    assert_eq!(ids[..7], expected);
    assert_ne!(ids[7], first.0, "divided by 100, or multiplied");
    assert_eq!(ids[8], second.0);
    // What is told is of the model's own logits, whatever was done to them.
    for drawn in &drawn {
        for (told, plain) in drawn.top.iter().zip(&plain.top) {
            assert_eq!(told.0, plain.0);
            assert!((told.1 - plain.1).abs() < 0.02, "{told:?} {plain:?}");
        }
    }
}

fn nothing_to_draw() {
    let mut executor = open();
    let none = Sampling {
        allowed: Some(Arc::new([])),
        ..Sampling::default()
    };
    let drawn = draw(&mut executor, vec![top(0), none, top(0)]);
    assert!(drawn[1].logprob.is_nan());
    assert_eq!(drawn[0].id, drawn[2].id);
    assert!(drawn[0].logprob.is_finite() && drawn[2].logprob.is_finite());
    // The step after reads what was drawn, and goes on.
    let rows = (0..3).map(|i| Row {
        seq: SeqId(i),
        input: Input::Sampled,
        start: 4,
        blocks: vec![BlockId(i as u32)],
        adapter: None,
        sample: Some(top(0)),
    });
    executor
        .submit(Step {
            rows: rows.collect(),
        })
        .unwrap();
    let done = executor.poll(Duration::from_secs(30)).unwrap().unwrap();
    assert_eq!(done.drawn[0].id, done.drawn[2].id);
}

fn long_lists() {
    let mut executor = open();
    let plain = draw(&mut executor, vec![top(2)]).remove(0);
    // Ids beyond the vocabulary are not looked at; they only make the list long.
    let mut seen: Vec<(u32, u32)> = (0..300_000).map(|i| (1_000 + i, 1)).collect();
    seen.push((plain.id, 1));
    let long = Sampling {
        penalties: Some(Penalties {
            presence: 100.0,
            ..penalties(&seen)
        }),
        ..top(2)
    };
    let drawn = draw(&mut executor, vec![top(2), long]);
    assert_eq!(drawn[0].id, plain.id);
    assert_eq!(drawn[1].id, plain.top[1].0);
    assert_eq!(draw(&mut executor, vec![top(2)]).remove(0).id, plain.id);
}

fn most_likely() {
    let mut executor = open();
    let drawn = draw(&mut executor, vec![top(20), top(0), top(1), top(255)]);
    let counts: Vec<usize> = drawn.iter().map(|drawn| drawn.top.len()).collect();
    assert_eq!(counts, [20, 0, 1, 20]);
    let top = &drawn[0].top;
    assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    assert_eq!(top[0], (drawn[0].id, drawn[0].logprob));
    let mass: f32 = top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert!(mass > 0.0 && mass <= 1.0 + 1e-5, "{mass}");
}
