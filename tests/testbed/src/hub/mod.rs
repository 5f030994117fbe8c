//! A hub of models on this machine, which speaks what is asked of the Hugging Face hub: none is to be had where tests run.
//! It serves repositories out of memory, takes commits and large files, and does it badly when it is told to.

mod reads;
mod writes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The commit of every repository before there was another.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Larger files go to the storage.
const INLINE_BYTES_MAX: usize = 10 << 20;
/// Largest body of a request.
const BODY_BYTES_MAX: usize = 256 << 20;

/// What happens to a file on its way to whoever asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Half of what is asked for comes, and then the connection breaks.
    Breaks,
    /// Half of what is asked for comes, and then nothing.
    Hangs,
    /// All of it comes, and is not what was promised.
    Lies,
}

/// What a request meets in place of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A status, and how many seconds to wait, if it says so.
    Status(u16, Option<u64>),
    /// The connection is cut before the answer.
    Cut,
    /// It is done, and the connection is cut before the answer.
    CutAfter,
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

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Method and path.
    pub what: String,
    /// The bearer token.
    pub token: Option<String>,
}

/// A commit that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its id.
    pub id: String,
    /// Its first line.
    pub summary: String,
    /// What is below.
    pub description: String,
}

/// The running hub.
#[derive(Debug)]
pub struct Hub {
    /// For `HF_ENDPOINT`.
    pub url: String,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    url: String,
    state: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    /// By kind and name: `models/org/name`.
    repos: BTreeMap<String, Repo>,
    /// Large files, by their SHA-256.
    storage: BTreeMap<String, Bytes>,
    /// Parts of large files.
    parts: BTreeMap<(String, u32), Bytes>,
    /// Large files of more bytes come in parts of so many.
    part_bytes: Option<usize>,
    /// Tokens that may write; none: any may.
    writers: Option<BTreeSet<String>>,
    asked: Vec<Asked>,
    seen: Vec<Seen>,
    fault: Option<(String, Fault)>,
    /// What requests meet whose method and path hold a text, and how often.
    troubles: Vec<(String, Trouble, usize)>,
}

#[derive(Debug, Default)]
struct Repo {
    private: bool,
    /// The files of each commit, by its id.
    snapshots: BTreeMap<String, BTreeMap<String, Bytes>>,
    commits: Vec<Made>,
}

impl Repo {
    fn head(&self) -> &str {
        self.commits.last().map_or(COMMIT, |commit| &commit.id)
    }

    fn files(&self) -> BTreeMap<String, Bytes> {
        self.snapshots.get(self.head()).cloned().unwrap_or_default()
    }
}

impl Hub {
    /// Serves `folder` as the model `repo`.
    pub async fn start(repo: &str, folder: &Path) -> Self {
        let hub = Self::empty().await;
        let entries = std::fs::read_dir(folder).expect("the folder of the test's");
        let files = entries.map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("UTF-8");
            (name, std::fs::read(entry.path()).expect("a file").into())
        });
        let repository = Repo {
            snapshots: BTreeMap::from([(COMMIT.to_owned(), files.collect())]),
            ..Repo::default()
        };
        hub.all().repos.insert(format!("models/{repo}"), repository);
        hub
    }

    /// Serves nothing yet.
    pub async fn empty() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            url: url.clone(),
            state: Mutex::default(),
        });
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("a server") });
        Self {
            url,
            shared,
            _server: server,
        }
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.shared.all()
    }

    /// From now on, until it is told otherwise, the file suffers this.
    pub fn fault(&self, file: &str, fault: Fault) {
        self.all().fault = Some((file.to_owned(), fault));
    }

    /// All files come as they should.
    pub fn heal(&self) {
        self.all().fault = None;
    }

    /// The next `times` requests whose method and path hold `text` meet this.
    pub fn trouble(&self, text: &str, trouble: Trouble, times: usize) {
        self.all().troubles.push((text.to_owned(), trouble, times));
    }

    /// Only this token may write.
    pub fn writer(&self, token: &str) {
        self.all().writers = Some([token.to_owned()].into());
    }

    /// Large files of more bytes come in parts of so many.
    pub fn parts_of(&self, bytes: usize) {
        self.all().part_bytes = Some(bytes);
    }

    /// Every request for content so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.all().asked.clone()
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.all().seen.clone()
    }

    /// How many requests there were whose method and path hold `text`.
    pub fn count(&self, text: &str) -> usize {
        self.all()
            .seen
            .iter()
            .filter(|seen| seen.what.contains(text))
            .count()
    }

    /// Where each request for this file's content began.
    pub fn starts(&self, file: &str) -> Vec<usize> {
        let asked = self.asked();
        let of_file = asked.iter().filter(|asked| asked.file == file);
        of_file.map(|asked| asked.start).collect()
    }

    /// The commits of a repository: a model's, or that of a data set as `datasets/owner/name`.
    pub fn commits(&self, repo: &str) -> Vec<Made> {
        let all = self.all();
        let found = all.repos.get(&key(repo));
        found.map(|repo| repo.commits.clone()).unwrap_or_default()
    }

    /// The files of a repository; none where there is no such repository.
    pub fn files(&self, repo: &str) -> Option<BTreeMap<String, Vec<u8>>> {
        let all = self.all();
        let files = all.repos.get(&key(repo))?.files();
        Some(
            files
                .into_iter()
                .map(|(name, bytes)| (name, bytes.to_vec()))
                .collect(),
        )
    }

    /// Whether others cannot see a repository.
    pub fn is_private(&self, repo: &str) -> Option<bool> {
        Some(self.all().repos.get(&key(repo))?.private)
    }
}

impl Shared {
    fn all(&self) -> MutexGuard<'_, All> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trouble that a request is in.
    fn trouble(&self, what: &str) -> Option<Trouble> {
        let mut all = self.all();
        let matching = |(text, _, times): &&mut (String, Trouble, usize)| {
            *times > 0 && what.contains(text.as_str())
        };
        let (_, trouble, times) = all.troubles.iter_mut().find(matching)?;
        *times -= 1;
        Some(*trouble)
    }
}

/// By kind and name.
fn key(repo: &str) -> String {
    match repo.starts_with("datasets/") {
        true => repo.to_owned(),
        false => format!("models/{repo}"),
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let token = bearer(request.headers());
    shared.all().seen.push(Seen {
        what: what.clone(),
        token,
    });
    let trouble = shared.trouble(&what);
    match trouble {
        Some(Trouble::Status(status, wait)) => return refusal(status, wait),
        Some(Trouble::Cut) => cut(),
        Some(Trouble::CutAfter) | None => {}
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, BODY_BYTES_MAX)
        .await
        .unwrap_or_default();
    let answer = match parts.method {
        Method::GET | Method::HEAD => reads::answer(&shared, &parts),
        _ => writes::answer(&shared, &parts, body),
    };
    if trouble == Some(Trouble::CutAfter) {
        cut();
    }
    answer
}

/// Ends the connection's task without a word.
fn cut() -> ! {
    std::panic::resume_unwind(Box::new("the connection is cut"))
}

fn refusal(status: u16, wait: Option<u64>) -> Response {
    let status = StatusCode::from_u16(status).expect("a status");
    let mut response = said(status, &format!("it is so: {status}"));
    if let Some(seconds) = wait {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

fn said(status: StatusCode, error: &str) -> Response {
    (status, axum::Json(json!({"error": error}))).into_response()
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").map(str::to_owned)
}

fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Whether a file goes to the storage: by its name or its size, as on the real one.
fn is_large(path: &str, size: usize) -> bool {
    [".safetensors", ".parquet"]
        .iter()
        .any(|end| path.ends_with(end))
        || size > INLINE_BYTES_MAX
}

/// What a file is called that the repository has.
fn oid(path: &str, content: &[u8]) -> String {
    match is_large(path, content.len()) {
        true => sha256_hex(content),
        false => {
            let mut git = sha1_smol::Sha1::new();
            git.update(format!("blob {}\0", content.len()).as_bytes());
            git.update(content);
            git.digest().to_string()
        }
    }
}

fn parsed(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap_or_default()
}
