//! The adapters that requests may name, each under its newest version.
//!
//! A load happens beside everything: only when the executor has the weights does the name change hands, in one
//! statement. Requests that were taken before hold the version that they began with, and the executor forgets it when
//! the last of them has ended.

mod named;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use espalier_core::time::Timestamp;
use espalier_qwen3::Lora;
use espalier_runtime::clock::Clock;
use espalier_runtime::fetch::{FetchError, Fetcher, Source, Wanted};
use espalier_runtime::tasks::with_deadline;
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::worker::Serving;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::base::Base;
use crate::api::backend::{AdapterError, AdapterInfo, AdapterSource, Model, Target};
use crate::engine::{self, Adapter};
use named::{Asked, Holder, Named};

#[cfg(test)]
pub(super) use named::tests::held;
pub(super) use named::{Answers, Held, Split};

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

/// The adapters of one engine.
pub(super) struct Adapters {
    base: Arc<Base>,
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

/// A version that is followed, on its way into the engine.
pub(super) struct Version {
    /// What answers call it: `NAME@vN`.
    pub(super) called: String,
    /// Where it came from.
    pub(super) path: String,
    /// Its number.
    pub(super) number: u32,
}

impl Adapters {
    pub(super) fn new(
        base: Arc<Base>,
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
        self.lock().models()
    }

    /// What answers a request for `name` in the conversation that begins with `opening`.
    pub(super) fn target(&self, name: &str, opening: &dyn Fn() -> Vec<u8>) -> Option<Target> {
        let answers = self.lock().answers(name)?;
        Some(answers.target(name, opening))
    }

    /// Loads an adapter that a person names, or a new version of one.
    pub(super) async fn load(&self, source: AdapterSource) -> Result<Model, AdapterError> {
        let AdapterSource { name, path } = source;
        let refused = |reason: String| AdapterError::Refused {
            name: name.clone(),
            reason,
        };
        self.check_free(&name)?;
        let turn = self.places.turn(&path);
        let fetched = async {
            let turn = turn.lock().await;
            let place = Source::parse(&path, None).await?;
            let folder = self.fetcher.fetch(&place, WANTED).await?;
            Ok::<_, FetchError>((folder, turn))
        };
        let fetched = with_deadline("infer.adapter_fetch", FETCH_LIMIT, fetched).await;
        let fetched = fetched.map_err(FetchError::from).flatten();
        let (folder, _turn) = fetched.map_err(|error| refused(error_chain(&error)))?;
        let _one = self.loading.lock().await;
        self.check_free(&name)?;
        let loaded = self.weights(&name, folder).await?;
        self.name(name, path, loaded)
    }

    /// Loads a version that is followed from a folder, which nobody else changes meanwhile. It has no name yet.
    pub(super) async fn hold(
        &self,
        version: Version,
        folder: PathBuf,
    ) -> Result<Held, AdapterError> {
        let _one = self.loading.lock().await;
        let loaded = self.weights(&version.called, folder).await?;
        let number = version.number.into();
        Ok(self.held(version.called, version.path, number, loaded))
    }

    /// Gives the executor what lies in a folder.
    async fn weights(&self, name: &str, folder: PathBuf) -> Result<Loaded, AdapterError> {
        let reason = match with_deadline(
            "infer.adapter_weights",
            WEIGHTS_LIMIT,
            (self.load_weights)(folder),
        )
        .await
        {
            Ok(Ok(loaded)) => return Ok(loaded),
            Ok(Err(WeightsError::Engine(engine::AdapterError::Stopped(_)))) => {
                return Err(AdapterError::Stopped);
            }
            Ok(Err(error)) => error_chain(&error),
            Err(late) => error_chain(&late),
        };
        let name = name.to_owned();
        Err(AdapterError::Refused { name, reason })
    }

    fn held(&self, called: String, path: String, version: u64, loaded: Loaded) -> Held {
        let digest = loaded.handle.digest().iter();
        let info = AdapterInfo {
            digest: digest.map(|byte| format!("{byte:02x}")).collect(),
            path,
            rank: loaded.rank,
            version,
            doubt: self.base.doubt(loaded.made_for.as_deref()),
        };
        tracing::info!(
            adapter = called,
            version,
            digest = info.digest,
            "adapter loaded"
        );
        if let Some(doubt) = &info.doubt {
            tracing::warn!(adapter = called, doubt, "adapter may be another model's");
        }
        Held {
            called,
            handle: loaded.handle,
            created_s: self.clock.now().since(Timestamp::default()).as_secs(),
            info,
            asked: Asked::default(),
        }
    }

    /// Gives a person the name, unless the follower took it meanwhile.
    fn name(&self, name: String, path: String, loaded: Loaded) -> Result<Model, AdapterError> {
        let mut named = self.lock();
        check_holder(&named, &name)?;
        let load = named.next_load(&name);
        let held = Arc::new(self.held(name.clone(), path, load, loaded));
        let model = Model {
            name: name.clone(),
            created_s: held.created_s,
            adapter: Some(held.info.clone()),
        };
        let canary = None;
        named.set(name, Holder::Person, Answers { held, canary });
        self.tell(&named);
        Ok(model)
    }

    /// Lets the adapter `of` that is followed, as `project/name`, answer to these names and no others, from one moment to
    /// the next. Gives the names that it cannot have, with the reasons.
    pub(super) fn follow(
        &self,
        of: &str,
        names: BTreeMap<String, Answers>,
    ) -> BTreeMap<String, String> {
        let holder = Holder::Follower(of.to_owned());
        let mut refused = BTreeMap::new();
        let mut named = self.lock();
        named.release(&holder, |name| names.contains_key(name));
        for (name, answers) in names {
            match self.check_followed(&named, &name, &holder) {
                Ok(()) => named.set(name, holder.clone(), answers),
                Err(why) => drop(refused.insert(name, why)),
            }
        }
        self.tell(&named);
        refused
    }

    /// Places in the engine that are left beside what people loaded.
    pub(super) fn room(&self) -> usize {
        self.max.saturating_sub(self.lock().places_of_people())
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
        let names = std::iter::once(&self.base.name).chain(named.names());
        let names: Vec<String> = names.cloned().collect();
        let projects = named.projects();
        self.serving.send_if_modified(|serving| {
            let changed = serving.models != names || serving.projects != projects;
            (serving.models, serving.projects) = (names, projects);
            changed
        });
    }

    /// Says why a person cannot load something under this name.
    fn check_free(&self, name: &str) -> Result<(), AdapterError> {
        if name == self.base.name {
            let name = name.to_owned();
            return Err(AdapterError::NameTaken { name });
        }
        let (named, max) = (self.lock(), self.max);
        check_holder(&named, name)?;
        if named.holder(name).is_some() {
            return Ok(());
        }
        let full = || format!("{max} adapters are loaded, and `--max-loras` allows no more");
        let reason = match named.places() >= max {
            true => Err(full()),
            false => self.check_told(&named, name),
        };
        reason.map_err(|reason| AdapterError::Refused {
            name: name.to_owned(),
            reason,
        })
    }

    /// Says why what is followed cannot have this name.
    fn check_followed(&self, named: &Named, name: &str, by: &Holder) -> Result<(), String> {
        if *name == self.base.name {
            return Err(format!("`{name}` is the base model's name"));
        }
        match named.holder(name) {
            None => self.check_told(named, name),
            Some(holder) if holder == by => Ok(()),
            Some(Holder::Person) => Err(format!(
                "`{name}` was loaded by hand, and is served until it is taken out"
            )),
            Some(Holder::Follower(other)) => Err(format!("`{name}` is {other} already")),
        }
    }

    /// Says why coordinators cannot be told of one more name.
    fn check_told(&self, named: &Named, name: &str) -> Result<(), String> {
        let mut serving = self.serving.borrow().clone();
        if serving.url.is_empty() {
            // Nobody else is told.
            return Ok(());
        }
        let names = std::iter::once(&self.base.name).chain(named.names());
        serving.models = names.cloned().collect();
        serving.models.push(name.to_owned());
        serving.projects = named.projects();
        let checked = serving.check();
        checked.map_err(|error| format!("coordinators take no more: {error}"))
    }

    /// Takes one out that a person loaded: requests that run on it go on to their end.
    pub(super) fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let mut named = self.lock();
        check_holder(&named, name)?;
        if !named.remove(name) {
            let name = name.to_owned();
            return Err(AdapterError::Unknown { name });
        }
        self.tell(&named);
        Ok(())
    }

    /// No code that may panic runs under the lock, and what it holds is valid after every statement.
    fn lock(&self) -> MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// People do not change what is followed.
fn check_holder(named: &Named, name: &str) -> Result<(), AdapterError> {
    match named.holder(name) {
        Some(Holder::Follower(of)) => Err(AdapterError::Followed {
            name: name.to_owned(),
            of: of.clone(),
        }),
        _ => Ok(()),
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

    /// Gives every folder to an executor that takes all.
    fn adapters(environment: Environment) -> Adapters {
        let base = Arc::new(Base::new("served", "/served", PathBuf::new()));
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

    /// What the follower has for `name`, and `shop@v1`.
    fn of_shop(name: &str) -> BTreeMap<String, Answers> {
        let answers = Answers {
            held: held("shop@v1"),
            canary: None,
        };
        [name, "shop@v1"]
            .map(|name| (name.to_owned(), answers.clone()))
            .into()
    }

    #[tokio::test]
    async fn a_name_has_one_holder() {
        let adapters = adapters(Environment::default());
        let folder = TempDir::new().unwrap();
        let source = |name: &str| AdapterSource {
            name: name.to_owned(),
            path: folder.path().display().to_string(),
        };
        let followed = |name: &str| AdapterError::Followed {
            name: name.to_owned(),
            of: "p/shop".to_owned(),
        };
        // A person was first.
        adapters.load(source("shop")).await.unwrap();
        let refused = adapters.follow("p/shop", of_shop("shop"));
        assert_eq!(refused.keys().collect::<Vec<_>>(), ["shop"]);
        assert!(
            refused["shop"].contains("was loaded by hand"),
            "{refused:?}"
        );
        let called = |name: &str| adapters.target(name, &Vec::new).map(|it| it.called);
        assert_eq!(called("shop").as_deref(), Some("shop"));
        assert_eq!(called("shop@v1").as_deref(), Some("shop@v1"));
        adapters.load(source("shop")).await.unwrap();
        adapters.unload("shop").unwrap();
        // The follower is.
        assert!(adapters.follow("p/shop", of_shop("shop")).is_empty());
        assert_eq!(called("shop").as_deref(), Some("shop@v1"));
        let error = adapters.load(source("shop")).await.unwrap_err();
        assert_eq!(error, followed("shop"));
        assert_eq!(adapters.unload("shop@v1"), Err(followed("shop@v1")));
        let other = adapters.follow("q/shop", of_shop("shop"));
        assert!(other["shop"].contains("is p/shop already"), "{other:?}");
        let base = adapters.follow("p/shop", of_shop("served"));
        assert!(base["served"].contains("the base model's name"), "{base:?}");
        assert_eq!(called("shop"), None, "it is not followed under that name");
        assert_eq!(adapters.room(), 2);
    }

    #[tokio::test]
    async fn coordinators_are_told_of_every_name() {
        let adapters = adapters(Environment::default());
        let told = adapters.serving("http://h:1/v1".to_owned(), None);
        adapters.follow("p/shop", of_shop("shop"));
        assert_eq!(told.borrow().models, ["served", "shop", "shop@v1"]);
        let own = |name: &str| (name.to_owned(), "p".to_owned());
        assert_eq!(told.borrow().projects, ["shop", "shop@v1"].map(own).into());
        adapters.follow("p/shop", BTreeMap::new());
        assert_eq!(told.borrow().models, ["served"]);
    }
}
