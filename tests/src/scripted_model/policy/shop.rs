//! Policies for the shop: search, filter, sort, read.

use super::super::snapshot::Snapshot;
use super::goal::Goal;
use super::{Step, answer, click, ensure_chosen, ensure_typed, open, press};

const LIST: &str = "/shop";
const PRODUCT: &str = "/shop/product/";

/// Searches the product by its name and reads its price behind the link.
pub(super) fn price(goal: &Goal, page: &Snapshot, product: &str) -> Step {
    if page.path() != LIST {
        return open(&goal.url);
    }
    if let Some(step) = search(page, product) {
        return step;
    }
    match page.remark(product) {
        Some(price) => answer(price),
        None => press(goal, page, "Find"),
    }
}

/// Searches the product, opens its page and reads how many are left.
pub(super) fn stock(goal: &Goal, page: &Snapshot, product: &str) -> Step {
    if page.path().starts_with(PRODUCT) && page.find("heading", product).is_some() {
        return page.fact("Stock").map_or_else(|| open(&goal.url), answer);
    }
    if page.path() != LIST {
        return open(&goal.url);
    }
    if let Some(step) = search(page, product) {
        return step;
    }
    match page.find("link", product) {
        Some(link) => click(link),
        None => press(goal, page, "Find"),
    }
}

/// Filters and sorts the list and counts down to the place that is asked for.
pub(super) fn ranked(
    goal: &Goal,
    page: &Snapshot,
    category: &str,
    dear: bool,
    rank: usize,
) -> Step {
    if page.path() != LIST {
        return open(&goal.url);
    }
    let (option, value) = if dear {
        ("Price down", "down")
    } else {
        ("Price up", "up")
    };
    let missing =
        ensure_chosen(page, "Category", category).or_else(|| ensure_chosen(page, "Sort", option));
    if let Some(step) = missing {
        return step;
    }
    if !is_shown(page, "category", category) || !is_shown(page, "sort", value) {
        return press(goal, page, "Find");
    }
    if is_shown(page, "page", "2") || page.find("link", "Previous page").is_some() {
        return open(&goal.url);
    }
    match page.links_below(PRODUCT).nth(rank - 1) {
        Some(link) => answer(&link.name),
        None => open(&goal.url),
    }
}

/// Filters by category and price and reads how many were found.
pub(super) fn count(goal: &Goal, page: &Snapshot, category: &str, max: &str) -> Step {
    if page.path() != LIST {
        return open(&goal.url);
    }
    let missing = ensure_chosen(page, "Category", category)
        .or_else(|| ensure_typed(page, "Max price", max, true));
    if let Some(step) = missing {
        return step;
    }
    if !is_shown(page, "category", category) || !is_shown(page, "max", max) {
        return press(goal, page, "Find");
    }
    let status = page.first("status").map_or("", |node| node.value.as_str());
    match status.split_once(" found") {
        Some((count, _)) => answer(count),
        None => open(&goal.url),
    }
}

/// Types the name into the search field, unless the list is that of the name already.
fn search(page: &Snapshot, product: &str) -> Option<Step> {
    ensure_typed(page, "Search", product, true)
}

/// Whether the list in view was asked for with that field, which its address shows.
fn is_shown(page: &Snapshot, field: &str, value: &str) -> bool {
    let query = page.url.split_once('?').map_or("", |(_, query)| query);
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .any(|(name, text)| name == field && text == value)
}
