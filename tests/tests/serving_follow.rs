//! An inference worker that follows an adapter: versions become latest in the store, by the command that people use, and are
//! served without a restart; one that cannot be loaded changes nothing.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use espalier_tests::harness::process::binary;
use espalier_tests::harness::serving::{Serving, chat, fingerprint};
use espalier_tests::harness::tiny;
use espalier_tests::harness::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);

struct World {
    folder: TempDir,
    store: String,
    serving: Serving,
}

impl World {
    async fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let store = format!("file://{}", folder.path().join("store").display());
        tiny::write_model(&folder.path().join("model"));
        let options = [
            "--store-url",
            &store,
            "--follow",
            "shop",
            "--follow-every",
            "1",
        ];
        let serving = Serving::start(&options).await;
        Self {
            folder,
            store,
            serving,
        }
    }

    fn adapters(&self, words: &[&str]) -> Output {
        let mut command = Command::new(binary("espalier"));
        command
            .arg("adapters")
            .args(words)
            .args(["--store", &self.store]);
        command.env("ESPALIER_DATA_DIR", self.folder.path().join("user"));
        command.output().unwrap()
    }

    fn done(&self, words: &[&str]) {
        let output = self.adapters(words);
        assert!(
            output.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// A new version, drawn from `seed`.
    fn add(&self, seed: u64) {
        let [adapter, base] = [format!("adapter-{seed}"), "model".to_owned()]
            .map(|name| self.folder.path().join(name));
        tiny::write_adapter(&adapter, seed);
        self.done(&["add", "shop", text(&adapter), "--base", text(&base)]);
    }

    async fn listed(&self) -> Value {
        let (status, text) = self.serving.get("/v1/adapters").await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Waits until what is followed is as `expected`, and gives all that is listed.
    async fn until(&self, served: Value, latest: Value, has_error: bool) -> Value {
        wait_for("the adapter to be followed", DEADLINE, || async {
            let listed = self.listed().await;
            let one = &listed["following"][0];
            let is_so = one["served"] == served
                && one["latest"] == latest
                && one["error"].is_string() == has_error;
            if is_so {
                Ok(listed)
            } else {
                Err(listed.to_string())
            }
        })
        .await
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_latest_is_served_and_what_does_not_load_changes_nothing() {
    let world = World::new().await;
    let listed = world.until(json!(null), json!(null), false).await;
    assert_eq!(listed["data"], json!([]));
    assert_eq!(
        world
            .serving
            .ask(
                "/v1/chat/completions",
                &chat("Hello", json!({"model": "shop"}))
            )
            .await
            .0,
        404
    );
    world.add(5);
    world.done(&["promote", "shop"]);
    let listed = world.until(json!(1), json!(1), false).await;
    assert_eq!(
        (&listed["data"][0]["id"], &listed["data"][0]["path"]),
        (&json!("shop"), &json!("default/shop@v1"))
    );
    let first = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(first["system_fingerprint"], fingerprint(&listed["data"][0]));

    world.add(6);
    world.done(&["promote", "shop", "v2"]);
    let second = world.until(json!(2), json!(2), false).await;
    assert_ne!(second["data"][0]["digest"], listed["data"][0]["digest"]);

    // A third one whose weights were changed in the store.
    world.add(7);
    let shown = world.adapters(&["show", "shop@v3", "--json"]);
    let record: Value = serde_json::from_slice(&shown.stdout).unwrap();
    let files = record["files"].as_array().unwrap();
    let file = files
        .iter()
        .find(|file| file["path"].as_str().unwrap().ends_with(".safetensors"))
        .unwrap();
    let path = world
        .folder
        .path()
        .join("store")
        .join(file["path"].as_str().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    world.done(&["promote", "shop", "v3"]);
    let broken = world.until(json!(2), json!(3), true).await;
    let error = broken["following"][0]["error"].as_str().unwrap();
    assert!(error.contains("must have SHA-256"), "{error}");
    assert_eq!(
        broken["data"], second["data"],
        "the one before is served on"
    );
    let answer = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(
        answer["system_fingerprint"],
        fingerprint(&second["data"][0])
    );
    assert!(
        world
            .serving
            .process
            .log()
            .contains("what was served is served on")
    );

    world.done(&["rollback", "shop"]);
    let back = world.until(json!(2), json!(2), false).await;
    assert_eq!(back["data"], second["data"]);
    world.done(&["rollback", "shop"]);
    let back = world.until(json!(1), json!(1), false).await;
    assert_eq!(back["data"][0]["digest"], listed["data"][0]["digest"]);
    let again = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(again["choices"], first["choices"]);
}
