//! Measures the CPU forward pass on random weights of the shape of Qwen3-0.6B: decode at batch 1 and 8 after 128 tokens,
//! prefill of 2,048, beside what a plain copy reaches. `cargo run --release -p espalier-qwen3 --example speed -- bf16 2`

use std::sync::Arc;
use std::time::Instant;

use espalier_kernels::cpu::{KvCache, Pool};
use espalier_qwen3::{Config, Form, Model, Part, Seeded, Want};

const CONFIG: &str = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": true}"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let form = match args.next().as_deref() {
        Some("f32") => Form::F32,
        Some("q8") => Form::Q8,
        _ => Form::Bf16,
    };
    let threads = args.next().map_or(Ok(2), |text| text.parse())?;
    let pool = Arc::new(Pool::new(threads));
    let start = Instant::now();
    let model = Model::from_source(
        Config::parse(CONFIG)?,
        &Seeded::any(),
        form,
        Arc::clone(&pool),
    )?;
    println!(
        "{form:?} {:?}, {threads} threads; drawn and packed in {:.1?}",
        pool.isa(),
        start.elapsed()
    );
    let copied = copy_rate(&pool);
    println!(
        "copy: {copied:.1} GB/s (bytes read and written); read: {:.1} GB/s",
        read_rate(&pool)
    );
    let blocks = 8 * 16 + 128;
    let mut cache = KvCache::new(model.kv_shape(blocks))?;
    for batch in [1, 8] {
        decode(&model, &mut cache, batch)?;
    }
    let ids: Vec<u32> = (0..2048).map(|i| i * 71 % 150_000).collect();
    let all: Vec<u32> = (0..128).collect();
    let part = Part {
        ids: &ids,
        start: 0,
        blocks: &all,
        lora: None,
        want: Want::Last,
    };
    for _ in 0..2 {
        let start = Instant::now();
        model.forward(&mut cache, &[part])?;
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "prefill 2048: {seconds:.2} s, {:.0} tokens/s",
            2048.0 / seconds
        );
    }
    Ok(())
}

fn decode(
    model: &Model,
    cache: &mut KvCache,
    batch: u32,
) -> Result<(), Box<dyn std::error::Error>> {
    let blocks: Vec<Vec<u32>> = (0..batch)
        .map(|s| (s * 16..s * 16 + 16).collect())
        .collect();
    let steps = 24;
    let mut best = f64::INFINITY;
    let started = Instant::now();
    for step in 0..steps {
        let parts: Vec<Part<'_>> = blocks
            .iter()
            .map(|blocks| Part {
                ids: &[17],
                start: 128 + step,
                blocks,
                lora: None,
                want: Want::Last,
            })
            .collect();
        let start = Instant::now();
        model.forward(cache, &parts)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let mean = started.elapsed().as_secs_f64() / steps as f64;
    println!(
        "decode batch {batch}: mean {:.1} ms, best {:.1} ms a step; {:.1} tokens/s (best {:.1}); weights at {:.1} GB/s",
        mean * 1e3,
        best * 1e3,
        f64::from(batch) / mean,
        f64::from(batch) / best,
        model.weight_bytes() as f64 / best / 1e9,
    );
    Ok(())
}

/// Best of five copies of 256 MB by all threads.
fn copy_rate(pool: &Pool) -> f64 {
    let threads = pool.threads();
    let from = vec![1_u8; 256 << 20];
    let parts: Vec<std::sync::Mutex<Vec<u8>>> = (0..threads)
        .map(|_| std::sync::Mutex::new(vec![0; from.len() / threads]))
        .collect();
    let rate = |_| {
        let start = Instant::now();
        pool.run(&|index| {
            if let Ok(mut to) = parts[index].lock() {
                let len = to.len();
                to.copy_from_slice(&from[index * len..(index + 1) * len]);
            }
        });
        2.0 * from.len() as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(rate).fold(0.0, f64::max)
}

/// Best of five sums over 512 MB by all threads.
fn read_rate(pool: &Pool) -> f64 {
    let threads = pool.threads();
    let from = vec![1_u64; 64 << 20];
    let rate = |_| {
        let start = Instant::now();
        pool.run(&|index| {
            let len = from.len() / threads;
            let mut lanes = [0_u64; 64];
            for chunk in from[index * len..(index + 1) * len].chunks_exact(64) {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane = lane.wrapping_add(*x);
                }
            }
            std::hint::black_box(lanes);
        });
        8.0 * from.len() as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(rate).fold(0.0, f64::max)
}
