//! Who works: how many workers a pool has, how many it should have, and which of them wait for their own
//! pool.
//!
//! # No silent deadlock
//!
//! A worker that waits for a job of its own pool works for nobody meanwhile. Two things can go wrong, and the
//! wait that would complete either is refused with an error instead:
//!
//! - *Starvation*: every worker waits likewise, so nothing that is queued will ever start.
//! - *A circle*: whatever it waits for waits, directly or through others, for the job it is running itself.
//!
//! The argument that the error is neither missed nor wrong. A wait is entered here under the lock of what is
//! waited for, before that ends, and crossed out under the same lock when it ends, *by whoever ends it* and
//! not by the waiter when it awakes. A waiter that awakes for another reason crosses its entry out, under that
//! lock, before it makes a new one. So at any moment the waits on the list are exactly those of workers that
//! can only be freed by an end that has not happened. If all workers are on it, none of them can bring one
//! about; the last to come sees that, because the list has its own lock. Waits that end by themselves, with a
//! timeout or a deadline, are not on the list.
//!
//! A wait for room in the queue ends when there is room, and not by anybody's hand: its waiter may have been
//! told and not be awake yet. So while such a wait is on the list, all workers on it proves nothing. Whoever
//! completes the list then has those who wait for room look again, and each crosses itself out, tries, and
//! comes back if the queue is full; with all others on the list and the queue still full it is hopeless.
//!
//! A worker that has been told to leave stays while it is the last that does not wait, and none leaves a
//! draining pool before the queue is empty, when no job that could be starved is left. When a worker that was
//! expected cannot begin, everybody who waits looks again.
//!
//! What is not seen: circles through several pools, waits of an executor that polls handles on a worker, and a
//! `resize` called by a job, which waits for the first step of new workers, while that waits for the job,
//! or for one that needs its worker.

use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Condvar, Mutex, MutexGuard, lock, wait_while};
use crate::sync::event::Event;

/// The workers of a pool, as a number and as a list of those that wait for it.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    /// Told when there may be room in the queue; see `workers.rs`.
    pub(crate) room: Event,
    roster: Mutex<Roster>,
    /// A copy of [`Roster::workers`], for readers of gauges. Written under the lock.
    workers: AtomicUsize,
    /// Whether there are more workers than wanted. Written under the lock, read by workers between jobs.
    surplus: AtomicBool,
    /// Threads that have not come to their end; `all_gone` is told when it is 0.
    alive: Mutex<usize>,
    all_gone: Condvar,
}

#[derive(Debug, Default)]
struct Roster {
    /// Workers that have not been let go. A drain does not change it.
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
    /// To have it look again. A wait for room is told through [`Crew::room`].
    thread: Thread,
}

/// What a worker of the pool waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// The end of one of these jobs.
    AnyOf(Vec<JobId>),
    /// Room in the queue.
    Room,
}

/// Tells jobs apart while they live: where they are in memory.
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
    /// How many workers there are.
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
        *lock(&self.alive) += 1;
    }

    /// Lets the calling worker go if there are more than wanted, and it is not the last that does not wait.
    pub(crate) fn retire(&self) -> bool {
        let mut roster = lock(&self.roster);
        if roster.workers <= roster.wanted || roster.waits.len() + 1 >= roster.workers {
            return false;
        }
        roster.workers -= 1;
        self.publish(&roster);
        true
    }

    /// Counts out a worker that could not begin.
    pub(crate) fn withdraw(&self) {
        let mut roster = lock(&self.roster);
        roster.workers -= 1;
        self.publish(&roster);
        // Those who wait had counted on it.
        roster.waits.iter().for_each(|wait| wait.thread.unpark());
        drop(roster);
        self.room.notify(usize::MAX);
    }

    /// Counts out a thread that has come to its end.
    pub(crate) fn gone(&self) {
        let mut alive = lock(&self.alive);
        *alive -= 1;
        if *alive == 0 {
            self.all_gone.notify_all();
        }
    }

    fn publish(&self, roster: &MutexGuard<'_, Roster>) {
        self.workers.store(roster.workers, Ordering::Relaxed);
        self.surplus.store(roster.workers > roster.wanted, Ordering::Relaxed);
    }

    /// Blocks until all threads have come to their end, `timeout` at most. Says whether they have.
    pub(crate) fn wait_until_gone(&self, timeout: Duration) -> bool {
        let alive = lock(&self.alive);
        if timeout.is_zero() {
            return *alive == 0;
        }
        *wait_while(&self.all_gone, alive, timeout, |alive| *alive > 0) == 0
    }

    /// Enters a wait of the calling worker, which runs the job `by`, unless it would never end. `queue_is_full`
    /// is asked when a wait for room depends on it.
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
            // They can tell.
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
    /// Whether every way from these jobs, through what they wait for, ends in waits, when `by` waits too. A job
    /// that does not wait, or waits for room, is a way out.
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
    use super::*;

    fn crew_of(workers: usize) -> Crew {
        let crew = Crew::default();
        (0..crew.want(workers)).for_each(|_| crew.enter());
        crew
    }

    const HOPELESS: Result<Ticket, Refusal> = Err(Refusal::Hopeless);

    fn join(crew: &Crew, by: JobId, jobs: &[JobId]) -> Result<Ticket, Refusal> {
        crew.wait(by, Awaited::AnyOf(jobs.to_vec()), || unreachable!("it is no wait for room"))
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

    /// Who waits for room may have been given it already, so the one who completes the list is not the one to
    /// be told.
    #[test]
    fn who_waits_for_room_decides_whether_it_is_hopeless() {
        let crew = crew_of(2);
        let room = crew.wait(1, Awaited::Room, || true).expect("another worker is free");
        assert!(join(&crew, 2, &[10]).is_ok());
        crew.wait_is_over(room);
        assert_eq!(crew.wait(1, Awaited::Room, || false), Err(Refusal::HasRoom));
        assert_eq!(crew.wait(1, Awaited::Room, || true), HOPELESS);
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
        assert_eq!((crew.workers(), crew.has_surplus()), (1, false));
    }
}
