//! One job from grant to outcome: its spec is decoded and checked, the handler runs, panics are caught, and a handler
//! that does not stop when told is dropped.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::ErrorClass;
use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::spec::JobSpec;
use espalier_core::trace::sha256_hex;
use espalier_proto::convert::{decode_draft, error_to_wire, summary_to_wire};
use espalier_proto::v1;
use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use super::book::LeaseId;
use super::lease::{Lease, Stop};
use super::{Grant, Handler, JobOutcome, WorkerDeps};
use crate::ids::{IdSource, UuidIds};
use crate::store::{Patience, Store, StoreError};
use crate::tasks::with_deadline;
use crate::telemetry::names::{attribute, span};
use crate::telemetry::{self, TraceParent};

/// How long a handler may take to end after it was told to stop; then it is dropped.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long the coordinator may take to look at a manifest, reading every file of it.
const MANIFEST_CHECK_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a job whose spec lies in the store waits for a store that is away, under its lease.
const SPEC_PATIENCE: Duration = Duration::from_secs(600);
/// Longest error message that is reported, in bytes.
const MESSAGE_BYTES_MAX: usize = 4 * 1024;
/// Longest arguments of a question, in bytes, as the protocol says.
const QUESTION_BYTES_MAX: usize = 4 * 1024;

/// What a job tells the session.
pub(super) enum Event {
    /// Its task is over.
    Ended(LeaseId, Box<JobOutcome>),
    /// It asks whether a tool may run.
    Ask(LeaseId, v1::Question, oneshot::Sender<bool>),
    /// It met a manifest that does not verify.
    BadManifest(LeaseId, String, oneshot::Sender<bool>),
}

/// What a handler may ask of the loop.
#[derive(Clone)]
pub struct JobContext {
    id: LeaseId,
    lease: Lease,
    events: mpsc::Sender<Event>,
}

impl JobContext {
    /// The lease under which the job runs.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Asks people whether a tool may be called; arguments that are too long for a question are cut. Without an answer within `timeout` it may not.
    pub async fn ask(&self, tool: &str, arguments_json: &str, timeout: Duration) -> bool {
        let question = v1::Question {
            id: UuidIds.fresh(),
            // Filled in by the coordinator.
            batch: String::new(),
            job: String::new(),
            tool: tool.to_owned(),
            arguments_json: cut_visibly(arguments_json, QUESTION_BYTES_MAX),
            time_left_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let asked = self.request(|reply| Event::Ask(self.id.clone(), question, reply));
        let answer = with_deadline("worker.ask", timeout, asked).await;
        answer.unwrap_or(false)
    }

    /// Reports that the job's published manifest does not verify. True: the coordinator moved it aside, and the place
    /// is free.
    pub async fn report_bad_manifest(&self, reason: &str) -> bool {
        let reason = cut(reason, MESSAGE_BYTES_MAX);
        let asked = self.request(|reply| Event::BadManifest(self.id.clone(), reason, reply));
        let moved = with_deadline("worker.bad_manifest", MANIFEST_CHECK_TIMEOUT, asked).await;
        moved.unwrap_or(false)
    }

    async fn request(&self, event: impl FnOnce(oneshot::Sender<bool>) -> Event) -> bool {
        let (reply, answer) = oneshot::channel();
        if self.events.send(event(reply)).await.is_err() {
            return false;
        }
        answer.await.unwrap_or(false)
    }
}

/// Runs one job and reports its end. Always reports, so that its slot comes back.
pub(super) async fn run<H: Handler>(
    handler: Arc<H>,
    wire: v1::Grant,
    id: LeaseId,
    lease: Lease,
    deps: WorkerDeps,
    events: mpsc::Sender<Event>,
) {
    let context = JobContext {
        id: id.clone(),
        lease: lease.clone(),
        events: events.clone(),
    };
    let span = attempt_span(&id, &wire);
    let attempt = Box::pin(attempt(handler.as_ref(), wire, context, &deps));
    let ended = AssertUnwindSafe(attempt.instrument(span.clone()))
        .catch_unwind()
        .await;
    let outcome = ended.unwrap_or_else(|panic| {
        JobOutcome::failed(ErrorClass::Handler, panic_text(panic.as_ref()))
    });
    let outcome = settle(outcome, lease.reason(), lease.is_publishing());
    span.record(attribute::OUTCOME, name_of(&outcome));
    span.in_scope(|| report(&id, &outcome));
    // Fails only when the session is over, and then nobody waits for the slot.
    let _ = events.send(Event::Ended(id, Box::new(outcome))).await;
}

fn attempt_span(id: &LeaseId, wire: &v1::Grant) -> tracing::Span {
    let span = tracing::info_span!(
        span::ATTEMPT,
        { attribute::PROJECT } = %id.job.project,
        { attribute::BATCH } = %id.job.batch,
        { attribute::JOB } = %id.job.job,
        { attribute::ATTEMPT } = wire.attempt,
        { attribute::FENCE } = id.fence.0,
        { attribute::OUTCOME } = tracing::field::Empty,
    );
    if let Ok(cause) = wire.traceparent.parse::<TraceParent>() {
        telemetry::link_to(&span, cause);
    }
    span
}

async fn attempt<H: Handler>(
    handler: &H,
    wire: v1::Grant,
    context: JobContext,
    deps: &WorkerDeps,
) -> JobOutcome {
    let lease = context.lease.clone();
    let stopped = lease.stopped();
    let decoded = tokio::select! {
        biased;
        () = stopped.cancelled() => return unfinished(lease.reason()),
        decoded = decode(wire, &context.id, deps) => decoded,
    };
    let grant = match decoded {
        Ok(grant) => grant,
        Err(refusal) => return *refusal,
    };
    let longest = grant.spec.max_runtime;
    let mut work = Box::pin(handler.run(grant, context));
    tokio::select! {
        biased;
        () = stopped.cancelled() => {}
        outcome = &mut work => return outcome,
        () = tokio::time::sleep(longest) => lease.stop(Stop::TooLong),
    }
    match with_deadline("worker.stop", STOP_GRACE, work).await {
        Ok(outcome) => outcome,
        Err(_) => unfinished(lease.reason()),
    }
}

/// The outcome of work that left none.
fn unfinished(reason: Option<Stop>) -> JobOutcome {
    let reason = format!("stopped: {reason:?}");
    JobOutcome::failed(ErrorClass::Infra, reason)
}

/// What is reported of work that was stopped. What is published stays published.
///
/// `publishing`: the work was done, and only the store kept its result waiting.
fn settle(outcome: JobOutcome, stop: Option<Stop>, publishing: bool) -> JobOutcome {
    match (stop, outcome) {
        (_, outcome @ JobOutcome::Published { .. }) | (None, outcome) => outcome,
        (Some(Stop::Cancelled), _) => JobOutcome::failed(ErrorClass::Cancelled, "cancelled"),
        (Some(Stop::TooLong), _) if publishing => {
            let message = "its result could not be stored within `max_runtime_s`";
            JobOutcome::failed(ErrorClass::Infra, message)
        }
        (Some(Stop::TooLong), _) => {
            JobOutcome::failed(ErrorClass::Handler, "it ran longer than `max_runtime_s`")
        }
        (Some(Stop::Draining | Stop::Aborted), _) => JobOutcome::Released {
            reason: "the worker stops".to_owned(),
        },
        // Not reported at all.
        (Some(Stop::Lost | Stop::Expired), outcome) => outcome,
    }
}

async fn decode(
    wire: v1::Grant,
    id: &LeaseId,
    deps: &WorkerDeps,
) -> Result<Grant, Box<JobOutcome>> {
    let invalid = |message: String| Box::new(JobOutcome::failed(ErrorClass::Invalid, message));
    let spec = match wire.spec_path.as_str() {
        "" => wire.spec,
        path => fetch_spec(path, id, deps).await?,
    };
    let draft = decode_draft(&spec, &[]).map_err(|error| invalid(error.to_string()))?;
    let spec: JobSpec = draft.check().map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        invalid(errors.join("; "))
    })?;
    Ok(Grant {
        key: id.job.clone(),
        fence: id.fence,
        attempt: wire.attempt,
        spec,
        draft,
    })
}

/// A large spec lies in the store under the name of its own hash.
async fn fetch_spec(path: &str, id: &LeaseId, deps: &WorkerDeps) -> Result<Bytes, Box<JobOutcome>> {
    let infra = |message: String| Box::new(JobOutcome::failed(ErrorClass::Infra, message));
    let patiently = get_patiently(&deps.store, path, &id.job);
    let bytes = with_deadline("worker.spec", SPEC_PATIENCE, patiently).await;
    let bytes = bytes
        .map_err(|late| infra(late.to_string()))?
        .map_err(|error| infra(telemetry::error_chain(&error)))?;
    if layout::blob(&id.job.project, &sha256_hex(&bytes)) != path {
        return Err(infra(format!(
            "the spec at `{path}` is not what its name says"
        )));
    }
    Ok(bytes)
}

async fn get_patiently(store: &Store, path: &str, job: &JobKey) -> Result<Bytes, StoreError> {
    let mut patience = Patience::new(job, "spec");
    loop {
        let error = match store.get(path).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => error,
        };
        if !patience.after(&error).await {
            return Err(error);
        }
    }
}

/// The result as it goes over the wire.
///
/// `log_tail`: what the job was at, told where it failed.
pub(super) fn to_wire(id: &LeaseId, outcome: JobOutcome, log_tail: String) -> v1::Result {
    use v1::result::Outcome;
    let outcome = match outcome {
        JobOutcome::Published {
            manifest,
            summary,
            spawn,
        } => Outcome::Success(v1::Success {
            manifest,
            summary: Some(summary_to_wire(&summary)),
            spawn,
        }),
        JobOutcome::Failed {
            class,
            message,
            retry_after,
        } => Outcome::Failure(v1::Failure {
            error: Some(error_to_wire(
                class,
                cut(&message, MESSAGE_BYTES_MAX),
                log_tail,
            )),
            retry_after_ms: retry_after.map_or(0, |wait| {
                u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
            }),
        }),
        JobOutcome::Released { reason } => Outcome::Released(v1::Released { reason }),
    };
    v1::Result {
        lease: Some(id.to_wire()),
        outcome: Some(outcome),
    }
}

fn report(id: &LeaseId, outcome: &JobOutcome) {
    match outcome {
        JobOutcome::Failed { class, message, .. } => {
            tracing::warn!(job = %id.job, fence = id.fence.0, class = class.as_str(), error = message, "attempt failed");
        }
        JobOutcome::Released { reason } => {
            tracing::info!(job = %id.job, fence = id.fence.0, reason, "attempt handed back");
        }
        JobOutcome::Published { .. } => {
            tracing::info!(job = %id.job, fence = id.fence.0, "attempt published");
        }
    }
}

fn name_of(outcome: &JobOutcome) -> &'static str {
    match outcome {
        JobOutcome::Published { .. } => "succeeded",
        JobOutcome::Failed { class, .. } => class.as_str(),
        JobOutcome::Released { .. } => "released",
    }
}

fn cut(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// As [`cut`], with a mark at the end: whoever decides must see that there is more.
fn cut_visibly(text: &str, bytes_max: usize) -> String {
    const MARK: &str = "…";
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    cut(text, bytes_max.saturating_sub(MARK.len())) + MARK
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!(
        "the handler panicked: {}",
        text.as_deref().unwrap_or("unknown reason")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_visibly_ends_with_a_mark_within_its_bound() {
        assert_eq!(cut_visibly("ééé", 6), "ééé");
        assert_eq!(cut_visibly("éééé", 7), "éé…");
    }

    #[test]
    fn work_that_waits_for_the_store_for_too_long_is_not_to_blame() {
        for (publishing, expected) in [(false, ErrorClass::Handler), (true, ErrorClass::Infra)] {
            let settled = settle(unfinished(None), Some(Stop::TooLong), publishing);
            let JobOutcome::Failed { class, .. } = settled else {
                panic!("it failed: {settled:?}");
            };
            assert_eq!(class, expected, "publishing: {publishing}");
        }
    }
}
