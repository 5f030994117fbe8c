//! The policies: what to do next on the practice site, given what the user wants and the page in view.
//!
//! Each policy is a function of goal and page alone, so it finds its way back from any page that a mistake led to.
//! Called by the HTTP layer for prompts without a script.

mod booking;
mod goal;
mod reading;
mod shop;
#[cfg(test)]
mod tests;

use serde_json::{Value, json};

use super::chat::{Call, Reply, Request};
use super::history::{View, view};
use super::snapshot::{Node, Snapshot};
use goal::{Goal, Want};

/// Turns after which the model gives up: more than twice what the longest procedure takes with its mistakes.
const TURNS_MAX: usize = 60;

/// What a policy decides.
#[derive(Debug, PartialEq)]
enum Step {
    /// Call tools in order, with the thought that led to it.
    Act(String, Vec<(&'static str, Value)>),
    /// Give the answer.
    Answer(String, String),
}

/// The next turn for a prompt about the practice site.
pub(super) fn decide(request: &Request) -> Reply {
    let Some(goal) = Goal::parse(request.prompt()) else {
        return Reply::say(
            "I know neither this site nor this task.",
            "I do not know how to do this.",
        );
    };
    if request.turns_since_prompt() >= TURNS_MAX {
        return Reply::say("This leads nowhere.", "I give up.");
    }
    let step = match view(request) {
        View::Nothing => open(&goal.url),
        View::Stale => look("I need to see the page as it is now."),
        View::Page(page) => on_page(&goal, &page),
    };
    match step {
        Step::Act(thought, calls) => Reply {
            thought,
            calls: calls
                .iter()
                .map(|(tool, arguments)| Call {
                    tool: request.offered(tool),
                    arguments: arguments.to_string(),
                })
                .collect(),
            ..Reply::default()
        },
        Step::Answer(thought, text) => Reply::say(thought, text),
    }
}

fn on_page(goal: &Goal, page: &Snapshot) -> Step {
    match &goal.want {
        Want::Price { product } => shop::price(goal, page, product),
        Want::Stock { product } => shop::stock(goal, page, product),
        Want::Ranked {
            category,
            dear,
            rank,
        } => shop::ranked(goal, page, category, *dear, *rank),
        Want::Count { category, max } => shop::count(goal, page, category, max),
        Want::Booking(entry) => booking::book(goal, page, entry),
        Want::Row {
            column,
            largest,
            rank,
        } => reading::row(goal, page, column, *largest, *rank),
        Want::Account {
            user,
            password,
            field,
        } => reading::account(goal, page, user, password, field),
        Want::Notice { name } => reading::notice(goal, page, name),
        Want::Fact { name } => reading::fact(goal, page, name),
    }
}

fn act(thought: impl Into<String>, tool: &'static str, arguments: Value) -> Step {
    Step::Act(thought.into(), vec![(tool, arguments)])
}

fn open(url: &str) -> Step {
    act(
        format!("The task begins at {url}."),
        "browser_navigate",
        json!({"url": url}),
    )
}

fn look(thought: &str) -> Step {
    act(thought, "browser_snapshot", json!({}))
}

fn click(node: &Node) -> Step {
    act(
        format!("I press \"{}\".", node.name),
        "browser_click",
        target(node),
    )
}

fn target(node: &Node) -> Value {
    json!({"element": node.name, "target": node.target})
}

fn type_text(node: &Node, text: &str, submit: bool) -> Step {
    act(
        format!("I type {text} into \"{}\".", node.name),
        "browser_type",
        json!({"element": node.name, "target": node.target, "text": text, "submit": submit}),
    )
}

fn choose(node: &Node, option: &str) -> Step {
    act(
        format!("I choose {option} in \"{}\".", node.name),
        "browser_select_option",
        json!({"element": node.name, "target": node.target, "values": [option]}),
    )
}

fn answer(text: &str) -> Step {
    Step::Answer(
        format!("The page shows what was asked for: {text}."),
        text.to_owned(),
    )
}

/// Chooses `option` in the combobox `name` unless it is chosen; `None` when there is nothing to do.
fn ensure_chosen(page: &Snapshot, name: &str, option: &str) -> Option<Step> {
    let node = page.find("combobox", name)?;
    (page.chosen(name) != Some(option)).then(|| choose(node, option))
}

/// Types `text` into the field `name` unless it stands there; `None` when there is nothing to do.
fn ensure_typed(page: &Snapshot, name: &str, text: &str, submit: bool) -> Option<Step> {
    let node = page.find("textbox", name)?;
    (node.value != text).then(|| type_text(node, text, submit))
}

/// Presses the button `name`, or begins anew where the page has none.
fn press(goal: &Goal, page: &Snapshot, name: &str) -> Step {
    page.find("button", name)
        .map_or_else(|| open(&goal.url), click)
}
