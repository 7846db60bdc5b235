//! How closures are submitted: the part that [`Pool`](crate::Pool) and [`ScopedPool`](crate::ScopedPool) share.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Span;

use super::current::{self, Cancel, Counted, Run, Worker};
use super::errors::Rejected;
use super::handle::Held;
use super::identity::PoolId;
use super::job::{Boxed, Call, JobCell, Outlook, Plain, Runner, SMALL_BODY, Task, fits};
use super::queue::{Refusal, Wakes};
use super::shared::Patience;
use super::worker::run_beside;
use super::workers::Workers;

/// Jobs that [`Engine::execute_all`] admits at once, at most: the queue's lock is held for them. It begins with one,
/// and doubles the number, so that the first jobs start soon.
const BATCH: usize = 64;

/// How often a job that waits until its pool is idle looks whether it can run a job meanwhile.
const LOOK: Duration = Duration::from_millis(10);

/// The workers of a pool of closures that live for `'a`.
pub(super) struct Engine<'a> {
    pub(super) workers: Workers<Task<'a>>,
    /// Whether jobs run in the span of their submitter.
    pub(super) carry_span: bool,
}

/// How long a handled job lives.
pub(super) trait Lifetime<'a> {
    /// What the queue holds of the job.
    fn task(job: Arc<dyn Run + 'a>) -> Task<'a>;
    /// What the job finds as the thread's current one.
    fn current(job: Arc<dyn Run + 'a>) -> Option<Arc<dyn Cancel>>;
}

/// As long as any thread.
pub(super) struct Owned;

impl Lifetime<'static> for Owned {
    fn task(job: Arc<dyn Run>) -> Task<'static> {
        Task::handled(job)
    }

    fn current(job: Arc<dyn Run>) -> Option<Arc<dyn Cancel>> {
        Some(job)
    }
}

/// As long as a scope.
pub(super) struct Borrowed;

impl<'a> Lifetime<'a> for Borrowed {
    fn task(job: Arc<dyn Run + 'a>) -> Task<'a> {
        Task::scoped(job)
    }

    fn current(_: Arc<dyn Run + 'a>) -> Option<Arc<dyn Cancel>> {
        None
    }
}

/// A job that was admitted, for its handle.
type Admitted<'a, T> = Arc<dyn Outlook<T> + 'a>;

impl<'a> Engine<'a> {
    pub(super) fn id(&self) -> PoolId {
        self.workers.identity().id
    }

    pub(super) fn handle<T>(&self, job: Admitted<'a, T>) -> Held<'a, T> {
        Held::new(job, self.id())
    }

    /// The span for a job that is submitted now.
    fn span(&self) -> Option<Span> {
        self.carry_span.then(Span::current)
    }

    /// Admits a job with a handle.
    pub(super) fn admit<L, C, T>(
        &self,
        call: C,
        expires: Option<Instant>,
        patience: Patience,
    ) -> Result<Admitted<'a, T>, Rejected<C>>
    where
        L: Lifetime<'a>,
        C: Call<T> + 'a,
        T: Send + 'a,
    {
        if const { size_of::<C>() <= SMALL_BODY } {
            self.admit_cell::<L, C, T>(call, expires, patience)
        } else {
            let boxed = Boxed(Box::new(call));
            let admitted = self.admit_cell::<L, _, T>(boxed, expires, patience);
            admitted.map_err(|rejected| rejected.map(|it| *it.0))
        }
    }

    fn admit_cell<L, C, T>(
        &self,
        call: C,
        expires: Option<Instant>,
        patience: Patience,
    ) -> Result<Admitted<'a, T>, Rejected<C>>
    where
        L: Lifetime<'a>,
        C: Call<T> + 'a,
        T: Send + 'a,
    {
        let now_ns = self.workers.shared().watch.now_ns();
        let job = Arc::new(JobCell::new(call, expires, self.span(), self.id(), now_ns));
        match self.put_handled::<L>(Arc::clone(&job) as Arc<dyn Run + 'a>, now_ns, patience) {
            Ok(()) => Ok(job),
            Err(refusal) => Err(refusal.with(job.take_back())),
        }
    }

    /// What follows is made once, and not for each type of closure.
    fn put_handled<L: Lifetime<'a>>(
        &self,
        job: Arc<dyn Run + 'a>,
        now_ns: u64,
        patience: Patience,
    ) -> Result<(), Refusal> {
        let job = Cell::new(Some(job));
        let take = || job.take().expect("it is admitted or run once");
        let mut run_here = |worker: &Worker| {
            let job = take();
            let current = L::current(Arc::clone(&job));
            current::with_job_beside(current, Counted::No, || job.run_unqueued(worker));
        };
        self.put(&mut || L::task(take()), now_ns, patience, &mut run_here)
    }

    /// Admits a job without a handle.
    pub(super) fn execute<C: Call<()> + 'a>(&self, call: C, patience: Patience) -> Result<(), Rejected<C>> {
        let now_ns = self.workers.shared().watch.now_ns();
        let span = Cell::new(self.span());
        if const { fits::<Plain<C>>() } {
            let job = Cell::new(Some(Plain::new(call)));
            let take = || job.take().expect("it is admitted or run once");
            let outcome =
                self.put(&mut || Task::plain(take()).spanned(span.take()), now_ns, patience, &mut |worker| {
                    run_plain(take(), worker, now_ns);
                });
            outcome.map_err(|refusal| refusal.with(take().take_back()))
        } else {
            // Boxed before the queue's lock is taken.
            let job = Cell::new(Some(Box::new(Plain::new(call))));
            let take = || job.take().expect("it is admitted or run once");
            let outcome =
                self.put(&mut || Task::boxed(take()).spanned(span.take()), now_ns, patience, &mut |worker| {
                    run_plain(*take(), worker, now_ns);
                });
            outcome.map_err(|refusal| refusal.with(take().take_back()))
        }
    }

    /// Puts a job into the queue that was submitted at `now_ns`. A worker of this pool that would wait for room runs it by
    /// `run_here` instead.
    fn put(
        &self,
        make: &mut dyn FnMut() -> Task<'a>,
        now_ns: u64,
        patience: Patience,
        run_here: &mut dyn FnMut(&Worker),
    ) -> Result<(), Refusal> {
        let shared = self.workers.shared();
        match (shared.probe(make, now_ns, Wakes::One), patience) {
            (Ok(()), _) => Ok(()),
            (Err(Refusal::Full), Patience::Endless | Patience::Must) => {
                self.put_or_run(make, patience, run_here)
            }
            (Err(Refusal::Full), Patience::Until(_)) => shared.submit(make, patience, Wakes::One),
            (Err(refusal), Patience::Probe) => Err(refusal),
            (Err(refusal), _) => {
                shared.count_rejected(refusal);
                Err(refusal)
            }
        }
    }

    #[cold]
    fn put_or_run(
        &self,
        make: &mut dyn FnMut() -> Task<'a>,
        patience: Patience,
        run_here: &mut dyn FnMut(&Worker),
    ) -> Result<(), Refusal> {
        let shared = self.workers.shared();
        match current::worker_of(self.id()) {
            None => shared.submit(make, Patience::Endless, Wakes::One),
            Some(worker) if matches!(patience, Patience::Must) || current::has_stack_left() => {
                run_here(&worker);
                shared.queue.count_unqueued();
                Ok(())
            }
            Some(_) => {
                shared.count_rejected(Refusal::Full);
                Err(Refusal::Full)
            }
        }
    }

    /// Admits jobs without handles, many at once. See [`Pool::execute_all`](crate::Pool::execute_all).
    pub(super) fn execute_all<C: Call<()> + 'a>(
        &self,
        calls: impl Iterator<Item = C>,
    ) -> Result<usize, Rejected<Vec<C>>> {
        let shared = self.workers.shared();
        let mut calls = calls.fuse();
        let (mut admitted, mut size) = (0, 1);
        loop {
            // Drawn without the lock, because the iterator may do anything.
            let mut batch: VecDeque<C> = calls.by_ref().take(size).collect();
            size = (size * 2).min(BATCH);
            if batch.is_empty() {
                return Ok(admitted);
            }
            while !batch.is_empty() {
                if fits::<Plain<C>>() && !self.carry_span {
                    let mut next = || batch.pop_front().map(|call| Task::plain(Plain::new(call)));
                    admitted += shared.queue.admit_all(&mut next, shared.watch.now_ns());
                    shared.sweep_if_due();
                }
                // For the first that found no room, and for those that are large. It also finds out whether the pool
                // drains.
                let Some(first) = batch.pop_front() else { break };
                match self.execute(first, Patience::Endless) {
                    Ok(()) => admitted += 1,
                    Err(rejected) => {
                        return Err(rejected.map(|first| std::iter::once(first).chain(batch).collect()));
                    }
                }
            }
        }
    }

    /// As [`admit`](Engine::admit) without an end to the patience, for a task in place of a thread.
    #[cfg(not(millpond_loom))]
    pub(super) async fn admit_async<L, C, T>(&self, call: C) -> Result<Admitted<'a, T>, Rejected<C>>
    where
        L: Lifetime<'a>,
        C: Call<T> + 'a,
        T: Send + 'a,
    {
        if current::blocking_worker_of(self.id()).is_some() {
            // No other thread may make the room, so the job is run if there is none.
            return self.admit::<L, C, T>(call, None, Patience::Endless);
        }
        let shared = self.workers.shared();
        let now_ns = shared.watch.now_ns();
        let job = Arc::new(JobCell::new(Boxed(Box::new(call)), None, self.span(), self.id(), now_ns));
        let mut queued = Some(Arc::clone(&job) as Arc<dyn Run + 'a>);
        match shared.submit_async(move || L::task(queued.take().expect("it is admitted once"))).await {
            Ok(()) => Ok(job),
            Err(refusal) => Err(refusal.with(*job.take_back().0)),
        }
    }

    /// See [`Pool::wait_idle`](crate::Pool::wait_idle).
    pub(super) fn wait_idle(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let shared = self.workers.shared();
        if current::worker_of(self.id()).is_none() {
            return shared.wait_until_idle(until);
        }
        let is_over = || until.is_some_and(|until| Instant::now() >= until);
        let wait = || {
            loop {
                self.run_queued(is_over);
                let look = Instant::now() + LOOK;
                if shared.wait_until_idle(Some(until.map_or(look, |until| until.min(look)))) {
                    return true;
                }
                if is_over() {
                    return false;
                }
            }
        };
        current::with_jobs_aside(|jobs| shared.pool.with_aside(jobs, wait))
    }

    /// Runs queued jobs, if the calling thread is a worker of this pool, until none waits, `enough` returns true, or
    /// half of the worker's stack is used.
    pub(super) fn run_queued(&self, enough: impl Fn() -> bool) {
        if let Some(worker) = current::worker_of(self.id()) {
            let stops = || enough() || !current::has_stack_left();
            run_beside(self.workers.shared(), &worker, &mut Runner, stops);
        }
    }
}

/// Runs a job without a handle that was refused for want of room.
fn run_plain<C: Call<()>>(job: Plain<C>, worker: &Worker, submitted_ns: u64) {
    current::with_job_beside(None, Counted::No, || job.run_unqueued(worker, submitted_ns));
}
