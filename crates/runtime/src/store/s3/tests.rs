use std::error::Error;

use bytes::Bytes;
use espalier_testbed::s3::S3Server;

use super::super::tests::{s3_settings, s3_store_with};
use super::*;

fn refusal(status: u16, code: &str) -> Refusal {
    Refusal {
        status,
        code: code.to_owned(),
        message: "words".to_owned(),
    }
}

#[test]
fn each_refusal_has_its_class() {
    for (status, code, class) in [
        (404, "NoSuchKey", "not_found"),
        (404, "Not Found", "not_found"),
        (404, "NoSuchBucket", "invalid"),
        (403, "AccessDenied", "denied"),
        (401, "Unauthorized", "denied"),
        (400, "ExpiredToken", "denied"),
        (400, "AuthorizationHeaderMalformed", "invalid"),
        (400, "EntityTooLarge", "invalid"),
        (301, "PermanentRedirect", "invalid"),
        (307, "TemporaryRedirect", "invalid"),
        (409, "ConditionalRequestConflict", "unavailable"),
        (429, "SlowDown", "unavailable"),
        (500, "InternalError", "unavailable"),
        (503, "ServiceUnavailable", "unavailable"),
        (501, "NotImplemented", "invalid"),
        (507, "XMinioStorageFull", "full"),
        (403, "QuotaExceeded", "full"),
        (416, "InvalidRange", "invalid"),
    ] {
        let (kind, _) = refusal(status, code).meaning();
        assert_eq!(kind.as_str(), class, "{status} {code}");
    }
}

#[test]
fn a_conflict_of_two_creates_is_no_existing_object() {
    assert!(refusal(412, "PreconditionFailed").says_exists());
    assert!(!refusal(409, "ConditionalRequestConflict").says_exists());
    assert!(!refusal(404, "NoSuchBucket").says_missing());
}

#[test]
fn an_explanation_is_read_and_nothing_else_of_it() {
    let xml = "<?xml version=\"1.0\"?><Error><Code>InvalidToken</Code><Message>no</Message><Token-0>t</Token-0></Error>";
    assert_eq!(element(xml, "Code"), Some("InvalidToken"));
    assert_eq!(element(xml, "Message"), Some("no"));
    assert_eq!(element("<Code>cut", "Code"), None);
    assert_eq!(element("", "Code"), None);
}

#[test]
fn urls_have_a_bucket_and_a_prefix() {
    for (url, bucket, prefix) in [
        ("s3://espalier", "espalier", ""),
        ("s3://espalier/", "espalier", ""),
        ("s3://my.bucket-1/a/b/", "my.bucket-1", "a/b"),
    ] {
        let (found, path) = parse(url).unwrap();
        assert_eq!((found, path.as_ref()), (bucket, prefix), "{url}");
    }
}

async fn open_error(settings: AmazonS3Builder, url: &str) -> StoreError {
    let store = s3_store_with(settings, url);
    let error = store.probe().await.unwrap_err();
    store.backend.explain(error)
}

#[tokio::test]
async fn what_is_wrong_with_the_settings_is_said_and_no_secret_is() {
    let server = S3Server::start().await;
    let url = S3Server::store_url("");
    let good = || s3_settings(&server.endpoint());
    let bad = [
        (
            good().with_secret_access_key("wrong-secret"),
            url.as_str(),
            "AWS_SECRET_ACCESS_KEY",
        ),
        (
            good().with_access_key_id("wrong-key"),
            &url,
            "AWS_ACCESS_KEY_ID",
        ),
    ];
    for (settings, url, says) in bad {
        let error = open_error(settings, url).await;
        assert_eq!(error.kind, StoreErrorKind::Denied, "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
        let shown = format!("{error:?}");
        for secret in ["wrong-secret", "secret-key-of", "StringToSign"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}

#[tokio::test]
async fn an_endpoint_where_nobody_answers_is_named() {
    let nobody = espalier_testbed::ports::Ports::claim();
    let endpoint = format!("http://{}", nobody.address(0));
    let error = open_error(s3_settings(&endpoint), "s3://espalier").await;
    assert_eq!(error.kind.as_str(), "unavailable");
    let text = error.to_string();
    assert!(
        text.contains(&endpoint) && text.contains("AWS_ENDPOINT_URL"),
        "{text}"
    );
    assert!(error.source().is_some());
}

#[tokio::test]
async fn missing_credentials_are_named() {
    let nobody = espalier_testbed::ports::Ports::claim();
    let endpoint = format!("http://{}", nobody.address(0));
    let settings = AmazonS3Builder::new()
        .with_endpoint(&endpoint)
        .with_metadata_endpoint(&endpoint);
    let error = open_error(settings, "s3://espalier").await;
    let text = error.to_string();
    assert!(text.contains("set `AWS_ACCESS_KEY_ID`"), "{text}");
    let half = AmazonS3Builder::new().with_access_key_id("k");
    let error = open("s3://espalier", half).err().unwrap();
    assert_eq!(error.kind, StoreErrorKind::Invalid);
}

#[test]
fn an_endpoint_with_credentials_is_refused_and_not_repeated() {
    let settings = s3_settings("http://me:hidden@127.0.0.1:1");
    let error = open("s3://espalier", settings).err().unwrap();
    assert!(!format!("{error:?}").contains("hidden"), "{error:?}");
}

#[test]
fn a_store_shows_no_credentials() {
    let store = s3_store_with(s3_settings("http://127.0.0.1:1"), "s3://espalier/x");
    let shown = format!("{store:?}");
    assert!(shown.contains("s3://espalier/x"), "{shown}");
    assert!(!shown.contains("key-of-a-test"), "{shown}");
}

/// A server that gives one answer to everything, and its endpoint.
async fn answering(
    status: u16,
    body: &'static str,
) -> (tokio::task::JoinSet<std::io::Result<()>>, String) {
    let status = http::StatusCode::from_u16(status).unwrap();
    let app =
        axum::Router::new().fallback(move || async move { (status, [("etag", "\"x\"")], body) });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let mut server = tokio::task::JoinSet::new();
    server.spawn(async move { axum::serve(listener, app).await });
    (server, endpoint)
}

#[tokio::test]
async fn a_server_that_ignores_the_condition_is_refused() {
    let (_server, endpoint) = answering(200, "").await;
    let error = open_error(s3_settings(&endpoint), "s3://espalier").await;
    assert_eq!(error.kind, StoreErrorKind::Invalid);
    assert!(error.to_string().contains("create-if-absent"), "{error}");
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_no_missing_object() {
    let body =
        "<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>";
    let (_server, endpoint) = answering(404, body).await;
    let store = s3_store_with(s3_settings(&endpoint), "s3://espalier");
    let error = store.get("a").await.unwrap_err();
    assert!(!error.is_not_found(), "{error}");
    assert!(error.to_string().contains("create it"), "{error}");
    assert!(store.delete("a").await.is_err());
}

#[tokio::test]
async fn a_conflict_is_tried_again_and_an_answer_without_words_is_understood() {
    let body = "<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>";
    for (status, body, kind) in [
        (409, body, "unavailable"),
        (404, "", "not_found"),
        (403, "", "denied"),
    ] {
        let (_server, endpoint) = answering(status, body).await;
        let store = s3_store_with(s3_settings(&endpoint), "s3://espalier");
        let error = store.create("a", Bytes::new()).await.unwrap_err();
        assert_eq!(error.kind.as_str(), kind, "{status}: {error:?}");
    }
}

#[tokio::test]
async fn an_explanation_without_end_is_cut() {
    let endless = "x".repeat(4 * EXPLANATION_BYTES_MAX).leak();
    let (_server, endpoint) = answering(400, endless).await;
    let store = s3_store_with(s3_settings(&endpoint), "s3://espalier");
    let error = store.get("a").await.unwrap_err();
    assert!(format!("{error:?}").len() < 4096);
}
