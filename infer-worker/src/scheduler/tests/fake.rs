//! An executor whose model is a function of the whole prefix, and that checks every row that it is given.
//!
//! Its KV memory holds, for each position, a hash of all that came before, under which adapter. A block with the ids of
//! another sequence, in the wrong place, of an old adapter or not yet written is seen when it is read.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::blocks::AdapterDigest;
use crate::executor::{
    BLOCK_TOKENS, BlockId, Done, Drawn, Input, Limits, Row, Sampling, SeqId, Step, Ticket,
};

/// Ids of the fake model.
pub const VOCAB: u32 = 40;

pub fn digest(slot: u32) -> AdapterDigest {
    // Slots 1 and 2 hold the same files.
    [if slot == 2 { 1 } else { slot as u8 }; 32]
}

/// What a position's keys and values stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    position: usize,
    id: u32,
    mind: u64,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The state after `id`.
fn after(before: Option<Cell>, id: u32, adapter: Option<AdapterDigest>) -> Cell {
    let position = before.map_or(0, |cell| cell.position + 1);
    let mind = hash((before.map(|cell| cell.mind), id, adapter));
    Cell { position, id, mind }
}

fn draw(cell: Cell, sampling: &Sampling) -> u32 {
    let seen: Vec<_> = sampling
        .penalties
        .iter()
        .flat_map(|p| p.seen.iter())
        .collect();
    let seen: Vec<_> = seen.iter().map(|seen| (seen.id, seen.in_answer)).collect();
    let start = hash((cell.mind, sampling.seed, sampling.step, seen)) as u32;
    let allowed = |id: &u32| {
        let mask = sampling.allowed.as_ref();
        mask.is_none_or(|m| m[(id / 32) as usize] >> (id % 32) & 1 == 1)
    };
    let ids = (0..VOCAB).map(|i| (start % VOCAB + i) % VOCAB);
    ids.into_iter().find(allowed).expect("an id is allowed")
}

/// The answer that a model gives to `tokens` if nothing else runs: the next id.
pub fn next_id(tokens: &[u32], adapter: Option<AdapterDigest>, sampling: &Sampling) -> u32 {
    let fold = |before, id: &u32| Some(after(before, *id, adapter));
    let cell = tokens.iter().fold(None, fold).expect("a prompt");
    draw(cell, sampling)
}

pub struct Fake {
    limits: Limits,
    kv: HashMap<BlockId, [Option<Cell>; BLOCK_TOKENS]>,
    in_flight: VecDeque<(Ticket, Step)>,
    submitted: u64,
    /// The ids that the last executed step drew.
    last_drawn: HashMap<SeqId, u32>,
    /// When each sequence first had a row: the order of admission.
    pub first_rows: Vec<SeqId>,
    /// Rows by kind: chunks that draw nothing, ids that are known, ids in flight.
    pub rows: BTreeMap<&'static str, usize>,
}

impl Fake {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            kv: HashMap::new(),
            in_flight: VecDeque::new(),
            submitted: 0,
            last_drawn: HashMap::new(),
            first_rows: Vec::new(),
            rows: BTreeMap::new(),
        }
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub fn submit(&mut self, step: Step) {
        assert!(self.in_flight.len() < self.limits.steps_in_flight as usize);
        assert!(!step.rows.is_empty() && step.rows.len() <= self.limits.rows as usize);
        let tokens: usize = step.rows.iter().map(|row| row.input.tokens()).sum();
        assert!(tokens <= self.limits.tokens as usize, "{tokens} tokens");
        self.check_owners(&step);
        for row in &step.rows {
            self.check_row(row);
        }
        self.submitted += 1;
        self.in_flight.push_back((Ticket(self.submitted), step));
    }

    /// The result of the oldest step, which is executed only now.
    pub fn finish_one(&mut self) -> Option<Done> {
        let (ticket, step) = self.in_flight.pop_front()?;
        let before = std::mem::take(&mut self.last_drawn);
        // All rows read before any writes: what a row needs must be from earlier steps.
        let cells: Vec<_> = step.rows.iter().map(|row| self.run(row, &before)).collect();
        let mut drawn = Vec::new();
        for (row, cells) in step.rows.iter().zip(cells) {
            for cell in &cells {
                let block = row.blocks[cell.position / BLOCK_TOKENS];
                let block = self.kv.entry(block).or_insert([None; BLOCK_TOKENS]);
                block[cell.position % BLOCK_TOKENS] = Some(*cell);
            }
            if let Some(sampling) = &row.sample {
                let id = draw(*cells.last().unwrap(), sampling);
                self.last_drawn.insert(row.seq, id);
                drawn.push(Drawn {
                    seq: row.seq,
                    id,
                    logprob: -1.0,
                    top: vec![],
                });
            }
        }
        Some(Done { ticket, drawn })
    }

    fn run(&self, row: &Row, before: &HashMap<SeqId, u32>) -> Vec<Cell> {
        let adapter = row.adapter.map(|slot| digest(slot.0));
        let mut last = None;
        for position in 0..row.start as usize {
            let block = self.kv.get(&row.blocks[position / BLOCK_TOKENS]);
            let cell = block.and_then(|block| block[position % BLOCK_TOKENS]);
            let cell = cell.unwrap_or_else(|| panic!("{:?}: nothing at {position}", row.seq));
            assert_eq!(
                cell,
                after(last, cell.id, adapter),
                "{:?}: another prefix at {position}",
                row.seq
            );
            last = Some(cell);
        }
        let ids = match &row.input {
            Input::Ids(ids) => ids.clone(),
            Input::Sampled => vec![before[&row.seq]],
        };
        let mut cells = Vec::new();
        for id in ids {
            let cell = after(last, id, adapter);
            cells.push(cell);
            last = Some(cell);
        }
        cells
    }

    fn check_row(&mut self, row: &Row) {
        let end = row.start as usize + row.input.tokens();
        assert!(row.input.tokens() > 0);
        assert_eq!(
            row.blocks.len(),
            end.div_ceil(BLOCK_TOKENS),
            "{:?}",
            row.seq
        );
        assert!(row.blocks.iter().all(|b| b.0 < self.limits.kv_blocks));
        if !self.first_rows.contains(&row.seq) {
            self.first_rows.push(row.seq);
        }
        let kind = match (&row.input, &row.sample) {
            (_, None) => "chunk",
            (Input::Sampled, _) => "sampled",
            (Input::Ids(ids), _) if ids.len() == 1 => "known",
            _ => "prompt",
        };
        *self.rows.entry(kind).or_default() += 1;
    }

    /// A block that a row writes is in no other row of this step, and in no step in flight but its own sequence's.
    fn check_owners(&self, step: &Step) {
        let steps = self.in_flight.iter().map(|(_, step)| step).chain([step]);
        let mut users: HashMap<BlockId, Vec<SeqId>> = HashMap::new();
        for row in steps.flat_map(|step| &step.rows) {
            for block in &row.blocks {
                users.entry(*block).or_default().push(row.seq);
            }
        }
        let mut seqs = std::collections::HashSet::new();
        for row in &step.rows {
            assert!(seqs.insert(row.seq), "two rows of {:?}", row.seq);
            for block in &row.blocks[row.start as usize / BLOCK_TOKENS..] {
                let others = users[block].iter().filter(|seq| **seq != row.seq);
                let others: Vec<_> = others.collect();
                assert!(others.is_empty(), "{block:?} of {:?}: {others:?}", row.seq);
            }
        }
    }
}
