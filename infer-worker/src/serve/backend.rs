//! The API's backend: the engine that runs, the text side of its model, and its adapters.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::shutdown::Shutdown;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use serde_json::Value;
use tokio::sync::mpsc;

use super::adapters::Adapters;
use super::follow::Follower;
use super::text::Text;
use crate::api::backend::{
    AdapterError, AdapterSource, Backend, Condition, Conversation, Ended, Event, Events, Following,
    Form, Generation, Load, Model, Parser, Priority, RenderError, Rendered, Sampling, SubmitError,
    Target, Token,
};
use crate::engine::{self, Engine, EngineError, FinishReason, Health, Prompt, Request};
use crate::executor::{self, History, Penalties};
use crate::grammar::{Constraint, Grammar, GrammarError, Thoughts};

/// When a request that found the queue full may try again: places come free with every answer that ends.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Everything that serves one model.
pub(super) struct Served {
    pub(super) engine: Engine,
    pub(super) text: Text,
    pub(super) adapters: Adapters,
    /// What follows adapters.
    pub(super) follower: Option<Arc<Follower>>,
    pub(super) base: Model,
    pub(super) context_tokens: usize,
    pub(super) shutdown: Shutdown,
    /// Other machines reach the API, and it asks for no key.
    pub(super) open: bool,
}

/// The prompt of the answer before: several answers to one prompt come one after the other.
struct SharedPrompt(Option<(Arc<[u32]>, Arc<Prompt>)>);

impl SharedPrompt {
    fn of(&mut self, ids: Arc<[u32]>) -> Arc<Prompt> {
        match &self.0 {
            Some((known, prompt)) if Arc::ptr_eq(known, &ids) => Arc::clone(prompt),
            _ => {
                let prompt = Arc::new(Prompt::new(Arc::clone(&ids)));
                self.0 = Some((ids, Arc::clone(&prompt)));
                prompt
            }
        }
    }
}

impl Served {
    fn request(&self, generation: Generation, shared: &mut SharedPrompt) -> Request {
        let eos = &self.text.files().eos;
        // A grammar ends with the model's own end, and allows nothing after it.
        let own_end = !generation.ignore_eos || generation.constraint.is_some();
        let own = eos.iter().filter(|_| own_end);
        Request {
            prompt: shared.of(generation.prompt),
            adapter: generation.target.adapter,
            sampling: drawing(generation.sampling),
            max_tokens: u32::try_from(generation.tokens_max).unwrap_or(u32::MAX),
            stop_ids: own.chain(&generation.stop_ids).copied().collect(),
            priority: match generation.priority {
                Priority::Online => engine::Priority::Online,
                Priority::Batch => engine::Priority::Batch,
            },
            grammar: generation.constraint,
        }
    }

    async fn start(&self, generations: Vec<Generation>) -> Result<Vec<Events>, SubmitError> {
        let mut shared = SharedPrompt(None);
        let requests: Vec<Request> = generations
            .into_iter()
            .map(|one| self.request(one, &mut shared))
            .collect();
        let ends: Vec<Arc<[u32]>> = requests
            .iter()
            .map(|one| Arc::clone(&one.stop_ids))
            .collect();
        let answers = requests.len();
        let submitted = self.engine.submit_all(requests).await;
        let receivers = submitted.map_err(|error| refusal(error, answers))?;
        Ok(receivers
            .into_iter()
            .zip(ends)
            .map(|(receiver, ends)| events(receiver, ends))
            .collect())
    }
}

/// How the executor draws. The scheduler adds what depends on the answer so far.
fn drawing(sampling: Sampling) -> executor::Sampling {
    let penalties = Penalties {
        presence: sampling.presence_penalty,
        frequency: sampling.frequency_penalty,
        repetition: sampling.repetition_penalty,
        seen: History::default(),
    };
    let penalises =
        penalties.presence != 0.0 || penalties.frequency != 0.0 || penalties.repetition != 1.0;
    executor::Sampling {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        seed: sampling.seed,
        step: 0,
        penalties: penalises.then_some(penalties),
        bias: (!sampling.bias.is_empty()).then(|| sampling.bias.into()),
        allowed: None,
        logprobs: sampling.logprobs,
    }
}

/// Why so many answers at once were not taken.
fn refusal(error: EngineError, answers: usize) -> SubmitError {
    match error {
        // To try again would never help.
        EngineError::Full { max_queue } if answers > max_queue => SubmitError::TooMany {
            answers,
            limit: max_queue,
        },
        EngineError::Full { .. } => SubmitError::Full {
            retry_after: RETRY_AFTER,
        },
        EngineError::TooLong {
            prompt_tokens,
            max_model_len,
        } => SubmitError::TooLong {
            tokens: prompt_tokens,
            limit: max_model_len,
        },
        EngineError::Invalid(refused) => SubmitError::Invalid {
            reason: refused.to_string(),
        },
        EngineError::Stopped(Health::Failed(_)) => SubmitError::Failed,
        EngineError::Stopped(_) => SubmitError::Stopped,
    }
}

fn events(mut receiver: mpsc::Receiver<engine::Event>, ends: Arc<[u32]>) -> Events {
    let events = stream::poll_fn(move |cx| receiver.poll_recv(cx));
    events.map(move |event| told(event, &ends)).boxed()
}

fn told(event: engine::Event, ends: &[u32]) -> Event {
    match event {
        engine::Event::Token {
            id,
            logprob,
            top,
            cached_tokens,
        } => Event::Token(Token {
            id,
            logprob,
            top,
            ends: ends.contains(&id),
            cached_tokens: cached_tokens as usize,
        }),
        engine::Event::Finished { reason, .. } => Event::Finished {
            reason: match reason {
                FinishReason::Stop => Ended::Stop,
                FinishReason::Length => Ended::Length,
                FinishReason::Abort => Ended::Abort,
                FinishReason::Error => Ended::Error,
                FinishReason::Grammar => Ended::Grammar,
            },
        },
    }
}

impl Backend for Served {
    fn models(&self) -> Vec<Model> {
        let mut models = vec![self.base.clone()];
        models.extend(self.adapters.models());
        models
    }

    fn target(&self, name: &str, opening: &dyn Fn() -> Vec<u8>) -> Option<Target> {
        if name == self.base.name {
            return Some(Target {
                name: name.to_owned(),
                called: name.to_owned(),
                adapter: None,
                digest: None,
            });
        }
        self.adapters.target(name, opening)
    }

    fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    fn vocabulary(&self) -> u32 {
        self.text.tokenizer().vocabulary()
    }

    fn render(&self, conversation: &Conversation) -> Result<Rendered, RenderError> {
        self.text.render(conversation)
    }

    fn turn(&self, conversation: &Conversation, turn: &Value) -> Result<Vec<u32>, RenderError> {
        self.text.turn(conversation, turn)
    }

    fn rendered(&self, ids: Vec<u32>) -> Rendered {
        self.text.rendered(ids)
    }

    fn opening<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        self.text.opening(ids)
    }

    fn defaults(&self) -> Sampling {
        self.text.files().sampling.clone()
    }

    fn call_open(&self) -> u32 {
        self.text.tokenizer().ids().call_open
    }

    /// A prompt of a completion is the caller's own, control tokens included: that is how prompts are sent that went
    /// through a template elsewhere.
    fn encode(&self, text: &str) -> Vec<u32> {
        self.text.tokenizer().encode(text)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        let bytes = self.text.tokenizer().token_bytes(id);
        bytes.unwrap_or_default().to_vec()
    }

    fn parser(&self, form: Form) -> Box<dyn Parser> {
        self.text.parser(form)
    }

    fn constrain(
        &self,
        grammar: &Grammar,
        thoughts: Thoughts,
    ) -> Result<Box<dyn Constraint>, GrammarError> {
        self.text.guides().constrain(grammar, thoughts)
    }

    fn submit(
        &self,
        generations: Vec<Generation>,
    ) -> BoxFuture<'_, Result<Vec<Events>, SubmitError>> {
        self.start(generations).boxed()
    }

    fn load_adapter(&self, source: AdapterSource) -> BoxFuture<'_, Result<Model, AdapterError>> {
        match self.open {
            true => std::future::ready(Err(AdapterError::Open)).boxed(),
            false => self.adapters.load(source).boxed(),
        }
    }

    fn unload_adapter(&self, name: &str) -> BoxFuture<'_, Result<(), AdapterError>> {
        let unloaded = match self.open {
            true => Err(AdapterError::Open),
            false => self.adapters.unload(name),
        };
        std::future::ready(unloaded).boxed()
    }

    fn following(&self) -> Vec<Following> {
        let told = self.follower.as_ref().map(|follower| follower.told());
        told.unwrap_or_default()
    }

    fn load(&self) -> Load {
        let snapshot = self.engine.snapshot();
        let scheduler = snapshot.scheduler;
        Load {
            condition: match self.engine.health() {
                Health::Failed(_) => Condition::Failed,
                Health::Running if !self.shutdown.is_draining() => Condition::Running,
                _ => Condition::Ending,
            },
            running: scheduler.running as u64,
            waiting: snapshot.queued as u64,
            kv_share: f64::from(scheduler.kv_blocks_used) / f64::from(scheduler.kv_blocks.max(1)),
            prefix_queries: scheduler.prompt_tokens,
            prefix_hits: scheduler.cached_tokens,
            steps: scheduler.steps,
            preemptions: scheduler.preemptions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_penalties_that_change_something_are_kept() {
        let plain = Sampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 3,
            min_p: 0.1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: vec![],
            seed: 7,
            logprobs: Some(2),
        };
        let drawn = drawing(plain.clone());
        assert_eq!((drawn.penalties, drawn.bias), (None, None));
        assert_eq!(
            (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p),
            (0.5, 0.9, 3, 0.1)
        );
        assert_eq!((drawn.seed, drawn.logprobs), (7, Some(2)));
        let drawn = drawing(Sampling {
            presence_penalty: 0.5,
            bias: vec![(1, 2.0)],
            ..plain
        });
        assert_eq!(
            drawn.penalties.map(|p| (p.presence, p.repetition)),
            Some((0.5, 1.0))
        );
        assert_eq!(drawn.bias.as_deref(), Some(&[(1, 2.0)][..]));
    }

    #[test]
    fn a_rule_of_the_engine_keeps_its_words() {
        let refused = crate::scheduler::Refused::UnknownId { id: 9, vocab: 5 };
        assert_eq!(
            refusal(EngineError::Invalid(refused), 1),
            SubmitError::Invalid {
                reason: "token ids must be below 5, got 9".to_owned()
            }
        );
    }

    #[test]
    fn only_what_may_ever_wait_is_asked_to_come_again() {
        let full = || EngineError::Full { max_queue: 2 };
        let retry_after = RETRY_AFTER;
        assert_eq!(refusal(full(), 2), SubmitError::Full { retry_after });
        let (answers, limit) = (3, 2);
        let refused = SubmitError::TooMany { answers, limit };
        assert_eq!(refusal(full(), 3), refused);
    }
}
