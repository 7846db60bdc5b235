//! A bounded pool of worker threads that shows what it is doing.
//!
//! # What it guarantees
//!
//! - **Bounded.** A [`Pool`] has a queue of fixed capacity. If it is full, the submitter has a choice:
//!   [`submit`](Pool::submit) blocks, [`submit_timeout`](Pool::submit_timeout) gives up, and
//!   [`try_submit`](Pool::try_submit) rejects. A rejected job comes back to the submitter.
//! - **First in, first out.** Workers take jobs in the order in which they were admitted.
//! - **An admitted job ends exactly once**: it is completed, it panics, it is cancelled, it expires, or it is
//!   aborted. The pool counts that outcome, and the job's handle reports it. A panic ends its job, never its worker.
//! - **The numbers are true.** They come from [`Pool::stats`] and the collector of [`Pool::collector`]. At every
//!   moment, and not only at rest, they satisfy `submitted = completed + panicked + cancelled + expired + aborted +
//!   queue_depth + busy`, `busy <= workers`, and `queue_depth <= queue_capacity`. Time spent in jobs includes the
//!   running ones, and ages rise although nothing ends. If a job ran, a thread that has joined it finds it counted. If
//!   a job was cancelled or expired, it is counted when a worker comes to its place in the queue.
//! - **A drain loses no job.** [`Pool::drain`] stops admission, finishes the admitted jobs, and ends early when no job
//!   is left. [`Pool::resize`] loses no job either.
//! - **No silent deadlock.** A worker that would wait for ever for its own pool gets an error instead of a hang. This
//!   holds for `join`, for a group, and for a wait for room in the queue. A wait with a timeout ends at its timeout.
//!   The pool does not detect circles through several pools, or an executor that polls handles on a worker. Nor does it
//!   detect a job that resizes its pool while a new worker's first step waits for that job. The same is true if that
//!   step waits for another job that needs the worker of the first.
//!
//! # The rooms
//!
//! In reading order, from the types that a user holds down to the queue.
//!
//! | module | what |
//! | --- | --- |
//! | `map`, `group` | many jobs at once |
//! | `handle` | the submitter's side of a job: outcomes, errors, cancellation |
//! | `job` | a closure, its outcome, and the states of a job |
//! | `workers` | admission, the number of workers, drain: the engine, for any type of job |
//! | `worker` | one worker and its accounts |
//! | `metrics` | all accounts in one reading |
//! | `current`, `crew` | which pool the calling thread works for; which workers wait for which jobs |
//! | `queue` | the queue, and the waking of workers that sleep |

mod crew;
mod current;
mod group;
mod handle;
mod job;
mod map;
mod metrics;
#[cfg(all(test, millpond_loom))]
mod model;
mod queue;
mod worker;
mod workers;

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::Registry;

pub use self::group::{AsCompleted, Until, as_completed, wait};
pub use self::handle::{CancelToken, JobError, JobHandle};
use self::job::{JobCell, Run, Runner, Task};
pub use self::map::Map;
pub use self::metrics::{Durations, Stats};
pub(crate) use self::worker::{Handler, Job, Occupation, Outcome, Turn, quietly};
pub use self::workers::InitError;
pub(crate) use self::workers::{Helper, Patience, Settings, Workers};
use crate::clock::Clock;

/// The most workers a pool may have. Each is a thread, and a scrape looks at all of them.
pub const MAX_WORKERS: usize = 10_000;

/// The most jobs a queue may hold. The queue takes its memory at the start, and a queue of this capacity takes some
/// gigabytes.
pub const MAX_QUEUE_CAPACITY: usize = 100_000_000;

/// The default size of a worker's stack, in bytes. It is the size that std gives a thread, because the pool does not
/// know what its closures need. Only the touched part of a stack takes memory.
pub const DEFAULT_STACK_SIZE: usize = 2 * 1024 * 1024;

/// The default capacity of a pool's queue, in jobs. It is enough for a burst, and small enough that a submitter feels
/// backpressure when the workers fall behind.
pub const DEFAULT_QUEUE_CAPACITY: usize = 1024;

/// A bounded pool of named worker threads that run closures, and may block.
///
/// Dropping a pool drains it, and the drop blocks until every admitted job has ended. In a panicking thread it
/// aborts instead. [`drain`](Pool::drain) with a timeout, or [`abort`](Pool::abort), returns sooner.
///
/// A pool may be shared by reference or in an [`Arc`]. If the last owner is one of the pool's own jobs, the drop
/// aborts, because a worker cannot wait for its own end.
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
    workers: Workers<Task>,
    registered: Option<Registered>,
}

/// Takes a pool's metrics out of its registry when it is dropped.
struct Registered {
    registry: Registry,
    meter: Arc<dyn Meter>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // This fails if the user has taken the metrics out before.
        let _ = self.registry.unregister(collector(Arc::clone(&self.meter)));
    }
}

impl Pool {
    /// Starts to describe a pool. `name` is part of its threads' names, `mill-<name>-<number>`, of which Linux shows
    /// the first 15 bytes. It is also the value of the label `pool` of its metrics.
    pub fn builder(name: impl Into<String>) -> PoolBuilder {
        PoolBuilder {
            name: name.into(),
            workers: default_workers(),
            queue_capacity: DEFAULT_QUEUE_CAPACITY,
            stack_size: DEFAULT_STACK_SIZE,
            timed: true,
            registry: None,
            init: None,
        }
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.workers.name()
    }

    /// Admits a job. If the queue is full, it blocks for as long as that lasts.
    /// [`try_submit`](Pool::try_submit) never blocks, and [`submit_timeout`](Pool::submit_timeout) gives up.
    ///
    /// # Errors
    ///
    /// - [`Rejected::Draining`] once a drain or an abort has begun, also while it blocks.
    /// - [`Rejected::Deadlock`] on a worker of this pool that would block for ever.
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
    /// - [`Rejected::Draining`] once a drain or an abort has begun.
    ///
    /// Both carry the job, and both are counted.
    pub fn try_submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.admit(job, None, Patience::None)
    }

    /// Admits a job. If the queue is full, it blocks for `timeout` at most.
    ///
    /// # Errors
    ///
    /// - [`Rejected::Full`] if there was no room in that time.
    /// - [`Rejected::Draining`] once a drain or an abort has begun, also while it blocks.
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
        self.workers.submit(Task::plain(job), Patience::Endless).map_err(|it| it.map(Task::take_back))
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
        self.workers.submit(Task::plain(job), Patience::None).map_err(|it| it.map(Task::take_back))
    }

    /// Returns this pool with a deadline for jobs that are submitted through it.
    ///
    /// If a job has not been started within `deadline` of its submission, it is dropped unrun and counted as expired,
    /// and its handle reports that. The time for which a submission blocks counts too. A job that has been started runs
    /// to its end. Threads that wait for the job learn of its expiry on time. Tasks that await it, and callbacks, learn
    /// of it when a worker comes to the job.
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
        Map::new(self, items.into_iter(), work)
    }

    fn admit<F, T>(
        &self,
        job: F,
        deadline: Option<Duration>,
        patience: Patience,
    ) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let expires = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        let job = Arc::new(JobCell::new(job, expires));
        let task = Task::handled(Arc::clone(&job) as Arc<dyn Run>);
        match self.workers.submit(task, patience) {
            Ok(()) => Ok(JobHandle { job, pool: self.workers.id() }),
            // The task is dropped after the job has been taken out, and so finds nothing to abort.
            Err(rejected) => Err(rejected.map(|_task| job.take_back())),
        }
    }

    /// Sets the number of workers, 1 to [`MAX_WORKERS`], while the pool works. No job is lost.
    ///
    /// When it returns, the missing workers have been started, and have completed the step of
    /// [`PoolBuilder::on_worker_start`]. Surplus workers leave after the job they run, and until then they count as
    /// workers. If a surplus worker is the last that does not wait for its own pool, it stays for as long as that is
    /// so.
    ///
    /// # Errors
    ///
    /// - [`PoolError::Workers`] if the number is out of range.
    /// - [`PoolError::Draining`] once a drain or an abort has begun.
    /// - [`PoolError::Spawn`] if the system refuses a thread, and [`PoolError::Init`] if a new worker could not begin.
    ///   After these two the pool goes on with the workers it has.
    /// - [`PoolError::Beginning`] in [`PoolBuilder::on_worker_start`] of this pool.
    pub fn resize(&self, workers: usize) -> Result<(), PoolError> {
        self.workers.resize(workers)
    }

    /// Stops admission, lets the workers finish every admitted job, and waits for them, for `timeout` at most. It
    /// returns as soon as the last job has ended, or at the timeout. [`Stats::workers`] falls to 0 as the threads end.
    ///
    /// At the timeout it drops the jobs that still wait in the queue, and counts them as aborted. Workers that still
    /// run a job exit after it, and the drain does not wait for their threads.
    ///
    /// If all workers have ended in time, the drain also joins their threads, with the destructors of their
    /// thread-locals. It does not join the threads that a [`resize`](Self::resize) is starting meanwhile. Those leave
    /// by themselves.
    ///
    /// Safe to call again and from several threads, because each call waits for the same end. On a worker of this pool
    /// it cannot end before its timeout, because the job that calls it still runs.
    pub fn drain(&self, timeout: Duration) -> Drained {
        self.workers.drain(timeout)
    }

    /// Stops admission, drops every job that waits, and counts it as aborted. Running jobs run on, and can see the
    /// abort through [`CancelToken::current`]. Each worker exits after its job. The abort does not wait for them, and
    /// [`Stats::workers`] falls to 0 as the threads end.
    pub fn abort(&self) -> Drained {
        self.workers.abort()
    }

    /// Reads every number of the pool at once. It takes no lock that a submitter or a working worker waits for. It
    /// costs a look at each worker's cells.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.workers.stats()
    }

    /// How long the job that has waited longest has been waiting; zero if no job waits.
    #[must_use]
    pub fn oldest_age(&self) -> Duration {
        self.workers.oldest_age()
    }

    /// A collector of the pool's metrics for a `prometheus` registry. They are named `millpond_pool_*` and labelled
    /// `pool="<name>"`. [`PoolBuilder::registry`] registers the collector at the start.
    #[must_use]
    pub fn collector(&self) -> Box<dyn prometheus::core::Collector> {
        collector(self.workers.meter())
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
    /// As [`Pool::submit`].
    ///
    /// # Errors
    ///
    /// As [`Pool::submit`].
    pub fn submit<F, T>(&self, job: F) -> Result<JobHandle<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.pool.admit(job, Some(self.deadline), Patience::Endless)
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
    let name = meter.name().to_owned();
    crate::metrics::collector(metrics::PoolMetrics(meter), &[("pool", &name)])
}

/// The numbers of a pool, without the type of its jobs.
pub(crate) trait Meter: Send + Sync {
    /// The pool's name.
    fn name(&self) -> &str;
    /// See [`Pool::stats`].
    fn stats(&self) -> Stats;
    /// See [`Pool::oldest_age`].
    fn oldest_age(&self) -> Duration;
    /// What each worker does, by its number, and how many jobs it has taken. Workers that left after a resize are among
    /// them. Takes no lock that a worker waits for.
    fn workers(&self) -> Vec<(Occupation, u64)>;
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
    registry: Option<Registry>,
    init: Option<workers::Init>,
}

impl PoolBuilder {
    /// Sets the number of worker threads, 1 to [`MAX_WORKERS`]. The default is as many threads as the machine runs at
    /// once. Jobs that block need more.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Sets how many jobs may wait, 1 to [`MAX_QUEUE_CAPACITY`]. The default is [`DEFAULT_QUEUE_CAPACITY`]. The queue
    /// takes its memory at the start, about 48 bytes for each job.
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

    /// Sets whether waits and durations are measured. By default they are. If they are not, a job costs two looks at
    /// the clock less, and every time in [`Stats`] and in the metrics stays 0. Jobs are still counted.
    #[must_use]
    pub fn timed(mut self, timed: bool) -> Self {
        self.timed = timed;
        self
    }

    /// Sets a registry for the pool's metrics, which are those of [`Pool::collector`]. The pool registers them at the
    /// start. When the pool has been dropped, they are taken out by the pool's name.
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
        init: impl Fn(usize) -> Result<(), InitError> + Send + Sync + 'static,
    ) -> Self {
        self.init = Some(Arc::new(init));
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
    pub fn build(self) -> Result<Pool, PoolError> {
        let PoolBuilder { name, workers, queue_capacity, stack_size, timed, registry, init } = self;
        let clock = Clock::start();
        let settings = Settings {
            name,
            workers,
            queue_capacity,
            stack_size,
            clock,
            timed,
            lingers: true,
            enough_awake: None,
            init,
        };
        let mut pool = Pool { workers: Workers::start(settings, |_| Runner)?, registered: None };
        if let Some(registry) = registry {
            registry.register(pool.collector()).map_err(|source| PoolError::Register { source })?;
            pool.registered = Some(Registered { registry, meter: pool.workers.meter() });
        }
        Ok(pool)
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

/// Why a job was not admitted. The job comes back inside.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rejected<J> {
    /// As many jobs wait as the queue holds.
    Full(J),
    /// The pool drains, or has drained.
    Draining(J),
    /// The submitter is a worker of this pool. The queue would stay full for ever, because every worker waits for its
    /// own pool.
    Deadlock(J),
}

impl<J> Rejected<J> {
    /// Takes the job out of the error.
    pub fn into_job(self) -> J {
        match self {
            Rejected::Full(job) | Rejected::Draining(job) | Rejected::Deadlock(job) => job,
        }
    }

    /// Drops the job. Then the error can be sent and shared, whatever the type of the job:
    /// `pool.submit(job).map_err(Rejected::without_job)?`.
    #[must_use]
    pub fn without_job(self) -> Rejected<()> {
        self.map(drop)
    }

    pub(crate) fn map<K>(self, change: impl FnOnce(J) -> K) -> Rejected<K> {
        match self {
            Rejected::Full(job) => Rejected::Full(change(job)),
            Rejected::Draining(job) => Rejected::Draining(change(job)),
            Rejected::Deadlock(job) => Rejected::Deadlock(change(job)),
        }
    }
}

impl<J> fmt::Debug for Rejected<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rejected::Full(_) => "Full(..)",
            Rejected::Draining(_) => "Draining(..)",
            Rejected::Deadlock(_) => "Deadlock(..)",
        })
    }
}

impl<J> fmt::Display for Rejected<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rejected::Full(_) => "the pool's queue is full",
            Rejected::Draining(_) => "the pool is draining",
            Rejected::Deadlock(_) => {
                "the pool's queue is full, and every worker, this one included, waits for the pool"
            }
        })
    }
}

impl<J> std::error::Error for Rejected<J> {}

/// Why a pool did not start, or was not resized.
#[derive(Debug)]
#[non_exhaustive]
pub enum PoolError {
    /// The number of workers, carried here, is not between 1 and [`MAX_WORKERS`].
    Workers(usize),
    /// The capacity of the queue, carried here, is not between 1 and [`MAX_QUEUE_CAPACITY`].
    QueueCapacity(usize),
    /// The system refused a thread.
    Spawn {
        /// How many threads it had granted.
        started: usize,
        /// The system's error.
        source: io::Error,
    },
    /// A worker could not begin: [`PoolBuilder::on_worker_start`] failed or panicked.
    Init {
        /// The error that it returned, or the message of its panic.
        source: InitError,
    },
    /// The registry did not take the pool's metrics. As a rule it has those of a pool of this name.
    Register {
        /// The registry's error.
        source: prometheus::Error,
    },
    /// The pool drains, or has drained, and its workers are leaving.
    Draining,
    /// A worker called for a resize in its first step. A resize waits for that step.
    Beginning,
    /// The name, carried here, has a NUL in it. The name of a thread may not have one.
    Name(String),
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
            PoolError::Init { source } => write!(f, "a worker could not begin: {source}"),
            PoolError::Register { .. } => {
                f.write_str("the registry did not take the pool's metrics; has it a pool of the same name?")
            }
            PoolError::Draining => f.write_str("the pool is draining, and its workers are leaving"),
            PoolError::Beginning => f.write_str("a worker cannot resize its pool in its own first step"),
            PoolError::Name(name) => write!(f, "the name {name:?} has a NUL in it; no thread can have it"),
        }
    }
}

impl std::error::Error for PoolError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PoolError::Spawn { source, .. } => Some(source),
            // The message above has the text of this error, so the source is the next error below it.
            PoolError::Init { source } => source.source(),
            PoolError::Register { source } => Some(source),
            PoolError::Workers(_)
            | PoolError::QueueCapacity(_)
            | PoolError::Draining
            | PoolError::Beginning
            | PoolError::Name(_) => None,
        }
    }
}

/// Returns the message of a panic from its payload. If the payload is not text, the result only says that.
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
#[non_exhaustive]
pub struct Drained {
    /// Jobs that were run to their end since the call, including those that panicked.
    pub finished: u64,
    /// Jobs found cancelled or expired since the call.
    pub cancelled: u64,
    /// Jobs that were still running when the call returned. Their workers exit after them.
    pub running: usize,
    /// Jobs that were waiting and were dropped since the call.
    pub dropped: u64,
    /// The pool's numbers at the end.
    pub stats: Stats,
}

impl Drained {
    /// Whether every job ended by itself since the call. The jobs that an earlier call dropped are in
    /// [`stats`](Self::stats).
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.running == 0 && self.dropped == 0
    }
}

/// How much of `timeout` is left since `start`.
pub(crate) fn remaining(start: Instant, timeout: Duration) -> Duration {
    timeout.saturating_sub(start.elapsed())
}
