//! A version goes out: to a repository of the hub, or into a folder of the object store.
//!
//! Done again, it changes nothing: what goes out is made of the version and its base alone, byte for byte, the hub is sent
//! what it has not, and a commit that would be empty is not made. So an export that was killed at any moment is repeated.

use std::path::{Path, PathBuf};

use espalier_core::adapter::{AdapterKind, AdapterVersion};
use espalier_core::id::ProjectId;
use espalier_core::layout::{self, UploadName};
use espalier_core::spec::{AdapterRef, ExportSummary, ExportTarget};
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::hub::{Change, Content, Hub, HubSettings, MAIN, Repo, Upload};
use espalier_runtime::store::Store;

use crate::card::{Form, card};
use crate::error::AdaptersError;
use crate::merged::{BaseCheck, merge};
use crate::pull::{CARD, Scratch, pull_into};
use crate::versions::find;
use crate::watch::Watch;

/// What is written last, so that whoever finds it finds the rest too.
const LAST: [&str; 2] = ["config.json", "adapter_config.json"];

/// What exports are done with.
#[derive(Clone, Debug)]
pub struct Exporter {
    /// Has the versions.
    pub store: Store,
    /// Fetches bases.
    pub fetcher: Fetcher,
    /// The hub, and the token for it.
    pub hub: HubSettings,
    /// Folder for what is on its way: as large as the largest model.
    pub scratch: PathBuf,
    /// Which bases are taken.
    pub bases: BaseCheck,
}

/// What goes out, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// Whose it is.
    pub project: &'a ProjectId,
    /// The version.
    pub adapter: &'a AdapterRef,
    /// Whether as a whole model in 16 bits.
    pub merged: bool,
    /// Where to.
    pub to: &'a ExportTarget,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// What tables show.
    pub summary: ExportSummary,
    /// Where people look at it, for a repository.
    pub page: Option<String>,
    /// Whether everybody can see it.
    pub is_public: bool,
    /// Whether something changed: otherwise all of it was there already.
    pub changed: bool,
}

impl Exporter {
    /// Does it.
    ///
    /// # Errors
    /// The version is not there or damaged, the base does not fit, or the place does not take it.
    pub async fn run(&self, order: Order<'_>, watch: &Watch) -> Result<Exported, AdaptersError> {
        let AdapterRef { name, version } = order.adapter;
        let version = find(&self.store, order.project, name, Some(*version)).await?;
        if order.merged && version.kind == AdapterKind::Full {
            return Err(AdaptersError::Whole(order.adapter.clone()));
        }
        let scratch = Scratch::within(&self.scratch)?;
        let folder = self
            .make(&version, order.merged, scratch.path(), watch)
            .await?;
        let files = files_of(&folder)?;
        match order.to {
            ExportTarget::Hub { repo, public } => {
                self.to_hub(&version, repo, *public, files, watch).await
            }
            ExportTarget::Uploads(to) => self.to_store(order.project, to, files, watch).await,
        }
    }

    /// All files that go out, in one folder.
    async fn make(
        &self,
        version: &AdapterVersion,
        merged: bool,
        scratch: &Path,
        watch: &Watch,
    ) -> Result<PathBuf, AdaptersError> {
        let made = |name: &str| {
            let path = scratch.join(name);
            let made = std::fs::create_dir(&path).map_err(AdaptersError::file(&path));
            made.map(|()| path)
        };
        let pulled = made("version")?;
        pull_into(&self.store, version, &pulled, watch).await?;
        let (folder, form) = match (merged, version.kind) {
            (true, _) => {
                let model = made("model")?;
                let how = (self.bases, watch);
                merge(&self.fetcher, version, pulled, model.clone(), how).await?;
                (model, Form::Model)
            }
            (false, AdapterKind::Lora) => (pulled, Form::Adapter),
            (false, AdapterKind::Full) => (pulled, Form::Model),
        };
        let path = folder.join(CARD);
        let written = std::fs::write(&path, card(version, form));
        written.map_err(AdaptersError::file(&path))?;
        Ok(folder)
    }

    async fn to_hub(
        &self,
        version: &AdapterVersion,
        repo: &str,
        public: bool,
        files: Vec<(String, PathBuf, u64)>,
        watch: &Watch,
    ) -> Result<Exported, AdaptersError> {
        let repo: Repo = repo.parse()?;
        let hub = Hub::new(self.hub.clone())?;
        let meter = watch.begin("uploads");
        let state = hub.create_repo(&repo, !public).await?;
        let (count, bytes) = measure(&files);
        let upload = |(path, file, _)| Upload {
            path,
            content: Content::File(file),
        };
        let uploads = files.into_iter().map(upload).collect();
        let message = format!(
            "Add {} v{}\n\nPublished by Espalier from {}.",
            version.name, version.n, version.job
        );
        let change = Change {
            files: uploads,
            folder: None,
            message,
        };
        let commit = hub.commit(&repo, MAIN, change, &meter).await?;
        Ok(Exported {
            summary: ExportSummary {
                exported_to: repo.to_string(),
                commit: Some(commit.id),
                files: count,
                bytes,
            },
            page: Some(hub.page(&repo)),
            is_public: !state.is_private,
            changed: commit.made,
        })
    }

    async fn to_store(
        &self,
        project: &ProjectId,
        to: &UploadName,
        files: Vec<(String, PathBuf, u64)>,
        watch: &Watch,
    ) -> Result<Exported, AdaptersError> {
        let meter = watch.begin("writes");
        let (count, bytes) = measure(&files);
        meter.expect(bytes);
        let (last, first): (Vec<_>, Vec<_>) = files
            .into_iter()
            .partition(|(name, ..)| LAST.contains(&name.as_str()));
        for (name, file, size) in first.into_iter().chain(last) {
            let name = UploadName::new(&format!("{to}/{name}"))?;
            self.store
                .put_file(&layout::upload(project, &name), &file)
                .await?;
            meter.add(size);
        }
        Ok(Exported {
            summary: ExportSummary {
                exported_to: layout::upload(project, to),
                commit: None,
                files: count,
                bytes,
            },
            page: None,
            is_public: false,
            changed: true,
        })
    }
}

fn measure(files: &[(String, PathBuf, u64)]) -> (u64, u64) {
    (
        files.len() as u64,
        files.iter().map(|(.., size)| size).sum(),
    )
}

/// Name, place and size of each file, by name.
fn files_of(folder: &Path) -> Result<Vec<(String, PathBuf, u64)>, AdaptersError> {
    let read = || -> std::io::Result<Vec<(String, PathBuf, u64)>> {
        let entries = std::fs::read_dir(folder)?;
        let one = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((name, entry.path(), entry.metadata()?.len()))
        };
        entries.map(one).collect()
    };
    let mut files = read().map_err(AdaptersError::file(folder))?;
    files.sort_unstable();
    Ok(files)
}
