//! `espalier questions` and `answer`: tools under `ask` wait here for a person.

use clap::{Args, ValueEnum};
use espalier_proto::v1;
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{cut, duration, note, table};

/// Questions that one request asks for: the API's limit.
const PAGE_SIZE: u32 = 1000;

/// Options of `questions`.
#[derive(Args, Clone, Debug)]
pub struct Questions {
    /// Only of this batch
    #[arg(value_name = "BATCH")]
    pub batch: Option<String>,
}

/// Options of `answer`.
#[derive(Args, Clone, Debug)]
pub struct Answer {
    /// The question's id, from `espalier questions`
    #[arg(value_name = "ID")]
    pub id: String,
    /// Whether the call may run
    #[arg(value_enum)]
    pub decision: Decision,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Decision {
    /// The call runs
    Allow,
    /// The model is told that it was rejected
    Deny,
}

/// `espalier questions`.
pub async fn list(context: &Context, args: &Questions) -> Outcome {
    let client = context.client().await?;
    let mut request = v1::ListQuestionsRequest {
        batch: args.batch.clone().unwrap_or_default(),
        page_size: PAGE_SIZE,
        page_token: String::new(),
    };
    let mut questions = Vec::new();
    loop {
        let page = client.jobs().list_questions(request.clone()).await?;
        let page = page.into_inner();
        questions.extend(page.questions);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    context.out.show(
        || json!({"questions": questions.iter().map(question_json).collect::<Vec<_>>()}),
        || questions_table(&questions),
    )?;
    if let Some(first) = questions.first() {
        note(format!("answer with: espalier answer {} allow", first.id));
    }
    Ok(Exit::Ok)
}

fn question_json(question: &v1::Question) -> Value {
    json!({
        "id": question.id,
        "batch": question.batch,
        "job": question.job,
        "tool": question.tool,
        "arguments_json": question.arguments_json,
        "time_left_ms": question.time_left_ms,
    })
}

fn questions_table(questions: &[v1::Question]) -> String {
    let rows = questions.iter().map(|question| {
        [
            question.id.clone(),
            format!("{}/{}", question.batch, question.job),
            question.tool.clone(),
            cut(&question.arguments_json, 60),
            duration(question.time_left_ms),
        ]
    });
    table(
        ["id", "job", "tool", "arguments", "time left"],
        rows.collect(),
    )
}

/// `espalier answer`.
pub async fn answer(context: &Context, args: &Answer) -> Outcome {
    let client = context.client().await?;
    let allow = args.decision == Decision::Allow;
    let request = v1::AnswerQuestionRequest {
        id: args.id.clone(),
        allow,
    };
    client.jobs().answer_question(request).await?;
    context.out.show(
        || json!({"id": args.id, "allow": allow}),
        || if allow { "allowed" } else { "denied" }.to_owned(),
    )?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_questions() {
        let question = v1::Question {
            id: "q1".to_owned(),
            batch: "b".to_owned(),
            job: "j".to_owned(),
            tool: "pay".to_owned(),
            arguments_json: "{\"amount\":5}".to_owned(),
            time_left_ms: 60_000,
        };
        let expected =
            " ID  JOB  TOOL  ARGUMENTS     TIME LEFT\n q1  b/j  pay   {\"amount\":5}  1 min 00 s";
        assert_eq!(questions_table(&[question]), expected);
    }
}
