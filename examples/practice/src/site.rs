//! The site as an HTTP server: routes, cookies and delays around the pure pages.
//!
//! Serves loopback practice only and has no secrets: passwords are part of the tasks. Called by `espalier practice
//! serve` and by the tests.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::{FormRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Form, Path, Query, State};
use axum::http::header::{CACHE_CONTROL, COOKIE, SET_COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::net::TcpListener;

use crate::page::{Block, Page};
use crate::sessions::Sessions;
use crate::world::World;
use crate::{html, pages};

/// Time that a report takes to come.
pub const SLOW_DELAY_MS: u64 = 1_500;
/// Largest form that is read: the longest one of a visitor has a few hundred bytes.
const BODY_BYTES_MAX: usize = 16 * 1024;
const COOKIE_NAME: &str = "sid";

/// Serves the site of `seed` on `listener` until `shutdown` resolves and the requests at hand are answered.
pub async fn serve(
    listener: TcpListener,
    seed: u64,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(seed))
        .with_graceful_shutdown(shutdown)
        .await
}

/// The routes of the site of `seed`, for a server of the caller's own.
pub fn router(seed: u64) -> Router {
    let site = Site(Arc::new(Shared {
        world: World::new(seed),
        sessions: Mutex::new(Sessions::new(seed)),
    }));
    Router::new()
        .route("/", get(async || show(&pages::home())))
        .route("/shop", get(shop_list))
        .route("/shop/product/{slug}", get(shop_product))
        .route(
            "/booking",
            get(async || show(&pages::booking::who(&Default::default(), None))),
        )
        .route("/booking/when", get(to_booking).post(booking_when))
        .route("/booking/review", get(to_booking).post(booking_review))
        .route("/booking/confirm", get(to_booking).post(booking_confirm))
        .route("/crew", get(crew_index))
        .route("/crew/{team}", get(crew_team))
        .route(
            "/login",
            get(async || show(&pages::account::login(None))).post(login),
        )
        .route("/account", get(account))
        .route("/logout", get(logout))
        .route("/notices", get(notices_index))
        .route("/notices/{board}", get(notices_board))
        .route("/notices/{board}/{notice}", get(notices_notice))
        .route("/slow", get(slow_ask))
        .route("/slow/{name}", get(slow_report))
        .route("/late", get(late_ask))
        .route("/late/{name}", get(late_room))
        .fallback(async || missing())
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(site)
}

struct Shared {
    world: World,
    sessions: Mutex<Sessions>,
}

#[derive(Clone)]
struct Site(Arc<Shared>);

impl Site {
    fn world(&self) -> &World {
        &self.0.world
    }

    /// A panic while the lock was held cannot leave a session half made, so a poisoned lock is still good.
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.0
            .sessions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name that the pages of reports and rooms ask for.
#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    name: String,
}

fn show(page: &Page) -> Response {
    ([(CACHE_CONTROL, "no-store")], Html(html::render(page))).into_response()
}

fn missing() -> Response {
    (StatusCode::NOT_FOUND, show(&pages::missing())).into_response()
}

fn show_or_missing(page: Option<Page>) -> Response {
    page.map_or_else(missing, |page| show(&page))
}

/// A request whose fields cannot be read at all; the reason is the framework's and names no internals.
fn unreadable(reason: String) -> Response {
    let page = Page::new("Bad request").with(Block::Alert(reason));
    (StatusCode::BAD_REQUEST, show(&page)).into_response()
}

async fn shop_list(
    State(site): State<Site>,
    query: Result<Query<pages::shop::Query>, QueryRejection>,
) -> Response {
    match query {
        Ok(Query(query)) => show(&pages::shop::list(site.world(), &query)),
        Err(error) => unreadable(error.body_text()),
    }
}

async fn shop_product(State(site): State<Site>, Path(slug): Path<String>) -> Response {
    show_or_missing(site.world().product(&slug).map(pages::shop::product))
}

type EntryForm = Result<Form<pages::booking::Entry>, FormRejection>;

/// The later steps have no page of their own: who opens one by its address begins at the first.
async fn to_booking() -> Redirect {
    Redirect::to("/booking")
}

async fn booking_when(form: EntryForm) -> Response {
    match form {
        Ok(Form(entry)) => show(&pages::booking::when(&entry)),
        Err(error) => unreadable(error.body_text()),
    }
}

async fn booking_review(State(site): State<Site>, form: EntryForm) -> Response {
    match form {
        Ok(Form(entry)) => show(&pages::booking::review(site.world(), &entry)),
        Err(error) => unreadable(error.body_text()),
    }
}

async fn booking_confirm(State(site): State<Site>, form: EntryForm) -> Response {
    match form {
        Ok(Form(entry)) => show(&pages::booking::confirm(site.world(), &entry)),
        Err(error) => unreadable(error.body_text()),
    }
}

async fn crew_index(State(site): State<Site>) -> Response {
    show(&pages::crew::index(site.world()))
}

async fn crew_team(
    State(site): State<Site>,
    Path(name): Path<String>,
    query: Result<Query<pages::crew::Query>, QueryRejection>,
) -> Response {
    match query {
        Ok(Query(query)) => show_or_missing(
            site.world()
                .team(&name)
                .map(|team| pages::crew::team(team, &query)),
        ),
        Err(error) => unreadable(error.body_text()),
    }
}

async fn login(
    State(site): State<Site>,
    form: Result<Form<pages::account::Login>, FormRejection>,
) -> Response {
    let entry = match form {
        Ok(Form(entry)) => entry,
        Err(error) => return unreadable(error.body_text()),
    };
    let Some(account) = pages::account::check(site.world(), &entry) else {
        return show(&pages::account::login(Some(&entry.user)));
    };
    let id = site.sessions().open(&account.user);
    let cookie = format!("{COOKIE_NAME}={id}; Path=/; HttpOnly; SameSite=Lax");
    ([(SET_COOKIE, cookie)], Redirect::to("/account")).into_response()
}

async fn account(State(site): State<Site>, headers: HeaderMap) -> Response {
    let user = session_of(&headers).and_then(|id| site.sessions().user(id).map(ToOwned::to_owned));
    match user.and_then(|user| site.world().account(&user)) {
        Some(account) => show(&pages::account::account(account)),
        None => Redirect::to("/login").into_response(),
    }
}

async fn logout(State(site): State<Site>, headers: HeaderMap) -> Response {
    if let Some(id) = session_of(&headers) {
        site.sessions().close(id);
    }
    let cookie = format!("{COOKIE_NAME}=; Path=/; Max-Age=0");
    ([(SET_COOKIE, cookie)], Redirect::to("/login")).into_response()
}

fn session_of(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get(COOKIE)?.to_str().ok()?;
    cookies
        .split(';')
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}

async fn notices_index(State(site): State<Site>) -> Response {
    show(&pages::boards::index(site.world()))
}

async fn notices_board(State(site): State<Site>, Path(name): Path<String>) -> Response {
    show_or_missing(site.world().board(&name).map(pages::boards::board))
}

async fn notices_notice(
    State(site): State<Site>,
    Path((board, notice)): Path<(String, String)>,
) -> Response {
    let found = site
        .world()
        .board(&board)
        .and_then(|board| pages::boards::find(board, &notice));
    show_or_missing(found.map(pages::boards::notice))
}

/// Answers a name that the visitor typed: its page when it exists, else the question again.
fn ask_for(
    title: &str,
    action: &'static str,
    query: Result<Query<Named>, QueryRejection>,
    exists: impl Fn(&str) -> bool,
) -> Response {
    match query {
        Ok(Query(Named { name })) if exists(name.trim()) => {
            Redirect::to(&format!("{action}/{}", name.trim())).into_response()
        }
        Ok(Query(Named { name })) => {
            let missing = (!name.is_empty()).then_some(name.as_str());
            show(&pages::reports::ask(title, action, missing))
        }
        Err(error) => unreadable(error.body_text()),
    }
}

async fn slow_ask(
    State(site): State<Site>,
    query: Result<Query<Named>, QueryRejection>,
) -> Response {
    ask_for("Reports", "/slow", query, |name| {
        site.world().report_total(name).is_some()
    })
}

async fn slow_report(State(site): State<Site>, Path(name): Path<String>) -> Response {
    tokio::time::sleep(Duration::from_millis(SLOW_DELAY_MS)).await;
    let total = site.world().report_total(&name);
    show_or_missing(total.map(|total| pages::reports::report(&name, total)))
}

async fn late_ask(
    State(site): State<Site>,
    query: Result<Query<Named>, QueryRejection>,
) -> Response {
    ask_for("Rooms", "/late", query, |name| {
        site.world().room_word(name).is_some()
    })
}

async fn late_room(State(site): State<Site>, Path(name): Path<String>) -> Response {
    let word = site.world().room_word(&name);
    show_or_missing(word.map(|word| pages::reports::room(&name, word)))
}
