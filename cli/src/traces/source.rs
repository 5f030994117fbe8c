//! Where traces come from: the object store itself, or the coordinator's API.

use espalier_core::id::{BatchId, Fence, JobKey, ProjectId};
use espalier_core::time::Timestamp;
use espalier_core::trace::edits::{Curated, Patch, Standing, apply};
use espalier_core::trace::{RolloutSummary, Summary, Trace};
use espalier_proto::convert::summary_from_wire;
use espalier_proto::v1;
use espalier_runtime::store::Store;
use espalier_runtime::traces::{Listed, Loaded, TRACE_BYTES_MAX, Traces};
use futures::{Stream, StreamExt, TryStreamExt};

use super::{Filter, Place};
use crate::client::Client;
use crate::context::Context;
use crate::exit::Problem;

/// Objects that are read at once: hides the latency of a remote store, and bounds memory by as many traces.
const READS_MAX: usize = 8;
/// Jobs of one page of the API.
const PAGE_SIZE: u32 = 1000;

/// A trace as a list shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The job that made it.
    pub job: JobKey,
    /// What it came to.
    pub summary: RolloutSummary,
    /// When it was published.
    pub published: Timestamp,
    /// How many corrections it has.
    pub patches: u32,
    /// What they say of it as a whole.
    pub standing: Standing,
}

impl Entry {
    fn listed(&self) -> Listed {
        Listed {
            job: self.job.clone(),
            patches: self.patches,
        }
    }
}

/// A trace, its corrections, and what they come to.
#[derive(Clone, Debug)]
pub struct Found {
    /// As it was recorded.
    pub trace: Trace,
    /// The corrections, in order.
    pub log: Vec<Patch>,
    /// What they come to.
    pub curated: Curated,
}

impl From<Loaded> for Found {
    fn from(loaded: Loaded) -> Self {
        Self {
            trace: loaded.trace,
            log: loaded.log,
            curated: loaded.curated,
        }
    }
}

impl From<Trace> for Found {
    fn from(trace: Trace) -> Self {
        let curated = apply(&trace, &[]);
        let log = Vec::new();
        Self {
            trace,
            log,
            curated,
        }
    }
}

/// Where traces come from.
pub enum Source {
    /// The object store.
    Store(Traces),
    /// The API; corrections are not seen there.
    Api(Box<Client>, ProjectId),
}

impl Source {
    /// The store that was named or that the local `up` keeps; else the API.
    pub async fn open(context: &Context, place: &Place) -> Result<Self, Problem> {
        let project = context.project()?;
        if let Some(traces) = open_store(context, place, &project).await? {
            return Ok(Self::Store(traces));
        }
        Ok(Self::Api(Box::new(context.client().await?), project))
    }

    /// The published traces of a batch, or of the project, in order of their names.
    pub async fn list(&self, batch: Option<&BatchId>) -> Result<Vec<Entry>, Problem> {
        match self {
            Self::Store(traces) => {
                let listed = traces.list(batch).await?;
                let read = |one: Listed| async move {
                    let found = traces.summary(&one).await?;
                    // What is no rollout has no trace.
                    let Summary::Rollout(summary) = found.manifest.summary else {
                        return Ok(None);
                    };
                    Ok::<_, Problem>(Some(Entry {
                        job: one.job,
                        summary,
                        published: found.manifest.created_at_us,
                        patches: one.patches,
                        standing: found.standing,
                    }))
                };
                futures::stream::iter(listed)
                    .map(read)
                    .buffered(READS_MAX)
                    .try_filter_map(|entry| std::future::ready(Ok(entry)))
                    .try_collect()
                    .await
            }
            Self::Api(client, project) => {
                let batch = batch.ok_or_else(|| {
                    Problem::refused("a batch must be named where traces are read through the API")
                        .fix("name one (`espalier batches`), or the store with --store URL")
                })?;
                list_jobs(client, project, batch).await
            }
        }
    }

    /// Those of a batch that `filter` admits. None at all is refused: it is a typing error more often than a wish.
    pub async fn choose(&self, batch: &BatchId, filter: &Filter) -> Result<Vec<Entry>, Problem> {
        let mut entries = self.list(Some(batch)).await?;
        entries.retain(|entry| filter.admits(entry));
        if entries.is_empty() {
            let fix = format!("see what there is with `espalier traces list {batch}`");
            return Err(Problem::refused(format!("no trace of `{batch}` fits")).fix(fix));
        }
        Ok(entries)
    }

    /// One trace.
    pub async fn find(&self, job: &JobKey) -> Result<Found, Problem> {
        match self {
            Self::Store(traces) => Ok(load(traces, job).await?.into()),
            Self::Api(client, _) => Ok(fetch(client, job).await?.into()),
        }
    }

    /// The steps of one attempt, as lines of JSON.
    pub async fn steps(&self, job: &JobKey, fence: Fence) -> Result<String, Problem> {
        let Self::Store(traces) = self else {
            return Err(Problem::refused(
                "the steps of an attempt are read from the store, not the API",
            )
            .fix("name it with --store URL"));
        };
        let steps = traces.steps(job, fence).await?;
        if steps.segments == 0 {
            let what = format!("no steps of {job} are stored for an attempt under fence {fence}");
            let attempts = traces.attempts(job).await?;
            let fences: Vec<String> = attempts.iter().map(ToString::to_string).collect();
            return Err(Problem::refused(what).fix(match fences.is_empty() {
                true => "no attempt at it left anything there".to_owned(),
                false => format!("attempts that left something there: {}", fences.join(", ")),
            }));
        }
        Ok(steps.text)
    }

    /// The traces of `entries`, in order, a few read ahead.
    pub fn load_all(&self, entries: Vec<Entry>) -> impl Stream<Item = Result<Found, Problem>> {
        let load = move |entry: Entry| async move {
            match self {
                Self::Store(traces) => Ok(traces.load(&entry.listed()).await?.into()),
                Self::Api(client, _) => Ok(fetch(client, &entry.job).await?.into()),
            }
        };
        futures::stream::iter(entries).map(load).buffered(READS_MAX)
    }
}

/// The published trace of `job`, with all of its corrections.
pub async fn load(traces: &Traces, job: &JobKey) -> Result<Loaded, Problem> {
    Ok(traces.load(&traces.find(job).await?).await?)
}

/// The store, which corrections need.
pub async fn writable(context: &Context, place: &Place) -> Result<Traces, Problem> {
    let project = context.project()?;
    open_store(context, place, &project).await?.ok_or_else(|| {
        Problem::refused("corrections are written to the object store, and only the API is known")
            .fix("name the store with --store URL")
    })
}

/// The store, where one is named or known.
pub async fn open_store(
    context: &Context,
    place: &Place,
    project: &ProjectId,
) -> Result<Option<Traces>, Problem> {
    let url = match &place.store {
        Some(url) => Some(url.clone()),
        None => context.store_url()?,
    };
    match url {
        Some(url) => Ok(Some(Traces::new(Store::open(&url).await?, project.clone()))),
        None => Ok(None),
    }
}

async fn list_jobs(
    client: &Client,
    project: &ProjectId,
    batch: &BatchId,
) -> Result<Vec<Entry>, Problem> {
    let mut request = v1::ListJobsRequest {
        batch: batch.to_string(),
        states: vec![v1::JobState::Succeeded.into()],
        page_size: PAGE_SIZE,
        ..Default::default()
    };
    let mut entries = Vec::new();
    loop {
        let page = client.jobs().list_jobs(request.clone()).await?.into_inner();
        for job in page.jobs {
            let Some(summary) = job.summary else { continue };
            let Summary::Rollout(summary) = summary_from_wire(summary)? else {
                continue;
            };
            let key = JobKey::new(project.clone(), batch.clone(), job.id.parse()?);
            entries.push(Entry {
                job: key,
                summary,
                published: Timestamp(job.ended_at_us),
                patches: 0,
                standing: Standing::default(),
            });
        }
        if page.next_page_token.is_empty() {
            return Ok(entries);
        }
        request.page_token = page.next_page_token;
    }
}

async fn fetch(client: &Client, job: &JobKey) -> Result<Trace, Problem> {
    let request = v1::GetTraceRequest {
        batch: job.batch.to_string(),
        id: job.job.to_string(),
    };
    let mut chunks = client.jobs().get_trace(request).await?.into_inner();
    let mut text = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        text.extend_from_slice(&chunk.data);
        if text.len() as u64 > TRACE_BYTES_MAX {
            let rule = format!("the trace of {job} must have at most {TRACE_BYTES_MAX} bytes");
            return Err(Problem::failed(rule));
        }
    }
    Trace::from_json(&text)
        .map_err(|error| Problem::failed(format!("the trace of {job} cannot be read: {error}")))
}
