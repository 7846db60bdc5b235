//! The queue between submitters and workers, and the waking of sleepers.
//!
//! The queue is a bounded `crossbeam-channel`. Beside it stand the count of jobs ever pushed, and a ring with
//! the time of each push, so that anyone can say how long the job at the head has waited without touching the
//! channel. A push pays one read-modify-write for both, on a line that only submitters write; a take pays
//! nothing.
//!
//! # Why no wake-up is lost
//!
//! Sleepers wait on an `event_listener::Event`. A submitter pushes, then calls `notify(1)`; a worker that
//! finds the queue empty registers as a listener, **looks a second time**, and only then sleeps. `notify` and
//! `listen` both contain a sequentially consistent fence, so either the worker's second look sees the job, or
//! the submitter's notify sees the listener.
//!
//! `notify(1)` is throttled: while a notified listener has not yet woken it does nothing, so at most one
//! worker is being woken at a time. That loses nothing because of the cascade: a woken worker that takes a
//! job and leaves more calls `notify(1)` for the next. In steps, the claim is: *whenever a job waits and a
//! worker sleeps, some thread is about to notify or about to look.* (1) A push is followed by its notify. (2)
//! If the notify did nothing, a notified worker has not looked yet; it will, and then either takes a job and,
//! if one is left, notifies, or finds none. (3) A worker that registered but found a job at its second look
//! drops its listener, and a notification it had been given passes to another listener. So the duty is handed
//! on until no job waits or no worker sleeps.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use event_listener::{Event, Listener, listener};

/// A job and when it was pushed.
pub(crate) struct Queued<J> {
    pub(crate) job: J,
    pub(crate) submitted_ns: u64,
}

pub(crate) struct Queue<J> {
    sender: Sender<Queued<J>>,
    receiver: Receiver<Queued<J>>,
    pushes: Pushes,
    sleepers: Event,
}

impl<J> Queue<J> {
    /// A queue for `capacity` jobs and this many workers.
    pub(crate) fn new(capacity: usize, workers: usize) -> Self {
        let (sender, receiver) = bounded(capacity);
        // Beside those that wait, each worker may have one in hand that it has not counted yet.
        Queue { sender, receiver, pushes: Pushes::new(capacity + workers), sleepers: Event::new() }
    }

    /// Puts a job at the back, or gives it back when the queue is full. The caller wakes a worker afterwards.
    pub(crate) fn push(&self, job: J, now_ns: u64) -> Result<(), J> {
        match self.sender.try_send(Queued { job, submitted_ns: now_ns }) {
            Ok(()) => {
                self.pushes.count(now_ns);
                Ok(())
            }
            Err(refused) => Err(refused.into_inner().job),
        }
    }

    /// Takes the job at the front, if there is one.
    pub(crate) fn try_take(&self) -> Option<Queued<J>> {
        self.receiver.try_recv().ok()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.receiver.capacity().unwrap_or(usize::MAX)
    }

    /// How many jobs were ever pushed. It may lag a push by an instant, so a job may be taken before it is
    /// counted.
    pub(crate) fn pushed(&self) -> u64 {
        self.pushes.counted.load(Ordering::Acquire)
    }

    /// How long the job at the head has waited, when `taken` jobs have left the queue.
    pub(crate) fn oldest_age_ns(&self, taken: u64, now_ns: u64) -> u64 {
        self.pushes.time_of_ns(taken).map_or(0, |pushed_ns| now_ns.saturating_sub(pushed_ns))
    }

    /// Wakes a sleeping worker, unless one is being woken already.
    pub(crate) fn wake_one(&self) {
        self.sleepers.notify(1);
    }

    pub(crate) fn wake_all(&self) {
        self.sleepers.notify(usize::MAX);
    }

    /// Sleeps until woken, unless the queue is not empty or `leave` says so at the second look.
    pub(crate) fn sleep(&self, leave: impl Fn() -> bool) {
        listener!(self.sleepers => listener);
        if self.is_empty() && !leave() {
            listener.wait();
        }
    }
}

/// The count of pushes, and the time of each that may still be waiting.
///
/// The ring is indexed by the number of the push. An entry holds the time in microseconds above 16 bits of
/// the lap it was written in, so that a reader can tell an entry that is not yet written from the one a lap
/// before. A slot is written again only a whole ring later, when its job has long been taken, because the
/// ring has room for the queue and for what the workers have in hand.
///
/// Two submitters that push at the same instant may be counted in the other order, which puts the wrong one
/// of two nearly equal times beside each job. Only the age of the head is read here; a job's own wait is
/// measured from its own time.
#[repr(align(128))]
struct Pushes {
    counted: AtomicU64,
    ring: Box<[AtomicU64]>,
}

const LAP_BITS: u32 = 16;

impl Pushes {
    fn new(size: usize) -> Self {
        let ring = (0..size.next_power_of_two()).map(|_| AtomicU64::new(0)).collect();
        Pushes { counted: AtomicU64::new(0), ring }
    }

    fn count(&self, now_ns: u64) {
        let number = self.counted.fetch_add(1, Ordering::AcqRel);
        let entry = ((now_ns / 1000) << LAP_BITS) | self.lap(number);
        self.slot(number).store(entry, Ordering::Release);
    }

    /// When the push of this number happened; `None` when it has not, or is being written this instant.
    fn time_of_ns(&self, number: u64) -> Option<u64> {
        let entry = self.slot(number).load(Ordering::Acquire);
        (entry & ((1 << LAP_BITS) - 1) == self.lap(number)).then_some((entry >> LAP_BITS) * 1000)
    }

    /// The lap's mark, never that of an unwritten slot in the first lap.
    fn lap(&self, number: u64) -> u64 {
        (number / self.ring.len() as u64 + 1) & ((1 << LAP_BITS) - 1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the mask leaves less than the ring's length")]
    fn slot(&self, number: u64) -> &AtomicU64 {
        &self.ring[(number & (self.ring.len() as u64 - 1)) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_gives_the_job_back() {
        let queue = Queue::new(2, 1);
        assert_eq!(queue.push('a', 1), Ok(()));
        assert_eq!(queue.push('b', 1), Ok(()));
        assert_eq!(queue.push('c', 1), Err('c'));
        assert_eq!(queue.pushed(), 2);
    }

    #[test]
    fn the_age_is_that_of_the_head_over_many_laps() {
        let queue = Queue::new(3, 1);
        let mut taken = 0;
        let us = 1000;
        assert_eq!(queue.oldest_age_ns(taken, 5 * us), 0, "nothing waits");
        for round in 1..100_000 {
            let base = round * 100 * us;
            queue.push('x', base).expect("room");
            queue.push('y', base + 10 * us).expect("room");
            assert_eq!(queue.oldest_age_ns(taken, base + 30 * us), 30 * us);
            taken += u64::from(queue.try_take().is_some());
            assert_eq!(queue.oldest_age_ns(taken, base + 30 * us), 20 * us);
            taken += u64::from(queue.try_take().is_some());
            assert_eq!(queue.oldest_age_ns(taken, base + 30 * us), 0);
        }
    }
}
