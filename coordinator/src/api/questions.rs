//! Listing what running rollouts ask, and answering it.

use espalier_core::id::{BatchId, ProjectId};
use espalier_core::time::Timestamp;
use espalier_proto::status::ApiError;
use espalier_proto::v1;

use super::page::{self, List};
use super::{Shared, find_batch, queue_error};
use crate::peers::{self, Answer, Order};
use crate::questions::{self, Place, Wanted};

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
    let wanted = Wanted {
        project: &project,
        batch: batch.as_ref(),
        after: after.as_ref(),
        limit: size + 1,
        now: shared.now(),
    };
    let others = shared.peers.questions().await.map_err(queue_error)?;
    let mut open = shared.questions.list(&wanted);
    let elsewhere = shared.questions.unknown(&others);
    open.extend(questions::list(elsewhere.into_iter(), &wanted));
    open.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    open.truncate(size + 1);
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

/// How many questions of a batch are open, wherever its workers are connected.
pub async fn count(
    shared: &Shared,
    project: &ProjectId,
    batch: &BatchId,
    now: Timestamp,
) -> Result<u32, ApiError> {
    let others = shared.peers.questions().await.map_err(queue_error)?;
    Ok(shared.questions.count(&others, project, Some(batch), now))
}

/// Keeps the answer and lets it be handed to the worker, wherever it is connected. Without a stream it waits for the
/// worker to ask again.
pub async fn answer(
    shared: &Shared,
    project: &ProjectId,
    request: v1::AnswerQuestionRequest,
) -> Result<(), ApiError> {
    let v1::AnswerQuestionRequest { id, allow } = request;
    let now = shared.now();
    let question = match shared.questions.find(&id, now) {
        Some(question) => Some(question),
        None => {
            let others = shared.peers.questions().await.map_err(queue_error)?;
            others.get(&id).filter(|q| q.deadline > now).cloned()
        }
    };
    let question = question.filter(|question| question.key.project == *project);
    let question = question.ok_or_else(|| ApiError::NotFound {
        what: "open question",
        name: id.clone(),
    })?;
    if let Some(earlier) = question.answer.filter(|earlier| *earlier != allow) {
        let said = if earlier { "allowed" } else { "refused" };
        let conflict = format!("question `{id}` was answered before: {said}");
        return Err(ApiError::Conflict(conflict));
    }
    let answer = Answer {
        job: question.key,
        question: id,
        allow,
        until: question.deadline,
    };
    peers::give(shared, &Order::Answer(answer)).await
}
