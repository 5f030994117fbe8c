//! `espalier train --plan`: what a training would keep in memory and how long a step would take, told from the model's
//! configuration alone.

use espalier_core::spec::TrainSpec;
use espalier_runtime::fetch::{Fetcher, Source, Wanted};
use espalier_runtime::telemetry::error_chain;
use espalier_train_worker::engine::{Keep, Plan};
use espalier_train_worker::trainer;
use serde_json::json;

use super::Train;
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{count, facts};

/// Shows the plan.
pub(super) async fn show(context: &Context, args: &Train, spec: &TrainSpec) -> Outcome {
    let source = Source::parse(&spec.base, spec.revision.as_deref()).await;
    let source = source.map_err(|error| refused(&error))?;
    let fetcher = Fetcher::new(&context.environment, None);
    let folder = fetcher.fetch(&source, Wanted::Model).await;
    let folder = folder.map_err(|error| refused(&error))?;
    let config = trainer::config(&folder).map_err(|error| refused(&error))?;
    let settings = &spec.settings;
    let tokens = settings.batch * settings.max_length.min(config.max_positions);
    let tokens = tokens.min(config.max_positions);
    let plan = trainer::plan(&config, settings, tokens).map_err(|error| refused(&error))?;
    let step_flops = plan.flops(&[tokens], tokens as u64) * settings.accumulation as u64;
    let step_s = args.peak_flops.map(|peak| step_flops as f64 / peak);
    context.out.show(
        || {
            json!({
                "tokens": tokens,
                "layers": kept(&plan).iter().map(|(keep, n)| json!({"keeps": keep, "layers": n})).collect::<Vec<_>>(),
                "bytes": {
                    "frozen": plan.bytes.frozen, "trained": plan.bytes.trained,
                    "activations": plan.bytes.activations, "host": plan.bytes.host,
                    "device": plan.bytes.device(),
                },
                "step_flops": step_flops,
                "step_s_at_peak": step_s,
            })
        },
        || {
            let mib = |bytes: u64| format!("{} MiB", count(bytes.div_ceil(1 << 20)));
            let mut rows = vec![("micro-batch", format!("{} tokens at most", count(tokens as u64)))];
            for (keep, layers) in kept(&plan) {
                rows.push(("layers", format!("{layers} keep {keep}")));
            }
            rows.extend([
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

fn refused(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::refused(error_chain(error))
}

/// How many layers keep what.
fn kept(plan: &Plan) -> Vec<(&'static str, usize)> {
    let count = |keep: Keep| plan.keeps.iter().filter(|kept| **kept == keep).count();
    let kept = Keep::EVERY
        .into_iter()
        .map(|keep| (keep.name(), count(keep)));
    kept.filter(|(_, count)| *count > 0).collect()
}
