//! What a step brings to the device, as one run of words that is uploaded at once, and what it leaves there.
//!
//! A step's shape says where each list begins. So decode steps of one size share a recorded graph: they write the same
//! places. Lists whose length varies within a shape (masks, pairs of the sampler, blocks) follow in the *tail*, which the
//! other lists point into. Rows of one token come first, by adapter; so their tokens are the first of the step, and the
//! attention of single tokens and of many have each a range of their own.

use std::collections::HashMap;

use espalier_kernels::cuda::{
    BLOCK_TOKENS, Buffer, CudaError, FROM_DRAWN, NONE, PrefillAttention, SampleRow, TOP_MAX,
};

use super::super::{AdapterSlot, ExecutorError, Input, Row, Sampling, SeqId, Step};

/// Lists begin at whole 256 bytes.
const ALIGN_WORDS: usize = 64;

/// How long the lists of a step are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Tokens, those included that only fill it up.
    pub tokens: usize,
    /// Rows.
    pub rows: usize,
    /// The first rows, of one token each.
    pub decodes: usize,
    /// Tiles of the other rows.
    pub tiles: usize,
    /// Ids that are drawn.
    pub draws: usize,
}

impl Shape {
    /// Of a step of `rows` rows of one token.
    pub fn decode(rows: usize) -> Self {
        Self {
            tokens: rows,
            rows,
            decodes: rows,
            tiles: 0,
            draws: rows,
        }
    }
}

/// Where the lists of a shape begin, in words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub shape: Shape,
    ids: usize,
    positions: usize,
    token_rows: usize,
    slots: usize,
    lengths: usize,
    starts: usize,
    tiles: usize,
    wanted: usize,
    how: usize,
    /// Where the tail begins, and the other lists end.
    pub tail: usize,
}

impl Layout {
    pub fn new(shape: Shape) -> Self {
        let mut end = 0;
        let mut take = |words: usize| {
            let start = end;
            end += words.next_multiple_of(ALIGN_WORDS);
            start
        };
        Self {
            shape,
            ids: take(shape.tokens),
            positions: take(shape.tokens),
            token_rows: take(shape.tokens),
            slots: take(shape.tokens),
            lengths: take(shape.decodes),
            starts: take(shape.rows + 1),
            tiles: take(4 * shape.tiles),
            wanted: take(shape.draws),
            how: take(SampleRow::WORDS * shape.draws),
            tail: end,
        }
    }
}

/// The lists on the device.
pub(super) struct Inputs {
    pub shape: Shape,
    /// `[tokens]`.
    pub ids: Buffer<u32>,
    /// `[tokens]`.
    pub positions: Buffer<u32>,
    /// `[tokens]`: its row, or none.
    pub token_rows: Buffer<u32>,
    /// `[tokens]`: its adapter's place, or none.
    pub slots: Buffer<u32>,
    /// `[decodes]`.
    pub lengths: Buffer<u32>,
    /// `[rows + 1]`: where the blocks of a row begin in the tail.
    pub starts: Buffer<u32>,
    /// `[tiles]`.
    pub tiles: Buffer<[u32; 4]>,
    /// `[draws]`: the token of which logits are wanted.
    pub wanted: Buffer<u32>,
    /// `[draws]`.
    pub how: Buffer<SampleRow>,
    /// The tail, as words and as pairs.
    pub tail: Buffer<u32>,
    pub pairs: Buffer<[u32; 2]>,
}

impl Inputs {
    /// Of `layout` in `arena`, with a tail of its own where it does not fit there.
    pub fn new(
        arena: &Buffer<u32>,
        layout: &Layout,
        tail: Option<Buffer<u32>>,
    ) -> Result<Self, CudaError> {
        let shape = layout.shape;
        let tail = match tail {
            Some(tail) => tail,
            None => arena.part(layout.tail, arena.len() - layout.tail)?,
        };
        Ok(Self {
            shape,
            ids: arena.part(layout.ids, shape.tokens)?,
            positions: arena.part(layout.positions, shape.tokens)?,
            token_rows: arena.part(layout.token_rows, shape.tokens)?,
            slots: arena.part(layout.slots, shape.tokens)?,
            lengths: arena.part(layout.lengths, shape.decodes)?,
            starts: arena.part(layout.starts, shape.rows + 1)?,
            tiles: arena.part(layout.tiles, shape.tiles)?,
            wanted: arena.part(layout.wanted, shape.draws)?,
            how: arena.part(layout.how, shape.draws)?,
            pairs: tail.part(0, tail.len() / 2)?,
            tail,
        })
    }
}

/// What a step leaves: where the lists of so many draws begin, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Results {
    pub draws: usize,
    pub logprobs: usize,
    pub top_ids: usize,
    pub top_logprobs: usize,
    pub end: usize,
}

impl Results {
    pub fn new(draws: usize) -> Self {
        let (one, top) = (
            draws.next_multiple_of(ALIGN_WORDS),
            (draws * TOP_MAX).next_multiple_of(ALIGN_WORDS),
        );
        Self {
            draws,
            logprobs: one,
            top_ids: 2 * one,
            top_logprobs: 2 * one + top,
            end: 2 * (one + top),
        }
    }

    /// Words to copy: the most likely ids only where they are asked for.
    pub fn words(&self, with_top: bool) -> usize {
        if with_top { self.end } else { self.top_ids }
    }
}

/// An id that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub seq: SeqId,
    /// Its place among the draws.
    pub place: usize,
    /// How many of the most likely ids are wanted.
    pub top: usize,
}

/// Numbers of the model and the executor that lists depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Rows of a step.
    pub rows: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Positions that there are.
    pub positions: usize,
    /// KV blocks that there are.
    pub kv_blocks: usize,
    /// Words of a mask.
    pub mask_words: usize,
}

/// A step, sorted.
pub(super) struct Sorted<'a> {
    /// Rows of one token by adapter, then the others.
    rows: Vec<&'a Row>,
    /// How many have one token.
    pub singles: usize,
    /// Tokens of all.
    pub tokens: usize,
    /// Tiles of the others.
    pub tiles: usize,
    /// One for each row that draws, in the order of the step.
    pub due: Vec<Due>,
    /// Whether any row has an adapter.
    pub is_adapted: bool,
}

fn refuse<T>(row: &Row, rule: String) -> Result<T, ExecutorError> {
    Err(ExecutorError::Device(format!(
        "the row of {:?} is no step's: {rule}",
        row.seq
    )))
}

fn check(row: &Row, bounds: &Bounds) -> Result<(), ExecutorError> {
    let (tokens, end) = (row.input.tokens(), row.start as usize + row.input.tokens());
    if tokens == 0 {
        return refuse(row, "it has no tokens".to_owned());
    }
    if end > bounds.positions {
        let most = bounds.positions;
        return refuse(row, format!("it ends at position {end} of {most}"));
    }
    if row.blocks.len() * BLOCK_TOKENS < end {
        let blocks = row.blocks.len();
        return refuse(row, format!("{blocks} blocks do not hold {end} positions"));
    }
    match row.blocks.iter().find(|b| b.0 as usize >= bounds.kv_blocks) {
        Some(block) => refuse(row, format!("{block:?} is not below {}", bounds.kv_blocks)),
        None => Ok(()),
    }
}

impl<'a> Sorted<'a> {
    /// Checks a step, and puts its rows into the device's order.
    pub fn new(step: &'a Step, bounds: &Bounds) -> Result<Self, ExecutorError> {
        for row in &step.rows {
            check(row, bounds)?;
        }
        let tokens = step.rows.iter().map(|row| row.input.tokens()).sum();
        if tokens > bounds.tokens || step.rows.len() > bounds.rows || tokens == 0 {
            return Err(ExecutorError::Device(format!(
                "a step of {} rows and {tokens} tokens is not within 1 to {} and {}",
                step.rows.len(),
                bounds.rows,
                bounds.tokens
            )));
        }
        let mut order: Vec<usize> = (0..step.rows.len()).collect();
        // Neighbours of one adapter read its matrices once.
        order.sort_by_key(|i| {
            let row = &step.rows[*i];
            (row.input.tokens() > 1, row.adapter.map(|slot| slot.0))
        });
        let rows: Vec<&Row> = order.iter().map(|i| &step.rows[*i]).collect();
        let singles = rows.partition_point(|row| row.input.tokens() == 1);
        let tiles = rows[singles..]
            .iter()
            .map(|row| row.input.tokens().div_ceil(PrefillAttention::TILE as usize))
            .sum();
        let drawing = order.iter().filter(|i| step.rows[**i].sample.is_some());
        let mut due: Vec<(usize, Due)> = Vec::with_capacity(rows.len());
        for (place, index) in drawing.enumerate() {
            let row = &step.rows[*index];
            let wanted = row.sample.as_ref().and_then(|s| s.logprobs).unwrap_or(0);
            let top = usize::from(wanted).min(TOP_MAX);
            let seq = row.seq;
            due.push((*index, Due { seq, place, top }));
        }
        due.sort_unstable_by_key(|(index, _)| *index);
        Ok(Self {
            singles,
            tokens,
            tiles,
            due: due.into_iter().map(|(_, due)| due).collect(),
            is_adapted: rows.iter().any(|row| row.adapter.is_some()),
            rows,
        })
    }

    /// Whether all rows have one token.
    pub fn is_decode(&self) -> bool {
        self.singles == self.rows.len()
    }

    /// The exact shape, with `tokens` tokens in all.
    pub fn shape(&self, tokens: usize) -> Shape {
        Shape {
            tokens,
            rows: self.rows.len(),
            decodes: self.singles,
            tiles: self.tiles,
            draws: self.due.len(),
        }
    }

    /// Writes the lists of this step, whose shape is `layout`'s or smaller, and gives the tail.
    ///
    /// `drawn`: the place of each id that the step before draws. `adapters`: the place of each adapter.
    pub fn write(
        &self,
        words: &mut [u32],
        layout: &Layout,
        bounds: &Bounds,
        drawn: &HashMap<SeqId, u32>,
        adapters: &HashMap<AdapterSlot, u32>,
    ) -> Result<Vec<u32>, ExecutorError> {
        let mut tail = Tail::new(&self.rows, bounds);
        let mut lists = Lists::idle(words, layout);
        let (mut token, mut draw) = (0, 0);
        for (index, row) in self.rows.iter().enumerate() {
            let count = row.input.tokens();
            lists.ids(token, row, drawn)?;
            let slot = match row.adapter {
                None => NONE,
                Some(slot) => match adapters.get(&slot) {
                    Some(place) => *place,
                    None => return refuse(row, format!("no adapter is loaded as {slot:?}")),
                },
            };
            for i in 0..count {
                lists.put(layout.positions, token + i, row.start + i as u32);
                lists.put(layout.token_rows, token + i, index as u32);
                lists.put(layout.slots, token + i, slot);
            }
            if index < self.singles {
                lists.put(layout.lengths, index, row.start + 1);
            } else {
                lists.tiles(index as u32, token as u32, count as u32, row.start);
            }
            lists.put(layout.starts, index, tail.blocks(row));
            if let Some(sampling) = &row.sample {
                lists.put(layout.wanted, draw, (token + count - 1) as u32);
                let how = tail.how(sampling, draw as u32);
                lists.how(draw, &how);
                draw += 1;
            }
            token += count;
        }
        let end = tail.blocks_end();
        for row in self.rows.len()..=layout.shape.rows {
            lists.put(layout.starts, row, end);
        }
        Ok(tail.words)
    }
}

/// Writes into the lists of a layout.
struct Lists<'a> {
    words: &'a mut [u32],
    layout: &'a Layout,
    /// Tiles so far.
    tiles: usize,
}

impl<'a> Lists<'a> {
    /// Lists of a step that does nothing.
    fn idle(words: &'a mut [u32], layout: &'a Layout) -> Self {
        let shape = layout.shape;
        words[..layout.tail].fill(0);
        for (list, len) in [
            (layout.token_rows, shape.tokens),
            (layout.slots, shape.tokens),
            (layout.tiles, 4 * shape.tiles),
            (layout.wanted, shape.draws),
        ] {
            words[list..list + len].fill(NONE);
        }
        let mut lists = Self {
            words,
            layout,
            tiles: 0,
        };
        for draw in 0..shape.draws {
            lists.how(draw, &SampleRow::IDLE);
        }
        lists
    }

    fn put(&mut self, list: usize, at: usize, word: u32) {
        self.words[list + at] = word;
    }

    fn ids(
        &mut self,
        token: usize,
        row: &Row,
        drawn: &HashMap<SeqId, u32>,
    ) -> Result<(), ExecutorError> {
        let at = self.layout.ids + token;
        match &row.input {
            Input::Ids(ids) => self.words[at..at + ids.len()].copy_from_slice(ids),
            Input::Sampled => match drawn.get(&row.seq) {
                Some(place) => self.words[at] = FROM_DRAWN | place,
                None => return refuse(row, "the step before drew nothing for it".to_owned()),
            },
        }
        Ok(())
    }

    fn tiles(&mut self, row: u32, token: u32, count: u32, position: u32) {
        for tile in PrefillAttention::tiles_of(row, token, count, position) {
            let at = self.layout.tiles + 4 * self.tiles;
            self.words[at..at + 4].copy_from_slice(&tile);
            self.tiles += 1;
        }
    }

    fn how(&mut self, draw: usize, how: &SampleRow) {
        let at = self.layout.how + SampleRow::WORDS * draw;
        self.words[at..at + SampleRow::WORDS].copy_from_slice(&how.words());
    }
}

/// Writes the lists of a step that does nothing: what a graph is recorded with.
pub(super) fn write_idle(words: &mut [u32], layout: &Layout) {
    let _idle = Lists::idle(words, layout);
}

/// Masks first, at whole multiples of their length; then pairs, at even words; then blocks.
struct Tail {
    words: Vec<u32>,
    mask_words: usize,
    masks: usize,
    next_mask: usize,
    /// Where the next pair goes, counted in pairs.
    next_pair: usize,
    /// Where the blocks of the next row go.
    next_block: usize,
}

impl Tail {
    fn new(rows: &[&Row], bounds: &Bounds) -> Self {
        let samples = || rows.iter().filter_map(|row| row.sample.as_ref());
        let masks = samples().filter(|s| s.allowed.is_some()).count();
        let pairs: usize = samples().map(pairs_of).sum();
        let first_pair = (masks * bounds.mask_words).div_ceil(2);
        let first_block = 2 * (first_pair + pairs);
        let blocks: usize = rows.iter().map(|row| row.blocks.len()).sum();
        Self {
            words: vec![0; first_block + blocks],
            mask_words: bounds.mask_words,
            masks,
            next_mask: 0,
            next_pair: first_pair,
            next_block: first_block,
        }
    }

    /// Where the blocks of `row` begin.
    fn blocks(&mut self, row: &Row) -> u32 {
        let start = self.next_block;
        for (word, block) in self.words[start..].iter_mut().zip(&row.blocks) {
            *word = block.0;
        }
        self.next_block += row.blocks.len();
        start as u32
    }

    fn blocks_end(&self) -> u32 {
        self.next_block as u32
    }

    /// Writes what a row of the sampler points at, and gives it.
    fn how(&mut self, sampling: &Sampling, place: u32) -> SampleRow {
        let seen_from = self.next_pair as u32;
        let penalties = sampling.penalties.as_ref();
        for seen in penalties.iter().flat_map(|penalties| penalties.seen.iter()) {
            self.pair(seen.id, seen.in_answer);
        }
        let bias_from = self.next_pair as u32;
        for (id, bias) in merged(sampling.bias.as_deref().unwrap_or_default()) {
            self.pair(id, bias.to_bits());
        }
        SampleRow {
            temperature: sampling.effective_temperature(),
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            top_count: u32::from(sampling.logprobs.unwrap_or(0)).min(TOP_MAX as u32),
            repetition: penalties.map_or(1.0, |penalties| penalties.repetition),
            presence: penalties.map_or(0.0, |penalties| penalties.presence),
            frequency: penalties.map_or(0.0, |penalties| penalties.frequency),
            seen_from,
            seen_to: bias_from,
            mask: self.mask(sampling),
            bias_from,
            bias_to: self.next_pair as u32,
            feed: place,
            ..SampleRow::GREEDY
        }
        .seeded(sampling.seed, sampling.step)
    }

    fn pair(&mut self, id: u32, value: u32) {
        let at = 2 * self.next_pair;
        self.words[at..at + 2].copy_from_slice(&[id, value]);
        self.next_pair += 1;
    }

    fn mask(&mut self, sampling: &Sampling) -> u32 {
        let Some(allowed) = &sampling.allowed else {
            return NONE;
        };
        debug_assert!(self.next_mask < self.masks);
        let start = self.next_mask * self.mask_words;
        let mask = &mut self.words[start..start + self.mask_words];
        for (word, allowed) in mask.iter_mut().zip(allowed.iter()) {
            *word = *allowed;
        }
        self.next_mask += 1;
        (self.next_mask - 1) as u32
    }
}

/// Biases by id, each id once: those of one id add up.
fn merged(bias: &[(u32, f32)]) -> Vec<(u32, f32)> {
    let mut merged: Vec<(u32, f32)> = bias.to_vec();
    merged.sort_by_key(|(id, _)| *id);
    merged.dedup_by(|later, first| {
        let same = later.0 == first.0;
        first.1 += if same { later.1 } else { 0.0 };
        same
    });
    merged
}

/// Pairs that a row of the sampler has at most: biases of one id become one.
fn pairs_of(sampling: &Sampling) -> usize {
    let seen = sampling.penalties.as_ref().map_or(0, |p| p.seen.count());
    seen + sampling.bias.as_ref().map_or(0, |bias| bias.len())
}

#[cfg(test)]
mod tests;
