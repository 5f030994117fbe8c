//! The steps of one attempt, as far as they reached the store: what is left of one that was killed. Of no worth as a
//! result: only what a manifest names counts.

use espalier_core::id::{Fence, JobKey};
use espalier_core::layout;

use super::{TRACE_BYTES_MAX, TracesError, unpack};
use crate::store::Store;
use crate::tasks::blocking;

/// Most segments of one attempt: one every ten seconds makes more than a day.
const SEGMENTS_MAX: u32 = 10_000;

/// The steps of an attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// How many segments there are; also the number of the next one.
    pub segments: u32,
    /// Their lines, each a step as JSON.
    pub text: String,
}

/// Reads the segments of the attempt at `job` under `fence`; none at all are no error.
pub async fn read_steps(store: &Store, job: &JobKey, fence: Fence) -> Result<Steps, TracesError> {
    let mut steps = Steps::default();
    while steps.segments < SEGMENTS_MAX {
        let path = layout::segment(job, fence, steps.segments);
        let packed = match store.get(&path).await {
            Ok(packed) => packed,
            Err(error) if error.is_not_found() => break,
            Err(error) => return Err(error.into()),
        };
        let fail = |path: &str, rule: String| TracesError::Packed {
            path: path.to_owned(),
            rule,
        };
        let unpacked = {
            let path = path.clone();
            blocking("traces.unpack", move || unpack(&path, &packed)).await??
        };
        if (steps.text.len() + unpacked.len()) as u64 > TRACE_BYTES_MAX {
            let rule = format!("must make at most {TRACE_BYTES_MAX} bytes with those before it");
            return Err(fail(&path, rule));
        }
        let lines = String::from_utf8(unpacked);
        let lines = lines.map_err(|_| fail(&path, "must be UTF-8".to_owned()))?;
        steps.text.push_str(&lines);
        steps.segments += 1;
    }
    Ok(steps)
}
