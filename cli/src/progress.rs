//! Progress on standard error: a bar on a terminal, nothing elsewhere. Callers print plain lines where there is no
//! terminal and the work is long.

use std::sync::Arc;
use std::time::Duration;

use espalier_runtime::hub::Meter;
use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is redrawn, so that it and its clock move.
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

/// Does long work beside a bar over bytes; `look` tells what is done now, and how far it is.
pub async fn beside<T>(
    work: impl Future<Output = T>,
    look: impl Fn() -> (&'static str, Arc<Meter>),
) -> T {
    let mut work = Box::pin(work);
    let bar = bytes(0, "");
    loop {
        tokio::select! {
            biased;
            done = &mut work => {
                bar.finish_and_clear();
                return done;
            }
            () = tokio::time::sleep(TICK) => {
                let (stage, meter) = look();
                bar.set_prefix(stage);
                bar.set_length(meter.total());
                bar.set_position(meter.done());
            }
        }
    }
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
