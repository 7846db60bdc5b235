//! The pool's promises about admission, order, ends, workers and numbers. Those about a job's outcome are in `jobs.rs`, and the
//! promises of `promises/` go beyond both.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::pools::{Bomb, Latch, all_asleep, broken_law, held, pool_of, timed};
use common::{PATIENCE, eventually, thread_states};
use millpond::{Drained, MAX_WORKERS, Pool, PoolError, Rejected};

fn submit(pool: &Pool, job: impl FnOnce() + Send + 'static) {
    assert!(pool.try_execute(job).is_ok(), "the queue is full, or drains");
}

#[test]
fn a_full_queue_gives_the_job_back() {
    let (pool, latch) = held(1, 2);
    submit(&pool, || {});
    submit(&pool, || {});
    let refused = pool.try_submit(|| {}).expect_err("there is no room");
    assert_eq!(format!("{refused:?}: {refused}"), "Full(..): the pool's queue is full");
    assert_eq!((pool.stats().queue_depth, pool.stats().rejected_full), (2, 1));
    latch.open();
    eventually("room again", || pool.try_execute(|| {}).ok());
}

#[test]
fn a_pool_prints_its_name_and_its_sizes() {
    let builder = Pool::builder("lookup").queue_capacity(7);
    let workers = thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let made_of = format!("PoolBuilder {{ name: \"lookup\", workers: {workers}, queue_capacity: 7, .. }}");
    assert_eq!(format!("{builder:?}"), made_of);
    let pool = builder.build().expect("the threads");
    assert_eq!((pool.name(), pool.stats().workers), ("lookup", workers));
    assert_eq!(format!("{pool:?}"), "Pool { name: \"lookup\", .. }");
}

#[test]
fn the_oldest_age_is_that_of_the_job_that_waits_longest() {
    let (pool, latch) = held(1, 2);
    assert_eq!(pool.oldest_age(), Duration::ZERO, "none waits");
    let before = Instant::now();
    submit(&pool, || {});
    eventually("it ages", || (pool.oldest_age() > Duration::from_millis(5)).then_some(()));
    assert!(pool.oldest_age() < before.elapsed() + Duration::from_millis(100));
    latch.open();
    eventually("it was taken", || pool.oldest_age().is_zero().then_some(()));
}

#[test]
fn jobs_start_in_the_order_of_their_admission() {
    let (pool, latch) = held(1, 1000);
    let order = Arc::new(Mutex::new(Vec::new()));
    for number in 0..1000 {
        let order = Arc::clone(&order);
        submit(&pool, move || order.lock().expect("the order").push(number));
    }
    latch.open();
    assert!(pool.drain(PATIENCE).is_clean());
    assert!(order.lock().expect("the order").iter().copied().eq(0..1000));
}

#[test]
fn a_panicking_job_keeps_its_worker() {
    let pool = pool_of(1, 10);
    let names = Arc::new(Mutex::new(Vec::new()));
    for round in 0..10 {
        let names = Arc::clone(&names);
        submit(&pool, move || {
            names.lock().expect("the names").push(thread::current().id());
            assert!(round % 2 == 0, "every other one panics");
        });
    }
    let drained = pool.drain(PATIENCE);
    assert_eq!((drained.stats.completed, drained.stats.panicked), (5, 5));
    let names = names.lock().expect("the names");
    assert!(names.iter().all(|name| *name == names[0]), "another thread took over");
}

#[test]
fn a_worker_survives_a_payload_that_panics_when_dropped() {
    let pool = pool_of(1, 10);
    submit(&pool, || std::panic::panic_any(Bomb));
    submit(&pool, || {});
    let drained = pool.drain(PATIENCE);
    assert_eq!((drained.stats.completed, drained.stats.panicked), (1, 1));
}

#[test]
fn a_drain_finishes_the_admitted_jobs_and_admits_no_more() {
    let (pool, latch) = held(1, 100);
    let done = Arc::new(AtomicU64::new(0));
    for _ in 0..100 {
        let done = Arc::clone(&done);
        submit(&pool, move || {
            done.fetch_add(1, Ordering::Relaxed);
        });
    }
    thread::scope(|scope| {
        let drain = scope.spawn(|| pool.drain(PATIENCE));
        eventually("it drains", || match pool.try_submit(|| {}) {
            Err(Rejected::Draining(_)) => Some(()),
            _ => None,
        });
        assert!(!drain.is_finished());
        latch.open();
        let drained = drain.join().expect("the drain");
        assert!(drained.is_clean());
        assert_eq!(drained.stats.aborted, 0);
    });
    assert_eq!(done.load(Ordering::Relaxed), 100);
    assert!(pool.stats().rejected_draining >= 1);
}

#[test]
fn a_drain_that_runs_out_of_time_reports_the_jobs_that_are_left() {
    let (pool, latch) = held(1, 100);
    (0..7).for_each(|_| submit(&pool, || {}));
    let start = Instant::now();
    let drained = pool.drain(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!((drained.running, drained.dropped), (1, 7));
    assert_eq!(broken_law(&drained.stats), None);
    latch.open();
    eventually("the running job ends", || (pool.stats().busy == 0).then_some(()));
    assert_eq!((pool.stats().completed, pool.stats().aborted), (1, 7));
}

/// Workers that see the abort drop jobs too, and these jobs count as well.
#[test]
fn a_drain_that_runs_out_of_time_counts_every_job_it_dropped() {
    for _ in 0..20 {
        let pool = pool_of(2, 20_000);
        for _ in 0..20_000 {
            submit(&pool, || (0..200).for_each(|_| std::hint::spin_loop()));
        }
        let drained = pool.drain(Duration::from_micros(500));
        eventually("the last have ended", || (pool.stats().busy == 0).then_some(()));
        let stats = pool.stats();
        assert_eq!((drained.dropped, stats.queue_depth), (stats.aborted, 0), "{drained:?}");
        assert!(!drained.is_clean() || stats.aborted == 0, "{drained:?}");
        assert_eq!(broken_law(&stats), None);
    }
}

#[test]
fn an_abort_drops_the_waiting_jobs_and_lets_the_running_job_end() {
    let (pool, latch) = held(1, 100);
    let dropped = Arc::new(());
    for _ in 0..5 {
        let witness = Arc::clone(&dropped);
        submit(&pool, move || drop(witness));
    }
    assert_eq!(Arc::strong_count(&dropped), 6);
    let aborted = pool.abort();
    assert_eq!((aborted.running, aborted.dropped), (1, 5));
    assert_eq!(Arc::strong_count(&dropped), 1, "the jobs are dropped before the abort returns");
    latch.open();
    assert!(pool.drain(PATIENCE).running == 0);
}

#[test]
fn dropping_a_pool_drains_it() {
    let (pool, latch) = held(1, 10);
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    submit(&pool, move || seen.store(true, Ordering::Release));
    latch.open();
    drop(pool);
    assert!(done.load(Ordering::Acquire));
}

#[test]
fn a_pool_that_cannot_start_is_an_error_and_leaves_no_thread() {
    let start =
        |workers, capacity| Pool::builder("refused").workers(workers).queue_capacity(capacity).build().err();
    assert!(matches!(start(0, 1), Some(PoolError::Workers(0))));
    assert!(matches!(start(MAX_WORKERS + 1, 1), Some(PoolError::Workers(_))));
    assert!(matches!(start(1, usize::MAX), Some(PoolError::QueueCapacity(usize::MAX))));
    let refused = Pool::builder("a\0b").build().err();
    assert!(matches!(refused, Some(PoolError::Name(_))), "{refused:?}");
    // A stack that no address space has room for.
    let refused = Pool::builder("refused").workers(3).stack_size(1 << 60).build().err();
    assert!(matches!(refused, Some(PoolError::Spawn { started: 0, .. })), "{refused:?}");
    no_thread_is_left("mill-refused");
}

/// The kernel shows a thread for an instant after it has been joined.
fn no_thread_is_left(name: &str) {
    eventually("no thread is left", || thread_states(name).is_empty().then_some(()));
}

#[test]
fn workers_are_named_and_have_their_stack() {
    fn depth(left: usize) -> usize {
        let frame = std::hint::black_box([left; 128]);
        if left == 0 { frame[0] } else { depth(left - 1) + frame[0].min(1) }
    }
    let builder = Pool::builder("deep").workers(3).queue_capacity(9).stack_size(16 * 1024 * 1024);
    let names = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::new(Barrier::new(3));
    let pool = builder.build().expect("the threads");
    for _ in 0..3 {
        let (names, all) = (Arc::clone(&names), Arc::clone(&all));
        submit(&pool, move || {
            all.wait();
            names.lock().expect("names").push(thread::current().name().expect("a name").to_owned());
            // 5,000 frames of over a kilobyte each: more than the default stack.
            assert_eq!(depth(5_000), 5_000);
        });
    }
    let drained = pool.drain(PATIENCE);
    assert_eq!(drained.stats.completed, 3);
    let mut names = names.lock().expect("names").clone();
    names.sort();
    assert_eq!(names, ["mill-deep-0", "mill-deep-1", "mill-deep-2"]);
}

#[test]
fn ages_and_busy_time_rise_although_nothing_ends() {
    let (pool, latch) = held(1, 10);
    submit(&pool, || {});
    let (before, start) = (pool.stats(), Instant::now());
    thread::sleep(Duration::from_millis(50));
    let (after, elapsed) = (pool.stats(), start.elapsed());
    for (name, rise) in [
        ("oldest age", after.queue_oldest_age - before.queue_oldest_age),
        ("longest running", after.longest_running - before.longest_running),
        ("busy time", after.busy_time - before.busy_time),
    ] {
        assert!(rise >= Duration::from_millis(49), "{name} rose {rise:?} in {elapsed:?}");
    }
    assert_eq!((after.completed, after.queue_depth, after.busy), (0, 1, 1));
    latch.open();
    let drained = pool.drain(PATIENCE).stats;
    assert_eq!((drained.queue_oldest_age, drained.longest_running), (Duration::ZERO, Duration::ZERO));
}

/// Every job wakes a worker that sleeps. If a job waits while a worker is idle, this test fails.
#[test]
fn no_wake_up_is_lost_whenever_jobs_are_submitted() {
    let pool = Arc::new(pool_of(8, 64));
    let producers: Vec<_> = (0..4)
        .map(|seed| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for round in 0..5_000 {
                    let (done, burst) = (Arc::new(AtomicUsize::new(0)), random.usize(1..12));
                    let mut admitted = 0;
                    while admitted < burst {
                        let done = Arc::clone(&done);
                        let job = move || {
                            done.fetch_add(1, Ordering::Relaxed);
                        };
                        admitted += usize::from(pool.try_execute(job).is_ok());
                    }
                    // It waits for its own jobs, so that all workers fall asleep again and again.
                    let start = Instant::now();
                    while done.load(Ordering::Relaxed) < burst {
                        assert!(start.elapsed() < PATIENCE, "round {round}: {:?}", pool.stats());
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    while producers.iter().any(|producer| !producer.is_finished()) {
        let stats = pool.stats();
        assert_eq!(broken_law(&stats), None);
    }
    producers.into_iter().for_each(|producer| producer.join().expect("each job ran"));
    let stats = pool.stats();
    eventually("the last are counted", || (pool.stats().completed == stats.submitted).then_some(()));
}

#[test]
fn every_admitted_job_ends_whenever_the_drain_comes() {
    for round in 0..300 {
        let done = Arc::new(AtomicU64::new(0));
        let pool = pool_of(3, 16);
        let start = Barrier::new(4);
        let admitted: u64 = thread::scope(|scope| {
            let submitters: Vec<_> = (0..3)
                .map(|submitter| {
                    let (start, pool, done) = (&start, &pool, &done);
                    scope.spawn(move || {
                        start.wait();
                        let mut admitted = 0;
                        loop {
                            let done = Arc::clone(done);
                            let job = move || {
                                done.fetch_add(1, Ordering::Relaxed);
                            };
                            // One submitter blocks for room, and the drain ends its wait.
                            let outcome =
                                if submitter == 0 { pool.execute(job) } else { pool.try_execute(job) };
                            match outcome {
                                Ok(()) => admitted += 1,
                                Err(Rejected::Draining(_)) => return admitted,
                                Err(Rejected::Full(_)) => {}
                            }
                        }
                    })
                })
                .collect();
            start.wait();
            for _ in 0..round * 10 {
                std::hint::spin_loop();
            }
            let drained = pool.drain(PATIENCE);
            assert!(drained.is_clean(), "{drained:?}");
            submitters.into_iter().map(|submitter| submitter.join().expect("a submitter")).sum()
        });
        let stats = pool.stats();
        assert_eq!((done.load(Ordering::Relaxed), stats.completed), (admitted, admitted));
        assert_eq!(broken_law(&stats), None);
    }
}

/// Short jobs on a full queue, read all the while: each reading keeps the laws, and no counter falls.
#[test]
fn every_reading_keeps_the_laws_and_nothing_falls() {
    let pool = pool_of(6, 1);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = pool.try_execute(|| {});
                }
            });
        }
        let (start, mut last) = (Instant::now(), pool.stats());
        while start.elapsed() < Duration::from_secs(1) {
            let stats = pool.stats();
            let broken = broken_law(&stats).is_some()
                || stats.submitted < last.submitted
                || stats.completed < last.completed
                || stats.busy_time < last.busy_time;
            if broken {
                stop.store(true, Ordering::Relaxed);
                panic!("{last:?}, then {stats:?}");
            }
            last = stats;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// A thread with a name by which `/proc` shows whether it sleeps.
fn spawn_named<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> thread::ScopedJoinHandle<'scope, T> {
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, run).expect("a thread")
}

/// Drains the pool, and does `step` when the drain has begun.
fn drain_then(pool: &Pool, step: impl FnOnce()) -> Drained {
    thread::scope(|scope| {
        let drain = scope.spawn(|| pool.drain(PATIENCE));
        eventually("it drains", || matches!(pool.resize(1), Err(PoolError::Draining)).then_some(()));
        step();
        drain.join().expect("the drain")
    })
}

#[test]
fn submit_blocks_until_there_is_room() {
    let (pool, latch) = held(1, 1);
    submit(&pool, || {});
    thread::scope(|scope| {
        let blocked: Vec<_> = (0..3)
            .map(|_| spawn_named(scope, "blocked", || pool.submit(|| 7).map(millpond::JobHandle::join)))
            .collect();
        all_asleep("blocked", 3);
        assert!(blocked.iter().all(|thread| !thread.is_finished()), "there is no room");
        assert_eq!(pool.stats().rejected_full, 0);
        latch.open();
        for thread in blocked {
            assert!(matches!(thread.join().expect("a submitter"), Ok(Ok(7))));
        }
    });
}

#[test]
fn submit_timeout_gives_up_and_gives_the_job_back() {
    let (pool, latch) = held(1, 1);
    submit(&pool, || {});
    let (refused, took) = timed(|| pool.submit_timeout(|| 7, Duration::from_millis(40)));
    assert!(took >= Duration::from_millis(40));
    let Err(Rejected::Full(job)) = refused else { panic!("it was admitted, or the pool drains") };
    let job = job.into_inner();
    assert_eq!((job(), pool.stats().rejected_full), (7, 1));
    let opener = thread::spawn(move || latch.open());
    let admitted = pool.submit_timeout(job, PATIENCE).expect("there is room in time");
    assert_eq!(admitted.join(), Ok(7));
    opener.join().expect("the opener");
}

#[test]
fn a_drain_turns_back_submitters_that_wait_for_room() {
    let (pool, latch) = held(1, 1);
    submit(&pool, || {});
    thread::scope(|scope| {
        let blocked = [
            spawn_named(scope, "turned-back", || pool.execute(|| {}).map_err(|_| ())),
            spawn_named(scope, "turned-back", || {
                pool.submit_timeout(|| {}, PATIENCE).map(drop).map_err(|_| ())
            }),
        ];
        all_asleep("turned-back", 2);
        let drain = scope.spawn(|| pool.drain(PATIENCE));
        for thread in blocked {
            assert_eq!(thread.join().expect("a submitter"), Err(()));
        }
        assert!(!drain.is_finished(), "the worker is still held");
        latch.open();
        let drained = drain.join().expect("the drain");
        assert_eq!((drained.finished, drained.is_clean()), (2, true));
    });
    assert_eq!(pool.stats().rejected_draining, 2);
}

#[test]
fn a_drain_reports_how_many_jobs_it_finished_and_how_many_were_cancelled() {
    let (pool, latch) = held(1, 10);
    let jobs: Vec<_> = (0..6).map(|_| pool.submit(|| {}).expect("room")).collect();
    assert!(jobs[0].cancel(), "this job is cancelled before the drain");
    let drained = drain_then(&pool, || {
        assert!(jobs[1].cancel() && jobs[4].cancel());
        latch.open();
    });
    assert_eq!((drained.finished, drained.cancelled, drained.dropped, drained.running), (4, 2, 0, 0));
    assert_eq!(drained.stats.cancelled, 3);
}

#[test]
fn a_pool_grows_while_its_workers_are_busy() {
    let (pool, latch) = held(2, 10);
    let waiting = pool.submit(|| thread::current().name().map(str::to_owned)).expect("room");
    assert!(!waiting.is_finished());
    pool.resize(3).expect("a thread");
    assert_eq!(waiting.join(), Ok(Some("mill-test-2".to_owned())));
    assert_eq!((pool.stats().workers, pool.stats().busy), (3, 2));
    latch.open();
}

#[test]
fn a_pool_shrinks_after_the_jobs_that_run_and_loses_none() {
    let (pool, latch) = held(4, 100);
    let jobs: Vec<_> = (0..50).map(|n| pool.submit(move || n).expect("room")).collect();
    pool.resize(1).expect("fewer workers need no thread");
    assert_eq!(pool.stats().workers, 4, "workers count until they have left");
    latch.open();
    eventually("three have left", || (pool.stats().workers == 1).then_some(()));
    assert!(jobs.into_iter().enumerate().all(|(n, job)| job.join() == Ok(n)));
    // When the pool grows again, the counts go on.
    pool.resize(3).expect("threads");
    assert_eq!((pool.stats().workers, pool.stats().completed), (3, 54));
    // Idle workers leave at once.
    pool.resize(1).expect("fewer workers need no thread");
    eventually("two have left", || (pool.stats().workers == 1).then_some(()));
    assert_eq!(pool.submit(|| 1).expect("room").join(), Ok(1));
}

#[test]
fn a_pool_is_not_resized_out_of_range_or_in_a_drain() {
    let pool = pool_of(1, 1);
    assert!(matches!(pool.resize(0), Err(PoolError::Workers(0))));
    assert!(matches!(pool.resize(MAX_WORKERS + 1), Err(PoolError::Workers(_))));
    pool.drain(PATIENCE);
    assert!(matches!(pool.resize(2), Err(PoolError::Draining)));
}

#[test]
fn each_worker_completes_its_first_step_before_its_first_job() {
    thread_local!(static NUMBER: std::cell::Cell<Option<usize>> = const { std::cell::Cell::new(None) });
    let builder = Pool::builder("test").workers(2).queue_capacity(10).on_worker_start(|number| {
        NUMBER.set(Some(number));
        Ok(())
    });
    let pool = builder.build().expect("threads");
    pool.resize(3).expect("a thread");
    let all = Arc::new(Barrier::new(3));
    let jobs: Vec<_> = (0..3)
        .map(|_| {
            let all = Arc::clone(&all);
            let job = move || {
                all.wait();
                NUMBER.get()
            };
            pool.submit(job).expect("room")
        })
        .collect();
    let mut numbers: Vec<_> = jobs.into_iter().map(|job| job.join().expect("a number")).collect();
    numbers.sort();
    assert_eq!(numbers, [Some(0), Some(1), Some(2)]);
}

#[test]
fn a_worker_that_cannot_begin_is_an_error_with_no_thread_left() {
    let failing = |from: usize| {
        Pool::builder("sick").workers(4).on_worker_start(move |number| {
            if number == from + 1 {
                panic!("no luck")
            }
            if number >= from { Err("no database".into()) } else { Ok(()) }
        })
    };
    let refused = failing(2).build().expect_err("two of four cannot begin");
    assert!(matches!(refused, PoolError::Init { .. }), "{refused:?}");
    let words = refused.to_string();
    assert!(words.contains("no database") || words.contains("it panicked: no luck"), "{words}");
    no_thread_is_left("mill-sick");
    // In a resize of a running pool, the other workers go on.
    let builder = Pool::builder("half")
        .workers(2)
        .on_worker_start(|number| if number < 2 { Ok(()) } else { Err("no more".into()) });
    let pool = builder.build().expect("two can begin");
    assert!(matches!(pool.resize(4), Err(PoolError::Init { .. })));
    assert_eq!((pool.stats().workers, pool.submit(|| 5).expect("room").join()), (2, Ok(5)));
    pool.resize(1).expect("fewer workers need no thread");
    eventually("one has left", || (pool.stats().workers == 1).then_some(()));
}

#[test]
fn one_worker_that_cannot_begin_stops_no_other() {
    let builder = Pool::builder("most")
        .workers(1)
        .on_worker_start(|number| if number == 1 { Err("not me".into()) } else { Ok(()) });
    let pool = builder.queue_capacity(100).build().expect("a thread");
    assert!(matches!(pool.resize(40), Err(PoolError::Init { .. })));
    // Each of 39 jobs waits until all of them run.
    let all = Arc::new(Barrier::new(39));
    let meet = |_| {
        let all = Arc::clone(&all);
        pool.submit(move || all.wait().is_leader()).expect("room")
    };
    let jobs: Vec<_> = (0..39).map(meet).collect();
    let leaders = jobs.into_iter().map(|job| job.join_timeout(PATIENCE).expect("all 39 work"));
    assert_eq!(leaders.filter(|leads| *leads == Ok(true)).count(), 1);
    assert_eq!(pool.stats().workers, 39);
}

#[test]
fn a_first_step_whose_payload_panics_when_dropped_is_an_error_too() {
    let builder = Pool::builder("worse").workers(2).on_worker_start(|_| std::panic::panic_any(Bomb));
    assert!(matches!(builder.build(), Err(PoolError::Init { .. })));
    no_thread_is_left("mill-worse");
}

/// A worker's thread-local whose destructor calls the closure.
fn at_the_end_of_this_worker(step: impl Fn() + 'static) {
    struct AtExit(Box<dyn Fn()>);
    impl Drop for AtExit {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    thread_local!(static AT_EXIT: std::cell::RefCell<Option<AtExit>> = const { std::cell::RefCell::new(None) });
    AT_EXIT.with(|at_exit| *at_exit.borrow_mut() = Some(AtExit(Box::new(step))));
}

#[test]
fn a_worker_may_call_its_pool_at_the_very_end_of_its_thread() {
    let pool = Arc::new(pool_of(2, 10));
    let (report, reports) = std::sync::mpsc::channel();
    let inner = Arc::clone(&pool);
    let job = move || {
        at_the_end_of_this_worker(move || {
            let drained = inner.drain(Duration::ZERO);
            let refused = matches!(inner.resize(3), Err(PoolError::Draining));
            report.send((drained.running, refused)).expect("it is waited for");
        });
    };
    pool.submit(job).expect("room").join().expect("it returns");
    pool.abort();
    assert_eq!(reports.recv_timeout(PATIENCE), Ok((0, true)));
}

/// The drain waits for the end of its threads, and must not hold a lock that the resize needs.
#[test]
fn a_worker_may_resize_its_pool_at_the_very_end_of_its_thread_while_it_drains() {
    let pool = Arc::new(pool_of(2, 10));
    let (report, reports) = std::sync::mpsc::channel();
    let inner = Arc::clone(&pool);
    let job = move || {
        at_the_end_of_this_worker(move || {
            // Long enough that the drain waits for this thread, as a rule.
            std::thread::sleep(Duration::from_millis(50));
            report.send(matches!(inner.resize(3), Err(PoolError::Draining))).expect("it is waited for");
        });
    };
    pool.submit(job).expect("room").join().expect("it returns");
    let draining = std::thread::spawn(move || pool.drain(PATIENCE).is_clean());
    assert_eq!(reports.recv_timeout(PATIENCE), Ok(true));
    assert!(draining.join().expect("it returns"));
}

#[test]
fn a_worker_cannot_resize_its_pool_in_its_first_step() {
    let slot: Arc<Mutex<Option<Arc<Pool>>>> = Arc::default();
    let own = Arc::clone(&slot);
    let builder = Pool::builder("own").workers(1).on_worker_start(move |_| {
        let Some(pool) = own.lock().expect("the slot").take() else { return Ok(()) };
        Err(pool.resize(5).expect_err("it would wait for itself").into())
    });
    let pool = Arc::new(builder.build().expect("a thread"));
    *slot.lock().expect("the slot") = Some(Arc::clone(&pool));
    let refused = pool.resize(2).expect_err("the step failed").to_string();
    assert_eq!(refused, "a worker could not begin: a worker cannot resize its pool in its own first step");
}

#[test]
fn a_job_may_resize_its_own_pool() {
    let pool = Arc::new(pool_of(1, 10));
    let inner = Arc::clone(&pool);
    let resized = pool.submit(move || inner.resize(2).is_ok()).expect("room").join();
    assert_eq!((resized, pool.stats().workers), (Ok(true), 2));
}

#[test]
fn a_registry_has_the_pool_under_its_name() {
    let registry = prometheus::Registry::new();
    let pool = Pool::builder("jobs").workers(2).registry(&registry).build().expect("threads");
    pool.submit(|| {}).expect("room").join().expect("it returns");
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    for line in [
        r#"millpond_pool_workers{pool="jobs"} 2"#,
        r#"millpond_pool_jobs_total{pool="jobs",outcome="completed"} 1"#,
        r#"millpond_pool_job_duration_seconds_count{pool="jobs"} 1"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let again = Pool::builder("jobs").registry(&registry).build().expect_err("the name is taken");
    assert!(matches!(again, PoolError::Register { .. }), "{again:?}");
    Pool::builder("others").registry(&registry).build().expect("another name");
    drop(pool);
    Pool::builder("jobs").registry(&registry).build().expect("the name is free when its pool is gone");
}

#[test]
fn a_pool_without_times_counts_all_the_same() {
    let registry = prometheus::Registry::new();
    let pool = Pool::builder("bare").timed(false).registry(&registry).build().expect("threads");
    for _ in 0..10 {
        pool.submit(|| thread::sleep(Duration::from_millis(1))).expect("room").join().expect("it returns");
    }
    let stats = pool.stats();
    assert_eq!((stats.completed, stats.busy_time, broken_law(&stats)), (10, Duration::ZERO, None));
    let latch = Latch::default();
    let wait = latch.clone();
    pool.resize(1).expect("fewer workers need no thread");
    eventually("the others leave", || (pool.stats().workers == 1).then_some(()));
    pool.execute(move || wait.wait()).expect("room");
    pool.execute(|| {}).expect("room");
    eventually("one waits", || (pool.stats().queue_depth == 1).then_some(()));
    assert_eq!((pool.oldest_age(), pool.stats().longest_running), (Duration::ZERO, Duration::ZERO));
    latch.open();
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    assert!(text.contains(r#"millpond_pool_job_duration_seconds_count{pool="bare"} 0"#), "{text}");
}

#[test]
fn durations_are_counted_by_their_size() {
    let pool = pool_of(1, 10);
    for _ in 0..5 {
        pool.submit(|| thread::sleep(Duration::from_millis(2))).expect("room").join().expect("it returns");
    }
    let lasted = pool.stats().job_duration;
    assert_eq!(lasted.count(), 5);
    assert!(lasted.sum() >= Duration::from_millis(10), "{:?}", lasted.sum());
    let by_size: Vec<_> = lasted.cumulative().collect();
    assert!(by_size.is_sorted() && by_size.len() > 10, "{by_size:?}");
    let (least, most) = (by_size[0], by_size[by_size.len() - 1]);
    assert_eq!((least, most), ((Duration::from_micros(10), 0), (Duration::from_secs(60), 5)));
    let too_short = by_size.iter().filter(|(limit, _)| *limit < Duration::from_millis(2));
    assert_eq!(too_short.map(|(_, count)| count).max(), Some(&0));
}

#[test]
fn after_an_abort_no_job_waits() {
    let (pool, latch) = held(1, 10);
    (0..3).for_each(|_| submit(&pool, || {}));
    eventually("they wait", || (pool.oldest_age() > Duration::ZERO).then_some(()));
    assert_eq!(pool.abort().dropped, 3);
    assert_eq!((pool.oldest_age(), pool.stats().queue_oldest_age), (Duration::ZERO, Duration::ZERO));
    latch.open();
}

#[test]
fn a_drain_counts_only_jobs_that_ended_since_it_began() {
    let (pool, latch) = held(1, 20);
    let cancellable = |jobs: usize| (0..jobs).map(|_| pool.submit(|| ()).expect("room")).collect::<Vec<_>>();
    let panicking = |jobs: usize| (0..jobs).for_each(|_| submit(&pool, || panic!("on purpose")));
    // Some jobs of each kind end before the drain.
    assert!(cancellable(2).iter().all(millpond::JobHandle::cancel));
    let late = pool.with_deadline(Duration::ZERO);
    (0..3).for_each(|_| drop(late.submit(|| ()).expect("room")));
    panicking(4);
    latch.open();
    eventually("they ended", || {
        let stats = pool.stats();
        ((stats.cancelled, stats.expired, stats.panicked) == (2, 3, 4) && stats.busy == 0).then_some(())
    });
    let latch = Latch::default();
    let wait = latch.clone();
    submit(&pool, move || wait.wait());
    eventually("the worker is held", || (pool.stats().busy == 1).then_some(()));
    let jobs = cancellable(3);
    panicking(5);
    let drained = drain_then(&pool, || {
        assert!(jobs.iter().all(millpond::JobHandle::cancel));
        latch.open();
    });
    assert_eq!((drained.finished, drained.cancelled, drained.dropped, drained.running), (6, 3, 0, 0));
}

#[test]
fn an_abort_counts_only_jobs_that_it_dropped() {
    let (pool, latch) = held(1, 10);
    let late = pool.with_deadline(Duration::from_millis(1)).submit(|| ()).expect("room");
    assert_eq!(late.join(), Err(millpond::JobError::Expired));
    assert!(pool.submit(|| ()).expect("room").cancel());
    submit(&pool, || ());
    let (first, again) = (pool.abort(), pool.abort());
    latch.open();
    assert_eq!((first.cancelled, first.dropped), (0, 1));
    assert_eq!((first.stats.cancelled, first.stats.expired, first.stats.aborted), (1, 1, 1));
    assert_eq!((again.cancelled, again.dropped), (0, 0));
}

#[test]
fn the_source_of_an_error_is_not_in_its_text() {
    use std::error::Error;
    let beneath = |error: &PoolError| error.source().map(ToString::to_string);
    let failing = || Pool::builder("errors").workers(1);
    let refused = || std::io::Error::other("the system's words");

    let init = failing().on_worker_start(|_| Err("no luck".into())).build().expect_err("it cannot begin");
    assert_eq!((init.to_string(), beneath(&init)), ("a worker could not begin: no luck".to_owned(), None));
    let init =
        failing().on_worker_start(move |_| Err(Box::new(PoolError::Spawn { started: 0, source: refused() })));
    let init = init.build().expect_err("it cannot begin");
    assert_eq!(
        beneath(&init).as_deref(),
        Some("the system's words"),
        "the text of the step's error is in the pool's error already"
    );

    let registry = prometheus::Registry::new();
    let _first = failing().registry(&registry).build().expect("the name is free");
    let taken = failing().registry(&registry).build().expect_err("the name is taken");
    assert!(beneath(&taken).is_some_and(|said| said.contains("Duplicate")), "{taken:?}");

    let spawn = PoolError::Spawn { started: 3, source: refused() };
    assert_eq!(spawn.to_string(), "the system gave 3 worker threads and refused the next");
    assert_eq!(beneath(&spawn).as_deref(), Some("the system's words"));
    let name = failing().workers(0).build().expect_err("no worker");
    assert_eq!(beneath(&name), None);
}

/// The worker takes both waiting jobs, and no job after them. So the submitter that is woken first has to wake the second.
#[test]
fn room_for_two_jobs_lets_two_submitters_in() {
    for round in 0..20 {
        let (pool, latch) = held(1, 2);
        let last = Latch::default();
        let wait = last.clone();
        submit(&pool, || {});
        submit(&pool, move || wait.wait());
        thread::scope(|scope| {
            let waits = || pool.submit_timeout(|| {}, PATIENCE).is_ok();
            let submitters = [(); 2].map(|()| spawn_named(scope, "one-of-two", waits));
            all_asleep("one-of-two", 2);
            latch.open();
            let both = submitters.map(|submitter| submitter.join().expect("it returns"));
            assert_eq!(both, [true, true], "round {round}");
        });
        last.open();
    }
}
