//! The edits that lead from a form to what a person made of it.

use std::ops::Range;

use espalier_core::error::FieldError;
use espalier_core::trace::edits::Edit;
use serde_json::Value;

use super::form::{Field, Form, Heading, Role};

/// What leads from `offered` to `edited`, in an order in which it can be done. `turns` are the numbers of all assistant
/// messages.
///
/// # Errors
/// The line that no edit leads to, and why.
pub fn difference(offered: &Form, edited: &Form, turns: &[usize]) -> Result<Vec<Edit>, FieldError> {
    let aligned = Aligned::new(&offered.fields, &edited.fields)?;
    let mut edits = Vec::new();
    for unit in aligned.units() {
        aligned.texts(&unit, turns, &mut edits)?;
    }
    aligned.added_thoughts(turns, &mut edits)?;
    aligned.splits(&mut edits)?;
    for conversation in aligned.conversations() {
        aligned.removals(&conversation, turns, &mut edits)?;
    }
    if let Some(answer) = aligned.answer {
        edits.push(Edit::Answer {
            content: answer.text.clone(),
            reasoning: None,
        });
    }
    Ok(edits)
}

/// A field of a form without its splits, and whether one stood before it.
type Begun<'f> = (&'f Field, bool);

/// Both forms, field by field.
struct Aligned<'f> {
    /// The fields as they were, and what each has become; none where it is gone.
    fields: Vec<(Begun<'f>, Option<Begun<'f>>)>,
    /// Thoughts of turns that had none.
    thoughts: Vec<&'f Field>,
    /// The answer at the end.
    answer: Option<&'f Field>,
}

/// A message that is no turn's, or a turn with the results of its calls, as places in [`Aligned::fields`].
struct Unit {
    fields: Range<usize>,
    turn: Option<usize>,
}

impl<'f> Aligned<'f> {
    fn new(offered: &'f [Field], edited: &'f [Field]) -> Result<Self, FieldError> {
        let fields = begun(offered)?.into_iter().map(|field| (field, None));
        let mut aligned = Self {
            fields: fields.collect(),
            thoughts: Vec::new(),
            answer: None,
        };
        let mut next = 0;
        for (field, begins) in begun(edited)? {
            if aligned.answer.is_some() {
                return Err(refuse(
                    field,
                    "must not follow the answer, which is the end",
                ));
            }
            let is_it = |((old, _), _): &(Begun<'_>, _)| is_same(&old.heading, &field.heading);
            let place = aligned.fields[next..].iter().position(is_it);
            match (place, &field.heading) {
                (Some(at), _) => {
                    next += at + 1;
                    aligned.fields[next - 1].1 = Some((field, begins));
                }
                (None, Heading::Answer) => aligned.answer = Some(field),
                (None, Heading::Reasoning(_)) => aligned.thoughts.push(field),
                (None, _) => {
                    let rule = "must be one that was there, once and at its place";
                    return Err(refuse(field, rule));
                }
            }
        }
        Ok(aligned)
    }

    fn units(&self) -> Vec<Unit> {
        let mut units: Vec<Unit> = Vec::new();
        for (at, ((field, _), _)) in self.fields.iter().enumerate() {
            let turn = field.heading.turn();
            let is_result = matches!(field.heading, Heading::Message(_, Role::Tool));
            match units.last_mut() {
                Some(last) if last.turn.is_some() && (is_result || turn == last.turn) => {
                    last.fields.end = at + 1;
                }
                _ => units.push(Unit {
                    fields: at..at + 1,
                    turn,
                }),
            }
        }
        units
    }

    /// The units of each conversation, as they are to be split.
    fn conversations(&self) -> Vec<Vec<Unit>> {
        let mut found: Vec<Vec<Unit>> = Vec::new();
        for unit in self.units() {
            let ((_, began), now) = &self.fields[unit.fields.start];
            if now.map_or(*began, |(_, begins)| begins) {
                found.push(Vec::new());
            }
            match found.last_mut() {
                Some(last) => last.push(unit),
                None => found.push(vec![unit]),
            }
        }
        found
    }

    fn is_kept(&self, unit: &Unit) -> bool {
        let own = self.fields[unit.fields.clone()].iter();
        own.filter(|((old, _), _)| unit.turn.is_none() || old.heading.turn().is_some())
            .any(|(_, now)| now.is_some())
    }

    /// Changes of the texts of a unit that is kept.
    fn texts(&self, unit: &Unit, turns: &[usize], edits: &mut Vec<Edit>) -> Result<(), FieldError> {
        if !self.is_kept(unit) {
            return Ok(());
        }
        let mut emptied = Vec::new();
        for ((old, _), now) in &self.fields[unit.fields.clone()] {
            let text = match now {
                Some((new, _)) if is_same_text(&old.text, &new.text) => None,
                Some((new, _)) => Some(new.text.as_str()),
                None => Some(""),
            };
            let new = now.map_or(*old, |(new, _)| new);
            if let (Heading::Message(message, was), Heading::Message(_, is)) =
                (&old.heading, &new.heading)
                && was != is
            {
                edits.push(mark(*message, *was, *is, new)?);
            }
            let Some(text) = text else { continue };
            let edit = match &old.heading {
                Heading::Message(..) | Heading::Call(..) if now.is_none() => {
                    return Err(gone(old, "is kept with the turn that it belongs to"));
                }
                Heading::Call(turn, call, _) => Edit::Arguments {
                    message: message_of(turns, *turn, new)?,
                    call: call - 1,
                    arguments: arguments(new)?,
                },
                Heading::Message(message, _) => content(*message, text),
                Heading::Content(turn) => content(message_of(turns, *turn, new)?, text),
                Heading::Reasoning(turn) => Edit::Reasoning {
                    message: message_of(turns, *turn, new)?,
                    reasoning: (!text.trim().is_empty()).then(|| text.to_owned()),
                },
                Heading::Split | Heading::Answer => continue,
            };
            // What is emptied comes last: a turn must say something at each step.
            match text.trim() {
                "" => emptied.push(edit),
                _ => edits.push(edit),
            }
        }
        edits.append(&mut emptied);
        Ok(())
    }

    fn added_thoughts(&self, turns: &[usize], edits: &mut Vec<Edit>) -> Result<(), FieldError> {
        for field in &self.thoughts {
            let turn = field.heading.turn().unwrap_or_default();
            let is_there = |((old, _), now): &(Begun<'_>, Option<_>)| {
                old.heading == Heading::Content(turn) && now.is_some()
            };
            if !self.fields.iter().any(is_there) {
                return Err(refuse(field, "must be thoughts of a turn that is kept"));
            }
            edits.push(Edit::Reasoning {
                message: message_of(turns, turn, field)?,
                reasoning: Some(field.text.clone()),
            });
        }
        Ok(())
    }

    fn splits(&self, edits: &mut Vec<Edit>) -> Result<(), FieldError> {
        for ((old, began), now) in &self.fields {
            match (began, now, &old.heading) {
                (true, Some((new, false)), _) => {
                    let rule = "must stay behind its `=== split`: `traces undo` takes a split back";
                    return Err(refuse(new, rule));
                }
                (false, Some((_, true)), Heading::Message(message, _)) => {
                    edits.push(Edit::SplitBefore { message: *message });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Turns that are gone, and ends that are cut off.
    fn removals(
        &self,
        conversation: &[Unit],
        turns: &[usize],
        edits: &mut Vec<Edit>,
    ) -> Result<(), FieldError> {
        let kept = conversation.iter().rposition(|unit| self.is_kept(unit));
        let end = kept.map_or(0, |last| last + 1);
        for unit in conversation {
            self.check_results(unit)?;
        }
        for unit in conversation[..end]
            .iter()
            .filter(|unit| !self.is_kept(unit))
        {
            edits.push(Edit::RemoveTurn {
                message: self.removed_turn(unit, turns)?,
            });
        }
        let tail = &conversation[end..];
        if tail.iter().all(|unit| unit.turn.is_some()) {
            for unit in tail {
                let message = self.removed_turn(unit, turns)?;
                edits.push(Edit::RemoveTurn { message });
            }
            return Ok(());
        }
        let field = self.fields[tail[0].fields.start].0.0;
        let Some(turn) = end.checked_sub(1).and_then(|last| conversation[last].turn) else {
            let rule =
                "can be removed together with all from the last turn before it on, and not alone";
            return Err(gone(field, rule));
        };
        let message = message_of(turns, turn, field)?;
        edits.push(Edit::CutAfter { message });
        Ok(())
    }

    /// The message of a turn that is gone. Only turns may be.
    fn removed_turn(&self, unit: &Unit, turns: &[usize]) -> Result<usize, FieldError> {
        let field = self.fields[unit.fields.start].0.0;
        match unit.turn {
            Some(turn) => message_of(turns, turn, field),
            None => Err(gone(
                field,
                "is kept unless all to the end of its conversation is removed",
            )),
        }
    }

    /// A turn goes with its results.
    fn check_results(&self, unit: &Unit) -> Result<(), FieldError> {
        if self.is_kept(unit) {
            return Ok(());
        }
        let mut results = self.fields[unit.fields.clone()].iter();
        match results.find_map(|(_, now)| *now) {
            Some((left, _)) => Err(refuse(
                left,
                "must go with the turn whose call it answers, and that is removed",
            )),
            None => Ok(()),
        }
    }
}

/// The fields without splits, each with whether one stood before it.
fn begun(fields: &[Field]) -> Result<Vec<Begun<'_>>, FieldError> {
    let mut found = Vec::with_capacity(fields.len());
    let mut split: Option<&Field> = None;
    for field in fields {
        match (&field.heading, split) {
            (Heading::Split, _) => split = Some(field),
            (Heading::Message(_, Role::User), _) | (_, None) => {
                found.push((field, split.take().is_some()));
            }
            (_, Some(split)) => {
                return Err(refuse(split, "must stand before a user message"));
            }
        }
    }
    match split {
        Some(split) => Err(refuse(split, "must stand before a user message")),
        None => Ok(found),
    }
}

/// Whether both are about the same thing, by whatever role.
fn is_same(old: &Heading, new: &Heading) -> bool {
    match (old, new) {
        (Heading::Message(a, _), Heading::Message(b, _)) => a == b,
        (Heading::Call(a, n, _), Heading::Call(b, m, _)) => (a, n) == (b, m),
        (old, new) => old == new,
    }
}

/// White space at the end counts not: editors remove and add it unasked.
fn is_same_text(old: &str, new: &str) -> bool {
    old == new || old.trim_end() == new.trim_end()
}

fn content(message: usize, text: &str) -> Edit {
    Edit::Content {
        message,
        content: text.to_owned(),
    }
}

fn mark(message: usize, was: Role, is: Role, field: &Field) -> Result<Edit, FieldError> {
    match (was, is) {
        (Role::System, Role::Hint) => Ok(Edit::Hint {
            message,
            hint: true,
        }),
        (Role::Hint, Role::System) => Ok(Edit::Hint {
            message,
            hint: false,
        }),
        _ => Err(refuse(field, "must have the role that it had")),
    }
}

fn arguments(field: &Field) -> Result<serde_json::Map<String, Value>, FieldError> {
    match serde_json::from_str(&field.text) {
        Ok(Value::Object(arguments)) => Ok(arguments),
        Ok(_) => Err(refuse(field, "must be followed by a JSON object")),
        Err(error) => Err(refuse(
            field,
            &format!("must be followed by a JSON object: {error}"),
        )),
    }
}

fn message_of(turns: &[usize], turn: usize, field: &Field) -> Result<usize, FieldError> {
    let number = turn.checked_sub(1).and_then(|at| turns.get(at));
    number
        .copied()
        .ok_or_else(|| refuse(field, "must be of a turn that is there"))
}

fn refuse(field: &Field, rule: &str) -> FieldError {
    FieldError::new(format!("line {}", field.line), &field.heading, rule)
}

/// For a heading that has no line any more.
fn gone(field: &Field, rule: &str) -> FieldError {
    FieldError::new(field.heading.to_string(), "nothing", rule)
}
