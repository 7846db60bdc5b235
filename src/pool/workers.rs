//! A bounded queue and its workers, for jobs of one type: the engine of [`Pool`](crate::Pool) and of the server.
//!
//! A user of this module decides what a job is and how it is run: a [`Job`] type, and one [`Handler`] for each worker.
//! The server's job is a connection, and its handler owns the worker's buffer, so a job needs no allocation. The pool's
//! job is a closure.
//!
//! # States
//!
//! The stage is `open`, then `draining`, then `closed`, and never goes back.
//!
//! | stage | submitters | workers |
//! | --- | --- | --- |
//! | open | admitted if there is room | run jobs, sleep when there is none |
//! | draining | refused; those already inside finish their push | as before |
//! | closed | refused | run what is queued, then exit; after an abort they exit at once |
//!
//! Why no admitted job is left behind. A submitter counts itself inside before it looks at the stage, and leaves after
//! its push. A drain first sets the stage to `draining`, then waits until no submitter is inside, then sets `closed`.
//! Both store before they load, sequentially consistent, so one of them sees the other. Either the submitter sees
//! `draining` and turns back, or the drain waits for its push. So when the stage is `closed`, every admitted job is in
//! the queue. A worker that sees `closed` and then an empty queue has nothing more to come. Only a running job can
//! still requeue, and its own worker looks again after it.
//!
//! # Waiting for room
//!
//! A submitter that finds the queue full and has patience counts itself in `waiting`, listens, tries again, and only
//! then sleeps. A worker that has taken a job looks at `waiting` after it. Both are sequentially consistent, so either
//! the try sees the room or the worker sees the submitter. The notice is throttled and handed on as in `queue.rs`: one
//! submitter is woken, and wakes the next if it leaves room. No submitter waits inside, so a drain does not wait for
//! those that wait for room. It wakes them, and they turn back.
//!
//! In `model.rs` the model checker tries both parts, over the code below.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::crew::{Awaited, Refusal};
use super::current::{self, Identity, PoolId};
use super::metrics::Stats;
use super::queue::{Queue, Refused};
use super::worker::{self, Handler, Job, Occupation, Outcome, Watch, WorkerCell, quietly};
use super::{Drained, MAX_QUEUE_CAPACITY, MAX_WORKERS, Meter, PoolError, Rejected, panic_message};
use crate::clock::Clock;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::checked::thread::{self, JoinHandle};
use crate::sync::checked::{Mutex, lock};
use crate::sync::event::{Listener, listener};

pub(crate) const OPEN: u8 = 0;
const DRAINING: u8 = 1;
pub(crate) const CLOSED: u8 = 2;
pub(crate) const ABORTED: u8 = 3;

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
    /// Whether a worker lingers before it sleeps; see `queue.rs`.
    pub(crate) lingers: bool,
    /// Set for jobs that never block: how many workers awake are enough. One of the workers is then a [`Helper`], and
    /// not a thread of the pool's.
    pub(crate) enough_awake: Option<usize>,
    pub(crate) init: Option<Init>,
}

/// What each worker does before its first job. Its argument is the worker's number.
pub(crate) type Init = Arc<dyn Fn(usize) -> Result<(), InitError> + Send + Sync>;

/// Why a worker could not begin.
pub type InitError = Box<dyn std::error::Error + Send + Sync>;

/// A queue with workers. Dropping it drains it. In a panicking thread, or on one of its own workers, it aborts
/// instead.
pub(crate) struct Workers<J: Job> {
    shared: Arc<Shared<J>>,
    threads: Mutex<Threads<J>>,
}

/// The worker threads. The first drain that sees them all exit joins them.
struct Threads<J> {
    running: Vec<(usize, JoinHandle<()>)>,
    /// Starts the worker of this number.
    start: Box<StartWorker<J>>,
    /// Whether each worker has a first step, which a resize waits for.
    inits: bool,
}

type StartWorker<J> = dyn Fn(&Arc<Shared<J>>, usize, OnReady) -> io::Result<JoinHandle<()>> + Send;

/// Where a worker reports that it has begun, or why it could not.
type OnReady = Option<crossbeam_channel::Sender<Result<(), InitError>>>;

/// The state that submitters, workers and readers of the numbers share.
pub(crate) struct Shared<J> {
    pub(crate) pool: Arc<Identity>,
    pub(crate) watch: Watch,
    pub(crate) lingers: bool,
    pub(crate) queue: Queue<J>,
    /// A worker's cell is at the worker's number, and outlives the worker: the next worker of that number counts on.
    /// Written by a resize, read by readers of the numbers.
    cells: RwLock<Vec<Arc<WorkerCell>>>,
    /// The cell of the [`Helper`], if there is one.
    pub(crate) helper: Option<Arc<WorkerCell>>,
    /// Whether the [`Helper`] is there and counts as a worker. Written when it is made and dropped.
    pub(crate) helps: AtomicBool,
    /// Submitters that wait for room, at [`Crew::room`](super::crew::Crew::room).
    waiting: AtomicUsize,
    /// Jobs that an abort took out of the queue, by outcome. Written by the threads that empty the queue.
    pub(crate) dropped: Dropped,
    /// The largest busy time ever reported, in microseconds; see `metrics.rs`. Written by readers.
    pub(crate) busy_reported_us: AtomicU64,
    /// Submissions refused because the queue was full. Written by any submitter.
    pub(crate) rejected_full: AtomicU64,
    /// Submissions refused because the pool drains. Written by any submitter.
    pub(crate) rejected_draining: AtomicU64,
}

#[derive(Default)]
pub(crate) struct Dropped {
    pub(crate) aborted: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) expired: AtomicU64,
}

/// How long a submitter is willing to wait for room.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    None,
    /// As none, for a try that is not a submission yet: it is not counted as rejected.
    Probe,
    Until(Instant),
    Endless,
}

impl Patience {
    /// For this long. If that is beyond the reach of [`Instant`], for ever.
    pub(crate) fn lasting(timeout: Duration) -> Self {
        Instant::now().checked_add(timeout).map_or(Patience::Endless, Patience::Until)
    }
}

impl<J: Job> Workers<J> {
    /// Starts the workers. Calls `handler` once for each, with the worker's number from 0.
    pub(crate) fn start<H>(
        settings: Settings,
        handler: impl Fn(usize) -> H + Send + 'static,
    ) -> Result<Self, PoolError>
    where
        H: Handler<J> + 'static,
    {
        let Settings { name, workers, queue_capacity, stack_size, clock, timed, lingers, enough_awake, init } =
            settings;
        check_workers(workers)?;
        // A single worker has to be a thread, because a helper has other things to do.
        let enough_awake = enough_awake.filter(|_| workers > 1);
        let threads = workers - usize::from(enough_awake.is_some());
        let at_rest = enough_awake.map_or(0, |enough| threads.saturating_sub(enough));
        if name.contains('\0') {
            return Err(PoolError::Name(name));
        }
        if queue_capacity == 0 || queue_capacity > MAX_QUEUE_CAPACITY {
            return Err(PoolError::QueueCapacity(queue_capacity));
        }
        let shared = Arc::new(Shared {
            pool: Arc::new(Identity::new(name)),
            watch: Watch { clock, runs: timed },
            lingers,
            queue: Queue::new(queue_capacity, at_rest),
            helper: enough_awake.map(|_| Arc::new(WorkerCell::new())),
            helps: AtomicBool::new(false),
            cells: RwLock::new(Vec::with_capacity(workers)),
            waiting: AtomicUsize::new(0),
            dropped: Dropped::default(),
            busy_reported_us: AtomicU64::new(0),
            rejected_full: AtomicU64::new(0),
            rejected_draining: AtomicU64::new(0),
        });
        let inits = init.is_some();
        let start = Box::new(move |shared: &Arc<Shared<J>>, number, ready| {
            spawn(shared, number, stack_size, handler(number), init.clone(), ready)
        });
        let pool = Workers { shared, threads: Mutex::new(Threads { running: Vec::new(), start, inits }) };
        // An early return drops the pool, and that drop ends the workers started so far.
        pool.resize(threads)?;
        Ok(pool)
    }

    /// The worker that is not a thread of the pool's, if the pool's jobs never block and it has more than one worker.
    /// It counts as a worker until it is dropped. `handler` runs its jobs. Called once.
    pub(crate) fn helper<H: Handler<J>>(&self, handler: H) -> Option<Helper<J, H>> {
        let cell = self.shared.helper.clone()?;
        self.shared.helps.store(true, Ordering::Release);
        Some(Helper { shared: Arc::clone(&self.shared), cell, handler })
    }

    /// Admits a job, waits for room as long as `patience` lasts, or gives the job back.
    pub(crate) fn submit(&self, job: J, patience: Patience) -> Result<(), Rejected<J>> {
        let outcome = self.admit(job, patience);
        if outcome.is_ok() {
            self.shared.queue.wake_one();
        }
        outcome
    }

    /// As [`submit`](Workers::submit), but wakes no worker: a [`Helper`] will run the job, or wake a worker for it.
    pub(crate) fn admit(&self, job: J, patience: Patience) -> Result<(), Rejected<J>> {
        let mut outcome = self.shared.try_admit(job);
        if let Err(Rejected::Full(job)) = outcome {
            outcome = match patience {
                Patience::Probe => return Err(Rejected::Full(job)),
                Patience::None => Err(Rejected::Full(job)),
                Patience::Until(instant) => self.shared.admit_when_there_is_room(job, Some(instant)),
                Patience::Endless => self.shared.admit_when_there_is_room(job, None),
            };
        }
        match &outcome {
            Ok(()) => {}
            Err(Rejected::Full(_) | Rejected::Deadlock(_)) => {
                self.shared.rejected_full.fetch_add(1, Ordering::Relaxed);
            }
            Err(Rejected::Draining(_)) => {
                self.shared.rejected_draining.fetch_add(1, Ordering::Relaxed);
            }
        }
        outcome
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
        if shared.pool.stage.load(Ordering::SeqCst) != OPEN {
            return Err(PoolError::Draining);
        }
        let mut running = std::mem::take(&mut threads.running);
        // A finished thread only drops its thread-locals, and their destructors may want this lock. So it is not
        // joined.
        running.retain(|(_, thread)| !thread.is_finished());
        let missing = shared.pool.crew.want(workers);
        let (ready, begun) = crossbeam_channel::bounded(missing);
        let mut refused = None;
        let taken: HashSet<usize> = running.iter().map(|(number, _)| *number).collect();
        let free = (0..).filter(|number| !taken.contains(number));
        for (started, number) in free.take(missing).enumerate() {
            let ready = threads.inits.then(|| ready.clone());
            match (threads.start)(shared, number, ready) {
                Ok(thread) => running.push((number, thread)),
                Err(source) => {
                    refused = Some(PoolError::Spawn { started, source });
                    break;
                }
            }
        }
        threads.running = running;
        drop(ready);
        for outcome in begun {
            if let Err(source) = outcome {
                refused.get_or_insert(PoolError::Init { source });
            }
        }
        // Workers beyond the number may be asleep.
        shared.queue.wake_all();
        match refused {
            Some(error) => Err(error),
            // If a drain has begun meanwhile, it has ended the new workers too.
            None if shared.pool.stage.load(Ordering::SeqCst) != OPEN => Err(PoolError::Draining),
            None => Ok(()),
        }
    }

    /// See [`Pool::drain`](crate::Pool::drain).
    pub(crate) fn drain(&self, timeout: Duration) -> Drained {
        let before = self.stats();
        self.shared.close();
        self.wait_for_exit(timeout, &before)
    }

    /// See [`Pool::abort`](crate::Pool::abort).
    pub(crate) fn abort(&self) -> Drained {
        let before = self.stats();
        self.wait_for_exit(Duration::ZERO, &before)
    }

    fn wait_for_exit(&self, timeout: Duration, before: &Stats) -> Drained {
        let shared = &self.shared;
        let all_gone = shared.pool.crew.wait_until_gone(timeout);
        let mut stats = self.stats();
        if all_gone {
            // A resize that holds the lock keeps the threads, and they end by themselves. They are joined without the
            // lock, because the destructors of their thread-locals may want it.
            let running = self.threads.try_lock().map(|mut threads| std::mem::take(&mut threads.running));
            for (_, thread) in running.unwrap_or_default() {
                // The thread has left the crew, so this blocks only for the thread's exit, with the destructors of its
                // thread-locals. One of those destructors may be what drains.
                if thread.thread().id() != thread::current().id() {
                    let _ = thread.join();
                }
            }
        } else {
            shared.advance(ABORTED);
            shared.wait_for_those_inside();
            shared.drop_queued();
            // Workers that see the abort drop jobs too, and count each just after they take it.
            while {
                stats = self.stats();
                stats.queue_depth > 0
            } {
                thread::yield_now();
            }
        }
        Drained {
            finished: (stats.completed + stats.panicked) - (before.completed + before.panicked),
            cancelled: (stats.cancelled + stats.expired) - (before.cancelled + before.expired),
            running: if all_gone { 0 } else { stats.busy },
            dropped: stats.aborted - before.aborted,
            stats,
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        self.shared.read_stats()
    }

    pub(crate) fn oldest_age(&self) -> Duration {
        self.shared.read_oldest_age()
    }

    /// The pool's numbers without its job type, for code that only reads them.
    pub(crate) fn meter(&self) -> Arc<dyn Meter> {
        Arc::clone(&self.shared) as Arc<dyn Meter>
    }

    pub(crate) fn name(&self) -> &str {
        &self.shared.pool.name
    }

    pub(crate) fn id(&self) -> PoolId {
        self.shared.pool.id
    }
}

#[cfg(test)]
impl<J: Job> Workers<J> {
    pub(super) fn shared(&self) -> &Shared<J> {
        &self.shared
    }
}

#[cfg(test)]
impl<J> Shared<J> {
    /// Adds cells whose numbers a test sets by hand.
    pub(super) fn add_cells(&self, cells: impl IntoIterator<Item = Arc<WorkerCell>>) {
        self.cells.write().unwrap_or_else(PoisonError::into_inner).extend(cells);
    }
}

/// A thread that counts as one of the workers, and runs jobs when it has nothing else to do. Only for jobs that never
/// block.
pub(crate) struct Helper<J: Job, H> {
    shared: Arc<Shared<J>>,
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
        worker::help(&self.shared, &self.cell, &mut self.handler, enough);
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
        // After an abort, or a drain that timed out, this waits for no worker. A stuck job must not hang the thread
        // that drops the pool, and must not keep that thread's panic from being reported.
        if std::thread::panicking() || current::worker_of(self.id()).is_some() {
            // A worker cannot wait for its own end.
            self.abort();
        } else if self.shared.pool.stage.load(Ordering::SeqCst) < ABORTED {
            self.drain(Duration::MAX);
        }
    }
}

impl<J: Job> Meter for Shared<J> {
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

impl<J> Shared<J> {
    /// Admits a job if there is room.
    fn try_admit(&self, job: J) -> Result<(), Rejected<J>> {
        // SeqCst here and in `close`: see the module's part on states.
        let open = || self.pool.stage.load(Ordering::SeqCst) == OPEN;
        self.queue.admit(job, self.watch.now_ns(), open).map_err(|refused| match refused {
            Refused::Full(job) => Rejected::Full(job),
            Refused::Closed(job) => Rejected::Draining(job),
        })
    }

    #[cold]
    fn admit_when_there_is_room(&self, mut job: J, until: Option<Instant>) -> Result<(), Rejected<J>> {
        let _waiting = Waiting::new(&self.waiting);
        loop {
            listener!(self.pool.crew.room => listener);
            job = match self.try_admit(job) {
                Err(Rejected::Full(job)) => job,
                outcome => {
                    if outcome.is_ok() && !self.queue.is_full() {
                        // One submitter is woken at a time, and there is room for the next.
                        self.pool.crew.room.notify(1);
                    }
                    return outcome;
                }
            };
            let Some(until) = until else {
                // A worker of this pool that waits for room without an end may be the last that could make room.
                let wait = current::worker_of(self.pool.id)
                    .map(|(_, by)| self.pool.crew.wait(by, Awaited::Room, || self.queue.is_full()))
                    .transpose();
                match wait {
                    Ok(ticket) => {
                        listener.wait();
                        ticket.into_iter().for_each(|ticket| self.pool.crew.wait_is_over(ticket));
                    }
                    Err(Refusal::HasRoom) => {}
                    Err(Refusal::Hopeless) => return Err(Rejected::Deadlock(job)),
                }
                continue;
            };
            if listener.wait_deadline(until).is_none() {
                return self.try_admit(job);
            }
        }
    }

    /// Called by a worker after it has taken a job.
    pub(crate) fn there_is_room(&self) {
        // SeqCst: see the module's part on waiting for room.
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.pool.crew.room.notify(1);
        }
    }

    /// Stops admission, and lets the workers leave when the queue is empty.
    fn close(&self) {
        self.advance(DRAINING);
        self.wait_for_those_inside();
        self.advance(CLOSED);
    }

    /// Raises the stage, and wakes every sleeper so that it looks at the stage.
    fn advance(&self, stage: u8) {
        self.pool.stage.fetch_max(stage, Ordering::SeqCst);
        self.queue.wake_all();
        self.pool.crew.room.notify(usize::MAX);
    }

    /// A submitter inside is between two steps that do not block, so this takes microseconds.
    fn wait_for_those_inside(&self) {
        while self.queue.has_anyone_inside() {
            thread::yield_now();
        }
    }

    /// The workers' cells. The lock keeps out a resize only.
    pub(crate) fn cells(&self) -> RwLockReadGuard<'_, Vec<Arc<WorkerCell>>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Job> Shared<J> {
    /// Takes what is queued and drops it.
    pub(crate) fn drop_queued(&self) {
        while let Some(queued) = self.queue.try_take() {
            // A destructor may be slow, or panic. `abandon` counts the job before that.
            quietly(|| {
                queued.job.abandon(&mut |outcome| {
                    let count = match outcome {
                        Outcome::Cancelled => &self.dropped.cancelled,
                        Outcome::Expired => &self.dropped.expired,
                        _ => &self.dropped.aborted,
                    };
                    count.fetch_add(1, Ordering::Release);
                });
            });
        }
    }
}

/// Counts a submitter among those that wait for room, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Starts a worker thread.
fn spawn<J: Job, H: Handler<J> + 'static>(
    shared: &Arc<Shared<J>>,
    number: usize,
    stack_size: usize,
    mut handler: H,
    init: Option<Init>,
    ready: OnReady,
) -> io::Result<JoinHandle<()>> {
    let cell = {
        let mut cells = shared.cells.write().unwrap_or_else(PoisonError::into_inner);
        while cells.len() <= number {
            cells.push(Arc::new(WorkerCell::new()));
        }
        Arc::clone(&cells[number])
    };
    shared.pool.crew.enter();
    let thread =
        thread::Builder::new().name(format!("mill-{}-{number}", shared.pool.name)).stack_size(stack_size);
    let refused = Arc::clone(&shared.pool);
    let shared = Arc::clone(shared);
    let leave = Leave(Arc::clone(&shared));
    thread
        .spawn(move || {
            // Moved in, so that it is dropped, and the thread counted out, whether or not the system grants the thread.
            let leave = leave;
            // Before the first step, so that a wait in it for the own pool is seen as well.
            let _current = current::enter(&shared.pool);
            match init.map_or(Ok(()), |init| begin(&*init, number)) {
                Ok(()) => {
                    report(ready, Ok(()));
                    worker::work(&shared, &cell, &mut handler);
                }
                Err(error) => {
                    shared.pool.crew.withdraw();
                    // Before the report, so that a thread that has the error finds the number of workers right.
                    drop(leave);
                    report(ready, Err(error));
                }
            }
        })
        .inspect_err(|_| refused.crew.withdraw())
}

fn report(ready: OnReady, begun: Result<(), InitError>) {
    if let Some(ready) = ready {
        // If the resize has given up, nothing waits for the report.
        let _ = ready.send(begun);
    }
}

fn begin(init: &dyn Fn(usize) -> Result<(), InitError>, number: usize) -> Result<(), InitError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| init(number))).unwrap_or_else(|payload| {
        let error = format!("it panicked: {}", panic_message(&*payload)).into();
        quietly(|| drop(payload));
        Err(error)
    })
}

/// Counts a thread out when it is dropped.
struct Leave<J>(Arc<Shared<J>>);

impl<J> Drop for Leave<J> {
    fn drop(&mut self) {
        self.0.pool.crew.gone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Turn;

    struct Number(u32);

    impl Job for Number {
        fn abandon(self, count: &mut dyn FnMut(Outcome)) {
            count(Outcome::Aborted);
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
            lingers: false,
            enough_awake: None,
            init: None,
        };
        Workers::start(settings, handler).expect("threads")
    }

    /// Requeues its job, a number, until it is 0.
    struct Countdown;

    impl Handler<Number> for Countdown {
        fn run(&mut self, Number(left): Number, turn: &mut Turn<'_, Number>) {
            turn.begin();
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
