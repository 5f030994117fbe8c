//! A file of requests: checked at the door, and cut into parts between lines.
//!
//! A part is one job, which goes to a worker that serves the job's model. So all lines of a part are for one model, and a
//! new part begins where the model changes: the parts stay in the order of the lines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use espalier_core::answers::{BadLine, BatchRequest, LINE_BYTES_MAX};
use espalier_core::error::FieldError;
use espalier_core::spec::{GenerateDraft, JobDraft};
use espalier_core::trace::sha256_hex;
use serde_json::Value;

use crate::submit::file::Refusal;
use crate::submit::lines::{self, Line};

/// Where a part ends: large enough for hours of work, small enough for one upload and for an attempt's time.
const PART_MAX: Size = Size {
    bytes: 64 << 20,
    lines: 10_000,
};
/// Most times that the model changes from one line to the next: each is a job more.
const CHANGES_MAX: usize = 100;
/// Refusals that are kept; more say nothing new.
const REFUSALS_MAX: usize = 1_000;

/// A file that was checked.
#[derive(Debug, Default)]
pub struct Requests {
    /// Lines that are not blank.
    pub lines: u64,
    /// Where it is cut.
    pub parts: Vec<Part>,
    /// How often a line is for another model than the one before.
    pub changes: usize,
    /// What is wrong with it.
    pub refusals: Vec<Refusal>,
}

/// Some lines of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The byte at which they begin.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// The model that all of them are for; none: the base model of whoever answers.
    pub model: Option<String>,
}

/// Of a part.
#[derive(Clone, Copy)]
struct Size {
    bytes: u64,
    lines: u64,
}

/// Reads the whole file and checks each line. `model` is that of lines that name none. Blocking.
///
/// # Errors
/// It cannot be read, has no request at all, or changes its model again and again.
pub fn check(file: &Path, model: Option<&str>) -> Result<Requests, FieldError> {
    let fail = |rule: String| FieldError::new("file", file.display(), rule);
    let cannot = |error: io::Error| fail(format!("cannot be read: {error}"));
    let reader = BufReader::with_capacity(1 << 16, File::open(file).map_err(cannot)?);
    let requests = check_lines(reader, model, PART_MAX).map_err(cannot)?;
    match requests {
        Requests { lines: 0, .. } => Err(fail("must have at least one request".to_owned())),
        Requests { changes, .. } if changes > CHANGES_MAX => Err(fail(format!(
            "must have the lines of one model together: sort them by `body.model`, which changes {changes} times, and \
             may {CHANGES_MAX} times"
        ))),
        requests => Ok(requests),
    }
}

fn check_lines(
    reader: impl BufRead,
    default: Option<&str>,
    part_max: Size,
) -> io::Result<Requests> {
    let mut reader = Counted { reader, at: 0 };
    let mut requests = Requests::default();
    let mut seen = HashSet::new();
    let (mut place, mut open) = (0, None::<Open>);
    loop {
        let at = reader.at;
        let Some(line) = lines::next(&mut reader, LINE_BYTES_MAX)? else {
            break;
        };
        place += 1;
        let is_blank =
            matches!(&line, Line::Bytes(line) if line.iter().all(u8::is_ascii_whitespace));
        if is_blank {
            continue;
        }
        requests.lines += 1;
        let before = open.as_ref().and_then(|open| open.model.as_deref());
        let model = match check_line(&line, &mut seen, before) {
            Ok(named) => named.or_else(|| default.map(str::to_owned)),
            Err(bad) => {
                requests.refuse(place, bad);
                continue;
            }
        };
        let changes = open.as_ref().is_some_and(|open| open.model != model);
        requests.changes += usize::from(changes);
        if let Some(full) = open.take_if(|open| changes || open.is_full(at, part_max)) {
            requests.parts.push(full.end(at));
        }
        // Blank lines before the first are its part's.
        let start = requests.parts.last().map_or(0, |part| part.end);
        let open = open.get_or_insert(Open {
            start,
            lines: 0,
            model,
        });
        open.lines += 1;
    }
    requests.parts.extend(open.map(|open| open.end(reader.at)));
    Ok(requests)
}

/// A part that grows.
struct Open {
    start: u64,
    lines: u64,
    model: Option<String>,
}

impl Open {
    fn is_full(&self, at: u64, max: Size) -> bool {
        at - self.start >= max.bytes || self.lines >= max.lines
    }

    fn end(self, at: u64) -> Part {
        Part {
            start: self.start,
            end: at,
            model: self.model,
        }
    }
}

impl Requests {
    fn refuse(&mut self, place: u64, bad: BadLine) {
        if self.refusals.len() < REFUSALS_MAX {
            self.refusals.push(Refusal {
                place,
                id: bad.custom_id.unwrap_or_default(),
                error: bad.error,
            });
        }
    }
}

/// The model that a line names. `seen` are digests of the names so far, which take less memory than long names; `before`
/// is a model that may be named.
fn check_line(
    line: &Line,
    seen: &mut HashSet<String>,
    before: Option<&str>,
) -> Result<Option<String>, BadLine> {
    let request = match line {
        Line::Bytes(line) => BatchRequest::parse(line)?,
        Line::TooLong(bytes, _) => return Err(BadLine::too_long(*bytes)),
    };
    let fault = match request.body.get("model") {
        Some(Value::String(model)) if before != Some(model) => fault_of_model(model),
        _ => None,
    };
    let is_new = seen.insert(sha256_hex(request.custom_id.as_bytes()));
    let not_new = || {
        let rule = "must be unique in the file";
        FieldError::new("custom_id", &request.custom_id, rule)
    };
    match fault.or_else(|| (!is_new).then(not_new)) {
        None => match request.body.get("model") {
            Some(Value::String(model)) => Ok(Some(model.clone())),
            // What is no name is answered so by the API.
            _ => Ok(None),
        },
        Some(error) => Err(BadLine {
            custom_id: Some(request.custom_id),
            error,
        }),
    }
}

/// What is wrong with the name of a job's model.
fn fault_of_model(model: &str) -> Option<FieldError> {
    let draft = JobDraft {
        generate: Some(GenerateDraft {
            requests: Some("requests".to_owned()),
            model: Some(model.to_owned()),
        }),
        ..JobDraft::default()
    };
    let error = draft.check().err()?.into_iter().next()?;
    Some(FieldError {
        field: "body.model".to_owned(),
        ..error
    })
}

/// The bytes of a part. Blocking.
pub fn read(file: &Path, part: &Part) -> io::Result<Vec<u8>> {
    let mut file = File::open(file)?;
    file.seek(SeekFrom::Start(part.start))?;
    let bytes = part.end - part.start;
    let mut content = Vec::new();
    file.take(bytes).read_to_end(&mut content)?;
    match content.len() as u64 == bytes {
        true => Ok(content),
        false => Err(io::Error::other("the file of requests became shorter")),
    }
}

/// Counts what was read.
struct Counted<R> {
    reader: R,
    at: u64,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.reader.read(buffer)?;
        self.at += bytes as u64;
        Ok(bytes)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.at += bytes as u64;
        self.reader.consume(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Size = Size {
        bytes: 1 << 20,
        lines: 100,
    };

    fn line(id: &str) -> String {
        line_for(id, &Value::Null)
    }

    fn line_for(id: &str, model: &Value) -> String {
        let body = serde_json::json!({"prompt": "x", "model": model});
        let url = "/v1/completions";
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"{url}","body":{body}}}"#)
    }

    fn cut(text: &str, model: Option<&str>, max: Size) -> Vec<Part> {
        let requests = check_lines(text.as_bytes(), model, max).unwrap();
        assert_eq!(requests.refusals.len(), 0);
        requests.parts
    }

    #[test]
    fn a_file_is_cut_between_lines_and_blank_ones_make_no_part() {
        let one = line("a").len() as u64 + 1;
        let text = format!("{}\n{}\n\n{}\n\n\n", line("a"), line("b"), line("c"));
        let part = |start, end| Part {
            start,
            end,
            model: None,
        };
        let last = text.len() as u64;
        let two = [part(0, 2 * one + 1), part(2 * one + 1, last)];
        let bytes = 2 * one;
        assert_eq!(cut(&text, None, Size { bytes, ..WHOLE }), two);
        assert_eq!(cut(&text, None, Size { lines: 2, ..WHOLE }), two);
        assert_eq!(cut(&text, None, WHOLE), [part(0, last)]);
        assert_eq!(cut("\n \n", None, WHOLE), []);
        assert_eq!(cut(&format!("\n{}", line("a")), None, WHOLE).len(), 1);
    }

    #[test]
    fn a_part_is_for_one_model_and_parts_keep_the_order_of_the_lines() {
        let (a, b, none) = (Value::from("a"), Value::from("b"), Value::Null);
        let models = [&a, &a, &none, &none, &b, &a, &Value::from(7)];
        let lines = (0..).zip(models);
        let lines: Vec<String> = lines
            .map(|(n, model)| line_for(&format!("{n}"), model))
            .collect();
        let text = lines.join("\n");
        let named = |model| {
            let parts = cut(&text, model, WHOLE);
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start));
            assert_eq!(parts.last().unwrap().end, text.len() as u64);
            let name = |part: Part| part.model.unwrap_or_else(|| "base".to_owned());
            parts.into_iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(named(None), ["a", "base", "b", "a", "base"]);
        assert_eq!(named(Some("c")), ["a", "c", "b", "a", "c"]);
        assert_eq!(named(Some("b")), ["a", "b", "a", "b"]);
    }

    #[test]
    fn a_file_whose_models_alternate_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |count: usize| {
            let line = |n: usize| line_for(&n.to_string(), &["a", "b"][n % 2].into()) + "\n";
            std::fs::write(file.path(), (0..count).map(line).collect::<String>()).unwrap();
        };
        write(CHANGES_MAX + 1);
        let parts = check(file.path(), None).unwrap().parts;
        assert_eq!(parts.len(), CHANGES_MAX + 1);
        write(CHANGES_MAX + 2);
        let error = check(file.path(), None).unwrap_err();
        assert!(error.rule.contains("changes 101 times"), "{error}");
    }

    #[test]
    fn bad_lines_are_named_by_line_field_and_rule() {
        let text = format!(
            "{}\n\n{{}}\n{}\n{}\n{}",
            line("a"),
            line("a"),
            line("b"),
            line_for("c", &" ".into())
        );
        let requests = check_lines(text.as_bytes(), None, WHOLE).unwrap();
        let said: Vec<(u64, &str, &str)> = requests
            .refusals
            .iter()
            .map(|refusal| (refusal.place, &*refusal.id, &*refusal.error.field))
            .collect();
        assert_eq!(
            said,
            [
                (3, "", "custom_id"),
                (4, "a", "custom_id"),
                (6, "c", "body.model")
            ]
        );
        assert_eq!(
            requests.refusals[1].error.rule,
            "must be unique in the file"
        );
    }
}
