//! What an agent worker does with a granted `score` job: take over a result that is there already, or ask a model for the
//! turns of recorded rollouts, each after what was recorded before it, and publish what it says in their place.
//!
//! ```text
//! store ─► recorded rollouts ─► say: each turn asked for, and how likely the recorded one is ─► scores.json ─► manifest
//! ```
//! It takes a rollout's slot and has the same model client, but starts no server. What the numbers mean is
//! `espalier_core::compare::turns`'; they are compared by a `compare` job.

mod error;
mod say;

use bytes::Bytes;
use espalier_core::compare::Source;
use espalier_core::compare::turns::{SCORES_VERSION, Scores, TurnScore};
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::spec::{ScoreSpec, SpecDigest};
use espalier_core::trace::{FileEntry, Manifest, SCHEMA_VERSION, Summary};
use espalier_runtime::publish::{self, ByLease, Claim, Published, patiently};
use espalier_runtime::tasks::blocking;
use espalier_runtime::traces::{Loaded, Traces};
use espalier_runtime::worker::{Grant, JobContext};
use futures::{StreamExt, TryStreamExt, stream};

use crate::rollout::{Services, load_recording};
pub(crate) use error::ScoreError;
use say::Asked;

/// Turns that are asked for at once: an endpoint computes several as fast as one.
const TURNS_AT_ONCE: usize = 8;

/// Asks for turns.
pub(crate) struct Scorer<'a> {
    pub(crate) services: &'a Services,
    pub(crate) grant: &'a Grant,
    pub(crate) context: &'a JobContext,
}

impl Scorer<'_> {
    /// Does the job, or takes over what another attempt at it did.
    pub(crate) async fn attempt(&self, spec: &ScoreSpec) -> Result<Published, ScoreError> {
        let (grant, store) = (self.grant, &self.services.store);
        let digest = publish::spec_digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&digest),
        };
        let max_runtime = grant.spec.max_runtime;
        let adopted = publish::adopt(store, claim, max_runtime, self.context).await?;
        if let Some(published) = adopted {
            return Ok(published);
        }
        let scores = self.scores(spec).await?;
        self.context.lease().publishing();
        let file = self.write(&scores).await?;
        let manifest = self.manifest(spec, &scores, digest.clone(), file);
        let gate = ByLease(self.context);
        Ok(publish::create(store, claim, &manifest, &gate).await?)
    }

    /// Every turn of every recorded rollout, in order.
    async fn scores(&self, spec: &ScoreSpec) -> Result<Scores, ScoreError> {
        let key = &self.grant.key;
        let traces = Traces::new(self.services.store.clone(), key.project.clone());
        let model = spec.model.clone();
        let mut scores = Scores {
            scores_version: SCORES_VERSION,
            model: model.unwrap_or_else(|| self.services.model_name.clone()),
            labels: self.grant.spec.labels.clone(),
            sources: Vec::new(),
            turns: Vec::new(),
        };
        for (i, (batch, job)) in spec.traces.iter().enumerate() {
            let job = JobKey::new(key.project.clone(), batch.clone(), job.clone());
            let field = format!("score.traces[{i}]");
            let loaded = load_recording(&traces, key, job, &field).await?;
            let text = format!("rollout {}/{}", i + 1, spec.traces.len());
            self.context.lease().progress(&text);
            let turns = self.turns(&loaded, spec.hints, &scores.model).await?;
            scores.turns.extend(turns);
            scores.sources.extend(source(&loaded));
        }
        Ok(scores)
    }

    async fn turns(
        &self,
        loaded: &Loaded,
        hints: bool,
        model: &str,
    ) -> Result<Vec<TurnScore>, ScoreError> {
        let cancel = self.context.lease().stopped();
        let asked = Asked::new(self.services, &loaded.trace, hints, model, &cancel);
        let turns = stream::iter(asked.turns()).map(|message| asked.score(message));
        turns.buffered(TURNS_AT_ONCE).try_collect().await
    }

    async fn write(&self, scores: &Scores) -> Result<FileEntry, ScoreError> {
        let (grant, scores) = (self.grant, scores.clone());
        let encode = move || serde_json::to_vec(&scores);
        let content = blocking("score.write", encode).await?;
        let content = Bytes::from(content.map_err(ScoreError::Encode)?);
        let entry = FileEntry::of(layout::scores(&grant.key, grant.fence), &content);
        let put = || async {
            let store = &self.services.store;
            Ok::<_, ScoreError>(store.put(&entry.path, content.clone()).await?)
        };
        patiently(&grant.key, "scores", put).await?;
        Ok(entry)
    }

    fn manifest(
        &self,
        spec: &ScoreSpec,
        scores: &Scores,
        digest: SpecDigest,
        file: FileEntry,
    ) -> Manifest {
        let grant = self.grant;
        let parents = spec.traces.iter().map(|(batch, job)| {
            let project = grant.key.project.clone();
            layout::manifest(&JobKey::new(project, batch.clone(), job.clone()))
        });
        Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: Some(digest),
            created_at_us: self.services.clock.now(),
            files: vec![file],
            parents: parents.collect(),
            summary: Summary::Score(scores.summary()),
        }
    }
}

fn source(loaded: &Loaded) -> Option<Source> {
    let file = loaded.manifest.trace_file()?;
    Some(Source {
        path: file.path.clone(),
        sha256: file.sha256.clone(),
        patches: 0,
    })
}
