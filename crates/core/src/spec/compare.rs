//! Comparisons: which rollouts stand for which arm, and what is made of them.
//!
//! The filter of an arm is checked here as text only, as that of a data set is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::check::{Faults, limits};
use super::curate::{SOURCES_EACH_MAX, check_filter, each};
use super::export::AdapterRef;
use crate::compare::{Both, GateSettings, Prices};
use crate::error::FieldError;
use crate::id::{BatchId, JobId};

/// Longest label of an arm, and longest currency, in characters.
const LABEL_CHARS_MAX: usize = 80;
/// Most pairs that a report shows side by side.
const TRACES_MAX: i64 = 100;
/// Pairs that it shows without a word.
const TRACES: i64 = 10;
/// Most trainings whose losses a report plots.
const TRAININGS_MAX: usize = 8;

/// See [`CompareSpec`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `CompareSpec`")]
pub struct CompareDraft {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub arms: Vec<CompareArmDraft>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trainings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_difference: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tasks: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turns: Option<bool>,
}

/// See [`CompareArm`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the fields are documented at `CompareArm`")]
pub struct CompareArmDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_price: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_price: Option<f64>,
}

/// Rollouts that are to be compared, valid in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct CompareSpec {
    /// What is compared with what.
    pub arms: Both<CompareArm>,
    /// `train` jobs whose losses are plotted, as `batch/job`.
    pub trainings: Vec<(BatchId, JobId)>,
    /// Pairs that are shown side by side. Default 10.
    pub traces: usize,
    /// What prices are in. Default `USD`.
    pub currency: String,
    /// What the report asks of the second arm.
    pub gate: GateSettings,
    /// Whether the arms are `score` jobs, whose turns are compared, and not rollouts. Default false.
    pub turns: bool,
}

/// Rollouts that stand for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct CompareArm {
    /// What reports call it. Default: the model, or else the adapter, or else `before` and `after`.
    pub label: String,
    /// Only rollouts that asked for this model.
    pub model: Option<String>,
    /// The version of an adapter that it stands for, which becomes a parent of the report.
    pub adapter: Option<AdapterRef>,
    /// Batches of the project that the rollouts are of.
    pub batches: Vec<BatchId>,
    /// Only rollouts with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Only rollouts that this expression admits, in the language of data sets.
    pub filter: Option<String>,
    /// What a million tokens cost.
    pub prices: Option<Prices>,
}

impl CompareDraft {
    /// The job, or every rule that the draft breaks.
    pub(super) fn check(&self) -> Result<CompareSpec, Vec<FieldError>> {
        let mut faults = Faults::default();
        let arms = match &self.arms[..] {
            [before, after] => {
                let before = faults.take("arms[0]", before.check("before"));
                let after = faults.take("arms[1]", after.check("after"));
                before.zip(after)
            }
            arms => {
                let rule = "must be two: before and after";
                faults.add("arms", format_args!("{} arms", arms.len()), rule);
                None
            }
        };
        if let Some((before, after)) = &arms
            && before.label == after.label
        {
            faults.add(
                "arms[1].label",
                &after.label,
                "must differ from that of the first arm",
            );
        }
        let trainings = self.check_trainings(&mut faults);
        let currency = self.currency.as_deref().unwrap_or("USD");
        check_label(&mut faults, "currency", currency);
        let gate = GateSettings::default();
        let difference = |d| (-1.0..1.0).contains(&d);
        let gate = GateSettings {
            min_difference: faults.float(
                "min_difference",
                self.min_difference,
                gate.min_difference,
                "must be in [-1, 1)",
                difference,
            ),
            min_tasks: faults.number(
                "min_tasks",
                self.min_tasks,
                1..=1_000_000,
                i64::try_from(gate.min_tasks).unwrap_or(i64::MAX),
            ),
        };
        let traces = faults.number("traces", self.traces, 0..=TRACES_MAX, TRACES);
        match arms {
            Some((before, after)) => faults.or(CompareSpec {
                arms: Both { before, after },
                trainings,
                traces,
                currency: currency.to_owned(),
                gate,
                turns: self.turns.unwrap_or(false),
            }),
            None => Err(faults.0),
        }
    }

    fn check_trainings(&self, faults: &mut Faults) -> Vec<(BatchId, JobId)> {
        let read = |text: &str| match text.split_once('/') {
            Some((batch, job)) => Ok((BatchId::new(batch)?, JobId::new(job)?)),
            None => Err(FieldError::new("training", text, "must be `batch/job`")),
        };
        each(faults, "trainings", &self.trainings, TRAININGS_MAX, read)
    }
}

impl CompareArmDraft {
    fn check(&self, name: &str) -> Result<CompareArm, Vec<FieldError>> {
        let mut faults = Faults::default();
        if self.batches.is_empty() {
            let rule = format!("must be 1 to {SOURCES_EACH_MAX} batches");
            faults.add("batches", "", rule);
        }
        let most = SOURCES_EACH_MAX;
        let batches = each(&mut faults, "batches", &self.batches, most, str::parse);
        faults.name("model", self.model.as_deref());
        let adapter = self.adapter.as_deref().map(str::parse);
        let adapter = adapter.and_then(|adapter| faults.keep("adapter", adapter));
        let given = [&self.label, &self.model, &self.adapter];
        let label = given.into_iter().flatten().next();
        // A model's name may be longer than a table has room for.
        let label: String = match &self.label {
            Some(label) => label.clone(),
            None => {
                let chosen = label.map_or(name, String::as_str);
                chosen.chars().take(LABEL_CHARS_MAX).collect()
            }
        };
        check_label(&mut faults, "label", &label);
        faults.count("labels", self.labels.len(), limits::LIST_MAX);
        for (name, value) in &self.labels {
            faults.name(&format!("labels.{name}"), Some(value));
            faults.name("labels", Some(name));
        }
        check_filter(&mut faults, self.filter.as_deref());
        let price = |faults: &mut Faults, field: &str, price| {
            faults.float(field, price, 0.0, "must be in [0, 1e6]", |p| {
                (0.0..=1e6).contains(&p)
            })
        };
        let has_prices = self.prompt_price.is_some() || self.completion_price.is_some();
        let prices = Prices {
            prompt: price(&mut faults, "prompt_price", self.prompt_price),
            completion: price(&mut faults, "completion_price", self.completion_price),
        };
        faults.or(CompareArm {
            label,
            model: self.model.clone(),
            adapter,
            batches,
            labels: self.labels.clone(),
            filter: self.filter.clone(),
            prices: has_prices.then_some(prices),
        })
    }
}

fn check_label(faults: &mut Faults, field: &str, text: &str) {
    let chars = text.chars().count();
    if text.trim().is_empty() || chars > LABEL_CHARS_MAX || text.contains(char::is_control) {
        let rule = format!("must be 1 to {LABEL_CHARS_MAX} characters of printable text");
        faults.add(field, text, rule);
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::parse_line;
    use super::*;

    fn checked(line: &str) -> Result<CompareSpec, Vec<String>> {
        let job = parse_line(line.as_bytes()).unwrap().check();
        let job = job.map_err(|errors| errors.into_iter().map(|e| e.field).collect::<Vec<_>>())?;
        Ok(job.compare().unwrap().clone())
    }

    #[test]
    fn silence_is_filled_in() {
        let spec = checked(
            r#"{"compare":{"arms":[{"batches":["b"],"model":"base"},{"batches":["b"],"adapter":"shop@v2",
                "prompt_price":0.5}]}}"#,
        );
        let spec = spec.unwrap();
        let labels = (&*spec.arms.before.label, &*spec.arms.after.label);
        assert_eq!(labels, ("base", "shop@v2"));
        assert_eq!((spec.traces, &*spec.currency), (10, "USD"));
        assert_eq!((spec.gate.min_difference, spec.gate.min_tasks), (-0.02, 30));
        assert_eq!(spec.arms.before.prices, None);
        let prices = Prices {
            prompt: 0.5,
            completion: 0.0,
        };
        assert_eq!(spec.arms.after.prices, Some(prices));
        let spec =
            checked(r#"{"compare":{"arms":[{"batches":["b"]},{"batches":["c"]}]}}"#).unwrap();
        assert_eq!(
            (&*spec.arms.before.label, &*spec.arms.after.label),
            ("before", "after")
        );
    }

    #[test]
    fn what_breaks_a_rule_is_named_by_field() {
        let two = r#"{"batches":["a"]},{"batches":["a"]}"#;
        for (inner, fields) in [
            (String::new(), &["compare.arms"][..]),
            (
                r#""arms":[{"batches":["a"]}]"#.to_owned(),
                &["compare.arms"],
            ),
            (
                r#""arms":[{},{"batches":["/"],"adapter":"x","where":" ","prompt_price":-1}]"#
                    .to_owned(),
                &[
                    "compare.arms[0].batches",
                    "compare.arms[1].batches[0]",
                    "compare.arms[1].adapter",
                    "compare.arms[1].where",
                    "compare.arms[1].prompt_price",
                ],
            ),
            (
                r#""arms":[{"batches":["a"],"label":"x"},{"batches":["b"],"model":"x"}]"#
                    .to_owned(),
                &["compare.arms[1].label"],
            ),
            (
                format!(
                    r#""arms":[{two}],"trainings":["x"],"currency":" ","min_difference":1,"min_tasks":0,"traces":101"#
                ),
                &[
                    "compare.trainings[0]",
                    "compare.currency",
                    "compare.min_difference",
                    "compare.min_tasks",
                    "compare.traces",
                ],
            ),
        ] {
            let line = format!(r#"{{"compare":{{{inner}}}}}"#);
            assert_eq!(checked(&line).unwrap_err(), fields, "{line}");
        }
        let both = format!(r#"{{"prompt":"x","compare":{{"arms":[{two}]}}}}"#);
        assert_eq!(checked(&both).unwrap_err(), ["prompt"]);
    }

    #[test]
    fn a_comparison_may_wait_for_many_rollouts_and_a_rollout_for_few() {
        let after: Vec<String> = (0..=limits::AFTER_MANY_MAX)
            .map(|n| format!("\"j{n}\""))
            .collect();
        let line =
            |n: usize, work: &str| format!(r#"{{"after":[{}],{work}}}"#, after[..n].join(","));
        let compare = r#""compare":{"arms":[{"batches":["a"]},{"batches":["b"]}]}"#;
        let curate = r#""curate":{"batches":["a"],"dataset":"d"}"#;
        for (n, work, is_fine) in [
            (limits::AFTER_MANY_MAX, compare, true),
            (limits::AFTER_MANY_MAX, curate, true),
            (limits::AFTER_MANY_MAX + 1, compare, false),
            (limits::LIST_MAX, r#""prompt":"x""#, true),
            (limits::LIST_MAX + 1, r#""prompt":"x""#, false),
        ] {
            let job = parse_line(line(n, work).as_bytes()).unwrap().check();
            let fields = job.map_err(|errors| errors[0].field.clone()).map(drop);
            let expected = if is_fine {
                Ok(())
            } else {
                Err("after".to_owned())
            };
            assert_eq!(fields, expected, "{n} {work}");
        }
    }
}
