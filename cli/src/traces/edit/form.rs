//! A conversation as a text that a person edits or compares: one heading a field, texts indented by two spaces, so that
//! nothing in a text can look like a heading. What was written reads back as it was; the difference to what was edited is
//! a list of edits.
//!
//! ```text
//! # espalier trace default/b/j log 2
//! === message 2 user
//!   price?
//! === turn 1 reasoning
//!   I open the page.
//! === turn 1 content
//! === turn 1 call 1 open
//!   {
//!     "url": "x"
//!   }
//! === message 4 tool
//!   5
//! ```

use std::fmt::{self, Write};

use espalier_core::chat::{FunctionCall, Message};
use espalier_core::error::FieldError;
use espalier_core::id::JobKey;
use espalier_core::trace::edits::{Conversation, Curated};
use serde_json::Value;

/// How a heading begins.
const MARK: &str = "=== ";
/// How a line of a text begins.
const INDENT: &str = "  ";
/// How the first line begins.
const TITLE: &str = "# espalier trace ";

/// The fields of a conversation, each with its text, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// The trace.
    pub job: JobKey,
    /// How many corrections are in it.
    pub log: u32,
    /// The fields.
    pub fields: Vec<Field>,
}

/// A heading with its text.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// What it is.
    pub heading: Heading,
    /// What it holds.
    pub text: String,
    /// Its line, from 1; 0 where it was not read.
    pub line: usize,
}

/// What a field is. Turns count from 1, as the numbers of [`turns`](espalier_core::trace::edits::turns) do.
#[derive(Clone, Debug, PartialEq)]
pub enum Heading {
    /// A message that is no turn's: its number, its role, and whether it is a hint.
    Message(usize, Role),
    /// Thoughts of a turn.
    Reasoning(usize),
    /// Text of a turn.
    Content(usize),
    /// Arguments of a call of a turn, counted from 1, and the tool.
    Call(usize, usize, String),
    /// A conversation of its own begins.
    Split,
    /// An answer that is to be added.
    Answer,
}

/// The role of a message that is no turn's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `system`
    System,
    /// `system hint`
    Hint,
    /// `user`
    User,
    /// `tool`
    Tool,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Hint => "system hint",
            Self::User => "user",
            Self::Tool => "tool",
        }
    }

    fn of(text: &str) -> Option<Self> {
        let all = [Self::System, Self::Hint, Self::User, Self::Tool];
        all.into_iter().find(|role| role.as_str() == text)
    }
}

impl fmt::Display for Heading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(number, role) => write!(f, "message {number} {}", role.as_str()),
            Self::Reasoning(turn) => write!(f, "turn {turn} reasoning"),
            Self::Content(turn) => write!(f, "turn {turn} content"),
            Self::Call(turn, call, tool) => write!(f, "turn {turn} call {call} {tool}"),
            Self::Split => f.write_str("split"),
            Self::Answer => f.write_str("answer"),
        }
    }
}

impl Heading {
    fn of(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.trim_end().splitn(5, ' ').collect();
        match words[..] {
            ["split"] => Some(Self::Split),
            ["answer"] => Some(Self::Answer),
            ["message", number, role] => Some(Self::Message(number.parse().ok()?, Role::of(role)?)),
            ["message", number, "system", "hint"] => {
                Some(Self::Message(number.parse().ok()?, Role::Hint))
            }
            ["turn", turn, "reasoning"] => Some(Self::Reasoning(turn.parse().ok()?)),
            ["turn", turn, "content"] => Some(Self::Content(turn.parse().ok()?)),
            ["turn", turn, "call", call, tool] => Some(Self::Call(
                turn.parse().ok()?,
                call.parse().ok()?,
                tool.to_owned(),
            )),
            _ => None,
        }
    }

    /// The turn that it is of.
    pub fn turn(&self) -> Option<usize> {
        match self {
            Self::Reasoning(turn) | Self::Content(turn) | Self::Call(turn, ..) => Some(*turn),
            Self::Message(..) | Self::Split | Self::Answer => None,
        }
    }
}

impl Form {
    /// The form of what a trace has come to. `turns` are the numbers of all its assistant messages.
    pub fn new(job: &JobKey, curated: &Curated, turns: &[usize]) -> Self {
        let mut fields = Vec::new();
        for (n, conversation) in curated.conversations.iter().enumerate() {
            if n > 0 {
                fields.push(Field::new(Heading::Split, String::new()));
            }
            add_conversation(&mut fields, conversation, turns, n > 0);
        }
        Self {
            job: job.clone(),
            log: curated.patches,
            fields,
        }
    }

    /// The text of it.
    pub fn write(&self) -> String {
        let mut text = format!("{TITLE}{} log {}\n", self.job, self.log);
        for field in &self.fields {
            field.write(&mut text);
        }
        text
    }

    /// Reads a text.
    ///
    /// # Errors
    /// Names the line that is neither a heading, nor indented, nor begins with `#`.
    pub fn read(text: &str) -> Result<Self, FieldError> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let mut lines = text.split('\n').enumerate();
        let first = lines.next().map_or("", |(_, line)| line);
        let (job, log) = read_title(first)?;
        let mut fields: Vec<Field> = Vec::new();
        let mut texts: Vec<Vec<&str>> = Vec::new();
        for (i, line) in lines {
            let refuse = |rule: &str| FieldError::new(format!("line {}", i + 1), line, rule);
            if let Some(heading) = line.strip_prefix(MARK) {
                let heading = Heading::of(heading).ok_or_else(|| {
                    refuse("must be a heading that was there, `=== split` or `=== answer`")
                })?;
                let (text, line) = (String::new(), i + 1);
                fields.push(Field {
                    heading,
                    text,
                    line,
                });
                texts.push(Vec::new());
            } else if line.starts_with('#') {
                continue;
            } else if let (true, Some(lines)) = (
                line.starts_with(INDENT) || line.trim().is_empty(),
                texts.last_mut(),
            ) {
                lines.push(line);
            } else if !line.trim().is_empty() {
                return Err(refuse(
                    "must begin with two spaces as a line of a text, with `=== ` or with `#`",
                ));
            }
        }
        for (field, lines) in fields.iter_mut().zip(texts) {
            field.text = read_lines(lines);
        }
        Ok(Self { job, log, fields })
    }
}

impl Field {
    fn new(heading: Heading, text: String) -> Self {
        let line = 0;
        Self {
            heading,
            text,
            line,
        }
    }

    fn write(&self, out: &mut String) {
        let _ = writeln!(out, "{MARK}{}", self.heading);
        if self.text.is_empty() {
            return;
        }
        for line in self.text.split('\n') {
            let _ = writeln!(out, "{INDENT}{line}");
        }
    }
}

fn read_title(line: &str) -> Result<(JobKey, u32), FieldError> {
    let rule = format!("must be `{TITLE}PROJECT/BATCH/JOB log N`, as it was");
    let refuse = || FieldError::new("line 1", line, rule.as_str());
    let title = line.trim_end().strip_prefix(TITLE).ok_or_else(refuse)?;
    let (job, log) = title.split_once(" log ").ok_or_else(refuse)?;
    Ok((
        job.parse().map_err(|_| refuse())?,
        log.parse().map_err(|_| refuse())?,
    ))
}

/// The text of indented lines. Empty lines at the end that are not even indented are none: editors add them.
fn read_lines(mut lines: Vec<&str>) -> String {
    while lines.last() == Some(&"") {
        lines.pop();
    }
    let lines = lines.into_iter();
    let lines: Vec<&str> = lines
        .map(|line| {
            line.strip_prefix(INDENT)
                .unwrap_or(line.trim_end_matches(' '))
        })
        .collect();
    lines.join("\n")
}

/// The fields of one conversation. The system messages before one that was split off are those of the first.
fn add_conversation(
    fields: &mut Vec<Field>,
    conversation: &Conversation,
    turns: &[usize],
    is_split_off: bool,
) {
    let mut in_frame = is_split_off;
    for (message, origin) in conversation.messages.iter().zip(&conversation.origins) {
        in_frame &= message.role() == "system";
        if in_frame {
            continue;
        }
        let number = origin.number();
        let turn = turns.iter().position(|turn| *turn == number);
        add_message(fields, message, number, turn.map_or(0, |turn| turn + 1));
    }
}

fn add_message(fields: &mut Vec<Field>, message: &Message, number: usize, turn: usize) {
    let role = match message {
        Message::System { hint: true, .. } => Role::Hint,
        Message::System { .. } => Role::System,
        Message::User { .. } => Role::User,
        Message::Tool { .. } => Role::Tool,
        Message::Assistant {
            content,
            reasoning_content,
            tool_calls,
        } => {
            if let Some(reasoning) = reasoning_content {
                fields.push(Field::new(Heading::Reasoning(turn), reasoning.clone()));
            }
            fields.push(Field::new(Heading::Content(turn), content.clone()));
            for (n, call) in tool_calls.iter().enumerate() {
                let heading = Heading::Call(turn, n + 1, one_line(&call.function.name));
                fields.push(Field::new(heading, arguments(&call.function)));
            }
            return;
        }
    };
    let heading = Heading::Message(number, role);
    fields.push(Field::new(heading, message.content().to_owned()));
}

/// The arguments as JSON, or the model's own text where it was none.
pub fn arguments(function: &FunctionCall) -> String {
    match &function.malformed {
        Some(text) => text.clone(),
        None => format!("{:#}", Value::Object(function.arguments.clone())),
    }
}

/// A model may have named any tool; a heading is one line without spaces at its ends.
fn one_line(name: &str) -> String {
    let visible = name.trim().replace(char::is_whitespace, "_");
    if visible.is_empty() {
        "?".to_owned()
    } else {
        visible
    }
}
