//! A rollout asks, a person answers.

use espalier_proto::v1;
use espalier_proto::v1::coordinator_message::Message as Heard;
use espalier_proto::v1::worker_message::Message as Said;
use tonic::Code;

use crate::support::*;

fn ask(lease: &v1::Lease, id: &str) -> Said {
    Said::Ask(v1::Ask {
        lease: Some(lease.clone()),
        question: Some(v1::Question {
            id: id.to_owned(),
            tool: "browser_click".to_owned(),
            arguments_json: "{}".to_owned(),
            deadline_us: u64::MAX,
            ..v1::Question::default()
        }),
    })
}

async fn open_questions(jobs: &mut Jobs) -> Vec<v1::Question> {
    let request = v1::ListQuestionsRequest::default();
    let listed = jobs.list_questions(request).await.unwrap();
    listed.into_inner().questions
}

#[tokio::test]
async fn an_answer_reaches_the_rollout_that_asked() {
    let coordinator = Coordinator::start().await;
    let (mut shop, mut bank) = (coordinator.jobs(SHOP), coordinator.jobs(BANK));
    open(&mut shop, "b1").await;
    submit(&mut shop, "b1", 0, vec![plain("j")]).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    worker.say(ask(&lease, "q1")).await;
    let question = loop {
        if let Some(question) = open_questions(&mut shop).await.pop() {
            break question;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(
        (question.batch.as_str(), question.job.as_str()),
        ("b1", "j")
    );
    assert!(open_questions(&mut bank).await.is_empty());

    let answer = |allow| v1::AnswerQuestionRequest {
        id: "q1".to_owned(),
        allow,
    };
    let foreign = bank.answer_question(answer(true)).await.unwrap_err();
    assert_eq!(foreign.code(), Code::NotFound);
    shop.answer_question(answer(true)).await.unwrap();
    let expected = v1::Answer {
        id: "q1".to_owned(),
        allow: true,
    };
    assert_eq!(worker.hear().await, Heard::Answer(expected.clone()));
    assert!(open_questions(&mut shop).await.is_empty());
    let second = shop.answer_question(answer(false)).await.unwrap_err();
    assert_eq!(second.code(), Code::FailedPrecondition);

    // A worker that did not get the answer asks again.
    worker.say(ask(&lease, "q1")).await;
    assert_eq!(worker.hear().await, Heard::Answer(expected));
}

#[tokio::test]
async fn who_holds_no_lease_is_refused() {
    let coordinator = Coordinator::start().await;
    let mut worker = coordinator.worker("w1", 1).await;
    let lease = v1::Lease {
        job: "shop/b1/j".to_owned(),
        fence: 5,
    };
    worker.say(ask(&lease, "q1")).await;
    let refused = v1::Answer {
        id: "q1".to_owned(),
        allow: false,
    };
    assert_eq!(worker.hear().await, Heard::Answer(refused));
}
