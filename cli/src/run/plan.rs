//! Which steps a pipeline has, what each is called, and which of them can begin: all of it from the plan and the records of
//! steps that have ended. Pure; whoever runs a pipeline and whoever only looks on ask the same.

use std::collections::{BTreeMap, HashMap};

use espalier_core::id::BatchId;
use espalier_core::pipeline::{PipelinePlan, Step, StepDigest, StepOutput, StepRecord};
use espalier_core::spec::{AdapterRef, DatasetRef};

use super::drafts::Compared;

/// A step of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct At {
    /// The round, from 1.
    pub round: u32,
    /// The step.
    pub step: Step,
}

/// A step that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// What it came to.
    pub record: StepRecord,
    /// SHA-256 of the record as it is stored, in hex.
    pub sha256: String,
}

/// Steps that have ended, by their names.
pub type Records = BTreeMap<StepDigest, Known>;

/// A step that can begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Which.
    pub at: At,
    /// What it is called.
    pub digest: StepDigest,
    /// SHA-256 of the records that it takes as input.
    pub inputs: Vec<String>,
    /// What is to be done.
    pub work: Work,
}

/// What is to be done, with all that other steps left for it.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Tasks are tried.
    Rollouts {
        /// By this model.
        model: String,
        /// The version that must be served first, where it is one of ours.
        adapter: Option<AdapterRef>,
        /// But for these.
        dropped: Vec<String>,
    },
    /// Traces become a data set.
    Dataset {
        /// Where they are.
        batches: Vec<BatchId>,
    },
    /// A data set becomes an adapter.
    Train {
        /// The data set.
        dataset: DatasetRef,
        /// Rollouts by the base model, against which the training is held.
        by_base: BatchId,
    },
    /// Two models are compared.
    Comparison {
        /// The one before.
        before: Compared,
        /// The one after.
        after: Compared,
        /// The batch of its training.
        training: BatchId,
    },
    /// A version becomes `latest`, or does not.
    Publish {
        /// The version.
        adapter: AdapterRef,
        /// The model that it was measured against.
        against: String,
        /// The batch of the comparison.
        comparison: BatchId,
        /// Whether its gate passes.
        passed: bool,
        /// What it says.
        verdict: String,
    },
}

/// How a pipeline ends in good order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Every round was gone.
    Complete,
    /// The gate of a round stayed shut, and it was not the last.
    GateShut {
        /// The round.
        round: u32,
    },
    /// The model solves every training task every time.
    AllSolved {
        /// The round.
        round: u32,
    },
}

/// The plan and what is known of it.
#[derive(Debug)]
pub struct Resolved<'a> {
    plan: &'a PipelinePlan,
    digests: HashMap<At, StepDigest>,
    known: HashMap<At, &'a Known>,
}

impl At {
    const fn new(round: u32, step: Step) -> Self {
        Self { round, step }
    }
}

/// Every step of `plan`, in order.
pub fn steps(plan: &PipelinePlan) -> Vec<At> {
    let has = |step| match step {
        Step::Probe => plan.step(Step::Probe).is_some(),
        _ => true,
    };
    let round = |round: u32| {
        let of_round = Step::ALL.into_iter().filter(move |step| match step {
            // The evaluation of the round before is this round's.
            Step::Baseline => round == 1,
            step => has(*step),
        });
        of_round.map(move |step| At::new(round, step))
    };
    (1..=plan.rounds).flat_map(round).collect()
}

impl<'a> Resolved<'a> {
    /// Names every step whose inputs have ended.
    pub fn new(plan: &'a PipelinePlan, records: &'a Records) -> Self {
        let mut resolved = Self {
            plan,
            digests: HashMap::new(),
            known: HashMap::new(),
        };
        for at in steps(plan) {
            let Some(digest) = resolved.name(at) else {
                continue;
            };
            if let Some(known) = records.get(&digest) {
                resolved.known.insert(at, known);
            }
            resolved.digests.insert(at, digest);
        }
        resolved
    }

    /// What a step is called; none while something that it takes as input has not ended.
    pub fn digest(&self, at: At) -> Option<&StepDigest> {
        self.digests.get(&at)
    }

    /// What a step came to.
    pub fn record(&self, at: At) -> Option<&'a StepRecord> {
        self.known.get(&at).map(|known| &known.record)
    }

    /// Steps that have not ended and can begin, in order.
    pub fn ready(&self) -> Vec<Order> {
        let open = steps(self.plan)
            .into_iter()
            .filter(|at| !self.known.contains_key(at) && self.is_open(at.round));
        open.filter_map(|at| self.order(at)).collect()
    }

    /// How it ended; none: it goes on.
    pub fn end(&self) -> Option<End> {
        for round in 1..=self.plan.rounds {
            let probed = self.record(At::new(round, Step::Probe));
            if let Some(StepOutput::Probe { dropped, .. }) = probed.map(|record| &record.output)
                && self.is_all(dropped)
            {
                return Some(End::AllSolved { round });
            }
            self.record(At::new(round, Step::Publish))?;
            if !self.has_passed(round) && round < self.plan.rounds {
                return Some(End::GateShut { round });
            }
        }
        Some(End::Complete)
    }

    /// Whether the gate of a round let its version pass.
    pub fn has_passed(&self, round: u32) -> bool {
        let compared = self.record(At::new(round, Step::Comparison));
        matches!(
            compared.map(|record| &record.output),
            Some(StepOutput::Comparison { passed: true, .. })
        )
    }

    /// The version that a round trained.
    pub fn adapter(&self, round: u32) -> Option<&'a AdapterRef> {
        self.record(At::new(round, Step::Train))?.adapter()
    }

    fn is_all(&self, dropped: &[String]) -> bool {
        let tasks = self.plan.step(Step::Rollouts).map_or(0, |step| step.tasks);
        dropped.len() as u64 >= tasks
    }

    /// A round begins when the one before has ended well.
    fn is_open(&self, round: u32) -> bool {
        let before = round - 1;
        before == 0
            || (self.has_passed(before) && self.record(At::new(before, Step::Publish)).is_some())
    }

    fn name(&self, at: At) -> Option<StepDigest> {
        let planned = self.plan.step(at.step)?;
        let inputs = self.inputs(at)?;
        let inputs: Vec<&str> = inputs.iter().map(|known| known.sha256.as_str()).collect();
        let model = self.model(at)?;
        let mut work = planned.content();
        if at.step == Step::Publish {
            work.push_str(match self.has_passed(at.round) {
                true => ", passed",
                false => ", shut",
            });
        }
        Some(StepDigest::of(at.step, &work, model.as_deref(), &inputs))
    }

    /// The model that tries the tasks of a step; none inside: it tries none.
    fn model(&self, at: At) -> Option<Option<String>> {
        let of_round = match at.step {
            Step::Baseline | Step::Probe | Step::Rollouts => at.round - 1,
            Step::Evaluation => at.round,
            _ => return Some(None),
        };
        match of_round {
            0 => Some(Some(self.plan.model.clone())),
            round => Some(Some(self.adapter(round)?.to_string())),
        }
    }

    /// The records that a step takes as input; none: one of them is not there.
    fn inputs(&self, at: At) -> Option<Vec<&'a Known>> {
        let At { round, step } = at;
        let mut wanted = Vec::new();
        match step {
            Step::Baseline | Step::Serve => {}
            Step::Probe => wanted.extend(self.training_before(round)),
            Step::Rollouts => {
                wanted.extend(self.training_before(round));
                let probe = self.plan.step(Step::Probe);
                wanted.extend(probe.map(|_| At::new(round, Step::Probe)));
            }
            Step::Dataset => wanted.extend((1..=round).map(|n| At::new(n, Step::Rollouts))),
            Step::Train => wanted.push(At::new(round, Step::Dataset)),
            Step::Evaluation => wanted.push(At::new(round, Step::Train)),
            Step::Comparison => wanted.extend([
                before(round),
                At::new(round, Step::Evaluation),
                At::new(round, Step::Train),
            ]),
            Step::Publish => {
                // It begins with the comparison, and is named by what decides it: a report that only reads otherwise must not
                // publish again what somebody has taken back since.
                self.record(At::new(round, Step::Comparison))?;
                wanted.extend([
                    before(round),
                    At::new(round, Step::Evaluation),
                    At::new(round, Step::Train),
                ]);
            }
        }
        wanted
            .iter()
            .map(|at| self.known.get(at).copied())
            .collect()
    }

    fn training_before(&self, round: u32) -> Option<At> {
        (round > 1).then(|| At::new(round - 1, Step::Train))
    }

    fn order(&self, at: At) -> Option<Order> {
        let inputs = self.inputs(at)?;
        Some(Order {
            at,
            digest: self.digest(at)?.clone(),
            inputs: inputs.iter().map(|known| known.sha256.clone()).collect(),
            work: self.work(at)?,
        })
    }

    fn work(&self, at: At) -> Option<Work> {
        let round = at.round;
        let record = |step| self.record(At::new(round, step));
        match at.step {
            Step::Serve => None,
            Step::Baseline | Step::Probe | Step::Rollouts | Step::Evaluation => {
                let probed = record(Step::Probe).filter(|_| at.step == Step::Rollouts);
                let dropped = match probed.map(|record| &record.output) {
                    Some(StepOutput::Probe { dropped, .. }) => dropped.clone(),
                    _ => Vec::new(),
                };
                let is_ours = at.step == Step::Evaluation || round > 1;
                let of_round = round - u32::from(at.step != Step::Evaluation);
                Some(Work::Rollouts {
                    model: self.model(at)??,
                    adapter: is_ours.then(|| self.adapter(of_round)).flatten().cloned(),
                    dropped,
                })
            }
            Step::Dataset => {
                let batch = |n| self.batch(At::new(n, Step::Rollouts));
                let batches: Option<Vec<BatchId>> = (1..=round).map(batch).collect();
                batches.map(|batches| Work::Dataset { batches })
            }
            Step::Train => match &record(Step::Dataset)?.output {
                StepOutput::Dataset { dataset, .. } => Some(Work::Train {
                    dataset: dataset.clone(),
                    // Every round trains the base, and only the first one's rollouts are by it. They are in every data set,
                    // so that the step's name follows from them.
                    by_base: self.batch(At::new(1, Step::Rollouts))?,
                }),
                _ => None,
            },
            Step::Comparison => Some(Work::Comparison {
                before: self.compared(before(round))?,
                after: self.compared(At::new(round, Step::Evaluation))?,
                training: self.batch(At::new(round, Step::Train))?,
            }),
            Step::Publish => match &record(Step::Comparison)?.output {
                StepOutput::Comparison {
                    passed, verdict, ..
                } => Some(Work::Publish {
                    adapter: self.adapter(round)?.clone(),
                    against: self.compared(before(round))?.model,
                    comparison: self.batch(At::new(round, Step::Comparison))?,
                    passed: *passed,
                    verdict: verdict.clone(),
                }),
                _ => None,
            },
        }
    }

    fn batch(&self, at: At) -> Option<BatchId> {
        self.record(at)?.batch.clone()
    }

    /// The model whose rollouts a step made.
    fn compared(&self, at: At) -> Option<Compared> {
        Some(Compared {
            model: self.model(at)??,
            adapter: match at.step {
                Step::Evaluation => self.adapter(at.round).cloned(),
                _ => None,
            },
            batch: self.batch(at)?,
        })
    }
}

/// Where the rollouts of the model before are.
fn before(round: u32) -> At {
    match round {
        1 => At::new(1, Step::Baseline),
        round => At::new(round - 1, Step::Evaluation),
    }
}

#[cfg(test)]
pub mod tests {
    use espalier_core::compare::Estimate;
    use espalier_core::pipeline::{
        PIPELINE_PLAN_VERSION, PlannedStep, ProbeBuckets, STEP_RECORD_VERSION, StepCounts,
    };
    use espalier_core::time::Timestamp;
    use espalier_core::trace::sha256_hex;

    use super::*;

    /// A plan of `rounds` over three training tasks, with a probe where it is wanted.
    pub fn plan(rounds: u32, probe: bool) -> PipelinePlan {
        let planned = |step: Step| PlannedStep {
            step,
            work: format!("work of {step}"),
            tasks: 3,
            jobs: 12,
            again: 0,
        };
        let wanted = |step: &Step| *step != Step::Serve && (probe || *step != Step::Probe);
        PipelinePlan {
            plan_version: PIPELINE_PLAN_VERSION,
            pipeline: "shop".parse().unwrap(),
            base: "Qwen/Qwen3-4B".to_owned(),
            model: "qwen".to_owned(),
            rounds,
            steps: Step::ALL.into_iter().filter(wanted).map(planned).collect(),
            prices: None,
            min_share: 0.9,
            currency: "USD".to_owned(),
            created_at_us: Timestamp(1),
        }
    }

    fn estimate(value: f64) -> Estimate {
        Estimate {
            value,
            low: value,
            high: value,
        }
    }

    /// What a step leaves in these tests.
    fn output(order: &Order, passed: bool) -> StepOutput {
        let n = order.at.round;
        let version = format!("shop@v{n}");
        match &order.work {
            Work::Rollouts { .. } if order.at.step == Step::Probe => StepOutput::Probe {
                tasks: ProbeBuckets::default(),
                dropped: vec!["easy".to_owned()],
            },
            Work::Rollouts { .. } => StepOutput::Rollouts,
            Work::Dataset { .. } => StepOutput::Dataset {
                dataset: version.parse().unwrap(),
                sha256: String::new(),
                train_rows: 1,
                eval_rows: 1,
                tokens: 1,
            },
            Work::Train { .. } => StepOutput::Adapter {
                adapter: version.parse().unwrap(),
                sha256: String::new(),
                steps: 1,
                tokens: 1,
                loss: 1.0,
                eval_loss: None,
                agreement: None,
            },
            Work::Comparison { .. } => StepOutput::Comparison {
                report: "r".to_owned(),
                sha256: String::new(),
                tasks: 30,
                before: estimate(0.25),
                after: estimate(0.75),
                difference: estimate(0.5),
                passed,
                verdict: "because".to_owned(),
            },
            Work::Publish {
                adapter,
                passed: true,
                ..
            } => StepOutput::Published {
                adapter: adapter.clone(),
                canary: None,
                seq: 1,
            },
            Work::Publish { verdict, .. } => StepOutput::Unpublished {
                why: verdict.clone(),
            },
        }
    }

    /// That a step ended.
    pub fn known(plan: &PipelinePlan, order: &Order, passed: bool) -> Known {
        let batch = order
            .digest
            .batch(&plan.pipeline, order.at.step, 1)
            .unwrap();
        let record = StepRecord {
            record_version: STEP_RECORD_VERSION,
            pipeline: plan.pipeline.clone(),
            digest: order.digest.clone(),
            step: order.at.step,
            round: order.at.round,
            batch: (order.at.step != Step::Publish).then_some(batch),
            inputs: order.inputs.clone(),
            started_at_us: Timestamp(1_000_000),
            ended_at_us: Timestamp(61_000_000),
            counts: StepCounts {
                jobs: 12,
                succeeded: 11,
                dead: 1,
                solved: 5,
                judged: 10,
                prompt_tokens: 1_000_000,
                completion_tokens: 234_567,
            },
            output: output(order, passed),
        };
        let sha256 = sha256_hex(&serde_json::to_vec(&record).unwrap());
        Known { record, sha256 }
    }

    /// Runs a plan to its end, where the gate of each round says what `gates` has; gives the steps of each moment.
    pub fn played(plan: &PipelinePlan, gates: &[bool]) -> (Records, Vec<Vec<String>>) {
        let (mut records, mut moments) = (Records::new(), Vec::new());
        loop {
            let resolved = Resolved::new(plan, &records);
            if resolved.end().is_some() {
                return (records, moments);
            }
            let ready = resolved.ready();
            assert!(!ready.is_empty(), "nothing can begin: {moments:?}");
            let named = |order: &Order| format!("{} {}", order.at.round, order.at.step);
            moments.push(ready.iter().map(named).collect());
            for order in &ready {
                let passed = gates[order.at.round as usize - 1];
                records.insert(order.digest.clone(), known(plan, order, passed));
            }
        }
    }

    #[test]
    fn steps_begin_when_what_they_take_is_there() {
        let (_, moments) = played(&plan(1, true), &[true]);
        assert_eq!(
            moments,
            [
                vec!["1 baseline", "1 probe"],
                vec!["1 rollouts"],
                vec!["1 dataset"],
                vec!["1 train"],
                vec!["1 evaluation"],
                vec!["1 comparison"],
                vec!["1 publish"],
            ]
        );
    }

    #[test]
    fn a_round_begins_with_the_adapter_of_the_one_before_and_measures_nothing_twice() {
        let plan = plan(2, false);
        let (records, moments) = played(&plan, &[true, true]);
        let second: Vec<&String> = moments.iter().flatten().skip(7).collect();
        assert_eq!(
            second,
            [
                "2 rollouts",
                "2 dataset",
                "2 train",
                "2 evaluation",
                "2 comparison",
                "2 publish"
            ]
        );
        let resolved = Resolved::new(&plan, &records);
        let order = |round, step| resolved.order(At::new(round, step)).unwrap();
        let Work::Rollouts { model, adapter, .. } = order(2, Step::Rollouts).work else {
            panic!()
        };
        assert_eq!(model, "shop@v1");
        assert_eq!(adapter.unwrap().to_string(), "shop@v1");
        let Work::Dataset { batches } = order(2, Step::Dataset).work else {
            panic!()
        };
        assert_eq!(batches.len(), 2, "of all rounds");
        let rollouts = resolved.record(At::new(1, Step::Rollouts)).unwrap();
        for round in [1, 2] {
            let Work::Train { by_base, .. } = order(round, Step::Train).work else {
                panic!()
            };
            assert_eq!(Some(by_base), rollouts.batch, "round {round}");
        }
        let Work::Comparison { before, after, .. } = order(2, Step::Comparison).work else {
            panic!()
        };
        let evaluated = resolved.record(At::new(1, Step::Evaluation)).unwrap();
        assert_eq!(Some(before.batch), evaluated.batch);
        assert_eq!((&*before.model, &*after.model), ("shop@v1", "shop@v2"));
        let Work::Comparison { before, .. } = order(1, Step::Comparison).work else {
            panic!()
        };
        assert_eq!((&*before.model, before.adapter), ("qwen", None));
    }

    #[test]
    fn a_shut_gate_ends_the_rounds() {
        let two = plan(2, false);
        let (records, moments) = played(&two, &[false, true]);
        assert_eq!(moments.last().unwrap(), &["1 publish"]);
        let resolved = Resolved::new(&two, &records);
        assert_eq!(resolved.end(), Some(End::GateShut { round: 1 }));
        assert!(!resolved.has_passed(1) && resolved.ready().is_empty());
        let one = plan(1, false);
        let (records, _) = played(&one, &[false]);
        assert_eq!(Resolved::new(&one, &records).end(), Some(End::Complete));
    }

    #[test]
    fn tasks_that_are_always_solved_teach_nothing() {
        let plan = plan(1, true);
        let mut records = Records::new();
        for order in Resolved::new(&plan, &records.clone()).ready() {
            records.insert(order.digest.clone(), known(&plan, &order, true));
        }
        let resolved = Resolved::new(&plan, &records);
        let Work::Rollouts { dropped, .. } = &resolved.ready()[0].work else {
            panic!()
        };
        assert_eq!(dropped, &["easy"]);
        for known in records.values_mut() {
            if let StepOutput::Probe { dropped, .. } = &mut known.record.output {
                *dropped = ["a", "b", "c"].map(str::to_owned).to_vec();
            }
        }
        let end = Resolved::new(&plan, &records).end();
        assert_eq!(end, Some(End::AllSolved { round: 1 }));
    }

    #[test]
    fn a_gate_that_says_otherwise_is_heeded() {
        let plan = plan(1, false);
        let (mut records, _) = played(&plan, &[true]);
        let publish = At::new(1, Step::Publish);
        let before = Resolved::new(&plan, &records).digest(publish).cloned();
        let shut = records.values_mut().find_map(|known| {
            let StepOutput::Comparison { passed, .. } = &mut known.record.output else {
                return None;
            };
            *passed = false;
            Some(())
        });
        assert!(shut.is_some());
        let resolved = Resolved::new(&plan, &records);
        assert_eq!((resolved.end(), resolved.ready().len()), (None, 1));
        assert_ne!(resolved.digest(publish), before.as_ref());
    }

    #[test]
    fn a_change_runs_again_what_depends_on_it_and_nothing_else() {
        let plan = plan(2, true);
        let (records, moments) = played(&plan, &[true, true]);
        let all = moments.iter().flatten().count();
        for (step, again) in [
            (Step::Baseline, 3),
            (Step::Probe, all - 1),
            (Step::Rollouts, all - 2),
            (Step::Train, 4 + 7),
            // A report that reads otherwise publishes nothing again.
            (Step::Comparison, 2),
            (Step::Publish, 2),
        ] {
            let mut changed = plan.clone();
            for planned in changed.steps.iter_mut().filter(|p| p.step == step) {
                planned.work.push_str(", changed");
            }
            let mut seen = records.clone();
            let before = seen.len();
            loop {
                let resolved = Resolved::new(&changed, &seen);
                if resolved.end().is_some() {
                    break;
                }
                for order in resolved.ready() {
                    seen.insert(order.digest.clone(), known(&changed, &order, true));
                }
            }
            assert_eq!(seen.len() - before, again, "{step}");
        }
    }
}
