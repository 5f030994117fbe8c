//! The body of `POST /v1/chat/completions`, checked.

use serde_json::{Value, json};

use super::backend::{Backend, Conversation, Sampling};
use super::completion::bytes_of;
use super::conversation::{self, Tool};
use super::error::ApiError;
use super::fields::Fields;
use super::format::{self, Format};
use super::options::{Options, chat_logprobs};
use super::unserved;
use crate::grammar::{CallGrammar, Grammar};

/// A request for the next turn of an assistant.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ChatRequest {
    pub(super) options: Options,
    pub(super) prompt: ChatPrompt,
    pub(super) calls: Calls,
    /// What binds the answer.
    pub(super) grammar: Option<Grammar>,
    /// The field that asked for it.
    pub(super) grammar_field: &'static str,
    /// The turn that the answer is to be, whatever the model would say.
    pub(super) forced: Option<Value>,
    /// Names of fields that mean nothing here.
    pub(super) ignored: String,
}

/// What the model is to go on from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ChatPrompt {
    /// Goes through the template.
    Conversation(Conversation),
    /// The exact ids, as an earlier answer told them.
    Ids(Vec<u32>),
}

impl ChatPrompt {
    /// What the conversation begins with, which is the same in all of its turns: up to the first message of a user.
    pub(super) fn opening(&self, backend: &dyn Backend) -> Vec<u8> {
        match self {
            Self::Conversation(Conversation { messages, .. }) => {
                let first = messages.iter().position(|it| it["role"] == "user");
                let opening = messages
                    .iter()
                    .take(first.map_or(messages.len(), |at| at + 1));
                opening
                    .map(|message| format!("{message}\n"))
                    .collect::<String>()
                    .into_bytes()
            }
            Self::Ids(ids) => bytes_of(backend.opening(ids)),
        }
    }
}

/// What the answer may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// There are no tools: what looks like a call is content.
    Unknown,
    /// There are tools, and none may be called.
    Forbidden,
    /// One, then the answer ends.
    One,
    /// Any number.
    Several,
}

/// `tool_choice`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

impl ChatRequest {
    pub(super) fn parse(
        body: &[u8],
        defaults: &Sampling,
        vocabulary: u32,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut options = Options::take(&mut fields, defaults, vocabulary)?;
        options.sampling.logprobs = chat_logprobs(&mut fields)?;
        let tools = conversation::tools(fields.list("tools")?.unwrap_or_default())?;
        let choice = tool_choice(&mut fields, &tools)?;
        let several = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        let format = format::take(&mut fields)?;
        let grammar_field = format.as_ref().map_or("tools", |format| format.field);
        let grammar = grammar(&tools, &choice, several, format)?;
        let calls = match (&choice, several) {
            _ if tools.is_empty() => Calls::Unknown,
            (Choice::None, _) => Calls::Forbidden,
            (Choice::Named(_), _) | (_, false) => Calls::One,
            (_, true) => Calls::Several,
        };
        let prompt = prompt(&mut fields, tools, vocabulary)?;
        let forced = forced(&mut fields, &prompt, grammar.is_some(), options.n)?;
        unserved::refuse(&mut fields)?;
        Ok(Self {
            options,
            prompt,
            calls,
            grammar,
            grammar_field,
            forced,
            ignored: fields.ignored(),
        })
    }
}

/// `forced_message`: a turn whose likelihood is asked for, as it would stand after the messages.
fn forced(
    fields: &mut Fields,
    prompt: &ChatPrompt,
    is_bound: bool,
    n: usize,
) -> Result<Option<Value>, ApiError> {
    let at = fields.path("forced_message");
    let Some(turn) = fields.take("forced_message") else {
        return Ok(None);
    };
    let refuse = |rule: &str| {
        let message = format!("`{at}` must be absent where {rule}");
        Err(ApiError::about(&*at, message))
    };
    match prompt {
        ChatPrompt::Ids(_) => refuse("`prompt_token_ids` is given"),
        _ if is_bound => refuse("a field asks for a form or forces a call"),
        _ if n > 1 => refuse("`n` is above 1"),
        ChatPrompt::Conversation(_) => conversation::turn(turn, &at).map(Some),
    }
}

fn prompt(fields: &mut Fields, tools: Vec<Tool>, vocabulary: u32) -> Result<ChatPrompt, ApiError> {
    let (enable_thinking, kwargs) = template_kwargs(fields)?;
    let messages = fields.list("messages")?;
    if let Some(ids) = fields.ids("prompt_token_ids", vocabulary)? {
        if ids.is_empty() {
            let rule = "must have at least one id";
            return Err(ApiError::field("prompt_token_ids", rule, &json!([])));
        }
        return Ok(ChatPrompt::Ids(ids));
    }
    let messages = messages.unwrap_or_default();
    Ok(ChatPrompt::Conversation(Conversation {
        messages: conversation::messages(messages)?,
        tools: tools.into_iter().map(|tool| tool.shown).collect(),
        enable_thinking,
        kwargs,
    }))
}

type Kwargs = serde_json::Map<String, Value>;

fn template_kwargs(fields: &mut Fields) -> Result<(Option<bool>, Kwargs), ApiError> {
    match fields.object("chat_template_kwargs")? {
        Some(mut kwargs) => Ok((kwargs.flag("enable_thinking")?, kwargs.into_rest())),
        None => Ok((None, Kwargs::new())),
    }
}

fn tool_choice(fields: &mut Fields, tools: &[Tool]) -> Result<Choice, ApiError> {
    let rule = "must be none, auto, required, or an object that names a function";
    let choice = match fields.take("tool_choice") {
        None => return Ok(Choice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Choice::None,
            "auto" => Choice::Auto,
            "required" => Choice::Required,
            _ => return Err(ApiError::field("tool_choice", rule, &json!(word))),
        },
        Some(object @ Value::Object(_)) => {
            let name = object.pointer("/function/name").and_then(Value::as_str);
            match name {
                Some(name) => Choice::Named(name.to_owned()),
                None => return Err(ApiError::field("tool_choice", rule, &object)),
            }
        }
        Some(other) => return Err(ApiError::field("tool_choice", rule, &other)),
    };
    match &choice {
        Choice::Required if tools.is_empty() => Err(ApiError::field(
            "tool_choice",
            "needs `tools`",
            &json!("required"),
        )),
        Choice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            Err(ApiError::field(
                "tool_choice.function.name",
                "must be one of `tools`",
                &json!(name),
            ))
        }
        _ => Ok(choice),
    }
}

fn grammar(
    tools: &[Tool],
    choice: &Choice,
    several: bool,
    format: Option<Format>,
) -> Result<Option<Grammar>, ApiError> {
    let calls = |named: Option<&str>| {
        let chosen = tools
            .iter()
            .filter(|tool| named.is_none_or(|name| tool.name == name));
        let call = |tool: &Tool| CallGrammar {
            name: tool.name.clone(),
            arguments: tool.parameters.clone(),
        };
        chosen.map(call).collect::<Vec<_>>()
    };
    let forced = matches!(choice, Choice::Required | Choice::Named(_));
    Ok(match (choice, format) {
        (_, Some(Format { field, .. })) if forced => {
            let message =
                format!("`{field}` must not ask for a form where `tool_choice` forces a call");
            return Err(ApiError::about(field, message));
        }
        (Choice::Named(name), None) => Some(Grammar::Calls {
            calls: calls(Some(name)),
            several: false,
        }),
        (Choice::Required, None) => Some(Grammar::Calls {
            calls: calls(None),
            several,
        }),
        (Choice::Auto, Some(Format { schema, .. })) if !tools.is_empty() => {
            Some(Grammar::JsonOrCalls {
                schema,
                calls: calls(None),
                several,
            })
        }
        (_, Some(Format { schema, .. })) => Some(Grammar::Json { schema }),
        (_, None) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::options::tests::defaults;
    use super::*;

    fn read(more: &Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        ChatRequest::parse(body.to_string().as_bytes(), &defaults(), 1_000)
    }

    fn tools() -> Value {
        json!([{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}])
    }

    #[test]
    fn tool_choice_decides_what_binds_the_answer() {
        let with = |choice: Value| read(&json!({"tools": tools(), "tool_choice": choice})).unwrap();
        assert_eq!(
            (with(json!("auto")).calls, with(json!("auto")).grammar),
            (Calls::Several, None)
        );
        assert_eq!(
            (with(json!("none")).calls, with(json!("none")).grammar),
            (Calls::Forbidden, None)
        );
        let Some(Grammar::Calls { calls, several }) = with(json!("required")).grammar else {
            panic!("no grammar")
        };
        assert_eq!((calls.len(), several), (2, true));
        let named = with(json!({"type": "function", "function": {"name": "g"}}));
        let Some(Grammar::Calls { calls, several }) = named.grammar else {
            panic!("no grammar")
        };
        assert_eq!((&*calls[0].name, calls.len(), several), ("g", 1, false));
        assert_eq!(named.calls, Calls::One);
        let single = read(&json!({"tools": tools(), "parallel_tool_calls": false})).unwrap();
        assert_eq!(single.calls, Calls::One);
        assert_eq!(read(&json!({})).unwrap().calls, Calls::Unknown);
    }

    #[test]
    fn a_form_is_a_grammar() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let alone = read(&json!({"response_format": format})).unwrap();
        assert_eq!(alone.grammar, Some(Grammar::Json { schema }));
        let both = read(&json!({"response_format": format, "tools": tools()})).unwrap();
        assert!(matches!(both.grammar, Some(Grammar::JsonOrCalls { .. })));
    }

    #[test]
    fn ids_take_the_place_of_messages() {
        let request = read(&json!({"prompt_token_ids": [1, 2], "messages": []})).unwrap();
        assert_eq!(request.prompt, ChatPrompt::Ids(vec![1, 2]));
        let request =
            read(&json!({"chat_template_kwargs": {"enable_thinking": false, "x": 1}})).unwrap();
        let ChatPrompt::Conversation(conversation) = request.prompt else {
            panic!("ids")
        };
        assert_eq!(conversation.enable_thinking, Some(false));
        assert_eq!(json!(conversation.kwargs), json!({"x": 1}));
    }

    #[test]
    fn contradictions_and_wrong_forms_are_refused_by_name() {
        for (more, param) in [
            (json!({"messages": null}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"tools": {}}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": tools(), "tool_choice": "any"}),
                "tool_choice",
            ),
            (
                json!({"tools": tools(), "tool_choice": {"type": "function"}}),
                "tool_choice",
            ),
            (
                json!({"tools": tools(), "tool_choice": {"function": {"name": "h"}}}),
                "tool_choice.function.name",
            ),
            (
                json!({"tools": tools(), "tool_choice": "required", "guided_json": {}}),
                "guided_json",
            ),
            (json!({"min_tokens": 1}), "min_tokens"),
            (
                json!({"tools": tools(), "tool_choice": "required", "response_format": {"type": "json_object"}}),
                "response_format",
            ),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (
                json!({"logprobs": true, "top_logprobs": 21}),
                "top_logprobs",
            ),
            (json!({"prompt_token_ids": []}), "prompt_token_ids"),
            (json!({"prompt_token_ids": [1000]}), "prompt_token_ids[0]"),
            (
                json!({"chat_template_kwargs": {"enable_thinking": "no"}}),
                "chat_template_kwargs.enable_thinking",
            ),
        ] {
            let error = read(&more).unwrap_err();
            assert_eq!(error.param(), Some(param), "{more}: {error}");
        }
    }

    #[test]
    fn a_turn_may_be_forced() {
        let turn = json!({"role": "assistant", "content": "five"});
        let forced = read(&json!({"forced_message": turn})).unwrap().forced;
        assert_eq!(forced, Some(turn.clone()));
        assert_eq!(read(&json!({})).unwrap().forced, None);
        for (more, param) in [
            (json!({"forced_message": "five"}), "forced_message"),
            (
                json!({"forced_message": {"role": "user", "content": "x"}}),
                "forced_message.role",
            ),
            (json!({"forced_message": turn, "n": 2}), "forced_message"),
            (
                json!({"forced_message": turn, "prompt_token_ids": [1]}),
                "forced_message",
            ),
            (
                json!({"forced_message": turn, "guided_json": {"type": "object"}}),
                "forced_message",
            ),
        ] {
            let error = read(&more).unwrap_err();
            assert_eq!(error.param(), Some(param), "{more}: {error}");
        }
    }

    #[test]
    fn unknown_fields_are_told() {
        assert_eq!(read(&json!({"user": "u"})).unwrap().ignored, "user");
    }
}
