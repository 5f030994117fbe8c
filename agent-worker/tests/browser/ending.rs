//! When servers end, and what is left of them after kill -9: nothing.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;

use super::processes::{parent_of, tree};
use super::{LONG, connect, host_with, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_recycled_and_do_not_rest_for_ever() {
    let host = host_with(json!({"recycle_after": 2, "idle_stop_s": 1}));
    let first = connect(&host).await.unwrap();
    let spent = host.process_ids();
    first.close().await;
    let second = connect(&host).await.unwrap();
    assert_eq!(host.process_ids(), spent, "a resting server is used again");
    let third = connect(&host).await.unwrap();
    assert_eq!(
        host.process_ids().len(),
        2,
        "the first one has had its two rollouts"
    );
    second.close().await;
    wait_until("the end of the spent server", || {
        !host.process_ids().contains(&spent[0])
    })
    .await;
    third.close().await;
    wait_until("the end of the resting server", || {
        host.process_ids().is_empty()
    })
    .await;
    assert!(host.shutdown(LONG).await);
}

/// Runs in a process of its own, which the next test kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "part of `kill_9_leaves_no_node_and_no_chromium`"]
async fn hold_two_browsers_until_killed() {
    let shared = host_with(json!({}));
    let process = host_with(json!({"isolation": "process"}));
    let _held = [
        connect(&shared).await.unwrap(),
        connect(&process).await.unwrap(),
    ];
    println!(
        "PIDS {:?}",
        [shared.process_ids(), process.process_ids()].concat()
    );
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_leaves_no_node_and_no_chromium() {
    use std::io::BufRead;
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "ending::hold_two_browsers_until_killed",
            "--ignored",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(holder.stdout.take().unwrap()).lines();
    let pids = loop {
        let line = lines.next().expect("the holder tells its servers").unwrap();
        if let Some((_, pids)) = line.split_once("PIDS ") {
            break serde_json::from_str::<Vec<i32>>(pids).unwrap();
        }
    };
    let processes = tree(&pids);
    let dirs: Vec<PathBuf> = pids
        .iter()
        .map(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap())
        .collect();
    assert!(
        processes.len() > 8,
        "two servers with browsers: {processes:?}"
    );
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_until("the end of all browsers", || {
        !processes.iter().any(|pid| parent_of(*pid).is_some())
    })
    .await;
    wait_until("the removal of their folders", || {
        !dirs.iter().any(|dir| dir.exists())
    })
    .await;
}
