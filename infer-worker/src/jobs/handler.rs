//! What an inference worker does with a granted job: take over a result that is there already, or go on where an earlier
//! attempt was stopped, answer the rest, and publish it.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::layout;
use espalier_core::spec::{GenerateSpec, SpecDigest};
use espalier_core::trace::{Manifest, SCHEMA_VERSION, Summary};
use espalier_proto::v1;
use espalier_runtime::clock::Clock;
use espalier_runtime::ids::IdSource;
use espalier_runtime::publish::{self, ByLease, Claim, PublishError, Published, stopped_outcome};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::{Grant, Handler, JobContext, JobOutcome, Lease, Serving};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Answering;
use super::error::GenerateError;
use super::input::{Input, Line};
use super::output::Output;
use super::window::{Answered, Window};
use super::window_of;

/// Lines that are read ahead; each may be as long as lines get.
const LINES_AHEAD: usize = 4;
/// Answers that wait to be stored; more wait in the window.
const ANSWERS_AHEAD: usize = 64;
/// How long the last piece may take when the job was told to stop: a part of what the worker loop gives.
const LAST_PIECE_LIMIT: Duration = Duration::from_secs(2);
/// A job is handed on so long before its attempt may take no longer, in parts of that time: the last piece is stored by
/// then. Less than
const HAND_ON_PART: u32 = 10;
/// so long is too little for cores that are busy, and more than
const HAND_ON_MIN: Duration = Duration::from_secs(1);
/// so long is not needed.
const HAND_ON_MAX: Duration = Duration::from_secs(600);
/// How often people are told how far a job is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Does `generate` jobs.
pub(super) struct GenerateHandler {
    pub(super) answering: Answering,
    pub(super) store: Store,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ids: Arc<dyn IdSource>,
    pub(super) window: Arc<Semaphore>,
}

impl GenerateHandler {
    async fn attempt(
        &self,
        grant: &Grant,
        context: &JobContext,
    ) -> Result<Published, GenerateError> {
        let Some(generate) = grant.spec.generate() else {
            return Err(GenerateError::NoRequests);
        };
        let hand_on_at = hand_on_at(Instant::now(), grant.spec.max_runtime);
        let spec = publish::spec_digest(grant).await?;
        let stopped = context.lease().stopped();
        let begin = Box::pin(self.begin(grant, generate, &spec, context));
        let begun = stopped.run_until_cancelled(begin).await;
        let (input, mut output) = match begun.ok_or(GenerateError::Stopped)?? {
            Begun::Done(published) => return Ok(published),
            Begun::Open(input, output) => (input, *output),
        };
        let lease = context.lease();
        let ends = Ends {
            stopped: &stopped,
            hand_on_at,
        };
        self.answer(&input, &mut output, generate, lease, ends)
            .await?;
        if output.files().is_empty() {
            return Err(GenerateError::Empty {
                path: input.path().to_owned(),
            });
        }
        lease.publishing();
        let said = output.lines_sha256();
        input.check_says(&said).await?;
        let asked = spec.with_input(&said);
        let claim = claim(grant, &asked);
        let manifest = self.manifest(grant, claim, &input, &output);
        let gate = ByLease(context);
        Ok(publish::create(&self.store, claim, &manifest, &gate).await?)
    }

    async fn begin(
        &self,
        grant: &Grant,
        generate: &GenerateSpec,
        spec: &SpecDigest,
        context: &JobContext,
    ) -> Result<Begun, GenerateError> {
        let (key, fence, max_runtime) = (&grant.key, grant.fence, grant.spec.max_runtime);
        self.check_served(generate.model.as_deref())?;
        let path = layout::upload(&key.project, &generate.requests);
        if publish::is_published(&self.store, key, max_runtime).await? {
            // The name of the requests may have been used before, for others.
            let now = Input::open(&self.store, key, path.clone()).await?;
            let asked = spec.with_input(&now.lines_sha256().await?);
            let claim = claim(grant, &asked);
            let adopted = publish::adopt(&self.store, claim, max_runtime, context).await?;
            if let Some(published) = adopted {
                return Ok(Begun::Done(published));
            }
        }
        let input = Input::open(&self.store, key, path).await?;
        let mut output = Output::new(self.store.clone(), key.clone(), fence, spec.clone());
        output.take_over(&input).await?;
        tell(context.lease(), &input, &output);
        Ok(Begun::Open(input, Box::new(output)))
    }

    /// A grant may cross the news that its model is gone.
    fn check_served(&self, model: Option<&str>) -> Result<(), GenerateError> {
        let serving = self.answering.serving.borrow();
        match model.filter(|model| !serving.models.iter().any(|served| served == model)) {
            None => Ok(()),
            Some(model) => Err(GenerateError::NotServed {
                model: model.to_owned(),
            }),
        }
    }

    /// Answers what is left, and stores it.
    async fn answer(
        &self,
        input: &Input,
        output: &mut Output,
        generate: &GenerateSpec,
        lease: &Lease,
        ends: Ends<'_>,
    ) -> Result<(), GenerateError> {
        let window = Window {
            answering: self.answering.clone(),
            ids: Arc::clone(&self.ids),
            places: Arc::clone(&self.window),
            places_max: window_of(self.answering.sequences_max),
            model: generate.model.clone(),
        };
        let (first, start) = (output.summary().lines, output.end());
        let (lines_in, lines) = mpsc::channel(LINES_AHEAD);
        let (answers_in, answers) = mpsc::channel(ANSWERS_AHEAD);
        let read = read(input, first, start, lines_in);
        let answer = window.answer_all(first, lines, answers_in);
        // Boxed: the worker loop holds them beside much else.
        let mut work = Box::pin(async move { tokio::try_join!(read, answer) });
        let tell = |output: &Output| tell(lease, input, output);
        let mut store = Box::pin(store(output, answers, ends, tell));
        tokio::select! {
            biased;
            worked = &mut work => {
                // However it ended, what was answered by then is worth keeping.
                let stored = store.await;
                worked.map(drop).and(stored)
            }
            stored = &mut store => stored,
        }
    }

    fn manifest(
        &self,
        grant: &Grant,
        claim: Claim<'_>,
        input: &Input,
        output: &Output,
    ) -> Manifest {
        Manifest {
            schema_version: SCHEMA_VERSION,
            job: grant.key.clone(),
            attempt: grant.attempt,
            fence: grant.fence,
            spec_sha256: claim.spec.cloned(),
            created_at_us: self.clock.now(),
            files: output.files().to_vec(),
            parents: vec![input.path().to_owned()],
            summary: Summary::Generate(output.summary()),
        }
    }
}

fn claim<'a>(grant: &'a Grant, spec: &'a SpecDigest) -> Claim<'a> {
    Claim {
        key: &grant.key,
        fence: grant.fence,
        spec: Some(spec),
    }
}

/// What was found at the start of an attempt.
enum Begun {
    /// The result of an earlier one.
    Done(Published),
    /// Work to do.
    Open(Input, Box<Output>),
}

async fn read(
    input: &Input,
    first: u64,
    start: u64,
    lines_in: mpsc::Sender<Line>,
) -> Result<(), GenerateError> {
    let mut lines = input.lines(first, start, input.size());
    while let Some(line) = lines.next().await? {
        // Without a receiver nobody wants the rest.
        if lines_in.send(line).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// What ends an attempt before all lines are answered.
#[derive(Clone, Copy)]
pub(super) struct Ends<'a> {
    /// The lease.
    pub(super) stopped: &'a CancellationToken,
    /// From then on the job is handed on, if this attempt has answered anything: a job that gets ahead has no failure to
    /// count. One that does not is ended by the worker loop, and that is one.
    pub(super) hand_on_at: Instant,
}

/// When an attempt that began at `began` hands its job on.
pub(super) fn hand_on_at(began: Instant, max_runtime: Duration) -> Instant {
    let before = (max_runtime / HAND_ON_PART).clamp(HAND_ON_MIN, HAND_ON_MAX);
    began + (max_runtime - before.min(max_runtime / 2))
}

/// Stores answers piece by piece until there are no more. When the job is told to stop, or is handed on, what is answered
/// by then is stored too. `tell` is called now and then.
pub(super) async fn store(
    output: &mut Output,
    mut answers: mpsc::Receiver<Answered>,
    ends: Ends<'_>,
    tell: impl Fn(&Output),
) -> Result<(), GenerateError> {
    let stopped = ends.stopped;
    let (first, _) = output.reached();
    let mut told = Instant::now();
    loop {
        let due_at = output.due_at();
        let is_ahead = output.reached().0 > first;
        let next = tokio::select! {
            biased;
            () = stopped.cancelled() => {
                push_ready(output, &mut answers);
                let last = output.store_pending();
                // The next attempt answers again what is not stored in time.
                let _ = with_deadline("generate.last_piece", LAST_PIECE_LIMIT, last).await;
                return Err(GenerateError::Stopped);
            }
            () = tokio::time::sleep_until(ends.hand_on_at), if is_ahead => {
                let is_last = push_ready(output, &mut answers);
                store_pending(output, stopped).await?;
                return if is_last { Ok(()) } else { Err(GenerateError::HandedOn) };
            }
            () = tokio::time::sleep_until(due_at.unwrap_or(told)), if due_at.is_some() => None,
            answered = answers.recv() => match answered {
                Some(answered) => Some(answered),
                None => return output.store_pending().await,
            },
        };
        match next {
            Some(answered) => output.push(answered),
            None => store_pending(output, stopped).await?,
        }
        if output.is_full() {
            store_pending(output, stopped).await?;
        }
        if told.elapsed() >= PROGRESS_EVERY {
            tell(output);
            told = Instant::now();
        }
    }
}

/// Takes the answers that are there. True: no more will come.
fn push_ready(output: &mut Output, answers: &mut mpsc::Receiver<Answered>) -> bool {
    loop {
        match answers.try_recv() {
            Ok(answered) => output.push(answered),
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => return true,
        }
    }
}

/// Stores what is pending; a stop leaves it little time more.
async fn store_pending(
    output: &mut Output,
    stopped: &CancellationToken,
) -> Result<(), GenerateError> {
    let mut storing = Box::pin(output.store_pending());
    tokio::select! {
        stored = &mut storing => return stored,
        () = stopped.cancelled() => {}
    }
    let _ = with_deadline("generate.last_piece", LAST_PIECE_LIMIT, storing).await;
    Err(GenerateError::Stopped)
}

fn tell(lease: &Lease, input: &Input, output: &Output) {
    let (lines, bytes) = output.reached();
    let percent = bytes * 100 / input.size().max(1);
    lease.progress(&format!("{lines} lines answered, {percent} %"));
}

impl Handler for GenerateHandler {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Generate
    }

    fn serving(&self) -> Option<watch::Receiver<Serving>> {
        Some(self.answering.serving.clone())
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        match Box::pin(self.attempt(&grant, &context)).await {
            Ok(published) => published.into(),
            Err(GenerateError::Stopped | GenerateError::Publish(PublishError::Stopped)) => {
                stopped_outcome(&context)
            }
            Err(
                error @ (GenerateError::Engine(_)
                | GenerateError::NotServed { .. }
                | GenerateError::HandedOn),
            ) => JobOutcome::Released {
                reason: error.to_string(),
            },
            Err(error @ GenerateError::Publish(PublishError::NameUsed { .. })) => {
                let message = format!("{error}; what the requests say is a part of the spec");
                JobOutcome::failed(error.class(), message)
            }
            Err(error) => JobOutcome::failed(error.class(), error_chain(&error)),
        }
    }
}
