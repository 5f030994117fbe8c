//! `espalier adapters promote` and `rollback`: which version is `latest`, which one has a share beside it, and why.

use clap::Args;
use espalier_adapters::Latest;
use espalier_core::adapter::{Canary, LatestEntry, Why};
use espalier_core::id::AdapterName;
use espalier_runtime::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use super::comparison::{Comparison, Proof};
use super::{Opened, Place, Wanted};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{facts, note};

/// Options of `adapters promote`.
#[derive(Args, Clone, Debug)]
pub struct Promote {
    /// Adapter, with @vN for one of its versions [default: the one that the comparison is of, or the newest]
    #[arg(value_name = "NAME[@vN]")]
    pub adapter: Wanted,
    /// The version, in place of @vN
    #[arg(value_name = "vN", value_parser = version)]
    pub number: Option<u32>,
    /// The comparison that speaks for it, as BATCH/JOB or the BATCH of `espalier evaluate`: its gate must pass
    #[arg(long, value_name = "BATCH[/JOB]")]
    pub comparison: Option<Comparison>,
    /// Share of conversations that it answers, in (0, 1), beside the version that stays latest [default: all]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub canary: Option<f64>,
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

/// A number between 0 and 1.
fn share(text: &str) -> Result<f64, String> {
    let read = text.parse().ok();
    let read = read.filter(|share| *share > 0.0 && *share < 1.0);
    read.ok_or_else(|| "must be in (0, 1), such as 0.1".to_owned())
}

/// `espalier adapters promote`.
pub async fn promote(context: &Context, args: &Promote) -> Outcome {
    let wanted = wanted(args)?;
    let opened = args.place.open(context).await?;
    let comparison = args.comparison.as_ref();
    let (entry, is_new) = make_latest(&opened, &wanted, comparison, args.canary).await?;
    if !is_new {
        note("nothing is to be done: this comparison has made it so");
    }
    say(context, &entry, is_new)
}

/// Makes a version `latest`, or gives it a share beside that one: by hand, or because a comparison speaks for it. Gives the
/// entry, and whether it is a new one: the same comparison again changes nothing.
pub async fn make_latest(
    opened: &Opened,
    wanted: &Wanted,
    comparison: Option<&Comparison>,
    canary: Option<f64>,
) -> Result<(LatestEntry, bool), Problem> {
    let latest = latest(opened, &wanted.name);
    let (version, why) = match comparison {
        None => (opened.find(wanted).await?.n, Why::Hand),
        Some(comparison) => {
            let proof = Proof::read(opened, comparison, wanted).await?;
            let current = latest.current().await?;
            let same = |entry: &LatestEntry| is_of(entry, proof.of.version, canary);
            if let Some(entry) = current.filter(|entry| entry.why == proof.why && same(entry)) {
                return Ok((entry, false));
            }
            let wanted = Wanted {
                version: Some(proof.of.version),
                ..wanted.clone()
            };
            proof.check(opened, &opened.find(&wanted).await?).await?;
            (proof.of.version, proof.why)
        }
    };
    let now = SystemClock.now();
    let entry = match canary {
        None => latest.promote(version, why, now).await?,
        Some(share) => latest.canary(Canary { version, share }, why, now).await?,
    };
    Ok((entry, true))
}

/// The entry by which this comparison made a version `latest`, or gave it this share, also where another entry counts now.
pub async fn made_latest(
    opened: &Opened,
    wanted: &Wanted,
    comparison: &Comparison,
    canary: Option<f64>,
) -> Result<Option<LatestEntry>, Problem> {
    let log = latest(opened, &wanted.name).log().await?;
    if log.is_empty() {
        return Ok(None);
    }
    let proof = Proof::read(opened, comparison, wanted).await?;
    let is_it =
        |entry: &LatestEntry| entry.why == proof.why && is_of(entry, proof.of.version, canary);
    Ok(log.into_iter().find(is_it))
}

/// The adapter, and the version where one is named.
fn wanted(args: &Promote) -> Result<Wanted, Problem> {
    let version = match (args.adapter.version, args.number) {
        (Some(_), Some(_)) => {
            return Err(Problem::refused(
                "the version must be named once: as NAME@vN or as NAME vN",
            ));
        }
        (named, own) => named.or(own),
    };
    Ok(Wanted {
        name: args.adapter.name.clone(),
        version,
    })
}

/// Whether an entry gives a version what is asked for: all conversations, or this share.
fn is_of(entry: &LatestEntry, version: u32, share: Option<f64>) -> bool {
    match share {
        None => entry.version == version && entry.canary.is_none(),
        Some(share) => entry.canary == Some(Canary { version, share }),
    }
}

/// `espalier adapters rollback`.
pub async fn rollback(context: &Context, args: &Rollback) -> Outcome {
    let opened = args.place.open(context).await?;
    let entry = latest(&opened, &args.adapter)
        .rollback(SystemClock.now())
        .await?;
    say(context, &entry, true)
}

/// The entries of an adapter.
pub fn latest<'a>(opened: &'a Opened, name: &'a AdapterName) -> Latest<'a> {
    Latest {
        store: &opened.store,
        project: &opened.project,
        name,
    }
}

/// Shows an entry, and to programs whether it was made by this command.
fn say(context: &Context, entry: &LatestEntry, is_new: bool) -> Outcome {
    let value = || {
        let mut value = json!(entry);
        value["new"] = json!(is_new);
        value
    };
    context.out.show(value, || facts(&rows(entry)))?;
    Ok(Exit::Ok)
}

/// What an entry says.
pub fn rows(entry: &LatestEntry) -> Vec<(&'static str, String)> {
    let why = match &entry.why {
        Why::Hand => "by hand".to_owned(),
        Why::Comparison { report, sha256 } => format!("comparison {report} (sha256 {sha256})"),
        Why::Rollback { from } => format!("rolled back from v{from}"),
    };
    let mut rows = vec![("latest", format!("{}@v{}", entry.name, entry.version))];
    rows.extend(entry.canary.map(|canary| {
        let (of, share) = (canary.version, percent(canary));
        ("canary", format!("{}@v{of} for {share}", entry.name))
    }));
    rows.push(("why", why));
    rows.push(("since", entry.created_at_us.to_string()));
    rows
}

/// The same in a word: `v3, v4 for 10 %`.
pub fn word(entry: &LatestEntry) -> String {
    let canary = entry
        .canary
        .map(|canary| format!(", v{} for {}", canary.version, percent(canary)));
    format!("v{}{}", entry.version, canary.unwrap_or_default())
}

/// A share as people read it, to four digits.
fn percent(canary: Canary) -> String {
    format!("{} %", (canary.share * 1e6).round() / 1e4)
}

/// The same for programs; null where no version is `latest`.
pub fn to_json(entry: Option<&LatestEntry>) -> Value {
    json!(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_shares_have_rules() {
        assert_eq!((version("v3"), version("3")), (Ok(3), Ok(3)));
        assert!(version("v0").is_err() && version("x").is_err());
        assert_eq!(share("0.1"), Ok(0.1));
        for bad in ["0", "1", "-0.1", "NaN", "10%", ""] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    fn entry(canary: Option<Canary>, why: Why) -> LatestEntry {
        LatestEntry {
            record_version: 1,
            name: "shop".parse().unwrap(),
            seq: 2,
            version: 1,
            canary,
            why,
            created_at_us: espalier_core::time::Timestamp(0),
        }
    }

    #[test]
    fn an_entry_says_why_and_for_whom() {
        let back = entry(None, Why::Rollback { from: 3 });
        let said = rows(&back);
        assert_eq!(
            (&*said[0].1, &*said[1].1),
            ("shop@v1", "rolled back from v3")
        );
        assert_eq!(word(&back), "v1");
        let canary = Canary {
            version: 4,
            share: 0.07,
        };
        let part = entry(Some(canary), Why::Hand);
        assert_eq!(rows(&part)[1], ("canary", "shop@v4 for 7 %".to_owned()));
        assert_eq!(word(&part), "v1, v4 for 7 %");
    }

    #[test]
    fn what_is_so_already_is_seen() {
        let canary = Canary {
            version: 4,
            share: 0.1,
        };
        let whole = entry(None, Why::Hand);
        let part = entry(Some(canary), Why::Hand);
        assert!(is_of(&whole, 1, None) && !is_of(&whole, 2, None));
        assert!(!is_of(&whole, 1, Some(0.1)) && !is_of(&part, 1, None));
        assert!(is_of(&part, 4, Some(0.1)) && !is_of(&part, 4, Some(0.2)));
    }
}
