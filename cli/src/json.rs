//! API messages as JSON for `--json`: the names of the proto, states and classes in lower case, absent things left
//! out.

use espalier_proto::convert::agreement_from_wire;
use espalier_proto::v1;
use serde_json::{Map, Value, json};

/// A batch.
pub fn batch(batch: &v1::Batch) -> Value {
    let mut value = json!({
        "batch": batch.batch,
        "project": batch.project,
        "closed": batch.closed,
        "complete": batch.complete,
        "cancelled": batch.cancelled,
        "counts": counts(&batch.counts.unwrap_or_default()),
        "created_at_us": batch.created_at_us,
    });
    if batch.completed_at_us > 0 {
        value["completed_at_us"] = json!(batch.completed_at_us);
    }
    value
}

/// Jobs by state.
pub fn counts(counts: &v1::Counts) -> Value {
    json!({
        "blocked": counts.blocked,
        "delayed": counts.delayed,
        "ready": counts.ready,
        "leased": counts.leased,
        "succeeded": counts.succeeded,
        "dead": counts.dead,
        "cancelled": counts.cancelled,
    })
}

/// A job.
pub fn job(job: &v1::Job) -> Value {
    let mut value = json!({
        "batch": job.batch,
        "id": job.id,
        "kind": kind(job.kind()),
        "priority": job.priority,
        "needs": job.needs,
        "state": state(job.state()),
        "attempts": job.attempts,
        "handler_failures": job.handler_failures,
        "infra_failures": job.infra_failures,
        "fence": job.fence,
        "labels": job.labels,
        "created_at_us": job.created_at_us,
        "ended_at_us": job.ended_at_us,
    });
    let texts = [
        ("worker", &job.worker),
        ("manifest", &job.manifest),
        ("progress", &job.progress),
    ];
    for (name, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        value[name] = json!(text);
    }
    if let Some(error) = &job.last_error {
        value["last_error"] = json!({
            "class": class(error.class()),
            "message": error.message,
            "log_tail": error.log_tail,
        });
    }
    if let Some(found) = &job.summary {
        value["summary"] = summary(found);
    }
    value
}

/// What a job came to.
pub fn summary(summary: &v1::RolloutSummary) -> Value {
    if let Some(generate) = &summary.generate {
        return json!({
            "lines": generate.lines,
            "failed": generate.failed,
            "prompt_tokens": generate.prompt_tokens,
            "completion_tokens": generate.completion_tokens,
        });
    }
    if let Some(export) = &summary.export {
        return json!({
            "exported_to": export.exported_to,
            "commit": export.commit,
            "files": export.files,
            "bytes": export.bytes,
        });
    }
    if let Some(compare) = &summary.compare {
        return json!({
            "tasks": compare.tasks,
            "pairs": compare.pairs,
            "before": compare.before,
            "after": compare.after,
            "difference": compare.difference,
            "low": compare.low,
            "high": compare.high,
            "passed": compare.passed,
            "verdict": compare.verdict,
        });
    }
    if let Some(score) = &summary.score {
        return json!({
            "traces": score.traces,
            "turns": score.turns,
            "agreed": score.agreed,
            "prompt_tokens": score.prompt_tokens,
            "completion_tokens": score.completion_tokens,
        });
    }
    if let Some(curate) = &summary.curate {
        return json!({
            "sources": curate.sources,
            "train_rows": curate.train_rows,
            "eval_rows": curate.eval_rows,
            "tokens": curate.tokens,
            "supervised_tokens": curate.supervised_tokens,
            "dropped": curate.dropped,
        });
    }
    if let Some(train) = &summary.train {
        return json!({
            "steps": train.steps,
            "tokens": train.tokens,
            "supervised_tokens": train.supervised_tokens,
            "loss": train.loss,
            "eval_loss": train.eval_loss,
            "best_step": train.best_step,
            "wall_ms": train.wall_ms,
            "agreement": train.agreement.as_ref().map(agreement_from_wire),
        });
    }
    let mut value = Map::new();
    if let Some(reward) = summary.reward {
        value.insert("reward".to_owned(), json!(reward));
    }
    let rest = json!({
        "stop": summary.stop,
        "reason": summary.reason,
        "task_id": summary.task_id,
        "task_kind": summary.task_kind,
        "turns": summary.turns,
        "tool_calls": summary.tool_calls,
        "tool_errors": summary.tool_errors,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "wall_ms": summary.wall_ms,
    });
    if let Value::Object(rest) = rest {
        value.extend(rest);
    }
    Value::Object(value)
}

/// The name of a kind of work.
pub fn kind(kind: v1::JobKind) -> &'static str {
    match kind {
        v1::JobKind::Unspecified => "unknown",
        v1::JobKind::Rollout => "rollout",
        v1::JobKind::Generate => "generate",
        v1::JobKind::Train => "train",
        v1::JobKind::Curate => "curate",
        v1::JobKind::Compare => "compare",
        v1::JobKind::Export => "export",
    }
}

/// The name of a state.
pub fn state(state: v1::JobState) -> &'static str {
    match state {
        v1::JobState::Unspecified => "unknown",
        v1::JobState::Blocked => "blocked",
        v1::JobState::Delayed => "delayed",
        v1::JobState::Ready => "ready",
        v1::JobState::Leased => "leased",
        v1::JobState::Succeeded => "succeeded",
        v1::JobState::Dead => "dead",
        v1::JobState::Cancelled => "cancelled",
    }
}

/// The name of a class of errors.
pub fn class(class: v1::ErrorClass) -> &'static str {
    match class {
        v1::ErrorClass::Unspecified => "unknown",
        v1::ErrorClass::Invalid => "invalid",
        v1::ErrorClass::Handler => "handler",
        v1::ErrorClass::Infra => "infra",
        v1::ErrorClass::Preempted => "preempted",
        v1::ErrorClass::Cancelled => "cancelled",
    }
}
