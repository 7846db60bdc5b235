//! A queue's capacity is the number of jobs that wait, and the numbers never show more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use millpond::{JobError, JobHandle, Pool, Rejected};

use crate::common::pools::{Latch, all_asleep, broken_law, held, pool_of, timed};
use crate::common::{PATIENCE, eventually};
use crate::{in_time, join, submit};

/// Submits jobs that hold their workers, until one is refused, and returns how many were admitted. When it returns, all
/// of them have ended.
fn burst(pool: &Pool) -> usize {
    let latch = Latch::default();
    let mut jobs = Vec::new();
    loop {
        let wait = latch.clone();
        match pool.try_submit(move || wait.wait()) {
            Ok(job) => jobs.push(job),
            Err(refused) => {
                assert!(matches!(refused, Rejected::Full(_)), "{refused:?}");
                break;
            }
        }
        assert_eq!(broken_law(&pool.stats()), None);
    }
    let admitted = jobs.len();
    latch.open();
    jobs.into_iter().for_each(|job| assert_eq!(join(job), Ok(())));
    assert!(pool.wait_idle(PATIENCE));
    admitted
}

#[test]
fn idle_workers_and_the_queue_take_exactly_as_many_jobs_as_they_hold() {
    for workers in [1, 2, 8] {
        for capacity in [0, 1, 2, 16] {
            let pool = pool_of(workers, capacity);
            for round in 0..20 {
                let admitted = burst(&pool);
                assert_eq!(
                    admitted,
                    workers + capacity,
                    "round {round} of {workers} workers, capacity {capacity}"
                );
            }
        }
    }
}

#[test]
fn submitters_that_race_fill_the_pool_exactly() {
    for (workers, capacity) in [(1, 0), (4, 0), (3, 2), (8, 1)] {
        for round in 0..50 {
            let (pool, latch) = (pool_of(workers, capacity), Latch::default());
            let admitted: usize = thread::scope(|scope| {
                let submitters: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            let attempts = (0..workers + capacity).map(|_| {
                                let wait = latch.clone();
                                pool.try_execute(move || wait.wait())
                            });
                            attempts.filter(Result::is_ok).count()
                        })
                    })
                    .collect();
                submitters.into_iter().map(|submitter| submitter.join().expect("a submitter")).sum()
            });
            latch.open();
            assert_eq!(
                admitted,
                workers + capacity,
                "round {round} of {workers} workers, capacity {capacity}"
            );
        }
    }
}

#[test]
fn with_capacity_0_a_job_is_admitted_if_a_worker_is_free_for_it() {
    let (pool, latch) = held(1, 0);
    assert!(matches!(pool.try_submit(|| 1), Err(Rejected::Full(_))));
    let (refused, took) = timed(|| pool.submit_timeout(|| 2, Duration::from_millis(20)));
    assert!(matches!(refused, Err(Rejected::Full(_))) && took >= Duration::from_millis(20), "{took:?}");
    // Another worker is free, so jobs are admitted one at a time.
    pool.resize(2).expect("a thread");
    for number in 0..100 {
        let job = pool.submit_timeout(move || number, PATIENCE).expect("a worker is free");
        assert_eq!((join(job), pool.stats().queue_depth), (Ok(number), 0));
    }
    latch.open();
}

#[test]
fn with_capacity_0_a_submit_waits_for_a_free_worker() {
    let (pool, latch) = held(1, 0);
    thread::scope(|scope| {
        let waiting = [(); 3].map(|()| {
            let builder = thread::Builder::new().name("hand-over".to_owned());
            builder.spawn_scoped(scope, || pool.submit(|| 5).map(join)).expect("a thread")
        });
        all_asleep("hand-over", 3);
        assert_eq!(pool.stats().queue_depth, 0, "submitters that wait are not jobs that wait");
        latch.open();
        for submitter in waiting {
            assert!(matches!(submitter.join().expect("it returns"), Ok(Ok(5))));
        }
    });
    assert_eq!(pool.stats().rejected_full, 0);
}

#[test]
fn each_cancelled_job_makes_room_for_exactly_one_more() {
    let (pool, latch) = held(2, 5);
    let jobs: Vec<_> = (0..5).map(|number| submit(&pool, move || number)).collect();
    assert!(matches!(pool.try_execute(|| ()), Err(Rejected::Full(_))));
    assert!(jobs[1].cancel() && jobs[3].cancel());
    let more = [submit(&pool, || 10), submit(&pool, || 11)];
    assert!(matches!(pool.try_execute(|| ()), Err(Rejected::Full(_))));
    latch.open();
    let outcomes = jobs.into_iter().chain(more).map(join).collect::<Vec<_>>();
    let cancelled = Err(JobError::Cancelled);
    assert_eq!(outcomes, [Ok(0), cancelled.clone(), Ok(2), cancelled, Ok(4), Ok(10), Ok(11)]);
}

/// A job may be cancelled before a worker has taken it, also if it was admitted for an idle worker.
#[test]
fn after_cancels_that_race_with_workers_the_pool_takes_as_many_as_before() {
    for (workers, capacity) in [(1, 0), (2, 1), (4, 3)] {
        let pool = pool_of(workers, capacity);
        let mut random = fastrand::Rng::with_seed(workers as u64);
        for round in 0..300 {
            let jobs = (0..random.usize(1..10)).filter_map(|_| pool.try_submit(|| ()).ok());
            let jobs: Vec<_> =
                jobs.inspect(|job| (0..random.u32(0..3)).for_each(|_| _ = job.cancel())).collect();
            jobs.into_iter().for_each(|job| assert!(matches!(join(job), Ok(()) | Err(JobError::Cancelled))));
            if round % 30 == 0 {
                assert!(pool.wait_idle(PATIENCE));
                assert_eq!(burst(&pool), workers + capacity, "round {round}, {workers} workers");
            }
        }
        assert_eq!(broken_law(&pool.stats()), None);
    }
}

#[test]
fn after_a_resize_the_pool_takes_what_the_new_workers_hold() {
    for capacity in [0, 2] {
        let pool = pool_of(2, capacity);
        for workers in [5, 1, 3, 2, 8, 1] {
            pool.resize(workers).expect("threads");
            eventually("the others leave", || (pool.stats().workers == workers).then_some(()));
            assert_eq!(burst(&pool), workers + capacity, "{workers} workers, capacity {capacity}");
        }
    }
}

#[test]
fn a_worker_that_comes_makes_room_in_a_full_queue() {
    let (pool, latch) = held(1, 2);
    let second = Latch::default();
    let wait = second.clone();
    let waiting = [submit(&pool, move || wait.wait()), submit(&pool, || ())];
    assert!(matches!(pool.try_execute(|| ()), Err(Rejected::Full(_))));
    thread::scope(|scope| {
        let submitter = scope.spawn(|| pool.submit(|| 3).map(join));
        pool.resize(2).expect("a thread");
        // The new worker takes the first of the two, so the submitter's job finds room.
        eventually("it is admitted", || (pool.stats().submitted == 4).then_some(()));
        second.open();
        assert!(matches!(submitter.join().expect("it returns"), Ok(Ok(3))));
    });
    latch.open();
    assert_eq!(waiting.map(join), [Ok(()), Ok(())]);
}

/// Producers of every kind, cancels and resizes, read all the while.
#[test]
fn the_depth_exceeds_the_capacity_in_no_reading() {
    for capacity in [0, 1, 3] {
        let pool = Arc::new(pool_of(4, capacity));
        let over = Arc::new(AtomicBool::new(false));
        let producers: Vec<_> = (0..4)
            .map(|producer| {
                let (pool, over) = (Arc::clone(&pool), Arc::clone(&over));
                thread::spawn(move || {
                    let mut random = fastrand::Rng::with_seed(producer);
                    while !over.load(Ordering::Relaxed) {
                        let spins = random.u32(0..200);
                        let job = move || (0..spins).for_each(|_| std::hint::spin_loop());
                        let job = match random.u32(0..4) {
                            0 => pool.submit(job),
                            1 => pool.submit_timeout(job, Duration::from_micros(50)),
                            2 => pool.with_deadline(Duration::from_micros(50)).try_submit(job),
                            _ => pool.try_submit(job),
                        };
                        if random.bool() {
                            job.ok().as_ref().map(JobHandle::cancel);
                        }
                    }
                })
            })
            .collect();
        let (start, mut deepest) = (Instant::now(), 0);
        let mut random = fastrand::Rng::with_seed(99);
        while start.elapsed() < Duration::from_millis(700) {
            let stats = pool.stats();
            assert_eq!(broken_law(&stats), None);
            assert!(stats.queue_depth <= capacity as u64, "{stats:?}");
            deepest = deepest.max(stats.queue_depth);
            if random.u32(0..100) == 0 {
                pool.resize(random.usize(1..6)).expect("threads");
            }
        }
        over.store(true, Ordering::Relaxed);
        in_time("the producers", move || {
            producers.into_iter().for_each(|producer| producer.join().expect("a producer"));
        });
        assert!(capacity == 0 || deepest > 0, "no job ever waited");
        assert!(pool.wait_idle(PATIENCE));
        assert_eq!(broken_law(&pool.stats()), None);
    }
}

#[test]
fn the_oldest_age_is_zero_while_no_job_waits() {
    let (pool, latch) = held(2, 4);
    assert_eq!((pool.oldest_age(), pool.stats().queue_oldest_age), (Duration::ZERO, Duration::ZERO));
    let job = submit(&pool, || ());
    eventually("it ages", || (pool.oldest_age() > Duration::ZERO).then_some(()));
    latch.open();
    assert_eq!(join(job), Ok(()));
    assert_eq!((pool.oldest_age(), pool.stats().queue_oldest_age), (Duration::ZERO, Duration::ZERO));
}
