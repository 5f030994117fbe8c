//! The clock: the one place where a process reads the time of day.
//!
//! Everything that decides by the time takes a [`Clock`] or a `Timestamp`, so that tests own time. Durations within
//! a process (deadlines, latencies) use `tokio::time` and `std::time::Instant`, which never step.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use espalier_core::time::Timestamp;

/// Where the time of day comes from.
pub trait Clock: Send + Sync {
    /// The present moment. May lie before that of an earlier process, as clocks of machines are set.
    fn now(&self) -> Timestamp;
}

/// The machine's clock: its time of day when this process first asked, and the time that has passed since. A clock that
/// is set while the process runs changes nothing here, so that no lease and no delay is cut short or frozen by it; the
/// price is that a correction shows only after a restart.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

/// The time of day at one moment of the process.
static START: OnceLock<(Timestamp, Instant)> = OnceLock::new();

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the clock that everything else is given"
    )]
    fn now(&self) -> Timestamp {
        let (start, at) = START.get_or_init(|| {
            let since_epoch = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            (Timestamp::default() + since_epoch, Instant::now())
        });
        *start + at.elapsed()
    }
}

/// A clock that stands still until a test moves it.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Stands at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self(AtomicU64::new(now.0))
    }

    /// Moves forward.
    pub fn advance(&self, by: Duration) {
        self.set(self.now() + by);
    }

    /// Jumps to `now`, which may lie in the past: clocks step.
    pub fn set(&self, now: Timestamp) {
        self.0.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::new(Timestamp::from_ms(5));
        assert_eq!(clock.now(), Timestamp::from_ms(5));
        clock.advance(Duration::from_millis(3));
        assert_eq!(clock.now(), Timestamp::from_ms(8));
        clock.set(Timestamp::from_ms(1));
        assert_eq!(clock.now(), Timestamp::from_ms(1));
    }

    #[test]
    fn the_system_clock_is_past_2020() {
        assert!(SystemClock.now() > Timestamp::from_ms(1_577_836_800_000));
    }

    #[test]
    fn the_system_clock_is_read_once_and_counts_on() {
        let first = SystemClock.now();
        let (start, at) = *START.get().unwrap();
        let second = SystemClock.now();
        assert!(start <= first && first <= second);
        assert!(second <= start + at.elapsed(), "not from the time of day");
    }
}
