//! Rows under a header, as lines of text that fit a width. Pure.
//!
//! What has no room is counted ("… 12 more"); columns that have none are left out, the least telling first; names are cut
//! in their middle, since their ends tell them apart.

use std::cmp::Ordering;

use console::{measure_text_width, truncate_str};

use crate::output::{count, duration, plain};

/// Names are not cut below this many columns; rather a column is left out.
const NAME_MIN: usize = 16;
/// Between two columns.
const GAP: usize = 2;

/// What stands in a row, and what it is sorted by.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    text: String,
    number: Option<f64>,
}

impl Cell {
    /// A count.
    pub fn count(n: u64) -> Self {
        Self::of(count(n), n as f64)
    }

    /// A length of time in milliseconds; none is a dash.
    pub fn duration(ms: Option<u64>) -> Self {
        ms.map_or_else(Self::dash, |ms| Self::of(duration(ms), ms as f64))
    }

    /// A rate in a second; none is a dash.
    pub fn rate(rate: Option<f64>) -> Self {
        rate.map_or_else(Self::dash, |rate| Self::of(per_second(rate), rate))
    }

    /// `text`, which stands for `number`.
    pub fn of(text: String, number: f64) -> Self {
        let number = Some(number);
        Self { text, number }
    }

    fn dash() -> Self {
        Self::from("-".to_owned())
    }

    /// Numbers stand before what is none.
    fn order(&self, other: &Self) -> Ordering {
        match (self.number, other.number) {
            (Some(one), Some(other)) => other.total_cmp(&one),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => self.text.cmp(&other.text),
        }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, number: None }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

/// Rows under a header, the most telling columns first; what to say where there are none.
#[derive(Clone, Debug)]
pub struct Table {
    /// Names of the columns.
    pub header: &'static [&'static str],
    /// As many cells each as the header has.
    pub rows: Vec<Vec<Cell>>,
    /// Said in the place of no rows.
    pub none: &'static str,
    /// The column that the rows are sorted by, and whether the order is turned round.
    sorted: Option<(usize, bool)>,
}

impl Table {
    /// Rows in the order in which they come.
    pub fn new(header: &'static [&'static str], rows: Vec<Vec<Cell>>, none: &'static str) -> Self {
        Self {
            header,
            rows,
            none,
            sorted: None,
        }
    }

    /// The rows that have `word` in a cell, whatever its case.
    pub fn filtered(mut self, word: &str) -> Self {
        let word = word.to_lowercase();
        let has = |cell: &Cell| cell.text.to_lowercase().contains(&word);
        self.rows.retain(|row| row.iter().any(has));
        if !word.is_empty() && self.rows.is_empty() {
            self.none = "no row has the word of the filter";
        }
        self
    }

    /// Sorted by a column, largest numbers and first letters above; or turned round.
    pub fn sorted(mut self, column: usize, reversed: bool) -> Self {
        let order = |one: &Vec<Cell>, other: &Vec<Cell>| {
            let (one, other) = (one.get(column), other.get(column));
            let order = one
                .zip(other)
                .map_or(Ordering::Equal, |(one, other)| one.order(other));
            match reversed {
                true => order.reverse(),
                false => order,
            }
        };
        self.rows.sort_by(order);
        self.sorted = Some((column, reversed));
        self
    }

    /// The rows after the first `rows`, as far as there are any.
    pub fn after(mut self, rows: usize) -> Self {
        self.rows
            .drain(..rows.min(self.rows.len().saturating_sub(1)));
        self
    }

    /// The header and at most `rows` lines under it.
    pub fn lines(&self, width: usize, rows: usize) -> Vec<String> {
        if self.rows.is_empty() {
            return vec![fit(&format!(" {}", self.none), width)];
        }
        let all = self.rows.len();
        // The line that counts the rest takes the place of a row.
        let shown = if rows < all {
            rows.saturating_sub(1)
        } else {
            all
        };
        let mut cells: Vec<Vec<String>> = vec![self.names()];
        let seen = self.rows.iter().take(shown);
        cells.extend(seen.map(|row| row.iter().map(|cell| plain(&cell.text)).collect()));
        let widths = widths(&cells, width);
        let mut lines: Vec<String> = cells.iter().map(|row| line(row, &widths)).collect();
        if shown < all && rows > 0 {
            lines.push(format!(" … {} more", count((all - shown) as u64)));
        }
        lines.iter().map(|line| fit(line, width)).collect()
    }

    fn names(&self) -> Vec<String> {
        let name = |(n, name): (usize, &&str)| match self.sorted {
            Some((column, false)) if column == n => format!("{}▼", name.to_uppercase()),
            Some((column, true)) if column == n => format!("{}▲", name.to_uppercase()),
            _ => name.to_uppercase(),
        };
        self.header.iter().enumerate().map(name).collect()
    }
}

/// `text`, cut to `width` columns.
pub fn fit(text: &str, width: usize) -> String {
    truncate_str(&plain(text), width, "…").into_owned()
}

/// Widths of the columns that have room, the first of which may be cut.
fn widths(cells: &[Vec<String>], width: usize) -> Vec<usize> {
    let columns = cells.first().map_or(0, Vec::len);
    let widest = |n: usize| cells.iter().map(|row| measure_text_width(&row[n])).max();
    let mut widths: Vec<usize> = (0..columns).filter_map(widest).collect();
    let others = |widths: &[usize]| widths.iter().skip(1).map(|w| w + GAP).sum::<usize>() + 1;
    let name = widths.first().copied().unwrap_or_default();
    while widths.len() > 1 && others(&widths) + name.min(NAME_MIN) > width {
        widths.pop();
    }
    let room = width.saturating_sub(others(&widths));
    if let Some(first) = widths.first_mut() {
        *first = name.min(room);
    }
    widths
}

fn line(row: &[String], widths: &[usize]) -> String {
    let mut text = String::from(" ");
    for (n, (cell, width)) in row.iter().zip(widths).enumerate() {
        let cell = if n == 0 {
            cut_middle(cell, *width)
        } else {
            cell.clone()
        };
        let pad = width.saturating_sub(measure_text_width(&cell)) + GAP;
        text.push_str(&cell);
        text.extend(std::iter::repeat_n(' ', pad));
    }
    text.trim_end().to_owned()
}

/// `text` in `width` columns, without its middle where it is longer.
fn cut_middle(text: &str, width: usize) -> String {
    if measure_text_width(text) <= width {
        return text.to_owned();
    }
    let all: Vec<char> = text.chars().collect();
    // Wide characters take more room than one, so that the cut goes on until it fits.
    for kept in (0..width.min(all.len())).rev() {
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let cut: String = all[..head]
            .iter()
            .chain(&['…'])
            .chain(&all[all.len() - tail..])
            .collect();
        if measure_text_width(&cut) <= width {
            return cut;
        }
    }
    String::new()
}

/// A rate, as exact as it is large.
pub fn per_second(rate: f64) -> String {
    match rate {
        100.0.. => count(rate.round() as u64),
        1.0.. => format!("{rate:.1}"),
        _ => format!("{rate:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let row = |name: &str, n, rate| vec![Cell::from(name), Cell::count(n), Cell::rate(rate)];
        let rows = vec![
            row("bee", 900, None),
            row("ant", 1_000, Some(0.5)),
            row("cat", 30, Some(12.0)),
        ];
        Table::new(&["name", "jobs", "rate"], rows, "nothing")
    }

    fn first(table: &Table) -> Vec<&str> {
        table.rows.iter().map(|row| row[0].text.as_str()).collect()
    }

    #[test]
    fn rows_are_sorted_by_what_cells_stand_for() {
        assert_eq!(first(&table().sorted(0, false)), ["ant", "bee", "cat"]);
        assert_eq!(first(&table().sorted(0, true)), ["cat", "bee", "ant"]);
        assert_eq!(first(&table().sorted(1, false)), ["ant", "bee", "cat"]);
        assert_eq!(first(&table().sorted(1, true)), ["cat", "bee", "ant"]);
        // What has no rate stands below.
        assert_eq!(first(&table().sorted(2, false)), ["cat", "ant", "bee"]);
        assert_eq!(first(&table().sorted(9, false)), ["bee", "ant", "cat"]);
        let lines = table().sorted(1, false).lines(80, 10);
        assert!(lines[0].contains("JOBS▼"), "{lines:#?}");
        let lines = table().sorted(1, true).lines(80, 10);
        assert!(lines[0].contains("JOBS▲"), "{lines:#?}");
    }

    #[test]
    fn a_filter_keeps_what_has_the_word_and_says_so_of_nothing() {
        assert_eq!(first(&table().filtered("")).len(), 3);
        assert_eq!(first(&table().filtered("AN")), ["ant"]);
        assert_eq!(first(&table().filtered("1,000")), ["ant"]);
        let none = table().filtered("dog").lines(80, 10);
        assert_eq!(none, [" no row has the word of the filter"]);
    }

    #[test]
    fn one_row_stays_however_far_it_is_scrolled() {
        assert_eq!(first(&table().after(1)), ["ant", "cat"]);
        assert_eq!(first(&table().after(99)), ["cat"]);
        assert_eq!(first(&Table::new(&["a"], vec![], "none").after(3)).len(), 0);
    }

    #[test]
    fn names_lose_their_middle() {
        assert_eq!(cut_middle("abcdefgh", 5), "ab…gh");
        assert_eq!(cut_middle("日本語日本語", 5), "日…語");
        assert_eq!(cut_middle("abc", 0), "");
    }

    #[test]
    fn rates_are_as_exact_as_they_are_large() {
        let shown = [0.066, 0.0, 4.24, 99.96, 1234.5].map(per_second);
        assert_eq!(shown, ["0.07", "0.00", "4.2", "100.0", "1,235"]);
    }
}
