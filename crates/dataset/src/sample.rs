//! Rows to samples: token ids, and which of them are trained.
//!
//! A row with recorded ids gives them as they are; another one is rendered by the one template. Either way a sample
//! ends with its last trained token, because what follows would teach nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use espalier_qwen3_text::Tokenizer;

use crate::render::{RenderError, Renderer, index};
use crate::row::Row;

/// Rows that a thread takes at once: neighbours often share their beginning, which it then has in its cache.
const ROWS_AT_ONCE: usize = 8;

/// Tokens of one training sample. Loss is on predicting `ids[i]` from `ids[..i]` for every `i` in a supervised range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The row's id.
    pub id: String,
    /// Token ids, all of the vocabulary.
    pub ids: Vec<u32>,
    /// Ascending, apart from each other, none empty, none with 0; the last one ends where `ids` end.
    pub supervised: Vec<Range<u32>>,
    /// Where the ids come from.
    pub origin: Origin,
    /// The task of the row.
    pub task_id: Option<String>,
    /// The family of the task.
    pub task_kind: Option<String>,
    /// What was cut off, because the row is too long.
    pub cut: Option<TurnsCut>,
}

/// Where the ids of a sample come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// They are what a model saw and sampled.
    Recorded,
    /// They were made from text.
    Rendered,
}

/// Whole turns that did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnsCut {
    /// Tokens before.
    pub tokens: usize,
    /// Trained turns that are gone.
    pub turns: usize,
}

/// Why a row gives no sample. Each names the row.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The conversation cannot be rendered.
    #[error("sample `{id}` cannot be rendered")]
    Render {
        /// The row.
        id: String,
        /// Why.
        source: RenderError,
    },
    /// Nothing to learn from.
    #[error("sample `{id}` must have a supervised token, got none in {tokens} tokens")]
    NothingSupervised {
        /// The row.
        id: String,
        /// Its length.
        tokens: usize,
    },
    /// Not even the first trained turn fits.
    #[error("sample `{id}` must have its first trained turn within {max} tokens, got {needed}")]
    TooLong {
        /// The row.
        id: String,
        /// Where that turn ends.
        needed: usize,
        /// The longest that was asked for.
        max: usize,
    },
    /// An id that no token has.
    #[error("sample `{id}` must have token ids below {vocabulary}, got {token} at {at}")]
    OutsideVocabulary {
        /// The row.
        id: String,
        /// Ids that the tokenizer has.
        vocabulary: u32,
        /// The token id.
        token: u32,
        /// Its position.
        at: usize,
    },
    /// Ranges that are no ranges of the ids.
    #[error(
        "sample `{id}` must have ascending supervised ranges within 1..{tokens}, got {start}..{end}"
    )]
    Ranges {
        /// The row.
        id: String,
        /// Its length.
        tokens: usize,
        /// Where the first wrong range starts.
        start: u32,
        /// Where it ends.
        end: u32,
    },
    /// The row names a turn that it does not have.
    #[error("sample `{id}` must name trained turns below {turns}, got {turn}")]
    NoSuchTurn {
        /// The row.
        id: String,
        /// What it names.
        turn: u32,
        /// How many assistant turns it has.
        turns: usize,
    },
}

impl Sample {
    /// Tokens that are trained.
    pub fn supervised_tokens(&self) -> usize {
        let lengths = self.supervised.iter().map(Range::len);
        lengths.sum()
    }
}

/// The sample of one row, of at most `tokens_max` tokens: too long, it loses whole turns from its end.
///
/// # Errors
/// See [`SampleError`]; each names the row.
pub fn sample(
    row: &Row,
    tokens_max: usize,
    renderer: &mut Renderer,
) -> Result<Sample, SampleError> {
    let (ids, supervised, origin) = match &row.recorded {
        Some(recorded) => {
            let vocabulary = renderer.tokenizer().vocabulary();
            check_recorded(row, &recorded.ids, &recorded.supervised, vocabulary)?;
            let (ids, spans) = (recorded.ids.clone(), recorded.supervised.clone());
            (ids, spans, Origin::Recorded)
        }
        None => {
            let (ids, spans) = rendered(row, renderer)?;
            (ids, spans, Origin::Rendered)
        }
    };
    let mut sample = Sample {
        id: row.id.clone(),
        ids,
        supervised,
        origin,
        task_id: row.task_id.clone(),
        task_kind: row.task_kind.clone(),
        cut: None,
    };
    fit(&mut sample, tokens_max)?;
    Ok(sample)
}

/// The samples of many rows, in their order, made by `threads` threads.
pub fn samples(
    rows: &[Row],
    tokens_max: usize,
    threads: usize,
    tokenizer: &Tokenizer,
) -> Vec<Result<Sample, SampleError>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        let mut renderer = Renderer::new(tokenizer);
        loop {
            let first = next.fetch_add(ROWS_AT_ONCE, Ordering::Relaxed);
            let Some(rest) = rows.get(first..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let some = rest.iter().take(ROWS_AT_ONCE);
            let made: Vec<_> = some
                .map(|row| sample(row, tokens_max, &mut renderer))
                .collect();
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.push((first, made));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(rows.len().div_ceil(ROWS_AT_ONCE)) {
            scope.spawn(work);
        }
        work();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(first, _)| *first);
    done.into_iter().flat_map(|(_, made)| made).collect()
}

fn rendered(
    row: &Row,
    renderer: &mut Renderer,
) -> Result<(Vec<u32>, Vec<Range<u32>>), SampleError> {
    let id = || row.id.clone();
    let rendered = renderer
        .render(&row.messages, &row.tools, &row.trained_turns)
        .map_err(|source| SampleError::Render { id: id(), source })?;
    let turns = rendered.turns.len();
    let span = |&turn: &u32| {
        let found = usize::try_from(turn)
            .ok()
            .and_then(|t| rendered.turns.get(t));
        let missing = || SampleError::NoSuchTurn {
            id: id(),
            turn,
            turns,
        };
        found.cloned().ok_or_else(missing)
    };
    let spans = row.trained_turns.iter().map(span);
    let spans = spans.collect::<Result<Vec<_>, _>>()?;
    check_ranges(row, rendered.ids.len(), &spans)?;
    Ok((rendered.ids, spans))
}

fn check_recorded(
    row: &Row,
    tokens: &[u32],
    spans: &[Range<u32>],
    vocabulary: u32,
) -> Result<(), SampleError> {
    if let Some(at) = tokens.iter().position(|&token| token >= vocabulary) {
        return Err(SampleError::OutsideVocabulary {
            id: row.id.clone(),
            vocabulary,
            token: tokens[at],
            at,
        });
    }
    check_ranges(row, tokens.len(), spans)
}

fn check_ranges(row: &Row, tokens: usize, spans: &[Range<u32>]) -> Result<(), SampleError> {
    let mut least = 1;
    for &Range { start, end } in spans {
        if start < least || start >= end || end > index(tokens) {
            return Err(SampleError::Ranges {
                id: row.id.clone(),
                tokens,
                start,
                end,
            });
        }
        least = end;
    }
    Ok(())
}

/// Ends the sample after the last trained turn that fits.
fn fit(sample: &mut Sample, tokens_max: usize) -> Result<(), SampleError> {
    let (tokens, turns) = (sample.ids.len(), sample.supervised.len());
    let Some(first) = sample.supervised.first() else {
        let id = sample.id.clone();
        return Err(SampleError::NothingSupervised { id, tokens });
    };
    let needed = first.end as usize;
    sample
        .supervised
        .retain(|span| span.end as usize <= tokens_max);
    let kept = sample.supervised.len();
    let Some(last) = sample.supervised.last() else {
        let (id, max) = (sample.id.clone(), tokens_max);
        return Err(SampleError::TooLong { id, needed, max });
    };
    sample.ids.truncate(last.end as usize);
    sample.cut = (kept < turns).then(|| TurnsCut {
        tokens,
        turns: turns - kept,
    });
    Ok(())
}

#[cfg(test)]
mod tests;
