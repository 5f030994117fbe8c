//! The policy for the booking form: fill in the step in view and go on, both in one turn.

use serde_json::{Value, json};

use super::super::snapshot::Snapshot;
use super::goal::{Entry, Goal};
use super::{Step, answer, open, target};

/// Books `entry` and reads the code.
pub(super) fn book(goal: &Goal, page: &Snapshot, entry: &Entry) -> Step {
    let title = page.first("heading").map_or("", |node| node.name.as_str());
    let step = match title {
        "Booking step 1 of 3" => fill(
            page,
            &[
                ("textbox", "Name", &entry.name),
                ("textbox", "Guests", &entry.guests),
            ],
            "Next",
        ),
        "Booking step 2 of 3" => fill(
            page,
            &[
                ("combobox", "Day", &entry.day),
                ("combobox", "Time", &entry.time),
            ],
            "Next",
        ),
        "Booking step 3 of 3" => fill(page, &[("checkbox", "I agree", "true")], "Confirm"),
        "Booking confirmed" => page.fact("Code").map(answer),
        _ => None,
    };
    step.unwrap_or_else(|| open(&goal.url))
}

/// Fills the fields of (role, label, value) and presses `button`; `None` where the page lacks one of them.
fn fill(page: &Snapshot, fields: &[(&str, &str, &str)], button: &str) -> Option<Step> {
    let fields: Option<Vec<Value>> = fields
        .iter()
        .map(|(role, label, value)| {
            let node = page.find(role, label)?;
            Some(json!({"target": node.target, "name": label, "type": role, "value": value}))
        })
        .collect();
    let button = page.find("button", button)?;
    Some(Step::Act(
        format!("I fill in this step and press \"{}\".", button.name),
        vec![
            ("browser_fill_form", json!({"fields": fields?})),
            ("browser_click", target(button)),
        ],
    ))
}
