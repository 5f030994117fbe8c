//! Tables and texts of others in Markdown and in a page, so that nothing of them means anything there.
//!
//! A model, a tool or a web page may have said anything. In a page, what they said stands between tags as escaped text, and
//! nowhere in an attribute. In Markdown every sign that means something is escaped, and lines are joined.

use std::fmt::Write;

use super::words::Table;

/// The style of a page.
pub const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1a1a1a;background:#fff}\
table{border-collapse:collapse;margin:1rem 0}th,td{text-align:left;padding:.25rem .75rem;border-bottom:1px solid #ddd;vertical-align:top}\
th{font-weight:600}.both{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.turn{border-left:3px solid #ccc;margin:.4rem 0;padding:.1rem .6rem;\
white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}.assistant{border-color:#1f5fa8}.user{border-color:#555}.tool{border-color:#b08900}\
.role{color:#666;font-size:11px}.thought{color:#777;font-style:italic}.call{font-family:ui-monospace,monospace}\
.solved{color:#15803d}.failed{color:#b91c1c}.gate{padding:.6rem 1rem;background:#f3f4f6}.small{font-size:12px;color:#555;overflow-wrap:anywhere}\
summary{cursor:pointer}svg{max-width:100%;height:auto}";

/// What a page forbids itself: it fetches nothing and runs nothing.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// A table of Markdown.
pub fn markdown_table(table: &Table) -> String {
    let row = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| inline(cell)).collect();
        format!("| {} |", cells.join(" | "))
    };
    let mut out = String::new();
    // Writing into a `String` cannot fail.
    let _ = writeln!(out, "{}", row(&table.header));
    let _ = writeln!(out, "|{}", " --- |".repeat(table.header.len()));
    for cells in &table.rows {
        let _ = writeln!(out, "{}", row(cells));
    }
    out
}

/// A table of a page.
pub fn html_table(table: &Table) -> String {
    let cells = |tag: &str, cells: &[String]| {
        let cells = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell)));
        cells.collect::<String>()
    };
    let mut out = format!("<table><tr>{}</tr>", cells("th", &table.header));
    for row in &table.rows {
        let _ = write!(out, "<tr>{}</tr>", cells("td", row));
    }
    out.push_str("</table>");
    out
}

/// Text within a line of Markdown: no sign of it means anything.
pub fn inline(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars().map(harmless) {
        match c {
            '\n' => out.push(' '),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '!' | '~' | '$' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    // A bare address would become a link.
    out.replace("://", ":&#8203;//")
}

/// Text between the tags of a page, or within the quotes of an attribute.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars().map(harmless) {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Signs that steer how others are shown: those of control, and those that turn the direction of text round.
fn harmless(c: char) -> char {
    match c {
        '\n' => c,
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        '\u{061c}'
        | '\u{200e}'
        | '\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_said_means_anything_in_markdown() {
        let said = "a | b\n# c <script> [x](http://y) `z` \u{202e}\u{1b}[2J";
        let found = inline(said);
        assert_eq!(
            found,
            "a \\| b \\# c &lt;script&gt; \\[x\\](http:&#8203;//y) \\`z\\` \u{fffd}\u{fffd}\\[2J"
        );
    }

    #[test]
    fn nothing_that_was_said_is_a_tag() {
        assert_eq!(
            escaped("<a href=\"x\" onclick='y'>&\r"),
            "&lt;a href=&quot;x&quot; onclick=&#39;y&#39;&gt;&amp;\u{fffd}"
        );
    }

    #[test]
    fn a_table_has_as_many_columns_as_its_header() {
        let table = Table {
            header: vec!["a".to_owned(), "b|".to_owned()],
            rows: vec![vec!["1".to_owned(), "<x>".to_owned()]],
        };
        assert_eq!(
            markdown_table(&table),
            "| a | b\\| |\n| --- | --- |\n| 1 | &lt;x&gt; |\n"
        );
        assert_eq!(
            html_table(&table),
            "<table><tr><th>a</th><th>b|</th></tr><tr><td>1</td><td>&lt;x&gt;</td></tr></table>"
        );
    }
}
