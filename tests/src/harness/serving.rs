//! A real `espalier-infer-worker` that serves the tiny model, and how a test talks to it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use espalier_runtime::model::ADAPTER_FINGERPRINT;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process::{Process, binary};
use super::tiny;
use super::wait_for;

/// Long enough for two busy cores: the tokenizer alone takes a second where code is not optimised.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Longer than the last of a thousand answers takes on a machine that does much else.
const ANSWER_DEADLINE: Duration = Duration::from_secs(150);

/// A running worker, its model and its adapters.
#[derive(Debug)]
pub struct Serving {
    /// The process.
    pub process: Process,
    /// Where it answers, without a path.
    pub url: String,
    /// For requests that are made by hand.
    pub client: reqwest::Client,
    /// The model, what the process logs, and what a test puts beside them.
    pub folder: TempDir,
}

impl Serving {
    /// Starts it with these options beside the model and a free port.
    pub async fn start(options: &[&str]) -> Self {
        Self::start_with(options, &[]).await
    }

    /// The same with variables of its environment.
    pub async fn start_with(options: &[&str], environment: &[(&str, String)]) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let model = folder.path().join("model");
        tiny::write_model(&model);
        Self::start_on(folder, &model.display().to_string(), options, environment).await
    }

    /// The same on whatever `--model` names.
    pub async fn start_on(
        folder: TempDir,
        model: &str,
        options: &[&str],
        environment: &[(&str, String)],
    ) -> Self {
        let mut command = command(folder.path(), model, options);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut process = Process::start("infer", command, folder.path());
        let url = address(&mut process).await;
        let client = reqwest::Client::builder().timeout(ANSWER_DEADLINE).build();
        Self {
            process,
            url,
            client: client.expect("a client needs nothing"),
            folder,
        }
    }

    /// A folder beside the model.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A request to `path`.
    pub fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    /// What `path` says, with its status.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await;
        let response = response.expect("the worker answers");
        let status = response.status().as_u16();
        (status, response.text().await.expect("a whole answer"))
    }

    /// The answer to a chat, which must be one. Greedy and short where `more` does not say otherwise.
    pub async fn chat(&self, content: &str, more: Value) -> Value {
        let (status, body) = self.ask("/v1/chat/completions", &chat(content, more)).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Whatever comes back.
    pub async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self
            .post(path, body)
            .send()
            .await
            .expect("the worker answers");
        let status = response.status().as_u16();
        (status, response.json().await.expect("JSON"))
    }

    /// The events of a chat.
    pub async fn stream(&self, content: &str, mut more: Value) -> Vec<Value> {
        more["stream"] = json!(true);
        let response = self
            .post("/v1/chat/completions", &chat(content, more))
            .send()
            .await;
        let response = response.expect("the worker answers");
        assert_eq!(response.status(), 200);
        events(&response.text().await.expect("a whole answer"))
    }

    /// Loads an adapter.
    pub async fn load_adapter(&self, name: &str, path: &Path) -> (u16, Value) {
        self.ask("/v1/adapters", &json!({"name": name, "path": path}))
            .await
    }

    /// A value of `/metrics`, summed over labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, page) = self.get("/metrics").await;
        let of_name = |line: &&str| line.split(['{', ' ']).next() == Some(name);
        let lines = page.lines().filter(of_name);
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Waits until nothing runs, waits, or holds memory.
    pub async fn wait_until_idle(&self) {
        wait_for("the worker to be idle", ANSWER_DEADLINE, || async {
            let mut busy = Vec::new();
            for name in [
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
            ] {
                busy.push(self.metric(name).await);
            }
            if busy.iter().all(|value| *value == 0.0) {
                Ok(())
            } else {
                Err(busy)
            }
        })
        .await;
    }
}

/// How answers of an adapter are marked that was loaded with this answer.
pub fn fingerprint(loaded: &Value) -> Value {
    let digest = loaded["digest"].as_str().expect("a digest");
    json!(format!("{ADAPTER_FINGERPRINT}{digest}"))
}

/// The worker on a free port, not started.
pub fn command(folder: &Path, model: &str, options: &[&str]) -> Command {
    let mut command = Command::new(binary("espalier-infer-worker"));
    command.args([
        "--model",
        model,
        "--served-model-name",
        "tiny",
        "--port",
        "0",
        "--device",
        "cpu",
    ]);
    command.args(["--cpu-threads", "2"]).args(options);
    if !options.contains(&"--kv-cache-memory-bytes") {
        command.args(["--kv-cache-memory-bytes", "64MiB"]);
    }
    command.env("HOME", folder);
    command
}

/// Where it serves, once it does.
async fn address(process: &mut Process) -> String {
    wait_for("the worker to serve", START_DEADLINE, || {
        let ended = process.ended();
        let log = process.log();
        assert!(ended.is_none(), "the worker ended with {ended:?}:\n{log}");
        let serving = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut serving = serving.filter(|line| line["message"] == "serving");
        let address =
            serving.find_map(|line| Some(format!("http://{}", line["address"].as_str()?)));
        async move { address.ok_or(log.len()) }
    })
    .await
}

/// The body of a chat.
pub fn chat(content: &str, more: Value) -> Value {
    let mut body = json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

/// The data of a stream's events, without the mark of its end, which must be there.
pub fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let mut data: Vec<&str> = data.collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.iter()
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect()
}
