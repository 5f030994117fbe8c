//! What runs the model: takes steps of ragged rows over paged KV memory, and gives back the ids that it drew.
//!
//! An executor knows sequences only as names and decides nothing: which rows run, where their keys and values lie and
//! when a block may be written again is the [scheduler's](crate::scheduler). The thread of [`engine`](crate::engine)
//! calls it and nobody else.

pub mod cpu;
pub mod cuda;

use std::time::Duration;

pub use espalier_kernels::sampling::{History, Penalties, Sampling, Seen};

/// Tokens whose keys and values one KV block holds.
pub const BLOCK_TOKENS: usize = 16;

/// A KV block: tokens `16·i..16·(i+1)` of a sequence lie in its `i`-th block. Below [`Limits::kv_blocks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A sequence that is running. Never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A version of an adapter that was loaded. Never used again for another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterSlot(pub u32);

/// A step that was submitted. Tickets grow, and results come in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// The ids that go into a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// These, at least one.
    Ids(Vec<u32>),
    /// One: the id that the step submitted just before this one draws for this sequence. It may still be in flight.
    Sampled,
}

impl Input {
    /// How many tokens it is.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Sampled => 1,
        }
    }
}

/// One sequence's part of a step. A sequence has at most one row in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Whose it is.
    pub seq: SeqId,
    /// What goes in.
    pub input: Input,
    /// The position of its first token. Keys and values of all positions before it are in `blocks`, written by steps
    /// that were submitted earlier.
    pub start: u32,
    /// Covers positions `0..start + input.tokens()`, in order. No block that this row writes is in another row of the
    /// step; blocks that it only reads may be.
    pub blocks: Vec<BlockId>,
    /// The adapter, or the base model.
    pub adapter: Option<AdapterSlot>,
    /// How the token after the row's last is drawn. `None`: a chunk of a prompt that is not the last. The scheduler sets
    /// what depends on the answer so far: [`Sampling::step`], [`Sampling::allowed`] and [`Penalties::seen`].
    pub sample: Option<Sampling>,
}

/// Rows that run as one ragged batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// At least one, at most [`Limits::rows`]; their inputs together at most [`Limits::tokens`].
    pub rows: Vec<Row>,
}

/// An id that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// For whom.
    pub seq: SeqId,
    /// The id. Never a padding id of the vocabulary.
    pub id: u32,
    /// Its log-probability under the model: log-softmax of the f32 logits before penalties, bias, mask and temperature.
    /// NaN: none could be drawn, because a logit is no number or the mask allows nothing; the sequence ends there.
    pub logprob: f32,
    /// The most likely ids and theirs, the most likely first, as many as [`Sampling::logprobs`] asked for.
    pub top: Vec<(u32, f32)>,
}

/// A step that came to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Which.
    pub ticket: Ticket,
    /// One for each row with a [`Row::sample`], in the order of rows.
    pub drawn: Vec<Drawn>,
}

/// What an executor can take. Does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// KV blocks that there are.
    pub kv_blocks: u32,
    /// Tokens of a step.
    pub tokens: u32,
    /// Rows of a step.
    pub rows: u32,
    /// Ids that can be drawn are below this.
    pub vocab: u32,
    /// Steps that may be in flight: 2 where a step runs while the host prepares the next, 1 where there is nothing to
    /// overlap (an ended sequence then never runs a step too many).
    pub steps_in_flight: u32,
    /// Versions of adapters that are there at once, at most.
    pub adapters: u32,
}

/// Why an executor cannot go on, or cannot take an adapter.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The device is gone or answered with an error: nothing that runs can be saved.
    #[error("the device failed: {0}")]
    Device(String),
    /// The adapter does not fit the model or the memory kept for adapters. The executor goes on without it.
    #[error("adapter refused: {0}")]
    Adapter(String),
}

/// Runs a model.
///
/// Steps take effect in the order of their tickets: what a step writes into KV blocks is there for the next one. The
/// result of a row depends on its own sequence only: on the CPU bit for bit; on a GPU but for the last bits of bf16, which
/// may follow the size of the batch, so that ids are the same wherever the most likely is ahead by more than that.
/// Dropping the executor ends what is in flight.
pub trait Executor: Send {
    /// The weights of an adapter, read and checked beforehand, off the engine's thread.
    type Adapter: Send + 'static;

    /// What it can take.
    fn limits(&self) -> Limits;

    /// Begins a step. At most [`Limits::steps_in_flight`] are in flight.
    ///
    /// # Errors
    /// [`ExecutorError::Device`]: nothing is in flight any more.
    fn submit(&mut self, step: Step) -> Result<Ticket, ExecutorError>;

    /// The result of the oldest step in flight; `None` when it is not there after `wait`. An executor without a
    /// thread of its own computes here, and may take longer.
    ///
    /// # Errors
    /// [`ExecutorError::Device`]: nothing is in flight any more.
    fn poll(&mut self, wait: Duration) -> Result<Option<Done>, ExecutorError>;

    /// Makes an adapter ready for rows of steps submitted from now on. Steps may be in flight.
    ///
    /// # Errors
    /// [`ExecutorError::Adapter`]: it does not fit. [`ExecutorError::Device`].
    fn load_adapter(
        &mut self,
        slot: AdapterSlot,
        adapter: Self::Adapter,
    ) -> Result<(), ExecutorError>;

    /// Forgets an adapter that no step in flight uses and no later step will.
    ///
    /// # Errors
    /// [`ExecutorError::Device`].
    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), ExecutorError>;
}
