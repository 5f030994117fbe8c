//! What a model generated, told apart as it comes: reasoning, content, tool calls.
//!
//! The borders are token ids, not text: a page that spells `<tool_call>` and a model that quotes it are text here. A
//! border where it means nothing is text too, so that nothing of an answer is lost:
//!
//! | state | `<think>` | `</think>` | `<tool_call>` | `</tool_call>` |
//! |---|---|---|---|---|
//! | reasoning | text | to content | text | text |
//! | content | to reasoning | text | to a call | text |
//! | call | text | text | ends the call, opens the next | to content |
//!
//! Line breaks that the template puts around the parts do not belong to them: those around reasoning, those before
//! content, one between content and a call, and the whitespace between calls. So a turn that is parsed and rendered
//! again gives the same text.

mod call;

use crate::detokenizer::Detokenizer;
use crate::ids::Ids;
use crate::tokenizer::Tokenizer;

use call::CallParser;

/// A part of an answer. Parts of one kind, joined in order, are the whole of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the content.
    Content(String),
    /// A call begins, and this is its function's name. Calls are numbered from 0 in the order of their blocks.
    ToolCall {
        /// The call's number.
        index: usize,
        /// The name, whole; not checked against any list.
        name: String,
    },
    /// More of the JSON text of a call's arguments. Comes after the name.
    ToolArguments {
        /// The call's number.
        index: usize,
        /// Text as the model wrote it; of arguments in a string, what the string spells.
        text: String,
    },
    /// A call ends. Comes once for each block.
    ToolCallDone {
        /// The call's number.
        index: usize,
        /// `None`: the deltas gave a name, and arguments that are a JSON object.
        error: Option<CallError>,
    },
}

/// Why a block is no call. Its deltas, if any, stand; the model is to be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tool call must be {{\"name\": …, \"arguments\": {{…}}}}: {reason}")]
pub struct CallError {
    /// What is wrong.
    pub reason: String,
    /// The whole text of the block.
    pub text: String,
    /// Whether the answer ended within the block: at a limit of tokens, as a rule.
    pub unfinished: bool,
}

/// How an answer is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParserOptions {
    /// Whether the prompt ends within reasoning (Thinking-2507's template opens it); see
    /// [`ParserOptions::after_prompt`].
    pub in_thought: bool,
    /// Whether thoughts are told apart from content. If not, their borders are text. Without thoughts and calls, all of
    /// an answer is content, as it is.
    pub reasoning: bool,
    /// Whether calls are told apart from content. If not, their borders are text.
    pub tool_calls: bool,
}

impl ParserOptions {
    /// For the answer to `prompt`, in which some ids have a meaning: reasoning is open if the prompt's last turn opened it
    /// and did not close it.
    pub fn after_prompt(ids: &Ids, prompt: &[u32]) -> Self {
        let borders = [ids.thought_open, ids.thought_close, ids.turn_open];
        let last = prompt.iter().rev().find(|id| borders.contains(id));
        Self {
            in_thought: last == Some(&ids.thought_open),
            reasoning: true,
            tool_calls: true,
        }
    }

    /// Whether all is content: then it is given as it is, line breaks at its ends included.
    fn is_plain(self) -> bool {
        !self.reasoning && !self.tool_calls
    }
}

/// Reads the ids of one answer, one after another. It never fails: what cannot be read is text.
#[derive(Debug)]
pub struct OutputParser {
    options: ParserOptions,
    detokenizer: Detokenizer,
    state: State,
    /// Blocks begun.
    calls: usize,
    deltas: Vec<Delta>,
}

#[derive(Debug)]
enum State {
    Reasoning(Part),
    Content(Part),
    Call(CallParser),
}

/// Text of which the ends may turn out not to belong to it.
#[derive(Debug, Default)]
struct Part {
    /// What its text starts after.
    after: After,
    /// Whether some of it was given.
    begun: bool,
    /// What is kept back until more follows.
    held: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The start of the answer, or a thought: line breaks before the text are the template's.
    #[default]
    Border,
    /// A call: whitespace before the text counts only if there is text.
    Call,
}

impl OutputParser {
    /// At the start of an answer.
    pub fn new(tokenizer: Tokenizer, options: ParserOptions) -> Self {
        let state = match options.in_thought && options.reasoning {
            true => State::Reasoning(Part::default()),
            false => State::Content(Part {
                begun: options.is_plain(),
                ..Part::default()
            }),
        };
        Self {
            options,
            detokenizer: Detokenizer::new(tokenizer),
            state,
            calls: 0,
            deltas: Vec::new(),
        }
    }

    /// All parts of a whole answer.
    pub fn parse(tokenizer: Tokenizer, options: ParserOptions, ids: &[u32]) -> Vec<Delta> {
        let mut parser = Self::new(tokenizer, options);
        let mut deltas: Vec<Delta> = ids.iter().flat_map(|&id| parser.push(id)).collect();
        deltas.extend(parser.finish());
        deltas
    }

    /// Adds an id; gives what is certain since. Control tokens without a meaning in an answer, and padding ids, add
    /// nothing.
    pub fn push(&mut self, id: u32) -> Vec<Delta> {
        if self.is_border(id) {
            let rest = self.detokenizer.finish();
            self.text(&rest);
            self.cross(id);
        } else if !self.tokenizer().is_special(id)
            && let Ok(text) = self.detokenizer.push(id)
        {
            self.text(&text);
        }
        std::mem::take(&mut self.deltas)
    }

    /// Ends the answer; gives the rest. What is pushed afterwards belongs to another answer to the same prompt.
    pub fn finish(&mut self) -> Vec<Delta> {
        let rest = self.detokenizer.finish();
        self.text(&rest);
        self.leave(State::Content(Part::default()), true);
        let deltas = std::mem::take(&mut self.deltas);
        *self = Self::new(self.tokenizer().clone(), self.options);
        deltas
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.detokenizer.tokenizer()
    }

    /// Whether `id` means another state; see the table of this module.
    fn is_border(&self, id: u32) -> bool {
        let ids = self.tokenizer().ids();
        match self.state {
            State::Reasoning(_) => id == ids.thought_close,
            State::Content(_) if id == ids.thought_open => self.options.reasoning,
            State::Content(_) => id == ids.call_open && self.options.tool_calls,
            State::Call(_) => id == ids.call_open || id == ids.call_close,
        }
    }

    fn cross(&mut self, id: u32) {
        let ids = *self.tokenizer().ids();
        let next = if id == ids.thought_open {
            State::Reasoning(Part::default())
        } else if id == ids.thought_close {
            State::Content(Part::default())
        } else if id == ids.call_close {
            State::Content(Part {
                after: After::Call,
                ..Part::default()
            })
        } else {
            State::Call(CallParser::new(self.calls))
        };
        self.calls += usize::from(id == ids.call_open);
        self.leave(next, false);
    }

    /// Ends the part that the state is in; `is_end` at the end of the answer.
    fn leave(&mut self, next: State, is_end: bool) {
        let to_call = matches!(next, State::Call(_));
        match std::mem::replace(&mut self.state, next) {
            State::Reasoning(_) => {}
            State::Content(mut part) => {
                if to_call {
                    part.held.pop();
                }
                if part.begun && !part.held.is_empty() {
                    self.deltas.push(Delta::Content(part.held));
                }
            }
            State::Call(call) => call.finish(is_end, &mut self.deltas),
        }
    }

    fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match &mut self.state {
            State::Reasoning(part) => {
                let given = part.reasoning(text);
                self.deltas.extend(given.map(Delta::Reasoning));
            }
            State::Content(part) => {
                let given = part.content(text);
                self.deltas.extend(given.map(Delta::Content));
            }
            State::Call(call) => call.push(text, &mut self.deltas),
        }
    }
}

impl Part {
    /// Reasoning without the line breaks around it.
    fn reasoning(&mut self, text: &str) -> Option<String> {
        let text = match self.begun {
            true => text,
            false => text.trim_start_matches('\n'),
        };
        self.held.push_str(text);
        let breaks = text.len() - text.trim_end_matches('\n').len();
        // All of it line breaks: those that were held before stay so too.
        match breaks == text.len() {
            true => None,
            false => self.give(self.held.len() - breaks),
        }
    }

    /// Content once it is more than whitespace, without the line break that a call may follow.
    fn content(&mut self, text: &str) -> Option<String> {
        self.held.push_str(text);
        if !self.begun {
            if text.trim().is_empty() {
                return None;
            }
            if self.after == After::Border {
                let blank = self.held.len() - self.held.trim_start_matches('\n').len();
                self.held.drain(..blank);
            }
        }
        self.give(self.held.len() - usize::from(text.ends_with('\n')))
    }

    /// Gives what is held up to `end`.
    fn give(&mut self, end: usize) -> Option<String> {
        if end == 0 {
            return None;
        }
        self.begun = true;
        let rest = self.held.split_off(end);
        Some(std::mem::replace(&mut self.held, rest))
    }
}

#[cfg(test)]
mod tests;
