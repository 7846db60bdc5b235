//! The queue between submitters and workers, and the waking of sleepers.
//!
//! The queue is a bounded `crossbeam-channel`. Beside it stand the count of jobs ever pushed, and a ring with
//! the time of each push, so that anyone can say how long the job at the head has waited without touching the
//! channel. A take pays nothing for that.
//!
//! # Why no wake-up is lost
//!
//! Sleepers wait on an `event_listener::Event`. A submitter pushes, then looks whether anyone sleeps, and if so
//! calls `notify(1)`; a worker that finds the queue empty counts itself among the sleepers, **looks a second
//! time**, and only then sleeps. Push, count and both looks are sequentially consistent, so either the
//! worker's second look sees the job, or the submitter sees the sleeper.
//!
//! `notify(1)` is throttled: while a notified listener has not yet woken it does nothing, so at most one
//! worker is being woken at a time. That loses nothing because of the cascade: a woken worker that takes a
//! job and leaves more calls `notify(1)` for the next. In steps, the claim is: *whenever a job waits and a
//! worker sleeps, some thread is about to notify or about to look.* (1) A push is followed by its notify. (2)
//! If the notify did nothing, a notified worker has not looked yet; it will, and then either takes a job and,
//! if one is left, notifies, or finds none. (3) A worker that registered but found a job at its second look
//! drops its listener, and a notification it had been given passes to another listener. So the duty is handed
//! on until no job waits or no worker sleeps.
//!
//! # Enough workers
//!
//! Where no job ever blocks, more workers awake than there are processors only take turns. So a queue can be told how
//! many may sleep although jobs wait: with no more than that nobody is woken. The claim then is: *whenever a job waits
//! and more sleep than may, some thread is about to notify or about to look.* With no more asleep than may be, workers
//! are awake, and each says that it sleeps before it looks a second time, as above. Jobs that do not block do not
//! keep it from that for long.
//!
//! # Lingering
//!
//! To fall asleep and to be woken costs more than many a job. So one worker at a time, having run out of
//! jobs, lingers: it looks again for some microseconds before it sleeps, and while it does a submitter need
//! not wake anyone. It has a woken worker's duties: having found a job, it first says that it lingers no
//! more, and if there are others behind the one it takes it wakes the next. The argument above holds with
//! "lingers" for "has been notified": a submitter that saw it lingering had pushed before it stopped, and so
//! before its next look.
//!
//! `model.rs` has the model checker try all this, over the code below.

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::checked::thread;
use crate::sync::event::{Event, Listener, listener};
use crate::sync::ring::{Receiver, Sender, bounded};

/// For how long a worker lingers: 2^0 + 2^1 + ... + 2^6 pauses of the processor, each followed by a look, then
/// some turns given to other threads; in all 3 to 5 us where nobody else wants to run. It is the measure of
/// `crossbeam`'s `Backoff`, and less than it takes to wake a thread.
const LINGER_PAUSES: u32 = if cfg!(millpond_loom) { 1 } else { 7 };
const LINGER_YIELDS: u32 = if cfg!(millpond_loom) { 1 } else { 4 };

/// A job and when it was pushed.
pub(crate) struct Queued<J> {
    pub(crate) job: J,
    pub(crate) submitted_ns: u64,
}

pub(crate) struct Queue<J> {
    sender: Sender<Queued<J>>,
    receiver: Receiver<Queued<J>>,
    pushes: Pushes,
    idle: Idle,
    /// So many workers may sleep although jobs wait; see the module's part on enough workers.
    at_rest: usize,
}

/// Workers with nothing to do. On lines of its own: it changes all the time, and what stands beside it does
/// not.
#[derive(Default)]
#[repr(align(128))]
struct Idle {
    sleepers: Event,
    /// Workers that sleep, or are about to.
    sleeping: AtomicUsize,
    /// Whether a worker lingers.
    lingering: AtomicBool,
}

/// Why a job was not pushed; it comes back.
pub(crate) enum Refused<J> {
    /// Submitters are not admitted.
    Closed(J),
    /// There is no room.
    Full(J),
}

impl<J> Queue<J> {
    /// A queue for `capacity` jobs, for which so many workers need not be woken.
    pub(crate) fn new(capacity: usize, at_rest: usize) -> Self {
        let (sender, receiver) = bounded(capacity);
        Queue { sender, receiver, pushes: Pushes::new(capacity), idle: Idle::default(), at_rest }
    }

    /// Puts a submitter's job at the back, if there is room and `open` says so. `open` is asked when the
    /// submitter counts as inside, which it does until the job is in the queue. The caller wakes a worker
    /// afterwards.
    pub(crate) fn admit(&self, job: J, now_ns: u64, open: impl FnOnce() -> bool) -> Result<(), Refused<J>> {
        self.pushes.enter();
        if !open() {
            self.pushes.leave();
            return Err(Refused::Closed(job));
        }
        match self.sender.try_send(Queued { job, submitted_ns: now_ns }) {
            Ok(()) => {
                self.pushes.leave_and_count(now_ns);
                Ok(())
            }
            Err(refused) => {
                self.pushes.leave();
                Err(Refused::Full(refused.into_inner().job))
            }
        }
    }

    /// Whether a submitter is inside.
    pub(crate) fn has_anyone_inside(&self) -> bool {
        self.pushes.inside() > 0
    }

    /// Puts a worker's own job at the back, or gives it back when the queue is full. The caller wakes a worker
    /// afterwards.
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

    pub(crate) fn is_full(&self) -> bool {
        self.receiver.is_full()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.receiver.capacity().unwrap_or(usize::MAX)
    }

    /// How many jobs were ever pushed. It may lag a push by an instant, so a job may be taken before it is
    /// counted.
    pub(crate) fn pushed(&self) -> u64 {
        self.pushes.counted()
    }

    /// How long the job at the head has waited, when workers say that they have taken `taken` jobs.
    pub(crate) fn oldest_age_ns(&self, taken: u64, now_ns: u64) -> u64 {
        // Workers may have more in hand, each one that it has not counted yet; but no more jobs wait than there
        // is room for.
        let head = taken.max(self.pushed().saturating_sub(self.capacity() as u64));
        self.pushes.time_of_ns(head).map_or(0, |pushed_ns| now_ns.saturating_sub(pushed_ns))
    }

    pub(crate) fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Wakes a sleeping worker, unless one is awake that will look, or is being woken already, or enough are awake.
    pub(crate) fn wake_one(&self) {
        if self.idle.lingering.load(Ordering::SeqCst) {
            return;
        }
        if self.idle.sleeping.load(Ordering::SeqCst) > self.at_rest {
            self.idle.sleepers.notify(1);
        }
    }

    pub(crate) fn wake_all(&self) {
        self.idle.sleepers.notify(usize::MAX);
    }

    /// Looks for a job again and again, unless another worker does. Says whether there is one.
    pub(crate) fn linger(&self) -> bool {
        if self.idle.lingering.swap(true, Ordering::SeqCst) {
            return false;
        }
        let found = (0..LINGER_PAUSES + LINGER_YIELDS).any(|step| {
            if step < LINGER_PAUSES {
                (0..1 << step).for_each(|_| std::hint::spin_loop());
            } else {
                thread::yield_now();
            }
            !self.is_empty()
        });
        self.idle.lingering.store(false, Ordering::SeqCst);
        found
    }

    /// Sleeps until woken, unless the queue is not empty or `leave` says so at the second look.
    pub(crate) fn sleep(&self, leave: impl FnOnce() -> bool) {
        listener!(self.idle.sleepers => listener);
        self.idle.sleeping.fetch_add(1, Ordering::SeqCst);
        if self.is_empty() && !leave() {
            listener.wait();
        }
        self.idle.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The count of pushes, the time of each that may still be waiting, and the count of submitters inside.
///
/// Both counts are in one word, so that a submission writes it twice and no other: submitters inside in the low
/// 16 bits, each a thread between two steps that do not block; pushes above them, of which 48 bits hold nine
/// years at a million a second.
///
/// The ring is indexed by the number of the push. An entry holds the time in units of 1024 ns above 16 bits of
/// the lap it was written in, so that a reader can tell an entry that is not yet written from the one a lap
/// before. A slot is written again only a whole ring later, when its job has been taken, because the ring has
/// more room than the queue.
///
/// Two submitters that push at the same instant may be counted in the other order, which puts the wrong one
/// of two nearly equal times beside each job. Only the age of the head is read here; a job's own wait is
/// measured from its own time.
#[repr(align(128))]
struct Pushes {
    word: AtomicU64,
    /// As long as a power of two.
    ring: Box<[Entry]>,
}

/// Only read for the age of the head, by which no thread decides what to do next.
type Entry = std::sync::atomic::AtomicU64;

const INSIDE_BITS: u32 = 16;
const INSIDE: u64 = (1 << INSIDE_BITS) - 1;
const LAP_BITS: u32 = 16;
const UNIT_BITS: u32 = 10;

impl Pushes {
    fn new(size: usize) -> Self {
        let ring = (0..(size + 1).next_power_of_two()).map(|_| Entry::new(0)).collect();
        Pushes { word: AtomicU64::new(0), ring }
    }

    fn counted(&self) -> u64 {
        self.word.load(Ordering::Acquire) >> INSIDE_BITS
    }

    fn inside(&self) -> u64 {
        self.word.load(Ordering::SeqCst) & INSIDE
    }

    // SeqCst: see `workers.rs`, the part on states.
    fn enter(&self) {
        self.word.fetch_add(1, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.word.fetch_sub(1, Ordering::Release);
    }

    fn leave_and_count(&self, now_ns: u64) {
        let before = self.word.fetch_add((1 << INSIDE_BITS) - 1, Ordering::AcqRel);
        self.note(before >> INSIDE_BITS, now_ns);
    }

    fn count(&self, now_ns: u64) {
        let before = self.word.fetch_add(1 << INSIDE_BITS, Ordering::AcqRel);
        self.note(before >> INSIDE_BITS, now_ns);
    }

    fn note(&self, number: u64, now_ns: u64) {
        let entry = ((now_ns >> UNIT_BITS) << LAP_BITS) | self.lap(number);
        self.slot(number).store(entry, Ordering::Release);
    }

    /// When the push of this number happened; `None` when it has not, or is being written this instant.
    fn time_of_ns(&self, number: u64) -> Option<u64> {
        let entry = self.slot(number).load(Ordering::Acquire);
        (entry & ((1 << LAP_BITS) - 1) == self.lap(number)).then_some((entry >> LAP_BITS) << UNIT_BITS)
    }

    /// The lap's mark, never that of an unwritten slot in the first lap.
    fn lap(&self, number: u64) -> u64 {
        ((number >> self.ring.len().trailing_zeros()) + 1) & ((1 << LAP_BITS) - 1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the mask leaves less than the ring's length")]
    fn slot(&self, number: u64) -> &Entry {
        &self.ring[(number & (self.ring.len() as u64 - 1)) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_gives_the_job_back() {
        let queue = Queue::new(2, 0);
        assert_eq!(queue.push('a', 1), Ok(()));
        assert_eq!(queue.push('b', 1), Ok(()));
        assert_eq!(queue.push('c', 1), Err('c'));
        assert_eq!(queue.pushed(), 2);
    }

    #[test]
    fn the_age_is_that_of_the_head_over_many_laps() {
        let queue = Queue::new(3, 0);
        let mut taken = 0;
        let us = 1 << UNIT_BITS;
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
