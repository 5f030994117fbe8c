//! What the result of a step means.

use super::sequence::Sequence;
use super::{Event, FinishReason, RequestId, Scheduler, publish, release};
use crate::executor::{Done, Drawn, SeqId};
use crate::grammar::GrammarError;

/// A result that is not that of the oldest step in flight.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the executor drew for {drawn:?}, and the oldest step in flight has {expected:?}")]
pub struct Unexpected {
    /// For whom it has ids.
    pub drawn: Vec<SeqId>,
    /// For whom ids were due.
    pub expected: Vec<SeqId>,
}

impl Scheduler {
    /// Takes the result of the oldest step in flight: gives requests their ids, ends those that are done, and gives
    /// back blocks.
    ///
    /// # Errors
    /// It is another step's. The scheduler is of no use any more.
    pub fn apply(&mut self, done: Done) -> Result<Vec<(RequestId, Event)>, Unexpected> {
        let flight = self.in_flight.pop_front();
        let (step, expected) = flight.map_or((0, Vec::new()), |f| (f.step, f.draws));
        let as_expected = done.drawn.iter().map(|drawn| &drawn.seq).eq(&expected);
        if step == 0 || !as_expected {
            let drawn = done.drawn.iter().map(|drawn| drawn.seq).collect();
            return Err(Unexpected { drawn, expected });
        }
        let ended = self
            .leaving
            .extract_if(.., |leaving| leaving.last_step <= step);
        for leaving in ended.collect::<Vec<_>>() {
            release(leaving, &mut self.pool);
        }
        let mut events = Vec::with_capacity(done.drawn.len());
        // All grammars are told before one is asked: they compute side by side.
        let mut told = Vec::new();
        for drawn in done.drawn {
            told.extend(self.accept(drawn, &mut events));
        }
        for request in told {
            let sequence = self.sequences.get_mut(&request);
            if let Some(Err(error)) = sequence.map(Sequence::ask_grammar) {
                self.end_by_grammar(request, &error, &mut events);
            }
        }
        Ok(events)
    }

    /// Gives a request its id. Returns it if its grammar was told.
    fn accept(&mut self, drawn: Drawn, events: &mut Vec<(RequestId, Event)>) -> Option<RequestId> {
        let request = RequestId(drawn.seq.0);
        let Some(sequence) = self.sequences.get_mut(&request) else {
            // It ended, or was aborted, after this step was decided.
            self.counters.dropped_tokens += 1;
            return None;
        };
        let Drawn {
            id, logprob, top, ..
        } = drawn;
        if logprob.is_nan() {
            tracing::warn!(request = request.0, "no id could be drawn");
            self.end(request, FinishReason::Error, events);
            return None;
        }
        sequence.accept(id);
        if self.config.prefix_caching {
            publish(sequence, &mut self.pool);
        }
        self.counters.drawn_tokens += 1;
        let token = Event::Token {
            id,
            logprob,
            top,
            cached_tokens: sequence.cached_tokens.unwrap_or_default(),
        };
        events.push((request, token));
        if sequence.request.stop_ids.contains(&id) {
            self.end(request, FinishReason::Stop, events);
            return None;
        }
        if sequence.tokens.len() >= sequence.limit {
            self.end(request, FinishReason::Length, events);
            return None;
        }
        match sequence.push_grammar(id) {
            Ok(told) => told.then_some(request),
            Err(error) => {
                self.end_by_grammar(request, &error, events);
                None
            }
        }
    }

    fn end_by_grammar(
        &mut self,
        request: RequestId,
        error: &GrammarError,
        events: &mut Vec<(RequestId, Event)>,
    ) {
        tracing::warn!(request = request.0, %error, "grammar failed");
        self.end(request, FinishReason::Grammar, events);
    }

    fn end(
        &mut self,
        request: RequestId,
        reason: FinishReason,
        events: &mut Vec<(RequestId, Event)>,
    ) {
        let cached = self.sequences.get(&request).and_then(|s| s.cached_tokens);
        self.abort(request);
        let cached_tokens = cached.unwrap_or_default();
        events.push((
            request,
            Event::Finished {
                reason,
                cached_tokens,
            },
        ));
    }
}
