//! Training: what a client may say of it, the workshop's values for what it leaves out, and the rule of each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::check::Faults;
use super::curate::each;
use crate::error::FieldError;
use crate::id::{AdapterName, BatchId, DatasetName};
use crate::layout::UploadName;

/// Longest name of a base model or of its revision, in bytes.
pub(super) const BASE_BYTES_MAX: usize = 1024;
/// Most batches that a training is held against: of their rollouts a few are looked at.
const AGREEMENT_MAX: usize = 8;

/// See [`TrainSpec`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `TrainSpec`")]
pub struct TrainDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_rows: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub agreement: Vec<String>,
    #[serde(skip_serializing_if = "TrainSettingsDraft::is_empty")]
    pub settings: TrainSettingsDraft,
}

/// See [`TrainSettings`]; what is absent takes the workshop's value. The form of `lora.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `TrainSettings`")]
pub struct TrainSettingsDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulation: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_checkpoints: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_budget_mib: Option<i64>,
}

/// A model that is to be trained, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSpec {
    /// The model to begin with: `owner/name` of the hub, `s3://bucket/prefix`, or a folder where the worker allows it.
    pub base: String,
    /// Branch, tag or commit of the hub's repository.
    pub revision: Option<String>,
    /// What it learns from.
    pub data: TrainData,
    /// The name under which the result is published.
    pub adapter: AdapterName,
    /// Batches of rollouts by the base model itself, against whose log-probabilities those that training computes are
    /// held before the first step.
    pub agreement: Vec<BatchId>,
    /// How.
    pub settings: TrainSettings,
}

/// What is learned from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrainData {
    /// A version of a data set, with its own held-out part.
    Dataset(DatasetRef),
    /// Token rows among the project's uploads, one JSON object a line.
    Rows {
        /// Those that it is trained on.
        train: UploadName,
        /// Those that it is only measured on.
        eval: Option<UploadName>,
    },
}

/// A version of a data set, written `name@v3`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatasetRef {
    /// The data set.
    pub name: DatasetName,
    /// Its version, from 1.
    pub version: u32,
}

impl FromStr for DatasetRef {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let refuse = || FieldError::new("dataset", text, "must be NAME@vN, such as shop@v1");
        let (name, version) = text.split_once("@v").ok_or_else(refuse)?;
        let is_plain = version.bytes().all(|b| b.is_ascii_digit()) && !version.starts_with('0');
        let version = version.parse().ok().filter(|_| is_plain);
        Ok(Self {
            name: name.parse().map_err(|_| refuse())?,
            version: version.ok_or_else(refuse)?,
        })
    }
}

impl TryFrom<String> for DatasetRef {
    type Error = FieldError;

    fn try_from(text: String) -> Result<Self, FieldError> {
        text.parse()
    }
}

impl From<DatasetRef> for String {
    fn from(reference: DatasetRef) -> Self {
        reference.to_string()
    }
}

impl fmt::Display for DatasetRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@v{}", self.name, self.version)
    }
}

/// How a model is trained. Without a word from the user these are the workshop's values.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSettings {
    /// Which weights change.
    pub method: TrainMethod,
    /// Longest sample, in tokens; a longer one is cut at its last whole turn, or else refused. Default 32,768.
    pub max_length: usize,
    /// Samples of a micro-batch. Default 1.
    pub batch: usize,
    /// Micro-batches of an optimizer step. Default 4.
    pub accumulation: usize,
    /// Whether a micro-batch takes as many samples, in their order, as fit into `batch × max_length` tokens, in place of
    /// `batch` of them. Samples never see each other either way. Default false.
    pub packing: bool,
    /// Where it ends. Default one epoch.
    pub length: TrainLength,
    /// Learning rate after warm-up. Default 2e-4.
    pub lr: f64,
    /// How it goes on from there. Default constant.
    pub schedule: Schedule,
    /// Steps over which the learning rate grows from 0. Default 5.
    pub warmup_steps: u64,
    /// Decoupled weight decay. Default 0.01.
    pub weight_decay: f64,
    /// Longest gradient, as a norm over everything that is trained; none: any length. Default 1.
    pub clip_norm: Option<f64>,
    /// The optimizer. Default AdamW with moments of 8 bits.
    pub optimizer: Optimizer,
    /// Decay of the first moment. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999.
    pub beta2: f64,
    /// What is added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Of the order of samples and of the weights that training adds. Default 3407.
    pub seed: u64,
    /// Steps between two measurements on held-out samples; 0: at the end only. Default 50.
    pub eval_every: u64,
    /// Steps between two checkpoints. Default 50.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept, beside the best one. Default 3.
    pub keep_checkpoints: usize,
    /// Memory that training may take, in bytes; none: what is free.
    pub memory_budget_bytes: Option<u64>,
}

/// Which weights change.
#[derive(Clone, Debug, PartialEq)]
pub enum TrainMethod {
    /// Low-rank matrices beside frozen weights.
    Lora {
        /// Columns of the one and rows of the other. Default 32.
        rank: usize,
        /// Numerator of the scale. Default 16.
        alpha: f64,
        /// Whether the scale is `alpha / √rank`, and not `alpha / rank`. Default true.
        rslora: bool,
        /// The layers that get them; empty: all seven of a dense model, those of attention of one with experts.
        targets: Vec<LoraTarget>,
    },
    /// All of them.
    Full,
}

/// A linear layer of a block, by its name in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum LoraTarget {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl LoraTarget {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The name in checkpoints.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }
}

/// Where training ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainLength {
    /// After so many passes over all samples.
    Epochs(u32),
    /// After so many optimizer steps.
    Steps(u64),
}

/// How the learning rate goes on after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// It stays.
    Constant,
    /// It falls to 0 along a line.
    Linear,
    /// It falls to 0 along half a wave of the cosine.
    Cosine,
}

/// What makes a step of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimizer {
    /// AdamW whose moments are 32-bit floats.
    AdamW,
    /// AdamW whose moments have 8 bits and a scale a block.
    AdamW8Bit,
}

impl TrainSettingsDraft {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads a settings file, such as `lora.toml`; what it does not know is refused.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn parse_toml(text: &str) -> Result<Self, FieldError> {
        super::draft::from_toml(text)
    }

    /// The same, with what `over` says in place of what this says.
    pub fn overridden(self, over: Self) -> Self {
        let targets = match over.targets.is_empty() {
            true => self.targets,
            false => over.targets,
        };
        // Who counts steps does not count epochs, and the other way round.
        let (epochs, max_steps) = match (over.epochs, over.max_steps) {
            (None, None) => (self.epochs, self.max_steps),
            given => given,
        };
        Self {
            method: over.method.or(self.method),
            rank: over.rank.or(self.rank),
            alpha: over.alpha.or(self.alpha),
            rslora: over.rslora.or(self.rslora),
            targets,
            max_length: over.max_length.or(self.max_length),
            batch: over.batch.or(self.batch),
            accumulation: over.accumulation.or(self.accumulation),
            packing: over.packing.or(self.packing),
            epochs,
            max_steps,
            lr: over.lr.or(self.lr),
            schedule: over.schedule.or(self.schedule),
            warmup_steps: over.warmup_steps.or(self.warmup_steps),
            weight_decay: over.weight_decay.or(self.weight_decay),
            clip_norm: over.clip_norm.or(self.clip_norm),
            optimizer: over.optimizer.or(self.optimizer),
            beta1: over.beta1.or(self.beta1),
            beta2: over.beta2.or(self.beta2),
            eps: over.eps.or(self.eps),
            seed: over.seed.or(self.seed),
            eval_every: over.eval_every.or(self.eval_every),
            checkpoint_every: over.checkpoint_every.or(self.checkpoint_every),
            keep_checkpoints: over.keep_checkpoints.or(self.keep_checkpoints),
            memory_budget_mib: over.memory_budget_mib.or(self.memory_budget_mib),
        }
    }

    /// The settings, or every rule that the draft breaks.
    ///
    /// # Errors
    /// Each fault by field, value and rule.
    pub fn check(&self) -> Result<TrainSettings, Vec<FieldError>> {
        let mut faults = Faults::default();
        let settings = check_settings(&mut faults, self);
        faults.or(settings)
    }
}

impl TrainDraft {
    /// The job, or every rule that the draft breaks.
    pub(super) fn check(&self) -> Result<TrainSpec, Vec<FieldError>> {
        let mut faults = Faults::default();
        let base = self.base.clone().unwrap_or_default();
        check_source(&mut faults, "base", Some(&base));
        check_source(&mut faults, "revision", self.revision.as_deref());
        let data = self.check_data(&mut faults);
        let adapter = AdapterName::new(self.adapter.as_deref().unwrap_or_default());
        let adapter = faults.keep("adapter", adapter);
        let (batches, most) = (&self.agreement, AGREEMENT_MAX);
        let agreement = each(&mut faults, "agreement", batches, most, str::parse);
        let settings = faults.take("settings", self.settings.check());
        let spec = data.zip(adapter).zip(settings);
        let spec = spec.map(|((data, adapter), settings)| TrainSpec {
            base,
            revision: self.revision.clone(),
            data,
            adapter,
            agreement,
            settings,
        });
        match spec {
            Some(spec) => faults.or(spec),
            None => Err(faults.0),
        }
    }

    fn check_data(&self, faults: &mut Faults) -> Option<TrainData> {
        match (&self.dataset, &self.rows) {
            (Some(dataset), None) => {
                if let Some(eval) = &self.eval_rows {
                    let rule = "must be absent where `dataset` is given, which has its own";
                    faults.add("eval_rows", eval, rule);
                }
                let dataset = faults.keep("dataset", dataset.parse());
                dataset.map(TrainData::Dataset)
            }
            (None, Some(rows)) => {
                let train = faults.keep("rows", UploadName::new(rows));
                let eval = self.eval_rows.as_deref().map(UploadName::new);
                let eval = eval.map(|eval| faults.keep("eval_rows", eval));
                train.map(|train| TrainData::Rows {
                    train,
                    eval: eval.flatten(),
                })
            }
            (Some(dataset), Some(_)) => {
                faults.add("dataset", dataset, "must be absent where `rows` is given");
                None
            }
            (None, None) => {
                faults.add("dataset", "", "must be NAME@vN, or `rows` an upload");
                None
            }
        }
    }
}

/// Names of models and of their revisions: printable, and not empty.
fn check_source(faults: &mut Faults, field: &str, value: Option<&str>) {
    let Some(value) = value else { return };
    if value.trim().is_empty() || value.len() > BASE_BYTES_MAX || value.contains(char::is_control) {
        let rule = format!("must be 1 to {BASE_BYTES_MAX} bytes of printable text");
        faults.add(field, value, rule);
    }
}

fn check_settings(faults: &mut Faults, draft: &TrainSettingsDraft) -> TrainSettings {
    let share = |v| (0.0..1.0).contains(&v);
    let decay = "must be in [0, 1)";
    let clip_norm = faults.float(
        "clip_norm",
        draft.clip_norm,
        1.0,
        "must be in [0, 1e6]",
        |v| (0.0..=1e6).contains(&v),
    );
    let mib: Option<i64> = draft.memory_budget_mib;
    let mib = mib.map(|mib| faults.number("memory_budget_mib", Some(mib), 1..=1 << 24, 0));
    TrainSettings {
        method: check_method(faults, draft),
        max_length: faults.number("max_length", draft.max_length, 2..=1 << 20, 32_768),
        batch: faults.number("batch", draft.batch, 1..=4096, 1),
        accumulation: faults.number("accumulation", draft.accumulation, 1..=4096, 4),
        packing: draft.packing.unwrap_or(false),
        length: check_length(faults, draft),
        lr: faults.float("lr", draft.lr, 2e-4, "must be in (0, 1]", |v| {
            v > 0.0 && v <= 1.0
        }),
        schedule: check_schedule(faults, draft.schedule.as_deref()),
        warmup_steps: faults.number("warmup_steps", draft.warmup_steps, 0..=1_000_000, 5),
        weight_decay: faults.float(
            "weight_decay",
            draft.weight_decay,
            0.01,
            "must be in [0, 1]",
            |v| (0.0..=1.0).contains(&v),
        ),
        clip_norm: Some(clip_norm).filter(|norm| *norm > 0.0),
        optimizer: check_optimizer(faults, draft.optimizer.as_deref()),
        beta1: faults.float("beta1", draft.beta1, 0.9, decay, share),
        beta2: faults.float("beta2", draft.beta2, 0.999, decay, share),
        eps: faults.float("eps", draft.eps, 1e-8, "must be in (0, 1e-2]", |v| {
            v > 0.0 && v <= 1e-2
        }),
        seed: faults.number("seed", draft.seed, 0..=i64::MAX, 3407),
        eval_every: faults.number("eval_every", draft.eval_every, 0..=1_000_000, 50),
        checkpoint_every: faults.number(
            "checkpoint_every",
            draft.checkpoint_every,
            1..=1_000_000,
            50,
        ),
        keep_checkpoints: faults.number("keep_checkpoints", draft.keep_checkpoints, 1..=100, 3),
        memory_budget_bytes: mib.map(|mib: u64| mib << 20),
    }
}

fn check_method(faults: &mut Faults, draft: &TrainSettingsDraft) -> TrainMethod {
    match draft.method.as_deref() {
        None | Some("lora") => TrainMethod::Lora {
            rank: faults.number("rank", draft.rank, 1..=1024, 32),
            alpha: faults.float("alpha", draft.alpha, 16.0, "must be in (0, 1e5]", |v| {
                v > 0.0 && v <= 1e5
            }),
            rslora: draft.rslora.unwrap_or(true),
            targets: check_targets(faults, &draft.targets),
        },
        Some("full") => {
            let rule = "must be absent where `method` is `full`";
            let given = [
                ("rank", draft.rank.map(|v| v.to_string())),
                ("alpha", draft.alpha.map(|v| v.to_string())),
                ("rslora", draft.rslora.map(|v| v.to_string())),
                ("targets", draft.targets.first().cloned()),
            ];
            for (field, value) in given {
                if let Some(value) = value {
                    faults.add(field, value, rule);
                }
            }
            TrainMethod::Full
        }
        Some(other) => {
            faults.add("method", other, "must be `lora` or `full`");
            TrainMethod::Full
        }
    }
}

fn check_targets(faults: &mut Faults, names: &[String]) -> Vec<LoraTarget> {
    let mut targets = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let field = format!("targets[{i}]");
        let known = LoraTarget::ALL.into_iter().find(|t| t.as_str() == name);
        match known {
            None => faults.add(
                &field,
                name,
                "must be one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
            ),
            Some(target) if targets.contains(&target) => {
                faults.add(&field, name, "must be named once");
            }
            Some(target) => targets.push(target),
        }
    }
    targets.sort_unstable();
    targets
}

fn check_length(faults: &mut Faults, draft: &TrainSettingsDraft) -> TrainLength {
    match (draft.epochs, draft.max_steps) {
        (Some(epochs), Some(_)) => {
            faults.add(
                "epochs",
                epochs,
                "must be absent where `max_steps` is given",
            );
            TrainLength::Epochs(1)
        }
        (None, Some(steps)) => {
            TrainLength::Steps(faults.number("max_steps", Some(steps), 1..=1_000_000, 1))
        }
        (epochs, None) => TrainLength::Epochs(faults.number("epochs", epochs, 1..=1_000, 1)),
    }
}

fn check_schedule(faults: &mut Faults, name: Option<&str>) -> Schedule {
    match name {
        None | Some("constant") => Schedule::Constant,
        Some("linear") => Schedule::Linear,
        Some("cosine") => Schedule::Cosine,
        Some(other) => {
            faults.add(
                "schedule",
                other,
                "must be `constant`, `linear` or `cosine`",
            );
            Schedule::Constant
        }
    }
}

fn check_optimizer(faults: &mut Faults, name: Option<&str>) -> Optimizer {
    match name {
        None | Some("adamw_8bit") => Optimizer::AdamW8Bit,
        Some("adamw") => Optimizer::AdamW,
        Some(other) => {
            faults.add("optimizer", other, "must be `adamw` or `adamw_8bit`");
            Optimizer::AdamW
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse_line;
    use super::*;

    const JOB: &str =
        r#"{"train":{"base":"Qwen/Qwen3-0.6B","dataset":"shop@v1","adapter":"shop"}}"#;

    fn faults(line: &str) -> Vec<String> {
        let errors = parse_line(line.as_bytes()).unwrap().check().unwrap_err();
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_defaults_are_the_workshops() {
        let job = parse_line(JOB.as_bytes()).unwrap().check().unwrap();
        assert_eq!(job.max_runtime.as_secs(), 7 * 86_400);
        let train = job.train().unwrap();
        let dataset = DatasetRef {
            name: "shop".parse().unwrap(),
            version: 1,
        };
        assert_eq!(train.data, TrainData::Dataset(dataset));
        let settings = &train.settings;
        let lora = TrainMethod::Lora {
            rank: 32,
            alpha: 16.0,
            rslora: true,
            targets: Vec::new(),
        };
        assert_eq!(settings.method, lora);
        assert_eq!(
            (settings.max_length, settings.batch, settings.accumulation),
            (32_768, 1, 4)
        );
        assert_eq!(
            (settings.length, settings.schedule, settings.optimizer),
            (
                TrainLength::Epochs(1),
                Schedule::Constant,
                Optimizer::AdamW8Bit
            )
        );
        assert_eq!(
            (
                settings.lr,
                settings.weight_decay,
                settings.clip_norm,
                settings.seed
            ),
            (2e-4, 0.01, Some(1.0), 3407)
        );
    }

    #[test]
    fn every_fault_is_named_under_the_job() {
        let line = r#"{"train":{"base":" ","dataset":"shop@v0","eval_rows":"x","settings":{"method":"lora","rank":0,
            "alpha":0,"targets":["q_proj","lm_head","q_proj"],"max_length":1,"epochs":1,"max_steps":5,"lr":2,
            "schedule":"step","optimizer":"sgd","beta2":1,"memory_budget_mib":0}}}"#;
        let found = faults(line);
        let fields: Vec<&str> = found.iter().map(|f| f.split('`').nth(1).unwrap()).collect();
        let settings = [
            "memory_budget_mib",
            "rank",
            "alpha",
            "targets[1]",
            "targets[2]",
            "max_length",
            "epochs",
            "lr",
            "schedule",
            "optimizer",
            "beta2",
        ];
        let expected: Vec<String> = ["base", "eval_rows", "dataset", "adapter"]
            .iter()
            .map(|field| format!("train.{field}"))
            .chain(settings.iter().map(|f| format!("train.settings.{f}")))
            .collect();
        assert_eq!(fields, expected, "{found:#?}");
        assert!(found.contains(&"`train.settings.rank` must be in 1..=1024, got `0`".to_owned()));
    }

    #[test]
    fn batches_of_the_base_model_are_few_and_named_once() {
        let with =
            |batches: &str| JOB.replacen("}}", &format!(r#","agreement":[{batches}]}}}}"#), 1);
        let job = parse_line(with(r#""a","b""#).as_bytes()).unwrap();
        let named = &job.check().unwrap().train().unwrap().agreement.clone();
        assert_eq!(named, &["a", "b"].map(|name| name.parse().unwrap()));
        let found = faults(&with(r#""a","/","a""#));
        assert!(
            found[0].starts_with("`train.agreement[1]` must be"),
            "{found:?}"
        );
        assert_eq!(found[1], "`train.agreement[2]` must be named once, got `a`");
        let many: Vec<String> = (0..9).map(|n| format!("\"b{n}\"")).collect();
        let found = faults(&with(&many.join(",")));
        assert_eq!(
            found,
            ["`train.agreement` must have at most 8 items, got `9`"]
        );
    }

    #[test]
    fn nothing_else_stands_beside_training() {
        for (more, field) in [
            (r#""prompt":"x","#, "prompt"),
            (r#""generate":{"requests":"x"},"#, "generate"),
        ] {
            let found = faults(&JOB.replacen('{', &format!("{{{more}"), 1));
            let rule = format!("`{field}` must be absent where `train` is given");
            assert!(found[0].starts_with(&rule), "{found:?}");
        }
    }

    #[test]
    fn all_weights_have_no_rank() {
        let draft = TrainSettingsDraft::parse_toml("method = \"full\"\nrank = 8\n").unwrap();
        let errors = draft.check().unwrap_err();
        assert_eq!((errors.len(), errors[0].field.as_str()), (1, "rank"));
        let draft = TrainSettingsDraft::parse_toml("method = \"full\"\nclip_norm = 0").unwrap();
        let settings = draft.check().unwrap();
        assert_eq!(
            (settings.method, settings.clip_norm),
            (TrainMethod::Full, None)
        );
    }

    #[test]
    fn a_settings_file_has_no_unknown_keys_and_options_come_on_top() {
        let error = TrainSettingsDraft::parse_toml("rnak = 8").unwrap_err();
        assert_eq!((error.field.as_str(), error.value.as_str()), ("rnak", "8"));
        assert!(error.rule.contains("unknown field"), "{error}");
        let file = TrainSettingsDraft::parse_toml("rank = 8\nepochs = 2\nlr = 1e-3").unwrap();
        let over = TrainSettingsDraft {
            max_steps: Some(7),
            lr: Some(0.5),
            ..TrainSettingsDraft::default()
        };
        let settings = file.overridden(over).check().unwrap();
        assert_eq!((settings.length, settings.lr), (TrainLength::Steps(7), 0.5));
    }

    #[test]
    fn a_version_of_a_data_set_reads_back() {
        let read: DatasetRef = "shop@v12".parse().unwrap();
        assert_eq!(read.to_string(), "shop@v12");
        for bad in [
            "shop",
            "shop@12",
            "shop@v",
            "shop@v01",
            "shop@v-1",
            "@v1",
            "a/b@v1",
            "shop@v99999999999",
        ] {
            assert!(bad.parse::<DatasetRef>().is_err(), "{bad}");
        }
    }
}
