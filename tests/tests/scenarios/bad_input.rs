//! Bad input meets the door: field, value and rule are named, and the good rest of the batch goes on.

use std::time::Duration;

use espalier_proto::status::field_error;
use espalier_proto::v1;
use espalier_tests::harness::client::Client;
use espalier_tests::harness::model::{self, sum_job};
use espalier_tests::harness::up::{Up, toy_servers};
use serde_json::{Value, json};
use tonic::Code;

async fn start() -> Up {
    Up::start(&toy_servers(), &model::start().await, &[]).await
}

fn changed(id: &str, key: &str, value: Value) -> Value {
    let mut job = sum_job(id, 1);
    job[key] = value;
    job
}

#[tokio::test]
async fn bad_jobs_are_refused_one_by_one_and_the_rest_runs() {
    let up = start().await;
    let mut client = up.client().await;
    let jobs = [
        sum_job("good-1", 1),
        changed("empty", "prompt", json!("  ")),
        changed("negative", "limits", json!({"turns": -1})),
        sum_job("good-1", 1),
        changed("unknown-server", "mcp", json!(["nobody"])),
        changed("missing-dependency", "after", json!(["not-there"])),
        changed("cycle-a", "after", json!(["cycle-b"])),
        changed("cycle-b", "after", json!(["cycle-a"])),
        changed("regex", "verify", json!({"answer": {"regex": "(a"}})),
        changed(
            "path",
            "verify",
            json!({"all": [{"answer": {"json_path": "$.[", "equals": 1}}]}),
        ),
        changed("long", "prompt", json!("x".repeat(300_000))),
        changed("needs-good", "after", json!(["good-2"])),
        sum_job("good-2", 2),
    ];
    let answer = client.submit("b", &jobs).await;
    let expected = [
        (1, "prompt", "", "must not be empty"),
        (2, "limits.turns", "-1", "must be in 1..=1000"),
        (3, "id", "good-1", ""),
        (4, "mcp[0]", "nobody", "toy"),
        (5, "after[0]", "not-there", ""),
        (6, "after", "cycle-a", "depend on itself"),
        (7, "after", "cycle-b", "depend on itself"),
        (8, "verify.answer.regex", "(a", "regular expression"),
        (9, "verify.all[0].answer.json_path", "$.[", "RFC 9535"),
        (10, "prompt", "xxx", "at most"),
    ];
    let found: Vec<_> = answer
        .rejected
        .iter()
        .map(|r| (r.index, &r.errors[0]))
        .collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((index, error), (expected_index, field, value, rule)) in found.iter().zip(expected) {
        assert_eq!(
            (*index, error.field.as_str()),
            (expected_index, field),
            "{error:?}"
        );
        assert!(
            error.value.contains(value) && error.rule.contains(rule),
            "{error:?}"
        );
    }
    assert_eq!(answer.accepted, 3);
    assert_eq!(client.wait("b", Duration::from_secs(60)).await.solved(), 3);
}

#[tokio::test]
async fn a_job_cannot_be_changed_under_its_id() {
    let up = start().await;
    let mut client = up.client().await;
    client.open("b").await;
    assert_eq!(
        client
            .chunk("b", 0, &[sum_job("j", 1)])
            .await
            .unwrap()
            .accepted,
        1
    );
    let same = client.chunk("b", 1, &[sum_job("j", 1)]).await.unwrap();
    assert_eq!(
        (same.accepted, same.rejected.len()),
        (1, 0),
        "sending a job again is harmless"
    );
    let other = client.chunk("b", 2, &[sum_job("j", 2)]).await.unwrap();
    assert_eq!(
        (other.accepted, other.rejected[0].errors[0].field.as_str()),
        (0, "id")
    );
}

#[tokio::test]
async fn tokens_and_their_roles_are_checked() {
    let up = start().await;
    let file = up.file();
    for token in ["", "wrong", &format!("{}x", file.token)] {
        let mut stranger = Client::connect(&file.url, token).await;
        let request = v1::GetBatchRequest { batch: "b".into() };
        let status = stranger.jobs.get_batch(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
        assert!(
            !status.message().contains(&file.token),
            "a token stands in an error"
        );
    }
    let mut client = up.client().await;
    let drain = v1::DrainWorkerRequest { worker: "w".into() };
    let status = client.admin.drain_worker(drain.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("`admin`"), "{status:?}");
    let mut operator = Client::connect(&file.url, &file.admin_token).await;
    let status = operator.admin.drain_worker(drain).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
    let request = v1::GetBatchRequest { batch: "b".into() };
    let status = operator.jobs.get_batch(request).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("`read`"), "{status:?}");
}

#[tokio::test]
async fn a_job_brings_a_command_only_where_its_owner_alone_submits() {
    let bringing = |id: &str| {
        let server = toy_servers()["mcpServers"]["toy"].clone();
        changed(id, "mcp", json!([{"name": "mine", "server": server}]))
    };
    let model = model::start().await;
    let open = Up::start(&toy_servers(), &model, &["--listen", "0.0.0.0:0"]).await;
    let answer = open.client().await.submit("b", &[bringing("j")]).await;
    assert_eq!(answer.accepted, 0, "{answer:?}");
    let rule = &answer.rejected[0].errors[0].rule;
    assert!(rule.contains("allow_inline_mcp"), "{rule}");
    let log = open.process.log();
    assert!(log.contains("tokens travel unencrypted"), "{log}");

    let own = start().await;
    let answer = own.client().await.submit("b", &[bringing("j")]).await;
    assert_eq!(answer.accepted, 1, "{answer:?}");
    let log = own.process.log();
    assert!(!log.contains("tokens travel unencrypted"), "{log}");
}

#[tokio::test]
async fn page_tokens_stay_with_their_list() {
    let up = start().await;
    let mut client = up.client().await;
    client
        .submit(
            "b",
            &(0..5)
                .map(|n| sum_job(&format!("j{n}"), n))
                .collect::<Vec<_>>(),
        )
        .await;
    client.submit("c", &[sum_job("k", 1)]).await;
    let list = |batch: &str, page_token: &str| v1::ListJobsRequest {
        batch: batch.to_owned(),
        page_size: 2,
        page_token: page_token.to_owned(),
        ..v1::ListJobsRequest::default()
    };
    let first = client
        .jobs
        .list_jobs(list("b", ""))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.jobs.len(), 2);
    let second = client
        .jobs
        .list_jobs(list("b", &first.next_page_token))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(second.jobs[0].id, "j2");
    for (batch, token) in [("c", first.next_page_token.as_str()), ("b", "nonsense")] {
        let status = client.jobs.list_jobs(list(batch, token)).await.unwrap_err();
        let error = field_error(&status).unwrap_or_else(|| panic!("{status:?}"));
        assert_eq!(error.field, "page_token", "{error}");
    }
}

#[tokio::test]
async fn a_file_of_jobs_may_hold_anything() {
    use espalier_tests::harness::process::binary;
    let up = start().await;
    let mut lines: Vec<Vec<u8>> = vec![
        sum_job("good", 1).to_string().into(),
        br#"{"id":"typo","promt":"x"}"#.to_vec(),
        b"{\"id\":\"bytes\",\"prompt\":\"\xff\xfe\"}".to_vec(),
        b"not json".to_vec(),
        br#"{"id":"var","prompt":"go to ${nowhere}"}"#.to_vec(),
    ];
    lines.push(
        json!({"id": "huge", "prompt": "x".repeat(10_000_000)})
            .to_string()
            .into(),
    );
    lines.push(sum_job("good-too", 2).to_string().into());
    let path = up.folder.path().join("jobs.jsonl");
    std::fs::write(&path, lines.join(&b'\n')).unwrap();
    let mut command = std::process::Command::new(binary("espalier"));
    command
        .arg("submit")
        .arg(&path)
        .args(["--batch", "b", "--watch", "--json"]);
    command.arg("--data-dir").arg(up.folder.path().join("data"));
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        output.status.code(),
        Some(2),
        "some jobs were refused: {text}"
    );
    for part in ["promt", "UTF-8", "nowhere", "bytes"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let result = up.client().await.wait("b", Duration::from_secs(60)).await;
    assert_eq!(
        (result.jobs.len(), result.solved()),
        (2, 2),
        "the good rest ran"
    );
}
