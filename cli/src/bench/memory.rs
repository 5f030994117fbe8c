//! Memory of a process and of everything it started, as Linux tells it.
//!
//! PSS (proportional set size) counts a page that several processes share once, in parts; browsers share most of
//! theirs, and a sum of resident sizes would count it many times.

use std::collections::HashMap;
use std::fs::read_to_string;
use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use espalier_runtime::tasks::blocking;
use serde_json::json;

use super::{Bound, Figures, Headline};
use crate::exit::Problem;

/// The bound of the issue for a coordinator that has nothing to do.
pub const COORDINATOR_MAX_MB: f64 = 30.0;
/// How often memory is looked at,
const EVERY: Duration = Duration::from_millis(200);
/// and how many times as long as a look took is waited at least: walking page tables costs what it measures.
const REST_FACTOR: u32 = 10;

/// Options of `bench memory`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Memory {
    /// The process, such as an idle coordinator's
    #[arg(value_name = "PID")]
    pub pid: u32,
    /// Seconds for which it is watched
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
}

/// What one look saw, in megabytes of 1,000,000 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Resident size of the process itself.
    pub own_rss_mb: f64,
    /// Its own proportional size.
    pub own_pss_mb: f64,
    /// Proportional size of everything that it started.
    pub below_pss_mb: f64,
    /// How many processes that is.
    pub below: usize,
    /// How many of them did not let themselves be looked at.
    pub unreadable: usize,
}

/// Watches a process for a while.
pub async fn measure(args: Memory) -> Result<Figures, Problem> {
    let mut samples = Vec::new();
    let look = watch(args.pid, |sample| samples.push(sample));
    let limit = Duration::from_secs(args.seconds);
    if let Ok(Err(problem)) = tokio::time::timeout(limit, look).await {
        return Err(problem);
    }
    let largest = |of: fn(&Sample) -> f64| samples.iter().map(of).fold(0.0, f64::max);
    let rss = largest(|sample| sample.own_rss_mb);
    Ok(Figures {
        values: json!({
            "seconds": args.seconds,
            "samples": samples.len(),
            "rss_max_mb": rss,
            "pss_max_mb": largest(|sample| sample.own_pss_mb),
            "below_pss_max_mb": largest(|sample| sample.below_pss_mb),
        }),
        headlines: vec![
            Headline::new("resident, largest", rss, "MB").bound(Bound::AtMost(COORDINATOR_MAX_MB)),
        ],
    })
}

/// Looks at a process over and over and hands out what it sees. Ends only when the process is gone.
pub async fn watch(pid: u32, mut seen: impl FnMut(Sample)) -> Result<(), Problem> {
    loop {
        let began = Instant::now();
        seen(look(pid).await?);
        tokio::time::sleep(EVERY.max(began.elapsed() * REST_FACTOR)).await;
    }
}

/// One look.
pub async fn look(pid: u32) -> Result<Sample, Problem> {
    let looked = blocking("bench.memory", move || sample(pid));
    let looked = looked
        .await
        .map_err(|error| Problem::failed(error.to_string()))?;
    looked.map_err(|error| Problem::failed(format!("cannot read memory of process {pid}: {error}")))
}

fn sample(pid: u32) -> io::Result<Sample> {
    let own = rollup(pid)?;
    let mut sample = Sample {
        own_rss_mb: own.rss_mb,
        own_pss_mb: own.pss_mb,
        ..Sample::default()
    };
    for process in descendants(pid, &parents()?) {
        match rollup(process) {
            Ok(size) => {
                sample.below_pss_mb += size.pss_mb;
                sample.below += 1;
            }
            // It ended since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(NO_SUCH_PROCESS) => {}
            Err(_) => sample.unreadable += 1,
        }
    }
    Ok(sample)
}

/// `ESRCH`: what Linux answers for a process that has ended and was not waited for.
const NO_SUCH_PROCESS: i32 = 3;

struct Size {
    rss_mb: f64,
    pss_mb: f64,
}

fn rollup(pid: u32) -> io::Result<Size> {
    let text = read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(Size {
        rss_mb: field_mb(&text, "Rss:"),
        pss_mb: field_mb(&text, "Pss:"),
    })
}

/// The value of `Name:   123 kB` in megabytes; 0 where there is none.
fn field_mb(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = value.and_then(|value| value.trim().trim_end_matches("kB").trim().parse().ok());
    kib.map_or(0.0, |kib: f64| kib * 1024.0 / 1e6)
}

/// The parent of each process.
fn parents() -> io::Result<HashMap<u32, u32>> {
    let mut parents = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // A process that ended since it was listed has no parent to speak of.
        let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        parents.extend(parent(&stat).map(|parent| (pid, parent)));
    }
    Ok(parents)
}

/// The second field after the command, which stands in parentheses and may hold anything.
fn parent(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

fn descendants(root: u32, parents: &HashMap<u32, u32>) -> Vec<u32> {
    let mut found = vec![root];
    let mut looked_at = 0;
    while let Some(&above) = found.get(looked_at) {
        let children = parents.iter().filter(|(_, parent)| **parent == above);
        found.extend(children.map(|(pid, _)| *pid));
        looked_at += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_counted_in_megabytes() {
        let text = "5581 7ffe [rollup]\nRss:   2000 kB\nPss:    500 kB\nPss_Anon: 7 kB\n";
        assert_eq!(field_mb(text, "Pss:"), 0.512);
        assert_eq!(field_mb(text, "Rss:"), 2.048);
        assert_eq!(field_mb(text, "Swap:"), 0.0);
        assert_eq!(parent("12 (a) b) S 7 12 12"), Some(7));
        assert_eq!(parent(""), None);
    }

    #[test]
    fn descendants_are_found_at_any_depth() {
        let parents = HashMap::from([(2, 1), (3, 2), (4, 3), (5, 9)]);
        let mut found = descendants(1, &parents);
        found.sort_unstable();
        assert_eq!(found, [2, 3, 4]);
    }

    #[tokio::test]
    async fn this_process_has_memory() {
        let sample = look(std::process::id()).await.unwrap();
        assert!(sample.own_rss_mb > 1.0, "{sample:?}");
        assert!(look(u32::MAX).await.is_err());
    }
}
