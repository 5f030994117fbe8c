//! What a comparison proves of a version of an adapter: which one it is of, that the gate lets it pass, and that it was
//! the one that answered.

use std::str::FromStr;

use espalier_adapters::content_digest;
use espalier_core::adapter::{AdapterVersion, Why};
use espalier_core::compare::{REPORT_FILE, Report, ReportArm};
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, JobKey};
use espalier_core::layout;
use espalier_core::spec::AdapterRef;
use espalier_core::trace::Manifest;

use super::{Opened, Wanted};
use crate::exit::Problem;
use crate::output::note;

/// A `compare` job: BATCH/JOB, or BATCH with the job that `espalier evaluate` gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Its batch.
    pub batch: BatchId,
    /// Its id.
    pub job: JobId,
}

impl FromStr for Comparison {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let (batch, job) = text.split_once('/').unwrap_or((text, "compare"));
        Ok(Self {
            batch: BatchId::new(batch)?,
            job: JobId::new(job)?,
        })
    }
}

/// A report that speaks for a version.
pub struct Proof {
    /// The version.
    pub of: AdapterRef,
    /// The report, as an entry of the log names it.
    pub why: Why,
    report: Report,
}

impl Proof {
    /// Reads the report of a comparison, which must be of what is `wanted`, and whose gate must pass.
    pub async fn read(
        opened: &Opened,
        comparison: &Comparison,
        wanted: &Wanted,
    ) -> Result<Self, Problem> {
        let Comparison { batch, job } = comparison;
        let key = JobKey::new(opened.project.clone(), batch.clone(), job.clone());
        let manifest = match opened.store.get(&layout::manifest(&key)).await {
            Err(error) if error.is_not_found() => {
                let message = format!("{batch}/{job} has published nothing");
                return Err(Problem::refused(message)
                    .fix(format!("see how it is: espalier job show {batch}/{job}")));
            }
            other => Manifest::parse(&other?, &key)?,
        };
        let folder = layout::report_files(&key, manifest.fence);
        let path = format!("{folder}{REPORT_FILE}");
        let file = manifest.files.iter().find(|file| file.path == path);
        let file =
            file.ok_or_else(|| Problem::refused(format!("{batch}/{job} is no comparison")))?;
        let bytes = opened.store.get(&path).await?;
        if !file.holds(&bytes) {
            let message = format!("{path} is not what its manifest names");
            return Err(Problem::failed(message));
        }
        let report = Report::parse(&bytes)?;
        let of = spoken_for(&report, wanted).map_err(|message| {
            Problem::refused(message).fix("promote it by hand, without --comparison")
        })?;
        let sha256 = file.sha256.clone();
        let why = Why::Comparison {
            report: path,
            sha256,
        };
        Ok(Self { of, why, report })
    }

    /// Holds the adapters that answered against the content of the version.
    pub async fn check(&self, opened: &Opened, version: &AdapterVersion) -> Result<(), Problem> {
        let arm = &self.report.arms.after;
        if !arm.adapters.iter().any(|said| digest_of(said).is_some()) {
            note(format!(
                "no server said which adapter answered: that it was {} is not checked",
                self.of
            ));
            return Ok(());
        }
        let content = content_digest(&opened.store, version).await?;
        match other_than(arm, &content) {
            None => Ok(()),
            Some(other) => Err(Problem::refused(format!(
                "the comparison was answered by {other}, and {} is sha256:{content}",
                self.of
            ))
            .fix(format!("evaluate {} where it is served", self.of))),
        }
    }
}

/// The version that a report lets pass, which must be what is wanted.
fn spoken_for(report: &Report, wanted: &Wanted) -> Result<AdapterRef, String> {
    let of = named(&report.arms.after)?;
    let meant = AdapterRef {
        name: wanted.name.clone(),
        version: wanted.version.unwrap_or(of.version),
    };
    if of != meant {
        let meant = match wanted.version {
            Some(_) => meant.to_string(),
            None => wanted.name.to_string(),
        };
        return Err(format!(
            "the comparison is of {of}, and {meant} is to become latest"
        ));
    }
    match report.gate.passed {
        true => Ok(of),
        false => Err(format!("the gate does not pass: {}", report.gate.words)),
    }
}

/// The version that an arm is of: the one that its job named, or that its rollouts asked for by name.
fn named(arm: &ReportArm) -> Result<AdapterRef, String> {
    let asked: Vec<Option<AdapterRef>> = arm.models.iter().map(|m| m.parse().ok()).collect();
    let said = arm
        .adapter
        .as_ref()
        .and_then(|adapter| adapter.parse().ok());
    let of = match (said, &asked[..]) {
        (Some(said), _) => said,
        (None, [Some(asked)]) => asked.clone(),
        (None, _) => {
            return Err(format!(
                "the comparison names no version of an adapter: its second arm asked for {}",
                arm.models.join(", ")
            ));
        }
    };
    match asked.iter().flatten().find(|asked| **asked != of) {
        Some(other) => Err(format!(
            "the comparison says that it is of {of}, and asked for {other}"
        )),
        None => Ok(of),
    }
}

/// The SHA-256 that `name#sha256:digest` names.
fn digest_of(said: &str) -> Option<&str> {
    Some(said.rsplit_once("#sha256:")?.1)
}

/// What answered in an arm and has another content.
fn other_than<'a>(arm: &'a ReportArm, content: &str) -> Option<&'a str> {
    let is_other = |said: &&String| digest_of(said).is_some_and(|digest| digest != content);
    arm.adapters.iter().find(is_other).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_is_named_in_two_ways() {
        let named = |text: &str| {
            let read = text.parse::<Comparison>();
            read.map(|read| format!("{}/{}", read.batch, read.job))
        };
        assert_eq!(named("b").unwrap(), "b/compare");
        assert_eq!(named("b/j").unwrap(), "b/j");
        assert!(named("b/j/k").is_err());
    }

    fn arm(adapter: Option<&str>, models: &[&str], adapters: &[&str]) -> ReportArm {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        ReportArm {
            label: "after".to_owned(),
            models: owned(models),
            adapters: owned(adapters),
            adapter: adapter.map(str::to_owned),
            batches: Vec::new(),
            rollouts: 1,
            replayed: 0,
            prices: None,
        }
    }

    #[test]
    fn the_second_arm_names_the_version() {
        let of = |adapter, models: &[&str]| {
            let named = named(&arm(adapter, models, &[]));
            named.map(|of| of.to_string())
        };
        assert_eq!(of(None, &["shop@v4"]).unwrap(), "shop@v4");
        assert_eq!(of(Some("shop@v4"), &["tuned"]).unwrap(), "shop@v4");
        assert_eq!(of(Some("shop@v4"), &["shop@v4"]).unwrap(), "shop@v4");
        for (adapter, models, words) in [
            (None, &["shop"][..], "names no version of an adapter"),
            (None, &[], "names no version"),
            (None, &["shop@v4", "tuned"], "asked for shop@v4, tuned"),
            (
                Some("shop@v4"),
                &["shop@v3"],
                "is of shop@v4, and asked for shop@v3",
            ),
        ] {
            let error = of(adapter, models).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn what_answered_must_be_of_the_same_content() {
        let arm = arm(None, &[], &["a#sha256:11", "b", "shop@v4#sha256:22"]);
        assert_eq!(other_than(&arm, "11"), Some("shop@v4#sha256:22"));
        assert_eq!(other_than(&arm, "22"), Some("a#sha256:11"));
        let same = ReportArm {
            adapters: arm.adapters[..2].to_vec(),
            ..arm
        };
        assert_eq!(other_than(&same, "11"), None);
    }
}
