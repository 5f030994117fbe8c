//! Comparisons of turns: the scores of both arms out of the store, and the report that is made of them.

use std::collections::BTreeSet;
use std::fmt::Write;

use espalier_core::compare::markup::{POLICY, STYLE, escaped, html_table, inline, markdown_table};
use espalier_core::compare::turns::{
    Scores, TURNS_METHOD, TurnsReport, agreement_table, arms_table, compare_turns,
};
use espalier_core::compare::words::{percent, points};
use espalier_core::compare::{Both, CompareSummary, REPORT_VERSION};
use espalier_core::layout;
use espalier_core::spec::{CompareArm, CompareSpec};
use espalier_core::time::Timestamp;
use espalier_core::trace::Summary;
use espalier_runtime::publish::patiently;
use espalier_runtime::traces::Listed;

use super::error::CompareError;
use super::gather::Gatherer;

/// What tables say of the gate.
const NO_GATE: &str = "turns were compared, which is no evaluation of tasks";

impl Gatherer<'_> {
    /// The report of both arms' scores.
    pub(super) async fn turns(
        &self,
        spec: &CompareSpec,
        now: Timestamp,
    ) -> Result<TurnsReport, CompareError> {
        let mut scores = Both::<Vec<Scores>>::default();
        for listed in self.items(spec).await? {
            let Some(found) = self.scores(&listed).await? else {
                continue;
            };
            if admits(&spec.arms.after, &listed, &found) {
                scores.after.push(found.clone());
            }
            if admits(&spec.arms.before, &listed, &found) {
                scores.before.push(found);
            }
        }
        let labels = Both::of(|side| spec.arms.at(side).label.clone());
        let all = scores.before.iter().chain(&scores.after);
        let sources: BTreeSet<_> = all.flat_map(|scores| scores.sources.clone()).collect();
        let found = compare_turns(&scores, labels)?;
        Ok(TurnsReport {
            turns_report_version: REPORT_VERSION,
            job: self.key.to_string(),
            created_at_us: now,
            arms: found.arms,
            pooled: found.pooled,
            kinds: found.kinds,
            sources: sources.into_iter().collect(),
        })
    }

    /// What a job found; none where it scored nothing.
    async fn scores(&self, listed: &Listed) -> Result<Option<Scores>, CompareError> {
        let traces = self.traces();
        let read = || async { Ok::<_, CompareError>(traces.summary(listed).await?) };
        let manifest = patiently(self.key, "scores", read).await?.manifest;
        if !matches!(manifest.summary, Summary::Score(_)) {
            return Ok(None);
        }
        let path = layout::scores(&listed.job, manifest.fence);
        let get = || async { Ok::<_, CompareError>(self.store.get(&path).await?) };
        let bytes = patiently(self.key, "scores", get).await?;
        let file = manifest.files.iter().find(|file| file.path == path);
        match file.is_some_and(|file| file.holds(&bytes)) {
            true => Ok(Some(Scores::parse(&bytes)?)),
            false => Err(CompareError::Scores { path }),
        }
    }
}

fn admits(arm: &CompareArm, listed: &Listed, scores: &Scores) -> bool {
    let has = |(name, value): (&String, &String)| scores.labels.get(name) == Some(value);
    arm.batches.contains(&listed.job.batch)
        && arm.labels.iter().all(has)
        && arm
            .model
            .as_ref()
            .is_none_or(|model| scores.model == *model)
}

/// What tables show of it.
pub(super) fn summary(report: &TurnsReport) -> CompareSummary {
    let all = &report.pooled.agreement;
    CompareSummary {
        tasks: all.tasks,
        pairs: all.turns,
        before: all.arms.before.value,
        after: all.arms.after.value,
        difference: all.difference,
        passed: false,
        verdict: NO_GATE.to_owned(),
    }
}

/// What came of it, in a sentence.
fn headline(report: &TurnsReport) -> String {
    let all = &report.pooled.agreement;
    format!(
        "Over {} tasks and {} recorded turns, {} says the same in {} and {} in {}: a difference of {} points.",
        all.tasks,
        all.turns,
        report.arms.before.label,
        percent(&all.arms.before),
        report.arms.after.label,
        percent(&all.arms.after),
        points(&all.difference),
    )
}

/// The report as Markdown.
pub(super) fn markdown(report: &TurnsReport) -> String {
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    format!(
        "# {} and {}, teacher-forced\n\n{}\n\n## Agreement\n\n{}\n{}\n\n## Arms\n\n{}\nMade by {} of {} recorded rollouts; \
         `report.json` names each.\n",
        inline(before),
        inline(after),
        inline(&headline(report)),
        markdown_table(&agreement_table(report)),
        inline(TURNS_METHOD),
        markdown_table(&arms_table(report)),
        inline(&report.job),
        report.sources.len(),
    )
}

/// The report as one page, which fetches and runs nothing.
pub(super) fn html(report: &TurnsReport) -> String {
    let (before, after) = (&report.arms.before.label, &report.arms.after.label);
    let title = escaped(&format!("{before} and {after}, teacher-forced"));
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\
         <h1>{title}</h1><p>{}</p><h2>Agreement</h2>{}<p class=\"small\">{}</p><h2>Arms</h2>{}<h2>Lineage</h2><p>Made by {}.</p>\
         <p class=\"small\">",
        escaped(&headline(report)),
        html_table(&agreement_table(report)),
        escaped(TURNS_METHOD),
        html_table(&arms_table(report)),
        escaped(&report.job),
    );
    for source in &report.sources {
        let _ = write!(
            out,
            "{} {}<br>",
            escaped(&source.sha256),
            escaped(&source.path)
        );
    }
    out.push_str("</p></body></html>");
    out
}
