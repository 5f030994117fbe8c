//! What is refused, and that a device that fails is told about, not died of.

use std::time::Duration;

use espalier_infer_worker::executor::cuda::{CudaExecutor, CudaOptions, LoadError};
use espalier_infer_worker::executor::{
    BlockId, Executor, ExecutorError, Input, Row, Sampling, SeqId, Step,
};
use espalier_kernels::cuda::Options;

use crate::reference::{checkpoint, config};
use crate::serve::{chain, load, options};

pub const TESTS: &[(&str, fn())] = &[
    ("too_little_memory_says_what_would_fit", too_little_memory),
    ("a_device_that_is_not_there_is_named", missing_device),
    ("a_broken_step_fails_the_executor_for_good", broken_steps),
    ("an_executor_is_dropped_with_steps_in_flight", dropped),
    ("an_executor_moves_to_another_thread", moves),
    ("memory_is_used_as_planned", memory),
];

fn open(options: &CudaOptions) -> Result<CudaExecutor, LoadError> {
    CudaExecutor::load(&config("tiny-dense"), &checkpoint("tiny-dense"), options)
}

fn too_little_memory() {
    let little = CudaOptions {
        gpu_memory_utilization: 1e-6,
        kv_blocks: None,
        ..options()
    };
    let refused = open(&little).err().unwrap();
    assert!(matches!(refused, LoadError::Memory(_)), "{refused:?}");
    let text = chain(&refused);
    println!("{text}");
    assert!(text.contains("--gpu-memory-utilization"), "{text}");
    let rows = CudaOptions {
        max_num_seqs: 0,
        ..options()
    };
    let text = open(&rows).err().unwrap().to_string();
    assert_eq!(text, "`max_num_seqs` must be at least 1, got 0");
}

fn missing_device() {
    let options = CudaOptions {
        device: Options {
            ordinal: 77,
            ..options().device
        },
        ..options()
    };
    let text = chain(&open(&options).err().unwrap());
    assert!(text.contains("device cuda:77 does not exist"), "{text}");
}

fn row(seq: u64, start: u32, input: Input) -> Row {
    Row {
        seq: SeqId(seq),
        input,
        start,
        blocks: vec![BlockId(3)],
        adapter: None,
        sample: Some(Sampling::default()),
    }
}

fn one(row: Row) -> Step {
    Step { rows: vec![row] }
}

fn broken_steps() {
    let ids = |len| Input::Ids(vec![1; len]);
    let mut outside = row(0, 0, ids(2));
    outside.blocks = vec![BlockId(1_000_000)];
    for (step, reason) in [
        (one(row(0, 0, Input::Sampled)), "drew nothing for it"),
        (one(row(0, 0, ids(0))), "it has no tokens"),
        (one(row(0, 9, ids(8))), "1 blocks do not hold 17 positions"),
        (
            one(row(0, 4_000, ids(1))),
            "it ends at position 4001 of 512",
        ),
        (one(outside), "BlockId(1000000) is not below 512"),
        (Step { rows: Vec::new() }, "a step of 0 rows"),
    ] {
        let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
        let error = executor.submit(step).unwrap_err();
        assert!(matches!(error, ExecutorError::Device(_)));
        assert!(error.to_string().contains(reason), "{error}");
        // All later calls say the same.
        let later = executor.submit(one(row(0, 0, ids(1)))).unwrap_err();
        assert_eq!(later.to_string(), error.to_string());
        let later = executor.poll(Duration::ZERO).unwrap_err();
        assert_eq!(later.to_string(), error.to_string());
    }
}

fn dropped() {
    let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
    for seq in 0..2 {
        let step = one(row(seq, 0, Input::Ids(vec![1; 16])));
        executor.submit(step).unwrap();
    }
    let third = executor.submit(one(row(2, 0, Input::Ids(vec![1]))));
    assert!(
        third
            .unwrap_err()
            .to_string()
            .contains("2 steps are in flight")
    );
    drop(executor);
    let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
    executor
        .submit(one(row(0, 0, Input::Ids(vec![1; 16]))))
        .unwrap();
    drop(executor);
}

fn moves() {
    let mut executor = load(&config("tiny-dense"), &checkpoint("tiny-dense"), &options());
    let drawn = std::thread::spawn(move || {
        executor
            .submit(one(row(0, 0, Input::Ids(vec![1, 2, 3]))))
            .unwrap();
        executor.poll(Duration::from_secs(30)).unwrap().unwrap()
    });
    assert_eq!(drawn.join().unwrap().drawn.len(), 1);
}

fn memory() {
    let share = CudaOptions {
        kv_blocks: None,
        gpu_memory_utilization: 0.1,
        ..options()
    };
    let executor = open(&share).unwrap();
    let memory = executor.memory();
    println!("{memory:?}");
    assert_eq!(executor.limits().kv_blocks as usize, memory.blocks);
    assert!(memory.blocks > 1_000, "{memory:?}");
}
