//! What attempts that were killed with their process left on this machine: the next process that takes the folder
//! brings their steps to the store, as further segments of those attempts, and only then removes them. Nobody waits for
//! it, and no result comes of it: the jobs are done again under new fences.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::layout;
use espalier_core::trace::{Header, Step, sha256_hex};
use espalier_runtime::store::Store;
use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::telemetry::error_chain;
use espalier_runtime::traces::{TRACE_BYTES_MAX, TracesError, read_steps};
use tokio_util::sync::CancellationToken;

use super::publish::compress;
use super::{BLOBS_MAX, RecordContext, RecordError};

/// How long one attempt's leftovers may take. The store was there when the process started.
const SHIP_TIMEOUT: Duration = Duration::from_secs(120);

/// Why leftovers are still on this machine.
#[derive(Debug, thiserror::Error)]
enum LeftoverError {
    #[error("cannot read the steps")]
    Disk(#[from] io::Error),
    #[error("cannot store the steps")]
    Record(#[from] RecordError),
    #[error("cannot read what is stored of the steps")]
    Stored(#[from] TracesError),
    #[error(transparent)]
    Blocking(#[from] tasks::BlockingFailed),
}

/// Brings the steps of attempts that were killed to the store, until `stop`. What cannot be brought there stays for the
/// next start.
pub(crate) async fn ship_leftovers(context: RecordContext, stop: CancellationToken) {
    let mut shipped = 0_usize;
    for folder in context.spool.take_leftovers() {
        let ship = with_deadline(
            "record.leftovers",
            SHIP_TIMEOUT,
            ship(&context.store, &folder),
        );
        let done = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            done = ship => done,
        };
        let failed = match done {
            Ok(Ok(())) => remove(folder.clone())
                .await
                .err()
                .map(|error| error_chain(&error)),
            Ok(Err(error)) => Some(error_chain(&error)),
            Err(late) => Some(late.to_string()),
        };
        match failed {
            None => shipped += 1,
            Some(error) => {
                tracing::warn!(folder = %folder.display(), error, "steps of a killed attempt stay on this machine");
            }
        }
    }
    if shipped > 0 {
        tracing::info!(shipped, "brought the steps of killed attempts to the store");
    }
}

async fn remove(folder: PathBuf) -> Result<(), LeftoverError> {
    Ok(tasks::blocking("record.remove", move || fs::remove_dir_all(folder)).await??)
}

async fn ship(store: &Store, folder: &Path) -> Result<(), LeftoverError> {
    let path = folder.join("steps.jsonl");
    let text = tasks::blocking("record.leftovers", move || whole_lines(&path)).await??;
    // Without a header nobody knows whose steps they are, and there are none but system texts.
    let Some(header) = header_of(&text) else {
        return Ok(());
    };
    ship_blobs(store, &header, folder).await?;
    let stored = read_steps(store, &header.job, header.fence).await?;
    let Some(rest) = text.strip_prefix(stored.text.as_str()) else {
        tracing::warn!(job = %header.job, fence = header.fence.0, "other steps are stored under the name of a killed attempt");
        return Ok(());
    };
    if rest.is_empty() {
        return Ok(());
    }
    let rest = rest.to_owned();
    let packed = tasks::blocking("record.compress", move || compress(rest.as_bytes())).await??;
    let segment = layout::segment(&header.job, header.fence, stored.segments);
    store
        .put(&segment, packed)
        .await
        .map_err(RecordError::Store)?;
    Ok(())
}

/// Brings the raw results to the store that the steps name and that had not left yet.
async fn ship_blobs(store: &Store, header: &Header, folder: &Path) -> Result<(), LeftoverError> {
    let blobs = folder.join("blobs");
    let listed = tasks::blocking("record.leftovers", move || -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(blobs)?.take(BLOBS_MAX);
        entries.map(|entry| Ok(entry?.path())).collect()
    });
    for path in listed.await?.unwrap_or_default() {
        let name = path.file_name().unwrap_or_default().to_owned();
        let read = move || -> io::Result<(String, Vec<u8>)> {
            let content = fs::read(path)?;
            Ok((sha256_hex(&content), content))
        };
        let (sha256, content) = tasks::blocking("record.leftovers", read).await??;
        // One that was half written has the name of the whole.
        if name != sha256.as_str() {
            continue;
        }
        let object = layout::blob(&header.job.project, &sha256);
        let content = Bytes::from(content);
        store
            .create(&object, content)
            .await
            .map_err(RecordError::Store)?;
    }
    Ok(())
}

/// The lines of a log; of the last one only if it was written as a whole.
fn whole_lines(path: &Path) -> io::Result<String> {
    let mut text = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(TRACE_BYTES_MAX).read_to_end(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let end = text.iter().rposition(|byte| *byte == b'\n');
    text.truncate(end.map_or(0, |end| end + 1));
    String::from_utf8(text).map_err(io::Error::other)
}

fn header_of(text: &str) -> Option<Box<Header>> {
    match serde_json::from_str(text.lines().next()?) {
        Ok(Step::Header(header)) => Some(header),
        _ => None,
    }
}
