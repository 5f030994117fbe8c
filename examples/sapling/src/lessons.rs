//! Conversations without end: tasks of made-up sites, done by the teacher, as a rollout would record them.

use espalier_agent_worker::observe;
use espalier_core::chat::{Message, ToolCall};
use espalier_core::spec::Observation;
use espalier_practice::draw::Draw;
use espalier_practice::tasks::{Kind, Split, Task};
use espalier_practice::teacher::{Act, Episode, NotTaught, episode};
use espalier_practice::world::World;
use espalier_qwen3_text::Tokenizer;
use serde_json::Value;

/// How a page is shown, in the demonstration as here.
pub const OBSERVATION: Observation = Observation::CompactTokens(2048);
/// Sites below it are for people and for measuring: no lesson is given on them.
const FIRST_SEED: u64 = 1_000_000;
/// Lessons on one site.
const PER_SITE: usize = 32;
/// Kinds with how many lessons of a hundred they have, and how many of a hundred of these come with hints.
const MIX: [(Kind, u64, u64); 6] = [
    (Kind::DepotFind, 34, 80),
    (Kind::DepotCode, 15, 80),
    (Kind::DepotSign, 10, 80),
    (Kind::ShopPrice, 12, 30),
    (Kind::Login, 19, 30),
    (Kind::SlowPage, 10, 30),
];

/// The tools that a small model is offered, as the agent worker lists them where a job asks for brief ones.
pub fn tools() -> Vec<Value> {
    match serde_json::from_str(include_str!("../tools.json")) {
        Ok(Value::Array(tools)) => tools,
        _ => vec![],
    }
}

/// A conversation, and whether it counts whole or only what the model says.
pub struct Lesson {
    /// What is said.
    pub messages: Vec<Message>,
    /// Whether the model also learns to say what it is shown: so copying is learned much sooner.
    pub is_whole: bool,
}

/// Lessons on the sites of one stream: streams of other numbers have other sites.
pub struct Lessons {
    stream: u64,
    streams: u64,
    site: u64,
    tokenizer: Tokenizer,
    ready: Vec<Lesson>,
}

impl Lessons {
    /// The `stream`-th of `streams`.
    pub fn new(stream: u64, streams: u64, tokenizer: &Tokenizer) -> Self {
        Self {
            stream,
            streams,
            site: 0,
            tokenizer: tokenizer.clone(),
            ready: Vec::new(),
        }
    }

    /// The next lesson.
    ///
    /// # Errors
    /// A mistake of the teacher.
    pub fn next(&mut self) -> Result<Lesson, NotTaught> {
        loop {
            if let Some(lesson) = self.ready.pop() {
                return Ok(lesson);
            }
            let seed = FIRST_SEED + self.site * self.streams + self.stream;
            self.site += 1;
            self.ready = self.on_site(seed)?;
        }
    }

    fn on_site(&self, seed: u64) -> Result<Vec<Lesson>, NotTaught> {
        let world = World::new(seed);
        let mut draw = Draw::new(seed, "lessons");
        let mut tasks: Vec<Vec<Task>> = MIX.map(|(kind, ..)| kind.tasks(&world)).into();
        for tasks in &mut tasks {
            tasks.retain(|task| Split::of(&task.key()) == Split::Train);
        }
        let mut lessons = Vec::with_capacity(PER_SITE);
        for _ in 0..PER_SITE {
            let (kind, hinted) = drawn_kind(&mut draw);
            let task = &tasks[kind][draw.between(0, tasks[kind].len() as u64 - 1) as usize];
            let origin = format!("http://localhost:{}", draw.between(1024, 65_535));
            let episode = episode(&world, task, &origin)?;
            let with_hints = draw.between(0, 99) < hinted;
            lessons.push(Lesson {
                messages: messages(&episode, with_hints, &self.tokenizer),
                is_whole: draw.between(0, 1) == 0,
            });
        }
        Ok(lessons)
    }
}

/// The place of a kind in [`MIX`], and its share of hints.
fn drawn_kind(draw: &mut Draw) -> (usize, u64) {
    let mut left = draw.between(0, 99);
    for (at, (_, share, hinted)) in MIX.iter().enumerate() {
        if left < *share {
            return (at, *hinted);
        }
        left -= share;
    }
    (0, MIX[0].2)
}

/// An episode as the agent worker records it.
pub fn messages(episode: &Episode, with_hints: bool, tokenizer: &Tokenizer) -> Vec<Message> {
    let mut messages = Vec::with_capacity(2 * episode.turns.len() + 2);
    if with_hints {
        messages.push(Message::System {
            content: episode.hints.clone(),
            hint: true,
        });
    }
    messages.push(Message::User {
        content: episode.prompt.clone(),
    });
    for (n, turn) in episode.turns.iter().enumerate() {
        let thought = Some(turn.thought.clone());
        match &turn.act {
            Act::Answer(text) => {
                messages.push(Message::assistant(text.clone(), thought, vec![]));
            }
            Act::Call {
                tool,
                arguments,
                result,
            } => {
                let id = format!("call_{n}");
                let call = ToolCall::new(id.clone(), *tool, arguments.clone());
                messages.push(Message::assistant(String::new(), thought, vec![call]));
                messages.push(Message::Tool {
                    tool_call_id: id,
                    content: observe::shape(result, OBSERVATION, tokenizer).text,
                });
            }
        }
    }
    messages
}
