//! What a repository holds, and its files.

use axum::body::{Body, Bytes};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt as _, stream};
use serde_json::json;

use super::{Asked, Fault, Shared, bearer, oid, said};

pub(super) fn answer(shared: &Shared, parts: &Parts) -> Response {
    let path = parts.uri.path();
    let info = path
        .strip_prefix("/api/")
        .and_then(|rest| rest.split_once("/revision/"));
    if let Some((repo, revision)) = info {
        return told(shared, repo, revision);
    }
    let (kind, path) = match path.strip_prefix("/datasets/") {
        Some(rest) => ("datasets", rest),
        None => ("models", path.trim_start_matches('/')),
    };
    let asked = path.split_once("/resolve/").and_then(|(repo, rest)| {
        let (commit, file) = rest.split_once('/')?;
        Some((format!("{kind}/{repo}"), commit, file))
    });
    let content = asked.as_ref().and_then(|(repo, commit, file)| {
        let all = shared.all();
        let content = all.repos.get(repo)?.snapshots.get(*commit)?.get(*file)?;
        Some(content.clone())
    });
    match (asked, content) {
        (Some((_, commit, file)), Some(whole)) => give(shared, parts, commit, file, whole),
        _ => said(StatusCode::NOT_FOUND, "Repository or entry not found"),
    }
}

fn told(shared: &Shared, repo: &str, revision: &str) -> Response {
    let all = shared.all();
    let Some(repo) = all.repos.get(repo) else {
        return said(StatusCode::NOT_FOUND, "Repository not found");
    };
    let commit = match repo.snapshots.contains_key(revision) {
        true => revision,
        false => repo.head(),
    };
    let files = repo.snapshots.get(commit).cloned().unwrap_or_default();
    let files: Vec<_> = files
        .keys()
        .map(|file| json!({"rfilename": file}))
        .collect();
    axum::Json(json!({"sha": commit, "private": repo.private, "siblings": files})).into_response()
}

fn give(shared: &Shared, parts: &Parts, commit: &str, file: &str, whole: Bytes) -> Response {
    let headers: &HeaderMap = &parts.headers;
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let range = text(header::RANGE).and_then(|range| range.strip_prefix("bytes="));
    let (start, end) = range
        .and_then(|range| range.split_once('-'))
        .unwrap_or(("0", ""));
    let start: usize = start.parse().expect("a number");
    let end = end.parse().map_or(whole.len(), |last: usize| last + 1);
    let digest = oid(file, &whole);
    let told = [
        (header::ETAG.as_str(), format!("\"{digest}\"")),
        ("x-repo-commit", commit.to_owned()),
        (
            header::CONTENT_RANGE.as_str(),
            format!("bytes {start}-{}/{}", end.saturating_sub(1), whole.len()),
        ),
        (header::CONTENT_LENGTH.as_str(), (end - start).to_string()),
    ];
    if parts.method == Method::HEAD {
        return (told, whole).into_response();
    }
    let mut piece = whole[start..end].to_vec();
    let mut all = shared.all();
    all.asked.push(Asked {
        file: file.to_owned(),
        start,
        token: bearer(headers),
    });
    let fault = all
        .fault
        .clone()
        .filter(|(of, _)| of == file && piece.len() > 1);
    let half = Bytes::copy_from_slice(&piece[..piece.len() / 2]);
    let first = stream::iter([Ok::<_, std::io::Error>(half)]);
    let body = match fault.map(|(_, fault)| fault) {
        None => Body::from(piece),
        Some(Fault::Lies) => {
            piece.iter_mut().for_each(|byte| *byte ^= 1);
            Body::from(piece)
        }
        Some(Fault::Breaks) => Body::from_stream(first.chain(stream::once(async {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }))),
        Some(Fault::Hangs) => Body::from_stream(first.chain(stream::pending())),
    };
    (StatusCode::PARTIAL_CONTENT, told, body).into_response()
}
