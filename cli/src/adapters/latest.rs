//! `espalier adapters promote` and `rollback`: which version is `latest`, and why.

use clap::Args;
use espalier_adapters::Latest;
use espalier_core::adapter::{LatestEntry, Why};
use espalier_core::compare::{REPORT_FILE, Report};
use espalier_core::error::FieldError;
use espalier_core::id::{AdapterName, BatchId, JobId, JobKey};
use espalier_core::layout;
use espalier_core::spec::AdapterRef;
use espalier_core::trace::Manifest;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use super::{Opened, Place, Wanted};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::facts;

/// Options of `adapters promote`.
#[derive(Args, Clone, Debug)]
pub struct Promote {
    /// Adapter, with @vN for one of its versions [default: the newest]
    #[arg(value_name = "NAME[@vN]")]
    pub adapter: Wanted,
    /// The version, in place of @vN
    #[arg(value_name = "vN", value_parser = version)]
    pub number: Option<u32>,
    /// The comparison that speaks for it, as BATCH/JOB or the BATCH of `espalier evaluate`: its gate must pass
    #[arg(long, value_name = "BATCH[/JOB]", value_parser = comparison)]
    pub comparison: Option<(BatchId, JobId)>,
    #[command(flatten)]
    place: Place,
}

/// Options of `adapters rollback`.
#[derive(Args, Clone, Debug)]
pub struct Rollback {
    /// Adapter
    #[arg(value_name = "NAME")]
    pub adapter: AdapterName,
    #[command(flatten)]
    place: Place,
}

/// vN or N.
fn version(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix('v').unwrap_or(text);
    let read = digits.parse().ok().filter(|version| *version > 0);
    read.ok_or_else(|| "must be vN, such as v3".to_owned())
}

/// BATCH/JOB, or BATCH with the job that `espalier evaluate` gives it.
fn comparison(text: &str) -> Result<(BatchId, JobId), FieldError> {
    let (batch, job) = text.split_once('/').unwrap_or((text, "compare"));
    Ok((BatchId::new(batch)?, JobId::new(job)?))
}

/// `espalier adapters promote`.
pub async fn promote(context: &Context, args: &Promote) -> Outcome {
    let wanted = Wanted {
        name: args.adapter.name.clone(),
        version: match (args.adapter.version, args.number) {
            (Some(_), Some(_)) => {
                return Err(Problem::refused(
                    "the version must be named once: as NAME@vN or as NAME vN",
                ));
            }
            (named, own) => named.or(own),
        },
    };
    let opened = args.place.open(context).await?;
    let version = opened.find(&wanted).await?.n;
    let name = wanted.name;
    let of = AdapterRef { name, version };
    let entry = make_latest(&opened, &of, args.comparison.as_ref()).await?;
    say(context, &entry)
}

/// Makes a version `latest`, by hand or because a comparison speaks for it.
pub async fn make_latest(
    opened: &Opened,
    of: &AdapterRef,
    comparison: Option<&(BatchId, JobId)>,
) -> Result<LatestEntry, Problem> {
    let why = match comparison {
        Some(job) => passed(opened, job, of).await?,
        None => Why::Hand,
    };
    let latest = latest(opened, &of.name);
    Ok(latest.promote(of.version, why, SystemClock.now()).await?)
}

/// `espalier adapters rollback`.
pub async fn rollback(context: &Context, args: &Rollback) -> Outcome {
    let opened = args.place.open(context).await?;
    let entry = latest(&opened, &args.adapter)
        .rollback(SystemClock.now())
        .await?;
    say(context, &entry)
}

/// The entries of an adapter.
pub fn latest<'a>(opened: &'a Opened, name: &'a AdapterName) -> Latest<'a> {
    Latest {
        store: &opened.store,
        project: &opened.project,
        name,
    }
}

/// The comparison that speaks for a version: its gate passes, and it is of that version, where it says of which.
async fn passed(
    opened: &Opened,
    (batch, job): &(BatchId, JobId),
    of: &AdapterRef,
) -> Result<Why, Problem> {
    let key = JobKey::new(opened.project.clone(), batch.clone(), job.clone());
    let manifest = match opened.store.get(&layout::manifest(&key)).await {
        Err(error) if error.is_not_found() => {
            let message = format!("{batch}/{job} has published nothing");
            return Err(Problem::refused(message)
                .fix(format!("see how it is: espalier job show {batch}/{job}")));
        }
        other => Manifest::parse(&other?, &key)?,
    };
    let path = format!(
        "{}{REPORT_FILE}",
        layout::report_files(&key, manifest.fence)
    );
    let file = manifest.files.iter().find(|file| file.path == path);
    let file = file.ok_or_else(|| Problem::refused(format!("{batch}/{job} is no comparison")))?;
    let bytes = opened.store.get(&path).await?;
    if !file.holds(&bytes) {
        return Err(Problem::failed(format!(
            "{path} is not what its manifest names"
        )));
    }
    let report = Report::parse(&bytes)?;
    speaks_for(&report, of)?;
    Ok(Why::Comparison {
        report: path,
        sha256: file.sha256.clone(),
    })
}

fn speaks_for(report: &Report, of: &AdapterRef) -> Result<(), Problem> {
    let compared = report.arms.after.adapter.as_deref();
    if let Some(compared) = compared.filter(|compared| *compared != of.to_string()) {
        let message = format!("the comparison is of {compared}, and {of} is to become latest");
        return Err(Problem::refused(message));
    }
    if !report.gate.passed {
        let message = format!("the gate does not pass: {}", report.gate.words);
        return Err(Problem::refused(message).fix("promote it by hand, without --comparison"));
    }
    Ok(())
}

fn say(context: &Context, entry: &LatestEntry) -> Outcome {
    context.out.show(|| json!(entry), || facts(&rows(entry)))?;
    Ok(Exit::Ok)
}

/// What an entry says.
pub fn rows(entry: &LatestEntry) -> Vec<(&'static str, String)> {
    let why = match &entry.why {
        Why::Hand => "by hand".to_owned(),
        Why::Comparison { report, sha256 } => format!("comparison {report} (sha256 {sha256})"),
        Why::Rollback { from } => format!("rolled back from v{from}"),
    };
    vec![
        ("latest", format!("{}@v{}", entry.name, entry.version)),
        ("why", why),
        ("since", entry.created_at_us.to_string()),
    ]
}

/// The same for programs; null where no version is `latest`.
pub fn to_json(entry: Option<&LatestEntry>) -> Value {
    json!(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_comparisons_are_named_in_two_ways() {
        assert_eq!((version("v3"), version("3")), (Ok(3), Ok(3)));
        assert!(version("v0").is_err() && version("x").is_err());
        let named = |text: &str| comparison(text).map(|(batch, job)| format!("{batch}/{job}"));
        assert_eq!(named("b").unwrap(), "b/compare");
        assert_eq!(named("b/j").unwrap(), "b/j");
        assert!(named("b/j/k").is_err());
    }

    #[test]
    fn an_entry_says_why() {
        let entry = LatestEntry {
            record_version: 1,
            name: "shop".parse().unwrap(),
            seq: 2,
            version: 1,
            why: Why::Rollback { from: 3 },
            created_at_us: espalier_core::time::Timestamp(0),
        };
        let rows = rows(&entry);
        assert_eq!(rows[0].1, "shop@v1");
        assert_eq!(rows[1].1, "rolled back from v3");
    }
}
