//! What was sampled beside what the template writes of the same conversation: the first token at which they part.
//!
//! Rows keep the sampled ids wherever they are known, so that a difference does no harm to training by itself. It shows
//! that somebody else than the one template made the prompt, that a server reads turns in another way than it writes
//! them, or that a model spells what the template spells otherwise.

use crate::recorded::{ended, shown};
use crate::render::{RenderError, Renderer, index};
use crate::source::{Source, SourceCall};
use crate::unroll::assistant_turns;

/// A call of the model, held against its rendering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rerendered {
    /// Index of the assistant message that it gave.
    pub message: usize,
    /// Recorded tokens of its prompt; none where nobody knows them.
    pub prompt: Option<usize>,
    /// Recorded tokens of its completion, with the end of its turn.
    pub completion: usize,
    /// Where they first part.
    pub difference: Option<Difference>,
}

/// The first token that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where it is.
    pub part: Part,
    /// Its place there, from 0.
    pub at: usize,
    /// The last ids before it, which are the same.
    pub before: Vec<u32>,
    /// The id that was recorded; none where that ends.
    pub recorded: Option<u32>,
    /// The id that is rendered; none where that ends.
    pub rendered: Option<u32>,
}

/// What of a call differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the model was shown.
    Prompt,
    /// What it said.
    Completion,
}

impl Part {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Completion => "completion",
        }
    }
}

/// Ids that are shown before a difference.
const BEFORE: usize = 12;

/// Every call of `source` whose ids are known, in order.
///
/// # Errors
/// The template refuses the conversation.
pub fn rerender(source: &Source, renderer: &mut Renderer) -> Result<Vec<Rerendered>, RenderError> {
    source
        .calls
        .iter()
        .map(|call| one(source, call, renderer))
        .collect()
}

fn one(
    source: &Source,
    call: &SourceCall,
    renderer: &mut Renderer,
) -> Result<Rerendered, RenderError> {
    let completion = ended(call, renderer.tokenizer().ids());
    let before = shown(&source.messages[..call.message], true);
    let prompt = renderer.prompt(&before, &source.tools, source.thinking)?;
    let prompt = renderer.encode(&prompt, 0);
    let after = shown(&source.messages[..=call.message], true);
    let turn = assistant_turns(&after).count().saturating_sub(1);
    let whole = renderer.render(&after, &source.tools, &[index(turn)])?;
    let turn = whole.turns.last().cloned().unwrap_or_default();
    // Where the model is told not to think, the prompt has the beginning of the turn.
    let start = match whole.ids.starts_with(&prompt) {
        true => prompt.len(),
        false => turn.start as usize,
    };
    let said = whole.ids.get(start..turn.end as usize).unwrap_or_default();
    let in_prompt = call.prompt.as_deref();
    let in_prompt = in_prompt.and_then(|ids| difference(Part::Prompt, ids, &prompt));
    Ok(Rerendered {
        message: call.message,
        prompt: call.prompt.as_ref().map(Vec::len),
        completion: completion.len(),
        difference: in_prompt.or_else(|| difference(Part::Completion, &completion, said)),
    })
}

fn difference(part: Part, recorded: &[u32], rendered: &[u32]) -> Option<Difference> {
    let alike = recorded.iter().zip(rendered).take_while(|(a, b)| a == b);
    let at = alike.count();
    (recorded.len() != rendered.len() || at < recorded.len()).then(|| Difference {
        part,
        at,
        before: recorded[at.saturating_sub(BEFORE)..at].to_vec(),
        recorded: recorded.get(at).copied(),
        rendered: rendered.get(at).copied(),
    })
}

#[cfg(test)]
mod tests {
    use espalier_core::chat::{Message, ToolCall, on_the_wire};
    use espalier_qwen3_text::Tokenizer;
    use serde_json::json;

    use super::*;
    use crate::source::Facts;

    const CALLED: &str = "<think>\nlook\n</think>\n\n<tool_call>\n{\"name\": \"open\", \"arguments\": {\"url\": \"a\"}}\n</tool_call><|im_end|>";

    fn messages() -> Vec<Message> {
        let arguments = json!({"url": "a"}).as_object().cloned();
        let call = ToolCall::new("c", "open", arguments.unwrap_or_default());
        vec![
            Message::System {
                content: "the footer has it".into(),
                hint: true,
            },
            Message::User {
                content: "price?".into(),
            },
            Message::assistant(String::new(), Some("look".into()), vec![call]),
            Message::Tool {
                tool_call_id: "c".into(),
                content: "page".into(),
            },
            Message::assistant("five".into(), Some("hm".into()), vec![]),
        ]
    }

    /// The conversation as a server records it that was sent these completions.
    fn served(completions: [&str; 2], thinking: bool) -> Source {
        let mut renderer = Renderer::new(Tokenizer::shared().unwrap());
        let messages = messages();
        let calls = assistant_turns(&messages)
            .zip(completions)
            .map(|(message, said)| {
                let before = on_the_wire(&messages[..message]);
                let prompt = renderer.prompt(&before, &[], thinking).unwrap();
                SourceCall {
                    message,
                    prompt: Some(renderer.encode(&prompt, 0)),
                    completion: renderer.tokenizer().encode(said),
                    is_ended: true,
                }
            })
            .collect();
        Source {
            id: "s".into(),
            timestamp: String::new(),
            model: String::new(),
            messages: messages.clone(),
            tools: vec![],
            facts: Facts::default(),
            thinking,
            keep_hints: None,
            calls,
        }
    }

    fn differences(source: &Source) -> Vec<Option<Difference>> {
        let mut renderer = Renderer::new(Tokenizer::shared().unwrap());
        let calls = rerender(source, &mut renderer).unwrap();
        calls.into_iter().map(|call| call.difference).collect()
    }

    #[test]
    fn what_the_template_wrote_does_not_differ() {
        let source = served([CALLED, "<think>\nhm\n</think>\n\nfive"], true);
        assert_eq!(differences(&source), [None, None]);
    }

    #[test]
    fn another_spelling_is_found_with_its_token() {
        let tight = CALLED.replace("\": ", "\":");
        let source = served([&tight, "<think>\nhm\n</think>\n\nfive<|im_end|>"], true);
        let found = differences(&source);
        let first = found[0].as_ref().unwrap();
        let text = |ids: &[u32]| Tokenizer::shared().unwrap().decode(ids).unwrap();
        assert_eq!(first.part, Part::Completion);
        assert!(
            text(&first.before).ends_with("{\"name"),
            "{:?}",
            text(&first.before)
        );
        assert_ne!(first.recorded, first.rendered);
        assert_eq!(found[1], None);
    }

    #[test]
    fn another_prompt_is_found_before_what_was_said() {
        let mut source = served([CALLED, "<think>\nhm\n</think>\n\nfive"], true);
        let prompt = source.calls[1].prompt.as_mut().unwrap();
        prompt.truncate(7);
        let second = differences(&source)[1].clone().unwrap();
        assert_eq!((second.part, second.at), (Part::Prompt, 7));
        assert_eq!((second.recorded, second.before.len()), (None, 7));
        assert!(second.rendered.is_some());
    }

    #[test]
    fn a_turn_without_thoughts_begins_in_the_prompt() {
        let mut source = served([CALLED, "five"], false);
        source.messages[4] = Message::assistant("five".into(), None, vec![]);
        source.calls.remove(0);
        assert_eq!(differences(&source), [None]);
    }
}
