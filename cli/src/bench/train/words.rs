//! Made-up conversations in the form of recorded ones: 25 tools, page snapshots as results, thoughts, several questions.

use espalier_core::chat::{Message, ToolCall};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

const TOOLS: usize = 25;
const QUESTIONS: usize = 3;
const CALLS: usize = 3;
const PAGE_LINES: usize = 50;

const PARTS: [&str; 40] = [
    "the", "price", "of", "book", "ing", "to", "navi", "gate", "and", "link", "page", "tion", "re",
    "search", "but", "ton", "is", "click", "able", "in", "form", "ation", "foot", "er", "con",
    "tent", "a", "new", "head", "ing", "for", "cart", "check", "out", "sub", "mit", "user", "name",
    "pro", "duct",
];

/// Text like that of pages and thoughts, the same for the same seed.
pub struct Words(StdRng);

impl Words {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(0..bound)
    }

    fn word(&mut self) -> String {
        let parts = 1 + self.below(2);
        let word: String = (0..parts).map(|_| PARTS[self.below(PARTS.len())]).collect();
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

    fn page(&mut self) -> String {
        let mut page = String::from("### Page snapshot\n```yaml\n");
        for line in 0..PAGE_LINES {
            let indent = " ".repeat(2 * (1 + self.below(5)));
            let (name, number) = (self.words(4), self.below(1_000_000));
            page += &format!(
                "{indent}- link \"{name}\" [ref=e{line}] [cursor=pointer]:\n{indent}  - /url: https://example.com/{number}\n"
            );
        }
        page + "```"
    }

    /// Definitions of tools.
    pub fn tools(&mut self) -> Vec<Value> {
        let tool = |n: usize| {
            let [element, target, text] =
                [(); 3].map(|()| json!({"type": "string", "description": self.words(12)}));
            let properties = json!({"element": element, "ref": target, "text": text});
            let parameters =
                json!({"type": "object", "properties": properties, "required": ["element", "ref"]});
            json!({"type": "function", "function": {"name": format!("browser_{n}"), "description": self.words(15),
                "parameters": parameters}})
        };
        (0..TOOLS).map(tool).collect()
    }

    /// What was said.
    pub fn conversation(&mut self) -> Vec<Message> {
        let mut messages = vec![];
        for _ in 0..QUESTIONS {
            messages.push(Message::User {
                content: self.words(20),
            });
            for _ in 0..CALLS {
                let thought = self.words(150);
                messages.push(Message::assistant(
                    String::new(),
                    Some(thought),
                    vec![self.call()],
                ));
                messages.push(Message::Tool {
                    tool_call_id: "c".to_owned(),
                    content: self.page(),
                });
            }
            let (answer, thought) = (self.words(60), self.words(80));
            messages.push(Message::assistant(answer, Some(thought), vec![]));
        }
        messages
    }

    fn call(&mut self) -> ToolCall {
        let target = format!("e{}", self.below(PAGE_LINES));
        let arguments = json!({"element": self.words(3), "ref": target});
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        ToolCall::new("c", "browser_3", arguments)
    }
}
