//! What the disk under a measurement manages: the rate at which one small write after the other becomes durable. A
//! queue that answers after its commit cannot do more single commits than that.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use espalier_runtime::tasks::blocking;

use super::per_second;
use crate::exit::Problem;

/// One page, as a small commit writes.
const WRITE_BYTES: usize = 4096;
/// Enough writes for a steady figure, and the longest that a slow disk is asked for them.
const WRITES_MAX: usize = 500;
const MEASURE_MAX: Duration = Duration::from_secs(3);

/// Durable writes a second, in the folder for temporary files, where the measurements keep their queues.
pub async fn syncs_per_second() -> Result<f64, Problem> {
    let measured = blocking("bench.disk", || {
        let folder = tempfile::tempdir()?;
        write_and_sync(&folder.path().join("syncs"))
    });
    let measured = measured
        .await
        .map_err(|error| Problem::failed(error.to_string()))?;
    Ok(measured?)
}

fn write_and_sync(path: &Path) -> std::io::Result<f64> {
    let mut file = File::create(path)?;
    let began = Instant::now();
    let mut writes = 0;
    while writes < WRITES_MAX && began.elapsed() < MEASURE_MAX {
        file.write_all(&[0x5a; WRITE_BYTES])?;
        file.sync_data()?;
        writes += 1;
    }
    Ok(per_second(writes, began.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_a_rate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        assert!(write_and_sync(&path).unwrap() > 0.0);
        let written = std::fs::metadata(&path).unwrap().len();
        assert!(written >= WRITE_BYTES as u64);
    }
}
