//! What somebody chose to see: which part, in which order, which rows; and what each key changes of that. Pure.

/// A key that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// Return.
    Enter,
    /// Escape.
    Escape,
    /// Backspace.
    Backspace,
    /// Tab.
    Tab,
    /// So many rows up, or down where it is below 0.
    Up(isize),
}

/// Rows that a page key moves by.
const PAGE: isize = 20;
/// Longest word of a filter, in characters.
const FILTER_MAX: usize = 64;

/// The keys in what a terminal sent at once. An escape by itself is the key; before `[` it begins the name of one.
pub fn keys(bytes: &[u8]) -> Vec<Key> {
    const NAMES: [(&str, Key); 4] = [
        ("\u{1b}[A", Key::Up(1)),
        ("\u{1b}[B", Key::Up(-1)),
        ("\u{1b}[5~", Key::Up(PAGE)),
        ("\u{1b}[6~", Key::Up(-PAGE)),
    ];
    let text = String::from_utf8_lossy(bytes);
    let mut rest: &str = &text;
    let mut found = Vec::new();
    while let Some(first) = rest.chars().next() {
        if let Some((name, key)) = NAMES.iter().find(|(name, _)| rest.starts_with(name)) {
            found.push(*key);
            rest = &rest[name.len()..];
            continue;
        }
        if let Some(sequence) = rest.strip_prefix("\u{1b}[") {
            // The name of another key: it ends with a letter or `~`.
            let end = sequence.find(|c: char| c.is_ascii_alphabetic() || c == '~');
            rest = end.map_or("", |end| &sequence[end + 1..]);
            continue;
        }
        found.extend(match first {
            '\r' | '\n' => Some(Key::Enter),
            '\u{1b}' => Some(Key::Escape),
            '\u{7f}' | '\u{8}' => Some(Key::Backspace),
            '\t' => Some(Key::Tab),
            c if c.is_control() => None,
            c => Some(Key::Char(c)),
        });
        rest = &rest[first.len_utf8()..];
    }
    found
}

/// A part of what there is to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// A little of each.
    #[default]
    All,
    /// The queue by project and kind.
    Queues,
    /// Batches in progress.
    Batches,
    /// Steps of pipelines.
    Pipelines,
    /// Workers.
    Workers,
    /// Models that are served.
    Models,
}

impl Part {
    /// Every part, in the order of their keys, which begin with 0.
    pub const EACH: [Self; 6] = [
        Self::All,
        Self::Queues,
        Self::Batches,
        Self::Pipelines,
        Self::Workers,
        Self::Models,
    ];

    fn next(self) -> Self {
        let at = Self::EACH.iter().position(|part| *part == self);
        let next = at.map_or(0, |at| (at + 1) % Self::EACH.len());
        Self::EACH[next]
    }
}

/// How large a part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Columns that it can be sorted by.
    pub columns: usize,
    /// Rows, as far as the filter lets them be seen.
    pub rows: usize,
}

/// What is wanted after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressed {
    /// The screen is to be drawn anew.
    Draw,
    /// The end.
    End,
    /// Nothing: the key means nothing here.
    Nothing,
}

/// What is shown, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Which part.
    pub part: Part,
    /// The column that rows are sorted by; none: as they come.
    pub sort: Option<usize>,
    /// Whether the order is turned round.
    pub reversed: bool,
    /// What rows have to contain.
    pub filter: String,
    /// Whether the filter is being written.
    pub typing: bool,
    /// Whether the screen stands still.
    pub paused: bool,
    /// Rows that are scrolled past.
    pub skipped: usize,
}

impl View {
    /// A key was pressed, where the part that is shown is so large.
    pub fn press(&mut self, key: Key, size: Size) -> Pressed {
        if self.typing {
            return self.write(key);
        }
        match key {
            Key::Char('q') => return Pressed::End,
            Key::Char(' ') => self.paused = !self.paused,
            Key::Char('/') => self.typing = true,
            Key::Char('r') => self.reversed = !self.reversed,
            Key::Char('s') => {
                let next = self.sort.map_or(0, |column| column + 1);
                self.sort = Some(next).filter(|next| *next < size.columns);
            }
            Key::Char(digit @ '0'..='5') => {
                let at = digit as usize - '0' as usize;
                self.turn_to(Part::EACH[at]);
            }
            Key::Tab => self.turn_to(self.part.next()),
            Key::Char('k') => self.scroll(1, size),
            Key::Char('j') => self.scroll(-1, size),
            Key::Up(rows) => self.scroll(rows, size),
            Key::Escape if !self.filter.is_empty() => self.filter.clear(),
            Key::Escape => self.turn_to(Part::All),
            Key::Char(_) | Key::Enter | Key::Backspace => return Pressed::Nothing,
        }
        Pressed::Draw
    }

    fn write(&mut self, key: Key) -> Pressed {
        match key {
            Key::Enter => self.typing = false,
            Key::Escape => {
                self.typing = false;
                self.filter.clear();
            }
            Key::Backspace => {
                self.filter.pop();
            }
            Key::Char(c) if self.filter.chars().count() < FILTER_MAX => self.filter.push(c),
            Key::Char(_) | Key::Tab | Key::Up(_) => return Pressed::Nothing,
        }
        self.skipped = 0;
        Pressed::Draw
    }

    /// Columns are each part's own.
    fn turn_to(&mut self, part: Part) {
        self.part = part;
        (self.sort, self.reversed, self.skipped) = (None, false, 0);
    }

    /// The last row stays.
    fn scroll(&mut self, rows: isize, size: Size) {
        let to = self.skipped.saturating_add_signed(-rows);
        self.skipped = to.min(size.rows.saturating_sub(1));
    }

    /// The line that says which keys there are, or what is being written.
    pub fn help(&self) -> String {
        if self.typing {
            return format!(
                " filter: {}_   enter keeps it, escape drops it",
                self.filter
            );
        }
        let filter = match &*self.filter {
            "" => "/ filter".to_owned(),
            word => format!("rows with `{word}`, escape shows all"),
        };
        let paused = match self.paused {
            true => "STOPPED, space goes on",
            false => "space stop",
        };
        format!(
            " {paused} · tab, 0 all 1 queues 2 batches 3 pipelines 4 workers 5 models · s sort r turn · {filter} · q end"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size {
        columns: 3,
        rows: 50,
    };

    fn after(pressed: &str) -> View {
        let mut view = View::default();
        for key in keys(pressed.as_bytes()) {
            view.press(key, SIZE);
        }
        view
    }

    #[test]
    fn keys_are_told_from_what_terminals_send() {
        let sent = "q\u{1b}[A\u{1b}[6~\u{1b}[3~x\t\r\u{7f}é\u{1}\u{1b}";
        let expected = [
            Key::Char('q'),
            Key::Up(1),
            Key::Up(-PAGE),
            Key::Char('x'),
            Key::Tab,
            Key::Enter,
            Key::Backspace,
            Key::Char('é'),
            Key::Escape,
        ];
        assert_eq!(keys(sent.as_bytes()), expected);
        assert_eq!(keys(b"\x1b["), []);
    }

    #[test]
    fn keys_turn_pages_and_sort_their_columns_in_turn() {
        assert_eq!(after("\t").part, Part::Queues);
        assert_eq!(after("4").part, Part::Workers);
        assert_eq!(after("5\t").part, Part::All);
        assert_eq!(after("4\u{1b}").part, Part::All);
        let sorts: Vec<_> = ["", "s", "ss", "sss", "ssss"].map(|p| after(p).sort).into();
        assert_eq!(sorts, [None, Some(0), Some(1), Some(2), None]);
        assert!(after("sr").reversed && !after("srr").reversed);
        let turned = after("sr4");
        assert_eq!((turned.sort, turned.reversed), (None, false));
    }

    #[test]
    fn a_filter_is_written_kept_and_dropped() {
        let kept = after("/shoq\u{7f}p q\r");
        assert_eq!((&*kept.filter, kept.typing), ("shop q", false));
        assert_eq!(after("/shop\u{1b}"), View::default());
        assert_eq!(after("/shop\r\u{1b}"), View::default());
        assert!(after("/q").help().contains("filter: q_"));
        let long = after(&format!("/{}", "x".repeat(200)));
        assert_eq!(long.filter.len(), FILTER_MAX);
    }

    #[test]
    fn rows_are_scrolled_and_the_screen_stops() {
        assert_eq!(after("jjjk").skipped, 2);
        assert_eq!(after("kk").skipped, 0);
        assert_eq!(after("\u{1b}[6~\u{1b}[6~\u{1b}[6~").skipped, 49);
        assert_eq!(after("\u{1b}[6~\u{1b}[A").skipped, 19);
        assert_eq!(after("jj/x").skipped, 0);
        assert!(after(" ").help().contains("STOPPED"));
        assert_eq!(View::default().press(Key::Char('q'), SIZE), Pressed::End);
        assert_eq!(
            View::default().press(Key::Char('z'), SIZE),
            Pressed::Nothing
        );
    }
}
