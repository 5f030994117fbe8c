//! `espalier dataset push`: the rows of a version as a repository of the Hugging Face hub, with a card that loaders read.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use espalier_core::dataset::{CARD_FILE, DatasetVersion};
use espalier_core::trace::FileEntry;
use espalier_dataset::Secrets;
use espalier_dataset::files::{CardFacts, Format, card, parquet_records};
use espalier_runtime::datasets::Datasets;
use espalier_runtime::hub::{
    Change, Content, Hub, HubSettings, MAIN, Meter, Repo, RepoKind, Upload,
};
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use tempfile::TempDir;

use super::pull::{files, write};
use super::{Named, Place, manifest, tally};
use crate::context::Context;
use crate::exit::{Outcome, Problem};
use crate::hub::{self, Pushed};
use crate::output::plain;
use crate::progress;

pub(super) const HELP: &str = "\
  HF_TOKEN=… espalier dataset push me/shop --dataset shop
  HF_TOKEN=… espalier dataset push me/shop --dataset shop@v3 --public --license apache-2.0

The repository is made if it is not there, and private unless --public is given. What an older version left in its data
folder is removed. Pushing again what is there already makes no commit.
Rows that seem to hold a key or a password are named, and nothing is pushed.";

/// Where loaders look for rows.
const FOLDER: &str = "data";
/// How variables end that hold a secret.
const SECRET_NAMES: [&str; 4] = ["TOKEN", "KEY", "SECRET", "PASSWORD"];
/// Findings that are shown.
const FOUND_SHOWN: usize = 5;

/// Options of `dataset push`.
#[derive(Args, Clone, Debug)]
pub struct Push {
    /// Repository of the hub, as OWNER/NAME
    #[arg(value_name = "REPO", value_parser = hub::repo)]
    pub repo: String,
    /// Data set, with @vN for one of its versions [default: the project's only one, and its newest version]
    #[arg(long, value_name = "NAME[@vN]")]
    pub dataset: Option<Named>,
    /// Lets everybody see the repository, if it is made
    #[arg(long)]
    pub public: bool,
    /// What others may do with it, by a name that the hub knows, such as apache-2.0 [default: the card says nothing of it]
    #[arg(long, value_name = "NAME", value_parser = license)]
    pub license: Option<String>,
    /// Pushes rows that seem to hold a key or a password, too
    #[arg(long)]
    pub allow_secrets: bool,
    /// Where data sets are.
    #[command(flatten)]
    pub place: Place,
}

fn license(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c);
    match (1..=64).contains(&text.len()) && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => {
            Err("must be a name that the hub knows, of a-z 0-9 . -, such as apache-2.0".to_owned())
        }
    }
}

/// Runs the command.
pub async fn run(context: &Context, args: &Push) -> Outcome {
    let settings = hub::settings(context)?;
    let repo = Repo::new(RepoKind::Dataset, &args.repo)?;
    let datasets = args.place.open(context).await?;
    let wanted = match &args.dataset {
        Some(named) => named.clone(),
        None => only(&datasets).await?,
    };
    let version = datasets.version(&wanted.name, wanted.version).await?;
    let scratch = TempDir::new()?;
    let gathering = Gathering {
        datasets: &datasets,
        secrets: secrets(context, &settings)?,
        folder: scratch.path(),
        allow_secrets: args.allow_secrets,
    };
    let (name, n) = (&version.name, version.n);
    let (files, bytes) = gathering.run(&version, args.license.as_deref()).await?;
    let count = files.len() as u64;
    let client = Hub::new(settings)?;
    let state = client.create_repo(&repo, !args.public).await?;
    if !state.is_private && !args.public {
        return Err(Problem::refused(format!(
            "`--public` must be given for {}, which everybody can read, and rows are conversations",
            args.repo
        )));
    }
    let change = Change {
        files,
        folder: Some(FOLDER),
        message: format!(
            "Add {name} v{n}\n\nPublished by Espalier from {}.",
            version.job
        ),
    };
    let meter = Arc::new(Meter::default());
    let commit = client.commit(&repo, MAIN, change, &meter);
    let commit = progress::beside(commit, || ("uploads", Arc::clone(&meter))).await?;
    let pushed = Pushed {
        kind: "dataset",
        name: name.as_str(),
        version: n,
        repo: &args.repo,
        page: client.page(&repo),
        commit: commit.id,
        changed: commit.made,
        is_public: !state.is_private,
        public: args.public,
        files: count,
        bytes,
    };
    pushed.report(context)
}

/// The data set that is meant where none is named.
async fn only(datasets: &Datasets) -> Result<Named, Problem> {
    let listed = datasets.list().await?;
    let names: Vec<&str> = listed.keys().map(|name| name.as_str()).collect();
    match names[..] {
        [name] => name.parse().map_err(Problem::failed),
        [] => Err(Problem::refused("the project has no data set")
            .fix("build one with `espalier dataset build`")),
        _ => {
            let message = format!("there are several data sets: {}", names.join(", "));
            Err(Problem::refused(message).fix("name one with --dataset"))
        }
    }
}

/// What must not be in rows: known forms of keys, and what is secret in this terminal.
fn secrets(context: &Context, hub: &HubSettings) -> Result<Arc<Secrets>, Problem> {
    let is_secret = |name: &str| SECRET_NAMES.iter().any(|end| name.ends_with(end));
    let environment = context.environment.iter();
    let named = environment.filter(|(name, _)| is_secret(name));
    let own = named.map(|(_, value)| value.clone());
    let token = hub.token.iter().map(|token| token.expose().to_owned());
    let secrets = Secrets::new(own.chain(token));
    let secrets = secrets.map_err(|error| Problem::failed(error.to_string()))?;
    Ok(Arc::new(secrets))
}

/// The files of a version on their way to the hub.
struct Gathering<'a> {
    datasets: &'a Datasets,
    secrets: Arc<Secrets>,
    folder: &'a Path,
    allow_secrets: bool,
}

impl Gathering<'_> {
    /// Everything that goes out, and its bytes. Lines of JSON stay here: they hold the same rows again.
    async fn run(
        &self,
        version: &DatasetVersion,
        license: Option<&str>,
    ) -> Result<(Vec<Upload>, u64), Problem> {
        let named = files(version);
        let goes = |(name, _): &(String, &FileEntry)| {
            Format::of(name) != Some(Format::Jsonl) && name != CARD_FILE
        };
        let named: Vec<(String, &FileEntry)> = named.into_iter().filter(goes).collect();
        let meter = Arc::new(Meter::default());
        meter.expect(named.iter().map(|(_, entry)| entry.size).sum());
        let gather = self.all(&named, &meter);
        let mut uploads = progress::beside(gather, || ("gathers", Arc::clone(&meter))).await?;
        let text = self.card(version, license).await?;
        let bytes = meter.total() + text.len() as u64;
        uploads.push(Upload {
            path: CARD_FILE.to_owned(),
            content: Content::Bytes(text.into()),
        });
        Ok((uploads, bytes))
    }

    async fn all(
        &self,
        named: &[(String, &FileEntry)],
        meter: &Meter,
    ) -> Result<Vec<Upload>, Problem> {
        let (mut uploads, mut found) = (Vec::new(), Vec::new());
        for (name, entry) in named {
            let content = self.datasets.file(entry).await?;
            let (path, secrets) = (self.folder.join(name), Arc::clone(&self.secrets));
            let (to, file) = (path.clone(), name.clone());
            let keep = blocking("dataset.gather", move || {
                write(&to, &content)?;
                look(&file, content, &secrets)
            });
            let kept = keep
                .await
                .map_err(|error| Problem::failed(error.to_string()))?;
            found.extend(kept?);
            uploads.push(Upload {
                path: name.clone(),
                content: Content::File(path),
            });
            meter.add(entry.size);
        }
        match found.is_empty() || self.allow_secrets {
            true => Ok(uploads),
            false => Err(refused(&found)),
        }
    }

    async fn card(
        &self,
        version: &DatasetVersion,
        license: Option<&str>,
    ) -> Result<String, Problem> {
        let manifest = manifest(self.datasets, version).await?;
        let tally = tally(self.datasets, version).await?;
        Ok(card(&CardFacts {
            name: &format!("{}@v{}", version.name, version.n),
            license,
            sources: &version.sources,
            manifest: &manifest,
            tally: &tally,
        }))
    }
}

/// Where a file seems to hold secrets, and of which kind.
fn look(file: &str, content: Bytes, secrets: &Secrets) -> Result<Vec<String>, Problem> {
    if Format::of(file) != Some(Format::Parquet) {
        let text = String::from_utf8_lossy(&content);
        let found = secrets.find(&text);
        return Ok(found
            .map(|kind| format!("{file}: {kind}"))
            .into_iter()
            .collect());
    }
    let broken = |error| Problem::failed(error_chain(&error));
    let mut found = Vec::new();
    for record in parquet_records(file, content).map_err(broken)? {
        let record = record.map_err(broken)?;
        let columns = record.as_object().into_iter().flatten();
        let texts = columns.filter_map(|(name, value)| Some((name, value.as_str()?)));
        let here = texts.filter_map(|(name, text)| Some((name, secrets.find(text)?)));
        let id = plain(record["id"].as_str().unwrap_or_default());
        found.extend(here.map(|(column, kind)| format!("row `{id}`, `{column}`: {kind}")));
    }
    Ok(found)
}

fn refused(found: &[String]) -> Problem {
    let more = match found.len().saturating_sub(FOUND_SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let shown = found.iter().take(FOUND_SHOWN).cloned().collect::<Vec<_>>();
    let message = format!(
        "what would be pushed seems to hold secrets: {}{more}",
        shown.join("; ")
    );
    Problem::refused(message).fix(
        "correct those traces with `espalier traces edit` and build the data set again, or push it with --allow-secrets",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_license_is_a_name() {
        assert_eq!(license("apache-2.0").as_deref(), Ok("apache-2.0"));
        for wrong in ["", "Apache 2", "a\nb", "x: y"] {
            assert!(license(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn findings_are_shown_up_to_a_few() {
        let found: Vec<String> = (0..7).map(|n| format!("row `{n}`")).collect();
        let problem = refused(&found);
        assert_eq!(problem.exit, crate::exit::Exit::Refused);
        assert!(
            problem.message.ends_with("row `4`; and 2 more"),
            "{problem}"
        );
    }
}
