//! The worker thread, and the cells in which it keeps its accounts.
//!
//! A worker takes a job, runs it, counts it, and looks for the next; when there is none it sleeps. It reads
//! the clock once a job: the end of one job is the start of the next, unless it slept between them.
//!
//! # Readings that agree with themselves
//!
//! A [`WorkerCell`] is written by its worker alone and read by anyone. Two of its numbers must fit together
//! in every reading:
//!
//! - *Taken against ended.* The worker counts `taken` when a job starts and one outcome when it ends, so
//!   `taken` is the number ended, or one more. A reader takes the outcomes, then `taken`, then the outcomes
//!   again, until both readings of the outcomes are the same; then no job ended in between, so what it read
//!   was true at one moment.
//! - *Busy time.* Kept in one word, so that a reading cannot be torn: an idle worker stores the sum `A` of
//!   its finished busy time, and a busy one stores `A - S`, where `S` is when it became busy. Adding the time
//!   of the reading gives the sum with the running job included. A worker that goes from job to job without a
//!   rest need not touch it. `metrics.rs` sees to it that the sum over all workers never falls.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::queue::{Queue, Queued};
use super::{ABORTED, CLOSED, Shared};
use crate::clock::Clock;
use crate::metrics::{Counter, LATENCY_BOUNDS_NS, Latency};
use crate::sync::lock;

/// What one worker does with jobs. Each worker owns one value, so it may keep buffers and counters that no
/// other thread touches. Any `FnMut(J) + Send` closure is a handler.
pub trait Handler<J>: Send {
    /// Runs a job. It may block, and may panic: the panic ends the job, and is counted, but the worker and
    /// this value go on, so a handler leaves itself in order at every point where it may panic.
    fn run(&mut self, job: J, turn: &mut Turn<'_, J>);

    /// Called when the worker is about to sleep for want of jobs: the moment to give back memory.
    fn rest(&mut self) {}
}

impl<J, F: FnMut(J) + Send> Handler<J> for F {
    fn run(&mut self, job: J, _turn: &mut Turn<'_, J>) {
        self(job);
    }
}

/// What a running job may know and ask of its pool.
#[derive(Debug)]
pub struct Turn<'a, J> {
    queue: &'a Queue<J>,
    clock: Clock,
    submitted_ns: u64,
    started_ns: u64,
}

impl<J> Turn<'_, J> {
    /// When the job was submitted, in nanoseconds of the pool's clock.
    #[must_use]
    pub fn submitted_ns(&self) -> u64 {
        self.submitted_ns
    }

    /// When the worker took it.
    #[must_use]
    pub fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// Reads the pool's clock.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Whether other jobs wait now; a long job may use it to give way.
    #[must_use]
    pub fn others_wait(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Puts a job at the back of the queue: the way to give way and go on later. It counts as submitted, and
    /// is accepted even while the pool drains, because it continues what was admitted. Never blocks.
    ///
    /// # Errors
    ///
    /// The job comes back when the queue is full.
    pub fn requeue(&self, job: J) -> Result<(), J> {
        self.queue.push(job, self.clock.now_ns())?;
        self.queue.wake_one();
        Ok(())
    }
}

impl<J> std::fmt::Debug for Queue<J> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

/// The accounts of one worker: written by it alone, read by scrapes.
#[repr(align(128))]
pub(crate) struct WorkerCell {
    /// Jobs started.
    taken: Counter,
    completed: Counter,
    panicked: Counter,
    /// The module's part on busy time: the sum when idle, the sum less the start when busy.
    busy: AtomicU64,
    /// When the running job started; 0 when none runs. Written by the worker, read for the longest-running
    /// age, alone.
    running_since_ns: AtomicU64,
    pub(crate) queue_wait: Latency,
    pub(crate) job_duration: Latency,
}

/// The bit of [`WorkerCell::busy`] that says a job runs; the rest is a count modulo 2^63.
const RUNNING: u64 = 1 << 63;

/// What a [`WorkerCell`] said at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkerReading {
    pub(crate) completed: u64,
    pub(crate) panicked: u64,
    pub(crate) busy: bool,
}

impl WorkerCell {
    pub(crate) fn new() -> Self {
        WorkerCell {
            taken: Counter::default(),
            completed: Counter::default(),
            panicked: Counter::default(),
            busy: AtomicU64::new(0),
            running_since_ns: AtomicU64::new(0),
            queue_wait: Latency::new(&LATENCY_BOUNDS_NS),
            job_duration: Latency::new(&LATENCY_BOUNDS_NS),
        }
    }

    fn start(&self, now_ns: u64) {
        self.taken.add(1);
        self.running_since_ns.store(now_ns, Ordering::Relaxed);
        let busy = self.busy.load(Ordering::Relaxed);
        if busy & RUNNING == 0 {
            // Release, against the reader's Acquire: its later look at the clock is then no earlier than
            // `now_ns`.
            self.busy.store((busy.wrapping_sub(now_ns) & !RUNNING) | RUNNING, Ordering::Release);
        }
    }

    fn rest(&self, now_ns: u64) {
        self.running_since_ns.store(0, Ordering::Relaxed);
        let busy = self.busy.load(Ordering::Relaxed);
        if busy & RUNNING != 0 {
            self.busy.store(busy.wrapping_add(now_ns) & !RUNNING, Ordering::Release);
        }
    }

    /// Reads the accounts as they were at one moment.
    pub(crate) fn read(&self) -> WorkerReading {
        let mut completed = self.completed.get();
        let mut panicked = self.panicked.get();
        loop {
            let taken = self.taken.get();
            let again = (self.completed.get(), self.panicked.get());
            if again == (completed, panicked) {
                // `taken` was read between two equal readings of what ended, so it is their sum or one more.
                return WorkerReading { completed, panicked, busy: taken > completed + panicked };
            }
            (completed, panicked) = again;
        }
    }

    /// The word on busy time; see [`busy_ns`].
    pub(crate) fn busy_word(&self) -> u64 {
        self.busy.load(Ordering::Acquire)
    }

    pub(crate) fn running_since_ns(&self) -> Option<u64> {
        Some(self.running_since_ns.load(Ordering::Relaxed)).filter(|since| *since != 0)
    }
}

/// The busy time a word from [`WorkerCell::busy_word`] stands for at `now_ns`, a time read after it.
pub(crate) fn busy_ns(word: u64, now_ns: u64) -> u64 {
    if word & RUNNING == 0 { word } else { word.wrapping_add(now_ns) & !RUNNING }
}

/// Starts a worker thread.
pub(crate) fn spawn<J, H>(
    shared: &Arc<Shared<J>>,
    number: usize,
    stack_size: usize,
    mut handler: H,
) -> io::Result<JoinHandle<()>>
where
    J: Send + 'static,
    H: Handler<J> + 'static,
{
    let shared = Arc::clone(shared);
    *lock(&shared.alive) += 1;
    let leave = Leave(Arc::clone(&shared));
    std::thread::Builder::new().name(format!("mill-{}-{number}", shared.name)).stack_size(stack_size).spawn(
        move || {
            // Moved in, so that it is dropped, and counted, whether the thread ran or was never granted.
            let _leave = leave;
            work(&shared, &shared.cells[number], &mut handler);
        },
    )
}

/// Counts a worker out when it is dropped.
struct Leave<J>(Arc<Shared<J>>);

impl<J> Drop for Leave<J> {
    fn drop(&mut self) {
        let mut alive = lock(&self.0.alive);
        *alive -= 1;
        if *alive == 0 {
            self.0.all_exited.notify_all();
        }
    }
}

fn work<J, H: Handler<J>>(shared: &Shared<J>, cell: &WorkerCell, handler: &mut H) {
    let queue = &shared.queue;
    let clock = shared.clock;
    let stage = || shared.stage.load(Ordering::SeqCst);
    let mut woken = false;
    let mut ended_ns = None;
    while stage() < ABORTED {
        let Some(queued) = queue.try_take() else {
            // The order matters: `closed` first, then a look at the queue. After `closed` nothing is added to
            // it but by running jobs, and their own workers look again after them.
            if stage() >= CLOSED && queue.is_empty() {
                break;
            }
            if let Some(ended_ns) = ended_ns.take() {
                cell.rest(ended_ns);
            }
            quietly(|| handler.rest());
            queue.sleep(|| stage() >= CLOSED);
            woken = true;
            continue;
        };
        if std::mem::take(&mut woken) && !queue.is_empty() {
            queue.wake_one();
        }
        let started_ns = ended_ns.unwrap_or_else(|| clock.now_ns());
        ended_ns = Some(run(queue, clock, cell, handler, queued, started_ns));
    }
    if let Some(ended_ns) = ended_ns {
        cell.rest(ended_ns);
    }
    if stage() == ABORTED {
        // A job that ran while the queue was being emptied may have requeued itself; nobody else would take
        // that.
        shared.drop_queued();
    }
}

/// Runs one job and counts it. Returns when it ended.
fn run<J, H: Handler<J>>(
    queue: &Queue<J>,
    clock: Clock,
    cell: &WorkerCell,
    handler: &mut H,
    queued: Queued<J>,
    started_ns: u64,
) -> u64 {
    let Queued { job, submitted_ns } = queued;
    cell.start(started_ns);
    cell.queue_wait.observe(started_ns.saturating_sub(submitted_ns));
    let mut turn = Turn { queue, clock, submitted_ns, started_ns };
    let outcome = catch_unwind(AssertUnwindSafe(|| handler.run(job, &mut turn)));
    let ended_ns = clock.now_ns();
    cell.job_duration.observe(ended_ns.saturating_sub(started_ns));
    match outcome {
        Ok(()) => cell.completed.add(1),
        Err(payload) => {
            cell.panicked.add(1);
            quietly(|| drop(payload));
        }
    }
    ended_ns
}

/// Runs `step`, as a rule a destructor that is not ours; a panic in it is reported by the panic hook and
/// otherwise ignored.
pub(crate) fn quietly(step: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(step)) {
        // A payload whose own destructor panics would be a panic in this thread; leaking it is the lesser
        // evil.
        std::mem::forget::<Box<dyn Any + Send>>(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_counts_the_running_job_and_never_falls() {
        let cell = WorkerCell::new();
        let read = |now_ns| busy_ns(cell.busy_word(), now_ns);
        assert_eq!(read(1_000), 0);
        cell.start(2_000);
        assert_eq!(read(2_000), 0);
        assert_eq!(read(2_500), 500);
        cell.start(3_000);
        assert_eq!(read(3_100), 1_100, "from job to job without a rest");
        cell.rest(4_000);
        assert_eq!(read(9_000), 2_000);
        cell.start(10_000);
        assert_eq!(read(10_001), 2_001);
    }

    #[test]
    fn a_reading_never_shows_a_job_ended_that_was_not_taken() {
        let cell = WorkerCell::new();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200_000_u64 {
                    cell.start(number + 1);
                    if number % 3 == 0 { cell.panicked.add(1) } else { cell.completed.add(1) }
                }
                done.store(true, Ordering::Release);
            });
            let mut last = WorkerReading::default();
            while !done.load(Ordering::Acquire) {
                let now = cell.read();
                assert!(now.completed >= last.completed && now.panicked >= last.panicked);
                last = now;
            }
        });
        assert_eq!(cell.read(), WorkerReading { completed: 133_333, panicked: 66_667, busy: false });
    }
}
