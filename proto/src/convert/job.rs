//! Errors and results.

use espalier_core::adapter::{Agreement, Difference, TrainSummary};
use espalier_core::answers::GenerateSummary;
use espalier_core::compare::turns::ScoreSummary;
use espalier_core::compare::{CompareSummary, Estimate};
use espalier_core::dataset::CurateSummary;
use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::spec::ExportSummary;
use espalier_core::trace::{RolloutSummary, StopReason, Summary, Totals};

use crate::v1;

/// The class on the wire.
pub fn class_to_wire(class: ErrorClass) -> v1::ErrorClass {
    match class {
        ErrorClass::Invalid => v1::ErrorClass::Invalid,
        ErrorClass::Handler => v1::ErrorClass::Handler,
        ErrorClass::Infra => v1::ErrorClass::Infra,
        ErrorClass::Preempted => v1::ErrorClass::Preempted,
        ErrorClass::Cancelled => v1::ErrorClass::Cancelled,
    }
}

/// The class that a peer sent. One that this build does not know counts as a failure of the handler, whose budget is
/// the smaller one.
pub fn class_from_wire(class: v1::ErrorClass) -> ErrorClass {
    match class {
        v1::ErrorClass::Invalid => ErrorClass::Invalid,
        v1::ErrorClass::Handler | v1::ErrorClass::Unspecified => ErrorClass::Handler,
        v1::ErrorClass::Infra => ErrorClass::Infra,
        v1::ErrorClass::Preempted => ErrorClass::Preempted,
        v1::ErrorClass::Cancelled => ErrorClass::Cancelled,
    }
}

/// An error on the wire.
pub fn error_to_wire(class: ErrorClass, message: String, log_tail: String) -> v1::JobError {
    v1::JobError {
        class: class_to_wire(class).into(),
        message,
        log_tail,
    }
}

/// A refused value on the wire.
pub fn field_error_to_wire(error: FieldError) -> v1::FieldError {
    v1::FieldError {
        field: error.field,
        value: error.value,
        rule: error.rule,
    }
}

/// A summary on the wire.
pub fn summary_to_wire(summary: &Summary) -> v1::RolloutSummary {
    match summary {
        Summary::Rollout(summary) => rollout_to_wire(summary),
        Summary::Generate(summary) => v1::RolloutSummary {
            generate: Some(v1::GenerateSummary {
                lines: summary.lines,
                failed: summary.failed,
                prompt_tokens: summary.prompt_tokens,
                completion_tokens: summary.completion_tokens,
            }),
            ..v1::RolloutSummary::default()
        },
        Summary::Train(summary) => v1::RolloutSummary {
            train: Some(v1::TrainSummary {
                steps: summary.steps,
                tokens: summary.tokens,
                supervised_tokens: summary.supervised_tokens,
                loss: summary.loss,
                eval_loss: summary.eval_loss,
                best_step: summary.best_step,
                wall_ms: summary.wall_ms,
                agreement: summary.agreement.as_ref().map(agreement_to_wire),
            }),
            ..v1::RolloutSummary::default()
        },
        Summary::Export(summary) => v1::RolloutSummary {
            export: Some(v1::ExportSummary {
                exported_to: summary.exported_to.clone(),
                commit: summary.commit.clone().unwrap_or_default(),
                files: summary.files,
                bytes: summary.bytes,
            }),
            ..v1::RolloutSummary::default()
        },
        Summary::Curate(summary) => v1::RolloutSummary {
            curate: Some(v1::CurateSummary {
                sources: summary.sources,
                train_rows: summary.train_rows,
                eval_rows: summary.eval_rows,
                tokens: summary.tokens,
                supervised_tokens: summary.supervised_tokens,
                dropped: summary.dropped.clone(),
            }),
            ..v1::RolloutSummary::default()
        },
        Summary::Compare(summary) => v1::RolloutSummary {
            compare: Some(v1::CompareSummary {
                tasks: summary.tasks,
                pairs: summary.pairs,
                before: summary.before,
                after: summary.after,
                difference: summary.difference.value,
                low: summary.difference.low,
                high: summary.difference.high,
                passed: summary.passed,
                verdict: summary.verdict.clone(),
            }),
            ..v1::RolloutSummary::default()
        },
        Summary::Score(summary) => v1::RolloutSummary {
            score: Some(v1::ScoreSummary {
                traces: summary.traces,
                turns: summary.turns,
                agreed: summary.agreed,
                prompt_tokens: summary.prompt_tokens,
                completion_tokens: summary.completion_tokens,
            }),
            ..v1::RolloutSummary::default()
        },
    }
}

fn agreement_to_wire(agreement: &Agreement) -> v1::Agreement {
    match agreement {
        Agreement::Measured(difference) => v1::Agreement {
            traces: difference.traces,
            tokens: difference.tokens,
            mean: difference.mean,
            max: difference.max,
            unmeasured: None,
        },
        Agreement::Unmeasured { unmeasured } => v1::Agreement {
            unmeasured: Some(unmeasured.clone()),
            ..v1::Agreement::default()
        },
    }
}

/// What came of holding a training against serving.
pub fn agreement_from_wire(agreement: &v1::Agreement) -> Agreement {
    match &agreement.unmeasured {
        Some(why) => Agreement::unmeasured(why),
        None => Agreement::Measured(Difference {
            traces: agreement.traces,
            tokens: agreement.tokens,
            mean: agreement.mean,
            max: agreement.max,
        }),
    }
}

fn rollout_to_wire(summary: &RolloutSummary) -> v1::RolloutSummary {
    v1::RolloutSummary {
        reward: summary.reward,
        stop: summary.stop.as_str().to_owned(),
        reason: summary.reason.clone(),
        task_id: summary.task_id.clone(),
        task_kind: summary.task_kind.clone(),
        turns: summary.totals.turns,
        tool_calls: summary.totals.tool_calls,
        tool_errors: summary.totals.tool_errors,
        prompt_tokens: summary.totals.prompt_tokens,
        completion_tokens: summary.totals.completion_tokens,
        wall_ms: summary.totals.wall_ms,
        generate: None,
        train: None,
        export: None,
        curate: None,
        compare: None,
        score: None,
    }
}

/// The summary that a peer sent.
///
/// # Errors
/// Names a stop reason that this build does not know.
pub fn summary_from_wire(summary: v1::RolloutSummary) -> Result<Summary, FieldError> {
    if let Some(score) = summary.score {
        return Ok(Summary::Score(ScoreSummary {
            traces: score.traces,
            turns: score.turns,
            agreed: score.agreed,
            prompt_tokens: score.prompt_tokens,
            completion_tokens: score.completion_tokens,
        }));
    }
    if let Some(compare) = summary.compare {
        return Ok(Summary::Compare(CompareSummary {
            tasks: compare.tasks,
            pairs: compare.pairs,
            before: compare.before,
            after: compare.after,
            difference: Estimate {
                value: compare.difference,
                low: compare.low,
                high: compare.high,
            },
            passed: compare.passed,
            verdict: compare.verdict,
        }));
    }
    if let Some(curate) = summary.curate {
        return Ok(Summary::Curate(CurateSummary {
            sources: curate.sources,
            train_rows: curate.train_rows,
            eval_rows: curate.eval_rows,
            tokens: curate.tokens,
            supervised_tokens: curate.supervised_tokens,
            dropped: curate.dropped,
        }));
    }
    if let Some(export) = summary.export {
        return Ok(Summary::Export(ExportSummary {
            exported_to: export.exported_to,
            commit: Some(export.commit).filter(|commit| !commit.is_empty()),
            files: export.files,
            bytes: export.bytes,
        }));
    }
    if let Some(generate) = summary.generate {
        return Ok(Summary::Generate(GenerateSummary {
            lines: generate.lines,
            failed: generate.failed,
            prompt_tokens: generate.prompt_tokens,
            completion_tokens: generate.completion_tokens,
        }));
    }
    if let Some(train) = summary.train {
        return Ok(Summary::Train(TrainSummary {
            steps: train.steps,
            tokens: train.tokens,
            supervised_tokens: train.supervised_tokens,
            loss: train.loss,
            eval_loss: train.eval_loss,
            best_step: train.best_step,
            wall_ms: train.wall_ms,
            agreement: train.agreement.as_ref().map(agreement_from_wire),
        }));
    }
    let stop: StopReason = serde_json::from_value(summary.stop.as_str().into()).map_err(|_| {
        FieldError::new("summary.stop", &summary.stop, "must be a known stop reason")
    })?;
    Ok(Summary::Rollout(RolloutSummary {
        reward: summary.reward,
        stop,
        reason: summary.reason,
        task_id: summary.task_id,
        task_kind: summary.task_kind,
        totals: Totals {
            turns: summary.turns,
            tool_calls: summary.tool_calls,
            tool_errors: summary.tool_errors,
            prompt_tokens: summary.prompt_tokens,
            completion_tokens: summary.completion_tokens,
            wall_ms: summary.wall_ms,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_survives_the_wire() {
        let measured = Agreement::Measured(Difference {
            traces: 2,
            tokens: 9,
            mean: 1e-7,
            max: 3e-7,
        });
        let agreements = [
            Some(measured),
            Some(Agreement::unmeasured("no rollout was found")),
            None,
        ];
        for agreement in agreements {
            let summary = Summary::Train(TrainSummary {
                steps: 3,
                tokens: 9,
                supervised_tokens: 5,
                loss: 0.5,
                eval_loss: None,
                best_step: 3,
                wall_ms: 7,
                agreement,
            });
            assert_eq!(summary_from_wire(summary_to_wire(&summary)), Ok(summary));
        }
    }
}
