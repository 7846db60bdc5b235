//! The cells in which workers count, and the account of one job.
//!
//! # Readings that agree with themselves
//!
//! A [`WorkerCell`] is written by its worker alone and read by any thread. Two of its numbers must agree in every
//! reading:
//!
//! - *Taken against ended.* The worker counts `taken` when a job starts and one outcome when it ends. So `taken` is
//!   the number of ended jobs, or one more. A reader reads the outcomes, then `taken`, then the outcomes again, until
//!   both readings of the outcomes are the same. Then no job ended in between, and what it read was true at one
//!   moment. A job that the worker runs beside its own (see [`Account::beside`]) is counted at its end, first as ended,
//!   then as taken. In between the worker looks idle, and its own job looks as if it waited.
//! - *Busy time.* It is in one word, so that a reading cannot be torn. An idle worker stores the sum `A` of its
//!   finished busy time. A busy worker stores `A - S`, where `S` is the time at which it became busy. That word plus
//!   the time of the reading is the sum with the running job included. A worker that goes from job to job without a
//!   rest need not touch it.
//!
//! The word of busy time is modulo 2^63 ns, and a reading is right up to 2^62 ns: 146 years of one worker. The sum over
//! all workers is more. `metrics.rs` adds it up in 128 bits, and takes care that it never falls.
//!
//! # Durations
//!
//! A worker reads the clock once a job: the end of one job is the start of the next, unless the worker slept between
//! them. The duration of a job leaves out the jobs that its worker ran beside it. So durations never add up to more
//! than the busy time.

use std::sync::atomic::{AtomicU64, Ordering};

use super::errors::quietly;
use super::identity::Identity;
use crate::clock::Clock;
use crate::metrics::{Counter, LATENCY_BOUNDS_NS, Latency};

/// How a job ended that was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It returned.
    Completed,
    /// It panicked.
    Panicked,
}

/// How a job ended that returned or panicked. Drops the payload of its panic.
pub(crate) fn outcome_of(returned: std::thread::Result<()>) -> Outcome {
    match returned {
        Ok(()) => Outcome::Completed,
        Err(payload) => {
            quietly(|| drop(payload));
            Outcome::Panicked
        }
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
    /// The sum of the busy time if the worker is idle, the sum less the start if it is busy. See the module's part on
    /// readings.
    busy: AtomicU64,
    /// With [`RUNNING`], when the running job started. Without, when the worker became idle; 0 if it has not run a job
    /// yet. Written by the worker.
    since: AtomicU64,
    /// Time spent in jobs that were run beside the job that runs now. Read by the worker alone.
    beside_ns: AtomicU64,
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
}

impl Ended {
    pub(crate) fn sum(self) -> u64 {
        self.completed + self.panicked
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
            busy: AtomicU64::new(0),
            since: AtomicU64::new(0),
            beside_ns: AtomicU64::new(0),
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

    /// Sets the time spent in jobs beside the running one. Returns what it was. Only the worker may call it.
    fn set_beside_ns(&self, ns: u64) -> u64 {
        let before = self.beside_ns.load(Ordering::Relaxed);
        if before != ns {
            self.beside_ns.store(ns, Ordering::Relaxed);
        }
        before
    }

    /// Adds to the jobs completed by hand.
    #[cfg(test)]
    pub(super) fn pretend_completed(&self, jobs: u64) {
        self.taken.add(jobs);
        self.completed.add(jobs);
    }

    fn ended(&self) -> Ended {
        Ended { completed: self.completed.get(), panicked: self.panicked.get() }
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

/// The account of one job that a worker has in hand.
pub(crate) struct Account<'a> {
    pub(crate) pool: &'a Identity,
    cell: &'a WorkerCell,
    watch: Watch,
    submitted_ns: u64,
    started_ns: u64,
    /// Whether the worker runs the job beside its own, and [`WorkerCell::beside_ns`] of its own.
    beside: Option<u64>,
    stage: Stage,
    /// When the worker was free again.
    free_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    InHand,
    Begun,
    Ended,
}

impl<'a> Account<'a> {
    /// The account of a job that the worker of this cell took at `started_ns`.
    pub(crate) fn new(
        pool: &'a Identity,
        cell: &'a WorkerCell,
        watch: Watch,
        submitted_ns: u64,
        started_ns: u64,
    ) -> Self {
        Account {
            pool,
            cell,
            watch,
            submitted_ns,
            started_ns,
            beside: None,
            stage: Stage::InHand,
            free_ns: started_ns,
        }
    }

    /// The account of a job that the worker of this cell runs now beside its own, which waits meanwhile.
    pub(crate) fn beside(pool: &'a Identity, cell: &'a WorkerCell, watch: Watch, submitted_ns: u64) -> Self {
        let beside = Some(cell.set_beside_ns(0));
        Account { beside, ..Account::new(pool, cell, watch, submitted_ns, watch.now_ns()) }
    }

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
    pub(crate) fn begin(&mut self) {
        debug_assert_eq!(self.stage, Stage::InHand, "a job begins once");
        self.stage = Stage::Begun;
        if self.beside.is_none() {
            // What ran since the last job, in a destructor or a waker, is not this job's.
            self.cell.set_beside_ns(0);
            self.cell.start(self.started_ns);
        }
        if self.watch.runs {
            self.cell.queue_wait.observe(self.started_ns.saturating_sub(self.submitted_ns));
        }
    }

    /// Whether the job was run.
    pub(crate) fn has_begun(&self) -> bool {
        self.stage != Stage::InHand
    }

    /// Counts the job as ended. A handler that tells other threads of the end calls it before that, so that those
    /// threads find the job counted. For all other handlers the worker calls it when they return.
    pub(crate) fn end(&mut self, outcome: Outcome) {
        debug_assert_eq!(self.stage, Stage::Begun, "a job ends once");
        self.stage = Stage::Ended;
        let cell = self.cell;
        if self.watch.runs {
            self.free_ns = self.watch.now_ns();
            let all_ns = self.free_ns.saturating_sub(self.started_ns);
            let beside_ns = cell.set_beside_ns(self.beside.map_or(0, |before| before + all_ns));
            cell.job_duration.observe(all_ns.saturating_sub(beside_ns));
        }
        match outcome {
            Outcome::Completed => cell.completed.add(1),
            Outcome::Panicked => cell.panicked.add(1),
        }
        if self.beside.is_some() {
            // After the outcome: see the module's part on readings.
            cell.taken.add(1);
        }
    }

    /// As [`end`](Account::end), unless it was called.
    pub(crate) fn end_if_begun(&mut self, outcome: Outcome) {
        if self.stage == Stage::Begun {
            self.end(outcome);
        }
    }

    /// Closes the account of a job that had ended before it was taken.
    pub(crate) fn cancel(&mut self) {
        debug_assert_eq!(self.stage, Stage::InHand, "it was not run");
        if let Some(before) = self.beside {
            self.cell.set_beside_ns(before);
        }
    }

    /// Excludes the time since [`end`](Account::end) from the next job.
    pub(crate) fn tarried(&mut self) {
        self.free_ns = self.watch.now_ns();
    }

    /// When the worker was free again.
    pub(crate) fn free_ns(&self) -> u64 {
        self.free_ns
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
                assert!(
                    now.ended.completed >= last.ended.completed && now.ended.panicked >= last.ended.panicked
                );
                last = now;
            }
        });
        let ended = Ended { completed: 133_333, panicked: 66_667 };
        assert_eq!(cell.read(), WorkerReading { ended, busy: false });
    }
}
