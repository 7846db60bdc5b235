//! The clock every measurement is read from.
//!
//! Times that cross threads are kept in atomics, so they are whole nanoseconds since one epoch instead of
//! [`Instant`]s. A reading is never 0, which leaves 0 free to mean "none".

use std::time::{Duration, Instant};

/// A monotonic clock that counts nanoseconds from its own start. Copies share the epoch.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch: Instant,
}

impl Clock {
    /// Starts a clock; its first readings are a few nanoseconds above 1.
    #[must_use]
    pub fn start() -> Self {
        Clock { epoch: Instant::now() }
    }

    /// Reads the clock: nanoseconds since its start, at least 1. It lasts 584 years.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        ns(self.epoch.elapsed()).saturating_add(1)
    }
}

/// Converts a duration to whole nanoseconds; what does not fit (584 years) becomes `u64::MAX`.
#[must_use]
pub(crate) fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The time `by` after `from_ns`; what does not fit is the end of all time.
#[must_use]
pub(crate) fn later(from_ns: u64, by: Duration) -> u64 {
    from_ns.saturating_add(ns(by))
}

/// Converts nanoseconds to seconds, the unit of every exported time.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "53 bits hold 104 days to the nanosecond")]
pub(crate) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_never_zero_and_never_goes_back() {
        let clock = Clock::start();
        let mut last = 0;
        for _ in 0..1000 {
            let now = clock.now_ns();
            assert!(now > 0 && now >= last, "{now} after {last}");
            last = now;
        }
    }

    #[test]
    fn a_duration_beyond_the_range_saturates() {
        assert_eq!(ns(Duration::MAX), u64::MAX);
        assert_eq!(ns(Duration::from_micros(3)), 3000);
    }
}
