//! A bounded pool of worker threads that shows what it is doing.
//!
//! # What it guarantees
//!
//! - **Bounded.** In the queue of a [`Pool`] at most a fixed number of jobs wait. If it is full, the submitter has a
//!   choice: [`submit`](Pool::submit) blocks, [`submit_async`](Pool::submit_async) awaits room,
//!   [`submit_timeout`](Pool::submit_timeout) gives up, and [`try_submit`](Pool::try_submit) rejects. A rejected job
//!   comes back to the submitter.
//! - **First in, first out.** Workers take jobs in the order in which they were admitted.
//! - **An admitted job ends exactly once**: it is completed, it panics, it is cancelled, it expires, or it is
//!   aborted. The pool counts that outcome, and the job's handle reports it. A panic ends its job, never its worker.
//! - **An admitted job is not lost because of what is dropped.** The workers finish the queue whether the pool is
//!   drained, closed or dropped, even by a panicking thread. A job is dropped unrun only by [`Pool::abort`], a drain's
//!   timeout, a cancellation or its deadline.
//! - **The numbers are true.** They come from [`Pool::stats`] and the collector of [`Pool::collector`]. At every
//!   moment, and not only at rest, they satisfy `submitted = completed + panicked + cancelled + expired + aborted +
//!   queue_depth + busy`, `busy <= workers`, and `queue_depth <= queue_capacity`. Time spent in jobs includes the
//!   running ones, and ages rise although nothing ends. A thread that has joined a job finds it counted. A job that is
//!   cancelled or expires is counted at once, and its place is free for another.
//! - **Jobs may wait for jobs of their own pool**, however few workers it has: a worker that would wait runs the job
//!   itself. A worker that submits to its own full queue runs that job itself. [`JobHandle`] says what can still wait
//!   for ever.
//!
//! # The rooms
//!
//! In reading order, from the types that a user holds down to the queue. A module imports only from those below it.
//!
//! | module | what |
//! | --- | --- |
//! | `scoped` | a pool whose jobs may borrow |
//! | `map` | a job for each of many items |
//! | `submit` | how closures are submitted |
//! | `workers` | the number of workers, drain: the engine, for any type of job |
//! | `group` | waits for several jobs together |
//! | `handle` | the submitter's side of a job |
//! | `job` | a closure, its outcome, and the states of a job |
//! | `worker` | one worker's loop |
//! | `metrics` | all accounts in one reading |
//! | `shared` | admission, and what submitters, workers and readers share |
//! | `block_on`, `current` | whether the calling thread is a worker, and which job it runs |
//! | `account` | the cells in which workers count, and the account of one job |
//! | `identity`, `crew`, `agenda` | the stage of a pool, its number of workers, its deadlines |
//! | `queue`, `places` | the queue, its bound, and the waking of workers that sleep |
//! | `errors`, `limits` | the error types; bounds and defaults |

#![cfg_attr(
    millpond_loom,
    expect(
        dead_code,
        unused_imports,
        reason = "a model has no clock, no scope, and no task that awaits room"
    )
)]

mod account;
mod agenda;
#[cfg(not(millpond_loom))]
mod block_on;
mod crew;
mod current;
mod errors;
mod group;
mod handle;
mod identity;
mod job;
mod limits;
mod map;
mod metrics;
#[cfg(all(test, millpond_loom))]
mod model;
mod places;
mod queue;
#[cfg(not(millpond_loom))]
mod scoped;
mod shared;
mod submit;
mod worker;
mod workers;

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use prometheus::Registry;

pub(crate) use self::account::Occupation;
#[cfg(not(millpond_loom))]
pub use self::block_on::block_on;
pub(crate) use self::errors::quietly;
pub use self::errors::{InitError, JobError, MapError, Panic, PoolError, Rejected, Returned, panic_message};
pub use self::group::{AsCompleted, Until, as_completed, wait};
pub use self::handle::{CancelOnDrop, CancelToken, JobHandle};
pub(crate) use self::identity::{Identity, Unrun};
use self::job::{Call, Runner};
pub use self::limits::{DEFAULT_QUEUE_CAPACITY, DEFAULT_STACK_SIZE, MAX_QUEUE_CAPACITY, MAX_WORKERS};
pub use self::map::{Map, MapUnordered};
pub(crate) use self::metrics::Meter;
pub use self::metrics::{Durations, Stats};
#[cfg(not(millpond_loom))]
pub use self::scoped::{ScopedHandle, ScopedPool};
pub(crate) use self::shared::{Job, Patience};
use self::submit::{Engine, Owned};
pub(crate) use self::worker::{Handler, Turn};
pub use self::workers::Drained;
pub(crate) use self::workers::{Helper, Hooks, Settings, Workers};
use crate::clock::Clock;

/// A bounded pool of named worker threads that run closures, and may block.
///
/// # Dropping it
///
/// Dropping a pool drains it: the drop blocks until every admitted job has ended. In three cases it does not block, and
/// the workers finish the queue by themselves: after [`close`](Pool::close), in a thread that panics, and in a job of
/// the pool itself. After an abort, or a drain that ran out of time, it waits for no running job. In async code call
/// `close` before the drop, or [`drain`](Pool::drain) with a timeout on a thread that may block, because the drop has
/// no timeout.
///
/// A pool may be shared by reference or in an [`Arc`].
///
/// # Blocking
///
/// [`submit`](Pool::submit), [`submit_timeout`](Pool::submit_timeout), [`execute`](Pool::execute),
/// [`execute_all`](Pool::execute_all), the maps, [`wait_idle`](Pool::wait_idle), [`resize`](Pool::resize) and `drain`
/// may block; each says for how long. Calls that drop jobs, as [`abort`](Pool::abort) and a cancellation, run the
/// destructors of those jobs' closures and their callbacks.
///
/// ```
/// use std::time::Duration;
/// use millpond::Pool;
///
/// let pool = Pool::builder("sums").workers(2).queue_capacity(100).build()?;
/// let jobs: Vec<_> = (1..=3_u64).map(|n| pool.submit(move || n * n)).collect::<Result<_, _>>()?;
/// let squares: Result<Vec<_>, _> = jobs.into_iter().map(|job| job.join()).collect();
/// assert_eq!(squares?, [1, 4, 9]);
///
/// let drained = pool.drain(Duration::from_secs(10));
/// assert!(drained.is_clean());
/// assert_eq!(drained.stats.completed, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
#[doc = include_str!("comparison.md")]
pub struct Pool {
    // The first field, because fields are dropped in order: the registry has the numbers until the drop's drain is
    // over.
    engine: Engine<'static>,
    registered: Option<Registered>,
}

/// Takes a pool's metrics out of its registry when it is dropped.
struct Registered {
    registry: Registry,
    meter: Arc<dyn Meter>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // This fails if the user has taken the metrics out before, also if another pool of the name has come since.
        let _ = self.registry.unregister(collector(Arc::clone(&self.meter)));
    }
}

impl Pool {
    /// Starts to describe a pool. `name` is part of its threads' names, `mill-<name>-<number>`, where it is shortened
    /// so that Linux, which shows 15 bytes, shows all of the number. It is also the value of the label `pool` of its
    /// metrics.
    pub fn builder(name: impl Into<String>) -> PoolBuilder {
        PoolBuilder {
            name: name.into(),
            workers: default_workers(),
            queue_capacity: DEFAULT_QUEUE_CAPACITY,
            stack_size: DEFAULT_STACK_SIZE,
            timed: true,
            carry_span: false,
            registry: None,
            hooks: Hooks::default(),
        }
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.engine.workers.identity().name
    }

    /// Admits a job. If the queue is full, it blocks until there is room, without a timeout.
    /// [`try_submit`](Pool::try_submit) never blocks, [`submit_timeout`](Pool::submit_timeout) gives up, and
    /// [`submit_async`](Pool::submit_async) blocks no thread.
    ///
    /// On a worker of this pool it does not wait for room. If the queue is full, it runs the job at once, on the
    /// worker's own stack and under the locks that the calling job holds, and returns the handle of a job that has
    /// ended. It does so while less than half of that stack is used. `try_submit` and `submit_timeout` never run the
    /// job.
    ///
    /// # Errors
    ///
    /// - [`Rejected::Draining`] once the pool drains or is closed, also while this blocks.
    /// - [`Rejected::Full`] on a worker of this pool, if the queue is full and half of the stack is used.
    ///
    /// Both carry the job, and both are counted.
    pub fn submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.admit(job, None, Patience::Endless)
    }

    /// Admits a job, or gives it back. Never blocks.
    ///
    /// # Errors
    ///
    /// - [`Rejected::Full`] if as many jobs wait as the queue holds.
    /// - [`Rejected::Draining`] once the pool drains or is closed.
    ///
    /// Both carry the job, and both are counted.
    pub fn try_submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.admit(job, None, Patience::None)
    }

    /// Admits a job. If the queue is full, it blocks for `timeout` at most, on a worker of this pool too.
    ///
    /// # Errors
    ///
    /// - [`Rejected::Full`] if there was no room in that time.
    /// - [`Rejected::Draining`] once the pool drains or is closed, also while this blocks.
    ///
    /// Both carry the job, and both are counted. If the timeout is beyond the reach of [`Instant`], this is a
    /// [`submit`](Pool::submit).
    pub fn submit_timeout<F, T>(&self, job: F, timeout: Duration) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.admit(job, None, Patience::lasting(timeout))
    }

    /// Admits a job. If the queue is full, the future is pending until there is room; it blocks no thread. Dropping the
    /// future drops the job.
    ///
    /// In [`block_on`] on a worker of this pool it does not wait for room, as [`submit`](Pool::submit).
    ///
    /// # Errors
    ///
    /// As [`submit`](Pool::submit).
    #[cfg(not(millpond_loom))]
    pub async fn submit_async<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        match self.admit(job, None, Patience::Probe) {
            Err(Rejected::Full(job)) => {
                let job = self.engine.admit_async::<Owned, F, T>(job.into_inner()).await?;
                Ok(JobHandle::new(self.engine.handle(job)))
            }
            outcome => {
                if outcome.is_err() {
                    self.engine.workers.shared().count_rejected(queue::Refusal::Draining);
                }
                outcome
            }
        }
    }

    /// As [`submit`](Pool::submit), for a job whose outcome is not needed. There is no handle, so the job costs less.
    /// The numbers count the job, and only the panic hook reports its panic.
    ///
    /// # Errors
    ///
    /// As [`submit`](Pool::submit).
    pub fn execute<F>(&self, job: F) -> Result<(), Rejected<F>>
    where
        F: FnOnce() + Send + 'static,
    {
        self.engine.execute(job, Patience::Endless)
    }

    /// As [`execute`](Pool::execute), but never blocks.
    ///
    /// # Errors
    ///
    /// As [`try_submit`](Pool::try_submit).
    pub fn try_execute<F>(&self, job: F) -> Result<(), Rejected<F>>
    where
        F: FnOnce() + Send + 'static,
    {
        self.engine.execute(job, Patience::None)
    }

    /// As [`execute`](Pool::execute) for each of several jobs, in their order, and cheaper than as many calls. Blocks
    /// whenever the queue is full. Returns how many jobs there were.
    ///
    /// It draws up to 64 jobs before it submits them together. So the iterator must not wait for a job that it has given.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").workers(2).build()?;
    /// let (sender, receiver) = std::sync::mpsc::channel();
    /// let jobs = (1..=100).map(|n| { let sender = sender.clone(); move || sender.send(n).expect("it is received") });
    /// assert_eq!(pool.execute_all(jobs)?, 100);
    /// drop(sender);
    /// assert_eq!(receiver.iter().sum::<i32>(), 5050);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`execute`](Pool::execute), at the first job that is not admitted. The error carries that job and
    /// up to 63 jobs drawn after it, in their order. To keep the rest, pass `&mut iterator`.
    pub fn execute_all<I, F>(&self, jobs: I) -> Result<usize, Rejected<Vec<F>>>
    where
        I: IntoIterator<Item = F>,
        F: FnOnce() + Send + 'static,
    {
        self.engine.execute_all(jobs.into_iter())
    }

    /// Returns this pool with a deadline for jobs that are submitted through it.
    ///
    /// If a job has not been started within `deadline` of its submission, it is dropped unrun and counted as expired,
    /// its place is free, and the handle reports that, in time, to a thread, a task or a callback. The time for which a
    /// submission blocks counts too. A job that has been started runs to its end.
    ///
    /// The first such job starts one more thread, which ends with the pool. If the system refuses that thread, a worker
    /// checks the deadline when it takes the job.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").workers(1).build()?;
    /// use std::time::Duration;
    /// use millpond::JobError;
    /// let (finish, wait) = std::sync::mpsc::channel::<()>();
    /// let slow = pool.submit(move || wait.recv())?;
    /// let stale = pool.with_deadline(Duration::from_millis(10)).submit(|| "too late")?;
    /// assert_eq!(stale.join(), Err(JobError::Expired));
    /// finish.send(())?;
    /// # drop(slow);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> WithDeadline<'_> {
        WithDeadline { pool: self, deadline }
    }

    /// Runs one job for each item, and returns the results in the order of the items.
    ///
    /// It submits jobs when results are asked for, a bounded number ahead, so the items may be endless; see
    /// [`Map::look_ahead`]. The first job is submitted when the first result is asked for.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").workers(4).build()?;
    /// let lengths = pool.map(["a", "bc", "def"], |word| word.len());
    /// assert_eq!(lengths.collect::<Result<Vec<_>, _>>()?, [1, 2, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn map<I, F, R>(&self, items: I, work: F) -> Map<'_, I::IntoIter, F, R>
    where
        I: IntoIterator,
        I::Item: Send + 'static,
        F: Fn(I::Item) -> R + Send + Sync + 'static,
        R: Send + 'static,
    {
        Map::new(&self.engine, items.into_iter(), work)
    }

    /// As [`map`](Pool::map), but returns each result as soon as it is there, with the number of its item from 0.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").workers(4).build()?;
    /// let mut lengths: Vec<_> = pool.map_unordered(["a", "bc", "def"], |word| word.len()).collect();
    /// lengths.sort_by_key(|(number, _)| *number);
    /// assert_eq!(lengths, [(0, Ok(1)), (1, Ok(2)), (2, Ok(3))]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn map_unordered<I, F, R>(&self, items: I, work: F) -> MapUnordered<'_, I::IntoIter, F, R>
    where
        I: IntoIterator,
        I::Item: Send + 'static,
        F: Fn(I::Item) -> R + Send + Sync + 'static,
        R: Send + 'static,
    {
        MapUnordered::new(&self.engine, items.into_iter(), work)
    }

    fn admit<C, T>(
        &self,
        job: C,
        deadline: Option<Duration>,
        patience: Patience,
    ) -> Result<JobHandle<T>, Rejected<C>>
    where
        C: Call<T> + 'static,
        T: Send + 'static,
    {
        let expires = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        let job = self.engine.admit::<Owned, C, T>(job, expires, patience)?;
        if let Some(at) = expires {
            let job: Weak<dyn identity::Expires> =
                Arc::downgrade(&(Arc::clone(&job) as Arc<dyn identity::Expires>));
            self.engine.workers.identity().note_deadline(at, job);
        }
        Ok(JobHandle::new(self.engine.handle(job)))
    }

    /// Sets the number of workers, 1 to [`MAX_WORKERS`], while the pool works. No job is lost.
    ///
    /// It blocks until the missing workers have been started, and have completed the step of
    /// [`PoolBuilder::on_worker_start`]. Surplus workers leave after the job they run, and until then they count as
    /// workers.
    ///
    /// # Errors
    ///
    /// - [`PoolError::Workers`] if the number is out of range.
    /// - [`PoolError::Draining`] once the pool drains or is closed.
    /// - [`PoolError::Spawn`] if the system refuses a thread, and [`PoolError::Init`] if a new worker could not begin.
    ///   After these two the pool goes on with the workers it has.
    /// - [`PoolError::Beginning`] in [`PoolBuilder::on_worker_start`] of this pool.
    pub fn resize(&self, workers: usize) -> Result<(), PoolError> {
        self.engine.workers.resize(workers)
    }

    /// Blocks until no job waits and none runs, `timeout` at most. Returns whether that was so. Other threads may have
    /// submitted more since.
    ///
    /// In a job of this pool it runs queued jobs meanwhile. Jobs that themselves wait here are not counted, so several
    /// may wait at once.
    #[must_use = "it says whether the pool became idle"]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.engine.wait_idle(timeout)
    }

    /// Stops admission, and returns at once. The workers finish every admitted job, and then exit.
    /// [`Stats::workers`] falls to 0 as they do. After this, dropping the pool does not block. A
    /// [`drain`](Pool::drain) or an [`abort`](Pool::abort) may follow.
    pub fn close(&self) {
        self.engine.workers.close();
    }

    /// Stops admission, lets the workers finish every admitted job, and blocks until they have, for `timeout` at most.
    /// It returns as soon as the last job has ended, or at the timeout. [`Stats::workers`] falls to 0 as the threads
    /// end.
    ///
    /// At the timeout it drops the jobs that still wait in the queue, and counts them as aborted; it returns after the
    /// destructors of their closures and their callbacks. Workers that still run a job exit after it, and the drain
    /// does not wait for their threads. Nor does it wait for a callback or a destructor that a cancellation or a
    /// deadline runs on another thread.
    ///
    /// If all workers have ended in time, the drain also waits for their threads with the destructors of their
    /// thread-locals, until the timeout. Threads that a [`resize`](Self::resize) is starting meanwhile leave by
    /// themselves.
    ///
    /// Safe to call again and from several threads, because each call waits for the last job. One of them waits for the
    /// threads' destructors. In a job of this pool it
    /// runs queued jobs itself, and waits for the jobs that other workers run, except for those that themselves drain
    /// the pool. A queued job that it has begun to run
    /// may outlast the timeout. The calling job does not count as running.
    pub fn drain(&self, timeout: Duration) -> Drained {
        let start = Instant::now();
        let before = self.engine.workers.stats();
        self.engine.workers.stop_admission();
        self.engine.run_queued(|| start.elapsed() >= timeout);
        self.engine.workers.finish(&before, start, timeout)
    }

    /// Stops admission, drops every job that waits, and counts it as aborted. Running jobs run on, and can see the
    /// abort through [`CancelToken::current`]. Each worker exits after its job. The abort does not wait for them, and
    /// [`Stats::workers`] falls to 0 as the threads end. It blocks for as long as the dropped jobs' destructors and
    /// callbacks last.
    pub fn abort(&self) -> Drained {
        self.engine.workers.abort()
    }

    /// Reads every number of the pool at once. It reads each worker's counters, and holds the queue's locks for as
    /// long as it takes to find the oldest job.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.workers.stats()
    }

    /// How long the job that has waited longest has been waiting; zero if no job waits.
    #[must_use]
    pub fn oldest_age(&self) -> Duration {
        self.engine.workers.oldest_age()
    }

    /// A collector of the pool's metrics for a `prometheus` registry. They are named `millpond_pool_*` and labelled
    /// `pool="<name>"`. [`PoolBuilder::registry`] registers the collector at the start.
    #[must_use]
    pub fn collector(&self) -> Box<dyn prometheus::core::Collector> {
        collector(self.engine.workers.meter())
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// A pool, and a deadline for jobs that are submitted through it; see [`Pool::with_deadline`].
#[derive(Clone, Copy, Debug)]
pub struct WithDeadline<'p> {
    pool: &'p Pool,
    deadline: Duration,
}

impl WithDeadline<'_> {
    /// As [`Pool::submit`], but blocks no longer than the deadline.
    ///
    /// # Errors
    ///
    /// As [`Pool::submit`], and [`Rejected::Full`] if there was no room before the deadline.
    pub fn submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        // After its deadline the job would not run, so there is no use in waiting for room longer. A worker does not
        // wait.
        let is_worker = current::worker_of(self.pool.engine.id()).is_some();
        let patience = if is_worker { Patience::Endless } else { Patience::lasting(self.deadline) };
        self.pool.admit(job, Some(self.deadline), patience)
    }

    /// As [`Pool::try_submit`].
    ///
    /// # Errors
    ///
    /// As [`Pool::try_submit`].
    pub fn try_submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.pool.admit(job, Some(self.deadline), Patience::None)
    }

    /// As [`Pool::submit_timeout`].
    ///
    /// # Errors
    ///
    /// As [`Pool::submit_timeout`].
    pub fn submit_timeout<F, T>(&self, job: F, timeout: Duration) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.pool.admit(job, Some(self.deadline), Patience::lasting(timeout))
    }
}

/// A collector of this pool's metrics.
pub(crate) fn collector(meter: Arc<dyn Meter>) -> Box<dyn prometheus::core::Collector> {
    let (name, id) = (meter.name().to_owned(), meter.id());
    crate::metrics::identified(crate::metrics::collector(metrics::PoolMetrics(meter), &[("pool", &name)]), id)
}

/// As many workers as the machine runs threads at once.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS)
}

/// The description of a pool; see [`Pool::builder`].
#[derive(Clone)]
pub struct PoolBuilder {
    name: String,
    workers: usize,
    queue_capacity: usize,
    stack_size: usize,
    timed: bool,
    carry_span: bool,
    registry: Option<Registry>,
    hooks: Hooks,
}

impl PoolBuilder {
    /// Sets the number of worker threads, 1 to [`MAX_WORKERS`]. The default is as many threads as the machine runs at
    /// once. Jobs that block need more.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Sets how many jobs may wait, 0 to [`MAX_QUEUE_CAPACITY`]. The default is [`DEFAULT_QUEUE_CAPACITY`]. Jobs that
    /// idle workers are about to take do not count: a pool with 2 idle workers and a capacity of 3 takes 5 jobs at
    /// once. With a capacity of 0 a job is admitted only if a worker is free for it. A worker is free an instant after
    /// the handle of its last job reports the end. A queue takes memory for the jobs in it, 64 bytes for each small
    /// one.
    #[must_use]
    pub fn queue_capacity(mut self, jobs: usize) -> Self {
        self.queue_capacity = jobs;
        self
    }

    /// Sets the size of each worker's stack, in bytes. The default is [`DEFAULT_STACK_SIZE`]. The system rounds it up,
    /// and only the touched part takes memory.
    #[must_use]
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.stack_size = bytes;
        self
    }

    /// Sets whether waits and durations are measured. By default they are. If they are not, each job saves two clock
    /// reads, and every time in [`Stats`] and in the metrics stays 0. Jobs are still counted.
    #[must_use]
    pub fn timed(mut self, timed: bool) -> Self {
        self.timed = timed;
        self
    }

    /// Sets whether each job runs in the [`tracing`] span in which it was submitted. By default it does not: a span
    /// costs some tens of nanoseconds, and lives until the job has ended.
    #[must_use]
    pub fn carry_span(mut self, carry: bool) -> Self {
        self.carry_span = carry;
        self
    }

    /// Sets a registry for the pool's metrics, which are those of [`Pool::collector`]. The pool registers them at the
    /// start, and takes them out again when it has been dropped.
    #[must_use]
    pub fn registry(mut self, registry: &Registry) -> Self {
        self.registry = Some(registry.clone());
        self
    }

    /// Sets a step that each worker completes on its own thread before its first job. The argument is the worker's
    /// number, from 0. The step may open a connection, set a thread-local, or lower a priority.
    /// [`build`](PoolBuilder::build) and [`Pool::resize`] wait for it. If the step returns an error or panics, they
    /// return an error.
    ///
    /// ```
    /// use millpond::{Pool, PoolError};
    ///
    /// let refused = Pool::builder("doc").on_worker_start(|_| Err("no such database".into())).build();
    /// assert_eq!(refused.unwrap_err().to_string(), "a worker could not begin: no such database");
    /// ```
    #[must_use]
    pub fn on_worker_start(
        mut self,
        step: impl Fn(usize) -> Result<(), InitError> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.start = Some(Arc::new(step));
        self
    }

    /// Sets a step that each worker completes on its own thread after its last job, in a drain, after a close, or when
    /// a [`Pool::resize`] lets it leave. The argument is the worker's number. [`Pool::drain`] waits for it. If the step
    /// panics, the panic hook reports it, and nothing else happens. A worker whose first step failed has no last step.
    #[must_use]
    pub fn on_worker_stop(mut self, step: impl Fn(usize) + Send + Sync + 'static) -> Self {
        self.hooks.stop = Some(Arc::new(step));
        self
    }

    /// Starts the workers.
    ///
    /// # Errors
    ///
    /// - [`PoolError::Workers`] and [`PoolError::QueueCapacity`] if a number is out of range.
    /// - [`PoolError::Name`] if no thread can have the name.
    /// - [`PoolError::Spawn`] if the system refuses a thread.
    /// - [`PoolError::Init`] if a worker could not begin.
    /// - [`PoolError::Register`] if the registry has a pool of this name.
    ///
    /// After an error no thread is left.
    pub fn build(mut self) -> Result<Pool, PoolError> {
        let (registry, carry_span) = (self.registry.take(), self.carry_span);
        let workers = Workers::start(self.settings(), |_| Runner)?;
        let mut pool = Pool { engine: Engine { workers, carry_span }, registered: None };
        if let Some(registry) = registry {
            registry.register(pool.collector()).map_err(|source| PoolError::Register { source })?;
            pool.registered = Some(Registered { registry, meter: pool.engine.workers.meter() });
        }
        Ok(pool)
    }

    /// Runs `run` with a pool whose jobs may borrow what outlives this call. It blocks until `run` has returned and
    /// every admitted job has ended, also if `run` panics.
    ///
    /// The pool has no registry: metrics may outlive the scope. Read its numbers by
    /// [`ScopedPool::stats`](crate::ScopedPool::stats).
    ///
    /// ```
    /// use millpond::Pool;
    ///
    /// let words = ["a", "bc", "def"];
    /// let total = Pool::builder("lengths").workers(2).scoped(|pool| {
    ///     let jobs: Vec<_> = words.iter().map(|word| pool.submit(|| word.len())).collect::<Result<_, _>>().unwrap();
    ///     jobs.into_iter().map(|job| job.join().unwrap()).sum::<usize>()
    /// })?;
    /// assert_eq!(total, 6);
    /// # Ok::<(), millpond::PoolError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`build`](PoolBuilder::build); and [`PoolError::ScopedRegistry`] if a registry was set. Then `run` is not
    /// called.
    #[cfg(not(millpond_loom))]
    pub fn scoped<'env, R>(
        self,
        run: impl for<'scope> FnOnce(&ScopedPool<'scope, 'env>) -> R,
    ) -> Result<R, PoolError> {
        if self.registry.is_some() {
            return Err(PoolError::ScopedRegistry);
        }
        let carry_span = self.carry_span;
        scoped::scoped(self.settings(), carry_span, run)
    }

    fn settings(self) -> Settings {
        let PoolBuilder {
            name,
            workers,
            queue_capacity,
            stack_size,
            timed,
            hooks,
            carry_span: _,
            registry: _,
        } = self;
        let clock = Clock::start();
        Settings { name, workers, queue_capacity, stack_size, clock, timed, enough_awake: None, hooks }
    }
}

impl fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolBuilder")
            .field("name", &self.name)
            .field("workers", &self.workers)
            .field("queue_capacity", &self.queue_capacity)
            .finish_non_exhaustive()
    }
}

/// How much of `timeout` is left since `start`.
pub(crate) fn remaining(start: Instant, timeout: Duration) -> Duration {
    timeout.saturating_sub(start.elapsed())
}
