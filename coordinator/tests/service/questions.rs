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
            time_left_ms: u64::MAX,
            ..v1::Question::default()
        }),
    })
}

async fn leased(coordinator: &Coordinator, shop: &mut Jobs) -> (Worker, v1::Lease) {
    open(shop, "b1").await;
    submit(shop, "b1", 0, vec![plain("j")]).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    let lease = worker.grants(1).await.remove(0).lease.unwrap();
    (worker, lease)
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
    let (mut worker, lease) = leased(&coordinator, &mut shop).await;
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
async fn many_questions_come_in_pages_that_clients_take_by_default() {
    const QUESTIONS: u32 = 1_100;
    let coordinator = Coordinator::start().await;
    let mut shop = coordinator.jobs(SHOP);
    let (worker, lease) = leased(&coordinator, &mut shop).await;
    for n in 0..QUESTIONS {
        let Said::Ask(mut asked) = ask(&lease, &format!("q{n:04}")) else {
            unreachable!()
        };
        asked.question.as_mut().unwrap().arguments_json = "x".repeat(4 * 1024);
        worker.say(Said::Ask(asked)).await;
    }
    let mut events = shop
        .watch_batch(v1::WatchBatchRequest {
            batch: "b1".to_owned(),
            after_cursor: 0,
        })
        .await
        .unwrap()
        .into_inner();
    while soon(events.message())
        .await
        .unwrap()
        .unwrap()
        .open_questions
        < QUESTIONS
    {}

    let mut request = v1::ListQuestionsRequest {
        batch: "b1".to_owned(),
        page_size: 1_000,
        page_token: String::new(),
    };
    let (mut ids, mut pages) = (Vec::new(), 0);
    loop {
        let page = shop.list_questions(request.clone()).await.unwrap();
        let page = page.into_inner();
        ids.extend(page.questions.into_iter().map(|q| q.id));
        pages += 1;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let expected: Vec<String> = (0..QUESTIONS).map(|n| format!("q{n:04}")).collect();
    assert_eq!((ids, pages), (expected, 2));

    let first = v1::ListQuestionsRequest {
        page_size: 1,
        page_token: String::new(),
        ..request
    };
    let token = shop.list_questions(first.clone()).await.unwrap();
    let elsewhere = v1::ListQuestionsRequest {
        batch: String::new(),
        page_token: token.into_inner().next_page_token,
        ..first
    };
    let refused = shop.list_questions(elsewhere).await.unwrap_err();
    assert_eq!(field(&refused), "page_token");
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
