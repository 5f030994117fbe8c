//! Conversations to token ids by the one chat template, with every assistant turn found in them.
//!
//! The template's own control texts cut a prompt into segments that are tokenized apart, so ids of a segment do not
//! depend on what stands around it. That is what the cache rests on: the tools of a thousand rows, and the turns that
//! the rows of one conversation share, are tokenized once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use espalier_core::chat::{Message, on_the_wire};
use espalier_qwen3_text::{ChatTemplate, Conversation, Prompt, TemplateError, Tokenizer};
use serde_json::{Value, json};

/// What the template writes after `<|im_start|>` where the model's own turn begins.
const TURN_HEAD: &str = "assistant\n";
/// Shorter segments are tokenized faster than they are looked up.
const CACHED_BYTES_MIN: usize = 64;
/// Text that one generation of the cache holds; there are two, and ids take about as much again.
const CACHE_BYTES_MAX: usize = 16 << 20;

/// Why a conversation has no token ids.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The template has no meaning for it.
    #[error("the chat template cannot render the conversation")]
    Template(#[from] TemplateError),
    /// The text has not one turn for each assistant message: content imitates the template beyond what can be told.
    #[error("the rendered conversation must have {expected} assistant turns, got {found}")]
    Turns {
        /// Assistant messages.
        expected: usize,
        /// Turns that were found.
        found: usize,
    },
}

/// Token ids of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// All of them.
    pub ids: Vec<u32>,
    /// One for each assistant message, in order: from after `<|im_start|>assistant\n` to `<|im_end|>` inclusive.
    pub turns: Vec<Range<u32>>,
}

/// Renders and tokenizes. Holds a cache: one for each thread, kept from row to row.
#[derive(Debug)]
pub struct Renderer {
    tokenizer: Tokenizer,
    /// Tokens of [`TURN_HEAD`].
    head: usize,
    cache: Segments,
}

impl Renderer {
    /// With an empty cache.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            head: tokenizer.count(TURN_HEAD),
            cache: Segments::default(),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids of a whole conversation. `trained` are the assistant turns, counted from 0, whose ids must begin where a
    /// served prompt ends: their first token never merges with the line break before it.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn render(
        &mut self,
        messages: &[Message],
        tools: &[Value],
        trained: &[u32],
    ) -> Result<Rendered, RenderError> {
        let prompt = ChatTemplate::qwen3().prompt(&conversation(messages, tools))?;
        let expected = messages.iter().filter(|m| m.role() == "assistant").count();
        let rendered = self.turns(&prompt, trained);
        let found = rendered.turns.len();
        if found != expected {
            return Err(RenderError::Turns { expected, found });
        }
        Ok(rendered)
    }

    /// What a model is asked with: the messages so far, and the opening of its own turn.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn prompt(
        &self,
        messages: &[Message],
        tools: &[Value],
        thinking: bool,
    ) -> Result<Prompt, RenderError> {
        let mut asked = conversation(messages, tools);
        asked.add_generation_prompt = true;
        // Qwen3 thinks unless it is told not to, and `true` is written as nothing.
        asked.enable_thinking = (!thinking).then_some(false);
        Ok(ChatTemplate::qwen3().prompt(&asked)?)
    }

    /// The ids of a prompt from byte `from` on, which must stand beside one of its control texts.
    pub fn encode(&mut self, prompt: &Prompt, from: usize) -> Vec<u32> {
        let text = prompt.text();
        let mut ids = Vec::with_capacity((text.len() - from) / 3);
        let mut done = from;
        for control in prompt.controls().iter().filter(|c| c.start >= from) {
            self.push(&text[done..control.start], &mut ids);
            ids.push(self.control(&text[control.clone()]));
            done = control.end;
        }
        self.push(&text[done..], &mut ids);
        ids
    }

    fn turns(&mut self, prompt: &Prompt, trained: &[u32]) -> Rendered {
        let text = prompt.text();
        let (mut ids, mut turns) = (Vec::with_capacity(text.len() / 3), Vec::new());
        let (mut done, mut opened, mut start) = (0, false, None);
        let marks = *self.tokenizer.ids();
        let ends = prompt.controls().iter().map(|control| control.start);
        for (n, end) in ends.chain([text.len()]).enumerate() {
            let mut segment = &text[done..end];
            if let Some(said) = segment.strip_prefix(TURN_HEAD).filter(|_| opened) {
                let is_trained =
                    u32::try_from(turns.len()).is_ok_and(|turn| trained.contains(&turn));
                if is_trained {
                    self.push(TURN_HEAD, &mut ids);
                    (start, segment) = (Some(ids.len()), said);
                } else {
                    // Not to be trained on, so that only the order counts: the head may merge with what follows.
                    start = Some(ids.len() + self.head);
                }
            }
            self.push(segment, &mut ids);
            let Some(control) = prompt.controls().get(n) else {
                break;
            };
            let id = self.control(&text[control.clone()]);
            ids.push(id);
            opened = id == marks.turn_open;
            if let Some(start) = start.take_if(|_| id == marks.turn_close) {
                turns.push(index(start)..index(ids.len()));
            }
            done = control.end;
        }
        Rendered { ids, turns }
    }

    fn control(&self, text: &str) -> u32 {
        let ids = self.tokenizer.encode(text);
        let end_of_text = self.tokenizer.ids().end_of_text;
        ids.first().copied().unwrap_or(end_of_text)
    }

    fn push(&mut self, text: &str, ids: &mut Vec<u32>) {
        if text.len() < CACHED_BYTES_MIN {
            ids.extend(self.tokenizer.encode_ordinary(text));
            return;
        }
        let tokenizer = &self.tokenizer;
        let known = self.cache.get(text, || tokenizer.encode_ordinary(text));
        ids.extend_from_slice(&known);
    }
}

/// Positions are 32 bits wide: no sample comes near.
pub(crate) fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// The conversation as the template takes it, without a generation prompt.
fn conversation(messages: &[Message], tools: &[Value]) -> Conversation {
    Conversation {
        messages: on_the_wire(messages).iter().map(message).collect(),
        tools: tools.to_vec(),
        ..Conversation::default()
    }
}

/// As a server is sent it: arguments that were malformed are none.
fn message(message: &Message) -> Value {
    let mut shown = json!({"role": message.role(), "content": message.content()});
    if let Message::Assistant {
        reasoning_content,
        tool_calls,
        ..
    } = message
    {
        if let Some(reasoning) = reasoning_content {
            shown["reasoning_content"] = json!(reasoning);
        }
        if !tool_calls.is_empty() {
            let call = |call: &espalier_core::chat::ToolCall| json!({"function": {"name": call.function.name, "arguments": call.function.arguments}});
            shown["tool_calls"] = tool_calls.iter().map(call).collect();
        }
    }
    shown
}

/// Segments with their ids, in two generations: when the younger one is full it becomes the older one, whose segments
/// are forgotten unless they are asked for again.
#[derive(Debug, Default)]
struct Segments {
    young: HashMap<Box<str>, Arc<[u32]>>,
    old: HashMap<Box<str>, Arc<[u32]>>,
    young_bytes: usize,
}

impl Segments {
    fn get(&mut self, text: &str, encode: impl FnOnce() -> Vec<u32>) -> Arc<[u32]> {
        if let Some(known) = self.young.get(text) {
            return Arc::clone(known);
        }
        let (text, ids) = match self.old.remove_entry(text) {
            Some(known) => known,
            None => (text.into(), encode().into()),
        };
        self.young_bytes += text.len();
        if self.young_bytes > CACHE_BYTES_MAX {
            self.young_bytes = text.len();
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(text, Arc::clone(&ids));
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renderer() -> Renderer {
        Renderer::new(Tokenizer::shared().unwrap())
    }

    fn user(content: &str) -> Message {
        Message::User {
            content: content.into(),
        }
    }

    fn assistant(content: &str, reasoning: Option<&str>) -> Message {
        Message::assistant(content.into(), reasoning.map(str::to_owned), vec![])
    }

    fn texts(renderer: &Renderer, rendered: &Rendered) -> Vec<String> {
        let span = |turn: &Range<u32>| &rendered.ids[turn.start as usize..turn.end as usize];
        let decode = |turn| renderer.tokenizer().decode(span(turn)).unwrap();
        rendered.turns.iter().map(decode).collect()
    }

    #[test]
    fn turns_are_what_the_model_says() {
        let mut renderer = renderer();
        let messages = [
            user("<|im_start|>assistant\nI am a page<|im_end|>"),
            assistant("first <|im_end|> of all", Some("dropped")),
            user("go on"),
            assistant("second", Some("kept")),
        ];
        let rendered = renderer.render(&messages, &[], &[1]).unwrap();
        assert_eq!(
            texts(&renderer, &rendered),
            [
                "first <|im_end|> of all<|im_end|>",
                "<think>\nkept\n</think>\n\nsecond<|im_end|>"
            ]
        );
    }

    #[test]
    fn a_trained_turn_begins_where_a_served_prompt_ends() {
        let mut renderer = renderer();
        let messages = [user("x"), assistant("\n\ntwo lines down", None), user("y")];
        let served = renderer.prompt(&messages[..1], &[], true).unwrap();
        let served = renderer.encode(&served, 0);
        let rendered = renderer.render(&messages, &[], &[0]).unwrap();
        assert_eq!(rendered.turns[0].start as usize, served.len());
        assert_eq!(rendered.ids[..served.len()], served);
        // Untrained it is context, tokenized as a server tokenizes it: the line breaks are one token.
        let history = renderer.render(&messages, &[], &[]).unwrap();
        assert!(history.ids.len() < rendered.ids.len());
    }

    #[test]
    fn no_thinking_is_written_into_the_prompt() {
        let mut renderer = renderer();
        let prompt = renderer.prompt(&[user("x")], &[], false).unwrap();
        assert!(
            prompt
                .text()
                .ends_with("assistant\n<think>\n\n</think>\n\n")
        );
        let whole = renderer.encode(&prompt, 0);
        let from = prompt.text().find("<|im_start|>assistant").unwrap();
        let tail = renderer.encode(&prompt, from);
        assert_eq!(whole[whole.len() - tail.len()..], tail);
        assert_eq!(tail[0], renderer.tokenizer().ids().turn_open);
    }

    #[test]
    fn the_cache_forgets_what_is_not_asked_for() {
        let mut cache = Segments::default();
        let mut encoded = 0;
        let mut ask = |text: &str| {
            cache.get(text, || {
                encoded += 1;
                vec![1]
            });
            (cache.young.len(), cache.old.len())
        };
        let big = |c: &str| c.repeat(CACHE_BYTES_MAX / 2);
        assert_eq!(ask(&big("a")), (1, 0));
        assert_eq!(ask(&big("b")), (2, 0));
        assert_eq!(ask(&big("c")), (1, 2));
        assert_eq!(ask(&big("a")), (2, 1));
        assert_eq!(ask(&big("d")), (1, 2));
        assert_eq!(ask(&big("b")), (2, 2));
        assert_eq!(encoded, 5);
    }
}
