//! From a file of tasks to rollouts: each task some times for each model, alike but for the model. `evaluate` and `run` share
//! it. But for reading the file it is pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use espalier_core::error::FieldError;
use espalier_core::id::NAME_BYTES_MAX;
use espalier_core::spec::{JobDraft, SamplingDraft};
use espalier_core::trace::sha256_hex;
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use prost::Message;

use crate::submit::file::{Additions, CHUNK_BYTES_MAX, CHUNK_JOBS_MAX, JobFile, Piece, Refusal};
use crate::submit::vars::Vars;

/// The label by which the arms of a batch are told apart.
pub const ARM_LABEL: &str = "arm";
/// Hex digits of the digest that stands for the end of a long name.
const DIGEST_LEN: usize = 12;

/// Who tries the tasks.
#[derive(Clone, Debug)]
pub struct Arm {
    /// What ids of its rollouts begin with, and its value of [`ARM_LABEL`]; none where the batch has no other arm.
    pub name: Option<&'static str>,
    /// The model, as its endpoint names it; none: whoever submits the rollouts adds it.
    pub model: Option<String>,
}

/// What is asked of every task.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who tries it.
    pub arms: Vec<Arm>,
    /// Rollouts of each task and arm.
    pub samples: u32,
    /// Only tasks of this split.
    pub split: Option<String>,
    /// Whether hints stay in.
    pub hints: bool,
    /// Of the seeds of tasks that bring none.
    pub seed: u64,
    /// How tokens are drawn, over what the tasks say.
    pub sampling: SamplingDraft,
    /// What tasks have in common, under the defaults of their file.
    pub defaults: JobDraft,
    /// Labels on top of the tasks' own.
    pub labels: BTreeMap<String, String>,
    /// What a task without an id is called, before its place in the file.
    pub nameless: &'static str,
    /// Rollouts that are made; more are only counted.
    pub rollouts_max: u64,
}

/// The rollouts of a file.
#[derive(Debug, Default)]
pub struct Expanded {
    /// They.
    pub jobs: Vec<v1::JobSpec>,
    /// Of each, the place of its task in the file.
    pub places: Vec<u64>,
    /// What is left out, in the order of the file.
    pub refusals: Vec<Refusal>,
    /// Tasks of another split.
    pub skipped: u64,
    /// Rollouts of all tasks, also where that is more than are made.
    pub rollouts: u64,
}

impl Expanded {
    /// Reads a file of tasks and expands it. What breaks a rule is left out, with its place. Blocking.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(path: &Path, vars: Vars, plan: Plan) -> Result<Self, FieldError> {
        let additions = Additions {
            vars,
            ..Additions::default()
        };
        let file = JobFile::open(path, additions)?;
        let defaults = laid(
            draft_to_wire(&plan.defaults),
            &draft_to_wire(&file.defaults),
        )?;
        let mut expander = Expander::new(plan, defaults);
        let mut read = Self::default();
        let ended = file.read_all(|piece| {
            match piece {
                Piece::Refused(refusal) => read.refusals.push(refusal),
                Piece::Progress(_) => {}
                Piece::Chunk(chunk) => {
                    for (own, place) in chunk.jobs.iter().zip(chunk.places) {
                        read.take(own, place, &mut expander);
                    }
                }
            }
            true
        });
        ended.map_err(|error| {
            FieldError::new("file", path.display(), format!("cannot be read: {error}"))
        })?;
        read.refusals.sort_by_key(|refusal| refusal.place);
        (read.skipped, read.rollouts) = (expander.skipped, expander.rollouts);
        Ok(read)
    }

    fn take(&mut self, own: &v1::JobSpec, place: u64, expander: &mut Expander) {
        match expander.expand(own, place) {
            Ok(jobs) => {
                self.places.extend(jobs.iter().map(|_| place));
                self.jobs.extend(jobs);
            }
            Err(error) => self.refusals.push(Refusal {
                place,
                id: own.id().to_owned(),
                error,
            }),
        }
    }
}

/// Jobs that are sent together, each with what stands beside it. The same jobs give the same chunks.
pub fn chunks<T>(
    jobs: impl IntoIterator<Item = (v1::JobSpec, T)>,
) -> Vec<(Vec<v1::JobSpec>, Vec<T>)> {
    let mut chunks: Vec<(Vec<v1::JobSpec>, Vec<T>)> = Vec::new();
    let mut bytes = 0;
    for (job, beside) in jobs {
        let more = job.encoded_len() + 8;
        let is_full = chunks
            .last()
            .is_none_or(|(jobs, _)| jobs.len() >= CHUNK_JOBS_MAX || bytes + more > CHUNK_BYTES_MAX);
        if is_full {
            chunks.push((Vec::new(), Vec::new()));
            bytes = 0;
        }
        bytes += more;
        if let Some((jobs, besides)) = chunks.last_mut() {
            jobs.push(job);
            besides.push(beside);
        }
    }
    chunks
}

/// `own` over `defaults`: what it says wins, and what it lists comes behind what they list.
fn laid(mut defaults: v1::JobSpec, own: &v1::JobSpec) -> Result<v1::JobSpec, FieldError> {
    // What was just encoded can be read.
    let merged = defaults.merge(&own.encode_to_vec()[..]);
    merged.map_err(|error| FieldError::new("job", "", error.to_string()))?;
    Ok(defaults)
}

/// What tasks have in common, and what was seen of them.
struct Expander {
    plan: Plan,
    defaults: v1::JobSpec,
    sampling: v1::Sampling,
    /// The place of each sample of a task.
    seen: HashMap<(String, i64), u64>,
    /// Ids of rollouts.
    ids: HashSet<String>,
    /// Tasks that are of another split.
    skipped: u64,
    /// Rollouts of the others.
    rollouts: u64,
}

impl Expander {
    /// `defaults` are those of the file, which lie under each task.
    fn new(plan: Plan, defaults: v1::JobSpec) -> Self {
        let sampling = JobDraft {
            sampling: Some(plan.sampling.clone()),
            ..JobDraft::default()
        };
        let sampling = draft_to_wire(&sampling).rollout.and_then(|r| r.sampling);
        Self {
            plan,
            defaults,
            sampling: sampling.unwrap_or_default(),
            seen: HashMap::new(),
            ids: HashSet::new(),
            skipped: 0,
            rollouts: 0,
        }
    }

    /// The rollouts of the task at `place` of its file; none where it is of another split, or makes more than may be made.
    ///
    /// # Errors
    /// It is no rollout, waits for another task, or another one is the same sample of the same task.
    fn expand(&mut self, own: &v1::JobSpec, place: u64) -> Result<Vec<v1::JobSpec>, FieldError> {
        let mut spec = laid(self.defaults.clone(), own)?;
        check_work(&spec)?;
        let rollout = spec.rollout.get_or_insert_default();
        let wanted = self.plan.split.as_ref();
        if wanted.is_some_and(|split| rollout.split.as_ref() != Some(split)) {
            self.skipped += 1;
            return Ok(Vec::new());
        }
        check_after(&spec.after)?;
        let rollout = spec.rollout.get_or_insert_default();
        let name = spec
            .id
            .clone()
            .unwrap_or_else(|| format!("{}-{place:06}", self.plan.nameless));
        let task = rollout.task_id.get_or_insert_with(|| name.clone()).clone();
        // A file may have several samples of a task by itself.
        let first = rollout.sample_index.unwrap_or(0);
        self.note(&task, first, place)?;
        if !self.plan.hints {
            rollout.hints = None;
        }
        rollout.group.get_or_insert_with(|| task.clone());
        self.rollouts += u64::from(self.plan.samples) * self.plan.arms.len() as u64;
        if self.rollouts > self.plan.rollouts_max {
            return Ok(Vec::new());
        }
        let samples = i64::from(self.plan.samples);
        let mut jobs = Vec::new();
        for sample in 0..samples {
            let sample = first.saturating_mul(samples).saturating_add(sample);
            for arm in &self.plan.arms {
                jobs.push(self.one(&spec, arm, (&name, &task), sample));
            }
        }
        match jobs.iter().find(|job| self.ids.contains(job.id())) {
            Some(_) => Err(FieldError::new("id", name, "must be unique in the file")),
            None => {
                self.ids.extend(jobs.iter().map(|job| job.id().to_owned()));
                Ok(jobs)
            }
        }
    }

    fn note(&mut self, task: &str, sample: i64, place: u64) -> Result<(), FieldError> {
        match self.seen.insert((task.to_owned(), sample), place) {
            None => Ok(()),
            Some(before) => {
                self.seen.insert((task.to_owned(), sample), before);
                let rule = format!(
                    "must be unique in the file together with `sample_index`, and entry {before} has both too"
                );
                Err(FieldError::new("task_id", task, rule))
            }
        }
    }

    fn one(
        &self,
        spec: &v1::JobSpec,
        arm: &Arm,
        (name, task): (&str, &str),
        sample: i64,
    ) -> v1::JobSpec {
        let mut spec = spec.clone();
        spec.id = Some(job_id(arm.name, name, sample));
        spec.labels.extend(self.plan.labels.clone());
        if let Some(arm) = arm.name {
            spec.labels.insert(ARM_LABEL.to_owned(), arm.to_owned());
        }
        let rollout = spec.rollout.get_or_insert_default();
        rollout.model.clone_from(&arm.model);
        rollout.sample_index = Some(sample);
        let seed = || seed(self.plan.seed, task, sample);
        let sampling = rollout.sampling.get_or_insert_default();
        // Both are of this process.
        let _ = sampling.merge(&self.sampling.encode_to_vec()[..]);
        sampling.seed = Some(match sampling.seed {
            // Samples of one task that draw alike would be one sample.
            Some(given) => given.wrapping_add(sample),
            None => seed(),
        });
        spec
    }
}

fn check_work(spec: &v1::JobSpec) -> Result<(), FieldError> {
    let other = [
        ("generate", spec.generate.is_some()),
        ("train", spec.train.is_some()),
        ("export", spec.export.is_some()),
        ("curate", spec.curate.is_some()),
        ("compare", spec.compare.is_some()),
        ("score", spec.score.is_some()),
    ];
    match other.into_iter().find(|(_, given)| *given) {
        Some((field, _)) => {
            let rule = "must be absent: a task is a rollout";
            Err(FieldError::new(field, "", rule))
        }
        None => Ok(()),
    }
}

/// Rollouts have ids of their own, and a task may be in no batch at all, so that nobody can wait for it by its name.
fn check_after(after: &[String]) -> Result<(), FieldError> {
    let own = after.iter().enumerate().find(|(_, job)| !job.contains('/'));
    own.map_or(Ok(()), |(n, job)| {
        let rule =
            "must be `batch/job` of another batch: tasks are tried by themselves, in any order";
        Err(FieldError::new(format!("after[{n}]"), job, rule))
    })
}

/// `{arm}.{name}.s{sample}`. Of a name for which there is no room the beginning is kept, and a digest tells it from others.
fn job_id(arm: Option<&str>, name: &str, sample: i64) -> String {
    let arm = arm.map(|arm| format!("{arm}.")).unwrap_or_default();
    let sample = format!(".s{sample}");
    let room = NAME_BYTES_MAX - arm.len() - sample.len();
    if name.len() <= room {
        return format!("{arm}{name}{sample}");
    }
    let digest = &sha256_hex(name.as_bytes())[..DIGEST_LEN];
    let kept = &name[..name.floor_char_boundary(room - DIGEST_LEN - 1)];
    format!("{arm}{kept}-{digest}{sample}")
}

/// The same for every arm, and the same when it is done again.
fn seed(seed: u64, task: &str, sample: i64) -> i64 {
    let digest = sha256_hex(format!("{seed}|{task}|{sample}").as_bytes());
    // Eight digits of hex fit, and servers that keep seeds in 32 bits with a sign take seven and a half.
    i64::from_str_radix(&digest[..8], 16).unwrap_or(0) & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use espalier_core::id::JobId;
    use espalier_core::spec::parse_line;

    use super::*;

    fn spec(line: &str) -> v1::JobSpec {
        draft_to_wire(&parse_line(line.as_bytes()).unwrap())
    }

    fn plan(samples: u32, split: Option<&str>, hints: bool) -> Plan {
        Plan {
            arms: [("a", "base"), ("b", "shop")]
                .map(|(name, model)| Arm {
                    name: Some(name),
                    model: Some(model.to_owned()),
                })
                .to_vec(),
            samples,
            split: split.map(str::to_owned),
            hints,
            seed: 0,
            sampling: SamplingDraft::default(),
            defaults: JobDraft::default(),
            labels: BTreeMap::new(),
            nameless: "task",
            rollouts_max: u64::MAX,
        }
    }

    fn rollout(job: &v1::JobSpec) -> &v1::RolloutSpec {
        job.rollout.as_ref().unwrap()
    }

    #[test]
    fn both_models_get_the_same_but_for_their_name() {
        let defaults = spec(r#"{"mcp":["browser"],"limits":{"turns":5}}"#);
        let mut expander = Expander::new(plan(2, None, false), defaults);
        let task =
            spec(r#"{"id":"t","prompt":"x","hints":"h","limits":{"wall_s":7},"labels":{"k":"v"}}"#);
        let jobs = expander.expand(&task, 3).unwrap();
        let ids: Vec<&str> = jobs.iter().map(v1::JobSpec::id).collect();
        assert_eq!(ids, ["a.t.s0", "b.t.s0", "a.t.s1", "b.t.s1"]);
        let models: Vec<&str> = jobs.iter().map(|job| rollout(job).model()).collect();
        assert_eq!(models, ["base", "shop", "base", "shop"]);
        let seed = |n: usize| rollout(&jobs[n]).sampling.as_ref().unwrap().seed;
        assert!(seed(0) == seed(1) && seed(2) == seed(3) && seed(0) != seed(2));
        assert!(seed(0).unwrap() > 0);
        for (n, job) in jobs.iter().enumerate() {
            let of = rollout(job);
            assert_eq!((of.task_id(), of.sample_index()), ("t", (n / 2) as i64));
            assert_eq!((of.hints.as_ref(), of.mcp.len()), (None, 1));
            let limits = of.limits.unwrap();
            assert_eq!((limits.turns, limits.wall_s), (Some(5), Some(7)));
            assert_eq!(
                (job.labels["arm"].as_str(), job.labels["k"].as_str()),
                (["a", "b"][n % 2], "v")
            );
        }
        let with = Expander::new(plan(1, None, true), v1::JobSpec::default()).expand(&task, 1);
        assert_eq!(rollout(&with.unwrap()[0]).hints(), "h");
    }

    #[test]
    fn tasks_of_another_split_are_passed_over_and_bad_ones_named() {
        let mut expander = Expander::new(plan(1, Some("eval"), false), v1::JobSpec::default());
        for (line, count) in [
            (r#"{"prompt":"x","split":"eval"}"#, 2),
            (r#"{"prompt":"x","split":"train"}"#, 0),
            (r#"{"prompt":"x"}"#, 0),
        ] {
            assert_eq!(
                expander.expand(&spec(line), 7).unwrap().len(),
                count,
                "{line}"
            );
        }
        assert_eq!(expander.skipped, 2);
        let again = expander.expand(
            &spec(r#"{"task_id":"task-000007","prompt":"y","split":"eval"}"#),
            9,
        );
        let error = again.unwrap_err();
        assert_eq!((&*error.field, &*error.value), ("task_id", "task-000007"));
        assert!(error.rule.contains("entry 7"), "{error}");
        let other = expander
            .expand(&spec(r#"{"generate":{"requests":"x"}}"#), 10)
            .unwrap_err();
        assert_eq!(other.field, "generate");
    }

    #[test]
    fn more_than_may_be_made_is_counted_and_not_made() {
        let plan = Plan {
            rollouts_max: 4,
            nameless: "eval",
            ..plan(2, None, false)
        };
        let mut expander = Expander::new(plan, v1::JobSpec::default());
        let mut made = |place| expander.expand(&spec(r#"{"prompt":"x"}"#), place).unwrap();
        let first = made(1);
        assert_eq!((first.len(), first[0].id()), (4, "a.eval-000001.s0"));
        assert_eq!(made(2).len() + made(3).len(), 0);
        assert_eq!(expander.rollouts, 12);
    }

    #[test]
    fn samples_of_the_file_stay_apart() {
        let mut expander = Expander::new(plan(2, None, false), v1::JobSpec::default());
        let line = |n: u32| {
            format!(
                r#"{{"id":"t{n}","task_id":"t","sample_index":{n},"prompt":"x","sampling":{{"seed":5}}}}"#
            )
        };
        let jobs: Vec<_> = (0..2)
            .flat_map(|n| expander.expand(&spec(&line(n)), 1).unwrap())
            .collect();
        let samples: Vec<i64> = jobs
            .iter()
            .step_by(2)
            .map(|job| rollout(job).sample_index())
            .collect();
        assert_eq!(samples, [0, 1, 2, 3]);
        let seeds: Vec<_> = jobs
            .iter()
            .step_by(2)
            .map(|job| rollout(job).sampling.as_ref().unwrap().seed())
            .collect();
        assert_eq!(seeds, [5, 6, 7, 8]);
    }

    #[test]
    fn a_task_waits_for_no_other_task() {
        let mut expander = Expander::new(plan(1, None, false), v1::JobSpec::default());
        let waits = spec(r#"{"id":"t","prompt":"x","after":["other/j","u"]}"#);
        let error = expander.expand(&waits, 1).unwrap_err();
        assert_eq!((&*error.field, &*error.value), ("after[1]", "u"));
        let elsewhere = spec(r#"{"id":"t","prompt":"x","after":["other/j"]}"#);
        assert_eq!(
            expander.expand(&elsewhere, 1).unwrap()[0].after,
            ["other/j"]
        );
    }

    #[test]
    fn long_ids_stay_ids_and_apart() {
        let long = "t".repeat(NAME_BYTES_MAX);
        let ids = [
            job_id(Some("a"), &long, 0),
            job_id(Some("a"), &long, 10),
            job_id(None, &long, 0),
            job_id(None, &"t".repeat(NAME_BYTES_MAX - 1), 0),
            job_id(None, &format!("{long}ä"), 0),
        ];
        for (n, id) in ids.iter().enumerate() {
            assert!(JobId::new(id).is_ok(), "{id}");
            assert!(!ids[..n].contains(id), "{id}");
        }
        assert_eq!(ids[0], job_id(Some("a"), &long, 0));
        let whole = "t".repeat(NAME_BYTES_MAX - 5);
        assert_eq!(job_id(Some("a"), &whole, 0), format!("a.{whole}.s0"));
        let mut expander = Expander::new(plan(1, None, false), v1::JobSpec::default());
        let nameless = spec(r#"{"prompt":"x","task_id":"one"}"#);
        expander.expand(&nameless, 7).unwrap();
        let named = spec(r#"{"id":"task-000007","task_id":"two","prompt":"x"}"#);
        assert_eq!(expander.expand(&named, 9).unwrap_err().field, "id");
    }

    #[test]
    fn one_arm_has_plain_ids_and_sampling_goes_over_the_tasks_own() {
        let mut plan = plan(2, None, true);
        plan.arms = vec![Arm {
            name: None,
            model: None,
        }];
        plan.sampling.temperature = Some(0.5);
        plan.labels = [("pipeline".to_owned(), "shop".to_owned())].into();
        let mut expander = Expander::new(plan, v1::JobSpec::default());
        let line =
            r#"{"id":"t","model":"other","prompt":"x","sampling":{"temperature":1,"top_k":7}}"#;
        let jobs = expander.expand(&spec(line), 1).unwrap();
        let ids: Vec<&str> = jobs.iter().map(v1::JobSpec::id).collect();
        assert_eq!(ids, ["t.s0", "t.s1"]);
        let of = rollout(&jobs[0]);
        let sampling = of.sampling.as_ref().unwrap();
        assert_eq!((sampling.temperature, sampling.top_k), (Some(0.5), Some(7)));
        assert_eq!((of.model.as_deref(), of.group()), (None, "t"));
        assert_eq!(jobs[0].labels["pipeline"], "shop");
        assert!(!jobs[0].labels.contains_key(ARM_LABEL));
    }

    #[test]
    fn what_tasks_have_in_common_lies_under_their_own() {
        let under = spec(r#"{"limits":{"turns":5,"wall_s":60},"tools":{"allow":["a"]}}"#);
        let own = spec(r#"{"limits":{"turns":9},"tools":{"brief":true},"prompt":"x"}"#);
        let laid = laid(under, &own).unwrap().rollout.unwrap();
        let limits = laid.limits.unwrap();
        assert_eq!((limits.turns, limits.wall_s), (Some(9), Some(60)));
        let tools = laid.tools.unwrap();
        assert_eq!(
            (tools.allow, tools.brief),
            (vec!["a".to_owned()], Some(true))
        );
    }
}
