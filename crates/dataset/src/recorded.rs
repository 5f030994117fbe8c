//! A cut of a conversation to rows, with the sampled token ids where they are known.
//!
//! Turns that a model saw one after another are one row: the prompt of the first, what it sampled, and of each later
//! prompt only what is new. Where a later prompt does not begin with what was seen and sampled before (thoughts that
//! were dropped, a call that was written back in another spelling), going on would train on a context that no model
//! saw: a new row begins there, so that every turn is trained in its own context and none is lost.
//!
//! Where hints are dropped, or something before a call was changed, no model saw the prompt either. It is rendered by
//! the one template, and the sampled ids are spliced in: what they spell must be what the next prompt spells.

use std::borrow::Cow;
use std::ops::Range;

use espalier_core::chat::Message;
use espalier_qwen3_text::Ids;

use crate::render::{RenderError, Renderer, index};
use crate::row::{Recorded, Row, Split};
use crate::source::{Source, SourceCall};
use crate::unroll::{Cut, Unroll, assistant_turns, cuts};

/// How a conversation becomes rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowsOptions {
    /// Where it is cut.
    pub unroll: Unroll,
    /// Whether hints stay in, where the conversation itself does not say.
    pub keep_hints: bool,
}

/// What was found wrong with the recorded ids of a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Rows that had to begin anew because a prompt does not continue what was sampled before it.
    pub breaks: usize,
    /// Calls whose ids do not spell their message, or that no token of the tokenizer has: rendered from text.
    pub misspelt: usize,
}

impl Drift {
    /// Adds another's.
    pub fn add(&mut self, other: Self) {
        self.breaks += other.breaks;
        self.misspelt += other.misspelt;
    }
}

/// The rows of a conversation, and what was found wrong with its ids.
///
/// # Errors
/// The template refuses the conversation.
pub fn rows(
    source: &Source,
    options: RowsOptions,
    split: Split,
    renderer: &mut Renderer,
) -> Result<(Vec<Row>, Drift), RenderError> {
    let keep_hints = source.keep_hints.unwrap_or(options.keep_hints);
    let mut drift = Drift::default();
    let mut rows = Vec::new();
    for cut in cuts(&source.messages, options.unroll) {
        let pieces = match options.unroll {
            // The workshop's rows are text, and train turns in a form in which nothing sampled them.
            Unroll::Compat => vec![Piece::rendered(&cut)],
            _ => {
                let mut splice = Splice::new(source, keep_hints, renderer);
                let pieces = splice.pieces(&cut)?;
                drift.add(splice.drift);
                pieces
            }
        };
        let piece = |piece| row(source, &cut, piece, keep_hints, split);
        rows.extend(pieces.into_iter().map(piece));
    }
    Ok((rows, drift))
}

/// A part of a cut that is one row: its trained turns, which are at its end, and their ids.
struct Piece {
    trained: Vec<usize>,
    recorded: Option<Recorded>,
}

impl Piece {
    fn rendered(cut: &Cut) -> Self {
        Self {
            trained: cut.trained.clone(),
            recorded: None,
        }
    }
}

fn row(source: &Source, cut: &Cut, piece: Piece, keep_hints: bool, split: Split) -> Row {
    let last = piece.trained.last().copied().unwrap_or_default();
    let is_last_piece = cut.trained.last() == Some(&last);
    let end = if is_last_piece {
        cut.messages
    } else {
        let mut turns = assistant_turns(&source.messages);
        turns.nth(last).map_or(cut.messages, |at| at + 1)
    };
    let whole = cut.whole && is_last_piece;
    // The row's last assistant turn, trained or not.
    let point = assistant_turns(&source.messages[..end]).count();
    let facts = &source.facts;
    Row {
        id: match whole {
            true => source.id.clone(),
            false => format!("{}_trunc_{point}", source.id),
        },
        timestamp: source.timestamp.clone(),
        model: source.model.clone(),
        messages: shown(&source.messages[..end], keep_hints),
        tools: source.tools.clone(),
        truncated: !whole,
        original_id: (!whole).then(|| source.id.clone()),
        truncation_point: (!whole).then(|| index(point)),
        task_id: facts.task_id.clone(),
        task_kind: facts.task_kind.clone(),
        split,
        reward: facts.reward,
        trained_turns: piece.trained.iter().map(|&turn| index(turn)).collect(),
        recorded: piece.recorded,
    }
}

/// The messages as a row holds them: without hints unless they stay, and the beginning as one system message.
pub(crate) fn shown(messages: &[Message], keep_hints: bool) -> Vec<Message> {
    let is_hint = |message: &Message| matches!(message, Message::System { hint: true, .. });
    let kept = messages.iter().filter(|m| keep_hints || !is_hint(m));
    let kept: Vec<Message> = kept.cloned().collect();
    espalier_core::chat::on_the_wire(&kept)
}

/// Turns that follow on each other, with their ids.
struct Chain {
    trained: Vec<usize>,
    ids: Vec<u32>,
    supervised: Vec<Range<u32>>,
    /// What `ids` spell, where the prompt was rendered here; none where it was recorded.
    text: Option<String>,
}

impl Chain {
    fn push(&mut self, turn: usize, completion: &[u32]) {
        let start = index(self.ids.len());
        self.ids.extend_from_slice(completion);
        self.supervised.push(start..index(self.ids.len()));
        self.trained.push(turn);
    }
}

/// A call whose ids are what its message says.
struct Trusted<'a> {
    call: &'a SourceCall,
    completion: Cow<'a, [u32]>,
    spelt: String,
}

/// Builds the pieces of a cut.
struct Splice<'a> {
    source: &'a Source,
    keep_hints: bool,
    renderer: &'a mut Renderer,
    drift: Drift,
    pieces: Vec<Piece>,
    chain: Option<Chain>,
}

impl<'a> Splice<'a> {
    fn new(source: &'a Source, keep_hints: bool, renderer: &'a mut Renderer) -> Self {
        Self {
            source,
            keep_hints,
            renderer,
            drift: Drift::default(),
            pieces: Vec::new(),
            chain: None,
        }
    }

    fn pieces(&mut self, cut: &Cut) -> Result<Vec<Piece>, RenderError> {
        if self.source.calls.is_empty() {
            return Ok(vec![Piece::rendered(cut)]);
        }
        let turns: Vec<usize> = assistant_turns(&self.source.messages).collect();
        for &turn in &cut.trained {
            match self.trusted_call(turns[turn]) {
                Some(trusted) => self.sampled(turn, &trusted)?,
                None => self.unsampled(turn),
            }
        }
        self.close();
        Ok(std::mem::take(&mut self.pieces))
    }

    /// The call of a message whose ids are of the tokenizer's vocabulary and spell the message, the completion to the end
    /// of its turn, and what that spells.
    fn trusted_call(&mut self, message: usize) -> Option<Trusted<'a>> {
        let call = self.source.call_of(message)?;
        let tokenizer = self.renderer.tokenizer();
        let mut prompt = call.prompt.iter().flatten();
        // The completion's ids are looked at by decoding them.
        let known = prompt.all(|&id| id < tokenizer.vocabulary());
        let completion = ended(call, tokenizer.ids());
        let spelt = tokenizer.decode(&completion).ok();
        let spelt = spelt.filter(|text| known && spells(text, &self.source.messages[message]));
        self.drift.misspelt += usize::from(spelt.is_none());
        let spelt = spelt?;
        Some(Trusted {
            call,
            completion,
            spelt,
        })
    }

    fn sampled(&mut self, turn: usize, trusted: &Trusted) -> Result<(), RenderError> {
        let call = trusted.call;
        match call.prompt.as_ref().filter(|_| self.sees_all(call.message)) {
            Some(prompt) => self.verbatim(prompt),
            None => self.spliced(call.message)?,
        }
        if let Some(chain) = &mut self.chain {
            chain.push(turn, &trusted.completion);
            if let Some(text) = &mut chain.text {
                text.push_str(&trusted.spelt);
            }
        }
        Ok(())
    }

    /// Whether the row shows everything that the model saw before this message.
    fn sees_all(&self, message: usize) -> bool {
        let mut before = self.source.messages[..message].iter();
        self.keep_hints || !before.any(|m| matches!(m, Message::System { hint: true, .. }))
    }

    /// Makes the chain's ids the recorded prompt.
    fn verbatim(&mut self, prompt: &[u32]) {
        match &mut self.chain {
            Some(chain) if chain.text.is_none() && prompt.starts_with(&chain.ids) => {
                chain.ids.extend_from_slice(&prompt[chain.ids.len()..]);
            }
            _ => self.open(prompt.to_vec(), None),
        }
    }

    /// Makes the chain's ids those of a prompt that is rendered here.
    fn spliced(&mut self, message: usize) -> Result<(), RenderError> {
        let (source, thinking) = (self.source, self.source.thinking);
        let before = shown(&source.messages[..message], self.keep_hints);
        let prompt = self.renderer.prompt(&before, &source.tools, thinking)?;
        let known = self.chain.as_ref().and_then(|chain| chain.text.as_deref());
        let from = known
            .filter(|text| prompt.text().starts_with(text))
            .map(str::len);
        // Sampled ids end with a control text, unless the answer was cut; then no prompt goes on from there.
        let from = from.filter(|&from| prompt.controls().iter().any(|c| c.end == from));
        let ids = self.renderer.encode(&prompt, from.unwrap_or(0));
        let text = prompt.text().to_owned();
        match &mut self.chain {
            Some(chain) if from.is_some() => {
                chain.ids.extend(ids);
                chain.text = Some(text);
            }
            _ => self.open(ids, Some(text)),
        }
        Ok(())
    }

    /// A turn whose ids nobody knows: rendered, together with others of its kind beside it.
    fn unsampled(&mut self, turn: usize) {
        self.close();
        match self.pieces.last_mut() {
            Some(piece) if piece.recorded.is_none() => piece.trained.push(turn),
            _ => self.pieces.push(Piece {
                trained: vec![turn],
                recorded: None,
            }),
        }
    }

    fn open(&mut self, ids: Vec<u32>, text: Option<String>) {
        self.drift.breaks += usize::from(self.chain.is_some());
        self.close();
        self.chain = Some(Chain {
            trained: Vec::new(),
            ids,
            supervised: Vec::new(),
            text,
        });
    }

    fn close(&mut self) {
        if let Some(chain) = self.chain.take() {
            self.pieces.push(Piece {
                trained: chain.trained,
                recorded: Some(Recorded {
                    ids: chain.ids,
                    supervised: chain.supervised,
                }),
            });
        }
    }
}

/// The completion with the end of its turn, where the model came to it.
pub(crate) fn ended<'a>(call: &'a SourceCall, ids: &Ids) -> Cow<'a, [u32]> {
    let last = call.completion.last();
    let ends = last.is_some_and(|last| [ids.turn_close, ids.end_of_text].contains(last));
    let mut completion = Cow::Borrowed(call.completion.as_slice());
    if call.is_ended && !ends {
        completion.to_mut().push(ids.turn_close);
    }
    completion
}

/// Whether sampled text holds what its message says: ids of another tokenizer, or of another message, do not.
pub fn spells(text: &str, message: &Message) -> bool {
    let Message::Assistant {
        content,
        reasoning_content,
        tool_calls,
    } = message
    else {
        return false;
    };
    let names = tool_calls.iter().map(|call| call.function.name.as_str());
    let reasoning = reasoning_content.as_deref().unwrap_or_default();
    let mut said = names.chain([content.trim(), reasoning.trim()]);
    said.all(|part| text.contains(part))
}

#[cfg(test)]
mod tests;
