//! One request: its trouble, its key, what the description says of it, and then what it asks for.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::contract::{Operation, Unknown, problem};
use super::pods::Pod;
use super::{KEY, Shared, Trouble};

/// Largest body of a request.
const BODY_BYTES_MAX: usize = 1 << 20;

/// A status and what is said, if anything.
type Answer = (u16, Option<Value>);

pub async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let trouble = {
        let mut state = shared.state();
        state.asked.push(what.clone());
        state.trouble(&what)
    };
    match trouble {
        Some(Trouble::Status(status, wait)) => return refusal(status, wait),
        Some(Trouble::Cut) => cut(),
        Some(Trouble::Hang) => std::future::pending().await,
        Some(Trouble::CutAfter) | None => {}
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, BODY_BYTES_MAX).await;
    let query = parts.uri.query().unwrap_or_default();
    let response = if !is_known(&parts.headers) {
        said((
            401,
            Some(problem(401, "Unauthorized", "invalid bearer token", &[])),
        ))
    } else {
        match shared.contract.find(&parts.method, parts.uri.path()) {
            Ok((operation, id)) => {
                let asked = Asked {
                    operation,
                    id,
                    query: pairs(query),
                    body: body.unwrap_or_default(),
                };
                asked.answer(&shared, &what)
            }
            Err(unknown) => not_described(&shared, &what, unknown),
        }
    };
    if trouble == Some(Trouble::CutAfter) {
        cut();
    }
    response
}

/// A request that has an operation.
struct Asked<'a> {
    operation: Operation<'a>,
    id: String,
    query: Vec<(String, String)>,
    body: Bytes,
}

impl Asked<'_> {
    fn answer(&self, shared: &Shared, what: &str) -> Response {
        let contract = &shared.contract;
        let mut faults = contract.query_faults(self.operation, &self.query);
        faults.extend(contract.body_faults(self.operation, &self.body));
        let (status, body) = match faults.is_empty() {
            true => self.perform(shared, what),
            false => {
                violated(shared, what, &faults);
                let detail = "Request validation failed.";
                let refused = problem(422, "Unprocessable Entity", detail, &faults);
                (422, Some(refused))
            }
        };
        contract.assert_answer(self.operation, status, body.as_ref());
        said((status, body))
    }

    fn perform(&self, shared: &Shared, what: &str) -> Answer {
        let mut state = shared.state();
        let method = what.split(' ').next().unwrap_or_default();
        match (method, self.operation.path) {
            ("GET", "/v2/pods") => {
                let pods = state.pods.iter_mut();
                (
                    200,
                    Some(json!({"pods": pods.filter_map(listed).collect::<Vec<_>>()})),
                )
            }
            ("POST", "/v2/pods") => {
                let request: Value = serde_json::from_slice(&self.body).unwrap_or_default();
                match state.create(&request, &shared.folder) {
                    Ok(pod) => (201, Some(pod.to_json_new())),
                    Err((status, detail)) => {
                        (status, Some(problem(status, "Refused", &detail, &[])))
                    }
                }
            }
            ("GET", "/v2/pods/{id}") => match state.pods.iter_mut().find(|pod| pod.id() == self.id)
            {
                Some(pod) => (200, Some(pod.shown())),
                None => not_found(),
            },
            ("DELETE", "/v2/pods/{id}") => {
                let place = state.pods.iter().position(|pod| pod.id() == self.id);
                match place {
                    Some(place) => {
                        state.pods.remove(place);
                        (204, None)
                    }
                    None => not_found(),
                }
            }
            ("GET", "/v2/catalog/gpus") => match self.availability() {
                Ok(with) => {
                    let gpus = state.gpus.iter().map(|gpu| gpu.to_json(with));
                    (200, Some(json!({"gpus": gpus.collect::<Vec<_>>()})))
                }
                Err(detail) => (400, Some(problem(400, "Bad Request", detail, &[]))),
            },
            (method, path) => panic!("{method} {path} is described, and not served here: teach it"),
        }
    }

    /// Whether availability is wanted; of products, a number and a cloud only then.
    fn availability(&self) -> Result<bool, &'static str> {
        let has = |name: &str| self.query.iter().any(|(known, _)| known == name);
        match (has("include"), has("product")) {
            (true, true) => Ok(true),
            (true, false) => Err("product is required with include=AVAILABILITY"),
            (false, _) if ["product", "count", "cloud"].into_iter().any(has) => {
                Err("product, count and cloud are valid with include=AVAILABILITY only")
            }
            (false, _) => Ok(false),
        }
    }
}

/// A pod in a list, unless this is one that does not have it yet.
fn listed(pod: &mut Pod) -> Option<Value> {
    if pod.unlisted > 0 {
        pod.unlisted -= 1;
        return None;
    }
    Some(pod.shown())
}

fn not_found() -> Answer {
    (404, Some(problem(404, "Not Found", "pod not found", &[])))
}

fn not_described(shared: &Shared, what: &str, unknown: Unknown) -> Response {
    violated(shared, what, &[format!("{unknown:?} is not described")]);
    let (status, title) = match unknown {
        Unknown::Path => (404, "Not Found"),
        Unknown::Method => (405, "Method Not Allowed"),
    };
    said((
        status,
        Some(problem(status, title, "no such operation", &[])),
    ))
}

fn violated(shared: &Shared, what: &str, faults: &[String]) {
    let faults = faults.iter().map(|fault| format!("{what}: {fault}"));
    shared.state().violations.extend(faults);
}

fn is_known(headers: &HeaderMap) -> bool {
    let shown = headers.get(header::AUTHORIZATION);
    let shown = shown.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    shown == Some(KEY)
}

/// The parameters of a query, whose values may have escapes.
fn pairs(query: &str) -> Vec<(String, String)> {
    let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(
        &format!("/?{query}").parse().expect("a query that was sent"),
    );
    pairs.map(|pairs| pairs.0).unwrap_or_default()
}

/// Ends the connection's task without a word.
fn cut() -> ! {
    std::panic::resume_unwind(Box::new("the connection is cut"))
}

fn refusal(status: u16, wait: Option<u64>) -> Response {
    let detail = format!("it is so: {status}");
    let mut response = said((status, Some(problem(status, "Trouble", &detail, &[]))));
    if let Some(seconds) = wait {
        let headers = response.headers_mut();
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

fn said((status, body): Answer) -> Response {
    let status = StatusCode::from_u16(status).expect("a status");
    let Some(body) = body else {
        return status.into_response();
    };
    let kind = match status.is_success() {
        true => "application/json",
        false => "application/problem+json",
    };
    (status, [(header::CONTENT_TYPE, kind)], body.to_string()).into_response()
}
