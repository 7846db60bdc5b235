//! A pool whose jobs may borrow: its workers are scoped threads.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::errors::{JobError, PoolError, Rejected};
use super::handle::Held;
use super::job::Runner;
use super::metrics::Stats;
use super::shared::Patience;
use super::submit::{Borrowed, Engine};
use super::workers::{Settings, Workers};

/// A pool whose jobs may borrow what outlives its scope; see [`PoolBuilder::scoped`](crate::PoolBuilder::scoped).
///
/// Its methods are those of [`Pool`](crate::Pool) of the same name. What it does not have: a registry, deadlines, maps,
/// `submit_async`, a change of size, callbacks and tokens, and an end before its scope's. Its jobs cannot reach it, so
/// they cannot submit jobs to it.
pub struct ScopedPool<'scope, 'env> {
    engine: Engine<'scope>,
    /// The scope's lifetimes are neither shortened nor lengthened, as those of [`std::thread::Scope`].
    scope: PhantomData<&'scope mut &'env ()>,
}

/// Runs `run` with a pool whose workers end before this returns.
pub(super) fn scoped<'env, R>(
    settings: Settings,
    carry_span: bool,
    run: impl for<'scope> FnOnce(&ScopedPool<'scope, 'env>) -> R,
) -> Result<R, PoolError> {
    std::thread::scope(|scope| {
        // An early return or a panic drops the workers, which drains or closes them. The scope waits for the threads.
        let (workers, threads) = Workers::without_threads(settings)?;
        workers.enlist(threads, |recruit| {
            recruit.builder().spawn_scoped(scope, move || recruit.work(Runner)).map(drop)
        })?;
        let pool = ScopedPool { engine: Engine { workers, carry_span }, scope: PhantomData };
        Ok(run(&pool))
    })
}

impl<'scope> ScopedPool<'scope, '_> {
    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.engine.workers.identity().name
    }

    /// As [`Pool::submit`](crate::Pool::submit).
    ///
    /// # Errors
    ///
    /// As [`Pool::submit`](crate::Pool::submit).
    pub fn submit<F, T>(&self, job: F) -> Result<ScopedHandle<'scope, T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        self.admit(job, Patience::Endless)
    }

    /// As [`Pool::try_submit`](crate::Pool::try_submit).
    ///
    /// # Errors
    ///
    /// As [`Pool::try_submit`](crate::Pool::try_submit).
    pub fn try_submit<F, T>(&self, job: F) -> Result<ScopedHandle<'scope, T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        self.admit(job, Patience::None)
    }

    /// As [`Pool::submit_timeout`](crate::Pool::submit_timeout).
    ///
    /// # Errors
    ///
    /// As [`Pool::submit_timeout`](crate::Pool::submit_timeout).
    pub fn submit_timeout<F, T>(
        &self,
        job: F,
        timeout: Duration,
    ) -> Result<ScopedHandle<'scope, T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        self.admit(job, Patience::lasting(timeout))
    }

    fn admit<F, T>(&self, job: F, patience: Patience) -> Result<ScopedHandle<'scope, T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        let job = self.engine.admit::<Borrowed, F, T>(job, None, patience)?;
        Ok(ScopedHandle(self.engine.handle(job)))
    }

    /// As [`Pool::execute`](crate::Pool::execute).
    ///
    /// # Errors
    ///
    /// As [`Pool::execute`](crate::Pool::execute).
    pub fn execute<F: FnOnce() + Send + 'scope>(&self, job: F) -> Result<(), Rejected<F>> {
        self.engine.execute(job, Patience::Endless)
    }

    /// As [`Pool::try_execute`](crate::Pool::try_execute).
    ///
    /// # Errors
    ///
    /// As [`Pool::try_execute`](crate::Pool::try_execute).
    pub fn try_execute<F: FnOnce() + Send + 'scope>(&self, job: F) -> Result<(), Rejected<F>> {
        self.engine.execute(job, Patience::None)
    }

    /// As [`Pool::execute_all`](crate::Pool::execute_all).
    ///
    /// # Errors
    ///
    /// As [`Pool::execute_all`](crate::Pool::execute_all).
    pub fn execute_all<I, F>(&self, jobs: I) -> Result<usize, Rejected<Vec<F>>>
    where
        I: IntoIterator<Item = F>,
        F: FnOnce() + Send + 'scope,
    {
        self.engine.execute_all(jobs.into_iter())
    }

    /// As [`Pool::wait_idle`](crate::Pool::wait_idle).
    #[must_use = "it says whether the pool became idle"]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.engine.wait_idle(timeout)
    }

    /// As [`Pool::stats`](crate::Pool::stats).
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.workers.stats()
    }
}

impl fmt::Debug for ScopedPool<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopedPool").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// A job of a [`ScopedPool`], as [`JobHandle`](crate::JobHandle) is one of a [`Pool`](crate::Pool).
#[must_use = "the outcome of the job is lost with its handle; drop it on purpose if nobody needs it"]
pub struct ScopedHandle<'scope, T>(Held<'scope, T>);

impl<T: Send> ScopedHandle<'_, T> {
    /// As [`JobHandle::join`](crate::JobHandle::join).
    ///
    /// # Errors
    ///
    /// As [`JobHandle::join`](crate::JobHandle::join).
    pub fn join(self) -> Result<T, JobError> {
        let outcome = self.0.wait_for(None, || None);
        outcome.unwrap_or_else(|| unreachable!("a wait without a timeout ends with the job"))
    }

    /// As [`JobHandle::join_timeout`](crate::JobHandle::join_timeout).
    ///
    /// # Errors
    ///
    /// As [`JobHandle::join_timeout`](crate::JobHandle::join_timeout).
    pub fn join_timeout(self, timeout: Duration) -> Result<Result<T, JobError>, Self> {
        self.0.wait_for(Instant::now().checked_add(timeout), || None).ok_or(self)
    }

    /// As [`JobHandle::is_finished`](crate::JobHandle::is_finished).
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// As [`JobHandle::cancel`](crate::JobHandle::cancel).
    pub fn cancel(&self) -> bool {
        self.0.cancel()
    }
}

impl<T: Send> Future for ScopedHandle<'_, T> {
    type Output = Result<T, JobError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(context, || None)
    }
}

impl<T> fmt::Debug for ScopedHandle<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopedHandle").field("ended", &self.0.has_ended()).finish_non_exhaustive()
    }
}
