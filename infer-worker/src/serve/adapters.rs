//! The adapters that requests may name, each under its newest version.
//!
//! A load happens beside everything: only when the executor has the weights does the name change hands, in one
//! statement. Requests that were taken before hold the version that they began with, and the executor forgets it when
//! the last of them has ended.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use espalier_core::error::shorten;
use espalier_core::time::Timestamp;
use espalier_qwen3::Lora;
use espalier_runtime::clock::Clock;
use espalier_runtime::fetch::{FetchError, Fetcher, Source, Wanted};
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::Serving;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::api::backend::{AdapterError, AdapterInfo, AdapterSource, Model, Target};
use crate::engine::{self, Adapter};

/// What is fetched of an adapter: no more than is read.
const WANTED: Wanted = Wanted::Adapter {
    bytes_max: Lora::FILE_BYTES_MAX,
};
/// How long fetching an adapter may take, with the wait for another load from the same place.
const FETCH_LIMIT: Duration = Duration::from_secs(600);
/// How long reading it, and handing it to the executor, may take. Longer than the executor has for its part.
const WEIGHTS_LIMIT: Duration = Duration::from_secs(600);

/// An adapter in the executor.
pub(super) struct Loaded {
    /// Holds it there.
    pub(super) handle: Arc<Adapter>,
    /// Its largest rank.
    pub(super) rank: u32,
    /// The model that it says it was made for.
    pub(super) made_for: Option<String>,
}

/// Why a folder is no adapter for the model that runs.
#[derive(Debug, thiserror::Error)]
pub(super) enum WeightsError {
    /// It is broken or made for another model.
    #[error("{0}")]
    Refused(String),
    /// The executor did not take it.
    #[error(transparent)]
    Engine(#[from] engine::AdapterError),
}

/// Reads a folder and gives it to the executor: what differs between devices.
pub(super) type LoadWeights =
    Box<dyn Fn(PathBuf) -> BoxFuture<'static, Result<Loaded, WeightsError>> + Send + Sync>;

/// What the model is called that adapters are for.
pub(super) struct Base {
    /// By requests.
    pub(super) name: String,
    /// By whoever started the worker: a folder, a repository, a place in a bucket.
    pub(super) source: String,
}

impl Base {
    /// What speaks against an adapter that says it was made for `made_for`. Copies and mirrors of a model have the last
    /// part of its name, more or less, and shapes were compared before: so this is a doubt and no refusal.
    fn doubt(&self, made_for: Option<&str>) -> Option<String> {
        let made_for = made_for.filter(|name| !name.trim_matches('/').is_empty())?;
        let own = [&self.name, &self.source];
        if own.iter().any(|own| model_of(own) == model_of(made_for)) {
            return None;
        }
        Some(format!(
            "adapter_config.json says `base_model_name_or_path` is `{}`, and `{}` is served here: the shapes fit, but it \
             may have been made for another model",
            shorten(made_for),
            self.name
        ))
    }
}

/// The last part of a model's name or path. The hub's cache keeps it in the name of a folder further up.
fn model_of(path: &str) -> String {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let cached = parts
        .clone()
        .find_map(|part| part.strip_prefix("models--")?.rsplit("--").next());
    let last = cached.or(parts.next_back()).unwrap_or_default();
    last.to_lowercase()
}

/// The adapters of one engine.
pub(super) struct Adapters {
    base: Base,
    max: usize,
    fetcher: Fetcher,
    load_weights: LoadWeights,
    clock: Arc<dyn Clock>,
    named: Mutex<Named>,
    /// What other workers are told.
    serving: watch::Sender<Serving>,
    places: Places,
    /// One at a time has its weights in memory, and gets its name: versions follow that order.
    loading: tokio::sync::Mutex<()>,
}

/// One load at a time of each place: a second one would replace the files that the first one reads.
#[derive(Default)]
struct Places(Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Places {
    /// The turn of whoever loads from `path`.
    fn turn(&self, path: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|_, turn| turn.strong_count() > 0);
        let known = places.get(path).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let turn = Arc::default();
            places.insert(path.to_owned(), Arc::downgrade(&turn));
            turn
        })
    }
}

#[derive(Default)]
struct Named {
    current: BTreeMap<String, (Arc<Adapter>, Model)>,
    /// How often each name was loaded, also of those that are gone: a version never comes back.
    versions: BTreeMap<String, u64>,
}

impl Adapters {
    pub(super) fn new(
        base: Base,
        max: usize,
        fetcher: Fetcher,
        load_weights: LoadWeights,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let serving = Serving {
            models: vec![base.name.clone()],
            ..Serving::default()
        };
        Self {
            serving: watch::Sender::new(serving),
            base,
            max,
            fetcher,
            load_weights,
            clock,
            named: Mutex::default(),
            places: Places::default(),
            loading: tokio::sync::Mutex::default(),
        }
    }

    /// By name.
    pub(super) fn models(&self) -> Vec<Model> {
        let named = self.lock();
        named
            .current
            .values()
            .map(|(_, model)| model.clone())
            .collect()
    }

    pub(super) fn target(&self, name: &str) -> Option<Target> {
        let named = self.lock();
        let (handle, model) = named.current.get(name)?;
        Some(Target {
            name: name.to_owned(),
            adapter: Some(Arc::clone(handle)),
            digest: model.adapter.as_ref().map(|adapter| adapter.digest.clone()),
        })
    }

    /// Loads an adapter, or a new version of one.
    pub(super) async fn load(&self, source: AdapterSource) -> Result<Model, AdapterError> {
        let name = source.name;
        if name == self.base.name {
            return Err(AdapterError::NameTaken { name });
        }
        let refused = |reason: String| AdapterError::Refused {
            name: name.clone(),
            reason,
        };
        self.check_room(&name).map_err(refused)?;
        let turn = self.places.turn(&source.path);
        let fetched = async {
            let turn = turn.lock().await;
            let place = Source::parse(&source.path, None).await?;
            let folder = self.fetcher.fetch(&place, WANTED).await?;
            Ok::<_, FetchError>((folder, turn))
        };
        let fetched = with_deadline("infer.adapter_fetch", FETCH_LIMIT, fetched).await;
        let fetched = fetched.map_err(FetchError::from).flatten();
        let (folder, _turn) = fetched.map_err(|error| refused(error_chain(&error)))?;
        self.load_folder(&name, source.path, folder).await
    }

    /// Loads what lies in a folder, which nobody else changes meanwhile, and says that it came from `path`.
    pub(super) async fn load_folder(
        &self,
        name: &str,
        path: String,
        folder: PathBuf,
    ) -> Result<Model, AdapterError> {
        if name == self.base.name {
            let name = name.to_owned();
            return Err(AdapterError::NameTaken { name });
        }
        let refused = |reason: String| AdapterError::Refused {
            name: name.to_owned(),
            reason,
        };
        let _one = self.loading.lock().await;
        self.check_room(name).map_err(refused)?;
        let loaded = (self.load_weights)(folder);
        let loaded = match with_deadline("infer.adapter_weights", WEIGHTS_LIMIT, loaded).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(WeightsError::Engine(engine::AdapterError::Stopped(_)))) => {
                return Err(AdapterError::Stopped);
            }
            Ok(Err(error)) => return Err(refused(error_chain(&error))),
            Err(late) => return Err(refused(error_chain(&late))),
        };
        let model = self.name(name, path, loaded);
        let info = model.adapter.as_ref();
        tracing::info!(
            adapter = name,
            version = info.map(|info| info.version),
            digest = info.map(|info| &*info.digest),
            "adapter loaded"
        );
        if let Some(doubt) = info.and_then(|info| info.doubt.as_deref()) {
            tracing::warn!(adapter = name, doubt, "adapter may be another model's");
        }
        Ok(model)
    }

    fn name(&self, name: &str, path: String, loaded: Loaded) -> Model {
        let mut named = self.lock();
        let version = named.versions.entry(name.to_owned()).or_default();
        *version += 1;
        let digest = loaded
            .handle
            .digest()
            .iter()
            .map(|byte| format!("{byte:02x}"));
        let model = Model {
            name: name.to_owned(),
            created_s: self.clock.now().since(Timestamp::default()).as_secs(),
            adapter: Some(AdapterInfo {
                digest: digest.collect(),
                path,
                rank: loaded.rank,
                version: *version,
                doubt: self.base.doubt(loaded.made_for.as_deref()),
            }),
        };
        named
            .current
            .insert(name.to_owned(), (loaded.handle, model.clone()));
        self.tell(&named);
        model
    }

    /// What is served, now and later, to those who reach it at `url`.
    pub(super) fn serving(
        &self,
        url: String,
        api_key_name: Option<String>,
    ) -> watch::Receiver<Serving> {
        self.serving.send_modify(|serving| {
            (serving.url, serving.api_key_name) = (url, api_key_name);
        });
        self.serving.subscribe()
    }

    /// A new version of a known name is no news.
    fn tell(&self, named: &Named) {
        let names = std::iter::once(&self.base.name).chain(named.current.keys());
        let names: Vec<String> = names.cloned().collect();
        self.serving.send_if_modified(|serving| {
            let changed = serving.models != names;
            serving.models = names;
            changed
        });
    }

    /// Says why there is no room for another name.
    fn check_room(&self, name: &str) -> Result<(), String> {
        let (named, max) = (self.lock(), self.max);
        if named.current.contains_key(name) {
            return Ok(());
        }
        if named.current.len() >= max {
            return Err(format!(
                "{max} adapters are loaded, and `--max-loras` allows no more"
            ));
        }
        let mut serving = self.serving.borrow().clone();
        if serving.url.is_empty() {
            // Nobody else is told.
            return Ok(());
        }
        serving.models.push(name.to_owned());
        serving
            .check()
            .map_err(|error| format!("coordinators take no more: {error}"))
    }

    /// Takes one out: requests that run on it go on to their end.
    pub(super) fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let mut named = self.lock();
        match named.current.remove(name) {
            Some(_) => {
                self.tell(&named);
                Ok(())
            }
            None => Err(AdapterError::Unknown {
                name: name.to_owned(),
            }),
        }
    }

    /// No code that may panic runs under the lock, and what it holds is valid after every statement.
    fn lock(&self) -> MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use espalier_runtime::clock::SystemClock;
    use espalier_runtime::config::Environment;
    use futures::FutureExt as _;
    use tempfile::TempDir;
    use tokio::net::TcpListener;

    use super::*;
    use crate::executor::AdapterSlot;

    #[test]
    fn copies_of_a_model_are_no_other_model() {
        let base = Base {
            name: "served".to_owned(),
            source: "s3://models/Qwen3-4B/".to_owned(),
        };
        for same in [
            None,
            Some(""),
            Some("/"),
            Some("served"),
            Some("Qwen/Qwen3-4B"),
            Some("qwen3-4b"),
            Some("/home/me/models/Qwen3-4B/"),
            Some("/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7"),
        ] {
            assert_eq!(base.doubt(same), None, "{same:?}");
        }
        for other in [
            "Qwen/Qwen3-4B-Base",
            "Qwen/Qwen3-8B",
            "meta/llama",
            "Qwen3-4B/x",
        ] {
            let doubt = base.doubt(Some(other)).unwrap();
            assert!(
                doubt.contains(other) && doubt.contains("`served`"),
                "{doubt}"
            );
        }
    }

    /// Gives every folder to an executor that takes all.
    fn adapters(environment: Environment) -> Adapters {
        let base = Base {
            name: "served".to_owned(),
            source: "/served".to_owned(),
        };
        let weights: LoadWeights = Box::new(|_| {
            let loaded = Loaded {
                handle: Arc::new(Adapter::new(AdapterSlot(1), [1; 32])),
                rank: 4,
                made_for: None,
            };
            std::future::ready(Ok(loaded)).boxed()
        });
        let fetcher = Fetcher::new(&environment, None);
        Adapters::new(base, 2, fetcher, weights, Arc::new(SystemClock))
    }

    #[tokio::test]
    async fn a_slow_repository_holds_up_no_other_load() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let (cache, folder) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let path = |folder: &TempDir| folder.path().display().to_string();
        let adapters = adapters(Environment::from([
            ("HF_ENDPOINT".to_owned(), url),
            ("HF_HUB_CACHE".to_owned(), path(&cache)),
        ]));
        let from = |name: &str, path: String| AdapterSource {
            name: name.to_owned(),
            path,
        };
        let slow = adapters.load(from("slow", "a/b".to_owned()));
        let quick = async {
            // It was asked, and says nothing until this is over.
            let _asked = silent.accept().await.unwrap();
            adapters.load(from("quick", path(&folder))).await.unwrap()
        };
        let both = with_deadline("test", Duration::from_secs(20), async {
            tokio::select! {
                biased;
                _ = slow => panic!("the repository answered"),
                quick = quick => quick,
            }
        });
        assert_eq!(Box::pin(both).await.unwrap().name, "quick");
    }
}
