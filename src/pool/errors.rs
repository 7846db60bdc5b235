//! Everything that may go wrong with a pool or a job, as one error for each boundary.
//!
//! - [`PoolError`]: a pool did not start, or was not resized.
//! - [`Rejected`]: a job was not admitted, and comes back inside.
//! - [`JobError`]: an admitted job has no result. [`MapError`] adds which item of a map it was.
//!
//! Each of them is `Send`, `Sync` and `'static` whenever what it carries is `Send` and `'static`, so that `?` converts
//! it into a boxed error, whatever a closure captured.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use super::limits::{MAX_QUEUE_CAPACITY, MAX_WORKERS};

/// Why a worker could not begin, as its first step reports it.
pub type InitError = Box<dyn std::error::Error + Send + Sync>;

/// Why a job was not admitted. The job comes back inside.
pub enum Rejected<J> {
    /// As many jobs wait as the queue holds.
    Full(Returned<J>),
    /// The pool drains or is closed, and admits no job any more.
    Draining(Returned<J>),
}

/// The job inside of a [`Rejected`]. It can be taken out and not looked at, so the error can be shared between threads
/// although the job cannot.
pub struct Returned<J>(Mutex<J>);

impl<J> Returned<J> {
    pub(crate) fn new(job: J) -> Self {
        Returned(Mutex::new(job))
    }

    /// Takes the job out.
    pub fn into_inner(self) -> J {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J> fmt::Debug for Returned<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl<J> Rejected<J> {
    pub(crate) fn full(job: J) -> Self {
        Rejected::Full(Returned::new(job))
    }

    pub(crate) fn draining(job: J) -> Self {
        Rejected::Draining(Returned::new(job))
    }

    /// Takes the job out of the error.
    pub fn into_job(self) -> J {
        match self {
            Rejected::Full(job) | Rejected::Draining(job) => job.into_inner(),
        }
    }

    /// Drops the job, and keeps the reason. Use it where a job borrows something, or is too large to be kept:
    /// `pool.submit(job).map_err(Rejected::without_job)?`.
    #[must_use]
    pub fn without_job(self) -> Rejected<()> {
        self.map(drop)
    }

    pub(crate) fn map<K>(self, change: impl FnOnce(J) -> K) -> Rejected<K> {
        match self {
            Rejected::Full(job) => Rejected::full(change(job.into_inner())),
            Rejected::Draining(job) => Rejected::draining(change(job.into_inner())),
        }
    }
}

impl<J> fmt::Debug for Rejected<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rejected::Full(_) => "Full(..)",
            Rejected::Draining(_) => "Draining(..)",
        })
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

impl<J> std::error::Error for Rejected<J> {}

/// Why there is no result of a job. The job has ended: a result will not come later.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobError {
    /// The job panicked.
    Panicked(Panic),
    /// The job was cancelled while it waited, and never ran.
    Cancelled,
    /// The job waited longer than its deadline, and never ran.
    Expired,
    /// An abort, or the end of a drain, dropped the job while it waited, and it never ran.
    Aborted,
    /// The pool was draining, and did not admit the job. Only where jobs are submitted on the way, as by
    /// [`Pool::map`](crate::Pool::map).
    Draining,
}

impl JobError {
    /// The payload of the panic, as [`std::thread::JoinHandle::join`] returns it, for
    /// [`resume_unwind`](std::panic::resume_unwind) or a downcast. `None` if the job did not panic, or if the payload
    /// was taken out of a clone of this error.
    #[must_use]
    pub fn into_panic(self) -> Option<Box<dyn Any + Send>> {
        match self {
            JobError::Panicked(panic) => panic.payload.take(),
            _ => None,
        }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobError::Panicked(panic) => write!(f, "the job panicked: {}", panic.message()),
            JobError::Cancelled => f.write_str("the job was cancelled before it ran"),
            JobError::Expired => f.write_str("the job waited longer than its deadline and was not run"),
            JobError::Aborted => f.write_str("the pool ended before the job could run"),
            JobError::Draining => f.write_str("the pool is draining and did not admit the job"),
        }
    }
}

impl std::error::Error for JobError {}

/// The panic of a job: its message, and its payload until it is taken. Two are equal if their messages are.
#[derive(Clone, Debug)]
pub struct Panic {
    message: Arc<str>,
    payload: Arc<Payload>,
}

impl Panic {
    pub(crate) fn new(payload: Box<dyn Any + Send>) -> Self {
        let message = panic_message(&*payload).into();
        Panic { message, payload: Arc::new(Payload(Mutex::new(Some(payload)))) }
    }

    /// What the panic said; see [`panic_message`].
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl PartialEq for Panic {
    fn eq(&self, other: &Self) -> bool {
        self.message == other.message
    }
}

impl Eq for Panic {}

/// The payload of a panic, shared by the clones of an error.
struct Payload(Mutex<Option<Box<dyn Any + Send>>>);

impl Payload {
    fn take(&self) -> Option<Box<dyn Any + Send>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        // Its destructor comes from outside, and may panic.
        if let Some(payload) = self.take() {
            quietly(|| drop(payload));
        }
    }
}

/// An item of [`Pool::map`](crate::Pool::map) has no result: which item it was, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapError {
    /// The number of the item, from 0.
    pub item: usize,
    /// Why it has no result.
    pub error: JobError,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "item {}: {}", self.item, self.error)
    }
}

impl std::error::Error for MapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The message above has the text of this error, so the source is the next error below it.
        self.error.source()
    }
}

/// Why a pool did not start, or was not resized.
#[derive(Debug)]
#[non_exhaustive]
pub enum PoolError {
    /// The number of workers, carried here, is not between 1 and [`MAX_WORKERS`].
    Workers(usize),
    /// The capacity of the queue, carried here, is more than [`MAX_QUEUE_CAPACITY`].
    QueueCapacity(usize),
    /// The system refused a thread.
    Spawn {
        /// How many threads it had granted.
        started: usize,
        /// The system's error.
        source: io::Error,
    },
    /// A worker could not begin: [`PoolBuilder::on_worker_start`](crate::PoolBuilder::on_worker_start) failed or
    /// panicked.
    Init {
        /// The error that it returned, or the message of its panic.
        source: InitError,
    },
    /// The registry did not take the pool's metrics. As a rule it has those of a pool of this name.
    Register {
        /// The registry's error.
        source: prometheus::Error,
    },
    /// The pool drains or is closed, and its workers are leaving.
    Draining,
    /// A worker called for a resize in its first step. A resize waits for that step.
    Beginning,
    /// The name, carried here, has a NUL in it. The name of a thread may not have one.
    Name(String),
    /// A registry was set for the pool of a scope. Its metrics might outlive the scope.
    ScopedRegistry,
}

impl fmt::Display for PoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PoolError::Workers(workers) => {
                write!(f, "{workers} workers asked for; a pool has 1 to {MAX_WORKERS}")
            }
            PoolError::QueueCapacity(jobs) => {
                write!(f, "a queue for {jobs} jobs asked for; one holds at most {MAX_QUEUE_CAPACITY}")
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
            PoolError::ScopedRegistry => {
                f.write_str("a pool of a scope cannot have a registry; read its numbers by stats()")
            }
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
            | PoolError::Name(_)
            | PoolError::ScopedRegistry => None,
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

/// How many payloads in a row [`quietly`] drops before it leaks one: the destructor of a payload may panic with
/// another payload.
const PAYLOADS_DROPPED: usize = 4;

/// Runs `step`, as a rule a destructor from outside this crate. The panic hook reports a panic in it, and nothing else
/// comes of the panic.
pub(crate) fn quietly(step: impl FnOnce()) {
    let Err(mut payload) = catch_unwind(AssertUnwindSafe(step)) else { return };
    for _ in 0..PAYLOADS_DROPPED {
        match catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            Ok(()) => return,
            Err(next) => payload = next,
        }
    }
    std::mem::forget(payload);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts its drops, and panics with one like it so many times.
    struct Again(Arc<AtomicUsize>, usize);

    impl Drop for Again {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
            if let Some(left) = self.1.checked_sub(1) {
                std::panic::panic_any(Again(Arc::clone(&self.0), left));
            }
        }
    }

    #[test]
    fn a_payload_is_dropped_and_an_endless_row_of_them_is_not_followed() {
        for (times, expected) in [(0, 1), (2, 3), (usize::MAX, PAYLOADS_DROPPED)] {
            let drops = Arc::new(AtomicUsize::new(0));
            let payload = Again(Arc::clone(&drops), times);
            quietly(|| std::panic::panic_any(payload));
            assert_eq!(drops.load(Ordering::Relaxed), expected, "{times}");
        }
    }

    #[test]
    fn errors_can_be_sent_and_shared_whatever_they_carry() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<Rejected<std::cell::Cell<u8>>>();
        shared::<JobError>();
        shared::<MapError>();
        shared::<PoolError>();
    }

    #[test]
    fn the_payload_of_a_panic_is_taken_once() {
        let error = JobError::Panicked(Panic::new(Box::new(7_u64)));
        let clone = error.clone();
        assert_eq!(error, clone);
        assert_eq!(error.into_panic().and_then(|payload| payload.downcast().ok()), Some(Box::new(7_u64)));
        assert!(clone.into_panic().is_none());
        assert!(JobError::Cancelled.into_panic().is_none());
    }
}
