//! A client of the public API, as a test wants it: short calls, panics with the status.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_core::id::{Fence, JobKey};
use espalier_core::spec::parse_line;
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_proto::v1::admin_service_client::AdminServiceClient;
use espalier_proto::v1::job_service_client::JobServiceClient;
use serde_json::Value;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::wait_for;

/// Adds the token to each call.
#[derive(Clone, Debug)]
pub struct Bearer(MetadataValue<Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request
            .metadata_mut()
            .insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A connection with a token.
#[derive(Clone, Debug)]
pub struct Client {
    /// The job service itself, for calls that a test wants to see refused.
    pub jobs: JobServiceClient<InterceptedService<Channel, Bearer>>,
    /// The admin service itself.
    pub admin: AdminServiceClient<InterceptedService<Channel, Bearer>>,
}

/// What became of a batch.
#[derive(Clone, Debug)]
pub struct BatchResult {
    /// The batch in its last state.
    pub batch: v1::Batch,
    /// Its jobs by id, in the state in which they were reported as ended.
    pub jobs: BTreeMap<String, v1::Job>,
}

impl BatchResult {
    /// Jobs in `state`.
    pub fn count(&self, state: v1::JobState) -> usize {
        self.jobs
            .values()
            .filter(|job| job.state() == state)
            .count()
    }

    /// Succeeded jobs whose every check held.
    pub fn solved(&self) -> usize {
        let reward = |job: &&v1::Job| {
            job.summary
                .as_ref()
                .and_then(|s| s.reward)
                .is_some_and(|r| r >= 1.0)
        };
        self.jobs.values().filter(reward).count()
    }

    /// Why the others are not solved, by id: state and stop, then the reason of the verifier and the last error.
    pub fn unsolved(&self) -> BTreeMap<&str, (String, String)> {
        let reason = |job: &v1::Job| {
            let summary = job.summary.clone().unwrap_or_default();
            let error = job.last_error.clone().unwrap_or_default();
            (
                format!("{:?} {}", job.state(), summary.stop),
                format!("{} {}", summary.reason, error.message),
            )
        };
        let bad = self
            .jobs
            .values()
            .filter(|job| job.summary.as_ref().and_then(|s| s.reward) != Some(1.0));
        bad.map(|job| (job.id.as_str(), reason(job))).collect()
    }
}

/// Time between two tries to watch a batch.
const AGAIN: Duration = Duration::from_millis(50);

impl Client {
    /// Connects to `url` with `token`.
    pub async fn connect(url: &str, token: &str) -> Self {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .expect("a url")
            .connect_timeout(Duration::from_secs(10));
        let channel = endpoint
            .connect()
            .await
            .unwrap_or_else(|error| panic!("cannot connect to {url}: {error:?}"));
        let bearer = Bearer(
            format!("Bearer {token}")
                .parse()
                .expect("a token is printable"),
        );
        Self {
            jobs: JobServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            admin: AdminServiceClient::with_interceptor(channel, bearer),
        }
    }

    /// Opens `batch`, submits the lines as one chunk and closes it. The lines are in the form of `tasks.jsonl`.
    pub async fn submit(&mut self, batch: &str, lines: &[Value]) -> v1::SubmitChunkResponse {
        let submitted = self.try_submit(batch, lines).await;
        submitted.expect("the chunk is accepted")
    }

    /// The same, where it may be refused. May be repeated.
    pub async fn try_submit(
        &mut self,
        batch: &str,
        lines: &[Value],
    ) -> Result<v1::SubmitChunkResponse, Status> {
        self.try_open(batch).await?;
        let answer = self.chunk(batch, 0, lines).await?;
        let close = v1::CloseBatchRequest {
            batch: batch.to_owned(),
        };
        self.jobs.close_batch(close).await?;
        Ok(answer)
    }

    /// Opens `batch`.
    pub async fn open(&mut self, batch: &str) {
        let opened = self.try_open(batch).await;
        opened.expect("the batch can be opened");
    }

    /// Opens `batch`, where that may be refused.
    pub async fn try_open(&mut self, batch: &str) -> Result<(), Status> {
        let open = v1::OpenBatchRequest {
            batch: batch.to_owned(),
            defaults: None,
        };
        // Boxed: a job has room for everything that jobs can do, and this one is held in the futures of most tests.
        Box::pin(self.jobs.open_batch(open)).await.map(drop)
    }

    /// Submits one chunk.
    pub async fn chunk(
        &mut self,
        batch: &str,
        chunk: u32,
        lines: &[Value],
    ) -> Result<v1::SubmitChunkResponse, Status> {
        let jobs = lines.iter().map(|line| {
            draft_to_wire(&parse_line(line.to_string().as_bytes()).expect("a job line"))
        });
        let request = v1::SubmitChunkRequest {
            batch: batch.to_owned(),
            chunk,
            jobs: jobs.collect(),
        };
        Ok(self.jobs.submit_chunk(request).await?.into_inner())
    }

    /// A job as it is now.
    pub async fn job(&self, key: &JobKey) -> v1::Job {
        let request = v1::GetJobRequest {
            batch: key.batch.to_string(),
            id: key.job.to_string(),
        };
        let answer = self.jobs.clone().get_job(request).await;
        answer.expect("the job is there").into_inner()
    }

    /// The fences of those of `keys` that are leased now.
    pub async fn leases(&self, keys: &[JobKey]) -> BTreeMap<JobKey, Fence> {
        let mut leases = BTreeMap::new();
        for key in keys {
            let fence = self.job(key).await.fence;
            if fence > 0 {
                leases.insert(key.clone(), Fence(fence));
            }
        }
        leases
    }

    /// The counters of `batch` as they are now.
    pub async fn counts(&self, batch: &str) -> v1::Counts {
        self.try_counts(batch).await.expect("the batch is there")
    }

    /// The same, where nobody may be able to tell.
    pub async fn try_counts(&self, batch: &str) -> Result<v1::Counts, Status> {
        let request = v1::GetBatchRequest {
            batch: batch.to_owned(),
        };
        let batch = self.jobs.clone().get_batch(request).await?.into_inner();
        Ok(batch.counts.expect("a batch has counters"))
    }

    /// Waits until `at_least` jobs of `batch` have succeeded, over times at which nobody can tell.
    pub async fn wait_until_succeeded(&self, batch: &str, at_least: u64, deadline: Duration) {
        let is_so = |counts: &v1::Counts| counts.succeeded >= at_least;
        self.wait_until_counts("some jobs to succeed", batch, deadline, is_so)
            .await;
    }

    /// Waits until the counters of `batch` are so in one look, over times at which nobody can tell.
    pub async fn wait_until_counts(
        &self,
        what: &str,
        batch: &str,
        deadline: Duration,
        is_so: impl Fn(&v1::Counts) -> bool,
    ) {
        wait_for(what, deadline, || async {
            match self.try_counts(batch).await {
                Ok(counts) if is_so(&counts) => Ok(()),
                other => Err(other),
            }
        })
        .await;
    }

    /// Watches `batch` until it completes, over lost connections too. Panics after `deadline`, and if a job is reported
    /// as ended twice.
    pub async fn wait(&mut self, batch: &str, deadline: Duration) -> BatchResult {
        let mut seen = Seen::default();
        let watch = async {
            while !seen.complete() {
                // A stream that breaks is taken up again where it stopped.
                if self.watch_once(batch, &mut seen).await.is_err() {
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        let ended = tokio::time::timeout(deadline, watch).await;
        assert!(
            ended.is_ok(),
            "batch {batch} is not complete after {deadline:?}: {:?}",
            seen.batch
        );
        BatchResult {
            batch: seen.batch.expect("complete"),
            jobs: seen.jobs,
        }
    }

    async fn watch_once(&mut self, batch: &str, seen: &mut Seen) -> Result<(), Status> {
        let request = v1::WatchBatchRequest {
            batch: batch.to_owned(),
            after_cursor: seen.cursor,
        };
        let mut stream = self.jobs.watch_batch(request).await?.into_inner();
        while let Some(event) = stream.message().await? {
            seen.take(event);
        }
        Ok(())
    }

    /// The published trace of a job.
    pub async fn trace(&mut self, batch: &str, id: &str) -> espalier_core::trace::Trace {
        let request = v1::GetTraceRequest {
            batch: batch.to_owned(),
            id: id.to_owned(),
        };
        let mut stream = self
            .jobs
            .get_trace(request)
            .await
            .expect("the trace is there")
            .into_inner();
        let mut bytes = Vec::new();
        while let Some(piece) = stream.message().await.expect("the trace can be read") {
            bytes.extend_from_slice(&piece.data);
        }
        espalier_core::trace::Trace::from_json(&bytes).expect("the trace reads")
    }
}

#[derive(Default)]
struct Seen {
    cursor: u64,
    batch: Option<v1::Batch>,
    jobs: BTreeMap<String, v1::Job>,
}

impl Seen {
    fn complete(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| batch.complete)
    }

    fn take(&mut self, event: v1::BatchEvent) {
        self.cursor = event.cursor;
        self.batch = event.batch;
        for job in event.ended {
            let twice = self.jobs.insert(job.id.clone(), job);
            assert!(
                twice.is_none(),
                "a job was reported as ended twice: {twice:?}"
            );
        }
    }
}
