//! RunPod on this machine: its REST v2 over loopback, for there is no account where tests run. What is asked is held against
//! RunPod's own description, so that a client which passes here speaks the API; what it is told can be as bad as RunPod
//! at its worst. A pod may be a real process ([`Runpod::image`]).

mod answer;
mod contract;
mod pods;
mod schema;

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use contract::Contract;
use pods::{Gpu, Pod};

/// The key that is accepted.
pub const KEY: &str = "rpa_key-of-a-test-0123456789";

/// What a request meets in place of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A refusal, and how many seconds to wait, if it says so.
    Status(u16, Option<u64>),
    /// The connection is cut before anything is done.
    Cut,
    /// It is done, and the connection is cut before the answer.
    CutAfter,
    /// There is no answer, and nothing is done.
    Hang,
}

/// A pod, as the owner of the account sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// RunPod's name for it.
    pub id: String,
    /// Its owner's.
    pub name: String,
    /// How it is.
    pub status: String,
    /// What was asked for.
    pub request: Value,
    /// $ an hour.
    pub cost: f64,
}

/// The running server.
pub struct Runpod {
    /// What clients take in the place of `https://api.runpod.io`.
    pub url: String,
    shared: Arc<Shared>,
    server: JoinSet<()>,
}

impl fmt::Debug for Runpod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runpod")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

/// Makes the process of a pod from its environment.
type Image = Box<dyn Fn(&BTreeMap<String, String>) -> Command + Send + Sync>;

struct Shared {
    contract: Contract,
    state: Mutex<State>,
    /// Logs of pods that are processes.
    folder: TempDir,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything of the account.
struct State {
    gpus: Vec<Gpu>,
    pods: Vec<Pod>,
    made: usize,
    images: BTreeMap<String, Image>,
    /// How long a pod takes to run.
    provisioning: Duration,
    /// From how many lists a pod is missing at first.
    unlisted: usize,
    /// What requests meet whose method and path hold a text, and how often.
    troubles: Vec<(String, Trouble, usize)>,
    /// Method and path of every request.
    asked: Vec<String>,
    /// What requests broke of the description.
    violations: Vec<String>,
}

impl Runpod {
    /// Serves an account without pods, where there are three types of GPU. None where there is no copy of RunPod's description:
    /// a server that enforces nothing would show nothing.
    pub async fn start() -> Option<Self> {
        let contract = Contract::read()?;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            contract,
            state: Mutex::new(State::new()),
            folder: TempDir::new().expect("a temporary folder"),
        });
        let router = Router::new()
            .fallback(answer::answer)
            .with_state(Arc::clone(&shared));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("a server") });
        Some(Self {
            url,
            shared,
            server,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// Pods with this image are processes, which begin and end with their pods, and have their environment and RunPod's own
    /// `RUNPOD_POD_ID`. A pod whose process has ended is `EXITED`.
    pub fn image(
        &self,
        image: &str,
        command: impl Fn(&BTreeMap<String, String>) -> Command + Send + Sync + 'static,
    ) {
        let mut state = self.state();
        state.images.insert(image.to_owned(), Box::new(command));
    }

    /// Pods take so long to run, from now on.
    pub fn provisioning(&self, takes: Duration) {
        self.state().provisioning = takes;
    }

    /// New pods are missing from the next `lists` lists: what one machine of RunPod's knows, another does not yet.
    pub fn unlisted_at_first(&self, lists: usize) {
        self.state().unlisted = lists;
    }

    /// The catalogue has `availability` of a GPU, and so many pods can be created.
    pub fn stock(&self, gpu: &str, availability: &'static str, left: usize) {
        let mut state = self.state();
        let gpu = state.gpus.iter_mut().find(|known| known.id == gpu);
        let gpu = gpu.expect("a GPU of the catalogue");
        (gpu.availability, gpu.left) = (availability, left);
    }

    /// What a GPU costs from now on, in $ an hour. Pods that there are keep their price.
    pub fn price(&self, gpu: &str, secure: f64, community: f64) {
        let mut state = self.state();
        let gpu = state.gpus.iter_mut().find(|known| known.id == gpu);
        let gpu = gpu.expect("a GPU of the catalogue");
        (gpu.secure, gpu.community) = (secure, community);
    }

    /// The next `times` requests whose method and path hold `text` meet this.
    pub fn trouble(&self, text: &str, trouble: Trouble, times: usize) {
        let entry = (text.to_owned(), trouble, times);
        self.state().troubles.push(entry);
    }

    /// From now on a pod is so, whatever its time says.
    pub fn set_status(&self, name: &str, status: &'static str) {
        let mut state = self.state();
        let pod = state.pods.iter_mut().find(|pod| pod.name() == name);
        pod.expect("a pod of that name").set_status(status);
    }

    /// Makes a pod that nobody asked this server for, as people do in RunPod's console.
    pub fn put(&self, request: &Value) -> String {
        let mut state = self.state();
        let pod = state.create(request, &self.shared.folder);
        pod.expect("a pod can be created").id().to_owned()
    }

    /// The pods that there are.
    pub fn pods(&self) -> Vec<Seen> {
        let mut state = self.state();
        state.pods.iter_mut().map(Pod::seen).collect()
    }

    /// Their names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.pods().into_iter().map(|pod| pod.name).collect();
        names.sort();
        names
    }

    /// How many requests there were whose method and path hold `text`.
    pub fn count(&self, text: &str) -> usize {
        let state = self.state();
        let asked = state.asked.iter();
        asked.filter(|asked| asked.contains(text)).count()
    }

    /// What requests broke of RunPod's description. A client that is right breaks nothing.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }
}

impl Drop for Runpod {
    fn drop(&mut self) {
        self.server.abort_all();
        // The processes end before the folder of their logs is removed.
        self.state().pods.clear();
    }
}

impl State {
    fn new() -> Self {
        Self {
            gpus: pods::catalogue(),
            pods: Vec::new(),
            made: 0,
            images: BTreeMap::new(),
            provisioning: Duration::ZERO,
            unlisted: 0,
            troubles: Vec::new(),
            asked: Vec::new(),
            violations: Vec::new(),
        }
    }

    /// The trouble that a request is in.
    fn trouble(&mut self, what: &str) -> Option<Trouble> {
        let matching = |(text, _, times): &&mut (String, Trouble, usize)| {
            *times > 0 && what.contains(text.as_str())
        };
        let (_, trouble, times) = self.troubles.iter_mut().find(matching)?;
        *times -= 1;
        Some(*trouble)
    }
}
