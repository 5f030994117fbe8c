//! What an agent worker does with a granted comparison, in its `cpu` slots: take over a result that is there already, or
//! compare the rollouts of two arms and publish a report.
//!
//! ```text
//! store ─► gather: each trace once ─► espalier_core::compare ─► report.json, report.md, report.html ─► manifest
//!                                   └► the pairs that are shown, again ─┘
//! ```
//! Every number is `core`'s; what is here reads, and writes for people. What models, tools and pages said is shown as text
//! and nothing else: see [`write`].

mod error;
mod gather;
mod page;
mod talk;
mod turns;
mod write;

use std::sync::Arc;

use bytes::Bytes;
use espalier_core::compare::{
    self, Both, CompareSummary, LossCurve, MARKDOWN_FILE, METHOD, PAGE_FILE, Pair, Pairs,
    REPORT_FILE, REPORT_VERSION, Report, ShownPair, Side,
};
use espalier_core::id::{BatchId, JobId, JobKey};
use espalier_core::layout;
use espalier_core::spec::CompareSpec;
use espalier_core::time::Timestamp;
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Summary, sha256_hex};
use espalier_proto::v1;
use espalier_runtime::clock::Clock;
use espalier_runtime::publish::{
    self, ByLease, Claim, PublishError, Published, patiently, stopped_outcome,
};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome};
use serde::Deserialize;

use error::CompareError;
use gather::{Gathered, Gatherer, sides};
use talk::Talk;

/// Largest file of steps that is read, in bytes: a million steps.
const STEPS_BYTES_MAX: u64 = 512 << 20;
/// Most points of a curve in a report: more are not told apart.
const CURVE_POINTS_MAX: usize = 2_000;

/// Makes comparisons.
pub(crate) struct CompareHandler {
    store: Store,
    clock: Arc<dyn Clock>,
}

impl CompareHandler {
    pub(crate) fn new(store: Store, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock }
    }

    async fn attempt(
        &self,
        grant: &Grant,
        context: &JobContext,
    ) -> Result<Published, CompareError> {
        let compare = grant.spec.compare().ok_or(CompareError::NoComparison)?;
        let spec = publish::spec_digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&spec),
        };
        let max_runtime = grant.spec.max_runtime;
        let adopted = publish::adopt(&self.store, claim, max_runtime, context).await?;
        if let Some(published) = adopted {
            return Ok(published);
        }
        let made = match compare.turns {
            true => self.compare_turns(grant, compare, context).await?,
            false => {
                let (report, talks) = self.compare(grant, compare, context).await?;
                made(report, talks).await?
            }
        };
        context.lease().publishing();
        let files = self.write(grant, made.files).await?;
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: Some(spec.clone()),
            created_at_us: made.created_at,
            files,
            parents: parents(grant, compare),
            summary: Summary::Compare(made.summary),
        };
        let gate = ByLease(context);
        Ok(publish::create(&self.store, claim, &manifest, &gate).await?)
    }

    /// Reads both arms and the pairs that are shown, and compares.
    async fn compare(
        &self,
        grant: &Grant,
        spec: &CompareSpec,
        context: &JobContext,
    ) -> Result<(Report, Vec<Both<Talk>>), CompareError> {
        let gatherer = Gatherer {
            key: &grant.key,
            store: &self.store,
            context,
        };
        let mut gathered = gatherer.gather(spec).await?;
        let losses = self.losses(grant, spec).await?;
        let arms = Both::of(|side| gathered.arms.at(side).in_report());
        let pairs = pairs(&mut gathered);
        let prices = Both::of(|side| spec.arms.at(side).prices);
        let comparison = compare::compare(&pairs, &prices).map_err(|why| CompareError::Empty {
            before: arms.before.label.clone(),
            after: arms.after.label.clone(),
            found_before: arms.before.rollouts,
            found_after: arms.after.rollouts,
            why,
        })?;
        let order = compare::order_for_reading(&pairs.pairs);
        let shown: Vec<&Pair> = order
            .into_iter()
            .take(spec.traces)
            .map(|n| &pairs.pairs[n])
            .collect();
        let mut talks = Vec::with_capacity(shown.len());
        for pair in &shown {
            talks.push(Both {
                before: Talk::of(&gatherer.load(&pair.before.job).await?),
                after: Talk::of(&gatherer.load(&pair.after.job).await?),
            });
        }
        let lines = gathered.sources.iter();
        let lines: String = lines
            .map(|source| format!("{}  {}\n", source.sha256, source.path))
            .collect();
        let report = Report {
            report_version: REPORT_VERSION,
            job: grant.key.to_string(),
            created_at_us: self.clock.now(),
            gate: compare::judge(&comparison, spec.gate),
            arms,
            comparison,
            method: METHOD.to_owned(),
            currency: spec.currency.clone(),
            shown: shown.into_iter().map(shown_pair).collect(),
            losses,
            sources_sha256: sha256_hex(lines.as_bytes()),
            sources: gathered.sources.into_iter().collect(),
        };
        Ok((report, talks))
    }

    /// The losses of the trainings that the job names.
    async fn losses(
        &self,
        grant: &Grant,
        spec: &CompareSpec,
    ) -> Result<Vec<LossCurve>, CompareError> {
        let mut losses = Vec::new();
        for (batch, job) in &spec.trainings {
            losses.push(self.loss(grant, batch, job).await?);
        }
        Ok(losses)
    }

    async fn loss(
        &self,
        grant: &Grant,
        batch: &BatchId,
        job: &JobId,
    ) -> Result<LossCurve, CompareError> {
        let key = JobKey::new(grant.key.project.clone(), batch.clone(), job.clone());
        let name = format!("{batch}/{job}");
        let fail = |reason: String| CompareError::Training {
            job: name.clone(),
            reason,
        };
        let get = |path: String| {
            let (store, key) = (&self.store, &grant.key);
            async move {
                let get = || async { Ok::<_, CompareError>(store.get(&path).await?) };
                patiently(key, "training", get).await
            }
        };
        let manifest = match get(layout::manifest(&key)).await {
            Err(CompareError::Store(error)) if error.is_not_found() => {
                return Err(fail("nothing is published".to_owned()));
            }
            other => Manifest::parse(&other?, &key)?,
        };
        let path = layout::training_steps(&key, manifest.fence);
        let file = manifest.files.iter().find(|file| file.path == path);
        let file = file.ok_or_else(|| fail("its manifest names none".to_owned()))?;
        if file.size > STEPS_BYTES_MAX {
            return Err(fail(format!("they have {} bytes", file.size)));
        }
        let bytes = get(path).await?;
        if !file.holds(&bytes) {
            return Err(fail("they are not what its manifest names".to_owned()));
        }
        let curve = blocking("compare.steps", move || curve(name, &bytes)).await?;
        Ok(curve)
    }

    /// The same of scores of turns.
    async fn compare_turns(
        &self,
        grant: &Grant,
        spec: &CompareSpec,
        context: &JobContext,
    ) -> Result<Made, CompareError> {
        let gatherer = Gatherer {
            key: &grant.key,
            store: &self.store,
            context,
        };
        let report = gatherer.turns(spec, self.clock.now()).await?;
        let make = move || {
            Ok::<_, serde_json::Error>(Made {
                created_at: report.created_at_us,
                summary: turns::summary(&report),
                files: [
                    (REPORT_FILE, serde_json::to_vec_pretty(&report)?),
                    (MARKDOWN_FILE, turns::markdown(&report).into_bytes()),
                    (PAGE_FILE, turns::html(&report).into_bytes()),
                ],
            })
        };
        let made = blocking("compare.write", make).await?;
        made.map_err(CompareError::Encode)
    }

    /// Numbers, text and page, in the store.
    async fn write(
        &self,
        grant: &Grant,
        made: [(&'static str, Vec<u8>); 3],
    ) -> Result<Vec<FileEntry>, CompareError> {
        let folder = layout::report_files(&grant.key, grant.fence);
        let mut files = Vec::new();
        for (name, content) in made {
            let entry = FileEntry::of(format!("{folder}{name}"), &content);
            let content = Bytes::from(content);
            let put = || async {
                Ok::<_, CompareError>(self.store.put(&entry.path, content.clone()).await?)
            };
            patiently(&grant.key, "report", put).await?;
            files.push(entry);
        }
        Ok(files)
    }
}

/// A report as it is stored.
struct Made {
    created_at: Timestamp,
    summary: CompareSummary,
    files: [(&'static str, Vec<u8>); 3],
}

async fn made(report: Report, talks: Vec<Both<Talk>>) -> Result<Made, CompareError> {
    let make = move || {
        Ok::<_, serde_json::Error>(Made {
            created_at: report.created_at_us,
            summary: report.summary(),
            files: [
                (REPORT_FILE, serde_json::to_vec_pretty(&report)?),
                (MARKDOWN_FILE, write::markdown(&report, &talks).into_bytes()),
                (PAGE_FILE, page::html(&report, &talks).into_bytes()),
            ],
        })
    };
    let made = blocking("compare.write", make).await?;
    made.map_err(CompareError::Encode)
}

/// What the report was made from: batches, adapters, trainings. The report itself names each trace.
fn parents(grant: &Grant, spec: &CompareSpec) -> Vec<String> {
    let project = &grant.key.project;
    let mut parents: Vec<String> = Vec::new();
    for arm in Side::ALL.map(|side| spec.arms.at(side)) {
        let adapter = arm.adapter.iter();
        let adapter = adapter.map(|of| layout::adapter_version(project, &of.name, of.version));
        let batches = arm
            .batches
            .iter()
            .map(|batch| layout::batch(project, batch));
        parents.extend(adapter.chain(batches));
    }
    parents.extend(spec.trainings.iter().map(|(batch, job)| {
        let key = JobKey::new(project.clone(), batch.clone(), job.clone());
        layout::manifest(&key)
    }));
    let mut seen = std::collections::BTreeSet::new();
    parents.retain(|parent| seen.insert(parent.clone()));
    parents
}

/// The rollouts of both arms in pairs.
fn pairs(gathered: &mut Gathered) -> Pairs {
    let unreadable: Vec<u64> = sides(gathered).map(|arm| arm.unreadable).collect();
    let Both { before, after } = &mut gathered.arms;
    let before = std::mem::take(&mut before.rollouts);
    let after = std::mem::take(&mut after.rollouts);
    let mut pairs = compare::pair(before, after);
    if let [before, after] = unreadable[..] {
        pairs.left_out.unreadable = Both { before, after };
    }
    pairs
}

fn shown_pair(pair: &Pair) -> ShownPair {
    ShownPair {
        task: pair.before.task.clone(),
        kind: pair.before.kind.clone(),
        sample: pair.before.sample,
        solved: Both::of(|side| pair.solved(side)),
        jobs: Both::of(|side| {
            let job = &pair.at(side).job;
            format!("{}/{}", job.batch, job.job)
        }),
    }
}

/// The losses of a file of steps, thinned to what a report holds. A line that is no step is passed over.
fn curve(job: String, lines: &[u8]) -> LossCurve {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
        loss: f64,
        #[serde(default)]
        eval_loss: Option<f64>,
    }
    let lines = lines.split(|byte| *byte == b'\n');
    let steps: Vec<Step> = lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    let held_out = |step: &Step| Some((step.step, step.eval_loss?));
    LossCurve {
        job,
        train: thinned(steps.iter().map(|step| (step.step, step.loss)).collect()),
        eval: thinned(steps.iter().filter_map(held_out).collect()),
    }
}

/// Means of neighbours, each at the last of their steps: at most [`CURVE_POINTS_MAX`].
fn thinned(points: Vec<(u64, f64)>) -> Vec<(u64, f64)> {
    let each = points.len().div_ceil(CURVE_POINTS_MAX).max(1);
    let mean = |some: &[(u64, f64)]| {
        let (last, _) = *some.last()?;
        let sum: f64 = some.iter().map(|(_, loss)| loss).sum();
        Some((last, sum / some.len() as f64))
    };
    points.chunks(each).filter_map(mean).collect()
}

impl Handler for CompareHandler {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Compare
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        let stopped = context.lease().stopped();
        let attempt = Box::pin(self.attempt(&grant, &context));
        match stopped.run_until_cancelled(attempt).await {
            Some(Ok(published)) => published.into(),
            None | Some(Err(CompareError::Publish(PublishError::Stopped))) => {
                stopped_outcome(&context)
            }
            Some(Err(error)) => JobOutcome::failed(error.class(), error_chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_what_a_report_can_show() {
        let line = |n: u64| format!("{{\"step\":{n},\"loss\":{n},\"lr\":1}}\n");
        let few: String = (1..=3).map(line).collect();
        let few = few + "no step\n{\"step\":4,\"loss\":2.5,\"eval_loss\":0.5}\n";
        let found = curve("b/train".to_owned(), few.as_bytes());
        assert_eq!(found.train, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 2.5)]);
        assert_eq!(found.eval, [(4, 0.5)]);
        let many: String = (1..=10_000).map(line).collect();
        let found = curve(String::new(), many.as_bytes());
        assert_eq!(
            (found.train.len(), found.train[0]),
            (CURVE_POINTS_MAX, (5, 3.0))
        );
        assert_eq!(curve(String::new(), b"").train, []);
        let held_out = |n: u64| format!("{{\"step\":{n},\"loss\":1,\"eval_loss\":{n}}}\n");
        let many: String = (1..=10_000).map(held_out).collect();
        let found = curve(String::new(), many.as_bytes());
        assert_eq!(
            (found.eval.len(), found.eval[0]),
            (CURVE_POINTS_MAX, (5, 3.0))
        );
    }
}
