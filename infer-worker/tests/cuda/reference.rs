//! What is right: the model in f32 on the CPU, and the tolerances.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_kernels::cpu::{Form, KvCache, Pool};
use espalier_qwen3::{Checkpoint, Config, Lora, Model, Part, TensorSource, Want};
use serde_json::Value;

use crate::serve::Answer;

/// How far bf16 may be from f32.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Root of the mean square of the errors of log-probabilities.
    pub logprobs: f64,
    /// A most likely id that is ahead by more than this is the one that must be drawn.
    pub margin: f32,
}

impl Tolerance {
    /// From torch's own bf16 on a GPU against the same f32, as `bf16.json` has it: twice its error, and for two ids that
    /// are each off by its largest.
    pub fn of(model: &str) -> Self {
        Self {
            logprobs: 2.0 * torch_bf16(model, "rms"),
            margin: 2.0 * torch_bf16(model, "largest") as f32,
        }
    }
}

/// What `bf16.py` measured.
pub fn torch_bf16(model: &str, what: &str) -> f64 {
    let measured = json(&golden("bf16.json"));
    measured[model][what].as_f64().unwrap()
}

/// The folder of golden files, also where the test was built elsewhere and runs at the root of a copy of the tree.
pub fn golden(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = |root: &Path| root.join("crates/qwen3/tests/golden").join(name);
    if folder(built).exists() {
        folder(built)
    } else {
        folder(Path::new("."))
    }
}

pub struct Reference {
    pub model: Model,
}

pub fn config(folder: &str) -> Config {
    Config::parse(&std::fs::read_to_string(golden(folder).join("config.json")).unwrap()).unwrap()
}

pub fn checkpoint(folder: &str) -> Checkpoint {
    Checkpoint::open(&golden(folder)).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

fn facts(folder: &str) -> Value {
    json(&golden(folder).join("expected.json"))
}

fn json(file: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

/// Which of the cases the golden logits are of.
pub fn logits_of(folder: &str) -> usize {
    facts(folder)["logits_of"].as_u64().unwrap() as usize
}

/// transformers' logits in f32 of every position of that prompt: `[positions, vocabulary]`.
pub fn golden_logits(folder: &str) -> Vec<f32> {
    let file = Checkpoint::open_file(&golden(folder).join("expected.safetensors")).unwrap();
    let shape = file.shape("logits").unwrap().to_vec();
    file.tensor("logits", &shape).unwrap().to_vec()
}

/// Logits as log-probabilities.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    logits.iter().map(|x| x - most - sum.ln() as f32).collect()
}

/// Prompts and the greedy answers that transformers or PEFT gives in f32.
pub fn cases(folder: &str) -> Vec<(Vec<u32>, Vec<u32>)> {
    let facts = facts(folder);
    let cases = facts["greedy"].as_array().unwrap().iter();
    cases
        .map(|case| (ids(&case["prompt"]), ids(&case["ids"])))
        .collect()
}

/// How far answers are from f32.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    squares: f64,
    count: usize,
    /// Ids that were drawn, and those of them that are not the most likely in f32.
    pub drawn: usize,
    pub others: usize,
}

impl Distance {
    /// Root of the mean square of the errors of log-probabilities.
    pub fn error(&self) -> f64 {
        (self.squares / self.count.max(1) as f64).sqrt()
    }
}

impl Reference {
    pub fn new(config: Config, source: &dyn TensorSource) -> Self {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let pool = Arc::new(Pool::new(threads.min(16)));
        let model = Model::from_source(config, source, Form::F32, pool).unwrap();
        Self { model }
    }

    pub fn of(folder: &str) -> Self {
        Self::new(config(folder), &checkpoint(folder))
    }

    pub fn lora(&self, folder: &str) -> Lora {
        Lora::load(&golden(folder), self.model.config(), self.model.pool()).unwrap()
    }

    /// Log-probabilities of what follows each position of an answer, the answer given.
    fn logprobs(&self, lora: Option<&Lora>, prompt: &[u32], answer: &[u32]) -> Vec<Vec<f32>> {
        let ids = [prompt, &answer[..answer.len() - 1]].concat();
        let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
        let mut cache = KvCache::new(self.model.kv_shape(blocks.len())).unwrap();
        let part = Part {
            ids: &ids,
            start: 0,
            blocks: &blocks,
            lora,
            want: Want::All,
        };
        let logits = self.model.forward(&mut cache, &[part]).unwrap();
        let rows = prompt.len() - 1..logits.rows();
        rows.map(|row| log_softmax(logits.row(row))).collect()
    }

    /// Whether a greedy answer is right: every id the most likely in f32 after those before it, or behind it by no more
    /// than the margin; log-probabilities within the tolerance.
    pub fn check(
        &self,
        what: &str,
        lora: Option<&Lora>,
        prompt: &[u32],
        answer: &Answer,
        tolerance: &Tolerance,
        distance: &mut Distance,
    ) {
        let exact = self.logprobs(lora, prompt, &answer.ids);
        assert_eq!(exact.len(), answer.ids.len(), "{what}");
        for (position, (exact, id)) in exact.iter().zip(&answer.ids).enumerate() {
            let most = exact.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let behind = most - exact[*id as usize];
            assert!(
                behind <= tolerance.margin,
                "{what}: id {id} at {position} is behind the most likely by {behind}, {} allowed",
                tolerance.margin
            );
            distance.drawn += 1;
            distance.others += usize::from(behind > 0.0);
            let own = (*id, answer.logprobs[position]);
            for (id, logprob) in answer.top[position].iter().chain([&own]) {
                let error = f64::from(logprob - exact[*id as usize]);
                assert!(error.is_finite(), "{what}: {logprob} of {id}");
                distance.squares += error * error;
                distance.count += 1;
            }
        }
    }

    /// Whether two greedy answers to one prompt agree: they may part only where f32 has two ids within the margin.
    pub fn agree(
        &self,
        what: &str,
        lora: Option<&Lora>,
        prompt: &[u32],
        [one, other]: [&Answer; 2],
        tolerance: &Tolerance,
    ) -> bool {
        assert_eq!(one.ids.len(), other.ids.len(), "{what}");
        let parted = one.ids.iter().zip(&other.ids).position(|(a, b)| a != b);
        let Some(at) = parted else { return true };
        let exact = self.logprobs(lora, prompt, &one.ids[..=at]).pop().unwrap();
        let apart = exact[one.ids[at] as usize] - exact[other.ids[at] as usize];
        assert!(
            apart.abs() <= tolerance.margin,
            "{what}: {} and {} at {at} are {apart} apart in f32",
            one.ids[at],
            other.ids[at]
        );
        false
    }
}
