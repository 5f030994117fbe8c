//! Greedy answers: those of f32, whatever the batch, the chunks, the cache and preemption are.

use std::sync::Arc;

use espalier_infer_worker::executor::cuda::{CudaExecutor, CudaOptions};
use espalier_infer_worker::executor::{Executor, Sampling};
use espalier_infer_worker::scheduler::FinishReason;
use espalier_qwen3::{Config, Seeded};

use crate::reference::{
    Distance, Reference, Tolerance, cases, checkpoint, config, golden_logits, log_softmax,
    logits_of, torch_bf16,
};
use crate::serve::{Answer, How, greedy, load, options, request, serve, serve_and_abort};

pub const TESTS: &[(&str, fn())] = &[
    ("logits_are_as_near_to_f32_as_twice_torch_s_bf16", || {
        logits("tiny-dense");
        logits("tiny-moe");
    }),
    ("greedy_answers_of_a_dense_model_are_those_of_f32", || {
        greedy_is_that_of_f32("tiny-dense")
    }),
    ("greedy_answers_of_a_moe_model_are_those_of_f32", || {
        greedy_is_that_of_f32("tiny-moe")
    }),
    ("a_dense_answer_does_not_depend_on_what_runs_beside", || {
        nothing_changes_an_answer("tiny-dense")
    }),
    ("a_moe_answer_does_not_depend_on_what_runs_beside", || {
        nothing_changes_an_answer("tiny-moe")
    }),
    ("graphs_equal_launches_one_by_one_bit_for_bit", || {
        graphs_equal_launches("tiny-dense");
        graphs_equal_launches("tiny-moe");
    }),
    ("layers_of_the_shape_of_0_6b_are_those_of_f32", || {
        real_shape("0.6b", SHAPE_0_6B)
    }),
    ("layers_of_the_shape_of_4b_are_those_of_f32", || {
        real_shape("4b", SHAPE_4B)
    }),
    ("layers_of_the_shape_of_30b_a3b_are_those_of_f32", || {
        real_shape("30b-a3b", SHAPE_30B_A3B)
    }),
    ("aborted_requests_leave_nothing_behind", aborts),
    (
        "a_stop_is_noticed_and_what_was_drawn_beyond_is_dropped",
        stops,
    ),
];

/// Prompts of all golden cases, and some that are longer than a chunk and a block.
fn prompts(folder: &str) -> Vec<Vec<u32>> {
    let golden = cases(folder).into_iter().map(|(prompt, _)| prompt);
    let long = [70_u32, 129, 200].map(|len| (0..len).map(|i| (i * 37 + len) % 500).collect());
    golden.chain(long).collect()
}

fn alone(executor: &mut CudaExecutor, prompts: &[Vec<u32>], tokens: u32) -> Vec<Answer> {
    let each = prompts.iter().map(|prompt| {
        let (mut answers, _) = serve(executor, How::PLAIN, vec![greedy(prompt, tokens)]);
        answers.remove(0)
    });
    each.collect()
}

fn check_all(
    what: &str,
    reference: &Reference,
    prompts: &[Vec<u32>],
    answers: &[Answer],
    tolerance: &Tolerance,
) {
    let mut distance = Distance::default();
    for (prompt, answer) in prompts.iter().zip(answers) {
        reference.check(what, None, prompt, answer, tolerance, &mut distance);
    }
    println!(
        "{what}: log-probabilities are off by {:.4} (root of the mean square, {:.4} allowed); {} of {} ids are not the \
         most likely in f32",
        distance.error(),
        tolerance.logprobs,
        distance.others,
        distance.drawn
    );
    assert!(distance.error() <= tolerance.logprobs, "{what}");
    assert!(
        distance.others * 10 <= distance.drawn,
        "{what}: {} of {} ids",
        distance.others,
        distance.drawn
    );
}

/// All log-probabilities of every position: a mask that allows one id tells its own.
fn logits(folder: &str) {
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let expected = golden_logits(folder);
    let (prompt, _) = cases(folder).swap_remove(logits_of(folder));
    let vocab = expected.len() / prompt.len();
    let told = |id: usize| {
        let mut allowed = vec![0; vocab.div_ceil(32)];
        allowed[id / 32] = 1 << (id % 32);
        Sampling {
            allowed: Some(allowed.into()),
            ..Sampling::default()
        }
    };
    let (mut squares, mut size) = (0.0, 0.0);
    for (position, logits) in expected.chunks(vocab).enumerate() {
        let prompt = &prompt[..=position];
        let requests = (0..vocab).map(|id| request(prompt, 1, told(id))).collect();
        let (answers, _) = serve(&mut executor, How::PLAIN, requests);
        let exact = log_softmax(logits);
        for (id, (answer, exact)) in answers.iter().zip(exact).enumerate() {
            assert_eq!(answer.ids, [id as u32]);
            squares += f64::from(answer.logprobs[0] - exact).powi(2);
            size += f64::from(logits[id]).powi(2);
        }
    }
    let error = (squares / size).sqrt();
    let allowed = 2.0 * torch_bf16(folder, "relative");
    println!("{folder}: logits are off by {error:.5}, twice torch's bf16 is {allowed:.5}");
    assert!(error <= allowed, "{folder}");
}

fn greedy_is_that_of_f32(folder: &str) {
    let tolerance = &Tolerance::of(folder);
    let reference = Reference::of(folder);
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let prompts = prompts(folder);
    let answers = alone(&mut executor, &prompts, 40);
    check_all(folder, &reference, &prompts, &answers, tolerance);
    let expected = cases(folder);
    let same = expected
        .iter()
        .zip(&answers)
        .filter(|((_, ids), answer)| answer.ids.starts_with(ids))
        .count();
    println!(
        "{folder}: {same} of {} answers are transformers' in f32 to the end",
        expected.len()
    );
}

fn nothing_changes_an_answer(folder: &str) {
    let tolerance = &Tolerance::of(folder);
    let reference = Reference::of(folder);
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let prompts = prompts(folder);
    let tokens = 40;
    let expected = alone(&mut executor, &prompts, tokens);
    let many: Vec<usize> = (0..64).map(|i| i * 5 % prompts.len()).collect();
    let plain = How::PLAIN;
    for (name, how) in [
        ("64 at once", plain),
        ("5 at once", How { seqs: 5, ..plain }),
        (
            "chunks of 64",
            How {
                tokens: 64,
                ..plain
            },
        ),
        (
            "chunks of 7",
            How {
                seqs: 7,
                tokens: 7,
                ..plain
            },
        ),
        (
            "a cached prefix",
            How {
                caching: true,
                ..plain
            },
        ),
        (
            "preemption",
            How {
                blocks: 40,
                ..plain
            },
        ),
        (
            "preemption and a cache",
            How {
                blocks: 40,
                caching: true,
                tokens: 100,
                ..plain
            },
        ),
    ] {
        let requests = many.iter().map(|i| greedy(&prompts[*i], tokens)).collect();
        let (answers, counters) = serve(&mut executor, how, requests);
        if how.blocks < 64 {
            assert!(counters.preemptions > 0, "{name}: nobody was preempted");
        }
        if how.caching {
            assert!(
                answers.iter().any(|answer| answer.cached > 0),
                "{name}: nothing was cached"
            );
        }
        let same = many
            .iter()
            .zip(&answers)
            .filter(|(i, answer)| {
                let what = format!("{folder}, {name}");
                let pair = [&expected[**i], answer];
                reference.agree(&what, None, &prompts[**i], pair, tolerance)
            })
            .count();
        println!(
            "{folder}, {name}: {same} of {} answers have the same ids as alone; the others part where f32 has two ids \
             within {:.3}",
            many.len(),
            tolerance.margin
        );
        assert!(same * 4 >= many.len() * 3, "{folder}, {name}: {same}");
    }
}

fn graphs_equal_launches(folder: &str) {
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let prompts = prompts(folder);
    let requests = || {
        let sampled = |(i, prompt): (usize, &Vec<u32>)| {
            let sampling = Sampling {
                temperature: if i.is_multiple_of(2) { 0.0 } else { 0.8 },
                top_p: 0.9,
                seed: i as u64,
                logprobs: Some(5),
                ..Sampling::default()
            };
            request(prompt, 30, sampling)
        };
        prompts.iter().enumerate().map(sampled).collect()
    };
    let (replayed, _) = serve(&mut executor, How::PLAIN, requests());
    executor.use_graphs(false);
    let (launched, _) = serve(&mut executor, How::PLAIN, requests());
    assert_eq!(replayed, launched, "{folder}");
    let without = CudaOptions {
        graphs: false,
        ..options()
    };
    let mut never = load(&config(folder), &checkpoint(folder), &without);
    let (launched, _) = serve(&mut never, How::PLAIN, requests());
    assert_eq!(replayed, launched, "{folder}: an executor without graphs");
}

const SHAPE_0_6B: &str = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": true}"#;
const SHAPE_4B: &str = r#"{"model_type": "qwen3", "vocab_size": 8000, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rope_theta": 5000000, "max_position_embeddings": 40960, "tie_word_embeddings": true}"#;
const SHAPE_30B_A3B: &str = r#"{"model_type": "qwen3_moe", "vocab_size": 8000, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": true, "rope_theta": 10000000, "max_position_embeddings": 40960,
    "tie_word_embeddings": false}"#;

/// Layers of the real shapes, weights drawn from seeds; also that ids of the vocabulary's padding are never drawn.
fn real_shape(name: &str, json: &str) {
    let config = Config::parse(json).unwrap();
    let source = Seeded::any();
    let mut executor = load(&config, &source, &options());
    let vocab = executor.limits().vocab;
    let prompts: Vec<Vec<u32>> = [1_u32, 17, 64, 150]
        .iter()
        .map(|len| (0..*len).map(|i| (i * 7919 + len) % vocab).collect())
        .collect();
    let requests = prompts.iter().map(|prompt| greedy(prompt, 12)).collect();
    let (answers, _) = serve(&mut executor, How::PLAIN, requests);
    assert!(answers.iter().flat_map(|a| &a.ids).all(|id| *id < vocab));
    drop(executor);
    let reference = Reference::new(config, &source);
    let tolerance = Tolerance::of(name);
    check_all(name, &reference, &prompts, &answers, &tolerance);
}

fn aborts() {
    let folder = "tiny-dense";
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let prompts = prompts(folder);
    let requests = |count: usize| {
        (0..count)
            .map(|i| greedy(&prompts[i % prompts.len()], 30))
            .collect::<Vec<_>>()
    };
    let (expected, _) = serve(&mut executor, How::PLAIN, requests(12));
    let (answers, counters) = serve_and_abort(&mut executor, How::PLAIN, requests(12), &[1, 4, 11]);
    assert!(
        counters.dropped_tokens > 0,
        "what was in flight was dropped"
    );
    for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
        if [1, 4, 11].contains(&i) {
            assert_eq!((answer.ids.len(), answer.reason), (5, None));
        } else {
            assert_eq!(answer.reason, Some(FinishReason::Length));
        }
        assert!(expected.ids.starts_with(&answer.ids[..5]), "{i}");
    }
    // The executor goes on as before.
    let (again, _) = serve(&mut executor, How::PLAIN, requests(12));
    assert_eq!(again, expected);
}

fn stops() {
    let folder = "tiny-dense";
    let mut executor = load(&config(folder), &checkpoint(folder), &options());
    let (prompt, ids) = cases(folder).swap_remove(1);
    let stop = ids[7];
    let first = ids.iter().position(|id| *id == stop).unwrap();
    let mut ended = greedy(&prompt, 40);
    ended.stop_ids = Arc::new([stop]);
    let (answers, counters) = serve(&mut executor, How::PLAIN, vec![ended]);
    assert_eq!(answers[0].reason, Some(FinishReason::Stop));
    assert_eq!(answers[0].ids.last(), Some(&stop));
    assert_eq!(counters.dropped_tokens, 1, "two steps were in flight");
    println!(
        "stopped after {} ids, in f32 after {}",
        answers[0].ids.len(),
        first + 1
    );
}
