//! Versions of data sets in the object store: taking a number, listing, and reading with proof of wholeness.
//!
//! What is in the files is `espalier-dataset`'s. The worker that builds a data set takes its number here; whoever trains
//! on one or shows it reads it here.

use std::collections::BTreeMap;

use bytes::Bytes;
use espalier_core::dataset::DatasetVersion;
use espalier_core::error::FieldError;
use espalier_core::id::{DatasetName, JobKey, ProjectId};
use espalier_core::layout;
use espalier_core::trace::FileEntry;

use crate::publish::OfStore;
use crate::store::{Created, LIST_MAX, Store, StoreError};
use crate::tasks::{BlockingFailed, blocking};

/// Why a data set cannot be read or named.
#[derive(Debug, thiserror::Error)]
pub enum DatasetsError {
    /// The store failed.
    #[error("the data set's objects cannot be reached")]
    Store(#[from] StoreError),
    /// There is no such version, or none at all.
    #[error("data set `{name}` has no version {}", version.map_or("yet".to_owned(), |n| n.to_string()))]
    Missing {
        /// The data set.
        name: DatasetName,
        /// The version that was asked for.
        version: Option<u32>,
    },
    /// The record of a version is broken.
    #[error("a version of a data set is refused")]
    Record(#[from] FieldError),
    /// A file is not the one that the record names.
    #[error("`{path}` must have the size and sha256 of its record, got {bytes} other bytes")]
    Altered {
        /// The file.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// The record cannot be written.
    #[error("the record of a version cannot be encoded")]
    Encode(#[source] serde_json::Error),
    /// Work off the async threads failed.
    #[error(transparent)]
    Blocking(#[from] BlockingFailed),
}

impl OfStore for DatasetsError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// The data sets of one project.
#[derive(Clone, Debug)]
pub struct Datasets {
    store: Store,
    project: ProjectId,
}

impl Datasets {
    /// The data sets of `project` in `store`.
    pub fn new(store: Store, project: ProjectId) -> Self {
        Self { store, project }
    }

    /// Every data set with the numbers of its versions, ascending.
    pub async fn list(&self) -> Result<BTreeMap<DatasetName, Vec<u32>>, DatasetsError> {
        self.find(&layout::datasets(&self.project)).await
    }

    /// The numbers of a data set's versions, ascending.
    pub async fn numbers(&self, name: &DatasetName) -> Result<Vec<u32>, DatasetsError> {
        let prefix = layout::dataset_versions(&self.project, name);
        let mut found = self.find(&prefix).await?;
        Ok(found.remove(name).unwrap_or_default())
    }

    async fn find(&self, prefix: &str) -> Result<BTreeMap<DatasetName, Vec<u32>>, DatasetsError> {
        let prefix = prefix.trim_end_matches('/');
        let mut found: BTreeMap<DatasetName, Vec<u32>> = BTreeMap::new();
        let mut after = None::<String>;
        loop {
            let page = self.store.list(prefix, after.as_deref(), LIST_MAX).await?;
            for object in &page {
                if let Some((name, n)) = layout::dataset_version_of(&self.project, &object.path) {
                    found.entry(name).or_default().push(n);
                }
            }
            if page.len() < LIST_MAX {
                break;
            }
            after = page.last().map(|last| last.path.clone());
        }
        found
            .values_mut()
            .for_each(|numbers| numbers.sort_unstable());
        Ok(found)
    }

    /// One version; without a number the newest.
    pub async fn version(
        &self,
        name: &DatasetName,
        n: Option<u32>,
    ) -> Result<DatasetVersion, DatasetsError> {
        let missing = || DatasetsError::Missing {
            name: name.clone(),
            version: n,
        };
        let n = match n {
            Some(n) => n,
            None => *self.numbers(name).await?.last().ok_or_else(missing)?,
        };
        let path = layout::dataset_version(&self.project, name, n);
        let bytes = match self.store.get(&path).await {
            Err(error) if error.is_not_found() => return Err(missing()),
            other => other?,
        };
        Ok(DatasetVersion::parse(&bytes, name, n)?)
    }

    /// The version that a job became, the newest where an operator had it done twice.
    pub async fn of_job(
        &self,
        name: &DatasetName,
        job: &JobKey,
    ) -> Result<Option<DatasetVersion>, DatasetsError> {
        for n in self.numbers(name).await?.into_iter().rev() {
            match self.version(name, Some(n)).await {
                Ok(found) if found.job == *job => return Ok(Some(found)),
                // One that cannot be read is another's.
                Ok(_) | Err(DatasetsError::Record(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Gives a result that is published a number: the one that it has, or the first that is free. The record's own is
    /// not looked at.
    pub async fn reserve(&self, record: &DatasetVersion) -> Result<u32, DatasetsError> {
        let name = &record.name;
        let is_same = |found: DatasetVersion| {
            (found.job == record.job && found.fence == record.fence).then_some(found.n)
        };
        if let Some(n) = self.of_job(name, &record.job).await?.and_then(is_same) {
            return Ok(n);
        }
        let mut n = self.numbers(name).await?.last().map_or(1, |last| last + 1);
        loop {
            let numbered = DatasetVersion {
                n,
                ..record.clone()
            };
            let content = serde_json::to_vec_pretty(&numbered).map_err(DatasetsError::Encode)?;
            let path = layout::dataset_version(&self.project, name, n);
            if self.store.create(&path, content.into()).await? == Created::New {
                return Ok(n);
            }
            // It may be this one's own, whose answer was lost.
            match self.version(name, Some(n)).await {
                Ok(found) if is_same(found.clone()).is_some() => return Ok(n),
                Ok(_) | Err(DatasetsError::Record(_)) => n += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// A file of a version, as its record says that it is.
    pub async fn file(&self, entry: &FileEntry) -> Result<Bytes, DatasetsError> {
        let bytes = self.store.get(&entry.path).await?;
        let (entry, read) = (entry.clone(), bytes.clone());
        let holds = blocking("datasets.verify", move || (entry.holds(&read), entry.path));
        let (holds, path) = holds.await?;
        match holds {
            true => Ok(bytes),
            false => Err(DatasetsError::Altered {
                path,
                bytes: bytes.len(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use espalier_core::dataset::{
        CurateSummary, DATASET_RECORD_VERSION, DatasetSources, MANIFEST_FILE,
    };
    use espalier_core::id::Fence;
    use espalier_core::time::Timestamp;

    use super::*;

    fn record(job: &str, fence: u64) -> DatasetVersion {
        let job: JobKey = format!("shop/{job}/curate").parse().unwrap();
        let fence = Fence(fence);
        let manifest = format!("{}{MANIFEST_FILE}", layout::dataset_files(&job, fence));
        DatasetVersion {
            record_version: DATASET_RECORD_VERSION,
            name: "clicks".parse().unwrap(),
            n: 0,
            job,
            fence,
            created_at_us: Timestamp(1),
            sources: DatasetSources::default(),
            summary: CurateSummary::default(),
            files: vec![FileEntry::of(manifest, b"{}")],
        }
    }

    #[tokio::test]
    async fn a_result_takes_one_number() {
        let store = Store::open("memory://").await.unwrap();
        let datasets = Datasets::new(store.clone(), "shop".parse().unwrap());
        let name: DatasetName = "clicks".parse().unwrap();
        let none = datasets.version(&name, None).await.unwrap_err();
        assert_eq!(none.to_string(), "data set `clicks` has no version yet");
        for (job, fence, n) in [("a", 1, 1), ("b", 2, 2), ("a", 1, 1), ("a", 3, 3)] {
            assert_eq!(datasets.reserve(&record(job, fence)).await.unwrap(), n);
        }
        assert_eq!(datasets.numbers(&name).await.unwrap(), [1, 2, 3]);
        let newest = datasets.version(&name, None).await.unwrap();
        assert_eq!((newest.n, newest.fence), (3, Fence(3)));
        let of_b = datasets.of_job(&name, &record("b", 0).job).await.unwrap();
        assert_eq!(of_b.map(|found| found.n), Some(2));
        let missing = datasets.version(&name, Some(9)).await.unwrap_err();
        assert_eq!(missing.to_string(), "data set `clicks` has no version 9");
        // A record that somebody else broke takes its number and stands in nobody's way.
        let broken = layout::dataset_version(&"shop".parse().unwrap(), &name, 4);
        store.put(&broken, "{".into()).await.unwrap();
        assert_eq!(datasets.reserve(&record("c", 4)).await.unwrap(), 5);
        assert_eq!(datasets.list().await.unwrap()[&name], [1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn an_altered_file_is_refused() {
        let store = Store::open("memory://").await.unwrap();
        let datasets = Datasets::new(store.clone(), "shop".parse().unwrap());
        let entry = record("a", 1).files.remove(0);
        store.put(&entry.path, "{}".into()).await.unwrap();
        assert_eq!(datasets.file(&entry).await.unwrap(), "{}");
        store.put(&entry.path, "[]".into()).await.unwrap();
        let error = datasets.file(&entry).await.unwrap_err();
        assert!(
            matches!(error, DatasetsError::Altered { bytes: 2, .. }),
            "{error}"
        );
    }
}
