//! Which worker, and which job, the calling thread is.
//!
//! A worker thread keeps here whose it is, so that a wait for its own pool is recognised, and the job it
//! runs, so that the job can find out about itself from any depth of its calls.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::crew::{Crew, JobId};
use super::job::Run;
use super::workers::OPEN;

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
    job: Option<Arc<dyn Run>>,
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
    CURRENT.with(|current| current.replace(Some(Current { pool: Arc::clone(pool), job: None })));
    Guard
}

pub(crate) struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        CURRENT.with(|current| current.replace(None));
    }
}

/// Calls `run` with the job while it is the thread's current one.
pub(crate) fn with_job(job: Arc<dyn Run>, run: impl FnOnce(&dyn Run)) {
    CURRENT.with(|current| {
        if let Some(current) = &mut *current.borrow_mut() {
            current.job = Some(job);
        }
    });
    // What runs here may look at the current job, and only look: nobody borrows it to change it.
    CURRENT.with(|current| {
        if let Some(Current { job: Some(job), .. }) = &*current.borrow() {
            run(&**job);
        }
    });
    let job = CURRENT.with(|current| current.borrow_mut().as_mut().and_then(|current| current.job.take()));
    // Out of the borrow: a destructor may be anything.
    drop(job);
}

/// The pool whose worker the calling thread is, if it is this one, and the job it runs.
pub(crate) fn worker_of(pool: PoolId) -> Option<(Arc<Identity>, JobId)> {
    look(|Current { pool: own, job }| {
        (own.id == pool).then(|| (Arc::clone(own), job.as_ref().map_or(0, |job| job_id(&**job))))
    })
}

/// The job that the calling thread runs.
pub(crate) fn job() -> Option<(Arc<Identity>, Arc<dyn Run>)> {
    look(|Current { pool, job }| Some((Arc::clone(pool), Arc::clone(job.as_ref()?))))
}

/// Asks the thread's entry. A thread that is so far in its end that it has none is nobody's worker.
fn look<T>(ask: impl FnOnce(&Current) -> Option<T>) -> Option<T> {
    CURRENT.try_with(|current| current.borrow().as_ref().and_then(ask)).ok().flatten()
}

/// Where a job is in memory, which tells it from all others while it lives.
pub(crate) fn job_id<R: ?Sized>(job: &R) -> JobId {
    std::ptr::from_ref(job).addr()
}
