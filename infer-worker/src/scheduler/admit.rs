//! Who of the waiting requests begins to run.

use super::queue::Rank;
use super::sequence::{Sequence, State};
use super::{Plan, Priority, RequestId, Scheduler};
use crate::blocks::Named;
use crate::executor::BLOCK_TOKENS;

/// What is there of a waiting sequence already.
enum Prefix {
    /// These blocks.
    Found(Vec<Named>),
    /// More soon: its next block is being computed for another sequence in this very step.
    Soon,
}

impl Scheduler {
    /// Lets requests begin in their order, while the step has tokens and rows left.
    pub(super) fn admit(&mut self, plan: &mut Plan) {
        self.promote();
        let (mut passed, mut passed_over) = (None, 0);
        while let Some(rank) = self.waiting.next(passed) {
            if self.settling(rank.id) || !self.has_place(rank) {
                return;
            }
            // A place that was just made is free in the next step.
            if plan.tokens_left == 0 || plan.rows.len() >= self.config.max_num_seqs {
                return;
            }
            let blocks = match self.prefix(rank.id, plan.step) {
                Prefix::Found(blocks) => blocks,
                Prefix::Soon if passed_over < self.config.max_num_seqs => {
                    (passed, passed_over) = (Some(rank), passed_over + 1);
                    continue;
                }
                Prefix::Soon => return,
            };
            if !self.begin(rank, &blocks) {
                return;
            }
            let todo = self.sequences.get(&rank.id).map_or(0, Sequence::todo);
            self.push_row(rank.id, todo.min(plan.tokens_left), plan);
            self.promote();
        }
    }

    fn promote(&mut self) {
        if let Some(id) = self.waiting.promote()
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            sequence.class = Priority::Online;
        }
    }

    /// Whether ids are still in flight that it must go on from.
    fn settling(&self, id: RequestId) -> bool {
        self.sequences.get(&id).is_some_and(|s| s.drawing > 0)
    }

    /// Whether there is a place among the running ones, if need be that of a batch request.
    fn has_place(&mut self, rank: Rank) -> bool {
        if self.running.len() < self.config.max_num_seqs {
            return true;
        }
        match self.yielding(rank) {
            Some(last) => {
                self.preempt(last);
                true
            }
            None => false,
        }
    }

    /// The running batch request that gives way to a waiting online one first.
    fn yielding(&self, rank: Rank) -> Option<Rank> {
        let last = self.running.last().copied();
        last.filter(|last| rank.class < last.class)
    }

    /// The leading blocks that need not be computed. Not the last token's: it has to run so that an id is drawn.
    fn prefix(&mut self, id: RequestId, step: u64) -> Prefix {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Prefix::Found(Vec::new());
        };
        if !self.config.prefix_caching {
            return Prefix::Found(Vec::new());
        }
        let most = (sequence.tokens.len() - 1) / BLOCK_TOKENS;
        let mut found = Vec::new();
        for block in 0..most {
            match self.pool.find(sequence.chain.get(block)) {
                Some(named) if named.filled_in < step => found.push(named),
                Some(_) if sequence.waits_for_block <= found.len() => {
                    sequence.waits_for_block = found.len() + 1;
                    return Prefix::Soon;
                }
                _ => break,
            }
        }
        Prefix::Found(found)
    }

    /// Makes a waiting sequence a running one, with blocks for all its ids. False: there are not enough.
    fn begin(&mut self, rank: Rank, prefix: &[Named]) -> bool {
        let Some(sequence) = self.sequences.get(&rank.id) else {
            return false;
        };
        let fresh = sequence.blocks_for_tokens() - prefix.len();
        let idle = prefix.iter().filter(|named| named.idle).count();
        // Each running answer needs a block every 16 steps: one step's share is left to them.
        let reserve = self.running.len().div_ceil(BLOCK_TOKENS);
        let needed = fresh + idle + reserve;
        if needed > self.pool.available() as usize {
            self.make_room(rank, needed);
            return false;
        }
        let mut blocks = Vec::with_capacity(prefix.len() + fresh);
        for named in prefix {
            self.pool.share(named.block);
            blocks.push(named.block);
        }
        blocks.extend(std::iter::from_fn(|| self.pool.take()).take(fresh));
        self.waiting.admit(rank);
        self.running.insert(rank);
        let Some(sequence) = self.sequences.get_mut(&rank.id) else {
            return false;
        };
        sequence.state = State::Running;
        sequence.blocks = blocks;
        sequence.published = prefix.len();
        sequence.computed = prefix.len() * BLOCK_TOKENS;
        if sequence.cached_tokens.is_none() {
            sequence.cached_tokens = Some(sequence.computed as u32);
            self.counters.prompt_tokens += sequence.tokens.prompt_len() as u64;
            self.counters.cached_tokens += sequence.computed as u64;
        }
        true
    }

    /// Preempts batch requests for an online one, if that gives it the blocks that it needs. They come back when the
    /// steps in flight have ended.
    fn make_room(&mut self, rank: Rank, needed: usize) {
        let held = |rank: &Rank| self.sequences.get(&rank.id).map_or(0, |s| s.blocks.len());
        let yielding = self.running.iter().filter(|r| rank.class < r.class);
        let leaving: usize = self.leaving.iter().map(|l| l.blocks.len()).sum();
        let coming = self.pool.available() as usize + leaving;
        if coming >= needed || coming + yielding.map(held).sum::<usize>() < needed {
            return;
        }
        let mut coming = coming;
        while coming < needed
            && let Some(last) = self.yielding(rank)
        {
            coming += self.sequences.get(&last.id).map_or(0, |s| s.blocks.len());
            self.preempt(last);
        }
    }
}
