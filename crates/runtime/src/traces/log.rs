//! The log of a trace in the store: one object a patch, numbered from 0 without gaps, each created once.

use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::edits::{PATCH_BYTES_MAX, PATCHES_MAX, Patch, check, recheck};
use futures::{StreamExt, TryStreamExt};

use super::{Listed, Loaded, NUMBER_TRIES_MAX, Traces, TracesError};
use crate::store::Created;
use crate::tasks::blocking;

/// Patches that are read at once: hides the latency of a remote store.
const READS_MAX: usize = 8;

impl Traces {
    /// The trace of one job as a listing shows it, whether or not one is published.
    pub async fn find(&self, job: &JobKey) -> Result<Listed, TracesError> {
        let prefix = layout::patches(job);
        let prefix = prefix.trim_end_matches('/');
        // Those that may be there, and one that may not, which reading refuses.
        let limit = PATCHES_MAX as usize + 1;
        let objects = self.store.list(prefix, None, limit).await?;
        let numbers = objects
            .iter()
            .filter_map(|object| layout::job_of_patch(&object.path));
        let newest = numbers.map(|(_, n)| n).max();
        Ok(Listed {
            job: job.clone(),
            patches: newest.map_or(0, |n| n.saturating_add(1)),
        })
    }

    /// The corrections of a trace, in order.
    pub async fn log(&self, listed: &Listed) -> Result<Vec<Patch>, TracesError> {
        self.patches(&listed.job, 0, listed.patches).await
    }

    async fn patches(&self, job: &JobKey, from: u32, to: u32) -> Result<Vec<Patch>, TracesError> {
        if to > PATCHES_MAX {
            let reason = format!("a trace must have at most {PATCHES_MAX} corrections");
            let path = layout::patch(job, to - 1);
            return Err(TracesError::Patch { path, reason });
        }
        let read = |n| async move {
            let path = layout::patch(job, n);
            let bytes = match self.store.get(&path).await {
                Err(error) if error.is_not_found() => {
                    let reason = "it is missing, and later ones are there".to_owned();
                    return Err(TracesError::Patch { path, reason });
                }
                other => other?,
            };
            Patch::parse(&bytes).map_err(|reason| TracesError::Patch { path, reason })
        };
        let reads = futures::stream::iter((from..to).map(read));
        reads.buffered(READS_MAX).try_collect().await
    }

    /// Adds a correction at the end of the log of a trace. Where others added theirs since it was read, the correction
    /// is looked at again with those in the log. Returns its number and the trace with it.
    ///
    /// # Errors
    /// [`TracesError::Refused`] where it does not fit, or where what it names has changed since `patch.log`.
    pub async fn patch(
        &self,
        mut loaded: Loaded,
        mut patch: Patch,
    ) -> Result<(u32, Loaded), TracesError> {
        let job = loaded.manifest.job.clone();
        for _ in 0..NUMBER_TRIES_MAX {
            let checking = blocking("traces.check", move || {
                let checked = recheck(&loaded.trace, &loaded.log, &patch)
                    .and_then(|()| check(&loaded.trace, &loaded.log, &patch));
                (checked, loaded, patch)
            });
            let checked;
            (checked, loaded, patch) = checking.await?;
            loaded.curated = checked.map_err(|source| TracesError::Refused {
                job: job.clone(),
                source,
            })?;
            let n = u32::try_from(loaded.log.len()).unwrap_or(u32::MAX);
            if self.create_patch(&job, n, &patch).await? == Created::New {
                loaded.log.push(patch);
                return Ok((n, loaded));
            }
            let known = self.find(&job).await?.patches;
            loaded.log.extend(self.patches(&job, n, known).await?);
        }
        Err(TracesError::Contended(job))
    }

    async fn create_patch(
        &self,
        job: &JobKey,
        n: u32,
        patch: &Patch,
    ) -> Result<Created, TracesError> {
        let path = layout::patch(job, n);
        let text = match serde_json::to_vec_pretty(patch) {
            Ok(text) if text.len() as u64 <= PATCH_BYTES_MAX => text,
            Ok(text) => {
                let bytes = text.len();
                let reason = format!("must be at most {PATCH_BYTES_MAX} bytes, got {bytes}");
                return Err(TracesError::Patch { path, reason });
            }
            Err(error) => {
                let reason = error.to_string();
                return Err(TracesError::Patch { path, reason });
            }
        };
        Ok(self.store.create(&path, text.into()).await?)
    }
}
