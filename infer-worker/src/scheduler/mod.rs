//! Decides what runs in each step: continuous batching, prompts in chunks beside answers, preemption, prefix reuse.
//!
//! Plain data: no clock, no IO, no threads, and no numbers of the model. [`Scheduler::decide`] gives a step,
//! [`Scheduler::apply`] takes its result; as many steps may lie between as the executor allows. What a request is
//! answered does not depend on what else runs. The [engine](crate::engine) calls it.
//!
//! The rules:
//!
//! - *Order.* Online requests go before batch ones, each by arrival: into the running ones, and for blocks. Of those
//!   that wait nobody is passed over, but one whose next block somebody is just computing. While a batch request waits,
//!   at most [`ONLINE_PER_BATCH`] online requests are admitted before one ranks as online.
//! - *A step* has one token of each running answer first, then chunks of running prompts, then new requests, until its
//!   tokens are used up.
//! - *Blocks* for all ids that are known are taken when a request is admitted, and one by one for its answer. Where
//!   there are none, whoever ranks last gives up its own and waits again; its answer so far is kept, and keys and values
//!   are computed again, or found. An online request that waits takes blocks and places of batch requests so.
//! - *Ends* by a stop id are seen a step late where two are in flight: what was drawn beyond is dropped. Blocks come
//!   back when no step in flight uses them.

mod admit;
mod apply;
mod prompt;
mod queue;
mod request;
mod sequence;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

pub use apply::Unexpected;
pub use prompt::Prompt;
pub use queue::ONLINE_PER_BATCH;
use queue::{Rank, Waiting};
pub use request::{Adapter, Event, FinishReason, Priority, Refused, Request, RequestId};
use sequence::{Sequence, State};

use crate::blocks::BlockPool;
use crate::executor::{BLOCK_TOKENS, BlockId, Limits, Row, SeqId, Step};

/// What a scheduler keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Tokens of prompt and answer together.
    pub max_model_len: usize,
    /// Whether blocks of earlier requests are found again.
    pub prefix_caching: bool,
    /// Part of the names of blocks: changes when the model's weights do.
    pub weight_version: u64,
}

/// A configuration that an executor cannot keep.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Zero of something.
    #[error("`{0}` must be at least 1, got 0")]
    Zero(&'static str),
    /// More than the executor takes.
    #[error("`{field}` must be at most {most}, which is what the executor takes, got {value}")]
    TooMuch {
        /// Of what.
        field: &'static str,
        /// What was asked for.
        value: usize,
        /// What would do.
        most: usize,
    },
    /// Answers alone would not fit into a step.
    #[error(
        "`max_num_batched_tokens` must be at least `max_num_seqs` ({max_num_seqs}), got {tokens}"
    )]
    TokensBelowSeqs {
        /// Tokens of a step.
        tokens: usize,
        /// Sequences of a step.
        max_num_seqs: usize,
    },
    /// Not even one sequence of full length has room.
    #[error(
        "`max_model_len` of {max_model_len} tokens does not fit into the memory left for keys and values, which holds {fits}: set it to at most {fits}"
    )]
    ModelLen {
        /// What was asked for.
        max_model_len: usize,
        /// What would fit.
        fits: usize,
    },
}

impl Config {
    /// Whether an executor of these limits can keep it.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self, limits: &Limits) -> Result<(), ConfigError> {
        let most = [
            ("max_num_seqs", self.max_num_seqs, limits.rows),
            (
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                limits.tokens,
            ),
            ("max_model_len", self.max_model_len, u32::MAX),
        ];
        for (field, value, most) in most {
            let most = most as usize;
            if value == 0 {
                return Err(ConfigError::Zero(field));
            }
            if value > most {
                return Err(ConfigError::TooMuch { field, value, most });
            }
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(ConfigError::TokensBelowSeqs {
                tokens: self.max_num_batched_tokens,
                max_num_seqs: self.max_num_seqs,
            });
        }
        let fits = limits.kv_blocks as usize * BLOCK_TOKENS;
        if self.max_model_len > fits {
            return Err(ConfigError::ModelLen {
                max_model_len: self.max_model_len,
                fits,
            });
        }
        Ok(())
    }

    /// Whether a request can be served at all.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, request: &Request, vocab: u32) -> Result<(), Refused> {
        let prompt_tokens = request.prompt.ids().len();
        if prompt_tokens == 0 {
            return Err(Refused::EmptyPrompt);
        }
        if prompt_tokens >= self.max_model_len {
            return Err(Refused::TooLong {
                prompt_tokens,
                max_model_len: self.max_model_len,
            });
        }
        if request.max_tokens == 0 {
            return Err(Refused::NoTokens);
        }
        match request.prompt.unknown(vocab) {
            Some(id) => Err(Refused::UnknownId { id, vocab }),
            None => Ok(()),
        }
    }
}

/// What has happened so far, and what is there now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Requests that were set aside.
    pub held: usize,
    /// KV blocks that there are.
    pub kv_blocks: u32,
    /// KV blocks that somebody uses.
    pub kv_blocks_used: u32,
    /// KV blocks that nobody uses and that can be found again.
    pub kv_blocks_cached: u32,
    /// Rows of the last step.
    pub step_rows: usize,
    /// Tokens of the last step.
    pub step_tokens: usize,
    /// Steps so far.
    pub steps: u64,
    /// Tokens that went through the model so far.
    pub computed_tokens: u64,
    /// Ids of answers so far.
    pub drawn_tokens: u64,
    /// Ids that were drawn after their answer had ended.
    pub dropped_tokens: u64,
    /// Tokens of prompts that were admitted, whether cached or not.
    pub prompt_tokens: u64,
    /// Of these, tokens that were found in the cache.
    pub cached_tokens: u64,
    /// How often a running request gave up its blocks.
    pub preemptions: u64,
}

/// A step whose result is not there yet.
#[derive(Debug)]
struct InFlight {
    step: u64,
    draws: Vec<SeqId>,
}

/// What an ended or preempted sequence leaves behind until the last step that uses it has ended.
#[derive(Debug)]
struct Leaving {
    last_step: u64,
    blocks: Vec<BlockId>,
    #[expect(dead_code, reason = "kept alive: rows in flight run under it")]
    adapter: Option<Arc<Adapter>>,
}

/// A step that is being decided.
struct Plan {
    step: u64,
    tokens_left: usize,
    rows: Vec<Row>,
}

/// All requests, and who of them runs.
pub struct Scheduler {
    config: Config,
    limits: Limits,
    pool: BlockPool,
    sequences: HashMap<RequestId, Sequence>,
    waiting: Waiting,
    running: BTreeSet<Rank>,
    leaving: Vec<Leaving>,
    in_flight: VecDeque<InFlight>,
    last_id: u64,
    last_step: u64,
    counters: Counters,
}

impl Scheduler {
    /// Without requests.
    ///
    /// # Errors
    /// The executor cannot keep the configuration.
    pub fn new(config: Config, limits: Limits) -> Result<Self, ConfigError> {
        config.check(&limits)?;
        Ok(Self {
            config,
            limits,
            pool: BlockPool::new(limits.kv_blocks),
            sequences: HashMap::new(),
            waiting: Waiting::default(),
            running: BTreeSet::new(),
            leaving: Vec::new(),
            in_flight: VecDeque::new(),
            last_id: 0,
            last_step: 0,
            counters: Counters::default(),
        })
    }

    /// Takes a request, which waits.
    ///
    /// # Errors
    /// It can never be served.
    pub fn add(&mut self, request: Request) -> Result<RequestId, Refused> {
        self.config.admits(&request, self.limits.vocab)?;
        let id = RequestId(self.last_id + 1);
        let sequence = Sequence::new(
            id,
            request,
            self.config.max_model_len,
            self.config.weight_version,
        )?;
        self.last_id = id.0;
        self.waiting.insert(sequence.rank());
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Ends a request without an event. False if there is no such request any more.
    pub fn abort(&mut self, id: RequestId) -> bool {
        match self.sequences.remove(&id) {
            Some(sequence) => {
                self.retire(sequence);
                true
            }
            None => false,
        }
    }

    /// Sets a request aside: it gives up its blocks and does not run until [`resume`](Self::resume). What was drawn for
    /// it in steps in flight still comes.
    pub fn hold(&mut self, id: RequestId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let rank = sequence.rank();
        match sequence.state {
            State::Held => return,
            State::Waiting => {
                self.waiting.remove(rank);
            }
            State::Running => self.vacate(rank),
        }
        self.set_state(id, State::Held);
        self.counters.held += 1;
    }

    /// Lets a request that was set aside wait for its place again, by its arrival.
    pub fn resume(&mut self, id: RequestId) {
        if let Some(sequence) = self.sequences.get(&id)
            && sequence.state == State::Held
        {
            self.waiting.insert(sequence.rank());
            self.set_state(id, State::Waiting);
            self.counters.held -= 1;
        }
    }

    /// The next step, if there is anything to do and room for a step in flight. Its result is due at
    /// [`apply`](Self::apply).
    pub fn decide(&mut self) -> Option<Step> {
        if self.in_flight.len() >= self.limits.steps_in_flight as usize {
            return None;
        }
        let mut plan = Plan {
            step: self.last_step + 1,
            tokens_left: self.config.max_num_batched_tokens,
            rows: Vec::with_capacity(self.running.len()),
        };
        self.go_on_with_answers(&mut plan);
        self.go_on_with_prompts(&mut plan);
        self.admit(&mut plan);
        if plan.rows.is_empty() {
            return None;
        }
        self.last_step = plan.step;
        let draws = plan.rows.iter().filter(|row| row.sample.is_some());
        self.in_flight.push_back(InFlight {
            step: plan.step,
            draws: draws.map(|row| row.seq).collect(),
        });
        let tokens = self.config.max_num_batched_tokens - plan.tokens_left;
        self.counters.steps += 1;
        self.counters.step_rows = plan.rows.len();
        self.counters.step_tokens = tokens;
        self.counters.computed_tokens += tokens as u64;
        Some(Step { rows: plan.rows })
    }

    /// Whether it has no request and no step in flight.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.in_flight.is_empty()
    }

    /// Whether a request runs or waits to run. Then, with no step in flight, there is one to decide.
    pub fn has_work(&self) -> bool {
        self.waiting.len() + self.running.len() > 0
    }

    /// Whether a request has not ended yet.
    pub fn knows(&self, id: RequestId) -> bool {
        self.sequences.contains_key(&id)
    }

    /// How many steps are in flight.
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// What has happened so far, and what is there now.
    pub fn counters(&self) -> Counters {
        Counters {
            waiting: self.waiting.len(),
            running: self.running.len(),
            kv_blocks: self.pool.total(),
            kv_blocks_used: self.pool.total() - self.pool.available(),
            kv_blocks_cached: self.pool.cached(),
            ..self.counters
        }
    }

    /// One token of each running answer.
    fn go_on_with_answers(&mut self, plan: &mut Plan) {
        let ranks: Vec<Rank> = self.running.iter().copied().collect();
        for rank in ranks {
            if plan.tokens_left == 0 {
                return;
            }
            // One that gave up its blocks for another one in this loop runs no more.
            let Some(sequence) = self.running_mut(rank) else {
                continue;
            };
            if sequence.todo() != 1 || !sequence.can_draw() {
                continue;
            }
            if sequence.blocks.len() * BLOCK_TOKENS == sequence.computed {
                // Where there is none, those that rank after it get none either: it comes first in the next step.
                let Some(block) = self.block_for(rank) else {
                    continue;
                };
                if let Some(sequence) = self.running_mut(rank) {
                    sequence.blocks.push(block);
                }
            }
            self.push_row(rank.id, 1, plan);
        }
    }

    /// The next chunks of running prompts. They have their blocks.
    fn go_on_with_prompts(&mut self, plan: &mut Plan) {
        let todo = |rank: &Rank| {
            let sequence = self.sequences.get(&rank.id)?;
            (sequence.todo() > 1).then(|| (rank.id, sequence.todo()))
        };
        let prompts: Vec<_> = self.running.iter().filter_map(todo).collect();
        for (id, todo) in prompts {
            let count = todo.min(plan.tokens_left);
            if count > 0 {
                self.push_row(id, count, plan);
            }
        }
    }

    fn push_row(&mut self, id: RequestId, count: usize, plan: &mut Plan) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        plan.rows.push(sequence.row(count, plan.step));
        plan.tokens_left -= count;
        if self.config.prefix_caching {
            publish(sequence, &mut self.pool);
        }
    }

    fn running_mut(&mut self, rank: Rank) -> Option<&mut Sequence> {
        let sequence = self.sequences.get_mut(&rank.id)?;
        (sequence.state == State::Running).then_some(sequence)
    }

    /// A block for a running sequence, if need be from those that rank after it. `None`: not in this step.
    fn block_for(&mut self, rank: Rank) -> Option<BlockId> {
        loop {
            if let Some(block) = self.pool.take() {
                return Some(block);
            }
            // What leaves comes back with a step in flight: no need to preempt more.
            if !self.leaving.is_empty() {
                return None;
            }
            let last = self.running.last().copied().filter(|last| *last > rank)?;
            self.preempt(last);
        }
    }

    /// Takes its blocks from a running sequence, which waits again.
    fn preempt(&mut self, rank: Rank) {
        self.vacate(rank);
        self.set_state(rank.id, State::Waiting);
        self.waiting.insert(rank);
        self.counters.preemptions += 1;
    }

    /// Takes blocks and place from a running sequence.
    fn vacate(&mut self, rank: Rank) {
        self.running.remove(&rank);
        if let Some(sequence) = self.sequences.get_mut(&rank.id) {
            let leaving = Leaving {
                last_step: sequence.last_step,
                blocks: sequence.forget_blocks(),
                adapter: sequence.request.adapter.clone(),
            };
            self.leave(leaving);
        }
    }

    /// Lets go of all that a sequence had. It is in no map any more.
    fn retire(&mut self, mut sequence: Sequence) {
        match sequence.state {
            State::Waiting => {
                self.waiting.remove(sequence.rank());
            }
            State::Running => {
                self.running.remove(&sequence.rank());
            }
            State::Held => self.counters.held -= 1,
        }
        self.leave(Leaving {
            last_step: sequence.last_step,
            blocks: sequence.forget_blocks(),
            adapter: sequence.request.adapter.take(),
        });
    }

    fn leave(&mut self, leaving: Leaving) {
        if self.uses(leaving.last_step) {
            self.leaving.push(leaving);
        } else {
            release(leaving, &mut self.pool);
        }
    }

    /// Whether a step is in flight, or just being decided.
    fn uses(&self, step: u64) -> bool {
        step > self.last_step
            || self
                .in_flight
                .front()
                .is_some_and(|first| step >= first.step)
    }

    fn set_state(&mut self, id: RequestId, state: State) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.state = state;
        }
    }
}

/// Offers the blocks of a sequence that are full of ids that are known, and written by steps up to its last.
fn publish(sequence: &mut Sequence, pool: &mut BlockPool) {
    let full = sequence.computed.min(sequence.tokens.len()) / BLOCK_TOKENS;
    for i in sequence.published..full {
        pool.publish(
            sequence.blocks[i],
            *sequence.chain.get(i),
            sequence.last_step,
        );
    }
    sequence.published = sequence.published.max(full);
}

/// The last blocks first, so that of a cached prompt the end goes before the start.
fn release(leaving: Leaving, pool: &mut BlockPool) {
    for block in leaving.blocks.into_iter().rev() {
        pool.release(block);
    }
}
