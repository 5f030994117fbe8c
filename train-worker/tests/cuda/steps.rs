//! What must hold on any device: steps repeat, plans change nothing, predictions come true, a model learns.

use espalier_qwen3::{Config, Seeded};
use espalier_train_worker::engine::{
    Bits, Engine, EngineError, Keep, LoraSettings, Plan, Projection, Settings, State, Trained,
};

use crate::{Sample, on_gpu, settings};

pub const TESTS: &[(&str, fn())] = &[
    ("steps_repeat_bit_for_bit", repeat),
    ("long_documents_repeat_bit_for_bit", long_documents),
    ("a_state_goes_on_bit_for_bit", restore),
    ("plans_change_no_bit", plans),
    (
        "losses_of_tokens_add_up_to_those_of_their_documents",
        tokens,
    ),
    ("memory_and_operations_are_as_predicted", predictions),
    ("a_model_learns_from_scratch", scratch),
    ("experts_train_and_repeat_bit_for_bit", experts),
    ("too_little_memory_is_refused", too_little),
];

fn config() -> Config {
    let json = r#"{"model_type": "qwen3", "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "rope_theta": 10000, "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;
    Config::parse(json).unwrap()
}

fn lora() -> Trained {
    Trained::Lora(LoraSettings {
        rank: 8,
        alpha: 16.0,
        rslora: false,
        targets: Projection::ALL.to_vec(),
    })
}

/// Documents whose tokens follow from the ones before.
fn sample(seed: u32, lengths: &[usize]) -> Sample {
    let mut state = seed;
    let (mut ids, mut ends, mut supervised) = (Vec::new(), Vec::new(), Vec::new());
    for length in lengths {
        for i in 0..*length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let fresh = state >> 26;
            ids.push(if i % 4 == 0 {
                fresh
            } else {
                (ids[ids.len() - 1] * 3 + 1) % 64
            });
            supervised.push(i > 0);
        }
        ends.push(ids.len());
    }
    Sample {
        ids,
        ends,
        supervised,
    }
}

fn engine(settings: &Settings) -> Engine {
    on_gpu(config(), &Seeded::any(), settings).unwrap()
}

/// Losses, norms and the state after some steps.
fn run(engine: &mut Engine, steps: u32) -> (Vec<[f64; 2]>, State) {
    let reports = (0..steps).map(|step| {
        let micros = [
            sample(2 * step, &[200, 1, 311]),
            sample(2 * step + 1, &[90]),
        ];
        let micros = [micros[0].documents(), micros[1].documents()];
        let report = engine.step(&micros, 1e-3).unwrap();
        assert!(report.grad_norm > 0.0);
        [report.loss, report.grad_norm]
    });
    let reports = reports.collect();
    let state = engine.state();
    engine.check_device().unwrap();
    (reports, state)
}

fn both() -> [Settings; 2] {
    let mut eight = settings(lora());
    eight.optimizer.bits = Bits::Eight;
    [settings(Trained::Full), eight]
}

fn repeat() {
    for settings in both() {
        let first = run(&mut engine(&settings), 3);
        assert!(run(&mut engine(&settings), 3) == first);
    }
}

/// Long enough for what trains long documents alone, beside short ones.
fn long_documents() {
    let mut settings = settings(lora());
    settings.tokens_max = 4096;
    let runs = [(); 2].map(|()| {
        let mut engine = engine(&settings);
        let reports = (0..3).map(|step| {
            let sample = sample(step, &[1500, 200, 1100, 1296]);
            let report = engine.step(&[sample.documents()], 1e-3).unwrap();
            [report.loss, report.grad_norm]
        });
        let reports: Vec<[f64; 2]> = reports.collect();
        (reports, engine.state())
    });
    assert!(runs[0] == runs[1]);
}

fn restore() {
    for settings in both() {
        let mut whole = engine(&settings);
        let (_, state) = run(&mut whole, 2);
        let mut other = engine(&settings);
        other.restore(state).unwrap();
        assert!(run(&mut other, 2) == run(&mut whole, 2));
    }
}

fn plans() {
    let mut expected = None;
    for keep in Keep::EVERY {
        let mut settings = settings(lora());
        let plan = Plan::with(&config(), &settings, settings.tokens_max, vec![keep; 4]);
        settings.memory_budget_bytes = Some(plan.bytes.device());
        let mut engine = engine(&settings);
        assert!(engine.plan().keeps.iter().all(|kept| *kept <= keep));
        if keep == Keep::Offloaded {
            assert_eq!(engine.plan().keeps, [keep; 4]);
        }
        let got = run(&mut engine, 2);
        assert!(
            *expected.get_or_insert_with(|| got.clone()) == got,
            "{keep:?}"
        );
    }
}

fn tokens() {
    let mut engine = engine(&settings(lora()));
    let sample = sample(3, &[200, 1, 311]);
    let tokens = engine.token_losses(sample.documents()).unwrap();
    let documents = engine.evaluate(sample.documents()).unwrap();
    let mut rest = tokens.as_slice();
    for document in documents {
        let (own, after) = rest.split_at(document.tokens as usize);
        rest = after;
        let sum: f64 = own.iter().map(|loss| f64::from(*loss)).sum();
        assert_eq!(sum, document.sum);
    }
    assert!(rest.is_empty());
}

fn predictions() {
    for mut settings in both() {
        settings.tokens_max = 2048;
        let mut engine = engine(&settings);
        let sample = sample(1, &[1500, 548]);
        let supervised = sample.supervised.iter().filter(|target| **target).count();
        let report = engine.step(&[sample.documents()], 1e-3).unwrap();
        let planned = engine.plan();
        assert_eq!(report.flops, planned.flops(&sample.ends, supervised as u64));
        let (taken, planned) = (engine.memory().device_peak, planned.bytes.device());
        let apart = taken.abs_diff(planned) as f64 / taken as f64;
        println!("{taken} bytes taken, {planned} planned");
        assert!(apart < 0.1, "{taken} is not {planned}");
    }
}

fn scratch() {
    let mut engine = engine(&settings(Trained::Full));
    let losses = (0..60).map(|step| {
        let sample = sample(step, &[256, 256]);
        engine.step(&[sample.documents()], 1e-3).unwrap().loss
    });
    let losses: Vec<f64> = losses.collect();
    println!("from {} to {}", losses[0], losses[59]);
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

fn experts() {
    let json = r#"{"model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 10000,
        "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;
    let runs = [(); 2].map(|()| {
        let config = Config::parse(json).unwrap();
        let mut engine = on_gpu(config, &Seeded::any(), &settings(lora())).unwrap();
        let losses = run(&mut engine, 20);
        assert!(losses.0[19][0] < losses.0[0][0]);
        losses
    });
    assert!(runs[0] == runs[1]);
}

fn too_little() {
    let mut settings = settings(lora());
    settings.memory_budget_bytes = Some(1 << 20);
    let refused = on_gpu(config(), &Seeded::any(), &settings);
    assert!(matches!(refused, Err(EngineError::Plan(_))));
}
