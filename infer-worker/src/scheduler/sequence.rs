//! A request that waits or runs, and what is known of it.

use std::sync::Arc;

use super::prompt::Tokens;
use super::queue::Rank;
use super::{Priority, Refused, Request, RequestId};
use crate::blocks::HashChain;
use crate::executor::{BLOCK_TOKENS, BlockId, History, Input, Row, Sampling};
use crate::grammar::GrammarError;

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the queue, without blocks.
    Waiting,
    /// With blocks for all ids that are known.
    Running,
    /// Set aside until it is asked for again, without blocks.
    Held,
}

/// A request and its answer so far.
///
/// `tokens` are the ids that are known: the prompt and what was drawn. `drawing` more are in flight. Keys and values of
/// the first `computed` of both lie in `blocks`, or will when the steps in flight have ended.
pub struct Sequence {
    pub id: RequestId,
    pub class: Priority,
    pub request: Request,
    pub state: State,
    pub tokens: Tokens,
    /// Tokens of prompt and answer at which it ends.
    pub limit: usize,
    pub drawing: usize,
    pub computed: usize,
    pub blocks: Vec<BlockId>,
    pub chain: HashChain,
    /// Leading blocks that have been offered under their names.
    pub published: usize,
    /// The last step with a row of it.
    pub last_step: u64,
    /// Prompt tokens found in the cache when it was first admitted.
    pub cached_tokens: Option<u32>,
    /// It waits for another one to compute the block of this number, at most once for each.
    pub waits_for_block: usize,
    seen: Option<History>,
    allowed: Option<Arc<[u32]>>,
}

impl Sequence {
    pub fn new(
        id: RequestId,
        mut request: Request,
        max_model_len: usize,
        weight_version: u64,
    ) -> Result<Self, Refused> {
        let tokens = Tokens::new(Arc::clone(&request.prompt));
        let allowed = match &mut request.grammar {
            Some(grammar) => Some(grammar.allowed()?),
            None => None,
        };
        Ok(Self {
            id,
            class: request.priority,
            state: State::Waiting,
            limit: max_model_len.min(tokens.len().saturating_add(request.max_tokens as usize)),
            drawing: 0,
            computed: 0,
            blocks: Vec::new(),
            chain: request.names(weight_version),
            published: 0,
            last_step: 0,
            cached_tokens: None,
            waits_for_block: 0,
            seen: request.history(),
            allowed,
            tokens,
            request,
        })
    }

    pub fn rank(&self) -> Rank {
        Rank {
            class: self.class,
            id: self.id,
        }
    }

    /// How many tokens a row must have so that the next id can be drawn.
    pub fn todo(&self) -> usize {
        self.tokens.len() + self.drawing - self.computed
    }

    /// Whether another id may be asked for now: it is not at its limit, and all that a draw needs is known.
    pub fn can_draw(&self) -> bool {
        let needs_ids = self.seen.is_some() || self.request.grammar.is_some();
        self.tokens.len() + self.drawing < self.limit && !(needs_ids && self.drawing > 0)
    }

    /// Blocks for all ids that are known.
    pub fn blocks_for_tokens(&self) -> usize {
        self.tokens.len().div_ceil(BLOCK_TOKENS)
    }

    /// Its part of step number `step`: the next `count` tokens, whose blocks it has.
    pub fn row(&mut self, count: usize, step: u64) -> Row {
        let (start, end) = (self.computed, self.computed + count);
        let input = match self.tokens.get(start..end) {
            Some(ids) => Input::Ids(ids),
            None => Input::Sampled,
        };
        let draws = count == self.todo();
        let sample = draws.then(|| self.sampling());
        self.computed = end;
        self.drawing += usize::from(draws);
        self.last_step = step;
        Row {
            seq: self.id.seq(),
            input,
            start: start as u32,
            blocks: self.blocks[..end.div_ceil(BLOCK_TOKENS)].to_vec(),
            adapter: self.request.adapter.as_ref().map(|a| a.slot()),
            sample,
        }
    }

    fn sampling(&self) -> Sampling {
        let drawn = self.tokens.len() + self.drawing - self.tokens.prompt_len();
        let mut sampling = self.request.sampling.clone();
        sampling.step = drawn as u32;
        if let (Some(penalties), Some(seen)) = (&mut sampling.penalties, &self.seen) {
            penalties.seen = seen.clone();
        }
        if self.allowed.is_some() {
            sampling.allowed.clone_from(&self.allowed);
        }
        sampling
    }

    /// Goes on by an id that was drawn.
    pub fn accept(&mut self, id: u32) {
        self.drawing -= 1;
        self.tokens.push(id);
        let end = self.tokens.len();
        if end.is_multiple_of(BLOCK_TOKENS)
            && let Some(block) = self.tokens.get(end - BLOCK_TOKENS..end)
        {
            self.chain.push(&block);
        }
        if let Some(seen) = &mut self.seen {
            seen.add(id);
        }
    }

    /// Tells the grammar, which begins to compute what may come next. Whether there is one.
    pub fn push_grammar(&mut self, id: u32) -> Result<bool, GrammarError> {
        let Some(grammar) = &mut self.request.grammar else {
            return Ok(false);
        };
        grammar.push(id).map(|()| true)
    }

    /// Asks the grammar what may come next.
    pub fn ask_grammar(&mut self) -> Result<(), GrammarError> {
        if let Some(grammar) = &mut self.request.grammar {
            self.allowed = Some(grammar.allowed()?);
        }
        Ok(())
    }

    /// Gives up its blocks, to be computed again. What was drawn stays.
    pub fn forget_blocks(&mut self) -> Vec<BlockId> {
        self.computed = 0;
        self.published = 0;
        self.waits_for_block = 0;
        std::mem::take(&mut self.blocks)
    }
}
