//! `espalier adapters push`: here, with the token of this terminal, or as a job, with the token of whoever does it.

use clap::Args;
use espalier_adapters::{BaseCheck, Exported, Exporter, Order, Watch};
use espalier_core::adapter::{AdapterKind, AdapterVersion};
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobKey, ProjectId};
use espalier_core::spec::{AdapterRef, ExportDraft, ExportTarget, JobDraft};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::fetch::Fetcher;
use serde_json::json;

use super::{Place, Wanted, shown};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::hub::{self, Pushed};
use crate::names::stamp;
use crate::uploads;

/// The only job of its batch.
const JOB: &str = "export";

pub(super) const HELP: &str = "\
  HF_TOKEN=… espalier adapters push me/shop-lora --adapter shop
  espalier adapters push me/shop-4b --adapter shop@v3 --merged --detach   a worker does it, with its own token

The repository is made if it is not there, and private unless --public is given. Pushing again what is there already
makes no commit.";

/// Options of `adapters push`.
#[derive(Args, Clone, Debug)]
pub struct Push {
    /// Repository of the hub, as OWNER/NAME
    #[arg(value_name = "REPO", value_parser = hub::repo)]
    pub repo: String,
    /// Adapter, with @vN for one of its versions [default: the project's only one, and its newest version]
    #[arg(long, value_name = "NAME[@vN]")]
    pub adapter: Option<Wanted>,
    /// Uploads the whole model in 16 bits, the adapter added to its base
    #[arg(long)]
    pub merged: bool,
    /// Lets everybody see the repository, if it is made
    #[arg(long)]
    pub public: bool,
    /// Leaves the work to a worker, and returns
    #[arg(long)]
    pub detach: bool,
    /// Name of the batch with --detach [default: of the adapter and the time]
    #[arg(long, value_name = "NAME", requires = "detach")]
    pub batch: Option<BatchId>,
    #[command(flatten)]
    place: Place,
}

/// Runs the command.
pub(super) async fn run(context: &Context, args: &Push) -> Outcome {
    let opened = args.place.open(context).await?;
    let version = match &args.adapter {
        Some(adapter) => opened.find(adapter).await?,
        None => opened.find(&opened.only().await?).await?,
    };
    if args.merged && version.kind == AdapterKind::Full {
        let message = format!("{}@v{} is a whole model already", version.name, version.n);
        return Err(Problem::refused(message).fix("leave --merged out"));
    }
    let adapter = AdapterRef {
        name: version.name.clone(),
        version: version.n,
    };
    if args.detach {
        return submit(context, args, &opened.project, &adapter).await;
    }
    let hub = hub::settings(context)?;
    let exporter = Exporter {
        store: opened.store.clone(),
        fetcher: Fetcher::new(&context.environment, None).with_hub(hub.clone()),
        hub,
        scratch: std::env::temp_dir(),
        bases: BaseCheck::Any,
    };
    let to = ExportTarget::Hub {
        repo: args.repo.clone(),
        public: args.public,
    };
    let order = Order {
        project: &opened.project,
        adapter: &adapter,
        merged: args.merged,
        to: &to,
    };
    let watch = Watch::default();
    let exported = shown(exporter.run(order, &watch), &watch).await?;
    report(context, args, &version, &exported)
}

fn report(
    context: &Context,
    args: &Push,
    version: &AdapterVersion,
    exported: &Exported,
) -> Outcome {
    let summary = &exported.summary;
    let pushed = Pushed {
        kind: "adapter",
        name: version.name.as_str(),
        version: version.n,
        repo: &args.repo,
        page: exported.page.clone().unwrap_or_default(),
        commit: summary.commit.clone().unwrap_or_default(),
        changed: exported.changed,
        is_public: exported.is_public,
        public: args.public,
        files: summary.files,
        bytes: summary.bytes,
    };
    pushed.report(context)
}

/// A batch of one job.
async fn submit(
    context: &Context,
    args: &Push,
    project: &ProjectId,
    adapter: &AdapterRef,
) -> Outcome {
    let client = context.client().await?;
    let batch = match &args.batch {
        Some(batch) => batch.clone(),
        None => batch_of(adapter)?,
    };
    let key = JobKey::new(project.clone(), batch.clone(), JOB.parse()?);
    let draft = JobDraft {
        id: Some(JOB.to_owned()),
        export: Some(ExportDraft {
            adapter: Some(adapter.to_string()),
            merged: args.merged.then_some(true),
            repo: Some(args.repo.clone()),
            public: args.public.then_some(true),
            folder: None,
        }),
        ..JobDraft::default()
    };
    uploads::submit_alone(&client, &key, &draft).await?;
    let said = json!({"batch": batch, "job": JOB, "adapter": adapter.to_string()});
    context.out.show(
        || said,
        || format!("batch {batch}: follow it with `espalier watch {batch}`"),
    )?;
    Ok(Exit::Ok)
}

fn batch_of(adapter: &AdapterRef) -> Result<BatchId, FieldError> {
    let name: String = adapter.name.as_str().chars().take(64).collect();
    let time = stamp(SystemClock.now());
    BatchId::new(format!("export-{name}-v{}-{time}", adapter.version))
}
