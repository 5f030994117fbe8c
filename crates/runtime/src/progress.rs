//! How far a download is: a bar on a terminal, a line now and then in a log.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The bytes of one file as they come.
#[derive(Debug)]
pub struct Progress {
    file: String,
    bar: ProgressBar,
    told: Instant,
}

impl Progress {
    /// Of a file of so many bytes.
    #[must_use]
    pub fn new(file: &str, bytes: u64) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(bytes), target);
        let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(file.to_owned());
        Self {
            file: file.to_owned(),
            bar,
            told: Instant::now(),
        }
    }

    /// So many more have come.
    pub fn more(&mut self, bytes: u64) {
        self.bar.inc(bytes);
        if self.bar.is_hidden() && self.told.elapsed() >= LINE_EVERY {
            self.told = Instant::now();
            let of_bytes = self.bar.length().unwrap_or(0);
            tracing::info!(
                file = self.file,
                bytes = self.bar.position(),
                of_bytes,
                "downloading"
            );
        }
    }

    /// So many have come in all.
    pub fn at(&mut self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// All have come.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
