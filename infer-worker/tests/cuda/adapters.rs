//! Adapters in a batch: each answer is that of f32 with its own adapter, the base's with none.

use std::sync::Arc;
use std::time::Duration;

use espalier_infer_worker::executor::{
    AdapterSlot, BlockId, Executor, ExecutorError, Input, Row, Sampling, SeqId, Step,
};
use espalier_infer_worker::scheduler::{Adapter, Request};
use espalier_qwen3::Lora;

use crate::reference::{Distance, Reference, Tolerance, cases, checkpoint, config};
use crate::serve::{How, greedy, load, options, serve};

pub const TESTS: &[(&str, fn())] = &[
    ("adapters_of_a_batch_are_those_of_f32", batch),
    ("adapters_come_and_go", come_and_go),
];

const FOLDERS: [&str; 4] = ["tiny-dense", "lora-plain", "lora-rslora", "lora-patterns"];

fn adapted(prompt: &[u32], tokens: u32, slot: u32) -> Request {
    let adapter = Adapter::new(AdapterSlot(slot), [slot as u8; 32]);
    Request {
        adapter: (slot > 0).then(|| Arc::new(adapter)),
        ..greedy(prompt, tokens)
    }
}

fn batch() {
    let tolerance = &Tolerance::of("tiny-dense");
    let reference = Reference::of("tiny-dense");
    let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
    let loras: Vec<Option<Lora>> = FOLDERS
        .iter()
        .enumerate()
        .map(|(slot, folder)| (slot > 0).then(|| reference.lora(folder)))
        .collect();
    let mut prompts: Vec<Vec<u32>> = cases("tiny-dense").into_iter().map(|case| case.0).collect();
    prompts.push((0..100).map(|i| i * 13 % 500).collect());
    // Of the base alone, before any adapter is there.
    let requests = prompts.iter().map(|prompt| greedy(prompt, 24)).collect();
    let (base, _) = serve(&mut executor, How::PLAIN, requests);
    for (slot, folder) in (1..).zip(&FOLDERS[1..]) {
        let lora = executor.adapter_layout().lay_out(&reference.lora(folder));
        executor
            .load_adapter(AdapterSlot(slot), lora.unwrap())
            .unwrap();
    }
    for (name, how) in [
        ("whole prompts", How::PLAIN),
        (
            "chunks of 24",
            How {
                tokens: 24,
                seqs: 24,
                ..How::PLAIN
            },
        ),
        (
            "prefixes are cached by adapter",
            How {
                caching: true,
                ..How::PLAIN
            },
        ),
    ] {
        let requests = prompts
            .iter()
            .flat_map(|prompt| (0..4).map(move |slot| adapted(prompt, 24, slot)));
        let (answers, _) = serve(&mut executor, how, requests.collect());
        let mut distance = Distance::default();
        for (i, answer) in answers.iter().enumerate() {
            let (prompt, slot) = (&prompts[i / 4], i % 4);
            let (what, lora) = (format!("{name}, {}", FOLDERS[slot]), loras[slot].as_ref());
            reference.check(&what, lora, prompt, answer, tolerance, &mut distance);
            if slot == 0 {
                reference.agree(&what, None, prompt, [&base[i / 4], answer], tolerance);
            }
        }
        println!(
            "{name}: log-probabilities are off by {:.4}, {:.4} allowed",
            distance.error(),
            tolerance.logprobs
        );
        assert!(distance.error() <= tolerance.logprobs, "{name}");
        // Adapters do something: answers to one prompt differ.
        let differ = answers.chunks(4).filter(|four| four[0].ids != four[1].ids);
        assert!(differ.count() * 2 > prompts.len(), "{name}");
    }
}

fn step(slot: u32) -> Step {
    let row = Row {
        seq: SeqId(u64::from(slot)),
        input: Input::Ids(vec![7, 8, 9]),
        start: 0,
        blocks: vec![BlockId(0)],
        adapter: Some(AdapterSlot(slot)),
        sample: Some(Sampling::default()),
    };
    Step { rows: vec![row] }
}

fn come_and_go() {
    let reference = Reference::of("tiny-dense");
    let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
    let layout = executor.adapter_layout();
    let lora = |folder| layout.lay_out(&reference.lora(folder)).unwrap();
    let draw = |executor: &mut espalier_infer_worker::executor::cuda::CudaExecutor, slot| {
        executor.submit(step(slot)).unwrap();
        let done = executor.poll(Duration::from_secs(30)).unwrap().unwrap();
        (done.drawn[0].id, done.drawn[0].logprob)
    };
    for (slot, folder) in (1..).zip(&FOLDERS[1..]) {
        executor
            .load_adapter(AdapterSlot(slot), lora(folder))
            .unwrap();
    }
    let first: Vec<_> = (1..4).map(|slot| draw(&mut executor, slot)).collect();
    // The place for a version beside the one whose name it takes.
    executor
        .load_adapter(AdapterSlot(7), lora(FOLDERS[1]))
        .unwrap();
    assert_eq!(draw(&mut executor, 7), first[0]);
    // All places are taken: refused, and the executor goes on.
    let refused = executor.load_adapter(AdapterSlot(4), lora(FOLDERS[1]));
    assert!(
        matches!(refused, Err(ExecutorError::Adapter(_))),
        "{refused:?}"
    );
    assert!(refused.unwrap_err().to_string().contains("--max-loras"));
    assert_eq!(draw(&mut executor, 2), first[1]);
    // A place that was freed is another adapter's, to the last number; nothing of the one before is left in it.
    executor.drop_adapter(AdapterSlot(2)).unwrap();
    executor
        .load_adapter(AdapterSlot(5), lora(FOLDERS[1]))
        .unwrap();
    assert_eq!(draw(&mut executor, 5), first[0]);
    assert_eq!(draw(&mut executor, 3), first[2]);
    // A new version takes over while a step of the old one is in flight.
    executor.drop_adapter(AdapterSlot(5)).unwrap();
    executor.submit(step(1)).unwrap();
    executor
        .load_adapter(AdapterSlot(6), lora(FOLDERS[3]))
        .unwrap();
    executor.submit(step(6)).unwrap();
    for expected in [first[0], first[2]] {
        let done = executor.poll(Duration::from_secs(30)).unwrap().unwrap();
        assert_eq!((done.drawn[0].id, done.drawn[0].logprob), expected);
    }
    // One that was dropped is not there: the step is no step, and the executor has failed.
    executor.drop_adapter(AdapterSlot(6)).unwrap();
    let error = executor.submit(step(6)).unwrap_err().to_string();
    assert!(
        error.contains("no adapter is loaded as AdapterSlot(6)"),
        "{error}"
    );
}
