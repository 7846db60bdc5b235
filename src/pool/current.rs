//! Which worker, and which job, the calling thread is.
//!
//! A worker thread keeps here whose it is, so that a wait for its own pool is recognised, and the job it
//! runs, so that the job can find out about itself from any depth of its calls.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::crew::{Crew, JobId};
use super::job::Run;
use super::workers::OPEN;
use crate::sync::atomic::{AtomicU8, Ordering};

#[cfg(not(millpond_loom))]
thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}
#[cfg(millpond_loom)]
loom::thread_local! {
    static CURRENT: RefCell<Option<Current>> = RefCell::new(None);
}

struct Current {
    pool: Arc<Identity>,
    runs: Runs,
}

/// What a worker is running.
enum Runs {
    /// Nothing: it is in its first step, or between jobs.
    Nothing,
    /// A job that has no handle.
    Plain,
    Job(Arc<dyn Run>),
}

/// What a worker knows of the pool it belongs to, whatever its jobs are.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: PoolId,
    pub(crate) name: String,
    pub(crate) crew: Crew,
    /// One of `OPEN`, `DRAINING`, `CLOSED`, `ABORTED`; only rises. See `workers.rs`, the part on states.
    pub(crate) stage: AtomicU8,
}

/// Tells pools apart, those that are gone included.
pub(crate) type PoolId = u64;

impl Identity {
    pub(crate) fn new(name: String) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        Identity { id, name, crew: Crew::default(), stage: AtomicU8::new(OPEN) }
    }
}

/// Makes the calling thread a worker until the guard is dropped.
pub(crate) fn enter(pool: &Arc<Identity>) -> Guard {
    CURRENT.with(|current| current.replace(Some(Current { pool: Arc::clone(pool), runs: Runs::Nothing })));
    Guard
}

pub(crate) struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        CURRENT.with(|current| current.replace(None));
    }
}

/// Calls `run` with the job while it is the thread's current one.
pub(crate) fn with_job<R>(job: Arc<dyn Run>, run: impl FnOnce(&Arc<dyn Run>) -> R) -> R {
    set(Runs::Job(job));
    // What runs here may look at the current job, and only look: nobody borrows it to change it.
    let returned = CURRENT.with(|current| match &*current.borrow() {
        Some(Current { runs: Runs::Job(job), .. }) => run(job),
        _ => unreachable!("it was set, and only a worker has jobs"),
    });
    // Out of the borrow: a destructor may be anything.
    drop(set(Runs::Nothing));
    returned
}

/// Calls `run` while the thread's current job is one without a handle.
pub(crate) fn with_plain_job(run: impl FnOnce()) {
    /// Also when the job panics.
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            set(Runs::Nothing);
        }
    }
    set(Runs::Plain);
    let _over = Over;
    run();
}

fn set(runs: Runs) -> Option<Runs> {
    CURRENT.with(|current| {
        current.borrow_mut().as_mut().map(|current| std::mem::replace(&mut current.runs, runs))
    })
}

/// The pool whose worker the calling thread is, and the job it runs, as far as that can be told apart.
pub(crate) fn worker() -> Option<(Arc<Identity>, JobId)> {
    look(|Current { pool, runs }| match runs {
        Runs::Job(job) => Some((Arc::clone(pool), job_id(&**job))),
        // Nobody can wait for such a job, so it needs no name.
        Runs::Plain | Runs::Nothing => Some((Arc::clone(pool), 0)),
    })
}

/// As [`worker`], if it is a worker of this pool.
pub(crate) fn worker_of(pool: PoolId) -> Option<(Arc<Identity>, JobId)> {
    worker().filter(|(own, _)| own.id == pool)
}

/// Whether the calling thread is a worker of this pool in its first step.
pub(crate) fn is_beginning_in(pool: PoolId) -> bool {
    look(|current| Some(current.pool.id == pool && matches!(current.runs, Runs::Nothing))).unwrap_or(false)
}

/// The pool of the job that the calling thread runs, if it runs one.
pub(crate) fn pool() -> Option<Arc<Identity>> {
    look(|current| (!matches!(current.runs, Runs::Nothing)).then(|| Arc::clone(&current.pool)))
}

/// The job that the calling thread runs, if it is one with a handle.
pub(crate) fn job() -> Option<Arc<dyn Run>> {
    look(|current| match &current.runs {
        Runs::Job(job) => Some(Arc::clone(job)),
        Runs::Plain | Runs::Nothing => None,
    })
}

/// Asks the thread's entry. A thread that is so far in its end that it has none is nobody's worker.
fn look<T>(ask: impl FnOnce(&Current) -> Option<T>) -> Option<T> {
    CURRENT.try_with(|current| current.borrow().as_ref().and_then(ask)).ok().flatten()
}

/// Where a job is in memory, which tells it from all others while it lives.
pub(crate) fn job_id<R: ?Sized>(job: &R) -> JobId {
    std::ptr::from_ref(job).addr()
}
