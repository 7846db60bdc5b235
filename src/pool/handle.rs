//! What a submitter holds of its job: the handle, and the token of a cancellation.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::current::{self, Cancel, Counted};
use super::errors::{JobError, quietly};
use super::identity::{Identity, PoolId, Stage};
use super::job::{Outlook, Waiter};
use crate::sync::checked::thread;

/// A job that was admitted, and its outcome once it has ended.
///
/// Dropping the handle lets the job run; its outcome is then dropped as a part of it.
/// [`cancel_on_drop`](JobHandle::cancel_on_drop) makes a handle that cancels the job instead.
///
/// A handle is also a [`Future`], on any executor: awaiting it holds no thread. The thread that ends the job wakes the
/// task.
///
/// # On a worker of the same pool
///
/// A worker that would wait for a job of its own pool runs that job itself, if it is still queued. So it is no deadlock
/// if jobs join jobs of their own pool, however few workers there are. The job runs on the stack of the waiting worker,
/// and while that holds its locks, and as deep as a chain of joins is, as a function call would. What can still wait
/// for ever:
///
/// - a job that waits for itself, or two jobs that run, each waiting for the other,
/// - two pools whose workers wait for each other's jobs,
/// - a job that waits for another by other means than a handle, such as a channel or a lock; also a job that a worker
///   runs for a full queue, and that waits for its submitter or for a lock that the submitter holds.
///
/// ```
/// use millpond::{JobError, Pool};
///
/// let pool = Pool::builder("sums").workers(2).queue_capacity(100).build()?;
/// let sum = pool.submit(|| (1..=10).sum::<u64>())?;
/// let bad = pool.submit(|| -> u64 { panic!("no more numbers") })?;
/// assert_eq!(sum.join(), Ok(55));
/// assert_eq!(bad.join().unwrap_err().to_string(), "the job panicked: no more numbers");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the outcome of the job is lost with its handle; drop it on purpose if nobody needs it"]
pub struct JobHandle<T>(Held<'static, T>);

/// The handle behind [`JobHandle`] and [`ScopedHandle`](crate::ScopedHandle).
pub(super) struct Held<'a, T> {
    job: Arc<dyn Outlook<T> + 'a>,
    pool: PoolId,
    /// Whether the job may have a waker of this handle.
    polled: bool,
    /// Whether this thread ran the job in place of waiting for it. Then the queue may still hold it.
    ran_here: AtomicBool,
}

impl<'a, T> Held<'a, T> {
    pub(super) fn new(job: Arc<dyn Outlook<T> + 'a>, pool: PoolId) -> Self {
        Held { job, pool, polled: false, ran_here: AtomicBool::new(false) }
    }

    /// Runs the job if it is queued and the calling thread is a worker of its pool. Returns whether it did. `current`
    /// is what the job finds as the thread's current one.
    fn run_here(&self, current: impl FnOnce() -> Option<Arc<dyn Cancel>>) -> bool {
        let ran = current::worker_of(self.pool).is_some_and(|worker| {
            current::with_job_beside(current(), Counted::Yes, || self.job.run_beside(&worker))
        });
        if ran {
            self.ran_here.store(true, Ordering::Relaxed);
        }
        ran
    }

    /// Blocks until the job has ended, until `until` at most, and takes its outcome.
    pub(super) fn wait_for(
        &self,
        until: Option<Instant>,
        current: impl FnOnce() -> Option<Arc<dyn Cancel>>,
    ) -> Option<Result<T, JobError>> {
        let is_over = || until.is_some_and(|until| Instant::now() >= until);
        if !is_over() {
            self.run_here(current);
        }
        loop {
            let outcome = self.job.take_or_wait(&mut || Some(Waiter::Thread(thread::current())));
            if outcome.is_some() {
                return outcome;
            }
            match until {
                None => thread::park(),
                Some(at) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
            }
            if is_over() {
                // One last look, and no thread to be told any more.
                return self.job.take_or_wait(&mut || None);
            }
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.job.ended().is_some()
    }

    pub(super) fn cancel(&self) -> bool {
        self.job.cancel()
    }

    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        current: impl FnOnce() -> Option<Arc<dyn Cancel>>,
    ) -> Poll<Result<T, JobError>> {
        if current::blocking_worker_of(self.pool).is_some() {
            self.run_here(current);
        }
        // Cloned before the job is locked, because the waker's code is not ours.
        let mut waker = Some(context.waker().clone());
        self.polled = true;
        match self.job.take_or_wait(&mut || waker.take().map(Waiter::Task)) {
            Some(outcome) => {
                self.polled = false;
                Poll::Ready(outcome)
            }
            None => Poll::Pending,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.job.has_ended()
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        if self.polled {
            self.job.forget_waiter();
        }
        if self.ran_here.load(Ordering::Relaxed) {
            self.job.forget_outcome();
        }
    }
}

impl<T: Send + 'static> JobHandle<T> {
    pub(super) fn new(held: Held<'static, T>) -> Self {
        JobHandle(held)
    }

    /// Blocks until the job has ended, and takes its outcome. It has no timeout;
    /// [`join_timeout`](JobHandle::join_timeout) has one. On a worker of the job's own pool it runs the job if that is
    /// still queued.
    ///
    /// # Errors
    ///
    /// How the job failed, see [`JobError`].
    ///
    /// # Panics
    ///
    /// If the handle has been awaited to its end, which took the outcome. So do the other methods that take it.
    pub fn join(self) -> Result<T, JobError> {
        let outcome = self.0.wait_for(None, || Some(self.as_cancel()));
        outcome.unwrap_or_else(|| unreachable!("a wait without a timeout ends with the job"))
    }

    /// Blocks until the job has ended, `timeout` at most, and takes its outcome. On a worker of the job's own pool it
    /// runs the job if that is still queued, unless the timeout is zero; this lasts as long as the job does.
    ///
    /// ```
    /// use std::time::Duration;
    /// # let pool = millpond::Pool::builder("doc").build()?;
    /// let mut job = pool.submit(|| std::thread::sleep(Duration::from_millis(30)))?;
    /// let outcome = loop {
    ///     match job.join_timeout(Duration::from_millis(10)) {
    ///         Ok(outcome) => break outcome,
    ///         Err(handle) => job = handle, // time to look at something else
    ///     }
    /// };
    /// assert_eq!(outcome, Ok(()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the job has not ended by then, the handle comes back. The inner result is as in [`join`](JobHandle::join). If
    /// the timeout is beyond the reach of [`Instant`], this is a `join`.
    pub fn join_timeout(self, timeout: Duration) -> Result<Result<T, JobError>, Self> {
        let outcome = self.0.wait_for(Instant::now().checked_add(timeout), || Some(self.as_cancel()));
        outcome.ok_or(self)
    }

    /// Whether the job has ended, so that a [`join`](JobHandle::join) will not block. Does not wait for the job. If the
    /// job waits beyond its deadline, this ends it, which runs the destructor of its closure and its callback.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Asks for the job's cancellation. Returns whether that kept it from running, now or at an earlier call. Does not
    /// wait for the job.
    ///
    /// A job that waits in the queue is dropped at once, counted as cancelled, and ends as [`JobError::Cancelled`]. Its
    /// place is free for another job. The destructor of its closure and its callback run in this call. A job that runs
    /// can see the request through [`CancelToken::current`]; it ends as it pleases, and `join` says how.
    pub fn cancel(&self) -> bool {
        self.0.cancel()
    }

    /// Returns a token that can ask for the job's cancellation, also while this handle is being joined.
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        CancelToken { job: Some(self.as_cancel()), pool: None }
    }

    /// Returns a handle that cancels the job when it is dropped, as when the future that awaits it is dropped.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").workers(1).build()?;
    /// # let (finish, wait) = std::sync::mpsc::channel::<()>();
    /// # let busy = pool.submit(move || wait.recv())?;
    /// let job = pool.submit(|| "not wanted any more")?.cancel_on_drop();
    /// drop(job);
    /// assert_eq!(pool.stats().cancelled, 1);
    /// # finish.send(())?;
    /// # drop(busy);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cancel_on_drop(self) -> CancelOnDrop<T> {
        CancelOnDrop { handle: Some(self) }
    }

    /// Passes the outcome to a closure in place of a `join`.
    ///
    /// The closure is called once. If the job runs, its worker calls it right after the job, as a part of it that holds
    /// the worker as long as it lasts. If the job is cancelled, aborted, or expires, the thread that ends it calls it;
    /// for a deadline that is a thread of the pool, which handles no other deadline meanwhile. If the job has ended, it
    /// is called here and now. If it panics, the panic hook reports it, and nothing else happens.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").build()?;
    /// let (report, reports) = std::sync::mpsc::channel();
    /// pool.submit(|| 6 * 7)?.on_done(move |outcome| report.send(outcome).expect("it is received"));
    /// assert_eq!(reports.recv()?, Ok(42));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_done(mut self, callback: impl FnOnce(Result<T, JobError>) + Send + 'static) {
        let mut callback = Some(callback);
        let outcome = self.0.job.take_or_wait(&mut || {
            let callback = callback.take().expect("it is asked for once");
            Some(Waiter::Callback(Box::new(callback)))
        });
        // The waiter is the callback now.
        self.0.polled = false;
        if let (Some(outcome), Some(callback)) = (outcome, callback) {
            quietly(|| callback(outcome));
        }
    }

    /// Leaves a waiter with a job that has not ended. Otherwise returns whether it failed.
    pub(super) fn watch(&self, waiter: Waiter<T>) -> Result<(), bool> {
        self.0.job.watch(waiter)
    }

    /// Runs the job if it is queued and the calling thread is a worker of its pool. Returns whether it did.
    pub(super) fn run_here(&self) -> bool {
        self.0.run_here(|| Some(self.as_cancel()))
    }

    fn as_cancel(&self) -> Arc<dyn Cancel> {
        Arc::clone(&self.0.job) as Arc<dyn Cancel>
    }
}

/// As [`join`](JobHandle::join), without holding a thread.
///
/// # Panics
///
/// When polled again after it was ready.
impl<T: Send + 'static> Future for JobHandle<T> {
    type Output = Result<T, JobError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let job = Arc::clone(&self.0.job);
        self.0.poll(context, || Some(job as Arc<dyn Cancel>))
    }
}

impl<T> fmt::Debug for JobHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobHandle").field("ended", &self.0.has_ended()).finish_non_exhaustive()
    }
}

/// A [`JobHandle`] that cancels its job when it is dropped; see [`JobHandle::cancel_on_drop`].
#[must_use = "dropping it cancels the job"]
pub struct CancelOnDrop<T: Send + 'static> {
    /// `None` once it was taken out.
    handle: Option<JobHandle<T>>,
}

impl<T: Send + 'static> CancelOnDrop<T> {
    /// Returns the handle, whose drop lets the job run.
    pub fn into_handle(mut self) -> JobHandle<T> {
        self.take()
    }

    /// As [`JobHandle::join`].
    ///
    /// # Errors
    ///
    /// As [`JobHandle::join`].
    pub fn join(mut self) -> Result<T, JobError> {
        self.take().join()
    }

    fn take(&mut self) -> JobHandle<T> {
        self.handle.take().expect("it is taken by methods that consume this")
    }
}

impl<T: Send + 'static> Future for CancelOnDrop<T> {
    type Output = Result<T, JobError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let handle = self.handle.as_mut().expect("it is taken by methods that consume this");
        Pin::new(handle).poll(context)
    }
}

impl<T: Send + 'static> Drop for CancelOnDrop<T> {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            handle.cancel();
        }
    }
}

impl<T: Send + 'static> fmt::Debug for CancelOnDrop<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelOnDrop").field("handle", &self.handle).finish()
    }
}

/// Requests a job's cancellation, and lets the job see the request. A token keeps its job's memory, and a result that
/// no handle has taken.
///
/// A job looks at [`CancelToken::current`], from any depth of its calls. Other threads get a token from
/// [`JobHandle::cancel_token`].
///
/// ```
/// use millpond::{CancelToken, Pool};
///
/// let pool = Pool::builder("search").build()?;
/// # let (begins, begun) = std::sync::mpsc::channel();
/// let job = pool.submit(move || {
///     let token = CancelToken::current().expect("this is a job");
///     # begins.send(()).expect("the submitter waits");
///     let mut looked_at = 0_u64;
///     while !token.is_cancelled() {
///         looked_at += 1; // in small steps
///     }
///     looked_at
/// })?;
/// # begun.recv()?;
/// assert!(!job.cancel(), "the job runs already, so it only sees the request");
/// assert!(job.join().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct CancelToken {
    /// `None` for a job without a handle, and for a job of a scope.
    job: Option<Arc<dyn Cancel>>,
    /// The pool that runs the job. `None` for a token from a handle, which does not see an abort.
    pool: Option<Arc<Identity>>,
}

impl CancelToken {
    /// Returns the token of the job that the calling thread runs; `None` outside of a job.
    #[must_use]
    pub fn current() -> Option<CancelToken> {
        let (pool, job) = current::job()?;
        Some(CancelToken { job, pool: Some(pool) })
    }

    /// Whether the job should stop: its cancellation was asked for, or, for a token from
    /// [`current`](CancelToken::current), its pool was aborted. Takes the job's lock
    /// for an instant, which is cheap enough for every few microseconds.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.is_requested())
            || self.pool.as_ref().is_some_and(|pool| pool.stage() == Stage::Aborted)
    }

    /// As [`JobHandle::cancel`]. A job that was submitted without a handle cannot be cancelled.
    pub fn cancel(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.cancel())
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").field("is_cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}
