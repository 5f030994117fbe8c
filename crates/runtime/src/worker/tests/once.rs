//! A worker that takes one job, and what a loop tells of its health.

use super::*;

const LONG: Duration = Duration::from_secs(60);

impl World {
    /// A worker with room for two jobs, which takes one.
    async fn once(wait: Duration) -> (Self, Session) {
        let mut world = Self::with(2, 1, &[], Some(wait)).await;
        let mut session = world.session().await;
        assert_eq!(session.hello(vec![]).await.capacity, 2);
        (world, session)
    }
}

#[tokio::test]
async fn it_asks_for_one_job_and_ends_when_its_result_is_acknowledged() {
    let (world, mut session) = World::once(LONG).await;
    assert_eq!(session.credit().await, 1);
    session.grant("panic", TTL_MS).await;
    let result = session.result().await;
    assert_eq!(class(&result), v1::ErrorClass::Handler);
    assert!(!world.worker.is_finished() && !world.shutdown.is_draining());
    session.acknowledge(&result).await;
    let heard = session.expect("drain", |m| match m {
        ToCoordinator::Credit(_) => Some("credit"),
        ToCoordinator::Drain(_) => Some("drain"),
        _ => None,
    });
    assert_eq!(heard.await, "drain", "no second job is asked for");
    world.ended().await;
    assert!(world.shutdown.is_draining(), "the process ends with it");
}

#[tokio::test]
async fn a_lost_lease_was_its_job_too() {
    let (world, mut session) = World::once(LONG).await;
    assert_eq!(session.credit().await, 1);
    session.grant("wait", TTL_MS).await;
    world.started().await;
    let lost = v1::RenewalAcks {
        acks: vec![],
        lost: vec![lease("wait")],
    };
    session.send(FromCoordinator::RenewalAcks(lost)).await;
    assert_eq!(world.stopped().await, [Some(Stop::Lost)]);
    world.ended().await;
}

#[tokio::test]
async fn it_ends_when_no_job_came_and_hands_back_one_that_comes_too_late() {
    let (world, mut session) = World::once(Duration::from_millis(50)).await;
    let drains = |m| matches!(m, ToCoordinator::Drain(_)).then_some(());
    session.expect("drain", drains).await;
    session.grant("wait", TTL_MS).await;
    let result = session.result().await;
    assert!(
        matches!(result.outcome, Some(Outcome::Released(_))),
        "{result:?}"
    );
    session.acknowledge(&result).await;
    world.ended().await;
    assert!(world.handler.started.lock().unwrap().is_empty());
}

#[tokio::test]
async fn it_ends_without_a_coordinator_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = net::endpoint_of(&listener, None).unwrap();
    drop(listener);
    let world = World::with(1, 0, &[nobody], Some(Duration::from_millis(50))).await;
    world.ended().await;
}

#[tokio::test]
async fn the_health_follows_the_stream() {
    let mut world = World::new(1).await;
    let said = |world: &World| world.health.ready().unwrap_err();
    let begins = said(&world);
    assert!(begins.contains("no loop runs") || begins.starts_with("rollout: not connected yet"));
    let mut session = world.session().await;
    session.hello(vec![]).await;
    assert_eq!(session.credit().await, 1);
    world
        .until("ready", |world| world.health.ready().is_ok())
        .await;
    session.grant("wait", TTL_MS).await;
    world.started().await;
    drop(session);
    let again = world.session().await;
    assert_eq!(world.health.ready(), Ok(()), "a moment without a stream");
    world.shutdown.drain();
    world
        .until("ending", |world| world.health.ready().is_err())
        .await;
    let ends = said(&world);
    assert!(
        ends.contains("no more work") || ends.contains("no loop runs"),
        "{ends}"
    );
    assert_eq!(world.health.live(), Ok(()));
    drop(again);
}
