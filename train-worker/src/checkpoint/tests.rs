//! Checkpoints that are stored, found, passed over and removed.

use super::*;
use crate::engine::{StateTensor, StateValues};
use crate::report::Step;

fn spec(text: &str) -> SpecDigest {
    let line = format!(r#"{{"prompt":"{text}"}}"#);
    SpecDigest::of(&espalier_core::spec::parse_line(line.as_bytes()).unwrap())
}

fn place(store: &Store, fence: u64) -> Place {
    Place {
        store: store.clone(),
        key: "p/b/j".parse().unwrap(),
        fence: Fence(fence),
    }
}

fn snapshot(step: u64, mark: f32) -> Snapshot {
    let mut history = History::default();
    for n in 1..=step {
        history.push(Step {
            step: n,
            loss: 1.0 / n as f64,
            grad_norm: 0.5,
            lr: 1e-4,
            tokens: 10,
            supervised: 5,
            took_ms: 1,
            at_s: 0.0,
            peak_share: None,
            eval_loss: None,
        });
    }
    Snapshot {
        spec: spec("a"),
        base_sha256: "base".to_owned(),
        data_sha256: "data".to_owned(),
        cursor: Cursor {
            epoch: 0,
            position: step as usize,
        },
        totals: Totals::default(),
        best: None,
        agreement: None,
        state: State {
            step,
            tensors: vec![StateTensor {
                name: "w".to_owned(),
                shape: vec![2],
                values: StateValues::F32(vec![mark, f32::from_bits(0x7fc0_0001)]),
            }],
        },
        history,
    }
}

async fn found(place: &Place, spec: &SpecDigest, base: &str, data: &str) -> Option<(u64, f32)> {
    let expected = Expected {
        spec,
        base_sha256: base,
        data_sha256: data,
    };
    let resumed = newest(place, expected).await.unwrap()?;
    let StateValues::F32(values) = &resumed.state.tensors[0].values else {
        panic!("numbers");
    };
    assert_eq!(values[1].to_bits(), 0x7fc0_0001, "bit for bit");
    assert_eq!(resumed.history.last().unwrap().step, resumed.record.step);
    Some((resumed.record.step, values[0]))
}

#[tokio::test]
async fn the_newest_whole_checkpoint_of_an_earlier_attempt_is_found() {
    let store = Store::open("memory://").await.unwrap();
    assert_eq!(
        found(&place(&store, 5), &spec("a"), "base", "data").await,
        None
    );
    for (fence, step, mark) in [
        (1, 10, 1.0),
        (1, 20, 2.0),
        (3, 20, 3.0),
        (3, 30, 4.0),
        (7, 40, 5.0),
    ] {
        save(&place(&store, fence), snapshot(step, mark))
            .await
            .unwrap();
    }
    let own = place(&store, 5);
    let asked = spec("a");
    let seek = || found(&own, &asked, "base", "data");
    assert_eq!(seek().await, Some((30, 4.0)), "not that of a later attempt");
    // A broken file, a missing record, a missing file: each time the one before.
    let path = layout::checkpoint_tensors(&own.key, Fence(3), 30, 0);
    store.put(&path, Bytes::from_static(b"torn")).await.unwrap();
    assert_eq!(seek().await, Some((20, 3.0)));
    let path = layout::checkpoint_record(&own.key, Fence(3), 20);
    store.delete(&path).await.unwrap();
    assert_eq!(seek().await, Some((20, 2.0)));
    let path = layout::checkpoint_steps(&own.key, Fence(1), 20);
    store.delete(&path).await.unwrap();
    assert_eq!(seek().await, Some((10, 1.0)));
}

#[tokio::test]
async fn a_checkpoint_of_another_training_is_refused() {
    let store = Store::open("memory://").await.unwrap();
    save(&place(&store, 1), snapshot(10, 1.0)).await.unwrap();
    let own = place(&store, 2);
    for (asked, base, data, is_found) in [
        ("a", "base", "data", true),
        ("b", "base", "data", false),
        ("a", "other", "data", false),
        ("a", "base", "other", false),
    ] {
        let found = found(&own, &spec(asked), base, data).await;
        assert_eq!(found.is_some(), is_found, "{asked} {base} {data}");
    }
}

#[tokio::test]
async fn what_is_removed_leaves_nothing() {
    let store = Store::open("memory://").await.unwrap();
    let own = place(&store, 1);
    save(&own, snapshot(10, 1.0)).await.unwrap();
    save(&own, snapshot(20, 2.0)).await.unwrap();
    own.remove(10).await.unwrap();
    let left = store.list("p", None, 100).await.unwrap();
    assert!(
        left.iter()
            .all(|object| object.path.contains("step-0000000020")),
        "{left:?}"
    );
    assert_eq!(left.len(), 3);
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let mut kept = Kept::default();
    assert_eq!(kept.stored(1, 2, Some(1)), [] as [u64; 0]);
    assert_eq!(kept.stored(2, 2, Some(1)), [] as [u64; 0]);
    assert_eq!(kept.stored(3, 2, Some(1)), [] as [u64; 0], "1 is the best");
    assert_eq!(kept.stored(4, 2, Some(1)), [2]);
    assert_eq!(kept.stored(5, 2, Some(5)), [1, 3]);
    assert_eq!(kept, Kept(vec![4, 5]));
}
