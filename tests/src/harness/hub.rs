//! A hub of models on this machine, which speaks what `hf-hub` asks of the Hugging Face hub: none is to be had where tests
//! run. It serves one repository out of a folder, and does it badly when it is told to.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use espalier_core::trace::sha256_hex;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use futures::{StreamExt as _, stream};
use serde_json::json;
use tokio::net::TcpListener;

/// The commit of everything.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What happens to a file on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Half of what is asked for comes, and then the connection breaks.
    Breaks,
    /// Half of what is asked for comes, and then nothing.
    Hangs,
    /// All of it comes, and is not what was promised.
    Lies,
}

/// A request for a file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which file.
    pub file: String,
    /// From which byte on.
    pub start: usize,
    /// The bearer token.
    pub token: Option<String>,
}

/// The running hub.
#[derive(Debug)]
pub struct Hub {
    /// For `HF_ENDPOINT`.
    pub url: String,
    state: Arc<Serves>,
}

#[derive(Debug)]
struct Serves {
    repo: String,
    folder: PathBuf,
    asked: Mutex<Vec<Asked>>,
    fault: Mutex<Option<(String, Fault)>>,
}

impl Hub {
    /// Serves `folder` as `repo`.
    pub async fn start(repo: &str, folder: &Path) -> Self {
        let state = Arc::new(Serves {
            repo: repo.to_owned(),
            folder: folder.to_owned(),
            asked: Mutex::default(),
            fault: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&state));
        let server = async move { axum::serve(listener, router).await };
        Tasks::new(Shutdown::new()).spawn("hub", OnFailure::Log, server);
        Self {
            url: format!("http://{address}"),
            state,
        }
    }

    /// From now on, until it is told otherwise, the file suffers this.
    pub fn fault(&self, file: &str, fault: Fault) {
        *self.state.fault() = Some((file.to_owned(), fault));
    }

    /// All files come as they should.
    pub fn heal(&self) {
        *self.state.fault() = None;
    }

    /// Every request for content so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked().clone()
    }

    /// Where each request for this file's content began.
    pub fn starts(&self, file: &str) -> Vec<usize> {
        let asked = self.asked();
        let of_file = asked.iter().filter(|asked| asked.file == file);
        of_file.map(|asked| asked.start).collect()
    }
}

impl Serves {
    fn asked(&self) -> std::sync::MutexGuard<'_, Vec<Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> std::sync::MutexGuard<'_, Option<(String, Fault)>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).expect("the folder of the test's");
        let name = |entry: std::fs::DirEntry| entry.file_name().into_string().expect("UTF-8");
        entries
            .map(|entry| name(entry.expect("an entry")))
            .collect()
    }
}

async fn answer(State(state): State<Arc<Serves>>, request: Request) -> Response {
    let path = request.uri().path();
    let repo = &state.repo;
    if path.starts_with(&format!("/api/models/{repo}/revision/")) {
        let files = state.files();
        let files: Vec<_> = files
            .iter()
            .map(|file| json!({"rfilename": file}))
            .collect();
        return axum::Json(json!({"sha": COMMIT, "siblings": files})).into_response();
    }
    match path.strip_prefix(&format!("/{repo}/resolve/{COMMIT}/")) {
        Some(file) => content(&state, file, request.headers()),
        None => (StatusCode::NOT_FOUND, "Repository not found").into_response(),
    }
}

fn content(state: &Serves, file: &str, headers: &HeaderMap) -> Response {
    let Ok(whole) = std::fs::read(state.folder.join(file)) else {
        return (StatusCode::NOT_FOUND, "Entry not found").into_response();
    };
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let range = text(header::RANGE).and_then(|range| range.strip_prefix("bytes="));
    let (start, end) = range
        .and_then(|range| range.split_once('-'))
        .unwrap_or(("0", ""));
    let start: usize = start.parse().expect("a number");
    let end = end.parse().map_or(whole.len(), |last: usize| last + 1);
    // Large files are known by the digest of their content, small ones by git's.
    let digest = match file.ends_with(".safetensors") {
        true => sha256_hex(&whole),
        false => sha256_hex(&whole)[..40].to_owned(),
    };
    let told = [
        (header::ETAG.as_str(), format!("\"{digest}\"")),
        ("x-repo-commit", COMMIT.to_owned()),
        (
            header::CONTENT_RANGE.as_str(),
            format!("bytes {start}-{}/{}", end.saturating_sub(1), whole.len()),
        ),
        (header::CONTENT_LENGTH.as_str(), (end - start).to_string()),
    ];
    let mut piece = whole[start..end].to_vec();
    if piece.len() <= 1 {
        return (StatusCode::PARTIAL_CONTENT, told, piece).into_response();
    }
    state.asked().push(Asked {
        file: file.to_owned(),
        start,
        token: text(header::AUTHORIZATION)
            .and_then(|value| value.strip_prefix("Bearer "))
            .map(str::to_owned),
    });
    let fault = state.fault().clone().filter(|(of, _)| of == file);
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
