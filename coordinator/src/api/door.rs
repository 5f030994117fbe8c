//! The door: every job that enters the queue is checked here, whether a client submits it or a result spawns it.
//!
//! [`Door::check`] is pure and may be slow, so it runs off the async threads; [`Door::store_blobs`] and the queue do
//! the rest. A job that breaks a rule is refused with every field that is wrong; its neighbours go on.

use std::collections::BTreeSet;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, ProjectId};
use espalier_core::layout;
use espalier_core::queue::NewJob;
use espalier_core::spec::{JobDraft, JobSpec, McpUse, McpUseDraft, Work, limits, model_tag};
use espalier_core::time::Timestamp;
use espalier_proto::convert::draft_from_wire;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::store::{Store, StoreError};
use futures::{StreamExt, TryStreamExt};
use prost::Message;
use sha2::{Digest, Sha256};

use super::stored::{INLINE_BYTES_MAX, StoredSpec};
use super::{Shared, queue_error};
use crate::queue::Submission;
use crate::registry::MCP_TAG;

/// Large specs that are written at once: enough to hide the latency of a store, few enough for a disk.
const BLOB_WRITES_MAX: usize = 16;

/// What the check of a job has to know.
#[derive(Clone, Debug)]
pub struct Door {
    /// The tenant.
    pub project: ProjectId,
    /// The batch.
    pub batch: BatchId,
    /// Its defaults, encoded and decoded.
    defaults: (Bytes, v1::JobSpec),
    /// MCP servers that may be named.
    mcp_servers: BTreeSet<String>,
    allow_inline_mcp: bool,
    /// The submitter's trace context, for jobs without one.
    traceparent: Option<String>,
    now: Timestamp,
}

/// A job that passed.
#[derive(Debug)]
pub struct Admitted {
    /// What the queue gets.
    pub submission: Submission,
    /// What the store gets first.
    blob: Option<Blob>,
}

/// A job that did not pass.
#[derive(Debug)]
pub struct Refused {
    /// Every rule that it broke.
    pub errors: Vec<FieldError>,
    /// What would have passed if the servers that it names were known. Workers announce servers, so that a job which
    /// passed once may not pass again right after a restart.
    pub without_servers: Option<Box<Admitted>>,
}

impl From<FieldError> for Refused {
    fn from(error: FieldError) -> Self {
        Self {
            errors: vec![error],
            without_servers: None,
        }
    }
}

/// A large spec.
#[derive(Debug)]
struct Blob {
    path: String,
    own: Bytes,
}

impl Door {
    /// The door of a batch that is there.
    pub async fn open(
        shared: &Shared,
        project: ProjectId,
        batch: BatchId,
        encoded: Bytes,
        traceparent: Option<String>,
    ) -> Result<Self, ApiError> {
        let defaults = v1::JobSpec::decode(encoded.clone()).map_err(|error| {
            tracing::error!(%project, %batch, error = %error, "stored defaults cannot be read");
            ApiError::Internal("the batch's stored defaults cannot be read".to_owned())
        })?;
        Ok(Self {
            project,
            batch,
            defaults: (encoded, defaults),
            mcp_servers: shared.mcp_servers().await.map_err(queue_error)?,
            allow_inline_mcp: shared.config.allow_inline_mcp,
            traceparent,
            now: shared.now(),
        })
    }

    /// Checks one job; `derived_id` is its id where it has none.
    pub fn check(&self, own: &v1::JobSpec, derived_id: &str) -> Result<Admitted, Vec<FieldError>> {
        self.judge(own, derived_id)
            .map_err(|refused| refused.errors)
    }

    /// As [`Door::check`], and says of a job that was refused whether only its servers stand against it.
    pub fn judge(&self, own: &v1::JobSpec, derived_id: &str) -> Result<Admitted, Refused> {
        let encoded: Bytes = own.encode_to_vec().into();
        if encoded.len() > limits::SPEC_BYTES_MAX {
            let shown = format!("{} bytes", encoded.len());
            let rule = format!("must have at most {} bytes", limits::SPEC_BYTES_MAX);
            return Err(FieldError::new("spec", shown, rule).into());
        }
        let draft = self.draft(encoded.clone())?;
        // Recordings stand in for its servers.
        let of_servers = match draft.replay.is_empty() {
            true => self.check_servers(&draft.mcp),
            false => Vec::new(),
        };
        match draft.check() {
            Ok(spec) => {
                let admitted = self.admit(spec, encoded, derived_id)?;
                if of_servers.is_empty() {
                    return Ok(admitted);
                }
                Err(Refused {
                    errors: of_servers,
                    without_servers: Some(Box::new(admitted)),
                })
            }
            Err(mut errors) => {
                errors.extend(of_servers);
                Err(Refused {
                    errors,
                    without_servers: None,
                })
            }
        }
    }

    /// The defaults followed by the job's own fields.
    fn draft(&self, own: Bytes) -> Result<JobDraft, FieldError> {
        let mut merged = self.defaults.1.clone();
        merged
            .merge(own)
            .map_err(|e| FieldError::new("spec", "", format!("must be an encoded JobSpec: {e}")))?;
        draft_from_wire(merged)
    }

    fn check_servers(&self, used: &[McpUseDraft]) -> Vec<FieldError> {
        let refuse = |(i, used): (usize, &McpUseDraft)| match used {
            McpUseDraft::Named(name) if !self.mcp_servers.contains(name) => Some(FieldError::new(
                format!("mcp[{i}]"),
                name,
                self.server_rule(),
            )),
            McpUseDraft::Inline { name, .. } if !self.allow_inline_mcp => Some(FieldError::new(
                format!("mcp[{i}].server"),
                name,
                "must be absent: jobs may not bring servers of their own here (`allow_inline_mcp`)",
            )),
            _ => None,
        };
        used.iter().enumerate().filter_map(refuse).collect()
    }

    fn server_rule(&self) -> String {
        if self.mcp_servers.is_empty() {
            return "must be a configured MCP server, and there is none".to_owned();
        }
        let names: Vec<&str> = self.mcp_servers.iter().map(String::as_str).collect();
        format!("must be a configured MCP server: {}", names.join(", "))
    }

    fn admit(&self, spec: JobSpec, own: Bytes, derived_id: &str) -> Result<Admitted, FieldError> {
        let id = match spec.id {
            Some(id) => id,
            None => JobId::new(derived_id)?,
        };
        let implied = implied_needs(&spec.work);
        let resolve =
            |dep: &espalier_core::spec::Dependency| dep.resolve(&self.project, &self.batch);
        let budget = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let job = NewJob {
            id,
            kind: spec.work.kind(),
            priority: spec.priority,
            needs: spec.needs.iter().cloned().chain(implied).collect(),
            deps: spec.after.iter().map(resolve).collect(),
            not_before: (!spec.delay.is_zero()).then(|| self.now + spec.delay),
            max_attempts: budget(spec.max_attempts),
            max_infra: budget(spec.max_infra),
            max_runtime: Some(spec.max_runtime),
            labels: spec.labels,
            spec_digest: Sha256::digest(&own).into(),
            traceparent: spec.traceparent.or_else(|| self.traceparent.clone()),
        };
        let (stored, blob) = self.place(own);
        let spec = stored.encode();
        Ok(Admitted {
            submission: Submission { job, spec },
            blob,
        })
    }

    /// Decides where a spec is kept. A blob holds the defaults too, so that a worker needs nothing else.
    fn place(&self, own: Bytes) -> (StoredSpec, Option<Blob>) {
        if own.len() <= INLINE_BYTES_MAX {
            return (StoredSpec::Inline(own), None);
        }
        let mut hasher = Sha256::new();
        hasher.update(&self.defaults.0);
        hasher.update(&own);
        let hex: String = hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let path = layout::blob(&self.project, &hex);
        (StoredSpec::Blob(path.clone()), Some(Blob { path, own }))
    }

    /// Writes the large specs of `admitted`. They are named by their content, so that a repetition changes nothing.
    pub async fn store_blobs(
        &self,
        store: &Store,
        admitted: &mut [Admitted],
    ) -> Result<(), StoreError> {
        let blobs: Vec<Blob> = admitted.iter_mut().filter_map(|a| a.blob.take()).collect();
        futures::stream::iter(blobs.into_iter().map(|blob| async move {
            let content = [&self.defaults.0[..], &blob.own[..]].concat();
            store.create(&blob.path, content.into()).await.map(drop)
        }))
        .buffer_unordered(BLOB_WRITES_MAX)
        .try_collect()
        .await
    }
}

/// Tags that a worker must offer for what the job does: the servers of a rollout, the model of a batch of requests.
fn implied_needs(work: &Work) -> Vec<String> {
    match work {
        // Its servers are not started.
        Work::Rollout(rollout) if !rollout.replay.is_empty() => Vec::new(),
        Work::Rollout(rollout) => {
            let named = rollout.mcp.iter().filter_map(|used| match used {
                McpUse::Named(name) => Some(format!("{MCP_TAG}{name}")),
                McpUse::Inline { .. } => None,
            });
            named.collect()
        }
        Work::Generate(generate) => generate.model.iter().map(|name| model_tag(name)).collect(),
        // Any worker that trains fetches what it needs.
        Work::Train(_) => Vec::new(),
        // Their sources are in the store.
        Work::Curate(_) | Work::Compare(_) | Work::Score(_) => Vec::new(),
        // What it takes out is in the store, and what it needs besides it fetches.
        Work::Export(_) => Vec::new(),
    }
}

/// Clients write `after` what the queue calls `deps`.
pub fn in_clients_terms(mut error: FieldError) -> FieldError {
    error.field = error.field.replace("deps", "after");
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::queue::JobKind;
    use espalier_core::spec::parse_line;
    use espalier_proto::convert::draft_to_wire;

    fn spec(line: &str) -> v1::JobSpec {
        draft_to_wire(&parse_line(line.as_bytes()).unwrap())
    }

    fn door(defaults: &str) -> Door {
        let defaults = spec(defaults);
        Door {
            project: "shop".parse().unwrap(),
            batch: "b1".parse().unwrap(),
            defaults: (defaults.encode_to_vec().into(), defaults),
            mcp_servers: ["browser".to_owned(), "files".to_owned()].into(),
            allow_inline_mcp: false,
            traceparent: None,
            now: Timestamp(1_000),
        }
    }

    fn refused(line: &str) -> Vec<(String, String)> {
        let errors = door("{}").check(&spec(line), "c0-0000").unwrap_err();
        errors.into_iter().map(|e| (e.field, e.rule)).collect()
    }

    #[test]
    fn a_job_becomes_a_submission_on_top_of_the_defaults() {
        let door = door(r#"{"mcp":["browser"],"max_attempts":7}"#);
        let own =
            spec(r#"{"prompt":"x","mcp":["files"],"needs":["gpu"],"after":["a"],"delay_ms":5}"#);
        let admitted = door.check(&own, "c3-0042").unwrap();
        let job = &admitted.submission.job;
        assert_eq!(job.id.as_str(), "c3-0042");
        let needs: Vec<&str> = job.needs.iter().map(String::as_str).collect();
        assert_eq!(needs, ["gpu", "mcp:browser", "mcp:files"]);
        assert_eq!(job.deps[0].to_string(), "shop/b1/a");
        assert_eq!(job.max_attempts, 7);
        assert_eq!(job.not_before, Some(Timestamp(6_000)));
        let stored = StoredSpec::decode(&admitted.submission.spec).unwrap();
        assert_eq!(stored, StoredSpec::Inline(own.encode_to_vec().into()));
    }

    #[test]
    fn a_batch_of_requests_waits_for_a_worker_that_serves_its_model() {
        let own = r#"{"generate":{"requests":"a.jsonl","model":"m"},"needs":["gpu"]}"#;
        let admitted = door("{}").check(&spec(own), "a").unwrap();
        let job = &admitted.submission.job;
        assert_eq!(job.kind, JobKind::Generate);
        let needs: Vec<&str> = job.needs.iter().map(String::as_str).collect();
        assert_eq!(needs, ["gpu", "model:m"]);
        let any = r#"{"generate":{"requests":"a.jsonl"}}"#;
        let admitted = door("{}").check(&spec(any), "a").unwrap();
        assert!(admitted.submission.job.needs.is_empty());
        let of_a_rollout = door(r#"{"mcp":["browser"]}"#).check(&spec(any), "a");
        assert_eq!(of_a_rollout.unwrap_err()[0].field, "mcp");
    }

    #[test]
    fn an_export_waits_for_any_worker_that_exports() {
        let own = r#"{"export":{"adapter":"shop@v1","repo":"me/shop"}}"#;
        let job = door("{}").check(&spec(own), "a").unwrap().submission.job;
        assert_eq!((job.kind, job.needs.len()), (JobKind::Export, 0));
        let refused = refused(r#"{"export":{"adapter":"shop","folder":"../x"}}"#);
        let fields: Vec<&str> = refused.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["export.adapter", "export.folder"]);
    }

    #[test]
    fn a_curation_waits_for_any_worker_that_builds_data_sets() {
        let own = r#"{"curate":{"batches":["b1"],"dataset":"shop"}}"#;
        let job = door("{}").check(&spec(own), "a").unwrap().submission.job;
        assert_eq!((job.kind, job.needs.len()), (JobKind::Curate, 0));
        let refused = refused(r#"{"curate":{"dataset":"shop","eval_share":1.5}}"#);
        let fields: Vec<&str> = refused.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["curate.batches", "curate.eval_share"]);
    }

    #[test]
    fn a_training_waits_for_any_worker_that_trains() {
        let own = r#"{"train":{"base":"b","dataset":"shop@v1","adapter":"shop"},"needs":["gpu"]}"#;
        let admitted = door("{}").check(&spec(own), "a").unwrap();
        let job = &admitted.submission.job;
        assert_eq!((job.kind, job.needs.len()), (JobKind::Train, 1));
        let refused = refused(r#"{"train":{"base":"b","adapter":"a","settings":{"rank":0}}}"#);
        let fields: Vec<&str> = refused.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["train.dataset", "train.settings.rank"]);
    }

    #[test]
    fn the_submitters_trace_context_does_not_change_a_jobs_digest() {
        let own = spec(r#"{"prompt":"x"}"#);
        let mut traced = door("{}");
        traced.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
        let (with, without) = (traced.check(&own, "a"), door("{}").check(&own, "a"));
        let (with, without) = (with.unwrap().submission, without.unwrap().submission);
        assert_eq!(with.job.traceparent, traced.traceparent);
        assert_eq!(with.job.spec_digest, without.job.spec_digest);
    }

    #[test]
    fn unknown_servers_and_commands_are_refused_by_place() {
        let errors = refused(r#"{"prompt":"","mcp":["browser","shell"],"limits":{"turns":-1}}"#);
        let fields: Vec<&str> = errors.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["prompt", "limits.turns", "mcp[1]"]);
        assert_eq!(
            errors[2].1,
            "must be a configured MCP server: browser, files"
        );

        let inline = r#"{"prompt":"x","mcp":[{"name":"sh","server":{"command":"sh"}}]}"#;
        assert_eq!(refused(inline)[0].0, "mcp[0].server");
        let mut open = door("{}");
        open.allow_inline_mcp = true;
        assert!(open.check(&spec(inline), "a").is_ok());
    }

    #[test]
    fn recordings_need_no_server() {
        let own = r#"{"prompt":"x","mcp":["shell"],"replay":["b0/j"],"needs":["gpu"]}"#;
        let job = door("{}").check(&spec(own), "a").unwrap().submission.job;
        assert_eq!((job.kind, job.needs.len()), (JobKind::Rollout, 1));
        assert_eq!(
            refused(r#"{"prompt":"x","replay":["j"]}"#)[0].0,
            "replay[0]"
        );
    }

    #[tokio::test]
    async fn a_large_spec_goes_to_the_store_with_its_defaults() {
        let store = Store::open("memory://").await.unwrap();
        let door = door(r#"{"mcp":["browser"]}"#);
        let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(INLINE_BYTES_MAX));
        let mut admitted = [door.check(&spec(&long), "a").unwrap()];
        let Some(StoredSpec::Blob(path)) = StoredSpec::decode(&admitted[0].submission.spec) else {
            panic!("must be a blob");
        };
        door.store_blobs(&store, &mut admitted).await.unwrap();
        let content = store.get(&path).await.unwrap();
        assert_eq!(
            path,
            layout::blob(&door.project, &espalier_core::trace::sha256_hex(&content))
        );
        let whole = v1::JobSpec::decode(content).unwrap();
        assert_eq!(whole.rollout.unwrap().mcp[0].name, "browser");

        let huge = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(10 << 20));
        let errors = door.check(&spec(&huge), "a").unwrap_err();
        assert_eq!((errors[0].field.as_str(), errors.len()), ("spec", 1));
    }
}
