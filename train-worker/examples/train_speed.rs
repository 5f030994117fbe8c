//! Measures training steps on the CPU beside what its registers could do, in one run, as JSON: seconds of a step, executed
//! floating-point operations of products, the machine's f32 matrix peak, and the share of it.
//! `cargo run --release -p espalier-train-worker --example train_speed -- 2`

use std::sync::Arc;
use std::time::Instant;

use espalier_kernels::cpu::Pool;
use espalier_kernels::train::peak_flops;
use espalier_qwen3::{Config, Seeded};
use espalier_train_worker::engine::{
    AdamW, Device, Documents, Engine, LoraSettings, Precision, Projection, Settings, Trained,
};
use serde_json::{Value, json};

const TOKENS: usize = 1024;

/// Hidden, intermediate, heads, heads of keys, elements of a head.
const MODELS: [(&str, [usize; 5]); 2] = [
    ("256 wide", [256, 768, 4, 2, 64]),
    ("layers of 0.6B", [1024, 3072, 16, 8, 128]),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(2), |text| text.parse())?;
    let pool = Arc::new(Pool::new(threads));
    let mut rows = Vec::new();
    for (name, shape) in MODELS {
        let lora = Trained::Lora(LoraSettings {
            rank: 32,
            alpha: 16.0,
            rslora: true,
            targets: Projection::ALL.to_vec(),
        });
        for (trained, what) in [(lora, "lora"), (Trained::Full, "full")] {
            rows.push(measure(&pool, name, shape, trained, what)?);
        }
    }
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

fn measure(
    pool: &Arc<Pool>,
    name: &str,
    [hidden, intermediate, heads, kv_heads, dim]: [usize; 5],
    trained: Trained,
    what: &str,
) -> Result<Value, Box<dyn std::error::Error>> {
    let config = Config::parse(&format!(
        r#"{{"model_type": "qwen3", "vocab_size": 4096, "hidden_size": {hidden}, "intermediate_size": {intermediate},
        "num_hidden_layers": 4, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {dim},
        "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": true}}"#
    ))?;
    let settings = Settings {
        trained,
        optimizer: AdamW::default(),
        clip_norm: Some(1.0),
        seed: 1,
        precision: Precision::F32,
        memory_budget_bytes: None,
        tokens_max: TOKENS,
    };
    let device = Device::Cpu {
        threads: pool.threads(),
    };
    let mut engine = Engine::new(config, &Seeded::any(), &settings, device)?;
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * 71 % 4096).collect();
    let mut supervised = vec![true; TOKENS];
    supervised[0] = false;
    let documents = Documents {
        ids: &ids,
        ends: &[TOKENS],
        supervised: &supervised,
    };
    let first = engine.step(&[documents], 1e-3)?;
    let (mut seconds, mut matrix_peak) = (f64::INFINITY, peak_flops(pool));
    let mut last = first;
    for _ in 0..5 {
        let start = Instant::now();
        last = engine.step(&[documents], 1e-3)?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
        matrix_peak = matrix_peak.max(peak_flops(pool));
    }
    let rate = last.flops as f64 / seconds;
    Ok(json!({
        "model": name, "trained": what, "tokens": TOKENS, "threads": pool.threads(), "isa": pool.isa().name(),
        "step_seconds": seconds, "tokens_per_second": TOKENS as f64 / seconds, "executed_flops": last.flops,
        "gflops": rate / 1e9, "matrix_peak_gflops": matrix_peak / 1e9, "share_of_peak": rate / matrix_peak,
        "grad_norm": last.grad_norm, "loss": [first.loss, last.loss],
        "memory_bytes": engine.memory().device_peak, "planned_bytes": engine.plan().bytes.device(),
    }))
}
