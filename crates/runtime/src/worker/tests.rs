//! The loop against coordinators that the test plays by hand, over real gRPC.

mod moving;
mod once;

use std::pin::Pin;
use std::sync::Mutex;

use espalier_core::layout;
use espalier_core::spec::parse_line;
use espalier_core::trace::sha256_hex;
use espalier_core::trace::{RolloutSummary, StopReason, Totals};
use espalier_proto::convert::encode_draft;
use espalier_proto::v1::coordinator_message::Message as FromCoordinator;
use espalier_proto::v1::result::Outcome;
use espalier_proto::v1::result_ack::Verdict;
use espalier_proto::v1::worker_message::Message as ToCoordinator;
use espalier_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::net;
use crate::store::faults::{Fault, Faults};
use crate::tasks::{OnFailure, TaskHandle, with_deadline};

const SOON: Duration = Duration::from_secs(10);
const TTL_MS: u64 = 60_000;

/// One session, seen from the coordinator.
struct Session {
    /// Which of the coordinators.
    at: usize,
    from: Streaming<v1::WorkerMessage>,
    to: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
}

impl Session {
    async fn send(&self, message: FromCoordinator) {
        let message = Some(message);
        self.to
            .send(Ok(v1::CoordinatorMessage { message }))
            .await
            .unwrap();
    }

    /// The next message that `pick` takes.
    async fn expect<T>(
        &mut self,
        name: &'static str,
        pick: impl Fn(ToCoordinator) -> Option<T>,
    ) -> T {
        let found = async {
            loop {
                let message = self
                    .from
                    .message()
                    .await
                    .unwrap()
                    .expect("the worker went away");
                if let Some(found) = message.message.and_then(&pick) {
                    return found;
                }
            }
        };
        with_deadline(name, SOON, found).await.unwrap()
    }

    async fn hello(&mut self, lost: Vec<v1::Lease>) -> v1::Hello {
        let hello = self.expect("hello", |m| match m {
            ToCoordinator::Hello(hello) => Some(hello),
            _ => None,
        });
        let hello = hello.await;
        let lease_ttl_ms = TTL_MS;
        self.send(FromCoordinator::Welcome(v1::Welcome { lost, lease_ttl_ms }))
            .await;
        hello
    }

    async fn credit(&mut self) -> u32 {
        self.expect("credit", |m| match m {
            ToCoordinator::Credit(credit) => Some(credit.jobs),
            _ => None,
        })
        .await
    }

    async fn result(&mut self) -> v1::Result {
        self.expect("result", |m| match m {
            ToCoordinator::Results(mut results) => results.results.pop(),
            _ => None,
        })
        .await
    }

    async fn acknowledge(&self, result: &v1::Result) {
        let ack = v1::ResultAck {
            lease: result.lease.clone(),
            verdict: Verdict::Accepted.into(),
            reason: String::new(),
        };
        let acks = vec![ack];
        self.send(FromCoordinator::ResultAcks(v1::ResultAcks { acks }))
            .await;
    }

    async fn grant(&self, job: &str, lease_ttl_ms: u64) {
        let draft = parse_line(format!(r#"{{"prompt": "{job}"}}"#).as_bytes()).unwrap();
        self.grant_spec(job, encode_draft(&draft), String::new(), lease_ttl_ms)
            .await;
    }

    async fn grant_spec(&self, job: &str, spec: Bytes, spec_path: String, lease_ttl_ms: u64) {
        let grant = v1::Grant {
            lease: Some(lease(job)),
            attempt: 1,
            spec,
            spec_path,
            lease_ttl_ms,
            earlier_fences: vec![],
            traceparent: String::new(),
        };
        let grants = vec![grant];
        self.send(FromCoordinator::Grants(v1::Grants { grants }))
            .await;
    }
}

fn lease(job: &str) -> v1::Lease {
    v1::Lease {
        job: format!("p/b/{job}"),
        fence: 7,
    }
}

fn class(result: &v1::Result) -> v1::ErrorClass {
    match &result.outcome {
        Some(Outcome::Failure(failure)) => failure.error.as_ref().unwrap().class(),
        other => panic!("no failure: {other:?}"),
    }
}

/// Hands each session to the test.
struct Fake {
    at: usize,
    sessions: mpsc::Sender<Session>,
}

#[tonic::async_trait]
impl WorkerService for Fake {
    type SessionStream =
        Pin<Box<dyn futures::Stream<Item = Result<v1::CoordinatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (to, replies) = mpsc::channel(16);
        let from = request.into_inner();
        let at = self.at;
        self.sessions
            .send(Session { at, from, to })
            .await
            .map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// Does what the job's id says.
#[derive(Default)]
struct ById {
    started: Mutex<Vec<String>>,
    stopped: Mutex<Vec<Option<Stop>>>,
}

impl Handler for ById {
    fn kind(&self) -> v1::JobKind {
        v1::JobKind::Rollout
    }

    async fn run(&self, grant: Grant, context: JobContext) -> JobOutcome {
        self.started.lock().unwrap().push(grant.key.job.to_string());
        let published = JobOutcome::Published {
            manifest: layout::manifest(&grant.key),
            summary: Summary::Rollout(RolloutSummary {
                reward: None,
                stop: StopReason::Answered,
                reason: String::new(),
                task_id: String::new(),
                task_kind: String::new(),
                totals: Totals::default(),
            }),
            spawn: vec![],
        };
        match grant.key.job.as_str() {
            "panic" => panic!("no {}", "way"),
            "wait" => {
                context.lease().stopped().cancelled().await;
                self.stopped.lock().unwrap().push(context.lease().reason());
                JobOutcome::failed(ErrorClass::Infra, "stopped")
            }
            "ask" if !context.ask("click", "{}", SOON).await => {
                JobOutcome::failed(ErrorClass::Handler, "refused")
            }
            "manifest" if !context.report_bad_manifest("a file is missing").await => {
                JobOutcome::failed(ErrorClass::Infra, "not moved")
            }
            _ => published,
        }
    }
}

struct World {
    sessions: mpsc::Receiver<Session>,
    handler: Arc<ById>,
    shutdown: Shutdown,
    store: Store,
    faults: Faults,
    health: Health,
    worker: TaskHandle,
    _tasks: Tasks,
}

impl World {
    async fn new(slots: u32) -> Self {
        Self::beside(slots, 1, &[]).await
    }

    /// A worker of `n` coordinators, and of those at `others`.
    async fn beside(slots: u32, n: usize, others: &[String]) -> Self {
        Self::with(slots, n, others, None).await
    }

    async fn with(slots: u32, n: usize, others: &[String], once: Option<Duration>) -> Self {
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(shutdown.clone());
        let (to, sessions) = mpsc::channel(4);
        let mut addresses = others.to_vec();
        for at in 0..n {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(net::endpoint_of(&listener, None).unwrap());
            let sessions = to.clone();
            let serve = tonic::transport::Server::builder()
                .add_service(WorkerServiceServer::new(Fake { at, sessions }))
                .serve_with_incoming(net::incoming(listener));
            tasks.spawn("test.coordinator", OnFailure::Log, serve);
        }
        let config = WorkerConfig {
            process: ProcessId::default(),
            coordinators: Addresses::parse(&addresses.join(",")).unwrap(),
            tls: None,
            token: None,
            tags: vec!["mcp:toy".to_owned()],
            slots,
            grace: Duration::ZERO,
            tell_every: None,
            once,
        };
        let faults = Faults::new(|_, _| None);
        let store = Store::open("memory://").await.unwrap();
        let store = store.with_faults(faults.clone());
        let health = Health::default();
        let deps = WorkerDeps {
            store: store.clone(),
            health: health.clone(),
            tasks: tasks.clone(),
        };
        let handler = Arc::new(ById::default());
        let work = run(Arc::clone(&handler), config, deps, shutdown.clone());
        let worker = tasks.spawn("test.worker", OnFailure::Log, work);
        Self {
            sessions,
            handler,
            shutdown,
            store,
            faults,
            health,
            worker,
            _tasks: tasks,
        }
    }

    async fn session(&mut self) -> Session {
        let next = with_deadline("session", SOON, self.sessions.recv());
        next.await.unwrap().unwrap()
    }

    /// The worker is greeted and has given credit for every slot.
    async fn ready(slots: u32) -> (Self, Session) {
        Self::new(slots).await.greeted(slots).await
    }

    async fn greeted(mut self, slots: u32) -> (Self, Session) {
        let world = &mut self;
        let mut session = world.session().await;
        let hello = session.hello(vec![]).await;
        assert_eq!(
            (hello.capacity, hello.tags),
            (slots, vec!["mcp:toy".to_owned()])
        );
        assert_eq!(session.credit().await, slots);
        (self, session)
    }

    /// Waits until `is_so`.
    async fn until(&self, name: &'static str, is_so: impl Fn(&Self) -> bool) {
        let wait = async {
            while !is_so(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_deadline(name, SOON, wait).await.unwrap();
    }

    async fn started(&self) {
        self.until("started", |world| {
            !world.handler.started.lock().unwrap().is_empty()
        })
        .await;
    }

    async fn stopped(&self) -> Vec<Option<Stop>> {
        self.until("stopped", |world| {
            !world.handler.stopped.lock().unwrap().is_empty()
        })
        .await;
        self.handler.stopped.lock().unwrap().clone()
    }

    async fn ended(&self) {
        self.until("ended", |world| world.worker.is_finished())
            .await;
    }
}

#[tokio::test]
async fn a_result_survives_a_cut_stream_until_it_is_acknowledged() {
    let (mut world, mut session) = World::ready(2).await;
    session.grant("a", TTL_MS).await;
    let first = session.result().await;
    assert!(matches!(first.outcome, Some(Outcome::Success(_))));
    // The acknowledgement is lost with the stream.
    drop(session);
    let mut session = world.session().await;
    let hello = session.hello(vec![]).await;
    assert_eq!(hello.held, [lease("a")]);
    let again = session.result().await;
    assert_eq!(again, first);
    session.acknowledge(&again).await;
    drop(session);
    let mut session = world.session().await;
    assert!(session.hello(vec![]).await.held.is_empty());
    assert_eq!(session.credit().await, 2);
}

#[tokio::test]
async fn a_free_slot_is_offered_again() {
    let (_world, mut session) = World::ready(1).await;
    session.grant("a", TTL_MS).await;
    assert_eq!(session.result().await.lease, Some(lease("a")));
    assert_eq!(session.credit().await, 1);
}

#[tokio::test]
async fn a_running_job_outlives_the_stream_and_a_cancel_ends_it() {
    let (mut world, session) = World::ready(1).await;
    session.grant("wait", TTL_MS).await;
    drop(session);
    let mut session = world.session().await;
    // The grant may have been cut off together with the stream.
    if session.hello(vec![]).await.held.is_empty() {
        session.grant("wait", TTL_MS).await;
    }
    let leases = vec![lease("wait")];
    session
        .send(FromCoordinator::Cancels(v1::Cancels { leases }))
        .await;
    assert_eq!(class(&session.result().await), v1::ErrorClass::Cancelled);
    assert_eq!(world.stopped().await, [Some(Stop::Cancelled)]);
}

#[tokio::test]
async fn nothing_is_reported_of_a_lost_lease() {
    let (world, mut session) = World::ready(1).await;
    session.grant("wait", 300).await;
    let renewal = session.expect("renewal", |m| match m {
        ToCoordinator::Renewals(renewals) => Some(renewals.renewals[0].lease.clone()),
        _ => None,
    });
    assert_eq!(renewal.await, Some(lease("wait")));
    let acks = v1::RenewalAcks {
        acks: vec![],
        lost: vec![lease("wait")],
    };
    session.send(FromCoordinator::RenewalAcks(acks)).await;
    assert_eq!(world.stopped().await, [Some(Stop::Lost)]);
    assert_eq!(session.credit().await, 1);
    session.grant("a", TTL_MS).await;
    assert_eq!(
        session.result().await.lease,
        Some(lease("a")),
        "the first result is of the next job"
    );
}

#[tokio::test]
async fn a_lease_that_nobody_renews_stops_its_job_before_it_ends() {
    let (world, mut session) = World::ready(1).await;
    let began = std::time::Instant::now();
    session.grant("wait", 1_000).await;
    assert_eq!(world.stopped().await, [Some(Stop::Expired)]);
    assert!(
        began.elapsed() < Duration::from_millis(1_000),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(session.credit().await, 1);
    session.grant("a", TTL_MS).await;
    assert_eq!(session.result().await.lease, Some(lease("a")));
}

#[tokio::test]
async fn draining_hands_back_what_does_not_finish_and_waits_for_acknowledgements() {
    let (world, mut session) = World::ready(2).await;
    session.grant("wait", TTL_MS).await;
    world.started().await;
    world.shutdown.drain();
    session
        .expect("drain", |m| {
            matches!(m, ToCoordinator::Drain(_)).then_some(())
        })
        .await;
    let result = session.result().await;
    assert!(
        matches!(result.outcome, Some(Outcome::Released(_))),
        "{result:?}"
    );
    assert!(!world.worker.is_finished());
    session.acknowledge(&result).await;
    world.ended().await;
}

#[tokio::test]
async fn a_grant_that_crosses_the_drain_is_handed_back() {
    let (world, mut session) = World::ready(1).await;
    world.shutdown.drain();
    session
        .expect("drain", |m| {
            matches!(m, ToCoordinator::Drain(_)).then_some(())
        })
        .await;
    session.grant("a", TTL_MS).await;
    let result = session.result().await;
    assert!(
        matches!(result.outcome, Some(Outcome::Released(_))),
        "{result:?}"
    );
    session.acknowledge(&result).await;
    world.ended().await;
}

#[tokio::test]
async fn a_panic_and_a_spec_that_is_none_are_failures_of_the_job() {
    let (_world, mut session) = World::ready(1).await;
    session.grant("panic", TTL_MS).await;
    let result = session.result().await;
    assert_eq!(class(&result), v1::ErrorClass::Handler);
    let Some(Outcome::Failure(failure)) = result.outcome else {
        panic!("no failure");
    };
    assert_eq!(
        failure.error.unwrap().message,
        "the handler panicked: no way"
    );

    session
        .grant_spec("a", Bytes::from_static(b"\xff"), String::new(), TTL_MS)
        .await;
    assert_eq!(class(&session.result().await), v1::ErrorClass::Invalid);
}

#[tokio::test]
async fn a_large_spec_is_read_from_the_store_and_checked() {
    let (world, mut session) = World::ready(1).await;
    let spec = encode_draft(&parse_line(br#"{"prompt": "x"}"#).unwrap());
    let project = "p".parse().unwrap();
    let path = layout::blob(&project, &sha256_hex(&spec));
    world.store.put(&path, spec).await.unwrap();
    session.grant_spec("a", Bytes::new(), path, TTL_MS).await;
    assert!(matches!(
        session.result().await.outcome,
        Some(Outcome::Success(_))
    ));

    let other = layout::blob(&project, &sha256_hex(b"other"));
    world
        .store
        .put(&other, Bytes::from_static(b"changed"))
        .await
        .unwrap();
    session.grant_spec("b", Bytes::new(), other, TTL_MS).await;
    let result = session.expect("result of b", |m| match m {
        ToCoordinator::Results(results) => results
            .results
            .into_iter()
            .find(|result| result.lease == Some(lease("b"))),
        _ => None,
    });
    assert_eq!(class(&result.await), v1::ErrorClass::Infra);
}

#[tokio::test]
async fn a_large_spec_waits_for_a_store_that_is_away() {
    let (world, mut session) = World::ready(1).await;
    let spec = encode_draft(&parse_line(br#"{"prompt": "x"}"#).unwrap());
    let path = layout::blob(&"p".parse().unwrap(), &sha256_hex(&spec));
    world.store.put(&path, spec).await.unwrap();
    // More than one read tries by itself.
    let mut left = 6;
    world.faults.set(move |operation, _| {
        left -= i32::from(operation == "get");
        (operation == "get" && left > 0).then_some(Fault::Unavailable)
    });
    session.grant_spec("a", Bytes::new(), path, TTL_MS).await;
    assert!(matches!(
        session.result().await.outcome,
        Some(Outcome::Success(_))
    ));
}

#[tokio::test]
async fn questions_and_bad_manifests_are_answered_over_the_stream_even_a_new_one() {
    let (mut world, mut session) = World::ready(1).await;
    session.grant("ask", TTL_MS).await;
    let ask = |m| match m {
        ToCoordinator::Ask(ask) => ask.question,
        _ => None,
    };
    let first = session.expect("ask", ask).await;
    drop(session);
    let mut session = world.session().await;
    session.hello(vec![]).await;
    let mut question = session.expect("ask again", ask).await;
    assert!(question.time_left_ms < first.time_left_ms, "{question:?}");
    question.time_left_ms = first.time_left_ms;
    assert_eq!(question, first);
    let answer = v1::Answer {
        id: question.id,
        allow: true,
    };
    session.send(FromCoordinator::Answer(answer)).await;
    let result = session.result().await;
    assert!(
        matches!(result.outcome, Some(Outcome::Success(_))),
        "{result:?}"
    );
    session.acknowledge(&result).await;

    session.grant("manifest", TTL_MS).await;
    let bad = session.expect("bad manifest", |m| match m {
        ToCoordinator::BadManifest(bad) => Some(bad),
        _ => None,
    });
    let bad = bad.await;
    assert_eq!(bad.reason, "a file is missing");
    let checked = v1::ManifestChecked {
        lease: bad.lease,
        moved: true,
        detail: String::new(),
    };
    session
        .send(FromCoordinator::ManifestChecked(checked))
        .await;
    assert!(matches!(
        session.result().await.outcome,
        Some(Outcome::Success(_))
    ));
}
