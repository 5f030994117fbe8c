//! What versions there are. A record is small and written once; its files are not looked at here.

use std::collections::BTreeMap;

use espalier_core::adapter::AdapterVersion;
use espalier_core::error::FieldError;
use espalier_core::id::{AdapterName, ProjectId};
use espalier_core::layout;
use espalier_core::spec::AdapterRef;
use espalier_runtime::store::{LIST_MAX, Store};

use crate::error::AdaptersError;

/// An adapter and its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: AdapterName,
    /// The numbers of its versions, ascending; at least one.
    pub versions: Vec<u32>,
    /// The number of the newest entry that says which of them is `latest`; 0: there is none.
    pub latest_seq: u64,
}

/// The adapters of a project, by name.
///
/// # Errors
/// The store does not answer.
pub async fn list(store: &Store, project: &ProjectId) -> Result<Vec<Listed>, AdaptersError> {
    listed(store, project, &layout::adapters(project)).await
}

/// One adapter of a project; none where it has no version.
///
/// # Errors
/// The store does not answer.
pub async fn list_one(
    store: &Store,
    project: &ProjectId,
    name: &AdapterName,
) -> Result<Option<Listed>, AdaptersError> {
    let prefix = layout::adapter_versions(project, name);
    Ok(listed(store, project, &prefix).await?.pop())
}

/// The record of a version; without a number, of the newest.
///
/// # Errors
/// There is none, it is broken, or the store does not answer.
pub async fn find(
    store: &Store,
    project: &ProjectId,
    name: &AdapterName,
    version: Option<u32>,
) -> Result<AdapterVersion, AdaptersError> {
    let version = match version {
        Some(version) => version,
        None => {
            let newest = newest(store, project, name).await?;
            newest.ok_or_else(|| AdaptersError::NoAdapter {
                name: name.to_string(),
                project: project.to_string(),
            })?
        }
    };
    let path = layout::adapter_version(project, name, version);
    let bytes = match store.get(&path).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => {
            let name = name.clone();
            return Err(AdaptersError::NoVersion(AdapterRef { name, version }));
        }
        Err(error) => return Err(error.into()),
    };
    let record = AdapterVersion::parse(&bytes, name, version)?;
    if record.job.project != *project {
        let rule = format!("must be a job of project {project}");
        return Err(FieldError::new("adapter.job", &record.job, rule).into());
    }
    Ok(record)
}

/// The highest number of a version, if there is one.
pub(crate) async fn newest(
    store: &Store,
    project: &ProjectId,
    name: &AdapterName,
) -> Result<Option<u32>, AdaptersError> {
    let found = list_one(store, project, name).await?;
    Ok(found.and_then(|one| one.versions.last().copied()))
}

/// What lies below `prefix`, in as many listings as it takes.
async fn listed(
    store: &Store,
    project: &ProjectId,
    prefix: &str,
) -> Result<Vec<Listed>, AdaptersError> {
    let mut found: BTreeMap<AdapterName, (Vec<u32>, u64)> = BTreeMap::new();
    let mut after: Option<String> = None;
    loop {
        let prefix = prefix.trim_end_matches('/');
        let page = store.list(prefix, after.as_deref(), LIST_MAX).await?;
        for object in &page {
            if let Some((name, n)) = layout::adapter_version_of(project, &object.path) {
                found.entry(name).or_default().0.push(n);
            } else if let Some((name, seq)) = layout::adapter_latest_of(project, &object.path) {
                let newest = &mut found.entry(name).or_default().1;
                *newest = seq.max(*newest);
            }
        }
        if page.len() < LIST_MAX {
            break;
        }
        after = page.last().map(|last| last.path.clone());
    }
    let sorted = |(name, (mut versions, latest_seq)): (AdapterName, (Vec<u32>, u64))| {
        versions.sort_unstable();
        let has_versions = !versions.is_empty();
        has_versions.then_some(Listed {
            name,
            versions,
            latest_seq,
        })
    };
    Ok(found.into_iter().filter_map(sorted).collect())
}
