//! What survives the end of a process.

use super::*;
use crate::queue::Renewal;
use espalier_core::queue::RenewReply;

pub async fn what_was_answered_survives_a_kill(mut f: Fixture) {
    f.open("p", "b").await;
    let mut done = 0;
    for round in 0..10 {
        let jobs = (0..20).map(|n| new_job(&format!("r{round}-{n}"))).collect();
        f.submit(round, jobs).await;
        let granted = f.lease(5).await;
        f.finish(&granted[0], succeeded()).await;
        f.finish(&granted[1], failed(ErrorClass::Invalid)).await;
        f.finish(&granted[2], Outcome::Released).await;
        done += 1;
        let before = f.batch().await;
        f = f.reopened(Ending::Killed).await;
        assert_eq!(f.batch().await, before);
        let again = f.finish(&granted[0], succeeded()).await;
        assert_eq!(again, FinishAck::AlreadyFinished);
        let spec = f
            .queue
            .spec(key(&format!("p/b/r{round}-19")))
            .await
            .unwrap();
        assert_eq!(spec.unwrap().spec, format!("spec of r{round}-19"));
        let chunk = (0..20).map(|n| new_job(&format!("r{round}-{n}"))).collect();
        assert!(f.submit(round, chunk).await.repeated);
    }
    let batch = f.batch().await;
    assert_eq!(batch.counters.total(), 200);
    assert_eq!(batch.counters.get(StateName::Succeeded), done);
}

pub async fn leases_survive_a_restart_with_a_fresh_term(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(2).await;
    f.advance(3_600 * SECOND);
    let f = f.reopened(Ending::Killed).await;
    f.tick().await;
    let renewal = Renewal {
        key: granted[0].grant.key.clone(),
        fence: granted[0].grant.fence,
        progress: None,
    };
    let reply = f.queue.renew(vec![renewal]).await.unwrap()[0];
    assert!(
        matches!(reply, RenewReply::Held { .. }),
        "nobody could renew meanwhile"
    );
    assert_eq!(
        f.finish(&granted[0], succeeded()).await,
        FinishAck::Accepted
    );
    f.advance(61 * SECOND);
    f.tick().await;
    assert_eq!(
        f.job("p/b/b").await.budgets.infra,
        1,
        "the other worker is gone"
    );
}

pub async fn fences_grow_over_restarts_and_clock_steps(mut f: Fixture) {
    f.with_jobs(&["a"]).await;
    let mut last = Fence(0);
    for how in [Ending::Closed, Ending::Killed, Ending::Closed] {
        for _ in 0..3 {
            let granted = f.run_one(Outcome::Released).await;
            assert!(granted.grant.fence > last);
            last = granted.grant.fence;
        }
        f.clock.set(Timestamp(f.now().0 / 2));
        f = f.reopened(how).await;
    }
}

pub async fn order_and_fairness_survive_a_restart(f: Fixture) {
    for name in ["a", "b"] {
        f.open(name, "b").await;
        let jobs = (0..200).map(|n| new_job(&format!("j{n}"))).collect();
        f.try_submit(name, "b", 0, jobs).await.unwrap();
    }
    f.lease(101).await;
    let f = f.reopened(Ending::Closed).await;
    let next = f.lease(4).await;
    let order = next.iter().map(|granted| granted.grant.key.to_string());
    let order: Vec<_> = order.collect();
    assert_eq!(order, ["b/b/j50", "a/b/j51", "b/b/j51", "a/b/j52"]);
}

pub async fn a_closed_queue_says_so(f: Fixture) {
    f.with_jobs(&["a"]).await;
    f.queue.close().await;
    f.queue.close().await;
    let refused = f.queue.job(key("p/b/a")).await;
    assert!(matches!(refused, Err(QueueError::Closed)), "{refused:?}");
    let f = f.reopened(Ending::Closed).await;
    assert_eq!(f.lease_ids(5).await, ["a"]);
}
