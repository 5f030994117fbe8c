//! Published answers, joined into one file.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use espalier_core::id::JobKey;
use espalier_core::layout;
use espalier_core::trace::Manifest;
use espalier_runtime::store::Store;
use espalier_runtime::tasks::blocking;

use crate::exit::Problem;

/// Writes the answers of `jobs`, one after the other, to `output`, which is there as a whole or not at all.
pub async fn write(store: &Store, jobs: &[JobKey], output: &Path) -> Result<(), Problem> {
    let mut name = output.as_os_str().to_owned();
    name.push(".part");
    let at = Path::new(&name);
    let cannot = |error: std::io::Error| {
        Problem::failed(format!("cannot write {}: {error}", output.display()))
    };
    let mut file = File::create(at).map_err(cannot)?;
    for job in jobs {
        let manifest = store.get(&layout::manifest(job)).await?;
        for entry in Manifest::parse(&manifest, job)?.files {
            let content = store.get(&entry.path).await?;
            let written = blocking("generate.write", move || {
                let holds = entry.holds(&content);
                let written = file.write_all(&content).map(|()| file);
                (holds, entry.path, written)
            });
            let (holds, path, written) = written
                .await
                .map_err(|error| Problem::failed(error.to_string()))?;
            if !holds {
                let message = format!("{path} is not what the manifest of {job} names");
                return Err(Problem::failed(message));
            }
            file = written.map_err(cannot)?;
        }
    }
    file.sync_all().map_err(cannot)?;
    std::fs::rename(at, output).map_err(cannot)
}
