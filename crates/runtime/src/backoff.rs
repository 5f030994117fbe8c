//! How long to wait before the next try: exponential, bounded, jittered. Used by every retry of the process.

use std::time::Duration;

/// A series of waits. The randomness comes in from outside, so that the series is a pure function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The middle of the first wait.
    pub first: Duration,
    /// No wait is longer.
    pub max: Duration,
}

impl Backoff {
    /// The wait after the `failures`-th failure, counted from 1. `random` in [0, 1) spreads it over 50 to 150 %, so
    /// that many clients of one server do not come back together.
    pub fn delay(&self, failures: u32, random: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(32);
        let middle = self.first.as_secs_f64() * f64::from(doublings).exp2();
        let spread = middle * (0.5 + random.clamp(0.0, 1.0));
        Duration::from_secs_f64(spread.min(self.max.as_secs_f64()))
    }

    /// [`delay`](Self::delay) with the process's own randomness.
    pub fn jittered(&self, failures: u32) -> Duration {
        self.delay(failures, rand::random())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_spread_and_stop_growing() {
        let backoff = Backoff {
            first: Duration::from_millis(100),
            max: Duration::from_secs(5),
        };
        let millis = |failures, random| backoff.delay(failures, random).as_millis();
        assert_eq!(millis(1, 0.5), 100);
        assert_eq!(millis(1, 0.0), 50);
        assert_eq!(millis(3, 0.5), 400);
        assert_eq!(millis(10, 0.0), 5000);
        assert_eq!(millis(u32::MAX, 0.9), 5000);
    }
}
