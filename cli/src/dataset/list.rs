//! `espalier dataset list`.

use clap::Args;
use espalier_core::dataset::DatasetVersion;
use espalier_runtime::datasets::DatasetsError;
use serde_json::json;

use super::Place;
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{count, note, table};

/// Options of `dataset list`.
#[derive(Args, Clone, Debug)]
pub struct List {
    /// Every version, not only the newest of each
    #[arg(long)]
    pub all: bool,
    /// Where data sets are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &List) -> Outcome {
    let datasets = args.place.open(context).await?;
    let mut found = Vec::new();
    for (name, numbers) in datasets.list().await? {
        let shown = if args.all { numbers.len() } else { 1 };
        for n in numbers.into_iter().rev().take(shown) {
            match datasets.version(&name, Some(n)).await {
                Ok(version) => found.push(version),
                Err(DatasetsError::Record(error)) => note(format!("{name}@v{n}: {error}")),
                Err(error) => return Err(error.into()),
            }
        }
    }
    if found.is_empty() {
        note("no data set yet: build one with `espalier dataset build`");
    }
    let as_json = |version: &DatasetVersion| {
        json!({
            "dataset": version.name.as_str(),
            "version": version.n,
            "created_at_us": version.created_at_us.0,
            "job": version.job.to_string(),
            "summary": version.summary,
        })
    };
    context
        .out
        .show(|| found.iter().map(as_json).collect(), || listed(&found))?;
    Ok(Exit::Ok)
}

fn listed(found: &[DatasetVersion]) -> String {
    let row = |version: &DatasetVersion| {
        let summary = &version.summary;
        [
            format!("{}@v{}", version.name, version.n),
            count(summary.train_rows),
            count(summary.eval_rows),
            count(summary.tokens),
            version.created_at_us.to_string(),
            version.job.to_string(),
        ]
    };
    let header = ["data set", "train", "held out", "tokens", "built", "job"];
    table(header, found.iter().map(row).collect())
}
