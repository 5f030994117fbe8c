//! `espalier traces reverify`: stored traces, judged again by the checks that are stored with them.
//!
//! Only checks over what the trace holds can be repeated: the answer, the final address, the tool calls. A trace
//! whose checks ask a page, a server or a hook keeps its verdict.

use clap::Args;
use espalier_agent_worker::verify::{Evidence, Offline, judge};
use espalier_core::id::{BatchId, JobKey};
use espalier_core::trace::edits::{Change, Patch};
use espalier_core::trace::{StopReason, Verdict};
use espalier_runtime::clock::{Clock, SystemClock};
use espalier_runtime::traces::Traces;
use futures::StreamExt;
use serde_json::{Value, json};

use super::source::{self, Found};
use super::{Filter, Place, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::output::{cut, note, table};
use crate::progress;

/// Who a correction says it is from.
const BY: &str = concat!("espalier traces reverify ", env!("CARGO_PKG_VERSION"));

/// Options of `traces reverify`.
#[derive(Args, Clone, Debug)]
pub struct Reverify {
    /// The batch
    #[arg(value_name = "BATCH")]
    pub batch: BatchId,
    /// Writes new verdicts as corrections beside the traces; `list`, `show` and `export` then use them
    #[arg(long)]
    pub write: bool,
    /// Which traces.
    #[command(flatten)]
    pub filter: Filter,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// What became of one trace.
#[derive(Clone, Debug, PartialEq)]
struct Judged {
    job: JobKey,
    old: Option<Verdict>,
    result: Judgement,
}

/// The new verdict, or why there is none.
#[derive(Clone, Debug, PartialEq)]
enum Judgement {
    /// As before.
    Same,
    /// Different.
    New(Verdict),
    /// It cannot be judged from what is stored.
    No(String),
}

/// Runs the command.
pub async fn run(context: &Context, args: &Reverify) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    if args.write && !matches!(source, Source::Store(_)) {
        return Err(Problem::refused(
            "corrections are written to the object store, and only the API is known",
        )
        .fix("name the store with --store URL"));
    }
    let entries = source.choose(&args.batch, &args.filter).await?;
    let bar = progress::things(entries.len() as u64, "judging");
    let mut judged = Vec::new();
    let mut traces = std::pin::pin!(source.load_all(entries));
    while let Some(trace) = traces.next().await {
        let one = again(&trace?).await;
        if let (true, Source::Store(traces), Judgement::New(verdict)) =
            (args.write, &source, &one.result)
        {
            write(traces, &one.job, verdict).await?;
        }
        judged.push(one);
        bar.inc(1);
    }
    bar.finish_and_clear();
    report(context, args, &judged)
}

/// Adds the verdict to the log of the trace.
async fn write(traces: &Traces, job: &JobKey, verdict: &Verdict) -> Result<(), Problem> {
    let loaded = source::load(traces, job).await?;
    let change = Change::Verdict {
        verdict: verdict.clone(),
    };
    let seen = loaded.curated.patches;
    let patch = Patch::new(change, BY, SystemClock.now(), seen);
    traces.patch(loaded, patch).await?;
    Ok(())
}

async fn again(found: &Found) -> Judged {
    let old = found.curated.verdict.clone();
    let result = match verdict(found).await {
        Err(reason) => Judgement::No(reason),
        Ok(new) if Some(&new) == old.as_ref() => Judgement::Same,
        Ok(new) => Judgement::New(new),
    };
    Judged {
        job: found.trace.header.job.clone(),
        old,
        result,
    }
}

/// What the checks find in the answer as it was corrected, and in the calls as they were made.
async fn verdict(found: &Found) -> Result<Verdict, String> {
    let trace = &found.trace;
    if trace.outcome.stop == StopReason::Unrecorded {
        return Err("it ended where nothing was recorded".to_owned());
    }
    let draft = trace
        .header
        .verify
        .as_ref()
        .ok_or("no checks are stored with it")?;
    let verify = draft.check().map_err(|errors| {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        texts.join("; ")
    })?;
    let evidence = Evidence {
        answer: found.curated.answer(),
        ..Evidence::from(trace)
    };
    judge(&verify, &evidence, &Offline)
        .await
        .map_err(|error| error.to_string())
}

fn report(context: &Context, args: &Reverify, judged: &[Judged]) -> Outcome {
    let changed = judged
        .iter()
        .filter(|one| matches!(one.result, Judgement::New(_)))
        .count();
    let skipped = judged
        .iter()
        .filter(|one| matches!(one.result, Judgement::No(_)))
        .count();
    context.out.show(
        || {
            json!({
                "batch": args.batch,
                "traces": judged.iter().map(judged_json).collect::<Vec<_>>(),
                "changed": changed,
                "not_judged": skipped,
                "written": args.write,
            })
        },
        || judged_table(judged),
    )?;
    if !context.out.json {
        note(format!(
            "{} judged, {changed} changed, {skipped} not judged",
            judged.len() - skipped
        ));
        if changed > 0 && !args.write {
            note("nothing was written: --write keeps the new verdicts");
        }
    }
    Ok(Exit::Ok)
}

fn judged_json(one: &Judged) -> Value {
    let old = one.old.as_ref().map(|verdict| verdict.reward);
    match &one.result {
        Judgement::Same => json!({"job": one.job, "old": old, "new": old}),
        Judgement::New(new) => {
            json!({"job": one.job, "old": old, "new": new.reward, "verdict": new})
        }
        Judgement::No(reason) => json!({"job": one.job, "old": old, "reason": reason}),
    }
}

fn judged_table(judged: &[Judged]) -> String {
    let reward = |verdict: Option<&Verdict>| {
        verdict
            .map(|v| format!("{:.3}", v.reward))
            .unwrap_or_default()
    };
    let rows = judged.iter().map(|one| {
        let (new, what) = match &one.result {
            Judgement::Same => (reward(one.old.as_ref()), "same".to_owned()),
            Judgement::New(verdict) => (reward(Some(verdict)), "changed".to_owned()),
            Judgement::No(reason) => (String::new(), cut(reason, 60)),
        };
        [
            format!("{}/{}", one.job.batch, one.job.job),
            reward(one.old.as_ref()),
            new,
            what,
        ]
    });
    table(["job", "old", "new", "result"], rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use espalier_core::spec::parse_line;
    use espalier_core::trace::edits::{self, Edit};
    use espalier_runtime::traces::workshop;

    fn found(verify: &str) -> Found {
        let draft =
            parse_line(format!(r#"{{"prompt":"x","verify":{verify}}}"#).as_bytes()).unwrap();
        let sampling = draft.check().unwrap().rollout().unwrap().sampling.clone();
        let file = json!({
            "timestamp": "20250529_130900", "model": "m", "tools": [],
            "messages": [{"role": "user", "content": "price?"}, {"role": "assistant", "content": "it costs 5"}],
        });
        let job = "default/b/j".parse().unwrap();
        let mut trace = workshop::read(file.to_string().as_bytes(), job, sampling).unwrap();
        trace.header.verify = draft.verify;
        trace.into()
    }

    #[tokio::test]
    async fn what_the_trace_holds_is_judged_again() {
        let mut found = found(r#"{"answer":{"number":5}}"#);
        let Judgement::New(verdict) = again(&found).await.result else {
            panic!("there was no verdict before");
        };
        assert_eq!(verdict.reward, 1.0);
        found.curated.verdict = Some(verdict);
        assert_eq!(again(&found).await.result, Judgement::Same);
    }

    #[tokio::test]
    async fn a_corrected_answer_is_what_is_judged() {
        let mut found = found(r#"{"answer":{"number":6}}"#);
        let content = "it costs 6".to_owned();
        let edits = vec![Edit::Content {
            message: 1,
            content,
        }];
        let patch = Patch::new(Change::Edit { edits }, "ann", SystemClock.now(), 0);
        found.curated = edits::apply(&found.trace, &[patch]);
        let judged = again(&found).await.result;
        assert!(matches!(judged, Judgement::New(verdict) if verdict.reward == 1.0));
    }

    #[tokio::test]
    async fn what_needs_a_live_rollout_keeps_its_verdict() {
        let judged = again(&found(r#"{"page":{"script":"() => true"}}"#)).await;
        assert!(matches!(judged.result, Judgement::No(reason) if reason.contains("live")));
        let mut unjudged = found(r#"{"answer":{"number":5}}"#);
        unjudged.trace.header.verify = None;
        assert!(matches!(again(&unjudged).await.result, Judgement::No(_)));
        let mut unrecorded = found(r#"{"answer":{"number":5}}"#);
        unrecorded.trace.outcome.stop = StopReason::Unrecorded;
        let judged = again(&unrecorded).await;
        assert!(matches!(judged.result, Judgement::No(reason) if reason.contains("recorded")));
    }
}
