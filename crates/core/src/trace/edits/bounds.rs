//! Bounds of a patch that can be told from the patch alone.

use super::patch::{Change, Edit, Patch};
use crate::error::FieldError;
use crate::trace::SCHEMA_VERSION;

/// Most patches of one trace: a reader fetches them all.
pub const PATCHES_MAX: u32 = 1000;
/// Largest patch as JSON, in bytes: a long conversation that is joined fits.
pub const PATCH_BYTES_MAX: u64 = 32 << 20;
/// Longest text of one edit, in bytes: longer than any context.
pub const TEXT_BYTES_MAX: usize = 4 << 20;
/// Longest reason or author, in bytes.
pub const WHY_BYTES_MAX: usize = 4096;
/// Most labels of one patch.
pub const LABELS_MAX: usize = 64;
/// Longest label, key or value, in bytes, as in job specs.
pub const LABEL_BYTES_MAX: usize = 256;
/// Most edits of one patch: one for each field of a long conversation.
const EDITS_MAX: usize = 10_000;

/// Checks what needs no trace.
pub(super) fn check(patch: &Patch) -> Result<(), FieldError> {
    if patch.schema_version != SCHEMA_VERSION {
        let rule = format!("must be {SCHEMA_VERSION}");
        return Err(FieldError::new(
            "schema_version",
            patch.schema_version,
            rule,
        ));
    }
    length("by", &patch.by, 1..=WHY_BYTES_MAX)?;
    length("why", &patch.why, 0..=WHY_BYTES_MAX)?;
    match &patch.change {
        Change::Verdict { verdict } => reward("verdict.reward", verdict.reward),
        Change::Edit { edits } => check_edits(edits),
        Change::Label {
            labels,
            judgement,
            reward: given,
        } => {
            if labels.is_empty() && judgement.is_none() && given.is_none() {
                let rule = "must be given where neither a judgement nor a reward is";
                return Err(FieldError::new("labels", "{}", rule));
            }
            if labels.len() > LABELS_MAX {
                let rule = format!("must be at most {LABELS_MAX}");
                return Err(FieldError::new("labels", labels.len(), rule));
            }
            for (key, value) in labels {
                let is_name = |c: char| !c.is_control() && !c.is_whitespace() && c != '=';
                length("labels", key, 1..=LABEL_BYTES_MAX)?;
                if !key.chars().all(is_name) {
                    let rule = "must have keys without spaces and `=`";
                    return Err(FieldError::new("labels", key, rule));
                }
                let value = value.as_deref().unwrap_or_default();
                length(&format!("labels.{key}"), value, 0..=LABEL_BYTES_MAX)?;
            }
            given.map_or(Ok(()), |given| reward("reward", given))
        }
        Change::Hints { .. }
        | Change::Drop
        | Change::Undrop
        | Change::Join { .. }
        | Change::Undo { .. } => Ok(()),
    }
}

fn check_edits(edits: &[Edit]) -> Result<(), FieldError> {
    if !(1..=EDITS_MAX).contains(&edits.len()) {
        let rule = format!("must be 1 to {EDITS_MAX}");
        return Err(FieldError::new("edits", edits.len(), rule));
    }
    for (i, edit) in edits.iter().enumerate() {
        let fits = |field: &str, text: &str| {
            length(&format!("edits[{i}].{field}"), text, 0..=TEXT_BYTES_MAX)
        };
        match edit {
            Edit::Content { content, .. } => fits("content", content)?,
            Edit::Reasoning { reasoning, .. } => {
                fits("reasoning", reasoning.as_deref().unwrap_or_default())?;
            }
            Edit::Answer { content, reasoning } => {
                fits("content", content)?;
                fits("reasoning", reasoning.as_deref().unwrap_or_default())?;
            }
            Edit::Arguments { .. }
            | Edit::CutAfter { .. }
            | Edit::RemoveTurn { .. }
            | Edit::SplitBefore { .. }
            | Edit::Hint { .. } => {}
        }
    }
    Ok(())
}

fn length(
    field: &str,
    text: &str,
    bytes: std::ops::RangeInclusive<usize>,
) -> Result<(), FieldError> {
    if bytes.contains(&text.len()) {
        return Ok(());
    }
    let rule = format!("must be {} to {} bytes", bytes.start(), bytes.end());
    Err(FieldError::new(field, text, rule))
}

fn reward(field: &str, reward: f64) -> Result<(), FieldError> {
    if (0.0..=1.0).contains(&reward) {
        return Ok(());
    }
    Err(FieldError::new(field, reward, "must be in [0, 1]"))
}
