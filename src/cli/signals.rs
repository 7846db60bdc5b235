//! Signals: which of them belong to one stop, and which one must not kill the program.
//!
//! One stop often arrives as two signals. `timeout` signals its child and then its process group. When a terminal closes,
//! the kernel and the shell each send SIGHUP. Process runners send SIGINT and then SIGTERM, and systemd with
//! `SendSIGHUP=yes` sends SIGTERM and SIGHUP. So signals within [`ONE_STOP`] of the first one belong to it, and only a later
//! signal abandons.
//!
//! Guarantees: the time of a signal is the time at which it arrives, however busy the main thread is. The signal
//! crate's thread, which takes that time, never blocks. The notice to abandon always has room in the channel.
//!
//! The caller decides what a stop does. The signal crate cannot tell SIGINT, SIGTERM and SIGHUP apart.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::SIGXFSZ;

/// Signals that arrive this soon after the first one belong to the same stop. Programs that send two signals send them
/// within milliseconds. A person who presses Ctrl-C again after a second means it.
pub(crate) const ONE_STOP: Duration = Duration::from_secs(1);

/// How many signals of the same stop are reported, for the log. Further ones are ignored without a notice, which bounds
/// the channel.
const REPEATS: usize = 8;

/// Room for every notice that is ever sent: one stop, its repeats, and one to abandon.
const NOTICES: usize = 1 + REPEATS + 1;

/// What a signal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The first signal: stop in an orderly way.
    Stop,
    /// Another signal of the same stop. It changes nothing.
    Repeat {
        /// The time since the first signal, less than [`ONE_STOP`].
        after: Duration,
    },
    /// A signal [`ONE_STOP`] or more after the first one: end at once.
    Abandon,
}

/// Catches SIGINT, SIGTERM and SIGHUP from now on. The notices come through the channel, in the order of the signals.
/// It can be called once in a process.
///
/// # Errors
///
/// [`ctrlc::Error::System`] if the system refuses the signal crate its thread or the handlers.
pub(crate) fn notices() -> Result<Receiver<Notice>, ctrlc::Error> {
    let (sender, receiver) = bounded(NOTICES);
    catch(move |notice| {
        // The channel has room for all of them, so this fails only once the receiver is gone.
        let _ = sender.try_send(notice);
    })?;
    Ok(receiver)
}

/// Catches the same signals, and calls `tell` on the signal crate's thread. `tell` must not block, because it would
/// delay the time of the next signal. It can be called once in a process, instead of [`notices`].
///
/// # Errors
///
/// As [`notices`].
pub(crate) fn catch(mut tell: impl FnMut(Notice) + Send + 'static) -> Result<(), ctrlc::Error> {
    let mut stop = Stop::default();
    ctrlc::set_handler(move || {
        if let Some(notice) = stop.signal(Instant::now()) {
            tell(notice);
        }
    })
}

/// Keeps a limit on the size of files (`ulimit -f`) from killing the program. SIGXFSZ, which kills by default, gets a
/// handler that does nothing, so a write beyond the limit fails with EFBIG instead. The log then drops lines, and a
/// report is an error.
///
/// If the system refuses the handler, the default stays. That is no reason not to run.
pub(crate) fn survive_file_size_limit() {
    let nobody_reads = Arc::new(AtomicBool::new(false));
    let _ = signal_hook::flag::register(SIGXFSZ, nobody_reads);
}

/// The stop that is under way, if there is one. Only the signal crate's thread uses it.
#[derive(Debug, Default)]
struct Stop {
    /// When the first signal came.
    first: Option<Instant>,
    /// Repeats that were reported.
    repeats: usize,
    /// [`Notice::Abandon`] was given.
    abandoned: bool,
}

impl Stop {
    /// The notice for a signal that comes `now`. Each kind is given a bounded number of times: see [`NOTICES`].
    fn signal(&mut self, now: Instant) -> Option<Notice> {
        let Some(first) = self.first else {
            self.first = Some(now);
            return Some(Notice::Stop);
        };
        let after = now.saturating_duration_since(first);
        if after < ONE_STOP {
            let reported = self.repeats < REPEATS;
            self.repeats += usize::from(reported);
            reported.then_some(Notice::Repeat { after })
        } else {
            let again = std::mem::replace(&mut self.abandoned, true);
            (!again).then_some(Notice::Abandon)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn signals_within_a_second_of_the_first_belong_to_it() {
        let (mut stop, start) = (Stop::default(), Instant::now());
        assert_eq!(stop.signal(start), Some(Notice::Stop));
        for after in [Duration::ZERO, MS, 50 * MS, 500 * MS, ONE_STOP - MS] {
            assert_eq!(stop.signal(start + after), Some(Notice::Repeat { after }));
        }
    }

    #[test]
    fn a_signal_a_second_after_the_first_abandons_whatever_came_between() {
        let start = Instant::now();
        for between in [None, Some(MS), Some(ONE_STOP - MS)] {
            let mut stop = Stop::default();
            stop.signal(start);
            // The second counts from the first signal, and no repeat makes it longer.
            between.map(|after| stop.signal(start + after));
            assert_eq!(stop.signal(start + ONE_STOP), Some(Notice::Abandon), "{between:?}");
        }
    }

    #[test]
    fn a_flood_of_signals_never_fills_the_channel() {
        let (sender, receiver) = bounded(NOTICES);
        let (mut stop, start) = (Stop::default(), Instant::now());
        for signal in 0..100_000 {
            if let Some(notice) = stop.signal(start + signal * ONE_STOP / 50_000) {
                sender.try_send(notice).expect("room for every notice");
            }
        }
        let notices: Vec<Notice> = receiver.try_iter().collect();
        assert_eq!((notices.len(), notices[0]), (NOTICES, Notice::Stop));
        assert_eq!(notices.iter().filter(|notice| **notice == Notice::Abandon).count(), 1);
        assert_eq!(notices.last(), Some(&Notice::Abandon));
    }
}
