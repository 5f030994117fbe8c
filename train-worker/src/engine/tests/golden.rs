//! Against transformers and PEFT: see `train-worker/tests/golden`.

use std::path::PathBuf;

use espalier_kernels::cpu::KvCache;
use espalier_qwen3::{CheckpointError, Form, Lora, Model, Part, Tensor, Want};
use serde_json::Value;

use super::*;

fn golden(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

fn checkpoint(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../crates/qwen3/tests/golden").join(name)
}

fn facts() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("facts.json")).unwrap()).unwrap()
}

/// Documents of the facts, each alone.
fn documents(facts: &Value, name: &str) -> Vec<Sample> {
    let all = facts[name].as_array().unwrap();
    all.iter()
        .map(|document| {
            let numbers = |field: &str| {
                let values = document[field].as_array().unwrap().iter();
                values
                    .map(|value| value.as_u64().unwrap())
                    .collect::<Vec<_>>()
            };
            let ids: Vec<u32> = numbers("ids").iter().map(|id| *id as u32).collect();
            let mut supervised = vec![false; ids.len()];
            for at in numbers("supervised") {
                supervised[at as usize] = true;
            }
            let ends = vec![ids.len()];
            Sample {
                ids,
                ends,
                supervised,
            }
        })
        .collect()
}

/// Several documents in one micro-batch.
fn packed(samples: &[Sample]) -> Sample {
    let mut all = Sample {
        ids: Vec::new(),
        ends: Vec::new(),
        supervised: Vec::new(),
    };
    for sample in samples {
        all.ids.extend(&sample.ids);
        all.supervised.extend(&sample.supervised);
        all.ends.push(all.ids.len());
    }
    all
}

fn of_facts(case: &Value) -> Settings {
    let peft = &case["settings"];
    let trained = match peft.is_object() {
        false => Trained::Full,
        true => Trained::Lora(LoraSettings {
            rank: peft["r"].as_u64().unwrap() as usize,
            alpha: peft["lora_alpha"].as_f64().unwrap(),
            rslora: peft["use_rslora"].as_bool().unwrap_or(false),
            targets: peft["target_modules"]
                .as_array()
                .unwrap()
                .iter()
                .map(|name| Projection::named(name.as_str().unwrap()).unwrap())
                .collect(),
        }),
    };
    let mut settings = settings(trained);
    settings.optimizer.weight_decay = case["weight_decay"].as_f64().unwrap_or(0.0);
    settings
}

fn load(name: &str, source: &dyn TensorSource, settings: &Settings) -> Trainer<Cpu<f32>> {
    let text = std::fs::read_to_string(checkpoint(name).join("config.json")).unwrap();
    let config = Config::parse(&text).unwrap();
    let backend = Cpu::new(Arc::new(Pool::new(1)));
    Trainer::new(config, source, settings, backend).unwrap()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Norm of the difference over that of what is expected.
fn apart(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let pairs = || got.iter().zip(expected);
    norm(pairs().map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(pairs().map(|(_, b)| f64::from(*b)))
}

fn close(got: f64, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap();
    assert!(
        (got - expected).abs() < tolerance * expected,
        "{got} is not {expected}"
    );
}

#[test]
fn gradients_of_adapters_are_those_of_peft() {
    let facts = facts();
    let sample = packed(&documents(&facts, "gradient_documents"));
    let cases = [
        ("lora-dense", "tiny-dense"),
        ("lora-some", "tiny-dense"),
        ("lora-moe", "tiny-moe"),
    ];
    for (case, model) in cases {
        let source = Checkpoint::open(&checkpoint(model)).unwrap();
        let mut trainer = load(model, &source, &of_facts(&facts[case]));
        let open = |file: &str| Checkpoint::open_file(&golden(case).join(file)).unwrap();
        let adapter = open("adapter_model.safetensors");
        trainer.adopt(&adapter).unwrap();
        assert_eq!(trainer.layout.parameters.len(), adapter.names().count());
        let expected = open("gradients.safetensors");
        let (loss, grads) = gradients(&mut trainer, &[&sample]);
        close(loss, &facts[case]["loss"], 1e-6);
        close(
            norm(grads.iter().map(|x| f64::from(*x))),
            &facts[case]["norm"],
            1e-5,
        );
        for parameter in &trainer.layout.parameters {
            let own = &grads[parameter.start..parameter.start + parameter.len];
            let expected = expected.tensor(&parameter.name, &parameter.shape).unwrap();
            let apart = apart(own, &expected.to_vec());
            assert!(apart < 1e-5, "{case} {}: {apart}", parameter.name);
        }
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

#[test]
fn gradients_of_all_weights_are_those_of_transformers() {
    let facts = facts();
    let sample = packed(&documents(&facts, "gradient_documents"));
    let text = std::fs::read_to_string(checkpoint("tiny-dense").join("config.json")).unwrap();
    for case in ["full-tied", "full-untied"] {
        let mut config = Config::parse(&text).unwrap();
        config.tied = case == "full-tied";
        let source = Untied(Checkpoint::open(&checkpoint("tiny-dense")).unwrap());
        let backend = Cpu::<f32>::new(Arc::new(Pool::new(1)));
        let settings = of_facts(&facts[case]);
        let mut trainer = Trainer::new(config, &source, &settings, backend).unwrap();
        let (loss, grads) = gradients(&mut trainer, &[&sample]);
        close(loss, &facts[case]["loss"], 1e-6);
        let picks = Checkpoint::open_file(&golden(&format!("{case}.safetensors"))).unwrap();
        assert_eq!(trainer.layout.parameters.len(), picks.names().count());
        for parameter in &trainer.layout.parameters {
            let own = &grads[parameter.start..parameter.start + parameter.len];
            let picked: Vec<f32> = (0..256).map(|i| own[i * 9973 % own.len()]).collect();
            let expected = picks.tensor(&parameter.name, &[256]).unwrap().to_vec();
            let norms = &facts[case]["norms"][&parameter.name];
            close(norm(own.iter().map(|x| f64::from(*x))), norms, 1e-5);
            let apart = apart(&picked, &expected);
            assert!(apart < 1e-5, "{case} {}: {apart}", parameter.name);
        }
    }
}

/// Trains as the facts say: two documents a step, each a micro-batch.
fn curve(trainer: &mut Trainer<Cpu<f32>>, facts: &Value, case: &str) {
    let documents = documents(facts, "curve_documents");
    let losses = facts[case]["losses"].as_array().unwrap();
    let lr = facts[case]["lr"].as_f64().unwrap();
    let mut sum = 0.0;
    for (step, expected) in losses.iter().enumerate() {
        let pair = [0, 1].map(|i| documents[(2 * step + i) % documents.len()].documents());
        let report = trainer.step(&pair, lr).unwrap();
        let expected = expected.as_f64().unwrap();
        sum += (report.loss - expected).abs() / expected;
        if step < 5 {
            close(report.loss, &losses[step], 1e-5);
            close(report.grad_norm, &facts[case]["norms"][step], 1e-4);
        }
    }
    let mean = sum / losses.len() as f64;
    assert!(mean < 0.005, "{case}: {mean}");
}

#[test]
fn an_adapter_trains_as_in_peft_and_is_served_as_peft_computes_it() {
    let facts = facts();
    let source = Checkpoint::open(&checkpoint("tiny-dense")).unwrap();
    let mut trainer = load("tiny-dense", &source, &of_facts(&facts["curve"]));
    let initial = Checkpoint::open_file(&golden("curve/initial.safetensors")).unwrap();
    trainer.adopt(&initial).unwrap();
    curve(&mut trainer, &facts, "curve");
    let folder = tempfile::tempdir().unwrap();
    let export = trainer.export();
    let bytes = export.to_safetensors(ExportType::F32).unwrap();
    std::fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
    let config = export.adapter_config.unwrap().to_string();
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let pool = Arc::new(Pool::new(1));
    let model = Model::load(&checkpoint("tiny-dense"), Form::F32, Arc::clone(&pool)).unwrap();
    let ids: Vec<u32> = serde_json::from_value(facts["curve"]["ids"].clone()).unwrap();
    let stored = Checkpoint::open_file(&golden("curve/logits.safetensors")).unwrap();
    let stored = |name: &str| stored.tensor(name, &[ids.len(), 512]).unwrap().to_vec();
    let served = |folder: &Path| {
        let lora = Lora::load(folder, model.config(), &pool).unwrap();
        logits(&model, &lora, &ids)
    };
    // PEFT's adapter gives PEFT's logits, and merged ones are near; ours gives nearly the same, and not the base's.
    let peft = served(&golden("curve"));
    assert!(apart(&peft, &stored("adapted")) < 1e-5);
    assert!(apart(&peft, &stored("merged")) < 1e-4);
    let own = served(folder.path());
    let near = apart(&own, &stored("adapted"));
    assert!(near < 0.01, "{near}");
    assert!(apart(&own, &stored("base")) > 0.2);
    trained_as_served(&mut trainer, &ids, &own);
}

/// Log-probabilities of trainer and server on the same tokens.
fn trained_as_served(trainer: &mut Trainer<Cpu<f32>>, ids: &[u32], logits: &[f32]) {
    let mut supervised = vec![true; ids.len()];
    supervised[0] = false;
    let documents = Documents {
        ids,
        ends: &[ids.len()],
        supervised: &supervised,
    };
    trainer.evaluate(documents).unwrap();
    let losses = Slice::new(trainer.buffers.losses, 0, ids.len() - 1);
    let losses = trainer.backend.read(losses);
    let mut sum = 0.0;
    for (i, loss) in losses.iter().enumerate() {
        let row = &logits[i * 512..(i + 1) * 512];
        let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let served = total.ln() - f64::from(row[ids[i + 1] as usize]);
        sum += (served - f64::from(*loss)).abs();
    }
    let mean = sum / losses.len() as f64;
    assert!(mean < 1e-5, "{mean}");
}

fn logits(model: &Model, lora: &Lora, ids: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(model.kv_shape(8)).unwrap();
    let part = Part {
        ids,
        start: 0,
        blocks: &[0, 1, 2, 3],
        lora: Some(lora),
        want: Want::All,
    };
    let mut logits = model.forward(&mut cache, &[part]).unwrap();
    logits.iter_mut().flat_map(|row| row.to_vec()).collect()
}

#[test]
fn all_weights_train_as_in_transformers() {
    let facts = facts();
    let source = Checkpoint::open(&checkpoint("tiny-dense")).unwrap();
    let mut trainer = load("tiny-dense", &source, &of_facts(&facts["full-curve"]));
    curve(&mut trainer, &facts, "full-curve");
}

#[test]
fn exports_are_what_was_loaded_before_a_step() {
    let source = Checkpoint::open(&checkpoint("tiny-dense")).unwrap();
    let settings = settings(Trained::Full);
    let mut trainer = load("tiny-dense", &source, &settings);
    let export = trainer.export();
    assert_eq!(export.tensors.len(), source.names().count());
    for tensor in &export.tensors {
        let stored = source.tensor(&tensor.name, &tensor.shape).unwrap();
        assert_eq!(stored.to_vec(), tensor.values, "{}", tensor.name);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, export.to_safetensors(ExportType::Bf16).unwrap()).unwrap();
    let written = Checkpoint::open_file(&path).unwrap();
    trainer.adopt(&written).unwrap();
    assert_eq!(trainer.export(), export);
}
