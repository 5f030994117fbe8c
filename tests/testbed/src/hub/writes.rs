//! Repositories that are made, large files that come to the storage, and commits.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{All, Made, Repo, Shared, bearer, is_large, oid, parsed, said, sha256_hex};

pub(super) fn answer(shared: &Shared, parts: &Parts, body: Bytes) -> Response {
    let path = parts.uri.path().trim_start_matches('/');
    if let Some(rest) = path.strip_prefix("storage/") {
        return store(shared, parts, rest, body);
    }
    let may = {
        let (all, token) = (shared.all(), bearer(&parts.headers));
        match (&all.writers, token) {
            (None, Some(_)) => Ok(()),
            (_, None) => Err((StatusCode::UNAUTHORIZED, "Invalid username or password.")),
            (Some(writers), Some(token)) if writers.contains(&token) => Ok(()),
            (Some(_), Some(_)) => Err((StatusCode::FORBIDDEN, "You don't have the rights")),
        }
    };
    if let Err((status, error)) = may {
        return said(status, error);
    }
    if path == "api/repos/create" {
        return create(shared, &parsed(&body));
    }
    if let Some((repo, what)) = path.split_once(".git/info/lfs/objects/") {
        let repo = repo.to_owned();
        return match what {
            "batch" => batch(shared, &repo, &parsed(&body)),
            _ => verify(shared, &parsed(&body)),
        };
    }
    let rest = path.strip_prefix("api/").unwrap_or_default();
    let preupload = rest.split_once("/preupload/");
    if let Some((repo, _)) = preupload {
        return modes(shared, repo, &parsed(&body));
    }
    match rest.split_once("/commit/") {
        Some((repo, _)) => commit(shared, repo, &body),
        None => said(StatusCode::NOT_FOUND, "no such thing"),
    }
}

fn create(shared: &Shared, body: &Value) -> Response {
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let name = format!(
        "{}s/{}/{}",
        text("type"),
        text("organization"),
        text("name")
    );
    let mut all = shared.all();
    if all.repos.contains_key(&name) {
        return said(StatusCode::CONFLICT, "You already created this model repo");
    }
    let repo = Repo {
        private: body["private"].as_bool().unwrap_or(false),
        ..Repo::default()
    };
    all.repos.insert(name.clone(), repo);
    axum::Json(json!({"url": format!("{}/{name}", shared.url)})).into_response()
}

fn modes(shared: &Shared, repo: &str, body: &Value) -> Response {
    let all = shared.all();
    let Some(repo) = all.repos.get(repo) else {
        return said(StatusCode::NOT_FOUND, "Repository not found");
    };
    let has = repo.files();
    let files = body["files"].as_array().cloned().unwrap_or_default();
    let mode = |file: &Value| {
        let path = file["path"].as_str().unwrap_or_default();
        let large = is_large(path, file["size"].as_u64().unwrap_or(0) as usize);
        let mode = if large { "lfs" } else { "regular" };
        let oid = has.get(path).map(|content| oid(path, content));
        json!({"path": path, "uploadMode": mode, "shouldIgnore": false, "oid": oid})
    };
    axum::Json(json!({"files": files.iter().map(mode).collect::<Vec<_>>()})).into_response()
}

fn batch(shared: &Shared, repo: &str, body: &Value) -> Response {
    let all = shared.all();
    let objects = body["objects"].as_array().cloned().unwrap_or_default();
    let object = |object: &Value| {
        let oid = object["oid"].as_str().unwrap_or_default();
        let size = object["size"].as_u64().unwrap_or(0);
        if all.storage.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        let (at, url) = (format!("{}/storage/{oid}", shared.url), &shared.url);
        let upload = match all.part_bytes {
            Some(part) if size > part as u64 => {
                let mut header = json!({"chunk_size": part.to_string()});
                for n in 1..=size.div_ceil(part as u64) {
                    header[format!("{n:05}")] = json!(format!("{at}/{n}?signature=s3cret"));
                }
                json!({"href": format!("{url}/{repo}.git/info/lfs/objects/complete"), "header": header})
            }
            _ => json!({"href": format!("{at}?signature=s3cret"), "header": {"x-of": oid}}),
        };
        let verify = json!({"href": format!("{url}/{repo}.git/info/lfs/objects/verify")});
        json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    };
    let objects: Vec<Value> = objects.iter().map(object).collect();
    axum::Json(json!({"transfer": "basic", "objects": objects})).into_response()
}

/// The storage is somebody else's, and must not see a token.
fn store(shared: &Shared, parts: &Parts, rest: &str, body: Bytes) -> Response {
    if bearer(&parts.headers).is_some() {
        return said(StatusCode::BAD_REQUEST, "the storage was shown a token");
    }
    let mut all = shared.all();
    match rest.split_once('/') {
        None if sha256_hex(&body) != rest => {
            return said(StatusCode::BAD_REQUEST, "another digest");
        }
        None => {
            all.storage.insert(rest.to_owned(), body);
        }
        Some((oid, part)) => {
            let part = part.parse().expect("a number");
            all.parts.insert((oid.to_owned(), part), body);
        }
    }
    ([("etag", "\"part\"")], "").into_response()
}

/// Checks that a large file is there; one that came in parts is put together.
fn verify(shared: &Shared, body: &Value) -> Response {
    let oid = body["oid"].as_str().unwrap_or_default().to_owned();
    let mut all = shared.all();
    if let Some(parts) = body["parts"].as_array() {
        let whole: Vec<u8> = parts
            .iter()
            .filter_map(|part| all.part(&oid, part["partNumber"].as_u64()?))
            .flatten()
            .collect();
        if sha256_hex(&whole) != oid {
            return said(StatusCode::BAD_REQUEST, "the parts are not the whole");
        }
        all.storage.insert(oid.clone(), whole.into());
    }
    match all.storage.get(&oid) {
        Some(content) if body["size"].is_null() || body["size"] == content.len() => {
            axum::Json(json!({})).into_response()
        }
        _ => said(StatusCode::NOT_FOUND, "the object is not there"),
    }
}

impl All {
    fn part(&self, oid: &str, n: u64) -> Option<Vec<u8>> {
        let part = self.parts.get(&(oid.to_owned(), n as u32))?;
        Some(part.to_vec())
    }
}

fn commit(shared: &Shared, repo: &str, body: &[u8]) -> Response {
    let mut all = shared.all();
    let storage = all.storage.clone();
    let Some(repo) = all.repos.get_mut(repo) else {
        return said(StatusCode::NOT_FOUND, "Repository not found");
    };
    let (mut files, mut header) = (repo.files(), json!({}));
    for line in body
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let line = parsed(line);
        if line["key"] == "header" {
            header = line["value"].clone();
        } else if !apply(&line, &storage, &mut files) {
            return said(StatusCode::BAD_REQUEST, &format!("cannot take {line}"));
        }
    }
    let n = repo.commits.len() + 1;
    let text = |name: &str| header[name].as_str().unwrap_or_default().to_owned();
    let made = Made {
        id: sha256_hex(format!("{} {n}", repo.head()).as_bytes())[..40].to_owned(),
        summary: text("summary"),
        description: text("description"),
    };
    repo.snapshots.insert(made.id.clone(), files);
    let answer = json!({"success": true, "commitOid": made.id, "commitUrl": shared.url});
    repo.commits.push(made);
    axum::Json(answer).into_response()
}

/// Whether a line of a commit could be done.
fn apply(
    line: &Value,
    storage: &BTreeMap<String, Bytes>,
    files: &mut BTreeMap<String, Bytes>,
) -> bool {
    let value = &line["value"];
    let path = value["path"].as_str().unwrap_or_default().to_owned();
    if line["key"] == "deletedFile" {
        return files.remove(&path).is_some();
    }
    let content = match line["key"].as_str() {
        Some("file") => {
            let content = BASE64.decode(value["content"].as_str().unwrap_or_default());
            content.ok().map(Bytes::from)
        }
        Some("lfsFile") => storage
            .get(value["oid"].as_str().unwrap_or_default())
            .cloned(),
        _ => None,
    };
    let known = content.is_some() && !path.is_empty();
    files.extend(content.map(|content| (path, content)));
    known
}
