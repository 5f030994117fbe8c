//! A screen that is drawn over and over, on the terminal's second page, so that what stood there before comes back.

use std::io::{self, IsTerminal, Write};

use console::Term;

use super::look::Look;
use super::rates::Rates;
use super::screen;
use super::table;
use super::view::{Key, Pressed, Size, View};

/// The second page, without a cursor.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l";
/// The cursor, and the page that was there before.
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";
const HOME: &str = "\u{1b}[H";
const LINE: &str = "\u{1b}[2K";
const REST_OF_SCREEN: &str = "\u{1b}[J";

/// How wide the terminal is; none where standard output is none.
pub fn columns() -> Option<usize> {
    let (_, columns) = Term::stdout().size_checked()?;
    io::stdout().is_terminal().then_some(usize::from(columns))
}

/// Whether standard output is a terminal.
pub fn is_there() -> bool {
    io::stdout().is_terminal()
}

/// The screen. Dropping it gives the terminal back as it was.
#[derive(Debug)]
pub struct Terminal {
    term: Term,
    last: Option<(Look, Rates)>,
    remark: String,
    /// What somebody chose with keys; none where there are none.
    view: Option<View>,
}

impl Terminal {
    /// Takes the terminal, with a view that `keys` change; none where standard output is none.
    pub fn open(keys: bool) -> Option<Self> {
        if !io::stdout().is_terminal() {
            return None;
        }
        // A terminal that cannot be written to is told of when the first look is drawn.
        let _ = write(ENTER);
        Some(Self {
            term: Term::stdout(),
            last: None,
            remark: String::new(),
            view: keys.then(View::default),
        })
    }

    /// Shows a look, or goes on showing the last one, with a remark above it.
    pub fn show(&mut self, look: Option<(&Look, &Rates)>, remark: &str) -> io::Result<()> {
        let stands = self.view.as_ref().is_some_and(|view| view.paused);
        if let Some((look, rates)) = look.filter(|_| !stands) {
            self.last = Some((look.clone(), rates.clone()));
        }
        remark.clone_into(&mut self.remark);
        self.draw()
    }

    /// A key was pressed. False: somebody wants an end.
    pub fn press(&mut self, key: Key) -> io::Result<bool> {
        let Some(view) = &mut self.view else {
            return Ok(true);
        };
        let size = match &self.last {
            Some((look, rates)) => screen::size(look, rates, view),
            None => Size::default(),
        };
        match view.press(key, size) {
            Pressed::Draw => self.draw()?,
            Pressed::Nothing => {}
            Pressed::End => return Ok(false),
        }
        Ok(true)
    }

    /// Draws what there is in the size that the terminal has now.
    pub fn draw(&self) -> io::Result<()> {
        let (rows, columns) = self.term.size();
        let (rows, columns) = (usize::from(rows), usize::from(columns));
        let mut lines = Vec::new();
        if !self.remark.is_empty() {
            lines.push(table::fit(&self.remark, columns));
        }
        if let Some((look, rates)) = &self.last {
            let left = rows.saturating_sub(lines.len());
            lines.extend(match &self.view {
                Some(view) => screen::lay_out_live(look, rates, view, columns, left),
                None => screen::lay_out(look, rates, columns, left),
            });
        }
        lines.truncate(rows);
        // Each line is emptied before it is written: behind one that fills it, the cursor stands on its last character.
        let mut text = format!("{HOME}{LINE}{}", lines.join(&format!("\r\n{LINE}")));
        if lines.len() < rows {
            text.push_str(&format!("\r\n{REST_OF_SCREEN}"));
        }
        write(&text)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = write(LEAVE);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
