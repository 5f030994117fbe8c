//! From a task to its rollouts: each sample once for each model, alike but for the model. Pure.

use std::collections::HashMap;

use espalier_core::error::FieldError;
use espalier_core::trace::sha256_hex;
use espalier_proto::v1;
use prost::Message;

/// The label by which the arms of a batch are told apart.
pub const ARM_LABEL: &str = "arm";
/// Its values, and what ids of rollouts begin with: before and after.
pub const ARMS: [&str; 2] = ["a", "b"];

/// What is asked of every task.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The models, as their endpoint names them: before and after.
    pub models: [String; 2],
    /// Rollouts of each task and model.
    pub samples: u32,
    /// Only tasks of this split.
    pub split: Option<String>,
    /// Whether hints stay in.
    pub hints: bool,
    /// Of the seeds of tasks that bring none.
    pub seed: u64,
}

/// What tasks have in common, and what was seen of them.
pub struct Expander {
    plan: Plan,
    defaults: v1::JobSpec,
    /// The place of each sample of a task.
    seen: HashMap<(String, i64), u64>,
    /// Tasks that are of another split.
    pub skipped: u64,
}

impl Expander {
    /// `defaults` are those of the file, which lie under each task.
    pub fn new(plan: Plan, defaults: v1::JobSpec) -> Self {
        Self {
            plan,
            defaults,
            seen: HashMap::new(),
            skipped: 0,
        }
    }

    /// The rollouts of the task at `place` of its file; none where it is of another split.
    ///
    /// # Errors
    /// It is no rollout, or another one is the same sample of the same task.
    pub fn expand(
        &mut self,
        own: &v1::JobSpec,
        place: u64,
    ) -> Result<Vec<v1::JobSpec>, FieldError> {
        let mut spec = self.defaults.clone();
        // What was just encoded can be read.
        spec.merge(&own.encode_to_vec()[..])
            .map_err(|error| FieldError::new("job", "", error.to_string()))?;
        let other = [
            ("generate", spec.generate.is_some()),
            ("train", spec.train.is_some()),
            ("export", spec.export.is_some()),
            ("curate", spec.curate.is_some()),
            ("compare", spec.compare.is_some()),
        ];
        if let Some((field, _)) = other.into_iter().find(|(_, given)| *given) {
            let rule = "must be absent: a task that is evaluated is a rollout";
            return Err(FieldError::new(field, "", rule));
        }
        let rollout = spec.rollout.get_or_insert_default();
        let wanted = self.plan.split.as_ref();
        if wanted.is_some_and(|split| rollout.split.as_ref() != Some(split)) {
            self.skipped += 1;
            return Ok(Vec::new());
        }
        let name = spec
            .id
            .clone()
            .unwrap_or_else(|| format!("task-{place:06}"));
        let task = rollout.task_id.get_or_insert_with(|| name.clone()).clone();
        // A file may have several samples of a task by itself.
        let first = rollout.sample_index.unwrap_or(0);
        self.note(&task, first, place)?;
        if !self.plan.hints {
            rollout.hints = None;
        }
        let samples = i64::from(self.plan.samples);
        let mut jobs = Vec::new();
        for sample in 0..samples {
            let sample = first.saturating_mul(samples).saturating_add(sample);
            for (arm, model) in ARMS.into_iter().zip(&self.plan.models) {
                jobs.push(self.one(&spec, (arm, model), (&name, &task), sample));
            }
        }
        Ok(jobs)
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
        (arm, model): (&str, &str),
        (name, task): (&str, &str),
        sample: i64,
    ) -> v1::JobSpec {
        let mut spec = spec.clone();
        spec.id = Some(format!("{arm}.{name}.s{sample}"));
        spec.labels.insert(ARM_LABEL.to_owned(), arm.to_owned());
        let rollout = spec.rollout.get_or_insert_default();
        rollout.model = Some(model.to_owned());
        rollout.sample_index = Some(sample);
        let seed = || seed(self.plan.seed, task, sample);
        let sampling = rollout.sampling.get_or_insert_default();
        sampling.seed = Some(match sampling.seed {
            // Samples of one task that draw alike would be one sample.
            Some(given) => given.wrapping_add(sample),
            None => seed(),
        });
        spec
    }
}

/// The same for both arms, and the same when it is done again.
fn seed(seed: u64, task: &str, sample: i64) -> i64 {
    let digest = sha256_hex(format!("{seed}|{task}|{sample}").as_bytes());
    // Eight digits of hex fit, and servers that keep seeds in 32 bits with a sign take seven and a half.
    i64::from_str_radix(&digest[..8], 16).unwrap_or(0) & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::parse_line;
    use espalier_proto::convert::draft_to_wire;

    use super::*;

    fn spec(line: &str) -> v1::JobSpec {
        draft_to_wire(&parse_line(line.as_bytes()).unwrap())
    }

    fn plan(samples: u32, split: Option<&str>, hints: bool) -> Plan {
        Plan {
            models: ["base".to_owned(), "shop".to_owned()],
            samples,
            split: split.map(str::to_owned),
            hints,
            seed: 0,
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
                (ARMS[n % 2], "v")
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
}
