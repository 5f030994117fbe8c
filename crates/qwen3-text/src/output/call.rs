//! One `<tool_call>` block: the name as soon as it is known, then the arguments as they come.
//!
//! While the block comes it is only scanned: strings, brackets, the two fields that matter. Whether it is JSON of the
//! right form is judged once, at its end, so that the work for each token depends on that token alone.

use serde_json::Value;

use super::{CallError, Delta};

/// A block, up to what came of it.
#[derive(Debug)]
pub(super) struct CallParser {
    index: usize,
    /// All of the block.
    text: String,
    step: Step,
    has_name: bool,
    has_arguments: bool,
    /// Arguments that were not given yet: the name is not known, or the push is not at its end.
    arguments: String,
    /// Why nothing more of the block is understood.
    broken: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    /// Before the object.
    Start,
    /// Before a key, a comma or the object's end.
    Key,
    /// Within a key's quotes, or the name's; what was read of it with its first quote.
    Literal {
        is_name: bool,
        read: String,
        escaped: bool,
    },
    /// Between a key and its value.
    Colon(Field),
    /// Before a value.
    Value(Field),
    /// Within a value that is no literal of interest.
    Nested(Nested),
    /// Within arguments in a string; what was read of an escape.
    Spelled { escape: String },
    /// After the object.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Field {
    Name,
    Arguments,
    Other,
}

/// A value that ends when its brackets and quotes are closed; without any, before a comma or a bracket that closes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Nested {
    is_arguments: bool,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl CallParser {
    pub(super) fn new(index: usize) -> Self {
        Self {
            index,
            text: String::new(),
            step: Step::Start,
            has_name: false,
            has_arguments: false,
            arguments: String::new(),
            broken: None,
        }
    }

    /// Adds text of the block.
    pub(super) fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.text.push_str(text);
        for character in text.chars() {
            if self.broken.is_some() {
                break;
            }
            self.step = self.next(character, deltas);
        }
        self.give_arguments(deltas);
    }

    /// Ends the block; `is_end` at the end of the answer.
    pub(super) fn finish(mut self, is_end: bool, deltas: &mut Vec<Delta>) {
        let reason = match self.broken {
            Some(reason) => Some(reason.to_owned()),
            None => self.judge().err(),
        };
        if reason.is_none() && self.has_no_arguments() {
            self.arguments.push_str("{}");
            self.give_arguments(deltas);
        }
        let error = reason.map(|reason| CallError {
            reason,
            unfinished: is_end,
            text: self.text,
        });
        deltas.push(Delta::ToolCallDone {
            index: self.index,
            error,
        });
    }

    fn give_arguments(&mut self, deltas: &mut Vec<Delta>) {
        if self.has_name && !self.arguments.is_empty() {
            deltas.push(Delta::ToolArguments {
                index: self.index,
                text: std::mem::take(&mut self.arguments),
            });
        }
    }

    /// The step after `character`.
    fn next(&mut self, character: char, deltas: &mut Vec<Delta>) -> Step {
        let blank = matches!(character, ' ' | '\n' | '\r' | '\t');
        match (std::mem::replace(&mut self.step, Step::End), character) {
            (Step::Start, '{') => Step::Key,
            (Step::Key, '}') => Step::End,
            (Step::Key, ',') => Step::Key,
            (Step::Key, '"') => literal(false),
            (Step::Colon(field), ':') => Step::Value(field),
            (step @ (Step::Start | Step::Key | Step::Colon(_) | Step::Value(_) | Step::End), _)
                if blank =>
            {
                step
            }
            (Step::Value(field), _) => self.value(field, character),
            (
                Step::Literal {
                    is_name,
                    read,
                    escaped,
                },
                _,
            ) => self.literal(is_name, read, escaped, character, deltas),
            (Step::Nested(nested), _) => self.nested(nested, character),
            (Step::Spelled { escape }, _) => self.spelled(escape, character),
            (Step::Start, _) => self.fail("it does not begin with `{`"),
            (Step::Key, _) => self.fail("a key must be in quotes"),
            (Step::Colon(_), _) => self.fail("a key must be followed by `:`"),
            (Step::End, _) => self.fail("there is text after the object"),
        }
    }

    fn fail(&mut self, reason: &'static str) -> Step {
        self.broken = Some(reason);
        Step::End
    }

    /// The first character of a value.
    fn value(&mut self, field: Field, character: char) -> Step {
        let nested = Nested {
            is_arguments: false,
            depth: 0,
            in_string: false,
            escaped: false,
        };
        match (field, character) {
            (Field::Name, '"') => literal(true),
            (Field::Name, _) => self.fail("`name` must be a string"),
            (Field::Arguments, '"') => Step::Spelled {
                escape: String::new(),
            },
            (Field::Arguments, '{' | 'n') => {
                // `null` stands for none; it is not given.
                let is_arguments = character == '{';
                self.nested(
                    Nested {
                        is_arguments,
                        ..nested
                    },
                    character,
                )
            }
            (Field::Arguments, _) => self.fail("`arguments` must be an object"),
            (Field::Other, _) => self.nested(nested, character),
        }
    }

    /// A character of a key or of the name.
    fn literal(
        &mut self,
        is_name: bool,
        mut read: String,
        escaped: bool,
        character: char,
        deltas: &mut Vec<Delta>,
    ) -> Step {
        read.push(character);
        if escaped || character != '"' {
            return Step::Literal {
                is_name,
                read,
                escaped: !escaped && character == '\\',
            };
        }
        let Ok(text) = serde_json::from_str::<String>(&read) else {
            return self.fail("a string is not JSON");
        };
        if is_name {
            if text.is_empty() {
                return self.fail("`name` is empty");
            }
            self.has_name = true;
            deltas.push(Delta::ToolCall {
                index: self.index,
                name: text,
            });
            return Step::Key;
        }
        match text.as_str() {
            "name" if self.has_name => self.fail("`name` is given twice"),
            "arguments" if self.has_arguments => self.fail("`arguments` are given twice"),
            "name" => Step::Colon(Field::Name),
            "arguments" => {
                self.has_arguments = true;
                Step::Colon(Field::Arguments)
            }
            _ => Step::Colon(Field::Other),
        }
    }

    /// A character of a value that is copied or passed over.
    fn nested(&mut self, mut nested: Nested, character: char) -> Step {
        if nested.in_string {
            nested.in_string = nested.escaped || character != '"';
            nested.escaped = !nested.escaped && character == '\\';
        } else {
            match character {
                '"' => nested.in_string = true,
                '{' | '[' => nested.depth += 1,
                // A value without brackets ended before this.
                ',' | '}' | ']' if nested.depth == 0 => {
                    return if character == '}' {
                        Step::End
                    } else {
                        Step::Key
                    };
                }
                '}' | ']' => {
                    nested.depth -= 1;
                    if nested.depth == 0 {
                        self.copy(nested, character);
                        return Step::Key;
                    }
                }
                _ => {}
            }
        }
        self.copy(nested, character);
        Step::Nested(nested)
    }

    fn copy(&mut self, nested: Nested, character: char) {
        if nested.is_arguments {
            self.arguments.push(character);
        }
    }

    /// A character of arguments in a string.
    fn spelled(&mut self, mut escape: String, character: char) -> Step {
        match (escape.is_empty(), character) {
            (true, '"') => return Step::Key,
            (true, '\\') => escape.push('\\'),
            (true, _) => self.arguments.push(character),
            (false, _) => {
                escape.push(character);
                if is_whole(&escape) {
                    let text = serde_json::from_str::<String>(&format!("\"{escape}\""));
                    let Ok(text) = text else {
                        return self.fail("`arguments` have an escape that is not JSON");
                    };
                    self.arguments.push_str(&text);
                    escape.clear();
                }
            }
        }
        Step::Spelled { escape }
    }

    /// Whether the whole block is a call; if not, why.
    fn judge(&self) -> Result<(), String> {
        let block: Value = serde_json::from_str(&self.text).map_err(|e| e.to_string())?;
        if !self.has_name {
            return Err("`name` is missing".to_owned());
        }
        match block.get("arguments") {
            Some(Value::String(spelled)) if !is_blank(spelled) => {
                let arguments: Value = serde_json::from_str(spelled)
                    .map_err(|e| format!("`arguments` are a string that is not JSON: {e}"))?;
                match arguments.is_object() {
                    true => Ok(()),
                    false => Err("`arguments` must be an object".to_owned()),
                }
            }
            // Other kinds were refused as they came.
            _ => Ok(()),
        }
    }

    /// Of a block that is a call: whether it gave no text for arguments.
    fn has_no_arguments(&self) -> bool {
        let block: Option<Value> = serde_json::from_str(&self.text).ok();
        match block.as_ref().and_then(|block| block.get("arguments")) {
            None | Some(Value::Null) => true,
            Some(Value::String(spelled)) => is_blank(spelled),
            Some(_) => false,
        }
    }
}

fn literal(is_name: bool) -> Step {
    Step::Literal {
        is_name,
        read: "\"".to_owned(),
        escaped: false,
    }
}

/// Whitespace of JSON.
fn is_blank(text: &str) -> bool {
    text.trim_matches([' ', '\n', '\r', '\t']).is_empty()
}

/// Whether an escape is complete: `\n`, `\u2013`, or two of the latter for a character beyond 16 bits.
fn is_whole(escape: &str) -> bool {
    let is_unicode = escape.starts_with("\\u");
    let is_first_of_two = || {
        let unit = escape.get(2..6);
        let unit = unit.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        unit.is_some_and(|unit| (0xD800..0xDC00).contains(&unit))
    };
    match escape.chars().count() {
        2 => !is_unicode,
        6 => !is_first_of_two(),
        // The second half must be an escape too; what else there is, is no character.
        7 => !escape.ends_with('\\'),
        8 => !escape.ends_with('u'),
        length => length >= 12,
    }
}
