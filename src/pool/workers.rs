//! A bounded queue and its workers, for jobs of one type: the engine of [`Pool`](crate::Pool) and of the server.
//!
//! A user of this module decides what a job is and how it is run: a [`Job`] type, and one [`Handler`] for each worker.
//! The server's job is a connection, and its handler owns the worker's buffer, so a job needs no allocation. The pool's
//! job is a closure.
//!
//! # The end
//!
//! [`Workers::close`] closes the queue, under the lock that admits jobs. So every admitted job is in the queue then,
//! and a worker leaves when it finds the queue closed and empty, under the same locks. Only a running job can still
//! requeue, and its own worker looks again after it. A drain closes, and waits for the workers. An abort closes,
//! empties the queue, and waits for no worker.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::account::{Occupation, Watch, WorkerCell};
use super::current::{self, Phase};
use super::errors::{InitError, PoolError, Rejected, panic_message, quietly};
use super::identity::{Identity, PoolId, Stage};
use super::limits::{MAX_QUEUE_CAPACITY, MAX_WORKERS};
use super::metrics::{Meter, Stats};
use super::queue::{Queue, Seat, Wakes};
use super::shared::{Job, Patience, Shared};
use super::worker::{self, Handler};
use crate::clock::Clock;
use crate::sync::atomic::Ordering;
use crate::sync::checked::thread::{self, JoinHandle};
use crate::sync::checked::{Mutex, lock};

/// If more jobs than this wait, a [`Helper`] wakes a worker at once. If fewer do, it wakes one when its time is over.
/// To wake a thread, which then takes turns with others, costs as much as some jobs that do not block. With 1 in place
/// of 32, an echo took a third more processor time with 50 or 300 clients.
const SHARED_FROM: usize = 32;

/// The settings with which a pool is made.
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) workers: usize,
    pub(crate) queue_capacity: usize,
    pub(crate) stack_size: usize,
    pub(crate) clock: Clock,
    /// Whether waits and durations are measured.
    pub(crate) timed: bool,
    /// Set for jobs that never block: how many workers awake are enough. One of the workers is then a [`Helper`], and
    /// not a thread of the pool's.
    pub(crate) enough_awake: Option<usize>,
    pub(crate) hooks: Hooks,
}

/// What each worker does beside its jobs. The argument is the worker's number.
#[derive(Clone, Default)]
pub(crate) struct Hooks {
    /// Before its first job.
    pub(crate) start: Option<Arc<StartHook>>,
    /// After its last job.
    pub(crate) stop: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}

/// How a drain or an abort ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Drained {
    /// Jobs that were run to their end since the call, including those that panicked.
    pub finished: u64,
    /// Jobs cancelled or expired since the call.
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

type StartHook = dyn Fn(usize) -> Result<(), InitError> + Send + Sync;

/// A queue with workers. Dropping it drains it. In a panicking thread, on one of its own workers, or after
/// [`close`](Workers::close), dropping it closes it and waits for nothing.
pub(crate) struct Workers<J: Job> {
    shared: Arc<Shared<J>>,
    stack_size: usize,
    hooks: Hooks,
    threads: Mutex<Threads<J>>,
    /// Whether [`close`](Workers::close) was called, so that the drop waits for nothing.
    let_go: AtomicBool,
}

/// The worker threads. The first drain that sees them all exit joins them.
struct Threads<J: Job> {
    running: Vec<JoinHandle<()>>,
    /// Starts a worker. A scope, which starts its threads itself, has none.
    start: Option<Box<StartWorker<J>>>,
}

type StartWorker<J> = dyn Fn(Recruit<J>) -> io::Result<JoinHandle<()>> + Send;

/// Where a worker reports that it has begun, or why it could not. `None` if it has no first step.
type OnReady = Option<crossbeam_channel::Sender<Result<(), InitError>>>;

impl<J: Job> Workers<J> {
    /// Starts the workers. Calls `handler` once for each, with the worker's number from 0.
    pub(crate) fn start<H>(
        settings: Settings,
        handler: impl Fn(usize) -> H + Send + 'static,
    ) -> Result<Self, PoolError>
    where
        J: 'static,
        H: Handler<J> + 'static,
    {
        let (pool, threads) = Workers::without_threads(settings)?;
        let start = move |recruit: Recruit<J>| {
            let handler = handler(recruit.number);
            recruit.builder().spawn(move || recruit.work(handler))
        };
        lock(&pool.threads).start = Some(Box::new(start));
        // An early return drops the pool, and that drop ends the workers started so far.
        pool.resize(threads)?;
        Ok(pool)
    }

    /// Makes a pool that has no thread yet, and returns how many it is to have. The caller starts them by
    /// [`enlist`](Workers::enlist).
    pub(crate) fn without_threads(settings: Settings) -> Result<(Self, usize), PoolError> {
        let Settings { name, workers, queue_capacity, stack_size, clock, timed, enough_awake, hooks } =
            settings;
        check_workers(workers)?;
        // A single worker has to be a thread, because a helper has other things to do.
        let enough_awake = enough_awake.filter(|_| workers > 1);
        let threads = workers - usize::from(enough_awake.is_some());
        let at_rest = enough_awake.map_or(0, |enough| threads.saturating_sub(enough));
        if name.contains('\0') {
            return Err(PoolError::Name(name));
        }
        if queue_capacity > MAX_QUEUE_CAPACITY {
            return Err(PoolError::QueueCapacity(queue_capacity));
        }
        let pool = Identity::new(name);
        let shared = Arc::new(Shared {
            watch: Watch { clock, runs: timed },
            queue: Queue::new(queue_capacity, at_rest, Arc::clone(&pool.places)),
            pool,
            helper: enough_awake.map(|_| Arc::new(WorkerCell::new())),
            helps: AtomicBool::new(false),
            cells: RwLock::new(Vec::with_capacity(workers)),
            busy_reported_us: AtomicU64::new(0),
            rejected_full: AtomicU64::new(0),
            rejected_draining: AtomicU64::new(0),
        });
        let of_pool = Mutex::new(Threads { running: Vec::new(), start: None });
        let let_go = AtomicBool::new(false);
        Ok((Workers { shared, stack_size, hooks, threads: of_pool, let_go }, threads))
    }

    /// The worker that is not a thread of the pool's, if the pool's jobs never block and it has more than one worker.
    /// It counts as a worker until it is dropped. `handler` runs its jobs. Called once.
    pub(crate) fn helper<H: Handler<J>>(&self, handler: H) -> Option<Helper<J, H>> {
        let cell = self.shared.helper.clone()?;
        self.shared.helps.store(true, Ordering::Release);
        Some(Helper { shared: Arc::clone(&self.shared), seat: Seat::new(false), cell, handler })
    }

    /// Admits a job, waits for room as long as `patience` lasts, or gives the job back.
    pub(crate) fn submit(&self, job: J, patience: Patience) -> Result<(), Rejected<J>> {
        self.put(job, patience, Wakes::One)
    }

    /// As [`submit`](Workers::submit), but wakes no worker: a [`Helper`] will run the job, or wake a worker for it.
    pub(crate) fn admit(&self, job: J, patience: Patience) -> Result<(), Rejected<J>> {
        self.put(job, patience, Wakes::None)
    }

    fn put(&self, job: J, patience: Patience, wakes: Wakes) -> Result<(), Rejected<J>> {
        let mut job = Some(job);
        let outcome = self.shared.submit(&mut || job.take().expect("it is admitted once"), patience, wakes);
        outcome.map_err(|refusal| refusal.with(job.take().expect("it was not admitted")))
    }

    /// Sets the number of workers. New ones have begun when it returns. Workers beyond the number leave after their
    /// job.
    pub(crate) fn resize(&self, workers: usize) -> Result<(), PoolError> {
        check_workers(workers)?;
        let shared = &self.shared;
        if current::is_beginning_in(shared.pool.id) {
            // The resize that holds the lock waits for this worker.
            return Err(PoolError::Beginning);
        }
        let mut threads = lock(&self.threads);
        if shared.pool.stage() != Stage::Open {
            return Err(PoolError::Draining);
        }
        // A finished thread only drops its thread-locals, and their destructors may want this lock. So it is not
        // joined.
        threads.running.retain(|thread| !thread.is_finished());
        let Threads { running, start } = &mut *threads;
        let Some(start) = start else { return Err(PoolError::Draining) };
        let enlisted = self.enlist(workers, |recruit| start(recruit).map(|thread| running.push(thread)));
        // Workers beyond the number may be asleep.
        shared.queue.wake_all();
        enlisted?;
        // If a drain has begun meanwhile, it has ended the new workers too.
        if shared.pool.stage() == Stage::Open { Ok(()) } else { Err(PoolError::Draining) }
    }

    /// Starts the workers that are missing, and waits until they have begun, if they have a first step.
    pub(crate) fn enlist(
        &self,
        workers: usize,
        mut start: impl FnMut(Recruit<J>) -> io::Result<()>,
    ) -> Result<(), PoolError> {
        let missing = self.shared.pool.crew.want(workers);
        let (ready, begun) = crossbeam_channel::bounded(missing);
        // All numbers are given out first, so that a worker that cannot begin leaves its number to none of the others.
        let recruits: Vec<_> = (0..missing).map(|_| self.recruit(&ready)).collect();
        drop(ready);
        let mut refused = None;
        for (started, recruit) in recruits.into_iter().enumerate() {
            if let Err(source) = start(recruit) {
                refused = Some(PoolError::Spawn { started, source });
                break;
            }
        }
        for outcome in begun {
            if let Err(source) = outcome {
                refused.get_or_insert(PoolError::Init { source });
            }
        }
        refused.map_or(Ok(()), Err)
    }

    fn recruit(&self, ready: &crossbeam_channel::Sender<Result<(), InitError>>) -> Recruit<J> {
        let shared = Arc::clone(&self.shared);
        let number = shared.pool.crew.enter();
        let mut cells = shared.cells.write().unwrap_or_else(PoisonError::into_inner);
        while cells.len() <= number {
            cells.push(Arc::new(WorkerCell::new()));
        }
        let cell = Arc::clone(&cells[number]);
        drop(cells);
        let ready = self.hooks.start.is_some().then(|| ready.clone());
        let (stack_size, hooks) = (self.stack_size, self.hooks.clone());
        // A worker without a first step is as good as idle. So a new pool takes as many jobs as it has workers.
        let asked = hooks.start.is_none();
        if asked {
            shared.queue.ask();
        }
        Recruit { shared, number, cell, stack_size, hooks, ready, asked, settled: false }
    }

    /// See [`Pool::close`](crate::Pool::close).
    pub(crate) fn close(&self) {
        self.let_go.store(true, Ordering::Relaxed);
        self.shared.close();
    }

    /// Stops admission, and waits for the workers to finish the queue, for `timeout` at most. At the timeout it drops
    /// what is queued.
    pub(crate) fn drain(&self, timeout: Duration) -> Drained {
        let (start, before) = (Instant::now(), self.stats());
        self.stop_admission();
        self.finish(&before, start, timeout)
    }

    /// Admits no job from now on.
    pub(crate) fn stop_admission(&self) {
        self.shared.close();
    }

    /// The rest of a drain that began at `start` with these numbers, and has stopped admission. On a worker of this
    /// pool it waits for the other workers.
    pub(crate) fn finish(&self, before: &Stats, start: Instant, timeout: Duration) -> Drained {
        let inside = current::is_worker_of(self.shared.pool.id);
        let left = timeout.saturating_sub(start.elapsed());
        let all_gone = self.shared.pool.crew.wait_until_gone(left, inside);
        if !all_gone {
            self.shared.empty();
        } else if !inside {
            self.join_threads(start, timeout);
        }
        // The job that calls does not count as running.
        self.drained(before, all_gone, usize::from(inside))
    }

    /// See [`Pool::abort`](crate::Pool::abort).
    pub(crate) fn abort(&self) -> Drained {
        let before = self.stats();
        let all_gone = self.shared.pool.crew.wait_until_gone(Duration::ZERO, false);
        self.shared.empty();
        self.drained(&before, all_gone, 0)
    }

    fn drained(&self, before: &Stats, all_gone: bool, inside: usize) -> Drained {
        let stats = self.stats();
        Drained {
            finished: (stats.completed + stats.panicked) - (before.completed + before.panicked),
            cancelled: (stats.cancelled + stats.expired) - (before.cancelled + before.expired),
            running: if all_gone { 0 } else { stats.busy.saturating_sub(inside) },
            dropped: stats.aborted - before.aborted,
            stats,
        }
    }

    /// Waits until the threads have ended, with the destructors of their thread-locals, until `timeout` has passed
    /// since `start`. All workers have left.
    fn join_threads(&self, start: Instant, timeout: Duration) {
        // A resize that holds the lock keeps the threads, and they end by themselves. They are joined without the lock,
        // because the destructors of their thread-locals may want it.
        let running = self.threads.try_lock().map(|mut threads| std::mem::take(&mut threads.running));
        let mut running = running.unwrap_or_default();
        // A destructor of a thread-local may be what drains.
        running.retain(|thread| thread.thread().id() != thread::current().id());
        if running.is_empty() {
            return;
        }
        join_all(running, start, timeout, self.shared.pool.thread_name("end"));
    }

    pub(crate) fn stats(&self) -> Stats {
        self.shared.read_stats()
    }

    pub(crate) fn oldest_age(&self) -> Duration {
        self.shared.read_oldest_age()
    }

    /// The pool's numbers without its job type, for code that only reads them.
    pub(crate) fn meter(&self) -> Arc<dyn Meter>
    where
        J: 'static,
    {
        Arc::clone(&self.shared) as Arc<dyn Meter>
    }

    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.shared.pool
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<J>> {
        &self.shared
    }
}

/// Joins threads for a bounded time. There is no such join, so one more thread joins them, and this one waits for it.
/// If the system refuses that thread, nothing is joined.
#[cfg(not(millpond_loom))]
fn join_all(running: Vec<JoinHandle<()>>, start: Instant, timeout: Duration, name: String) {
    let (joined, all_joined) = crossbeam_channel::bounded::<()>(0);
    let join = move || {
        for thread in running {
            let _ = thread.join();
        }
        drop(joined);
    };
    if std::thread::Builder::new().name(name).spawn(join).is_ok() {
        // The channel is closed when all are joined.
        let _ = match start.checked_add(timeout) {
            Some(until) => all_joined.recv_deadline(until).is_ok(),
            None => all_joined.recv().is_ok(),
        };
    }
}

/// In a model there is no time.
#[cfg(millpond_loom)]
fn join_all(running: Vec<JoinHandle<()>>, _start: Instant, _timeout: Duration, _name: String) {
    for thread in running {
        let _ = thread.join();
    }
}

/// A thread that counts as one of the workers, and runs jobs when it has nothing else to do. Only for jobs that never
/// block.
pub(crate) struct Helper<J: Job, H> {
    shared: Arc<Shared<J>>,
    seat: Seat,
    cell: Arc<WorkerCell>,
    handler: H,
}

impl<J: Job, H: Handler<J>> Helper<J, H> {
    /// Runs jobs until none waits, or `enough` returns true for the time. If many wait, or some are left, wakes a
    /// worker to run some of them. Returns whether any are left.
    pub(crate) fn help(&mut self, enough: impl Fn(u64) -> bool) -> bool {
        let queue = &self.shared.queue;
        if queue.len() > SHARED_FROM {
            queue.wake_one();
        }
        worker::help(&self.shared, &mut self.seat, &self.cell, &mut self.handler, enough);
        let left = !queue.is_empty();
        if left {
            queue.wake_one();
        }
        left
    }
}

impl<J: Job, H> Drop for Helper<J, H> {
    fn drop(&mut self) {
        self.shared.helps.store(false, Ordering::Release);
    }
}

fn check_workers(workers: usize) -> Result<(), PoolError> {
    if workers == 0 || workers > MAX_WORKERS { Err(PoolError::Workers(workers)) } else { Ok(()) }
}

impl<J: Job> Drop for Workers<J> {
    fn drop(&mut self) {
        let is_worker = current::is_worker_of(self.shared.pool.id);
        self.stop_admission();
        // A panic is to be reported soon, and a worker cannot wait for its own end. After an abort, or a drain that
        // timed out, this waits for no worker: a stuck job must not hang the thread that drops the pool.
        let waits = !std::thread::panicking() && !is_worker && !self.let_go.load(Ordering::Relaxed);
        if waits && self.shared.pool.stage() < Stage::Aborted {
            self.finish(&self.stats(), Instant::now(), Duration::MAX);
        }
    }
}

impl<J: Job> Shared<J> {
    /// Stops admission, and lets the workers leave when the queue is empty.
    fn close(&self) {
        self.pool.advance(Stage::Closed);
        self.queue.close();
    }

    /// Stops admission, lets the workers leave after their job, and drops what is queued.
    fn empty(&self) {
        self.pool.advance(Stage::Aborted);
        self.queue.close();
        self.drop_queued();
        // Workers that see the abort drop jobs too, and count each just after they take it. A job that a worker set
        // aside counts as waiting until its worker is done with the job beside it.
        while self.read_stats().queue_depth > self.pool.beside() {
            thread::yield_now();
        }
    }
}

impl<J: Job> Meter for Shared<J> {
    fn id(&self) -> PoolId {
        self.pool.id
    }

    fn name(&self) -> &str {
        &self.pool.name
    }

    fn stats(&self) -> Stats {
        self.read_stats()
    }

    fn oldest_age(&self) -> Duration {
        self.read_oldest_age()
    }

    fn workers(&self) -> Vec<(Occupation, u64)> {
        self.read_workers()
    }
}

/// A worker before its thread is started, and on it. When it is dropped, the worker is counted out.
pub(crate) struct Recruit<J: Job> {
    shared: Arc<Shared<J>>,
    number: usize,
    cell: Arc<WorkerCell>,
    stack_size: usize,
    hooks: Hooks,
    ready: OnReady,
    /// Whether the queue was asked for its first job.
    asked: bool,
    /// Whether it has begun.
    settled: bool,
}

impl<J: Job> Recruit<J> {
    pub(crate) fn builder(&self) -> thread::Builder {
        thread::Builder::new().name(self.shared.pool.thread_name(self.number)).stack_size(self.stack_size)
    }

    /// The body of the thread.
    pub(crate) fn work<H: Handler<J>>(mut self, mut handler: H) {
        let current = current::enter(&self.shared.pool, &self.cell, self.shared.watch, self.stack_size);
        if let Err(error) = self.begin() {
            let ready = self.ready.take();
            // Before the report, so that a thread that has the error finds the number of workers right.
            drop(current);
            drop(self);
            return report(ready, Err(error));
        }
        self.settled = true;
        if !self.asked {
            self.shared.queue.ask();
        }
        report(self.ready.take(), Ok(()));
        current.set_phase(Phase::Works);
        worker::work(&self.shared, &self.cell, &mut handler);
        current.set_phase(Phase::Ends);
        // Its destructor comes from the user of the pool, as the hook does.
        quietly(|| drop(handler));
        if let Some(stop) = &self.hooks.stop {
            quietly(|| stop(self.number));
        }
    }

    fn begin(&self) -> Result<(), InitError> {
        let Some(start) = &self.hooks.start else { return Ok(()) };
        let number = self.number;
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| start(number))).unwrap_or_else(|payload| {
            let error = format!("it panicked: {}", panic_message(&*payload)).into();
            quietly(|| drop(payload));
            Err(error)
        })
    }
}

impl<J: Job> Drop for Recruit<J> {
    fn drop(&mut self) {
        let pool = &self.shared.pool;
        if !self.settled {
            if self.asked {
                self.shared.queue.unask();
            }
            pool.crew.withdraw();
        }
        if pool.crew.gone(self.number) {
            pool.end_clock();
        }
        pool.places.idle.notify(usize::MAX);
    }
}

fn report(ready: OnReady, begun: Result<(), InitError>) {
    if let Some(ready) = ready {
        // If the resize has given up, nothing waits for the report.
        let _ = ready.send(begun);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Turn;
    use crate::pool::identity::Unrun;

    struct Number(u32);

    impl Job for Number {
        fn abandon(self, pool: &Identity) {
            pool.count_unrun(Unrun::Aborted);
        }
    }

    fn start<H: Handler<Number> + 'static>(handler: impl Fn(usize) -> H + Send + 'static) -> Workers<Number> {
        let settings = Settings {
            name: "test".to_owned(),
            workers: 4,
            queue_capacity: 100,
            stack_size: 64 * 1024,
            clock: Clock::start(),
            timed: true,
            enough_awake: None,
            hooks: Hooks::default(),
        };
        Workers::start(settings, handler).expect("threads")
    }

    /// Requeues its job, a number, until it is 0.
    struct Countdown;

    impl Handler<Number> for Countdown {
        fn run(&mut self, Number(left): Number, turn: &mut Turn<'_, Number>) {
            turn.account.begin();
            if left > 0 {
                assert!(turn.requeue(Number(left - 1)).is_ok(), "its place in the queue is free");
            }
        }
    }

    #[test]
    fn as_many_workers_as_the_limit_names_are_allowed_and_not_one_more() {
        assert!([1, MAX_WORKERS].into_iter().all(|workers| check_workers(workers).is_ok()));
        for workers in [0, MAX_WORKERS + 1] {
            assert!(matches!(check_workers(workers), Err(PoolError::Workers(named)) if named == workers));
        }
    }

    #[test]
    fn a_job_may_requeue_itself_to_its_end_although_the_pool_drains() {
        let pool = start(|_| Countdown);
        for _ in 0..50 {
            assert!(pool.submit(Number(1000), Patience::None).is_ok());
        }
        let drained = pool.drain(Duration::from_secs(30));
        assert!(drained.is_clean(), "{drained:?}");
        assert_eq!(drained.stats.completed, 50 * 1001);
    }

    #[test]
    fn a_job_that_requeues_itself_for_ever_is_ended_by_an_abort() {
        struct Endless;
        impl Handler<Number> for Endless {
            fn run(&mut self, job: Number, turn: &mut Turn<'_, Number>) {
                turn.account.begin();
                // For longer than the abort takes to empty the queue.
                std::thread::sleep(Duration::from_millis(10));
                let _ = turn.requeue(job);
            }
        }
        let pool = start(|_| Endless);
        for _ in 0..50 {
            assert!(pool.submit(Number(0), Patience::None).is_ok());
        }
        pool.drain(Duration::from_millis(50));
        let start = Instant::now();
        loop {
            let stats = pool.stats();
            let ended = stats.completed + stats.aborted;
            assert_eq!(stats.submitted, ended + stats.queue_depth + stats.busy as u64, "{stats:?}");
            if stats.busy == 0 && stats.queue_depth == 0 {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "{stats:?}");
            thread::yield_now();
        }
    }
}
