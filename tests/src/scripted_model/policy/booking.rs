//! The policy for the booking form: fill in what the step in view lacks, then go on.

use super::super::snapshot::Snapshot;
use super::goal::{Entry, Goal};
use super::{Step, answer, click, ensure_chosen, ensure_typed, open, press};

/// Books `entry` and reads the code.
pub(super) fn book(goal: &Goal, page: &Snapshot, entry: &Entry) -> Step {
    let title = page.first("heading").map_or("", |node| node.name.as_str());
    match title {
        "Booking step 1 of 3" => ensure_typed(page, "Name", &entry.name, false)
            .or_else(|| ensure_typed(page, "Guests", &entry.guests, false))
            .unwrap_or_else(|| press(goal, page, "Next")),
        "Booking step 2 of 3" => ensure_chosen(page, "Day", &entry.day)
            .or_else(|| ensure_chosen(page, "Time", &entry.time))
            .unwrap_or_else(|| press(goal, page, "Next")),
        "Booking step 3 of 3" => match page.find("checkbox", "I agree") {
            Some(node) if !node.checked => click(node),
            _ => press(goal, page, "Confirm"),
        },
        "Booking confirmed" => page
            .fact("Code")
            .map_or_else(|| open(&goal.url), answer),
        _ => open(&goal.url),
    }
}
