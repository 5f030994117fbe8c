//! Versions from one end to the other: added, listed, pulled, merged, exported; the store is in memory, the hub a stand-in.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_adapters::{
    AdaptersError, Added, BaseCheck, Exported, Exporter, Form, Order, Watch, add, base_digest,
    card, find, list, pull,
};
use espalier_core::adapter::{AdapterVersion, Agreement, BaseModel, Difference};
use espalier_core::id::{AdapterName, ProjectId};
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::{AdapterRef, ExportTarget};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::{Clock, ManualClock};
use espalier_runtime::config::{Environment, Secret};
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::hub::HubSettings;
use espalier_runtime::store::Store;
use espalier_testbed::hub::Hub as StandIn;
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../qwen3/tests/golden")
        .join(name)
}

struct World {
    store: Store,
    project: ProjectId,
    name: AdapterName,
    folder: TempDir,
}

impl World {
    async fn new() -> Self {
        Self {
            store: Store::open("memory://").await.unwrap(),
            project: "shop".parse().unwrap(),
            name: "clicks".parse().unwrap(),
            folder: TempDir::new().unwrap(),
        }
    }

    fn fetcher(&self) -> Fetcher {
        Fetcher::new(&Environment::new(), Some(self.folder.path()))
    }

    async fn add(&self, folder: &Path, base: &str) -> Result<Added, AdaptersError> {
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(Timestamp::from_ms(1_000)));
        let place = (&self.store, &self.project);
        add(
            place,
            &self.name,
            folder,
            Some(base),
            &self.fetcher(),
            &clock,
        )
        .await
    }

    /// The golden adapter of the golden model.
    async fn added(&self) -> AdapterVersion {
        let base = golden("tiny-dense").display().to_string();
        let added = self.add(&golden("lora-plain"), &base).await.unwrap();
        assert!(added.is_new);
        added.version
    }

    async fn pull(&self, version: &AdapterVersion) -> Result<PathBuf, AdaptersError> {
        let to = self.folder.path().join("pulled");
        pull(&self.store, version, &to, &Watch::default()).await?;
        Ok(to)
    }

    fn exporter(&self, hub: &StandIn, bases: BaseCheck) -> Exporter {
        Exporter {
            store: self.store.clone(),
            fetcher: self.fetcher(),
            hub: HubSettings {
                endpoint: hub.url.clone(),
                token: Some(Secret::new("hf_s3cret")),
                ca: None,
                cache: None,
                offline: false,
            },
            scratch: self.folder.path().join("scratch"),
            bases,
        }
    }

    async fn export(
        &self,
        exporter: &Exporter,
        merged: bool,
        to: &ExportTarget,
    ) -> Result<Exported, AdaptersError> {
        let adapter = AdapterRef {
            name: self.name.clone(),
            version: 1,
        };
        let order = Order {
            project: &self.project,
            adapter: &adapter,
            merged,
            to,
        };
        let done = exporter.run(order, &Watch::default()).await;
        let left = std::fs::read_dir(&exporter.scratch).map_or(0, Iterator::count);
        assert_eq!(left, 0, "nothing stays behind");
        done
    }
}

fn repo() -> ExportTarget {
    ExportTarget::Hub {
        repo: "me/clicks".to_owned(),
        public: false,
    }
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn what_was_added_is_listed_and_pulled_as_it_was() {
    let world = World::new().await;
    let version = world.added().await;
    assert_eq!((version.n, version.files.len()), (1, 2));
    let listed = list(&world.store, &world.project).await.unwrap();
    assert_eq!(listed[0].name, world.name);
    assert_eq!(listed[0].versions, [1]);
    let newest = find(&world.store, &world.project, &world.name, None)
        .await
        .unwrap();
    assert_eq!(newest, version);
    let to = world.pull(&newest).await.unwrap();
    let names = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ];
    assert_eq!(files(&to), names);
    for name in &names[1..] {
        let [was, is] = [golden("lora-plain"), to.clone()].map(|at| std::fs::read(at.join(name)));
        assert_eq!(was.unwrap(), is.unwrap(), "{name}");
    }
    let again = world.pull(&newest).await.unwrap_err();
    assert!(matches!(again, AdaptersError::Exists(_)), "{again}");
}

#[tokio::test]
async fn the_same_files_are_no_new_version_and_other_files_are() {
    let world = World::new().await;
    world.added().await;
    let base = golden("tiny-dense").display().to_string();
    let again = world.add(&golden("lora-plain"), &base).await.unwrap();
    assert_eq!((again.is_new, again.version.n), (false, 1));
    let other = world.add(&golden("lora-rslora"), &base).await.unwrap();
    assert_eq!((other.is_new, other.version.n), (true, 2));
    let listed = list(&world.store, &world.project).await.unwrap();
    assert_eq!(listed[0].versions, [1, 2]);
}

#[tokio::test]
async fn what_cannot_be_served_is_not_added() {
    let world = World::new().await;
    let moe = golden("tiny-moe").display().to_string();
    let error = world.add(&golden("lora-plain"), &moe).await.unwrap_err();
    assert!(matches!(error, AdaptersError::Adapter(_)), "{error}");
    let error = world.add(&golden("tiny-dense"), &moe).await.unwrap_err();
    assert!(matches!(error, AdaptersError::Missing { .. }), "{error}");
    assert_eq!(list(&world.store, &world.project).await.unwrap(), []);
    let error = find(&world.store, &world.project, &world.name, None)
        .await
        .unwrap_err();
    assert!(matches!(error, AdaptersError::NoAdapter { .. }), "{error}");
    let error = find(&world.store, &world.project, &world.name, Some(7))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "there is no version clicks@v7");
}

#[tokio::test]
async fn a_file_that_changed_in_the_store_is_named_and_no_folder_is_made() {
    let world = World::new().await;
    let version = world.added().await;
    let path = &version.files[0].path;
    let mut content = world.store.get(path).await.unwrap().to_vec();
    content[100] ^= 1;
    world.store.put(path, content.into()).await.unwrap();
    let error = world.pull(&version).await.unwrap_err();
    assert!(
        matches!(&error, AdaptersError::Damaged { path: at, .. } if at == path),
        "{error}"
    );
    assert_eq!(files(world.folder.path()), Vec::<String>::new());
}

#[tokio::test]
async fn an_adapter_goes_to_the_hub_and_a_second_time_changes_nothing() {
    let (world, hub) = (World::new().await, StandIn::empty().await);
    world.added().await;
    let exporter = world.exporter(&hub, BaseCheck::NoFolders);
    let exported = world.export(&exporter, false, &repo()).await.unwrap();
    assert!(exported.changed && !exported.is_public);
    assert_eq!(exported.summary.files, 3);
    let there = hub.files("me/clicks").unwrap();
    let weights = std::fs::read(golden("lora-plain/adapter_model.safetensors")).unwrap();
    assert_eq!(there["adapter_model.safetensors"], weights);
    assert!(there["README.md"].starts_with(b"---\n"));
    let again = world.export(&exporter, false, &repo()).await.unwrap();
    assert_eq!((again.changed, &again.summary), (false, &exported.summary));
    assert_eq!(hub.commits("me/clicks").len(), 1);
}

#[tokio::test]
async fn a_merged_model_goes_out_if_the_base_is_the_one_that_was_trained_on() {
    let (world, hub) = (World::new().await, StandIn::empty().await);
    let mut version = world.added().await;
    let digest = base_digest(&golden("tiny-dense")).await.unwrap();
    assert_eq!(digest.len(), 64);
    let to = ExportTarget::Uploads(UploadName::new("out/clicks").unwrap());
    let guarded = world.exporter(&hub, BaseCheck::NoFolders);
    let error = world.export(&guarded, true, &to).await.unwrap_err();
    assert!(matches!(error, AdaptersError::BaseFolder(_)), "{error}");
    let exporter = world.exporter(&hub, BaseCheck::Any);
    let path = layout::adapter_version(&world.project, &world.name, 1);
    for (sha256, fits) in [("0".repeat(64), false), (digest, true)] {
        version.base.sha256 = sha256;
        let record = serde_json::to_vec(&version).unwrap();
        world.store.put(&path, record.into()).await.unwrap();
        let done = world.export(&exporter, true, &to).await;
        match (fits, done) {
            (true, Ok(done)) => assert_eq!(done.summary.exported_to, "shop/uploads/out/clicks"),
            (false, Err(AdaptersError::OtherBase { .. })) => {}
            (_, done) => panic!("{done:?}"),
        }
    }
    let listed = world
        .store
        .list("shop/uploads/out/clicks", None, 10)
        .await
        .unwrap();
    let names: Vec<&str> = listed
        .iter()
        .filter_map(|object| object.path.rsplit('/').next())
        .collect();
    assert_eq!(names, ["README.md", "config.json", "model.safetensors"]);
    let merged = world
        .store
        .get("shop/uploads/out/clicks/model.safetensors")
        .await
        .unwrap();
    let base = std::fs::read(golden("tiny-dense/model.safetensors")).unwrap();
    assert!(merged.len() == base.len() && merged != base);
}

#[tokio::test]
async fn the_card_has_a_header_of_yaml_and_says_where_it_comes_from() {
    let text = include_str!("../../core/tests/golden/adapter-v1.json");
    let version = AdapterVersion::parse(text.as_bytes(), &"shop".parse().unwrap(), 3).unwrap();
    let adapter = card(&version, Form::Adapter);
    let header = "---\nbase_model: \"Qwen/Qwen3-4B\"\nbase_model_relation: adapter\nlibrary_name: peft\n\
                  pipeline_tag: text-generation\ntags:\n- espalier\n- agent\n- tool-use\n- lora\n---\n\n# shop v3\n";
    assert!(adapter.starts_with(header), "{adapter}");
    for fact in [
        "`shop/b1/train`",
        "`shop/datasets/clicks/v1.json`",
        "| 0.5625 |",
        "| 0.7500 |",
    ] {
        assert!(adapter.contains(fact), "{fact}: {adapter}");
    }
    assert!(!adapter.contains("agreement"), "{adapter}");
    let model = card(&version, Form::Model);
    assert!(model.contains("library_name: transformers\n"), "{model}");
    let mut compared = version.clone();
    let difference = Difference {
        traces: 2,
        tokens: 9,
        mean: 1e-7,
        max: 3e-7,
    };
    compared.training.agreement = Some(Agreement::Measured(difference));
    let row = format!("| train/serve agreement | {difference} |");
    let adapter = card(&compared, Form::Adapter);
    assert!(adapter.contains(&row), "{adapter}");
    compared.training.agreement = Some(Agreement::unmeasured("no rollout was found"));
    let adapter = card(&compared, Form::Adapter);
    assert!(!adapter.contains("agreement"), "{adapter}");
    // What is no repository of the hub is not linked, whatever it holds.
    let strange = AdapterVersion {
        base: BaseModel {
            name: "/models/a: \"b\"\n---\nc|d".to_owned(),
            revision: None,
            sha256: String::new(),
        },
        ..version
    };
    let adapter = card(&strange, Form::Adapter);
    assert!(
        adapter.starts_with("---\nlibrary_name: peft\n"),
        "{adapter}"
    );
    assert!(adapter.contains("c\\|d |"), "{adapter}");
}
