use std::collections::BTreeMap;

use clap::Parser;
use espalier_coordinator::scaler::runpod::config::URL_DEFAULT;
use espalier_coordinator::scaler::runpod::wire::Pod;
use espalier_coordinator::scaler::runpod::{Cloud, RunpodConfig};
use espalier_core::time::Timestamp;
use espalier_runtime::config::Secret;
use serde_json::{Value, json};

use super::{RunpodCommand, status};
use crate::args::{Cli, Command};

const GPU: [&str; 2] = ["--gpu", "NVIDIA L4"];
const IMAGE: [&str; 2] = ["--image", "r.example/w:1"];
const TRAIN: [&str; 6] = [
    "--env",
    "ESPALIER_TRAIN_WORKER_COORDINATOR_URL=http://c:7411",
    "--env",
    "ESPALIER_TRAIN_WORKER_STORE_URL=s3://b/p",
    "--env",
    "ESPALIER_TRAIN_WORKER_TOKEN",
];

/// The account that a command line means, where the terminal has a token.
fn config(worker: &str, more: &[&str]) -> Result<RunpodConfig, String> {
    let words = ["espalier", "runpod", "up", worker].into_iter();
    let words = words.chain(more.iter().copied());
    let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
    let Command::Runpod(RunpodCommand::Up(up)) = cli.command else {
        panic!("another command");
    };
    let environment = BTreeMap::from([(
        "ESPALIER_TRAIN_WORKER_TOKEN".to_owned(),
        "hunter2hunter2".to_owned(),
    )]);
    let config = up.config(Secret::new("rpa_key"), &environment);
    let config = config.map_err(|problem| problem.to_string())?;
    assert!(!format!("{config:?}").contains("hunter2"));
    Ok(config)
}

#[test]
fn options_describe_a_pod() {
    let more = [
        "--name",
        "night",
        "--count",
        "2",
        "--gpu",
        "NVIDIA RTX A5000",
        "--gpu-count",
        "2",
        "--max-price",
        "0.5",
        "--cloud",
        "community",
        "--data-center",
        "EU-RO-1",
        "--cuda-min",
        "12.8",
        "--disk-gb",
        "40",
        "--volume",
        "50:/workspace",
        "--port",
        "22/tcp",
        "--registry",
        "cred",
        "--ssh",
        "--args",
        "--device auto",
    ];
    let config = config("train", &[&GPU[..], &IMAGE, &TRAIN, &more].concat()).unwrap();
    assert_eq!(
        (config.name.as_str(), config.url.as_str()),
        ("night", URL_DEFAULT)
    );
    let pool = &config.pools[0];
    assert_eq!(
        (pool.name.as_str(), pool.cloud, pool.max_price),
        ("train", Cloud::Community, Some(0.5))
    );
    assert_eq!(pool.gpus, ["NVIDIA L4", "NVIDIA RTX A5000"]);
    let pod = serde_json::to_value(pool.pod("night", "night-train-0", "NVIDIA L4")).unwrap();
    assert_eq!(pod["env"]["ESPALIER_TRAIN_WORKER_TOKEN"], "hunter2hunter2");
    assert_eq!(
        pod["mounts"],
        json!({"persistent": {"size": 50, "path": "/workspace"}})
    );
    assert_eq!(
        (&pod["args"], &pod["disk"], &pod["ports"]),
        (&json!("--device auto"), &json!(40), &json!(["22/tcp"]))
    );
}

#[test]
fn a_worker_that_serves_is_told_where_it_is() {
    let key = [
        "--env",
        "ESPALIER_INFER_WORKER_API_KEY=sk-1",
        "--env",
        "ESPALIER_INFER_WORKER_MODEL=m",
    ];
    let alone = config("infer", &[&GPU[..], &IMAGE, &key].concat()).unwrap();
    let pool = &alone.pools[0];
    assert_eq!(pool.ports, ["8000/http"]);
    assert_eq!(pool.env["ESPALIER_INFER_WORKER_HOST"].expose(), "0.0.0.0");
    assert!(!pool.env.contains_key("ESPALIER_INFER_WORKER_ADVERTISE_URL"));
    let coordinator = [
        "--env",
        "ESPALIER_INFER_WORKER_COORDINATOR_URL=http://c:7411",
        "--port",
        "8000/http",
    ];
    let words = [&GPU[..], &IMAGE, &key, &coordinator].concat();
    let said = config("infer", &words).unwrap_err();
    for missing in ["API_KEY_NAME", "STORE_URL", "TOKEN"] {
        let name = format!("ESPALIER_INFER_WORKER_{missing} (");
        assert!(said.contains(&name), "{said}");
    }
    let rest = [
        "--env",
        "ESPALIER_INFER_WORKER_API_KEY_NAME=pods",
        "--env",
        "ESPALIER_INFER_WORKER_STORE_URL=s3://b/p",
        "--env",
        "ESPALIER_INFER_WORKER_TOKEN=t",
    ];
    let told = config("infer", &[&words[..], &rest].concat()).unwrap();
    let pool = &told.pools[0];
    assert_eq!(pool.ports.len(), 1);
    assert_eq!(
        pool.env["ESPALIER_INFER_WORKER_ADVERTISE_URL"].expose(),
        "https://${RUNPOD_POD_ID}-8000.proxy.runpod.net/v1"
    );
}

#[test]
fn an_agent_worker_has_a_folder() {
    let told = [
        "COORDINATOR_URL=http://c:7411",
        "STORE_URL=s3://b/p",
        "TOKEN=t",
        "MODEL_NAME=m",
    ];
    let variables = told.map(|variable| format!("ESPALIER_AGENT_WORKER_{variable}"));
    let variables = variables
        .iter()
        .flat_map(|variable| ["--env", variable.as_str()]);
    let words: Vec<&str> = GPU.into_iter().chain(IMAGE).chain(variables).collect();
    let pool = config("agent", &words).unwrap().pools.remove(0);
    assert_eq!(
        pool.env["ESPALIER_AGENT_WORKER_DATA_DIR"].expose(),
        "/var/lib/espalier"
    );
    let error = config("agent", &words[..words.len() - 2]).unwrap_err();
    assert!(
        error.contains("ESPALIER_AGENT_WORKER_MODEL_NAME"),
        "{error}"
    );
}

#[test]
fn what_is_wrong_is_said_before_anything_costs() {
    let all = |more: &[&'static str]| [&GPU[..], &IMAGE, &TRAIN, more].concat();
    for (worker, more, rule) in [
        (
            "train",
            [&GPU[..], &IMAGE].concat(),
            "ESPALIER_TRAIN_WORKER_COORDINATOR_URL (whom to take jobs from",
        ),
        (
            "infer",
            [&GPU[..], &IMAGE].concat(),
            "ESPALIER_INFER_WORKER_API_KEY (what requests must show",
        ),
        ("train", [&GPU[..], &TRAIN].concat(), "--image"),
        ("train", [&IMAGE[..], &TRAIN].concat(), "--gpu"),
        ("trian", all(&[]), "possible values: agent, infer, train"),
        ("train", all(&["--name", "Night"]), "`name` must be 1 to 32"),
        ("train", all(&["--count", "0"]), "0 is not in 1..=100"),
        (
            "train",
            all(&["--max-price", "0"]),
            "`max_price` must be above 0",
        ),
        (
            "train",
            all(&["--env", "HOME=x", "--env", "NOPE"]),
            "`--env NOPE` has no value",
        ),
        ("train", all(&["--env", "=x"]), "must be NAME=VALUE"),
        (
            "train",
            all(&["--env", "ESPALIER_POOL=x"]),
            "must not set what the scaler sets",
        ),
        ("train", all(&["--volume", "50"]), "must have a colon"),
        (
            "train",
            all(&["--volume", "big:/w"]),
            "`--volume` must begin with a number of GB, got `big`",
        ),
        (
            "train",
            all(&["--port", "http"]),
            "`ports[0]` must be such as",
        ),
        (
            "train",
            all(&["--api-url", "http://api.example"]),
            "`url` must be `https://…`",
        ),
    ] {
        let error = config(worker, &more).unwrap_err();
        assert!(error.contains(rule), "{more:?}: {error}");
    }
    let template = [&GPU[..], &["--template", "t1"]].concat();
    assert!(
        config("train", &template).is_ok(),
        "the template has the variables"
    );
}

fn pod(name: &str, of: &str, created_at: &str) -> Pod {
    let value: Value = json!({
        "id": format!("id-{name}"), "name": name, "status": "RUNNING", "cost": 0.5, "createdAt": created_at,
        "gpu": {"id": "NVIDIA L4", "count": 2}, "env": {"ESPALIER_SCALER": of, "ESPALIER_INSTANCE": name},
    });
    serde_json::from_value(value).unwrap()
}

#[test]
fn golden_status() {
    let pods = vec![
        pod("b-0", "b", "2026-06-01T12:00:00Z"),
        pod("a-1", "a", "2026-06-01T10:30:00Z"),
        pod("mine", "", "2026-06-01T12:00:00Z"),
    ];
    let now = Timestamp::parse("2026-06-01T12:30:00Z").unwrap();
    let all = status::of_name(pods.clone(), None);
    assert_eq!(
        status::table_of(&all, now),
        " NAME  STATE    GPU            $/H    AGE          SPENT  ID      OF\n \
         a-1   running  2 × NVIDIA L4  $0.50  2 h 00 min   $1.00  id-a-1  a\n \
         b-0   running  2 × NVIDIA L4  $0.50  30 min 00 s  $0.25  id-b-0  b"
    );
    assert_eq!(status::of_name(pods, Some("b")).len(), 1);
    let value = status::pod_json(&all[0], now);
    assert_eq!(
        (&value["spent"], &value["age_s"], &value["of"]),
        (&json!(1.0), &json!(7200), &json!("a"))
    );
}
