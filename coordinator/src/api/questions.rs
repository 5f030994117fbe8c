//! Listing what running rollouts ask, and answering it.

use espalier_core::id::ProjectId;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::tasks::with_deadline;

use super::page::{self, List};
use super::{Shared, find_batch};
use crate::questions::{NotAnswered, Place};
use crate::session;

/// A page of open questions.
pub async fn list(
    shared: &Shared,
    project: ProjectId,
    request: v1::ListQuestionsRequest,
) -> Result<v1::ListQuestionsResponse, ApiError> {
    let size = page::size(request.page_size)?;
    let list = List::of("ListQuestions")
        .with(project.as_str())
        .with(&request.batch);
    let after: Option<Place> = match list.after(&request.page_token)? {
        Some(place) => Some(place.parse()?),
        None => None,
    };
    let batch = match request.batch.as_str() {
        "" => None,
        name => Some(find_batch(shared, project.clone(), name).await?.batch),
    };
    let open = shared.questions.list(
        &project,
        batch.as_ref(),
        after.as_ref(),
        size + 1,
        shared.now(),
    );
    let rows = open.len();
    let (places, questions): (Vec<Place>, Vec<_>) = open.into_iter().unzip();
    let questions = page::fitting(questions.into_iter().take(size));
    let last = places.get(questions.len().wrapping_sub(1));
    let last = last.filter(|_| questions.len() < rows);
    Ok(v1::ListQuestionsResponse {
        next_page_token: last
            .map(|place| list.token(&place.to_string()))
            .unwrap_or_default(),
        questions,
    })
}

/// Keeps the answer and hands it to the worker. Without a stream it waits for the worker to ask again.
pub async fn answer(
    shared: &Shared,
    project: &ProjectId,
    request: v1::AnswerQuestionRequest,
) -> Result<(), ApiError> {
    let (id, allow) = (request.id, request.allow);
    let answered = shared.questions.answer(project, &id, allow, shared.now());
    let addressee = answered.map_err(|why| match why {
        NotAnswered::Unknown => ApiError::NotFound {
            what: "open question",
            name: id.clone(),
        },
        NotAnswered::Otherwise(earlier) => {
            let said = if earlier { "allowed" } else { "refused" };
            ApiError::Conflict(format!("question `{id}` was answered before: {said}"))
        }
    })?;
    let Some(connected) = shared.registry.find(&addressee.worker) else {
        return Ok(());
    };
    let answer = v1::coordinator_message::Message::Answer(v1::Answer { id, allow });
    let sent = connected.outbox().send(Ok(session::message(answer)));
    match with_deadline("session.answer", session::SEND_LIMIT, sent).await {
        // A stream that has just ended: the worker asks again on the next one.
        Ok(_) => Ok(()),
        Err(_) => Err(ApiError::Unavailable(
            "the worker does not take the answer now; send it again".to_owned(),
        )),
    }
}
