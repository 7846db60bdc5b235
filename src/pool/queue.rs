//! The queue between submitters and workers, and the waking of workers that sleep.
//!
//! The queue is a bounded `crossbeam-channel`. Beside it are the count of all pushes, and a ring with the time of each
//! push. So any thread can tell how long the job at the head has waited without touching the channel. A take pays
//! nothing for that.
//!
//! # Why no wake-up is lost
//!
//! Workers without a job wait on an `event_listener::Event`. A submitter pushes, then looks whether a worker sleeps,
//! and if so calls `notify(1)`. A worker that finds the queue empty counts itself among the sleepers, **looks a second
//! time**, and only then sleeps. Push, count and both looks are sequentially consistent. So either the worker's second
//! look sees the job, or the submitter sees the sleeper.
//!
//! `notify(1)` is throttled. While a notified listener has not woken yet, `notify(1)` does nothing, so at most one
//! worker is being woken at a time. That loses no wake-up because of the cascade: a woken worker that takes a job and
//! leaves more calls `notify(1)` for the next. The claim is: *whenever a job waits and a worker sleeps, some thread is
//! about to notify or about to look.* In steps:
//!
//! 1. Each push is followed by its notify.
//! 2. If the notify did nothing, a notified worker has not looked yet. When it looks, it either finds no job, or takes
//!    one and notifies if another is left.
//! 3. A worker that registered and found a job at its second look drops its listener. A notification that the listener
//!    had been given passes to another listener.
//!
//! So each thread hands the duty on until no job waits or no worker sleeps.
//!
//! # Enough workers
//!
//! If no job ever blocks, workers beyond the number of processors only take turns. So a queue can be given a number of
//! workers that may sleep although jobs wait. While no more than that sleep, no worker is woken. The claim then is:
//! *whenever a job waits and more sleep than may, some thread is about to notify or about to look.* If no more sleep
//! than may, the others are awake. Each of them counts itself as asleep before it looks a second time, as above. Jobs
//! that do not block do not keep a worker from that for long.
//!
//! # Lingering
//!
//! To fall asleep and to be woken costs more than many jobs. So one worker at a time lingers when it has no job: it
//! looks again for some microseconds before it sleeps. While it does, a submitter need not wake a worker. A lingering
//! worker has the duties of a woken one. When it finds a job, it first clears the flag that says that it lingers. If
//! there are more jobs behind the one it takes, it wakes the next worker. The argument above holds with "lingers" for
//! "has been notified". A submitter that saw the worker linger had pushed before it stopped lingering, and so before
//! its next look.
//!
//! In `model.rs` the model checker tries all this, over the code below.

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::checked::thread;
use crate::sync::event::{Event, Listener, listener};
use crate::sync::ring::{Receiver, Sender, bounded};

/// For how long a worker lingers: 2^0 + 2^1 + ... + 2^6 pauses of the processor, each followed by a look, then
/// some turns given to other threads. That is 3 to 5 us in all if no other thread wants to run. It is the measure of
/// `crossbeam`'s `Backoff`, and less than it takes to wake a thread.
const LINGER_PAUSES: u32 = if cfg!(millpond_loom) { 1 } else { 7 };
const LINGER_YIELDS: u32 = if cfg!(millpond_loom) { 1 } else { 4 };

/// A job and the time of its push.
pub(crate) struct Queued<J> {
    pub(crate) job: J,
    pub(crate) submitted_ns: u64,
}

pub(crate) struct Queue<J> {
    sender: Sender<Queued<J>>,
    receiver: Receiver<Queued<J>>,
    pushes: Pushes,
    idle: Idle,
    /// How many workers may sleep although jobs wait. See the module's part on enough workers.
    at_rest: usize,
}

/// Workers without a job. On cache lines of its own, because it changes all the time and the fields beside it do not.
#[derive(Default)]
#[repr(align(128))]
struct Idle {
    sleepers: Event,
    /// Workers that sleep, or are about to.
    sleeping: AtomicUsize,
    /// Whether a worker lingers.
    lingering: AtomicBool,
}

/// Why a job was not pushed. The job comes back inside.
pub(crate) enum Refused<J> {
    /// Submitters are not admitted.
    Closed(J),
    /// There is no room.
    Full(J),
}

impl<J> Queue<J> {
    /// A queue for `capacity` jobs, of whose workers `at_rest` may sleep although jobs wait.
    pub(crate) fn new(capacity: usize, at_rest: usize) -> Self {
        let (sender, receiver) = bounded(capacity);
        Queue { sender, receiver, pushes: Pushes::new(capacity), idle: Idle::default(), at_rest }
    }

    /// Puts a submitter's job at the back, if there is room and `open` returns true. The submitter counts as inside
    /// from before the call of `open` until the job is in the queue. The caller wakes a worker afterwards.
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

    /// How many jobs were ever pushed. A push is counted an instant after it, so a job may be taken before it is
    /// counted.
    pub(crate) fn pushed(&self) -> PushCount {
        self.pushes.counted()
    }

    /// Sets the count of pushes by hand.
    #[cfg(test)]
    pub(super) fn pretend_pushed(&self, count: u64) {
        self.pushes.word.store(count << INSIDE_BITS, Ordering::SeqCst);
    }

    /// How long the job at the head has waited, if workers have counted `taken` jobs as taken.
    pub(crate) fn oldest_age_ns(&self, taken: u64, now_ns: u64) -> u64 {
        // Each worker may have taken one more job that it has not counted yet. But no more jobs wait than there is
        // room for.
        let head = taken.max(self.pushed().near(taken).saturating_sub(self.capacity() as u64));
        self.pushes.age_ns(head, now_ns).unwrap_or(0)
    }

    pub(crate) fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Wakes a sleeping worker, unless one lingers and will look, one is being woken already, or enough are awake.
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

    /// Looks for a job again and again, unless another worker does. Returns whether there is one.
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

    /// Sleeps until woken, unless at the second look the queue is not empty or `leave` returns true.
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
/// Both counts are in one word, so that a submission writes that word twice and no other. The low 16 bits count the
/// submitters inside, each a thread between two steps that do not block. The upper 48 bits count pushes modulo 2^48,
/// which is nine years at a million a second. A reader of the numbers also knows how many jobs were taken, in 64 bits,
/// and that count is near. [`PushCount::near`] finds the full count from both.
///
/// The index in the ring is the number of the push. An entry holds the time in units of 1024 ns, modulo 2^48 of them,
/// above 16 bits of the lap in which it was written. By the lap a reader can tell an entry that is not yet written from
/// the one a lap before. A slot is written again only a whole ring later. Its job has been taken by then, because the
/// ring has more room than the queue.
///
/// Two submitters that push at the same instant may be counted in the other order. Then each of the two jobs has the
/// other's time in the ring, and the times are nearly equal. Only the age of the head is read here. A job's own wait is
/// measured from its own time.
#[repr(align(128))]
struct Pushes {
    word: AtomicU64,
    /// Its length is a power of two.
    ring: Box<[Entry]>,
}

/// Only read for the age of the head, on which no thread's next step depends.
type Entry = std::sync::atomic::AtomicU64;

const INSIDE_BITS: u32 = 16;
const INSIDE: u64 = (1 << INSIDE_BITS) - 1;
const LAP_BITS: u32 = 16;
const UNIT_BITS: u32 = 10;

/// The bits of a time in nanoseconds that an entry keeps: nine years.
const TIME_BITS: u32 = u64::BITS - LAP_BITS + UNIT_BITS;

/// How many jobs had been pushed, modulo 2^48.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PushCount(u64);

impl PushCount {
    /// The full count. Of all numbers that it may stand for, it is the one nearest to `taken`. That is the count of the
    /// jobs taken at about the same time.
    ///
    /// The two differ by the jobs in the queue, the jobs in hand, and the jobs pushed or taken between the two
    /// readings. That is far less than 2^47.
    pub(crate) fn near(self, taken: u64) -> u64 {
        // The shifts extend the sign of a difference of 48 bits.
        let distance = (self.0.wrapping_sub(taken) << INSIDE_BITS).cast_signed() >> INSIDE_BITS;
        taken.saturating_add_signed(distance)
    }
}

impl Pushes {
    fn new(size: usize) -> Self {
        let ring = (0..(size + 1).next_power_of_two()).map(|_| Entry::new(0)).collect();
        Pushes { word: AtomicU64::new(0), ring }
    }

    fn counted(&self) -> PushCount {
        PushCount(self.word.load(Ordering::Acquire) >> INSIDE_BITS)
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

    /// How long ago the push of this number was; `None` if it has not happened, or is being written this instant.
    fn age_ns(&self, number: u64, now_ns: u64) -> Option<u64> {
        let entry = self.slot(number).load(Ordering::Acquire);
        if entry & ((1 << LAP_BITS) - 1) != self.lap(number) {
            return None;
        }
        let pushed_ns = (entry >> LAP_BITS) << UNIT_BITS;
        // Both modulo nine years, so that the age is right in any year. The upper half stands for a push after
        // `now_ns`.
        let age_ns = now_ns.wrapping_sub(pushed_ns) & ((1 << TIME_BITS) - 1);
        Some(if age_ns >> (TIME_BITS - 1) == 0 { age_ns } else { 0 })
    }

    /// The mark of the lap. In the first lap it differs from the mark of a slot that is not written yet.
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
        assert_eq!(queue.pushed().near(0), 2);
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

    /// Nine years at a million a second, and long after: the word's count of pushes begins again at 0.
    #[test]
    fn count_and_age_are_right_when_the_count_of_pushes_overflows_its_bits() {
        for before in [(1 << 48) - 2, (1 << 48) - 1, 1 << 48, (5 << 48) - 2, u64::MAX - 20] {
            let queue = Queue::new(4, 0);
            queue.pretend_pushed(before);
            let mut taken = before;
            let us = 1 << UNIT_BITS;
            for round in 1..=3 {
                let base = round * 100 * us;
                queue.push('x', base).expect("room");
                assert!(queue.admit('y', base + 10 * us, || true).is_ok(), "there is room");
                assert_eq!(queue.pushed().near(taken), taken + 2);
                assert_eq!(queue.oldest_age_ns(taken, base + 30 * us), 30 * us);
                taken += u64::from(queue.try_take().is_some());
                assert_eq!(queue.oldest_age_ns(taken, base + 30 * us), 20 * us);
                // The worker counts the job after the push's count is read.
                assert_eq!(queue.pushed().near(taken + 5), taken + 1);
                taken += u64::from(queue.try_take().is_some());
                assert_eq!((queue.pushed().near(taken), queue.has_anyone_inside()), (taken, false));
            }
        }
    }

    #[test]
    fn the_age_of_the_head_is_right_after_nine_years() {
        let queue = Queue::new(2, 0);
        let us = 1 << UNIT_BITS;
        for (taken, nine_years) in [1, 2, 3, 20, 63].into_iter().enumerate() {
            // The push is just before the entry's time begins again at 0, and the reading after it.
            let pushed_ns = (nine_years << TIME_BITS) - 4 * us;
            queue.push('x', pushed_ns).expect("room");
            assert_eq!(queue.oldest_age_ns(taken as u64, pushed_ns + 10 * us), 10 * us);
            assert_eq!(queue.oldest_age_ns(taken as u64, pushed_ns - us), 0, "clocks may differ");
            queue.try_take().expect("it was pushed");
        }
    }
}
