//! An inference worker that follows adapters: versions come into the store and become latest there, by the commands that
//! people use, and are served without a restart; one that cannot be loaded changes nothing.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use espalier_core::trace::StopReason;
use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::{Cluster, Setup};
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
    /// A worker that follows what an option names.
    async fn of(follow: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let store = format!("file://{}", folder.path().join("store").display());
        tiny::write_model(&folder.path().join("model"));
        let options = [
            "--store-url",
            &store,
            "--follow",
            follow,
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

    /// A new version of an adapter, drawn from `seed`.
    fn add(&self, name: &str, seed: u64) {
        let [adapter, base] = [format!("adapter-{seed}"), "model".to_owned()]
            .map(|name| self.folder.path().join(name));
        tiny::write_adapter(&adapter, seed);
        self.done(&["add", name, text(&adapter), "--base", text(&base)]);
    }

    /// The names of what is served, beside the model.
    async fn names(&self) -> BTreeSet<String> {
        let listed = self.listed().await;
        let names = listed["data"].as_array().unwrap().iter();
        names
            .map(|one| one["id"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn until_named(&self, expected: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        wait_for("adapters to be served", DEADLINE, || async {
            let names = self.names().await;
            if names == expected {
                Ok(())
            } else {
                Err(names)
            }
        })
        .await;
    }

    /// Waits until version 1 is latest beside this canary.
    async fn until_canary(&self, expected: Value) {
        wait_for("the canary", DEADLINE, || async {
            let following = self.listed().await["following"][0].clone();
            let is_so = following["canary"] == expected && following["served"] == 1;
            if is_so { Ok(()) } else { Err(following) }
        })
        .await;
    }

    /// What answers a chat to `shop` is called.
    async fn answers(&self, content: &str) -> Value {
        let answer = self.serving.chat(content, json!({"model": "shop"})).await;
        answer["model"].clone()
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
    let world = World::of("shop").await;
    let listed = world.until(json!(null), json!(null), false).await;
    assert_eq!(listed["data"], json!([]));
    let unknown = chat("Hello", json!({"model": "shop"}));
    let (status, _) = world.serving.ask("/v1/chat/completions", &unknown).await;
    assert_eq!(status, 404);
    world.add("shop", 5);
    world.done(&["promote", "shop"]);
    let listed = world.until(json!(1), json!(1), false).await;
    let shop = &listed["data"][0];
    assert_eq!(
        (&shop["id"], &shop["path"], &shop["version"]),
        (&json!("shop"), &json!("default/shop@v1"), &json!(1))
    );
    let first = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(first["system_fingerprint"], fingerprint(shop));
    assert_eq!(
        first["model"], "shop@v1",
        "an answer says which version it is of"
    );

    world.add("shop", 6);
    world.done(&["promote", "shop", "v2"]);
    let second = world.until(json!(2), json!(2), false).await;
    assert_ne!(second["data"][0]["digest"], shop["digest"]);

    // A third one whose weights were changed in the store.
    world.add("shop", 7);
    world.until_named(&["shop", "shop@v2", "shop@v3"]).await;
    world.done(&["promote", "shop"]);
    world.until(json!(3), json!(3), false).await;
    world.add("shop", 8);
    spoil(&world, "shop@v4");
    world.done(&["promote", "shop", "v4"]);
    let broken = world.until(json!(3), json!(4), true).await;
    let error = broken["following"][0]["error"].as_str().unwrap();
    assert!(error.contains("must have SHA-256"), "{error}");
    assert_eq!(
        world.answers("Hello").await,
        "shop@v3",
        "the one before is served on"
    );
    let log = world.serving.process.log();
    assert!(log.contains("what was served is served on"), "{log}");

    world.done(&["rollback", "shop"]);
    world.until(json!(3), json!(3), false).await;
    world.done(&["rollback", "shop"]);
    world.until(json!(2), json!(2), false).await;
    world.done(&["rollback", "shop"]);
    let back = world.until(json!(1), json!(1), false).await;
    assert_eq!(back["data"][0]["digest"], shop["digest"]);
    let again = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(again["choices"], first["choices"]);
}

/// Changes the weights of a version in the store.
fn spoil(world: &World, version: &str) {
    let shown = world.adapters(&["show", version, "--json"]);
    let record: Value = serde_json::from_slice(&shown.stdout).unwrap();
    let mut files = record["files"].as_array().unwrap().iter();
    let is_weights = |file: &&Value| file["path"].as_str().unwrap().ends_with(".safetensors");
    let file = files.find(is_weights).unwrap();
    let store = world.folder.path().join("store");
    let path = store.join(file["path"].as_str().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_answers_whole_conversations_until_it_is_latest_or_taken_back() {
    let world = World::of("*").await;
    world.add("shop", 5);
    world.until_named(&["shop@v1"]).await;
    let refused = world.adapters(&["promote", "shop", "--canary", "0.5"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2));
    assert!(said.contains("no version of `shop` is latest"), "{said}");
    world.done(&["promote", "shop"]);
    world.add("shop", 6);
    world.until_named(&["shop", "shop@v1", "shop@v2"]).await;
    let candidate = world
        .serving
        .chat("Hello", json!({"model": "shop@v2"}))
        .await;
    assert_eq!(candidate["model"], "shop@v2");
    assert_eq!(world.answers("Hello").await, "shop@v1");

    world.done(&["promote", "shop", "v2", "--canary", "0.5"]);
    world
        .until_canary(json!({"version": 2, "share": 0.5}))
        .await;
    let shown = world.adapters(&["list"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("v1, v2 for 50 %"), "{shown}");
    let mut answered = BTreeSet::new();
    for n in 0..16 {
        let mut messages = vec![
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "user", "content": format!("Hello, {n}.")}),
        ];
        let mut of_turns = BTreeSet::new();
        for _ in 0..3 {
            let more = json!({"model": "shop", "messages": messages, "max_tokens": 2});
            let answer = world.serving.chat("", more).await;
            let model = answer["model"].as_str().unwrap().to_owned();
            let digest = answer["system_fingerprint"].as_str().unwrap().to_owned();
            of_turns.insert((model, digest));
            messages.push(json!({"role": "assistant", "content": "Well."}));
            messages.push(json!({"role": "user", "content": "Go on."}));
        }
        assert_eq!(of_turns.len(), 1, "{of_turns:?}");
        answered.extend(of_turns);
    }
    let models: Vec<&str> = answered.iter().map(|(model, _)| &**model).collect();
    assert_eq!(models, ["shop@v1", "shop@v2"]);

    world.done(&["rollback", "shop"]);
    world.until_canary(json!(null)).await;
    world.done(&["promote", "shop", "v2", "--canary", "0.5"]);
    world.done(&["promote", "shop", "v2"]);
    world.until_named(&["shop", "shop@v2"]).await;
    assert_eq!(world.answers("Hello").await, "shop@v2");
    world.done(&["rollback", "shop"]);
    world.until(json!(1), json!(1), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_followed_is_not_changed_by_hand_and_the_other_way_round() {
    let world = World::of("*").await;
    let own = world.folder.path().join("own");
    tiny::write_adapter(&own, 11);
    let (status, loaded) = world.serving.load_adapter("shop", &own).await;
    assert_eq!(status, 200, "{loaded}");
    world.add("shop", 5);
    world.done(&["promote", "shop"]);
    let stands = world.until(json!(null), json!(1), true).await;
    let error = stands["following"][0]["error"].as_str().unwrap();
    assert!(error.contains("`shop` was loaded by hand"), "{error}");
    let answer = world.serving.chat("Hello", json!({"model": "shop"})).await;
    assert_eq!(answer["system_fingerprint"], fingerprint(&loaded));
    assert_eq!(answer["model"], "shop");
    assert_eq!(delete(&world, "shop").await, 200);
    world.until(json!(1), json!(1), false).await;
    assert_eq!(world.answers("Hello").await, "shop@v1");

    let (status, refused) = world.serving.load_adapter("shop", &own).await;
    assert_eq!(status, 409, "{refused}");
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("is followed as default/shop"), "{message}");
    assert_eq!(delete(&world, "shop").await, 409);
    assert_eq!(delete(&world, "shop@v1").await, 409);
    assert_eq!(world.answers("Hello").await, "shop@v1");
}

async fn delete(world: &World, name: &str) -> u16 {
    let url = format!("{}/v1/adapters/{name}", world.serving.url);
    let answer = world.serving.client.delete(url).send().await;
    answer.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn rollouts_find_a_version_before_it_is_latest() {
    let cluster = Cluster::start_with(Setup::new("embedded", "")).await;
    let (options, environment) = cluster.answering();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let follow = ["--follow", "*", "--follow-every", "1"];
    let serving = Serving::start_with(&[&options[..], &follow].concat(), &environment).await;
    let mut agent = cluster.worker("agent", 2);
    let (adapter, base) = (serving.path("adapter"), serving.path("model"));
    tiny::write_adapter(&adapter, 5);
    let rollout = json!({
        "id": "j", "mcp": ["toy"], "prompt": "Go on.", "model": "shop@v1",
        "sampling": {"temperature": 0, "thinking": false, "completion_tokens": 8},
    });
    let words = [
        "adapters",
        "add",
        "shop",
        text(&adapter),
        "--base",
        text(&base),
    ];
    let added = cluster.espalier(&words).await;
    assert!(added.status.success(), "{added:?}");
    wait_for("coordinators to hear of it", DEADLINE, || async {
        let mut command = cluster.operator(&cluster.addresses());
        let output = command.args(["workers", "--json"]).output().unwrap();
        let workers = String::from_utf8_lossy(&output.stdout).into_owned();
        if workers.contains("shop@v1") {
            Ok(())
        } else {
            Err(workers)
        }
    })
    .await;
    let mut client = cluster.client().await;
    client.submit("b", &[rollout]).await;
    let result = client.wait("b", DEADLINE).await;
    assert_eq!(
        result.count(JobState::Succeeded),
        1,
        "{:?}",
        result.unsolved()
    );
    let trace = client.trace("b", "j").await;
    assert_eq!(trace.outcome.stop, StopReason::CutAnswer);
    let (_, listed) = serving.get("/v1/adapters").await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let answered = trace.model_calls[0].adapter.as_ref().unwrap();
    assert_eq!(
        (&*answered.name, answered.sha256.as_deref()),
        ("shop@v1", listed["data"][0]["digest"].as_str())
    );
    agent.terminate(DEADLINE).await;
}
