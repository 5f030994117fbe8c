use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::path::Path as FilePath;

use futures::FutureExt;
use futures::future::join_all;

use espalier_testbed::s3::{self as server, S3Server};
use object_store::aws::AmazonS3Builder;

use super::faults::Fault;
use super::*;

fn file_url(folder: &FilePath) -> String {
    format!("file://{}", folder.display())
}

/// What the environment of a process that knows the server would say.
pub(super) fn s3_settings(endpoint: &str) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_region(server::REGION)
        .with_access_key_id(server::ACCESS_KEY)
        .with_secret_access_key(server::SECRET_KEY)
}

pub(super) fn s3_store_with(settings: AmazonS3Builder, url: &str) -> Store {
    Store::over(s3::open(url, settings).unwrap(), url)
}

fn s3_store(endpoint: &str, prefix: &str) -> Store {
    s3_store_with(s3_settings(endpoint), &S3Server::store_url(prefix))
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

/// What every backend has to show, where `racers` create each object at once.
async fn conformance(store: &Store, racers: u32) {
    reads_what_was_written(store).await;
    create_never_overwrites(store).await;
    of_many_creators_one_wins(store, racers).await;
    lists_in_order_and_in_pages(store).await;
    deletes_once_and_again(store).await;
    refuses_what_is_no_path(store).await;
    large_objects_are_whole(store).await;
    of_large_creators_one_wins(store).await;
}

async fn reads_what_was_written(store: &Store) {
    assert!(store.get("p/none").await.unwrap_err().is_not_found());
    assert!(store.head("p/none").await.unwrap_err().is_not_found());
    store.put("p/one", Bytes::from_static(b"1")).await.unwrap();
    store.put("p/one", Bytes::from_static(b"22")).await.unwrap();
    store.put("p/empty", Bytes::new()).await.unwrap();
    assert_eq!(store.get("p/one").await.unwrap(), "22");
    assert_eq!(store.get("p/empty").await.unwrap(), "");
    store
        .put("p/long", Bytes::from_static(b"abcdef"))
        .await
        .unwrap();
    assert_eq!(store.get_range("p/long", 2..4).await.unwrap(), "cd");
    let missing = store.get_range("p/none", 0..1).await.unwrap_err();
    assert!(missing.is_not_found());
    let meta = store.head("p/one").await.unwrap();
    assert_eq!((meta.path.as_str(), meta.size), ("p/one", 2));
    assert!(meta.modified > Timestamp::from_ms(1_577_836_800_000));
    store.put("p/one", Bytes::from_static(b"33")).await.unwrap();
    let etag = store.head("p/one").await.unwrap().etag;
    assert!(etag.is_some() && etag != meta.etag, "{etag:?}");
}

async fn create_never_overwrites(store: &Store) {
    let mine = Bytes::from_static(b"mine");
    assert_eq!(store.create("c/m", mine).await.unwrap(), Created::New);
    let other = Bytes::from_static(b"other");
    assert_eq!(store.create("c/m", other).await.unwrap(), Created::Exists);
    assert_eq!(store.get("c/m").await.unwrap(), "mine");
}

async fn of_many_creators_one_wins(store: &Store, racers: u32) {
    for round in 0..5 {
        let path = format!("race/{round}/manifest.json");
        let creators = (0..racers).map(|n| {
            let (store, path) = (store.clone(), path.clone());
            let content = Bytes::from(format!("creator {n}"));
            async move { (n, store.create(&path, content).await.unwrap()) }
        });
        let results = join_all(creators).await;
        let winners: Vec<u32> = results
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
    // `-` sorts before `/`, so that a folder lies between files that begin like it.
    for path in [
        "l/b/2", "l/a", "l/b/10", "l/b-x", "l/b/1", "l/c", "lx/a", "l-/a", "l/b.y",
    ] {
        store.put(path, Bytes::from_static(b"x")).await.unwrap();
    }
    let all = ["l/a", "l/b-x", "l/b.y", "l/b/1", "l/b/10", "l/b/2", "l/c"];
    assert_eq!(paths(store, "l/", None, 100).await, all);
    assert_eq!(paths(store, "l", None, 2).await, all[..2]);
    for (n, after) in all.iter().enumerate() {
        let rest = &all[n + 1..];
        let page = &rest[..rest.len().min(2)];
        assert_eq!(paths(store, "l/", Some(after), 2).await, page, "{after}");
    }
    assert_eq!(paths(store, "l/b", None, 100).await, all[3..6]);
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

/// More than two parts, and no whole number of them.
fn large(fill: u8) -> Bytes {
    let mut content = vec![fill; 2 * PART_BYTES + 12_345];
    // Each part differs, so that parts in the wrong order show.
    for (n, byte) in content.iter_mut().enumerate().step_by(4096) {
        *byte = (n >> 20) as u8;
    }
    content.into()
}

async fn large_objects_are_whole(store: &Store) {
    for content in [large(1), large(2)] {
        store.put("big/a", content.clone()).await.unwrap();
        assert!(store.get("big/a").await.unwrap() == content);
    }
    let exactly = large(3).slice(..PART_BYTES);
    store.put("big/b", exactly.clone()).await.unwrap();
    assert!(store.get("big/b").await.unwrap() == exactly);
    assert_eq!(paths(store, "big", None, 10).await, ["big/a", "big/b"]);
}

async fn of_large_creators_one_wins(store: &Store) {
    let creators = (0..4).map(|n| {
        let store = store.clone();
        async move { (n, store.create("big/c", large(n)).await.unwrap()) }
    });
    let results = join_all(creators).await;
    let winners: Vec<u8> = results
        .iter()
        .filter(|(_, created)| *created == Created::New)
        .map(|(n, _)| *n)
        .collect();
    assert_eq!(winners.len(), 1, "{winners:?}");
    assert!(store.get("big/c").await.unwrap() == large(winners[0]));
    store.delete("big/c").await.unwrap();
    store.create("big/c", large(9)).await.unwrap();
    let again = store.create("big/c", large(8)).await.unwrap();
    assert_eq!(again, Created::Exists);
    assert!(store.get("big/c").await.unwrap() == large(9));
}

#[tokio::test]
async fn memory_conforms() {
    conformance(&Store::open("memory://").await.unwrap(), 40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_folder_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&file_url(folder.path())).await.unwrap();
    conformance(&store, 40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn s3_conforms() {
    let server = S3Server::start().await;
    let store = s3_store(&server.endpoint(), "");
    store.probe().await.unwrap();
    assert_eq!(paths(&store, "", None, 10).await, [""; 0]);
    // The server makes racing creates of one object wait for each other, forty of them for ten seconds.
    conformance(&store, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn s3_conforms_below_a_prefix() {
    let server = S3Server::start().await;
    let store = s3_store(&server.endpoint(), "team/espalier");
    store.probe().await.unwrap();
    reads_what_was_written(&store).await;
    create_never_overwrites(&store).await;
    lists_in_order_and_in_pages(&store).await;
    deletes_once_and_again(&store).await;
    large_objects_are_whole(&store).await;
}

#[tokio::test]
async fn stores_of_one_bucket_see_their_prefix_only() {
    let server = S3Server::start().await;
    let [a, b] = ["a", "ab"].map(|prefix| s3_store(&server.endpoint(), prefix));
    a.put("x", Bytes::from_static(b"of a")).await.unwrap();
    assert!(b.get("x").await.unwrap_err().is_not_found());
    assert_eq!(paths(&b, "", None, 10).await, [""; 0]);
    let whole = s3_store(&server.endpoint(), "");
    assert_eq!(paths(&whole, "", None, 10).await, ["a/x"]);
}

#[tokio::test]
async fn s3_keeps_what_it_acknowledged_over_a_kill() {
    let mut server = S3Server::start().await;
    let store = s3_store(&server.endpoint(), "");
    let manifest = Bytes::from_static(b"manifest");
    store.create("m", manifest.clone()).await.unwrap();
    store.put("big", large(1)).await.unwrap();
    server.kill();
    let away = store.clone().with_limits(quick()).get("m").await;
    let away = away.unwrap_err();
    assert_eq!(away.kind.as_str(), "unavailable", "{away:?}");
    server.restart().await;
    assert_eq!(store.get("m").await.unwrap(), manifest);
    assert_eq!(store.create("m", large(2)).await.unwrap(), Created::Exists);
    assert!(store.get("big").await.unwrap() == large(1));
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
        "s3://",
        "s3://Bucket/x",
        "s3://bucket/a//b",
        "s3://key:secret@bucket/x",
        "gs://bucket",
        "file://relative/folder",
        "/plain/folder",
        "memory://x",
    ] {
        let error = Store::open(url).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Invalid, "{url}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
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
async fn a_part_that_fails_is_sent_again_alone() {
    let mut parts = 0;
    let store = faulty(move |operation, _| {
        parts += u32::from(operation == "put_part");
        assert!(parts <= 4, "three parts, one of them twice");
        (operation == "put_part" && parts == 2).then_some(Fault::Unavailable)
    })
    .await;
    store.put("big", large(1)).await.unwrap();
    assert!(store.get("big").await.unwrap() == large(1));
}

#[tokio::test]
async fn an_upload_that_fails_leaves_what_was_there() {
    for fails in ["put_begin", "put_part", "put_complete"] {
        let store = Store::open("memory://").await.unwrap();
        store.put("big", large(1)).await.unwrap();
        let faults = Faults::new(move |operation, _| (operation == fails).then_some(Fault::Full));
        let full = store.clone().with_limits(quick()).with_faults(faults);
        let error = full.put("big", large(2)).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Full, "{fails}");
        assert!(store.get("big").await.unwrap() == large(1), "{fails}");
    }
}

#[tokio::test]
async fn an_upload_whose_last_reply_was_lost_is_whole() {
    let server = S3Server::start().await;
    let mut lose = [Fault::LoseReply].into_iter();
    let faults = Faults::new(move |operation, _| match operation {
        "put_complete" => lose.next(),
        _ => None,
    });
    let store = s3_store(&server.endpoint(), "").with_faults(faults);
    store.put("big", large(1)).await.unwrap();
    assert!(store.get("big").await.unwrap() == large(1));
    assert_eq!(paths(&store, "", None, 10).await, ["big"]);
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
            backend.objects.delete(&at).now_or_never().unwrap().unwrap();
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
