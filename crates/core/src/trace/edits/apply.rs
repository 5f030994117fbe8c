//! Applying a log, patch by patch.

use std::borrow::Cow;

use super::curated::{Conversation, Curated, Origin, Refused};
use super::patch::{Change, Edit, Patch};
use super::standing::{Standing, live_of};
use super::state::{State, check_order, is_assistant};
use crate::chat::{Message, ToolDef};
use crate::error::FieldError;
use crate::trace::Trace;

/// What `trace` and its `log` come to. A patch that does not fit what is there counts as a whole or not at all, and is
/// named in [`Curated::refused`]; so this never fails.
pub fn apply(trace: &Trace, log: &[Patch]) -> Curated {
    applied(trace, &log.iter().collect::<Vec<_>>()).into_curated(trace)
}

/// A log while nothing is copied yet.
pub(super) struct Applied<'a> {
    pub state: State<'a>,
    pub standing: Standing,
    pub refused: Vec<Refused>,
    patches: u32,
}

pub(super) fn applied<'a>(trace: &'a Trace, log: &[&'a Patch]) -> Applied<'a> {
    let mut state = State::new(&trace.messages);
    let mut standing = Standing::default();
    let mut refused = Vec::new();
    let mut next = trace.messages.len();
    for (n, (patch, live)) in log.iter().zip(live_of(log)).enumerate() {
        let first = next;
        next += patch.adds();
        if !live {
            continue;
        }
        standing.take(patch);
        let changed = match &patch.change {
            Change::Edit { edits } => edit_all(&state, edits, first).map(Some),
            Change::Join {
                messages, tools, ..
            } => join(&state, trace, messages, tools, first).map(Some),
            Change::Undo { patch } => is_earlier(*patch, n).map(|()| None),
            _ => Ok(None),
        };
        match changed {
            Ok(Some(changed)) => state = changed,
            Ok(None) => {}
            Err(error) => refused.push(Refused {
                patch: number(n),
                error,
            }),
        }
    }
    Applied {
        state,
        standing,
        refused,
        patches: number(log.len()),
    }
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn is_earlier(patch: u32, n: usize) -> Result<(), FieldError> {
    match usize::try_from(patch) {
        Ok(earlier) if earlier < n => Ok(()),
        _ => Err(FieldError::new(
            "patch",
            patch,
            "must be the number of an earlier patch",
        )),
    }
}

/// All edits on a copy: messages are borrowed until one changes, so that a copy is cheap.
fn edit_all<'a>(state: &State<'a>, edits: &[Edit], first: usize) -> Result<State<'a>, FieldError> {
    let mut state = state.clone();
    let mut next = first;
    for (i, edit) in edits.iter().enumerate() {
        state
            .edit(edit, next)
            .map_err(|error| error.under(&format!("edits[{i}]")))?;
        next += usize::from(matches!(edit, Edit::Answer { .. }));
    }
    Ok(state)
}

fn join<'a>(
    state: &State<'a>,
    trace: &'a Trace,
    messages: &'a [Message],
    tools: &'a [ToolDef],
    first: usize,
) -> Result<State<'a>, FieldError> {
    let role = |at: usize| messages.get(at).map_or("nothing", Message::role);
    if role(0) != "user" || !messages.iter().any(is_assistant) {
        let rule = "must begin with a user message and have a turn";
        return Err(FieldError::new("messages[0].role", role(0), rule));
    }
    if let Some(at) = messages.iter().position(|m| m.role() == "system") {
        let rule = "must not be a system message: those of the trace stand";
        return Err(FieldError::new(
            format!("messages[{at}].role"),
            "system",
            rule,
        ));
    }
    check_order(messages)?;
    if let Some(Message::Assistant { tool_calls, .. }) =
        state.slots.last().map(|slot| slot.message.as_ref())
        && !tool_calls.is_empty()
    {
        let rule = "must follow a turn whose calls have their results: cut or remove that one";
        return Err(FieldError::new("messages", messages.len(), rule));
    }
    let mut state = state.clone();
    for (i, tool) in tools.iter().enumerate() {
        let name = &tool.function.name;
        let mut known = trace.header.tools.iter().chain(state.tools.iter().copied());
        if known.any(|known| known.function.name == *name) {
            let rule = "must not have the name of a tool that the trace has";
            return Err(FieldError::new(format!("tools[{i}].name"), name, rule));
        }
        state.tools.push(tool);
    }
    state.append(first, messages);
    Ok(state)
}

impl Applied<'_> {
    pub fn into_curated(self, trace: &Trace) -> Curated {
        let untouched = self.untouched_calls(trace);
        let mut tools = trace.header.tools.clone();
        tools.extend(self.state.tools.iter().map(|tool| (*tool).clone()));
        let mut conversations = Vec::new();
        let frame = self.frame();
        for range in self.state.conversations() {
            let is_first = conversations.is_empty();
            let frame = if is_first { 0..0 } else { 0..frame };
            let mut conversation = Conversation {
                messages: Vec::new(),
                origins: Vec::new(),
                tools: tools.clone(),
                untouched_calls: if is_first { untouched } else { 0 },
            };
            for slot in frame.chain(range).map(|at| &self.state.slots[at]) {
                if let Some(message) = self.with_hints(&slot.message) {
                    conversation.messages.push(message.into_owned());
                    let origin = origin(trace, slot.number, &slot.message);
                    conversation.origins.push(origin);
                }
            }
            conversations.push(conversation);
        }
        let verdict = self.standing.verdict.clone();
        Curated {
            patches: self.patches,
            conversations,
            verdict: verdict.or_else(|| trace.outcome.verdict.clone()),
            standing: self.standing,
            refused: self.refused,
        }
    }

    /// How many system messages stand at the beginning: each conversation begins with them.
    fn frame(&self) -> usize {
        let slots = self.state.slots.iter();
        slots
            .take_while(|slot| slot.message.role() == "system")
            .count()
    }

    /// The message as hints are to be dealt with; none where it is left out.
    fn with_hints<'m>(&self, message: &'m Message) -> Option<Cow<'m, Message>> {
        match (message, self.standing.hints) {
            (Message::System { hint: true, .. }, Some(false)) => None,
            (
                Message::System {
                    content,
                    hint: true,
                },
                Some(true),
            ) => Some(Cow::Owned(Message::System {
                content: content.clone(),
                hint: false,
            })),
            _ => Some(Cow::Borrowed(message)),
        }
    }

    /// How many model calls, from the first, have nothing changed in their message, nor before it.
    fn untouched_calls(&self, trace: &Trace) -> usize {
        if !self.state.tools.is_empty() {
            return 0;
        }
        let first = self.state.conversations().into_iter().next();
        let slots = self.state.slots[first.unwrap_or(0..0)].iter();
        let same = slots.enumerate().take_while(|(at, slot)| {
            origin(trace, slot.number, &slot.message) == Origin::Recorded(*at)
        });
        let same = same.count();
        let calls = trace.model_calls.iter();
        calls
            .take_while(|call| call.message < same && is_assistant(&trace.messages[call.message]))
            .count()
    }
}

fn origin(trace: &Trace, number: usize, now: &Message) -> Origin {
    let same = |recorded: &Message| match (recorded, now) {
        (Message::System { content: a, .. }, Message::System { content: b, .. }) => a == b,
        (recorded, now) => recorded == now,
    };
    match trace.messages.get(number) {
        None => Origin::Added(number),
        Some(recorded) if same(recorded) => Origin::Recorded(number),
        Some(_) => Origin::Edited(number),
    }
}

/// The numbers of all assistant messages, those that were removed included: the place in the list, counted from 1, is
/// the turn's own number for people, and never changes.
pub fn turns(trace: &Trace, log: &[Patch]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut next = 0;
    let mut add = |messages: &mut dyn Iterator<Item = bool>| {
        for is_turn in messages {
            found.extend(is_turn.then_some(next));
            next += 1;
        }
    };
    add(&mut trace.messages.iter().map(is_assistant));
    for patch in log {
        match &patch.change {
            Change::Join { messages, .. } => add(&mut messages.iter().map(is_assistant)),
            _ => add(&mut (0..patch.adds()).map(|_| true)),
        }
    }
    found
}

/// The messages that a name of `number` is about: of an assistant message its whole turn.
pub(super) fn named<'s>(state: &'s State<'_>, number: usize) -> Option<Vec<&'s Message>> {
    let place = state.place(number)?;
    let range = if is_assistant(&state.slots[place].message) {
        state.turn(place)
    } else {
        place..place + 1
    };
    let slots = state.slots[range].iter();
    Some(slots.map(|slot| slot.message.as_ref()).collect())
}
