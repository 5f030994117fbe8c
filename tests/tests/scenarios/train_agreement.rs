//! Training held against serving, with real processes: rollouts on a model that is served in f32, and a training of that
//! model which computes the log-probabilities of their tokens again.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use espalier_core::trace::{Trace, prompt_ids};
use espalier_proto::v1::JobState;
use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::serving::Serving;
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
const ROLLOUTS: usize = 6;
/// Makes a model of random weights end most answers within some tens of tokens, and moves no log-probability.
const BIAS: &str = r#"{ logit_bias = { "151645" = 4 } }"#;

/// Two questions to a model that draws from all of its vocabulary.
fn rollout(n: usize) -> Value {
    json!({
        "id": format!("r{n}"), "mcp": ["toy"], "prompt": [format!("Go on, {n}."), "And then?"],
        "sampling": {"temperature": 1, "top_p": 1, "top_k": 0, "thinking": false, "completion_tokens": 48, "seed": n},
    })
}

async fn roll_out(cluster: &Cluster) -> Vec<Trace> {
    let mut client = cluster.client().await;
    let jobs: Vec<Value> = (0..ROLLOUTS).map(rollout).collect();
    client.submit("base", &jobs).await;
    let result = client.wait("base", DEADLINE).await;
    let unsolved = result.unsolved();
    assert_eq!(result.count(JobState::Succeeded), ROLLOUTS, "{unsolved:?}");
    let mut traces = Vec::new();
    for n in 0..ROLLOUTS {
        traces.push(client.trace("base", &format!("r{n}")).await);
    }
    traces
}

/// A file with the longest call of all as its only sample: nothing of the others is longer than what is trained.
fn write_rows(folder: &Path, traces: &[Trace]) -> PathBuf {
    let call = |trace: &Trace| {
        let prompts = prompt_ids(&trace.model_calls).unwrap();
        let calls = trace.model_calls.iter().zip(prompts);
        calls
            .map(|(call, prompt)| (prompt.unwrap(), call.completion_ids.clone().unwrap()))
            .collect::<Vec<_>>()
    };
    let calls = traces.iter().flat_map(call);
    let longest = calls.max_by_key(|(prompt, said)| prompt.len() + said.len());
    let (prompt, said) = longest.unwrap();
    let ids = [&prompt[..], &said].concat();
    let row = json!({"id": "a", "ids": ids, "supervised": [[prompt.len(), ids.len()]]});
    let path = folder.join("rows.jsonl");
    std::fs::write(&path, format!("{row}\n")).unwrap();
    path
}

fn said(output: Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn training_computes_the_log_probabilities_that_were_served() {
    let bias = ("ESPALIER_AGENT_WORKER_MODEL_EXTRA", BIAS);
    let cluster = Cluster::start_with(Setup {
        environment: vec![(bias.0.to_owned(), bias.1.to_owned())],
        ..Setup::new("embedded", "")
    })
    .await;
    let (mut options, environment) = cluster.answering();
    // Weights, inputs, keys and values: nothing is rounded.
    options.extend(["--dtype", "f32"].map(str::to_owned));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let serving = Serving::start_with(&options, &environment).await;
    let mut worker = cluster.worker("a", 2);
    let _trainer = cluster.train_worker("trainer");
    let traces = roll_out(&cluster).await;
    let calls = traces.iter().flat_map(|trace| &trace.model_calls);
    let sampled = calls.map(|call| {
        let ids = call.completion_ids.as_ref().unwrap();
        assert_eq!(call.logprobs.as_ref().map(Vec::len), Some(ids.len()));
        ids.len()
    });
    let sampled: usize = sampled.sum();
    assert!(sampled > 50, "{sampled} tokens");

    let folder = cluster.folder.path();
    let rows = write_rows(folder, &traces);
    let config = folder.join("lora.toml");
    std::fs::write(&config, "rank = 4\nmax_steps = 2\n").unwrap();
    let [base, rows, config] =
        [serving.path("model"), rows, config].map(|path| path.display().to_string());
    let train = [
        "train",
        "--name",
        "tiny",
        "--base",
        &base,
        "--rows",
        &rows,
        "--config",
        &config,
        "--agreement",
        "base",
    ];
    let came = said(cluster.espalier(&train).await);
    let shown = said(
        cluster
            .espalier(&["adapters", "show", "tiny", "--json"])
            .await,
    );
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let agreement = &shown["training"]["agreement"];
    assert_eq!(
        (&agreement["traces"], &agreement["tokens"]),
        (&json!(ROLLOUTS), &json!(sampled)),
        "{shown}"
    );
    let [mean, max] = ["mean", "max"].map(|name| agreement[name].as_f64().unwrap());
    assert!(0.0 < mean && mean < 1e-5, "{agreement}");
    assert!(mean <= max && max < 1e-4, "{agreement}");
    let table = said(cluster.espalier(&["adapters", "show", "tiny"]).await);
    let words = format!("{sampled} tokens of {ROLLOUTS} traces");
    for told in [&came, &table] {
        let is_told = told.contains(&words) && told.contains("as f32 rounds");
        assert!(is_told, "{told}");
    }
    worker.terminate(DEADLINE).await;
}
