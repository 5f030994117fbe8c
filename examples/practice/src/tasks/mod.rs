//! The task generator: job lines for `espalier submit`, each with a verifier that knows the right answer.
//!
//! A task is told apart by its *key*, the words that make it up ("shop_price.amber-lamp"). A hash of the key alone,
//! whatever the seed, puts it on the training side or on the held-out side, so the two can never overlap. It asks the
//! world, never a rendered page; that both agree is a test.

mod depot;
mod kinds;

use std::str::FromStr;

use serde_json::{Value, json};

use crate::draw::{Draw, hash};
use crate::world::World;

pub use kinds::{AccountField, Kind, Task, Text};

/// The seed of the site that `espalier practice` serves unless told otherwise.
pub const DEFAULT_SEED: u64 = 7;
/// Tasks in the committed `tasks.jsonl`.
pub const COMMITTED_TASKS: usize = 48;
/// One key in this many is held out.
const EVAL_ONE_IN: u64 = 4;
/// Fixes which keys are held out, for all seeds of the site.
const SPLIT_SEED: u64 = 0;
/// Turns of the model that a task allows: three times what the longest procedure takes.
const TURNS_MAX: u32 = 30;

/// Which side of the partition a task is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// May be learned from.
    Train,
    /// Held out for evaluation.
    Eval,
}

impl Split {
    /// The name in a job.
    pub fn as_str(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Eval => "eval",
        }
    }

    /// The side of the task with that key.
    pub fn of(key: &str) -> Self {
        if hash(SPLIT_SEED, key).is_multiple_of(EVAL_ONE_IN) {
            Split::Eval
        } else {
            Split::Train
        }
    }
}

impl FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "train" => Ok(Split::Train),
            "eval" => Ok(Split::Eval),
            other => Err(format!("`split` must be train or eval, got {other}")),
        }
    }
}

/// `count` different tasks of one side for the site of `seed`, the kinds in turn. The same arguments give the same
/// tasks, and a larger `count` only adds to them. Fewer come back only once every kind is used up, which takes more
/// than a hundred thousand.
pub fn generate(seed: u64, count: usize, split: Split) -> Vec<Value> {
    generate_of(&Kind::ALL, seed, count, split)
}

/// The same of some kinds alone.
pub fn generate_of(kinds: &[Kind], seed: u64, count: usize, split: Split) -> Vec<Value> {
    let world = World::new(seed);
    let mut sources: Vec<std::vec::IntoIter<Task>> = kinds
        .iter()
        .map(|kind| candidates(&world, *kind, split, count).into_iter())
        .collect();
    let mut tasks = Vec::with_capacity(count);
    while tasks.len() < count {
        let before = tasks.len();
        for source in &mut sources {
            if tasks.len() < count
                && let Some(task) = source.next()
            {
                tasks.push(line(&world, &task, split, tasks.len()));
            }
        }
        if tasks.len() == before {
            break;
        }
    }
    tasks
}

/// The tasks of one kind on one side, in the order of the seed.
fn candidates(world: &World, kind: Kind, split: Split, count: usize) -> Vec<Task> {
    let mut tasks = kind.tasks(world);
    tasks.retain(|task| Split::of(&task.key()) == split);
    let label = format!("tasks {} {}", kind.as_str(), split.as_str());
    Draw::new(world.seed, &label).shuffle(&mut tasks);
    tasks.truncate(count);
    tasks
}

/// One job line.
fn line(world: &World, task: &Task, split: Split, index: usize) -> Value {
    let text = task.text(world);
    json!({
        "id": format!("practice-{}-{index:05}", split.as_str()),
        "task_id": task.key(),
        "task_kind": task.kind().as_str(),
        "split": split.as_str(),
        "prompt": text.prompt,
        "hints": text.hints,
        "mcp": ["browser"],
        "limits": {"turns": TURNS_MAX},
        "verify": text.verify,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    fn keys(seed: u64, count: usize, split: Split) -> Vec<String> {
        generate(seed, count, split)
            .iter()
            .map(|task| task["task_id"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn training_and_held_out_tasks_never_overlap_over_all_seeds() {
        let train: HashSet<String> = [7, 8]
            .iter()
            .flat_map(|s| keys(*s, 3000, Split::Train))
            .collect();
        let eval: HashSet<String> = [7, 8]
            .iter()
            .flat_map(|s| keys(*s, 3000, Split::Eval))
            .collect();
        assert!(train.len() > 3000 && eval.len() > 3000);
        assert_eq!(train.intersection(&eval).count(), 0);
    }

    #[test]
    fn tasks_are_different_and_the_same_every_time() {
        let first = generate(7, 500, Split::Train);
        assert_eq!(first, generate(7, 500, Split::Train));
        assert_eq!(first[..100], generate(7, 100, Split::Train)[..]);
        let unique: HashSet<String> = keys(7, 500, Split::Train).into_iter().collect();
        assert_eq!(unique.len(), 500);
    }

    #[test]
    fn every_kind_comes_up_on_both_sides() {
        for split in [Split::Train, Split::Eval] {
            let mut kinds: HashMap<String, usize> = HashMap::new();
            for task in generate(7, 60, split) {
                *kinds
                    .entry(task["task_kind"].as_str().unwrap().into())
                    .or_default() += 1;
            }
            assert_eq!(kinds.len(), Kind::ALL.len());
            assert!(kinds.values().all(|n| *n == 6), "{kinds:?}");
        }
    }

    #[test]
    fn every_line_has_all_its_fields_and_valid_names() {
        for task in generate(7, 200, Split::Eval) {
            for field in ["id", "task_id"] {
                let name = task[field].as_str().unwrap();
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
                assert!(name.len() <= 128 && name.bytes().all(valid), "{name}");
            }
            let prompt = task["prompt"].to_string();
            assert!(prompt.contains("${site}/"), "{prompt}");
            assert!(!task["hints"].as_str().unwrap().is_empty());
            assert_eq!(task["split"], "eval");
            assert!(task["verify"].is_object());
        }
    }

    #[test]
    fn the_committed_tasks_are_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tasks.jsonl");
        let committed = std::fs::read_to_string(path).unwrap();
        let fresh: String = generate(DEFAULT_SEED, COMMITTED_TASKS, Split::Train)
            .iter()
            .map(|task| format!("{task}\n"))
            .collect();
        assert!(
            committed == fresh,
            "run `cargo run -p espalier-practice --example write-tasks` and commit tasks.jsonl"
        );
    }
}
