//! When messages are due, and waiting for it.
//!
//! With a rate, the messages of a run are due one after another at equal distances, and the connections take turns.
//! Message *k* is due at `begin + k / rate`, on connection *k* modulo the number of connections. So each connection has
//! a schedule of its own, which never shifts. A message that could not be sent in time is late, and its latency shows
//! that. Gil Tene's wrk2 does the same (<https://github.com/giltene/wrk2>).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// The schedule of one thread's connections.
#[derive(Debug)]
pub(super) struct Schedule {
    rate: u64,
    begin_ns: u64,
    /// Connections of the run.
    all: u64,
    /// This thread and the number of threads. This thread has every `threads`-th connection.
    thread: u64,
    threads: u64,
    /// Connections of this thread.
    slots: u64,
    /// The slot of the next message that is due, and its turn.
    slot: u64,
    turn: u64,
}

impl Schedule {
    /// Makes a schedule. No message is due before [`begin`](Schedule::begin).
    pub(super) fn new(rate: u64, all: usize, (thread, threads): (usize, usize), slots: usize) -> Self {
        Schedule {
            rate,
            begin_ns: u64::MAX,
            all: all as u64,
            thread: thread as u64,
            threads: threads as u64,
            slots: slots as u64,
            slot: 0,
            turn: 0,
        }
    }

    pub(super) fn begin(&mut self, now_ns: u64) {
        self.begin_ns = now_ns;
    }

    /// When a slot's message of this turn is due.
    pub(super) fn due_ns(&self, slot: usize, turn: u64) -> u64 {
        const SECOND_NS: u64 = 1_000_000_000;
        let message = self.thread + slot as u64 * self.threads + turn * self.all;
        // Computes whole seconds apart from the rest, so that nothing overflows or is rounded away.
        let ns = message / self.rate * SECOND_NS + message % self.rate * SECOND_NS / self.rate;
        self.begin_ns.saturating_add(ns)
    }

    /// When the next message is due.
    pub(super) fn next_ns(&self) -> u64 {
        self.due_ns(usize::try_from(self.slot).unwrap_or(usize::MAX), self.turn)
    }

    /// Returns the slot of the next message, if it is due now. Then the message after it is the next.
    pub(super) fn take(&mut self, now_ns: u64) -> Option<usize> {
        if self.next_ns() > now_ns {
            return None;
        }
        let slot = usize::try_from(self.slot).ok();
        self.slot += 1;
        if self.slot == self.slots {
            self.slot = 0;
            self.turn += 1;
        }
        slot
    }
}

/// A timer that wakes a poll to the microsecond. A poll's own timeout is in whole milliseconds.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: OwnedFd,
    /// The time that it is set to.
    at_ns: u64,
}

impl Alarm {
    /// Makes a timer that is reported under this token each time it expires.
    pub(super) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // Edge-triggered: each new expiry is reported, although no thread reads the timer.
        registry.register(&mut SourceFd(&timer.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Alarm { timer, at_ns: u64::MAX })
    }

    /// Sets the timer to this time, unless it is set to that already.
    pub(super) fn set(&mut self, at_ns: u64, now_ns: u64) -> io::Result<()> {
        if at_ns == self.at_ns {
            return Ok(());
        }
        self.at_ns = at_ns;
        // A wait of 0 would switch the timer off.
        let wait = Duration::from_nanos(at_ns.saturating_sub(now_ns).max(1));
        let wait = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: wait };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_due_at_equal_distances_over_all_threads() {
        // There are three connections on two threads, and 1000 messages a second.
        let mut schedules = [Schedule::new(1000, 3, (0, 2), 2), Schedule::new(1000, 3, (1, 2), 1)];
        assert_eq!(schedules[0].take(u64::MAX - 1), None, "it has not begun");
        let mut due = Vec::new();
        for schedule in &mut schedules {
            schedule.begin(500);
            while schedule.next_ns() < 500 + 12_000_000 {
                due.push(schedule.next_ns());
                schedule.take(u64::MAX).expect("due");
            }
        }
        due.sort_unstable();
        assert_eq!(due, (0..12).map(|message| 500 + message * 1_000_000).collect::<Vec<_>>());
    }

    #[test]
    fn each_connection_keeps_its_own_schedule() {
        let mut schedule = Schedule::new(1000, 3, (0, 2), 2);
        schedule.begin(0);
        assert_eq!(schedule.take(0), Some(0));
        assert_eq!(schedule.take(1_999_999), None);
        assert_eq!(schedule.take(2_000_000), Some(1));
        assert_eq!((schedule.due_ns(0, 1), schedule.due_ns(1, 1)), (3_000_000, 5_000_000));
        assert_eq!(
            [schedule.take(9_000_000), schedule.take(9_000_000)],
            [Some(0), Some(1)],
            "late, not lost"
        );
    }

    #[test]
    fn a_rate_that_divides_nothing_drifts_by_nothing() {
        let mut schedule = Schedule::new(7, 1, (0, 1), 1);
        schedule.begin(0);
        let hundred_years = 100 * 365 * 24 * 3600;
        assert_eq!(schedule.due_ns(0, 7 * hundred_years), hundred_years * 1_000_000_000);
        assert_eq!(schedule.due_ns(0, 1), 142_857_142);
    }
}
