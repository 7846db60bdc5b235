//! What a submitter holds of its job: the handle, the errors it may bring, and the token of a cancellation.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::crew::{Awaited, JobId};
use super::current::{self, Identity, PoolId};
use super::job::{Listed, Outlook, Pending, Run, Unrun, Waiter};
use super::worker::quietly;
use super::workers::ABORTED;
use crate::sync::checked::thread;

/// A job that was admitted, and its outcome once it has ended.
///
/// Dropping the handle lets the job run; its outcome is then dropped as a part of it.
///
/// A handle is also a [`Future`], on any executor: awaiting it holds no thread. It is woken by the thread that
/// ends the job; a deadline is noticed when a worker comes to the job, or when the handle is polled.
///
/// ```
/// use std::time::Duration;
/// use millpond::{JobError, Pool};
///
/// let pool = Pool::builder("sums").workers(2).queue_capacity(100).build()?;
/// let sum = pool.submit(|| (1..=10).sum::<u64>())?;
/// let bad = pool.submit(|| -> u64 { panic!("no more numbers") })?;
/// assert_eq!(sum.join(), Ok(55));
/// assert_eq!(bad.join(), Err(JobError::Panicked("no more numbers".to_owned())));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the outcome of the job is lost with its handle; drop it on purpose if nobody needs it"]
pub struct JobHandle<T> {
    pub(super) job: Arc<dyn Outlook<T>>,
    pub(super) pool: PoolId,
}

impl<T: Send + 'static> JobHandle<T> {
    /// Blocks until the job has ended, and takes its outcome. Blocks for as long as that takes;
    /// [`join_timeout`](JobHandle::join_timeout) gives up.
    ///
    /// # Errors
    ///
    /// How the job failed, see [`JobError`]; or [`JobError::Deadlock`] when a worker of the job's own pool
    /// would wait here for ever. The job is then still in its place, and will run if it can.
    ///
    /// # Panics
    ///
    /// When the handle has been awaited to its end: that took the outcome. So do the other methods that take it.
    pub fn join(self) -> Result<T, JobError> {
        self.wait_for(None).unwrap_or_else(|| unreachable!("a wait without an end has no end"))
    }

    /// Blocks until the job has ended, `timeout` at most, and takes its outcome.
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
    /// The handle comes back if the job has not ended by then. The inner result is as in
    /// [`join`](JobHandle::join), but never [`JobError::Deadlock`], because this wait has an end; unless the
    /// timeout is beyond the reach of [`Instant`], which makes it a `join`.
    pub fn join_timeout(self, timeout: Duration) -> Result<Result<T, JobError>, Self> {
        self.wait_for(Instant::now().checked_add(timeout)).ok_or(self)
    }

    pub(super) fn id(&self) -> JobId {
        current::job_id(&*self.job)
    }

    fn wait_for(&self, until: Option<Instant>) -> Option<Result<T, JobError>> {
        loop {
            let mut wake_at = until;
            let outcome = self.job.take_or_wait(&mut |pending: &Pending| {
                wake_at = until.into_iter().chain(pending.expires).min();
                let listed = if wake_at.is_some() {
                    None
                } else {
                    list_wait(|pool| (pool == self.pool).then(|| vec![self.id()]))?
                };
                Ok(Some(Waiter::Thread(thread::current(), listed)))
            });
            if outcome.is_some() {
                return outcome;
            }
            match wake_at {
                None => thread::park(),
                Some(at) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
            }
            let over = until.is_some_and(|until| Instant::now() >= until);
            if over {
                // One last look, and nobody to be told any more.
                return self.job.take_or_wait(&mut |_| Ok(None));
            }
        }
    }

    /// Whether the job has ended, so that a [`join`](JobHandle::join) will not block. Ends a job that waits beyond
    /// its deadline, which drops its closure. Never waits.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.job.ended().is_some()
    }

    /// Asks for the job's cancellation, and says whether that kept it from running. Never blocks.
    ///
    /// A job that waits in the queue is dropped at once and ends as [`JobError::Cancelled`]; its place in the
    /// queue, and its count as `cancelled`, follow when a worker comes to it. A job that runs is only told,
    /// through [`CancelToken::current`]; it ends as it pleases, and `join` says how.
    pub fn cancel(&self) -> bool {
        Arc::clone(&self.job).as_run().cancel()
    }

    /// A token with which others can ask for the job's cancellation, also while this handle is being joined.
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        CancelToken { job: Some(Arc::clone(&self.job).as_run()), pool: None }
    }

    /// Hands the outcome to a closure instead of a `join`.
    ///
    /// It is called once: by the worker, right after the job, as a part of it that holds the worker as long as it
    /// lasts; by whoever cancels or aborts the job; or here and now if the job has ended. If it panics, the
    /// panic hook reports it, and nothing else happens.
    ///
    /// ```
    /// # let pool = millpond::Pool::builder("doc").build()?;
    /// let (report, reports) = std::sync::mpsc::channel();
    /// pool.submit(|| 6 * 7)?.on_done(move |outcome| report.send(outcome).expect("it is received"));
    /// assert_eq!(reports.recv()?, Ok(42));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_done(self, callback: impl FnOnce(Result<T, JobError>) + Send + 'static) {
        let mut callback = Some(callback);
        let outcome = self.job.take_or_wait(&mut |_| {
            let callback = callback.take().expect("asked once");
            Ok(Some(Waiter::Callback(Box::new(callback))))
        });
        if let (Some(outcome), Some(callback)) = (outcome, callback) {
            quietly(|| callback(outcome));
        }
    }
}

/// Enters an endless wait of the calling thread into its pool's list, if it is a worker and `jobs`, given the pool,
/// says for which of its jobs; none, if something else may end the wait.
pub(super) fn list_wait(jobs: impl FnOnce(PoolId) -> Option<Vec<JobId>>) -> Result<Option<Listed>, JobError> {
    let Some((pool, by)) = current::worker() else {
        return Ok(None);
    };
    let Some(jobs) = jobs(pool.id) else {
        return Ok(None);
    };
    match pool.crew.wait(by, Awaited::AnyOf(jobs), || unreachable!("it is no wait for room")) {
        Ok(ticket) => Ok(Some(Listed(pool, ticket))),
        Err(_) => Err(JobError::Deadlock { pool: pool.name.clone() }),
    }
}

/// As [`join`](JobHandle::join), without holding a thread.
///
/// # Panics
///
/// When polled again after it was ready.
impl<T: Send + 'static> Future for JobHandle<T> {
    type Output = Result<T, JobError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Cloned before the job is locked: what that does is not ours.
        let mut waker = Some(context.waker().clone());
        match self.job.take_or_wait(&mut |_| Ok(waker.take().map(Waiter::Task))) {
            Some(outcome) => Poll::Ready(outcome),
            None => Poll::Pending,
        }
    }
}

impl<T> fmt::Debug for JobHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobHandle").field("ended", &self.job.has_ended()).finish_non_exhaustive()
    }
}

/// Why there is no result of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobError {
    /// It panicked, and this is what the panic said; see [`panic_message`](crate::panic_message).
    Panicked(String),
    /// It was cancelled while it waited, and never ran.
    Cancelled,
    /// It waited longer than its deadline, and never ran.
    Expired,
    /// An abort, or the end of a drain, dropped it while it waited, and it never ran.
    Aborted,
    /// The pool was draining, and did not admit it. Only where jobs are submitted on the way, as by
    /// [`Pool::map`](crate::Pool::map).
    Draining,
    /// The wait, by a worker of the job's own pool, would never have ended: every worker of the pool waits for
    /// one of its jobs, or the job waits for the one that waits for it. Circles through several pools are not
    /// seen.
    Deadlock {
        /// The name of the pool.
        pool: String,
    },
}

impl JobError {
    pub(super) fn unrun(&self) -> Option<Unrun> {
        match self {
            JobError::Cancelled => Some(Unrun::Cancelled),
            JobError::Expired => Some(Unrun::Expired),
            JobError::Aborted => Some(Unrun::Aborted),
            JobError::Panicked(_) | JobError::Draining | JobError::Deadlock { .. } => None,
        }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobError::Panicked(message) => write!(f, "the job panicked: {message}"),
            JobError::Cancelled => f.write_str("the job was cancelled before it ran"),
            JobError::Expired => f.write_str("the job waited longer than its deadline and was not run"),
            JobError::Aborted => f.write_str("the pool ended before the job could run"),
            JobError::Draining => f.write_str("the pool is draining and did not admit the job"),
            JobError::Deadlock { pool } => write!(
                f,
                "waiting for this job would never end: it is a job of pool {pool:?}, whose workers all wait for its jobs, or for each other; \
                 submit it to another pool, or wait outside of the pool"
            ),
        }
    }
}

impl std::error::Error for JobError {}

/// Tells a job that its cancellation was asked for, and asks for it. A token keeps its job's memory, and a result
/// that nobody has taken.
///
/// The job looks at [`CancelToken::current`], from any depth of its calls; others get a token from
/// [`JobHandle::cancel_token`].
///
/// ```
/// use millpond::{CancelToken, Pool};
///
/// let pool = Pool::builder("search").build()?;
/// # let (begins, begun) = std::sync::mpsc::channel();
/// let job = pool.submit(move || {
///     let token = CancelToken::current().expect("this is a job");
///     # begins.send(()).expect("somebody waits");
///     let mut looked_at = 0_u64;
///     while !token.is_cancelled() {
///         looked_at += 1; // in small steps
///     }
///     looked_at
/// })?;
/// # begun.recv()?;
/// assert!(!job.cancel(), "it runs already, so it is only told");
/// assert!(job.join().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct CancelToken {
    /// A job without a handle is none.
    job: Option<Arc<dyn Run>>,
    /// The pool that runs the job; for a token given out by a handle, none.
    pool: Option<Arc<Identity>>,
}

impl CancelToken {
    /// The token of the job that the calling thread runs; none outside of a job.
    #[must_use]
    pub fn current() -> Option<CancelToken> {
        let pool = current::pool()?;
        Some(CancelToken { job: current::job(), pool: Some(pool) })
    }

    /// Whether the job should stop: its cancellation was asked for, or, for a token from
    /// [`current`](CancelToken::current), its pool was aborted. Takes the job's lock
    /// for an instant, which is cheap enough for every few microseconds.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let aborted = |pool: &Arc<Identity>| pool.stage.load(Ordering::Relaxed) == ABORTED;
        self.job.as_ref().is_some_and(|job| job.cancel_requested()) || self.pool.as_ref().is_some_and(aborted)
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
