//! The door of a log: what may enter it.
//!
//! A patch is created under the number that follows the log which was checked, and creation is refused where that number
//! is taken. So every patch of a log was checked against all before it, also where several people write at once.

use super::apply::{Applied, applied, named};
use super::bounds::{self, PATCHES_MAX};
use super::curated::Curated;
use super::patch::{Change, Edit, Patch};
use super::standing::live;
use crate::error::FieldError;
use crate::trace::Trace;

/// What the trace comes to with `patch` at the end of `log`.
///
/// # Errors
/// The field of the patch that breaks a rule of its own, does not fit what is there, or takes away what a later patch
/// of the log needs.
pub fn check(trace: &Trace, log: &[Patch], patch: &Patch) -> Result<Curated, FieldError> {
    bounds::check(patch)?;
    if u32::try_from(log.len()).map_or(true, |n| n >= PATCHES_MAX) {
        let rule = format!("must be at most {PATCHES_MAX} before it");
        return Err(FieldError::new("patches", log.len(), rule));
    }
    if let Change::Undo { patch } = &patch.change {
        check_undo(log, *patch)?;
    }
    let before = applied(trace, &log.iter().collect::<Vec<_>>()).refused;
    let all: Vec<&Patch> = log.iter().chain([patch]).collect();
    let after = applied(trace, &all);
    let mut new = after.refused.iter().filter(|one| !before.contains(one));
    if let Some(first) = new.next() {
        if usize::try_from(first.patch) == Ok(log.len()) {
            return Err(first.error.clone());
        }
        let rule = format!(
            "must be kept, because patch {} needs it: take that one back first",
            first.patch
        );
        return Err(FieldError::new("patch", undone(patch), rule));
    }
    Ok(after.into_curated(trace))
}

fn undone(patch: &Patch) -> String {
    match &patch.change {
        Change::Undo { patch } => patch.to_string(),
        other => other.kind().to_owned(),
    }
}

fn check_undo(log: &[Patch], patch: u32) -> Result<(), FieldError> {
    let live = live(log);
    match usize::try_from(patch).ok().and_then(|n| live.get(n)) {
        Some(true) => Ok(()),
        Some(false) => Err(FieldError::new(
            "patch",
            patch,
            "must be one that counts, and this one is taken back",
        )),
        None => {
            let rule = format!("must be less than {}, the length of the log", log.len());
            Err(FieldError::new("patch", patch, rule))
        }
    }
}

/// Whether a patch that was made against a shorter log may still enter `log`: what it names must be what its maker saw.
/// To be called before [`check`].
///
/// # Errors
/// The name, and which patches its maker had seen.
pub fn recheck(trace: &Trace, log: &[Patch], patch: &Patch) -> Result<(), FieldError> {
    let length = log.len();
    let seen = match patch.log.map(usize::try_from) {
        None => return Ok(()),
        Some(Ok(seen)) if seen <= length => seen,
        Some(_) => {
            let rule = format!("must be at most {length}, the length of the log");
            return Err(FieldError::new("log", patch.log.unwrap_or_default(), rule));
        }
    };
    if seen == length {
        return Ok(());
    }
    let old = applied(trace, &log[..seen].iter().collect::<Vec<_>>());
    let new = applied(trace, &log.iter().collect::<Vec<_>>());
    let changed = |field: String, value: String| {
        let rule = format!(
            "must not have changed since it was looked at, after {seen} patches; the log has {length} now"
        );
        Err(FieldError::new(field, value, rule))
    };
    match &patch.change {
        Change::Edit { edits } => {
            for (i, edit) in edits.iter().enumerate() {
                if !is_same(&old, &new, edit.message()) {
                    let field = format!("edits[{i}].message");
                    return changed(field, told(edit));
                }
            }
            Ok(())
        }
        Change::Join { from, .. } if !is_same(&old, &new, None) => {
            changed("from".to_owned(), from.to_string())
        }
        _ => Ok(()),
    }
}

fn told(edit: &Edit) -> String {
    edit.message()
        .map_or_else(|| "the last one".to_owned(), |number| number.to_string())
}

/// Whether the message, or the last one, and its turn are the same in both.
fn is_same(old: &Applied<'_>, new: &Applied<'_>, message: Option<usize>) -> bool {
    let of = |one: &Applied<'_>| message.or(one.state.slots.last().map(|slot| slot.number));
    let (in_old, in_new) = (of(old), of(new));
    let messages = |one, number: Option<usize>| number.and_then(|n| named(one, n).map(|m| (n, m)));
    messages(&old.state, in_old) == messages(&new.state, in_new)
}
