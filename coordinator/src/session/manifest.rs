//! Manifests that do not verify: a worker reports one, the coordinator looks for itself and moves it aside, so that
//! the holder of the lease can publish (`design.md`, *Adoption*). Nobody else moves a manifest.

use std::time::Duration;

use espalier_core::error::{FieldError, shorten};
use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;
use espalier_core::trace::Manifest;
use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message;
use espalier_runtime::store::{Store, StoreError};
use espalier_runtime::{tasks, telemetry};
use tokio::sync::mpsc;

use super::{Session, lease_from_wire};
use crate::api::view;

/// Reports that wait. Each reads files, which a slow store makes slow; room for one of each lease that a stream may
/// hold, so that the reader of the stream, which also takes renewals, need not wait for it.
pub const REPORTS_MAX: usize = 1_000;
/// How long one check may take.
const CHECK_LIMIT: Duration = Duration::from_secs(120);

/// A worker's report.
#[derive(Debug)]
pub struct Report {
    key: JobKey,
    fence: Fence,
    reason: String,
}

/// What the check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Checked {
    /// The place is free.
    Free(String),
    /// It is not, for this reason.
    Kept(String),
}

impl Report {
    /// Reads a report.
    pub fn from_wire(report: &v1::BadManifest) -> Result<Self, FieldError> {
        let lease = lease_from_wire(report.lease.as_ref());
        let (key, fence) = lease.map_err(|error| error.under("bad_manifest"))?;
        Ok(Self {
            key,
            fence,
            reason: shorten(&report.reason),
        })
    }
}

impl Session {
    /// Checks one report after the other until the stream ends. A check that is broken off does no harm: the worker
    /// reports again on its next stream.
    pub async fn check_manifests(&self, mut inbox: mpsc::Receiver<Report>) {
        let ended = &self.connected.ended;
        while let Some(Some(report)) = ended.run_until_cancelled(inbox.recv()).await {
            // Boxed: reports are rare, and every session would carry the state of a check.
            let checked = Box::pin(self.check(&report));
            let checked = tasks::with_deadline("session.manifest", CHECK_LIMIT, checked);
            let Some(checked) = ended.run_until_cancelled(checked).await else {
                return;
            };
            let (moved, detail) = match checked {
                Ok(Checked::Free(detail)) => (true, detail),
                Ok(Checked::Kept(detail)) => (false, detail),
                Err(timeout) => (false, timeout.to_string()),
            };
            let lease = Some(view::lease(&report.key, report.fence));
            let answer = v1::ManifestChecked {
                lease,
                moved,
                detail,
            };
            self.send(Message::ManifestChecked(answer)).await;
        }
    }

    async fn check(&self, report: &Report) -> Checked {
        match self.holds(&report.key, report.fence).await {
            Ok(true) => {}
            Ok(false) => return Checked::Kept("the lease is lost".to_owned()),
            Err(error) => return Checked::Kept(error.to_string()),
        }
        let set_aside = set_aside(&self.shared.store, &report.key, report.fence).await;
        match &set_aside {
            Ok(Checked::Free(detail)) => {
                tracing::warn!(job = %report.key, reported = report.reason, detail, "bad manifest set aside");
            }
            Ok(Checked::Kept(_)) => {}
            Err(error) => {
                tracing::error!(job = %report.key, error = telemetry::error_chain(error), "a manifest could not be checked");
            }
        }
        set_aside
            .unwrap_or_else(|_| Checked::Kept("the object store cannot be used now".to_owned()))
    }
}

/// Moves the manifest of `key` aside unless it verifies. Repeating it after a break finishes what was begun: the copy
/// is made before the original goes, and a second copy meets the first.
async fn set_aside(store: &Store, key: &JobKey, fence: Fence) -> Result<Checked, StoreError> {
    let path = layout::manifest(key);
    let bytes = match store.get(&path).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => {
            return Ok(Checked::Free("there is no manifest".to_owned()));
        }
        Err(error) => return Err(error),
    };
    let Some(fault) = fault_of(store, key, &bytes).await? else {
        return Ok(Checked::Kept("the manifest verifies".to_owned()));
    };
    let aside = layout::manifest_aside(key, fence);
    store.create(&aside, bytes).await?;
    store.delete(&path).await?;
    Ok(Checked::Free(format!("{aside}: {fault}")))
}

/// What is wrong with a manifest, if something is.
async fn fault_of(store: &Store, key: &JobKey, bytes: &[u8]) -> Result<Option<String>, StoreError> {
    let manifest = match Manifest::parse(bytes, key) {
        Ok(manifest) => manifest,
        Err(error) => return Ok(Some(error.to_string())),
    };
    for file in manifest.files {
        let content = match store.get(&file.path).await {
            Ok(content) => content,
            Err(error) if error.is_not_found() => {
                return Ok(Some(format!("{} is missing", file.path)));
            }
            Err(error) => return Err(error),
        };
        let path = file.path.clone();
        let hashed = tasks::blocking("session.manifest", move || file.holds(&content)).await;
        // Work that did not come back proves nothing against the file.
        if hashed == Ok(false) {
            return Ok(Some(format!("{path} is not what the manifest names")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use espalier_core::time::Timestamp;
    use espalier_core::trace::{FileEntry, RolloutSummary, StopReason, Summary, Totals};

    fn manifest(key: &JobKey, trace: &[u8]) -> Bytes {
        let fence = Fence(7);
        let manifest = Manifest {
            schema_version: espalier_core::trace::SCHEMA_VERSION,
            job: key.clone(),
            attempt: 1,
            fence,
            spec_sha256: None,
            created_at_us: Timestamp(1),
            files: vec![FileEntry::of(layout::trace(key, fence), trace)],
            parents: Vec::new(),
            summary: Summary::Rollout(RolloutSummary {
                reward: None,
                stop: StopReason::Answered,
                reason: String::new(),
                task_id: String::new(),
                task_kind: String::new(),
                totals: Totals::default(),
            }),
        };
        serde_json::to_vec(&manifest).unwrap().into()
    }

    #[tokio::test]
    async fn only_a_manifest_that_does_not_verify_is_moved() {
        let store = Store::open("memory://").await.unwrap();
        let key: JobKey = "shop/b/j".parse().unwrap();
        let aside = || set_aside(&store, &key, Fence(9));
        assert!(matches!(aside().await.unwrap(), Checked::Free(_)));

        let path = layout::manifest(&key);
        store.create(&path, manifest(&key, b"trace")).await.unwrap();
        let trace = layout::trace(&key, Fence(7));
        store
            .put(&trace, Bytes::from_static(b"trace"))
            .await
            .unwrap();
        assert_eq!(
            aside().await.unwrap(),
            Checked::Kept("the manifest verifies".to_owned())
        );

        store
            .put(&trace, Bytes::from_static(b"other"))
            .await
            .unwrap();
        assert!(matches!(aside().await.unwrap(), Checked::Free(_)));
        assert!(store.get(&path).await.unwrap_err().is_not_found());
        let moved = store
            .get(&layout::manifest_aside(&key, Fence(9)))
            .await
            .unwrap();
        assert_eq!(moved, manifest(&key, b"trace"));
    }
}
