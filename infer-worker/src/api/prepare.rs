//! From a body to answers that run: parse, render and encode off the async threads, then submit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::time::Timestamp;
use espalier_runtime::tasks;
use serde_json::{Value, json};

use super::App;
use super::answers::{Answers, Told};
use super::backend::{Backend, Form, Generation, Priority, Rendered, Target};
use super::chat::{Calls, ChatPrompt, ChatRequest};
use super::choice::Choice;
use super::completion::{CompletionRequest, TextPrompt};
use super::error::ApiError;
use super::format::Format;
use super::limits;
use super::observe::Observed;
use super::options::Options;
use super::patience::{OFFLINE_SILENCE_MAX, SILENCE_MAX};
use super::reply::{Dialect, Head};
use crate::grammar::{Constraint, Exactly, Grammar, GrammarError, Thoughts};

/// Keeps an id from being drawn, whatever its logit is.
const NEVER: f32 = -1e9;

/// Text of so many bytes is encoded within some hundreds of microseconds.
const QUICK_BYTES_MAX: usize = 2 << 10;
/// What fields begin with whose grammars are compiled, and what hides letters of a name.
const COMPILED: [&str; 5] = [
    "response_format",
    "structured_outputs",
    "guided_",
    "tool",
    "\\u",
];

/// A request that is ready for the engine.
pub(super) struct Prepared {
    dialect: Dialect,
    options: Options,
    target: Target,
    prompts: Vec<Rendered>,
    calls: Calls,
    /// One for each answer.
    constraints: Vec<Option<Box<dyn Constraint>>>,
    context_tokens: usize,
    silence_max: Duration,
    pub(super) stream: bool,
    pub(super) ignored: String,
}

impl Prepared {
    /// What the request calls the model that answers it, and what the answer calls it.
    pub(super) fn model(&self) -> (&str, &str) {
        (&self.target.name, &self.target.called)
    }

    /// The same with all its answers as parts of a batch: they yield, and may be silent for long.
    pub(super) fn offline(mut self) -> Self {
        self.options.priority = Priority::Batch;
        self.silence_max = OFFLINE_SILENCE_MAX;
        self
    }
}

impl App {
    /// Everything that computes.
    pub(super) async fn prepare(
        &self,
        body: Bytes,
        dialect: Dialect,
    ) -> Result<Prepared, ApiError> {
        let place = Arc::clone(&self.preparing).acquire_owned();
        let place = tasks::with_deadline("api.prepare", limits::PREPARE_WAIT_MAX, place).await;
        let Ok(Ok(place)) = place else {
            return Err(ApiError::full(Duration::from_secs(1)));
        };
        let (backend, logprobs_max) = (Arc::clone(&self.backend), self.logprobs_max);
        let is_quick = is_quick(&body);
        let work = move || {
            // The place is held by the work, not by who waits for it: a client that goes does not make room for more.
            let _place = place;
            match dialect {
                Dialect::Chat => prepare_chat(&*backend, &body, logprobs_max),
                Dialect::Completion => prepare_completion(&*backend, &body, logprobs_max),
            }
        };
        let prepared = match is_quick {
            true => tasks::here("api.prepare", work),
            false => tasks::blocking("api.prepare", work).await,
        };
        prepared.unwrap_or_else(|error| {
            tracing::error!(error = %error, "a request could not be prepared");
            Err(ApiError::internal())
        })
    }

    /// Starts all answers.
    pub(super) async fn submit(
        &self,
        prepared: Prepared,
        began: Instant,
        observed: Observed,
    ) -> Result<Answers, ApiError> {
        let name = self.ids.fresh();
        let random = self.seeds.next();
        let options = prepared.options;
        let param = match prepared.dialect {
            Dialect::Chat => "messages",
            Dialect::Completion => "prompt",
        };
        let shared: Vec<Arc<[u32]>> = prepared
            .prompts
            .iter()
            .map(|prompt| prompt.ids.as_slice().into())
            .collect();
        let (mut generations, mut choices) = (Vec::new(), Vec::new());
        for (i, constraint) in prepared.constraints.into_iter().enumerate() {
            let prompt = &prepared.prompts[i / options.n];
            let room = prepared.context_tokens - prompt.ids.len();
            let mut sampling = options.sampling.clone();
            sampling.seed = options.seed_of(i, random);
            if prepared.calls == Calls::Forbidden {
                sampling.bias.push((self.backend.call_open(), NEVER));
            }
            generations.push(Generation {
                prompt: Arc::clone(&shared[i / options.n]),
                target: prepared.target.clone(),
                sampling,
                tokens_max: options.tokens_within(room),
                stop_ids: options.stop_ids.clone(),
                ignore_eos: options.ignore_eos,
                priority: options.priority,
                constraint,
            });
            let form = form(prepared.dialect, prepared.calls, prompt.thoughts);
            let parser = self.backend.parser(form);
            let one_call = prepared.calls == Calls::One;
            choices.push(Choice::new(parser, &options.stops, one_call));
        }
        let submitted = self.backend.submit(generations).await;
        let events = submitted.map_err(|error| ApiError::submit(error, param))?;
        let started = choices.into_iter().zip(events).collect();
        let prefix = match prepared.dialect {
            Dialect::Chat => "chatcmpl",
            Dialect::Completion => "cmpl",
        };
        let head = Head {
            dialect: prepared.dialect,
            id: format!("{prefix}-{name}"),
            created_s: self.clock.now().since(Timestamp::default()).as_secs(),
            model: prepared.target.called,
            adapter_digest: prepared.target.digest,
            logprobs: options.sampling.logprobs.is_some(),
            return_token_ids: options.return_token_ids,
            prompts: prepared
                .prompts
                .into_iter()
                .map(|prompt| prompt.ids)
                .collect(),
            n: options.n,
        };
        observed.answered_as(&head.id);
        let told = Told {
            metrics: Arc::clone(&self.metrics),
            observed,
            began,
        };
        let backend = Arc::clone(&self.backend);
        let mut answers = Answers::new(head, options.include_usage, backend, told, started);
        answers.silence_max = prepared.silence_max;
        Ok(answers)
    }
}

/// Whether to prepare a body takes less than to wake another thread: it is short, and names nothing to compile.
fn is_quick(body: &[u8]) -> bool {
    let compiles = |text: &str| COMPILED.iter().any(|field| text.contains(field));
    body.len() <= QUICK_BYTES_MAX && std::str::from_utf8(body).is_ok_and(|text| !compiles(text))
}

fn form(dialect: Dialect, calls: Calls, thoughts: Thoughts) -> Form {
    match dialect {
        Dialect::Completion => Form::Plain,
        Dialect::Chat => Form::Chat {
            thoughts,
            tools: matches!(calls, Calls::One | Calls::Several),
        },
    }
}

fn prepare_chat(
    backend: &dyn Backend,
    body: &[u8],
    logprobs_max: usize,
) -> Result<Prepared, ApiError> {
    let request = ChatRequest::parse(body, &backend.defaults(), backend.vocabulary())?;
    let opening = || request.prompt.opening(backend);
    let target = target(backend, &request.options, &opening)?;
    let (prompt, param) = rendered(backend, &request)?;
    let context_tokens = backend.context_tokens();
    check_length(&prompt, context_tokens, param)?;
    let room = context_tokens - prompt.ids.len();
    let mut options = request.options;
    let constraints = match forced(backend, &request.prompt, request.forced.as_ref(), room)? {
        Some(ids) => {
            options.tokens_max = Some(ids.len());
            vec![Some(Box::new(Exactly::new(ids)) as Box<dyn Constraint>)]
        }
        None => {
            let bound = request.grammar.map(|it| (it, request.grammar_field));
            constraints(backend, bound, prompt.thoughts, options.n)?
        }
    };
    options.check_logprobs(std::iter::once(room), "top_logprobs", logprobs_max)?;
    Ok(Prepared {
        dialect: Dialect::Chat,
        stream: options.stream,
        options,
        target,
        prompts: vec![prompt],
        calls: request.calls,
        constraints,
        context_tokens,
        silence_max: SILENCE_MAX,
        ignored: request.ignored,
    })
}

/// The prompt of a chat, and the field that it came from.
fn rendered(
    backend: &dyn Backend,
    request: &ChatRequest,
) -> Result<(Rendered, &'static str), ApiError> {
    match &request.prompt {
        ChatPrompt::Ids(ids) => Ok((backend.rendered(ids.clone()), "prompt_token_ids")),
        ChatPrompt::Conversation(conversation) => {
            let rendered = backend.render(conversation);
            let rendered =
                rendered.map_err(|error| ApiError::about("messages", error.to_string()))?;
            Ok((rendered, "messages"))
        }
    }
}

/// The ids of the turn that the answer is to be, if there is such a turn. It must fit into `room`.
fn forced(
    backend: &dyn Backend,
    prompt: &ChatPrompt,
    turn: Option<&Value>,
    room: usize,
) -> Result<Option<Vec<u32>>, ApiError> {
    let (ChatPrompt::Conversation(conversation), Some(turn)) = (prompt, turn) else {
        return Ok(None);
    };
    let field = "forced_message";
    let ids = backend.turn(conversation, turn);
    let ids = ids.map_err(|error| ApiError::about(field, format!("`{field}`: {error}")))?;
    let got = ids.len();
    if got == 0 {
        let rule = "must have at least one token";
        return Err(ApiError::field(field, rule, turn));
    }
    if got > room {
        let message = format!(
            "`{field}` must have at most {room} tokens, which the prompt leaves, got {got}"
        );
        return Err(ApiError::context_length(field, message));
    }
    Ok(Some(ids))
}

fn prepare_completion(
    backend: &dyn Backend,
    body: &[u8],
    logprobs_max: usize,
) -> Result<Prepared, ApiError> {
    let request = CompletionRequest::parse(body, &backend.defaults(), backend.vocabulary())?;
    let opening = || request.opening();
    let target = target(backend, &request.options, &opening)?;
    let context_tokens = backend.context_tokens();
    let rendered = |prompt| {
        let ids = match prompt {
            TextPrompt::Ids(ids) => ids,
            TextPrompt::Text(text) => backend.encode(&text),
        };
        let thoughts = Thoughts::Over;
        let prompt = Rendered { ids, thoughts };
        check_length(&prompt, context_tokens, "prompt").map(|()| prompt)
    };
    let prompts: Vec<Rendered> = request
        .prompts
        .into_iter()
        .map(rendered)
        .collect::<Result<_, _>>()?;
    let rooms = prompts
        .iter()
        .map(|prompt| context_tokens - prompt.ids.len());
    let options = &request.options;
    options.check_logprobs(rooms, "logprobs", logprobs_max)?;
    let bound = request
        .format
        .map(|Format { schema, field }| (Grammar::Json { schema }, field));
    let answers = prompts.len() * request.options.n;
    let constraints = constraints(backend, bound, Thoughts::Over, answers)?;
    Ok(Prepared {
        dialect: Dialect::Completion,
        stream: request.options.stream,
        options: request.options,
        target,
        prompts,
        calls: Calls::Unknown,
        constraints,
        context_tokens,
        silence_max: SILENCE_MAX,
        ignored: request.ignored,
    })
}

/// The model that a request names, or the base model.
fn target(
    backend: &dyn Backend,
    options: &Options,
    opening: &dyn Fn() -> Vec<u8>,
) -> Result<Target, ApiError> {
    let base = || backend.models().first().map(|base| base.name.clone());
    let name = options.model.clone().or_else(base).unwrap_or_default();
    backend
        .target(&name, opening)
        .ok_or_else(|| ApiError::unknown_model(&name))
}

fn check_length(prompt: &Rendered, context_tokens: usize, param: &str) -> Result<(), ApiError> {
    let tokens = prompt.ids.len();
    if tokens == 0 {
        return Err(ApiError::field(
            param,
            "must have at least one token",
            &json!(""),
        ));
    }
    if tokens >= context_tokens {
        return Err(ApiError::prompt_too_long(param, tokens, context_tokens));
    }
    Ok(())
}

/// For each answer the state of the grammar that a field asked for.
fn constraints(
    backend: &dyn Backend,
    bound: Option<(Grammar, &str)>,
    thoughts: Thoughts,
    answers: usize,
) -> Result<Vec<Option<Box<dyn Constraint>>>, ApiError> {
    let constrain = |_| match &bound {
        None => Ok(None),
        Some((grammar, field)) => backend
            .constrain(grammar, thoughts)
            .map(Some)
            .map_err(|error| grammar_refusal(field, error)),
    };
    (0..answers).map(constrain).collect()
}

fn grammar_refusal(field: &str, error: GrammarError) -> ApiError {
    match error {
        GrammarError::Busy => ApiError::full(Duration::from_secs(1)),
        error => ApiError::about(field, format!("`{field}`: {error}")),
    }
}
