//! The pool's promises to the submitter of a job: every job has an outcome, and every wait for one ends.

mod common;

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::pools::{Bomb, Latch, all_asleep, broken_law, held, pool_of, timed};
use common::{PATIENCE, eventually};
use millpond::{CancelToken, JobError, JobHandle, MapError, Pool, Rejected, Until, as_completed, wait};

/// Submits a job that must find room at once.
fn submit<T: Send + 'static>(pool: &Pool, job: impl FnOnce() -> T + Send + 'static) -> JobHandle<T> {
    pool.try_submit(job).expect("there is room")
}

/// The message of the panic with which a job ended.
fn panic_of<T: std::fmt::Debug>(outcome: Result<T, JobError>) -> String {
    match outcome {
        Err(JobError::Panicked(panic)) => panic.message().to_owned(),
        other => panic!("no panic: {other:?}"),
    }
}

/// Joins a job. If the job does not end, the test fails and does not hang.
fn join<T: Send + 'static>(job: JobHandle<T>) -> Result<T, JobError> {
    job.join_timeout(PATIENCE).expect("the job ends in time")
}

/// A worker or another thread may still have work for a job that was counted.
#[test]
fn work_after_a_job_was_counted_is_not_the_next_jobs_time() {
    const LONG: Duration = Duration::from_millis(500);
    struct Slow;
    impl Drop for Slow {
        fn drop(&mut self) {
            thread::sleep(LONG);
        }
    }
    /// Drops the handle that was polled with this waker.
    struct Forgetful(Mutex<Option<JobHandle<Slow>>>);
    impl std::task::Wake for Forgetful {
        fn wake(self: Arc<Self>) {
            drop(self.0.lock().expect("the handle").take());
        }
    }
    /// Takes long to wake its task.
    struct Sleepy;
    impl std::task::Wake for Sleepy {
        fn wake(self: Arc<Self>) {
            thread::sleep(LONG);
        }
    }
    fn poll<T: Send + 'static>(
        handle: &mut JobHandle<T>,
        wakes: Arc<impl std::task::Wake + Send + Sync + 'static>,
    ) {
        let waker = std::task::Waker::from(wakes);
        assert!(Pin::new(handle).poll(&mut std::task::Context::from_waker(&waker)).is_pending());
    }
    /// Gives the only worker the work that `leave` adds, and then one more job. On a busy machine any job may last
    /// long, so it is enough if one round of five has no long job.
    fn next_pays_nothing(what: &str, mut leave: impl FnMut(&Pool)) {
        let mut excess = || {
            let start = Instant::now();
            let (pool, latch) = held(1, 10);
            leave(&pool);
            let next = submit(&pool, || ());
            latch.open();
            // Only the held job may have a long duration.
            let held_for = start.elapsed();
            join(next).expect("it returns");
            pool.stats().job_duration.sum().saturating_sub(held_for)
        };
        let rounds: Vec<_> =
            (0..5).map_while(|_| Some(excess()).filter(|excess| *excess >= LONG / 2)).collect();
        assert!(rounds.len() < 5, "{what}: jobs lasted too long by {rounds:?}");
    }
    // The callback of a job that has expired. The test waits until the deadline has passed.
    next_pays_nothing("a late job's callback", |pool| {
        let deadline = Duration::from_millis(100);
        pool.with_deadline(deadline).try_submit(|| ()).expect("room").on_done(|_| thread::sleep(LONG));
        thread::sleep(deadline);
    });
    // The destructor of a result, when the handle is dropped after the worker has counted the job.
    next_pays_nothing("a result's destructor", |pool| {
        let mut handle = submit(pool, || Slow);
        let forgetful = Arc::new(Forgetful(Mutex::new(None)));
        poll(&mut handle, Arc::clone(&forgetful));
        *forgetful.0.lock().expect("the handle") = Some(handle);
    });
    // The wake-up of a task that awaits a job, after the worker has counted the job.
    let mut awaited = Vec::new();
    next_pays_nothing("a wake-up", |pool| {
        awaited.push(submit(pool, || ()));
        let handle = awaited.last_mut().expect("it is there");
        poll(handle, Arc::new(Sleepy));
    });
}

#[test]
fn the_time_of_a_callback_counts_as_its_jobs_time() {
    const LONG: Duration = Duration::from_millis(100);
    let (pool, latch) = (pool_of(1, 10), Latch::default());
    let wait_here = latch.clone();
    submit(&pool, move || wait_here.wait()).on_done(|_| thread::sleep(LONG));
    latch.open();
    eventually("it is counted", || (pool.stats().completed == 1).then_some(()));
    // The pool's clock and the one that `sleep` uses may differ by a little.
    let sum = pool.stats().job_duration.sum();
    assert!(sum >= LONG * 9 / 10, "{sum:?}");
}

#[test]
fn printing_a_handle_does_not_change_its_job() {
    let (pool, latch) = held(1, 10);
    let captured = Arc::new(());
    let inside = Arc::clone(&captured);
    let job = submit(&pool, move || drop(inside));
    assert_eq!(format!("{job:?}"), "JobHandle { ended: false, .. }");
    assert_eq!(Arc::strong_count(&captured), 2, "the pool still has the closure");
    assert!(job.cancel());
    assert_eq!(
        (format!("{job:?}").as_str(), Arc::strong_count(&captured)),
        ("JobHandle { ended: true, .. }", 1)
    );
    latch.open();
}

#[test]
fn a_refusal_can_be_sent_and_shared_without_its_job() {
    fn ask(pool: &Pool) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let cell = std::cell::Cell::new(5);
        Ok(pool.submit(move || cell.get()).map_err(Rejected::without_job)?.join()?)
    }
    let pool = pool_of(1, 10);
    assert_eq!(ask(&pool).expect("it is admitted"), 5);
    pool.drain(PATIENCE);
    assert_eq!(ask(&pool).expect_err("the pool drains").to_string(), "the pool is draining");
}

#[test]
fn a_join_brings_the_result() {
    let pool = pool_of(2, 10);
    let word = submit(&pool, || "done".to_owned());
    assert_eq!(word.join(), Ok("done".to_owned()));
    let ended = submit(&pool, || 5);
    eventually("it ended", || ended.is_finished().then_some(()));
    assert_eq!(ended.join(), Ok(5), "a join works after the job has ended");
}

#[test]
fn a_joined_job_is_counted() {
    let pool = pool_of(3, 10);
    for round in 1..=2_000 {
        submit(&pool, || {}).join().expect("it returns");
        let stats = pool.stats();
        assert_eq!((stats.completed, stats.busy, broken_law(&stats)), (round, 0, None));
    }
}

#[test]
fn a_panic_comes_back_with_its_message() {
    let pool = pool_of(1, 10);
    let literal = submit(&pool, || -> u32 { panic!("out of cheese") });
    assert_eq!(panic_of(literal.join()), "out of cheese");
    let number = 7;
    let formatted = submit(&pool, move || -> u32 { panic!("no {number}") });
    let error = formatted.join().expect_err("it panicked");
    assert_eq!(error.to_string(), "the job panicked: no 7");
    let other = submit(&pool, || std::panic::panic_any(7_u64));
    assert!(panic_of(other.join()).contains("no text"));
    assert_eq!((pool.stats().panicked, submit(&pool, || 1).join()), (3, Ok(1)));
}

#[test]
fn a_dropped_handle_lets_the_job_run() {
    let (pool, latch) = held(1, 10);
    let ran = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ran);
    drop(submit(&pool, move || seen.store(true, Ordering::Release)));
    latch.open();
    assert_eq!(pool.drain(PATIENCE).stats.completed, 2);
    assert!(ran.load(Ordering::Acquire));
}

#[test]
fn a_result_whose_destructor_panics_harms_no_other_job() {
    let pool = pool_of(1, 10);
    drop(submit(&pool, || Bomb));
    assert_eq!(join(submit(&pool, || 3)), Ok(3));
    assert_eq!((pool.stats().completed, pool.stats().panicked), (2, 0));
}

#[test]
fn join_timeout_gives_the_handle_back_until_the_job_has_ended() {
    let (pool, latch) = held(1, 10);
    let job = submit(&pool, || 9);
    let (job, took) = timed(|| job.join_timeout(Duration::from_millis(40)).expect_err("the worker is held"));
    assert!(took >= Duration::from_millis(40), "{took:?}");
    let job = job.join_timeout(Duration::ZERO).expect_err("still held");
    latch.open();
    assert_eq!(join(job), Ok(9));
}

#[test]
fn a_cancelled_job_that_waits_never_runs_and_is_dropped_at_once() {
    let (pool, latch) = held(1, 10);
    let witness = Arc::new(());
    let inside = Arc::clone(&witness);
    let job = submit(&pool, move || drop(inside));
    assert!(job.cancel());
    assert_eq!(Arc::strong_count(&witness), 1, "its closure is gone");
    assert!(job.is_finished() && job.cancel(), "the job stays cancelled");
    assert_eq!(job.join(), Err(JobError::Cancelled));
    assert_eq!((pool.stats().queue_depth, pool.stats().cancelled), (0, 1), "it is counted at once");
    latch.open();
    let stats = pool.drain(PATIENCE).stats;
    assert_eq!((stats.cancelled, stats.completed, broken_law(&stats)), (1, 1, None));
}

#[test]
fn a_running_job_sees_its_cancellation() {
    assert!(CancelToken::current().is_none(), "the test's thread runs no job");
    let pool = pool_of(1, 10);
    let (running, started) = mpsc::channel();
    let job = submit(&pool, move || {
        let token = CancelToken::current().expect("this is a job");
        assert!(!token.is_cancelled());
        running.send(()).expect("the test waits");
        eventually("the job is cancelled", || token.is_cancelled().then_some("stopped early"))
    });
    started.recv().expect("it runs");
    let from_elsewhere = job.cancel_token();
    let canceller = thread::spawn(move || from_elsewhere.cancel());
    assert_eq!(job.join(), Ok("stopped early"));
    assert!(!canceller.join().expect("the canceller"), "the job was running already");
    assert_eq!((pool.stats().cancelled, pool.stats().completed), (0, 1));
}

#[test]
fn the_running_job_sees_an_abort_and_the_waiting_jobs_end() {
    let pool = pool_of(1, 10);
    let latch = Latch::default();
    let wait = latch.clone();
    let running = submit(&pool, move || {
        let token = CancelToken::current().expect("this is a job");
        eventually("the job is cancelled", || token.is_cancelled().then_some(()));
        // The job is still running when `abort` counts the running jobs.
        wait.wait();
    });
    eventually("it runs", || (pool.stats().busy == 1).then_some(()));
    let (waiting, cancelled) = (submit(&pool, || {}), submit(&pool, || {}));
    cancelled.cancel();
    let aborted = pool.abort();
    // The cancelled job was counted before the abort.
    assert_eq!((aborted.dropped, aborted.cancelled, aborted.running), (1, 0, 1));
    assert_eq!((aborted.stats.aborted, aborted.stats.cancelled), (1, 1));
    assert_eq!((join(waiting), join(cancelled)), (Err(JobError::Aborted), Err(JobError::Cancelled)));
    latch.open();
    assert_eq!(join(running), Ok(()));
}

#[test]
fn the_callback_runs_on_the_thread_that_ends_the_job() {
    let (pool, latch) = held(1, 10);
    let (report, reports) = mpsc::channel();
    let reporting = |what: &'static str| {
        let report = report.clone();
        move |outcome: Result<u32, JobError>| {
            let thread = thread::current().name().map(str::to_owned);
            report.send((what, outcome, thread)).expect("the test waits");
        }
    };
    let here = thread::current().name().map(str::to_owned);
    let (run, cancelled) = (submit(&pool, || 1), submit(&pool, || 2));
    let token = cancelled.cancel_token();
    run.on_done(reporting("run"));
    cancelled.on_done(reporting("cancelled"));
    assert!(token.cancel());
    assert_eq!(reports.try_recv(), Ok(("cancelled", Err(JobError::Cancelled), here.clone())));
    latch.open();
    let worker = Some("mill-test-0".to_owned());
    assert_eq!(reports.recv_timeout(PATIENCE), Ok(("run", Ok(1), worker)));
    let ended = submit(&pool, || 3);
    eventually("it ended", || ended.is_finished().then_some(()));
    ended.on_done(reporting("ended"));
    assert_eq!(reports.try_recv(), Ok(("ended", Ok(3), here)));
    // A callback that panics harms no other job.
    submit(&pool, || 4).on_done(|_| panic!("a callback"));
    assert_eq!(join(submit(&pool, || 5)), Ok(5));
}

#[test]
fn a_job_that_waits_longer_than_its_deadline_expires_unrun() {
    let (pool, latch) = held(1, 10);
    let ran = Arc::new(AtomicUsize::new(0));
    let with = |deadline: Duration| {
        let ran = Arc::clone(&ran);
        let job = move || ran.fetch_add(1, Ordering::Relaxed);
        pool.with_deadline(deadline).try_submit(job).expect("room")
    };
    let [late, joined, asked, in_time] = [
        with(Duration::from_millis(30)),
        with(Duration::from_millis(30)),
        with(Duration::ZERO),
        with(PATIENCE),
    ];
    // The join returns at the deadline, although the only worker is held all the while.
    let (outcome, took) = timed(|| joined.join());
    assert_eq!(outcome, Err(JobError::Expired));
    assert!(took < PATIENCE / 2, "{took:?}");
    assert!(asked.is_finished());
    latch.open();
    assert_eq!(in_time.join(), Ok(0));
    assert_eq!((late.join(), asked.join()), (Err(JobError::Expired), Err(JobError::Expired)));
    let stats = pool.drain(PATIENCE).stats;
    assert_eq!((stats.expired, stats.completed, broken_law(&stats)), (3, 2, None));
    assert_eq!(ran.load(Ordering::Relaxed), 1);
}

#[test]
fn groups_learn_of_a_deadline_in_time() {
    let (pool, latch) = held(1, 10);
    let late = || pool.with_deadline(Duration::from_millis(20)).try_submit(|| {}).expect("room");
    let mut jobs = [late(), late()];
    assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
    let (outcomes, took) = timed(|| as_completed([late(), late()]).map(|(_, end)| end).collect::<Vec<_>>());
    assert_eq!(outcomes, [Err(JobError::Expired), Err(JobError::Expired)]);
    assert!(took < PATIENCE / 2, "{took:?}");
    latch.open();
}

#[test]
fn a_job_without_a_handle_sees_an_abort_too() {
    let pool = pool_of(1, 10);
    let (report, reports) = mpsc::channel();
    pool.execute(move || {
        let token = CancelToken::current().expect("this is a job");
        report.send(false).expect("the test waits");
        eventually("the job is cancelled", || token.is_cancelled().then_some(()));
        report.send(token.cancel()).expect("the test waits");
    })
    .expect("room");
    assert_eq!(reports.recv_timeout(PATIENCE), Ok(false));
    pool.abort();
    assert_eq!(reports.recv_timeout(PATIENCE), Ok(false), "cancelled by the abort, not by `cancel`");
}

#[test]
fn the_destructor_of_an_unwanted_result_is_part_of_its_job() {
    struct Slow(Latch);
    impl Drop for Slow {
        fn drop(&mut self) {
            self.0.wait();
        }
    }
    let (pool, latch) = (pool_of(1, 10), Latch::default());
    let result = Slow(latch.clone());
    let (dropped, seen) = mpsc::channel();
    let job = submit(&pool, move || {
        seen.recv().expect("the handle is dropped first");
        result
    });
    drop(job);
    dropped.send(()).expect("it waits");
    eventually("the destructor runs", || {
        let stats = pool.stats();
        (stats.longest_running > Duration::from_millis(20)).then_some(())
    });
    assert_eq!((pool.stats().busy, pool.stats().completed), (1, 0));
    latch.open();
    assert_eq!(pool.drain(PATIENCE).stats.completed, 1);
}

#[test]
fn a_deadline_does_not_stop_a_job_that_runs() {
    let pool = pool_of(1, 10);
    // On a busy machine the job may not start within its deadline. Then it never runs, and the next job has longer.
    for deadline in [50, 500, 5_000].map(Duration::from_millis) {
        let started = Arc::new(AtomicBool::new(false));
        let starts = Arc::clone(&started);
        let job = pool.with_deadline(deadline).submit(move || {
            starts.store(true, Ordering::Release);
            thread::sleep(deadline + Duration::from_millis(30));
            "finished"
        });
        let outcome = job.expect("room").join();
        if started.load(Ordering::Acquire) {
            assert_eq!(outcome, Ok("finished"));
            return;
        }
        assert_eq!(outcome, Err(JobError::Expired));
    }
    panic!("no job was started within 5 s");
}

#[test]
fn a_worker_may_wait_for_its_own_pool_while_another_is_free() {
    let pool = Arc::new(pool_of(2, 10));
    let inner = Arc::clone(&pool);
    let job = submit(&pool, move || submit(&inner, || 8).join());
    assert_eq!(join(job), Ok(Ok(8)));
    // A worker may always wait for another pool.
    let (one, other) = (pool_of(1, 10), Arc::new(pool_of(1, 10)));
    assert_eq!(join(submit(&one, move || submit(&other, || 9).join())), Ok(Ok(9)));
}

fn named(name: &str, workers: usize, queue_capacity: usize) -> Arc<Pool> {
    let builder = Pool::builder(name).workers(workers).queue_capacity(queue_capacity);
    Arc::new(builder.build().expect("the threads"))
}

/// Any code may unpark a thread, and std's own channels do.
#[test]
fn a_wake_up_before_the_end_ends_no_join() {
    let pool = named("unpark", 3, 10);
    for _ in 0..3 {
        let (latch, inner) = (Latch::default(), Arc::clone(&pool));
        let wait = latch.clone();
        let (started, has_started) = mpsc::channel();
        let outer = submit(&pool, move || {
            let held = submit(&inner, move || {
                started.send(()).expect("the outer job waits");
                wait.wait();
            });
            // Another worker runs the job, so this worker does not run it in the join.
            has_started.recv().expect("it starts");
            thread::current().unpark();
            held.join()
        });
        eventually("both run", || (pool.stats().busy == 2).then_some(()));
        all_asleep("mill-unpark-", 3);
        latch.open();
        assert_eq!(join(outer), Ok(Ok(())));
    }
    pool.resize(1).expect("fewer workers need no new thread");
    eventually("two workers have left", || (pool.stats().workers == 1).then_some(()));
}

#[test]
fn a_pool_that_shrinks_while_a_worker_waits_for_it_runs_every_job() {
    let pool = Arc::new(Pool::builder("last").workers(2).queue_capacity(10).build().expect("threads"));
    let (latch, inner) = (Latch::default(), Arc::clone(&pool));
    let wait = latch.clone();
    let (started, has_started) = mpsc::channel();
    let outer = submit(&pool, move || {
        let first = submit(&inner, move || {
            started.send(()).expect("the outer job waits");
            wait.wait();
        });
        has_started.recv().expect("it starts");
        let second = submit(&inner, || 5);
        (second.join(), first.join())
    });
    // One worker is held. The other has run the second job itself, and waits for the held one.
    eventually("both workers are busy", || (pool.stats().busy == 2).then_some(()));
    all_asleep("mill-last-", 2);
    pool.resize(1).expect("fewer workers need no new thread");
    latch.open();
    assert_eq!(join(outer), Ok((Ok(5), Ok(()))));
    eventually("one worker has left", || {
        drop(submit(&pool, || {}));
        (pool.stats().workers == 1).then_some(())
    });
}

#[test]
fn as_completed_gives_outcomes_in_the_order_of_their_ends() {
    let pool = pool_of(3, 10);
    let latches: Vec<_> = (0..3).map(|_| Latch::default()).collect();
    let jobs = latches.iter().cloned().enumerate().map(|(number, latch)| {
        submit(&pool, move || {
            latch.wait();
            assert_ne!(number, 2, "the last one panics");
            number * 10
        })
    });
    let mut outcomes = as_completed(jobs);
    assert_eq!(outcomes.len(), 3);
    latches[1].open();
    assert_eq!(outcomes.next(), Some((1, Ok(10))));
    latches[2].open();
    assert!(matches!(outcomes.next(), Some((2, Err(JobError::Panicked(_))))));
    latches[0].open();
    assert_eq!((outcomes.len(), outcomes.next(), outcomes.next()), (1, Some((0, Ok(0))), None));
}

#[test]
fn wait_waits_for_the_first_the_first_failed_or_all() {
    let (pool, latch) = held(1, 10);
    let mut jobs = [submit(&pool, || 1), submit(&pool, || 2)];
    let (all, took) = timed(|| wait(&mut jobs, Until::AllCompleted, Duration::from_millis(30)));
    assert!(!all);
    assert!(took >= Duration::from_millis(30));
    jobs[0].cancel();
    assert!(wait(&mut jobs, Until::FirstCompleted, PATIENCE));
    assert!(wait(&mut jobs, Until::FirstFailed, PATIENCE));
    assert!(!wait(&mut jobs, Until::AllCompleted, Duration::ZERO));
    latch.open();
    assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
    assert_eq!(jobs.map(JobHandle::join), [Err(JobError::Cancelled), Ok(2)]);
    // If no job fails, the wait returns when all jobs have ended.
    let mut jobs = [submit(&pool, || 1), submit(&pool, || 2)];
    assert!(wait(&mut jobs, Until::FirstFailed, PATIENCE));
    assert!(jobs.iter().all(JobHandle::is_finished));
    assert!(wait::<()>(&mut [], Until::AllCompleted, Duration::ZERO));
    // The end of one job that did not fail is not the end of all.
    let latch = Latch::default();
    let wait_here = latch.clone();
    let mut jobs = [submit(&pool, || ()), submit(&pool, move || wait_here.wait())];
    assert!(wait(&mut jobs, Until::FirstCompleted, PATIENCE));
    assert!(!wait(&mut jobs, Until::FirstFailed, Duration::from_millis(30)));
    latch.open();
}

#[test]
fn a_worker_may_wait_for_a_group_that_another_runs() {
    let pool = Arc::new(pool_of(2, 10));
    let inner = Arc::clone(&pool);
    let job = submit(&pool, move || {
        let jobs = (0..5).map(|number| submit(&inner, move || number));
        as_completed(jobs).map(|(_, end)| end).collect::<Result<Vec<_>, _>>()
    });
    assert_eq!(join(job), Ok(Ok(vec![0, 1, 2, 3, 4])));
}

#[test]
fn map_keeps_the_order_and_looks_no_further_ahead_than_it_may() {
    let pool = pool_of(4, 3);
    let pulled = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&pulled);
    let items = (0_u64..).inspect(move |_| {
        counting.fetch_add(1, Ordering::Relaxed);
    });
    let mut results = pool
        .map(items, |n| {
            thread::sleep(Duration::from_micros(n * 7919 % 1000));
            n * n
        })
        .look_ahead(6);
    assert_eq!(pulled.load(Ordering::Relaxed), 0, "the test has not asked for a result");
    for n in 0..500 {
        assert_eq!(results.next(), Some(Ok(n * n)));
        let ahead = pulled.load(Ordering::Relaxed) - usize::try_from(n).expect("small") - 1;
        assert!(ahead <= 6, "{ahead} ahead of the {n}th");
    }
}

#[test]
fn map_counts_no_item_as_rejected_that_it_submits_later() {
    let pool = pool_of(2, 1);
    assert!(pool.map(0..1000, |n| n).look_ahead(8).enumerate().all(|(n, result)| result == Ok(n)));
    assert_eq!(pool.stats().rejected_full, 0);
}

#[test]
fn map_reports_each_item_that_fails_and_goes_on() {
    let pool = pool_of(2, 10);
    let results: Vec<_> = pool
        .map(0..10, |n| {
            assert_ne!(n % 4, 3, "bad item");
            n
        })
        .collect();
    for (n, result) in results.iter().enumerate() {
        let failed = matches!(result, Err(MapError { item, error: JobError::Panicked(panic), .. })
            if *item == n && panic.message().contains("bad item"));
        assert!(failed == (n % 4 == 3) && (failed || *result == Ok(n)), "{n}: {result:?}");
    }
    pool.drain(PATIENCE);
    let mut drained = pool.map(0..2, |n| n);
    let error = drained.next().expect("an error").expect_err("the pool drains");
    assert_eq!((error.item, error.error, drained.next()), (0, JobError::Draining, None));
}

#[test]
fn a_dropped_map_cancels_what_it_submitted_ahead() {
    let pool = pool_of(1, 100);
    let latch = Latch::default();
    let wait = latch.clone();
    let (begins, begun) = mpsc::channel();
    let mut results = pool
        .map(0..50, move |n| {
            if n > 0 {
                begins.send(()).expect("the test waits");
                wait.wait();
            }
            n
        })
        .look_ahead(10);
    assert_eq!(results.next(), Some(Ok(0)));
    begun.recv().expect("the second item runs");
    drop(results);
    latch.open();
    let stats = pool.drain(PATIENCE).stats;
    assert_eq!((stats.completed, stats.cancelled), (2, 8));
}

#[test]
fn a_handle_can_be_awaited() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let (pool, latch) = held(1, 10);
    let (job, bad, cancelled) =
        (submit(&pool, || 1), submit(&pool, || -> u32 { panic!("bad") }), submit(&pool, || 3));
    let token = cancelled.cancel_token();
    let outcomes = runtime.block_on(async {
        // None of these awaits blocks the runtime's only thread.
        let others = tokio::task::spawn(async move {
            assert!(token.cancel());
            latch.open();
        });
        let cancelled = cancelled.await;
        others.await.expect("the task");
        (job.await, bad.await, cancelled)
    });
    let (ran, panicked, cancelled) = outcomes;
    assert_eq!((ran, panic_of(panicked), cancelled), (Ok(1), "bad".to_owned(), Err(JobError::Cancelled)));
}

/// Joins race with ends, over and over. Every wait returns, and every outcome is the right one.
#[test]
fn no_wait_misses_the_end_of_its_job_whenever_it_begins() {
    let pool = pool_of(3, 64);
    thread::scope(|scope| {
        for seed in 0..3 {
            let pool = &pool;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for round in 0..4_000_u32 {
                    let spins = random.u32(0..300);
                    let job = pool.submit(move || {
                        (0..spins).for_each(|_| std::hint::spin_loop());
                        round
                    });
                    let job = job.expect("the pool is not draining");
                    match random.u8(0..4) {
                        0 => assert_eq!(join(job), Ok(round)),
                        1 => {
                            let cancelled = job.cancel();
                            let expected = if cancelled { Err(JobError::Cancelled) } else { Ok(round) };
                            assert_eq!(join(job), expected);
                        }
                        2 => {
                            let mut jobs = [job];
                            assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
                        }
                        _ => {
                            let heard = Arc::new(Mutex::new(None));
                            let (ear, this) = (Arc::clone(&heard), thread::current());
                            job.on_done(move |outcome| {
                                *ear.lock().expect("the ear") = Some(outcome);
                                this.unpark();
                            });
                            let start = Instant::now();
                            while heard.lock().expect("the ear").is_none() {
                                assert!(start.elapsed() < PATIENCE, "the callback did not run");
                                thread::park_timeout(PATIENCE);
                            }
                        }
                    }
                }
            });
        }
    });
    let stats = pool.drain(PATIENCE).stats;
    assert_eq!((stats.submitted, stats.completed + stats.cancelled), (12_000, 12_000));
}

#[test]
fn handles_tokens_and_groups_print_how_far_their_jobs_are() {
    let (pool, latch) = held(1, 10);
    let handle = submit(&pool, || ());
    let token = handle.cancel_token();
    assert_eq!(format!("{token:?}"), "CancelToken { is_cancelled: false, .. }");
    handle.cancel();
    assert_eq!(format!("{token:?}"), "CancelToken { is_cancelled: true, .. }");
    let completed = as_completed([handle, submit(&pool, || ())]);
    assert_eq!(format!("{completed:?}"), "AsCompleted { left: 2, .. }");
    let mut map = pool.map([1, 2, 3], |number| number);
    assert!(format!("{map:?}").ends_with("ahead: 0, .. }"), "{map:?}");
    latch.open();
    assert_eq!(map.next(), Some(Ok(1)));
    assert!(format!("{map:?}").starts_with("Map { look_ahead: "), "{map:?}");
}

#[test]
fn map_knows_how_many_results_are_to_come() {
    let pool = pool_of(1, 1);
    let mut map = pool.map(0..10, |number| number).look_ahead(4);
    // A drain may end the map after one error, so no more than that is sure.
    assert_eq!(map.size_hint(), (1, Some(10)));
    for left in (0..10).rev() {
        map.next().expect("there are more").expect("it returns");
        let (least, most) = map.size_hint();
        assert!(most == Some(left) && least <= left && (least > 0) == (left > 0), "{least} of {left}");
    }
    assert_eq!(map.next(), None);
    assert_eq!(pool.map(0_u64.., |number| number).size_hint(), (1, None));
}
