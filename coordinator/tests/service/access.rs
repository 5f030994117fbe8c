//! Who may call what, and what everybody may see.

use espalier_proto::status::field_error;
use espalier_proto::v1;
use espalier_proto::v1::admin_service_client::AdminServiceClient;
use espalier_proto::v1::model_service_client::ModelServiceClient;
use espalier_proto::v1::worker_service_client::WorkerServiceClient;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_prost::ProstCodec;

use crate::support::*;

/// The status codes of every call of the API with one token.
async fn codes(coordinator: &Coordinator, token: &str) -> Vec<(&'static str, Code)> {
    let mut jobs = coordinator.jobs(token);
    let mut admin = AdminServiceClient::new(coordinator.channel(token));
    let mut models = ModelServiceClient::new(coordinator.channel(token));
    let mut worker = WorkerServiceClient::new(coordinator.channel(token));
    macro_rules! code {
        ($client:ident . $call:ident ( $request:expr )) => {
            (
                stringify!($call),
                $client
                    .$call($request)
                    .await
                    .err()
                    .map_or(Code::Ok, |s| s.code()),
            )
        };
    }
    vec![
        code!(jobs.open_batch(v1::OpenBatchRequest::default())),
        code!(jobs.submit_chunk(v1::SubmitChunkRequest::default())),
        code!(jobs.close_batch(v1::CloseBatchRequest::default())),
        code!(jobs.get_batch(v1::GetBatchRequest::default())),
        code!(jobs.list_batches(v1::ListBatchesRequest::default())),
        code!(jobs.get_job(v1::GetJobRequest::default())),
        code!(jobs.list_jobs(v1::ListJobsRequest::default())),
        code!(jobs.watch_batch(v1::WatchBatchRequest::default())),
        code!(jobs.cancel(v1::CancelRequest::default())),
        code!(jobs.retry(v1::RetryRequest::default())),
        code!(jobs.list_questions(v1::ListQuestionsRequest::default())),
        code!(jobs.answer_question(v1::AnswerQuestionRequest::default())),
        code!(jobs.get_trace(v1::GetTraceRequest::default())),
        code!(models.get_model(v1::GetModelRequest::default())),
        code!(worker.session(tokio_stream::empty())),
        code!(admin.get_queues(v1::GetQueuesRequest::default())),
        code!(admin.list_workers(v1::ListWorkersRequest::default())),
        code!(admin.drain_worker(v1::DrainWorkerRequest::default())),
        code!(admin.get_info(v1::GetInfoRequest::default())),
    ]
}

fn refused(codes: &[(&'static str, Code)]) -> Vec<&'static str> {
    let refused = codes.iter().filter(|(_, c)| *c == Code::PermissionDenied);
    refused.map(|(call, _)| *call).collect()
}

#[tokio::test]
async fn every_call_asks_for_its_role() {
    let coordinator = Coordinator::start().await;
    for (call, code) in codes(&coordinator, "nobody's").await {
        assert_eq!(code, Code::Unauthenticated, "{call}");
    }
    let by_reader = codes(&coordinator, READER).await;
    let expected = [
        "open_batch",
        "submit_chunk",
        "close_batch",
        "cancel",
        "retry",
        "answer_question",
        "session",
        "get_queues",
        "list_workers",
        "drain_worker",
        "get_info",
    ];
    assert_eq!(refused(&by_reader), expected);
    let by_worker = codes(&coordinator, WORKER).await;
    assert_eq!(refused(&by_worker).len(), 18);
    let by_admin = codes(&coordinator, ADMIN).await;
    assert_eq!(refused(&by_admin).len(), 15);
}

/// The status of a call whose message never comes.
async fn without_a_message(coordinator: &Coordinator, token: &str, call: &'static str) -> Status {
    let mut client = Grpc::new(coordinator.channel(token));
    client.ready().await.unwrap();
    let nothing = Request::new(tokio_stream::pending::<v1::SubmitChunkRequest>());
    let codec = ProstCodec::<_, v1::SubmitChunkResponse>::default();
    let answer = client.client_streaming(nothing, PathAndQuery::from_static(call), codec);
    soon(answer).await.unwrap_err()
}

#[tokio::test]
async fn who_is_nobody_is_refused_before_the_message_is_read() {
    let coordinator = Coordinator::start().await;
    for call in [
        "/espalier.v1.JobService/SubmitChunk",
        "/espalier.v1.AdminService/GetInfo",
        "/espalier.v1.WorkerService/Session",
    ] {
        let status = without_a_message(&coordinator, "nobody's", call).await;
        assert_eq!(status.code(), Code::Unauthenticated, "{call}: {status}");
    }
}

#[tokio::test]
async fn requests_of_a_few_names_cannot_be_large() {
    let coordinator = Coordinator::start().await;
    let service = "x".repeat(1 << 20);
    let mut health = HealthClient::new(coordinator.channel("nobody's"));
    let status = health
        .check(HealthCheckRequest {
            service: service.clone(),
        })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    let request = v1::DrainWorkerRequest { worker: service };
    let status = coordinator.admin().drain_worker(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

#[tokio::test]
async fn an_operator_of_one_project_does_not_touch_the_workers_of_all() {
    let coordinator = Coordinator::start().await;
    let mut worker = coordinator.worker("w1", 1).await;
    let by_bank = codes(&coordinator, BANK_ADMIN).await;
    let of_operators: Vec<_> = by_bank
        .iter()
        .skip_while(|(call, _)| *call != "get_queues")
        .collect();
    assert_eq!(
        of_operators,
        [
            &("get_queues", Code::Ok),
            &("list_workers", Code::PermissionDenied),
            &("drain_worker", Code::PermissionDenied),
            &("get_info", Code::PermissionDenied),
        ]
    );
    let mut admin = AdminServiceClient::new(coordinator.channel(BANK_ADMIN));
    let drain = v1::DrainWorkerRequest {
        worker: "w1".to_owned(),
    };
    let status = admin.drain_worker(drain).await.unwrap_err();
    assert!(status.message().contains("project `*`"), "{status}");

    // The worker was told nothing: it still gets jobs.
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    submit(&mut jobs, "b1", 0, vec![plain("a")]).await;
    worker.credit(1).await;
    assert_eq!(worker.grants(1).await.len(), 1);
}

#[tokio::test]
async fn another_projects_things_do_not_exist() {
    let coordinator = Coordinator::start().await;
    let (mut shop, mut bank) = (coordinator.jobs(SHOP), coordinator.jobs(BANK));
    open(&mut shop, "b1").await;
    submit(&mut shop, "b1", 0, vec![plain("j1")]).await;

    let get = |batch: &str| v1::GetBatchRequest {
        batch: batch.to_owned(),
    };
    let foreign = bank.get_batch(get("b1")).await.unwrap_err();
    let absent = bank.get_batch(get("b2")).await.unwrap_err();
    assert_eq!(foreign.code(), Code::NotFound);
    assert_eq!(
        foreign.message().replace("b1", "b2"),
        absent.message(),
        "a foreign batch must look like an absent one"
    );
    let job = v1::GetJobRequest {
        batch: "b1".to_owned(),
        id: "j1".to_owned(),
    };
    assert_eq!(bank.get_job(job).await.unwrap_err().code(), Code::NotFound);
    let target = Some(v1::cancel_request::Target::Batch("b1".to_owned()));
    let cancel = bank.cancel(v1::CancelRequest { target }).await;
    assert_eq!(cancel.unwrap_err().code(), Code::NotFound);
    let jobs = vec![plain("j2")];
    let batch = "b1".to_owned();
    let chunk = v1::SubmitChunkRequest {
        batch,
        chunk: 0,
        jobs,
    };
    assert_eq!(
        bank.submit_chunk(chunk).await.unwrap_err().code(),
        Code::NotFound
    );

    // The same name in another project is another batch.
    open(&mut bank, "b1").await;
    let batches = bank.list_batches(v1::ListBatchesRequest::default()).await;
    let batches = batches.unwrap().into_inner().batches;
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].counts, Some(v1::Counts::default()));
}

#[tokio::test]
async fn health_is_open_and_turns_when_draining() {
    let coordinator = Coordinator::start().await;
    let mut health = HealthClient::new(coordinator.channel("nobody's"));
    let service = "espalier.v1.JobService".to_owned();
    let mut watched = health
        .watch(HealthCheckRequest { service })
        .await
        .unwrap()
        .into_inner();
    let first = soon(watched.message()).await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    coordinator.shutdown.drain();
    let second = soon(watched.message()).await.unwrap().unwrap();
    assert_eq!(second.status(), ServingStatus::NotServing);
    drop(watched);
    coordinator.end().await.unwrap();
}

#[tokio::test]
async fn operators_see_what_is_in_progress_in_their_projects_alone() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    for batch in ["b1", "b2"] {
        open(&mut jobs, batch).await;
        submit(&mut jobs, batch, 0, vec![plain("a"), plain("b")]).await;
    }
    let request = |batches_max| v1::GetQueuesRequest { batches_max };
    let mut of_bank = AdminServiceClient::new(coordinator.channel(BANK_ADMIN));
    let nothing = of_bank.get_queues(request(10)).await.unwrap().into_inner();
    assert_eq!(nothing, v1::GetQueuesResponse::default());

    let mut admin = coordinator.admin();
    let all = admin.get_queues(request(10)).await.unwrap().into_inner();
    let names: Vec<&str> = all.batches.iter().map(|b| b.batch.as_str()).collect();
    assert_eq!(names, ["b2", "b1"], "newest first");
    assert_eq!(all.by_kind[0].kind(), v1::JobKind::Rollout);
    assert_eq!((all.by_kind[0].ready, all.open_questions), (4, 0));
    let one = admin.get_queues(request(1)).await.unwrap().into_inner();
    assert_eq!(one.batches, all.batches[..1]);
    let none = admin.get_queues(request(0)).await.unwrap().into_inner();
    assert_eq!(none.batches, []);
    let refused = admin.get_queues(request(1_001)).await.unwrap_err();
    assert_eq!(field_error(&refused).unwrap().field, "batches_max");
}

#[tokio::test]
async fn operators_see_queues_workers_and_what_this_is() {
    let coordinator = Coordinator::start().await;
    let mut jobs = coordinator.jobs(SHOP);
    open(&mut jobs, "b1").await;
    submit(&mut jobs, "b1", 0, vec![plain("a"), plain("b")]).await;
    let mut worker = coordinator.worker("w1", 1).await;
    worker.credit(1).await;
    worker.grants(1).await;

    let channel = coordinator.channel(BANK_ADMIN);
    let mut of_bank = AdminServiceClient::new(channel);
    let queues = of_bank
        .get_queues(v1::GetQueuesRequest::default())
        .await
        .unwrap();
    assert_eq!(queues.get_ref().queues, []);
    let mut admin = coordinator.admin();
    let queues = admin
        .get_queues(v1::GetQueuesRequest::default())
        .await
        .unwrap();
    let shop = &queues.get_ref().queues[0];
    assert_eq!(
        (shop.project.as_str(), shop.ready, shop.leased),
        ("shop", 1, 1)
    );
    let workers = admin
        .list_workers(v1::ListWorkersRequest::default())
        .await
        .unwrap();
    let seen = &workers.get_ref().workers[0];
    assert_eq!(
        (seen.worker.as_str(), seen.capacity, seen.running),
        ("w1", 1, 1)
    );
    assert_eq!((seen.granted, seen.coordinator.is_empty()), (1, false));
    assert!(workers.get_ref().now_us >= seen.last_seen_us && seen.last_seen_us > 0);
    let info = admin.get_info(v1::GetInfoRequest {}).await.unwrap();
    assert_eq!(info.get_ref().mcp_servers, ["browser"]);

    let drain = |worker: &str| v1::DrainWorkerRequest {
        worker: worker.to_owned(),
    };
    let unknown = admin.drain_worker(drain("nobody")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    admin.drain_worker(drain("w1")).await.unwrap();
    worker.credit(1).await;
    let lease = worker_lease(&mut jobs, "a").await;
    // The credit was read before this result, so that a grant would have come before its answer.
    let ack = worker.report(lease.clone(), success(&lease)).await;
    assert_eq!(ack.verdict(), v1::result_ack::Verdict::Accepted);
    let job = get_job(&mut jobs, "b1", "b").await;
    assert_eq!(job.state(), v1::JobState::Ready);
}

async fn worker_lease(jobs: &mut Jobs, id: &str) -> v1::Lease {
    let fence = get_job(jobs, "b1", id).await.fence;
    let job = format!("shop/b1/{id}");
    v1::Lease { job, fence }
}
