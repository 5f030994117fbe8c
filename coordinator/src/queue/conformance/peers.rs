//! What coordinators show and tell each other.

use super::*;
use crate::queue::{ANNOUNCE_MAX, Change, PRESENCE_TTL, Table};
use espalier_core::id::CoordinatorId;

fn coordinator(name: &str) -> CoordinatorId {
    CoordinatorId::new(name).unwrap()
}

fn change(table: Table, key: &str, value: Option<&str>) -> Change {
    Change {
        table,
        key: key.to_owned(),
        value: value.map(|value| Bytes::from(value.to_owned())),
    }
}

fn worker(key: &str, value: &str) -> Change {
    change(Table::Workers, key, Some(value))
}

impl Fixture {
    async fn announce(&self, by: &str, changes: Vec<Change>) -> bool {
        let announced = self.queue.announce(coordinator(by), changes);
        announced.await.unwrap()
    }

    /// Who shows what under which key.
    async fn seen(&self, table: Table) -> Vec<(String, String, String)> {
        let shown = self.queue.shown(table).await.unwrap().into_iter();
        let mut seen: Vec<_> = shown
            .map(|shown| {
                let value = String::from_utf8(shown.value.to_vec()).unwrap();
                (shown.by.to_string(), shown.key, value)
            })
            .collect();
        seen.sort();
        seen
    }

    async fn keys_of(&self, table: Table) -> Vec<String> {
        let seen = self.seen(table).await.into_iter();
        seen.map(|(by, key, _)| format!("{by}:{key}")).collect()
    }
}

pub async fn what_a_coordinator_shows_all_see(f: Fixture) {
    assert!(f.seen(Table::Workers).await.is_empty());
    let first = vec![worker("w1", "one"), worker("w2", "two")];
    assert!(!f.announce("a", first).await, "it is new");
    assert!(!f.announce("b", vec![worker("w1", "other")]).await);
    let question = change(Table::Questions, "q", Some("may I"));
    let later = vec![worker("w2", "changed"), question];
    assert!(f.announce("a", later).await);
    let entry = |by: &str, key: &str, value: &str| (by.into(), key.into(), value.into());
    assert_eq!(
        f.seen(Table::Workers).await,
        [
            entry("a", "w1", "one"),
            entry("a", "w2", "changed"),
            entry("b", "w1", "other")
        ]
    );
    assert_eq!(
        f.seen(Table::Questions).await,
        [entry("a", "q", "may I")],
        "lists are apart"
    );
    let gone = vec![
        change(Table::Workers, "w1", None),
        change(Table::Workers, "nobody", None),
    ];
    f.announce("a", gone).await;
    assert_eq!(f.keys_of(Table::Workers).await, ["a:w2", "b:w1"]);

    let many = (0..=ANNOUNCE_MAX).map(|n| worker(&n.to_string(), ""));
    let refused = f.queue.announce(coordinator("a"), many.collect()).await;
    assert!(refused.unwrap_err().to_string().contains("`changes`"));
    let large = worker("w", &"x".repeat(1 << 20));
    let refused = f.queue.announce(coordinator("a"), vec![large]).await;
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("`changes[0].value`")
    );
}

pub async fn who_is_silent_too_long_is_seen_no_more(f: Fixture) {
    f.announce("a", vec![worker("w1", "")]).await;
    f.announce("b", vec![worker("w2", "")]).await;
    f.advance(PRESENCE_TTL - SECOND);
    assert!(
        f.announce("b", Vec::new()).await,
        "to say nothing is enough"
    );
    assert_eq!(f.keys_of(Table::Workers).await, ["a:w1", "b:w2"]);
    f.advance(SECOND);
    assert_eq!(f.keys_of(Table::Workers).await, ["b:w2"]);
    let back = f.announce("a", vec![worker("w3", "")]).await;
    assert!(!back, "it has to show everything again");
    assert_eq!(f.keys_of(Table::Workers).await, ["a:w3", "b:w2"]);
    f.advance(PRESENCE_TTL);
    assert!(f.seen(Table::Workers).await.is_empty());
    assert!(!f.announce("a", Vec::new()).await);
    assert!(f.seen(Table::Workers).await.is_empty());
}

pub async fn a_list_is_read_as_it_is_now(f: Fixture) {
    for n in 0..50 {
        let (key, last) = (n.to_string(), (n - 1).to_string());
        let changes = vec![worker(&key, "x"), change(Table::Workers, &last, None)];
        f.announce("a", changes).await;
        assert_eq!(f.keys_of(Table::Workers).await, [format!("a:{key}")]);
        assert_eq!(
            f.keys_of(Table::Workers).await,
            [format!("a:{key}")],
            "and the same again"
        );
    }
}

pub async fn what_is_told_reaches_whoever_listens(f: Fixture) {
    let (mut one, mut other) = (f.queue.events(), f.queue.events());
    let notice = Bytes::from_static(b"drain \xff\x00 w1");
    f.queue.tell(notice.clone()).await.unwrap();
    for events in [&mut one, &mut other] {
        let heard = Fixture::event(events, |event| matches!(event, Event::Notice(_))).await;
        assert_eq!(heard, Event::Notice(notice.to_vec()));
    }
}
