//! Which pool the calling thread works for, and which job it runs.
//!
//! A worker thread keeps here what a job needs to know of itself from any depth of its calls, and what a wait needs so
//! that it can run a job of its own pool in place of waiting for it.

use std::cell::RefCell;
use std::sync::Arc;

use super::account::{Account, Watch, WorkerCell};
use super::errors::quietly;
use super::identity::{Expires, Identity, PoolId};

#[cfg(not(millpond_loom))]
thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
    /// The worker's own job, if it has a handle. Borrowed while the job runs.
    static JOB: RefCell<Option<Arc<dyn Run>>> = const { RefCell::new(None) };
}
#[cfg(millpond_loom)]
loom::thread_local! {
    static CURRENT: RefCell<Option<Current>> = RefCell::new(None);
    static JOB: RefCell<Option<Arc<dyn Run>>> = RefCell::new(None);
}

/// The calling thread as a worker.
#[derive(Clone)]
pub(crate) struct Worker {
    pub(crate) pool: Arc<Identity>,
    pub(crate) cell: Arc<WorkerCell>,
    pub(crate) watch: Watch,
    /// The address of something on the stack when the thread began, and the size of the stack in bytes.
    stack: (usize, usize),
}

struct Current {
    worker: Worker,
    phase: Phase,
    /// The jobs on the stack that the worker runs beside its own, the last on top.
    beside: Vec<Beside>,
    /// How many of the jobs on the stack are counted as waiting until the pool is idle.
    aside: u64,
    /// Whether the thread is in [`block_on`](crate::block_on).
    blocks_on: bool,
}

/// A job that a worker runs beside its own.
struct Beside {
    /// The job, if it has a handle that others can cancel it with.
    job: Option<Arc<dyn Cancel>>,
    counted: Counted,
}

/// What a worker thread is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its first step.
    Begins,
    /// Its jobs.
    Works,
    /// Its last step.
    Ends,
}

/// A job that can be cancelled, or told to stop.
pub(crate) trait Cancel: Send + Sync {
    /// Whether its cancellation was asked for.
    fn is_requested(&self) -> bool;
    /// Asks for its cancellation. Returns whether that kept it from running.
    fn cancel(&self) -> bool;
}

/// The worker's side of a job that has a handle.
pub(crate) trait Run: Cancel + Expires {
    /// Runs the job, unless it has ended. Counts it, then tells the thread that waits for it. `orphaned` says whether
    /// only the worker has the job. Returns whether code from outside this crate may have run since the job was
    /// counted, or may when the job is dropped.
    fn run(&self, account: &mut Account<'_>, orphaned: &dyn Fn() -> bool) -> bool;
    /// Runs a job that was refused for want of room, for a worker of its pool.
    fn run_unqueued(&self, worker: &Worker);
    /// Ends the job as aborted if it is still queued, for a thread that has taken it out of the queue.
    fn abandon(&self);
}

/// Makes the calling thread a worker until the guard is dropped.
pub(crate) fn enter(pool: &Arc<Identity>, cell: &Arc<WorkerCell>, watch: Watch, stack_size: usize) -> Guard {
    let worker = Worker {
        pool: Arc::clone(pool),
        cell: Arc::clone(cell),
        watch,
        stack: (stack_address(), stack_size),
    };
    let current = Current { worker, phase: Phase::Begins, beside: Vec::new(), aside: 0, blocks_on: false };
    CURRENT.with(|slot| slot.replace(Some(current)));
    Guard
}

pub(crate) struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        // Out of the borrow: the pool's destructor may be anything.
        drop(CURRENT.with(|slot| slot.replace(None)));
    }
}

impl Guard {
    pub(crate) fn set_phase(&self, phase: Phase) {
        change(|current| current.phase = phase);
    }
}

/// Calls `run` with a job that was taken out of the queue, while it is the thread's current one. Also passes how many
/// references to the job this thread has.
pub(crate) fn with_job<R>(job: Arc<dyn Run>, run: impl FnOnce(&Arc<dyn Run>, usize) -> R) -> R {
    let beside = change(|current| {
        let beside = current.beside.last_mut()?;
        beside.job = Some(Arc::clone(&job) as Arc<dyn Cancel>);
        Some(())
    });
    if beside.flatten().is_some() {
        return run(&job, 2);
    }
    JOB.with(|slot| {
        // The worker's own job can only look at this slot, so it is free to be changed before and after.
        slot.replace(Some(job));
        let returned =
            run(slot.borrow().as_ref().expect("it was set, and nothing else sets it meanwhile"), 1);
        // Out of the borrow: a destructor may be anything.
        drop(slot.take());
        returned
    })
}

/// Whether a job that a worker runs beside its own is counted as submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// It was in the queue.
    Yes,
    /// It is counted when it ends.
    No,
}

/// Calls `run` for a job that the calling worker runs beside its own, and which can be cancelled by `job`.
pub(crate) fn with_job_beside<R>(
    job: Option<Arc<dyn Cancel>>,
    counted: Counted,
    run: impl FnOnce() -> R,
) -> R {
    /// Also when the job panics.
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            // Out of the borrow: a destructor may be anything.
            let over = change(|current| current.beside.pop());
            quietly(|| drop(over));
        }
    }
    change(|current| current.beside.push(Beside { job, counted }));
    let _over = Over;
    run()
}

/// Calls `run` while handles that are polled may run their job.
pub(crate) fn with_block_on<R>(run: impl FnOnce() -> R) -> R {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            change(|current| current.blocks_on = self.0);
        }
    }
    let before = change(|current| std::mem::replace(&mut current.blocks_on, true));
    let _back = Back(before.unwrap_or(false));
    run()
}

/// Whether the calling thread is a worker of this pool, in whatever phase.
pub(crate) fn is_worker_of(pool: PoolId) -> bool {
    look(|current| current.worker.pool.id == pool).unwrap_or(false)
}

/// The calling thread as a worker of this pool that runs a job.
pub(crate) fn worker_of(pool: PoolId) -> Option<Worker> {
    look(|current| {
        (current.worker.pool.id == pool && current.phase == Phase::Works).then(|| current.worker.clone())
    })
    .flatten()
}

/// As [`worker_of`], if the thread is in [`block_on`](crate::block_on).
pub(crate) fn blocking_worker_of(pool: PoolId) -> Option<Worker> {
    if look(|current| current.blocks_on)? { worker_of(pool) } else { None }
}

/// Whether the calling thread is a worker of this pool in its first step.
pub(crate) fn is_beginning_in(pool: PoolId) -> bool {
    look(|current| current.worker.pool.id == pool && current.phase == Phase::Begins).unwrap_or(false)
}

/// The pool of a job, and the job, if it can be cancelled.
type CurrentJob = (Arc<Identity>, Option<Arc<dyn Cancel>>);

/// The job that the calling thread runs, if it runs one.
pub(crate) fn job() -> Option<CurrentJob> {
    look(|current| {
        let job = match current.beside.last() {
            Some(beside) => beside.job.clone(),
            None => JOB.with(|slot| slot.borrow().clone().map(|job| job as Arc<dyn Cancel>)),
        };
        (current.phase == Phase::Works).then(|| (Arc::clone(&current.worker.pool), job))
    })
    .flatten()
}

/// How many jobs that are counted as submitted the calling worker has on its stack, if it runs one.
fn jobs_on_stack() -> u64 {
    look(|current| 1 + current.beside.iter().filter(|beside| beside.counted == Counted::Yes).count() as u64)
        .unwrap_or(0)
}

/// Calls `run` with the number of jobs on the calling worker's stack that are counted as submitted and that no wait
/// further down on it has passed on.
pub(crate) fn with_jobs_aside<R>(run: impl FnOnce(u64) -> R) -> R {
    struct Back(u64);
    impl Drop for Back {
        fn drop(&mut self) {
            change(|current| current.aside = self.0);
        }
    }
    let all = jobs_on_stack();
    let before = change(|current| std::mem::replace(&mut current.aside, all)).unwrap_or(0);
    let _back = Back(before);
    run(all - before)
}

/// Jobs that a worker may have on its stack where addresses say nothing of the use of the stack.
const DEPTH_WITHOUT_ADDRESSES: usize = 16;

/// Whether the calling worker has used less than half of its stack.
pub(crate) fn has_stack_left() -> bool {
    look(|current| {
        if cfg!(any(miri, millpond_loom)) {
            return current.beside.len() < DEPTH_WITHOUT_ADDRESSES;
        }
        let (base, size) = current.worker.stack;
        base.abs_diff(stack_address()) < size / 2
    })
    .unwrap_or(false)
}

/// The address of a local variable.
#[inline(never)]
fn stack_address() -> usize {
    let here = 0_u8;
    std::ptr::from_ref(std::hint::black_box(&here)).addr()
}

/// Asks the thread's entry. A thread that is so far in its end that it has none is no worker.
fn look<T>(ask: impl FnOnce(&Current) -> T) -> Option<T> {
    CURRENT.try_with(|slot| slot.borrow().as_ref().map(ask)).ok().flatten()
}

fn change<T>(change: impl FnOnce(&mut Current) -> T) -> Option<T> {
    CURRENT.try_with(|slot| slot.borrow_mut().as_mut().map(change)).ok().flatten()
}
