//! What the API needs from what is behind it: tokenizer, template, engine, adapters. Tests have a scripted one.

use std::sync::Arc;
use std::time::Duration;

use espalier_core::adapter::Canary;
pub use espalier_qwen3_text::{CallError, Delta};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::{Map, Value};

use crate::engine::Adapter;
use crate::grammar::{Constraint, Grammar, GrammarError, Thoughts};

/// Everything behind the API. Methods that are not async compute, and are called off the async threads.
pub trait Backend: Send + Sync + 'static {
    /// What is served now: the base model first, then adapters in the order of their names.
    fn models(&self) -> Vec<Model>;

    /// The version that a request for `name` is to run on from its first token to its last. `opening` gives what the
    /// conversation begins with, the same in each of its turns, where that decides.
    fn target(&self, name: &str, opening: &dyn Fn() -> Vec<u8>) -> Option<Target>;

    /// Longest prompt and answer together, in tokens.
    fn context_tokens(&self) -> usize;

    /// Ids below this have a text.
    fn vocabulary(&self) -> u32;

    /// The prompt of a conversation.
    fn render(&self, conversation: &Conversation) -> Result<Rendered, RenderError>;

    /// The ids of a turn of the assistant as the template writes it after the conversation, from where the prompt of
    /// [`render`](Self::render) ends to the end of the turn.
    fn turn(&self, conversation: &Conversation, turn: &Value) -> Result<Vec<u32>, RenderError>;

    /// A prompt that came as ids.
    fn rendered(&self, ids: Vec<u32>) -> Rendered;

    /// The ids up to the end of the first turn of a user; all of them where there is none.
    fn opening<'a>(&self, ids: &'a [u32]) -> &'a [u32];

    /// How ids are drawn where a request leaves it open.
    fn defaults(&self) -> Sampling;

    /// The id that begins a call of a tool.
    fn call_open(&self) -> u32;

    /// The ids of plain text.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// The bytes of an id. Empty for ids without a text.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// Turns the ids of an answer into deltas.
    fn parser(&self, form: Form) -> Box<dyn Parser>;

    /// A grammar, ready to constrain one answer that begins where `thoughts` says.
    fn constrain(
        &self,
        grammar: &Grammar,
        thoughts: Thoughts,
    ) -> Result<Box<dyn Constraint>, GrammarError>;

    /// Starts answers, of which all are taken or none. Dropping the events of one ends it and frees what it holds.
    fn submit(
        &self,
        generations: Vec<Generation>,
    ) -> BoxFuture<'_, Result<Vec<Events>, SubmitError>>;

    /// Loads an adapter, or a new version of one: requests that come afterwards run on it.
    fn load_adapter(&self, source: AdapterSource) -> BoxFuture<'_, Result<Model, AdapterError>>;

    /// Takes an adapter out: requests that run on it go on to their end.
    fn unload_adapter(&self, name: &str) -> BoxFuture<'_, Result<(), AdapterError>>;

    /// The adapters that are followed.
    fn following(&self) -> Vec<Following> {
        Vec::new()
    }

    /// How busy the engine is.
    fn load(&self) -> Load;
}

/// What happens to an answer, to its end. Events that end without [`Event::Finished`] are of an engine that is gone.
pub type Events = BoxStream<'static, Event>;

/// A model that requests may name.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// What requests call it.
    pub name: String,
    /// When it was loaded, in seconds since 1970.
    pub created_s: u64,
    /// For adapters: what it is made of.
    pub adapter: Option<AdapterInfo>,
}

/// An adapter that is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInfo {
    /// SHA-256 of its content in hexadecimal.
    pub digest: String,
    /// Where it came from.
    pub path: String,
    /// Its rank.
    pub rank: u32,
    /// Of an adapter that is followed, its version; of others the number of loads under this name, from 1.
    pub version: u64,
    /// Why it may be another model's, though it fits.
    pub doubt: Option<String>,
}

/// An adapter that is followed, and how far.
#[derive(Clone, Debug, PartialEq)]
pub struct Following {
    /// What requests call it.
    pub name: String,
    /// The project whose adapter it is.
    pub project: String,
    /// The version that answers to its name.
    pub served: Option<u32>,
    /// The version that is latest, as far as it is known.
    pub latest: Option<u32>,
    /// The version that answers to its name for a share of conversations.
    pub canary: Option<Canary>,
    /// The newest version, where it is not the one that is latest.
    pub candidate: Option<Candidate>,
    /// Why latest, or its canary, is not what is served.
    pub error: Option<String>,
}

/// A version that can be evaluated before it becomes latest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which one.
    pub version: u32,
    /// Why it is not served.
    pub error: Option<String>,
}

/// A version of a model. Holding it keeps the version loaded.
#[derive(Clone, Debug)]
pub struct Target {
    /// What requests call it.
    pub name: String,
    /// What answers call it: the same, or `NAME@vN` of an adapter that is followed.
    pub called: String,
    /// The loaded adapter version, or the base model.
    pub adapter: Option<Arc<Adapter>>,
    /// SHA-256 of the adapter's content.
    pub digest: Option<String>,
}

/// A conversation that was checked, in the form that chat templates take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role` and `content`; arguments of tool calls are objects.
    pub messages: Vec<Value>,
    /// As the request gave them.
    pub tools: Vec<Value>,
    /// The request's wish, if it has one.
    pub enable_thinking: Option<bool>,
    /// More variables of the template.
    pub kwargs: Map<String, Value>,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// Its ids.
    pub ids: Vec<u32>,
    /// Where the answer begins: inside a thought it has no opening tag.
    pub thoughts: Thoughts,
}

/// A conversation that the template has no meaning for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct RenderError {
    /// The template's words.
    pub reason: String,
}

/// How ids become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// All of it is content.
    Plain,
    /// An assistant's turn.
    Chat {
        /// Where it begins.
        thoughts: Thoughts,
        /// Whether calls of tools are told apart; otherwise they are content.
        tools: bool,
    },
}

/// Reads one answer, id by id.
pub trait Parser: Send {
    /// What the next id adds. Bytes of an unfinished character wait for the rest of it.
    fn push(&mut self, id: u32) -> Vec<Delta>;
    /// What is left at the end.
    fn finish(&mut self) -> Vec<Delta>;
}

/// One answer to generate.
pub struct Generation {
    /// The prompt.
    pub prompt: Arc<[u32]>,
    /// What runs it.
    pub target: Target,
    /// How ids are drawn.
    pub sampling: Sampling,
    /// Longest answer, at least 1.
    pub tokens_max: usize,
    /// Ids that end the answer beside the model's own.
    pub stop_ids: Vec<u32>,
    /// Whether the model's own end of turn is ignored.
    pub ignore_eos: bool,
    /// Online requests come before batch ones.
    pub priority: Priority,
    /// What binds the answer.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Priority {
    /// Somebody, now.
    #[default]
    Online,
    /// A job of the queue.
    Batch,
}

/// How ids are drawn. Every value is within its rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely id.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// 0: all.
    pub top_k: u32,
    /// In [0, 1].
    pub min_p: f32,
    /// In [-2, 2].
    pub presence_penalty: f32,
    /// In [-2, 2].
    pub frequency_penalty: f32,
    /// Above 0; 1: none.
    pub repetition_penalty: f32,
    /// Added to logits.
    pub bias: Vec<(u32, f32)>,
    /// Same seed, same answer.
    pub seed: u64,
    /// How many of the most likely ids to report; `None`: no log-probabilities at all.
    pub logprobs: Option<u8>,
}

/// What happens to an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// An id was drawn.
    Token(Token),
    /// The last event.
    Finished {
        /// Why.
        reason: Ended,
    },
}

/// An id that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The id.
    pub id: u32,
    /// Its log-probability under the model, in nats.
    pub logprob: f32,
    /// The most likely ids, the most likely first.
    pub top: Vec<(u32, f32)>,
    /// It ends the answer and is no part of its text.
    pub ends: bool,
    /// Tokens of the prompt that were found in the prefix cache, the same for every id of an answer.
    pub cached_tokens: usize,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model ended it.
    Stop,
    /// It has as many tokens as it may.
    Length,
    /// The engine stops.
    Abort,
    /// It failed.
    Error,
    /// What binds it became too expensive.
    Grammar,
}

/// An answer that does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many wait as may wait.
    #[error("the queue is full")]
    Full {
        /// When it may be better.
        retry_after: Duration,
    },
    /// More answers at once than may ever wait.
    #[error("{answers} answers are more than may wait, which are {limit}")]
    TooMany {
        /// That were asked for.
        answers: usize,
        /// Of the engine.
        limit: usize,
    },
    /// It can never run.
    #[error("the prompt has {tokens} tokens, of {limit} at most")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the engine.
        limit: usize,
    },
    /// A rule of the engine that has no status of its own.
    #[error("{reason}")]
    Invalid {
        /// Field, value and rule.
        reason: String,
    },
    /// The engine does not run.
    #[error("the engine is not running")]
    Stopped,
    /// The engine failed: only a new process helps.
    #[error("the engine has failed")]
    Failed,
}

/// Where an adapter comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSource {
    /// What requests are to call it.
    pub name: String,
    /// A folder, `s3://…`, or a repository of the hub.
    pub path: String,
}

/// An adapter that is not loaded, or not taken out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// It is broken, or does not fit.
    #[error("adapter `{name}` refused: {reason}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The name is the base model's.
    #[error("`{name}` is the base model's name")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The name is that of an adapter that is followed.
    #[error(
        "`{name}` is followed as {of}: what is served under it changes with `espalier adapters promote` and `rollback`"
    )]
    Followed {
        /// The name.
        name: String,
        /// The adapter, with its project.
        of: String,
    },
    /// No adapter of that name.
    #[error("no adapter is called `{name}`")]
    Unknown {
        /// The name.
        name: String,
    },
    /// Whoever reaches this server could load what they like.
    #[error(
        "adapters are loaded and unloaded over HTTP only with `--api-key`, or where `--host` is this machine alone"
    )]
    Open,
    /// The engine does not run.
    #[error("the engine is not running")]
    Stopped,
}

/// Whether requests are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// They are.
    #[default]
    Running,
    /// The process ends in order.
    Ending,
    /// The engine failed, and the process ends for that reason.
    Failed,
}

/// How busy the engine is. Counters grow only.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Whether it takes requests.
    pub condition: Condition,
    /// Answers that run.
    pub running: u64,
    /// Answers that wait.
    pub waiting: u64,
    /// Share of the KV blocks in use, 0 to 1.
    pub kv_share: f64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Of those, found.
    pub prefix_hits: u64,
    /// Steps, by which it is seen to go on.
    pub steps: u64,
    /// Answers that lost their memory and began again.
    pub preemptions: u64,
}
