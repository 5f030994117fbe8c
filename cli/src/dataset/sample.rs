//! One row as a model learns it: the text of its tokens, what is learned marked.

use std::fmt::Write;
use std::ops::Range;

use bytes::Bytes;
use espalier_core::dataset::DatasetVersion;
use espalier_dataset::files::{FileError, parquet_records, read_rows};
use espalier_dataset::{Origin, Renderer, Row, Sample, Split, sample};
use espalier_qwen3_text::Tokenizer;
use espalier_runtime::datasets::Datasets;
use espalier_runtime::tasks::blocking;
use espalier_runtime::telemetry::error_chain;
use serde_json::{Value, json};

use crate::exit::Problem;
use crate::output::{count, plain};
use crate::render::{DIM, GREEN, Style};

/// Lines of what is not learned that stay before and after that which is, where not all of it is shown.
const LINES_AROUND: usize = 6;

/// A sample as text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    id: String,
    split: Split,
    tokens: usize,
    supervised: usize,
    is_recorded: bool,
    /// Pieces in their order, each with whether it is learned.
    pieces: Vec<(bool, String)>,
}

/// The row of this id, or the first that is trained on.
pub(super) async fn find(
    datasets: &Datasets,
    version: &DatasetVersion,
    wanted: Option<String>,
    (max_length, tokenizer): (usize, &Tokenizer),
) -> Result<Shown, Problem> {
    for split in Split::ALL {
        for entry in version.rows(split.as_str(), "parquet") {
            let (bytes, path) = (datasets.file(entry).await?, entry.path.clone());
            let (wanted, tokenizer) = (wanted.clone(), tokenizer.clone());
            let look = move || {
                let row = row(&path, bytes, wanted.as_deref()).map_err(|e| error_chain(&e))?;
                row.map(|row| shown(&row, max_length, &tokenizer))
                    .transpose()
            };
            let found = blocking("dataset.sample", look).await;
            let found = found.map_err(|error| Problem::failed(error.to_string()))?;
            if let Some(shown) = found.map_err(Problem::failed)? {
                return Ok(shown);
            }
        }
    }
    let message = match wanted {
        Some(id) => format!(
            "no row of {}@v{} has the id `{id}`",
            version.name, version.n
        ),
        None => format!("{}@v{} has no rows", version.name, version.n),
    };
    Err(Problem::refused(message).fix("rows and their ids: `espalier dataset pull`, data/*.jsonl"))
}

fn row(path: &str, bytes: Bytes, wanted: Option<&str>) -> Result<Option<Row>, FileError> {
    for row in read_rows(path, parquet_records(path, bytes)?) {
        let row = row?;
        if wanted.is_none_or(|id| row.id == id) {
            return Ok(Some(row));
        }
    }
    Ok(None)
}

fn shown(row: &Row, max_length: usize, tokenizer: &Tokenizer) -> Result<Shown, String> {
    let sample = sample(row, max_length, &mut Renderer::new(tokenizer));
    let sample = sample.map_err(|error| error_chain(&error))?;
    let pieces = pieces(&sample, |ids| {
        tokenizer.decode(ids).map_err(|error| error.to_string())
    })?;
    Ok(Shown {
        id: row.id.clone(),
        split: row.split,
        tokens: sample.ids.len(),
        supervised: sample.supervised_tokens(),
        is_recorded: sample.origin == Origin::Recorded,
        pieces,
    })
}

/// The text of what is learned and of what is between.
fn pieces(
    sample: &Sample,
    decode: impl Fn(&[u32]) -> Result<String, String>,
) -> Result<Vec<(bool, String)>, String> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    let mut add = |is_learned, range: Range<usize>| {
        let ids = sample.ids.get(range).unwrap_or_default();
        if !ids.is_empty() {
            pieces.push((is_learned, decode(ids)?));
        }
        Ok::<_, String>(())
    };
    for range in &sample.supervised {
        let (start, end) = (range.start as usize, range.end as usize);
        add(false, at..start)?;
        add(true, start..end)?;
        at = end;
    }
    add(false, at..sample.ids.len())?;
    Ok(pieces)
}

impl Shown {
    /// For programs.
    pub(super) fn to_json(&self) -> Value {
        let pieces: Vec<Value> = self
            .pieces
            .iter()
            .map(|(learned, text)| json!({"learned": learned, "text": text}))
            .collect();
        json!({
            "id": self.id,
            "split": self.split,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "recorded": self.is_recorded,
            "pieces": pieces,
        })
    }

    /// For people: what is learned in green, or in brackets where there are no colours.
    pub(super) fn text(&self, color: bool, full: bool) -> String {
        let style = Style {
            color,
            lines: None,
            rest: "",
        };
        let from = if self.is_recorded {
            "as it was sampled"
        } else {
            "rendered from text"
        };
        let mut text = format!(
            "sample {} ({}): {} tokens, {} of them learned, {from}\n",
            plain(&self.id),
            self.split.as_str(),
            count(self.tokens as u64),
            count(self.supervised as u64)
        );
        let last = self.pieces.len().saturating_sub(1);
        for (n, (is_learned, piece)) in self.pieces.iter().enumerate() {
            let piece = match *is_learned || full {
                true => piece.clone(),
                false => around(piece, n == 0, n == last),
            };
            match (is_learned, color) {
                (true, true) => text.push_str(&by_line(&piece, |line| style.paint(GREEN, line))),
                (true, false) => {
                    let _ = write!(text, "[[{}]]", by_line(&piece, str::to_owned));
                }
                (false, _) => text.push_str(&by_line(&piece, |line| style.paint(DIM, line))),
            }
        }
        text
    }
}

/// The lines at the beginning and at the end, with how many are between.
fn around(text: &str, is_first: bool, is_last: bool) -> String {
    let lines: Vec<&str> = text.split('\n').collect();
    let before = if is_first { 2 } else { LINES_AROUND };
    let after = if is_last { 2 } else { LINES_AROUND };
    if lines.len() <= before + after + 1 {
        return text.to_owned();
    }
    let between = lines.len() - before - after;
    format!(
        "{}\n… {between} lines (--full)\n{}",
        lines[..before].join("\n"),
        lines[lines.len() - after..].join("\n")
    )
}

/// Line by line, made harmless: pages and models wrote it.
fn by_line(text: &str, paint: impl Fn(&str) -> String) -> String {
    let lines: Vec<String> = text
        .split('\n')
        .map(|line| {
            if line.is_empty() {
                String::new()
            } else {
                paint(&plain(line))
            }
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ids: Vec<u32>, supervised: Vec<Range<u32>>) -> Sample {
        Sample {
            id: "a".into(),
            ids,
            supervised,
            origin: Origin::Rendered,
            task_id: None,
            task_kind: None,
            cut: None,
        }
    }

    #[test]
    fn what_is_learned_stands_in_brackets() {
        let letters = |ids: &[u32]| {
            let letters = ids.iter().filter_map(|id| char::from_u32(*id));
            Ok(letters.collect::<String>())
        };
        let ids: Vec<u32> = "ask\u{1b}\nyes\nthank\nbye"
            .chars()
            .map(u32::from)
            .collect();
        let sample = sample(ids, vec![5..8, 15..18]);
        let shown = Shown {
            id: "a".into(),
            split: Split::Train,
            tokens: 18,
            supervised: 6,
            is_recorded: false,
            pieces: pieces(&sample, letters).unwrap(),
        };
        let text = shown.text(false, true);
        let (head, rest) = text.split_once('\n').unwrap();
        assert_eq!(
            head,
            "sample a (train): 18 tokens, 6 of them learned, rendered from text"
        );
        assert_eq!(rest, "ask\u{fffd}\n[[yes]]\nthank\n[[bye]]");
        assert_eq!(
            shown.to_json()["pieces"][1],
            json!({"learned": true, "text": "yes"})
        );
    }

    #[test]
    fn what_is_between_is_cut_to_its_ends() {
        let lines: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        let cut = around(&lines.join("\n"), true, false);
        assert!(cut.starts_with("0\n1\n… 32 lines"), "{cut}");
        assert!(cut.ends_with("\n38\n39"), "{cut}");
        assert_eq!(around("a\nb", true, true), "a\nb");
    }
}
