//! What the queue costs the server: memory, and processor time. Both are bounded here with room for a slow machine;
//! `--nocapture` shows the figures.

use espalier_testbed::redis::RedisServer;

use super::faults::{chunk, lease, open_batch, success};
use super::tests::open;
use crate::queue::Queue;

const JOBS: u32 = 20_000;
const SPEC_BYTES: usize = 300;
/// What a queued job may take beside its spec.
const JOB_BYTES_MAX: u64 = 600;
/// What the longest calls, of 1,000 jobs, may take on the average.
const CALL_US_MAX: u64 = 100_000;

/// The number behind `name` in what INFO says.
async fn info(server: &RedisServer, section: &str, name: &str) -> u64 {
    let info = server.cli(&["INFO", section]).await;
    let at = info.find(name).unwrap_or_else(|| panic!("{name}: {info}"));
    let digits = info[at + name.len()..].split(|c: char| !c.is_ascii_digit());
    digits.into_iter().next().unwrap().parse().unwrap()
}

/// Microseconds that the server has worked so far: unlike the time in calls, whatever else the machine does.
async fn worked_us(server: &RedisServer) -> u64 {
    let info = server.cli(&["INFO", "cpu"]).await;
    let of = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        let seconds: f64 = line.unwrap().trim().parse().unwrap();
        (seconds * 1e6) as u64
    };
    of("used_cpu_user_main_thread:") + of("used_cpu_sys_main_thread:")
}

#[tokio::test]
async fn a_job_costs_the_server_little_memory_and_time() {
    let server = RedisServer::start_with(&[("appendfsync", "no")]).await;
    let queue = open(&server.url(), None, 1).await;
    let queue = queue.as_ref() as &dyn Queue;
    open_batch(queue, "b").await.unwrap();
    let before = info(&server, "memory", "used_memory:").await;
    let began = worked_us(&server).await;
    for n in 0..JOBS / 500 {
        queue.submit(chunk("b", n, 500, SPEC_BYTES)).await.unwrap();
    }
    let submit_us = worked_us(&server).await - began;
    let bytes = info(&server, "memory", "used_memory:").await - before;
    let bytes = bytes / u64::from(JOBS) - SPEC_BYTES as u64;
    println!("{bytes} bytes a queued job beside its spec");
    println!(
        "submit, 500 in a call: {} µs a call",
        submit_us * 500 / u64::from(JOBS)
    );
    for size in [100, 1_000] {
        let (mut lease_us, mut finish_us) = (0, 0);
        let calls = u64::from(JOBS / 2 / size);
        for _ in 0..calls {
            let began = worked_us(&server).await;
            let granted = lease(queue, size).await.unwrap();
            assert_eq!(granted.len(), size as usize);
            let leased = worked_us(&server).await;
            lease_us += leased - began;
            let ends = granted.iter().map(success).collect();
            queue.finish(ends).await.unwrap();
            finish_us += worked_us(&server).await - leased;
        }
        println!(
            "{size} in a call: lease {} µs, finish {} µs a call; {} cycles a second",
            lease_us / calls,
            finish_us / calls,
            u64::from(JOBS) * 1_000_000 / (submit_us + 2 * (lease_us + finish_us)),
        );
        let longest_us = (lease_us / calls).max(finish_us / calls);
        assert!(longest_us <= CALL_US_MAX, "a call takes {longest_us} µs");
    }
    assert!(bytes <= JOB_BYTES_MAX, "{bytes} bytes a job");
}
