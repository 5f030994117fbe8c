//! How fast rows become samples: rendered, tokenized and masked, in tokens a second, as one line of JSON.
//!
//! ```sh
//! cargo run --release -p espalier-dataset --example dataset_speed -- [THREADS [CONVERSATIONS]]
//! ```
//!
//! Conversations are made up in the form of the workshop's: 25 tools, page snapshots as results, thoughts, several
//! questions each. `shared_tools` is how data sets are: every conversation offers the same tools. In `own_tools` no two
//! conversations have a text in common, so that the cache helps only between the rows of one.

#![expect(clippy::unwrap_used, reason = "an example may panic")]

use std::time::Instant;

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use espalier_core::chat::{Message, ToolCall};
use espalier_dataset::{Facts, Renderer, Row, RowsOptions, Source, Split, rows, samples};
use espalier_qwen3_text::Tokenizer;
use serde_json::{Value, json};

const TOOLS: usize = 25;
const QUESTIONS: usize = 3;
const CALLS: usize = 3;

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|argument| argument.parse::<usize>().unwrap());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.next().unwrap_or(cores);
    let conversations = arguments.next().unwrap_or(200);
    let tokenizer = Tokenizer::shared().unwrap();
    // The pattern and the merges are read once.
    tokenizer.count("warm up");
    let measured = [("shared_tools", true), ("own_tools", false)].map(|(name, shared)| {
        (
            name.to_owned(),
            measure(conversations, shared, threads, tokenizer),
        )
    });
    let mut line = json!({"threads": threads, "conversations": conversations});
    line.as_object_mut().unwrap().extend(measured);
    println!("{line}");
}

fn measure(
    conversations: usize,
    shared: bool,
    threads: usize,
    tokenizer: &'static Tokenizer,
) -> Value {
    let rows = made_up(conversations, shared, tokenizer);
    let began = Instant::now();
    let samples = samples(&rows, usize::MAX, threads, tokenizer);
    let seconds = began.elapsed().as_secs_f64();
    let (mut tokens, mut supervised) = (0_usize, 0_usize);
    for sample in &samples {
        let sample = sample.as_ref().unwrap();
        tokens += sample.ids.len();
        supervised += sample.supervised_tokens();
    }
    json!({
        "rows": rows.len(),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": seconds,
        "tokens_per_s": tokens as f64 / seconds,
    })
}

fn made_up(conversations: usize, shared: bool, tokenizer: &'static Tokenizer) -> Vec<Row> {
    let mut text = Text(ChaCha8Rng::seed_from_u64(1));
    let tools = text.tools();
    let mut renderer = Renderer::new(tokenizer);
    let mut all = Vec::new();
    for n in 0..conversations {
        let source = Source {
            id: n.to_string(),
            timestamp: String::new(),
            model: String::new(),
            messages: text.conversation(),
            tools: if shared { tools.clone() } else { text.tools() },
            facts: Facts::default(),
            thinking: true,
            keep_hints: None,
            calls: vec![],
        };
        let made = rows(&source, RowsOptions::default(), Split::Train, &mut renderer);
        all.extend(made.unwrap().0);
    }
    all
}

/// Text like that of pages and thoughts.
struct Text(ChaCha8Rng);

impl Text {
    fn below(&mut self, bound: u32) -> u32 {
        self.0.next_u32() % bound
    }

    fn word(&mut self) -> String {
        const PARTS: [&str; 40] = [
            "the", "price", "of", "book", "ing", "to", "navi", "gate", "and", "link", "page",
            "tion", "re", "search", "but", "ton", "is", "click", "able", "in", "form", "ation",
            "foot", "er", "con", "tent", "a", "new", "head", "ing", "for", "cart", "check", "out",
            "sub", "mit", "user", "name", "pro", "duct",
        ];
        let parts = 1 + self.below(2);
        let word: String = (0..parts).map(|_| PARTS[self.below(40) as usize]).collect();
        match self.below(12) {
            0 => format!("{word}-{}", self.below(100_000)),
            1 => format!("{word},"),
            2 => word.to_uppercase(),
            _ => word,
        }
    }

    fn words(&mut self, count: usize) -> String {
        let words: Vec<String> = (0..count).map(|_| self.word()).collect();
        words.join(" ")
    }

    fn page(&mut self, lines: usize) -> String {
        let mut page = String::from("### Page snapshot\n```yaml\n");
        for line in 0..lines {
            let indent = " ".repeat(2 * (1 + self.below(5) as usize));
            let (name, number) = (self.words(4), self.below(1_000_000));
            page += &format!(
                "{indent}- link \"{name}\" [ref=e{line}] [cursor=pointer]:\n{indent}  - /url: https://example.com/{number}\n"
            );
        }
        page + "```"
    }

    fn tools(&mut self) -> Vec<Value> {
        let tool = |n: usize, text: &mut Self| {
            let property =
                |text: &mut Self| json!({"type": "string", "description": text.words(12)});
            let properties =
                json!({"element": property(text), "ref": property(text), "text": property(text)});
            json!({"type": "function", "function": {"name": format!("browser_{n}"), "description": text.words(15),
                "parameters": {"type": "object", "properties": properties, "required": ["element", "ref"]}}})
        };
        (0..TOOLS).map(|n| tool(n, self)).collect()
    }

    fn conversation(&mut self) -> Vec<Message> {
        let mut messages = vec![];
        for _ in 0..QUESTIONS {
            messages.push(Message::User {
                content: self.words(20),
            });
            for _ in 0..CALLS {
                let arguments =
                    json!({"element": self.words(3), "ref": format!("e{}", self.below(200))});
                let call = ToolCall::new("c", "browser_3", arguments.as_object().cloned().unwrap());
                messages.push(Message::assistant(
                    String::new(),
                    Some(self.words(150)),
                    vec![call],
                ));
                messages.push(Message::Tool {
                    tool_call_id: "c".into(),
                    content: self.page(50),
                });
            }
            messages.push(Message::assistant(
                self.words(60),
                Some(self.words(80)),
                vec![],
            ));
        }
        messages
    }
}
