//! Client and provider against a server that holds them to RunPod's description, and shows its faults.

mod client;
mod guide;
mod provider;

use espalier_core::queue::JobKind;
use espalier_runtime::config::Secret;
use espalier_testbed::runpod::{KEY, Runpod as Server};

use super::config::{RunpodConfig, RunpodPool};

const A5000: &str = "NVIDIA RTX A5000";
const L4: &str = "NVIDIA L4";
const H100: &str = "NVIDIA H100 80GB HBM3";
/// What a worker shows its coordinator, and nobody else may see.
const TOKEN: &str = "token-of-the-workers";

/// A pool `train` of pods with one of `gpus`, and $10 an hour for them.
fn config(server: &Server, gpus: &[&str]) -> RunpodConfig {
    let image = Some("registry.example/espalier/train-worker:1".to_owned());
    let gpus = gpus.iter().map(|gpu| (*gpu).to_owned()).collect();
    let mut pool = RunpodPool::new("train", image, gpus);
    let token = ("ESPALIER_TRAIN_WORKER_TOKEN".to_owned(), Secret::new(TOKEN));
    pool.env.extend([token]);
    (pool.kinds, pool.max) = ([JobKind::Train].into(), 8);
    let config = RunpodConfig {
        name: "espalier".to_owned(),
        api_key: Secret::new(KEY),
        url: server.url.clone(),
        max_per_hour: 10.0,
        max_per_day: 100.0,
        pools: vec![pool],
    };
    config.validate().unwrap();
    config
}

/// Nothing was asked that RunPod's description does not have.
fn assert_spoken(server: &Server) {
    assert_eq!(server.violations(), Vec::<String>::new());
}
