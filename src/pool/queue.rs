//! The queue between submitters and workers: its bound, its order, and the waking of workers that sleep.
//!
//! # Two buffers
//!
//! Submitters append to the *back* under one lock. Workers take from the *front* under another. If the front is empty,
//! a worker swaps it with the back, under both locks, the front's first. So submitters and workers meet once for many
//! jobs. Each lock is held for some nanoseconds, and never while code from outside this crate runs.
//!
//! The buffers are lists of chunks of [`CHUNK`] jobs, so that no buffer grows and moves its jobs under a lock, and an
//! empty queue takes next to no memory, whatever its capacity.
//!
//! # The bound
//!
//! Capacity means jobs that wait: a queue of capacity 3 with 2 idle workers takes 5 jobs at once. So the bound needs
//! the number of idle workers. It is kept as one count that only needs to be written when a worker is free again:
//!
//! - A worker *asks* once for each job, when it has none: after a job, and before it begins. If it finds no job, it
//!   sleeps, and does not ask again when it wakes.
//! - A job that is cancelled or expires *frees* its place.
//! - A job is admitted while `pushed < capacity + asked + freed`.
//!
//! Each job that was pushed has ended, is run by a worker, is matched with a worker that has asked, or waits. So at
//! every moment at most `capacity` jobs wait. If a worker leaves and no job waits for it, it takes its
//! last question back. A capacity of 0 makes a hand-over: a job is admitted if a worker has asked for it.
//!
//! For a reader of the numbers: a worker counts the end of a job before it asks for the next, and a submitter that
//! uses a question has seen it. So `pushed <= capacity + ended + workers` holds for a reader that reads `pushed` first.
//!
//! # Why no wake-up is lost
//!
//! A worker that finds both buffers empty registers among the sleepers **under both locks**. A submitter appends a job
//! and looks for sleepers under the back's lock. So either the worker sees the job, or the submitter sees the sleeper.
//!
//! At most one worker is being woken at a time: to wake eight for eight jobs of a microsecond costs more than the jobs.
//! The flag `waking` says so. A submitter that finds it set wakes no worker. The claim is: *whenever a job waits and a
//! worker sleeps, some thread is about to wake a worker or about to look.* In steps:
//!
//! 1. A submitter that appends while a worker sleeps and `waking` is clear takes a sleeper off the list, sets `waking`,
//!    and wakes that worker.
//! 2. If `waking` is set, a woken worker has not looked yet, or has looked and not reported. It looks, and after that
//!    clears the flag under the back's lock. If then a job waits in either buffer, it wakes the next worker as in step
//!    1. So it sees every job that was appended while the flag was set.
//! 3. A woken worker that finds no job clears the flag when it registers again, under both locks, with both buffers
//!    empty. A woken worker that leaves does as in step 2.
//!
//! So each thread passes the duty on until no job waits or no worker sleeps. Sleepers are woken last in, first out: the
//! worker that slept shortest has the warmest caches.
//!
//! # Enough workers
//!
//! If no job ever blocks, workers beyond the number of processors only take turns. So a queue can be given a number of
//! workers that may sleep although jobs wait. While no more than that sleep, no worker is woken. The claim then is:
//! *whenever a job waits and more sleep than may, some thread is about to wake a worker or about to look.* The others
//! are awake, and each looks under both locks before it sleeps.
//!
//! # Waiting for room
//!
//! A submitter that waits for room counts itself in `waiting`, under the front's lock, before it looks for room. A
//! worker asks under the same lock. So either the submitter sees the question, or the worker sees the submitter and
//! notifies it. A thread that frees a place always notifies, because that is rare. One thread that waits is notified at
//! a time, and notifies the next when it is done. `places.rs` says how tasks are woken.
//!
//! In `model.rs` the model checker tries all this, over the code below.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;

use super::errors::{Rejected, quietly};
use super::places::Places;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::checked::thread::{self, Thread};
use crate::sync::checked::{Mutex, MutexGuard, lock};

/// Jobs in a chunk. A chunk of the pool's jobs takes 8 KiB: large enough that an allocation for each is nothing, small
/// enough that two of them are nothing.
const CHUNK: usize = if cfg!(millpond_loom) { 2 } else { 128 };

/// Empty chunks that a queue keeps. A burst that fits in them allocates nothing.
const SPARE_CHUNKS: usize = 32;

/// A sweep begins above this number of dead jobs, once they are more than half of the queue.
const DEAD_JOBS: usize = if cfg!(millpond_loom) { 1 } else { 64 };

/// A job and the time of its submission.
pub(crate) struct Queued<J> {
    pub(crate) job: J,
    pub(crate) submitted_ns: u64,
}

type Chunk<J> = VecDeque<Queued<J>>;

/// See the module.
pub(crate) struct Queue<J> {
    /// Its count is that of all pushes, and of all jobs that were run without one.
    back: Side<Back<J>>,
    /// Its count is that of all jobs for which workers asked.
    front: Side<Front<J>>,
    capacity: usize,
    /// How many workers may sleep although jobs wait. See the module's part on enough workers.
    at_rest: usize,
    places: Arc<Places>,
}

/// One buffer, on cache lines of its own. What each push or take writes is on the first of them: both counts, the lock,
/// and the first two fields of the buffer.
#[repr(C, align(128))]
struct Side<T> {
    /// Jobs in the buffer. Written under its lock. A look without the lock is a hint.
    len: AtomicUsize,
    /// Only rises. Written under the lock, read by any thread.
    count: AtomicU64,
    buffer: Mutex<T>,
}

impl<T> Side<T> {
    fn new(buffer: T) -> Self {
        Side { buffer: Mutex::new(buffer), len: AtomicUsize::new(0), count: AtomicU64::new(0) }
    }

    /// Counts one. Called under the lock. Release: a thread that sees the count sees what this thread counted before.
    fn count_one(&self) {
        self.count.store(self.count.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

#[repr(C)]
struct Back<J> {
    /// The chunk that jobs are appended to.
    open: Chunk<J>,
    /// `asked + freed` when a submitter last needed it. The true number is as large or larger.
    allowance: u64,
    /// Full chunks, oldest first.
    full: VecDeque<Chunk<J>>,
    spare: Vec<Chunk<J>>,
    /// Whether submitters are admitted.
    admits: bool,
    sleepers: Vec<Arc<Sleeper>>,
    /// Whether a worker has been woken that has not looked yet.
    waking: bool,
    /// Threads that wait until the pool is idle.
    idle_waiters: usize,
}

#[repr(C)]
struct Front<J> {
    /// The chunk that jobs are taken from.
    current: Chunk<J>,
    /// Submitters that wait for room.
    waiting: usize,
    /// The chunks after the current one.
    chunks: VecDeque<Chunk<J>>,
    /// Empty chunks on their way to [`Back::spare`].
    spent: Vec<Chunk<J>>,
}

/// A worker that may sleep.
struct Sleeper {
    thread: Thread,
    /// Set by the thread that wakes it, cleared by the worker.
    woken: AtomicBool,
}

impl Sleeper {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }

    fn wait(&self) {
        // Code of a job may have left an unpark behind.
        while !self.woken.load(Ordering::Acquire) {
            thread::park();
        }
        // No thread wakes it again before it has registered again, under a lock.
        self.woken.store(false, Ordering::Relaxed);
    }
}

/// A worker's state in the queue: its sleeper, and whether it has asked. Each worker owns one.
pub(crate) struct Seat {
    sleeper: Arc<Sleeper>,
    /// Whether it has asked for the job that it has not got yet.
    asked: bool,
    /// Whether it was woken and has not looked since.
    woken: bool,
}

impl Seat {
    /// For the calling thread. `asked` says whether a first question was asked for it by [`Queue::ask`].
    pub(crate) fn new(asked: bool) -> Self {
        let sleeper = Sleeper { thread: thread::current(), woken: AtomicBool::new(false) };
        Seat { sleeper: Arc::new(sleeper), asked, woken: false }
    }

    /// The worker has run the job it asked for.
    pub(crate) fn served(&mut self) {
        self.asked = false;
    }
}

/// Why a job was not pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no room.
    Full,
    /// Submitters are not admitted.
    Draining,
}

impl Refusal {
    /// The error that gives the job back.
    pub(crate) fn with<J>(self, job: J) -> Rejected<J> {
        match self {
            Refusal::Full => Rejected::full(job),
            Refusal::Draining => Rejected::draining(job),
        }
    }
}

/// Whether a push may wake a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wakes {
    One,
    None,
}

/// How [`Queue::sleep`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// The worker is to look again.
    Over,
    /// The worker has left.
    Left,
}

impl<J> Queue<J> {
    /// A queue in which `capacity` jobs may wait, of whose workers `at_rest` may sleep although jobs wait.
    pub(crate) fn new(capacity: usize, at_rest: usize, places: Arc<Places>) -> Self {
        let back = Back {
            full: VecDeque::new(),
            open: Chunk::new(),
            spare: Vec::new(),
            admits: true,
            allowance: 0,
            sleepers: Vec::new(),
            waking: false,
            idle_waiters: 0,
        };
        let front = Front { current: Chunk::new(), chunks: VecDeque::new(), spent: Vec::new(), waiting: 0 };
        Queue { back: Side::new(back), front: Side::new(front), capacity, at_rest, places }
    }

    /// Puts a submitter's job at the back, if there is room. `make` makes the job in its place, if it is called. It runs
    /// under the lock, so it must be short and must not panic.
    pub(crate) fn admit(
        &self,
        make: &mut (impl FnMut() -> J + ?Sized),
        now_ns: u64,
        wakes: Wakes,
    ) -> Result<(), Refusal> {
        let mut back = lock(&self.back.buffer);
        if !back.admits {
            return Err(Refusal::Draining);
        }
        if !self.has_room(&mut back) {
            return Err(Refusal::Full);
        }
        self.append(&mut back, Queued { job: make(), submitted_ns: now_ns });
        let sleeper = if wakes == Wakes::One { self.next_to_wake(&mut back) } else { None };
        drop(back);
        wake(sleeper);
        Ok(())
    }

    /// Admits jobs as long as there is room and `next`, which runs under the lock, makes one. Returns how many.
    pub(crate) fn admit_all(&self, next: &mut dyn FnMut() -> Option<J>, now_ns: u64) -> usize {
        let mut back = lock(&self.back.buffer);
        let mut admitted = 0;
        while back.admits
            && self.has_room(&mut back)
            && let Some(job) = next()
        {
            self.append(&mut back, Queued { job, submitted_ns: now_ns });
            admitted += 1;
        }
        let sleeper = if admitted > 0 { self.next_to_wake(&mut back) } else { None };
        drop(back);
        wake(sleeper);
        admitted
    }

    /// Puts a worker's own job at the back, or gives it back when the queue is full. The queue takes it although it is
    /// closed.
    pub(crate) fn requeue(&self, job: J, now_ns: u64) -> Result<(), J> {
        let mut back = lock(&self.back.buffer);
        if !self.has_room(&mut back) {
            return Err(job);
        }
        self.append(&mut back, Queued { job, submitted_ns: now_ns });
        let sleeper = self.next_to_wake(&mut back);
        drop(back);
        wake(sleeper);
        Ok(())
    }

    /// Counts a job that was run without having been in the queue, after it was counted as ended.
    pub(crate) fn count_unqueued(&self) {
        let _back = lock(&self.back.buffer);
        self.places.free_uncontested();
        self.back.count_one();
    }

    fn has_room(&self, back: &mut MutexGuard<'_, Back<J>>) -> bool {
        let pushed = self.back.count.load(Ordering::Relaxed);
        let has = |allowance: u64| pushed < allowance.saturating_add(self.capacity as u64);
        if has(back.allowance) {
            return true;
        }
        back.allowance = self.allowance();
        has(back.allowance)
    }

    /// Called under the back's lock, under which alone questions are taken back. So the sum is not negative.
    fn allowance(&self) -> u64 {
        self.front.count.load(Ordering::Acquire).wrapping_add(self.places.freed())
    }

    fn append(&self, back: &mut MutexGuard<'_, Back<J>>, queued: Queued<J>) {
        if back.open.len() >= CHUNK {
            let next = back.spare.pop().unwrap_or_else(|| Chunk::with_capacity(CHUNK));
            let full = mem::replace(&mut back.open, next);
            back.full.push_back(full);
        }
        back.open.push_back(queued);
        self.back.len.store(self.back.len.load(Ordering::Relaxed) + 1, Ordering::Release);
        self.back.count_one();
    }

    /// Takes a sleeper off the list, unless one is being woken already or enough are awake. For when a job waits.
    fn next_to_wake(&self, back: &mut MutexGuard<'_, Back<J>>) -> Option<Arc<Sleeper>> {
        if back.waking || back.sleepers.len() <= self.at_rest {
            return None;
        }
        back.waking = true;
        back.sleepers.pop()
    }

    /// Asks for a worker that is about to begin.
    pub(crate) fn ask(&self) {
        let front = lock(&self.front.buffer);
        self.front.count_one();
        let makes_room = front.waiting > 0;
        drop(front);
        if makes_room {
            self.places.notify_room();
        }
    }

    /// Takes back what was asked for a worker that could not begin.
    pub(crate) fn unask(&self) {
        let mut back = lock(&self.back.buffer);
        self.places.take_back();
        back.allowance = self.allowance();
    }

    /// Takes the job at the front, if there is one. The worker asks for it, unless it has.
    pub(crate) fn take(&self, seat: &mut Seat) -> Option<Queued<J>> {
        let mut front = lock(&self.front.buffer);
        let mut makes_room = false;
        if !seat.asked {
            seat.asked = true;
            self.front.count_one();
            makes_room = front.waiting > 0;
        }
        let queued = self.pop(&mut front);
        drop(front);
        if makes_room {
            self.places.notify_room();
        }
        if seat.woken && queued.is_some() {
            seat.woken = false;
            self.has_looked();
        }
        queued
    }

    /// Takes the job at the front for a thread that drops it, or runs it beside its own.
    pub(crate) fn take_unasked(&self) -> Option<Queued<J>> {
        self.pop(&mut lock(&self.front.buffer))
    }

    fn pop(&self, front: &mut MutexGuard<'_, Front<J>>) -> Option<Queued<J>> {
        let mut queued = front.current.pop_front();
        if queued.is_none() {
            if front.chunks.is_empty() && !self.refill(front) {
                return None;
            }
            if front.current.is_empty()
                && let Some(next) = front.chunks.pop_front()
            {
                let spent = mem::replace(&mut front.current, next);
                if front.spent.len() < SPARE_CHUNKS {
                    front.spent.push(spent);
                }
            }
            queued = front.current.pop_front();
        }
        if queued.is_some() {
            self.front.len.store(self.front.len.load(Ordering::Relaxed) - 1, Ordering::Release);
        }
        queued
    }

    /// Moves what is in the back to the empty front. Returns whether there was anything.
    fn refill(&self, front: &mut MutexGuard<'_, Front<J>>) -> bool {
        // A worker that overlooks a job here looks again, under the lock, before it sleeps.
        if self.back.len.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut back = lock(&self.back.buffer);
        mem::swap(&mut front.chunks, &mut back.full);
        if front.chunks.is_empty() {
            mem::swap(&mut front.current, &mut back.open);
        }
        let room = SPARE_CHUNKS.saturating_sub(back.spare.len()).min(front.spent.len());
        back.spare.extend(front.spent.drain(..room));
        let (all, left) = (self.back.len.load(Ordering::Relaxed), back.open.len());
        // The front first, so that no look in between finds both empty.
        self.front.len.store(all - left, Ordering::Release);
        self.back.len.store(left, Ordering::Release);
        all > left
    }

    /// A woken worker has looked. Wakes the next if a job waits.
    fn has_looked(&self) {
        let mut back = lock(&self.back.buffer);
        back.waking = false;
        // The front's length is a hint. A worker that has moved jobs to the front since has taken one of them, and will
        // look again; so will every worker that is awake. What counts are jobs that were there when this one looked.
        let waits = self.back.len.load(Ordering::Relaxed) > 0 || self.front.len.load(Ordering::Acquire) > 0;
        let sleeper = if waits { self.next_to_wake(&mut back) } else { None };
        drop(back);
        wake(sleeper);
    }

    /// Wakes a worker if a job waits, for a thread that has pushed jobs and woken no worker for them.
    pub(crate) fn wake_one(&self) {
        if self.is_empty() {
            return;
        }
        let sleeper = self.next_to_wake(&mut lock(&self.back.buffer));
        wake(sleeper);
    }

    /// Wakes all workers that sleep, so that each asks whether it is to leave.
    pub(crate) fn wake_all(&self) {
        let sleepers = mem::take(&mut lock(&self.back.buffer).sleepers);
        sleepers.iter().for_each(|sleeper| sleeper.wake());
    }

    /// Admits no submitter from now on. All that were admitted before are in the queue.
    pub(crate) fn close(&self) {
        lock(&self.back.buffer).admits = false;
        self.wake_all();
        self.places.notify_all();
    }

    /// Sleeps until woken, if the queue is empty. Asks `leaves` before, with whether submitters are admitted; if it
    /// returns true, the worker does not sleep and takes back its question.
    pub(crate) fn sleep(&self, seat: &mut Seat, leaves: impl FnOnce(bool) -> bool) -> Rest {
        let front = lock(&self.front.buffer);
        let mut back = lock(&self.back.buffer);
        if self.front.len.load(Ordering::Relaxed) + self.back.len.load(Ordering::Relaxed) > 0 {
            return Rest::Over;
        }
        if mem::take(&mut seat.woken) {
            back.waking = false;
        }
        let idle_waiters = back.idle_waiters;
        let rest = if leaves(back.admits) {
            self.take_back(&mut back, seat);
            Rest::Left
        } else {
            back.sleepers.push(Arc::clone(&seat.sleeper));
            Rest::Over
        };
        drop(back);
        drop(front);
        if idle_waiters > 0 {
            self.places.idle.notify(usize::MAX);
        }
        if rest == Rest::Over {
            seat.sleeper.wait();
            seat.woken = true;
        }
        rest
    }

    /// Retires the calling worker, if the queue stays within its capacity without it and `leaves` returns true. Returns
    /// whether it does.
    pub(crate) fn leave(&self, seat: &mut Seat, leaves: impl FnOnce() -> bool) -> bool {
        let mut back = lock(&self.back.buffer);
        // No more jobs than the capacity may wait when the worker has taken back its question.
        let goes = (!seat.asked || self.has_room(&mut back)) && leaves();
        if goes {
            self.take_back(&mut back, seat);
        }
        goes
    }

    fn take_back(&self, back: &mut MutexGuard<'_, Back<J>>, seat: &mut Seat) {
        if mem::take(&mut seat.asked) {
            self.places.take_back();
            back.allowance = self.allowance();
        }
    }

    /// If a woken worker leaves before it looked for a job, wakes another in its place.
    pub(crate) fn pass_on(&self, seat: &mut Seat) {
        if mem::take(&mut seat.woken) {
            self.has_looked();
        }
    }

    /// Whether no job is in the queue, dead ones included. A hint.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many jobs are in the queue, dead ones included. A hint.
    pub(crate) fn len(&self) -> usize {
        // The back first: jobs that move to the front meanwhile are counted there.
        self.back.len.load(Ordering::Acquire) + self.front.len.load(Ordering::Acquire)
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many jobs were ever pushed, and how many were run without.
    pub(crate) fn pushed(&self) -> u64 {
        self.back.count.load(Ordering::Acquire)
    }

    /// For how many workers no job has been pushed since they asked. Negative if more jobs wait than workers have asked
    /// for.
    pub(crate) fn idle_workers(&self) -> i64 {
        let _back = lock(&self.back.buffer);
        self.allowance().wrapping_sub(self.back.count.load(Ordering::Relaxed)).cast_signed()
    }

    /// Sets the count of pushes by hand, all of jobs that have ended.
    #[cfg(test)]
    pub(super) fn pretend_pushed(&self, count: u64) {
        self.places.pretend_freed(count);
        self.back.count.store(count, Ordering::Release);
    }

    /// Counts the caller among the submitters that wait for room, until the guard is dropped.
    pub(crate) fn wait_for_room(&self) -> Waiting<'_, J> {
        lock(&self.front.buffer).waiting += 1;
        Waiting(self)
    }

    /// Counts the caller among the threads that wait until the pool is idle, until the guard is dropped.
    pub(crate) fn wait_for_idle(&self) -> IdleWait<'_, J> {
        lock(&self.back.buffer).idle_waiters += 1;
        IdleWait(self)
    }

    /// When the oldest job that waits was submitted. Holds the locks for as long as it takes to pass over dead jobs;
    /// those at the front it drops for good.
    pub(crate) fn oldest_ns(&self, is_dead: impl Fn(&J) -> bool) -> Option<u64> {
        let mut dead = Dead(Vec::new());
        let mut front = lock(&self.front.buffer);
        while let Some(queued) = front.current.front() {
            if !is_dead(&queued.job) {
                return Some(queued.submitted_ns);
            }
            dead.0.extend(self.pop(&mut front));
            self.places.dead_is_gone(1);
        }
        let live = |chunk: &Chunk<J>| {
            chunk.iter().find(|queued| !is_dead(&queued.job)).map(|queued| queued.submitted_ns)
        };
        let in_front = front.chunks.iter().find_map(live);
        if in_front.is_some() {
            return in_front;
        }
        let back = lock(&self.back.buffer);
        back.full.iter().chain([&back.open]).find_map(live)
    }

    /// Whether more than half of the jobs in the queue are dead, and more than [`DEAD_JOBS`].
    pub(crate) fn sweep_is_due(&self) -> bool {
        let dead = self.places.dead();
        dead > DEAD_JOBS && dead > self.len() / 2
    }

    /// Takes dead jobs out of the queue. Holds both locks while it checks each job. At least half of them are
    /// dead, so the cost of a dead job is constant.
    pub(crate) fn sweep(&self, is_dead: impl Fn(&J) -> bool) {
        let mut dead = Dead(Vec::new());
        {
            let mut front = lock(&self.front.buffer);
            let mut back = lock(&self.back.buffer);
            let mut part = |chunk: &mut Chunk<J>| {
                let all = mem::take(chunk);
                let (gone, live): (Vec<_>, Chunk<J>) = split(all, &is_dead);
                *chunk = live;
                dead.0.extend(gone);
            };
            part(&mut front.current);
            front.chunks.iter_mut().for_each(&mut part);
            back.full.iter_mut().for_each(&mut part);
            part(&mut back.open);
            front.chunks.retain(|chunk| !chunk.is_empty());
            back.full.retain(|chunk| !chunk.is_empty());
            let in_front = front.current.len() + front.chunks.iter().map(Chunk::len).sum::<usize>();
            let in_back = back.open.len() + back.full.iter().map(Chunk::len).sum::<usize>();
            self.front.len.store(in_front, Ordering::Release);
            self.back.len.store(in_back, Ordering::Release);
        }
        self.places.dead_is_gone(dead.0.len());
    }
}

/// Dead jobs on their way out. They may hold what comes from outside this crate, so they are dropped without a lock,
/// and their destructors may panic.
struct Dead<J>(Vec<Queued<J>>);

impl<J> Drop for Dead<J> {
    fn drop(&mut self) {
        for queued in self.0.drain(..) {
            quietly(|| drop(queued));
        }
    }
}

fn split<J>(all: Chunk<J>, is_dead: impl Fn(&J) -> bool) -> (Vec<Queued<J>>, Chunk<J>) {
    let (mut gone, mut live) = (Vec::new(), Chunk::with_capacity(all.capacity().min(CHUNK)));
    for queued in all {
        if is_dead(&queued.job) { gone.push(queued) } else { live.push_back(queued) }
    }
    (gone, live)
}

fn wake(sleeper: Option<Arc<Sleeper>>) {
    if let Some(sleeper) = sleeper {
        sleeper.wake();
    }
}

/// See [`Queue::wait_for_room`].
pub(crate) struct Waiting<'a, J>(&'a Queue<J>);

impl<J> Drop for Waiting<'_, J> {
    fn drop(&mut self) {
        lock(&self.0.front.buffer).waiting -= 1;
    }
}

/// See [`Queue::wait_for_idle`].
pub(crate) struct IdleWait<'a, J>(&'a Queue<J>);

impl<J> Drop for IdleWait<'_, J> {
    fn drop(&mut self) {
        lock(&self.0.back.buffer).idle_waiters -= 1;
    }
}
