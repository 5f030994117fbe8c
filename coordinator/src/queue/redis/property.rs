//! Random commands go to the pure machine and to two coordinators on one real Redis, by one clock. After each, what
//! was answered, what can be read and what listeners were told must be the same.
//!
//! Not compared: the numbers of jobs and batches, and the order in which a job's dependencies are listed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{Fence, JobKey, ProjectId};
use espalier_core::queue::{
    BatchSeq, BatchView, Event, FinishReply, Grant, JobFilter, JobKind, JobSeq, JobView,
    LeaseRequest, Machine, MachineConfig, NewBatch, Outcome as Bare, Refusal, RenewReply,
    StateName,
};
use espalier_runtime::clock::{Clock, ManualClock};
use espalier_runtime::config::Secret;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::Tasks;
use espalier_testbed::redis::RedisServer;
use proptest::collection::vec;
use proptest::test_runner::{Config, TestRunner};
use tokio::sync::broadcast::Receiver;

use super::commands::{Command, How, Sent, batches, command, key, lease_request, names, selector};
use super::{Acknowledge, Redis, RedisConfig};
use crate::queue::{
    Chunk, DUE_LOOK_MAX, Finish, FinishAck, Intake, JobDetail, JobResult, OpenBatch, Outcome,
    Queue, QueueError, Renewal, Submission,
};

const START: u64 = 1_700_000_000_000_000;

fn weights() -> MachineConfig {
    MachineConfig {
        weights: [(ProjectId::new("b").unwrap(), 250)].into(),
        ..MachineConfig::default()
    }
}

async fn coordinator(url: &str, name: &str, clock: &Arc<ManualClock>) -> Redis {
    let config = RedisConfig {
        url: Secret::new(url),
        name: name.to_owned(),
        shards: 1,
        acknowledge: Acknowledge::Fast,
        machine: weights(),
        clock: Some(Arc::clone(clock) as Arc<dyn Clock>),
    };
    Redis::open(config, &Tasks::new(Shutdown::new()))
        .await
        .unwrap()
}

struct World {
    url: String,
    name: String,
    clock: Arc<ManualClock>,
    machine: Machine,
    /// Two that take turns, so that neither may rely on what it has seen itself.
    coordinators: [Redis; 2],
    turn: usize,
    events: Receiver<Event>,
    sent: Vec<Sent>,
    grants: Vec<Grant>,
    last_fence: Fence,
    results: BTreeMap<JobKey, JobResult>,
}

impl World {
    async fn new(url: &str, name: String) -> Self {
        let clock = Arc::new(ManualClock::new(espalier_core::time::Timestamp(START)));
        let first = coordinator(url, &name, &clock).await;
        let second = coordinator(url, &name, &clock).await;
        Self {
            events: first.events(),
            url: url.to_owned(),
            name,
            machine: Machine::new(weights()),
            coordinators: [first, second],
            turn: 0,
            clock,
            sent: Vec::new(),
            grants: Vec::new(),
            last_fence: Fence(0),
            results: BTreeMap::new(),
        }
    }

    /// The coordinator whose turn it is.
    fn queue(&self) -> &Redis {
        &self.coordinators[self.turn % 2]
    }

    async fn run(&mut self, command: Command) {
        self.turn += 1;
        let now = self.clock.now();
        match command {
            Command::Open { batch, params } => self.open(batch, params).await,
            Command::Submit { batch, chunk, jobs } => {
                let sent = Sent::new(now, batch, chunk, &jobs);
                self.sent.push(sent.clone());
                self.submit(sent).await;
            }
            Command::SubmitAgain(n) => {
                if !self.sent.is_empty() {
                    self.submit(self.sent[n % self.sent.len()].clone()).await;
                }
            }
            Command::Close(batch) => self.close(batch).await,
            Command::Lease(lease) => self.lease(lease_request(&lease)).await,
            Command::Renew(renewals) => self.renew(&renewals).await,
            Command::Finish { grant, how } => self.finish(&[(grant, how)]).await,
            Command::FinishMany(ends) => self.finish(&ends).await,
            Command::Cancel(batch, job) => {
                let which = selector(batch, job);
                let expected = self.machine.cancel(now, &which);
                same(expected, self.queue().cancel(which).await);
            }
            Command::Requeue(batch, job) => {
                let which = selector(batch, job);
                let expected = self.machine.requeue_dead(now, &which);
                same(expected, self.queue().requeue_dead(which).await);
            }
            Command::Tick(limit) => self.tick(limit).await,
            Command::Wait(ms) => self.clock.advance(Duration::from_millis(ms)),
            Command::StepBack(ms) => {
                // What a command that is refused came with, nobody remembers.
                self.tick(1).await;
                let back = now.0.saturating_sub(ms * 1_000);
                self.clock.set(espalier_core::time::Timestamp(back));
            }
            Command::Outage(ms) => {
                let by = Duration::from_millis(ms);
                self.machine.extend_leases(by);
                self.queue().extend_leases(by).await.unwrap();
            }
            Command::Purge { age_ms, limit } => self.purge(age_ms, limit).await,
            Command::Reopen => self.reopen().await,
        }
    }

    async fn open(&mut self, batch: u8, params: u8) {
        let (project, batch) = names(batch);
        let new = NewBatch {
            project,
            batch,
            params_digest: [params; 32],
        };
        let expected = self.machine.open_batch(self.clock.now(), &new);
        let defaults = Bytes::from(format!("defaults of {}", new.batch));
        let request = OpenBatch {
            batch: new,
            defaults,
        };
        let opened = self.queue().open_batch(request).await;
        same(expected.map(bare_batch), opened.map(bare_batch));
    }

    async fn submit(&mut self, sent: Sent) {
        let (project, batch) = names(sent.batch);
        let (now, jobs) = (self.clock.now(), sent.jobs.clone());
        let expected = self
            .machine
            .submit(now, &project, &batch, sent.chunk, sent.digest, jobs);
        let chunk = Chunk {
            project,
            batch,
            n: sent.chunk,
            digest: sent.digest,
            jobs: sent.jobs.into_iter().map(submission).collect(),
        };
        let reply = self.queue().submit(chunk).await;
        same(
            expected.map(|answer| (answer.items, answer.repeated)),
            reply.map(|reply| (reply.items, reply.repeated)),
        );
    }

    async fn close(&mut self, batch: u8) {
        let (project, batch) = names(batch);
        let now = self.clock.now();
        let expected = self.machine.close_batch(now, &project, &batch);
        let closed = self.queue().close_batch(project, batch).await;
        same(expected.map(bare_batch), closed.map(bare_batch));
    }

    async fn lease(&mut self, request: LeaseRequest) {
        let expected = self.machine.lease(self.clock.now(), &request);
        let granted = self.queue().lease(request).await;
        for granted in granted.iter().flatten() {
            let key = &granted.grant.key;
            assert_eq!(granted.spec, spec_of(key));
            assert_eq!(granted.defaults, format!("defaults of {}", key.batch));
        }
        let grants = granted.map(|all| all.into_iter().map(|g| bare_grant(g.grant)).collect());
        let expected: Result<Vec<_>, _> =
            expected.map(|all| all.into_iter().map(bare_grant).collect());
        same(expected.clone(), grants);
        for grant in expected.into_iter().flatten() {
            if grant.fence > self.last_fence {
                self.last_fence = grant.fence;
                self.grants.push(grant);
            }
        }
    }

    async fn renew(&mut self, renewals: &[(usize, Option<String>)]) {
        if self.grants.is_empty() {
            return;
        }
        let now = self.clock.now();
        let renewals = renewals.iter().map(|(n, progress)| {
            let grant = &self.grants[n % self.grants.len()];
            Renewal {
                key: grant.key.clone(),
                fence: grant.fence,
                progress: progress.clone(),
            }
        });
        let renewals: Vec<_> = renewals.collect();
        let renew = |r: &Renewal| {
            let machine = &mut self.machine;
            machine.renew(now, &r.key, r.fence, r.progress.as_deref())
        };
        let expected: Vec<RenewReply> = renewals.iter().map(renew).collect();
        same(Ok(expected), self.queue().renew(renewals).await);
    }

    async fn finish(&mut self, ends: &[(usize, How)]) {
        if self.grants.is_empty() {
            return;
        }
        let (mut expected, mut finishes) = (Vec::new(), Vec::new());
        for (n, how) in ends {
            let grant = self.grants[n % self.grants.len()].clone();
            let (bare, outcome) = outcomes(self.clock.now(), &grant, how);
            let now = self.clock.now();
            let reply = self.machine.finish(now, &grant.key, grant.fence, bare);
            let succeeded = matches!(how, How::Succeed(_));
            if succeeded && matches!(reply, FinishReply::Accepted { .. }) {
                self.results.insert(grant.key.clone(), result_of(&grant));
            }
            expected.push(match reply {
                FinishReply::Accepted { .. } => FinishAck::Accepted,
                FinishReply::AlreadyFinished => FinishAck::AlreadyFinished,
                FinishReply::Stale => FinishAck::Stale,
                FinishReply::SpawnRefused(error) => FinishAck::Refused(error),
            });
            finishes.push(Finish {
                key: grant.key,
                fence: grant.fence,
                outcome,
            });
        }
        same(Ok(expected), self.queue().finish(finishes).await);
    }

    async fn tick(&mut self, limit: usize) {
        let expected = self.machine.tick(self.clock.now(), limit);
        same(Ok(expected), self.queue().tick(limit).await);
    }

    async fn purge(&mut self, age_ms: u64, limit: usize) {
        let now = self.clock.now();
        let before = espalier_core::time::Timestamp(now.0.saturating_sub(age_ms * 1_000));
        let due = self.machine.purgeable(before, limit);
        for (project, batch) in &due {
            self.machine.purge_batch(now, project, batch).unwrap();
            let kept = |key: &JobKey| key.project != *project || key.batch != *batch;
            self.results.retain(|key, _| kept(key));
        }
        let gone = self.queue().purge(Duration::from_millis(age_ms), limit);
        same(Ok(due), gone.await);
    }

    /// A coordinator ends, and another comes in its place. If it finds a long silence, leases are prolonged by it.
    async fn reopen(&mut self) {
        let seen = redis::cmd("HGET")
            .arg(format!("{{{}:0}}:m", self.name))
            .arg("now")
            .take();
        let link = &self.coordinators[0].shards[0].core.link;
        let seen: u64 = super::decode::number(link.run(&seen).await.unwrap()).unwrap();
        let silence = self.clock.now().since(espalier_core::time::Timestamp(seen));
        if silence > super::core::OUTAGE_AFTER {
            self.machine.extend_leases(silence);
        }
        self.machine.tick(self.clock.now(), 0);
        let next = coordinator(&self.url, &self.name, &self.clock).await;
        self.coordinators[1].close().await;
        self.coordinators[1] = next;
    }

    /// Compares all that can be seen.
    async fn check(&mut self) {
        futures::future::join_all((0..batches()).map(|n| self.check_batch(n))).await;
        let now = self.clock.now().max(self.machine.newest_time());
        same(Ok(self.machine.stats(now)), self.queue().stats().await);
        let soon = Duration::from_secs(5);
        let due = self.machine.due_soon(now, soon, DUE_LOOK_MAX);
        same(Ok(due), self.queue().due_soon(soon).await);
        self.check_events().await;
    }

    async fn check_batch(&self, n: u8) {
        let (project, batch) = &names(n);
        let (filter, all) = (JobFilter::default(), 1_000);
        let queue = self.queue();
        let (jobs, ended) = tokio::join!(
            queue.jobs(project.clone(), batch.clone(), filter.clone(), None, all),
            queue.ended_after(project.clone(), batch.clone(), 0, all),
        );
        let views: Vec<JobView> = jobs.iter().flatten().map(|d| d.job.clone()).collect();
        for detail in jobs.iter().flatten() {
            self.check_result(detail);
        }
        let expected = self.machine.jobs(project, batch, &filter, None, all);
        let expected = expected.map(|all| all.into_iter().map(bare_job).collect());
        same(
            expected,
            jobs.map(|_| views.into_iter().map(bare_job).collect::<Vec<_>>()),
        );
        let expected = self.machine.ended_after(project, batch, 0, all);
        let expected = expected.map(|ended| {
            let view = self.machine.batch(project, batch).unwrap();
            let names = ended.into_iter().map(|end| (end.seq, end.job.key));
            (names.collect::<Vec<_>>(), bare_batch(view))
        });
        let ended = ended.map(|page| {
            let names = page.jobs.into_iter().map(|(end, d)| (end, d.job.key));
            (names.collect(), bare_batch(page.batch))
        });
        same(expected, ended);
    }

    fn check_result(&self, detail: &JobDetail) {
        let succeeded = detail.job.state.name() == StateName::Succeeded;
        let expected = self.results.get(&detail.job.key).filter(|_| succeeded);
        assert_eq!(detail.result.as_ref(), expected, "{}", detail.job.key);
    }

    /// What listeners were told since the last time. A message of our own shows that all before it have come.
    async fn check_events(&mut self) {
        let last = redis::cmd("PUBLISH")
            .arg(format!("{{{}:0}}:events", self.name))
            .arg(r#"[["ready","5\nlast"]]"#)
            .take();
        let link = &self.coordinators[0].shards[0].core.link;
        link.run(&last).await.unwrap();
        let (mut told, expected) = (BTreeSet::new(), self.machine.take_events());
        loop {
            match self.events.recv().await.unwrap() {
                Event::Ready { needs, .. } if needs.contains("last") => break,
                event => told.insert(format!("{event:?}")),
            };
        }
        let expected: BTreeSet<String> = expected.iter().map(|e| format!("{e:?}")).collect();
        assert_eq!(told, expected);
    }

    /// What is compared once: pages, filters, chunks, batches by name.
    async fn check_pages(&self) {
        let queue = self.queue();
        for n in 0..batches() {
            let (project, batch) = names(n);
            for chunk in 0..4 {
                let expected = self.machine.chunk_digest(&project, &batch, chunk);
                let found = queue.chunk_digest(project.clone(), batch.clone(), chunk);
                same(Ok(expected), found.await);
                let found = queue.intake(project.clone(), batch.clone(), chunk);
                let intake = |_| Intake {
                    defaults: format!("defaults of {batch}").into(),
                    digest: expected,
                    waiting: self.machine.waiting(&project),
                };
                let expected = self.machine.batch(&project, &batch).ok().map(intake);
                same(Ok(expected), found.await);
            }
            let filter = JobFilter {
                states: vec![StateName::Dead, StateName::Succeeded],
                kinds: vec![JobKind::Rollout],
                labels: [("parity".to_owned(), "1".to_owned())].into(),
            };
            let after = Some(key(n, 3).job);
            let expected = self
                .machine
                .jobs(&project, &batch, &filter, after.as_ref(), 2);
            let expected = expected.map(|all| all.into_iter().map(bare_job).collect::<Vec<_>>());
            let page = queue.jobs(project.clone(), batch.clone(), filter, after, 2);
            let page = page.await;
            same(
                expected,
                page.map(|all| all.into_iter().map(|d| bare_job(d.job)).collect()),
            );
            let expected = self.machine.batches(&project, Some(&batch), 1);
            let found = queue.batches(project, Some(batch), 1).await;
            let bare = |all: Vec<BatchView>| all.into_iter().map(bare_batch).collect::<Vec<_>>();
            same(Ok(bare(expected)), found.map(bare));
        }
    }

    /// Runs what is left until nothing can move any more: no job hangs.
    async fn drain(&mut self) {
        for batch in 0..batches() {
            self.run(Command::Close(batch)).await;
        }
        for _ in 0..100 {
            self.grants.clear();
            for kind in 0..2 {
                self.run(Command::Lease((9, kind, 0, 50, 3))).await;
            }
            let all = 0..self.grants.len();
            let ends: Vec<_> = all.map(|n| (n, How::Succeed(Vec::new()))).collect();
            self.finish(&ends).await;
            let stats = self.machine.stats(self.clock.now());
            if stats.batches_open == 0 {
                return;
            }
            self.run(Command::Wait(60_000)).await;
        }
        panic!("jobs hang: {:?}", self.machine.stats(self.clock.now()));
    }
}

fn submission(job: espalier_core::queue::NewJob) -> Submission {
    let spec = Bytes::from(format!("spec of {}", job.id));
    Submission { job, spec }
}

fn spec_of(key: &JobKey) -> String {
    format!("spec of {}", key.job)
}

fn result_of(grant: &Grant) -> JobResult {
    JobResult {
        summary: Bytes::from(vec![0, 255, grant.attempt as u8]),
        manifest: format!("{}/a-{}", grant.key, grant.fence.0),
    }
}

/// The same outcome for the machine and for the queue.
fn outcomes(now: espalier_core::time::Timestamp, grant: &Grant, how: &How) -> (Bare, Outcome) {
    match how {
        How::Succeed(specs) => {
            let batch: u8 = grant.key.batch.as_str()[6..].parse().unwrap();
            let jobs: Vec<_> = specs.iter().map(|spec| spec.job(now, batch)).collect();
            let spawn = jobs.iter().cloned().map(submission).collect();
            let result = result_of(grant);
            (
                Bare::Succeeded { spawn: jobs },
                Outcome::Succeeded { result, spawn },
            )
        }
        How::Fail(class, wait_ms) => {
            let (class, retry_after) = (*class, wait_ms.map(Duration::from_millis));
            let message = "no \"way\" / nowhere".to_owned();
            let log_tail = "line\nlast".to_owned();
            let bare = Bare::Failed {
                class,
                message: message.clone(),
                log_tail: log_tail.clone(),
                retry_after,
            };
            let outcome = Outcome::Failed {
                class,
                message,
                log_tail,
                retry_after,
            };
            (bare, outcome)
        }
        How::Release => (Bare::Released, Outcome::Released),
    }
}

/// Panics unless both were the same, or refused for the same reason.
fn same<T: PartialEq + std::fmt::Debug>(machine: Result<T, Refusal>, redis: Result<T, QueueError>) {
    let redis = redis.map_err(|error| match error {
        QueueError::Refused(refusal) => refusal,
        other => panic!("{other}"),
    });
    assert_eq!(machine, redis, "left: the machine, right: Redis");
}

fn bare_job(mut job: JobView) -> JobView {
    job.seq = JobSeq(0);
    job.batch_seq = BatchSeq(0);
    job.deps.sort_unstable();
    job
}

fn bare_batch(mut batch: BatchView) -> BatchView {
    batch.seq = BatchSeq(0);
    batch
}

fn bare_grant(mut grant: Grant) -> Grant {
    grant.seq = JobSeq(0);
    grant.batch_seq = BatchSeq(0);
    grant
}

/// `PROPTEST_CASES` says how many; 256 take some 16 s.
#[test]
fn redis_decides_as_the_machine_does() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = [("appendfsync", "no")];
    let server = runtime.block_on(RedisServer::start_with(&settings));
    let case = std::sync::atomic::AtomicUsize::new(0);
    let play = |commands: Vec<Command>| async {
        let n = case.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut world = World::new(&server.url(), format!("case-{n}")).await;
        for command in commands {
            world.run(command).await;
            world.check().await;
        }
        world.check_pages().await;
        world.drain().await;
        world.check().await;
        let flush = redis::cmd("FLUSHDB").take();
        let link = &world.coordinators[0].shards[0].core.link;
        link.run(&flush).await.unwrap();
        for coordinator in &world.coordinators {
            coordinator.close().await;
        }
    };
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    let played = TestRunner::new(config).run(&vec(command(), 1..40), |commands| {
        runtime.block_on(play(commands));
        Ok(())
    });
    if let Err(error) = played {
        panic!("{error}");
    }
}
