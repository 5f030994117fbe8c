//! What processes tell of how they do: workers over HTTP, a coordinator to its own command.

use std::process::{Command, Output};
use std::time::Duration;

use espalier_tests::harness::cluster::{Cluster, Setup};
use espalier_tests::harness::ports::Ports;
use espalier_tests::harness::process::binary;
use espalier_tests::harness::wait_for;

const DEADLINE: Duration = Duration::from_secs(60);
const NO_MODEL: &str = "http://127.0.0.1:9/v1";

/// Waits until the answer at `url` has this status, and gives its words.
async fn answers(url: &str, status: u16) -> String {
    let what = format!("{url} to answer {status}");
    wait_for(&what, DEADLINE, || async {
        let answer = reqwest::get(url).await.map_err(|error| error.to_string())?;
        let found = answer.status().as_u16();
        let words = answer.text().await.map_err(|error| error.to_string())?;
        match found == status {
            true => Ok(words),
            false => Err(format!("{found}: {words}")),
        }
    })
    .await
}

#[tokio::test]
async fn workers_tell_whether_they_live_and_whether_they_have_a_coordinator() {
    let ports = Ports::claim();
    let at = [ports.address(0), ports.address(1)];
    let environment = (
        "ESPALIER_AGENT_WORKER_HEALTH_LISTEN".to_owned(),
        at[0].to_string(),
    );
    let mut cluster = Cluster::start_with(Setup {
        environment: vec![environment],
        ..Setup::new("embedded", NO_MODEL)
    })
    .await;
    cluster.coordinators[0].process.kill();
    let mut agent = cluster.worker("agent", 2);
    let train = ["--health-listen", &at[1].to_string()];
    let mut train = cluster.train_worker_with("train", "cpu", &train);
    for at in at {
        let said = answers(&format!("http://{at}/ready"), 503).await;
        assert!(said.contains("not connected yet"), "{said}");
        answers(&format!("http://{at}/health"), 200).await;
    }
    cluster.restart_coordinator(0).await;
    for at in at {
        answers(&format!("http://{at}/ready"), 200).await;
    }
    // A coordinator that restarts makes no worker unready.
    cluster.coordinators[0].process.kill();
    for worker in [&agent.process, &train] {
        wait_for("the stream to be missed", DEADLINE, || {
            let log = worker.log();
            let last = log.rsplit("connected to a coordinator").next();
            let missed = last.is_some_and(|last| last.contains("no connection to a coordinator"));
            async move { missed.then_some(()).ok_or("it is not") }
        })
        .await;
    }
    for at in at {
        answers(&format!("http://{at}/ready"), 200).await;
    }
    agent.terminate(DEADLINE).await;
    let status = train.terminate(DEADLINE).await;
    assert!(status.success(), "{status:?}");
}

#[tokio::test]
async fn a_coordinator_is_asked_by_its_own_command() {
    let mut cluster = Cluster::start(NO_MODEL, 30_000).await;
    let config = cluster.folder.path().join("coordinator-0.toml");
    let ask = |service: &str| -> Output {
        let mut command = Command::new(binary("espalier-coordinator"));
        command.args(["health", "--service", service]);
        command.arg("--config").arg(&config).output().unwrap()
    };
    for service in ["liveness", "espalier.v1.WorkerService", ""] {
        let asked = ask(service);
        assert!(asked.status.success(), "{service}: {asked:?}");
        let said = String::from_utf8(asked.stdout).unwrap();
        assert!(said.contains("is served at 127.0.0.1:"), "{said}");
    }
    let refused = |asked: Output, words: &str| {
        assert_eq!(asked.status.code(), Some(1), "{asked:?}");
        let said = String::from_utf8(asked.stderr).unwrap();
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    };
    refused(
        ask("no.such.Service"),
        "it has no service `no.such.Service`",
    );
    cluster.coordinators[0].process.kill();
    refused(ask("liveness"), "it cannot be reached");
}
