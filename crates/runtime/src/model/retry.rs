//! When a call over HTTP is tried again. Pure.

use std::time::Duration;

use espalier_core::time::Timestamp;

use crate::backoff::Backoff;

/// The waits between tries where the endpoint does not ask for another.
pub(super) const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(500),
    max: Duration::from_secs(30),
};

/// Longest wait that an endpoint can ask for. Beyond it the call fails sooner, and the queue tries the job later.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// The wait after the `failures`-th failure: what the endpoint asks for, or else our own backoff. A part of either is
/// random, so that clients that were turned away together do not come back together.
pub(crate) fn wait(
    backoff: Backoff,
    failures: u32,
    retry_after: Option<Duration>,
    random: f64,
) -> Duration {
    match retry_after {
        Some(asked) => asked.min(RETRY_AFTER_MAX) + backoff.first.mul_f64(random.clamp(0.0, 1.0)),
        None => backoff.delay(failures, random),
    }
}

/// The header `Retry-After`: seconds, or a date of HTTP. That is the server's, so `date`, the header `Date` of the same
/// answer, is what it is held against; `now` only where there is none.
pub(crate) fn read_retry_after(
    header: &str,
    date: Option<&str>,
    now: Timestamp,
) -> Option<Duration> {
    let header = header.trim();
    if let Ok(seconds) = header.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let now = date.and_then(read_date).unwrap_or(now);
    Some(read_date(header)?.since(now))
}

fn read_date(header: &str) -> Option<Timestamp> {
    let date = chrono::DateTime::parse_from_rfc2822(header.trim()).ok()?;
    Some(Timestamp::from_ms(
        u64::try_from(date.timestamp_millis()).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = Timestamp::from_ms(784_111_777_000); // Sun, 06 Nov 1994 08:49:37 GMT
        let read = |header| read_retry_after(header, None, now).map(|wait| wait.as_secs());
        assert_eq!(read("7"), Some(7));
        assert_eq!(read(" 0 "), Some(0));
        assert_eq!(read("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(read("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        for bad in ["", "-1", "soon", "1.5"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_date_is_held_against_the_clock_that_it_came_from() {
        let (asked, said) = (
            "Sun, 06 Nov 1994 08:50:07 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT",
        );
        let hour_us = 3_600_000_000;
        for wrong in [784_111_777_000_000 - hour_us, 784_111_777_000_000 + hour_us] {
            let wait = read_retry_after(asked, Some(said), Timestamp(wrong));
            assert_eq!(wait, Some(Duration::from_secs(30)));
        }
    }

    #[test]
    fn what_the_endpoint_asks_for_counts_up_to_a_minute() {
        let seconds = |failures, asked: Option<u64>| {
            wait(BACKOFF, failures, asked.map(Duration::from_secs), 0.5).as_secs_f64()
        };
        assert_eq!(seconds(1, None), 0.5);
        assert_eq!(seconds(3, None), 2.0);
        assert_eq!(seconds(1, Some(7)), 7.25);
        assert_eq!(seconds(3, Some(0)), 0.25);
        assert_eq!(seconds(1, Some(86_400)), 60.25);
    }
}
