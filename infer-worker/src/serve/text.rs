//! The text side of the served model: conversations to ids, ids to parts of an answer, grammars over its vocabulary.

use espalier_qwen3_text::{Conversation as Shown, OutputParser, ParserOptions, Prompt, Tokenizer};
use espalier_runtime::telemetry::error_chain;
use serde_json::Value;

use crate::api::backend::{Conversation, Delta, Form, Parser, RenderError, Rendered};
use crate::grammar::{GrammarError, Guides, Thoughts, Vocabulary};
use crate::load::ModelFiles;

/// What stands behind the mark of a user's turn.
const USER: &[u8] = b"user\n";

/// Tokenizer, template and grammars of one model.
pub(super) struct Text {
    files: ModelFiles,
    guides: Guides,
}

impl Text {
    /// Also makes what decoding needs, so that the first request does not wait for it. Takes some tenths of a second.
    ///
    /// # Errors
    /// The vocabulary cannot be used for grammars.
    pub(super) fn new(files: ModelFiles) -> Result<Self, GrammarError> {
        let end = files.eos.first().copied();
        let guides = Guides::new(vocabulary(&files.tokenizer, end))?;
        Ok(Self { files, guides })
    }

    pub(super) fn files(&self) -> &ModelFiles {
        &self.files
    }

    pub(super) fn guides(&self) -> &Guides {
        &self.guides
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.files.tokenizer
    }

    pub(super) fn render(&self, conversation: &Conversation) -> Result<Rendered, RenderError> {
        let prompt = self.prompt(conversation, None)?;
        Ok(self.rendered(self.tokenizer().encode_prompt(&prompt)))
    }

    /// The ids of a turn after a conversation, up to the mark of its end.
    pub(super) fn turn(
        &self,
        conversation: &Conversation,
        turn: &Value,
    ) -> Result<Vec<u32>, RenderError> {
        let before = self.prompt(conversation, None)?;
        let after = self.prompt(conversation, Some(turn))?;
        let said = after.after(&before).ok_or_else(|| RenderError {
            reason: "the chat template does not write the turn behind the prompt".to_owned(),
        })?;
        let mut ids = self.tokenizer().encode_prompt(&said);
        let close = self.tokenizer().ids().turn_close;
        if let Some(end) = ids.iter().position(|id| *id == close) {
            ids.truncate(end + 1);
        }
        Ok(ids)
    }

    /// A conversation up to where the assistant's turn begins, or up to the end of that turn.
    fn prompt(
        &self,
        conversation: &Conversation,
        turn: Option<&Value>,
    ) -> Result<Prompt, RenderError> {
        let messages = conversation.messages.iter().chain(turn);
        let mut shown = Shown {
            messages: messages.cloned().collect(),
            tools: conversation.tools.clone(),
            add_generation_prompt: turn.is_none(),
            enable_thinking: conversation.enable_thinking,
            kwargs: conversation.kwargs.clone(),
        };
        // Blank content beside calls, as other servers give it back, would be rendered as stray lines.
        shown.mend();
        let prompt = self.files.template().prompt(&shown);
        prompt.map_err(|error| RenderError {
            reason: error_chain(&error),
        })
    }

    /// A prompt, and where its answer begins.
    pub(super) fn rendered(&self, ids: Vec<u32>) -> Rendered {
        let thoughts = thoughts(self.tokenizer(), &ids);
        Rendered { ids, thoughts }
    }

    /// The ids up to the end of the first turn of a user; all of them where there is none.
    pub(super) fn opening<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        opening(self.tokenizer(), ids)
    }

    pub(super) fn parser(&self, form: Form) -> Box<dyn Parser> {
        let options = match form {
            Form::Plain => ParserOptions {
                in_thought: false,
                reasoning: false,
                tool_calls: false,
            },
            Form::Chat { thoughts, tools } => ParserOptions {
                in_thought: thoughts == Thoughts::Open,
                reasoning: true,
                tool_calls: tools,
            },
        };
        Box::new(Answer(OutputParser::new(self.tokenizer().clone(), options)))
    }
}

/// What a tokenizer's ids stand for, for grammars; an answer ends with `end`, where the model has one of its own.
fn vocabulary(tokenizer: &Tokenizer, end: Option<u32>) -> Vocabulary {
    let word = |id| tokenizer.token_bytes(id).unwrap_or_default().to_vec();
    let ids = tokenizer.ids();
    Vocabulary {
        words: (0..tokenizer.vocabulary()).map(word).collect(),
        control: tokenizer.controls().to_vec(),
        end: end.unwrap_or(ids.turn_close),
        call: (ids.call_open, ids.call_close),
        thought: (ids.thought_open, ids.thought_close),
    }
}

/// Where the answer to a prompt begins.
fn thoughts(tokenizer: &Tokenizer, prompt: &[u32]) -> Thoughts {
    let ids = tokenizer.ids();
    let borders = [ids.thought_open, ids.thought_close, ids.turn_open];
    match prompt.iter().rev().find(|id| borders.contains(id)) {
        Some(&id) if id == ids.thought_open => Thoughts::Open,
        Some(&id) if id == ids.thought_close => Thoughts::Over,
        _ => Thoughts::Possible,
    }
}

/// A user's turn begins with a mark and the word `user`. That is told from the text of the ids: which ids it has hangs on what
/// stands behind it, a line break for example.
fn opening<'a>(tokenizer: &Tokenizer, ids: &'a [u32]) -> &'a [u32] {
    let (open, close) = (tokenizer.ids().turn_open, tokenizer.ids().turn_close);
    let begins = |at: &usize| ids[*at] == open && spells(tokenizer, &ids[at + 1..], USER);
    let end = (0..ids.len()).find(begins).and_then(|begin| {
        let length = ids[begin..].iter().position(|id| *id == close)?;
        Some(begin + length + 1)
    });
    &ids[..end.unwrap_or(ids.len())]
}

/// Whether the text of `ids` begins with `start`.
fn spells(tokenizer: &Tokenizer, ids: &[u32], start: &[u8]) -> bool {
    let bytes = ids
        .iter()
        .flat_map(|id| tokenizer.token_bytes(*id).unwrap_or_default());
    bytes.take(start.len()).eq(start)
}

struct Answer(OutputParser);

impl Parser for Answer {
    fn push(&mut self, id: u32) -> Vec<Delta> {
        self.0.push(id)
    }

    fn finish(&mut self) -> Vec<Delta> {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_follow_from_the_last_turn() {
        let tokenizer = Tokenizer::shared().unwrap();
        let ids = tokenizer.ids();
        let open = [ids.turn_open, 5, ids.thought_open];
        let of = |prompt: &[u32]| thoughts(tokenizer, prompt);
        assert_eq!(of(&open), Thoughts::Open);
        assert!(ParserOptions::after_prompt(ids, &open).in_thought);
        assert_eq!(
            of(&[ids.turn_open, ids.thought_open, 5, ids.thought_close, 6]),
            Thoughts::Over
        );
        assert_eq!(
            of(&[ids.thought_open, ids.turn_open, 5]),
            Thoughts::Possible
        );
        assert_eq!(of(&[5]), Thoughts::Possible);
    }

    #[test]
    fn a_conversation_begins_the_same_in_each_of_its_turns() {
        let tokenizer = Tokenizer::shared().unwrap();
        let ids = |text: &str| tokenizer.encode(text);
        let turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        let first = ids(&format!("<|im_start|>system\nBe brief.<|im_end|>\n{turn}"));
        let next = [&first[..], &ids(&format!("Hello.<|im_end|>\n{turn}"))].concat();
        let began = opening(tokenizer, &first);
        assert_eq!(opening(tokenizer, &next), began);
        assert_eq!(began.last(), Some(&tokenizer.ids().turn_close));
        let other = ids(&turn.replace("Hi", "Ho"));
        assert_ne!(opening(tokenizer, &other), opening(tokenizer, &ids(turn)));
        // The first line break and the template's are one token.
        let blank = ids(&turn.replace("Hi", "\n\nHi"));
        let later = [&blank[..], &ids(&format!("Hello.<|im_end|>\n{turn}"))].concat();
        assert_eq!(opening(tokenizer, &later), opening(tokenizer, &blank));
        assert_ne!(opening(tokenizer, &blank), blank);
        let open = ids("<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nHi");
        assert_eq!(
            opening(tokenizer, &open),
            open,
            "no turn of a user has ended"
        );
    }
}
