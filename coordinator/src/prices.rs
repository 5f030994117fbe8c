//! What tokens and workers cost, as the configuration says: metrics turn work into dollars by it. Nothing is decided by a
//! price here.

use std::collections::{BTreeMap, BTreeSet};

use espalier_core::error::FieldError;
use espalier_core::queue::JobKind;
use serde::Deserialize;

/// Most models with a price: each is two series of every coordinator.
const MODELS_MAX: usize = 256;
/// Highest price, in dollars: far beyond what anybody pays.
const PRICE_MAX: f64 = 1e6;

/// Prices, in dollars. What has none costs nothing.
///
/// ```toml
/// [prices]
/// budget_per_day = 200.0
///
/// [prices.models."gpt-5-mini"]
/// input = 0.25
/// output = 2.0
///
/// [prices.workers]
/// rollout = 0.12
/// train = 2.4
/// ```
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Dollars that a day may cost. Nothing stops there: an alert tells.
    #[serde(default)]
    pub budget_per_day: Option<f64>,
    /// Of models, by the name that rollouts ask for. Leave out those that are served by workers with a price.
    #[serde(default)]
    pub models: BTreeMap<String, TokenPrices>,
    /// Dollars for an hour of a worker that is connected, by the kind of job that it takes. A process that takes several
    /// kinds has a session for each, so give one of them its price.
    #[serde(default)]
    pub workers: BTreeMap<JobKind, f64>,
}

/// Dollars for a million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenPrices {
    /// Of prompts.
    pub input: f64,
    /// Of answers.
    pub output: f64,
}

impl Prices {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// Names the first price that breaks its rule.
    pub fn validate(&self) -> Result<(), FieldError> {
        if let Some(budget) = self.budget_per_day
            && !(budget > 0.0 && budget <= PRICE_MAX)
        {
            let rule = format!("must be above 0 and at most {PRICE_MAX}");
            return Err(FieldError::new("prices.budget_per_day", budget, rule));
        }
        if self.models.len() > MODELS_MAX {
            let rule = format!("must have at most {MODELS_MAX} names");
            return Err(FieldError::new("prices.models", self.models.len(), rule));
        }
        for (model, prices) in &self.models {
            if model.is_empty() {
                let rule = "must be named as rollouts ask for it";
                return Err(FieldError::new("prices.models", "an empty name", rule));
            }
            check(&format!("prices.models.\"{model}\".input"), prices.input)?;
            check(&format!("prices.models.\"{model}\".output"), prices.output)?;
        }
        for (kind, price) in &self.workers {
            check(&format!("prices.workers.{kind}"), *price)?;
        }
        Ok(())
    }

    /// What an hour of a session that takes `kinds` costs, and as which kind: the dearest.
    pub fn of_session(&self, kinds: &BTreeSet<JobKind>) -> Option<(JobKind, f64)> {
        let priced = kinds
            .iter()
            .filter_map(|kind| Some((*kind, *self.workers.get(kind)?)));
        priced.max_by(|(_, one), (_, other)| one.total_cmp(other))
    }
}

fn check(field: &str, price: f64) -> Result<(), FieldError> {
    if (0.0..=PRICE_MAX).contains(&price) {
        return Ok(());
    }
    let rule = format!("must be in 0..={PRICE_MAX}");
    Err(FieldError::new(field, price, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "budget_per_day = 200.0\n[models.\"gpt-5-mini\"]\ninput = 0.25\noutput = 2.0\n\
                        [workers]\nrollout = 0.12\ntrain = 2.4\n";

    fn parse(text: &str) -> Result<Prices, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prices.toml");
        std::fs::write(&file, text).unwrap();
        let environment = espalier_runtime::config::Environment::new();
        let prices: Prices = espalier_runtime::config::load(Some(&file), "NONE_", &environment)
            .map_err(|error| error.to_string())?;
        prices.validate().map_err(|error| error.to_string())?;
        Ok(prices)
    }

    #[test]
    fn prices_have_rules() {
        let prices = parse(GOOD).unwrap();
        assert_eq!(prices.workers[&JobKind::Train], 2.4);
        assert_eq!(parse("").unwrap(), Prices::default());
        for (from, to, expected) in [
            (
                "0.25",
                "-1.0",
                "`prices.models.\"gpt-5-mini\".input` must be in 0..=1000000",
            ),
            ("= 2.4", "= nan", "`prices.workers.train` must be in"),
            ("200.0", "0.0", "`prices.budget_per_day` must be above 0"),
            ("train", "trainer", "trainer"),
            ("output", "outputs", "outputs"),
        ] {
            let error = parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
        }
    }

    /// What the guide shows is taken.
    #[test]
    fn the_guides_example_is_a_configuration() {
        let guide = include_str!("../../docs/guides/operations.md");
        let (_, example) = guide.split_once("```toml\n[prices]\n").unwrap();
        let (example, _) = example.split_once("```").unwrap();
        let prices = parse(&example.replace("[prices.", "[")).unwrap();
        assert_eq!((prices.models.len(), prices.workers.len()), (1, 3));
    }

    #[test]
    fn a_session_of_several_kinds_costs_once() {
        let prices = parse(GOOD).unwrap();
        let of = |kinds: &[JobKind]| prices.of_session(&kinds.iter().copied().collect());
        assert_eq!(of(&[JobKind::Curate]), None);
        assert_eq!(
            of(&[JobKind::Curate, JobKind::Rollout]),
            Some((JobKind::Rollout, 0.12))
        );
        assert_eq!(
            of(&[JobKind::Train, JobKind::Rollout]),
            Some((JobKind::Train, 2.4))
        );
    }
}
