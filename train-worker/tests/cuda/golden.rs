//! Near what transformers and PEFT compute in f32.

use std::path::PathBuf;

use espalier_qwen3::{Checkpoint, CheckpointError, Config, Tensor, TensorSource};
use espalier_train_worker::engine::{Engine, LoraSettings, Projection, Settings, Trained};
use serde_json::Value;

use crate::{Sample, cosine, gradients, norm, on_gpu, settings};

pub const TESTS: &[(&str, fn())] = &[
    ("gradients_of_adapters_are_near_those_of_peft", adapters),
    (
        "gradients_of_all_weights_are_near_those_of_transformers",
        weights,
    ),
    ("an_adapter_trains_nearly_as_in_peft", curve),
];

fn golden(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

fn checkpoint(model: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../crates/qwen3/tests/golden").join(model)
}

fn config(model: &str) -> Config {
    let text = std::fs::read_to_string(checkpoint(model).join("config.json")).unwrap();
    Config::parse(&text).unwrap()
}

fn facts() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("facts.json")).unwrap()).unwrap()
}

/// How far torch's own bf16 is from its f32.
fn torch() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("bf16.json")).unwrap()).unwrap()
}

fn documents(documents: &Value) -> Vec<Sample> {
    let all = documents.as_array().unwrap().iter();
    all.map(|document| {
        let ids: Vec<u32> = serde_json::from_value(document["ids"].clone()).unwrap();
        let at: Vec<usize> = serde_json::from_value(document["supervised"].clone()).unwrap();
        Sample {
            ends: vec![ids.len()],
            supervised: (0..ids.len()).map(|i| at.contains(&i)).collect(),
            ids,
        }
    })
    .collect()
}

fn packed(samples: &[Sample]) -> Sample {
    let mut end = 0;
    let ends = samples.iter().map(|sample| {
        end += sample.ids.len();
        end
    });
    Sample {
        ends: ends.collect(),
        ids: samples.iter().flat_map(|s| s.ids.clone()).collect(),
        supervised: samples.iter().flat_map(|s| s.supervised.clone()).collect(),
    }
}

fn of_facts(case: &Value) -> Settings {
    let peft = &case["settings"];
    let trained = match peft.is_object() {
        false => Trained::Full,
        true => {
            let names: Vec<String> =
                serde_json::from_value(peft["target_modules"].clone()).unwrap();
            Trained::Lora(LoraSettings {
                rank: peft["r"].as_u64().unwrap() as usize,
                alpha: peft["lora_alpha"].as_f64().unwrap(),
                rslora: peft["use_rslora"].as_bool().unwrap_or(false),
                targets: names
                    .iter()
                    .map(|n| Projection::named(n).unwrap())
                    .collect(),
            })
        }
    };
    let mut settings = settings(trained);
    settings.optimizer.weight_decay = case["weight_decay"].as_f64().unwrap_or(0.0);
    settings
}

/// Within the share `tolerance`.
fn near(what: &str, got: f64, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap();
    let apart = (got - expected).abs() / expected;
    assert!(apart < tolerance, "{what}: {got} is not {expected}");
}

/// A step at no learning rate: loss, norm and gradients.
fn differentiate(engine: &mut Engine, case: &Value, sample: &Sample, beta1: f64) -> Gradients {
    let report = engine.step(&[sample.documents()], 0.0).unwrap();
    near("loss", report.loss, &case["loss"], 0.01);
    if case["norm"].is_number() {
        near("norm", report.grad_norm, &case["norm"], 0.02);
    }
    gradients(&engine.state(), beta1)
}

type Gradients = Vec<(String, Vec<usize>, Vec<f32>)>;

fn adapters() {
    let facts = facts();
    let few = packed(&documents(&facts["gradient_documents"]));
    // Documents whose choices of experts no rounding changes.
    let clear = packed(&documents(&facts["lora-moe-clear"]["documents"]));
    let cases = [
        ("lora-dense", "tiny-dense", &few),
        ("lora-some", "tiny-dense", &few),
        ("lora-moe-clear", "tiny-moe", &clear),
    ];
    for (name, model, sample) in cases {
        let case = &facts[name];
        let mut settings = of_facts(case);
        settings.clip_norm = None;
        let source = Checkpoint::open(&checkpoint(model)).unwrap();
        let mut engine = on_gpu(config(model), &source, &settings).unwrap();
        let open = |file: &str| Checkpoint::open_file(&golden(name).join(file)).unwrap();
        engine.adopt(&open("adapter_model.safetensors")).unwrap();
        let expected = open("gradients.safetensors");
        let all = differentiate(&mut engine, case, sample, settings.optimizer.beta1);
        assert_eq!(all.len(), expected.names().count());
        let (mut least, mut most) = (1.0_f64, 0.0_f64);
        for (parameter, shape, own) in all {
            let expected = expected.tensor(&parameter, &shape).unwrap().to_vec();
            least = least.min(cosine(&own, &expected));
            most = most.max((norm(&own) / norm(&expected) - 1.0).abs());
        }
        println!("{name}: least cosine {least}, norms at most {most} apart");
        assert!(least > 0.999 && most < 0.03);
    }
}

/// The head is the embedding with its rows in reverse order.
struct Untied(Checkpoint);

impl TensorSource for Untied {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        if name != "lm_head.weight" {
            return self.0.tensor(name, shape);
        }
        let all = self.0.tensor("model.embed_tokens.weight", shape)?.to_vec();
        let rows = all.chunks(shape[1]).rev();
        Ok(Tensor::Owned(rows.flatten().copied().collect()))
    }

    fn has(&self, name: &str) -> bool {
        name == "lm_head.weight" || self.0.has(name)
    }
}

fn weights() {
    let facts = facts();
    let sample = packed(&documents(&facts["gradient_documents"]));
    for name in ["full-tied", "full-untied"] {
        let case = &facts[name];
        let mut config = config("tiny-dense");
        config.tied = name == "full-tied";
        let mut settings = of_facts(case);
        settings.clip_norm = None;
        let source = Untied(Checkpoint::open(&checkpoint("tiny-dense")).unwrap());
        let mut engine = on_gpu(config, &source, &settings).unwrap();
        let picks = Checkpoint::open_file(&golden(&format!("{name}.safetensors"))).unwrap();
        let all = differentiate(&mut engine, case, &sample, settings.optimizer.beta1);
        assert_eq!(all.len(), picks.names().count());
        let mut least = 1.0_f64;
        for (parameter, _, own) in all {
            let picked: Vec<f32> = (0..256).map(|i| own[i * 9973 % own.len()]).collect();
            let expected = picks.tensor(&parameter, &[256]).unwrap().to_vec();
            let cosine = cosine(&picked, &expected);
            assert!(cosine > 0.999, "{name} {parameter}: cosine {cosine}");
            near(&parameter, norm(&own), &case["norms"][&parameter], 0.03);
            least = least.min(cosine);
        }
        println!("{name}: least cosine {least}");
    }
}

fn curve() {
    let facts = facts();
    let source = Checkpoint::open(&checkpoint("tiny-dense")).unwrap();
    let mut engine = on_gpu(config("tiny-dense"), &source, &of_facts(&facts["curve"])).unwrap();
    let initial = Checkpoint::open_file(&golden("curve/initial.safetensors")).unwrap();
    engine.adopt(&initial).unwrap();
    let documents = documents(&facts["curve_documents"]);
    let losses = facts["curve"]["losses"].as_array().unwrap();
    let lr = facts["curve"]["lr"].as_f64().unwrap();
    let (mut apart, mut sum) = (0.0, 0.0);
    for (step, expected) in losses.iter().enumerate() {
        let pair = [0, 1].map(|i| documents[(2 * step + i) % documents.len()].documents());
        let loss = engine.step(&pair, lr).unwrap().loss;
        let expected = expected.as_f64().unwrap();
        apart += (loss - expected).abs();
        sum += expected;
    }
    let torch = torch()["curve"]["share"].as_f64().unwrap();
    println!(
        "losses are off by {} of their sum, torch's by {torch}",
        apart / sum
    );
    assert!(apart / sum < 2.0 * torch);
}
