//! Commands against a coordinator in this process, with workers that do nothing: what a script would see.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use espalier_proto::v1;
use espalier_runtime::config::Environment;
use espalier_runtime::tasks::OnFailure;
use tokio_util::sync::CancellationToken;

use crate::args::Cli;
use crate::bench::{Ledger, Orders, Server, work};
use crate::context::Context;
use crate::exit::{Exit, Outcome, Problem};

/// A coordinator, a folder for files, and a command line that knows both.
struct Scene {
    server: Server,
    folder: tempfile::TempDir,
    leave: CancellationToken,
}

impl Scene {
    async fn new() -> Self {
        Self {
            server: Server::start().await.unwrap(),
            folder: tempfile::tempdir().unwrap(),
            leave: CancellationToken::new(),
        }
    }

    /// A worker for which every job has succeeded at once.
    fn hire(&self) {
        let orders = Orders {
            name: "idle".to_owned(),
            credit: 16,
            ledger: Arc::new(Ledger::new(0)),
            granted: None,
            leave: self.leave.clone(),
        };
        let working = Box::pin(work(self.server.worker.clone(), orders));
        self.server
            .tasks()
            .spawn("scene.worker", OnFailure::Log, working);
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    async fn run(&self, words: &[&str]) -> Outcome {
        self.run_with(words, "bench-client").await
    }

    async fn run_with(&self, words: &[&str], token: &str) -> Outcome {
        let words = ["espalier", "--json", "--url", &self.server.client.url]
            .into_iter()
            .chain(words.iter().copied());
        let cli = Cli::try_parse_from(words).unwrap();
        let environment = Environment::from([("ESPALIER_TOKEN".to_owned(), token.to_owned())]);
        let context = Context::new(cli.global, environment);
        Box::pin(crate::perform(&context, &cli.command)).await
    }

    async fn batch(&self, name: &str) -> v1::Batch {
        let request = v1::GetBatchRequest {
            batch: name.to_owned(),
        };
        let batch = self.server.client.jobs().get_batch(request).await;
        batch.unwrap().into_inner()
    }

    async fn end(self) {
        self.leave.cancel();
        self.server.end().await.unwrap();
    }
}

fn path(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn a_file_becomes_a_batch_that_is_followed_to_its_end() {
    let scene = Scene::new().await;
    scene.hire();
    let file = scene.file(
        "jobs.jsonl",
        "{\"id\":\"a\",\"prompt\":\"at ${site}\"}\n{\"id\":\"b\",\"prompt\":\"y\"}\n",
    );
    let submit = [
        "submit",
        path(&file),
        "--batch",
        "b1",
        "--var",
        "site=http://h",
        "--samples",
        "3",
        "--watch",
    ];
    assert_eq!(scene.run(&submit).await, Ok(Exit::Ok));
    // Sending it again, as after a lost answer, changes nothing.
    assert_eq!(scene.run(&["watch", "b1"]).await, Ok(Exit::Ok));
    let request = v1::ListJobsRequest {
        batch: "b1".to_owned(),
        ..Default::default()
    };
    let jobs = scene.server.client.jobs().list_jobs(request).await;
    let jobs = jobs.unwrap().into_inner().jobs;
    let ids: Vec<&str> = jobs.iter().map(|job| job.id.as_str()).collect();
    assert_eq!(ids, ["a.s0", "a.s1", "a.s2", "b.s0", "b.s1", "b.s2"]);
    for words in [
        &["jobs", "b1"][..],
        &["job", "show", "b1/a.s0"],
        &["batches"],
        &["questions"],
    ] {
        assert_eq!(scene.run(words).await, Ok(Exit::Ok), "{words:?}");
    }
    for words in [&["workers"][..], &["queues"]] {
        let by_operator = scene.run_with(words, "bench-admin").await;
        assert_eq!(by_operator, Ok(Exit::Ok), "{words:?}");
        let problem = scene.run(words).await.unwrap_err();
        assert_eq!(problem.exit, Exit::Unreachable, "{words:?}");
    }
    scene.end().await;
}

#[tokio::test]
async fn bad_jobs_are_refused_and_the_rest_is_accepted() {
    let scene = Scene::new().await;
    scene.hire();
    let content = b"{\"id\":\"a\",\"prompt\":\"x\"}\n{\"prompt\":\"\"}\n\xff\n{\"prompt\":\"x\",\"limits\":{\"turns\":-1}}\n{\"prompt\":\"x\",\"mcp\":[\"nowhere\"]}\n";
    let file = scene.file("jobs.jsonl", content);
    assert_eq!(
        scene
            .run(&["submit", path(&file), "--batch", "b1", "--watch"])
            .await,
        Ok(Exit::Refused)
    );
    let batch = scene.batch("b1").await;
    assert_eq!(batch.counts.unwrap().succeeded, 1);
    assert!(batch.complete);
    // A file without a single good job opens no batch.
    let file = scene.file("bad.jsonl", "{}x\n");
    assert_eq!(
        scene.run(&["submit", path(&file), "--batch", "b2"]).await,
        Ok(Exit::Refused)
    );
    assert_eq!(
        scene.run(&["watch", "b2"]).await.unwrap_err().exit,
        Exit::Refused
    );
    scene.end().await;
}

#[tokio::test]
async fn jobs_are_cancelled_by_name_batch_and_label() {
    let scene = Scene::new().await;
    let file = scene.file(
        "jobs.jsonl",
        "{\"id\":\"a\",\"prompt\":\"x\"}\n{\"id\":\"b\",\"prompt\":\"x\"}\n",
    );
    for batch in ["b1", "b2"] {
        let words = ["submit", path(&file), "--batch", batch, "--label", "run=7"];
        assert_eq!(scene.run(&words).await, Ok(Exit::Ok));
    }
    let counts = async |batch: &str| scene.batch(batch).await.counts.unwrap();
    assert_eq!(scene.run(&["cancel", "b1/a"]).await, Ok(Exit::Ok));
    assert_eq!(
        (counts("b1").await.cancelled, counts("b1").await.ready),
        (1, 1)
    );
    assert_eq!(scene.run(&["cancel", "b1"]).await, Ok(Exit::Ok));
    assert_eq!(counts("b1").await.cancelled, 2);
    assert_eq!(
        scene.run(&["cancel", "--label", "run=7"]).await,
        Ok(Exit::Ok)
    );
    assert_eq!(counts("b2").await.cancelled, 2);
    scene.end().await;
}

#[tokio::test]
async fn who_is_nobody_or_somewhere_else_gets_exit_code_3() {
    let scene = Scene::new().await;
    let problem: Problem = scene.run_with(&["batches"], "nobody").await.unwrap_err();
    assert_eq!(problem.exit, Exit::Unreachable);
    assert!(problem.fix.unwrap().contains("ESPALIER_TOKEN"));
    let problem = scene
        .run_with(&["batches", "--url", "http://127.0.0.1:1"], "x")
        .await
        .unwrap_err();
    assert_eq!(problem.exit, Exit::Unreachable);
    assert_eq!(
        scene
            .run(&["job", "show", "b1/none"])
            .await
            .unwrap_err()
            .exit,
        Exit::Refused
    );
    scene.end().await;
}

#[tokio::test]
async fn imported_traces_are_listed_shown_exported_and_imported_again() {
    let scene = Scene::new().await;
    let store = format!("file://{}/store", scene.folder.path().display());
    let file = scene.file(
        "talk.json",
        r#"{"timestamp":"20250529_130900","model":"m","tools":[],"messages":[{"role":"user","content":"x"},
            {"role":"assistant","content":"y"}]}"#,
    );
    let bad = scene.file("bad.json", "[]");
    let out = scene.folder.path().join("out");
    let place = ["--store", store.as_str()];
    let traces = async |words: &[&str]| {
        scene
            .run(&[&["traces"][..], words, &place[..]].concat())
            .await
    };
    let imported = traces(&["import", path(&file), path(&bad), "--batch", "w"]).await;
    assert_eq!(imported, Ok(Exit::Refused), "one of the two is no trace");
    assert_eq!(traces(&["list", "w"]).await, Ok(Exit::Ok));
    assert_eq!(traces(&["show", "w/talk"]).await, Ok(Exit::Ok));
    assert_eq!(
        traces(&["export", "w", "--out", path(&out)]).await,
        Ok(Exit::Ok)
    );
    let exported = out.join("talk.json");
    let again = traces(&["import", path(&exported), "--batch", "w2"]).await;
    assert_eq!(again, Ok(Exit::Ok));
    let second = scene.folder.path().join("out2");
    assert_eq!(
        traces(&["export", "w2", "--out", path(&second)]).await,
        Ok(Exit::Ok)
    );
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    assert_eq!(read(exported), read(second.join("talk.json")));
    assert_eq!(traces(&["reverify", "w"]).await, Ok(Exit::Ok));
    assert_eq!(
        traces(&["export", "w", "--min-reward", "1"])
            .await
            .unwrap_err()
            .exit,
        Exit::Refused
    );
    scene.end().await;
}
