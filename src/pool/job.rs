//! A closure on its way through a pool, and its outcome on the way back.
//!
//! One allocation holds both. The queue has one reference to it and the handle another; neither knows the
//! closure's type.
//!
//! # States
//!
//! Every change happens under the job's own lock, which is held for a few instructions and never while
//! anything of the user's runs.
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | queued | running | the worker that takes it |
//! | queued | ended, unrun | the handle: cancelled, or its deadline passed · the worker: its deadline passed · an abort |
//! | running | ended | its worker |
//! | ended | taken | the handle, which takes the outcome |
//!
//! There is one way out of *queued* for each job, so it is run or dropped unrun, never both, and whoever
//! made the change drops the closure. A job that ended unrun stays in the queue, empty, until a worker comes
//! to it; it is counted then, so that places, jobs and outcomes agree at every moment.
//!
//! Why nobody waits for ever. Whoever waits leaves a [`Waiter`] under the lock, having seen there that the
//! job has not ended; the end takes the waiter out under the same lock, and tells it. A job ends because it
//! is run, dropped unrun, or, if all else fails, when the queue's reference to it is dropped.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use super::crew::Ticket;
use super::current::{self, Identity};
use super::handle::JobError;
use super::panic_message;
use super::worker::{Handler, Job, Outcome, Turn, quietly};
use crate::sync::checked::thread::Thread;
use crate::sync::checked::{Mutex, MutexGuard, lock};

/// A closure and, later, its outcome.
///
/// With a small closure and a small result it takes 48 bytes, counts of references included: memory that one
/// thread takes and another gives back is most of what a small job costs.
pub(crate) struct JobCell<F, T> {
    state: Mutex<State<F, T>>,
}

struct State<F, T> {
    stage: Stage<F, T>,
    /// What most jobs never have.
    extra: Option<Box<Extra<T>>>,
}

struct Extra<T> {
    waiter: Option<Waiter<T>>,
    /// When it has waited too long.
    expires: Option<Instant>,
    /// Whether its cancellation was asked for; for the running job, if it cares to look.
    cancel: bool,
}

impl<T> Default for Extra<T> {
    fn default() -> Self {
        Extra { waiter: None, expires: None, cancel: false }
    }
}

impl<F, T> State<F, T> {
    fn expires(&self) -> Option<Instant> {
        self.extra.as_ref()?.expires
    }

    fn pending(&self) -> Pending {
        Pending { expires: self.expires().filter(|_| matches!(self.stage, Stage::Queued(_))) }
    }

    /// Whether it is queued beyond its deadline.
    fn is_late(&self) -> bool {
        matches!(self.stage, Stage::Queued(_))
            && self.expires().is_some_and(|expires| Instant::now() >= expires)
    }

    /// Tells whoever waits, when the job is about to be started, that its deadline will not end the wait any more:
    /// a wait without an end belongs on the list of waits.
    fn now_has_no_deadline(&self) {
        match self.extra.as_deref() {
            Some(Extra { expires: Some(_), waiter: Some(Waiter::Thread(thread, None)), .. }) => {
                thread.unpark();
            }
            Some(Extra { expires: Some(_), waiter: Some(Waiter::Group(audience, number)), .. }) => {
                audience.begun(*number);
            }
            _ => {}
        }
    }

    /// Puts a waiter in the place of the one before, which is returned, to be dropped outside of the lock.
    fn set_waiter(&mut self, waiter: Option<Waiter<T>>) -> Option<Waiter<T>> {
        if waiter.is_none() && self.extra.is_none() {
            return None;
        }
        mem::replace(&mut self.extra.get_or_insert_default().waiter, waiter)
    }
}

enum Stage<F, T> {
    Queued(F),
    Running,
    Ended(Result<T, Box<JobError>>),
    /// Its outcome has been taken. If it never ran, a worker still has to count it so.
    Taken(Option<Unrun>),
}

impl<F, T> Stage<F, T> {
    /// Whether a job that has ended failed.
    fn failed(&self) -> Option<bool> {
        match self {
            Stage::Ended(outcome) => Some(outcome.is_err()),
            Stage::Taken(unrun) => Some(unrun.is_some()),
            Stage::Queued(_) | Stage::Running => None,
        }
    }
}

/// Why a job ended without having been run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unrun {
    Cancelled,
    Expired,
    Aborted,
}

impl Unrun {
    fn error(self) -> JobError {
        match self {
            Unrun::Cancelled => JobError::Cancelled,
            Unrun::Expired => JobError::Expired,
            Unrun::Aborted => JobError::Aborted,
        }
    }

    fn outcome(self) -> Outcome {
        match self {
            Unrun::Cancelled => Outcome::Cancelled,
            Unrun::Expired => Outcome::Expired,
            Unrun::Aborted => Outcome::Aborted,
        }
    }
}

/// Whom to tell of the end. A handle has one user, so a job has one waiter at most.
pub(crate) enum Waiter<T> {
    /// A thread in `join`, and its entry in its pool's list of waits if it has one.
    Thread(Thread, Option<Listed>),
    /// A task that polled the handle.
    Task(Waker),
    /// A callback, which takes the outcome.
    Callback(Callback<T>),
    /// A group of jobs that is waited for together, and the job's number in it.
    Group(Arc<dyn Audience>, usize),
}

/// Whoever waits for several jobs together, and knows each by a number.
pub(crate) trait Audience: Send + Sync {
    /// A job that has a deadline has been started in time. Called under the job's lock.
    fn begun(&self, number: usize);
    /// A job has ended, and whether it failed.
    fn ended(&self, number: usize, failed: bool);
}

impl<T> Waiter<T> {
    /// The waiter without its entry in a list of waits; called under the job's lock.
    fn crossed_out(self) -> Self {
        match self {
            Waiter::Thread(thread, listed) => {
                drop(listed);
                Waiter::Thread(thread, None)
            }
            other => other,
        }
    }
}

pub(crate) type Callback<T> = Box<dyn FnOnce(Result<T, JobError>) + Send>;

/// An entry in a pool's list of waits, and where that is. It is crossed out when this is dropped, which is to be
/// done under the lock of what is waited for, so that the list is exact: see `crew.rs`.
pub(crate) struct Listed(pub(crate) Arc<Identity>, pub(crate) Ticket);

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.crew.wait_is_over(self.1);
    }
}

/// The worker's side of a job.
pub(crate) trait Run: Send + Sync {
    /// Runs the job, unless it has ended; counts it, then tells whoever waits. `orphaned` says whether nobody
    /// else has the job. Returns whether something of the user's may have run since it was counted, or may when the
    /// job is dropped.
    fn run(&self, turn: &mut Turn<'_, Task>, orphaned: &dyn Fn() -> bool) -> bool;
    /// Ends the job if it is still queued; calls `count` with how it ended before anyone is told.
    fn abandon(&self, count: &mut dyn FnMut(Outcome));
    /// Whether its cancellation was asked for.
    fn cancel_requested(&self) -> bool;
    /// Asks for its cancellation. Says whether that kept it from running.
    fn cancel(&self) -> bool;
}

/// Chooses whom to tell of the end of a job, if anyone, or why not to wait for it.
pub(crate) type Choose<'a, T> = dyn FnMut(&Pending) -> Result<Option<Waiter<T>>, JobError> + 'a;

/// The handle's side of a job.
pub(crate) trait Outlook<T>: Send + Sync {
    /// Takes the outcome of a job that has ended; otherwise asks `waiter`, under the job's lock, for whom to
    /// tell when it has. An error from `waiter` is passed on.
    fn take_or_wait(&self, waiter: &mut Choose<'_, T>) -> Option<Result<T, JobError>>;
    /// Leaves a waiter with a job that has not ended; otherwise says whether it failed.
    fn watch(&self, waiter: Waiter<T>) -> Result<Pending, bool>;
    /// Whether the job has ended, and if it has, whether it failed. Ends a job that waits beyond its deadline.
    fn ended(&self) -> Option<bool>;
    /// Whether the job has ended, and nothing else.
    fn has_ended(&self) -> bool;
    /// This job as its worker sees it.
    fn as_run(self: Arc<Self>) -> Arc<dyn Run>;
}

/// What is known of a job that has not ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    /// When it will have waited too long, if it has not been started by then.
    pub(crate) expires: Option<Instant>,
}

impl<F, T> JobCell<F, T>
where
    F: FnOnce() -> T + Send,
    T: Send,
{
    pub(crate) fn new(job: F, expires: Option<Instant>) -> Self {
        let extra = expires.map(|_| Box::new(Extra { expires, ..Extra::default() }));
        JobCell { state: Mutex::new(State { stage: Stage::Queued(job), extra }) }
    }

    /// Takes the closure back out of a job that was refused.
    pub(crate) fn take_back(&self) -> F {
        match mem::replace(&mut lock(&self.state).stage, Stage::Taken(None)) {
            Stage::Queued(job) => job,
            _ => unreachable!("what was refused has not run"),
        }
    }

    /// Locks the state as it has to be at this time: not queued beyond the deadline.
    fn lock_in_time(&self) -> MutexGuard<'_, State<F, T>> {
        let state = lock(&self.state);
        if !state.is_late() {
            return state;
        }
        drop(state);
        self.end_unrun(Unrun::Expired, &mut |_| ());
        lock(&self.state)
    }

    /// Takes the callback, if that is the waiter of the job that has just been run, and the outcome as taken.
    fn take_callback(&self) -> Option<Callback<T>> {
        let mut state = lock(&self.state);
        match state.set_waiter(None)? {
            Waiter::Callback(callback) => {
                state.stage = Stage::Taken(None);
                Some(callback)
            }
            other => {
                state.set_waiter(Some(other));
                None
            }
        }
    }

    /// Ends the job if it is queued. Returns why it ended unrun, if it did, now or before.
    fn end_unrun(&self, why: Unrun, count: &mut dyn FnMut(Outcome)) -> Option<Unrun> {
        let mut state = lock(&self.state);
        match &state.stage {
            Stage::Queued(_) => {}
            Stage::Ended(Err(error)) => {
                let unrun = error.unrun()?;
                count(unrun.outcome());
                return Some(unrun);
            }
            Stage::Taken(Some(unrun)) => {
                count(unrun.outcome());
                return Some(*unrun);
            }
            Stage::Running | Stage::Ended(Ok(_)) | Stage::Taken(None) => return None,
        }
        count(why.outcome());
        let before = mem::replace(&mut state.stage, Stage::Running);
        settle(state, Err(why.error()));
        // Out of the lock: a destructor may be anything.
        quietly(|| drop(before));
        Some(why)
    }
}

/// Puts the outcome where the handle finds it, and tells whoever waits. Says whether anyone did.
fn settle<F, T>(mut state: MutexGuard<'_, State<F, T>>, outcome: Result<T, JobError>) -> bool {
    let failed = outcome.is_err();
    let unrun = outcome.as_ref().err().and_then(JobError::unrun);
    let waiter = state.set_waiter(None);
    if let Some(Waiter::Callback(callback)) = waiter {
        state.stage = Stage::Taken(unrun);
        drop(state);
        quietly(|| callback(outcome));
        return true;
    }
    state.stage = Stage::Ended(outcome.map_err(Box::new));
    let waiter = waiter.map(Waiter::crossed_out);
    drop(state);
    match waiter {
        None => return false,
        Some(Waiter::Thread(thread, _)) => thread.unpark(),
        Some(Waiter::Task(waker)) => quietly(|| waker.wake()),
        Some(Waiter::Group(audience, number)) => audience.ended(number, failed),
        Some(Waiter::Callback(_)) => unreachable!("dealt with above"),
    }
    true
}

impl<F, T> Run for JobCell<F, T>
where
    F: FnOnce() -> T + Send,
    T: Send,
{
    fn run(&self, turn: &mut Turn<'_, Task>, orphaned: &dyn Fn() -> bool) -> bool {
        let job = {
            let mut state = lock(&self.state);
            if matches!(state.stage, Stage::Queued(_)) && !state.is_late() {
                state.now_has_no_deadline();
                match mem::replace(&mut state.stage, Stage::Running) {
                    Stage::Queued(job) => Some(job),
                    _ => unreachable!("it was queued under this lock"),
                }
            } else {
                None
            }
        };
        let Some(job) = job else {
            self.end_unrun(Unrun::Expired, &mut |outcome| turn.end(outcome));
            return true;
        };
        turn.begin();
        let outcome = catch_unwind(AssertUnwindSafe(job)).map_err(|payload| {
            let message = panic_message(&*payload).to_owned();
            quietly(|| drop(payload));
            JobError::Panicked(message)
        });
        let ended = if outcome.is_ok() { Outcome::Completed } else { Outcome::Panicked };
        if let Some(callback) = self.take_callback() {
            // The worker is busy with it as long as it lasts, so its time is the job's. (One that is hung on
            // between here and `settle` is called there, after the job was counted.)
            quietly(|| callback(outcome));
            turn.end(ended);
            return false;
        }
        if mem::needs_drop::<T>() && orphaned() {
            // Nobody will ask for the result, and its destructor may take its time: the job's.
            quietly(|| drop(outcome));
            turn.end(ended);
            return false;
        }
        // Counted first: whoever is told finds it counted.
        turn.end(ended);
        let told = settle(lock(&self.state), outcome);
        told || mem::needs_drop::<T>() && orphaned()
    }

    fn abandon(&self, count: &mut dyn FnMut(Outcome)) {
        self.end_unrun(Unrun::Aborted, count);
    }

    fn cancel_requested(&self) -> bool {
        lock(&self.state).extra.as_ref().is_some_and(|extra| extra.cancel)
    }

    fn cancel(&self) -> bool {
        lock(&self.state).extra.get_or_insert_default().cancel = true;
        self.end_unrun(Unrun::Cancelled, &mut |_| ()) == Some(Unrun::Cancelled)
    }
}

impl<F, T> Outlook<T> for JobCell<F, T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    fn take_or_wait(&self, waiter: &mut Choose<'_, T>) -> Option<Result<T, JobError>> {
        let mut state = self.lock_in_time();
        if matches!(state.stage, Stage::Ended(_)) {
            let Stage::Ended(outcome) = mem::replace(&mut state.stage, Stage::Taken(None)) else {
                unreachable!("it had ended under this lock");
            };
            state.stage = Stage::Taken(outcome.as_ref().err().and_then(|error| error.unrun()));
            return Some(outcome.map_err(|error| *error));
        }
        assert!(!matches!(state.stage, Stage::Taken(_)), "the outcome of this job was taken before");
        // One that awoke without an end waits anew, and must not stand in the list twice.
        let before = state.set_waiter(None).map(Waiter::crossed_out);
        let outcome = match waiter(&state.pending()) {
            Ok(waiter) => {
                state.set_waiter(waiter);
                None
            }
            Err(error) => Some(Err(error)),
        };
        drop(state);
        // Out of the lock: it may be a waker, whose destructor is not ours.
        drop(before);
        outcome
    }

    fn watch(&self, waiter: Waiter<T>) -> Result<Pending, bool> {
        let mut state = self.lock_in_time();
        if let Some(failed) = state.stage.failed() {
            return Err(failed);
        }
        let before = state.set_waiter(Some(waiter));
        let pending = state.pending();
        drop(state);
        drop(before);
        Ok(pending)
    }

    fn ended(&self) -> Option<bool> {
        self.lock_in_time().stage.failed()
    }

    fn has_ended(&self) -> bool {
        lock(&self.state).stage.failed().is_some()
    }

    fn as_run(self: Arc<Self>) -> Arc<dyn Run> {
        self
    }
}

/// A job as the queue holds it.
pub(crate) enum Task {
    /// There is a handle to it.
    Handled(Handled),
    /// There is none.
    Plain(Box<dyn RunOnce>),
}

/// The queue's reference to a job. If it is dropped the job ends as aborted, so that nobody waits for it for
/// ever.
pub(crate) struct Handled(Option<Arc<dyn Run>>);

impl Drop for Handled {
    fn drop(&mut self) {
        if let Some(job) = self.0.take() {
            job.abandon(&mut |_| ());
        }
    }
}

/// A closure that nobody has a handle to.
pub(crate) trait RunOnce: Send {
    fn run(self: Box<Self>);
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<F: FnOnce() + Send + 'static> RunOnce for F {
    fn run(self: Box<Self>) {
        self();
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Task {
    pub(crate) fn handled(job: Arc<dyn Run>) -> Self {
        Task::Handled(Handled(Some(job)))
    }

    pub(crate) fn plain<F: FnOnce() + Send + 'static>(job: F) -> Self {
        Task::Plain(Box::new(job))
    }

    /// Takes the closure back out of a plain job that was refused.
    pub(crate) fn take_back<F: 'static>(self) -> F {
        let Task::Plain(job) = self else { unreachable!("it went in as a plain job") };
        *job.into_any().downcast().expect("it went in with this type")
    }
}

impl Job for Task {
    fn abandon(self, count: &mut dyn FnMut(Outcome)) {
        match self {
            Task::Handled(mut handled) => {
                if let Some(job) = handled.0.take() {
                    job.abandon(count);
                }
            }
            Task::Plain(_closure) => count(Outcome::Aborted),
        }
    }
}

/// Runs closures.
pub(crate) struct Runner;

impl Handler<Task> for Runner {
    fn run(&mut self, task: Task, turn: &mut Turn<'_, Task>) {
        match task {
            Task::Handled(mut handled) => {
                if let Some(job) = handled.0.take() {
                    let tarried =
                        current::with_job(job, |job| job.run(turn, &|| Arc::strong_count(job) == 1));
                    if tarried {
                        turn.tarried();
                    }
                }
            }
            Task::Plain(job) => {
                turn.begin();
                current::with_plain_job(|| job.run());
            }
        }
    }
}

#[cfg(all(test, millpond_loom))]
mod model {
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use super::*;
    use crate::clock::Clock;
    use crate::pool::JobHandle;
    use crate::pool::queue::Queue;
    use crate::pool::worker::{self, Watch, WorkerCell};

    /// A pool without its threads: what they do, the model's threads do.
    struct Bench {
        pool: Arc<Identity>,
        queue: Queue<Task>,
    }

    impl Bench {
        fn new(workers: usize) -> Arc<Self> {
            let pool = Arc::new(Identity::new("model".to_owned()));
            (0..pool.crew.want(workers)).for_each(|_| pool.crew.enter());
            Arc::new(Bench { pool, queue: Queue::new(4, 0) })
        }

        fn make<T, F>(&self, job: F) -> (JobHandle<T>, Task)
        where
            T: Send + 'static,
            F: FnOnce() -> T + Send + 'static,
        {
            let job = Arc::new(JobCell::new(job, None));
            let task = Task::handled(Arc::clone(&job) as Arc<dyn Run>);
            (JobHandle { job, pool: self.pool.id }, task)
        }

        fn push(&self, task: Task) {
            assert!(self.queue.push(task, 1).is_ok(), "there is room");
        }

        fn submit<T, F>(&self, job: F) -> JobHandle<T>
        where
            T: Send + 'static,
            F: FnOnce() -> T + Send + 'static,
        {
            let (handle, task) = self.make(job);
            self.push(task);
            handle
        }

        /// Runs what is queued, as a worker does.
        fn work(&self) {
            let _current = current::enter(&self.pool);
            let (cell, watch) = (WorkerCell::new(), Watch { clock: Clock::start(), runs: false });
            while let Some(queued) = self.queue.try_take() {
                worker::run(&self.queue, watch, &cell, &mut Runner, queued, 1);
            }
        }
    }

    #[test]
    fn a_join_is_told_of_the_end_model() {
        loom::model(|| {
            let bench = Bench::new(1);
            let job = bench.submit(|| 7);
            let worker = thread::spawn({
                let bench = Arc::clone(&bench);
                move || bench.work()
            });
            assert_eq!(job.join(), Ok(7));
            worker.join().expect("the worker");
        });
    }

    #[test]
    fn a_job_is_run_or_cancelled_and_its_handle_says_which_model() {
        loom::model(|| {
            let bench = Bench::new(1);
            let ran = Arc::new(AtomicUsize::new(0));
            let seen = Arc::clone(&ran);
            let job = bench.submit(move || seen.fetch_add(1, Ordering::SeqCst));
            let token = job.cancel_token();
            let threads = [
                thread::spawn({
                    let bench = Arc::clone(&bench);
                    move || {
                        bench.work();
                        true
                    }
                }),
                thread::spawn(move || token.cancel()),
            ];
            let outcome = job.join();
            let [_, cancelled] = threads.map(|thread| thread.join().expect("a thread"));
            let expected = if cancelled { Err(JobError::Cancelled) } else { Ok(0) };
            assert_eq!((outcome, ran.load(Ordering::SeqCst)), (expected, usize::from(!cancelled)));
        });
    }

    #[test]
    fn a_callback_is_called_once_model() {
        loom::model(|| {
            let bench = Bench::new(1);
            let called = Arc::new(AtomicUsize::new(0));
            let (job, seen) = (bench.submit(|| 3), Arc::clone(&called));
            let worker = thread::spawn({
                let bench = Arc::clone(&bench);
                move || bench.work()
            });
            job.on_done(move |outcome| {
                assert_eq!(outcome, Ok(3));
                seen.fetch_add(1, Ordering::SeqCst);
            });
            worker.join().expect("the worker");
            assert_eq!(called.load(Ordering::SeqCst), 1);
        });
    }

    /// Two workers, each with a job that joins another that stands behind both: exactly one is told that this
    /// cannot end, and then everything ends.
    #[test]
    fn of_workers_that_wait_for_their_own_pool_exactly_one_is_told_model() {
        let mut model = loom::model::Builder::new();
        // Every interleaving with up to this many forced switches; without a bound there are too many.
        model.preemption_bound = Some(3);
        model.check(|| {
            let bench = Bench::new(2);
            let told = Arc::new(AtomicUsize::new(0));
            let ((one, first), (two, second)) = (bench.make(|| 5), bench.make(|| 5));
            for inner in [one, two] {
                let told = Arc::clone(&told);
                drop(bench.submit(move || {
                    // A wake-up without an end.
                    thread::current().unpark();
                    match inner.join() {
                        Ok(value) => assert_eq!(value, 5),
                        Err(error) => {
                            assert_eq!(error, JobError::Deadlock { pool: "model".to_owned() });
                            told.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                }));
            }
            bench.push(first);
            bench.push(second);
            let worker = thread::spawn({
                let bench = Arc::clone(&bench);
                move || bench.work()
            });
            bench.work();
            worker.join().expect("the worker");
            assert_eq!(told.load(Ordering::SeqCst), 1);
        });
    }
}
