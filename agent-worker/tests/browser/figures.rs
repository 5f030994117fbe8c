//! Start times and memory of browsers.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::pages::{serve, storage_site};
use super::processes::tree;
use super::{LONG, connect, host_with, open, snapshot};

/// Prints start times and memory: `cargo test -p espalier-agent-worker --test browser -- --ignored figures --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn figures() {
    let site = serve(storage_site).await;
    let mut out = Map::new();
    for (isolation, rollouts) in [("shared", 8), ("process", 4)] {
        let host = host_with(json!({"isolation": isolation}));
        let started = Instant::now();
        let mut held = vec![connect(&host).await.unwrap()];
        let first_ms = started.elapsed().as_millis();
        let started = Instant::now();
        held.push(connect(&host).await.unwrap());
        let second_ms = started.elapsed().as_millis();
        while held.len() < rollouts {
            held.push(connect(&host).await.unwrap());
        }
        let mut calls: BTreeMap<&str, Vec<u128>> = BTreeMap::new();
        for toolbox in &held {
            let started = Instant::now();
            open(toolbox, &format!("{site}/put/x")).await;
            calls
                .entry("navigate_us")
                .or_default()
                .push(started.elapsed().as_micros());
            let started = Instant::now();
            snapshot(toolbox).await;
            calls
                .entry("snapshot_us")
                .or_default()
                .push(started.elapsed().as_micros());
        }
        let pss: usize = tree(&host.process_ids())
            .iter()
            .map(|pid| pss_kib(*pid))
            .sum();
        let medians: Map<String, Value> = calls
            .into_iter()
            .map(|(name, mut times)| {
                times.sort_unstable();
                (name.to_owned(), json!(times[times.len() / 2] as u64))
            })
            .collect();
        out.insert(
            isolation.to_owned(),
            json!({"rollouts": rollouts, "first_connect_ms": first_ms as u64, "second_connect_ms": second_ms as u64,
                   "pss_mib_per_rollout": pss / 1024 / rollouts, "median": medians}),
        );
        assert!(host.shutdown(LONG).await);
    }
    println!("{}", serde_json::to_string_pretty(&out).unwrap());
}

fn pss_kib(pid: i32) -> usize {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}
