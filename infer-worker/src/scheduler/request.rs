//! What is asked of the engine, and what comes back.

use std::fmt;
use std::sync::Arc;

use super::Prompt;
use crate::blocks::{AdapterDigest, BlockHash, HashChain};
use crate::executor::{AdapterSlot, History, Sampling, SeqId};
use crate::grammar::{Constraint, GrammarError};

/// A request. Grows in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

impl RequestId {
    /// The name that the executor knows it by.
    pub fn seq(self) -> SeqId {
        SeqId(self.0)
    }
}

/// Who waits for the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody, now.
    #[default]
    Online,
    /// A job that takes its time. Yields to online requests.
    Batch,
}

/// An adapter version that requests run under. What is told when the last of its users has gone is `on_drop`'s.
pub struct Adapter {
    slot: AdapterSlot,
    digest: AdapterDigest,
    on_drop: Option<Box<dyn Fn(AdapterSlot) + Send + Sync>>,
}

impl Adapter {
    /// The adapter in `slot`, whose files have the digest `digest`.
    pub fn new(slot: AdapterSlot, digest: AdapterDigest) -> Self {
        Self {
            slot,
            digest,
            on_drop: None,
        }
    }

    /// The same, calling `on_drop` when it is dropped.
    pub fn on_drop(mut self, on_drop: impl Fn(AdapterSlot) + Send + Sync + 'static) -> Self {
        self.on_drop = Some(Box::new(on_drop));
        self
    }

    /// Where the executor has it.
    pub fn slot(&self) -> AdapterSlot {
        self.slot
    }

    /// The digest of its content.
    pub fn digest(&self) -> &AdapterDigest {
        &self.digest
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        if let Some(on_drop) = &self.on_drop {
            on_drop(self.slot);
        }
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Adapter").field(&self.slot).finish()
    }
}

/// One answer that is asked for. Several answers to one prompt are as many requests: they share its blocks.
pub struct Request {
    /// The prompt, of at least one id.
    pub prompt: Arc<Prompt>,
    /// Under which adapter, or the base model.
    pub adapter: Option<Arc<Adapter>>,
    /// How ids are drawn. [`Sampling::step`], [`Sampling::allowed`] and the list of seen ids are set for each draw.
    pub sampling: Sampling,
    /// At most so many ids, at least one. The model's length ends an answer too.
    pub max_tokens: u32,
    /// Ids that end the answer. The one that does is part of it.
    pub stop_ids: Arc<[u32]>,
    /// Who waits.
    pub priority: Priority,
    /// What the answer must look like.
    pub grammar: Option<Box<dyn Constraint>>,
}

impl Request {
    /// An online request for the base model, greedy, ended by nothing but `max_tokens`.
    pub fn new(prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self {
            prompt: Arc::new(Prompt::new(prompt)),
            adapter: None,
            sampling: Sampling::default(),
            max_tokens,
            stop_ids: Arc::new([]),
            priority: Priority::Online,
            grammar: None,
        }
    }

    /// Makes what is made once for all answers to a prompt, unless it is there: it takes a while for a long one.
    pub fn prepare(&self, weight_version: u64) {
        self.names(weight_version);
        self.history();
    }

    /// The names of the prompt's blocks under the request's adapter.
    pub(super) fn names(&self, weight_version: u64) -> HashChain {
        let digest = self.adapter.as_deref().map(Adapter::digest);
        self.prompt.names(BlockHash::root(weight_version, digest))
    }

    /// For penalties: what is seen before the answer begins.
    pub(super) fn history(&self) -> Option<History> {
        let penalties = self.sampling.penalties.as_ref();
        penalties.map(|_| History::new(self.prompt.distinct()))
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Prompts are not for logs.
        f.debug_struct("Request")
            .field("prompt_tokens", &self.prompt.ids().len())
            .field("adapter", &self.adapter)
            .field("max_tokens", &self.max_tokens)
            .field("priority", &self.priority)
            .finish_non_exhaustive()
    }
}

/// Why a request cannot be served, whatever else runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nothing to go on from.
    #[error("the prompt must have at least one token")]
    EmptyPrompt,
    /// No room for even one more token.
    #[error(
        "the prompt has {prompt_tokens} tokens, and with an answer of at least one it must not exceed the model's length of {max_model_len}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of prompt and answer that fit.
        max_model_len: usize,
    },
    /// An id that the model does not have.
    #[error("token ids must be below {vocab}, got {id}")]
    UnknownId {
        /// The id.
        id: u32,
        /// How many ids there are.
        vocab: u32,
    },
    /// No answer is asked for.
    #[error("`max_tokens` must be at least 1, got 0")]
    NoTokens,
    /// Its grammar allows nothing.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next id of the answer.
    Token {
        /// The id.
        id: u32,
        /// Its log-probability, as [`Drawn::logprob`](crate::executor::Drawn::logprob).
        logprob: f32,
        /// The most likely ids, as many as were asked for.
        top: Vec<(u32, f32)>,
        /// As in [`Finished`](Self::Finished), for those who do not wait for the end.
        cached_tokens: u32,
    },
    /// The last event.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens of the prompt that did not have to be computed when it was first run.
        cached_tokens: u32,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// One of its stop ids was drawn.
    Stop,
    /// `max_tokens`, or the model's length.
    Length,
    /// It was not wanted any more, or the engine stopped.
    Abort,
    /// The executor failed.
    Error,
    /// Its grammar failed, or became too expensive.
    Grammar,
}
