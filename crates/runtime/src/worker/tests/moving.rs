//! Several coordinators: where the worker goes, and what it takes with it.

use super::*;

fn released(result: &v1::Result) -> bool {
    matches!(result.outcome, Some(Outcome::Released(_)))
}

fn go_away(reconnect_after_ms: u64) -> FromCoordinator {
    FromCoordinator::GoAway(v1::GoAway {
        reason: "test".to_owned(),
        reconnect_after_ms,
    })
}

impl Session {
    async fn renewal(&mut self) -> v1::Renewal {
        self.expect("renewal", |m| match m {
            ToCoordinator::Renewals(mut renewals) => renewals.renewals.pop(),
            _ => None,
        })
        .await
    }

    /// Everything that the worker says until it closes its side.
    async fn rest(&mut self) -> Vec<ToCoordinator> {
        let mut said = Vec::new();
        let reading = async {
            while let Some(message) = self.from.message().await.unwrap() {
                said.extend(message.message);
            }
        };
        with_deadline("rest", SOON, reading).await.unwrap();
        said
    }
}

#[tokio::test]
async fn a_worker_that_is_asked_to_move_leaves_when_the_next_stream_is_up() {
    let (mut world, mut old) = World::beside(3, 2, &[]).await.greeted(3).await;
    old.grant("wait", 3_000).await;
    world.started().await;
    old.send(go_away(0)).await;
    let mut new = world.session().await;
    assert_ne!(new.at, old.at, "it goes elsewhere where it can");
    // The new stream is not up: the old one serves on, without credit for anything more.
    let renewal = old.renewal().await;
    assert_eq!(renewal.lease, Some(lease("wait")));
    let hello = new.hello(vec![]).await;
    assert_eq!(hello.held, [lease("wait")]);
    assert_eq!(new.credit().await, 2, "one slot is taken");
    let said = old.rest().await;
    let asked = |m: &ToCoordinator| matches!(m, ToCoordinator::Credit(_));
    assert!(!said.iter().any(asked), "{said:?}");

    // What comes late on the old stream: an answer counts, a grant goes back over the new one.
    let number = renewal.number;
    let again = new.renewal().await;
    assert!(again.number > number, "{} and {number}", again.number);
    let ack = v1::RenewalAck {
        lease: renewal.lease,
        lease_ttl_ms: TTL_MS,
        number: again.number,
    };
    let acks = vec![ack];
    let lost = vec![];
    old.send(FromCoordinator::RenewalAcks(v1::RenewalAcks { acks, lost }))
        .await;
    old.grant("late", TTL_MS).await;
    let result = new.result().await;
    assert_eq!(result.lease, Some(lease("late")));
    assert!(released(&result), "{result:?}");
    assert_eq!(*world.handler.started.lock().unwrap(), ["wait"]);
    assert!(world.handler.stopped.lock().unwrap().is_empty());
}

#[tokio::test]
async fn results_go_to_whichever_coordinator_there_is() {
    let (mut world, mut first) = World::beside(2, 2, &[]).await.greeted(2).await;
    first.grant("a", TTL_MS).await;
    let sent = first.result().await;
    let at = first.at;
    // It dies with the result on its way.
    drop(first);
    let mut second = world.session().await;
    assert_ne!(second.at, at);
    assert_eq!(second.hello(vec![]).await.held, [lease("a")]);
    assert_eq!(second.result().await, sent);
    second.acknowledge(&sent).await;
    assert_eq!(second.credit().await, 2);
}

#[tokio::test]
async fn a_coordinator_that_is_not_there_costs_a_moment() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let others = [net::endpoint_of(&gone, None).unwrap()];
    drop(gone);
    for _ in 0..4 {
        World::beside(1, 1, &others).await.greeted(1).await;
    }
}

#[tokio::test]
async fn a_grant_beyond_the_credit_goes_back() {
    let (world, mut session) = World::ready(1).await;
    session.grant("wait", TTL_MS).await;
    session.grant("a", TTL_MS).await;
    let result = session.result().await;
    assert_eq!(result.lease, Some(lease("a")));
    assert!(released(&result), "{result:?}");
    world.started().await;
    assert_eq!(*world.handler.started.lock().unwrap(), ["wait"]);
}
