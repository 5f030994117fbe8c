//! The chat template: messages and tools to the text that the model reads.
//!
//! [`ChatTemplate::render`] gives the text that transformers' `apply_chat_template` gives, byte for byte, or an error
//! where transformers has one. [`ChatTemplate::prompt`] also knows which control texts the template wrote itself: a
//! page that spells `<|im_start|>` must not open a turn. What becomes of the text is the tokenizer's
//! ([`Tokenizer::encode_prompt`](crate::Tokenizer::encode_prompt)).
//!
//! What it is not: it does not check messages for what an API allows, and it mends nothing unless it is asked to
//! ([`Conversation::mend`]).

mod marks;
mod mend;
mod python;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde_json::Map;

pub use mend::Mended;

/// Qwen3's original template; see `assets/README.md`.
const QWEN3: &str = include_str!("../../assets/chat_template.jinja");

/// SHA-256 of [`ChatTemplate::qwen3`]'s source in hexadecimal: names the template in what is made with it.
pub const CHAT_TEMPLATE_SHA256: &str =
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5";

/// Names that a message's reasoning has; transformers takes the first that is not null as `reasoning_content`.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A template, parsed. Rendering takes `&self`, so that one serves all requests.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// What a template renders. Messages and tools have the form that chat completions give them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role` and `content`; fields that are null count as absent.
    pub messages: Vec<serde_json::Value>,
    /// JSON descriptions, in the order in which the model is to see them.
    pub tools: Vec<serde_json::Value>,
    /// Whether the text ends where the assistant's turn begins.
    pub add_generation_prompt: bool,
    /// `None` leaves the choice to the template.
    pub enable_thinking: Option<bool>,
    /// More variables of the template (`chat_template_kwargs`); the fields above come before them.
    pub kwargs: Map<String, serde_json::Value>,
}

/// A rendered conversation that knows its control texts from those that its content spells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    /// Byte ranges of the control texts that the template wrote, in order.
    controls: Vec<Range<usize>>,
}

impl Prompt {
    /// What the model reads; equal to what [`ChatTemplate::render`] gives.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where the template's own control texts are, in order, in bytes.
    pub fn controls(&self) -> &[Range<usize>] {
        &self.controls
    }

    /// What stands behind `before`; none where this does not begin with it, control texts and all.
    pub fn after(&self, before: &Self) -> Option<Self> {
        let text = self.text.strip_prefix(&before.text)?;
        let (known, controls) = self.controls.split_at_checked(before.controls.len())?;
        let start = before.text.len();
        let is_behind = controls.first().is_none_or(|it| it.start >= start);
        let shifted = controls.iter().map(|it| it.start - start..it.end - start);
        (known == before.controls && is_behind).then(|| Self {
            text: text.to_owned(),
            controls: shifted.collect(),
        })
    }
}

/// Why a template, or a conversation in it, was refused.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The text is no template.
    #[error("chat template does not parse")]
    Parse(#[source] minijinja::Error),
    /// The template has no meaning for this conversation (Qwen3's has none for content that is not text).
    #[error("chat template cannot render the conversation")]
    Render(#[source] minijinja::Error),
    /// The template calls the conversation wrong.
    #[error("chat template refuses the conversation: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// Control texts of the template cannot be told from content: the template composes them, or compares with them,
    /// in a way that marks do not survive. [`ChatTemplate::render`] still works.
    #[error("chat template's own `{control}` cannot be told from content")]
    Unmarked {
        /// The first control text that is concerned.
        control: &'static str,
    },
}

impl ChatTemplate {
    /// Qwen3's original template, which all its sizes share.
    pub fn qwen3() -> &'static Self {
        static QWEN3_PARSED: LazyLock<ChatTemplate> =
            LazyLock::new(|| match ChatTemplate::parse(QWEN3) {
                Ok(template) => template,
                Err(error) => unreachable!("the embedded template parses, a test says: {error}"),
            });
        &QWEN3_PARSED
    }

    /// A template from a model folder: `chat_template.jinja`, or the string of that name in `tokenizer_config.json`.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::write_value);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", raise_exception);
        let marked = marks::mark_source(source);
        for (name, source) in [("plain", source.to_owned()), ("marked", marked)] {
            let added = environment.add_template_owned(name, source);
            added.map_err(TemplateError::Parse)?;
        }
        Ok(Self { environment })
    }

    /// The text, for people and for encoding as transformers does.
    pub fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        self.render_as("plain", &variables(conversation))
    }

    /// The text, and which control texts in it are the template's.
    ///
    /// The template is rendered twice, as it is and with a mark before each control text that it writes, and both must
    /// agree: so a template whose decisions depend on its own marks is found out.
    pub fn prompt(&self, conversation: &Conversation) -> Result<Prompt, TemplateError> {
        let variables = variables(conversation);
        let text = self.render_as("plain", &variables)?;
        let marked = self.render_as("marked", &variables)?;
        let controls =
            marks::align(&text, &marked).map_err(|control| TemplateError::Unmarked { control })?;
        // Content may spell one a million times: each is looked for once.
        let spelled: BTreeSet<_> = marks::outside(&text, &controls).collect();
        for control in spelled {
            // Content that spells it explains it; otherwise the template made it where no mark was put.
            if !conversation.spells(control) {
                return Err(TemplateError::Unmarked { control });
            }
        }
        Ok(Prompt { text, controls })
    }

    fn render_as(&self, name: &str, variables: &Value) -> Result<String, TemplateError> {
        let template = self.environment.get_template(name);
        let rendered = template.and_then(|template| template.render(variables.clone()));
        rendered.map_err(|error| match raised(&error) {
            Some(message) => TemplateError::Refused { message },
            None => TemplateError::Render(error),
        })
    }
}

impl Conversation {
    /// Whether any text of the conversation, keys included, holds `control`.
    fn spells(&self, control: &str) -> bool {
        let mut values = self.messages.iter().chain(&self.tools);
        values.any(|value| spells(value, control))
            || self.kwargs.values().any(|value| spells(value, control))
    }
}

fn spells(value: &serde_json::Value, control: &str) -> bool {
    match value {
        serde_json::Value::String(text) => text.contains(control),
        serde_json::Value::Array(items) => items.iter().any(|item| spells(item, control)),
        serde_json::Value::Object(fields) => fields
            .iter()
            .any(|(key, value)| key.contains(control) || spells(value, control)),
        _ => false,
    }
}

/// As transformers sets Jinja up.
fn syntax() -> SyntaxConfig {
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    syntax.build().unwrap_or_default()
}

fn variables(conversation: &Conversation) -> Value {
    let kwargs = conversation.kwargs.iter();
    let kwargs = kwargs.map(|(name, value)| (name.clone(), Value::from(Serde(value))));
    let messages: Vec<Value> = conversation.messages.iter().map(message).collect();
    let mut variables: Vec<(String, Value)> = kwargs.collect();
    variables.push(("messages".to_owned(), Value::from(messages)));
    let generation = Value::from(conversation.add_generation_prompt);
    variables.push(("add_generation_prompt".to_owned(), generation));
    if let Some(enabled) = conversation.enable_thinking {
        variables.push(("enable_thinking".to_owned(), Value::from(enabled)));
    }
    // Left undefined where there are none: templates ask `is defined` too.
    if !conversation.tools.is_empty() {
        let tools = Value::from(Serde(&conversation.tools));
        variables.push(("tools".to_owned(), tools));
    }
    Value::from_pairs(variables)
}

/// A message as transformers shows it to the template: without nulls, its reasoning under the usual name.
fn message(message: &serde_json::Value) -> Value {
    let Some(fields) = message.as_object() else {
        return Value::from(Serde(message));
    };
    let shown = fields.iter().filter(|(_, value)| !value.is_null());
    let shown = shown.map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
    let named = |name: &&&str| fields.get(**name).is_some_and(|value| !value.is_null());
    let Some(reasoning) = REASONING_FIELDS.iter().find(named) else {
        return Value::from_pairs(shown);
    };
    let reasoning = Value::from(Serde(&fields[*reasoning]));
    // Of equal names the first has the place, the last the value.
    let first = ("thinking", reasoning.clone());
    let last = (REASONING_FIELDS[0], reasoning);
    Value::from_pairs(std::iter::once(first).chain(shown).chain([last]))
}

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Raised(message)))
}

fn raised(error: &minijinja::Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests;
