//! Reports, which take their time to come, and rooms, whose page changes after it was loaded.

use crate::page::Field;
use crate::page::{Block, Fact, Form, Input, Late, Method, Page};

/// Time from load to change of a room's page.
pub const LATE_DELAY_MS: u64 = 900;

/// The page that asks for a report or a room by name; `missing` carries a name that does not exist.
pub fn ask(title: &str, action: &'static str, missing: Option<&str>) -> Page {
    let page = Page::new(title);
    let page = match missing {
        Some(name) => page.with(Block::Alert(format!("There is no {name} here"))),
        None => page.with(Block::Text("Names look like oak-harbor.".into())),
    };
    page.with(Block::Form(Form {
        action,
        method: Method::Get,
        hidden: vec![],
        fields: vec![Field {
            label: "Name",
            name: "name",
            input: Input::Text(missing.unwrap_or_default().to_owned()),
        }],
        button: "Open",
    }))
}

/// The report about `place`.
pub fn report(place: &str, total: u64) -> Page {
    Page::new(format!("Report {place}")).with(Block::Facts(vec![Fact {
        name: "Total",
        value: total.to_string(),
        id: "total",
    }]))
}

/// The room called `name`.
pub fn room(name: &str, word: String) -> Page {
    Page::new(format!("Room {name}")).with(Block::Late(Late {
        before: "Loading the word".into(),
        after: Fact {
            name: "Word",
            value: word,
            id: "word",
        },
        delay_ms: LATE_DELAY_MS,
    }))
}
