//! Code of the pool's user that runs in places where it could do harm: in a job that another job joins, in a waker, in a
//! destructor, and in an iterator.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use millpond::{JobError, JobHandle, Pool, Rejected, Until, wait};

use crate::common::pools::{Bomb, Latch, all_asleep, held, pool_of, timed};
use crate::common::{PATIENCE, eventually};
use crate::{Log, in_time, join, submit};

/// Far more than a step needs that waits for nothing, and far less than [`PATIENCE`].
const SOON: Duration = Duration::from_secs(5);

// A job that another job of the only worker joins.

/// The only worker runs a job that joins another job. The worker runs that job too, which waits at the latch.
fn held_in_a_join() -> (Arc<Pool>, Latch) {
    let (pool, latch, (begin, begins)) = (Arc::new(pool_of(1, 16)), Latch::default(), mpsc::channel());
    let (inner, wait) = (Arc::clone(&pool), latch.clone());
    let joins = move || {
        let joined = submit(&inner, move || {
            begin.send(()).expect("the test waits");
            wait.wait();
        });
        assert_eq!(joined.join(), Ok(()));
    };
    pool.execute(joins).expect("room");
    begins.recv_timeout(PATIENCE).expect("the joined job runs");
    (pool, latch)
}

#[test]
fn a_drain_ends_at_its_timeout_while_a_joined_job_runs() {
    let (pool, latch) = held_in_a_join();
    let draining = Arc::clone(&pool);
    let (drained, took) = in_time("the drain", move || timed(|| draining.drain(Duration::from_millis(50))));
    assert!(took < SOON, "{took:?}");
    assert!(drained.running > 0 && !drained.is_clean(), "{drained:?}");
    latch.open();
    eventually("both jobs end", || (pool.stats().completed == 2).then_some(()));
}

#[test]
fn an_abort_returns_while_a_joined_job_runs() {
    let (pool, latch) = held_in_a_join();
    let aborted = Arc::clone(&pool);
    let aborted = in_time("the abort", move || aborted.abort());
    assert!(aborted.running > 0, "{aborted:?}");
    latch.open();
    eventually("both jobs end", || (pool.stats().completed == 2).then_some(()));
}

/// Runs a job that joins another job on the only worker. Returns what that other job returned.
fn in_a_joined_job<T: Send + 'static>(step: impl FnOnce(&Pool) -> T + Send + 'static) -> T {
    let pool = Arc::new(pool_of(1, 16));
    let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
    let joins = submit(&pool, move || submit(&outer, move || step(&inner)).join());
    join(joins).expect("the first job returns").expect("the joined job returns")
}

#[test]
fn a_joined_job_may_abort_its_pool() {
    let aborted = in_a_joined_job(Pool::abort);
    assert_eq!(aborted.dropped, 0, "{aborted:?}");
}

#[test]
fn a_joined_job_may_wait_until_its_pool_is_idle() {
    let (idle, took) = in_a_joined_job(|pool| timed(|| pool.wait_idle(PATIENCE)));
    assert!(idle && took < SOON, "{idle} after {took:?}");
}

/// Both jobs end on the stack of the first one. Nothing of them may stay in the queue until the worker comes to it.
#[test]
fn a_dropped_handle_of_a_joined_job_drops_its_result() {
    let (pool, witness) = (Arc::new(pool_of(1, 100)), Arc::new(()));
    let (inner, result) = (Arc::clone(&pool), Arc::clone(&witness));
    let job = submit(&pool, move || {
        for _ in 0..60 {
            let result = Arc::clone(&result);
            let mut jobs = [submit(&inner, move || result)];
            assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
        }
        Arc::strong_count(&result)
    });
    // The test and the job have one each.
    assert_eq!(join(job), Ok(2), "results are kept although no handle is left");
}

/// Counts its drops, and panics in each.
struct CountedBomb(Arc<AtomicUsize>);

impl Drop for CountedBomb {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
        resume_unwind(Box::new("a destructor"));
    }
}

/// A worker sweeps ended jobs out of the queue, as do `submit` and `stats`. No destructor of a result may run there.
#[test]
fn a_result_whose_destructor_panics_harms_neither_submit_nor_stats() {
    const JOBS: usize = 200;
    let (pool, drops, latch) = (Arc::new(pool_of(2, 1_000)), Arc::new(AtomicUsize::new(0)), Latch::default());
    let (other, (tell, told)) = (Latch::default(), mpsc::channel());
    let wait_for_others = other.clone();
    pool.execute(move || wait_for_others.wait()).expect("room");
    eventually("a worker is held", || (pool.stats().busy == 1).then_some(()));
    let (inner, counted, hold) = (Arc::clone(&pool), Arc::clone(&drops), latch.clone());
    let joins = move || {
        let ((begin, begins), wait_here) = (mpsc::channel(), hold.clone());
        let first = move || {
            begin.send(()).expect("the job waits");
            wait_here.wait();
        };
        inner.execute(first).expect("room");
        let submit_bomb = |_| {
            let bomb = CountedBomb(Arc::clone(&counted));
            submit(&inner, move || bomb)
        };
        let mut jobs: Vec<_> = (0..JOBS).map(submit_bomb).collect();
        // The other worker takes the first job, and with it the others to the front of the queue.
        other.open();
        begins.recv_timeout(PATIENCE).expect("the other worker goes on");
        assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
        drop(jobs);
        tell.send(()).expect("the test waits");
        hold.wait();
    };
    pool.execute(joins).expect("room");
    told.recv_timeout(PATIENCE).expect("the handles are dropped");
    assert_eq!(drops.load(Ordering::Acquire), JOBS, "each result is dropped with its handle");
    let last = submit(&pool, || 1);
    assert_eq!(pool.stats().queue_depth, 1);
    latch.open();
    assert_eq!(join(last), Ok(1));
}

// Wakers.

/// Calls a closure when it is woken for the first time.
struct OnWake<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send + 'static> OnWake<F> {
    fn waker(step: F) -> Waker {
        Waker::from(Arc::new(OnWake(Mutex::new(Some(step)))))
    }
}

impl<F: FnOnce() + Send + 'static> Wake for OnWake<F> {
    fn wake(self: Arc<Self>) {
        let step = self.0.lock().expect("no step panics under this lock").take();
        step.into_iter().for_each(|step| step());
    }
}

fn panicking_waker() -> Waker {
    OnWake::waker(|| resume_unwind(Box::new("a waker")))
}

/// Polls a future that is pending, and leaves the waker with it.
fn leave<F: Future + Unpin>(future: &mut F, waker: &Waker) {
    assert!(Pin::new(future).poll(&mut Context::from_waker(waker)).is_pending());
}

#[test]
fn a_task_that_is_not_polled_again_keeps_no_submitter_waiting() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    let mut never_again = Box::pin(pool.submit_async(|| 2));
    leave(&mut never_again, Waker::noop());
    let outcome = thread::scope(|scope| {
        let blocked = thread::Builder::new().name("behind-a-task".to_owned());
        let blocked = blocked.spawn_scoped(scope, || pool.submit_timeout(|| 3, PATIENCE)).expect("a thread");
        all_asleep("behind-a-task", 1);
        latch.open();
        blocked.join().expect("it returns")
    });
    assert_eq!((join(queued), join(outcome.expect("there is room"))), (Ok(1), Ok(3)));
}

#[test]
fn a_panicking_waker_of_a_submission_keeps_its_worker_and_the_job() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    let mut submission = Box::pin(pool.submit_async(|| 2));
    leave(&mut submission, &panicking_waker());
    latch.open();
    assert_eq!(join(queued), Ok(1));
    assert_eq!((join(submit(&pool, || 3)), pool.stats().workers), (Ok(3), 1));
}

#[test]
fn a_panicking_waker_in_a_cancel_reaches_neither_the_caller_nor_the_joiner() {
    let (pool, latch) = held(1, 1);
    let job = submit(&pool, || 1);
    let mut submission = Box::pin(pool.submit_async(|| 2));
    leave(&mut submission, &panicking_waker());
    assert!(job.cancel());
    assert_eq!((join(job), pool.stats().cancelled), (Err(JobError::Cancelled), 1));
    latch.open();
}

/// The waker is the last owner of its task, which owns the submission. So the wake-up drops the submission.
#[test]
fn a_waker_may_drop_its_submission() {
    type Submission = Pin<Box<dyn Future<Output = ()> + Send>>;
    struct Owner(Mutex<Option<Submission>>);
    impl Wake for Owner {
        fn wake(self: Arc<Self>) {}
    }
    let (pool, latch) = held(1, 1);
    let (queued, pool) = (submit(&pool, || 1), Arc::new(pool));
    let (inner, witness) = (Arc::clone(&pool), Arc::new(()));
    let captured = Arc::clone(&witness);
    let submission = async move { drop(inner.submit_async(move || drop(captured)).await) };
    let task = Arc::new(Owner(Mutex::new(Some(Box::pin(submission)))));
    leave(task.0.lock().expect("the task").as_mut().expect("a submission"), &Waker::from(Arc::clone(&task)));
    drop(task);
    latch.open();
    assert_eq!(join(queued), Ok(1));
    eventually("the submission is dropped", || (Arc::strong_count(&witness) == 1).then_some(()));
    assert_eq!(join(submit(&pool, || 2)), Ok(2), "the worker goes on");
}

/// A job that waits until its pool is idle runs the other job, whose waker drops the handle with the result.
#[test]
fn a_waker_may_drop_the_handle_with_a_result_whose_destructor_panics() {
    let (pool, latch) = (Arc::new(pool_of(1, 2)), Latch::default());
    let (inner, wait) = (Arc::clone(&pool), latch.clone());
    let waits = submit(&pool, move || {
        wait.wait();
        inner.wait_idle(PATIENCE)
    });
    let job = Arc::new(Mutex::new(Some(submit(&pool, || Bomb))));
    let dropped = Arc::clone(&job);
    let waker = OnWake::waker(move || drop(dropped.lock().expect("the handle").take()));
    leave(job.lock().expect("the handle").as_mut().expect("it is there"), &waker);
    latch.open();
    assert_eq!(join(waits), Ok(true));
    assert!(pool.wait_idle(SOON), "no job is left: {:?}", pool.stats());
}

/// The waker of the first job joins the second one on the worker, before the third one.
#[test]
fn a_job_that_a_waker_runs_is_in_no_other_jobs_duration() {
    const LONG: Duration = Duration::from_millis(100);
    let (pool, latch, begin) = (pool_of(1, 16), Latch::default(), Instant::now());
    let wait = latch.clone();
    let mut first = submit(&pool, move || wait.wait());
    let [second, third] = [(); 2].map(|()| submit(&pool, || thread::sleep(LONG)));
    leave(&mut first, &OnWake::waker(move || assert_eq!(second.join(), Ok(()))));
    latch.open();
    assert_eq!(join(third), Ok(()));
    let (in_jobs, elapsed) = (pool.stats().job_duration.sum(), begin.elapsed());
    assert!(in_jobs >= 2 * LONG && in_jobs <= elapsed, "{in_jobs:?} in jobs of one worker in {elapsed:?}");
}

// Destructors and deadlines.

/// Calls a closure when it is dropped.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn a_destructor_that_panics_does_not_end_the_watch_over_deadlines() {
    let (pool, latch) = held(1, 16);
    for _ in 0..3 {
        let bomb = OnDrop(|| resume_unwind(Box::new("a destructor")));
        let late = pool.with_deadline(Duration::from_millis(5)).try_submit(move || drop(bomb));
        drop(late.expect("room"));
        let (report, reports) = mpsc::channel();
        let late = pool.with_deadline(Duration::from_millis(10)).try_submit(|| ()).expect("room");
        late.on_done(move |outcome| report.send(outcome).expect("the test waits"));
        assert_eq!(reports.recv_timeout(SOON), Ok(Err(JobError::Expired)));
    }
    assert_eq!((pool.stats().expired, pool.stats().busy), (6, 1));
    latch.open();
}

/// The destructors run where the pool drops a closure or a result: on a worker, and on the thread that watches deadlines.
#[test]
fn a_destructor_may_submit_a_job_with_a_deadline() {
    const HOUR: Duration = Duration::from_secs(3600);
    let pool = Arc::new(pool_of(2, 10_000));
    let again = |pool: &Arc<Pool>| {
        let pool = Arc::downgrade(pool);
        OnDrop(move || {
            let pool = pool.upgrade().expect("the test has the pool");
            drop(pool.with_deadline(HOUR).try_submit(|| ()));
        })
    };
    let submitter = Arc::clone(&pool);
    in_time("the submissions", move || {
        for number in 0..2_000 {
            let (result, deadline) = (again(&submitter), if number % 2 == 0 { HOUR } else { Duration::ZERO });
            drop(submitter.with_deadline(deadline).try_submit(move || result));
        }
    });
    assert!(pool.wait_idle(PATIENCE));
    let stats = pool.stats();
    assert!(stats.completed > 0 && stats.submitted == stats.completed + stats.expired, "{stats:?}");
}

#[test]
fn a_blocked_submission_ends_at_the_jobs_deadline() {
    const DEADLINE: Duration = Duration::from_millis(30);
    let (pool, latch) = held(1, 1);
    let (queued, pool) = (submit(&pool, || 1), Arc::new(pool));
    let submitter = Arc::clone(&pool);
    let submission = move || timed(|| submitter.with_deadline(DEADLINE).submit(|| 2));
    let (refused, took) = in_time("the submission", submission);
    assert!(matches!(refused, Err(Rejected::Full(_))), "there was no room");
    assert!(took >= DEADLINE && took < SOON, "{took:?}");
    latch.open();
    assert_eq!(join(queued), Ok(1));
}

/// The destructor of the job's closure cancels the job once more.
#[test]
fn a_cancel_inside_of_a_cancel_says_that_the_job_will_not_run() {
    let (pool, latch) = held(1, 16);
    let (token, log) = (Arc::new(Mutex::new(None::<millpond::CancelToken>)), Log::default());
    let (again, answers) = (Arc::clone(&token), log.clone());
    let cancels = OnDrop(move || {
        let token = again.lock().expect("the token").take().expect("it is there");
        answers.push(usize::from(token.cancel()));
    });
    let job: JobHandle<()> = submit(&pool, move || drop(cancels));
    *token.lock().expect("the token") = Some(job.cancel_token());
    assert!(job.cancel());
    assert_eq!((log.read(), join(job)), (vec![1], Err(JobError::Cancelled)));
    assert_eq!(pool.stats().cancelled, 1);
    latch.open();
}

// Iterators.

#[test]
fn execute_all_starts_the_first_job_before_it_draws_the_second() {
    let pool = pool_of(1, 16);
    let (report, reports) = mpsc::channel();
    let jobs = (0..2).map(move |number| {
        if number == 1 {
            reports.recv_timeout(PATIENCE).expect("the first job runs");
        }
        let report = report.clone();
        move || _ = report.send(())
    });
    assert!(matches!(in_time("the submission", move || pool.execute_all(jobs)), Ok(2)));
}
