//! How many workers a pool has, how many it should have, and which numbers they bear.
//!
//! Two numbers of workers are kept:
//!
//! - *Staying*: workers that have not been told to leave by a resize. A resize compares it with the number that is
//!   wanted.
//! - *Alive*, which [`Crew::workers`] returns and gauges show: worker threads that have entered and not come to their
//!   end. It is 0 when a drain or an abort is over. A thread that runs a job is always in it.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::checked::{Condvar, Mutex, MutexGuard, lock, wait_while};

/// The numbers of a pool's workers.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    roster: Mutex<Roster>,
    /// Whether there are more workers than wanted. Written under the roster's lock, read by workers between jobs.
    surplus: AtomicBool,
    /// A copy of [`Roster::alive`], for readers of gauges. Written under the roster's lock.
    workers: AtomicUsize,
    /// Notified when a thread came to its end, and when a worker began to wait for that.
    left: Condvar,
}

#[derive(Debug, Default)]
struct Roster {
    /// Workers that have not been told to leave.
    staying: usize,
    /// How many there should be, at most: a resize that failed leaves fewer.
    wanted: usize,
    /// Threads that have entered and not come to their end.
    alive: usize,
    /// Workers that wait in a job of theirs for all others to come to their end.
    inside: usize,
    /// The numbers of the threads that are alive.
    numbers: BTreeSet<usize>,
}

impl Crew {
    /// How many worker threads have entered and not come to their end.
    pub(crate) fn workers(&self) -> usize {
        self.workers.load(Ordering::Relaxed)
    }

    /// Whether a worker should ask [`retire`](Crew::retire).
    pub(crate) fn has_surplus(&self) -> bool {
        self.surplus.load(Ordering::Relaxed)
    }

    /// Sets how many workers there should be. Returns how many are missing.
    pub(crate) fn want(&self, wanted: usize) -> usize {
        let mut roster = lock(&self.roster);
        roster.wanted = wanted;
        self.publish(&roster);
        wanted.saturating_sub(roster.staying)
    }

    /// Counts a worker in, before its thread is started. Returns its number: the lowest that no thread bears.
    pub(crate) fn enter(&self) -> usize {
        let mut roster = lock(&self.roster);
        roster.staying += 1;
        roster.alive += 1;
        // Each number up to the count of numbers is taken, or one of them is free.
        let number = (0..).find(|number| !roster.numbers.contains(number)).unwrap_or_default();
        roster.numbers.insert(number);
        self.publish(&roster);
        number
    }

    /// Tells the calling worker to leave, if there are more workers than wanted. Returns whether it must.
    pub(crate) fn retire(&self) -> bool {
        let mut roster = lock(&self.roster);
        let leaves = roster.staying > roster.wanted;
        if leaves {
            roster.staying -= 1;
            self.publish(&roster);
        }
        leaves
    }

    /// Counts a worker that could not begin among those that leave.
    pub(crate) fn withdraw(&self) {
        let mut roster = lock(&self.roster);
        roster.staying -= 1;
        self.publish(&roster);
    }

    /// Counts out a thread that has come to its end. Returns whether it was the last.
    pub(crate) fn gone(&self, number: usize) -> bool {
        let mut roster = lock(&self.roster);
        roster.alive -= 1;
        roster.numbers.remove(&number);
        self.publish(&roster);
        self.left.notify_all();
        roster.alive == 0
    }

    fn publish(&self, roster: &MutexGuard<'_, Roster>) {
        self.surplus.store(roster.staying > roster.wanted, Ordering::Relaxed);
        self.workers.store(roster.alive, Ordering::Relaxed);
    }

    /// Blocks until all threads have come to their end, `timeout` at most. Returns whether they have.
    ///
    /// `inside` says that the caller is one of the threads. Then it waits for those that do not wait here themselves.
    pub(crate) fn wait_until_gone(&self, timeout: Duration, inside: bool) -> bool {
        let mut roster = lock(&self.roster);
        let gone = |roster: &Roster, inside: bool| roster.alive <= if inside { roster.inside } else { 0 };
        if inside {
            roster.inside += 1;
            self.left.notify_all();
        }
        if !timeout.is_zero() {
            roster = wait_while(&self.left, roster, timeout, |roster| !gone(roster, inside));
        }
        let all_gone = gone(&roster, inside);
        roster.inside -= usize::from(inside);
        all_gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crew_of(workers: usize) -> Crew {
        let crew = Crew::default();
        assert!((0..crew.want(workers)).map(|_| crew.enter()).eq(0..workers));
        crew
    }

    #[test]
    fn a_surplus_worker_leaves_and_its_number_is_free_at_its_end() {
        let crew = crew_of(3);
        assert!(!crew.has_surplus() && !crew.retire());
        assert_eq!(crew.want(2), 0);
        assert!(crew.has_surplus() && crew.retire() && !crew.retire());
        assert_eq!((crew.workers(), crew.has_surplus()), (3, false), "its thread has not ended");
        assert_eq!(crew.want(3), 1);
        assert_eq!(crew.enter(), 3);
        assert!(!crew.gone(1));
        assert_eq!(crew.workers(), 3);
        assert_eq!((crew.want(4), crew.enter()), (1, 1));
    }

    #[test]
    fn a_worker_that_could_not_begin_is_missing_again() {
        let crew = crew_of(2);
        crew.withdraw();
        assert_eq!((crew.want(2), crew.workers()), (1, 2));
    }

    #[test]
    fn a_worker_that_waits_inside_waits_for_the_others() {
        let crew = crew_of(2);
        assert!(!crew.wait_until_gone(Duration::from_millis(1), true), "the other is alive");
        assert!(!crew.gone(1));
        assert!(crew.wait_until_gone(Duration::MAX, true));
        assert!(!crew.wait_until_gone(Duration::from_millis(1), false), "for others it is alive");
        assert!(crew.gone(0));
        assert!(crew.wait_until_gone(Duration::ZERO, false));
    }

    #[test]
    fn two_workers_that_wait_inside_do_not_wait_for_each_other() {
        let crew = crew_of(2);
        std::thread::scope(|scope| {
            for number in [0, 1] {
                let crew = &crew;
                scope.spawn(move || {
                    assert!(crew.wait_until_gone(Duration::from_secs(60), true));
                    crew.gone(number);
                });
            }
        });
    }
}
