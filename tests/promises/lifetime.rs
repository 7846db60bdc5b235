//! How pools end: no drop loses an admitted job, and every wait for an end is bounded.

use std::cell::RefCell;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use millpond::{JobError, JobHandle, Pool, PoolError, Rejected};

use crate::common::pools::{Bomb, Latch, all_asleep, held, pool_of, timed};
use crate::common::{PATIENCE, eventually};
use crate::{Log, in_time, join, named, no_thread_is_left, submit};

/// Ten queued jobs, each of which returns its number.
fn ten_jobs(pool: &Pool) -> Vec<JobHandle<usize>> {
    (0..10).map(|number| submit(pool, move || number)).collect()
}

fn all_ten_ran(jobs: Vec<JobHandle<usize>>) {
    let outcomes: Vec<_> = jobs.into_iter().map(join).collect();
    assert_eq!(outcomes, (0..10).map(Ok).collect::<Vec<_>>());
}

fn none_ran(jobs: Vec<JobHandle<usize>>) {
    let outcomes: Vec<_> = jobs.into_iter().map(join).collect();
    assert_eq!(outcomes, vec![Err(JobError::Aborted); 10]);
}

/// A worker's thread-local whose destructor calls the closure.
fn at_the_end_of_this_worker(step: impl Fn() + 'static) {
    struct AtExit(Box<dyn Fn()>);
    impl Drop for AtExit {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    thread_local!(static AT_EXIT: RefCell<Option<AtExit>> = const { RefCell::new(None) });
    AT_EXIT.with(|at_exit| *at_exit.borrow_mut() = Some(AtExit(Box::new(step))));
}

/// Starts a drain on another thread, and returns when it has begun.
fn drain_elsewhere(pool: &Arc<Pool>) -> thread::JoinHandle<millpond::Drained> {
    let draining = Arc::clone(pool);
    let drain = thread::spawn(move || draining.drain(PATIENCE));
    eventually("it drains", || matches!(pool.resize(1), Err(PoolError::Draining)).then_some(()));
    drain
}

// Owners that drop the pool.

#[test]
fn when_a_job_drops_the_last_owner_ten_of_ten_queued_jobs_run() {
    for workers in [1, 3] {
        let (pool, latch) = (Arc::new(named("owned", workers, 16)), Latch::default());
        let mut owner = Some(Arc::clone(&pool));
        for busy in 1..=workers {
            let (wait, owner) = (latch.clone(), owner.take());
            pool.execute(move || {
                wait.wait();
                drop(owner);
            })
            .expect("room");
            eventually("a worker is held", || (pool.stats().busy == busy).then_some(()));
        }
        let jobs = ten_jobs(&pool);
        drop(pool);
        latch.open();
        all_ten_ran(jobs);
        no_thread_is_left("mill-owned-");
    }
}

#[test]
fn when_a_result_or_a_callback_drops_the_last_owner_ten_of_ten_queued_jobs_run() {
    for in_callback in [false, true] {
        let (pool, latch) = (Arc::new(pool_of(1, 16)), Latch::default());
        let (wait, owner) = (latch.clone(), Arc::clone(&pool));
        let holder = submit(&pool, move || {
            wait.wait();
            owner
        });
        if in_callback {
            holder.on_done(drop);
        } else {
            drop(holder);
        }
        eventually("the worker is held", || (pool.stats().busy == 1).then_some(()));
        let jobs = ten_jobs(&pool);
        drop(pool);
        latch.open();
        all_ten_ran(jobs);
    }
}

#[test]
fn a_job_that_drops_its_pool_waits_for_no_other_worker() {
    let (pool, latch) = held(1, 16);
    pool.resize(2).expect("a thread");
    let owner = Arc::new(pool);
    let (last, (go, gone)) = (Arc::clone(&owner), mpsc::channel::<()>());
    let dropper = submit(&owner, move || {
        gone.recv().expect("the test goes on");
        drop(last);
    });
    eventually("both workers are held", || (owner.stats().busy == 2).then_some(()));
    let jobs = ten_jobs(&owner);
    drop(owner);
    go.send(()).expect("the job waits");
    // The first worker is held all the while, so the second runs everything.
    assert_eq!(join(dropper), Ok(()));
    all_ten_ran(jobs);
    latch.open();
}

#[test]
fn an_owner_that_unwinds_waits_for_nothing_and_ten_of_ten_queued_jobs_run() {
    let (pool, latch) = held(1, 16);
    let jobs = ten_jobs(&pool);
    let outcome = in_time("the owner unwinds while the worker is held", move || {
        let owner = thread::spawn(move || {
            let _pool = pool;
            resume_unwind(Box::new("on purpose"));
        });
        owner.join().map_err(|payload| millpond::panic_message(&*payload).to_owned())
    });
    assert_eq!(outcome, Err("on purpose".to_owned()));
    assert!(jobs.iter().all(|job| !job.is_finished()), "no job ran while the worker was held");
    latch.open();
    all_ten_ran(jobs);
}

#[test]
fn a_job_of_another_pool_that_drops_a_pool_drains_it() {
    let other = pool_of(1, 1);
    let (pool, latch) = held(1, 16);
    let jobs = ten_jobs(&pool);
    let dropper = submit(&other, move || drop(pool));
    let dropper = dropper.join_timeout(Duration::from_millis(30)).expect_err("the drop waits for the jobs");
    latch.open();
    assert_eq!(join(dropper), Ok(()));
    assert!(jobs.iter().all(JobHandle::is_finished), "the drop waited for the jobs");
    all_ten_ran(jobs);
}

#[test]
fn any_other_drop_waits_until_ten_of_ten_queued_jobs_have_run() {
    let (pool, latch) = held(1, 16);
    let jobs = ten_jobs(&pool);
    latch.open();
    in_time("the drop", move || drop(pool));
    assert!(jobs.iter().all(JobHandle::is_finished));
    all_ten_ran(jobs);
}

#[test]
fn only_an_abort_or_a_drain_that_ran_out_of_time_drops_jobs() {
    let (aborted, latch) = held(1, 16);
    let jobs = ten_jobs(&aborted);
    assert_eq!(aborted.abort().dropped, 10);
    none_ran(jobs);
    latch.open();
    let (drained, latch) = held(1, 16);
    let jobs = ten_jobs(&drained);
    assert_eq!(drained.drain(Duration::from_millis(20)).dropped, 10);
    none_ran(jobs);
    latch.open();
}

// Closing.

#[test]
fn close_returns_at_once_and_the_workers_finish_what_is_queued() {
    let (pool, latch) = held(2, 16);
    let jobs = ten_jobs(&pool);
    let pool = in_time("the close returns while all workers are held", move || {
        pool.close();
        pool
    });
    let refused = pool.try_submit(|| 7);
    let Err(Rejected::Draining(job)) = refused else { panic!("a closed pool admitted a job") };
    assert_eq!((job.into_inner()(), pool.stats().rejected_draining), (7, 1));
    assert!(matches!(pool.resize(3), Err(PoolError::Draining)));
    pool.close();
    latch.open();
    all_ten_ran(jobs);
    eventually("the workers leave", || (pool.stats().workers == 0).then_some(()));
    assert_eq!((pool.stats().completed, pool.stats().aborted), (12, 0));
}

#[test]
fn close_turns_back_submitters_that_wait_for_room() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    thread::scope(|scope| {
        let blocked = thread::Builder::new().name("closed-out".to_owned());
        let blocked = blocked.spawn_scoped(scope, || pool.submit(|| 2)).expect("a thread");
        all_asleep("closed-out", 1);
        pool.close();
        assert!(matches!(blocked.join().expect("it returns"), Err(Rejected::Draining(_))));
    });
    latch.open();
    assert_eq!(join(queued), Ok(1));
}

#[test]
fn dropping_a_closed_pool_does_not_block() {
    let (pool, latch) = held(2, 16);
    let jobs = ten_jobs(&pool);
    pool.close();
    in_time("the drop returns while all workers are held", move || drop(pool));
    latch.open();
    all_ten_ran(jobs);
}

#[test]
fn a_drain_after_a_close_waits_for_the_end() {
    let (pool, latch) = held(1, 16);
    let jobs = ten_jobs(&pool);
    pool.close();
    let early = thread::spawn(move || {
        let drained = pool.drain(PATIENCE);
        (drained, pool)
    });
    latch.open();
    let (drained, _pool) = early.join().expect("the drain");
    assert!(drained.is_clean(), "{drained:?}");
    assert_eq!((drained.stats.completed, drained.stats.workers), (11, 0));
    all_ten_ran(jobs);
}

/// The runtime has one thread. If the drop blocked it, the task that opens the latch would never run.
#[test]
fn async_code_that_closes_its_pool_first_may_drop_it() {
    let (pool, latch) = held(1, 16);
    let outcome = in_time("the runtime goes on", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async move {
            let opener = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                latch.open();
            });
            let job = submit(&pool, || 5);
            pool.close();
            drop(pool);
            let outcome = job.await;
            opener.await.expect("the task");
            outcome
        })
    });
    assert_eq!(outcome, Ok(5));
}

// Drains.

#[test]
fn a_drain_ends_at_its_timeout_whatever_destructors_of_thread_locals_do() {
    let (pool, latch) = (Arc::new(pool_of(2, 16)), Latch::default());
    let wait = latch.clone();
    let job = submit(&pool, move || at_the_end_of_this_worker(move || wait.wait()));
    assert_eq!(join(job), Ok(()));
    let draining = Arc::clone(&pool);
    let (drained, took) = in_time("the drain", move || timed(|| draining.drain(Duration::from_millis(100))));
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(drained.is_clean(), "{drained:?}");
    latch.open();
    eventually("the worker leaves", || (pool.stats().workers == 0).then_some(()));
}

#[test]
fn a_job_that_drains_its_own_pool_runs_what_is_queued_and_is_answered() {
    for workers in [1, 3] {
        let (pool, latch, ran) =
            (Arc::new(pool_of(workers, 16)), Latch::default(), Arc::new(AtomicUsize::new(0)));
        let (wait, inner, seen) = (latch.clone(), Arc::clone(&pool), Arc::clone(&ran));
        let drains = submit(&pool, move || {
            wait.wait();
            let (drained, took) = timed(|| inner.drain(PATIENCE));
            (drained, took, seen.load(Ordering::Acquire))
        });
        for _ in 1..workers {
            let wait = latch.clone();
            pool.execute(move || wait.wait()).expect("room");
        }
        eventually("all workers are held", || (pool.stats().busy == workers).then_some(()));
        for _ in 0..10 {
            let ran = Arc::clone(&ran);
            pool.execute(move || _ = ran.fetch_add(1, Ordering::AcqRel)).expect("room");
        }
        latch.open();
        let (drained, took, ran) = join(drains).expect("it returns");
        assert!(took < PATIENCE / 2, "the drain ended at its timeout only");
        assert!(drained.is_clean(), "the job itself does not count: {drained:?}");
        assert_eq!(ran, 10);
        if workers == 1 {
            assert_eq!(drained.finished, 10);
        }
        eventually("all are counted", || (pool.stats().completed == 10 + workers as u64).then_some(()));
    }
}

#[test]
fn a_job_that_drains_its_own_pool_is_answered_at_the_timeout() {
    const SHORT: Duration = Duration::from_millis(50);
    let (pool, latch) = held(1, 16);
    pool.resize(2).expect("a thread");
    let (pool, log) = (Arc::new(pool), Log::default());
    let (inner, (go, gone)) = (Arc::clone(&pool), mpsc::channel::<()>());
    let drains = submit(&pool, move || {
        gone.recv().expect("the test goes on");
        timed(|| inner.drain(SHORT))
    });
    eventually("both workers are held", || (pool.stats().busy == 2).then_some(()));
    for number in 0..3 {
        let log = log.clone();
        pool.execute(move || log.push(number)).expect("room");
    }
    go.send(()).expect("the job waits");
    let (drained, took) = join(drains).expect("it returns");
    assert!(took >= SHORT && took < PATIENCE / 2, "{took:?}");
    assert_eq!((drained.running, drained.dropped), (1, 0), "the held job still runs");
    assert_eq!(log.read(), [0, 1, 2]);
    latch.open();
}

#[test]
fn two_jobs_that_drain_their_pool_at_once_are_both_answered() {
    // With one worker, the first drain runs the second job, which drains too.
    for workers in [1, 2, 3] {
        let (pool, latch) = held(workers, 16);
        let (pool, log) = (Arc::new(pool), Log::default());
        let both = Arc::new(Barrier::new(workers.min(2)));
        let drains: Vec<_> = (0..2)
            .map(|_| {
                let (inner, both) = (Arc::clone(&pool), Arc::clone(&both));
                submit(&pool, move || {
                    both.wait();
                    timed(|| inner.drain(PATIENCE))
                })
            })
            .collect();
        for number in 0..8 {
            let log = log.clone();
            pool.execute(move || log.push(number)).expect("room");
        }
        latch.open();
        for job in drains {
            let (drained, took) = join(job).expect("it returns");
            assert!(took < PATIENCE / 2 && drained.is_clean(), "{workers} workers, {took:?}: {drained:?}");
        }
        assert_eq!(log.sorted(), (0..8).collect::<Vec<_>>());
    }
}

#[test]
fn a_drain_from_outside_waits_for_a_job_that_drains_and_both_are_answered() {
    let (pool, latch) = (Arc::new(pool_of(2, 16)), Latch::default());
    let (wait, inner) = (latch.clone(), Arc::clone(&pool));
    let drains = submit(&pool, move || {
        wait.wait();
        timed(|| inner.drain(PATIENCE))
    });
    eventually("it runs", || (pool.stats().busy == 1).then_some(()));
    let outside = drain_elsewhere(&pool);
    assert!(!outside.is_finished(), "a job still runs");
    latch.open();
    let (inside, took) = join(drains).expect("it returns");
    assert!(inside.is_clean() && took < PATIENCE / 2, "{took:?}: {inside:?}");
    let outside = in_time("the drain from outside", move || outside.join().expect("it returns"));
    assert!(outside.is_clean(), "{outside:?}");
    assert_eq!(outside.stats.completed, 1);
}

// Waiting until a pool is idle.

#[test]
fn wait_idle_waits_for_jobs_that_run_and_jobs_that_wait() {
    let pool = pool_of(2, 16);
    let (idle, took) = timed(|| pool.wait_idle(PATIENCE));
    assert!(idle && took < PATIENCE / 2, "a pool without jobs is idle");
    let (pool, latch) = held(2, 16);
    let pool = Arc::new(pool);
    let queued = submit(&pool, || 1);
    let (idle, took) = timed(|| pool.wait_idle(Duration::from_millis(30)));
    assert!(!idle && took >= Duration::from_millis(30), "{idle} after {took:?}");
    assert!(!pool.wait_idle(Duration::ZERO));
    let waiting = Arc::clone(&pool);
    let idle = thread::spawn(move || (waiting.wait_idle(PATIENCE), waiting.stats()));
    latch.open();
    let (idle, stats) = in_time("the wait", move || idle.join().expect("it returns"));
    assert!(idle);
    assert_eq!((stats.queue_depth, stats.busy, stats.completed), (0, 0, 3));
    assert_eq!(join(queued), Ok(1));
    assert_eq!(join(submit(&pool, || 2)), Ok(2), "the pool still admits jobs");
}

#[test]
fn cancelled_jobs_do_not_keep_wait_idle_waiting() {
    let (pool, latch) = held(1, 16);
    let pool = Arc::new(pool);
    let jobs = ten_jobs(&pool);
    assert!(jobs.iter().all(JobHandle::cancel));
    let late = pool.with_deadline(Duration::from_millis(1)).try_submit(|| ()).expect("room");
    assert_eq!(join(late), Err(JobError::Expired));
    assert!(!pool.wait_idle(Duration::from_millis(20)), "the first job runs");
    latch.open();
    let waiting = Arc::clone(&pool);
    assert!(in_time("the wait", move || waiting.wait_idle(PATIENCE)));
    assert_eq!((pool.stats().cancelled, pool.stats().completed), (10, 1));
}

/// Each job submits the next one before it ends, so the pool is never idle in between.
#[test]
fn wait_idle_does_not_return_between_a_job_and_the_job_that_it_submits() {
    const LINKS: usize = 2_000;
    fn link(pool: &Arc<Pool>, number: usize, log: &Log) {
        log.push(number);
        if number + 1 < LINKS {
            let (inner, next_log) = (Arc::clone(pool), log.clone());
            pool.execute(move || link(&inner, number + 1, &next_log)).expect("the queue has room");
        }
    }
    for workers in [1, 2, 4] {
        let (pool, log) = (Arc::new(pool_of(workers, 16)), Log::default());
        let (inner, first_log) = (Arc::clone(&pool), log.clone());
        pool.execute(move || link(&inner, 0, &first_log)).expect("room");
        let waiting = Arc::clone(&pool);
        assert!(in_time("the wait", move || waiting.wait_idle(PATIENCE)));
        assert_eq!(log.read().len(), LINKS, "{workers} workers");
    }
}

#[test]
fn jobs_that_wait_until_their_pool_is_idle_do_not_count_and_run_what_is_queued() {
    for workers in [1, 2] {
        let (pool, latch) = held(workers, 16);
        let (pool, log) = (Arc::new(pool), Log::default());
        let waits: Vec<_> = (0..workers)
            .map(|_| {
                let inner = Arc::clone(&pool);
                submit(&pool, move || inner.wait_idle(PATIENCE))
            })
            .collect();
        for number in 0..10 {
            let log = log.clone();
            pool.execute(move || log.push(number)).expect("room");
        }
        latch.open();
        for job in waits {
            assert_eq!(join(job), Ok(true), "{workers} workers");
        }
        assert_eq!(log.sorted(), (0..10).collect::<Vec<_>>());
    }
}

#[test]
fn a_job_that_waits_until_its_pool_is_idle_gives_up_while_another_job_runs() {
    let (pool, latch) = held(1, 16);
    pool.resize(2).expect("a thread");
    let pool = Arc::new(pool);
    let inner = Arc::clone(&pool);
    let waits = submit(&pool, move || timed(|| inner.wait_idle(Duration::from_millis(30))));
    let (idle, took) = join(waits).expect("it returns");
    assert!(!idle && took >= Duration::from_millis(30), "{idle} after {took:?}");
    latch.open();
}

// Hooks and names.

#[test]
fn each_worker_calls_the_stop_hook_once_on_its_own_thread() {
    let stops = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stops);
    let builder = Pool::builder("stops").workers(3).on_worker_stop(move |number| {
        let name = thread::current().name().map(str::to_owned);
        seen.lock().expect("the list").push((number, name));
    });
    let pool = builder.build().expect("the threads");
    let count = || stops.lock().expect("the list").len();
    assert_eq!(count(), 0);
    pool.resize(2).expect("fewer workers need no thread");
    eventually("one worker stops", || (count() == 1).then_some(()));
    assert!(pool.drain(PATIENCE).is_clean());
    eventually("all workers stop", || (count() == 3).then_some(()));
    drop(pool);
    let mut stops = stops.lock().expect("the list").clone();
    stops.sort();
    let expected: Vec<_> = (0..3).map(|number| (number, Some(format!("mill-stops-{number}")))).collect();
    assert_eq!(stops, expected);
}

#[test]
fn the_stop_hook_comes_after_the_workers_last_job() {
    let (log, latch) = (Log::default(), Latch::default());
    let (at_start, at_stop, wait) = (log.clone(), log.clone(), latch.clone());
    let builder = Pool::builder("order").workers(1).queue_capacity(16);
    let builder = builder.on_worker_start(move |_| {
        at_start.push(100);
        Ok(())
    });
    let pool = builder.on_worker_stop(move |_| at_stop.push(200)).build().expect("a thread");
    pool.execute(move || wait.wait()).expect("room");
    for number in 0..3 {
        let log = log.clone();
        pool.execute(move || log.push(number)).expect("room");
    }
    pool.close();
    latch.open();
    eventually("the worker leaves", || (pool.stats().workers == 0).then_some(()));
    eventually("the hook is called", || (log.read().len() == 5).then_some(()));
    assert_eq!(log.read(), [100, 0, 1, 2, 200]);
}

#[test]
fn a_stop_hook_that_panics_harms_no_one() {
    let builder = Pool::builder("sorry").workers(2).on_worker_stop(|number| {
        if number == 0 {
            resume_unwind(Box::new("on purpose"));
        }
        resume_unwind(Box::new(Bomb));
    });
    let pool = builder.build().expect("the threads");
    assert_eq!(join(submit(&pool, || 1)), Ok(1));
    let (pool, drained) = in_time("the drain", move || {
        let drained = pool.drain(PATIENCE);
        (pool, drained)
    });
    assert!(drained.is_clean(), "{drained:?}");
    drop(pool);
    no_thread_is_left("mill-sorry-");
}

#[test]
fn thread_names_have_at_most_15_bytes_and_show_the_whole_number() {
    // The last two names have characters of two and four bytes, which no name may cut in two.
    for name in ["a", "reports", "a-very-long-name", "überlänge-größer", "\u{1F980}\u{1F980}\u{1F980}"] {
        const WORKERS: usize = 12;
        let pool = named(name, WORKERS, WORKERS);
        let all = Arc::new(Barrier::new(WORKERS));
        let jobs: Vec<_> = (0..WORKERS)
            .map(|_| {
                let all = Arc::clone(&all);
                submit(&pool, move || {
                    all.wait();
                    let shown = std::fs::read_to_string("/proc/thread-self/comm").expect("this thread");
                    (thread::current().name().expect("a name").to_owned(), shown.trim_end().to_owned())
                })
            })
            .collect();
        let mut numbers: Vec<usize> = jobs
            .into_iter()
            .map(|job| {
                let (given, shown) = join(job).expect("it returns");
                assert_eq!(given, shown, "Linux shows the whole name");
                assert!(given.len() <= 15, "{given}");
                let rest = given.strip_prefix("mill-").expect("the prefix");
                let (kept, number) = rest.rsplit_once('-').expect("the number");
                assert!(name.starts_with(kept) && !kept.is_empty(), "{kept:?} of {name:?}");
                // As much of the name is kept as there is room for.
                let next = name[kept.len()..].chars().next();
                assert!(next.is_none_or(|next| given.len() + next.len_utf8() > 15), "{given}");
                number.parse().expect("a number")
            })
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..WORKERS).collect::<Vec<_>>());
    }
}

/// The pool has a thread that watches deadlines. It ends with the pool, and not an hour later.
#[test]
fn a_deadline_in_an_hour_keeps_no_thread_and_no_drop_waiting() {
    let pool = named("hourly", 1, 16);
    let job = pool.with_deadline(Duration::from_secs(3600)).try_submit(|| 1).expect("room");
    assert_eq!(join(job), Ok(1));
    in_time("the drop", move || drop(pool));
    no_thread_is_left("mill-hourly");
}

/// A thread that waits for the pool's end must not be needed for it.
#[test]
fn a_pool_that_was_closed_by_a_job_can_be_drained_from_outside() {
    let pool = Arc::new(pool_of(1, 16));
    let (inner, closed) = (Arc::clone(&pool), Arc::new(AtomicBool::new(false)));
    let seen = Arc::clone(&closed);
    pool.execute(move || {
        inner.close();
        seen.store(true, Ordering::Release);
    })
    .expect("room");
    eventually("the job closes the pool", || closed.load(Ordering::Acquire).then_some(()));
    let drained = in_time("the drain", move || pool.drain(PATIENCE));
    assert!(drained.is_clean(), "{drained:?}");
}
