//! The rollouts of both arms, out of the store: each trace is read once, and what a comparison looks at is kept of it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use espalier_core::compare::{Both, ReportArm, Side, Source, Tried, Used};
use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::spec::{CompareArm, CompareSpec};
use espalier_core::trace::Decision;
use espalier_dataset::Filter;
use espalier_runtime::publish::patiently;
use espalier_runtime::store::Store;
use espalier_runtime::traces::{Listed, Loaded, Traces, TracesError};
use espalier_runtime::worker::JobContext;
use futures::{StreamExt, stream};

use super::error::CompareError;

/// Traces read at once: hides the latency of a store, and bounds memory by as many traces.
const READS_MAX: usize = 4;
/// How often people are told how far a job is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Models and adapters that a report names for an arm.
const NAMES_MAX: usize = 32;

/// What is known of an arm once its rollouts are read.
pub(super) struct Arm {
    spec: CompareArm,
    filter: Option<Filter>,
    pub(super) rollouts: Vec<Tried>,
    pub(super) unreadable: u64,
    /// Rollouts whose servers were recordings.
    replayed: u64,
    models: BTreeSet<String>,
    adapters: BTreeSet<String>,
}

/// What was read.
pub(super) struct Gathered {
    pub(super) arms: Both<Arm>,
    /// Every trace that is in an arm, by its path.
    pub(super) sources: BTreeSet<Source>,
}

/// Reads for one attempt.
pub(super) struct Gatherer<'a> {
    pub(super) key: &'a JobKey,
    pub(super) store: &'a Store,
    pub(super) context: &'a JobContext,
}

impl Gatherer<'_> {
    /// Everything that the arms name.
    pub(super) async fn gather(&self, spec: &CompareSpec) -> Result<Gathered, CompareError> {
        let mut gathered = Gathered {
            arms: Both {
                before: Arm::new(&spec.arms.before).map_err(|e| e.under("compare.arms[0]"))?,
                after: Arm::new(&spec.arms.after).map_err(|e| e.under("compare.arms[1]"))?,
            },
            sources: BTreeSet::new(),
        };
        let items = self.items(spec).await?;
        let mut told = Instant::now();
        let read = |n: usize| self.read(&items[n]);
        let mut reads = stream::iter(0..items.len()).map(read).buffered(READS_MAX);
        let mut done = 0;
        while let Some(read) = reads.next().await {
            gathered.take(&items[done], read?);
            done += 1;
            if told.elapsed() >= PROGRESS_EVERY || done == 1 {
                told = Instant::now();
                let text = format!("reading {done}/{}", items.len());
                self.context.lease().progress(&text);
            }
        }
        Ok(gathered)
    }

    /// One trace again, to be shown.
    pub(super) async fn load(&self, job: &JobKey) -> Result<Loaded, CompareError> {
        let traces = self.traces();
        let listed = Listed {
            job: job.clone(),
            patches: 0,
        };
        let load = || async { Ok::<_, CompareError>(traces.load(&listed).await?) };
        patiently(self.key, "traces", load).await
    }

    /// The jobs of all batches, each once.
    pub(super) async fn items(&self, spec: &CompareSpec) -> Result<Vec<Listed>, CompareError> {
        let traces = self.traces();
        let (before, after) = (&spec.arms.before.batches, &spec.arms.after.batches);
        let mut items = Vec::new();
        for (n, batch) in before.iter().chain(after).enumerate() {
            if before.iter().chain(after).take(n).any(|b| b == batch) {
                continue;
            }
            let list = || async { Ok::<_, CompareError>(traces.list(Some(batch)).await?) };
            items.extend(patiently(self.key, "traces", list).await?);
        }
        // A result of its own is no rollout, and one that another attempt left is not there yet.
        items.retain(|listed| listed.job != *self.key);
        Ok(items)
    }

    /// What a job left; none where it is no rollout. What cannot be read says so.
    async fn read(&self, listed: &Listed) -> Result<Read, CompareError> {
        let traces = self.traces();
        let load = || async { Ok::<_, CompareError>(traces.load(listed).await?) };
        match patiently(self.key, "traces", load).await {
            Ok(loaded) => Ok(Read::Rollout(Box::new(loaded))),
            Err(CompareError::Traces(TracesError::NotPublished(_))) => Ok(Read::Other),
            Err(CompareError::Traces(TracesError::Store(error))) if error.is_not_found() => {
                Ok(Read::Unreadable)
            }
            Err(CompareError::Traces(error @ (TracesError::Store(_) | TracesError::Work(_)))) => {
                Err(error.into())
            }
            Err(CompareError::Traces(error)) => {
                tracing::warn!(job = %listed.job, %error, "a trace cannot be compared");
                Ok(Read::Unreadable)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn traces(&self) -> Traces {
        Traces::new(self.store.clone(), self.key.project.clone())
    }
}

/// What a job left.
enum Read {
    Rollout(Box<Loaded>),
    Unreadable,
    Other,
}

impl Gathered {
    fn take(&mut self, listed: &Listed, read: Read) {
        let loaded = match read {
            Read::Other => return,
            Read::Rollout(loaded) => loaded,
            // Which arm it would have been of its trace alone tells.
            Read::Unreadable => {
                for arm in [&mut self.arms.before, &mut self.arms.after] {
                    let is_named = arm.spec.batches.contains(&listed.job.batch);
                    arm.unreadable += u64::from(is_named);
                }
                return;
            }
        };
        let mut is_in = false;
        for arm in [&mut self.arms.before, &mut self.arms.after] {
            if arm.admits(&loaded) {
                arm.add(&loaded);
                is_in = true;
            }
        }
        if let Some(file) = loaded.manifest.trace_file().filter(|_| is_in) {
            self.sources.insert(Source {
                path: file.path.clone(),
                sha256: file.sha256.clone(),
                patches: loaded.curated.patches,
            });
        }
    }
}

impl Arm {
    fn new(spec: &CompareArm) -> Result<Self, FieldError> {
        let filter = spec.filter.as_deref().map(|text| {
            let read: Result<Filter, _> = text.parse();
            read.map_err(|error| FieldError::new("where", text, format!("is refused: {error}")))
        });
        Ok(Self {
            filter: filter.transpose()?,
            spec: spec.clone(),
            rollouts: Vec::new(),
            unreadable: 0,
            replayed: 0,
            models: BTreeSet::new(),
            adapters: BTreeSet::new(),
        })
    }

    /// Labels and all that a filter asks for are as people corrected them.
    fn admits(&self, loaded: &Loaded) -> bool {
        let header = &loaded.trace.header;
        let labels = loaded.curated.standing.labels_over(&header.labels);
        let has = |(name, value): (&String, &String)| labels.get(name) == Some(value);
        let spec = &self.spec;
        spec.batches.contains(&header.job.batch)
            && spec.labels.iter().all(has)
            && spec
                .model
                .as_ref()
                .is_none_or(|model| header.provenance.model == *model)
            && self.filter_admits(loaded)
    }

    fn filter_admits(&self, loaded: &Loaded) -> bool {
        let Some(filter) = &self.filter else {
            return true;
        };
        // Where a trace was split, its first conversation is that of its task.
        let traces = loaded.curated.traces(&loaded.trace);
        let source = traces.first().map(espalier_dataset::Source::of_trace);
        source.is_some_and(|source| {
            source.is_ok_and(|mut source| {
                source.facts.rejected = !loaded.curated.standing.is_wanted();
                filter.admits(&source)
            })
        })
    }

    fn add(&mut self, loaded: &Loaded) {
        let header = &loaded.trace.header;
        let names = |found: &mut BTreeSet<String>, name: String| {
            if found.len() < NAMES_MAX {
                found.insert(name);
            }
        };
        names(&mut self.models, header.provenance.model.clone());
        for call in &loaded.trace.model_calls {
            if let Some(adapter) = &call.adapter {
                let digest = adapter.sha256.as_deref();
                let digest = digest.map(|sha256| format!("#sha256:{sha256}"));
                let digest = digest.unwrap_or_default();
                names(&mut self.adapters, format!("{}{digest}", adapter.name));
            }
        }
        self.replayed += u64::from(!header.provenance.replay.is_empty());
        self.rollouts.extend(tried(loaded));
    }

    /// How a report names it.
    pub(super) fn in_report(&self) -> ReportArm {
        let spec = &self.spec;
        ReportArm {
            label: spec.label.clone(),
            models: self.models.iter().cloned().collect(),
            adapters: self.adapters.iter().cloned().collect(),
            adapter: spec.adapter.as_ref().map(ToString::to_string),
            batches: spec.batches.iter().map(ToString::to_string).collect(),
            rollouts: self.rollouts.len() as u64,
            replayed: self.replayed,
            prices: spec.prices,
        }
    }
}

/// What a comparison looks at; none where the manifest is of something else than the trace.
fn tried(loaded: &Loaded) -> Option<Tried> {
    let summary = loaded.manifest.summary.rollout()?;
    let header = &loaded.trace.header;
    let totals = &summary.totals;
    let was_not_run = |decision: Decision| {
        matches!(
            decision,
            Decision::Unknown | Decision::Malformed | Decision::OverLimit
        )
    };
    let invalid = loaded.trace.tool_calls.iter();
    let invalid = invalid.filter(|call| was_not_run(call.decision)).count();
    Some(Tried {
        job: loaded.manifest.job.clone(),
        task: header.task.task_id.clone().unwrap_or_default(),
        kind: header.task.task_kind.clone().unwrap_or_default(),
        sample: header.task.sample_index,
        solved: summary.solved(),
        stop: summary.stop.as_str().to_owned(),
        reason: summary.reason.clone(),
        used: Used {
            turns: totals.turns,
            invalid_calls: u32::try_from(invalid).unwrap_or(u32::MAX),
            prompt_tokens: totals.prompt_tokens,
            completion_tokens: totals.completion_tokens,
            wall_ms: totals.wall_ms,
        },
    })
}

/// Both arms, for loops.
pub(super) fn sides(gathered: &Gathered) -> impl Iterator<Item = &Arm> {
    Side::ALL.into_iter().map(|side| gathered.arms.at(side))
}
