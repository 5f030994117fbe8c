//! The bodies of `POST /chat/completions`, as OpenAI defines them and vLLM extends them.
//!
//! What is sent follows one form strictly. What is read is lenient: fields that servers leave out, null or name
//! differently are all accepted here, so that nothing else has to know.

use espalier_core::chat::{Message, ToolCall, ToolDef};
use espalier_core::spec::Sampling;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{ChatRequest, ModelEndpoint};

/// The request's body. Extra fields of the caller fill in what is not there yet, and then what the endpoint asks for.
pub(super) fn request_body(
    request: &ChatRequest<'_>,
    endpoint: &ModelEndpoint,
) -> Result<Vec<u8>, serde_json::Error> {
    let (streaming, extensions) = (endpoint.streaming, endpoint.vllm_extensions);
    let body = Body {
        model: request.model,
        messages: request
            .messages
            .iter()
            .map(|message| WireMessage::new(message, extensions))
            .collect(),
        tools: request.tools,
        tool_choice: (!request.tools.is_empty()).then_some("auto"),
        sampling: WireSampling::new(request.sampling, extensions),
        stream: streaming,
        stream_options: streaming.then_some(StreamOptions {
            include_usage: true,
        }),
    };
    let vllm_extra = request.vllm_extra.iter().filter(|_| extensions);
    let logprobs = ("logprobs".to_owned(), Value::Bool(true));
    let of_endpoint = endpoint.logprobs.then_some((&logprobs.0, &logprobs.1));
    let mut more = request
        .extra
        .iter()
        .chain(vllm_extra)
        .chain(of_endpoint)
        .peekable();
    if more.peek().is_none() {
        return serde_json::to_vec(&body);
    }
    let Value::Object(mut body) = serde_json::to_value(&body)? else {
        unreachable!("a struct serializes to an object");
    };
    for (key, value) in more {
        body.entry(key.clone()).or_insert_with(|| value.clone());
    }
    serde_json::to_vec(&body)
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<WireMessage<'a>>,
    #[serde(skip_serializing_if = "<[ToolDef]>::is_empty")]
    tools: &'a [ToolDef],
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<&'static str>,
    #[serde(flatten)]
    sampling: WireSampling,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct WireSampling {
    temperature: f64,
    top_p: f64,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
}

impl WireSampling {
    fn new(sampling: &Sampling, extensions: bool) -> Self {
        let used = |value: f64| (value != 0.0).then_some(value);
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            max_tokens: sampling.completion_tokens_max,
            presence_penalty: used(sampling.presence_penalty),
            seed: sampling.seed,
            top_k: Some(sampling.top_k).filter(|k| extensions && *k != 0),
            min_p: used(sampling.min_p).filter(|_| extensions),
        }
    }
}

#[derive(Serialize)]
struct WireMessage<'a> {
    role: &'static str,
    /// Never null: Qwen3's own template fails on it.
    content: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WireCall<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<&'a str>,
}

impl<'a> WireMessage<'a> {
    fn new(message: &'a Message, extensions: bool) -> Self {
        let mut wire = Self {
            role: message.role(),
            content: message.content(),
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
        };
        match message {
            Message::Assistant {
                reasoning_content,
                tool_calls,
                ..
            } => {
                wire.reasoning_content = reasoning_content.as_deref().filter(|_| extensions);
                wire.tool_calls = tool_calls.iter().map(WireCall::new).collect();
            }
            Message::Tool { tool_call_id, .. } => wire.tool_call_id = Some(tool_call_id),
            Message::System { .. } | Message::User { .. } => {}
        }
        wire
    }
}

#[derive(Serialize)]
struct WireCall<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    call_type: &'static str,
    function: WireFunction<'a>,
}

#[derive(Serialize)]
struct WireFunction<'a> {
    name: &'a str,
    /// A string that holds JSON. Arguments that were malformed go out as `{}`, because servers parse them again.
    arguments: String,
}

impl<'a> WireCall<'a> {
    fn new(call: &'a ToolCall) -> Self {
        Self {
            id: &call.id,
            call_type: "function",
            function: WireFunction {
                name: &call.function.name,
                arguments: render(&call.function.arguments),
            },
        }
    }
}

fn render(arguments: &Map<String, Value>) -> String {
    // A map with text keys always renders.
    serde_json::to_string(arguments).unwrap_or_else(|_| "{}".to_owned())
}

/// A whole answer or one event of a stream: they differ only in `message` and `delta`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Chunk {
    pub(super) id: Option<String>,
    pub(super) model: Option<String>,
    pub(super) system_fingerprint: Option<String>,
    pub(super) choices: Option<Vec<Choice>>,
    pub(super) usage: Option<WireUsage>,
    /// vLLM, with `return_token_ids`.
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    /// An error inside a stream that began well.
    pub(super) error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Choice {
    pub(super) index: u32,
    #[serde(alias = "message")]
    pub(super) delta: Option<Delta>,
    pub(super) finish_reason: Option<String>,
    /// vLLM, with `return_token_ids`.
    pub(super) token_ids: Option<Vec<u32>>,
    pub(super) logprobs: Option<Logprobs>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Delta {
    pub(super) content: Option<String>,
    pub(super) reasoning_content: Option<String>,
    /// vLLM's newer name of the same.
    pub(super) reasoning: Option<String>,
    pub(super) tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CallDelta {
    pub(super) index: Option<u32>,
    pub(super) id: Option<String>,
    pub(super) function: Option<FunctionDelta>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FunctionDelta {
    pub(super) name: Option<String>,
    /// A string by the standard; some servers send the object itself.
    pub(super) arguments: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Logprobs {
    pub(super) content: Option<Vec<TokenLogprob>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct TokenLogprob {
    pub(super) logprob: f32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WireUsage {
    pub(super) prompt_tokens: Option<u64>,
    pub(super) completion_tokens: Option<u64>,
}
