//! What the site answers to a request, as a value: pages, redirects, sessions that begin and end.
//!
//! Pure: the site puts it behind HTTP, and whoever imagines a browser asks it directly.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::depot::Way;
use crate::page::{Block, Page};
use crate::pages;
use crate::world::World;

/// Time that a report takes to come.
pub const SLOW_DELAY_MS: u64 = 1_500;

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Whether fields come in the body; else in the address.
    pub post: bool,
    /// The path, such as `/shop`.
    pub path: &'a str,
    /// The fields, as a form writes them.
    pub fields: &'a str,
    /// Who is logged in.
    pub user: Option<&'a str>,
}

/// What becomes of the visitor's session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Session {
    /// Nothing.
    Keep,
    /// It begins, for that user.
    Open(String),
    /// It ends.
    Close,
}

/// What is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A page, with the status of HTTP.
    Page(u16, Page),
    /// What is at another path.
    Redirect(String),
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What is shown.
    pub shown: Shown,
    /// What becomes of the session.
    pub session: Session,
    /// Time that it takes to come.
    pub delay_ms: u64,
}

impl Answer {
    fn page(page: Page) -> Self {
        Self::shown(Shown::Page(200, page))
    }

    fn redirect(to: impl Into<String>) -> Self {
        Self::shown(Shown::Redirect(to.into()))
    }

    fn missing() -> Self {
        Self::shown(Shown::Page(404, pages::missing()))
    }

    fn some(page: Option<Page>) -> Self {
        page.map_or_else(Self::missing, Self::page)
    }

    fn shown(shown: Shown) -> Self {
        Self {
            shown,
            session: Session::Keep,
            delay_ms: 0,
        }
    }

    fn then(self, session: Session) -> Self {
        Self { session, ..self }
    }
}

/// The name that the pages of reports and rooms ask for.
#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    name: String,
}

/// Answers a request.
pub fn answer(world: &World, request: Request<'_>) -> Answer {
    routed(world, request).unwrap_or_else(|unreadable| unreadable)
}

/// The error is the answer to fields that cannot be read.
fn routed(world: &World, request: Request<'_>) -> Result<Answer, Answer> {
    let parts: Vec<&str> = request.path.split('/').skip(1).collect();
    Ok(match (request.post, parts.as_slice()) {
        (false, [""]) => Answer::page(pages::home()),
        (false, ["shop"]) => Answer::page(pages::shop::list(world, &read(request)?)),
        (false, ["shop", "product", slug]) => {
            Answer::some(world.product(slug).map(pages::shop::product))
        }
        (_, ["booking", step @ ..]) => booking(world, request, step)?,
        (false, ["crew"]) => Answer::page(pages::crew::index(world)),
        (false, ["crew", name]) => {
            let query = read(request)?;
            Answer::some(world.team(name).map(|team| pages::crew::team(team, &query)))
        }
        (_, ["login" | "account" | "logout"]) => account(world, request)?,
        (false, ["notices"]) => Answer::page(pages::boards::index(world)),
        (false, ["notices", board]) => Answer::some(world.board(board).map(pages::boards::board)),
        (false, ["notices", board, notice]) => {
            let board = world.board(board);
            let found = board.and_then(|board| pages::boards::find(board, notice));
            Answer::some(found.map(pages::boards::notice))
        }
        (false, ["slow" | "late", ..]) => reports(world, request, &parts)?,
        (_, ["depot", rest @ ..]) => depot(world, request, rest)?,
        _ => Answer::missing(),
    })
}

fn read<T: DeserializeOwned>(request: Request<'_>) -> Result<T, Answer> {
    serde_urlencoded::from_str(request.fields).map_err(|error| {
        let page = Page::new("Bad request").with(Block::Alert(error.to_string()));
        Answer::shown(Shown::Page(400, page))
    })
}

/// The later steps have no page of their own: who opens one by its address begins at the first.
fn booking(world: &World, request: Request<'_>, step: &[&str]) -> Result<Answer, Answer> {
    Ok(match (request.post, step) {
        (false, []) => Answer::page(pages::booking::who(&Default::default(), None)),
        (false, ["when" | "review" | "confirm"]) => Answer::redirect("/booking"),
        (true, ["when"]) => Answer::page(pages::booking::when(&read(request)?)),
        (true, ["review"]) => Answer::page(pages::booking::review(world, &read(request)?)),
        (true, ["confirm"]) => Answer::page(pages::booking::confirm(world, &read(request)?)),
        _ => Answer::missing(),
    })
}

fn account(world: &World, request: Request<'_>) -> Result<Answer, Answer> {
    Ok(match (request.post, request.path) {
        (false, "/login") => Answer::page(pages::account::login(None)),
        (true, "/login") => {
            let entry: pages::account::Login = read(request)?;
            match pages::account::check(world, &entry) {
                Some(account) => {
                    Answer::redirect("/account").then(Session::Open(account.user.clone()))
                }
                None => Answer::page(pages::account::login(Some(&entry.user))),
            }
        }
        (false, "/account") => match request.user.and_then(|user| world.account(user)) {
            Some(account) => Answer::page(pages::account::account(account)),
            None => Answer::redirect("/login"),
        },
        (false, "/logout") => Answer::redirect("/login").then(Session::Close),
        _ => Answer::missing(),
    })
}

fn reports(world: &World, request: Request<'_>, parts: &[&str]) -> Result<Answer, Answer> {
    Ok(match parts {
        ["slow"] => ask_for("Reports", "/slow", &read(request)?, |name| {
            world.report_total(name).is_some()
        }),
        ["late"] => ask_for("Rooms", "/late", &read(request)?, |name| {
            world.room_word(name).is_some()
        }),
        ["slow", name] => {
            let total = world.report_total(name);
            Answer {
                delay_ms: SLOW_DELAY_MS,
                ..Answer::some(total.map(|total| pages::reports::report(name, total)))
            }
        }
        ["late", name] => {
            let word = world.room_word(name);
            Answer::some(word.map(|word| pages::reports::room(name, word)))
        }
        _ => Answer::missing(),
    })
}

/// Answers a name that the visitor typed: its page when it exists, else the question again.
fn ask_for(
    title: &str,
    action: &'static str,
    asked: &Named,
    exists: impl Fn(&str) -> bool,
) -> Answer {
    let name = asked.name.trim();
    if exists(name) {
        return Answer::redirect(format!("{action}/{name}"));
    }
    let missing = (!asked.name.is_empty()).then_some(asked.name.as_str());
    Answer::page(pages::reports::ask(title, action, missing))
}

fn depot(world: &World, request: Request<'_>, rest: &[&str]) -> Result<Answer, Answer> {
    let depot = &world.depot;
    Ok(match (request.post, rest) {
        (false, []) => Answer::page(pages::depot::index()),
        (false, ["search"]) => Answer::page(pages::depot::search(depot, &read(request)?)),
        (false, ["parcel", slug]) => Answer::some(depot.parcel(slug).map(pages::depot::parcel)),
        (false, ["sign", slug]) => Answer::some(depot.parcel(slug).map(pages::depot::sign)),
        (false, [list]) => Answer::some(Way::list(list).map(|way| pages::depot::list(depot, way))),
        (false, [list, group]) => {
            let page = Way::list(list).and_then(|way| pages::depot::group(depot, way, group));
            Answer::some(page)
        }
        (true, [_]) => {
            let signed = read(request)?;
            let sign = pages::depot::sign_at(request.path);
            Answer::some(sign.and_then(|sign| pages::depot::signed(depot, sign, &signed)))
        }
        _ => Answer::missing(),
    })
}
