//! How many workers a pool has, how many it should have, and which of them wait for their own pool.
//!
//! # No silent deadlock
//!
//! A worker that waits for a job of its own pool runs no other job meanwhile. Two things can go wrong. In both cases
//! the wait that would complete the deadlock is refused with an error instead:
//!
//! - *Starvation*: every worker waits for the pool, so no queued job will ever start.
//! - *A circle*: the awaited job waits, directly or through others, for the job that the waiter itself runs.
//!
//! Why the error is neither missed nor wrong:
//!
//! 1. A wait is entered here under the lock of the awaited job or queue, before that ends.
//! 2. When the awaited job ends, *the thread that ends it* crosses the wait out, under the same lock. The waiter does
//!    not do it when it wakes. If a waiter wakes for another reason, it crosses its entry out, under that lock, before
//!    it makes a new one.
//! 3. So at any moment the list holds exactly the waits of workers that only an end can free that has not happened.
//! 4. If all workers are on the list, none of them can bring such an end about. The list has its own lock, so the last
//!    worker to come sees that.
//!
//! Waits that end by themselves, with a timeout or a deadline, are not on the list.
//!
//! A wait for room in the queue ends when there is room, and not by another thread's hand. Its waiter may have been
//! notified and not be awake yet. So if such a wait is on the list, a list of all workers proves nothing. The worker
//! that completes the list then makes all that wait for room look again. Each of those crosses its entry out, tries,
//! and enters again if the queue is full. With all others on the list and the queue still full, the wait is hopeless.
//!
//! A worker that should retire stays while it is the last that does not wait. No worker leaves a draining pool before
//! the queue is empty, and then no job is left that could starve. If other workers had counted on a worker that cannot
//! begin, all that wait look again.
//!
//! # Two numbers of workers
//!
//! - The roster's number is the one that the deadlock argument and a resize need. A worker that retires leaves it. A
//!   drain or an abort does not change it. A thread that aborts may have an awaited job in hand when all workers but
//!   the waiter have ended. That thread ends the wait, so the wait is not hopeless.
//! - [`Crew::workers`] is the number that gauges show: worker threads that have entered and not come to their end. It
//!   is 0 when a drain or an abort is over. A thread that runs a job is always in it. A reader takes this number before
//!   it counts the busy workers, and again after. It finds no more busy workers than the larger of the two.
//!
//! # What is not seen
//!
//! - Circles through several pools.
//! - Waits of an executor that polls handles on a worker.
//! - A `resize` called by a job, if the first step of a new worker waits for that job. The same is true if that step
//!   waits for another job that needs the worker of the first. The `resize` waits for the step.

use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Condvar, Mutex, MutexGuard, lock, wait_while};
use crate::sync::event::Event;

/// The number of a pool's workers, and the list of those that wait for the pool.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    /// Notified when there may be room in the queue; see `workers.rs`.
    pub(crate) room: Event,
    roster: Mutex<Roster>,
    /// Whether there are more workers than wanted. Written under the roster's lock, read by workers between jobs.
    surplus: AtomicBool,
    /// Threads that have entered and not come to their end. `all_gone` is notified when it becomes 0.
    alive: Mutex<usize>,
    /// A copy of `alive`, for readers of gauges. Written under its lock.
    workers: AtomicUsize,
    all_gone: Condvar,
}

#[derive(Debug, Default)]
struct Roster {
    /// Workers that have not retired. A drain does not change it.
    workers: usize,
    /// How many there should be, at most: a resize that failed leaves fewer.
    wanted: usize,
    waits: Vec<Wait>,
    last_ticket: u64,
}

/// A worker that waits for its own pool until something ends.
#[derive(Debug)]
struct Wait {
    ticket: Ticket,
    /// The job the worker is running.
    by: JobId,
    what: Awaited,
    /// To make the worker look again. A wait for room is notified through [`Crew::room`].
    thread: Thread,
}

/// The event that a worker of the pool waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// The end of one of these jobs.
    AnyOf(Vec<JobId>),
    /// Room in the queue.
    Room,
}

/// The address of a job in memory, which tells it from other jobs while it lives.
pub(crate) type JobId = usize;

/// An entry in the list of waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// Why a wait was not entered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It would never have ended.
    Hopeless,
    /// There is room in the queue after all.
    HasRoom,
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
        wanted.saturating_sub(roster.workers)
    }

    /// Counts a worker in, before its thread is started.
    pub(crate) fn enter(&self) {
        let mut roster = lock(&self.roster);
        roster.workers += 1;
        self.publish(&roster);
        let mut alive = lock(&self.alive);
        *alive += 1;
        self.workers.store(*alive, Ordering::Relaxed);
    }

    /// Takes the calling worker out of the roster, if there are more workers than wanted and it is not the last that
    /// does not wait. Returns whether it did. Then the worker must end.
    pub(crate) fn retire(&self) -> bool {
        let mut roster = lock(&self.roster);
        if roster.workers <= roster.wanted || roster.waits.len() + 1 >= roster.workers {
            return false;
        }
        roster.workers -= 1;
        self.publish(&roster);
        true
    }

    /// Takes a worker that could not begin out of the roster.
    pub(crate) fn withdraw(&self) {
        let mut roster = lock(&self.roster);
        roster.workers -= 1;
        self.publish(&roster);
        // Workers that wait had counted on it.
        roster.waits.iter().for_each(|wait| wait.thread.unpark());
        drop(roster);
        self.room.notify(usize::MAX);
    }

    /// Counts out a thread that has come to its end.
    pub(crate) fn gone(&self) {
        let mut alive = lock(&self.alive);
        *alive -= 1;
        self.workers.store(*alive, Ordering::Relaxed);
        if *alive == 0 {
            self.all_gone.notify_all();
        }
    }

    fn publish(&self, roster: &MutexGuard<'_, Roster>) {
        self.surplus.store(roster.workers > roster.wanted, Ordering::Relaxed);
    }

    /// Blocks until all threads have come to their end, `timeout` at most. Returns whether they have.
    pub(crate) fn wait_until_gone(&self, timeout: Duration) -> bool {
        let alive = lock(&self.alive);
        if timeout.is_zero() {
            return *alive == 0;
        }
        *wait_while(&self.all_gone, alive, timeout, |alive| *alive > 0) == 0
    }

    /// Enters a wait of the calling worker, which runs the job `by`, unless the wait would never end. Calls
    /// `queue_is_full` if a wait for room depends on it.
    pub(crate) fn wait(
        &self,
        by: JobId,
        what: Awaited,
        queue_is_full: impl Fn() -> bool,
    ) -> Result<Ticket, Refusal> {
        let mut roster = lock(&self.roster);
        if let Awaited::AnyOf(jobs) = &what
            && roster.lead_nowhere(jobs, by)
        {
            return Err(Refusal::Hopeless);
        }
        let all_wait = roster.waits.len() + 1 >= roster.workers;
        let for_room = roster.waits.iter().any(|wait| wait.what == Awaited::Room);
        if all_wait && what == Awaited::Room {
            return Err(if queue_is_full() { Refusal::Hopeless } else { Refusal::HasRoom });
        }
        if all_wait && !for_room {
            return Err(Refusal::Hopeless);
        }
        roster.last_ticket += 1;
        let ticket = Ticket(roster.last_ticket);
        roster.waits.push(Wait { ticket, by, what, thread: thread::current() });
        drop(roster);
        if all_wait {
            // They find out whether there is room.
            self.room.notify(usize::MAX);
        }
        Ok(ticket)
    }

    /// Crosses a wait out.
    pub(crate) fn wait_is_over(&self, ticket: Ticket) {
        lock(&self.roster).waits.retain(|wait| wait.ticket != ticket);
    }
}

impl Roster {
    /// Whether every way from these jobs, through the jobs they wait for, ends in waits if `by` waits too. A job that
    /// does not wait, or waits for room, is a way out.
    fn lead_nowhere(&self, jobs: &[JobId], by: JobId) -> bool {
        let mut seen = HashSet::from([by]);
        let mut ahead = jobs.to_vec();
        while let Some(job) = ahead.pop() {
            if seen.insert(job) {
                match self.waits.iter().find(|wait| wait.by == job) {
                    Some(Wait { what: Awaited::AnyOf(next), .. }) => ahead.extend(next),
                    _ => return false,
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::sync::event::{Listener, listener};

    fn crew_of(workers: usize) -> Crew {
        let crew = Crew::default();
        (0..crew.want(workers)).for_each(|_| crew.enter());
        crew
    }

    const HOPELESS: Result<Ticket, Refusal> = Err(Refusal::Hopeless);

    fn join(crew: &Crew, by: JobId, jobs: &[JobId]) -> Result<Ticket, Refusal> {
        crew.wait(by, Awaited::AnyOf(jobs.to_vec()), || unreachable!("it is not a wait for room"))
    }

    #[test]
    fn the_last_worker_may_not_wait_for_its_own_pool() {
        let crew = crew_of(2);
        let first = join(&crew, 1, &[10]).expect("another worker is free");
        assert_eq!(join(&crew, 2, &[11]), HOPELESS);
        crew.wait_is_over(first);
        assert!(join(&crew, 2, &[11, 12]).is_ok());
    }

    #[test]
    fn a_circle_is_seen_although_workers_are_free() {
        let crew = crew_of(9);
        assert!(join(&crew, 1, &[2]).is_ok());
        assert!(join(&crew, 2, &[3]).is_ok());
        assert_eq!(join(&crew, 3, &[1]), HOPELESS);
        assert_eq!(join(&crew, 3, &[3]), HOPELESS, "a job that waits for itself");
        assert_eq!(join(&crew, 3, &[1, 2, 3]), HOPELESS, "none of them is a way out");
        assert!(join(&crew, 3, &[1, 4]).is_ok(), "one of them may end");
        assert_eq!(join(&crew, 4, &[2]), HOPELESS, "that was the only way out");
    }

    #[test]
    fn a_wait_for_room_is_hopeless_only_while_the_queue_is_full() {
        let crew = crew_of(1);
        assert_eq!(crew.wait(1, Awaited::Room, || true), HOPELESS);
        assert_eq!(crew.wait(1, Awaited::Room, || false), Err(Refusal::HasRoom));
    }

    /// The worker that waits for room may have been given it already. So the error does not go to the worker that
    /// completes the list.
    #[test]
    fn the_worker_that_waits_for_room_finds_out_whether_it_is_hopeless() {
        let crew = crew_of(2);
        let room = crew.wait(1, Awaited::Room, || true).expect("another worker is free");
        assert!(join(&crew, 2, &[10]).is_ok());
        crew.wait_is_over(room);
        assert_eq!(crew.wait(1, Awaited::Room, || false), Err(Refusal::HasRoom));
        assert_eq!(crew.wait(1, Awaited::Room, || true), HOPELESS);
    }

    /// Whether `step` wakes all of those who wait for room.
    fn wakes_all_who_wait_for_room(crew: &Crew, step: impl FnOnce()) -> bool {
        listener!(crew.room => first);
        listener!(crew.room => second);
        step();
        let now = Instant::now();
        first.wait_deadline(now).is_some() && second.wait_deadline(now).is_some()
    }

    #[test]
    fn a_worker_that_cannot_begin_wakes_those_who_wait_for_room() {
        let crew = crew_of(3);
        assert!(wakes_all_who_wait_for_room(&crew, || crew.withdraw()));
        assert_eq!(crew.want(3), 1, "one is missing");
    }

    #[test]
    fn the_last_worker_to_wait_wakes_those_who_wait_for_room() {
        let crew = crew_of(3);
        assert!(crew.wait(1, Awaited::Room, || true).is_ok());
        assert!(
            !wakes_all_who_wait_for_room(&crew, || assert!(join(&crew, 2, &[10]).is_ok())),
            "another worker is free"
        );
        assert!(wakes_all_who_wait_for_room(&crew, || assert!(join(&crew, 3, &[10]).is_ok())));
    }

    #[test]
    fn a_surplus_worker_leaves_unless_all_others_wait() {
        let crew = crew_of(3);
        assert!(!crew.has_surplus() && !crew.retire());
        let waits = [1, 2].map(|by| join(&crew, by, &[10]).expect("one is free"));
        assert_eq!(crew.want(1), 0);
        assert!(crew.has_surplus() && !crew.retire(), "it is the last that could run anything");
        waits.into_iter().for_each(|ticket| crew.wait_is_over(ticket));
        assert!(crew.retire() && crew.retire() && !crew.retire());
        assert_eq!((crew.workers(), crew.has_surplus()), (3, false), "their threads have not ended");
        (0..2).for_each(|_| crew.gone());
        assert_eq!(crew.workers(), 1);
    }

    /// The thread that aborts may have job 10 in hand, and ends it.
    #[test]
    fn a_worker_that_ends_in_a_drain_counts_no_more_and_makes_no_wait_hopeless() {
        let crew = crew_of(2);
        assert_eq!(crew.workers(), 2);
        crew.gone();
        assert_eq!(crew.workers(), 1);
        let last = join(&crew, 1, &[10]).expect("the thread that aborts ends job 10");
        crew.wait_is_over(last);
        crew.gone();
        assert_eq!((crew.workers(), crew.wait_until_gone(Duration::ZERO)), (0, true));
    }
}
