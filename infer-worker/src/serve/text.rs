//! The text side of the served model: conversations to ids, ids to parts of an answer, grammars over its vocabulary.

use espalier_qwen3_text::{Conversation as Shown, OutputParser, ParserOptions, Tokenizer, ids};
use espalier_runtime::telemetry::error_chain;

use crate::api::backend::{Conversation, Delta, Form, Parser, RenderError, Rendered};
use crate::grammar::{GrammarError, Guides, Thoughts, Vocabulary};
use crate::load::ModelFiles;

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
        let word = |id| files.tokenizer.token_bytes(id).unwrap_or_default().to_vec();
        let guides = Guides::new(Vocabulary {
            words: (0..ids::VOCABULARY).map(word).collect(),
            control: (ids::END_OF_TEXT..ids::VOCABULARY).collect(),
            end: files.eos.first().copied().unwrap_or(ids::TURN_CLOSE),
            call: (ids::CALL_OPEN, ids::CALL_CLOSE),
            thought: (ids::THOUGHT_OPEN, ids::THOUGHT_CLOSE),
        })?;
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
        let mut shown = Shown {
            messages: conversation.messages.clone(),
            tools: conversation.tools.clone(),
            add_generation_prompt: true,
            enable_thinking: conversation.enable_thinking,
            kwargs: conversation.kwargs.clone(),
        };
        // Blank content beside calls, as other servers give it back, would be rendered as stray lines.
        shown.mend();
        let prompt = self.files.template().prompt(&shown);
        let prompt = prompt.map_err(|error| RenderError {
            reason: error_chain(&error),
        })?;
        Ok(rendered(self.tokenizer().encode_prompt(&prompt)))
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

/// A prompt, and where its answer begins.
pub(super) fn rendered(ids: Vec<u32>) -> Rendered {
    let thoughts = match ids.iter().rev().find(|id| is_border(**id)) {
        Some(&ids::THOUGHT_OPEN) => Thoughts::Open,
        Some(&ids::THOUGHT_CLOSE) => Thoughts::Over,
        _ => Thoughts::Possible,
    };
    Rendered { ids, thoughts }
}

fn is_border(id: u32) -> bool {
    [ids::THOUGHT_OPEN, ids::THOUGHT_CLOSE, ids::TURN_OPEN].contains(&id)
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
        let open = [ids::TURN_OPEN, 5, ids::THOUGHT_OPEN];
        let of = |ids: &[u32]| rendered(ids.to_vec()).thoughts;
        assert_eq!(of(&open), Thoughts::Open);
        assert!(ParserOptions::after_prompt(&open).in_thought);
        assert_eq!(
            of(&[ids::TURN_OPEN, ids::THOUGHT_OPEN, 5, ids::THOUGHT_CLOSE, 6]),
            Thoughts::Over
        );
        assert_eq!(
            of(&[ids::THOUGHT_OPEN, ids::TURN_OPEN, 5]),
            Thoughts::Possible
        );
        assert_eq!(of(&[5]), Thoughts::Possible);
    }
}
