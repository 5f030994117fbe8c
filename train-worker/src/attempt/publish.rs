//! The end of a training: the best weights, what tells how they came about, the manifest, and the version by which people
//! name them.

use std::path::Path;

use bytes::Bytes;
use espalier_core::adapter::{
    ADAPTER_RECORD_VERSION, AdapterKind, AdapterVersion, BaseModel, TrainSummary,
};
use espalier_core::layout;
use espalier_core::spec::{TrainData, TrainMethod, TrainSpec};
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Summary};
use espalier_runtime::publish::{self, Claim, Gate, PublishError, Published, patiently};
use espalier_runtime::store::{Created, LIST_MAX, OBJECT_BYTES_MAX, Store, StoreError};
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::Grant;
use serde_json::json;

use super::{Training, Workshop};
use crate::checkpoint::{Place, load};
use crate::engine::{Export, ExportTensor, ExportType};
use crate::error::TrainError;
use crate::report::History;

/// Numbers of one file of weights, in bytes; the rest of an object is for names and shapes.
pub(super) const SHARD_BYTES_MAX: u64 = OBJECT_BYTES_MAX - (16 << 20);
/// What a model's folder may hold beside its weights, and its copy too.
const BESIDE_WEIGHTS: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// A file of the result, by its name beside the others.
type Named = (String, Bytes);

/// What a method makes.
pub(super) fn kind_of(method: &TrainMethod) -> AdapterKind {
    match method {
        TrainMethod::Lora { .. } => AdapterKind::Lora,
        TrainMethod::Full => AdapterKind::Full,
    }
}

/// How a training goes, in the forms that people look at.
pub(super) struct Reports {
    steps: Bytes,
    plot: Bytes,
    events: Bytes,
}

impl Reports {
    pub(super) fn of(history: &History, name: &str, kind: AdapterKind) -> Self {
        Self {
            steps: Bytes::copy_from_slice(history.to_lines()),
            plot: history.to_plot(name, kind).into(),
            events: history.to_events().into(),
        }
    }

    fn files(&self, place: &Place) -> [(String, Bytes); 3] {
        let (key, fence) = (&place.key, place.fence);
        [
            (layout::training_steps(key, fence), self.steps.clone()),
            (layout::training_plot(key, fence), self.plot.clone()),
            (layout::training_events(key, fence), self.events.clone()),
        ]
    }

    /// While it runs: nothing depends on them then.
    pub(super) async fn store_for_people(&self, place: &Place) {
        for (path, content) in self.files(place) {
            if let Err(error) = place.store.put(&path, content).await {
                let error = error_chain(&error);
                tracing::warn!(job = %place.key, path, error, "a report is not stored");
            }
        }
    }
}

impl Workshop {
    /// Publishes the best weights of a training that is done.
    pub(super) async fn publish(
        &self,
        grant: &Grant,
        mut training: Training,
        claim: Claim<'_>,
        gate: &impl Gate,
    ) -> Result<Published, TrainError> {
        let best_step = training.take_best().await?;
        let files = training.export().await?;
        let folder = layout::adapter_files(&grant.key, grant.fence);
        let files = files
            .into_iter()
            .map(|(name, bytes)| (format!("{folder}{name}"), bytes));
        let kind = kind_of(&training.spec.settings.method);
        let reports = Reports::of(&training.history, training.spec.adapter.as_str(), kind);
        let mut entries = Vec::new();
        for (path, content) in files.chain(reports.files(&training.place)) {
            entries.push(store_file(&training.place, path, content).await?);
        }
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: claim.spec.cloned(),
            created_at_us: self.clock.now(),
            files: entries,
            parents: vec![training.base.parent(), training.dataset.clone()],
            summary: Summary::Train(training.summary(best_step)),
        };
        let published = publish::create(&self.store, claim, &manifest, gate).await?;
        if published.adopted {
            self.version_of_adopted(grant, &training.spec).await?;
        } else {
            self.version(grant, &training.spec, &manifest).await?;
        }
        Ok(published)
    }

    /// Sees to it that a result which an earlier attempt published has a version.
    pub(super) async fn version_of_adopted(
        &self,
        grant: &Grant,
        train: &TrainSpec,
    ) -> Result<(), TrainError> {
        let path = layout::manifest(&grant.key);
        let get = || async { self.store.get(&path).await };
        let read: Result<Bytes, StoreError> = patiently(&grant.key, "manifest", get).await;
        let manifest = Manifest::parse(&read?, &grant.key)?;
        self.version(grant, train, &manifest).await
    }

    /// Gives the result that `manifest` publishes the next version of its name, unless it has one.
    async fn version(
        &self,
        grant: &Grant,
        train: &TrainSpec,
        manifest: &Manifest,
    ) -> Result<(), TrainError> {
        let Some(training) = manifest.summary.train() else {
            return Err(TrainError::NoTraining);
        };
        let sha256 = manifest
            .parents
            .iter()
            .find_map(|p| BaseModel::sha256_of_parent(p));
        let folder = layout::adapter_files(&manifest.job, manifest.fence);
        let is_own = |file: &&FileEntry| file.path.starts_with(&folder);
        let mut record = AdapterVersion {
            record_version: ADAPTER_RECORD_VERSION,
            name: train.adapter.clone(),
            n: 0,
            kind: kind_of(&train.settings.method),
            job: manifest.job.clone(),
            fence: manifest.fence,
            created_at_us: manifest.created_at_us,
            base: BaseModel {
                name: train.base.clone(),
                revision: train.revision.clone(),
                sha256: sha256.unwrap_or_default().to_owned(),
            },
            dataset: dataset_path(grant, &train.data),
            training: training.clone(),
            files: manifest.files.iter().filter(is_own).cloned().collect(),
        };
        let reserve = || async { reserve(&self.store, &record).await };
        record.n = patiently(&grant.key, "version", reserve).await?;
        let (adapter, n) = (&record.name, record.n);
        tracing::info!(job = %grant.key, %adapter, n, "a version of an adapter is published");
        Ok(())
    }
}

/// Object path of what a job learns from.
fn dataset_path(grant: &Grant, data: &TrainData) -> String {
    let project = &grant.key.project;
    match data {
        TrainData::Dataset(dataset) => {
            layout::dataset_version(project, &dataset.name, dataset.version)
        }
        TrainData::Rows { train, .. } => layout::upload(project, train),
    }
}

/// The number of the version that `record` becomes: the one that it has, or the first that is free.
async fn reserve(store: &Store, record: &AdapterVersion) -> Result<u32, TrainError> {
    let project = &record.job.project;
    let taken = numbers(store, record).await?;
    for n in taken.iter().rev() {
        if is_at(store, record, *n).await? {
            return Ok(*n);
        }
    }
    let mut n = taken.last().map_or(1, |last| last + 1);
    loop {
        let numbered = AdapterVersion {
            n,
            ..record.clone()
        };
        let content = serde_json::to_vec_pretty(&numbered).map_err(PublishError::Encode)?;
        let path = layout::adapter_version(project, &record.name, n);
        // One that exists may be this one's own, whose answer was lost.
        if store.create(&path, content.into()).await? == Created::New
            || is_at(store, record, n).await?
        {
            return Ok(n);
        }
        n += 1;
    }
}

/// The numbers of an adapter's versions, ascending.
async fn numbers(store: &Store, record: &AdapterVersion) -> Result<Vec<u32>, TrainError> {
    let (project, name) = (&record.job.project, &record.name);
    let prefix = layout::adapter_versions(project, name);
    let prefix = prefix.trim_end_matches('/');
    let (mut numbers, mut after) = (Vec::new(), None::<String>);
    loop {
        let page = store.list(prefix, after.as_deref(), LIST_MAX).await?;
        let found = page
            .iter()
            .filter_map(|object| layout::adapter_version_of(project, &object.path));
        numbers.extend(found.map(|(_, n)| n));
        if page.len() < LIST_MAX {
            numbers.sort_unstable();
            return Ok(numbers);
        }
        after = page.last().map(|last| last.path.clone());
    }
}

/// Whether version `n` is the result of the same attempt. One that cannot be read is another's.
async fn is_at(store: &Store, record: &AdapterVersion, n: u32) -> Result<bool, TrainError> {
    let path = layout::adapter_version(&record.job.project, &record.name, n);
    let bytes = store.get(&path).await?;
    let found = AdapterVersion::parse(&bytes, &record.name, n);
    Ok(found.is_ok_and(|found| found.job == record.job && found.fence == record.fence))
}

async fn store_file(place: &Place, path: String, content: Bytes) -> Result<FileEntry, TrainError> {
    let size = content.len() as u64;
    if size > OBJECT_BYTES_MAX {
        return Err(TrainError::TooLarge {
            file: path,
            bytes: size,
            bytes_max: OBJECT_BYTES_MAX,
        });
    }
    let hashed = content.clone();
    let entry = blocking("train.hash", move || FileEntry::of(path, &hashed)).await?;
    let put =
        || async { Ok::<_, TrainError>(place.store.put(&entry.path, content.clone()).await?) };
    patiently(&place.key, "adapter", put).await?;
    Ok(entry)
}

impl Training {
    /// Puts the weights that did best on held-out samples onto the bench, and says of which step they are.
    async fn take_best(&mut self) -> Result<u64, TrainError> {
        let last = self.step();
        let Some(best) = self.best.filter(|best| best.step != last) else {
            return Ok(last);
        };
        let found = load(&self.place, best.fence, best.step, self.expected()).await?;
        let (Some(found), Some(mut bench)) = (found, self.bench.take()) else {
            tracing::warn!(job = %self.place.key, step = best.step, "the best checkpoint is gone: the last weights are published");
            self.best = None;
            return Ok(last);
        };
        let restored = blocking("train.restore", move || {
            let restored = bench.trainer.restore(found.state);
            (bench, restored)
        });
        let (bench, restored) = restored.await?;
        self.bench = Some(bench);
        restored?;
        Ok(best.step)
    }

    /// What was trained, as files. The engine's memory is free then.
    async fn export(&mut self) -> Result<Vec<Named>, TrainError> {
        let Some(mut bench) = self.bench.take() else {
            return Err(TrainError::Stopped);
        };
        let (base, folder) = (self.base.name.clone(), self.folder.clone());
        let export = blocking("train.export", move || {
            let export = bench.trainer.export()?;
            drop(bench);
            match &export.adapter_config {
                Some(_) => adapter_files(export, &base),
                None => model_files(export, &folder),
            }
        });
        export.await?
    }

    fn summary(&self, best_step: u64) -> TrainSummary {
        TrainSummary {
            steps: self.step(),
            tokens: self.totals.tokens,
            supervised_tokens: self.totals.supervised_tokens,
            loss: self.history.last().map_or(0.0, |step| step.loss),
            eval_loss: self.best.map(|best| best.eval_loss),
            best_step,
            wall_ms: self.totals.wall_ms,
            agreement: self.agreement.clone(),
        }
    }
}

/// An adapter as PEFT has it.
fn adapter_files(mut export: Export, base: &str) -> Result<Vec<Named>, TrainError> {
    let mut config = export.adapter_config.take().unwrap_or_default();
    config["base_model_name_or_path"] = json!(base);
    let weights = export.to_safetensors(ExportType::F32)?;
    Ok(vec![
        ("adapter_model.safetensors".to_owned(), weights.into()),
        (
            "adapter_config.json".to_owned(),
            format!("{config:#}\n").into(),
        ),
    ])
}

/// A model's folder: weights in bf16, and what the base model has beside its own.
fn model_files(export: Export, folder: &Path) -> Result<Vec<Named>, TrainError> {
    let mut files = Vec::new();
    for name in BESIDE_WEIGHTS {
        let path = folder.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => files.push((name.to_owned(), bytes.into())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(TrainError::Read { path, source }),
        }
    }
    let shards = shards(export.tensors, SHARD_BYTES_MAX);
    let count = shards.len();
    let mut map = serde_json::Map::new();
    let mut total = 0;
    for (n, tensors) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", n + 1),
        };
        for tensor in &tensors {
            total += tensor.values.len() * 2;
            map.insert(tensor.name.clone(), json!(file));
        }
        let shard = Export {
            tensors,
            adapter_config: None,
        };
        files.push((file, shard.to_safetensors(ExportType::Bf16)?.into()));
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let index = format!("{index:#}\n").into();
        files.push(("model.safetensors.index.json".to_owned(), index));
    }
    Ok(files)
}

/// Tensors in their order, in groups of at most `bytes_max` bytes of bf16.
fn shards(tensors: Vec<ExportTensor>, bytes_max: u64) -> Vec<Vec<ExportTensor>> {
    let mut shards: Vec<Vec<ExportTensor>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        let bytes = tensor.values.len() as u64 * 2;
        if shards.is_empty() || bytes > room {
            shards.push(Vec::new());
            room = bytes_max;
        }
        room = room.saturating_sub(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}
