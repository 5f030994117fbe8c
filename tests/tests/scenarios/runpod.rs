//! `espalier runpod` against a server that holds it to RunPod's description: pods come, are told of and go, whatever RunPod
//! does wrong, and a worker in a pod is found by others.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::Duration;

use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::guide::{self, blocks};
use espalier_tests::harness::process::binary;
use espalier_tests::harness::runpod::{KEY, Runpod, Trouble};
use espalier_tests::harness::{tiny, wait_for};
use serde_json::{Value, json};

/// Long enough for two busy cores.
const DEADLINE: Duration = Duration::from_secs(120);
const TOKEN: &str = "token-of-the-workers";
const A5000: &str = "NVIDIA RTX A5000";
const L4: &str = "NVIDIA L4";

/// `espalier runpod …` on the account, with what the train worker cannot do without in the terminal.
async fn runpod(server: &Runpod, words: &[&str]) -> Output {
    let mut command = Command::new(binary("espalier"));
    command.arg("runpod").args(words);
    command.env("RUNPOD_API_URL", &server.url);
    command.env("RUNPOD_API_KEY", KEY);
    command.env("ESPALIER_TRAIN_WORKER_TOKEN", TOKEN);
    let run = tokio::task::spawn_blocking(move || command.output());
    let output = run.await.unwrap().unwrap();
    let told = [&output.stdout[..], &output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(!told.contains(KEY) && !told.contains(TOKEN), "{told}");
    output
}

/// `up` of train workers on these types of GPU.
async fn up(server: &Runpod, gpus: &[&str], more: &[&str]) -> Output {
    let mut words = vec![
        "up",
        "train",
        "--image",
        "registry.example/espalier/train-worker:1",
        "--json",
    ];
    words.extend(gpus.iter().flat_map(|gpu| ["--gpu", *gpu]));
    for variable in [
        "ESPALIER_TRAIN_WORKER_COORDINATOR_URL=https://jobs.example:7411",
        "ESPALIER_TRAIN_WORKER_COORDINATOR_CA=/etc/ssl/certs/ca-certificates.crt",
        "ESPALIER_TRAIN_WORKER_STORE_URL=s3://bucket/espalier",
        "ESPALIER_TRAIN_WORKER_TOKEN",
    ] {
        words.extend(["--env", variable]);
    }
    words.extend(more);
    runpod(server, &words).await
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn read(output: &Output) -> Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn pods_come_are_told_of_and_go() {
    let Some(server) = Runpod::start().await else {
        return;
    };
    server.provisioning(Duration::from_secs(1));
    server.stock(A5000, "NONE", 0);
    server.put(&json!({"name": "mine", "image": "x", "gpu": {"id": L4}}));
    let more = ["--name", "night", "--count", "2", "--max-price", "0.40"];
    let made = read(&up(&server, &[A5000, L4], &more).await);
    let made = made["pods"].as_array().unwrap();
    let names: Vec<&str> = made
        .iter()
        .map(|pod| pod["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["night-train-0", "night-train-1"]);
    for pod in made {
        assert_eq!(
            (&pod["state"], &pod["gpu"], &pod["price_per_hour"]),
            (&json!("running"), &json!(L4), &json!(0.39))
        );
    }
    let asked = &server.pods()[1].request;
    assert_eq!(asked["env"]["ESPALIER_TRAIN_WORKER_TOKEN"], TOKEN);
    assert_eq!(asked["env"]["ESPALIER_INSTANCE"], "night-train-0");

    // Once more: what is there stays. Other pods are other people's.
    let again = read(&up(&server, &[A5000, L4], &more).await);
    assert_eq!(
        (
            again["pods"].as_array().unwrap().len(),
            server.count("POST")
        ),
        (2, 2)
    );
    let status = read(&runpod(&server, &["status", "--json"]).await);
    assert_eq!(
        (
            status["pods"].as_array().unwrap().len(),
            &status["price_per_hour"]
        ),
        (2, &json!(0.78))
    );
    let table = runpod(&server, &["status", "--name", "night"]).await;
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("night-train-1  running  NVIDIA L4  $0.39"),
        "{table}"
    );
    assert!(table.contains("\n$0.78 an hour; $0.0"), "{table}");

    let asks = runpod(&server, &["down", "--name", "night"]).await;
    assert_eq!(
        (asks.status.code(), server.pods().len()),
        (Some(2), 3),
        "{}",
        said(&asks)
    );
    assert!(said(&asks).contains("give --yes"), "{}", said(&asks));
    let ended = read(&runpod(&server, &["down", "--name", "night", "--yes", "--json"]).await);
    assert_eq!(ended, json!({"ended": ["night-train-0", "night-train-1"]}));
    assert_eq!(server.names(), ["mine"]);
    let none = read(&runpod(&server, &["down", "--name", "night", "--yes", "--json"]).await);
    assert_eq!(none, json!({"ended": []}));
    assert_eq!(server.violations(), Vec::<String>::new());
}

/// The commands of the guide, in a shell. The training itself needs a model of four billion parameters.
#[tokio::test]
async fn a_training_tonight_goes_as_the_guide_says() {
    let Some(server) = Runpod::start().await else {
        return;
    };
    let commands = blocks("runpod", "sh").swap_remove(0);
    let commands = commands
        .lines()
        .filter(|line| !line.starts_with("export ") && !line.starts_with("espalier train "));
    let commands: Vec<&str> = commands.collect();
    // Without a terminal nobody can be asked.
    let commands = commands
        .join("\n")
        .replace("runpod down", "runpod down --yes");
    let mut shell = guide::shell(&commands);
    shell
        .env("RUNPOD_API_URL", &server.url)
        .env("RUNPOD_API_KEY", KEY);
    shell.env("ESPALIER_TRAIN_WORKER_TOKEN", TOKEN);
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"] {
        shell.env(name, "of-a-test");
    }
    let run = tokio::task::spawn_blocking(move || shell.output());
    let output = run.await.unwrap().unwrap();
    let (table, text) = (String::from_utf8_lossy(&output.stdout), said(&output));
    assert!(output.status.success(), "{text}");
    // Once by `up` and once by `status`, as the guide shows it.
    let shown = blocks("runpod", "text").swap_remove(0);
    let heading = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let expected = heading(shown.lines().next().unwrap());
    let headings = table.lines().filter(|line| heading(line) == expected);
    assert_eq!(headings.count(), 2, "{table}");
    for name in ["night-train-0", "night-train-1"] {
        assert!(table.matches(name).count() >= 2, "{table}");
    }
    assert_eq!((server.count("POST"), server.names()), (2, Vec::new()));
    assert_eq!(server.violations(), Vec::<String>::new());
    // What the pods are told is what the worker reads.
    let help = Command::new(binary("espalier-train-worker"))
        .arg("--help")
        .output();
    let help = String::from_utf8(help.unwrap().stdout).unwrap();
    let told = commands.split(|c: char| !c.is_ascii_uppercase() && c != '_');
    let told: BTreeSet<&str> = told.filter(|word| word.starts_with("ESPALIER_")).collect();
    assert_eq!(told.len(), 4, "{told:?}");
    for variable in told {
        assert!(
            help.contains(variable),
            "{variable} is none of the worker's"
        );
    }
}

#[tokio::test]
async fn what_runpod_does_wrong_costs_time_and_no_second_pod() {
    let Some(server) = Runpod::start().await else {
        return;
    };
    server.unlisted_at_first(1);
    server.trouble("GET /v2/pods", Trouble::Status(429, Some(1)), 1);
    server.trouble("GET /v2/catalog", Trouble::Status(503, None), 2);
    server.trouble("POST", Trouble::CutAfter, 1);
    server.trouble("GET /v2/pods", Trouble::Cut, 2);
    let made = read(&up(&server, &[L4], &[]).await);
    assert_eq!(made["pods"].as_array().unwrap().len(), 1);
    // The reply was lost and the list was late: there were two for a moment.
    assert_eq!(
        (server.count("POST"), server.names()),
        (2, vec!["cli-train-0".to_owned()])
    );
    assert_eq!(server.pods()[0].id, "pod0000001", "the older one stays");
    server.trouble("DELETE", Trouble::CutAfter, 1);
    let ended = read(&runpod(&server, &["down", "--yes", "--json"]).await);
    assert_eq!(ended, json!({"ended": ["cli-train-0"]}));
    assert_eq!(server.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn what_does_not_run_is_said_with_what_it_costs() {
    let Some(server) = Runpod::start().await else {
        return;
    };
    server.stock(L4, "LOW", 1);
    let few = up(&server, &[L4], &["--count", "2"]).await;
    let text = said(&few);
    assert_eq!(few.status.code(), Some(1), "{text}");
    assert!(
        text.contains("There are no instances currently available"),
        "{text}"
    );
    assert!(
        text.contains("1 of 2 pods are there and cost $0.39 an hour"),
        "{text}"
    );
    assert!(text.contains("name another --gpu"), "{text}");

    server.stock(L4, "HIGH", 5);
    server.set_status("cli-train-0", "ERROR");
    let anew = read(&up(&server, &[L4], &["--count", "2"]).await);
    assert_eq!(anew["pods"].as_array().unwrap().len(), 2);
    server.set_status("cli-train-1", "EXITED");
    server.provisioning(Duration::from_secs(600));
    let slow = up(&server, &[L4], &["--count", "2", "--wait", "1"]).await;
    let text = said(&slow);
    assert!(
        text.contains(
            "after 1 s 1 of 2 pods run: cli-train-0 is running, cli-train-1 is provisioning"
        ),
        "{text}"
    );
    let soon = read(&up(&server, &[L4], &["--count", "2", "--wait", "0"]).await);
    assert_eq!(soon["pods"][1]["state"], "provisioning");

    let dear = up(&server, &[L4], &["--name", "dear", "--max-price", "0.1"]).await;
    assert!(
        said(&dear).contains("costs $0.39 an hour, and `max_price` is $0.10"),
        "{}",
        said(&dear)
    );
    server.trouble("/v2/pods", Trouble::Status(401, None), 1);
    let unknown = runpod(&server, &["status"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        said(&unknown).contains("fix: set RUNPOD_API_KEY"),
        "{}",
        said(&unknown)
    );
    assert_eq!(server.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn without_a_key_nothing_is_asked() {
    let mut command = Command::new(binary("espalier"));
    command
        .args(["runpod", "status"])
        .env_remove("RUNPOD_API_KEY");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("set RUNPOD_API_KEY"),
        "{}",
        said(&output)
    );
}

/// A worker that serves is reached over RunPod's proxy, whose address has the pod's id: nobody knows that before it runs.
#[tokio::test]
async fn a_worker_in_a_pod_is_told_to_others_by_the_address_of_its_pod() {
    let Some(server) = Runpod::start().await else {
        return;
    };
    // Agent workers know the key under the name `pods`.
    let names = ("ESPALIER_COORDINATOR_WORKER_KEY_NAMES", r#"["pods"]"#);
    let cluster = Cluster::start_with(Setup {
        environment: vec![(names.0.to_owned(), names.1.to_owned())],
        ..Setup::new("embedded", "")
    })
    .await;
    let home = cluster.folder.path().to_owned();
    let model = home.join("model");
    tiny::write_model(&model);
    server.image("registry.example/espalier/infer-worker:1", move |_| {
        let mut command = Command::new(binary("espalier-infer-worker"));
        command.args(["--port", "0", "--device", "cpu"]);
        command.env("HOME", &home);
        command
    });
    let (options, environment) = cluster.answering();
    let variable = |name: &str, value: &str| format!("ESPALIER_INFER_WORKER_{name}={value}");
    let variables = [
        variable("COORDINATOR_URL", &options[1]),
        variable("STORE_URL", &options[3]),
        variable("TOKEN", &environment[0].1),
        variable("API_KEY", "key-of-the-pods"),
        variable("API_KEY_NAME", "pods"),
        variable("MODEL", model.to_str().unwrap()),
    ];
    let mut words = vec![
        "up",
        "infer",
        "--image",
        "registry.example/espalier/infer-worker:1",
        "--gpu",
        L4,
        "--json",
    ];
    words.extend(
        variables
            .iter()
            .flat_map(|variable| ["--env", variable.as_str()]),
    );
    let made = read(&runpod(&server, &words).await);
    let url = "https://pod0000001-8000.proxy.runpod.net/v1";
    assert_eq!(made["pods"][0]["url"], url);
    assert_eq!(server.pods()[0].request["ports"], json!(["8000/http"]));
    wait_for("the worker to be told of", DEADLINE, || async {
        let output = cluster
            .operator(&cluster.addresses())
            .args(["workers", "--json"])
            .output()
            .unwrap();
        let workers = read(&output);
        let told = &workers["workers"][0]["serving"]["url"];
        (*told == url).then_some(()).ok_or((workers, server.pods()))
    })
    .await;
    let ended = read(&runpod(&server, &["down", "--yes", "--json"]).await);
    assert_eq!(ended, json!({"ended": ["cli-infer-0"]}));
}
