//! `espalier train --plan`: what a training would keep in memory and how long a step would take, told from the model's
//! configuration and, where a data set is named, from how long its samples are.

use espalier_core::spec::{TrainLength, TrainSettings};
use espalier_runtime::fetch::{Fetcher, Source, Wanted};
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use espalier_train_worker::config::DeviceChoice;
use espalier_train_worker::engine::{Device, EngineError, Keep, Plan};
use espalier_train_worker::trainer::{self, Budget, EngineLoader};
use serde_json::{Value, json};

use super::{Learned, Train};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, facts};

/// Shows the plan.
pub(super) async fn show(
    context: &Context,
    args: &Train,
    settings: &TrainSettings,
    learned: Option<&Learned>,
) -> Outcome {
    let source = Source::parse(&args.base, args.revision.as_deref()).await;
    let source = source.map_err(|error| refused(&error))?;
    let fetcher = Fetcher::new(&context.environment, None);
    let folder = fetcher.fetch(&source, Wanted::Model).await;
    let folder = folder.map_err(|error| refused(&error))?;
    let read = move || trainer::config(&folder).map_err(|error| refused(&error));
    let read = blocking("train.base", read).await;
    let (config, _) = read.map_err(|error| refused(&error))??;
    let longest = learned.map_or(usize::MAX, Learned::longest);
    let tokens = settings.batch * settings.max_length.min(config.max_positions).min(longest);
    let tokens = tokens.min(config.max_positions);
    let (choice, cores) = (args.device, args.peak_flops.is_none());
    let found = blocking("train.device", move || machine(choice, cores)).await;
    let (device, measured) = found
        .map_err(|error| refused(&error))?
        .map_err(|error| refused(&error))?;
    let budget = trainer::budget(&config, settings, tokens, device);
    let budget = budget.map_err(|error| refused(&error))?;
    let plan = trainer::plan(&config, settings, tokens, device, budget);
    let plan = plan.map_err(|error| refused(&error))?;
    let steps = learned.and_then(|learned| learned.steps(settings));
    let step_flops = plan.flops(&[tokens], tokens as u64) * settings.accumulation as u64;
    let step_s = args
        .peak_flops
        .or(measured)
        .map(|peak| step_flops as f64 / peak);
    context.out.show(
        || {
            json!({
                "tokens": tokens,
                "layers": kept(&plan).iter().map(|(keep, n)| json!({"keeps": keep, "layers": n})).collect::<Vec<_>>(),
                "device": device.to_string(),
                "budget": {"bytes": budget.bytes, "is_asked": budget.is_asked},
                "bytes": {
                    "frozen": plan.bytes.frozen, "trained": plan.bytes.trained,
                    "activations": plan.bytes.activations, "host": plan.bytes.host,
                    "device": plan.bytes.device(),
                },
                "dataset": learned.map(Learned::to_json),
                "steps": steps,
                "step_flops": step_flops,
                "step_s_at_peak": step_s,
            })
        },
        || {
            let mib = |bytes: u64| format!("{} MiB", count(bytes.div_ceil(1 << 20)));
            let mut rows = Vec::new();
            rows.extend(learned.map(|learned| ("data set", learned.text())));
            rows.extend(steps.map(|steps| ("steps", count(steps))));
            rows.push(("micro-batch", format!("{} tokens at most", count(tokens as u64))));
            for (keep, layers) in kept(&plan) {
                rows.push(("layers", format!("{layers} keep {keep}")));
            }
            rows.extend([
                ("device", device.to_string()),
                ("budget", format!("{}, {}", mib(budget.bytes), from(budget))),
                ("memory", mib(plan.bytes.device())),
                ("  frozen weights", mib(plan.bytes.frozen)),
                ("  what is trained", mib(plan.bytes.trained)),
                ("  activations", mib(plan.bytes.activations)),
                ("  on the host", mib(plan.bytes.host)),
                ("a step", format!("{:.3e} operations", step_flops as f64)),
            ]);
            rows.extend(step_s.map(|s| ("  at the peak", format!("{s:.2} s"))));
            facts(&rows)
        },
    )?;
    Ok(Exit::Ok)
}

impl Learned {
    /// No sample has more tokens.
    fn longest(&self) -> usize {
        let bounds = self.tally.buckets().filter(|(_, rows)| *rows > 0);
        let below = bounds.last().map_or(u64::MAX, |(below, _)| below - 1);
        self.tally
            .max_length
            .min(usize::try_from(below).unwrap_or(usize::MAX))
    }

    /// Steps of a training; none: it depends on how samples are packed.
    fn steps(&self, settings: &TrainSettings) -> Option<u64> {
        let epochs = match settings.length {
            TrainLength::Steps(steps) => return Some(steps),
            TrainLength::Epochs(epochs) => u64::from(epochs),
        };
        let step = (settings.batch * settings.accumulation) as u64;
        let rows = self.version.summary.train_rows;
        (!settings.packing).then(|| epochs * rows.div_ceil(step))
    }

    fn to_json(&self) -> Value {
        let sums = &self.version.summary;
        json!({
            "name": self.name(), "train_rows": sums.train_rows, "eval_rows": sums.eval_rows, "tokens": sums.tokens,
            "supervised_tokens": sums.supervised_tokens,
        })
    }

    fn text(&self) -> String {
        let sums = &self.version.summary;
        format!(
            "{}: {} samples and {} held out, {} tokens, {} of them learned or measured",
            self.name(),
            count(sums.train_rows),
            count(sums.eval_rows),
            count(sums.tokens),
            count(sums.supervised_tokens)
        )
    }
}

fn refused(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::refused(error_chain(error))
}

/// The device of this machine, and what its CPU is measured to do in a second where `is_measured`.
fn machine(choice: DeviceChoice, is_measured: bool) -> Result<(Device, Option<f64>), EngineError> {
    let loader = EngineLoader::open(choice, None, None)?;
    let device = loader.device();
    Ok((device, is_measured.then(|| loader.measure()).flatten()))
}

/// What a budget is.
fn from(budget: Budget) -> &'static str {
    match budget.is_asked {
        true => "as `memory_budget_mib` says",
        false => "of what is free on this machine; `memory_budget_mib` sets another",
    }
}

/// How many layers keep what.
fn kept(plan: &Plan) -> Vec<(&'static str, usize)> {
    let count = |keep: Keep| plan.keeps.iter().filter(|kept| **kept == keep).count();
    let kept = Keep::EVERY
        .into_iter()
        .map(|keep| (keep.name(), count(keep)));
    kept.filter(|(_, count)| *count > 0).collect()
}
