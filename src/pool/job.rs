//! A closure on its way through a pool, and its outcome on the way back.
//!
//! A job without a handle is a closure that lies in the queue itself, if it is small. A job with a handle is a
//! [`JobCell`]: one allocation for the closure and, later, its outcome. The queue has one reference to it and the
//! handle another. Neither knows the closure's type. A large closure is boxed, so that a finished job does not keep its
//! memory.
//!
//! # States of a job with a handle
//!
//! Every change happens under the job's own lock, which is held for a few instructions and never while code from
//! outside this crate runs.
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | queued | running | the worker that takes it, or a worker that would wait for it |
//! | queued | ended, unrun | a handle or a token: cancelled · the pool's clock, a handle or the worker: its deadline passed · an abort |
//! | running | ended | the worker that runs it |
//! | ended | taken | the handle, which takes the outcome |
//!
//! Each job leaves *queued* exactly once. So it is run or dropped unrun, never both, and the thread that made
//! the change drops the closure. A job that left *queued* by another thread than the worker that takes it stays in the
//! queue, dead, until a worker or a sweep comes to it. It holds no place there.
//!
//! A job that ends unrun is counted and its place is free before its closure is dropped, and its closure is dropped
//! before any thread that waits for the job is told.
//!
//! Why no thread waits for ever. A thread that waits leaves a [`Waiter`] under the lock, having seen there that the job
//! has not ended. The end takes the waiter out under the same lock, and tells it. A job ends because it is run, or
//! dropped unrun, or because the queue's reference to it is dropped.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use stack_dst::{Value, buffers::ConstArrayBuf};
use tracing::Span;

use super::account::{Account, Outcome, outcome_of};
use super::current::{self, Cancel, Run, Worker};
use super::errors::{JobError, Panic, quietly};
use super::identity::{self, Expires, Identity, PoolId, Unrun};
use super::shared::Job;
use super::worker::{Handler, Turn};
use crate::sync::checked::thread::Thread;
use crate::sync::checked::{Mutex, MutexGuard, lock};

/// The body of a job.
pub(crate) trait Call<T>: Send {
    fn call(self) -> T;
}

impl<F: FnOnce() -> T + Send, T> Call<T> for F {
    fn call(self) -> T {
        self()
    }
}

/// A large body, in memory of its own.
pub(crate) struct Boxed<C>(pub(crate) Box<C>);

impl<C: Call<T>, T> Call<T> for Boxed<C> {
    fn call(self) -> T {
        self.0.call()
    }
}

/// The largest body, in bytes, that lies in the cell of its job.
pub(crate) const SMALL_BODY: usize = 64;

/// A closure and, later, its outcome.
pub(crate) struct JobCell<C, T> {
    state: Mutex<State<C, T>>,
    pool: PoolId,
    /// When it was submitted, in nanoseconds of the pool's clock.
    submitted_ns: u64,
}

struct State<C, T> {
    stage: Stage<C, T>,
    /// Rare state, boxed so that most jobs do not pay for it.
    extra: Option<Box<Extra<T>>>,
}

struct Extra<T> {
    waiter: Option<Waiter<T>>,
    /// When it has waited too long.
    expires: Option<Instant>,
    /// Whether its cancellation was asked for. The running job may look.
    cancel: bool,
    /// The span of its submitter, in which it runs.
    span: Option<Span>,
}

impl<T> Default for Extra<T> {
    fn default() -> Self {
        Extra { waiter: None, expires: None, cancel: false, span: None }
    }
}

/// What is run of a job.
struct Claimed<C> {
    call: C,
    span: Option<Span>,
}

enum Stage<C, T> {
    Queued(C),
    Running,
    /// It has ended unrun, and its closure is being dropped.
    Dropping(Unrun),
    Ended(Result<T, Box<JobError>>),
    /// Its outcome was taken, and why it did not run, if so.
    Taken(Option<Unrun>),
}

impl<C, T> State<C, T> {
    /// Whether it is queued beyond its deadline.
    fn is_late(&self) -> bool {
        matches!(self.stage, Stage::Queued(_))
            && self.extra.as_ref().and_then(|extra| extra.expires).is_some_and(|at| Instant::now() >= at)
    }

    /// Takes the closure of a job that is queued, and the span it runs in.
    fn claim(&mut self) -> Option<Claimed<C>> {
        match mem::replace(&mut self.stage, Stage::Running) {
            Stage::Queued(call) => {
                Some(Claimed { call, span: self.extra.as_mut().and_then(|extra| extra.span.take()) })
            }
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// Puts a waiter in the place of the one before, which is returned, to be dropped outside of the lock.
    fn set_waiter(&mut self, waiter: Option<Waiter<T>>) -> Option<Waiter<T>> {
        if waiter.is_none() && self.extra.is_none() {
            return None;
        }
        mem::replace(&mut self.extra.get_or_insert_default().waiter, waiter)
    }

    /// Whether a job that has ended failed.
    fn failed(&self) -> Option<bool> {
        match &self.stage {
            Stage::Ended(outcome) => Some(outcome.is_err()),
            Stage::Taken(unrun) => Some(unrun.is_some()),
            Stage::Queued(_) | Stage::Running | Stage::Dropping(_) => None,
        }
    }
}

fn error_of(unrun: Unrun) -> JobError {
    match unrun {
        Unrun::Cancelled => JobError::Cancelled,
        Unrun::Expired => JobError::Expired,
        Unrun::Aborted => JobError::Aborted,
    }
}

fn unrun_of(error: &JobError) -> Option<Unrun> {
    match error {
        JobError::Cancelled => Some(Unrun::Cancelled),
        JobError::Expired => Some(Unrun::Expired),
        JobError::Aborted => Some(Unrun::Aborted),
        JobError::Panicked(_) | JobError::Draining => None,
    }
}

/// What the end of the job wakes or calls. A handle has one user, so a job has one waiter at most.
pub(crate) enum Waiter<T> {
    /// A thread in `join`.
    Thread(Thread),
    /// A task that polled the handle.
    Task(Waker),
    /// A callback, which takes the outcome.
    Callback(Callback<T>),
    /// A group of jobs that is waited for together, and the job's number in it.
    Group(Arc<dyn Audience>, usize),
}

/// A thread that waits for several jobs together, and knows each by a number.
pub(crate) trait Audience: Send + Sync {
    /// A job has ended, and whether it failed.
    fn ended(&self, number: usize, failed: bool);
}

pub(crate) type Callback<T> = Box<dyn FnOnce(Result<T, JobError>) + Send>;

/// The handle's side of a job.
pub(crate) trait Outlook<T>: Run {
    /// Takes the outcome of a job that has ended. Otherwise leaves what `waiter` returns, called under the job's lock,
    /// to be told of the end.
    fn take_or_wait(&self, waiter: &mut dyn FnMut() -> Option<Waiter<T>>) -> Option<Result<T, JobError>>;
    /// Leaves a waiter with a job that has not ended. Otherwise returns whether it failed.
    fn watch(&self, waiter: Waiter<T>) -> Result<(), bool>;
    /// Drops a waiter that was left.
    fn forget_waiter(&self);
    /// Drops the outcome of a job that has ended, for a handle that is dropped while the job may still be in the queue.
    fn forget_outcome(&self);
    /// Whether the job has ended, and if it has, whether it failed. Ends a job that waits beyond its deadline.
    fn ended(&self) -> Option<bool>;
    /// Whether the job has ended, and nothing else.
    fn has_ended(&self) -> bool;
    /// Runs the job if it is queued, for a worker of its pool that would wait for it. Returns whether it did.
    fn run_beside(&self, worker: &Worker) -> bool;
}

impl<C: Call<T>, T: Send> JobCell<C, T> {
    pub(crate) fn new(
        job: C,
        expires: Option<Instant>,
        span: Option<Span>,
        pool: PoolId,
        submitted_ns: u64,
    ) -> Self {
        let is_rare = expires.is_some() || span.is_some();
        let extra = is_rare.then(|| Box::new(Extra { expires, span, ..Extra::default() }));
        JobCell { state: Mutex::new(State { stage: Stage::Queued(job), extra }), pool, submitted_ns }
    }

    /// Takes the closure back out of a job that was refused.
    pub(crate) fn take_back(&self) -> C {
        lock(&self.state).claim().expect("a job that was refused has not run").call
    }

    /// See [`Run::run`].
    fn run_body(&self, job: Claimed<C>, account: &mut Account<'_>, orphaned: &dyn Fn() -> bool) -> bool {
        account.begin();
        let Claimed { call, span } = job;
        let call = || match span {
            None => call.call(),
            Some(span) => span.in_scope(|| call.call()),
        };
        let outcome =
            catch_unwind(AssertUnwindSafe(call)).map_err(|payload| JobError::Panicked(Panic::new(payload)));
        let ended = if outcome.is_ok() { Outcome::Completed } else { Outcome::Panicked };
        let mut state = lock(&self.state);
        let waiter = match state.set_waiter(None) {
            Some(Waiter::Callback(callback)) => {
                state.stage = Stage::Taken(None);
                drop(state);
                // The worker is busy with it as long as it lasts, so its time is the job's.
                quietly(|| callback(outcome));
                account.end(ended);
                return false;
            }
            waiter => waiter,
        };
        let failed = outcome.is_err();
        if orphaned() {
            drop(state);
            // No handle will ask for the outcome. Its destructor may take its time, which is the job's.
            quietly(|| drop(outcome));
            account.end(ended);
            return false;
        }
        // Counted first, so that a thread that is told finds it counted.
        account.end(ended);
        state.stage = Stage::Ended(outcome.map_err(Box::new));
        drop(state);
        let told = waiter.is_some();
        tell(waiter, failed);
        told || (mem::needs_drop::<T>() || failed) && orphaned()
    }

    /// Ends the job if it is queued. Returns why it ended unrun, if it did, now or before. `in_queue` says whether the
    /// job is left in the queue.
    fn end_unrun(&self, why: Unrun, in_queue: bool) -> Option<Unrun> {
        let mut state = lock(&self.state);
        let Some(job) = state.claim() else {
            return match &state.stage {
                Stage::Ended(Err(error)) => unrun_of(error),
                Stage::Taken(unrun) => *unrun,
                Stage::Dropping(unrun) => Some(*unrun),
                _ => None,
            };
        };
        state.stage = Stage::Dropping(why);
        drop(state);
        if let Some(pool) = identity::find(self.pool) {
            pool.count_unrun(why);
            if in_queue {
                pool.places.has_died();
            }
        }
        quietly(|| drop(job));
        let mut state = lock(&self.state);
        let waiter = match state.set_waiter(None) {
            Some(Waiter::Callback(callback)) => {
                state.stage = Stage::Taken(Some(why));
                drop(state);
                quietly(|| callback(Err(error_of(why))));
                return Some(why);
            }
            waiter => waiter,
        };
        state.stage = Stage::Ended(Err(Box::new(error_of(why))));
        drop(state);
        tell(waiter, true);
        Some(why)
    }

    /// Locks the state as it has to be at this time: not queued beyond the deadline.
    fn lock_in_time(&self) -> MutexGuard<'_, State<C, T>> {
        let state = lock(&self.state);
        if !state.is_late() {
            return state;
        }
        drop(state);
        self.end_unrun(Unrun::Expired, true);
        lock(&self.state)
    }
}

fn tell<T>(waiter: Option<Waiter<T>>, failed: bool) {
    match waiter {
        None => {}
        Some(Waiter::Thread(thread)) => thread.unpark(),
        Some(Waiter::Task(waker)) => quietly(|| waker.wake()),
        Some(Waiter::Group(audience, number)) => audience.ended(number, failed),
        Some(Waiter::Callback(_)) => unreachable!("a callback takes the outcome"),
    }
}

impl<C: Call<T>, T: Send> Cancel for JobCell<C, T> {
    fn is_requested(&self) -> bool {
        lock(&self.state).extra.as_ref().is_some_and(|extra| extra.cancel)
    }

    fn cancel(&self) -> bool {
        lock(&self.state).extra.get_or_insert_default().cancel = true;
        self.end_unrun(Unrun::Cancelled, true) == Some(Unrun::Cancelled)
    }
}

impl<C: Call<T>, T: Send> Expires for JobCell<C, T> {
    fn expire(&self) {
        drop(self.lock_in_time());
    }

    fn is_queued(&self) -> bool {
        matches!(lock(&self.state).stage, Stage::Queued(_))
    }
}

impl<C: Call<T>, T: Send> Run for JobCell<C, T> {
    fn run(&self, account: &mut Account<'_>, orphaned: &dyn Fn() -> bool) -> bool {
        let mut state = lock(&self.state);
        if state.is_late() {
            drop(state);
            self.end_unrun(Unrun::Expired, false);
        } else if let Some(job) = state.claim() {
            drop(state);
            return self.run_body(job, account, orphaned);
        } else {
            account.pool.places.dead_is_gone(1);
        }
        false
    }

    fn run_unqueued(&self, worker: &Worker) {
        let mut account = Account::beside(&worker.pool, &worker.cell, worker.watch, self.submitted_ns);
        let job = lock(&self.state).claim().expect("a job that was refused has not run");
        self.run_body(job, &mut account, &|| false);
    }

    fn abandon(&self) {
        self.end_unrun(Unrun::Aborted, false);
    }
}

impl<C: Call<T>, T: Send> Outlook<T> for JobCell<C, T> {
    fn take_or_wait(&self, waiter: &mut dyn FnMut() -> Option<Waiter<T>>) -> Option<Result<T, JobError>> {
        let mut state = self.lock_in_time();
        if matches!(state.stage, Stage::Ended(_)) {
            let Stage::Ended(outcome) = mem::replace(&mut state.stage, Stage::Taken(None)) else {
                unreachable!("it had ended under this lock");
            };
            state.stage = Stage::Taken(outcome.as_ref().err().and_then(|error| unrun_of(error)));
            return Some(outcome.map_err(|error| *error));
        }
        assert!(!matches!(state.stage, Stage::Taken(_)), "the outcome of this job was taken before");
        let before = state.set_waiter(waiter());
        drop(state);
        // Out of the lock: it may be a waker, whose destructor is not ours.
        quietly(|| drop(before));
        None
    }

    fn watch(&self, waiter: Waiter<T>) -> Result<(), bool> {
        let mut state = self.lock_in_time();
        if let Some(failed) = state.failed() {
            return Err(failed);
        }
        let before = state.set_waiter(Some(waiter));
        drop(state);
        quietly(|| drop(before));
        Ok(())
    }

    fn forget_waiter(&self) {
        let before = lock(&self.state).set_waiter(None);
        quietly(|| drop(before));
    }

    fn forget_outcome(&self) {
        let mut state = lock(&self.state);
        let unrun = match &state.stage {
            Stage::Ended(Err(error)) => unrun_of(error),
            Stage::Ended(Ok(_)) => None,
            _ => return,
        };
        let outcome = mem::replace(&mut state.stage, Stage::Taken(unrun));
        drop(state);
        quietly(|| drop(outcome));
    }

    fn ended(&self) -> Option<bool> {
        self.lock_in_time().failed()
    }

    fn has_ended(&self) -> bool {
        lock(&self.state).failed().is_some()
    }

    fn run_beside(&self, worker: &Worker) -> bool {
        let beside = worker.pool.count_beside();
        let claimed = self.lock_in_time().claim();
        let Some(job) = claimed else { return false };
        worker.pool.places.has_died();
        let mut account = Account::beside(&worker.pool, &worker.cell, worker.watch, self.submitted_ns);
        self.run_body(job, &mut account, &|| false);
        drop(beside);
        // Its place was taken as long as it ran: see `queue.rs`, the part on the bound.
        worker.pool.places.free();
        true
    }
}

/// What the queue of a pool holds: a job of any type. A small one lies in the queue itself.
pub(crate) struct Task<'a>(Slot<'a>);

enum Slot<'a> {
    Here(Value<dyn Work + 'a, ConstArrayBuf<usize, WORDS>>),
    There(Box<dyn Work + 'a>),
}

/// The words of a task that lies in the queue. One is for the pointer to its functions. With the tag and the time of
/// the submission an entry of the queue then takes 64 bytes, the size of a line of the cache.
const WORDS: usize = 6;

trait Work: Send {
    fn run(&mut self, account: &mut Account<'_>);
    fn abandon(&mut self, pool: &Identity);
    fn is_dead(&self) -> bool;
}

impl<'a> Task<'a> {
    /// A job that has a handle.
    pub(crate) fn handled(job: Arc<dyn Run>) -> Self {
        Task::here_or_there(Handled(Some(job)))
    }

    /// A job of a scope that has a handle.
    pub(crate) fn scoped(job: Arc<dyn Run + 'a>) -> Self {
        Task::here_or_there(ScopedHandled(Some(job)))
    }

    /// A job that has no handle.
    pub(crate) fn plain(job: Plain<impl Call<()> + 'a>) -> Self {
        Task::here_or_there(job)
    }

    /// The same for one that does not fit into the queue.
    pub(crate) fn boxed(job: Box<Plain<impl Call<()> + 'a>>) -> Self {
        Task(Slot::There(job))
    }

    /// The same job, to be run in this span.
    pub(crate) fn spanned(self, span: Option<Span>) -> Self {
        match span {
            None => self,
            Some(span) => Task(Slot::There(Box::new(Spanned { span, task: Box::new(self) }))),
        }
    }

    fn here_or_there<W: Work + 'a>(work: W) -> Self {
        if const { !fits::<W>() } {
            return Task(Slot::There(Box::new(work)));
        }
        match Value::new_stable(work, |work| work as &(dyn Work + 'a)) {
            Ok(here) => Task(Slot::Here(here)),
            Err(work) => Task(Slot::There(Box::new(work))),
        }
    }

    fn work(&mut self) -> &mut (dyn Work + 'a) {
        match &mut self.0 {
            Slot::Here(work) => &mut **work,
            Slot::There(work) => &mut **work,
        }
    }
}

/// Whether a job of this type lies in the queue itself. The size of a pointer is also its alignment.
pub(crate) const fn fits<W>() -> bool {
    size_of::<W>() <= (WORDS - 1) * size_of::<usize>() && align_of::<W>() <= align_of::<usize>()
}

/// A closure that has no handle.
pub(crate) struct Plain<C>(Option<C>);

impl<C> Plain<C> {
    pub(crate) fn new(job: C) -> Self {
        Plain(Some(job))
    }

    pub(crate) fn take_back(self) -> C {
        self.0.expect("a job that was refused has not run")
    }
}

/// A task that runs in a span of its submitter, for jobs without a handle.
struct Spanned<'a> {
    span: Span,
    task: Box<Task<'a>>,
}

impl Work for Spanned<'_> {
    fn run(&mut self, account: &mut Account<'_>) {
        self.span.in_scope(|| self.task.work().run(account));
    }

    fn abandon(&mut self, pool: &Identity) {
        self.task.work().abandon(pool);
    }

    fn is_dead(&self) -> bool {
        self.task.is_dead()
    }
}

impl<C: Call<()>> Plain<C> {
    /// Runs a job that was refused for want of room, for a worker of its pool.
    pub(crate) fn run_unqueued(mut self, worker: &Worker, submitted_ns: u64) {
        let mut account = Account::beside(&worker.pool, &worker.cell, worker.watch, submitted_ns);
        let returned = catch_unwind(AssertUnwindSafe(|| self.run(&mut account)));
        account.end_if_begun(outcome_of(returned));
    }
}

impl<C: Call<()>> Work for Plain<C> {
    fn run(&mut self, account: &mut Account<'_>) {
        account.begin();
        if let Some(job) = self.0.take() {
            job.call();
        }
    }

    fn abandon(&mut self, pool: &Identity) {
        // Counted first: a destructor may be slow, or panic.
        pool.count_unrun(Unrun::Aborted);
        drop(self.0.take());
    }

    fn is_dead(&self) -> bool {
        false
    }
}

/// The queue's reference to a job. If it is dropped the job ends as aborted, so that no thread waits for it for ever.
struct Handled(Option<Arc<dyn Run>>);

impl Work for Handled {
    fn run(&mut self, account: &mut Account<'_>) {
        if let Some(job) = self.0.take() {
            let run = |job: &Arc<dyn Run>, ours| job.run(account, &|| Arc::strong_count(job) <= ours);
            if current::with_job(job, run) {
                account.tarried();
            }
        }
    }

    fn abandon(&mut self, _pool: &Identity) {
        if let Some(job) = self.0.take() {
            job.abandon();
        }
    }

    fn is_dead(&self) -> bool {
        self.0.as_ref().is_none_or(|job| !job.is_queued())
    }
}

impl Drop for Handled {
    fn drop(&mut self) {
        if let Some(job) = self.0.take() {
            job.abandon();
        }
    }
}

/// As [`Handled`]. A job that borrows cannot be the thread's current one, which has no lifetime.
struct ScopedHandled<'a>(Option<Arc<dyn Run + 'a>>);

impl Work for ScopedHandled<'_> {
    fn run(&mut self, account: &mut Account<'_>) {
        if let Some(job) = self.0.take() {
            let tarried = job.run(account, &|| Arc::strong_count(&job) <= 1);
            drop(job);
            if tarried {
                account.tarried();
            }
        }
    }

    fn abandon(&mut self, _pool: &Identity) {
        if let Some(job) = self.0.take() {
            job.abandon();
        }
    }

    fn is_dead(&self) -> bool {
        self.0.as_ref().is_none_or(|job| !job.is_queued())
    }
}

impl Drop for ScopedHandled<'_> {
    fn drop(&mut self) {
        if let Some(job) = self.0.take() {
            job.abandon();
        }
    }
}

impl Job for Task<'_> {
    fn abandon(mut self, pool: &Identity) {
        self.work().abandon(pool);
    }

    fn is_dead(&self) -> bool {
        match &self.0 {
            Slot::Here(work) => work.is_dead(),
            Slot::There(work) => work.is_dead(),
        }
    }
}

/// Runs closures.
pub(crate) struct Runner;

impl<'a> Handler<Task<'a>> for Runner {
    fn run(&mut self, mut task: Task<'a>, turn: &mut Turn<'_, Task<'a>>) {
        task.work().run(&mut turn.account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_job_takes_64_bytes_of_the_queue() {
        assert_eq!(size_of::<super::super::queue::Queued<Task<'static>>>(), 64);
        let words = [7_usize; 4];
        let small = move || assert_eq!(words, [7; 4]);
        assert!(fits::<Handled>() && matches!(Task::plain(Plain::new(small)).0, Slot::Here(_)));
        let words = [7_usize; 5];
        let large = move || assert_eq!(words, [7; 5]);
        assert!(matches!(Task::plain(Plain::new(large)).0, Slot::There(_)));
    }

    #[test]
    fn a_job_that_needs_a_greater_alignment_does_not_lie_in_the_queue() {
        #[repr(align(16))]
        struct Aligned(u8);
        let aligned = Aligned(7);
        let job = move || {
            // All of it is captured, and not the number alone.
            let whole = &aligned;
            assert_eq!(whole.0, 7);
        };
        assert!(matches!(Task::plain(Plain::new(job)).0, Slot::There(_)));
    }
}
