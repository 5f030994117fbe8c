//! Policies for the crew's tables, the login, the notices, and pages that take their time.

use serde_json::json;

use super::super::snapshot::{Snapshot, path_of};
use super::goal::Goal;
use super::{Step, act, answer, click, ensure_typed, open, type_text};

/// Sorts the table by a press on its header and counts down to the place that is asked for.
pub(super) fn row(goal: &Goal, page: &Snapshot, column: &str, largest: bool, rank: usize) -> Step {
    if page.path() != path_of(&goal.url) {
        return open(&goal.url);
    }
    let order = if largest { "largest" } else { "smallest" };
    let caption = page.first("caption").map_or("", |node| node.value.as_str());
    if caption != format!("Sorted by {column}, {order} first") {
        return page
            .find("link", column)
            .map_or_else(|| open(&goal.url), click);
    }
    match page.rows().get(rank - 1).and_then(|row| row.first()) {
        Some(name) => answer(name),
        None => open(&goal.url),
    }
}

/// Logs in and reads a field of the account as JSON.
pub(super) fn account(
    goal: &Goal,
    page: &Snapshot,
    user: &str,
    password: &str,
    field: &str,
) -> Step {
    if page.path() == "/account" && page.fact("User") == Some(user) {
        let label = field[..1].to_uppercase() + &field[1..];
        return match page.fact(&label) {
            Some(value) => answer(&json!({field: value}).to_string()),
            None => open(&goal.url),
        };
    }
    if page.path() != path_of(&goal.url) {
        return open(&goal.url);
    }
    if let Some(step) = ensure_typed(page, "User", user, false) {
        return step;
    }
    match page.find("textbox", "Password") {
        Some(node) => type_text(node, password, true),
        None => open(&goal.url),
    }
}

/// Opens the notice, goes over to its tab and reads its word.
pub(super) fn notice(goal: &Goal, page: &Snapshot, name: &str) -> Step {
    let address = format!("{}/{}", path_of(&goal.url), name.replace(' ', "-"));
    if page.path() == address {
        return page.fact("Word").map_or_else(|| open(&goal.url), answer);
    }
    let tab = page.tabs.iter().find(|tab| path_of(&tab.url) == address);
    if let Some(tab) = tab {
        return act(
            "The notice opened in a new tab, so I go over to it.",
            "browser_tabs",
            json!({"action": "select", "index": tab.index}),
        );
    }
    if page.path() != path_of(&goal.url) {
        return open(&goal.url);
    }
    page.find("link", name)
        .map_or_else(|| open(&goal.url), click)
}

/// Waits until the page shows the value, and reads it.
pub(super) fn fact(goal: &Goal, page: &Snapshot, name: &str) -> Step {
    if page.path() != path_of(&goal.url) {
        return open(&goal.url);
    }
    match page.fact(name) {
        Some(value) => answer(value),
        None => act(
            format!("The page does not show the {name} yet, so I wait."),
            "browser_wait_for",
            json!({"time": 1}),
        ),
    }
}
