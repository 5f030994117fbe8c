//! Walks from an adapter to everything that it was made from. Each object is read and held against the digest that was
//! written down for it; what is wrong with one ends nothing.

use std::collections::{BTreeMap, BTreeSet};

use espalier_adapters::Latest;
use espalier_core::adapter::{AdapterVersion, BaseModel, Why};
use espalier_core::dataset::{DatasetVersion, MANIFEST_FILE};
use espalier_core::id::{JobKey, ProjectId};
use espalier_core::layout::{self, UploadName};
use espalier_core::trace::edits::{Corrections, Patch};
use espalier_core::trace::{FileEntry, Manifest, sha256_hex};
use espalier_dataset::DatasetManifest;
use espalier_runtime::store::Store;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::traces::{Listed, Traces, TracesError};
use futures::{StreamExt, stream};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::tree::{Node, State};

/// What is asked for at once, in bytes.
const PIECE_BYTES: u64 = 32 << 20;
/// Objects read at once.
const READS_MAX: usize = 4;

/// Jobs, with what was written down of the trace of each.
type Named = BTreeSet<(JobKey, Written)>;

/// What was written down of a trace where it was used.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Written {
    sha256: Option<String>,
    corrections: Option<Corrections>,
}

/// Traces of one batch.
#[derive(Default)]
struct Batch {
    nodes: Vec<Node>,
    /// Who spoke in them.
    models: BTreeSet<String>,
    /// What stood in for their servers.
    recordings: Named,
}

/// What walks.
pub struct Walker<'a> {
    pub store: &'a Store,
    pub project: &'a ProjectId,
    pub bar: &'a ProgressBar,
}

impl Walker<'_> {
    /// A version of an adapter and all that is behind it.
    pub async fn adapter(&self, version: &AdapterVersion) -> Node {
        let path = layout::adapter_version(self.project, &version.name, version.n);
        let mut node = self.object("adapter", &path).await;
        node.detail = format!("{}@v{}", version.name, version.n);
        node.children.extend(self.latest(version).await);
        let files = self.files(&version.files).await;
        node.children.extend(files);
        if version.training.steps == 0 && version.dataset.is_empty() {
            let why = "it was added from a folder: no job made it";
            node.children
                .push(Node::unverified("job", version.job.to_string(), why));
            node.children.push(base(&version.base));
            return node;
        }
        let mut job = self
            .job(
                &version.job,
                &version.files,
                &[&version.base.parent(), &version.dataset],
            )
            .await;
        job.children.push(base(&version.base));
        job.children
            .push(Box::pin(self.dataset(&version.dataset)).await);
        node.children.push(job);
        node
    }

    /// Why the version is `latest` or its canary, where it is.
    async fn latest(&self, version: &AdapterVersion) -> Option<Node> {
        let latest = Latest {
            store: self.store,
            project: self.project,
            name: &version.name,
        };
        let entry = match latest.current().await {
            Ok(entry) => {
                entry.filter(|entry| [entry.version, entry.subject()].contains(&version.n))?
            }
            Err(error) => {
                return Some(Node::broken(
                    "latest",
                    version.name.as_str(),
                    error_chain(&error),
                ));
            }
        };
        let path = layout::adapter_latest(self.project, &version.name, entry.seq);
        let kind = match entry.version == version.n {
            true => "latest",
            false => "canary",
        };
        let mut node = self.object(kind, &path).await;
        match &entry.why {
            // What the entry says why is its canary.
            _ if version.n != entry.subject() => {
                node.detail = format!("v{} is its canary", entry.subject());
            }
            Why::Hand => node.detail = "by hand".to_owned(),
            Why::Rollback { from } => node.detail = format!("rolled back from v{from}"),
            Why::Comparison { report, sha256 } => {
                let of = self.object("comparison", report).await;
                node.children.push(written_down(of, Some(sha256)));
            }
        }
        Some(node)
    }

    /// What was trained on: a version of a data set, or a file.
    async fn dataset(&self, path: &str) -> Node {
        let Some((name, n)) = layout::dataset_version_of(self.project, path) else {
            return written_down(self.large("rows", path).await, None);
        };
        let bytes = match self.store.get(path).await {
            Ok(bytes) => bytes,
            Err(error) => return Node::broken("data set", path, error_chain(&error)),
        };
        let version = match DatasetVersion::parse(&bytes, &name, n) {
            Ok(version) => version,
            Err(error) => return Node::broken("data set", path, error.to_string()),
        };
        let mut node = Node {
            sha256: Some(sha256_hex(&bytes)),
            detail: format!("{name}@v{n}"),
            ..Node::new("data set", path, State::Read)
        };
        node.children = self.files(&version.files).await;
        let mut job = self.job(&version.job, &version.files, &[]).await;
        job.children.extend(self.sources(&version).await);
        node.children.push(job);
        node
    }

    /// What is in a data set: traces by the batch that they are of, and files.
    async fn sources(&self, version: &DatasetVersion) -> Vec<Node> {
        let Some(file) = version.file(MANIFEST_FILE) else {
            return vec![Node::broken(
                "sources",
                MANIFEST_FILE,
                "the data set has no manifest",
            )];
        };
        let read = match self.store.get(&file.path).await {
            Ok(bytes) if file.holds(&bytes) => {
                serde_json::from_slice::<DatasetManifest>(&bytes).map_err(|error| error.to_string())
            }
            Ok(_) => Err("it is not what its record names".to_owned()),
            Err(error) => Err(error_chain(&error)),
        };
        let manifest = match read {
            Ok(manifest) => manifest,
            Err(why) => return vec![Node::broken("sources", &file.path, why)],
        };
        let (mut jobs, mut uploads) = (BTreeSet::new(), BTreeMap::new());
        for source in manifest
            .sources
            .iter()
            .filter(|source| source.split.is_some())
        {
            let name = source.source.split('#').next().unwrap_or_default();
            let written = Written {
                sha256: source.sha256.clone(),
                corrections: source.corrections.clone(),
            };
            match name.parse::<JobKey>() {
                Ok(job) if job.project == *self.project => {
                    jobs.insert((job, written));
                }
                _ => {
                    uploads.insert(name.to_owned(), written.sha256);
                }
            }
        }
        self.bar.inc_length(jobs.len() as u64);
        let mut nodes = self.traces("batch", jobs).await;
        for (upload, sha256) in uploads {
            let named = upload.strip_prefix("uploads/").map(UploadName::new);
            let Some(Ok(named)) = named else {
                nodes.push(Node::broken(
                    "upload",
                    upload,
                    "this is no name of an upload",
                ));
                continue;
            };
            let path = layout::upload(self.project, &named);
            nodes.push(written_down(
                self.large("upload", &path).await,
                sha256.as_deref(),
            ));
        }
        nodes
    }

    /// The traces of some jobs, by batch, each held against its manifest. Recordings that stood in for servers come before
    /// the traces of their batch, each once.
    async fn traces(&self, kind: &'static str, jobs: Named) -> Vec<Node> {
        let reads = jobs
            .into_iter()
            .map(|(job, written)| self.trace(job, written));
        let mut reads = stream::iter(reads).buffered(READS_MAX);
        let mut batches: BTreeMap<String, Batch> = BTreeMap::new();
        while let Some((job, read)) = reads.next().await {
            self.bar.inc(1);
            let path = layout::batch(&job.project, &job.batch);
            let batch = batches.entry(path).or_default();
            batch.models.extend(read.models);
            batch.recordings.extend(read.recordings);
            batch.nodes.extend(read.nodes);
        }
        let mut nodes = Vec::new();
        for (path, batch) in batches {
            let count = batch.nodes.len();
            let models: Vec<String> = batch.models.into_iter().collect();
            self.bar.inc_length(batch.recordings.len() as u64);
            let mut children = Box::pin(self.traces("recordings", batch.recordings)).await;
            children.extend(batch.nodes);
            nodes.push(Node {
                detail: format!("{count} traces by {}", models.join(", ")),
                children,
                ..Node::new(kind, path, State::Read)
            });
        }
        nodes
    }

    /// A trace, as a batch of one. It is held against its own manifest and against the digest that was written down where it
    /// was used.
    async fn trace(&self, job: JobKey, written: Written) -> (JobKey, Batch) {
        let traces = Traces::new(self.store.clone(), job.project.clone());
        let listed = Listed {
            job: job.clone(),
            patches: written.corrections.as_ref().map_or(0, |log| log.count),
        };
        let mut batch = Batch::default();
        let node = match traces.load(&listed).await {
            Ok(loaded) => {
                let header = &loaded.trace.header;
                batch.models.insert(header.provenance.model.clone());
                for adapter in loaded
                    .trace
                    .model_calls
                    .iter()
                    .filter_map(|call| call.adapter.as_ref())
                {
                    let digest = adapter.sha256.as_deref().unwrap_or("unknown");
                    let name = format!("{} (adapter, sha256 {digest})", adapter.name);
                    batch.models.insert(name);
                }
                let file = loaded.manifest.trace_file();
                let node = Node {
                    sha256: file.map(|file| file.sha256.clone()),
                    ..Node::new("trace", job.to_string(), State::Verified)
                };
                let node = match &written.sha256 {
                    Some(sha256) => written_down(node, Some(sha256)),
                    // It is what its manifest names, at least.
                    None => node,
                };
                let node = corrected(node, &written, &loaded.log);
                // What another trace than the one that was used names was not used, and may lead in a circle.
                if node.state == State::Verified {
                    let recordings = header.provenance.replay.iter();
                    let named = recordings.map(|it| {
                        let written = Written {
                            sha256: Some(it.sha256.clone()),
                            corrections: None,
                        };
                        (it.job.clone(), written)
                    });
                    batch.recordings.extend(named);
                }
                node
            }
            Err(error @ TracesError::NotPublished(_)) => {
                Node::broken("trace", job.to_string(), error.to_string())
            }
            Err(error) => Node::broken("trace", job.to_string(), error_chain(&error)),
        };
        batch.nodes.push(node);
        (job, batch)
    }

    /// A job by its manifest: its files, that `own` are among them, and that it names `parents`.
    async fn job(&self, key: &JobKey, own: &[FileEntry], parents: &[&str]) -> Node {
        let path = layout::manifest(key);
        let bytes = match self.store.get(&path).await {
            Ok(bytes) => bytes,
            Err(error) => return Node::broken("job", path, error_chain(&error)),
        };
        let manifest = match Manifest::parse(&bytes, key) {
            Ok(manifest) => manifest,
            Err(error) => return Node::broken("job", path, error.to_string()),
        };
        let spec = manifest.spec_sha256.as_ref().map(ToString::to_string);
        let mut node = Node {
            sha256: Some(sha256_hex(&bytes)),
            detail: format!(
                "attempt {} at {}, spec sha256 {}",
                manifest.attempt,
                manifest.created_at_us,
                spec.as_deref().unwrap_or("unknown")
            ),
            ..Node::new("job", path, State::Read)
        };
        if let Some(file) = own.iter().find(|file| !manifest.files.contains(file)) {
            let why = format!("it does not name {} as the version does", file.path);
            node.state = State::Broken { why };
        } else if let Some(parent) = parents
            .iter()
            .find(|parent| !manifest.parents.iter().any(|p| p == *parent))
        {
            let why = format!("it does not name {parent} among what it was made from");
            node.state = State::Broken { why };
        }
        let others = manifest.files.iter().filter(|file| !own.contains(file));
        let others: Vec<FileEntry> = others.cloned().collect();
        node.children = self.files(&others).await;
        node
    }

    async fn files(&self, files: &[FileEntry]) -> Vec<Node> {
        self.bar.inc_length(files.len() as u64);
        let reads = files.iter().map(|file| self.file(file));
        stream::iter(reads).buffered(READS_MAX).collect().await
    }

    async fn file(&self, file: &FileEntry) -> Node {
        let state = match self.digest(file).await {
            Ok(found) if found == file.sha256 => State::Verified,
            Ok(found) => State::Broken {
                why: format!("its bytes have sha256 {found}"),
            },
            Err(why) => State::Broken { why },
        };
        self.bar.inc(1);
        Node {
            sha256: Some(file.sha256.clone()),
            ..Node::new("file", &file.path, state)
        }
    }

    /// The digest of an object of that size, read in pieces.
    async fn digest(&self, file: &FileEntry) -> Result<String, String> {
        let there = self.store.head(&file.path).await;
        let size = there.map_err(|error| error_chain(&error))?.size;
        if size != file.size {
            return Err(format!("it must have {} bytes, has {size}", file.size));
        }
        self.digest_of(&file.path, size).await
    }

    async fn digest_of(&self, path: &str, size: u64) -> Result<String, String> {
        let (mut digest, mut start) = (Sha256::new(), 0);
        while start < size {
            let end = size.min(start + PIECE_BYTES);
            let piece = self.store.get_range(path, start..end).await;
            digest.update(&piece.map_err(|error| error_chain(&error))?);
            start = end;
        }
        let bytes = digest.finalize();
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// A small object that carries its meaning itself.
    async fn object(&self, kind: &'static str, path: &str) -> Node {
        match self.store.get(path).await {
            Ok(bytes) => Node {
                sha256: Some(sha256_hex(&bytes)),
                ..Node::new(kind, path, State::Read)
            },
            Err(error) => Node::broken(kind, path, error_chain(&error)),
        }
    }

    /// An object of any size.
    async fn large(&self, kind: &'static str, path: &str) -> Node {
        let read = async {
            let there = self.store.head(path).await;
            let size = there.map_err(|error| error_chain(&error))?.size;
            self.digest_of(path, size).await
        };
        match read.await {
            Ok(sha256) => Node {
                sha256: Some(sha256),
                ..Node::new(kind, path, State::Read)
            },
            Err(why) => Node::broken(kind, path, why),
        }
    }
}

/// An object that was read, held against the digest that was written down for it.
fn written_down(mut node: Node, sha256: Option<&str>) -> Node {
    node.state = match (node.state, sha256) {
        (broken @ State::Broken { .. }, _) => broken,
        (_, None) => State::Unverified {
            why: "no digest of it was written down".to_owned(),
        },
        (_, Some(sha256)) if node.sha256.as_deref() != Some(sha256) => State::Broken {
            why: format!("sha256 {sha256} was written down when it was used"),
        },
        (_, Some(_)) => State::Verified,
    };
    node
}

/// A trace with the corrections that it was used with.
fn corrected(mut node: Node, written: &Written, log: &[Patch]) -> Node {
    if let Some(corrections) = &written.corrections {
        node.detail = format!("with {} corrections", corrections.count);
        if node.state == State::Verified && Corrections::of(log).as_ref() != Some(corrections) {
            node.state = State::Broken {
                why: "they are not those that it was used with".to_owned(),
            };
        }
    }
    node
}

/// The base model is elsewhere.
fn base(base: &BaseModel) -> Node {
    let revision = base.revision.as_deref();
    let revision = revision
        .map(|revision| format!("@{revision}"))
        .unwrap_or_default();
    let why = match base.sha256.is_empty() {
        true => "no digest of it was written down",
        false => {
            "its weights are not in the store: this is the digest that was written down when it was trained"
        }
    };
    Node {
        sha256: Some(base.sha256.clone()).filter(|sha256| !sha256.is_empty()),
        ..Node::unverified("model", format!("{}{revision}", base.name), why)
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::spec::parse_line;
    use espalier_core::trace::ReplaySource;
    use espalier_runtime::clock::{Clock, SystemClock};
    use espalier_runtime::traces::workshop;
    use serde_json::json;

    use super::*;

    fn key(name: &str) -> JobKey {
        format!("default/b/{name}").parse().unwrap()
    }

    /// Publishes a rollout with these recordings. Gives the digest of its trace.
    async fn publish(traces: &Traces, name: &str, replay: Vec<ReplaySource>) -> String {
        let spec = parse_line(br#"{"prompt":"x"}"#).unwrap().check().unwrap();
        let sampling = spec.rollout().unwrap().sampling.clone();
        let file = json!({
            "timestamp": "20250529_130900", "model": "m", "tools": [],
            "messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "5"}],
        });
        let file = file.to_string();
        let mut trace = workshop::read(file.as_bytes(), key(name), sampling).unwrap();
        trace.header.provenance.replay = replay;
        let published = traces.publish(trace, Vec::new(), SystemClock.now()).await;
        published.unwrap();
        let listed = Listed {
            job: key(name),
            patches: 0,
        };
        let loaded = traces.load(&listed).await.unwrap();
        loaded.manifest.trace_file().unwrap().sha256.clone()
    }

    #[tokio::test]
    async fn recordings_are_held_against_what_a_replayed_trace_says_of_them() {
        let store = Store::open("memory://").await.unwrap();
        let project: ProjectId = "default".parse().unwrap();
        let traces = Traces::new(store.clone(), project.clone());
        let source = |name: &str, sha256: String| ReplaySource {
            job: key(name),
            sha256,
        };
        let first = publish(&traces, "first", vec![]).await;
        let second = publish(&traces, "second", vec![source("first", first)]).await;
        let wrong = source("first", "0".repeat(64));
        let third = publish(&traces, "third", vec![source("second", second), wrong]).await;
        let bar = ProgressBar::hidden();
        let walker = Walker {
            store: &store,
            project: &project,
            bar: &bar,
        };
        let written = Written {
            sha256: Some(third),
            ..Written::default()
        };
        let jobs = Named::from([(key("third"), written)]);
        let nodes = walker.traces("batch", jobs).await;
        let [batch] = &nodes[..] else {
            panic!("{nodes:?}")
        };
        assert_eq!(batch.counts(), [3, 0, 1], "{}", batch.to_text());
        let recordings = &batch.children[0];
        assert_eq!(
            (recordings.kind, recordings.children.len()),
            ("recordings", 3)
        );
    }
}
