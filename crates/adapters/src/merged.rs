//! Base and adapter become one model, if the base is the one that the adapter was trained on.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use espalier_core::adapter::AdapterVersion;
use espalier_kernels::cpu::Pool;
use espalier_qwen3::Merge;
use espalier_runtime::fetch::{COPIED, Fetcher, Source, Wanted, weight_files};
use espalier_runtime::tasks::blocking;
use sha2::{Digest, Sha256};

use crate::error::AdaptersError;
use crate::watch::Watch;

/// Which bases are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseCheck {
    /// Any, for whoever owns this machine.
    Any,
    /// None that is a folder: a job reads no folder for others.
    NoFolders,
}

/// The digest of a model's folder, as records name it: SHA-256 of the lines `{sha256}  {name}` of `config.json` and of each
/// file of weights, in the order of their names.
///
/// # Errors
/// A file cannot be read.
pub async fn base_digest(folder: &Path) -> Result<String, AdaptersError> {
    let mut names = weight_files(folder).await?;
    names.push("config.json".to_owned());
    names.sort_unstable();
    let folder = folder.to_owned();
    let digest = move || -> Result<String, AdaptersError> {
        let mut lines = Sha256::new();
        for name in names {
            let path = folder.join(&name);
            let digest = digest_of(&path).map_err(AdaptersError::file(&path))?;
            lines.update(format!("{digest}  {name}\n"));
        }
        Ok(hex(&lines.finalize()))
    };
    blocking("adapters.base_digest", digest).await?
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest_of(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let (mut digest, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match std::io::Read::read(&mut file, &mut piece)? {
            0 => return Ok(hex(&digest.finalize())),
            read => digest.update(&piece[..read]),
        }
    }
}

/// Writes the merged model of `version`, whose files lie in `adapter`, into the folder `to`.
pub(crate) async fn merge(
    fetcher: &Fetcher,
    version: &AdapterVersion,
    adapter: PathBuf,
    to: PathBuf,
    (bases, watch): (BaseCheck, &Watch),
) -> Result<(), AdaptersError> {
    let base = &version.base;
    watch.begin("fetches the base model");
    let source = Source::parse(&base.name, base.revision.as_deref()).await?;
    if bases == BaseCheck::NoFolders && matches!(source, Source::Folder(_)) {
        return Err(AdaptersError::BaseFolder(base.name.clone()));
    }
    let folder = fetcher.fetch(&source, Wanted::ModelToCopy).await?;
    if !base.sha256.is_empty() {
        watch.begin("checks the base model");
        let found = base_digest(&folder).await?;
        if found != base.sha256 {
            return Err(AdaptersError::OtherBase {
                name: base.name.clone(),
                expected: base.sha256.clone(),
                found,
            });
        }
    }
    let (meter, stop) = (watch.begin("merges"), watch.stop.clone());
    let work = move || {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let merge = Merge {
            base: &folder,
            adapter: &adapter,
            to: &to,
            companions: &COPIED,
        };
        merge.run(&Pool::new(threads), &|done, total| {
            if meter.total() == 0 {
                meter.expect(total);
            }
            meter.add(done - meter.done());
            match stop.is_cancelled() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
    };
    blocking("adapters.merge", work).await??;
    Ok(())
}
