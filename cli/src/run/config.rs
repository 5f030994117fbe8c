//! `improve.toml`: what a pipeline is to do, read whole, with every mistake named. Pure.

use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_core::compare::Prices;
use espalier_core::error::FieldError;
use espalier_core::id::PipelineName;
use espalier_core::pipeline::PIPELINE_NAME_BYTES_MAX;
use espalier_core::spec::{CurateDraft, JobDraft, SamplingDraft, TrainSettingsDraft};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::read::{Faults, Section, section};
use crate::submit::vars::{self, Vars};

/// Most rounds.
const ROUNDS_MAX: u32 = 20;
/// Most samples of a task.
const SAMPLES_MAX: u32 = 100;
/// Samples of a probe, where it is asked for without a word.
const PROBE_SAMPLES: u32 = 4;
/// Samples of the rollouts to train on.
const ROLLOUT_SAMPLES: u32 = 4;
/// The share of a step's rollouts that must come to an end.
const MIN_SHARE: f64 = 0.9;
/// How long a version may take to be served, in seconds.
const SERVE_S: u32 = 1_800;
/// The longest that may be asked for, in seconds: a week.
const SERVE_S_MAX: u32 = 7 * 86_400;
/// The traces that are learned from without a word.
pub const WHERE: &str = "solved";

/// What is to be done. Of what breaks a rule the default stands here.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Of the pipeline, its adapter and its data set.
    pub name: PipelineName,
    /// What is trained.
    pub base: String,
    /// Branch, tag or commit of the hub's repository.
    pub revision: Option<String>,
    /// What endpoints call it.
    pub model: String,
    /// How often it goes round.
    pub rounds: u32,
    /// The tasks.
    pub tasks: Tasks,
    /// Samples of each training task in a probe; none: there is no probe.
    pub probe: Option<u32>,
    /// The rollouts to train on.
    pub rollouts: Rollouts,
    /// How they become a data set.
    pub dataset: CurateDraft,
    /// How that becomes an adapter.
    pub train: TrainSettingsDraft,
    /// How long a version may take to be served.
    pub serve_deadline: Duration,
    /// How the models are compared.
    pub evaluate: Evaluate,
    /// What is asked of the comparison.
    pub gate: Gate,
    /// What becomes of a version whose gate passes.
    pub publish: Publish,
}

/// What becomes of a version whose gate passes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Publish {
    /// Whether it becomes `latest`.
    pub enabled: bool,
    /// The share of conversations that it has first, beside the version that is `latest`; none: all.
    pub canary: Option<f64>,
}

/// Where tasks are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tasks {
    /// Those of split `train` are trained on.
    pub train: PathBuf,
    /// Those of split `eval` are measured on.
    pub eval: PathBuf,
    /// What they have in common; a task's own fields win.
    pub defaults: JobDraft,
    /// What `${name}` stands for in them.
    pub vars: Vars,
}

/// How training tasks are tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollouts {
    /// How often each.
    pub samples: u32,
    /// Whether hints stay in.
    pub hints: bool,
    /// Over the tasks' own.
    pub sampling: SamplingDraft,
    /// Of the seeds of tasks that bring none, here and in the probe.
    pub seed: u32,
    /// The share of the rollouts of any step that must come to an end, solved or not.
    pub min_share: f64,
}

/// How held-out tasks are tried, and what a report says of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluate {
    /// How often each.
    pub samples: u32,
    /// Over the tasks' own.
    pub sampling: SamplingDraft,
    /// Of the seeds of tasks that bring none.
    pub seed: u32,
    /// What tokens cost.
    pub prices: Option<Prices>,
    /// What prices are in.
    pub currency: Option<String>,
    /// What reports call the models; none or two.
    pub labels: Vec<String>,
    /// Pairs of traces that a report shows.
    pub traces: Option<i64>,
}

/// What a comparison must show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// The lower end of the difference.
    pub min_difference: Option<f64>,
    /// Tasks.
    pub min_tasks: Option<i64>,
}

/// The file as it is written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    name: Option<String>,
    base: Option<String>,
    revision: Option<String>,
    model: Option<String>,
    rounds: Option<i64>,
    tasks: Section,
    probe: Option<Section>,
    rollouts: Section,
    dataset: Section,
    train: Section,
    serve: Section,
    evaluate: Section,
    gate: Section,
    publish: Section,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TasksSection {
    train: Option<PathBuf>,
    eval: Option<PathBuf>,
    defaults: Section,
    vars: Vars,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ProbeSection {
    samples: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RolloutsSection {
    samples: Option<i64>,
    hints: Option<bool>,
    sampling: Section,
    seed: Option<i64>,
    min_share: Option<f64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServeSection {
    deadline_s: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EvaluateSection {
    samples: Option<i64>,
    sampling: Section,
    seed: Option<i64>,
    prices: Option<Section>,
    currency: Option<String>,
    labels: Vec<String>,
    traces: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PricesSection {
    prompt: f64,
    completion: f64,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PublishSection {
    enabled: Option<bool>,
    canary: Option<f64>,
}

/// What the command line says over the file.
#[derive(Clone, Debug, Default)]
pub struct Over {
    /// Variables of the tasks.
    pub vars: Vars,
    /// Rounds.
    pub rounds: Option<u32>,
}

impl Config {
    /// Reads a file; the paths in it are seen from `folder`.
    pub fn parse(text: &str, folder: &Path, over: Over, faults: &mut Faults) -> Self {
        let file: File = section("", table(text, faults), faults);
        let base = needed("base", file.base, faults);
        let rounds = over.rounds.map(i64::from).or(file.rounds);
        Self {
            name: name(file.name, faults),
            model: file.model.unwrap_or_else(|| base.clone()),
            revision: file.revision,
            rounds: faults.number("rounds", rounds, 1..=ROUNDS_MAX, 1),
            tasks: tasks(file.tasks, folder, over.vars, faults),
            probe: file.probe.map(|found| probe(found, faults)),
            rollouts: rollouts(file.rollouts, faults),
            dataset: dataset(file.dataset, &base, faults),
            train: section("train", file.train, faults),
            serve_deadline: serve(file.serve, faults),
            evaluate: evaluate(file.evaluate, faults),
            gate: section("gate", file.gate, faults),
            publish: publish(file.publish, faults),
            base,
        }
    }
}

fn table(text: &str, faults: &mut Faults) -> Section {
    let refuse = |rule: String| FieldError::new("file", "", rule);
    let read = toml::from_str::<toml::Table>(text)
        .map_err(|error| refuse(format!("must be TOML: {}", error.to_string().trim())));
    let value = read.and_then(|table| {
        serde_json::to_value(table)
            .map_err(|error| refuse(format!("must be plain values: {error}")))
    });
    match faults.keep(value) {
        Some(Value::Object(table)) => table,
        _ => Section::new(),
    }
}

/// What has no default.
fn needed<T: Default>(field: &str, value: Option<T>, faults: &mut Faults) -> T {
    if value.is_none() && !faults.has(field) {
        faults.add(FieldError::new(field, "", "must be given"));
    }
    value.unwrap_or_default()
}

fn name(given: Option<String>, faults: &mut Faults) -> PipelineName {
    let given = needed("name", given, faults);
    let read = match given.len() {
        // Said already.
        0 => None,
        1..=PIPELINE_NAME_BYTES_MAX => {
            faults.keep(PipelineName::new(&given).map_err(|error| FieldError {
                field: "name".to_owned(),
                ..error
            }))
        }
        _ => {
            let rule = format!("must have at most {PIPELINE_NAME_BYTES_MAX} bytes");
            faults.add(FieldError::new("name", given, rule));
            None
        }
    };
    // Nothing is done under it.
    read.unwrap_or_else(|| PipelineName::new("pipeline").unwrap_or_else(|_| unreachable!()))
}

fn tasks(found: Section, folder: &Path, vars: Vars, faults: &mut Faults) -> Tasks {
    let found: TasksSection = section("tasks", found, faults);
    let mut all = found.vars;
    all.extend(vars);
    let mut defaults = Value::Object(found.defaults);
    let replaced = vars::replace(&mut defaults, &all);
    faults.keep(replaced.map_err(|error| error.under("tasks.defaults")));
    let defaults = match defaults {
        Value::Object(defaults) => section("tasks.defaults", defaults, faults),
        _ => JobDraft::default(),
    };
    let mut file = |field: &str, path: Option<PathBuf>| {
        let path = needed(field, path, faults);
        match path.as_os_str().is_empty() {
            true => path,
            false => folder.join(path),
        }
    };
    Tasks {
        train: file("tasks.train", found.train),
        eval: file("tasks.eval", found.eval),
        defaults,
        vars: all,
    }
}

fn probe(found: Section, faults: &mut Faults) -> u32 {
    let found: ProbeSection = section("probe", found, faults);
    faults.number(
        "probe.samples",
        found.samples,
        1..=SAMPLES_MAX,
        PROBE_SAMPLES,
    )
}

fn rollouts(found: Section, faults: &mut Faults) -> Rollouts {
    let found: RolloutsSection = section("rollouts", found, faults);
    let samples = found.samples;
    let min_share = found.min_share.unwrap_or(MIN_SHARE);
    if !(0.0..=1.0).contains(&min_share) {
        let rule = "must be in [0, 1], such as 0.9";
        faults.add(FieldError::new("rollouts.min_share", min_share, rule));
    }
    Rollouts {
        samples: faults.number(
            "rollouts.samples",
            samples,
            1..=SAMPLES_MAX,
            ROLLOUT_SAMPLES,
        ),
        hints: found.hints.unwrap_or(true),
        sampling: section("rollouts.sampling", found.sampling, faults),
        seed: faults.number("rollouts.seed", found.seed, 0..=u32::MAX, 0),
        min_share,
    }
}

/// The fields of a curation, but for what it reads and what it becomes, which are the pipeline's.
fn dataset(mut found: Section, base: &str, faults: &mut Faults) -> CurateDraft {
    for (field, rule) in [
        (
            "batches",
            "must be absent: the batches are those of the pipeline",
        ),
        (
            "dataset",
            "must be absent: the data set has the pipeline's name",
        ),
        (
            "uploads",
            "must be absent: build a data set of files, and name its version in `extends`",
        ),
    ] {
        if let Some(value) = found.remove(field) {
            faults.add(FieldError::new(format!("dataset.{field}"), value, rule));
        }
    }
    let mut draft: CurateDraft = section("dataset", found, faults);
    draft.filter.get_or_insert_with(|| WHERE.to_owned());
    // The training takes the base's, and refuses a data set of another one. Every name of a model has a `/`.
    if base.contains('/') {
        draft.tokenizer.get_or_insert_with(|| base.to_owned());
    }
    draft
}

fn serve(found: Section, faults: &mut Faults) -> Duration {
    let found: ServeSection = section("serve", found, faults);
    let seconds = faults.number(
        "serve.deadline_s",
        found.deadline_s,
        1..=SERVE_S_MAX,
        SERVE_S,
    );
    Duration::from_secs(seconds.into())
}

fn publish(found: Section, faults: &mut Faults) -> Publish {
    let found: PublishSection = section("publish", found, faults);
    if let Some(share) = found.canary.filter(|share| !(*share > 0.0 && *share < 1.0)) {
        let rule = "must be in (0, 1), such as 0.1";
        faults.add(FieldError::new("publish.canary", share, rule));
    }
    Publish {
        enabled: found.enabled.unwrap_or(true),
        canary: found.canary,
    }
}

fn evaluate(found: Section, faults: &mut Faults) -> Evaluate {
    let found: EvaluateSection = section("evaluate", found, faults);
    let prices = found.prices.map(|prices| {
        let found: PricesSection = section("evaluate.prices", prices, faults);
        Prices {
            prompt: found.prompt,
            completion: found.completion,
        }
    });
    if !matches!(found.labels.len(), 0 | 2) {
        let rule = "must be two: of the model before and of the one after";
        faults.add(FieldError::new(
            "evaluate.labels",
            found.labels.join(", "),
            rule,
        ));
    }
    Evaluate {
        samples: faults.number("evaluate.samples", found.samples, 1..=SAMPLES_MAX, 1),
        sampling: section("evaluate.sampling", found.sampling, faults),
        seed: faults.number("evaluate.seed", found.seed, 0..=u32::MAX, 0),
        prices,
        currency: found.currency,
        labels: found.labels,
        traces: found.traces,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Config, Vec<String>) {
        let mut faults = Faults::default();
        let config = Config::parse(text, Path::new("/p"), Over::default(), &mut faults);
        let mut fields: Vec<String> = faults.0.iter().map(|f| f.error.to_string()).collect();
        fields.sort_unstable();
        (config, fields)
    }

    const LEAST: &str = "name = \"shop\"\nbase = \"Qwen/Qwen3-4B\"\n[tasks]\ntrain = \"a.jsonl\"\neval = \"/e.jsonl\"\n";

    #[test]
    fn silence_is_filled_in() {
        let (config, faults) = read(LEAST);
        assert_eq!(faults, [""; 0]);
        assert_eq!((&*config.model, config.rounds), ("Qwen/Qwen3-4B", 1));
        assert_eq!(config.tasks.train, Path::new("/p/a.jsonl"));
        assert_eq!(config.tasks.eval, Path::new("/e.jsonl"));
        let publish = Publish {
            enabled: true,
            canary: None,
        };
        assert_eq!((config.probe, config.publish), (None, publish));
        assert_eq!((config.rollouts.samples, config.rollouts.hints), (4, true));
        assert_eq!((config.rollouts.seed, config.rollouts.min_share), (0, 0.9));
        assert_eq!(config.dataset.filter.as_deref(), Some("solved"));
        assert_eq!(config.dataset.tokenizer.as_deref(), Some("Qwen/Qwen3-4B"));
        let (config, _) = read(&format!("{LEAST}[dataset]\ntokenizer = \"a/b\"\n"));
        assert_eq!(config.dataset.tokenizer.as_deref(), Some("a/b"));
        let (config, _) = read(LEAST);
        assert_eq!(config.serve_deadline.as_secs(), 1_800);
        assert_eq!((config.evaluate.samples, config.evaluate.prices), (1, None));
        let (config, _) = read(&format!("{LEAST}[probe]\n"));
        assert_eq!(config.probe, Some(4));
    }

    #[test]
    fn the_command_line_goes_over_the_file() {
        let over = Over {
            vars: [("site".to_owned(), "http://b".to_owned())].into(),
            rounds: Some(3),
        };
        let text = format!("rounds = 2\n{LEAST}[tasks.vars]\nsite = \"http://a\"\nuser = \"u\"\n");
        let mut faults = Faults::default();
        let config = Config::parse(&text, Path::new("."), over, &mut faults);
        assert_eq!(config.rounds, 3);
        assert_eq!(config.tasks.vars["site"], "http://b");
        assert_eq!(config.tasks.vars["user"], "u");
        assert!(faults.0.is_empty(), "{faults:?}");
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let (_, faults) = read(
            "nmae = \"shop\"\nrounds = 0\n[tasks]\ntrian = \"a\"\neval = 5\n[rollouts]\nsamples = 0\nhints = \"no\"\nmin_share = 1.5\n\
             sampling = { temperatur = 1, top_k = \"x\" }\n[dataset]\nbatches = [\"b\"]\n[train]\nrnak = 8\n[evaluate]\n\
             labels = [\"a\"]\nprices = { promt = 1 }\n[gate]\nmin_task = 1\n[publish]\nenabeld = true\ncanary = 1\n",
        );
        let fields: Vec<&str> = faults
            .iter()
            .map(|f| f.split('`').nth(1).unwrap())
            .collect();
        assert_eq!(
            fields,
            [
                "base",
                "dataset.batches",
                "evaluate.labels",
                "evaluate.prices.promt",
                "gate.min_task",
                "name",
                "nmae",
                "publish.canary",
                "publish.enabeld",
                "rollouts.hints",
                "rollouts.min_share",
                "rollouts.samples",
                "rollouts.sampling.temperatur",
                "rollouts.sampling.top_k",
                "rounds",
                "tasks.eval",
                "tasks.train",
                "tasks.trian",
                "train.rnak",
            ],
            "{faults:#?}"
        );
        let has = |part: &str| assert!(faults.iter().any(|f| f.contains(part)), "{part}");
        has("did you mean `name`?");
        has("did you mean `temperature`?");
        has("did you mean `min_tasks`?");
        has("must be in 1..=20, got `0`");
    }

    #[test]
    fn what_is_no_toml_is_said_once() {
        let (_, faults) = read("name = ");
        assert!(faults.iter().any(|f| f.starts_with("`file` must be TOML")));
        let (_, faults) = read(&LEAST.replace("shop", &"x".repeat(65)));
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].starts_with("`name` must have at most 64 bytes"));
        let (_, faults) = read(&LEAST.replace("shop", "a/b"));
        assert!(
            faults[0].starts_with("`name` must be 1 to 128 of"),
            "{faults:?}"
        );
    }
}
