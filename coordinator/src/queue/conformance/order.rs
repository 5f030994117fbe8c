//! Which job goes first.

use super::*;
use espalier_core::queue::Event;

fn many(from: u32, n: u32) -> Vec<NewJob> {
    (from..from + n)
        .map(|n| new_job(&format!("j{n}")))
        .collect()
}

pub async fn higher_priority_first_then_submission(f: Fixture) {
    f.open("p", "b").await;
    let with = |id: &str, priority| NewJob {
        priority,
        ..new_job(id)
    };
    let jobs = vec![
        with("c", 5),
        with("b", 5),
        with("low", 0),
        with("a", 5),
        with("high", 9),
    ];
    f.submit(0, jobs).await;
    assert_eq!(f.lease_ids(2).await, ["high", "c"]);
    f.submit(1, vec![with("late", 9)]).await;
    assert_eq!(f.lease_ids(9).await, ["late", "b", "a", "low"]);
}

/// How many grants pass until all of `small`'s jobs are granted, each with its position.
async fn positions(f: &Fixture, small: &str, jobs: usize) -> Vec<usize> {
    let mut found = Vec::new();
    let mut passed = 0;
    while found.len() < jobs {
        let grants = f.lease(10).await;
        assert!(!grants.is_empty());
        for granted in grants {
            passed += 1;
            if granted.grant.key.project.as_str() == small {
                found.push(passed);
            }
        }
    }
    found
}

pub async fn a_small_tenant_beside_a_big_one_waits_its_share(f: Fixture) {
    f.open("big", "b").await;
    for n in 0..10 {
        f.try_submit("big", "b", n, many(n * 10_000, 10_000))
            .await
            .unwrap();
    }
    f.lease(500).await;
    f.open("small", "b").await;
    f.try_submit("small", "b", 0, many(0, 100)).await.unwrap();
    let positions = positions(&f, "small", 100).await;
    for (n, position) in positions.iter().enumerate() {
        // Of two tenants each gets every second grant; the wait may be twice that.
        let fair = 2 * (n + 1);
        assert!(
            *position <= 2 * fair,
            "job {n} came after {position} grants"
        );
    }
    assert!(positions[99] <= 202, "{positions:?}");
}

pub async fn a_tenant_that_calls_everything_urgent_starves_nobody(f: Fixture) {
    f.open("loud", "b").await;
    f.open("small", "b").await;
    let urgent = many(0, 1_000)
        .into_iter()
        .map(|job| NewJob { priority: 9, ..job });
    f.try_submit("loud", "b", 0, urgent.collect())
        .await
        .unwrap();
    f.lease(100).await;
    let modest = many(0, 50)
        .into_iter()
        .map(|job| NewJob { priority: 0, ..job });
    f.try_submit("small", "b", 0, modest.collect())
        .await
        .unwrap();
    let positions = positions(&f, "small", 50).await;
    assert!(positions[49] <= 102, "{positions:?}");
}

pub async fn a_returning_tenant_has_no_credit(f: Fixture) {
    for name in ["steady", "returns"] {
        f.open(name, "b").await;
    }
    f.try_submit("steady", "b", 0, many(0, 2_000))
        .await
        .unwrap();
    f.try_submit("returns", "b", 0, many(0, 1)).await.unwrap();
    f.lease(1_000).await;
    f.try_submit("returns", "b", 1, many(1, 200)).await.unwrap();
    let grants = f.lease(100).await;
    let of = |name: &str| {
        let held = grants
            .iter()
            .filter(|g| g.grant.key.project.as_str() == name);
        held.count()
    };
    assert!((49..=51).contains(&of("returns")), "{}", of("returns"));
}

pub async fn delayed_jobs_wait_for_their_moment(f: Fixture) {
    f.open("p", "b").await;
    let late = NewJob {
        not_before: Some(f.now() + 10 * SECOND),
        ..new_job("late")
    };
    let past = NewJob {
        not_before: Some(Timestamp(1)),
        ..new_job("past")
    };
    f.submit(0, vec![late, past]).await;
    assert_eq!(f.state("p/b/late").await, StateName::Delayed);
    assert_eq!(f.lease_ids(5).await, ["past"]);
    f.advance(10 * SECOND - Duration::from_micros(1));
    assert_eq!(f.queue.tick(10).await.unwrap().promoted, 0);
    f.advance(Duration::from_micros(1));
    assert_eq!(f.queue.tick(10).await.unwrap().promoted, 1);
    assert_eq!(f.lease_ids(5).await, ["late"]);
}

pub async fn a_wake_up_names_the_lane(f: Fixture) {
    f.open("p", "b").await;
    let mut events = f.queue.events();
    let browser = NewJob {
        needs: ["mcp:browser".to_owned()].into(),
        ..new_job("a")
    };
    f.submit(0, vec![browser, new_job("b"), new_job("c")]).await;
    let mut lanes = Vec::new();
    for _ in 0..2 {
        match events.recv().await.unwrap() {
            Event::Ready { kind, needs } => lanes.push((kind, needs.into_iter().next())),
            other => panic!("{other:?}"),
        }
    }
    lanes.sort();
    let browser = Some("mcp:browser".to_owned());
    assert_eq!(
        lanes,
        [(JobKind::Rollout, None), (JobKind::Rollout, browser)]
    );
}
