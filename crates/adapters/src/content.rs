//! The digest by which servers name what an adapter computes with. Records name files, so that it is computed from them.

use espalier_core::adapter::AdapterVersion;
use espalier_core::spec::AdapterRef;
use espalier_core::trace::FileEntry;
use espalier_qwen3::{ContentDigest, LoraError};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use crate::add::FILES;
use crate::error::AdaptersError;
use crate::pull::Verified;

/// SHA-256, in hex, of what a version computes with, as `system_fingerprint` has it. Reads all of its weights.
///
/// # Errors
/// It is no adapter, or a file is damaged or cannot be had.
pub async fn content_digest(
    store: &Store,
    version: &AdapterVersion,
) -> Result<String, AdaptersError> {
    let of_settings = file(version, FILES[1])?;
    let bytes_max = ContentDigest::SETTINGS_BYTES_MAX;
    if of_settings.size > bytes_max {
        let path = of_settings.path.clone().into();
        return Err(LoraError::TooLarge { path, bytes_max }.into());
    }
    let mut settings = Vec::new();
    let mut pieces = Verified::new(store, of_settings);
    while let Some(piece) = pieces.next().await? {
        settings.extend_from_slice(&piece);
    }
    let mut digest = ContentDigest::of_settings(&settings)?;
    let mut pieces = Verified::new(store, file(version, FILES[0])?);
    while let Some(piece) = pieces.next().await? {
        let hash = move || digest.update(&piece);
        digest = blocking("adapters.digest", hash).await?;
    }
    let hex = digest.finish().iter().map(|b| format!("{b:02x}")).collect();
    Ok(hex)
}

fn file<'a>(version: &'a AdapterVersion, name: &str) -> Result<&'a FileEntry, AdaptersError> {
    let is_it = |file: &&FileEntry| file.path.rsplit('/').next() == Some(name);
    version
        .files
        .iter()
        .find(is_it)
        .ok_or_else(|| AdaptersError::NoAdapterFile {
            version: AdapterRef {
                name: version.name.clone(),
                version: version.n,
            },
            file: name.to_owned(),
        })
}
