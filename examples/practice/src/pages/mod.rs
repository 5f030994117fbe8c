//! The pages: pure functions from the world and a request to a page model.
//!
//! No IO, no HTML, no sessions; the site calls these and renders what they return.

pub mod account;
pub mod boards;
pub mod booking;
pub mod crew;
pub mod depot;
pub mod reports;
pub mod shop;

use crate::page::{Block, Link, Page};

/// The page at `/`: where everything is.
pub fn home() -> Page {
    let areas = [
        ("Shop", "/shop"),
        ("Booking", "/booking"),
        ("Crew", "/crew"),
        ("Login", "/login"),
        ("Notices", "/notices"),
        ("Reports", "/slow"),
        ("Rooms", "/late"),
        ("Depot", "/depot"),
    ];
    let links = areas
        .iter()
        .map(|(text, href)| Link::new(*text, *href))
        .collect();
    Page::new("Practice site")
        .with(Block::Text("Pick a part of the site.".into()))
        .with(Block::Links(links))
}

/// The page of an address that leads nowhere.
pub fn missing() -> Page {
    Page::new("Not found").with(Block::Alert("There is no such page.".into()))
}
