//! Shutdown by real signals. In a process of its own, because the whole process hears them.

#![cfg(unix)]

use std::time::Duration;

use espalier_runtime::shutdown::Shutdown;
use rustix::process::{Signal, getpid, kill_process};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn the_first_signal_drains_and_the_second_aborts() {
    let shutdown = Shutdown::from_signals(Duration::from_secs(600)).unwrap();
    kill_process(getpid(), Signal::TERM).unwrap();
    tokio::time::timeout(SOON, shutdown.draining())
        .await
        .unwrap();
    assert!(!shutdown.is_aborted());
    kill_process(getpid(), Signal::INT).unwrap();
    tokio::time::timeout(SOON, shutdown.aborted())
        .await
        .unwrap();
}
