//! The person's side of a chat: reads turns and answers from the terminal, shows what happens.

use std::collections::BTreeSet;

use espalier_agent_worker::rollout::{Conversation, Question, Seen, UserTurn};
use espalier_core::chat::Message;
use espalier_core::trace::StopReason;
use espalier_runtime::tasks::blocking;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::output::{Out, note, plain};
use crate::render::{DIM, Style, assistant, tool};

/// Lines of a tool's result that are shown.
const RESULT_LINES: usize = 8;
/// What a person may type instead of a turn.
const HELP: &str = "/exit ends the chat and keeps its trace; so does Ctrl-D";

/// A person at a terminal.
pub struct Terminal {
    out: Out,
    style: Style,
    /// On loan to the thread that reads while it reads.
    editor: Option<DefaultEditor>,
    /// Tools that need no further answer.
    always: BTreeSet<String>,
}

/// What an answer about a tool means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    Always,
    Unclear,
}

impl Terminal {
    /// Shows what happens on `out`.
    pub fn new(out: Out) -> Self {
        note(HELP);
        Self {
            style: Style {
                color: out.color,
                lines: Some(RESULT_LINES),
                rest: "",
            },
            out,
            editor: None,
            always: BTreeSet::new(),
        }
    }

    /// One line; none where the person has left.
    async fn read(&mut self, prompt: &'static str) -> Option<String> {
        let editor = self.editor.take();
        let reading = blocking("chat.read", move || {
            let mut editor = match editor {
                Some(editor) => editor,
                None => DefaultEditor::new().ok()?,
            };
            let line = editor.readline(prompt);
            if let Ok(line) = &line {
                // A history that is full is no reason to lose the line.
                let _ = editor.add_history_entry(line);
            }
            Some((editor, line))
        });
        let (editor, line) = reading.await.ok().flatten()?;
        self.editor = Some(editor);
        match line {
            Ok(line) => Some(line),
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => None,
            Err(error) => {
                note(format!("cannot read the terminal: {error}"));
                None
            }
        }
    }

    fn print(&self, text: &str) {
        // Whoever closed standard output has left; the chat ends at the next turn.
        if self.out.json {
            note(text.trim_end());
        } else {
            let _ = self.out.line(text.trim_end());
        }
    }
}

impl Conversation for Terminal {
    async fn next_turn(&mut self) -> UserTurn {
        loop {
            let Some(line) = self.read("\nyou> ").await else {
                return UserTurn::Done(StopReason::UserExit);
            };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return UserTurn::Done(StopReason::UserExit),
                command if command.starts_with('/') => note(HELP),
                text => return UserTurn::Say(text.to_owned()),
            }
        }
    }

    async fn approve(&mut self, question: Question<'_>) -> bool {
        if self.always.contains(question.tool) {
            return true;
        }
        note(format!("may {} run?", plain(question.tool)));
        loop {
            let Some(line) = self.read("[y]es, [n]o, [a]lways> ").await else {
                return false;
            };
            match answer(&line) {
                Answer::Yes => return true,
                Answer::No => return false,
                Answer::Always => {
                    self.always.insert(question.tool.to_owned());
                    return true;
                }
                Answer::Unclear => {}
            }
        }
    }

    fn see(&mut self, seen: Seen<'_>) {
        let mut text = String::new();
        match seen {
            Seen::Thinking => note(self.style.paint(DIM, "…")),
            Seen::Said(Message::Assistant {
                content,
                reasoning_content,
                tool_calls,
            }) => assistant(
                &mut text,
                self.style,
                "assistant",
                reasoning_content.as_deref(),
                content,
                tool_calls,
            ),
            Seen::ToolAnswered { record, shown } => {
                tool(
                    &mut text,
                    self.style,
                    "",
                    &record.call_id,
                    shown,
                    Some(record),
                );
            }
            Seen::Said(_) | Seen::ToolCalled { .. } | Seen::TurnCost { .. } => {}
        }
        if !text.is_empty() {
            self.print(&text);
        }
    }
}

fn answer(line: &str) -> Answer {
    match line.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Answer::Yes,
        "n" | "no" => Answer::No,
        "a" | "always" => Answer::Always,
        _ => Answer::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Map;
    use std::time::Duration;

    #[test]
    fn answers_are_understood_in_short_and_long() {
        let read = ["y", " YES ", "n", "always", "", "maybe"].map(answer);
        let expected = [
            Answer::Yes,
            Answer::Yes,
            Answer::No,
            Answer::Always,
            Answer::Unclear,
            Answer::Unclear,
        ];
        assert_eq!(read, expected);
    }

    #[tokio::test]
    async fn always_means_no_further_question() {
        let out = Out {
            json: true,
            color: false,
        };
        let mut terminal = Terminal::new(out);
        terminal.always.insert("open".to_owned());
        let question = Question {
            tool: "open",
            arguments: &Map::new(),
            timeout: Duration::from_secs(1),
        };
        assert!(terminal.approve(question).await);
    }
}
