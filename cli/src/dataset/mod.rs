//! `espalier dataset`: building data sets of traces and files, and looking at them.
//!
//! A `curate` job builds; here it is asked for and waited for. What is shown and pulled is read from the object store,
//! each file by the size and digest that the version's record names.

pub mod build;
mod import;
mod list;
mod pull;
mod push;
mod sample;
mod show;

use std::str::FromStr;

use bytes::Bytes;
use clap::{Args, Subcommand};
use espalier_core::dataset::{DatasetVersion, MANIFEST_FILE, TALLY_FILE, TOKENIZER_FILE};
use espalier_core::id::{DatasetName, ProjectId};
use espalier_core::spec::DatasetRef;
use espalier_dataset::{DatasetManifest, Tally};
use espalier_qwen3_text::{TOKENIZER_SHA256, Tokenizer, TokenizerError};
use espalier_runtime::datasets::{Datasets, DatasetsError};
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;

use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::uploads;

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum DatasetCommand {
    /// Build a data set of traces and files, as its next version
    #[command(after_help = BUILD_HELP)]
    Build(Box<build::Build>),
    /// List data sets and their versions
    List(list::List),
    /// What is in a version: settings, counts, lengths, and one sample with what is learned of it marked
    Show(show::Show),
    /// Write the files of a version into a folder, named as loaders of others look for them
    Pull(pull::Pull),
    /// Upload a version to the Hugging Face hub, as a repository that loaders open
    #[command(after_help = push::HELP)]
    Push(push::Push),
}

const BUILD_HELP: &str = "\
  espalier dataset build --from b1 b2 --where 'reward >= 0.9' --name shop
  espalier dataset build --import traces/*.json more.parquet --name workshop
  espalier train --base Qwen/Qwen3-0.6B --dataset shop@v1 --name shop        next

--where compares reward, turns, messages, tool_errors, tokens, wall_s (numbers: = != < <= > >=) and id, model, stop,
task_id, task_kind, split, label.NAME (texts: = != ~), joined by and, or, not and brackets; `solved` stands alone.

Whole tasks are held out, so that no conversation of a task is on both sides.
Ctrl-C leaves the job running; the same command with the same --batch goes on watching it.
Exit code 1: the job failed, and says why. 2: the command line, the filter or a file was refused.";

/// Where data sets are.
#[derive(Args, Clone, Debug)]
pub struct Place {
    /// Project [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

impl Place {
    fn project(&self, context: &Context) -> Result<ProjectId, Problem> {
        match &self.project {
            Some(project) => Ok(project.clone()),
            None => context.project(),
        }
    }

    async fn open(&self, context: &Context) -> Result<Datasets, Problem> {
        let store = uploads::open_store(context, self.store.as_deref()).await?;
        Ok(Datasets::new(store, self.project(context)?))
    }
}

/// A data set, or one version of it: `shop` or `shop@v3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The data set.
    pub name: DatasetName,
    /// Its version; none: the newest.
    pub version: Option<u32>,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('@') {
            let of: DatasetRef = text.parse().map_err(|e| format!("{e}"))?;
            return Ok(Self {
                name: of.name,
                version: Some(of.version),
            });
        }
        let name = DatasetName::new(text).map_err(|error| error.to_string())?;
        Ok(Self {
            name,
            version: None,
        })
    }
}

/// Runs the command.
pub async fn run(context: &Context, command: &DatasetCommand) -> Outcome {
    match command {
        DatasetCommand::Build(args) => build::run(context, args).await,
        DatasetCommand::List(args) => list::run(context, args).await,
        DatasetCommand::Show(args) => show::run(context, args).await,
        DatasetCommand::Pull(args) => pull::run(context, args).await,
        DatasetCommand::Push(args) => push::run(context, args).await,
    }
}

/// How a version was built.
async fn manifest(
    datasets: &Datasets,
    version: &DatasetVersion,
) -> Result<DatasetManifest, Problem> {
    let content = file(datasets, version, MANIFEST_FILE).await?;
    Ok(DatasetManifest::parse(&content)?)
}

/// The sums of a version.
pub async fn tally(datasets: &Datasets, version: &DatasetVersion) -> Result<Tally, Problem> {
    let content = file(datasets, version, TALLY_FILE).await?;
    Ok(Tally::parse(&content)?)
}

/// The tokenizer of a version: Qwen3's, or the one that lies beside its rows.
async fn tokenizer(
    datasets: &Datasets,
    version: &DatasetVersion,
    manifest: &DatasetManifest,
) -> Result<Tokenizer, Problem> {
    let found = &manifest.tokenizer_sha256;
    let own = match found == TOKENIZER_SHA256 {
        true => None,
        false => Some(file(datasets, version, TOKENIZER_FILE).await?),
    };
    let read = move || match own {
        Some(file) => Tokenizer::from_json(&String::from_utf8_lossy(&file)),
        None => Tokenizer::shared().cloned().map_err(TokenizerError::Own),
    };
    let read = blocking("dataset.tokenizer", read).await;
    let read = read.map_err(|error| Problem::failed(error.to_string()))?;
    let read = read.map_err(|error| {
        let message = format!("{TOKENIZER_FILE} cannot be used: {}", error_chain(&error));
        Problem::failed(message)
    })?;
    match read.sha256() == found {
        true => Ok(read),
        false => Err(Problem::failed(format!(
            "{TOKENIZER_FILE} must be the tokenizer {found}, as the manifest says, got {}",
            read.sha256()
        ))),
    }
}

async fn file(datasets: &Datasets, version: &DatasetVersion, name: &str) -> Result<Bytes, Problem> {
    let missing = || Problem::failed(format!("{name} must be among the files of the version"));
    let entry = version.file(name).ok_or_else(missing)?;
    Ok(datasets.file(entry).await?)
}

impl From<DatasetsError> for Problem {
    fn from(error: DatasetsError) -> Self {
        let message = error_chain(&error);
        match error {
            DatasetsError::Missing { .. } => {
                Self::refused(message).fix("see what there is with `espalier dataset list`")
            }
            _ => Self::failed(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_may_be_left_out() {
        let shop: Named = "shop".parse().unwrap();
        assert_eq!((shop.name.as_str(), shop.version), ("shop", None));
        let third: Named = "shop@v3".parse().unwrap();
        assert_eq!((third.name.as_str(), third.version), ("shop", Some(3)));
        for wrong in ["shop@3", "shop@v0", "a/b", ""] {
            assert!(wrong.parse::<Named>().is_err(), "{wrong}");
        }
    }
}
