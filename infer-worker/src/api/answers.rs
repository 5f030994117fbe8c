//! Runs the answers of one request, all at once, and tells what happens in the order in which it does.
//!
//! Nothing runs in a task of its own: whoever waits drives it, and whoever stops waiting drops the receivers, which ends
//! the generation and frees what it held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::response::sse;
use futures::stream::{self, AbortHandle, SelectAll, Stream, StreamExt as _};

use super::backend::{Backend, Condition, Ended, Event, Events, Token};
use super::choice::{Choice, Finish, Piece};
use super::error::ApiError;
use super::metrics::Metrics;
use super::observe::{Observed, Progress};
use super::patience::{self, SILENCE_MAX};
use super::reply::{Head, Usage};
use super::whole::{Answer, Whole};

/// Answers that were submitted.
pub(super) struct Answers {
    pub(super) head: Head,
    pub(super) include_usage: bool,
    pub(super) silence_max: Duration,
    backend: Arc<dyn Backend>,
    told: Told,
    choices: Vec<Option<Choice>>,
    events: SelectAll<ChoiceEvents>,
    usage: Usage,
    /// Why answers ended, in that order.
    reasons: Vec<&'static str>,
    clocks: Vec<Progress>,
    /// Ends the generation of an answer that needs no more of it.
    enough: Vec<AbortHandle>,
}

type ChoiceEvents = stream::BoxStream<'static, (usize, Option<Event>)>;

/// Who is told how the answers go.
pub(super) struct Told {
    pub(super) metrics: Arc<Metrics>,
    pub(super) observed: Observed,
    pub(super) began: Instant,
}

impl Told {
    fn token(&self, progress: &mut Progress) {
        let first = progress.first.is_none();
        self.metrics.token(progress);
        if first {
            self.observed.first_token(progress.began.elapsed());
        }
    }

    fn answer_ended(&self, finish: Finish, progress: &Progress) {
        self.metrics
            .finished(finish.as_str(), progress.began.elapsed());
        self.observed.answer_ended(progress);
    }

    fn ended(&self, usage: Usage, reasons: &[&str]) {
        self.observed.ended(self.began.elapsed(), usage, reasons);
    }

    /// An answer that broke off after its status was sent.
    fn failed(&self, error: &ApiError) {
        self.metrics.failed(error.status().as_u16());
        self.observed.failed(self.began.elapsed(), error.status());
    }
}

/// What happened to one answer.
struct Step {
    choice: usize,
    pieces: Vec<Piece>,
    token: Option<Token>,
    finish: Option<Finish>,
}

impl Answers {
    pub(super) fn new(
        head: Head,
        include_usage: bool,
        backend: Arc<dyn Backend>,
        told: Told,
        started: Vec<(Choice, Events)>,
    ) -> Self {
        let prompt_tokens = head.prompts.iter().map(Vec::len).sum();
        told.metrics.prompt_tokens(prompt_tokens);
        let mut events = SelectAll::new();
        let mut choices = Vec::with_capacity(started.len());
        let mut enough = Vec::with_capacity(started.len());
        for (i, (choice, of_one)) in started.into_iter().enumerate() {
            let (of_choice, handle) = stream::abortable(events_of(i, of_one));
            events.push(of_choice.boxed());
            choices.push(Some(choice));
            enough.push(handle);
        }
        let clocks = choices.iter().map(|_| Progress::new(told.began)).collect();
        Self {
            head,
            include_usage,
            silence_max: SILENCE_MAX,
            backend,
            told,
            choices,
            events,
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            reasons: Vec::new(),
            clocks,
            enough,
        }
    }

    /// The next thing that happens; none when all answers have ended.
    async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        loop {
            if self.choices.iter().all(Option::is_none) {
                self.told.ended(self.usage, &self.reasons);
                return Ok(None);
            }
            let next = patience::next(&mut self.events, &*self.backend, self.silence_max);
            let (i, event) = next.await?;
            // A choice that ended by itself may have had events under way.
            let Some(choice) = self.choices[i].as_mut() else {
                continue;
            };
            let step = match event {
                Some(Event::Token(token)) => {
                    self.usage.completion_tokens += 1;
                    // A prompt is counted once, and computed for the first of its answers: the others find it.
                    if i % self.head.n == 0 && self.clocks[i].tokens == 0 {
                        self.usage.cached_tokens += token.cached_tokens;
                    }
                    self.told.token(&mut self.clocks[i]);
                    let pieces = choice.push(&token);
                    Step {
                        choice: i,
                        pieces,
                        token: Some(token),
                        finish: choice.finish(),
                    }
                }
                Some(Event::Finished { reason }) => {
                    if matches!(reason, Ended::Grammar) {
                        return Err(ApiError::grammar());
                    }
                    if matches!(reason, Ended::Abort | Ended::Error) {
                        return Err(self.failure(reason));
                    }
                    let pieces = choice.end(reason);
                    Step {
                        choice: i,
                        pieces,
                        token: None,
                        finish: choice.finish(),
                    }
                }
                // The engine went without a word.
                None => return Err(self.failure(Ended::Error)),
            };
            if let Some(finish) = step.finish {
                self.choices[i] = None;
                self.reasons.push(finish.as_str());
                self.enough[i].abort();
                self.told.answer_ended(finish, &self.clocks[i]);
            }
            return Ok(Some(step));
        }
    }

    /// Why an answer failed: with the engine, or alone. An engine that runs gives up only what is not taken.
    fn failure(&self, ended: Ended) -> ApiError {
        match (self.backend.load().condition, ended) {
            (Condition::Failed, _) => ApiError::failed(),
            (Condition::Running, Ended::Abort) => ApiError::not_taken(),
            (Condition::Ending, Ended::Abort) => ApiError::stopped(),
            (Condition::Running | Condition::Ending, _) => ApiError::internal(),
        }
    }

    /// Waits for all of them.
    pub(super) async fn whole(mut self) -> Result<Whole, ApiError> {
        let mut answers = vec![Answer::default(); self.choices.len()];
        while let Some(step) = self.next().await? {
            answers[step.choice].take(&self.head, step.pieces, step.token, step.finish);
        }
        Ok(Whole {
            head: self.head,
            answers,
            usage: self.usage,
            backend: self.backend,
        })
    }

    /// Tells them as they come: openings, chunks in the order in which tokens are drawn, usage, and the mark of the end.
    pub(super) fn stream(self) -> impl Stream<Item = sse::Event> + Send + 'static {
        let openings: Vec<sse::Event> = (0..self.choices.len())
            .filter_map(|choice| self.head.opening(choice).map(|chunk| event(&chunk)))
            .collect();
        let waiting = self.choices.iter().map(|_| Vec::new()).collect();
        let state = Some(Streamed {
            answers: self,
            waiting,
        });
        let rest = stream::unfold(state, |state| async move {
            let mut streamed: Streamed = state?;
            let (events, goes_on) = streamed.next().await;
            Some((events, goes_on.then_some(streamed)))
        });
        stream::iter(openings).chain(rest.flat_map(stream::iter))
    }
}

/// Answers, and the tokens of each that no chunk has told yet.
struct Streamed {
    answers: Answers,
    waiting: Vec<Vec<Token>>,
}

impl Streamed {
    /// The next events, and whether more follow.
    async fn next(&mut self) -> (Vec<sse::Event>, bool) {
        match self.answers.next().await {
            Ok(Some(step)) => {
                let waiting = &mut self.waiting[step.choice];
                waiting.extend(step.token);
                // Ids and log-probabilities of tokens without text of their own come with the next text.
                if step.pieces.is_empty() && step.finish.is_none() {
                    return (Vec::new(), true);
                }
                let tokens = std::mem::take(waiting);
                let answers = &self.answers;
                let chunk = answers.head.chunk(
                    step.choice,
                    &step.pieces,
                    &tokens,
                    step.finish,
                    &*answers.backend,
                );
                (chunk.iter().map(event).collect(), true)
            }
            Ok(None) => {
                let usage = self
                    .answers
                    .include_usage
                    .then(|| self.answers.head.usage_chunk(self.answers.usage));
                let mut events: Vec<sse::Event> = usage.iter().map(event).collect();
                events.push(done());
                (events, false)
            }
            Err(error) => {
                self.answers.told.failed(&error);
                (vec![event(&error.to_json()), done()], false)
            }
        }
    }
}

fn event(json: &serde_json::Value) -> sse::Event {
    sse::Event::default().data(json.to_string())
}

fn done() -> sse::Event {
    sse::Event::default().data("[DONE]")
}

/// The events of one answer and, if they end without a last one, that they did.
fn events_of(choice: usize, events: Events) -> ChoiceEvents {
    stream::unfold(Some(events), move |events| async move {
        let mut events = events?;
        let event = events.next().await;
        let more = matches!(event, Some(Event::Token(_)));
        Some(((choice, event), more.then_some(events)))
    })
    .boxed()
}
