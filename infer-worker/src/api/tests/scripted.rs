//! A backend whose ids are bytes and a few marks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use serde_json::Value;
use tokio::sync::{Notify, mpsc};

use crate::api::backend::*;
use crate::api::options::tests::defaults;
use crate::grammar::{Constraint, Grammar, GrammarError, Guides, Thoughts, Vocabulary};

const MARKS: [&str; 5] = [
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
];
const END: u32 = 256;
const CALL: (u32, u32) = (257, 258);
const THOUGHT: (u32, u32) = (259, 260);
/// Of every adapter.
pub(super) const ADAPTER_DIGEST: &str =
    "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

static GUIDES: LazyLock<Guides> = LazyLock::new(|| {
    let bytes = (0..=255).map(|byte| vec![byte]);
    let marks = MARKS.iter().map(|mark| mark.as_bytes().to_vec());
    let vocabulary = Vocabulary {
        words: bytes.chain(marks).collect(),
        control: (256..=260).collect(),
        end: END,
        call: CALL,
        thought: THOUGHT,
    };
    Guides::new(vocabulary).unwrap()
});

/// The ids of a text in which marks are ids of their own.
pub(super) fn ids_of(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let mark = MARKS.iter().position(|mark| rest.starts_with(mark));
        let len = match mark {
            Some(mark) => {
                ids.push(END + mark as u32);
                MARKS[mark].len()
            }
            None => {
                ids.extend(rest.bytes().take(c.len_utf8()).map(u32::from));
                c.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    ids
}

pub(super) struct Scripted {
    tasks: Tasks,
    adapters: Mutex<BTreeMap<String, u64>>,
    aborts: Arc<Aborts>,
    /// Lets one answer go on that says `slow`.
    pub(super) go: Arc<Notify>,
    /// How each answer was asked for.
    pub(super) asked: Mutex<Vec<(Target, Sampling, usize)>>,
    /// Whether it makes a step between two looks at it.
    pub(super) goes_on: AtomicBool,
    steps: AtomicU64,
}

/// Answers that were dropped before their end.
#[derive(Default)]
struct Aborts {
    count: AtomicUsize,
    one_more: Notify,
}

impl Default for Scripted {
    fn default() -> Self {
        Self {
            tasks: Tasks::new(Shutdown::new()),
            adapters: Mutex::default(),
            aborts: Arc::default(),
            go: Arc::default(),
            asked: Mutex::default(),
            goes_on: AtomicBool::new(true),
            steps: AtomicU64::new(0),
        }
    }
}

impl Scripted {
    /// Waits until `count` answers were dropped.
    pub(super) async fn aborted(&self, count: usize) {
        let reached = async {
            while self.aborted_count() < count {
                self.aborts.one_more.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), reached)
            .await
            .expect("the answer goes on");
    }

    fn start(&self, generation: Generation) -> Result<Events, SubmitError> {
        let prompt: Vec<u8> = generation.prompt.iter().map(|&id| id as u8).collect();
        let asked = (
            generation.target.clone(),
            generation.sampling.clone(),
            generation.tokens_max,
        );
        self.asked.lock().unwrap().push(asked);
        match &prompt[..] {
            b"full" => {
                return Err(SubmitError::Full {
                    retry_after: Duration::from_millis(1_500),
                });
            }
            b"too many" => {
                return Err(SubmitError::TooMany {
                    answers: 3,
                    limit: 2,
                });
            }
            b"stopped" => return Err(SubmitError::Stopped),
            b"invalid" => {
                return Err(SubmitError::Invalid {
                    reason: "`ids` must be below 261".to_owned(),
                });
            }
            _ => {}
        }
        let (sender, mut receiver) = mpsc::channel(16);
        let aborts = Arc::clone(&self.aborts);
        let go = Arc::clone(&self.go);
        self.tasks
            .spawn("test.generation", OnFailure::Log, async move {
                if !play(generation, sender, go).await {
                    aborts.count.fetch_add(1, Ordering::SeqCst);
                    aborts.one_more.notify_one();
                }
            });
        Ok(stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed())
    }

    pub(super) fn aborted_count(&self) -> usize {
        self.aborts.count.load(Ordering::SeqCst)
    }
}

/// Sends the script as the engine would; says whether somebody listened to the end.
async fn play(generation: Generation, events: mpsc::Sender<Event>, go: Arc<Notify>) -> bool {
    let bytes: Vec<u8> = generation.prompt.iter().map(|&id| id as u8).collect();
    let prompt = String::from_utf8_lossy(&bytes).into_owned();
    let script = prompt.rsplit('\u{1}').next().unwrap_or_default().to_owned();
    let mut constraint = generation.constraint;
    let endless = script == "endless";
    let mut ids = ids_of(&script);
    ids.push(END);
    let mut sent = 0;
    let mut reason = Ended::Stop;
    let script = ids
        .iter()
        .copied()
        .cycle()
        .take(if endless { usize::MAX } else { ids.len() });
    for id in script {
        if prompt.ends_with("slow") && sent == 2 || prompt.ends_with("silent") && sent == 0 {
            go.notified().await;
        }
        if prompt.ends_with("given up") && sent == 2 {
            reason = Ended::Abort;
            break;
        }
        if endless {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let id = if endless { u32::from(b'x') } else { id };
        if let Some(constraint) = &mut constraint {
            let mask = constraint.allowed().unwrap();
            let allowed = |id: u32| {
                mask.get(id as usize / 32)
                    .is_some_and(|word| word >> (id % 32) & 1 == 1)
            };
            if !allowed(id) {
                break;
            }
            constraint.push(id).unwrap();
        }
        if prompt.ends_with("broken") && sent == 2 {
            reason = Ended::Error;
            break;
        }
        let top = (0..generation.sampling.logprobs.unwrap_or(0))
            .map(|i| (u32::from(b'a' + i), f32::NEG_INFINITY));
        let token = Token {
            id,
            logprob: -0.5,
            top: top.collect(),
            ends: id == END,
            cached_tokens: 1 + generation.sampling.seed as usize % 5,
        };
        if events.send(Event::Token(token)).await.is_err() {
            return false;
        }
        sent += 1;
        if id == END {
            break;
        }
        if sent == generation.tokens_max {
            reason = Ended::Length;
            break;
        }
    }
    events.send(Event::Finished { reason }).await.is_ok()
}

#[derive(Default)]
struct ByteParser {
    bytes: Vec<u8>,
    thought: bool,
    call: Option<Vec<u8>>,
    calls: usize,
    tools: bool,
}

impl ByteParser {
    /// The complete characters so far.
    fn text(&mut self) -> Vec<Delta> {
        let end = match std::str::from_utf8(&self.bytes) {
            Ok(_) => self.bytes.len(),
            Err(error) => error.valid_up_to(),
        };
        let text: Vec<u8> = self.bytes.drain(..end).collect();
        let text = String::from_utf8(text).unwrap();
        match (text.is_empty(), self.thought) {
            (true, _) => vec![],
            (false, true) => vec![Delta::Reasoning(text)],
            (false, false) => vec![Delta::Content(text)],
        }
    }

    fn call_deltas(&mut self, text: &[u8]) -> Vec<Delta> {
        let call: Value = serde_json::from_slice(text).unwrap();
        let index = self.calls;
        self.calls += 1;
        let name = call["name"].as_str().unwrap().to_owned();
        let arguments = call["arguments"].to_string();
        let (head, tail) = arguments.split_at(3);
        let part = |text: &str| Delta::ToolArguments {
            index,
            text: text.to_owned(),
        };
        vec![
            Delta::ToolCall { index, name },
            part(head),
            part(tail),
            Delta::ToolCallDone { index, error: None },
        ]
    }
}

impl Parser for ByteParser {
    fn push(&mut self, id: u32) -> Vec<Delta> {
        match (id, self.call.take()) {
            (id, Some(text)) if id == CALL.1 => self.call_deltas(&text),
            (id, Some(mut text)) => {
                text.push(id as u8);
                self.call = Some(text);
                vec![]
            }
            (END, None) => vec![],
            (id, None) if id == THOUGHT.0 => {
                self.thought = true;
                vec![]
            }
            (id, None) if id == THOUGHT.1 => {
                self.thought = false;
                vec![]
            }
            (id, None) if id == CALL.0 && self.tools => {
                self.call = Some(vec![]);
                vec![]
            }
            (id, None) if id > END => {
                self.bytes.extend(MARKS[(id - END) as usize].bytes());
                self.text()
            }
            (id, None) => {
                self.bytes.push(id as u8);
                self.text()
            }
        }
    }

    fn finish(&mut self) -> Vec<Delta> {
        vec![]
    }
}

impl Backend for Scripted {
    fn models(&self) -> Vec<Model> {
        let model = |(name, version): (&String, &u64)| Model {
            name: name.clone(),
            created_s: 2,
            adapter: Some(AdapterInfo {
                digest: ADAPTER_DIGEST.to_owned(),
                path: "/a".to_owned(),
                rank: 8,
                version: *version,
                doubt: (name == "doubtful").then(|| "may be another's".to_owned()),
            }),
        };
        let base = Model {
            name: "toy".to_owned(),
            created_s: 1,
            adapter: None,
        };
        let adapters = self.adapters.lock().unwrap();
        std::iter::once(base)
            .chain(adapters.iter().map(model))
            .collect()
    }

    fn target(&self, name: &str, _: &dyn Fn() -> Vec<u8>) -> Option<Target> {
        let model = self.models().into_iter().find(|model| model.name == name)?;
        Some(Target {
            called: model.name.clone(),
            name: model.name,
            adapter: None,
            digest: model.adapter.map(|adapter| adapter.digest),
        })
    }

    fn context_tokens(&self) -> usize {
        1_000
    }

    fn vocabulary(&self) -> u32 {
        261
    }

    fn opening<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        ids
    }

    fn render(&self, conversation: &Conversation) -> Result<Rendered, RenderError> {
        let text = |message: &Value| message["content"].as_str().unwrap().to_owned();
        let texts: Vec<String> = conversation.messages.iter().map(text).collect();
        if texts.iter().any(|text| text == "unrenderable") {
            return Err(RenderError {
                reason: "no meaning".to_owned(),
            });
        }
        let ids = texts.join("\u{1}").bytes().map(u32::from).collect();
        let thoughts = match conversation.enable_thinking {
            Some(false) => Thoughts::Over,
            _ => Thoughts::Possible,
        };
        Ok(Rendered { ids, thoughts })
    }

    fn turn(&self, _: &Conversation, turn: &Value) -> Result<Vec<u32>, RenderError> {
        let mut text = turn["content"].as_str().unwrap().to_owned();
        for call in turn["tool_calls"].as_array().into_iter().flatten() {
            text.push_str(&format!("<tool_call>\n{}\n</tool_call>", call["function"]));
        }
        let mut ids = ids_of(&text);
        ids.push(END);
        Ok(ids)
    }

    fn rendered(&self, ids: Vec<u32>) -> Rendered {
        Rendered {
            ids,
            thoughts: Thoughts::Possible,
        }
    }

    fn defaults(&self) -> Sampling {
        defaults()
    }

    fn call_open(&self) -> u32 {
        CALL.0
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match id {
            0..END => vec![id as u8],
            _ => MARKS[(id - END) as usize].as_bytes().to_vec(),
        }
    }

    fn parser(&self, form: Form) -> Box<dyn Parser> {
        let tools = matches!(form, Form::Chat { tools: true, .. });
        Box::new(ByteParser {
            tools,
            ..ByteParser::default()
        })
    }

    fn constrain(
        &self,
        grammar: &Grammar,
        thoughts: Thoughts,
    ) -> Result<Box<dyn Constraint>, GrammarError> {
        GUIDES.constrain(grammar, thoughts)
    }

    fn submit(
        &self,
        generations: Vec<Generation>,
    ) -> BoxFuture<'_, Result<Vec<Events>, SubmitError>> {
        let start = |generation| self.start(generation);
        let started = generations.into_iter().map(start).collect();
        std::future::ready(started).boxed()
    }

    fn load_adapter(&self, source: AdapterSource) -> BoxFuture<'_, Result<Model, AdapterError>> {
        async move {
            if source.name == "toy" {
                return Err(AdapterError::NameTaken { name: source.name });
            }
            if source.path == "/broken" {
                let reason = "`lora_A` is missing".to_owned();
                return Err(AdapterError::Refused {
                    name: source.name,
                    reason,
                });
            }
            *self
                .adapters
                .lock()
                .unwrap()
                .entry(source.name.clone())
                .or_default() += 1;
            let found = self
                .models()
                .into_iter()
                .find(|model| model.name == source.name);
            Ok(found.unwrap())
        }
        .boxed()
    }

    fn unload_adapter(&self, name: &str) -> BoxFuture<'_, Result<(), AdapterError>> {
        let removed = self.adapters.lock().unwrap().remove(name);
        let name = name.to_owned();
        async move { removed.map(drop).ok_or(AdapterError::Unknown { name }) }.boxed()
    }

    fn load(&self) -> Load {
        let step = u64::from(self.goes_on.load(Ordering::SeqCst));
        Load {
            condition: Condition::Running,
            running: 3,
            steps: self.steps.fetch_add(step, Ordering::SeqCst),
            ..Load::default()
        }
    }
}
