//! `espalier dataset show`: what a version is made of, how long its rows are, and one of them as a model learns it.

use std::fmt::Write;

use clap::Args;
use espalier_core::dataset::{DatasetVersion, MANIFEST_FILE, file_name};
use espalier_dataset::{DatasetManifest, SourceEntry, Tally};
use serde_json::{Value, json};

use super::{Named, Place, manifest, sample, tally, tokenizer};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{count, cut, facts, plain, table};

/// Longest bar of a histogram, in characters.
const BAR_CHARS: u64 = 40;
/// Dropped conversations that are shown.
const DROPPED_SHOWN: usize = 10;

/// Options of `dataset show`.
#[derive(Args, Clone, Debug)]
pub struct Show {
    /// The data set; without a version its newest
    #[arg(value_name = "NAME[@vN]")]
    pub dataset: Named,
    /// The row that is shown [default: the first that is trained on]
    #[arg(long, value_name = "ID")]
    pub sample: Option<String>,
    /// The whole row, not only what surrounds that which is learned
    #[arg(long)]
    pub full: bool,
    /// Where data sets are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs the command.
pub async fn run(context: &Context, args: &Show) -> Outcome {
    let datasets = args.place.open(context).await?;
    let version = datasets
        .version(&args.dataset.name, args.dataset.version)
        .await?;
    let tally = tally(&datasets, &version).await?;
    let manifest = manifest(&datasets, &version).await?;
    let wanted = args.sample.clone();
    let tokenizer = tokenizer(&datasets, &version, &manifest).await?;
    let form = (tally.max_length, &tokenizer);
    let sample = sample::find(&datasets, &version, wanted, form).await?;
    let color = context.out.color;
    context.out.show(
        || {
            let mut value = as_json(&version, &tally);
            value["settings"] = json!(manifest.settings);
            value["counts"] = json!(manifest.counts);
            value["tokenizer_sha256"] = json!(manifest.tokenizer_sha256);
            value["sample"] = sample.to_json();
            value
        },
        || {
            let dropped = dropped(&manifest.sources);
            let parts = [
                summary(&version, &tally),
                settings(&manifest),
                histogram(&tally),
                dropped,
                sample.text(color, args.full),
            ];
            let parts: Vec<&str> = parts.iter().map(|part| part.trim_end()).collect();
            let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
            parts.join("\n\n")
        },
    )?;
    Ok(Exit::Ok)
}

/// A version for programs.
pub(super) fn as_json(version: &DatasetVersion, tally: &Tally) -> Value {
    let lengths: Vec<Value> = tally
        .buckets()
        .map(|(below, rows)| json!({"below": below, "rows": rows}))
        .collect();
    json!({
        "dataset": version.name.as_str(),
        "version": version.n,
        "created_at_us": version.created_at_us.0,
        "job": version.job.to_string(),
        "sources": version.sources,
        "summary": version.summary,
        "kinds": tally.kinds,
        "lengths": lengths,
        "max_length": tally.max_length,
        "cut": tally.cut,
        "left_out": tally.left_out,
        "files": version.files,
    })
}

/// What came of it, for people: rows by task kind, what was dropped, and where it lies.
pub(super) fn summary(version: &DatasetVersion, tally: &Tally) -> String {
    let sums = &version.summary;
    let folder = version.files.first().map_or("", |file| {
        file.path.strip_suffix(file_name(file)).unwrap_or_default()
    });
    let dropped: Vec<String> = sums
        .dropped
        .iter()
        .map(|(reason, n)| format!("{} {}", count(*n), reason.replace('_', " ")))
        .collect();
    let mut rows = vec![
        ("data set", format!("{}@v{}", version.name, version.n)),
        ("sources", count(sums.sources)),
        (
            "dropped",
            if dropped.is_empty() {
                "none".to_owned()
            } else {
                dropped.join(", ")
            },
        ),
    ];
    if tally.left_out > 0 {
        let text = format!(
            "{} beyond {} tokens",
            count(tally.left_out),
            count(tally.max_length as u64)
        );
        rows.push(("rows left out", text));
    }
    if tally.cut > 0 {
        rows.push(("rows cut", format!("{} at a whole turn", count(tally.cut))));
    }
    rows.push(("files", folder.to_owned()));
    let mut kinds: Vec<[String; 5]> = tally
        .kinds
        .iter()
        .map(|(name, kind)| {
            let name = if name.is_empty() { "(none)" } else { name };
            [
                name.to_owned(),
                count(kind.train_rows),
                count(kind.eval_rows),
                count(kind.tokens),
                count(kind.supervised_tokens),
            ]
        })
        .collect();
    kinds.push([
        "all".to_owned(),
        count(sums.train_rows),
        count(sums.eval_rows),
        count(sums.tokens),
        count(sums.supervised_tokens),
    ]);
    let header = ["task kind", "train", "held out", "tokens", "learned"];
    format!("{}\n\n{}", facts(&rows), table(header, kinds))
}

fn settings(manifest: &DatasetManifest) -> String {
    let settings = &manifest.settings;
    let mut rows = vec![
        (
            "where",
            settings
                .filter
                .as_ref()
                .map_or("all".to_owned(), ToString::to_string),
        ),
        ("unroll", settings.unroll.to_string()),
        (
            "hints",
            if settings.keep_hints {
                "kept"
            } else {
                "dropped"
            }
            .to_owned(),
        ),
        (
            "near",
            format!(
                "{}{}",
                settings.near,
                if settings.keep_near { ", kept" } else { "" }
            ),
        ),
        ("held out", format!("{} of the tasks", settings.eval_share)),
        ("seed", settings.seed.to_string()),
    ];
    if let Some(max) = settings.max_per_kind {
        rows.push(("max per kind", count(max as u64)));
    }
    if let Some(model) = &settings.tokenizer {
        rows.push(("tokenizer", format!("that of {}", plain(model))));
    }
    let counts = &manifest.counts;
    if counts.drift_breaks + counts.misspelt_calls > 0 {
        let text = format!(
            "{} rows begin anew, {} calls rendered from text",
            counts.drift_breaks, counts.misspelt_calls
        );
        rows.push(("drift", text));
    }
    facts(&rows)
}

/// Samples by length, a bar each.
fn histogram(tally: &Tally) -> String {
    let most = tally
        .lengths
        .iter()
        .copied()
        .max()
        .unwrap_or_default()
        .max(1);
    let mut text = String::from("tokens\n");
    let first = tally
        .lengths
        .iter()
        .position(|rows| *rows > 0)
        .unwrap_or_default();
    for (below, rows) in tally.buckets().skip(first) {
        // What is there is seen.
        let chars = (rows * BAR_CHARS).div_ceil(most);
        let bar = "█".repeat(usize::try_from(chars).unwrap_or_default());
        let _ = writeln!(text, "  < {:>9}  {bar} {}", count(below), count(rows));
    }
    text
}

fn dropped(sources: &[SourceEntry]) -> String {
    let all: Vec<&SourceEntry> = sources
        .iter()
        .filter(|entry| entry.dropped.is_some())
        .collect();
    if all.is_empty() {
        return String::new();
    }
    let row = |entry: &&SourceEntry| {
        let reason = entry
            .dropped
            .map(|reason| reason.as_str().replace('_', " "));
        [
            cut(&entry.source, 80),
            reason.unwrap_or_default(),
            cut(&plain(&entry.detail), 80),
        ]
    };
    let shown = all.iter().take(DROPPED_SHOWN).map(row).collect();
    let mut text = table(["dropped", "reason", "more"], shown);
    if all.len() > DROPPED_SHOWN {
        let more = all.len() - DROPPED_SHOWN;
        let _ = write!(
            text,
            "\n … and {more} more, in {MANIFEST_FILE} (espalier dataset pull)"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_counts() {
        let mut tally = Tally::new(1000);
        tally.lengths = vec![0, 1, 80];
        let text = histogram(&tally);
        let bars: Vec<usize> = text
            .lines()
            .skip(1)
            .map(|line| line.matches('█').count())
            .collect();
        assert_eq!(bars, [1, 40]);
        assert!(text.contains("<     1,024"), "{text}");
    }
}
