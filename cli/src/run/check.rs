//! The whole of a pipeline, held against every rule before anything is submitted: its file, the files of tasks, and each job
//! by the checks that the coordinator makes.

use std::collections::BTreeSet;
use std::path::Path;

use espalier_core::error::FieldError;
use espalier_core::spec::{JobDraft, PromptDraft, SamplingDraft};
use espalier_dataset::Filter;
use espalier_proto::convert::draft_from_wire;
use espalier_proto::v1;

use super::config::{Config, Over, WHERE};
use super::drafts::{Compared, Drafts, labels, task};
use super::read::Faults;
use crate::expand::{Arm, Expanded, Plan};

/// The split that is trained on.
const TRAIN: &str = "train";
/// The split that is measured on.
const EVAL: &str = "eval";
/// Most rollouts of one step: they are held in memory.
const ROLLOUTS_MAX: u64 = 100_000;

/// A pipeline that breaks no rule.
#[derive(Debug)]
pub struct Checked {
    /// What is to be done.
    pub config: Config,
    /// What its steps submit.
    pub drafts: Drafts,
}

/// Reads the file and the files of tasks, and checks all of it. Blocking.
///
/// # Errors
/// Everything that is wrong.
pub fn check(text: &str, folder: &Path, over: Over) -> Result<Checked, Faults> {
    let mut faults = Faults::default();
    let mut config = Config::parse(text, folder, over, &mut faults);
    for (parent, sampling) in [
        ("rollouts", &mut config.rollouts.sampling),
        ("evaluate", &mut config.evaluate.sampling),
    ] {
        check_sampling(parent, sampling, &mut faults);
    }
    let train = tasks(&config, &Wanted::rollouts(&config), &mut faults);
    let probe = config
        .probe
        .map(|samples| tasks(&config, &Wanted::probe(&config, samples), &mut faults));
    let eval = tasks(&config, &Wanted::evaluation(&config), &mut faults);
    check_apart(&train, &eval, &mut faults);
    let drafts = Drafts::new(&config, eval, probe, train);
    check_drafts(&drafts, &config, &mut faults);
    match faults.0.is_empty() {
        true => Ok(Checked { config, drafts }),
        false => Err(faults),
    }
}

/// Which tasks become rollouts, and how.
struct Wanted<'a> {
    /// The field that names the file.
    field: &'static str,
    file: &'a Path,
    split: &'static str,
    samples: u32,
    hints: bool,
    sampling: &'a SamplingDraft,
    seed: u64,
    /// Whether what is not judged is of no use.
    must_be_judged: bool,
}

impl<'a> Wanted<'a> {
    fn evaluation(config: &'a Config) -> Self {
        Self {
            field: "tasks.eval",
            file: &config.tasks.eval,
            split: EVAL,
            samples: config.evaluate.samples,
            hints: false,
            sampling: &config.evaluate.sampling,
            seed: config.evaluate.seed.into(),
            must_be_judged: true,
        }
    }

    fn rollouts(config: &'a Config) -> Self {
        Self {
            field: "tasks.train",
            file: &config.tasks.train,
            split: TRAIN,
            samples: config.rollouts.samples,
            hints: config.rollouts.hints,
            sampling: &config.rollouts.sampling,
            // The probe tries the same tasks: drawn alike, they would be the same rollouts.
            seed: 2 * u64::from(config.rollouts.seed) + 1,
            must_be_judged: config.dataset.filter.as_deref() == Some(WHERE),
        }
    }

    fn probe(config: &'a Config, samples: u32) -> Self {
        Self {
            samples,
            hints: false,
            seed: 2 * u64::from(config.rollouts.seed) + 2,
            ..Self::rollouts(config)
        }
    }
}

/// The rollouts of a file's tasks. Faults are named by file and line.
fn tasks(config: &Config, wanted: &Wanted<'_>, faults: &mut Faults) -> Vec<v1::JobSpec> {
    if wanted.file.as_os_str().is_empty() {
        return Vec::new();
    }
    let plan = Plan {
        arms: vec![Arm {
            name: None,
            model: None,
        }],
        samples: wanted.samples,
        split: Some(wanted.split.to_owned()),
        hints: wanted.hints,
        seed: wanted.seed,
        sampling: wanted.sampling.clone(),
        defaults: config.tasks.defaults.clone(),
        labels: labels(&config.name),
        // The files of both splits have lines of the same numbers.
        nameless: wanted.split,
        rollouts_max: ROLLOUTS_MAX,
    };
    let read = Expanded::read(wanted.file, config.tasks.vars.clone(), plan);
    let in_file = |error: FieldError| match error.field.as_str() {
        "file" => FieldError {
            field: wanted.field.to_owned(),
            ..error
        },
        _ => error.under(wanted.field),
    };
    let Some(read) = faults.keep(read.map_err(in_file)) else {
        return Vec::new();
    };
    let name = wanted.file.file_name().unwrap_or_default();
    let place = |place: u64| format!("{}:{place}", name.to_string_lossy());
    for refusal in &read.refusals {
        faults.add_at(place(refusal.place), refusal.error.clone());
    }
    check_jobs(&read, wanted, &place, faults);
    check_count(&read, wanted, faults);
    let mut jobs = read.jobs;
    if wanted.split == TRAIN {
        // Of what is learned from, the data set holds out its own share.
        for rollout in jobs.iter_mut().filter_map(|job| job.rollout.as_mut()) {
            rollout.split = None;
        }
    }
    jobs
}

/// The coordinator's rules for the first rollout of each task: the others differ in their numbers alone.
fn check_jobs(
    read: &Expanded,
    wanted: &Wanted<'_>,
    place: &dyn Fn(u64) -> String,
    faults: &mut Faults,
) {
    let mut last = None;
    for (job, at) in read.jobs.iter().zip(&read.places) {
        if last.replace(at) == Some(at) {
            continue;
        }
        let checked = draft_from_wire(job.clone()).map_err(|error| vec![error]);
        let checked = checked.and_then(|draft| draft.check());
        for error in checked.err().into_iter().flatten() {
            faults.add_at(place(*at), error);
        }
        let rollout = job.rollout.as_ref();
        if wanted.must_be_judged && rollout.is_none_or(|rollout| rollout.verify.is_none()) {
            let rule = "must be given: what nothing judges shows nothing";
            faults.add_at(place(*at), FieldError::new("verify", "", rule));
        }
    }
}

fn check_count(read: &Expanded, wanted: &Wanted<'_>, faults: &mut Faults) {
    let count = read.rollouts;
    let (file, split) = (wanted.file.display(), wanted.split);
    if count == 0 && read.refusals.is_empty() {
        let rule = format!("must have a task with `split` `{split}`");
        faults.add(FieldError::new(wanted.field, file, rule));
    } else if count > ROLLOUTS_MAX {
        let rule = format!("must make at most {ROLLOUTS_MAX} rollouts of a step, makes {count}");
        faults.add(FieldError::new(wanted.field, file, rule));
    }
}

/// A task that is learned says nothing about tasks that nobody has seen.
fn check_apart(train: &[v1::JobSpec], eval: &[v1::JobSpec], faults: &mut Faults) {
    let learned: BTreeSet<&str> = train.iter().map(task).collect();
    let both = eval.iter().map(task).find(|name| learned.contains(name));
    if let Some(name) = both {
        let rule =
            "must have no `task_id` that `tasks.train` has too: it would be learned and measured";
        faults.add(FieldError::new("tasks.eval", name, rule));
    }
}

/// What goes over the tasks' own is wrong once, and not in every task.
fn check_sampling(parent: &str, sampling: &mut SamplingDraft, faults: &mut Faults) {
    let job = JobDraft {
        prompt: PromptDraft::One("x".to_owned()),
        sampling: Some(sampling.clone()),
        ..JobDraft::default()
    };
    if let Err(errors) = job.check() {
        *sampling = SamplingDraft::default();
        for error in errors {
            faults.add(error.under(parent));
        }
    }
}

/// The jobs that are no rollouts, as they will be but for the names that nobody knows yet.
fn check_drafts(drafts: &Drafts, config: &Config, faults: &mut Faults) {
    let batch = drafts.name.as_str().parse();
    let version = format!("{}@v1", drafts.name);
    let (Ok(batch), Ok(dataset), Ok(adapter)) = (batch, version.parse(), version.parse()) else {
        return;
    };
    let compared = |model: &str, adapter| Compared {
        model: model.to_owned(),
        adapter,
        batch: std::clone::Clone::clone(&batch),
    };
    let (before, after) = (
        compared(&config.model, None),
        compared(&version, Some(adapter)),
    );
    let training = format!("{batch}/train");
    let rollout = JobDraft {
        prompt: PromptDraft::One("x".to_owned()),
        model: Some(config.model.clone()),
        ..JobDraft::default()
    };
    for draft in [
        rollout,
        drafts.dataset(std::slice::from_ref(&batch)),
        drafts.train(&dataset, &batch),
        drafts.comparison([&before, &after], &training),
    ] {
        for error in draft.check().err().into_iter().flatten() {
            let error = in_own_terms(error);
            if !faults.has(&error.field) {
                faults.add(error);
            }
        }
    }
    check_filter(config, faults);
}

fn check_filter(config: &Config, faults: &mut Faults) {
    let text = config.dataset.filter.as_deref().unwrap_or(WHERE);
    if let Err(error) = text.parse::<Filter>()
        && !faults.has("dataset.where")
    {
        let rule = format!("must be an expression of `dataset build --where`: {error}");
        faults.add(FieldError::new("dataset.where", text, rule));
    }
}

/// A field of a job as the pipeline's file calls it.
fn in_own_terms(error: FieldError) -> FieldError {
    const TERMS: [(&str, &str); 15] = [
        ("curate.dataset", "name"),
        ("curate.", "dataset."),
        ("train.settings.", "train."),
        ("train.adapter", "name"),
        ("train.base", "base"),
        ("train.revision", "revision"),
        ("compare.arms[0].label", "evaluate.labels[0]"),
        ("compare.arms[1].label", "evaluate.labels[1]"),
        ("compare.arms[0].prompt_price", "evaluate.prices.prompt"),
        ("compare.arms[1].prompt_price", "evaluate.prices.prompt"),
        (
            "compare.arms[0].completion_price",
            "evaluate.prices.completion",
        ),
        (
            "compare.arms[1].completion_price",
            "evaluate.prices.completion",
        ),
        ("compare.arms[0].model", "model"),
        ("compare.min_", "gate.min_"),
        ("compare.", "evaluate."),
    ];
    let term = TERMS
        .iter()
        .find_map(|(theirs, own)| Some((error.field.strip_prefix(theirs)?, own)));
    match term {
        Some((rest, own)) => FieldError {
            field: format!("{own}{rest}"),
            ..error
        },
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "name = \"shop\"\nbase = \"Qwen/Qwen3-4B\"\n[tasks]\ntrain = \"tasks.jsonl\"\neval = \"tasks.jsonl\"\n";

    fn task_line(id: &str, split: &str, more: &str) -> String {
        format!(
            "{{\"id\":\"{id}\",\"split\":\"{split}\",\"prompt\":\"x\",\"hints\":\"h\",\"verify\":{{\"answer\":{{\"equals\":\"y\"}}}}{more}}}\n"
        )
    }

    fn checked(file: &str, tasks: &str) -> Result<Checked, Vec<(String, String)>> {
        checked_both(file, tasks, "")
    }

    /// With another file of tasks.
    fn checked_both(
        file: &str,
        tasks: &str,
        other: &str,
    ) -> Result<Checked, Vec<(String, String)>> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tasks.jsonl"), tasks).unwrap();
        std::fs::write(folder.path().join("other.jsonl"), other).unwrap();
        check(file, folder.path(), Over::default()).map_err(|faults| {
            let fault = |fault: super::super::read::Fault| (fault.place, fault.error.field);
            faults.0.into_iter().map(fault).collect()
        })
    }

    fn good_tasks() -> String {
        task_line("a", "train", "") + &task_line("b", "eval", "") + &task_line("c", "test", "")
    }

    #[test]
    fn a_good_pipeline_has_the_rollouts_of_both_splits() {
        let file = format!("{FILE}[probe]\nsamples = 3\n");
        let checked = checked(&file, &good_tasks()).unwrap();
        let drafts = &checked.drafts;
        assert_eq!(drafts.evaluation.len(), 1);
        // Which of the tasks to learn from are held out is for the data set to say.
        let split = |jobs: &[v1::JobSpec]| jobs[0].rollout.as_ref().unwrap().split.clone();
        assert_eq!(split(&drafts.evaluation).as_deref(), Some(EVAL));
        assert_eq!(split(&drafts.rollouts), None);
        assert_eq!(drafts.probe.as_ref().unwrap().len(), 3);
        assert_eq!(drafts.rollouts.len(), 4);
        let hints = |job: &v1::JobSpec| job.rollout.as_ref().unwrap().hints.is_some();
        assert!(drafts.rollouts.iter().all(hints));
        assert!(!drafts.probe.iter().flatten().any(hints));
        assert!(!drafts.evaluation.iter().any(hints));
        let probed = seed(&drafts.probe.as_ref().unwrap()[0]);
        assert_ne!(
            probed,
            seed(&drafts.rollouts[0]),
            "they would be the same rollouts"
        );
    }

    fn seed(job: &v1::JobSpec) -> i64 {
        let rollout = job.rollout.as_ref().unwrap();
        rollout.sampling.as_ref().unwrap().seed()
    }

    #[test]
    fn each_split_has_a_seed_of_its_own() {
        let seeds = |more: &str| {
            let file = format!("{FILE}[probe]\n{more}");
            let drafts = checked(&file, &good_tasks()).unwrap().drafts;
            let probe = drafts.probe.unwrap();
            [&drafts.evaluation[0], &drafts.rollouts[0], &probe[0]].map(seed)
        };
        let silent = seeds("");
        let measured = seeds("[evaluate]\nseed = 1\n");
        assert!(measured[0] != silent[0] && measured[1..] == silent[1..]);
        let tried = seeds("[rollouts]\nseed = 1\n");
        assert!(tried[0] == silent[0] && tried[1] != silent[1] && tried[2] != silent[2]);
        assert_ne!(tried[1], tried[2]);
    }

    #[test]
    fn tasks_without_a_name_are_those_of_their_file() {
        let file = FILE.replace("eval = \"tasks", "eval = \"other");
        let nameless = |split| task_line("a", split, "").replace("\"id\":\"a\",", "");
        let checked = checked_both(&file, &nameless("train"), &nameless("eval")).unwrap();
        let drafts = &checked.drafts;
        assert_eq!(task(&drafts.rollouts[0]), "train-000001");
        assert_eq!(task(&drafts.evaluation[0]), "eval-000001");
    }

    #[test]
    fn too_many_rollouts_are_refused_before_they_are_made() {
        let many: String = (0..1_001)
            .map(|n| task_line(&format!("t{n}"), "train", ""))
            .collect();
        let file = format!("{FILE}[rollouts]\nsamples = 100\n");
        let faults = checked(&file, &(many + &task_line("e", "eval", ""))).unwrap_err();
        assert_eq!(faults, [(String::new(), "tasks.train".to_owned())]);
    }

    #[test]
    fn everything_that_is_wrong_is_named_by_field_or_line() {
        let file = "name = \"shop\"\nbase = \" \"\nmodel = \"m\"\nrounds = 99\n[tasks]\ntrain = \"tasks.jsonl\"\neval = \"none.jsonl\"\n\
            [rollouts]\nsampling = { temperature = 9 }\n[dataset]\nwhere = \"reward >=\"\nnear = 2\n[train]\nrank = 0\nlr = 5\n\
            [evaluate]\nprices = { prompt = -1 }\ncurrency = \" \"\n[gate]\nmin_tasks = 0\n";
        let tasks = task_line("a", "train", ",\"limits\":{\"turns\":-1}")
            + "{\"promt\":\"x\"}\n"
            + &task_line("d", "train", ",\"after\":[\"a\"]");
        let mut faults = checked(file, &tasks).unwrap_err();
        faults.sort_unstable();
        let found: Vec<(&str, &str)> = faults
            .iter()
            .map(|(p, f)| (p.as_str(), f.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("", "base"),
                ("", "dataset.near"),
                ("", "dataset.where"),
                ("", "evaluate.currency"),
                ("", "evaluate.prices.prompt"),
                ("", "gate.min_tasks"),
                ("", "rollouts.sampling.temperature"),
                ("", "rounds"),
                ("", "tasks.eval"),
                ("", "train.lr"),
                ("", "train.rank"),
                ("tasks.jsonl:1", "limits.turns"),
                ("tasks.jsonl:2", "promt"),
                ("tasks.jsonl:3", "after[0]"),
            ]
        );
    }

    #[test]
    fn what_is_learned_is_not_measured_and_both_are_there() {
        let both = task_line("a", "train", "") + &task_line("b", "eval", ",\"task_id\":\"a\"");
        let only = |fields: &[(&str, &str)]| -> Vec<(String, String)> {
            let own = |(place, field): &(&str, &str)| ((*place).to_owned(), (*field).to_owned());
            fields.iter().map(own).collect()
        };
        assert_eq!(
            checked(FILE, &both).unwrap_err(),
            only(&[("", "tasks.eval")])
        );
        let one = task_line("a", "train", "");
        assert_eq!(
            checked(FILE, &one).unwrap_err(),
            only(&[("", "tasks.eval")])
        );
        let lenient = format!("{FILE}[dataset]\nwhere = \"turns < 9\"\n");
        let unjudged =
            "{\"split\":\"train\",\"prompt\":\"x\"}\n".to_owned() + &task_line("b", "eval", "");
        assert!(checked(&lenient, &unjudged).is_ok());
        assert_eq!(
            checked(FILE, &unjudged).unwrap_err(),
            only(&[("tasks.jsonl:1", "verify")])
        );
    }
}
