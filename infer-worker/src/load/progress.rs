//! How far a download is: a bar on a terminal, a line now and then in a log, and a watch over whether anything comes.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The bytes of one file as they come.
pub(super) struct Progress {
    file: String,
    bar: ProgressBar,
    told: Instant,
    come: Arc<AtomicU64>,
}

impl Progress {
    /// `come` counts what moved, for whoever watches.
    pub(super) fn new(file: &str, come: Arc<AtomicU64>) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Self {
            file: file.to_owned(),
            bar: ProgressBar::with_draw_target(None, target),
            told: Instant::now(),
            come,
        }
    }

    pub(super) fn begin(&mut self, bytes: u64) {
        let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_message(self.file.clone());
        self.bar.set_length(bytes);
        self.bar.set_position(0);
    }

    pub(super) fn more(&mut self, bytes: u64) {
        self.come.fetch_add(bytes, Ordering::Relaxed);
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

    pub(super) fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl hf_hub::api::Progress for Progress {
    fn init(&mut self, size: usize, _: &str) {
        self.begin(size as u64);
    }

    fn update(&mut self, size: usize) {
        self.more(size as u64);
    }

    fn finish(&mut self) {
        self.end();
    }
}
