//! A follower between a store in memory and an engine that takes all.

use std::collections::BTreeMap;
use std::path::Path;

use espalier_adapters::Latest;
use espalier_core::adapter::{
    ADAPTER_RECORD_VERSION, AdapterKind, BaseModel, Canary, TrainSummary, Why,
};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::time::Timestamp;
use espalier_core::trace::{FileEntry, sha256_hex};
use espalier_runtime::clock::SystemClock;
use espalier_runtime::config::Environment;
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::store::faults::{Fault, Faults};
use tempfile::TempDir;

use super::*;
use crate::api::backend::{AdapterSource, Candidate};
use crate::engine::Adapter;
use crate::executor::AdapterSlot;
use crate::serve::adapters::{LoadWeights, Loaded};

const EVERY: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(30);

struct World {
    store: Store,
    faults: Faults,
    scratch: TempDir,
    base: Arc<Base>,
}

/// A version of an adapter.
struct Made {
    name: &'static str,
    n: u32,
    /// When.
    at: u64,
    base: &'static str,
    kind: AdapterKind,
}

/// One that was trained on the model that is served.
fn made(name: &'static str, n: u32, at: u64) -> Made {
    Made {
        name,
        n,
        at,
        base: "served",
        kind: AdapterKind::Lora,
    }
}

impl World {
    async fn new() -> Self {
        let faults = Faults::new(|_, _| None);
        let store = Store::open("memory://").await.unwrap();
        Self {
            store: store.with_faults(faults.clone()),
            faults,
            scratch: TempDir::new().unwrap(),
            base: Arc::new(Base::new("served", "/served", "/served".into())),
        }
    }

    async fn publish(&self, made: Made) {
        let Made { name, n, .. } = made;
        let job: JobKey = format!("default/{name}/job-{n}").parse().unwrap();
        let (fence, name) = (Fence(1), name.parse::<AdapterName>().unwrap());
        let path = format!("{}weights", layout::adapter_files(&job, fence));
        let content = format!("{name}@v{n}").into_bytes();
        let record = AdapterVersion {
            record_version: ADAPTER_RECORD_VERSION,
            name: name.clone(),
            n,
            kind: made.kind,
            job,
            fence,
            created_at_us: Timestamp(made.at),
            base: BaseModel {
                name: made.base.to_owned(),
                revision: None,
                sha256: String::new(),
            },
            dataset: String::new(),
            training: TrainSummary {
                steps: 0,
                tokens: 0,
                supervised_tokens: 0,
                loss: 0.0,
                eval_loss: None,
                agreement: None,
                best_step: 0,
                wall_ms: 0,
            },
            files: vec![FileEntry::of(&path, &content)],
        };
        self.store.put(&path, content.into()).await.unwrap();
        let record = serde_json::to_vec(&record).unwrap();
        let path = layout::adapter_version(&"default".parse().unwrap(), &name, n);
        self.store.create(&path, record.into()).await.unwrap();
    }

    /// Makes a version latest, or lets it answer a share.
    async fn promote(&self, name: &str, version: u32, share: Option<f64>) {
        let latest = Latest {
            store: &self.store,
            project: &"default".parse().unwrap(),
            name: &name.parse().unwrap(),
        };
        let now = Timestamp(1);
        let entry = match share {
            None => latest.promote(version, Why::Hand, now).await,
            Some(share) => {
                let canary = Canary { version, share };
                latest.canary(canary, Why::Hand, now).await
            }
        };
        entry.unwrap();
    }

    fn adapters(&self, max: usize, weights: LoadWeights) -> Adapters {
        let fetcher = Fetcher::new(&Environment::default(), None);
        let clock = Arc::new(SystemClock);
        Adapters::new(Arc::clone(&self.base), max, fetcher, weights, clock)
    }

    fn follower(&self, options: &[&str]) -> Follower {
        let options = options.iter().map(|option| option.parse().unwrap());
        Follower::new(
            self.store.clone(),
            Arc::clone(&self.base),
            EVERY,
            self.scratch.path().to_owned(),
            options.collect(),
        )
    }
}

/// An engine that takes every folder; what an adapter holds is what it says.
fn takes_all() -> LoadWeights {
    Box::new(|folder| async move { Ok(loaded(&folder)) }.boxed())
}

fn loaded(folder: &Path) -> Loaded {
    let content = std::fs::read(folder.join("weights")).unwrap_or_default();
    let mut digest = [0; 32];
    digest[..content.len()].copy_from_slice(&content);
    Loaded {
        handle: Arc::new(Adapter::new(AdapterSlot(1), digest)),
        rank: 4,
        made_for: None,
    }
}

/// Follows while something else happens.
async fn beside(follower: &Follower, adapters: &Adapters, scene: impl Future<Output = ()>) {
    tokio::select! {
        () = follower.run(adapters, Shutdown::new()) => panic!("it ended"),
        () = scene => {}
    }
}

/// Waits until `is_so` of what is told.
async fn until(
    follower: &Follower,
    is_so: impl Fn(&BTreeMap<String, Following>) -> bool,
) -> BTreeMap<String, Following> {
    let told = || {
        let told = follower.told().into_iter();
        told.map(|it| (it.name.clone(), it)).collect()
    };
    let waits = async {
        loop {
            let told = told();
            if is_so(&told) {
                return told;
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    match tokio::time::timeout(LIMIT, waits).await {
        Ok(told) => told,
        Err(_) => panic!("{:?}", told()),
    }
}

fn names(adapters: &Adapters) -> Vec<String> {
    adapters.models().into_iter().map(|it| it.name).collect()
}

#[tokio::test]
async fn a_canary_and_a_candidate_are_served_beside_latest() {
    let world = World::new().await;
    let (adapters, follower) = (world.adapters(8, takes_all()), world.follower(&["shop"]));
    world.publish(made("shop", 1, 1)).await;
    beside(&follower, &adapters, async {
        let told = until(&follower, |_| names(&adapters) == ["shop@v1"]).await;
        let candidate = |version| {
            let error = None;
            Some(Candidate { version, error })
        };
        assert_eq!(told["shop"].candidate, candidate(1));
        assert_eq!((told["shop"].served, told["shop"].latest), (None, None));
        world.promote("shop", 1, None).await;
        world.publish(made("shop", 2, 2)).await;
        world.promote("shop", 2, Some(0.5)).await;
        world.publish(made("shop", 3, 3)).await;
        let all = ["shop", "shop@v1", "shop@v2", "shop@v3"];
        let is_so = |told: &BTreeMap<String, Following>| {
            names(&adapters) == all && told["shop"].canary.is_some()
        };
        let told = until(&follower, is_so).await;
        let (version, share) = (2, 0.5);
        assert_eq!(told["shop"].canary, Some(Canary { version, share }));
        assert_eq!(told["shop"].candidate, candidate(3));
        assert_eq!((told["shop"].served, &told["shop"].error), (Some(1), &None));
        let called = |opening: &str| {
            let opening = || opening.as_bytes().to_vec();
            adapters.target("shop", &opening).unwrap().called
        };
        let answered: Vec<String> = (0..20).map(|n| called(&format!("hello {n}"))).collect();
        for version in ["shop@v1", "shop@v2"] {
            assert!(answered.iter().any(|it| it == version), "{answered:?}");
        }
        world.promote("shop", 2, None).await;
        let rest = ["shop", "shop@v2", "shop@v3"];
        let told = until(&follower, |_| names(&adapters) == rest).await;
        assert_eq!((told["shop"].served, told["shop"].canary), (Some(2), None));
    })
    .await;
}

#[tokio::test]
async fn a_version_that_is_asked_for_by_name_stays_while_there_is_room() {
    let world = World::new().await;
    world.publish(made("shop", 1, 1)).await;
    let (adapters, follower) = (world.adapters(2, takes_all()), world.follower(&["shop"]));
    beside(&follower, &adapters, async {
        until(&follower, |_| names(&adapters) == ["shop@v1"]).await;
        assert!(adapters.target("shop@v1", &Vec::new).is_some());
        world.publish(made("shop", 2, 2)).await;
        until(&follower, |_| names(&adapters) == ["shop@v1", "shop@v2"]).await;
        // Nobody asked for the second one.
        world.publish(made("shop", 3, 3)).await;
        until(&follower, |_| names(&adapters) == ["shop@v1", "shop@v3"]).await;
        world.promote("shop", 2, None).await;
        let all = ["shop", "shop@v2", "shop@v3"];
        until(&follower, |_| names(&adapters) == all).await;
    })
    .await;
}

#[tokio::test]
async fn an_adapter_that_hangs_holds_up_no_other() {
    let world = World::new().await;
    for name in ["quick", "slow", "stuck"] {
        world.publish(made(name, 1, 1)).await;
        world.promote(name, 1, None).await;
    }
    // Files of one never come, nor what is listed of another.
    world.faults.set(|operation, path| {
        let hangs = path.contains("/slow/jobs/") || (operation == "list" && path.contains("stuck"));
        hangs.then_some(Fault::Hang)
    });
    let follower = world.follower(&["stuck", "slow", "quick"]);
    let adapters = world.adapters(8, takes_all());
    beside(&follower, &adapters, async {
        until(&follower, |told| told["quick"].served == Some(1)).await;
        world.publish(made("quick", 2, 2)).await;
        world.promote("quick", 2, None).await;
        let told = until(&follower, |told| told["quick"].served == Some(2)).await;
        assert_eq!((told["slow"].served, told["stuck"].served), (None, None));
    })
    .await;
}

#[tokio::test]
async fn what_takes_too_long_leaves_nothing_behind_and_is_tried_again() {
    let world = World::new().await;
    world.publish(made("shop", 1, 1)).await;
    world.promote("shop", 1, None).await;
    let tries = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&tries);
    // The engine has no time for the first one.
    let weights: LoadWeights = Box::new(move |folder| {
        let mut tries = counted.lock().unwrap();
        *tries += 1;
        match *tries {
            1 => futures::future::pending().boxed(),
            _ => async move { Ok(loaded(&folder)) }.boxed(),
        }
    });
    let follower = Follower {
        load_limit: Duration::from_millis(300),
        ..world.follower(&["shop"])
    };
    let adapters = world.adapters(8, weights);
    beside(&follower, &adapters, async {
        let told = until(&follower, |told| told["shop"].error.is_some()).await;
        let error = told["shop"].error.clone().unwrap();
        assert!(error.contains("infer.follow"), "{error}");
        let is_served = |told: &BTreeMap<String, Following>| told["shop"].served == Some(1);
        let told = until(&follower, is_served).await;
        assert_eq!(told["shop"].error, None);
        assert_eq!(*tries.lock().unwrap(), 2);
        let left = std::fs::read_dir(world.scratch.path()).unwrap().count();
        assert_eq!(left, 0, "a folder stays behind");
    })
    .await;
}

#[tokio::test]
async fn all_adapters_of_the_model_are_followed_as_far_as_there_is_room() {
    let world = World::new().await;
    world.publish(made("old", 1, 1)).await;
    world.publish(made("mid", 1, 2)).await;
    world.promote("mid", 1, None).await;
    world.publish(made("mid", 2, 3)).await;
    let other = Made {
        base: "another",
        ..made("foreign", 1, 9)
    };
    world.publish(other).await;
    let whole = Made {
        kind: AdapterKind::Full,
        ..made("whole", 1, 9)
    };
    world.publish(whole).await;
    let (adapters, follower) = (world.adapters(3, takes_all()), world.follower(&["*"]));
    beside(&follower, &adapters, async {
        let told = until(&follower, |_| names(&adapters).len() == 4).await;
        assert_eq!(names(&adapters), ["mid", "mid@v1", "mid@v2", "old@v1"]);
        assert_eq!(told.keys().collect::<Vec<_>>(), ["mid", "old"]);
        // A newer one takes the place of the one that is least recent.
        world.publish(made("new", 1, 4)).await;
        let expected = ["mid", "mid@v1", "mid@v2", "new@v1"];
        let told = until(&follower, |_| names(&adapters) == expected).await;
        assert_eq!(told.keys().collect::<Vec<_>>(), ["mid", "new"]);
        // Where there is room for a part, it is latest that is served.
        world.publish(made("new", 2, 5)).await;
        world.promote("new", 1, None).await;
        let expected = ["mid", "mid@v1", "new", "new@v1", "new@v2"];
        let told = until(&follower, |_| names(&adapters) == expected).await;
        let error = told["mid"].candidate.as_ref().unwrap().error.clone();
        assert!(error.unwrap().contains("no room for v2"), "{told:?}");
        let folder = TempDir::new().unwrap();
        let own = AdapterSource {
            name: "own".to_owned(),
            path: folder.path().display().to_string(),
        };
        let full = adapters.load(own).await.unwrap_err().to_string();
        assert!(full.contains("`--max-loras` allows no more"), "{full}");
    })
    .await;
}

#[tokio::test]
async fn what_a_person_loaded_stays_until_it_is_taken_out() {
    let world = World::new().await;
    world.publish(made("shop", 1, 1)).await;
    world.promote("shop", 1, None).await;
    let (adapters, follower) = (world.adapters(8, takes_all()), world.follower(&["shop"]));
    let folder = TempDir::new().unwrap();
    let source = || AdapterSource {
        name: "shop".to_owned(),
        path: folder.path().display().to_string(),
    };
    adapters.load(source()).await.unwrap();
    beside(&follower, &adapters, async {
        let told = until(&follower, |_| names(&adapters) == ["shop", "shop@v1"]).await;
        assert_eq!((told["shop"].served, told["shop"].latest), (None, Some(1)));
        let error = told["shop"].error.clone().unwrap();
        assert!(error.contains("`shop` was loaded by hand"), "{error}");
        let called = || adapters.target("shop", &Vec::new).unwrap().called;
        assert_eq!(called(), "shop");
        adapters.unload("shop").unwrap();
        let is_served = |told: &BTreeMap<String, Following>| told["shop"].served == Some(1);
        until(&follower, is_served).await;
        assert_eq!(called(), "shop@v1");
        let error = adapters.load(source()).await.unwrap_err().to_string();
        assert!(error.contains("is followed as default/shop"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_had_changes_nothing() {
    let world = World::new().await;
    world.publish(made("shop", 1, 1)).await;
    world.promote("shop", 1, None).await;
    let (adapters, follower) = (world.adapters(8, takes_all()), world.follower(&["shop"]));
    let is_served = |told: &BTreeMap<String, Following>| told["shop"].served == Some(1);
    beside(&follower, &adapters, async {
        until(&follower, is_served).await;
        let damaged = "default/batches/shop/jobs/job-2/a-1/adapter/weights";
        world.publish(made("shop", 2, 2)).await;
        assert!(world.store.head(damaged).await.is_ok());
        world.store.put(damaged, "shop@v0".into()).await.unwrap();
        world.promote("shop", 2, None).await;
        let told = until(&follower, |told| told["shop"].error.is_some()).await;
        assert_eq!(
            (told["shop"].served, told["shop"].latest),
            (Some(1), Some(2))
        );
        let error = told["shop"].error.clone().unwrap();
        assert!(error.contains(&sha256_hex(b"shop@v2")), "{error}");
        world
            .faults
            .set(|operation, _| (operation == "list").then_some(Fault::Denied));
        let is_blind = |told: &BTreeMap<String, Following>| {
            told["shop"].error.as_ref().is_some_and(|it| *it != error)
        };
        let told = until(&follower, is_blind).await;
        assert_eq!(names(&adapters), ["shop", "shop@v1"], "{told:?}");
    })
    .await;
}
