//! `espalier traces render`: a trace as the model saw it, and whether the one template writes the same.

use clap::Args;
use espalier_core::trace::Trace;
use espalier_dataset::{Difference, Renderer, Rerendered, Source as Conversation, rerender};
use espalier_qwen3_text::{TOKENIZER_BYTES_MAX, Tokenizer, TokenizerError};
use espalier_runtime::fetch::{Fetcher, Source as Base, Wanted};
use espalier_runtime::tasks::blocking;
use serde_json::{Value, json};

use super::{Place, Source};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};
use crate::jobs::JobName;
use crate::output::{count, plain, table};

/// Options of `traces render`.
#[derive(Args, Clone, Debug)]
pub struct Render {
    /// The job that made it
    #[arg(value_name = "BATCH/JOB")]
    pub job: JobName,
    /// Holds what was sampled against what the template writes, and shows the first token that differs; exit code 1 if any
    #[arg(long)]
    pub diff: bool,
    /// The model whose tokenizer it is, as `espalier train --base` takes it [default: the one that all of Qwen3 have]
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<String>,
    /// Where traces are.
    #[command(flatten)]
    pub place: Place,
}

/// Runs `traces render`.
pub async fn run(context: &Context, args: &Render) -> Outcome {
    let source = Source::open(context, &args.place).await?;
    let job = args.job.key(context.project()?);
    let trace = source.find(&job).await?.trace;
    let tokenizer = tokenizer(context, args.tokenizer.as_deref()).await?;
    if !args.diff {
        let text = text(&trace, &tokenizer)?;
        context
            .out
            .show(|| json!({"text": text}), || plain(&text))?;
        return Ok(Exit::Ok);
    }
    let (own, held) = (tokenizer.clone(), Conversation::of_trace(&trace));
    let held = held.map_err(|error| Problem::failed(error.to_string()))?;
    let again = blocking("traces.render", move || {
        rerender(&held, &mut Renderer::new(&own))
    });
    let calls = again.await.map_err(unrendered)?.map_err(unrendered)?;
    let differing = calls
        .iter()
        .filter(|call| call.difference.is_some())
        .count();
    context.out.show(
        || {
            let calls: Vec<Value> = calls.iter().map(|call| call_json(call, &tokenizer)).collect();
            json!({"job": job, "calls": calls, "unknown": trace.model_calls.len() - calls.len(), "differing": differing})
        },
        || told(&calls, trace.model_calls.len(), &tokenizer),
    )?;
    Ok(if differing > 0 {
        Exit::Failed
    } else {
        Exit::Ok
    })
}

fn unrendered(error: impl std::error::Error + 'static) -> Problem {
    Problem::failed(espalier_runtime::telemetry::error_chain(&error))
}

async fn tokenizer(context: &Context, model: Option<&str>) -> Result<Tokenizer, Problem> {
    let folder = match model {
        None => None,
        Some(model) => {
            let base = Base::parse(model, None).await.map_err(unrendered)?;
            let wanted = Wanted::Tokenizer {
                bytes_max: TOKENIZER_BYTES_MAX,
            };
            let fetcher = Fetcher::new(&context.environment, None);
            Some(fetcher.fetch(&base, wanted).await.map_err(unrendered)?)
        }
    };
    let read = move || -> Result<Tokenizer, TokenizerError> {
        let file = folder.as_deref().map(Tokenizer::file_of).transpose()?;
        match file.flatten() {
            Some(json) => Tokenizer::from_json(&json),
            None => Tokenizer::shared().cloned().map_err(TokenizerError::Own),
        }
    };
    let read = blocking("tokenizer.load", read).await;
    read.map_err(unrendered)?.map_err(unrendered)
}

/// The whole conversation by the template.
fn text(trace: &Trace, tokenizer: &Tokenizer) -> Result<String, Problem> {
    let tools: Vec<Value> = trace.header.tools.iter().map(|tool| json!(tool)).collect();
    let rendered = Renderer::new(tokenizer).render(&trace.messages, &tools, &[]);
    let ids = rendered.map_err(unrendered)?.ids;
    tokenizer.decode(&ids).map_err(unrendered)
}

fn call_json(call: &Rerendered, tokenizer: &Tokenizer) -> Value {
    let difference = call.difference.as_ref().map(|found| {
        json!({
            "part": found.part.as_str(), "at": found.at, "before": spelt(&found.before, tokenizer),
            "recorded": token_json(found.recorded, tokenizer), "rendered": token_json(found.rendered, tokenizer),
        })
    });
    json!({"message": call.message, "prompt_tokens": call.prompt, "completion_tokens": call.completion, "difference": difference})
}

fn token_json(id: Option<u32>, tokenizer: &Tokenizer) -> Value {
    id.map_or(
        Value::Null,
        |id| json!({"id": id, "text": spelt(&[id], tokenizer)}),
    )
}

fn told(calls: &[Rerendered], all: usize, tokenizer: &Tokenizer) -> String {
    let row = |call: &Rerendered| {
        let prompt = call
            .prompt
            .map_or("?".to_owned(), |tokens| count(tokens as u64));
        [
            call.message.to_string(),
            prompt,
            count(call.completion as u64),
            call.difference
                .as_ref()
                .map_or("the same".to_owned(), |found| words(found, tokenizer)),
        ]
    };
    let mut text = table(
        ["message", "prompt", "completion", "rendered again"],
        calls.iter().map(row).collect(),
    );
    if calls.len() < all {
        text += &format!(
            "\n{} calls of {} have no recorded token ids",
            all - calls.len(),
            count(all as u64)
        );
    }
    text
}

fn words(found: &Difference, tokenizer: &Tokenizer) -> String {
    let token = |id: Option<u32>| match id {
        Some(id) => format!("{:?} ({id})", spelt(&[id], tokenizer)),
        None => "its end".to_owned(),
    };
    format!(
        "{} token {}: recorded {}, rendered {}, after {:?}",
        found.part.as_str(),
        found.at,
        token(found.recorded),
        token(found.rendered),
        spelt(&found.before, tokenizer)
    )
}

/// The text of ids; of those that no vocabulary has, their numbers.
fn spelt(ids: &[u32], tokenizer: &Tokenizer) -> String {
    tokenizer.decode(ids).unwrap_or_else(|_| format!("{ids:?}"))
}
