//! What the steps of a pipeline submit: jobs without a model and without what other steps leave, which are added when a step
//! begins; and the plan that follows from them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, PipelineName};
use espalier_core::pipeline::{PIPELINE_PLAN_VERSION, PipelinePlan, PlannedStep, Step};
use espalier_core::spec::{
    AdapterRef, CompareArmDraft, CompareDraft, CurateDraft, DatasetRef, JobDraft, TrainDraft,
};
use espalier_core::time::Timestamp;
use espalier_core::trace::sha256_hex;
use espalier_proto::convert::{draft_from_wire, draft_to_wire};
use espalier_proto::v1;
use serde::Serialize;
use serde_json::json;

use super::config::{Config, Publish};

/// The label of all jobs of a pipeline; its value is the pipeline's name.
pub const LABEL: &str = "pipeline";

/// What the steps submit.
#[derive(Debug)]
pub struct Drafts {
    /// The pipeline.
    pub name: PipelineName,
    /// Rollouts of held-out tasks.
    pub evaluation: Vec<v1::JobSpec>,
    /// Rollouts of training tasks that tell how hard they are; none: there is no probe.
    pub probe: Option<Vec<v1::JobSpec>>,
    /// Rollouts of training tasks.
    pub rollouts: Vec<v1::JobSpec>,
    dataset: CurateDraft,
    train: TrainDraft,
    compare: CompareDraft,
    /// What becomes of a version whose gate passes.
    pub publish: Publish,
}

/// One model of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// As its endpoint names it.
    pub model: String,
    /// The version that it is, where it is one of ours.
    pub adapter: Option<AdapterRef>,
    /// Where its rollouts are.
    pub batch: BatchId,
}

impl Drafts {
    /// With rollouts that are made already.
    pub fn new(
        config: &Config,
        evaluation: Vec<v1::JobSpec>,
        probe: Option<Vec<v1::JobSpec>>,
        rollouts: Vec<v1::JobSpec>,
    ) -> Self {
        let name = config.name.to_string();
        Self {
            name: config.name.clone(),
            evaluation,
            probe,
            rollouts,
            dataset: CurateDraft {
                dataset: Some(name.clone()),
                ..config.dataset.clone()
            },
            train: TrainDraft {
                base: Some(config.base.clone()),
                revision: config.revision.clone(),
                adapter: Some(name),
                settings: config.train.clone(),
                ..TrainDraft::default()
            },
            compare: compare(config),
            publish: config.publish,
        }
    }

    /// The rollouts of a step, by `model`, without the tasks that are dropped.
    pub fn rollouts(&self, step: Step, model: &str, dropped: &[String]) -> Vec<v1::JobSpec> {
        let jobs = match step {
            Step::Probe => self.probe.as_deref().unwrap_or_default(),
            Step::Rollouts => &self.rollouts,
            _ => &self.evaluation,
        };
        let dropped: BTreeSet<&str> = dropped.iter().map(String::as_str).collect();
        let wanted = jobs.iter().filter(|job| !dropped.contains(task(job)));
        let by_model = |job: &v1::JobSpec| {
            let mut job = job.clone();
            job.rollout.get_or_insert_default().model = Some(model.to_owned());
            job
        };
        wanted.map(by_model).collect()
    }

    /// The job that makes a data set of the traces of `batches`.
    pub fn dataset(&self, batches: &[BatchId]) -> JobDraft {
        self.job(
            "curate",
            JobDraft {
                curate: Some(CurateDraft {
                    batches: batches.iter().map(ToString::to_string).collect(),
                    ..self.dataset.clone()
                }),
                ..JobDraft::default()
            },
        )
    }

    /// The job that trains on `dataset`, held against the rollouts of the base model in `by_base`.
    pub fn train(&self, dataset: &DatasetRef, by_base: &BatchId) -> JobDraft {
        self.job(
            "train",
            JobDraft {
                train: Some(TrainDraft {
                    dataset: Some(dataset.to_string()),
                    agreement: vec![by_base.to_string()],
                    ..self.train.clone()
                }),
                ..JobDraft::default()
            },
        )
    }

    /// The job that compares, and plots the losses of `training`.
    pub fn comparison(&self, models: [&Compared; 2], training: &str) -> JobDraft {
        let mut draft = self.compare.clone();
        for (arm, of) in draft.arms.iter_mut().zip(models) {
            arm.model = Some(of.model.clone());
            arm.adapter = of.adapter.as_ref().map(ToString::to_string);
            arm.batches = vec![of.batch.to_string()];
        }
        draft.trainings = vec![training.to_owned()];
        self.job(
            crate::evaluate::JOB,
            JobDraft {
                compare: Some(draft),
                ..JobDraft::default()
            },
        )
    }

    fn job(&self, id: &str, draft: JobDraft) -> JobDraft {
        JobDraft {
            id: Some(id.to_owned()),
            labels: [(LABEL.to_owned(), self.name.to_string())].into(),
            ..draft
        }
    }

    /// What is to be done, for records and for those who look on.
    ///
    /// # Errors
    /// A rollout cannot be read back.
    pub fn plan(&self, config: &Config, now: Timestamp) -> Result<PipelinePlan, FieldError> {
        let evaluation = work_of_rollouts(&self.evaluation)?;
        let rollouts = |step, jobs: &[v1::JobSpec], work| PlannedStep {
            step,
            work,
            tasks: tasks(jobs),
            jobs: jobs.len() as u64,
            again: 0,
        };
        let one = |step, work| PlannedStep {
            step,
            work,
            tasks: 0,
            jobs: u64::from(step != Step::Publish),
            again: 0,
        };
        let mut steps = vec![rollouts(
            Step::Baseline,
            &self.evaluation,
            evaluation.clone(),
        )];
        if let Some(probe) = &self.probe {
            steps.push(rollouts(Step::Probe, probe, work_of_rollouts(probe)?));
        }
        steps.extend([
            rollouts(
                Step::Rollouts,
                &self.rollouts,
                work_of_rollouts(&self.rollouts)?,
            ),
            one(Step::Dataset, work(&self.dataset)),
            one(Step::Train, work(&self.train)),
            rollouts(Step::Evaluation, &self.evaluation, evaluation),
            one(Step::Comparison, work(&self.compare)),
            one(Step::Publish, work(&(self.publish, config.gate))),
        ]);
        Ok(PipelinePlan {
            plan_version: PIPELINE_PLAN_VERSION,
            pipeline: self.name.clone(),
            base: config.base.clone(),
            model: config.model.clone(),
            rounds: config.rounds,
            steps,
            prices: config.evaluate.prices,
            min_share: config.rollouts.min_share,
            currency: config
                .evaluate
                .currency
                .clone()
                .unwrap_or_else(|| "USD".to_owned()),
            created_at_us: now,
        })
    }
}

/// The comparison, but for what is compared.
fn compare(config: &Config) -> CompareDraft {
    let evaluate = &config.evaluate;
    let arm = |n: usize| CompareArmDraft {
        label: evaluate.labels.get(n).cloned(),
        prompt_price: evaluate.prices.map(|prices| prices.prompt),
        completion_price: evaluate.prices.map(|prices| prices.completion),
        ..CompareArmDraft::default()
    };
    CompareDraft {
        arms: vec![arm(0), arm(1)],
        trainings: Vec::new(),
        traces: evaluate.traces,
        currency: evaluate.currency.clone(),
        min_difference: config.gate.min_difference,
        min_tasks: config.gate.min_tasks,
        turns: None,
    }
}

/// The task of a rollout.
pub fn task(job: &v1::JobSpec) -> &str {
    job.rollout.as_ref().map_or("", |rollout| rollout.task_id())
}

fn tasks(jobs: &[v1::JobSpec]) -> u64 {
    jobs.iter().map(task).collect::<BTreeSet<_>>().len() as u64
}

fn work_of_rollouts(jobs: &[v1::JobSpec]) -> Result<String, FieldError> {
    let drafts: Result<Vec<JobDraft>, _> = jobs.iter().cloned().map(draft_from_wire).collect();
    Ok(work(&drafts?))
}

/// SHA-256 of what is done, as JSON without white space and with sorted keys.
fn work(draft: &impl Serialize) -> String {
    let mut canonical = json!(draft);
    canonical.sort_all_objects();
    sha256_hex(canonical.to_string().as_bytes())
}

/// The job of a batch of one, as it is submitted.
pub fn alone(draft: &JobDraft) -> Vec<v1::JobSpec> {
    vec![draft_to_wire(draft)]
}

/// The label of jobs that are expanded from tasks.
pub fn labels(name: &PipelineName) -> BTreeMap<String, String> {
    [(LABEL.to_owned(), name.to_string())].into()
}
