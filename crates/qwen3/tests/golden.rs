//! What transformers and PEFT computed in float32, computed again: logits within 1e-4 relative, the same greedy ids.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_kernels::cpu::{KvCache, KvForm, KvShape, Pool};
use espalier_qwen3::{
    Checkpoint, Config, Draw, Form, Lora, Model, Part, Seeded, TensorSource, Want, hashed,
};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn load(name: &str, form: Form) -> Model {
    Model::load(&golden(name), form, Arc::new(Pool::new(2))).unwrap()
}

const BLOCKS: [u32; 8] = [5, 0, 7, 2, 1, 6, 3, 4];

fn argmax(row: &[f32]) -> u32 {
    (0..row.len())
        .max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)))
        .unwrap() as u32
}

fn greedy(model: &Model, lora: Option<&Lora>, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut cache = KvCache::new(model.kv_shape(8)).unwrap();
    let mut out = Vec::new();
    let (mut next, mut start) = (prompt.to_vec(), 0);
    for _ in 0..count {
        let part = Part {
            ids: &next,
            start,
            blocks: &BLOCKS,
            lora,
            want: Want::Last,
        };
        let logits = model.forward(&mut cache, &[part]).unwrap();
        start += next.len();
        next = vec![argmax(logits.row(0))];
        out.push(next[0]);
    }
    out
}

/// A cache that rounds nothing, whatever the weights are kept in.
fn exact_cache(model: &Model, blocks: usize) -> KvCache {
    let form = KvForm::F32;
    KvCache::new(KvShape {
        form,
        ..model.kv_shape(blocks)
    })
    .unwrap()
}

fn logits(model: &Model, lora: Option<&Lora>, prompt: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(model.kv_shape(8)).unwrap();
    logits_over(&mut cache, model, lora, prompt)
}

fn logits_over(
    cache: &mut KvCache,
    model: &Model,
    lora: Option<&Lora>,
    prompt: &[u32],
) -> Vec<f32> {
    let part = Part {
        ids: prompt,
        start: 0,
        blocks: &BLOCKS,
        lora,
        want: Want::All,
    };
    let logits = model.forward(cache, &[part]).unwrap();
    (0..logits.rows())
        .flat_map(|row| logits.row(row).to_vec())
        .collect()
}

fn relative(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |x: f64| x * x;
    let error: f64 = got
        .iter()
        .zip(expected)
        .map(|(a, b)| square(f64::from(a - b)))
        .sum();
    (error / expected.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

fn check(model: &Model, lora: Option<&Lora>, folder: &str) -> Vec<f32> {
    let facts = json(&golden(folder).join("expected.json"));
    let cases = facts["greedy"].as_array().unwrap();
    for case in cases {
        let expected = ids(&case["ids"]);
        let got = greedy(model, lora, &ids(&case["prompt"]), expected.len());
        assert_eq!(got, expected, "{folder}: {}", case["margins"]);
    }
    let prompt = ids(&cases[facts["logits_of"].as_u64().unwrap() as usize]["prompt"]);
    let got = logits(model, lora, &prompt);
    let file = Checkpoint::open_file(&golden(folder).join("expected.safetensors")).unwrap();
    let expected = file
        .tensor("logits", &[prompt.len(), 512])
        .unwrap()
        .to_vec();
    let error = relative(&got, &expected);
    assert!(error < 1e-5, "{folder}: logits differ by {error}");
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (got, expected) in got.iter().zip(&expected) {
        assert!(
            (got - expected).abs() < 1e-4 * largest,
            "{folder}: {got} for {expected}"
        );
    }
    got
}

#[test]
fn dense_equals_transformers() {
    check(&load("tiny-dense", Form::F32), None, "tiny-dense");
}

/// The checkpoint is bf16, so keeping it in bf16 loses nothing: the same bits as with f32.
#[test]
fn weights_in_bf16_give_the_same_bits_as_the_bf16_checkpoint_in_f32() {
    for name in ["tiny-dense", "tiny-moe"] {
        let prompt: Vec<u32> = (0..60).map(|i| i * 7 % 500).collect();
        let [f32, bf16] = [Form::F32, Form::Bf16].map(|form| {
            let model = load(name, form);
            logits_over(&mut exact_cache(&model, 8), &model, None, &prompt)
        });
        assert!(f32 == bf16, "{name}");
        let q8 = logits(&load(name, Form::Q8), None, &prompt);
        let error = relative(&q8, &f32);
        assert!(
            error > 1e-5 && error < 0.1,
            "{name}: 8 bits are off by {error}"
        );
    }
}

#[test]
fn mixture_of_experts_equals_transformers() {
    check(&load("tiny-moe", Form::F32), None, "tiny-moe");
}

#[test]
fn adapters_equal_peft_and_differ_from_the_base() {
    let model = load("tiny-dense", Form::F32);
    let base = check(&model, None, "tiny-dense");
    let mut digests = Vec::new();
    for name in ["lora-plain", "lora-rslora", "lora-patterns"] {
        let lora = Lora::load(&golden(name), model.config(), model.pool()).unwrap();
        let adapted = check(&model, Some(&lora), name);
        assert!(relative(&adapted, &base) > 0.01, "{name} changes nothing");
        digests.push(lora.digest());
    }
    digests.dedup();
    assert_eq!(digests.len(), 3);
}

/// Sequences of two adapters and of none in one batch, in chunks of several sizes, beside decoding: every sequence has
/// the bits that it has alone.
#[test]
fn a_mixed_batch_gives_each_sequence_its_own_bits() {
    for form in [Form::Bf16, Form::bf16()] {
        mixed_batch(form);
    }
}

/// Where inputs are rounded too, logits are as near to those of f32 as twice torch's own bf16.
#[test]
fn bf16_throughout_is_as_near_to_f32_as_torch_s() {
    let torch = json(&golden("bf16.json"));
    for name in ["tiny-dense", "tiny-moe"] {
        let facts = json(&golden(name).join("expected.json"));
        let case = &facts["greedy"][facts["logits_of"].as_u64().unwrap() as usize];
        let prompt = ids(&case["prompt"]);
        let [f32, bf16] = [Form::F32, Form::bf16()].map(|f| logits(&load(name, f), None, &prompt));
        let error = relative(&bf16, &f32);
        let allowed = 2.0 * torch[name]["relative"].as_f64().unwrap();
        assert!(
            error <= allowed,
            "{name}: off by {error}, {allowed} allowed"
        );
    }
}

fn mixed_batch(form: Form) {
    let model = load("tiny-dense", form);
    let lora = |name| Lora::load(&golden(name), model.config(), model.pool()).unwrap();
    let (plain, rslora) = (lora("lora-plain"), lora("lora-rslora"));
    let loras = [None, Some(&plain), Some(&plain), Some(&rslora), None];
    let prompts: Vec<Vec<u32>> = (0..5_u32)
        .map(|s| (0..20 + s * 3).map(|i| (i * 31 + s * 97) % 500).collect())
        .collect();
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .zip(loras)
        .map(|(prompt, lora)| logits(&model, lora, prompt))
        .collect();
    let mut cache = KvCache::new(model.kv_shape(20)).unwrap();
    let blocks: Vec<Vec<u32>> = (0..5).map(|s| vec![s, s + 5, s + 10, s + 15]).collect();
    let mut done = [0; 5];
    for sizes in [[1, 17, 5, 20, 3], [4, 1, 16, 1, 1], [15, 5, 5, 8, 28]] {
        let parts: Vec<Part<'_>> = (0..5)
            .map(|s| Part {
                ids: &prompts[s][done[s]..prompts[s].len().min(done[s] + sizes[s])],
                start: done[s],
                blocks: &blocks[s],
                lora: loras[s],
                want: Want::All,
            })
            .collect();
        let logits = model.forward(&mut cache, &parts).unwrap();
        let mut row = 0;
        for (s, part) in parts.iter().enumerate() {
            for position in part.start..part.start + part.ids.len() {
                assert!(
                    logits.row(row) == &alone[s][position * 512..][..512],
                    "{s} {position}"
                );
                row += 1;
            }
        }
        for s in 0..5 {
            done[s] += parts[s].ids.len();
        }
    }
    assert_eq!(done, [20, 23, 26, 29, 32]);
}

fn real_layer(name: &str) {
    let facts = json(&golden("layers.json"))[name].clone();
    let mut config = facts["config"].clone();
    let is_moe = config.get("num_experts").is_some();
    config["model_type"] = if is_moe {
        "qwen3_moe".into()
    } else {
        "qwen3".into()
    };
    let config = Config::parse(&config.to_string()).unwrap();
    let seeds = facts["seeds"].clone();
    let of = move |name: &str, shape: &[usize]| {
        let name = name.strip_prefix("model.layers.0.").unwrap_or(name);
        let count = shape.iter().product::<usize>() as u64;
        let (key, start) = match name.strip_prefix("mlp.experts.") {
            None => (name.to_owned(), 0),
            Some(rest) => {
                let (expert, rest) = rest.split_once('.').unwrap();
                let expert: u64 = expert.parse().unwrap();
                match rest {
                    "gate_proj.weight" => {
                        ("mlp.experts.gate_up_proj".to_owned(), expert * 2 * count)
                    }
                    "up_proj.weight" => (
                        "mlp.experts.gate_up_proj".to_owned(),
                        (expert * 2 + 1) * count,
                    ),
                    _ => ("mlp.experts.down_proj".to_owned(), expert * count),
                }
            }
        };
        let Some(seed) = seeds.get(&key) else {
            return Some(Draw {
                seed: 500,
                start: 0,
                scale: 0.1,
                offset: 0.0,
            });
        };
        Some(Draw {
            seed: seed["seed"].as_u64().unwrap(),
            start,
            scale: seed["scale"].as_f64().unwrap() as f32,
            offset: if key.contains("norm") { 1.0 } else { 0.0 },
        })
    };
    let pool = Arc::new(Pool::new(2));
    let hidden = config.hidden_size;
    let model = Model::from_source(config, &Seeded(of), Form::Bf16, pool).unwrap();
    let mut x = hashed(
        Draw {
            seed: 1000,
            start: 0,
            scale: 1.0,
            offset: 0.0,
        },
        6 * hidden,
    );
    let mut cache = exact_cache(&model, 1);
    let part = Part {
        ids: &[0; 6],
        start: 0,
        blocks: &[0],
        lora: None,
        want: Want::All,
    };
    model.run_layers(&mut cache, &[part], &mut x);
    for (token, row) in x.chunks(hidden).enumerate() {
        let number = |name: &str| facts[name][token].as_f64().unwrap();
        let norm = row
            .iter()
            .map(|x| f64::from(*x).powi(2))
            .sum::<f64>()
            .sqrt();
        let sum = row.iter().map(|x| f64::from(*x)).sum::<f64>();
        assert!(
            (norm / number("row_norms") - 1.0).abs() < 1e-5,
            "{name} {token}: {norm}"
        );
        assert!(
            (sum - number("row_sums")).abs() < 1e-4 * norm,
            "{name} {token}: {sum}"
        );
        let columns = facts["columns"].as_array().unwrap();
        for (at, column) in columns.iter().enumerate() {
            let expected = facts["output"][token][at].as_f64().unwrap();
            let got = f64::from(row[column.as_u64().unwrap() as usize]);
            assert!(
                (got - expected).abs() < 1e-4 * expected.abs().max(1.0),
                "{got} {expected}"
            );
        }
    }
}

#[test]
fn a_layer_of_the_shape_of_0_6b_equals_transformers() {
    real_layer("0.6b");
}

#[test]
fn a_layer_of_the_shape_of_4b_equals_transformers() {
    real_layer("4b");
}

#[test]
fn a_layer_of_the_shape_of_30b_a3b_equals_transformers() {
    real_layer("30b-a3b");
}

/// Copies a golden folder, changes it, and gives the error of loading it.
fn broken(name: &str, change: impl Fn(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    change(folder.path());
    let pool = Arc::new(Pool::new(1));
    let error: Box<dyn std::error::Error> = if name.starts_with("lora") {
        let base = load("tiny-dense", Form::F32);
        Box::new(
            Lora::load(folder.path(), base.config(), &pool)
                .err()
                .unwrap(),
        )
    } else {
        Box::new(Model::load(folder.path(), Form::F32, pool).err().unwrap())
    };
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text += &format!(": {inner}");
        source = inner.source();
    }
    text
}

fn set(file: &str, field: &'static str, value: Value) -> impl Fn(&Path) {
    let file = file.to_owned();
    move |folder| {
        let mut config = json(&folder.join(&file));
        config[field] = value.clone();
        std::fs::write(folder.join(&file), config.to_string()).unwrap();
    }
}

fn truncate(folder: &Path, file: &str) {
    let path = folder.join(file);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len - 100)
        .unwrap();
}

#[test]
fn broken_checkpoints_are_refused_with_the_reason() {
    let shard = "model-00003-of-00006.safetensors";
    let says = [
        (
            broken("tiny-moe", |folder| {
                std::fs::remove_file(folder.join(shard)).unwrap()
            }),
            shard,
        ),
        (
            broken("tiny-moe", |folder| truncate(folder, shard)),
            "truncated",
        ),
        (
            broken("tiny-dense", |folder| truncate(folder, "model.safetensors")),
            "truncated",
        ),
        (
            broken("tiny-dense", |f| {
                std::fs::write(f.join("model.safetensors"), b"").unwrap()
            }),
            "truncated",
        ),
        (
            broken("tiny-dense", |f| {
                std::fs::remove_file(f.join("model.safetensors")).unwrap()
            }),
            "neither model.safetensors",
        ),
        (
            broken(
                "tiny-dense",
                set("config.json", "intermediate_size", 168.into()),
            ),
            "model.layers.0.mlp.gate_proj.weight has shape [160, 64], the configuration says [168, 64]",
        ),
        (
            broken(
                "tiny-dense",
                set("config.json", "num_hidden_layers", 4.into()),
            ),
            "model.layers.3.input_layernorm.weight is missing",
        ),
        (
            broken(
                "tiny-dense",
                set("config.json", "tie_word_embeddings", false.into()),
            ),
            "lm_head.weight is missing",
        ),
        (
            broken("tiny-dense", |f| {
                std::fs::remove_file(f.join("config.json")).unwrap()
            }),
            "config.json",
        ),
    ];
    for (error, says) in says {
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn broken_adapters_are_refused_with_the_reason() {
    let config = "adapter_config.json";
    let says = [
        (
            broken(
                "lora-plain",
                set(config, "modules_to_save", serde_json::json!(["lm_head"])),
            ),
            "`modules_to_save`",
        ),
        (
            broken("lora-plain", set(config, "use_dora", true.into())),
            "`use_dora`",
        ),
        (
            broken("lora-plain", set(config, "peft_type", "IA3".into())),
            "`peft_type`",
        ),
        (
            broken("lora-plain", set(config, "lora_alpha", (-1).into())),
            "`lora_alpha`",
        ),
        (
            broken(
                "lora-plain",
                set(config, "rank_pattern", serde_json::json!({".*q_proj": 8})),
            ),
            "regular expressions",
        ),
        (
            broken(
                "lora-plain",
                set(config, "init_lora_weights", "pissa_niter_4".into()),
            ),
            "`init_lora_weights` must leave the base's weights",
        ),
        (
            broken("lora-plain", set(config, "r", 4.5.into())),
            "`r` must be a whole number from 1 to 1024, got 4.5",
        ),
        (
            broken("lora-plain", set(config, "lora_alpha", 1e39.into())),
            "`lora_alpha` must be a number above 0",
        ),
        (
            broken(
                "lora-plain",
                set(config, "rank_pattern", serde_json::json!({"q_proj": 65536})),
            ),
            "`rank_pattern.q_proj` must be a whole number",
        ),
        (
            broken("lora-plain", set(config, "r", 8.into())),
            "layers.0.self_attn.q_proj.lora_A.weight has shape [4, 64], the configuration says [8, 64]",
        ),
        (
            broken("lora-plain", |f| truncate(f, "adapter_model.safetensors")),
            "truncated",
        ),
        (
            broken("lora-plain", |f| {
                let path = f.join("adapter_model.safetensors");
                let mut bytes = std::fs::read(&path).unwrap();
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                std::fs::write(path, bytes).unwrap();
            }),
            "holds values that are not finite",
        ),
        (
            broken("lora-plain", |f| {
                let file = std::fs::File::create(f.join("adapter_model.safetensors"));
                file.unwrap().set_len((8 << 30) + 1).unwrap();
            }),
            "adapter_model.safetensors must have at most 8589934592 bytes",
        ),
    ];
    for (error, says) in says {
        assert!(error.contains(says), "{error}");
    }
    let pool = Pool::new(1);
    let mut moe = load("tiny-moe", Form::F32).config().clone();
    moe.intermediate_size = 160;
    let error = Lora::load(&golden("lora-plain"), &moe, &pool)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("layers.0.mlp.down_proj.lora_A"),
        "{error}"
    );
    let mut wider = load("tiny-dense", Form::F32).config().clone();
    wider.hidden_size = 128;
    let error = Lora::load(&golden("lora-plain"), &wider, &pool)
        .err()
        .unwrap();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        source.contains("q_proj.lora_A.weight has shape [4, 64]"),
        "{source}"
    );
}

/// Numbers and digest are of one read, whatever happens to the file: a pipe gives its bytes once.
#[test]
fn the_weights_of_an_adapter_are_read_once() {
    let base = load("tiny-dense", Form::F32);
    let pool = Pool::new(1);
    let (from, folder) = (golden("lora-plain"), tempfile::tempdir().unwrap());
    let file = |name: &str| folder.path().join(name);
    let config = "adapter_config.json";
    std::fs::copy(from.join(config), file(config)).unwrap();
    let weights = "adapter_model.safetensors";
    let made = std::process::Command::new("mkfifo")
        .arg(file(weights))
        .status();
    assert!(made.unwrap().success());
    let (bytes, pipe) = (std::fs::read(from.join(weights)).unwrap(), file(weights));
    std::thread::spawn(move || std::fs::write(pipe, bytes));
    let read = Lora::load(folder.path(), base.config(), &pool).unwrap();
    let expected = Lora::load(&from, base.config(), &pool).unwrap();
    assert_eq!(read.digest(), expected.digest());
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error() {
    let model = load("tiny-dense", Form::F32);
    let mut cache = KvCache::new(model.kv_shape(1)).unwrap();
    let part = Part {
        ids: &[3, 512],
        start: 0,
        blocks: &[0],
        lora: None,
        want: Want::Last,
    };
    let error = model.forward(&mut cache, &[part]).err().unwrap();
    assert_eq!(error.to_string(), "token id 512 must be below 512");
}
