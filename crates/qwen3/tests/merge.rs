//! A model and its adapter merged into one: the logits of both together, the numbers of another computation, the files of
//! the base.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_kernels::cpu::{KvCache, Pool};
use espalier_qwen3::{
    Checkpoint, Form, Lora, Merge, MergeError, Merged, Model, Part, TensorSource as _, Want,
};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn merge(base: &Path, adapter: &Path, to: &Path) -> Result<Merged, MergeError> {
    let merge = Merge {
        base,
        adapter,
        to,
        companions: &["expected.json", "no-such-file"],
    };
    merge.run(&Pool::new(2), &|_, _| ControlFlow::Continue(()))
}

fn logits(model: &Model, lora: Option<&Lora>) -> Vec<f32> {
    let ids: Vec<u32> = (0..40).map(|i| i * 31 % 500).collect();
    let mut cache = KvCache::new(model.kv_shape(8)).unwrap();
    let part = Part {
        ids: &ids,
        start: 0,
        blocks: &[5, 0, 7],
        lora,
        want: Want::All,
    };
    let logits = model.forward(&mut cache, &[part]).unwrap();
    (0..logits.rows())
        .flat_map(|row| logits.row(row).to_vec())
        .collect()
}

fn relative(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (error / expected.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

#[test]
fn the_merged_model_says_what_base_and_adapter_say() {
    let model = |folder: &Path| Model::load(folder, Form::F32, Arc::new(Pool::new(2))).unwrap();
    let base = model(&golden("tiny-dense"));
    let alone = logits(&base, None);
    for (name, adapted) in [
        ("lora-plain", 21),
        ("lora-rslora", 21),
        ("lora-patterns", 21),
    ] {
        let to = TempDir::new().unwrap();
        let merged = merge(&golden("tiny-dense"), &golden(name), to.path()).unwrap();
        assert!(
            merged.adapted <= adapted && merged.adapted > 0,
            "{merged:?}"
        );
        assert_eq!(
            merged.files,
            ["model.safetensors", "config.json", "expected.json"]
        );
        let lora = Lora::load(&golden(name), base.config(), base.pool()).unwrap();
        let together = logits(&base, Some(&lora));
        let got = logits(&model(to.path()), None);
        let (off, changed) = (relative(&got, &together), relative(&alone, &together));
        assert!(
            off < 0.01 && off < changed / 3.0,
            "{name}: off by {off}, changed by {changed}"
        );
    }
}

/// PEFT's own merge in f32, of which every eighth row of each matrix is kept: all but the sums that lie so near to the middle
/// of two numbers of bf16 that the order of a sum decides are the same, and those differ by one step.
#[test]
fn every_matrix_is_what_peft_merges() {
    const EVERY: usize = 8;
    for name in ["lora-plain", "lora-rslora", "lora-patterns"] {
        let to = TempDir::new().unwrap();
        merge(&golden("tiny-dense"), &golden(name), to.path()).unwrap();
        let merged = Checkpoint::open(to.path()).unwrap();
        let peft = golden(name).join("merged.safetensors");
        let peft = Checkpoint::open_file(&peft).unwrap();
        let (mut matrices, mut elements, mut off) = (0, 0, 0);
        for matrix in peft.names() {
            let numbers = |from: &Checkpoint| {
                let shape = from.shape(matrix).unwrap().to_vec();
                (from.tensor(matrix, &shape).unwrap().to_vec(), shape)
            };
            let ((expected, kept), (got, shape)) = (numbers(&peft), numbers(&merged));
            assert_eq!(
                (kept[0], kept[1]),
                (shape[0].div_ceil(EVERY), shape[1]),
                "{matrix}"
            );
            let rows = got.chunks(shape[1]).step_by(EVERY).flatten();
            for (got, expected) in rows.zip(&expected) {
                let step = expected.abs().log2().floor().exp2() / 128.0;
                assert!(
                    (got - expected).abs() <= step,
                    "{name}, {matrix}: {got} for {expected}"
                );
                off += usize::from(got != expected);
                elements += 1;
            }
            matrices += 1;
        }
        assert_eq!(matrices, 21, "{name}");
        assert!(off * 500 <= elements, "{name}: {off} of {elements} differ");
    }
}

/// Every matrix against sums in f64: the nearest bf16, but where the sum lies so near to the middle of two that the
/// rounding of f32 decides.
#[test]
fn every_matrix_is_the_sum_rounded_once() {
    let to = TempDir::new().unwrap();
    merge(&golden("tiny-dense"), &golden("lora-plain"), to.path()).unwrap();
    let [base, merged] = [golden("tiny-dense"), to.path().to_owned()]
        .map(|folder| Checkpoint::open(&folder).unwrap());
    let adapter = golden("lora-plain/adapter_model.safetensors");
    let adapter = Checkpoint::open_file(&adapter).unwrap();
    let settings = std::fs::read_to_string(golden("lora-plain/adapter_config.json")).unwrap();
    let settings: serde_json::Value = serde_json::from_str(&settings).unwrap();
    let scale = settings["lora_alpha"].as_f64().unwrap() / settings["r"].as_f64().unwrap();
    let numbers = |from: &Checkpoint, name: &str| {
        let shape = from.shape(name).unwrap().to_vec();
        (from.tensor(name, &shape).unwrap().to_vec(), shape)
    };
    let (mut matrices, mut elements, mut near) = (0, 0, 0);
    for name in base.names() {
        let ((w, shape), (got, _)) = (numbers(&base, name), numbers(&merged, name));
        let module = name.trim_end_matches(".weight");
        let factor = |which| format!("base_model.model.{module}.{which}.weight");
        if !adapter.has(&factor("lora_A")) {
            assert_eq!(w, got, "{name} is not adapted");
            continue;
        }
        matrices += 1;
        let ((a, _), (b, b_shape)) = (
            numbers(&adapter, &factor("lora_A")),
            numbers(&adapter, &factor("lora_B")),
        );
        let (inputs, rank) = (shape[1], b_shape[1]);
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / inputs, i % inputs);
            let sum: f64 = (0..rank)
                .map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * inputs + column]))
                .sum();
            let exact = f64::from(w[i]) + scale * sum;
            // A step of bf16 near it, and how far it is from the middle between two.
            let step = exact.abs().log2().floor().exp2() / 128.0;
            let middle = ((exact / step).fract().abs() - 0.5).abs();
            let nearest = (exact / step).round() * step;
            elements += 1;
            if f64::from(*got) != nearest {
                near += 1;
                assert!(middle < 1e-4, "{name}[{row}, {column}]: {got} for {exact}");
            }
        }
    }
    assert!(
        matrices > 0 && near * 2_000 <= elements,
        "{near} of {elements}"
    );
}

#[test]
fn experts_are_merged_one_by_one_and_the_rest_is_copied_byte_for_byte() {
    let (to, adapter) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (inputs, outputs) = (64, 48);
    write_adapter(
        adapter.path(),
        "model.layers.0.mlp.experts.3.up_proj",
        &[
            (vec![0.5; 2 * inputs], [2, inputs]),
            (vec![0.25; outputs * 2], [outputs, 2]),
        ],
    );
    let base = golden("tiny-moe");
    let merged = merge(&base, adapter.path(), to.path()).unwrap();
    assert_eq!(merged.adapted, 1);
    let read = |folder: &Path, file: &str| std::fs::read(folder.join(file)).unwrap();
    for file in &merged.files {
        let (before, after) = (read(&base, file), read(to.path(), file));
        assert_eq!(before.len(), after.len(), "{file}");
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        // At most one matrix of two bytes an element; one file has it.
        assert!(changed <= inputs * outputs * 2, "{file}");
    }
    let changed = |file: &&String| read(&base, file) != read(to.path(), file);
    assert_eq!(merged.files.iter().filter(changed).count(), 1);
    let name = "model.layers.0.mlp.experts.3.up_proj.weight";
    let tensor = |folder: &Path| {
        let checkpoint = Checkpoint::open(folder).unwrap();
        checkpoint
            .tensor(name, &[outputs, inputs])
            .unwrap()
            .to_vec()
    };
    // Scale 1 · rank 2 · 0.5 · 0.25.
    let expected: Vec<f32> = tensor(&base)
        .iter()
        .map(|w| bf16::from_f32(w + 0.25).to_f32())
        .collect();
    assert_eq!(tensor(to.path()), expected);
}

#[test]
fn a_base_in_f32_becomes_bf16() {
    let (base, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let source = Checkpoint::open(&golden("tiny-dense")).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .names()
        .map(|name| {
            let shape = source.shape(name).unwrap().to_vec();
            let values = source.tensor(name, &shape).unwrap().to_vec();
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name.to_owned(), shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let file = serialize(views, None).unwrap();
    std::fs::write(base.path().join("model.safetensors"), file).unwrap();
    let config = std::fs::read_to_string(golden("tiny-dense/config.json")).unwrap();
    let config = config.replace("\"bfloat16\"", "\"float32\"");
    std::fs::write(base.path().join("config.json"), config).unwrap();
    merge(base.path(), &golden("lora-plain"), to.path()).unwrap();
    let of_bf16 = TempDir::new().unwrap();
    merge(&golden("tiny-dense"), &golden("lora-plain"), of_bf16.path()).unwrap();
    let [got, expected] = [to.path(), of_bf16.path()].map(|at| Checkpoint::open(at).unwrap());
    for (name, shape, _) in &tensors {
        let numbers = |from: &Checkpoint| from.tensor(name, shape).unwrap().to_vec();
        assert_eq!(numbers(&got), numbers(&expected), "{name}");
    }
    let config = std::fs::read_to_string(to.path().join("config.json")).unwrap();
    assert!(config.contains("\"bfloat16\""), "{config}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let to = TempDir::new().unwrap();
    let refused = |base: &str, adapter: &Path| {
        let error = merge(&golden(base), adapter, to.path()).unwrap_err();
        assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0);
        let first: &dyn std::error::Error = &error;
        let chain = std::iter::successors(Some(first), |error| error.source());
        chain.map(|error| format!("{error}: ")).collect::<String>()
    };
    // Of a dense model, and the base is none.
    let error = refused("tiny-moe", &golden("lora-plain"));
    assert!(
        error.contains("adapts no projection") || error.contains("shape"),
        "{error}"
    );
    let adapter = TempDir::new().unwrap();
    let module = "model.layers.0.self_attn.q_proj";
    let factors = |a: f32| [(vec![a; 2 * 64], [2, 64]), (vec![0.25; 128 * 2], [128, 2])];
    write_adapter(adapter.path(), module, &factors(f32::NAN));
    let error = refused("tiny-dense", adapter.path());
    assert!(
        error.contains(module) && error.contains("not finite"),
        "{error}"
    );
    write_adapter(
        adapter.path(),
        "model.layers.9.self_attn.q_proj",
        &factors(1.0),
    );
    let error = refused("tiny-dense", adapter.path());
    assert!(error.contains("layers.9"), "{error}");
}

#[test]
fn whoever_watches_can_stop_it() {
    let to = TempDir::new().unwrap();
    let merge = Merge {
        base: &golden("tiny-dense"),
        adapter: &golden("lora-plain"),
        to: to.path(),
        companions: &[],
    };
    let stopped = merge.run(&Pool::new(1), &|done, total| {
        assert!(done <= total);
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(MergeError::Stopped)));
}

/// An adapter of one module, of scale 1.
fn write_adapter(folder: &Path, module: &str, factors: &[(Vec<f32>, [usize; 2]); 2]) {
    let bytes = factors.each_ref().map(|(values, _)| {
        values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>()
    });
    let names =
        ["lora_A", "lora_B"].map(|which| format!("base_model.model.{module}.{which}.weight"));
    let views = names
        .iter()
        .zip(factors)
        .zip(&bytes)
        .map(|((name, (_, shape)), bytes)| {
            (
                name,
                TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
            )
        });
    let file = serialize(views, None).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
    let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":2,"target_modules":["up_proj"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
}
