//! What an agent worker does with a granted job: take over a result that is there already, or run the rollout and
//! publish it.

use std::time::Duration;

use espalier_core::error::ErrorClass;
use espalier_core::layout;
use espalier_core::trace::Outcome;
use espalier_proto::v1;
use espalier_runtime::model::Served;
use espalier_runtime::publish::{self, ByLease, Claim, PublishError, Published, stopped_outcome};
use espalier_runtime::telemetry::names::{attribute, span};
use espalier_runtime::telemetry::{self, metrics};
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome};
use tracing::Instrument;

use crate::record::{RecordContext, RecordError, Recorder};
use crate::rollout::{self, Approver, Order, Question, RolloutError, Scripted, Services};
use crate::score::{ScoreError, Scorer};

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
    #[error(transparent)]
    Score(#[from] ScoreError),
    #[error("the job is no rollout, and nothing else is done here")]
    NoRollout,
}

impl AttemptError {
    fn class(&self) -> ErrorClass {
        match self {
            Self::Rollout(error) => error.class(),
            Self::Record(error) => error.class(),
            Self::Score(error) => error.class(),
            Self::NoRollout => ErrorClass::Invalid,
        }
    }

    fn last_words(&self) -> Option<&str> {
        match self {
            Self::Rollout(error) => error.last_words(),
            Self::Record(_) | Self::Score(_) | Self::NoRollout => None,
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
        if let Some(score) = grant.spec.score() {
            let scorer = Scorer {
                services: &self.services,
                grant,
                context,
            };
            return Ok(Box::pin(scorer.attempt(score)).await?);
        }
        let Some(rollout) = grant.spec.rollout() else {
            return Err(AttemptError::NoRollout);
        };
        let spec = publish::spec_digest(grant)
            .await
            .map_err(RecordError::from)?;
        let claim = Claim {
            key: &grant.key,
            fence: grant.fence,
            spec: Some(&spec),
        };
        let max_runtime = grant.spec.max_runtime;
        let adopted = publish::adopt(&self.record.store, claim, max_runtime, context);
        if let Some(published) = adopted.await.map_err(RecordError::from)? {
            return Ok(published);
        }
        let (key, attempt, fence) = (grant.key.clone(), grant.attempt, grant.fence);
        let record = self.record.clone();
        let mut recorder = Recorder::open(record, key, attempt, fence, Some(spec)).await?;
        let order = Order {
            spec: rollout,
            verify: grant.draft.verify.as_ref(),
            labels: &grant.spec.labels,
        };
        let prompts = rollout.prompts.clone();
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
            () = stopped.cancelled() => return stopped_outcome(&context),
        };
        match done {
            Ok(published) => published.into(),
            Err(
                AttemptError::Record(RecordError::Publish(PublishError::Stopped))
                | AttemptError::Score(ScoreError::Publish(PublishError::Stopped)),
            ) => stopped_outcome(&context),
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
