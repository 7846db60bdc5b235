//! A bounded pool of worker threads that shows what it is doing.
//!
//! # What it guarantees
//!
//! - **Bounded.** A [`Pool`] has a fixed number of workers and a queue of fixed capacity.
//!   [`Pool::try_submit`] never blocks: a job that finds no room comes back in the error.
//! - **First in, first out.** Workers take jobs in the order in which they were admitted.
//! - **An admitted job ends exactly once**: it is completed, it panics, or it is aborted, and is counted so.
//!   A panic ends its job, never its worker.
//! - **The numbers are true.** [`Pool::stats`] and the collector of [`Pool::collector`] satisfy, at every
//!   moment and not only at rest, `submitted = completed + panicked + aborted + queue_depth + busy`, `busy <=
//!   workers`, and `queue_depth <= queue_capacity`. Time spent in jobs counts the running ones; ages rise
//!   although nothing ends.
//! - **A drain loses nothing.** [`Pool::drain`] stops admission, finishes what was admitted, and ends early
//!   when nothing is left.
//!
//! # What it leaves to others
//!
//! What a job is: a pool is built over any job type and one [`Handler`] for each worker. The server's job is
//! a connection and its handler owns the worker's buffer, so that a job needs no allocation.
//!
//! # States
//!
//! A pool is `open`, then `draining`, then `closed`, and never goes back.
//!
//! | stage | submitters | workers |
//! | --- | --- | --- |
//! | open | admitted if there is room | run jobs, sleep when there is none |
//! | draining | refused; those already inside finish their push | as before |
//! | closed | refused | run what is queued, then exit; after an abort they exit at once |
//!
//! Why no admitted job is left behind. A submitter adds itself to `inside` before it looks at the stage, and
//! leaves after its push. A drain first sets the stage to `draining`, then waits until `inside` is 0, then
//! sets `closed`. Both do their store before their load, sequentially consistent, so one of them sees the
//! other: either the submitter sees `draining` and turns back, or the drain waits for its push. So when the
//! stage is `closed`, every admitted job is in the queue, and a worker that sees `closed` and then an empty
//! queue has nothing more to come: only a running job can still requeue, and its own worker looks again after
//! it.

mod metrics;
mod queue;
mod worker;

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use self::metrics::Stats;
use self::queue::Queue;
use self::worker::WorkerCell;
pub(crate) use self::worker::quietly;
pub use self::worker::{Handler, Turn};
use crate::clock::Clock;
use crate::sync::lock;

/// The most workers a pool may have: a thread each, and a scrape looks at all of them.
pub const MAX_WORKERS: usize = 10_000;

/// The most jobs a queue may hold: its memory, some gigabytes then, is taken at the start.
pub const MAX_QUEUE_CAPACITY: usize = 100_000_000;

/// The stack of a worker unless set: enough for a service that does no deep recursion.
pub const DEFAULT_STACK_SIZE: usize = 256 * 1024;

const OPEN: u8 = 0;
const DRAINING: u8 = 1;
const CLOSED: u8 = 2;
const ABORTED: u8 = 3;

/// A bounded pool of named worker threads over jobs of type `J`.
///
/// Dropping a pool drains it: the drop blocks until every admitted job has ended; in a
/// panicking thread it aborts instead. [`drain`](Pool::drain) with
/// a timeout, or [`abort`](Pool::abort), comes back sooner.
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use std::sync::Arc;
/// use std::time::Duration;
/// use millpond::Pool;
///
/// let sum = Arc::new(AtomicU64::new(0));
/// let pool = Pool::builder("adder").workers(2).queue_capacity(100).start(|_worker| {
///     let sum = Arc::clone(&sum);
///     move |job: u64| {
///         sum.fetch_add(job, Ordering::Relaxed);
///     }
/// })?;
/// for number in 1..=10 {
///     pool.try_submit(number).expect("there is room for a hundred");
/// }
/// assert!(pool.drain(Duration::from_secs(10)).is_clean());
/// assert_eq!(sum.load(Ordering::Relaxed), 55);
/// # Ok::<(), millpond::PoolError>(())
/// ```
pub struct Pool<J: Send + 'static> {
    shared: Arc<Shared<J>>,
    /// Joined by the first drain that sees them all exit.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the pool, its workers and its collector hold together.
pub(crate) struct Shared<J> {
    name: String,
    clock: Clock,
    queue: Queue<J>,
    cells: Box<[WorkerCell]>,
    /// One of `OPEN`, `DRAINING`, `CLOSED`, `ABORTED`; only rises. See the module's part on states.
    stage: AtomicU8,
    /// Submitters between their look at the stage and the end of their push.
    inside: AtomicU64,
    /// Jobs that an abort took out of the queue. Written by whoever aborts.
    aborted: AtomicU64,
    /// The largest busy time ever reported; see `metrics.rs`. Written by readers.
    busy_reported_ns: AtomicU64,
    /// Submissions refused for want of room. Written by any submitter.
    rejected_full: AtomicU64,
    /// Submissions refused because the pool drains. Written by any submitter.
    rejected_draining: AtomicU64,
    /// Worker threads that have not exited; `all_exited` is told when it reaches 0.
    alive: Mutex<usize>,
    all_exited: Condvar,
}

impl Pool<()> {
    /// Starts to describe a pool. `name` becomes part of its threads' names, `mill-<name>-<number>`, of which
    /// Linux shows the first 15 bytes, and the value of its metrics' label `pool`.
    pub fn builder(name: impl Into<String>) -> PoolBuilder {
        PoolBuilder {
            name: name.into(),
            workers: 1,
            queue_capacity: 1,
            stack_size: DEFAULT_STACK_SIZE,
            clock: Clock::start(),
        }
    }
}

impl<J: Send + 'static> Pool<J> {
    /// Admits a job, or gives it back. Never blocks.
    ///
    /// # Errors
    ///
    /// [`Rejected::Full`] when as many jobs wait as the queue holds, [`Rejected::Draining`] once a drain or
    /// an abort has begun. Both carry the job, and both are counted.
    pub fn try_submit(&self, job: J) -> Result<(), Rejected<J>> {
        let shared = &self.shared;
        // SeqCst here and in `drain`: the module's part on states has the argument.
        shared.inside.fetch_add(1, Ordering::SeqCst);
        let outcome = if shared.stage.load(Ordering::SeqCst) == OPEN {
            shared.queue.push(job, shared.clock.now_ns()).map_err(Rejected::Full)
        } else {
            Err(Rejected::Draining(job))
        };
        shared.inside.fetch_sub(1, Ordering::Release);
        match &outcome {
            Ok(()) => shared.queue.wake_one(),
            Err(Rejected::Full(_)) => {
                shared.rejected_full.fetch_add(1, Ordering::Relaxed);
            }
            Err(Rejected::Draining(_)) => {
                shared.rejected_draining.fetch_add(1, Ordering::Relaxed);
            }
        }
        outcome
    }

    /// Stops admission, lets the workers finish every admitted job, and waits for them, `timeout` at most. It
    /// returns as soon as the last job has ended. What then still waits in the queue is dropped and counted
    /// as aborted, and workers still in a job exit after it; their threads are not waited for.
    ///
    /// Safe to call again and from several threads: each call waits for the same end.
    pub fn drain(&self, timeout: Duration) -> Drained {
        let shared = &self.shared;
        shared.advance(DRAINING);
        // A submitter inside is between two steps that do not block, so this is a matter of microseconds.
        while shared.inside.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        shared.advance(CLOSED);
        self.wait_for_exit(timeout)
    }

    /// Stops admission, drops every job that waits and counts it as aborted. Running jobs run on; each worker
    /// exits after its job. Does not wait for them.
    pub fn abort(&self) -> Drained {
        self.wait_for_exit(Duration::ZERO)
    }

    fn wait_for_exit(&self, timeout: Duration) -> Drained {
        let shared = &self.shared;
        let alive = lock(&shared.alive);
        let alive = if timeout.is_zero() {
            alive
        } else {
            shared
                .all_exited
                .wait_timeout_while(alive, timeout, |alive| *alive > 0)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0
        };
        let all_exited = *alive == 0;
        drop(alive);
        let mut dropped = 0;
        if all_exited {
            for thread in lock(&self.threads).drain(..) {
                // Its last act was to leave `alive`, so this blocks for no longer than a thread's exit takes.
                let _ = thread.join();
            }
        } else {
            shared.advance(ABORTED);
            while shared.inside.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
            dropped = shared.drop_queued();
        }
        let stats = self.stats();
        Drained { running: if all_exited { 0 } else { stats.busy }, dropped, stats }
    }

    /// Reads every number of the pool at once. Takes no lock that a worker or submitter waits on; costs a
    /// look at each worker's cells.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.read_stats()
    }

    /// How long the job that has waited longest has been waiting; zero when none waits.
    #[must_use]
    pub fn oldest_age(&self) -> Duration {
        self.shared.read_oldest_age()
    }

    /// A collector of the pool's metrics, `millpond_pool_*`, labelled `pool="<name>"`, for a `prometheus`
    /// registry.
    #[must_use]
    pub fn collector(&self) -> Box<dyn prometheus::core::Collector> {
        collector(self.meter())
    }

    /// The pool's gauges without its job type, for whoever only reads them.
    pub(crate) fn meter(&self) -> Arc<dyn Meter> {
        Arc::clone(&self.shared) as Arc<dyn Meter>
    }
}

/// See [`Pool::collector`].
pub(crate) fn collector(meter: Arc<dyn Meter>) -> Box<dyn prometheus::core::Collector> {
    let name = meter.name().to_owned();
    crate::metrics::collector(metrics::PoolMetrics(meter), &[("pool", &name)])
}

/// What a pool says of itself, whatever its jobs are.
pub(crate) trait Meter: Send + Sync {
    /// The pool's name.
    fn name(&self) -> &str;
    /// See [`Pool::stats`].
    fn stats(&self) -> Stats;
    /// See [`Pool::oldest_age`].
    fn oldest_age(&self) -> Duration;
}

impl<J: Send> Meter for Shared<J> {
    fn name(&self) -> &str {
        &self.name
    }

    fn stats(&self) -> Stats {
        self.read_stats()
    }

    fn oldest_age(&self) -> Duration {
        self.read_oldest_age()
    }
}

impl<J> Shared<J> {
    /// Raises the stage, and wakes every sleeper to see it.
    fn advance(&self, stage: u8) {
        self.stage.fetch_max(stage, Ordering::SeqCst);
        self.queue.wake_all();
    }

    /// Takes what is queued and drops it, counted as aborted.
    fn drop_queued(&self) -> u64 {
        let mut dropped = 0;
        while let Some(queued) = self.queue.try_take() {
            // Counted before it is dropped: a destructor may be slow, but the job has left the queue.
            self.aborted.fetch_add(1, Ordering::Release);
            quietly(|| drop(queued));
            dropped += 1;
        }
        dropped
    }
}

impl<J: Send + 'static> Drop for Pool<J> {
    fn drop(&mut self) {
        // After an abort, or a drain that timed out, nobody is waited for: a stuck job must not hang its
        // dropper. Nor must it keep a panic from being seen.
        if std::thread::panicking() {
            self.abort();
        } else if self.shared.stage.load(Ordering::SeqCst) < ABORTED {
            self.drain(Duration::MAX);
        }
    }
}

impl<J: Send + 'static> fmt::Debug for Pool<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.shared.name)
            .field("workers", &self.shared.cells.len())
            .finish()
    }
}

/// The description of a pool; see [`Pool::builder`].
#[derive(Clone, Debug)]
pub struct PoolBuilder {
    name: String,
    workers: usize,
    queue_capacity: usize,
    stack_size: usize,
    clock: Clock,
}

impl PoolBuilder {
    /// Sets the number of worker threads, 1 to [`MAX_WORKERS`]. Unless set, 1.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Sets how many jobs may wait, at least 1. Unless set, 1. The queue's memory is taken at the start:
    /// about 32 bytes and the size of a job for each.
    #[must_use]
    pub fn queue_capacity(mut self, jobs: usize) -> Self {
        self.queue_capacity = jobs;
        self
    }

    /// Sets the size of each worker's stack, in bytes. Unless set, [`DEFAULT_STACK_SIZE`]. The system rounds
    /// it up and takes memory only for what is touched.
    #[must_use]
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.stack_size = bytes;
        self
    }

    /// Reads times from this clock, so that they can be compared with others of the same clock.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Starts the workers; `handler` is called once for each, on the calling thread, with the worker's number
    /// from 0.
    ///
    /// # Errors
    ///
    /// [`PoolError::Workers`] and [`PoolError::QueueCapacity`] for a number out of range,
    /// [`PoolError::Spawn`] when the system refuses a thread. No thread is left behind.
    pub fn start<J, H>(self, mut handler: impl FnMut(usize) -> H) -> Result<Pool<J>, PoolError>
    where
        J: Send + 'static,
        H: Handler<J> + 'static,
    {
        if self.workers == 0 || self.workers > MAX_WORKERS {
            return Err(PoolError::Workers(self.workers));
        }
        if self.queue_capacity == 0 || self.queue_capacity > MAX_QUEUE_CAPACITY {
            return Err(PoolError::QueueCapacity(self.queue_capacity));
        }
        let shared = Arc::new(Shared {
            name: self.name,
            clock: self.clock,
            queue: Queue::new(self.queue_capacity, self.workers),
            cells: (0..self.workers).map(|_| WorkerCell::new()).collect(),
            stage: AtomicU8::new(OPEN),
            inside: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            busy_reported_ns: AtomicU64::new(0),
            rejected_full: AtomicU64::new(0),
            rejected_draining: AtomicU64::new(0),
            alive: Mutex::new(0),
            all_exited: Condvar::new(),
        });
        let pool = Pool { shared, threads: Mutex::new(Vec::with_capacity(self.workers)) };
        for number in 0..self.workers {
            // An early return drops the pool, which sends home the workers started so far.
            let thread = worker::spawn(&pool.shared, number, self.stack_size, handler(number))
                .map_err(|source| PoolError::Spawn { started: number, source })?;
            lock(&pool.threads).push(thread);
        }
        Ok(pool)
    }
}

/// Why a job was not admitted; it comes back inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected<J> {
    /// As many jobs wait as the queue holds.
    Full(J),
    /// The pool drains, or has.
    Draining(J),
}

impl<J> Rejected<J> {
    /// Takes the job out of the error.
    pub fn into_job(self) -> J {
        match self {
            Rejected::Full(job) | Rejected::Draining(job) => job,
        }
    }
}

impl<J> fmt::Display for Rejected<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rejected::Full(_) => "the pool's queue is full",
            Rejected::Draining(_) => "the pool is draining",
        })
    }
}

impl<J: fmt::Debug> std::error::Error for Rejected<J> {}

/// Why a pool did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum PoolError {
    /// The number of workers, carried here, is not between 1 and [`MAX_WORKERS`].
    Workers(usize),
    /// The capacity of the queue, carried here, is not between 1 and [`MAX_QUEUE_CAPACITY`].
    QueueCapacity(usize),
    /// The system refused a thread.
    Spawn {
        /// How many workers it had granted.
        started: usize,
        /// What it said.
        source: io::Error,
    },
}

impl fmt::Display for PoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PoolError::Workers(workers) => {
                write!(f, "{workers} workers asked for; a pool has 1 to {MAX_WORKERS}")
            }
            PoolError::QueueCapacity(jobs) => {
                write!(f, "a queue for {jobs} jobs asked for; one holds 1 to {MAX_QUEUE_CAPACITY}")
            }
            PoolError::Spawn { started, .. } => {
                write!(f, "the system gave {started} worker threads and refused the next")
            }
        }
    }
}

impl std::error::Error for PoolError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PoolError::Spawn { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// What a panic said, from its payload; a payload that is no text has nothing to say that could be shown.
#[must_use]
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("of a type that is no text")
}

/// How a drain or an abort ended.
#[derive(Clone, Debug)]
pub struct Drained {
    /// Jobs still running when it returned; their workers exit after them.
    pub running: usize,
    /// Jobs that were waiting and were dropped.
    pub dropped: u64,
    /// The pool's numbers at the end.
    pub stats: Stats,
}

impl Drained {
    /// Whether every admitted job ended by itself.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.running == 0 && self.dropped == 0
    }
}

/// What is left of `timeout` since `start`.
pub(crate) fn remaining(start: Instant, timeout: Duration) -> Duration {
    timeout.saturating_sub(start.elapsed())
}
