//! `JobService`: submitting, watching and steering jobs.

use std::sync::Arc;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey, ProjectId};
use espalier_core::queue::{BatchSeq, JobFilter, Refusal, Selector};
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::tasks::OnFailure;
use espalier_runtime::telemetry::names::{attribute, span};
use espalier_runtime::telemetry::{self, TraceParent};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::page::{self, List};
use super::watch::{self, Watch};
use super::{
    Shared, find_batch, job_key, missing_batch, no_job, questions, queue_error, submit, trace, view,
};
use crate::auth::Call;
use crate::queue::QueueError;

/// Most labels of a filter.
const FILTER_LABELS_MAX: usize = 64;
/// Most ids of one retry.
const RETRY_IDS_MAX: usize = 1_000;

/// The service.
#[derive(Clone)]
pub struct JobApi(pub Arc<Shared>);

#[tonic::async_trait]
impl v1::job_service_server::JobService for JobApi {
    async fn open_batch(
        &self,
        request: Request<v1::OpenBatchRequest>,
    ) -> Result<Response<v1::OpenBatchResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::OpenBatch)?;
        let batch = submit::open_batch(&self.0, project, request.into_inner()).await?;
        Ok(Response::new(v1::OpenBatchResponse { batch: Some(batch) }))
    }

    async fn submit_chunk(
        &self,
        request: Request<v1::SubmitChunkRequest>,
    ) -> Result<Response<v1::SubmitChunkResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::SubmitChunk)?;
        let caller = traceparent(request.metadata());
        let request = request.into_inner();
        let batch = BatchId::new(&request.batch).map_err(ApiError::Field)?;
        let span = tracing::info_span!(
            span::SUBMIT,
            otel.kind = "server",
            { attribute::PROJECT } = %project,
            { attribute::BATCH } = %batch,
            { attribute::JOBS } = request.jobs.len(),
        );
        if let Some(caller) = caller {
            telemetry::continue_from(&span, caller);
        }
        let submit = async {
            let cause = telemetry::inject_traceparent().or(caller);
            let cause = cause.map(|cause| cause.to_string());
            submit::submit_chunk(&self.0, project, request, cause).await
        };
        Ok(Response::new(submit.instrument(span).await?))
    }

    async fn close_batch(
        &self,
        request: Request<v1::CloseBatchRequest>,
    ) -> Result<Response<v1::CloseBatchResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::CloseBatch)?;
        let batch = BatchId::new(&request.get_ref().batch).map_err(ApiError::Field)?;
        let asked = self.0.journal.close_batch(project.clone(), batch.clone());
        let closed = match asked.await {
            Err(QueueError::Refused(Refusal::UnknownBatch { .. })) => {
                return Err(missing_batch(&self.0, &project, &batch).await.into());
            }
            closed => closed.map_err(queue_error)?,
        };
        let batch = Some(view::batch(&closed));
        Ok(Response::new(v1::CloseBatchResponse { batch }))
    }

    async fn get_batch(
        &self,
        request: Request<v1::GetBatchRequest>,
    ) -> Result<Response<v1::Batch>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::GetBatch)?;
        let found = find_batch(&self.0, project, &request.get_ref().batch).await?;
        Ok(Response::new(view::batch(&found)))
    }

    async fn list_batches(
        &self,
        request: Request<v1::ListBatchesRequest>,
    ) -> Result<Response<v1::ListBatchesResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::ListBatches)?;
        Ok(Response::new(
            self.batches(project, request.get_ref()).await?,
        ))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::Job>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::GetJob)?;
        let request = request.into_inner();
        let key = job_key(project, &request.batch, &request.id).map_err(ApiError::Field)?;
        let found = self.0.queue.job(key.clone()).await.map_err(queue_error)?;
        Ok(Response::new(view::job(found.ok_or_else(|| no_job(&key))?)))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::ListJobs)?;
        Ok(Response::new(
            self.jobs(project, request.into_inner()).await?,
        ))
    }

    type WatchBatchStream = ReceiverStream<Result<v1::BatchEvent, Status>>;

    async fn watch_batch(
        &self,
        request: Request<v1::WatchBatchRequest>,
    ) -> Result<Response<Self::WatchBatchStream>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::WatchBatch)?;
        let token = self.0.auth.admit(request.metadata(), Call::WatchBatch)?;
        let place = self.0.watch_places.take(&token.name)?;
        let found = find_batch(&self.0, project.clone(), &request.get_ref().batch).await?;
        let (events, stream) = mpsc::channel(watch::EVENTS_MAX);
        let watch = Watch {
            shared: Arc::clone(&self.0),
            project,
            batch: found.batch,
            cursor: request.get_ref().after_cursor,
            events,
        };
        let run = watch.run(place);
        self.0.tasks.spawn("api.watch", OnFailure::Log, run);
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::Cancel)?;
        let which = selector(project, request.into_inner()).map_err(ApiError::Field)?;
        let done = self.0.journal.cancel(which).await.map_err(queue_error)?;
        Ok(Response::new(v1::CancelResponse {
            cancelled: done.cancelled,
            signalled: done.requested,
        }))
    }

    async fn retry(
        &self,
        request: Request<v1::RetryRequest>,
    ) -> Result<Response<v1::RetryResponse>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::Retry)?;
        let requeued = self.requeue(project, request.into_inner()).await?;
        Ok(Response::new(v1::RetryResponse { requeued }))
    }

    async fn list_questions(
        &self,
        request: Request<v1::ListQuestionsRequest>,
    ) -> Result<Response<v1::ListQuestionsResponse>, Status> {
        let project = self
            .0
            .auth
            .project(request.metadata(), Call::ListQuestions)?;
        let answer = questions::list(&self.0, project, request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn answer_question(
        &self,
        request: Request<v1::AnswerQuestionRequest>,
    ) -> Result<Response<v1::AnswerQuestionResponse>, Status> {
        let project = self
            .0
            .auth
            .project(request.metadata(), Call::AnswerQuestion)?;
        questions::answer(&self.0, &project, request.into_inner()).await?;
        Ok(Response::new(v1::AnswerQuestionResponse {}))
    }

    type GetTraceStream = ReceiverStream<Result<v1::TraceChunk, Status>>;

    async fn get_trace(
        &self,
        request: Request<v1::GetTraceRequest>,
    ) -> Result<Response<Self::GetTraceStream>, Status> {
        let project = self.0.auth.project(request.metadata(), Call::GetTrace)?;
        let request = request.into_inner();
        let key = job_key(project, &request.batch, &request.id).map_err(ApiError::Field)?;
        let turn = self.0.trace_readers.turn(&key.project).await?;
        let packed = trace::find(&self.0, key).await?;
        let (pieces, stream) = mpsc::channel(trace::PIECES_MAX);
        let sent = trace::stream(packed, pieces, turn);
        self.0.tasks.spawn("api.trace", OnFailure::Log, sent);
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl JobApi {
    async fn batches(
        &self,
        project: ProjectId,
        request: &v1::ListBatchesRequest,
    ) -> Result<v1::ListBatchesResponse, ApiError> {
        let size = page::size(request.page_size)?;
        let list = List::of("ListBatches").with(project.as_str());
        let before = match list.after(&request.page_token)? {
            Some(seq) => {
                let number = seq
                    .parse()
                    .map_err(|_| FieldError::new("page_token", seq, "must end with a number"))?;
                Some(BatchSeq(number))
            }
            None => None,
        };
        let newest = self.0.queue.batches_newest(project, before, size + 1).await;
        let mut newest = newest.map_err(queue_error)?;
        let more = newest.len() > size;
        newest.truncate(size);
        let last = newest.last().filter(|_| more);
        Ok(v1::ListBatchesResponse {
            next_page_token: last
                .map(|batch| list.token(&batch.seq.0.to_string()))
                .unwrap_or_default(),
            batches: newest.iter().map(view::batch).collect(),
        })
    }

    async fn jobs(
        &self,
        project: ProjectId,
        request: v1::ListJobsRequest,
    ) -> Result<v1::ListJobsResponse, ApiError> {
        let size = page::size(request.page_size)?;
        if request.labels.len() > FILTER_LABELS_MAX {
            let rule = format!("must have at most {FILTER_LABELS_MAX} entries");
            return Err(FieldError::new("labels", request.labels.len(), rule).into());
        }
        let batch = BatchId::new(&request.batch)?;
        let mut states = view::states_from_wire(&request.states)?;
        states.sort_unstable();
        states.dedup();
        let mut list = List::of("ListJobs")
            .with(project.as_str())
            .with(batch.as_str());
        for state in &states {
            list = list.with(state.as_str());
        }
        for (name, value) in &request.labels {
            list = list.with(name).with(value);
        }
        let after = list
            .after(&request.page_token)?
            .map(JobId::new)
            .transpose()?;
        let filter = JobFilter {
            states,
            kinds: Vec::new(),
            labels: request.labels,
        };
        let found = self.0.queue.jobs(project, batch, filter, after, size).await;
        let found = found.map_err(queue_error)?;
        let rows = found.len();
        let jobs = page::fitting(found.into_iter().map(view::job));
        // A short page is the last; after a full one there may be nothing, which the next call says.
        let last = jobs.last().filter(|_| rows == size || jobs.len() < rows);
        Ok(v1::ListJobsResponse {
            next_page_token: last.map(|job| list.token(&job.id)).unwrap_or_default(),
            jobs,
        })
    }

    async fn requeue(
        &self,
        project: ProjectId,
        request: v1::RetryRequest,
    ) -> Result<u64, ApiError> {
        if request.ids.len() > RETRY_IDS_MAX {
            let rule = format!("must have at most {RETRY_IDS_MAX} entries");
            return Err(FieldError::new("ids", request.ids.len(), rule).into());
        }
        let batch = find_batch(&self.0, project.clone(), &request.batch)
            .await?
            .batch;
        if request.ids.is_empty() {
            let which = Selector::Batch(project, batch);
            return self.0.queue.requeue_dead(which).await.map_err(queue_error);
        }
        let mut keys = Vec::with_capacity(request.ids.len());
        for (i, id) in request.ids.iter().enumerate() {
            let id = JobId::new(id).map_err(|mut error| {
                error.field = format!("ids[{i}]");
                error
            })?;
            let key = JobKey::new(project.clone(), batch.clone(), id);
            // All of them first: a list with a mistake in it changes nothing.
            let found = self.0.queue.job(key.clone()).await.map_err(queue_error)?;
            found.ok_or_else(|| no_job(&key))?;
            keys.push(key);
        }
        let mut requeued = 0;
        for key in keys {
            let done = self.0.queue.requeue_dead(Selector::Job(key)).await;
            requeued += done.map_err(queue_error)?;
        }
        Ok(requeued)
    }
}

fn selector(project: ProjectId, request: v1::CancelRequest) -> Result<Selector, FieldError> {
    use v1::cancel_request::Target;
    match request.target {
        Some(Target::Job(job)) => Ok(Selector::Job(job_key(project, &job.batch, &job.id)?)),
        Some(Target::Batch(batch)) => Ok(Selector::Batch(project, BatchId::new(batch)?)),
        Some(Target::Label(label)) if label.name.is_empty() => Err(FieldError::new(
            "label.name",
            label.name,
            "must not be empty",
        )),
        Some(Target::Label(label)) => Ok(Selector::Label {
            project,
            key: label.name,
            value: label.value,
        }),
        None => Err(FieldError::new(
            "target",
            "nothing",
            "must be a job, a batch or a label",
        )),
    }
}

/// The caller's trace context, where it sent a valid one.
fn traceparent(metadata: &MetadataMap) -> Option<TraceParent> {
    let text = metadata.get("traceparent")?.to_str().ok()?;
    text.parse().ok()
}
