//! The phases of a server's life: `serving → lame_duck → draining → stopped`.
//!
//! Guarantees: a phase is entered once and never left backwards; whoever asks sees the current one without a
//! lock; the times of a drain are set before the phase says `draining`.
//!
//! What it leaves to others: what a phase means for connections (the reactor moves from phase to phase), and
//! who asks for the end (a signal handler, or any caller of
//! [`ServerHandle::drain`](crate::ServerHandle::drain)).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::metrics::{Page, Source};

/// Where a server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Accepting and serving.
    Serving,
    /// Still accepting and serving, but telling whoever asks not to send more.
    LameDuck,
    /// No longer accepting; finishing what was accepted.
    Draining,
    /// Every connection is closed.
    Stopped,
}

const PHASES: [Phase; 4] = [Phase::Serving, Phase::LameDuck, Phase::Draining, Phase::Stopped];

impl Phase {
    /// The phase's name in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Serving => "serving",
            Phase::LameDuck => "lame_duck",
            Phase::Draining => "draining",
            Phase::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The phase of one server and the times of its drain.
#[derive(Debug, Default)]
pub(crate) struct Lifecycle {
    /// An index into `PHASES`. Written by the reactor, read by anyone.
    phase: AtomicU8,
    /// Somebody asked for the end. Written by anyone, read by the reactor.
    drain_requested: AtomicBool,
    /// Milliseconds since 1970, 0 before the drain. Written by the reactor before the phase changes.
    drain_started_ms: AtomicU64,
    drain_deadline_ms: AtomicU64,
    /// When the lame duck and the drain end, by the server's clock; 0 before they begin. Written as the two above.
    lame_duck_until_ns: AtomicU64,
    drain_until_ns: AtomicU64,
}

impl Lifecycle {
    pub(crate) fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::Acquire))]
    }

    /// Asks for the end of serving. The caller wakes the reactor.
    pub(crate) fn request_drain(&self) {
        self.drain_requested.store(true, Ordering::Release);
    }

    pub(crate) fn drain_requested(&self) -> bool {
        self.drain_requested.load(Ordering::Acquire)
    }

    /// Enters a later phase.
    pub(crate) fn enter(&self, phase: Phase) {
        // Release: who sees `draining` sees the times of the drain.
        self.phase.fetch_max(phase as u8, Ordering::Release);
    }

    /// Notes when the lame duck will end, by the server's clock, and enters it.
    pub(crate) fn start_lame_duck(&self, until_ns: u64) {
        self.lame_duck_until_ns.store(until_ns, Ordering::Relaxed);
        self.enter(Phase::LameDuck);
    }

    /// Notes when the drain began, `timeout` before `until_ns` of the server's clock, and enters it.
    pub(crate) fn start_drain(&self, timeout: Duration, until_ns: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.drain_started_ms.store(millis(now), Ordering::Relaxed);
        self.drain_deadline_ms.store(millis(now.saturating_add(timeout)), Ordering::Relaxed);
        self.drain_until_ns.store(until_ns, Ordering::Relaxed);
        self.enter(Phase::Draining);
    }

    /// The phase, and when it will end by the server's clock if that is set.
    pub(crate) fn phase_until_ns(&self) -> (Phase, Option<u64>) {
        let phase = self.phase();
        let until_ns = match phase {
            Phase::Serving | Phase::Stopped => None,
            Phase::LameDuck => Some(&self.lame_duck_until_ns),
            Phase::Draining => Some(&self.drain_until_ns),
        };
        (phase, until_ns.map(|ns| ns.load(Ordering::Relaxed)))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The lifecycle as a source of metrics.
pub(crate) struct LifecycleMetrics(pub(crate) Arc<Lifecycle>);

impl Source for LifecycleMetrics {
    fn read(&self, page: &mut Page) {
        let current = self.0.phase();
        for phase in PHASES {
            page.gauge(
                "millpond_phase",
                "1 for the phase the server is in. Anything but serving takes no new work; draining for long, something holds its connection open.",
                &[("phase", phase.as_str())],
                f64::from(u8::from(phase == current)),
            );
        }
        for (name, help, ms) in [
            (
                "millpond_drain_started_timestamp_seconds",
                "When the drain began, in seconds since 1970; 0 until then.",
                &self.0.drain_started_ms,
            ),
            (
                "millpond_drain_deadline_timestamp_seconds",
                "When what is left of the drain will be cut, in seconds since 1970; 0 until a drain began. Connections still open when it passes are lost.",
                &self.0.drain_deadline_ms,
            ),
        ] {
            let seconds = Duration::from_millis(ms.load(Ordering::Relaxed)).as_secs_f64();
            page.gauge(name, help, &[], seconds);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_never_left_backwards() {
        let life = Lifecycle::default();
        assert_eq!(life.phase(), Phase::Serving);
        assert_eq!(life.phase_until_ns(), (Phase::Serving, None));
        life.start_drain(Duration::from_secs(1), 70);
        assert_eq!(life.phase_until_ns(), (Phase::Draining, Some(70)));
        life.start_lame_duck(50);
        assert_eq!(life.phase_until_ns(), (Phase::Draining, Some(70)));
        life.enter(Phase::Stopped);
        assert_eq!(life.phase_until_ns(), (Phase::Stopped, None));
    }

    #[test]
    fn the_deadline_stands_a_timeout_after_the_start() {
        let life = Lifecycle::default();
        life.start_drain(Duration::from_millis(1500), 1);
        let [start, end] =
            [&life.drain_started_ms, &life.drain_deadline_ms].map(|ms| ms.load(Ordering::Relaxed));
        assert_eq!(end - start, 1500);
    }
}
