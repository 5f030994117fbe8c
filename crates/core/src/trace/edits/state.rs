//! A conversation while patches are applied to it: messages by their numbers, and where conversations begin.

use std::borrow::Cow;
use std::ops::Range;

use super::patch::Edit;
use crate::chat::{Message, ToolCall, ToolDef};
use crate::error::FieldError;

/// A message at its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slot<'a> {
    /// Its number.
    pub number: usize,
    /// What it holds by now.
    pub message: Cow<'a, Message>,
    /// Whether a conversation of its own begins here.
    pub starts: bool,
}

/// All messages that are left, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State<'a> {
    pub slots: Vec<Slot<'a>>,
    /// Tools beside those of the trace.
    pub tools: Vec<&'a ToolDef>,
}

impl<'a> State<'a> {
    /// The messages as they were recorded.
    pub fn new(recorded: &'a [Message]) -> Self {
        let mut state = Self::default();
        state.append(0, recorded);
        state
    }

    /// Adds messages at the end, numbered from `first`.
    pub fn append(&mut self, first: usize, messages: &'a [Message]) {
        let slot = |(i, message)| Slot {
            number: first + i,
            message: Cow::Borrowed(message),
            starts: false,
        };
        self.slots.extend(messages.iter().enumerate().map(slot));
    }

    /// Where the message with this number stands.
    pub fn place(&self, number: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.number == number)
    }

    /// The conversation that holds `place`.
    pub fn conversation(&self, place: usize) -> Range<usize> {
        let begins = |at: &usize| self.slots[*at].starts;
        let start = (0..=place).rev().find(begins).unwrap_or(0);
        let end = (place + 1..self.slots.len()).find(begins);
        start..end.unwrap_or(self.slots.len())
    }

    /// All conversations, in order; at least one.
    pub fn conversations(&self) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        let mut start = 0;
        loop {
            let mut later = start + 1..self.slots.len();
            let end = later.find(|at| self.slots[*at].starts);
            let end = end.unwrap_or(self.slots.len());
            found.push(start..end);
            if end >= self.slots.len() {
                return found;
            }
            start = end;
        }
    }

    /// The turn whose assistant message stands at `place`: it and the results of its calls.
    pub fn turn(&self, place: usize) -> Range<usize> {
        let results = self.slots[place + 1..].iter();
        let results = results.take_while(|slot| is_tool(&slot.message)).count();
        place..place + 1 + results
    }

    /// Makes one edit; the answer that it may add has the number `next`.
    ///
    /// # Errors
    /// Names the field of the edit that does not fit what is there.
    pub fn edit(&mut self, edit: &Edit, next: usize) -> Result<(), FieldError> {
        match edit {
            Edit::Content { message, content } => self.set_content(*message, content),
            Edit::Reasoning { message, reasoning } => {
                self.set_reasoning(*message, reasoning.as_deref())
            }
            Edit::Arguments {
                message,
                call,
                arguments,
            } => {
                let calls = self.calls(*message)?;
                let there = calls.len();
                let Some(call) = calls.get_mut(*call) else {
                    let rule = format!("must be one of the {there} calls of the turn, from 0");
                    return Err(FieldError::new("call", call, rule));
                };
                call.function.arguments = arguments.clone();
                call.function.malformed = None;
                Ok(())
            }
            Edit::Answer { content, reasoning } => self.answer(content, reasoning.as_deref(), next),
            Edit::CutAfter { message } => {
                let turn = self.turn_of(*message)?;
                let end = self.conversation(turn.start).end;
                self.slots.drain(turn.end..end);
                Ok(())
            }
            Edit::RemoveTurn { message } => self.remove_turn(*message),
            Edit::SplitBefore { message } => self.split_before(*message),
            Edit::Hint { message, hint } => self.set_hint(*message, *hint),
        }
    }

    fn find(&self, number: usize) -> Result<usize, FieldError> {
        self.place(number).ok_or_else(|| {
            let rule = "must be a message that is there and was not removed";
            FieldError::new("message", number, rule)
        })
    }

    fn turn_of(&self, number: usize) -> Result<Range<usize>, FieldError> {
        let place = self.find(number)?;
        match self.slots[place].message.as_ref() {
            Message::Assistant { .. } => Ok(self.turn(place)),
            other => Err(must_be("an assistant message", number, other)),
        }
    }

    fn calls(&mut self, number: usize) -> Result<&mut Vec<ToolCall>, FieldError> {
        let place = self.find(number)?;
        match self.slots[place].message.to_mut() {
            Message::Assistant { tool_calls, .. } => Ok(tool_calls),
            other => Err(must_be("an assistant message", number, other)),
        }
    }

    fn set_content(&mut self, number: usize, new: &str) -> Result<(), FieldError> {
        let place = self.find(number)?;
        let slot = &mut self.slots[place].message;
        let changed = match slot.as_ref() {
            Message::Assistant {
                reasoning_content,
                tool_calls,
                ..
            } => speaking(new, reasoning_content.as_deref(), tool_calls.clone())?,
            Message::User { .. } if new.trim().is_empty() => {
                return Err(FieldError::new("content", new, "must not be empty"));
            }
            Message::User { .. } => Message::User {
                content: new.to_owned(),
            },
            Message::System { hint, .. } => Message::System {
                content: new.to_owned(),
                hint: *hint,
            },
            Message::Tool { tool_call_id, .. } => Message::Tool {
                tool_call_id: tool_call_id.clone(),
                content: new.to_owned(),
            },
        };
        *slot = Cow::Owned(changed);
        Ok(())
    }

    fn set_reasoning(&mut self, number: usize, new: Option<&str>) -> Result<(), FieldError> {
        let place = self.find(number)?;
        let slot = &mut self.slots[place].message;
        let changed = match slot.as_ref() {
            Message::Assistant {
                content,
                tool_calls,
                ..
            } => speaking(content, new, tool_calls.clone())?,
            other => return Err(must_be("an assistant message", number, other)),
        };
        *slot = Cow::Owned(changed);
        Ok(())
    }

    fn set_hint(&mut self, number: usize, new: bool) -> Result<(), FieldError> {
        let place = self.find(number)?;
        match self.slots[place].message.to_mut() {
            Message::System { hint, .. } => {
                *hint = new;
                Ok(())
            }
            other => Err(must_be("a system message", number, other)),
        }
    }

    fn answer(
        &mut self,
        content: &str,
        reasoning: Option<&str>,
        next: usize,
    ) -> Result<(), FieldError> {
        self.check_end("content", content, "an answer is added")?;
        if content.trim().is_empty() {
            return Err(FieldError::new("content", content, "must not be empty"));
        }
        self.slots.push(Slot {
            number: next,
            message: Cow::Owned(speaking(content, reasoning, Vec::new())?),
            starts: false,
        });
        Ok(())
    }

    /// Whether an assistant message may follow the last one.
    fn check_end(&self, field: &str, value: &str, what: &str) -> Result<(), FieldError> {
        match self.slots.last().map(|slot| slot.message.as_ref()) {
            Some(Message::User { .. } | Message::Tool { .. }) => Ok(()),
            last => {
                let there = last.map_or("nothing", Message::role);
                let rule = format!(
                    "must follow a user message or a result of a tool where {what}, and the last is of: {there}"
                );
                Err(FieldError::new(field, value, rule))
            }
        }
    }

    fn remove_turn(&mut self, number: usize) -> Result<(), FieldError> {
        let turn = self.turn_of(number)?;
        let mut others = self.conversation(turn.start);
        if !others.any(|at| at != turn.start && is_assistant(&self.slots[at].message)) {
            let rule = "must not be the only turn of its conversation: drop the trace instead";
            return Err(FieldError::new("message", number, rule));
        }
        self.slots.drain(turn);
        Ok(())
    }

    fn split_before(&mut self, number: usize) -> Result<(), FieldError> {
        let place = self.find(number)?;
        if !matches!(self.slots[place].message.as_ref(), Message::User { .. }) {
            return Err(must_be(
                "a user message",
                number,
                &self.slots[place].message,
            ));
        }
        let range = self.conversation(place);
        let has_turn =
            |mut part: Range<usize>| part.any(|at| is_assistant(&self.slots[at].message));
        if !has_turn(range.start..place) || !has_turn(place..range.end) {
            let rule = "must have a turn before and after it in its conversation";
            return Err(FieldError::new("message", number, rule));
        }
        self.slots[place].starts = true;
        Ok(())
    }
}

fn must_be(what: &str, number: usize, found: &Message) -> FieldError {
    let rule = format!("must be {what}, and this one is of: {}", found.role());
    FieldError::new("message", number, rule)
}

/// An assistant message that says, thinks or calls something.
fn speaking(
    content: &str,
    reasoning: Option<&str>,
    calls: Vec<ToolCall>,
) -> Result<Message, FieldError> {
    let reasoning = reasoning.map(str::to_owned);
    let message = Message::assistant(content.to_owned(), reasoning, calls);
    match &message {
        Message::Assistant {
            content,
            reasoning_content: None,
            tool_calls,
        } if content.is_empty() && tool_calls.is_empty() => {
            let rule = "must not be empty in a turn without thoughts and calls";
            Err(FieldError::new("content", content, rule))
        }
        _ => Ok(message),
    }
}

pub(super) fn is_assistant(message: &Message) -> bool {
    matches!(message, Message::Assistant { .. })
}

pub(super) fn is_tool(message: &Message) -> bool {
    matches!(message, Message::Tool { .. })
}

/// Checks that each result of a tool follows its call: behind the assistant message that made it with nothing but other
/// results between, and once.
///
/// # Errors
/// `messages[i]`, the first result that does not.
pub fn check_order<'m>(messages: impl IntoIterator<Item = &'m Message>) -> Result<(), FieldError> {
    let mut open: Vec<&str> = Vec::new();
    for (i, message) in messages.into_iter().enumerate() {
        match message {
            Message::Assistant { tool_calls, .. } => {
                open = tool_calls.iter().map(|call| call.id.as_str()).collect();
            }
            Message::Tool { tool_call_id, .. } => {
                let Some(at) = open.iter().position(|id| id == tool_call_id) else {
                    let rule = "must answer a call of the assistant message before it, once";
                    return Err(FieldError::new(
                        format!("messages[{i}].tool_call_id"),
                        tool_call_id,
                        rule,
                    ));
                };
                open.remove(at);
            }
            Message::System { .. } | Message::User { .. } => open.clear(),
        }
    }
    Ok(())
}
