//! The site as an HTTP server: cookies and delays around the pure answers.
//!
//! Serves loopback practice only and has no secrets: passwords are part of the tasks. Called by `espalier practice
//! serve` and by the tests.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{CACHE_CONTROL, COOKIE, SET_COOKIE};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{Html, IntoResponse, Redirect, Response};
use tokio::net::TcpListener;

use crate::html;
use crate::page::{Block, Page};
pub use crate::route::SLOW_DELAY_MS;
use crate::route::{Request, Session, Shown, answer};
use crate::sessions::Sessions;
use crate::world::World;

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
        .fallback(respond)
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
    /// A panic while the lock was held cannot leave a session half made, so a poisoned lock is still good.
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.0
            .sessions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

async fn respond(
    State(site): State<Site>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    let body = body.as_deref().map(std::str::from_utf8);
    let fields = match (&method, body) {
        (&Method::POST, Ok(Ok(body))) => body,
        (&Method::POST, _) => return unreadable("The form is too long, or no text."),
        (&Method::GET | &Method::HEAD, _) => uri.query().unwrap_or_default(),
        _ => return StatusCode::METHOD_NOT_ALLOWED.into_response(),
    };
    let session = session_of(&headers);
    let user = session.and_then(|id| site.sessions().user(id).map(ToOwned::to_owned));
    let request = Request {
        post: method == Method::POST,
        path: uri.path(),
        fields,
        user: user.as_deref(),
    };
    let answer = answer(&site.0.world, request);
    if answer.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(answer.delay_ms)).await;
    }
    let shown = match answer.shown {
        Shown::Page(status, page) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
            (status, show(&page)).into_response()
        }
        Shown::Redirect(to) => Redirect::to(&to).into_response(),
    };
    let cookie = match answer.session {
        Session::Keep => return shown,
        Session::Open(user) => {
            let id = site.sessions().open(&user);
            format!("{COOKIE_NAME}={id}; Path=/; HttpOnly; SameSite=Lax")
        }
        Session::Close => {
            if let Some(id) = session {
                site.sessions().close(id);
            }
            format!("{COOKIE_NAME}=; Path=/; Max-Age=0")
        }
    };
    ([(SET_COOKIE, cookie)], shown).into_response()
}

fn show(page: &Page) -> Response {
    ([(CACHE_CONTROL, "no-store")], Html(html::render(page))).into_response()
}

/// A request whose fields cannot be read at all.
fn unreadable(reason: &str) -> Response {
    let page = Page::new("Bad request").with(Block::Alert(reason.to_owned()));
    (StatusCode::BAD_REQUEST, show(&page)).into_response()
}

fn session_of(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get(COOKIE)?.to_str().ok()?;
    cookies
        .split(';')
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}
