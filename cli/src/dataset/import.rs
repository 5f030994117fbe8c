//! Files that become sources: read, bounded, and brought to the uploads of the project under the digest of what is in
//! them, so that the same file again costs nothing.

use std::path::{Path, PathBuf};

use espalier_core::id::ProjectId;
use espalier_core::layout::{self, UploadName};
use espalier_core::trace::sha256_hex;
use espalier_dataset::files::Format;
use espalier_runtime::store::{OBJECT_BYTES_MAX, Store};
use espalier_runtime::tasks::blocking;

use crate::exit::Problem;
use crate::progress;

/// Uploads files, and gives the names by which jobs find them, in the same order; one that is named twice comes once.
pub(super) async fn upload(
    store: &Store,
    project: &ProjectId,
    files: &[PathBuf],
) -> Result<Vec<String>, Problem> {
    let bar = progress::things(files.len() as u64, "uploading");
    let mut names: Vec<String> = Vec::new();
    for file in files {
        let name = upload_one(store, project, file).await?.to_string();
        if !names.contains(&name) {
            names.push(name);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(names)
}

/// Refuses what no job could read, before anything is sent.
pub(super) fn check(files: &[PathBuf]) -> Result<(), Problem> {
    for file in files {
        let shown = file.display();
        let name = file.to_string_lossy();
        if Format::of(&name).is_none() {
            let message = format!("`{shown}` must end with .jsonl, .json or .parquet");
            return Err(Problem::refused(message));
        }
        let bytes = std::fs::metadata(file)
            .map_err(|error| Problem::refused(format!("cannot read `{shown}`: {error}")))?
            .len();
        if bytes > OBJECT_BYTES_MAX {
            let message =
                format!("`{shown}` must have at most {OBJECT_BYTES_MAX} bytes, has {bytes}");
            return Err(Problem::refused(message).fix("split it into several files"));
        }
    }
    Ok(())
}

async fn upload_one(
    store: &Store,
    project: &ProjectId,
    file: &Path,
) -> Result<UploadName, Problem> {
    let path = file.to_owned();
    let read = blocking("dataset.read", move || {
        let content = std::fs::read(&path)?;
        let name = name(&path, &sha256_hex(&content));
        Ok::<_, std::io::Error>((content, name))
    });
    let read = read
        .await
        .map_err(|error| Problem::failed(error.to_string()))?;
    let (content, name) = read
        .map_err(|error| Problem::refused(format!("cannot read `{}`: {error}", file.display())))?;
    let name = name?;
    let path = layout::upload(project, &name);
    match store.head(&path).await {
        Ok(_) => {}
        Err(error) if error.is_not_found() => store.put(&path, content.into()).await?,
        Err(error) => return Err(error.into()),
    }
    Ok(name)
}

/// `{digest}/{file name}`, with what a name may not hold left out of the file's: manifests then say which file it was.
fn name(file: &Path, sha256: &str) -> Result<UploadName, Problem> {
    let given = file.file_name().unwrap_or_default().to_string_lossy();
    let kept = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    let plain: String = given.chars().filter(kept).collect();
    let end = given.rsplit_once('.').map_or("", |(_, end)| end);
    let own = UploadName::new(&format!("{sha256}/{plain}"));
    Ok(own.or_else(|_| UploadName::new(&format!("{sha256}/rows.{end}")))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_tells_which_file_it_was() {
        let named = |file: &str| name(Path::new(file), "ab12").unwrap().to_string();
        assert_eq!(named("/x/shop 1.jsonl"), "ab12/shop1.jsonl");
        assert_eq!(named("_x.json"), "ab12/rows.json");
        assert_eq!(named("é.parquet"), "ab12/rows.parquet");
    }

    #[test]
    fn files_are_refused_before_anything_is_sent() {
        let refused = |file: &str| check(&[PathBuf::from(file)]).unwrap_err().message;
        assert_eq!(
            refused("a.csv"),
            "`a.csv` must end with .jsonl, .json or .parquet"
        );
        assert!(refused("/no/such.json").starts_with("cannot read `/no/such.json`"));
    }
}
