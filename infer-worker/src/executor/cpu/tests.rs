use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_kernels::cpu::Pool;
use espalier_qwen3::Form;
use serde_json::Value;

use super::*;
use crate::executor::BlockId;

const ANSWER: usize = 24;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../crates/qwen3/tests/golden")
        .join(name)
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// Prompts and the greedy answers that transformers or PEFT gives.
fn cases(folder: &str) -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(golden(folder).join("expected.json")).unwrap();
    let facts: Value = serde_json::from_str(&text).unwrap();
    let cases = facts["greedy"].as_array().unwrap().iter();
    cases
        .map(|case| (ids(&case["prompt"]), ids(&case["ids"])))
        .collect()
}

fn start(folder: &str, steps_in_flight: u32) -> CpuExecutor {
    let model = Model::load(&golden(folder), Form::F32, Arc::new(Pool::new(2))).unwrap();
    let config = CpuConfig {
        kv_blocks: 64 * 4,
        tokens: 64 * 40,
        rows: 64,
        steps_in_flight,
        adapters: 4,
    };
    CpuExecutor::start(model, config).unwrap()
}

#[derive(Clone)]
struct Seq {
    prompt: Vec<u32>,
    blocks: Vec<u32>,
    adapter: Option<AdapterSlot>,
    /// Positions before it are in the cache.
    done: usize,
    answer: Vec<u32>,
    drawing: usize,
}

fn seq(prompt: &[u32], first_block: u32) -> Seq {
    Seq {
        prompt: prompt.to_vec(),
        blocks: (first_block..first_block + 4).collect(),
        adapter: None,
        done: 0,
        answer: Vec::new(),
        drawing: 0,
    }
}

impl Seq {
    /// The next row of this sequence, in chunks of the prompt of at most `chunk`.
    fn row(&mut self, seq: u64, chunk: usize, sampling: &Sampling) -> Option<Row> {
        if self.drawing == ANSWER {
            return None;
        }
        let start = self.done;
        let input = if start < self.prompt.len() {
            Input::Ids(self.prompt[start..self.prompt.len().min(start + chunk)].to_vec())
        } else {
            Input::Sampled
        };
        self.done += input.tokens();
        let draws = self.done >= self.prompt.len();
        let step = self.drawing as u32;
        self.drawing += usize::from(draws);
        let blocks = &self.blocks[..self.done.div_ceil(16)];
        Some(Row {
            seq: SeqId(seq),
            input,
            start: start as u32,
            blocks: blocks.iter().copied().map(BlockId).collect(),
            adapter: self.adapter,
            sample: draws.then(|| Sampling {
                step,
                ..sampling.clone()
            }),
        })
    }
}

/// Runs all to the end, with as many steps in flight as the executor takes.
fn run(executor: &mut CpuExecutor, seqs: &mut [Seq], chunk: usize, sampling: &Sampling) {
    let mut flying = VecDeque::new();
    loop {
        let rows: Vec<Row> = seqs
            .iter_mut()
            .enumerate()
            .filter_map(|(i, seq)| seq.row(i as u64, chunk, sampling))
            .collect();
        let ended = rows.is_empty();
        if !ended {
            flying.push_back(executor.submit(Step { rows }).unwrap());
        }
        while flying.len() >= executor.limits().steps_in_flight as usize
            || (ended && !flying.is_empty())
        {
            let done = executor.poll(Duration::from_secs(30)).unwrap().unwrap();
            assert_eq!(Some(done.ticket), flying.pop_front());
            for drawn in done.drawn {
                seqs[drawn.seq.0 as usize].answer.push(drawn.id);
            }
        }
        if ended {
            return;
        }
    }
}

#[test]
fn greedy_ids_are_those_of_transformers_alone_and_in_a_batch_of_64_whole_and_chunked() {
    for folder in ["tiny-dense", "tiny-moe"] {
        let cases = cases(folder);
        for steps_in_flight in [1, 2] {
            let mut executor = start(folder, steps_in_flight);
            for (prompt, expected) in &cases {
                let mut alone = [seq(prompt, 0)];
                run(&mut executor, &mut alone, 100, &Sampling::default());
                assert_eq!(alone[0].answer, *expected);
            }
            for chunk in [100, 16, 7] {
                let mut batch: Vec<Seq> = (0..64)
                    .map(|i| seq(&cases[i % cases.len()].0, i as u32 * 4))
                    .collect();
                run(&mut executor, &mut batch, chunk, &Sampling::default());
                for (i, seq) in batch.iter().enumerate() {
                    assert_eq!(seq.answer, cases[i % cases.len()].1, "{folder} {chunk} {i}");
                }
            }
        }
    }
}

#[test]
fn a_cached_prefix_changes_nothing() {
    let mut executor = start("tiny-dense", 1);
    let (prompt, expected) = cases("tiny-dense").pop().unwrap();
    assert_eq!(prompt.len(), 40);
    run(
        &mut executor,
        &mut [seq(&prompt, 0)],
        100,
        &Sampling::default(),
    );
    let mut later: Vec<Seq> = (1..4)
        .map(|i| {
            let mut seq = seq(&prompt, i * 4);
            // The first two blocks are read where the first sequence wrote them.
            seq.blocks[..2].copy_from_slice(&[0, 1]);
            seq.done = 32;
            seq
        })
        .collect();
    run(&mut executor, &mut later, 100, &Sampling::default());
    assert!(later.iter().all(|seq| seq.answer == expected));
}

#[test]
fn adapters_of_a_batch_are_peft_s_and_come_and_go() {
    let mut executor = start("tiny-dense", 2);
    let model = Model::load(&golden("tiny-dense"), Form::Bf16, Arc::new(Pool::new(1))).unwrap();
    let folders = ["tiny-dense", "lora-plain", "lora-rslora"];
    for (slot, name) in (1..).zip(&folders[1..]) {
        let lora = Lora::load(&golden(name), model.config(), model.pool()).unwrap();
        executor
            .load_adapter(AdapterSlot(slot), Box::new(lora))
            .unwrap();
    }
    let mut batch = Vec::new();
    let mut expected = Vec::new();
    for at in 0..4 {
        for (slot, name) in (0..).zip(folders) {
            let (prompt, answer) = cases(name).swap_remove(at);
            let mut seq = seq(&prompt, batch.len() as u32 * 4);
            seq.adapter = (slot > 0).then_some(AdapterSlot(slot));
            batch.push(seq);
            expected.push(answer);
        }
    }
    run(&mut executor, &mut batch, 9, &Sampling::default());
    for (seq, expected) in batch.iter().zip(&expected) {
        assert_eq!(seq.answer, *expected);
    }
    executor.drop_adapter(AdapterSlot(1)).unwrap();
    let mut row = batch[1].clone();
    (row.done, row.drawing) = (0, 0);
    let rows = vec![row.row(1, 100, &Sampling::default()).unwrap()];
    executor.submit(Step { rows }).unwrap();
    let error = executor
        .poll(Duration::from_secs(30))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no adapter is loaded as AdapterSlot(1)"),
        "{error}"
    );
}

#[test]
fn a_seed_draws_the_same_ids_whatever_runs_beside() {
    let mut executor = start("tiny-dense", 2);
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 0.9,
        seed: 11,
        ..Sampling::default()
    };
    let (prompt, greedy) = cases("tiny-dense").swap_remove(2);
    let mut alone = [seq(&prompt, 0)];
    run(&mut executor, &mut alone, 100, &sampling);
    assert_ne!(alone[0].answer, greedy);
    let mut batch: Vec<Seq> = (0..5).map(|i| seq(&prompt, i * 4)).collect();
    batch[3].prompt.truncate(4);
    run(&mut executor, &mut batch, 5, &sampling);
    for i in [0, 1, 2, 4] {
        assert_eq!(batch[i].answer, alone[0].answer);
    }
}

#[test]
fn a_row_that_cannot_be_drawn_is_told_by_its_log_probability_alone() {
    let mut executor = start("tiny-dense", 1);
    let row = |i: u32, allowed: Option<Arc<[u32]>>| {
        let sampling = Sampling {
            allowed,
            ..Sampling::default()
        };
        seq(&[7, 8], i * 4)
            .row(u64::from(i), 100, &sampling)
            .unwrap()
    };
    let rows = vec![
        row(0, None),
        row(1, Some(Arc::new([]))),
        row(2, Some(Arc::new([2]))),
    ];
    executor.submit(Step { rows }).unwrap();
    let done = executor.poll(Duration::from_secs(30)).unwrap().unwrap();
    assert!(done.drawn[0].logprob.is_finite() && done.drawn[1].logprob.is_nan());
    assert_eq!(done.drawn[2].id, 1);
}
