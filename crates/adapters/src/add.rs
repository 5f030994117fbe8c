//! A PEFT folder that was made elsewhere becomes a version, if it can be served.
//!
//! Its record says of training that nothing is known: no steps, no data set.

use std::path::Path;
use std::sync::Arc;

use espalier_core::adapter::{
    ADAPTER_RECORD_VERSION, AdapterKind, AdapterVersion, BaseModel, TrainSummary,
};
use espalier_core::id::{AdapterName, BatchId, Fence, JobId, JobKey, ProjectId};
use espalier_core::layout;
use espalier_core::trace::FileEntry;
use espalier_kernels::cpu::Pool;
use espalier_qwen3::{Config, Lora};
use espalier_runtime::clock::Clock;
use espalier_runtime::fetch::{Fetcher, Source, Wanted};
use espalier_runtime::store::{Created, Store};
use espalier_runtime::tasks::blocking;

use crate::error::AdaptersError;
use crate::pull::CARD;
use crate::versions;

/// The batch that such versions are counted to, which no queue knows.
const BATCH: &str = "added";
/// The files of an adapter; the last one need not be there.
pub(crate) const FILES: [&str; 3] = ["adapter_model.safetensors", "adapter_config.json", CARD];

/// What came of adding.
#[derive(Clone, Debug, PartialEq)]
pub struct Added {
    /// The version that has these files now.
    pub version: AdapterVersion,
    /// Whether it is new; otherwise the newest version had the same files already.
    pub is_new: bool,
}

/// Publishes `folder` as the next version of `name`. `base` takes the place of what the adapter itself says.
///
/// # Errors
/// It cannot be served, its base cannot be fetched, or the store does not take it.
pub async fn add(
    (store, project): (&Store, &ProjectId),
    name: &AdapterName,
    folder: &Path,
    base: Option<&str>,
    fetcher: &Fetcher,
    clock: &Arc<dyn Clock>,
) -> Result<Added, AdaptersError> {
    let base = check(folder, base, fetcher).await?;
    let contents = read(folder).await?;
    if let Some(n) = versions::newest(store, project, name).await? {
        let newest = versions::find(store, project, name, Some(n)).await?;
        if has_the_same(&newest, &contents) {
            return Ok(Added {
                version: newest,
                is_new: false,
            });
        }
    }
    let now = clock.now();
    let job = JobKey::new(
        project.clone(),
        BatchId::new(BATCH)?,
        JobId::new(format!("at-{}", now.0))?,
    );
    let fence = Fence(now.0);
    let files = layout::adapter_files(&job, fence);
    let mut version = AdapterVersion {
        record_version: ADAPTER_RECORD_VERSION,
        name: name.clone(),
        n: 1,
        kind: AdapterKind::Lora,
        job,
        fence,
        created_at_us: now,
        base: BaseModel {
            name: base,
            revision: None,
            // Its weights were not needed, and so not fetched.
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
        files: Vec::new(),
    };
    for (file, content) in contents {
        let path = format!("{files}{file}");
        version.files.push(FileEntry::of(&path, &content));
        store.put(&path, content.into()).await?;
    }
    publish(store, project, version).await
}

/// Takes the first number that is free.
async fn publish(
    store: &Store,
    project: &ProjectId,
    mut version: AdapterVersion,
) -> Result<Added, AdaptersError> {
    let newest = versions::newest(store, project, &version.name).await?;
    version.n = newest.unwrap_or(0) + 1;
    loop {
        let record = serde_json::to_vec_pretty(&version).map_err(AdaptersError::Encode)?;
        let path = layout::adapter_version(project, &version.name, version.n);
        let created = store.create(&path, record.clone().into()).await?;
        // A record that is there may be this one, whose answer was lost.
        if created == Created::New || store.get(&path).await? == record {
            return Ok(Added {
                version,
                is_new: true,
            });
        }
        version.n += 1;
    }
}

/// Finds that the adapter can be served with its base, and gives the base's name.
async fn check(
    folder: &Path,
    base: Option<&str>,
    fetcher: &Fetcher,
) -> Result<String, AdaptersError> {
    for file in &FILES[..2] {
        if !folder.join(file).is_file() {
            return Err(AdaptersError::Missing {
                folder: folder.to_owned(),
                file: (*file).to_owned(),
            });
        }
    }
    let base = match base {
        Some(base) => base.to_owned(),
        None => own_base(folder).await?,
    };
    let source = Source::parse(&base, None).await?;
    let at = fetcher.fetch(&source, Wanted::Config).await?;
    let config = at.join("config.json");
    let text = tokio::fs::read_to_string(&config).await;
    let config = Config::parse(&text.map_err(AdaptersError::file(&config))?)?;
    let folder = folder.to_owned();
    let load = move || Lora::load(&folder, &config, &Pool::new(1)).map(drop);
    blocking("adapters.check", load).await??;
    Ok(base)
}

async fn own_base(folder: &Path) -> Result<String, AdaptersError> {
    let path = folder.join(FILES[1]);
    let text = tokio::fs::read(&path)
        .await
        .map_err(AdaptersError::file(&path))?;
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let base = config["base_model_name_or_path"]
        .as_str()
        .unwrap_or_default();
    match base {
        "" => Err(AdaptersError::NoBase),
        base => Ok(base.to_owned()),
    }
}

async fn read(folder: &Path) -> Result<Vec<(&'static str, Vec<u8>)>, AdaptersError> {
    let mut contents = Vec::new();
    for file in FILES {
        let path = folder.join(file);
        match tokio::fs::read(&path).await {
            Ok(content) => contents.push((file, content)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && file == CARD => {}
            Err(error) => return Err(AdaptersError::file(&path)(error)),
        }
    }
    Ok(contents)
}

fn has_the_same(version: &AdapterVersion, contents: &[(&str, Vec<u8>)]) -> bool {
    let same = |(file, content): &(&str, Vec<u8>)| {
        let of_version = version
            .files
            .iter()
            .find(|entry| entry.path.ends_with(&format!("/{file}")));
        of_version.is_some_and(|entry| entry.holds(content))
    };
    version.files.len() == contents.len() && contents.iter().all(same)
}
