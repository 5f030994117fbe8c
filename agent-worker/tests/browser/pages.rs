//! Web servers of a test's own.

use axum::Router;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, SET_COOKIE};
use axum::http::{Method, Uri};
use axum::response::{IntoResponse, Response};
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use tokio::net::TcpListener;

/// A web server whose pages are made by `answer`.
pub(super) async fn serve<A>(answer: A) -> String
where
    A: Fn(Method, String) -> Response + Clone + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let page = |State(answer): State<A>, method: Method, uri: Uri| async move {
        answer(method, uri.to_string())
    };
    let router = Router::new().fallback(page).with_state(answer);
    let tasks = Tasks::new(Shutdown::new());
    tasks.spawn("test.site", OnFailure::Log, async move {
        axum::serve(listener, router).await
    });
    address
}

pub(super) fn html(body: &str) -> Response {
    (
        [(CONTENT_TYPE, "text/html")],
        format!("<!doctype html><title>t</title><body>{body}"),
    )
        .into_response()
}

/// `/put/X` leaves X in every kind of storage, `/show` tells what is there.
pub(super) fn storage_site(_: Method, path: String) -> Response {
    match path.strip_prefix("/put/") {
        Some(marker) => {
            let script = format!(
                "<h1>put {marker}</h1><script>localStorage.m='{marker}';sessionStorage.m='{marker}';window.name='{marker}';\
                 caches.open('{marker}');indexedDB.open('{marker}');</script>"
            );
            ([(SET_COOKIE, format!("m={marker}; Path=/"))], html(&script)).into_response()
        }
        None => html(
            "<p id=o></p><script>(async () => { const dbs = (await indexedDB.databases()).map(d => d.name); \
             o.textContent = ['COOKIE', document.cookie, 'LOCAL', localStorage.m, 'SESSION', sessionStorage.m, \
             'NAME', window.name, 'CACHES', await caches.keys(), 'DBS', dbs, 'END'].join(' '); })()</script>",
        ),
    }
}
