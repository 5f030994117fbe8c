//! The depot: a search and three lists of which one leads to parcels, a page for each, and the buttons that sign for it.

use serde::Deserialize;

use crate::depot::{Code, Depot, Parcel, Sign, Way};
use crate::page::{Block, Fact, Field, Form, Input, Link, Method, Page};

/// What a visitor searches for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Query {
    /// Words that the name must contain.
    pub q: String,
}

/// What a visitor presses for a parcel.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Signed {
    /// The parcel's part of its address.
    pub parcel: String,
}

/// The page at `/depot`.
pub fn index() -> Page {
    let lists = Way::ALL[1..]
        .iter()
        .map(|way| Link::new(way.label(), list_path(*way)))
        .collect();
    Page::new("Depot")
        .with(Block::Form(search_form("")))
        .with(Block::Links(lists))
}

/// What the search finds.
pub fn search(depot: &Depot, query: &Query) -> Page {
    let wanted = query.q.trim().to_lowercase();
    let found: Vec<&Parcel> = depot
        .parcels
        .iter()
        .filter(|_| depot.way == Way::Search && !wanted.is_empty())
        .filter(|parcel| parcel.name.contains(&wanted))
        .take(12)
        .collect();
    let page = Page::new("Depot search").with(Block::Form(search_form(&query.q)));
    match found.is_empty() {
        true => page.with(Block::Status("Nothing found".into())),
        false => page.with(Block::Links(found.into_iter().map(parcel_link).collect())),
    }
}

/// The groups of a list.
pub fn list(depot: &Depot, way: Way) -> Page {
    let page = Page::new(way.label());
    if way != depot.way {
        return page.with(Block::Status("This list is closed".into()));
    }
    let link = |group: &&str| Link::new(*group, format!("{}/{group}", list_path(way)));
    page.with(Block::Links(depot.groups(way).iter().map(link).collect()))
}

/// The parcels of a group.
pub fn group(depot: &Depot, way: Way, name: &str) -> Option<Page> {
    let of = |parcel: &&Parcel| way == depot.way && way.group(parcel) == name;
    let found: Vec<Link> = depot.parcels.iter().filter(of).map(parcel_link).collect();
    let title = format!("{} {name}", way.label());
    (!found.is_empty()).then(|| Page::new(title).with(Block::Links(found)))
}

/// One parcel.
pub fn parcel(parcel: &Parcel) -> Page {
    let fact = |name, value: u64, id| Fact {
        name,
        value: value.to_string(),
        id,
    };
    let mut facts = vec![fact("Weight", parcel.weight, "weight")];
    facts.extend(Code::ALL.map(|code| fact(code.label(), parcel.code(code), code.label())));
    Page::new(parcel.name.clone()).with(Block::Facts(facts))
}

/// The buttons for one parcel.
pub fn sign(parcel: &Parcel) -> Page {
    let form = |sign: Sign| {
        Block::Form(Form {
            action: sign_path(sign),
            method: Method::Post,
            hidden: vec![("parcel", parcel.slug())],
            fields: vec![],
            button: sign.label(),
        })
    };
    let page = Page::new(format!("Sign for {}", parcel.name));
    Sign::ALL
        .into_iter()
        .fold(page, |page, sign| page.with(form(sign)))
}

/// What comes of a press.
pub fn signed(depot: &Depot, sign: Sign, signed: &Signed) -> Option<Page> {
    let parcel = depot.parcel(&signed.parcel)?;
    Some(match sign == depot.sign {
        true => Page::new("Signed").with(Block::Facts(vec![Fact {
            name: "Receipt",
            value: parcel.receipt.to_string(),
            id: "receipt",
        }])),
        false => Page::new("Not signed").with(Block::Alert("That is not how we sign here".into())),
    })
}

/// The button whose press goes to that path.
pub fn sign_at(path: &str) -> Option<Sign> {
    Sign::ALL.into_iter().find(|sign| sign_path(*sign) == path)
}

fn sign_path(sign: Sign) -> &'static str {
    match sign {
        Sign::Keep => "/depot/keep",
        Sign::Send => "/depot/send",
        Sign::Hold => "/depot/hold",
        Sign::Free => "/depot/free",
    }
}

fn list_path(way: Way) -> String {
    format!("/depot/{}", way.label().to_lowercase())
}

fn parcel_link(parcel: &Parcel) -> Link {
    Link::new(
        parcel.name.clone(),
        format!("/depot/parcel/{}", parcel.slug()),
    )
}

fn search_form(q: &str) -> Form {
    Form {
        action: "/depot/search",
        method: Method::Get,
        hidden: vec![],
        fields: vec![Field {
            label: "Search",
            name: "q",
            input: Input::Text(q.to_owned()),
        }],
        button: "Find",
    }
}
