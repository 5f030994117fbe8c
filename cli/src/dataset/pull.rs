//! `espalier dataset pull`: the files of a version as a folder that `datasets.load_dataset` opens as it is.

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_core::dataset::{
    CARD_FILE, DatasetVersion, MANIFEST_FILE, TALLY_FILE, TOKENIZER_FILE,
};
use espalier_core::trace::FileEntry;
use espalier_dataset::Split;
use espalier_dataset::files::{Format, file_name};
use espalier_runtime::tasks::blocking;
use serde_json::json;

use super::{Named, Place};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, facts};
use crate::progress;

/// Options of `dataset pull`.
#[derive(Args, Clone, Debug)]
pub struct Pull {
    /// The data set; without a version its newest
    #[arg(value_name = "NAME[@vN]")]
    pub dataset: Named,
    /// The folder; files of these names in it are replaced
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Where data sets are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Pull) -> Outcome {
    let datasets = args.place.open(context).await?;
    let version = datasets
        .version(&args.dataset.name, args.dataset.version)
        .await?;
    let files = files(&version);
    let bytes: u64 = files.iter().map(|(_, entry)| entry.size).sum();
    let bar = progress::bytes(bytes, "pulling");
    for (name, entry) in &files {
        let content = datasets.file(entry).await?;
        let path = args.output.join(name);
        let write = blocking("dataset.write", move || write(&path, &content));
        write
            .await
            .map_err(|error| Problem::failed(error.to_string()))??;
        bar.inc(entry.size);
    }
    bar.finish_and_clear();
    let folder = args.output.display().to_string();
    let name = format!("{}@v{}", version.name, version.n);
    context.out.show(
        || json!({"dataset": version.name.as_str(), "version": version.n, "folder": folder, "files": files.len(), "bytes": bytes}),
        || {
            facts(&[
                ("data set", name),
                ("folder", folder.clone()),
                ("files", count(files.len() as u64)),
                ("bytes", count(bytes)),
            ])
        },
    )?;
    Ok(Exit::Ok)
}

/// Every file with its name in the folder.
pub(super) fn files(version: &DatasetVersion) -> Vec<(String, &FileEntry)> {
    let mut files = Vec::new();
    for split in Split::ALL {
        for (form, format) in [("parquet", Format::Parquet), ("jsonl", Format::Jsonl)] {
            let rows = version.rows(split.as_str(), form);
            let of = rows.len();
            let named = rows.into_iter().enumerate();
            files.extend(named.map(|(n, entry)| (file_name(split, n, of, format), entry)));
        }
    }
    for name in [CARD_FILE, MANIFEST_FILE, TALLY_FILE, TOKENIZER_FILE] {
        files.extend(version.file(name).map(|entry| (name.to_owned(), entry)));
    }
    files
}

/// Whole or not at all: a reader beside it sees no half of a file.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), Problem> {
    let failed = |error: std::io::Error| {
        Problem::failed(format!("cannot write `{}`: {error}", path.display()))
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    std::io::Write::write_all(&mut file, content).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
