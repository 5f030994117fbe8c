use std::error::Error;
use std::os::unix::fs::PermissionsExt;

use futures::FutureExt;
use futures::future::join_all;

use super::faults::Fault;
use super::*;

fn file_url(folder: &FilePath) -> String {
    format!("file://{}", folder.display())
}

/// Tries without waiting for long.
fn quick() -> StoreLimits {
    StoreLimits {
        try_timeout: Duration::from_millis(200),
        tries_max: 3,
        backoff: Backoff {
            first: Duration::from_millis(1),
            max: Duration::from_millis(2),
        },
    }
}

async fn paths(store: &Store, prefix: &str, after: Option<&str>, limit: usize) -> Vec<String> {
    let listed = store.list(prefix, after, limit).await.unwrap();
    listed.into_iter().map(|meta| meta.path).collect()
}

/// What every backend has to show.
async fn conformance(store: &Store) {
    reads_what_was_written(store).await;
    create_never_overwrites(store).await;
    of_forty_creators_one_wins(store).await;
    lists_in_order_and_in_pages(store).await;
    deletes_once_and_again(store).await;
    refuses_what_is_no_path(store).await;
}

async fn reads_what_was_written(store: &Store) {
    assert!(store.get("p/none").await.unwrap_err().is_not_found());
    assert!(store.head("p/none").await.unwrap_err().is_not_found());
    store.put("p/one", Bytes::from_static(b"1")).await.unwrap();
    store.put("p/one", Bytes::from_static(b"22")).await.unwrap();
    store.put("p/empty", Bytes::new()).await.unwrap();
    assert_eq!(store.get("p/one").await.unwrap(), "22");
    assert_eq!(store.get("p/empty").await.unwrap(), "");
    let meta = store.head("p/one").await.unwrap();
    assert_eq!((meta.path.as_str(), meta.size), ("p/one", 2));
    assert!(meta.modified > Timestamp::from_ms(1_577_836_800_000));
}

async fn create_never_overwrites(store: &Store) {
    let mine = Bytes::from_static(b"mine");
    assert_eq!(store.create("c/m", mine).await.unwrap(), Created::New);
    let other = Bytes::from_static(b"other");
    assert_eq!(store.create("c/m", other).await.unwrap(), Created::Exists);
    assert_eq!(store.get("c/m").await.unwrap(), "mine");
}

async fn of_forty_creators_one_wins(store: &Store) {
    for round in 0..5 {
        let path = format!("race/{round}/manifest.json");
        let creators = (0..40).map(|n| {
            let (store, path) = (store.clone(), path.clone());
            let content = Bytes::from(format!("creator {n}"));
            async move { (n, store.create(&path, content).await.unwrap()) }
        });
        let results = join_all(creators).await;
        let winners: Vec<i32> = results
            .iter()
            .filter(|(_, created)| *created == Created::New)
            .map(|(n, _)| *n)
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
        let content = store.get(&path).await.unwrap();
        assert_eq!(content, format!("creator {}", winners[0]));
    }
}

async fn lists_in_order_and_in_pages(store: &Store) {
    for path in ["l/b/2", "l/a", "l/b/10", "l/b/1", "l/c", "lx/a", "l-/a"] {
        store.put(path, Bytes::from_static(b"x")).await.unwrap();
    }
    let all = ["l/a", "l/b/1", "l/b/10", "l/b/2", "l/c"];
    assert_eq!(paths(store, "l/", None, 100).await, all);
    assert_eq!(paths(store, "l", None, 2).await, all[..2]);
    assert_eq!(paths(store, "l/", Some("l/b/1"), 2).await, all[2..4]);
    assert_eq!(paths(store, "l/", Some("l/c"), 2).await, [""; 0]);
    assert_eq!(paths(store, "l/b", None, 100).await, all[1..4]);
    assert_eq!(paths(store, "nothing", None, 100).await, [""; 0]);
    assert!(
        paths(store, "", None, 100)
            .await
            .contains(&"lx/a".to_owned())
    );
    let error = store.list("l", None, LIST_MAX + 1).await.unwrap_err();
    assert!(error.to_string().contains("got 10001"), "{error}");
}

async fn deletes_once_and_again(store: &Store) {
    store
        .put("d/a/b/c", Bytes::from_static(b"x"))
        .await
        .unwrap();
    store.delete("d/a/b/c").await.unwrap();
    store.delete("d/a/b/c").await.unwrap();
    assert!(store.get("d/a/b/c").await.unwrap_err().is_not_found());
    assert_eq!(paths(store, "d", None, 10).await, [""; 0]);
}

async fn refuses_what_is_no_path(store: &Store) {
    for path in ["a//b", "a/../b", "a/./b"] {
        let error = store.put(path, Bytes::new()).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Invalid, "{path}");
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[tokio::test]
async fn memory_conforms() {
    conformance(&Store::open("memory://").await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_folder_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&file_url(folder.path())).await.unwrap();
    conformance(&store).await;
}

#[tokio::test]
async fn a_folder_is_made_keeps_its_objects_and_stays_tidy() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("new/store with space");
    let store = Store::open(&file_url(&root)).await.unwrap();
    assert_eq!(
        std::fs::read_dir(&root).unwrap().count(),
        0,
        "the probe cleans up"
    );

    store
        .put("p/jobs/j/file", Bytes::from_static(b"kept"))
        .await
        .unwrap();
    // What a kill between staging and linking leaves behind.
    std::fs::write(root.join("p/jobs/j/file#1"), b"half").unwrap();
    let again = Store::open(&file_url(&root)).await.unwrap();
    assert_eq!(again.get("p/jobs/j/file").await.unwrap(), "kept");
    assert_eq!(paths(&again, "p", None, 10).await, ["p/jobs/j/file"]);
    again
        .put("p/jobs/j/file", Bytes::from_static(b"newer"))
        .await
        .unwrap();
    assert_eq!(again.get("p/jobs/j/file").await.unwrap(), "newer");

    std::fs::remove_file(root.join("p/jobs/j/file#1")).unwrap();
    again.delete("p/jobs/j/file").await.unwrap();
    assert!(!root.join("p").exists(), "empty folders go");
    assert!(root.exists());
}

#[tokio::test]
async fn urls_that_name_no_store_are_refused() {
    for url in [
        "",
        "s3://bucket",
        "file://relative/folder",
        "/plain/folder",
        "memory://x",
    ] {
        let error = Store::open(url).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Invalid, "{url}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Store::open(&file_url(&file.path().join("below")))
        .await
        .unwrap_err();
    assert!(error.source().is_some(), "{error}");
}

#[tokio::test]
async fn a_read_only_folder_is_denied_at_open() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o555)).unwrap();
    if std::fs::write(folder.path().join("x"), b"x").is_ok() {
        return; // Root may write anywhere, so there is nothing to see.
    }
    let error = Store::open(&file_url(folder.path())).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Denied);
}

async fn faulty(plan: impl FnMut(&'static str, &str) -> Option<Fault> + Send + 'static) -> Store {
    let store = Store::open("memory://").await.unwrap();
    store.with_limits(quick()).with_faults(Faults::new(plan))
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let mut faults = [Fault::Unavailable, Fault::Hang].into_iter();
    let store = faulty(move |_, _| faults.next()).await;
    store.put("a", Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), "x");
}

#[tokio::test]
async fn tries_are_bounded_and_the_error_says_for_how_long() {
    let store = faulty(|_, _| Some(Fault::Hang)).await;
    let error = store.put("a", Bytes::new()).await.unwrap_err();
    let StoreErrorKind::Unavailable { after } = error.kind else {
        panic!("{error}");
    };
    assert!(after >= 3 * quick().try_timeout, "{after:?}");
    assert!(error.source().unwrap().to_string().contains("store.put"));
}

#[tokio::test]
async fn what_cannot_pass_is_tried_once() {
    for (fault, kind) in [
        (Fault::Full, StoreErrorKind::Full),
        (Fault::Denied, StoreErrorKind::Denied),
    ] {
        let mut tries = 0;
        let store = faulty(move |_, _| {
            tries += 1;
            assert_eq!(tries, 1);
            Some(fault)
        })
        .await;
        let error = store.create("a", Bytes::new()).await.unwrap_err();
        assert_eq!(error.kind, kind);
    }
}

#[tokio::test]
async fn a_lost_reply_of_a_create_shows_as_exists() {
    let mut faults = [Fault::LoseReply].into_iter();
    let store = faulty(move |_, _| faults.next()).await;
    let created = store
        .create("a", Bytes::from_static(b"mine"))
        .await
        .unwrap();
    assert_eq!(created, Created::Exists);
    assert_eq!(store.get("a").await.unwrap(), "mine");
}

#[tokio::test]
async fn a_store_that_ignores_create_if_absent_is_refused() {
    // The object vanishes between the two creates, which looks the same as an ignored condition.
    let store = Store::open("memory://").await.unwrap();
    let backend = Arc::clone(&store.backend);
    let mut creates = 0;
    let store = store.with_faults(Faults::new(move |operation, path| {
        creates += u32::from(operation == "create");
        if creates == 2 {
            let at = Path::parse(path).unwrap();
            backend.delete(&at).now_or_never().unwrap().unwrap();
        }
        None
    }));
    let error = store.probe().await.unwrap_err();
    assert!(error.to_string().contains("create-if-absent"), "{error}");
}

#[test]
fn operations_can_run_in_tasks() {
    fn sendable(_: impl Future<Output: Send> + Send) {}
    let store = Store::open_unprobed("memory://").unwrap();
    sendable(store.create("a", Bytes::new()));
    sendable(store.get("a"));
    sendable(store.list("a", Some("b"), 1));
    sendable(Store::open("memory://"));
}
