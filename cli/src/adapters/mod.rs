//! `espalier adapters`: what was trained, listed, pulled as a folder, added, pushed, and which version is `latest`.

pub mod comparison;
pub mod latest;
mod push;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::{Args, Subcommand};
use espalier_adapters::{AdaptersError, Watch};
use espalier_core::adapter::{AdapterKind, AdapterVersion, LatestEntry};
use espalier_core::error::FieldError;
use espalier_core::id::{AdapterName, ProjectId};
use espalier_core::spec::AdapterRef;
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::fetch::Fetcher;
use espalier_runtime::store::Store;
use espalier_runtime::telemetry::error_chain;
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, duration, facts, note, table};
use crate::{progress, uploads};

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum AdaptersCommand {
    /// Adapters and their newest versions
    List(Place),
    /// One version: what it was trained on, how it went, its files
    Show(Show),
    /// Write a version as a folder that PEFT, vLLM and the inference worker load
    #[command(after_help = PULL_HELP)]
    Pull(Pull),
    /// Upload a version to the Hugging Face hub, as an adapter or merged with its base
    #[command(after_help = push::HELP)]
    Push(push::Push),
    /// Publish a PEFT folder that was made elsewhere as a new version
    Add(Add),
    /// Make a version the one that inference workers answer with who follow the adapter, or let it answer a share
    #[command(after_help = PROMOTE_HELP)]
    Promote(latest::Promote),
    /// End the canary, or go back to the version that was latest before
    Rollback(latest::Rollback),
}

const PULL_HELP: &str = "\
  espalier adapters pull shop            the newest version, into ./shop-v3
  espalier adapters pull shop@v2 -o old  another one, into ./old";

const PROMOTE_HELP: &str = "\
  espalier adapters promote shop                  the newest version, by hand
  espalier adapters promote shop --comparison B   the version that the evaluation B is of, because its gate passes
  espalier adapters promote shop v4 --canary 0.1  version 4 for a tenth of all conversations";

/// Where adapters are.
#[derive(Args, Clone, Debug)]
pub struct Place {
    /// Project whose adapters are meant [default: ESPALIER_PROJECT, or that of the local `up`]
    #[arg(long, value_name = "NAME")]
    pub project: Option<ProjectId>,
    /// Object store of the coordinator, such as s3://bucket/prefix [default: that of the local `up`]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
}

/// An adapter, and which of its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The adapter.
    pub name: AdapterName,
    /// None: the newest.
    pub version: Option<u32>,
}

impl FromStr for Wanted {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        if text.contains('@') {
            let AdapterRef { name, version } = text.parse()?;
            let version = Some(version);
            return Ok(Self { name, version });
        }
        Ok(Self {
            name: text.parse()?,
            version: None,
        })
    }
}

/// Options of `adapters show`.
#[derive(Args, Clone, Debug)]
pub struct Show {
    /// Adapter, with @vN for one of its versions [default: the newest]
    #[arg(value_name = "NAME[@vN]")]
    pub adapter: Wanted,
    #[command(flatten)]
    place: Place,
}

/// Options of `adapters pull`.
#[derive(Args, Clone, Debug)]
pub struct Pull {
    /// Adapter, with @vN for one of its versions [default: the newest]
    #[arg(value_name = "NAME[@vN]")]
    pub adapter: Wanted,
    /// Folder that is made [default: NAME-vN]
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

/// Options of `adapters add`.
#[derive(Args, Clone, Debug)]
pub struct Add {
    /// Name of the adapter
    #[arg(value_name = "NAME")]
    pub name: AdapterName,
    /// Folder with adapter_config.json and adapter_model.safetensors
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// The model that it was made for [default: what adapter_config.json says]
    #[arg(long, value_name = "MODEL")]
    pub base: Option<String>,
    #[command(flatten)]
    place: Place,
}

/// The store and the project.
pub struct Opened {
    /// The store.
    pub store: Store,
    /// The project.
    pub project: ProjectId,
}

impl Place {
    /// Opens it.
    pub async fn open(&self, context: &Context) -> Result<Opened, Problem> {
        Ok(Opened {
            store: uploads::open_store(context, self.store.as_deref()).await?,
            project: match &self.project {
                Some(project) => project.clone(),
                None => context.project()?,
            },
        })
    }
}

impl Opened {
    /// The adapter that is meant where none is named.
    async fn only(&self) -> Result<Wanted, Problem> {
        let listed = espalier_adapters::list(&self.store, &self.project).await?;
        let names: Vec<&str> = listed.iter().map(|one| one.name.as_str()).collect();
        match &listed[..] {
            [one] => Ok(Wanted {
                name: one.name.clone(),
                version: None,
            }),
            [] => {
                let message = format!("project `{}` has no adapter", self.project);
                Err(Problem::refused(message)
                    .fix("train one, or take one in with `espalier adapters add`"))
            }
            _ => {
                let message = format!("there are several adapters: {}", names.join(", "));
                Err(Problem::refused(message).fix("name one with --adapter"))
            }
        }
    }

    /// The version that is wanted.
    pub async fn find(&self, wanted: &Wanted) -> Result<AdapterVersion, Problem> {
        let Wanted { name, version } = wanted;
        Ok(espalier_adapters::find(&self.store, &self.project, name, *version).await?)
    }
}

impl From<AdaptersError> for Problem {
    fn from(error: AdaptersError) -> Self {
        let message = error_chain(&error);
        match error {
            AdaptersError::NothingBefore(_) => Self::refused(message),
            AdaptersError::NothingLatest(_) => {
                Self::refused(message).fix("promote a version without --canary first")
            }
            AdaptersError::NoAdapter { .. } | AdaptersError::NoVersion(_) => {
                Self::refused(message).fix("see what there is with `espalier adapters list`")
            }
            AdaptersError::Hub(_)
            | AdaptersError::Fetch(_)
            | AdaptersError::Store(_)
            | AdaptersError::File { .. }
            | AdaptersError::Damaged { .. }
            | AdaptersError::Contended(_)
            | AdaptersError::Blocking(_) => Self::failed(message),
            _ => Self::refused(message),
        }
    }
}

/// Runs the command.
pub async fn run(context: &Context, command: &AdaptersCommand) -> Outcome {
    match command {
        AdaptersCommand::List(place) => list(context, place).await,
        AdaptersCommand::Show(args) => show(context, args).await,
        AdaptersCommand::Pull(args) => pull(context, args).await,
        AdaptersCommand::Push(args) => push::run(context, args).await,
        AdaptersCommand::Add(args) => add(context, args).await,
        AdaptersCommand::Promote(args) => latest::promote(context, args).await,
        AdaptersCommand::Rollback(args) => latest::rollback(context, args).await,
    }
}

/// An adapter with its newest version, and what says which version is `latest`.
type InList = (
    espalier_adapters::Listed,
    AdapterVersion,
    Option<LatestEntry>,
);

async fn list(context: &Context, place: &Place) -> Outcome {
    let opened = place.open(context).await?;
    let mut newest = Vec::new();
    for listed in espalier_adapters::list(&opened.store, &opened.project).await? {
        let version = listed.versions.last().copied();
        let name = listed.name.clone();
        let latest = latest::latest(&opened, &name).current().await?;
        newest.push((
            listed,
            opened.find(&Wanted { name, version }).await?,
            latest,
        ));
    }
    let row = |(listed, newest, latest): &InList| {
        [
            listed.name.to_string(),
            format!("v{}", newest.n),
            latest.as_ref().map(latest::word).unwrap_or_default(),
            listed.versions.len().to_string(),
            kind(newest.kind).to_owned(),
            newest.base.name.clone(),
            loss(newest),
        ]
    };
    context.out.show(
        || {
            let one = |(_, version, latest): &InList| {
                let mut value = json!(version);
                value["latest"] = latest::to_json(latest.as_ref());
                value
            };
            json!({"adapters": newest.iter().map(one).collect::<Vec<_>>()})
        },
        || {
            let header = [
                "adapter", "newest", "latest", "versions", "kind", "base", "loss",
            ];
            table(header, newest.iter().map(row).collect())
        },
    )?;
    Ok(Exit::Ok)
}

fn kind(kind: AdapterKind) -> &'static str {
    match kind {
        AdapterKind::Lora => "lora",
        AdapterKind::Full => "full",
    }
}

/// Where it was trained here: the evaluation's, or else the last step's.
fn loss(version: &AdapterVersion) -> String {
    let training = &version.training;
    match training.steps {
        0 => String::new(),
        _ => format!("{:.4}", training.eval_loss.unwrap_or(training.loss)),
    }
}

async fn show(context: &Context, args: &Show) -> Outcome {
    let opened = args.place.open(context).await?;
    let version = opened.find(&args.adapter).await?;
    let latest = latest::latest(&opened, &version.name).current().await?;
    context.out.show(
        || {
            let mut value = json!(version);
            value["latest"] = latest::to_json(latest.as_ref());
            value
        },
        || {
            let mut rows = rows(&version);
            rows.extend(latest.as_ref().map(latest::rows).unwrap_or_default());
            facts(&rows)
        },
    )?;
    Ok(Exit::Ok)
}

fn rows(version: &AdapterVersion) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("adapter", format!("{}@v{}", version.name, version.n)),
        ("kind", kind(version.kind).to_owned()),
        ("base", version.base.name.clone()),
        ("base sha256", version.base.sha256.clone()),
        ("job", version.job.to_string()),
    ];
    let training = &version.training;
    if training.steps > 0 {
        rows.push(("data set", version.dataset.clone()));
        rows.push(("steps", count(training.steps)));
        rows.push(("tokens", count(training.tokens)));
        rows.push(("loss", format!("{:.4}", training.loss)));
        if let Some(loss) = training.eval_loss {
            rows.push(("evaluation loss", format!("{loss:.4}")));
        }
        rows.push(("time", duration(training.wall_ms)));
        let agreement = training.agreement.as_ref();
        rows.extend(agreement.map(|agreement| ("agreement", agreement.to_string())));
    }
    for file in &version.files {
        rows.push((
            "file",
            format!("{} ({} bytes)", file.path, count(file.size)),
        ));
    }
    rows
}

async fn pull(context: &Context, args: &Pull) -> Outcome {
    let opened = args.place.open(context).await?;
    let version = opened.find(&args.adapter).await?;
    let default = || PathBuf::from(format!("{}-v{}", version.name, version.n));
    let to = args.output.clone().unwrap_or_else(default);
    let watch = Watch::default();
    let pull = espalier_adapters::pull(&opened.store, &version, &to, &watch);
    shown(pull, &watch).await?;
    let (name, n) = (&version.name, version.n);
    let said = json!({"adapter": name, "version": n, "folder": to.display().to_string()});
    context
        .out
        .show(|| said, || format!("{name}@v{n} is in {}", to.display()))?;
    Ok(Exit::Ok)
}

/// Runs long work beside a bar that shows its stages.
async fn shown<T>(
    work: impl Future<Output = Result<T, AdaptersError>>,
    watch: &Watch,
) -> Result<T, Problem> {
    Ok(progress::beside(work, || watch.stage()).await?)
}

async fn add(context: &Context, args: &Add) -> Outcome {
    let opened = args.place.open(context).await?;
    let fetcher = Fetcher::new(&context.environment, None);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let added = espalier_adapters::add(
        (&opened.store, &opened.project),
        &args.name,
        &args.folder,
        args.base.as_deref(),
        &fetcher,
        &clock,
    )
    .await?;
    let (name, n) = (&added.version.name, added.version.n);
    let value: Value = json!({"adapter": name, "version": n, "new": added.is_new});
    context.out.show(
        || value,
        || match added.is_new {
            true => format!("{name}@v{n}"),
            false => format!("{name}@v{n} has the same files already"),
        },
    )?;
    note(format!(
        "next: espalier adapters push OWNER/NAME --adapter {name}@v{n}"
    ));
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_named_with_its_version_or_without() {
        let wanted = |text: &str| {
            text.parse::<Wanted>()
                .map(|w| (w.name.to_string(), w.version))
        };
        assert_eq!(wanted("shop").unwrap(), ("shop".to_owned(), None));
        assert_eq!(wanted("shop@v3").unwrap(), ("shop".to_owned(), Some(3)));
        for bad in ["", "shop@", "shop@3", "shop@v0", "a/b", "shop@v1@v2"] {
            assert!(wanted(bad).is_err(), "{bad}");
        }
    }
}
