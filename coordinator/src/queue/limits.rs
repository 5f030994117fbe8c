//! The sizes of payloads, which every backend checks before anything else.

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::queue::NewJob;

use super::{
    ANNOUNCE_MAX, Change, JobResult, MANIFEST_BYTES_MAX, SHOWN_KEY_BYTES_MAX,
    SHOWN_VALUE_BYTES_MAX, SPEC_BYTES_MAX, SUMMARY_BYTES_MAX, Submission,
};

/// Takes payloads off submissions, having checked their sizes.
pub fn parted(field: &str, jobs: Vec<Submission>) -> Result<(Vec<NewJob>, Vec<Bytes>), FieldError> {
    for (n, job) in jobs.iter().enumerate() {
        check_bytes(
            &format!("{field}[{n}].spec"),
            job.spec.len(),
            SPEC_BYTES_MAX,
        )?;
    }
    Ok(jobs.into_iter().map(|job| (job.job, job.spec)).unzip())
}

/// Refuses a result that is too large to keep.
pub fn check_result(result: &JobResult) -> Result<(), FieldError> {
    check_bytes("summary", result.summary.len(), SUMMARY_BYTES_MAX)?;
    check_bytes("manifest", result.manifest.len(), MANIFEST_BYTES_MAX)
}

/// Refuses defaults that are too large to keep.
pub fn check_defaults(defaults: &Bytes) -> Result<(), FieldError> {
    check_bytes("defaults", defaults.len(), SPEC_BYTES_MAX)
}

/// Refuses an announcement that is too large.
pub fn check_changes(changes: &[Change]) -> Result<(), FieldError> {
    if changes.len() > ANNOUNCE_MAX {
        let rule = format!("must have at most {ANNOUNCE_MAX} entries");
        return Err(FieldError::new("changes", changes.len(), rule));
    }
    for (n, change) in changes.iter().enumerate() {
        let (key, value) = (
            change.key.len(),
            change.value.as_ref().map_or(0, Bytes::len),
        );
        check_bytes(&format!("changes[{n}].key"), key, SHOWN_KEY_BYTES_MAX)?;
        check_bytes(&format!("changes[{n}].value"), value, SHOWN_VALUE_BYTES_MAX)?;
    }
    Ok(())
}

fn check_bytes(field: &str, found: usize, max: usize) -> Result<(), FieldError> {
    if found <= max {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        format!("{found} bytes"),
        format!("must have at most {max} bytes"),
    ))
}
