//! The clock every measurement is read from.
//!
//! Times that cross threads are kept in atomics, so they are whole nanoseconds since one epoch instead of
//! [`Instant`]s. A reading is never 0, which leaves 0 free to mean "none".
//!
//! Where the kernel itself trusts the processor's time stamp counter, so do we, through `quanta`: a reading
//! costs a fraction of what a call of the system's clock costs, and a job needs two. It is taken as a difference
//! of the raw counter, which is half the cost of `quanta`'s own `Instant`. The counter is measured against the
//! system's clock once, for some milliseconds; what is left of an error is a drift of up to 0.01 percent, which
//! no latency or utilization shows. Elsewhere it is the system's monotonic clock.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A monotonic clock that counts nanoseconds from its own start. Copies share the epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    epoch: Epoch,
}

#[derive(Clone, Copy, Debug)]
enum Epoch {
    /// The counter, and its raw value at the start.
    Counter(&'static quanta::Clock, u64),
    System(Instant),
}

impl Clock {
    /// Starts a clock; its first readings are a few nanoseconds above 1.
    #[must_use]
    pub(crate) fn start() -> Self {
        let epoch = match trusted_counter() {
            Some(counter) => Epoch::Counter(counter, counter.raw()),
            None => Epoch::System(Instant::now()),
        };
        Clock { epoch }
    }

    /// Reads the clock: nanoseconds since its start, at least 1. It lasts 584 years.
    #[must_use]
    pub(crate) fn now_ns(&self) -> u64 {
        let elapsed_ns = match self.epoch {
            Epoch::Counter(counter, epoch) => counter.delta_as_nanos(epoch, counter.raw()),
            Epoch::System(epoch) => ns(epoch.elapsed()),
        };
        elapsed_ns.saturating_add(1)
    }
}

/// The time stamp counter, if the kernel reads its own time from it. It watches the counter, and leaves it for
/// another source when processors disagree or a virtual machine's host cannot keep it steady.
fn trusted_counter() -> Option<&'static quanta::Clock> {
    static COUNTER: OnceLock<Option<quanta::Clock>> = OnceLock::new();
    let trusted = || {
        std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            .is_ok_and(|source| source.trim() == "tsc")
    };
    COUNTER.get_or_init(|| trusted().then(quanta::Clock::new)).as_ref()
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
    fn it_agrees_with_the_system() {
        let (clock, start) = (Clock::start(), Instant::now());
        std::thread::sleep(Duration::from_millis(200));
        let (ours, systems) = (clock.now_ns(), ns(start.elapsed()));
        assert!(ours.abs_diff(systems) < systems / 100, "{ours} against {systems} ns");
    }

    #[test]
    fn a_duration_beyond_the_range_saturates() {
        assert_eq!(ns(Duration::MAX), u64::MAX);
        assert_eq!(ns(Duration::from_micros(3)), 3000);
    }
}
