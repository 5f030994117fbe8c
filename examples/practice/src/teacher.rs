//! Who knows how tasks are done: rules that a small model can learn from, played on the [twin](crate::twin).
//!
//! Only kinds whose pages are small are taught. Before it acts, the teacher says the name of what it acts on, and before it
//! answers it quotes the page: a model that has learned to go on copying what it has begun can do the rest. What no page
//! tells (which list, which number, which button) the teacher takes from the world: a model reads it in a hint, or has
//! learned it by itself.

use serde_json::{Map, Value, json};

use crate::depot::{Parcel, Way};
use crate::tasks::{AccountField, Kind, Task};
use crate::twin::{Part, Twin, Unknown, quoted};
use crate::world::{Account, World};

/// Kinds that are taught.
pub const TAUGHT: [Kind; 6] = [
    Kind::DepotFind,
    Kind::DepotCode,
    Kind::DepotSign,
    Kind::ShopPrice,
    Kind::Login,
    Kind::SlowPage,
];

/// A turn of the teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// What it thinks first.
    pub thought: String,
    /// What it does.
    pub act: Act,
}

/// What the teacher does.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Calls a tool, and is shown the result.
    Call {
        /// The tool's name.
        tool: &'static str,
        /// Its arguments.
        arguments: Map<String, Value>,
        /// What it is shown.
        result: String,
    },
    /// Answers, which ends the task.
    Answer(String),
}

/// A task from its beginning to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Episode {
    /// How such tasks are done here.
    pub hints: String,
    /// What is asked.
    pub prompt: String,
    /// What is done, the answer last.
    pub turns: Vec<Turn>,
}

/// Why an episode cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NotTaught {
    /// The kind is none of [`TAUGHT`].
    #[error("tasks of kind {0} are not taught")]
    Kind(&'static str),
    /// The page has no part of that name.
    #[error("the page {page:?} has no {name:?}")]
    Part {
        /// Title of the page.
        page: String,
        /// The name.
        name: String,
    },
    /// The browser does not know the call.
    #[error(transparent)]
    Call(#[from] Unknown),
}

/// Does `task` on the site of `world` at `origin`.
///
/// # Errors
/// When tasks of its kind are not taught.
pub fn episode(world: &World, task: &Task, origin: &str) -> Result<Episode, NotTaught> {
    let text = task.text(world);
    let prompt = text.prompt.as_str().unwrap_or_default();
    let mut lesson = Lesson {
        twin: Twin::new(world, origin),
        origin,
        turns: Vec::new(),
    };
    let answer = match task {
        Task::DepotFind(parcel) => lesson.find(world, parcel)?,
        Task::DepotCode(parcel) => {
            lesson.open(&format!("/depot/parcel/{}", parcel.slug()))?;
            let code = world.depot.code;
            lesson.answer_fact(code.label(), &parcel.code(code).to_string())
        }
        Task::DepotSign(parcel) => {
            lesson.open(&format!("/depot/sign/{}", parcel.slug()))?;
            lesson.click(world.depot.sign.label())?;
            lesson.answer_fact("Receipt", &parcel.receipt.to_string())
        }
        Task::ShopPrice(product) => {
            lesson.open("/shop")?;
            lesson.enter("Search", &product.name, true)?;
            let price = product.price();
            answer(fact(&product.name, &price), price)
        }
        Task::Login { account, field } => lesson.log_in(account, *field)?,
        Task::SlowPage(name) => {
            lesson.open(&format!("/slow/{name}"))?;
            let total = world.report_total(name).unwrap_or_default();
            lesson.answer_fact("Total", &total.to_string())
        }
        other => return Err(NotTaught::Kind(other.kind().as_str())),
    };
    lesson.turns.push(answer);
    Ok(Episode {
        hints: text.hints.into_owned(),
        prompt: prompt.replace("${site}", origin),
        turns: lesson.turns,
    })
}

fn answer(thought: String, text: String) -> Turn {
    Turn {
        thought,
        act: Act::Answer(text),
    }
}

/// A name and its value as a compacted snapshot shows them.
fn fact(name: &str, value: &str) -> String {
    format!("\"{name}\": {}", quoted(value))
}

struct Lesson<'a> {
    twin: Twin<'a>,
    origin: &'a str,
    turns: Vec<Turn>,
}

impl Lesson<'_> {
    fn find(&mut self, world: &World, parcel: &Parcel) -> Result<Turn, NotTaught> {
        let way = world.depot.way;
        self.open("/depot")?;
        match way {
            Way::Search => self.enter(way.label(), &parcel.name, true)?,
            list => {
                self.click(list.label())?;
                self.click(list.group(parcel))?;
            }
        }
        self.click(&parcel.name)?;
        Ok(self.answer_fact("Weight", &parcel.weight.to_string()))
    }

    fn log_in(&mut self, account: &Account, field: AccountField) -> Result<Turn, NotTaught> {
        self.open("/login")?;
        self.enter("User", &account.user, false)?;
        self.enter("Password", &account.password, true)?;
        let (label, value) = (field.label(), field.value(account));
        let quote = fact(field.title(), &value);
        Ok(answer(quote, json!({label: value}).to_string()))
    }

    fn answer_fact(&self, name: &str, value: &str) -> Turn {
        answer(fact(name, value), value.to_owned())
    }

    fn open(&mut self, path: &str) -> Result<(), NotTaught> {
        let url = format!("{}{path}", self.origin);
        self.call(url.clone(), "browser_navigate", json!({"url": url}))
    }

    fn click(&mut self, name: &str) -> Result<(), NotTaught> {
        let target = self.target(name)?;
        let arguments = json!({"element": name, "target": target.id});
        self.call(name.to_owned(), "browser_click", arguments)
    }

    fn enter(&mut self, name: &str, text: &str, submit: bool) -> Result<(), NotTaught> {
        let target = self.target(name)?;
        let mut arguments = json!({"element": name, "target": target.id, "text": text});
        if submit {
            arguments["submit"] = json!(true);
        }
        self.call(format!("{name}: {text}"), "browser_type", arguments)
    }

    fn target(&self, name: &str) -> Result<Part, NotTaught> {
        let mut parts = self.twin.parts().iter();
        let part = parts.find(|part| part.name == name);
        part.cloned().ok_or_else(|| NotTaught::Part {
            page: self.twin.page().title.clone(),
            name: name.to_owned(),
        })
    }

    fn call(
        &mut self,
        thought: String,
        tool: &'static str,
        arguments: Value,
    ) -> Result<(), NotTaught> {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        let result = self.twin.call(tool, &arguments)?;
        self.turns.push(Turn {
            thought,
            act: Act::Call {
                tool,
                arguments,
                result,
            },
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Block, Page};

    fn shows(page: &Page, text: &str) -> bool {
        page.blocks.iter().any(|block| match block {
            Block::Facts(facts) => facts.iter().any(|fact| fact.value == text),
            Block::Links(links) => links.iter().any(|link| link.note == text),
            _ => false,
        })
    }

    #[test]
    fn every_lesson_ends_on_a_page_that_shows_the_answer() {
        for seed in 0..24 {
            let world = World::new(seed);
            for kind in TAUGHT {
                for task in kind.tasks(&world).iter().take(8) {
                    let episode = episode(&world, task, "http://localhost:4310").unwrap();
                    let Some(Turn {
                        act: Act::Answer(answer),
                        ..
                    }) = episode.turns.last()
                    else {
                        panic!("{episode:?}");
                    };
                    let answer = match task {
                        Task::Login { account, field } => field.value(account),
                        _ => answer.clone(),
                    };
                    let page: Page = last_page(&world, &episode);
                    assert!(shows(&page, &answer), "{answer}: {page:?}");
                    assert!(!episode.prompt.contains("${site}"));
                }
            }
        }
    }

    /// The page at which an episode's calls end, done once more.
    fn last_page(world: &World, episode: &Episode) -> Page {
        let mut twin = Twin::new(world, "http://localhost:4310");
        for turn in &episode.turns {
            if let Act::Call {
                tool,
                arguments,
                result,
            } = &turn.act
            {
                assert_eq!(&twin.call(tool, arguments).unwrap(), result);
            }
        }
        twin.page().clone()
    }
}
