//! The conversation in a person's own editor. What was typed is kept in its file where it cannot be taken.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use espalier_core::error::FieldError;
use espalier_core::trace::edits::{Edit, apply, turns};
use espalier_runtime::config::Environment;
use espalier_runtime::traces::Loaded;
use tokio::process::Command;

use super::difference::difference;
use super::form::Form;
use crate::context::Context;
use crate::exit::Problem;

/// The editor where the environment names none.
const EDITOR_DEFAULT: &str = "vi";
/// Largest form that is read, in bytes: a long conversation.
const FORM_BYTES_MAX: u64 = 64 << 20;
/// What stands below the first line in an editor.
const HELP: &str = "\
# Texts are indented by two spaces. Remove all of a turn to remove it, or all from a turn's end on to cut there.
# `=== split` before a user message begins a conversation of its own; `=== answer` at the end adds one.
# `system hint` in place of `system` marks a hint. Lines that begin with `#` are not read.
";

/// What a person made of a form.
pub struct Edited {
    /// What leads there.
    pub edits: Vec<Edit>,
    /// How many corrections were in the form.
    pub seen: u32,
}

/// Opens the conversation in an editor, and says what was changed.
pub async fn edits(context: &Context, loaded: &Loaded) -> Result<Edited, Problem> {
    let turns = turns(&loaded.trace, &loaded.log);
    let text = Form::new(&loaded.trace.header.job, &loaded.curated, &turns).write();
    let (title, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let file = tempfile::Builder::new()
        .prefix("espalier-trace-")
        .suffix(".txt")
        .tempfile()?;
    std::fs::write(file.path(), format!("{title}\n{HELP}{rest}"))?;
    open(&editor(&context.environment), file.path()).await?;
    let edits = read(file.path()).and_then(|text| edits_of(loaded, &text));
    edits.map_err(|problem| match file.keep() {
        Ok((_, path)) => {
            let path = path.display();
            let fix = format!("mend {path}, then give `--form {path}` in place of --editor");
            problem.fix(fix)
        }
        Err(_) => problem,
    })
}

/// What a form says that somebody edited.
pub fn edits_of_file(loaded: &Loaded, file: &Path) -> Result<Edited, Problem> {
    edits_of(loaded, &read(file)?)
}

fn edits_of(loaded: &Loaded, text: &str) -> Result<Edited, Problem> {
    let edited = Form::read(text)?;
    let job = &loaded.trace.header.job;
    if edited.job != *job {
        let rule = format!("must name {job}");
        return Err(FieldError::new("line 1", &edited.job, rule).into());
    }
    let seen = usize::try_from(edited.log).ok();
    let Some(log) = seen.and_then(|seen| loaded.log.get(..seen)) else {
        let rule = format!(
            "must name a log of at most {} corrections",
            loaded.log.len()
        );
        return Err(FieldError::new("line 1", edited.log, rule).into());
    };
    // The form is compared with what was offered, whatever was written meanwhile.
    let turns = turns(&loaded.trace, log);
    let offered = Form::new(job, &apply(&loaded.trace, log), &turns);
    let edits = difference(&offered, &edited, &turns)?;
    let seen = edited.log;
    Ok(Edited { edits, seen })
}

fn editor(environment: &Environment) -> String {
    let named = ["VISUAL", "EDITOR"]
        .iter()
        .filter_map(|name| environment.get(*name));
    let mut named = named.filter(|text| !text.trim().is_empty());
    named.next().cloned().unwrap_or(EDITOR_DEFAULT.to_owned())
}

/// Runs the editor to its end. Its name may have arguments behind it, such as `code --wait`.
async fn open(editor: &str, file: &Path) -> Result<(), Problem> {
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or(EDITOR_DEFAULT);
    let status = Command::new(program).args(words).arg(file).status().await;
    let fail = |what: String| {
        Problem::failed(format!("the editor `{editor}` {what}"))
            .fix("name one that works in VISUAL or EDITOR")
    };
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(fail(format!("ended with {status}, so nothing was changed"))),
        Err(error) => Err(fail(format!("cannot be started: {error}"))),
    }
}

fn read(file: &Path) -> Result<String, Problem> {
    let fail =
        |reason: String| Problem::refused(format!("cannot read {}: {reason}", file.display()));
    let mut text = String::new();
    let opened = File::open(file).map_err(|error| fail(error.to_string()))?;
    opened
        .take(FORM_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| fail(error.to_string()))?;
    if text.len() as u64 > FORM_BYTES_MAX {
        return Err(fail(format!("it must have at most {FORM_BYTES_MAX} bytes")));
    }
    Ok(text)
}
