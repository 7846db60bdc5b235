//! The worker thread, and the cells in which it counts.
//!
//! A worker takes a job, runs it, counts it, and looks for the next. If there is none, it sleeps. It reads the clock
//! once a job: the end of one job is the start of the next, unless the worker slept between them.
//!
//! # Readings that agree with themselves
//!
//! A [`WorkerCell`] is written by its worker alone and read by any thread. Two of its numbers must agree in every
//! reading:
//!
//! - *Taken against ended.* The worker counts `taken` when a job starts and one outcome when it ends. So `taken` is
//!   the number of ended jobs, or one more. A reader reads the outcomes, then `taken`, then the outcomes again, until
//!   both readings of the outcomes are the same. Then no job ended in between, and what it read was true at one
//!   moment.
//! - *Busy time.* It is in one word, so that a reading cannot be torn. An idle worker stores the sum `A` of its
//!   finished busy time. A busy worker stores `A - S`, where `S` is the time at which it became busy. That word plus
//!   the time of the reading is the sum with the running job included. A worker that goes from job to job without a
//!   rest need not touch it.
//!
//! The word of busy time is modulo 2^63 ns, and a reading is right up to 2^62 ns: 146 years of one worker. The sum over
//! all workers is more. `metrics.rs` adds it up in 128 bits, and takes care that it never falls.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use super::queue::{Queue, Queued};
use super::workers::{ABORTED, CLOSED, OPEN, Shared};
use crate::clock::Clock;
use crate::metrics::{Counter, LATENCY_BOUNDS_NS, Latency};

/// An item of a queue.
pub(crate) trait Job: Send + 'static {
    /// Ends a job that was queued and will not be run, because an abort took it out of the queue. Calls `count` with
    /// the outcome before it tells the threads that wait for the job.
    fn abandon(self, count: &mut dyn FnMut(Outcome));
}

/// What one worker does with jobs. Each worker owns one value, so it may keep buffers and counters that no
/// other thread touches.
pub(crate) trait Handler<J>: Send {
    /// Runs a job. It may block, and it may panic. A panic ends the job and is counted, and the worker goes on with
    /// this value. So a handler must be in order at every point where it may panic.
    fn run(&mut self, job: J, turn: &mut Turn<'_, J>);

    /// Called when the worker has no job and is about to sleep: the moment to give back memory.
    fn rest(&mut self) {}
}

/// How an admitted job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It returned.
    Completed,
    /// It panicked.
    Panicked,
    /// It was cancelled while it waited.
    Cancelled,
    /// It waited longer than its deadline.
    Expired,
    /// An abort took it out of the queue.
    Aborted,
}

/// A job that a worker runs: what the job may read from and ask of its pool, and how it is counted.
pub(crate) struct Turn<'a, J> {
    queue: &'a Queue<J>,
    cell: &'a WorkerCell,
    watch: Watch,
    submitted_ns: u64,
    started_ns: u64,
    /// When it was counted as ended; 0 until then.
    ended_ns: u64,
    /// When the worker was free again.
    free_ns: u64,
}

impl<J> Turn<'_, J> {
    /// When the job was submitted, in nanoseconds of the pool's clock.
    pub(crate) fn submitted_ns(&self) -> u64 {
        self.submitted_ns
    }

    /// When the worker took it.
    pub(crate) fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// Reads the pool's clock.
    pub(crate) fn now_ns(&self) -> u64 {
        self.watch.now_ns()
    }

    /// Notes that the job is run, and had not been cancelled or expired while it waited. A handler calls it first.
    pub(crate) fn begin(&self) {
        if self.watch.runs {
            self.cell.queue_wait.observe(self.started_ns.saturating_sub(self.submitted_ns));
        }
    }

    /// Counts the job as ended. A handler that tells other threads of the end calls it before that, so that those
    /// threads find the job counted. For all other handlers the worker calls it when they return.
    pub(crate) fn end(&mut self, outcome: Outcome) {
        debug_assert_eq!(self.ended_ns, 0, "a job ends once");
        self.ended_ns = self.watch.now_ns();
        self.free_ns = self.ended_ns;
        let cell = self.cell;
        let ended = match outcome {
            Outcome::Completed => &cell.completed,
            Outcome::Panicked => &cell.panicked,
            Outcome::Cancelled => return cell.cancelled.add(1),
            Outcome::Expired => return cell.expired.add(1),
            Outcome::Aborted => unreachable!("a worker aborts nothing it has taken"),
        };
        if self.watch.runs {
            cell.job_duration.observe(self.ended_ns.saturating_sub(self.started_ns));
        }
        ended.add(1);
    }

    /// Notes that the time since [`end`](Turn::end) is not the next job's.
    pub(crate) fn tarried(&mut self) {
        self.free_ns = self.watch.now_ns();
    }

    /// Whether other jobs wait now. A long job may use it to decide whether to give way.
    pub(crate) fn others_wait(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Puts a job at the back of the queue, so that it gives way and goes on later. It counts as submitted. The queue
    /// takes it even while the pool drains, because it continues an admitted job. Never blocks.
    ///
    /// # Errors
    ///
    /// If the queue is full, the job comes back.
    pub(crate) fn requeue(&self, job: J) -> Result<(), J> {
        self.queue.push(job, self.now_ns())?;
        self.queue.wake_one();
        Ok(())
    }
}

/// A clock that may be off: a pool that does not measure times reads no clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    pub(crate) clock: Clock,
    pub(crate) runs: bool,
}

impl Watch {
    pub(crate) fn now_ns(&self) -> u64 {
        if self.runs { self.clock.now_ns() } else { 1 }
    }
}

/// The counts of one worker: written by that worker alone, read by scrapes.
#[repr(align(128))]
pub(crate) struct WorkerCell {
    /// Jobs started.
    taken: Counter,
    completed: Counter,
    panicked: Counter,
    cancelled: Counter,
    expired: Counter,
    /// The sum of the busy time if the worker is idle, the sum less the start if it is busy. See the module's part on
    /// busy time.
    busy: AtomicU64,
    /// With [`RUNNING`], when the running job started. Without, when the worker became idle; 0 if it has not run a job
    /// yet. Written by the worker.
    since: AtomicU64,
    pub(crate) queue_wait: Latency,
    pub(crate) job_duration: Latency,
}

/// The bit of [`WorkerCell::busy`] and [`WorkerCell::since`] that is set while a job runs. The other bits are
/// nanoseconds modulo 2^63.
const RUNNING: u64 = 1 << 63;

/// The contents of a [`WorkerCell`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkerReading {
    pub(crate) ended: Ended,
    pub(crate) busy: bool,
}

/// What a worker does, and since when by the pool's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupation {
    /// It waits for a job. 0: since it was started.
    Idle { since_ns: u64 },
    /// It runs the job that it started then.
    Busy { since_ns: u64 },
}

/// How many jobs a worker has ended, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) completed: u64,
    pub(crate) panicked: u64,
    pub(crate) cancelled: u64,
    pub(crate) expired: u64,
}

impl Ended {
    pub(crate) fn sum(self) -> u64 {
        self.completed + self.panicked + self.cancelled + self.expired
    }
}

impl WorkerReading {
    /// How many jobs the worker has taken out of the queue.
    pub(crate) fn taken(&self) -> u64 {
        self.ended.sum() + u64::from(self.busy)
    }
}

impl WorkerCell {
    pub(crate) fn new() -> Self {
        WorkerCell {
            taken: Counter::default(),
            completed: Counter::default(),
            panicked: Counter::default(),
            cancelled: Counter::default(),
            expired: Counter::default(),
            busy: AtomicU64::new(0),
            since: AtomicU64::new(0),
            queue_wait: Latency::new(&LATENCY_BOUNDS_NS),
            job_duration: Latency::new(&LATENCY_BOUNDS_NS),
        }
    }

    /// Notes that a job starts. Only the worker may call it.
    pub(super) fn start(&self, now_ns: u64) {
        self.taken.add(1);
        self.since.store(now_ns | RUNNING, Ordering::Relaxed);
        let busy = self.busy.load(Ordering::Relaxed);
        if busy & RUNNING == 0 {
            // Release, with the reader's Acquire: the reader looks at the clock after it, and so finds no earlier time
            // than `now_ns`.
            self.busy.store((busy.wrapping_sub(now_ns) & !RUNNING) | RUNNING, Ordering::Release);
        }
    }

    /// Notes that the worker became idle. Only the worker may call it.
    pub(super) fn rest(&self, now_ns: u64) {
        self.since.store(now_ns, Ordering::Relaxed);
        let busy = self.busy.load(Ordering::Relaxed);
        if busy & RUNNING != 0 {
            self.busy.store(busy.wrapping_add(now_ns) & !RUNNING, Ordering::Release);
        }
    }

    /// Adds to the jobs completed by hand.
    #[cfg(test)]
    pub(super) fn pretend_completed(&self, jobs: u64) {
        self.taken.add(jobs);
        self.completed.add(jobs);
    }

    fn ended(&self) -> Ended {
        Ended {
            completed: self.completed.get(),
            panicked: self.panicked.get(),
            cancelled: self.cancelled.get(),
            expired: self.expired.get(),
        }
    }

    /// Reads the counts as they were at one moment.
    pub(crate) fn read(&self) -> WorkerReading {
        let mut ended = self.ended();
        loop {
            let taken = self.taken.get();
            let again = self.ended();
            if again == ended {
                // `taken` was read between two equal readings of the outcomes, so it is their sum or one more.
                return WorkerReading { ended, busy: taken > ended.sum() };
            }
            ended = again;
        }
    }

    /// The word of the busy time; see [`busy_ns`].
    pub(crate) fn busy_word(&self) -> u64 {
        self.busy.load(Ordering::Acquire)
    }

    /// What the worker does, and since when.
    pub(crate) fn occupation(&self) -> Occupation {
        match self.since.load(Ordering::Relaxed) {
            busy if busy & RUNNING != 0 => Occupation::Busy { since_ns: busy & !RUNNING },
            idle => Occupation::Idle { since_ns: idle },
        }
    }
}

/// The busy time that a word from [`WorkerCell::busy_word`] stands for at `now_ns`, a time read after it.
pub(crate) fn busy_ns(word: u64, now_ns: u64) -> u64 {
    if word & RUNNING == 0 {
        return word;
    }
    let sum = word.wrapping_add(now_ns) & !RUNNING;
    // The clocks of two processors may differ by nanoseconds. Then the first job may seem to begin after the reader's
    // time, and the sum is a small negative number.
    if sum & (RUNNING >> 1) == 0 { sum } else { 0 }
}

/// Runs jobs until no more will come, or the pool has too many workers and this one retires.
pub(crate) fn work<J: Job, H: Handler<J>>(shared: &Shared<J>, cell: &WorkerCell, handler: &mut H) {
    let queue = &shared.queue;
    let watch = shared.watch;
    let stage = || shared.pool.stage.load(Ordering::SeqCst);
    // In a drain no worker retires: all leave soon, and only when no job is left.
    let retires = || shared.pool.crew.has_surplus() && stage() == OPEN && shared.pool.crew.retire();
    let mut retired = false;
    let mut woken = false;
    let mut free_ns = None;
    while stage() < ABORTED {
        retired = retired || retires();
        if retired {
            // It passes a wake-up that it may have been given on to another worker.
            queue.wake_one();
            break;
        }
        let Some(queued) = queue.try_take() else {
            // The order matters: `closed` first, then a look at the queue. After `closed` only running jobs add to
            // it, and their own workers look again after them.
            if stage() >= CLOSED && queue.is_empty() {
                break;
            }
            if let Some(free_ns) = free_ns.take() {
                cell.rest(free_ns);
                if shared.lingers && queue.linger() {
                    woken = true;
                    continue;
                }
            }
            quietly(|| handler.rest());
            queue.sleep(|| {
                retired = retires();
                retired || stage() >= CLOSED
            });
            woken = true;
            continue;
        };
        shared.there_is_room();
        if std::mem::take(&mut woken) && !queue.is_empty() {
            queue.wake_one();
        }
        let started_ns = free_ns.unwrap_or_else(|| watch.now_ns());
        free_ns = Some(run(queue, watch, cell, handler, queued, started_ns));
    }
    if let Some(free_ns) = free_ns {
        cell.rest(free_ns);
    }
    if stage() == ABORTED {
        // A job that ran while the abort emptied the queue may have requeued itself, and no other thread takes it.
        shared.drop_queued();
    }
}

/// Runs jobs that wait, until there are none or `enough` returns true for the time. For a thread that has other things
/// to do. `cell` and `handler` belong to that thread.
pub(crate) fn help<J: Job, H: Handler<J>>(
    shared: &Shared<J>,
    cell: &WorkerCell,
    handler: &mut H,
    enough: impl Fn(u64) -> bool,
) {
    let (queue, watch) = (&shared.queue, shared.watch);
    let mut free_ns = None;
    while shared.pool.stage.load(Ordering::SeqCst) < ABORTED
        && !free_ns.is_some_and(&enough)
        && let Some(queued) = queue.try_take()
    {
        shared.there_is_room();
        let started_ns = free_ns.unwrap_or_else(|| watch.now_ns());
        free_ns = Some(run(queue, watch, cell, handler, queued, started_ns));
    }
    if let Some(free_ns) = free_ns {
        cell.rest(free_ns);
    }
}

/// Runs one job and counts it. Returns when the worker was free again.
pub(crate) fn run<J, H: Handler<J>>(
    queue: &Queue<J>,
    watch: Watch,
    cell: &WorkerCell,
    handler: &mut H,
    queued: Queued<J>,
    started_ns: u64,
) -> u64 {
    let Queued { job, submitted_ns } = queued;
    cell.start(started_ns);
    let mut turn = Turn { queue, cell, watch, submitted_ns, started_ns, ended_ns: 0, free_ns: 0 };
    let returned = catch_unwind(AssertUnwindSafe(|| handler.run(job, &mut turn)));
    let outcome = if returned.is_ok() { Outcome::Completed } else { Outcome::Panicked };
    if let Err(payload) = returned {
        quietly(|| drop(payload));
    }
    if turn.ended_ns == 0 {
        turn.end(outcome);
    }
    turn.free_ns
}

/// Runs `step`, as a rule a destructor from outside this crate. The panic hook reports a panic in it, and nothing else
/// comes of the panic.
pub(crate) fn quietly(step: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(step)) {
        // The destructor of the payload may panic too, and would end this thread. So the payload is leaked.
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
    fn a_turn_says_whether_others_wait() {
        struct Asks(Vec<(char, bool)>);
        impl Handler<char> for Asks {
            fn run(&mut self, job: char, turn: &mut Turn<'_, char>) {
                self.0.push((job, turn.others_wait()));
            }
        }
        let (queue, cell, mut handler) = (Queue::new(2, 0), WorkerCell::new(), Asks(Vec::new()));
        let watch = Watch { clock: Clock::start(), runs: true };
        ['a', 'b'].into_iter().for_each(|job| queue.push(job, 1).expect("room"));
        while let Some(queued) = queue.try_take() {
            run(&queue, watch, &cell, &mut handler, queued, 2);
        }
        assert_eq!(handler.0, [('a', true), ('b', false)]);
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
                assert!(
                    now.ended.completed >= last.ended.completed && now.ended.panicked >= last.ended.panicked
                );
                last = now;
            }
        });
        let ended = Ended { completed: 133_333, panicked: 66_667, ..Ended::default() };
        assert_eq!(cell.read(), WorkerReading { ended, busy: false });
    }
}
