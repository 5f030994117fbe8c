//! What an agent worker does with a granted job: take over a result that is there already, or run the rollout and
//! publish it.

use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::layout;
use espalier_core::spec::SpecDigest;
use espalier_core::trace::Outcome;
use espalier_proto::v1;
use espalier_runtime::model::Served;
use espalier_runtime::tasks;
use espalier_runtime::telemetry::names::{attribute, span};
use espalier_runtime::telemetry::{self, metrics};
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome, Stop};
use tracing::Instrument;

use crate::record::{
    Claim, Found, Gate, Published, RecordContext, RecordError, Recorder, find_at_start,
};
use crate::rollout::{self, Approver, Order, Question, RolloutError, Scripted, Services};

/// Lines of a server's last words that are kept with a failure: a half of what a record holds, so that it still tells
/// what the job was at.
const LAST_WORDS_LINES_MAX: usize = 10;

/// Does rollouts.
pub(crate) struct RolloutHandler {
    services: Services,
    record: RecordContext,
}

/// Why an attempt left no result.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Rollout(#[from] RolloutError),
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl AttemptError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Rollout(error) => error.class(),
            Self::Record(error) => error.class(),
        }
    }

    fn last_words(&self) -> Option<&str> {
        match self {
            Self::Rollout(error) => error.last_words(),
            Self::Record(_) => None,
        }
    }
}

impl RolloutHandler {
    /// Runs rollouts with `services` and records them with `record`.
    pub(crate) fn new(services: Services, record: RecordContext) -> Self {
        Self { services, record }
    }

    async fn attempt(
        &self,
        grant: &Grant,
        context: &JobContext,
    ) -> Result<Published, AttemptError> {
        let spec = digest(grant).await?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&spec),
        };
        let max_runtime = grant.spec.max_runtime;
        if let Some(published) = self.adopt(claim, max_runtime, context).await? {
            return Ok(published);
        }
        let (key, attempt, fence) = (grant.key.clone(), grant.attempt, grant.fence);
        let record = self.record.clone();
        let mut recorder = Recorder::open(record, key, attempt, fence, Some(spec)).await?;
        let order = Order {
            spec: &grant.spec.rollout,
            verify: grant.draft.verify.as_ref(),
            labels: &grant.spec.labels,
        };
        let prompts = grant.spec.rollout.prompts.clone();
        let mut conversation = Scripted::new(prompts, ByCoordinator(context));
        let cancel = context.lease().stopped();
        let run = rollout::run(
            &self.services,
            order,
            &mut recorder,
            &mut conversation,
            cancel,
        );
        let outcome = Box::pin(run).await?;
        self.publish(recorder, outcome, context).await
    }

    /// A result that an earlier attempt published, if there is one, it verifies, and it is of the same spec.
    async fn adopt(
        &self,
        claim: Claim<'_>,
        max_runtime: Duration,
        context: &JobContext,
    ) -> Result<Option<Published>, RecordError> {
        let key = claim.key;
        match find_at_start(&self.record.store, claim, max_runtime).await? {
            Found::Nothing => Ok(None),
            Found::Published(manifest) => {
                tracing::info!(job = %key, winner = manifest.fence.0, "took over the result of an earlier attempt");
                Ok(Some(Published {
                    manifest: layout::manifest(key),
                    summary: manifest.summary,
                    adopted: true,
                }))
            }
            Found::OfAnotherSpec(found) => Err(claim.refuse(found)),
            // Moved aside: this attempt may publish its own.
            Found::Invalid { reason } if context.report_bad_manifest(&reason).await => Ok(None),
            Found::Invalid { reason } => Err(RecordError::InvalidManifest {
                job: key.to_string(),
                reason,
            }),
        }
    }

    async fn publish(
        &self,
        recorder: Recorder,
        outcome: Outcome,
        context: &JobContext,
    ) -> Result<Published, AttemptError> {
        let key = recorder.key().clone();
        let span = tracing::info_span!(
            span::PUBLISH,
            { attribute::TRACE_PATH } = layout::trace(&key, recorder.fence()),
        );
        context.lease().publishing();
        let gate = ByLease(context);
        Ok(recorder.publish(outcome, &gate).instrument(span).await?)
    }
}

impl Handler for RolloutHandler {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Rollout
    }

    fn endpoints(&self, served: Vec<Served>) {
        self.services.model.update(&served);
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        let _running = Running::begin();
        let stopped = context.lease().stopped();
        let attempt = Box::pin(self.attempt(&grant, &context));
        // Dropping the attempt frees its browser context and removes its files.
        let done = tokio::select! {
            biased;
            done = attempt => done,
            () = stopped.cancelled() => return stopped_outcome(context.lease().reason()),
        };
        match done {
            Ok(published) => JobOutcome::Published {
                manifest: published.manifest,
                summary: published.summary,
                spawn: Vec::new(),
            },
            Err(AttemptError::Record(RecordError::Stopped)) => {
                stopped_outcome(context.lease().reason())
            }
            Err(error) => {
                keep_last_words(error.last_words(), &context);
                JobOutcome::failed(error.class(), telemetry::error_chain(&error))
            }
        }
    }
}

/// Puts what a server said last into the job's record, beside what the job was at. The message of the failure is
/// logged and exported, where nothing that a server says may stand.
fn keep_last_words(words: Option<&str>, context: &JobContext) {
    let lines: Vec<&str> = words.unwrap_or_default().lines().collect();
    for line in &lines[lines.len().saturating_sub(LAST_WORDS_LINES_MAX)..] {
        context
            .lease()
            .progress(&format!("the server said: {line}"));
    }
}

/// What the job asks for. A spec may be as large as a book, and its canonical form is made of a copy.
async fn digest(grant: &Grant) -> Result<SpecDigest, RecordError> {
    let draft = grant.draft.clone();
    Ok(tasks::blocking("record.spec_digest", move || SpecDigest::of(&draft)).await?)
}

/// The loop knows better what a stop means; this is what is left to say.
fn stopped_outcome(reason: Option<Stop>) -> JobOutcome {
    let reason = match reason {
        Some(Stop::Cancelled) => return JobOutcome::failed(ErrorClass::Cancelled, "cancelled"),
        Some(Stop::Draining | Stop::Aborted) => "the worker stops",
        _ => "the lease ended",
    };
    JobOutcome::Released {
        reason: reason.to_owned(),
    }
}

/// Counts a rollout for as long as it runs.
struct Running;

impl Running {
    fn begin() -> Self {
        metrics().rollouts_running.add(1, &[]);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        metrics().rollouts_running.add(-1, &[]);
    }
}

/// Results become visible under the lease alone.
struct ByLease<'a>(&'a JobContext);

impl Gate for ByLease<'_> {
    fn may_publish(&self) -> bool {
        self.0.lease().may_publish()
    }

    async fn report_invalid(&self, reason: &str) -> bool {
        self.0.report_bad_manifest(reason).await
    }
}

/// Questions go to people over the coordinator.
struct ByCoordinator<'a>(&'a JobContext);

impl Approver for ByCoordinator<'_> {
    async fn approve(&self, question: Question<'_>) -> bool {
        let arguments = serde_json::to_string(question.arguments).unwrap_or_default();
        self.0
            .lease()
            .progress(&format!("waits for an answer about {}", question.tool));
        self.0
            .ask(question.tool, &arguments, approve_timeout(question.timeout))
            .await
    }

    fn progress(&self, text: String) {
        self.0.lease().progress(&text);
    }
}

/// The loop itself counts the wait that came to its end; this one only must not end first.
fn approve_timeout(timeout: Duration) -> Duration {
    timeout + Duration::from_secs(1)
}
