//! Progress on standard error: a bar on a terminal, nothing elsewhere. Callers print plain lines where there is no
//! terminal and the work is long.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is redrawn while nothing happens, so that its clock moves.
const TICK: Duration = Duration::from_millis(200);

/// A bar over bytes.
pub fn bytes(total: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    bar.set_style(style(
        "{prefix} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    ));
    bar.set_prefix(what);
    bar
}

/// A bar over things that end one by one, with a text of the caller's beside it.
pub fn things(total: u64, what: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::new(total);
    bar.set_style(style("{prefix} {bar:24} {pos}/{len} {msg} {elapsed}"));
    bar.set_prefix(what.into());
    bar.enable_steady_tick(TICK);
    bar
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; the default style is a bar too.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸ ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        for template in [
            "{prefix} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            "{prefix} {bar:24} {pos}/{len} {msg} {elapsed}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
