//! Cancelling, in each state.

use super::*;
use crate::queue::Renewal;
use espalier_core::queue::{Cancelled, Event, RenewReply, Selector};

fn whole_batch() -> Selector {
    Selector::Batch(project("p"), batch_id("b"))
}

pub async fn waiting_jobs_are_cancelled_at_once(f: Fixture) {
    f.open("p", "b").await;
    let delayed = NewJob {
        not_before: Some(f.now() + 10 * SECOND),
        ..new_job("delayed")
    };
    let blocked = NewJob {
        deps: vec![key("p/b/delayed")],
        ..new_job("blocked")
    };
    f.submit(0, vec![new_job("ready"), delayed, blocked]).await;
    let done = f.queue.cancel(whole_batch()).await.unwrap();
    assert_eq!(
        done,
        Cancelled {
            cancelled: 3,
            requested: 0
        }
    );
    let batch = f.batch().await;
    assert_eq!(
        batch.counters.get(StateName::Cancelled),
        3,
        "none died of another"
    );
    assert!(batch.completed_at.is_some());
    f.advance(20 * SECOND);
    f.tick().await;
    assert_eq!(f.lease(5).await, []);
    let back = f.queue.requeue_dead(whole_batch()).await.unwrap();
    assert_eq!(back, 0, "cancelled is not dead");
}

pub async fn running_jobs_are_asked_to_stop(f: Fixture) {
    f.with_jobs(&["a", "b", "c"]).await;
    let granted = f.lease(3).await;
    let mut events = f.queue.events();
    let done = f.queue.cancel(whole_batch()).await.unwrap();
    assert_eq!(
        done,
        Cancelled {
            cancelled: 0,
            requested: 3
        }
    );
    for granted in &granted {
        let is_cancel = |event: &Event| matches!(event, Event::CancelRequested { .. });
        let told = Fixture::event(&mut events, is_cancel).await;
        let wanted = Event::CancelRequested {
            worker: WorkerId::new("w").unwrap(),
            key: granted.grant.key.clone(),
            fence: granted.grant.fence,
        };
        assert_eq!(told, wanted);
    }
    let renewal = Renewal {
        key: granted[0].grant.key.clone(),
        fence: granted[0].grant.fence,
        progress: None,
    };
    let reply = f.queue.renew(vec![renewal]).await.unwrap()[0];
    assert!(matches!(
        reply,
        RenewReply::Held {
            cancel_requested: true,
            ..
        }
    ));
    f.finish(&granted[0], failed(ErrorClass::Cancelled)).await;
    f.finish(&granted[1], failed(ErrorClass::Handler)).await;
    f.finish(&granted[2], succeeded()).await;
    assert_eq!(f.state("p/b/a").await, StateName::Cancelled);
    assert_eq!(f.state("p/b/b").await, StateName::Cancelled, "no retry");
    assert_eq!(
        f.state("p/b/c").await,
        StateName::Succeeded,
        "it was faster"
    );
    assert!(f.batch().await.completed_at.is_some());
}

pub async fn a_cancelled_job_that_expires_is_cancelled(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    let granted = f.lease(2).await;
    f.queue.cancel(whole_batch()).await.unwrap();
    f.finish(&granted[1], Outcome::Released).await;
    assert_eq!(f.state("p/b/b").await, StateName::Cancelled);
    f.advance(61 * SECOND);
    f.tick().await;
    assert_eq!(f.state("p/b/a").await, StateName::Cancelled);
}

pub async fn a_label_cancels_across_batches(f: Fixture) {
    let labelled = |id: &str, value: &str| NewJob {
        labels: [("sweep".to_owned(), value.to_owned())].into(),
        ..new_job(id)
    };
    for (project, batch) in [("p", "b"), ("p", "b2"), ("other", "b")] {
        f.open(project, batch).await;
        let jobs = vec![labelled("x", "7"), labelled("y", "8"), new_job("z")];
        f.try_submit(project, batch, 0, jobs).await.unwrap();
    }
    let which = Selector::Label {
        project: project("p"),
        key: "sweep".into(),
        value: "7".into(),
    };
    assert_eq!(f.queue.cancel(which).await.unwrap().cancelled, 2);
    assert_eq!(f.state("p/b2/x").await, StateName::Cancelled);
    assert_eq!(f.state("p/b2/y").await, StateName::Ready);
    assert_eq!(f.state("other/b/x").await, StateName::Ready);
    f.submit(1, vec![labelled("new", "7")]).await;
    assert_eq!(
        f.state("p/b/new").await,
        StateName::Ready,
        "the batch goes on"
    );
}

pub async fn a_cancelled_batch_takes_no_more(f: Fixture) {
    f.with_jobs(&["a"]).await;
    let granted = f.lease(1).await.remove(0);
    f.queue.cancel(whole_batch()).await.unwrap();
    assert!(f.try_submit("p", "b", 1, vec![new_job("z")]).await.is_err());
    let spawning = Outcome::Succeeded {
        result: JobResult::default(),
        spawn: vec![submission(new_job("s"))],
    };
    assert_eq!(f.finish(&granted, spawning).await, FinishAck::Accepted);
    assert_eq!(
        f.state("p/b/s").await,
        StateName::Cancelled,
        "it arrives cancelled"
    );
    let batch = f.batch().await;
    assert!(batch.cancelled && batch.completed_at.is_some());
}

pub async fn ended_jobs_stay_as_they_are(f: Fixture) {
    f.with_jobs(&["a", "b"]).await;
    f.run_one(succeeded()).await;
    f.run_one(failed(ErrorClass::Invalid)).await;
    let done = f.queue.cancel(whole_batch()).await.unwrap();
    assert_eq!(done, Cancelled::default());
    assert_eq!(f.state("p/b/a").await, StateName::Succeeded);
    assert_eq!(f.state("p/b/b").await, StateName::Dead);
    let unknown = f.queue.cancel(Selector::Job(key("p/b/nobody"))).await;
    assert_eq!(
        unknown.unwrap_err().to_string(),
        "job p/b/nobody is not known"
    );
    let unknown = f
        .queue
        .cancel(Selector::Batch(project("p"), batch_id("nobody")));
    assert_eq!(
        unknown.await.unwrap_err().to_string(),
        "batch p/nobody is not known"
    );
}
