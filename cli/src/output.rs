//! What a command says on standard output: text for people, or JSON for programs. Progress and problems go to
//! standard error and never mix with it.

use std::io::{self, IsTerminal, Write};

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, ColumnConstraint, ContentArrangement, Table};
use serde_json::Value;

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// JSON instead of text.
    pub json: bool,
    /// Colours.
    pub color: bool,
}

impl Out {
    /// JSON if asked for; colours on a terminal, unless `NO_COLOR` is set.
    pub fn new(json: bool, no_color: bool) -> Self {
        Self {
            json,
            color: !json && !no_color && io::stdout().is_terminal(),
        }
    }

    /// One line of text.
    pub fn line(&self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{}", text.as_ref())
    }

    /// One JSON value on a line of its own, as in a stream of events.
    pub fn event(&self, value: &Value) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{value}")
    }

    /// `value` as JSON, or what `text` makes of it for people.
    pub fn show(
        &self,
        value: impl FnOnce() -> Value,
        text: impl FnOnce() -> String,
    ) -> io::Result<()> {
        if self.json {
            self.line(format!("{:#}", value()))
        } else {
            self.line(text())
        }
    }
}

/// A remark for people that is no result: on standard error, and only where results are text or nobody parses it.
pub fn note(text: impl AsRef<str>) {
    // Standard error that is closed is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
}

/// A table: a header, a row a thing, two spaces between columns. Text that came from elsewhere is made harmless.
pub fn table<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    // Elsewhere than on a terminal a row is a line, so that `grep` and `cut` work.
    let arrangement = match io::stdout().is_terminal() {
        true => ContentArrangement::Dynamic,
        false => ContentArrangement::Disabled,
    };
    table.set_content_arrangement(arrangement);
    table.set_header(header.map(|name| Cell::new(name.to_uppercase())));
    // Names come first, and a name that is broken over lines cannot be copied.
    if let Some(names) = table.column_mut(0) {
        names.set_constraint(ColumnConstraint::ContentWidth);
    }
    for row in rows {
        table.add_row(row.map(|text| plain(&text)));
    }
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// The same of any number of columns.
pub fn rows_table(header: &[String], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let arrangement = match io::stdout().is_terminal() {
        true => ContentArrangement::Dynamic,
        false => ContentArrangement::Disabled,
    };
    table.set_content_arrangement(arrangement);
    table.set_header(
        header
            .iter()
            .map(|name| Cell::new(plain(&name.to_uppercase()))),
    );
    for row in rows {
        table.add_row(row.iter().map(|text| plain(text)));
    }
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// Two columns, names and values, without a header.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = rows
        .iter()
        .map(|(name, value)| {
            format!("{name:width$}  {}", plain(value))
                .trim_end()
                .to_owned()
        })
        .collect();
    lines.join("\n")
}

/// Text without control characters, so that a page or a model cannot steer the reader's terminal. Line ends become
/// spaces.
pub fn plain(text: &str) -> String {
    let harmless = |c: char| match c {
        '\n' | '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(harmless).collect()
}

/// The first `max` characters, with a sign that there are more.
pub fn cut(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The sum; of none 0.0, where `sum` of floats gives -0.0, which is shown as such.
pub fn total(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |sum, number| sum + number)
}

/// 1234567 as 1,234,567.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Milliseconds as a person says them.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {:02} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {:02} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_table() {
        let rows = vec![
            ["a".to_owned(), "12".to_owned()],
            ["long name".to_owned(), "3\u{1b}[2J".to_owned()],
        ];
        let text = table(["job", "turns"], rows);
        assert_eq!(
            text,
            " JOB        TURNS\n a          12\n long name  3\u{fffd}[2J"
        );
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [count(0), count(999), count(1000), count(1_234_567)],
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [
                duration(5),
                duration(1500),
                duration(61_000),
                duration(3_660_000)
            ],
            ["5 ms", "1.5 s", "1 min 01 s", "1 h 01 min"]
        );
        assert_eq!(cut("äöü", 2), "äö…");
        assert_eq!(cut("äö", 2), "äö");
        assert_eq!(
            facts(&[("a", "1".to_owned()), ("long", String::new())]),
            "a     1\nlong"
        );
    }
}
