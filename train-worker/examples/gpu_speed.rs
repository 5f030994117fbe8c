//! Measures training steps on a GPU, as JSON: seconds of a step, tokens and floating-point operations a second, memory
//! taken and planned. Weights are drawn. `cargo run --release -p espalier-train-worker --example gpu_speed -- cuda:0`

use std::time::Instant;

use espalier_qwen3::{CheckpointError, Config, Tensor, TensorSource};
use espalier_train_worker::engine::{
    AdamW, Device, Documents, Engine, LoraSettings, Projection, Settings, Trained,
};
use serde_json::{Value, json};

/// Vocabulary, hidden, intermediate, layers, heads, heads of keys, elements of a head.
type Model = [usize; 7];
const QWEN3_4B: Model = [151_936, 2560, 9728, 36, 32, 8, 128];
/// 4 million parameters.
const SMALL: Model = [4096, 256, 768, 4, 4, 2, 64];

struct Case {
    name: &'static str,
    model: Model,
    full: bool,
    micros: usize,
    tokens: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "4B, 1 x 2048",
        model: QWEN3_4B,
        full: false,
        micros: 1,
        tokens: 2048,
    },
    Case {
        name: "4B, 1 x 8192",
        model: QWEN3_4B,
        full: false,
        micros: 1,
        tokens: 8192,
    },
    Case {
        name: "4M, 1 x 8192",
        model: SMALL,
        full: true,
        micros: 1,
        tokens: 8192,
    },
    Case {
        name: "4M, 4 x 1024",
        model: SMALL,
        full: true,
        micros: 4,
        tokens: 1024,
    },
];

/// The same drawn numbers over and over: as fast as memory.
struct Drawn(Vec<f32>);

impl Drawn {
    fn new() -> Self {
        let mut state = 1_u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        // A prime, so that rows differ.
        Self((0..1_000_003).map(next).collect())
    }
}

impl TensorSource for Drawn {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let len: usize = shape.iter().product();
        if name.contains("norm") {
            return Ok(Tensor::Owned(vec![1.0; len]));
        }
        let scale = 1.0 / (shape[shape.len() - 1] as f32).sqrt();
        let drawn: Vec<f32> = self.0.iter().map(|x| x * scale).collect();
        let mut values = Vec::with_capacity(len);
        while values.len() < len {
            values.extend_from_slice(&drawn[..drawn.len().min(len - values.len())]);
        }
        Ok(Tensor::Owned(values))
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "cuda:0".to_owned());
    let device = Device::parse(&device, 1)?;
    let only = std::env::args().nth(2).unwrap_or_default();
    for case in CASES.iter().filter(|case| case.name.contains(&only)) {
        println!("{}", measure(device, case)?);
    }
    Ok(())
}

fn config(model: Model) -> Result<Config, Box<dyn std::error::Error>> {
    let [
        vocabulary,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        dim,
    ] = model;
    Ok(Config::parse(&format!(
        r#"{{"model_type": "qwen3", "vocab_size": {vocabulary}, "hidden_size": {hidden},
        "intermediate_size": {intermediate}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
        "num_key_value_heads": {kv_heads}, "head_dim": {dim}, "rope_theta": 1000000,
        "max_position_embeddings": 40960, "tie_word_embeddings": true}}"#
    ))?)
}

fn measure(device: Device, case: &Case) -> Result<Value, Box<dyn std::error::Error>> {
    let lora = Trained::Lora(LoraSettings {
        rank: 32,
        alpha: 32.0,
        rslora: false,
        targets: Projection::ALL.to_vec(),
    });
    let settings = Settings {
        trained: if case.full { Trained::Full } else { lora },
        optimizer: AdamW::default(),
        clip_norm: Some(1.0),
        seed: 1,
        precision: device.precision(),
        memory_budget_bytes: None,
        tokens_max: case.tokens,
    };
    let start = Instant::now();
    let mut engine = Engine::new(config(case.model)?, &Drawn::new(), &settings, device)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let ids: Vec<u32> = (0..case.tokens as u32).map(|i| i * 71 % 4096).collect();
    let mut supervised = vec![true; case.tokens];
    supervised[0] = false;
    let micro = Documents {
        ids: &ids,
        ends: &[case.tokens],
        supervised: &supervised,
    };
    let micros = vec![micro; case.micros];
    let first = engine.step(&micros, 1e-4)?;
    engine.step(&micros, 1e-4)?;
    let (mut seconds, mut last) = (f64::INFINITY, first);
    for _ in 0..5 {
        let start = Instant::now();
        last = engine.step(&micros, 1e-4)?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    Ok(json!({
        "model": case.name, "trained": if case.full { "all" } else { "lora" }, "device": device.to_string(),
        "step_seconds": seconds, "tokens_per_second": last.tokens as f64 / seconds,
        "executed_flops": last.flops, "tflops": last.flops as f64 / seconds / 1e12,
        "grad_norm": last.grad_norm, "loss": [first.loss, last.loss], "load_seconds": load_seconds,
        "keeps": engine.plan().keeps.iter().map(|keep| keep.name()).collect::<std::collections::BTreeSet<_>>(),
        "memory_bytes": engine.memory().device_peak, "planned_bytes": engine.plan().bytes.device(),
    }))
}
