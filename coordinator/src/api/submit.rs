//! Taking in batches and chunks of jobs. Each job goes through the [`Door`]; what is here is what a batch and a chunk
//! have as a whole: their size, the room of their project, and that they may come again.

use std::collections::BTreeMap;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::queue::{ItemResult, JobKind, NewBatch};
use espalier_core::spec::{CompareArmDraft, JobDraft, PromptDraft, limits};
use espalier_proto::convert::{draft_from_wire, field_error_to_wire};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::store::{Store, StoreError, StoreErrorKind};
use espalier_runtime::{tasks, telemetry};
use opentelemetry::KeyValue;
use prost::Message;
use sha2::{Digest, Sha256};
use telemetry::names::attribute;

use super::door::{Admitted, Door, in_clients_terms};
use super::{Shared, blocking_error, missing_batch, queue_error};
use crate::queue::{self, Chunk, ChunkReply, OpenBatch};

/// Most jobs of a chunk: bounds the work of one call.
const CHUNK_JOBS_MAX: usize = 2_000;
/// Most bytes of a chunk's jobs, not counting those that are refused for their own size.
const CHUNK_BYTES_MAX: usize = 8 << 20;

/// Opens a batch whose defaults have a valid form. Whether they suffice is seen at each job.
pub async fn open_batch(
    shared: &Shared,
    project: ProjectId,
    request: v1::OpenBatchRequest,
) -> Result<v1::Batch, ApiError> {
    let batch = BatchId::new(&request.batch)?;
    let defaults = request.defaults.unwrap_or_default();
    let encoded: Bytes = defaults.encode_to_vec().into();
    if encoded.len() > queue::SPEC_BYTES_MAX {
        let shown = format!("{} bytes", encoded.len());
        let rule = format!("must have at most {} bytes", queue::SPEC_BYTES_MAX);
        return Err(FieldError::new("defaults", shown, rule).into());
    }
    check_defaults(defaults).map_err(|error| error.under("defaults"))?;
    let params_digest = Sha256::digest(&encoded).into();
    let request = OpenBatch {
        batch: NewBatch {
            project,
            batch,
            params_digest,
        },
        defaults: encoded,
    };
    let view = shared.journal.open_batch(request).await;
    let view = view.map_err(queue_error)?;
    Ok(super::view::batch(&view))
}

/// The first rule that the defaults break by themselves, whatever the jobs add.
fn check_defaults(defaults: v1::JobSpec) -> Result<(), FieldError> {
    let mut draft = draft_from_wire(defaults)?;
    if let Some(id) = &draft.id {
        return Err(FieldError::new(
            "id",
            id,
            "must be absent: an id is one job's",
        ));
    }
    complete(&mut draft);
    let errors = draft.check().err().unwrap_or_default();
    // A check may use a server that only the jobs name.
    let by_jobs = |error: &FieldError| error.field.ends_with("mcp.server");
    errors.into_iter().find(|e| !by_jobs(e)).map_or(Ok(()), Err)
}

/// Gives what a job must say, and the defaults leave to each.
fn complete(draft: &mut JobDraft) {
    const NAME: &str = "given-by-each-job";
    let name = || NAME.to_owned();
    let version = || format!("{NAME}@v1");
    if let Some(export) = &mut draft.export {
        export.adapter.get_or_insert_with(version);
        if export.folder.is_none() {
            export.repo.get_or_insert_with(|| format!("{NAME}/{NAME}"));
        }
    } else if let Some(train) = &mut draft.train {
        train.base.get_or_insert_with(name);
        train.adapter.get_or_insert_with(name);
        match (&train.dataset, &train.rows, &train.eval_rows) {
            (None, None, None) => train.dataset = Some(version()),
            // A data set has held-out rows of its own.
            (None, None, Some(_)) => train.rows = Some(name()),
            _ => {}
        }
    } else if let Some(curate) = &mut draft.curate {
        curate.dataset.get_or_insert_with(name);
        if curate.batches.is_empty() && curate.uploads.is_empty() {
            curate.extends.get_or_insert_with(version);
        }
    } else if let Some(compare) = &mut draft.compare {
        for label in ["before", "after"].iter().skip(compare.arms.len()) {
            let label = Some((*label).to_owned());
            let batches = vec![name()];
            compare.arms.push(CompareArmDraft {
                label,
                batches,
                ..CompareArmDraft::default()
            });
        }
    } else if let Some(score) = &mut draft.score {
        if score.traces.is_empty() {
            score.traces.push(format!("{NAME}/{NAME}"));
        }
    } else if let Some(generate) = &mut draft.generate {
        generate.requests.get_or_insert_with(name);
    } else if draft.prompt == PromptDraft::Absent {
        draft.prompt = PromptDraft::One(name());
    }
}

/// Takes a chunk in. One that was taken before may come again at any time: its jobs are in the queue and need no
/// room, and those of them whose servers are not known now are found by their specs.
pub async fn submit_chunk(
    shared: &Shared,
    project: ProjectId,
    request: v1::SubmitChunkRequest,
    traceparent: Option<String>,
) -> Result<v1::SubmitChunkResponse, ApiError> {
    let batch = BatchId::new(&request.batch)?;
    check_size(&request.jobs)?;
    let (chunk, jobs) = (request.chunk, request.jobs);
    let found = shared.queue.intake(project.clone(), batch.clone(), chunk);
    let Some(found) = found.await.map_err(queue_error)? else {
        return Err(missing_batch(shared, &project, &batch).await);
    };
    let known = found.digest;
    if known.is_none() {
        check_room(shared, &project, found.waiting, jobs.len())?;
    }
    let door = Door::open(shared, project, batch, found.defaults, traceparent).await?;
    let (door, mut checked) = tasks::blocking("submit.check", move || {
        let checked = check_chunk(&door, chunk, &jobs);
        (door, checked)
    })
    .await
    .map_err(blocking_error)?;
    let again = known == Some(checked.digest);
    checked.judge_servers(shared, &door, again).await?;
    door.store_blobs(&shared.store, &mut checked.admitted)
        .await
        .map_err(|error| store_error(&shared.store, &error))?;
    let admitted = checked.admitted.iter();
    let kinds: Vec<JobKind> = admitted.map(|job| job.submission.job.kind).collect();
    // A known number with other jobs is refused by the queue, even if none of them passed.
    if !checked.admitted.is_empty() || known.is_some() {
        let reply = submit(shared, &door, chunk, known, &mut checked).await?;
        checked.take_reply(&door.project, reply, &kinds);
    }
    Ok(checked.answer())
}

fn check_size(jobs: &[v1::JobSpec]) -> Result<(), FieldError> {
    if jobs.is_empty() || jobs.len() > CHUNK_JOBS_MAX {
        let rule = format!("must be 1 to {CHUNK_JOBS_MAX} jobs");
        return Err(FieldError::new("jobs", jobs.len(), rule));
    }
    let sizes = jobs.iter().map(v1::JobSpec::encoded_len);
    let bytes: usize = sizes.filter(|size| *size <= limits::SPEC_BYTES_MAX).sum();
    if bytes > CHUNK_BYTES_MAX {
        let rule = format!("must have at most {CHUNK_BYTES_MAX} bytes in one chunk");
        return Err(FieldError::new("jobs", format!("{bytes} bytes"), rule));
    }
    Ok(())
}

/// Stops admission of a project that has more waiting than it may.
fn check_room(
    shared: &Shared,
    project: &ProjectId,
    waiting: u64,
    jobs: usize,
) -> Result<(), ApiError> {
    let max = shared.config.jobs_waiting_max;
    if waiting + jobs as u64 > max {
        return Err(ApiError::Exhausted(format!(
            "{waiting} jobs of project `{project}` wait already, of at most {max} (`jobs_waiting_max`); \
             submit again when some have run"
        )));
    }
    Ok(())
}

/// What the door made of a chunk.
#[derive(Debug, Default)]
struct Checked {
    /// Of the chunk as it was sent.
    digest: [u8; 32],
    admitted: Vec<Admitted>,
    /// Position in the chunk and id of each admitted job.
    places: Vec<(usize, String)>,
    /// Position, id and verdict of jobs that only the servers they name stand against.
    without_servers: Vec<(usize, String, Box<Admitted>, Vec<FieldError>)>,
    accepted: u32,
    rejected: Vec<v1::Rejection>,
}

fn check_chunk(door: &Door, chunk: u32, jobs: &[v1::JobSpec]) -> Checked {
    let mut checked = Checked {
        digest: digest_of(jobs),
        ..Checked::default()
    };
    for (index, own) in jobs.iter().enumerate() {
        let id = own.id.clone().unwrap_or_default();
        match door.judge(own, &format!("c{chunk}-{index:04}")) {
            Ok(admitted) => {
                checked.admitted.push(admitted);
                checked.places.push((index, id));
            }
            Err(refused) => match refused.without_servers {
                Some(job) => {
                    let job = (index, id, job, refused.errors);
                    checked.without_servers.push(job);
                }
                None => checked.reject(index, id, refused.errors),
            },
        }
    }
    checked
}

/// The same jobs in the same order have the same digest, whatever becomes of them at the door.
fn digest_of(jobs: &[v1::JobSpec]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for job in jobs {
        hasher.update(job.encode_length_delimited_to_vec());
    }
    hasher.finalize().into()
}

/// Whether the very job is in the queue.
async fn is_there(shared: &Shared, door: &Door, job: &Admitted) -> Result<bool, ApiError> {
    let (project, batch) = (door.project.clone(), door.batch.clone());
    let key = JobKey::new(project, batch, job.submission.job.id.clone());
    let found = shared.queue.spec(key).await.map_err(queue_error)?;
    Ok(found.is_some_and(|found| found.spec == job.submission.spec))
}

impl Checked {
    /// Lets jobs with unknown servers pass if the chunk came `again` and they are in the queue; rejects the others.
    async fn judge_servers(
        &mut self,
        shared: &Shared,
        door: &Door,
        again: bool,
    ) -> Result<(), ApiError> {
        let places = std::mem::take(&mut self.places).into_iter();
        let mut passed: Vec<_> = places.zip(std::mem::take(&mut self.admitted)).collect();
        for (index, id, job, errors) in std::mem::take(&mut self.without_servers) {
            if again && is_there(shared, door, &job).await? {
                passed.push(((index, id), *job));
            } else {
                self.reject(index, id, errors);
            }
        }
        // The first of two jobs with one id is the one that counts.
        passed.sort_by_key(|((index, _), _)| *index);
        (self.places, self.admitted) = passed.into_iter().unzip();
        Ok(())
    }

    fn reject(&mut self, index: usize, id: String, errors: Vec<FieldError>) {
        self.rejected.push(v1::Rejection {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            id,
            errors: errors.into_iter().map(field_error_to_wire).collect(),
        });
    }

    /// `kinds`: of the jobs, in their order.
    fn take_reply(&mut self, project: &ProjectId, reply: ChunkReply, kinds: &[JobKind]) {
        let mut new: BTreeMap<JobKind, u64> = BTreeMap::new();
        let places = std::mem::take(&mut self.places);
        for (((index, id), item), kind) in places.into_iter().zip(reply.items).zip(kinds) {
            match item {
                ItemResult::Accepted => {
                    self.accepted += 1;
                    *new.entry(*kind).or_default() += 1;
                }
                ItemResult::AlreadyThere => self.accepted += 1,
                ItemResult::Rejected(error) => {
                    self.reject(index, id, vec![in_clients_terms(error)]);
                }
            }
        }
        for (kind, new) in new {
            let labels = [
                KeyValue::new(attribute::PROJECT, project.to_string()),
                KeyValue::new(attribute::JOB_KIND, kind.as_str()),
            ];
            telemetry::metrics().job_submissions.add(new, &labels);
        }
    }

    fn answer(mut self) -> v1::SubmitChunkResponse {
        self.rejected
            .sort_unstable_by_key(|rejection| rejection.index);
        v1::SubmitChunkResponse {
            accepted: self.accepted,
            rejected: self.rejected,
        }
    }
}

async fn submit(
    shared: &Shared,
    door: &Door,
    chunk: u32,
    known: Option<[u8; 32]>,
    checked: &mut Checked,
) -> Result<ChunkReply, ApiError> {
    let admitted = std::mem::take(&mut checked.admitted).into_iter();
    let chunk = Chunk {
        project: door.project.clone(),
        batch: door.batch.clone(),
        n: chunk,
        digest: checked.digest,
        jobs: admitted.map(|admitted| admitted.submission).collect(),
    };
    let submitted = shared.journal.submit(chunk, known).await;
    submitted.map_err(queue_error)
}

fn store_error(store: &Store, error: &StoreError) -> ApiError {
    tracing::error!(
        error = telemetry::error_chain(error),
        "a large spec could not be stored"
    );
    let url = store.url();
    let why = match error.kind {
        StoreErrorKind::Full => "is full; free space there",
        StoreErrorKind::Denied => "refuses the coordinator; check its rights there",
        _ => "does not answer",
    };
    ApiError::Unavailable(format!(
        "the chunk's large specs could not be stored: the object store {url} {why}, and send the chunk again"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::{TrainMethod, parse_line};
    use espalier_proto::convert::draft_to_wire;

    fn spec(line: &str) -> v1::JobSpec {
        draft_to_wire(&parse_line(line.as_bytes()).unwrap())
    }

    #[test]
    fn defaults_are_checked_for_what_they_say() {
        let verdict = |line: &str| check_defaults(spec(line)).map_err(|e| e.field);
        assert_eq!(verdict("{}"), Ok(()));
        let check_by_job =
            r#"{"verify":{"mcp":{"server":"x","tool":"t","text":{"contains":"c"}}}}"#;
        assert_eq!(verdict(check_by_job), Ok(()));
        assert_eq!(verdict(r#"{"id":"a"}"#), Err("id".to_owned()));
        assert_eq!(verdict(r#"{"priority":99}"#), Err("priority".to_owned()));
        assert_eq!(verdict(r#"{"generate":{"model":"m"}}"#), Ok(()));
        assert_eq!(verdict(r#"{"export":{"merged":true}}"#), Ok(()));
        let model = verdict(r#"{"generate":{"model":" "}}"#);
        assert_eq!(model, Err("generate.model".to_owned()));
        for partial in [
            r#"{"train":{"settings":{"rank":8}}}"#,
            r#"{"train":{"base":"Qwen/Qwen3-0.6B","settings":{"max_steps":5}},"needs":["gpu"]}"#,
            r#"{"train":{"eval_rows":"held-out.jsonl"}}"#,
            r#"{"train":{"rows":"rows.jsonl","adapter":"shop"}}"#,
            r#"{"curate":{"where":"reward > 0"}}"#,
            r#"{"curate":{"batches":["b"]}}"#,
            r#"{"compare":{"min_tasks":5}}"#,
            r#"{"score":{"model":"m"}}"#,
            r#"{"compare":{"arms":[{"batches":["b"],"model":"m"}]}}"#,
        ] {
            assert_eq!(verdict(partial), Ok(()), "{partial}");
        }
        for (wrong, field) in [
            (
                r#"{"train":{"settings":{"rank":0}}}"#,
                "train.settings.rank",
            ),
            (r#"{"train":{"adapter":"a/b"}}"#, "train.adapter"),
            (r#"{"train":{},"prompt":"x"}"#, "prompt"),
            (r#"{"curate":{"near":2}}"#, "curate.near"),
            (r#"{"export":{"adapter":"shop"}}"#, "export.adapter"),
            (r#"{"compare":{"traces":-1}}"#, "compare.traces"),
        ] {
            assert_eq!(verdict(wrong), Err(field.to_owned()), "{wrong}");
        }
    }

    #[test]
    fn a_job_of_defaults_that_are_a_part_is_checked_as_a_whole() {
        let whole = |own: &str| {
            let defaults = spec(r#"{"train":{"base":"b","settings":{"rank":8,"max_steps":5}}}"#);
            let bytes = [defaults.encode_to_vec(), spec(own).encode_to_vec()].concat();
            let joined = v1::JobSpec::decode(&bytes[..]).unwrap();
            draft_from_wire(joined).unwrap().check()
        };
        let job = whole(r#"{"train":{"dataset":"shop@v1","adapter":"a"}}"#).unwrap();
        let settings = &job.train().unwrap().settings;
        assert!(
            matches!(settings.method, TrainMethod::Lora { rank: 8, .. }),
            "{settings:?}"
        );
        let error = whole(r#"{"train":{"adapter":"a"}}"#).unwrap_err();
        assert_eq!(error[0].field, "train.dataset");
    }
}
