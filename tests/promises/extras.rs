//! What the pool offers beyond submitting and joining.

use std::cell::Cell;
use std::error::Error;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use millpond::{
    CancelToken, Durations, JobError, JobHandle, MapError, Pool, PoolError, Rejected, Stats, block_on,
};

use crate::common::pools::{Latch, all_asleep, broken_law, held, pool_of};
use crate::common::{PATIENCE, eventually};
use crate::{Log, Wakes, in_time, join, no_thread_is_left, submit};

// `submit_async`

/// The runtime has one thread, on which the other task runs too.
#[test]
fn submit_async_waits_for_room_and_blocks_no_thread() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    let outcome = in_time("the submission", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async {
            let opener = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                latch.open();
            });
            let outcome = pool.submit_async(|| 2).await.expect("the pool is not draining").await;
            opener.await.expect("the task");
            (outcome, pool.stats().rejected_full)
        })
    });
    assert_eq!((join(queued), outcome), (Ok(1), (Ok(2), 0)));
}

#[test]
fn submit_async_admits_at_once_if_there_is_room() {
    let pool = pool_of(1, 1);
    let wakes = Arc::new(Wakes::default());
    let polled = pin!(pool.submit_async(|| 2)).poll(&mut Context::from_waker(&wakes.waker()));
    let Poll::Ready(Ok(job)) = polled else { panic!("there is room") };
    assert_eq!(join(job), Ok(2));
}

#[test]
fn submit_async_gives_the_job_back_when_the_pool_drains() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 1);
    let wakes = Arc::new(Wakes::default());
    {
        let mut submission = pin!(pool.submit_async(|| 7));
        assert!(submission.as_mut().poll(&mut Context::from_waker(&wakes.waker())).is_pending());
        pool.close();
        let refused = wakes.finish("the submission", submission);
        let Err(Rejected::Draining(job)) = refused else { panic!("a closed pool admitted a job") };
        assert_eq!(job.into_inner()(), 7);
    }
    assert!(matches!(block_on(pool.submit_async(|| 8)), Err(Rejected::Draining(_))));
    assert_eq!(pool.stats().rejected_draining, 2);
    latch.open();
    assert_eq!(join(queued), Ok(1));
}

/// Room for one is given to the first task, which is dropped before or after its wake-up. The second must not wait on.
#[test]
fn a_dropped_submit_async_loses_no_wake_up_for_the_next() {
    for dropped_before in [true, false] {
        let (pool, latch) = held(1, 1);
        let last = Latch::default();
        let (wait, pool) = (last.clone(), Arc::new(pool));
        // When the latch opens, the worker takes this job and is held again, with room for one behind it.
        let queued = submit(&pool, move || wait.wait());
        let (first, second) = (Arc::new(Wakes::default()), Arc::new(Wakes::default()));
        let mut gone = Box::pin(pool.submit_async(|| 1));
        let mut stays = Box::pin(pool.submit_async(|| 2));
        assert!(gone.as_mut().poll(&mut Context::from_waker(&first.waker())).is_pending());
        assert!(stays.as_mut().poll(&mut Context::from_waker(&second.waker())).is_pending());
        if dropped_before {
            drop(gone);
            latch.open();
        } else {
            latch.open();
            eventually("a task is woken", || (first.count() + second.count() > 0).then_some(()));
            drop(gone);
        }
        let admitted = second.finish("the second submission", stays.as_mut());
        let job = admitted.expect("the pool is not draining");
        last.open();
        assert_eq!((join(queued), join(job)), (Ok(()), Ok(2)));
    }
}

#[test]
fn a_dropped_submit_async_lets_a_waiting_thread_in() {
    let (pool, latch) = held(1, 1);
    let last = Latch::default();
    let wait = last.clone();
    let queued = submit(&pool, move || wait.wait());
    thread::scope(|scope| {
        let wakes = Arc::new(Wakes::default());
        let mut submission = Box::pin(pool.submit_async(|| 1));
        assert!(submission.as_mut().poll(&mut Context::from_waker(&wakes.waker())).is_pending());
        let builder = thread::Builder::new().name("behind-async".to_owned());
        let blocked = builder.spawn_scoped(scope, || pool.submit(|| 2)).expect("a thread");
        all_asleep("behind-async", 1);
        latch.open();
        drop(submission);
        let admitted = blocked.join().expect("it returns").expect("it is admitted");
        last.open();
        assert_eq!((join(queued), join(admitted)), (Ok(()), Ok(2)));
    });
}

/// Tasks and threads submit to a small queue, and some of the tasks give up. Each job that was admitted runs.
#[test]
fn tasks_that_give_up_at_random_leave_no_submitter_behind() {
    let pool = Arc::new(pool_of(2, 2));
    let submitters: Vec<_> = (0..4_u64)
        .map(|seed| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut admitted = Vec::new();
                for number in 0..3_000_u64 {
                    if seed == 0 {
                        admitted.push(pool.submit(move || number).expect("the pool is not draining"));
                        continue;
                    }
                    let mut submission = Box::pin(pool.submit_async(move || number));
                    if random.u32(0..3) == 0 {
                        let wakes = Arc::new(Wakes::default());
                        let polled = submission.as_mut().poll(&mut Context::from_waker(&wakes.waker()));
                        if let Poll::Ready(handle) = polled {
                            admitted.push(handle.expect("the pool is not draining"));
                        }
                    } else {
                        admitted.push(block_on(submission).expect("the pool is not draining"));
                    }
                }
                let count = admitted.len();
                admitted.into_iter().for_each(|job| assert!(join(job).is_ok()));
                count
            })
        })
        .collect();
    let counts = in_time("the submitters", move || {
        submitters.into_iter().map(|submitter| submitter.join().expect("it returns")).sum::<usize>()
    });
    assert!(pool.wait_idle(PATIENCE));
    assert_eq!((pool.stats().submitted, pool.stats().completed), (counts as u64, counts as u64));
}

// `execute_all`

#[test]
fn execute_all_admits_all_jobs_in_their_order() {
    let (pool, log) = (pool_of(1, 3), Log::default());
    let jobs = (0..1_000).map(|number| {
        let log = log.clone();
        move || log.push(number)
    });
    assert_eq!(pool.execute_all(jobs).expect("the pool is not draining"), 1_000);
    assert!(pool.wait_idle(PATIENCE));
    assert_eq!(log.read(), (0..1_000).collect::<Vec<_>>());
    let stats = pool.stats();
    assert_eq!((stats.submitted, stats.completed, stats.rejected_full), (1_000, 1_000, 0));
    assert_eq!(pool.execute_all(std::iter::empty::<fn()>()).expect("nothing to refuse"), 0);
}

#[test]
fn execute_all_waits_for_room() {
    let (pool, latch) = held(1, 2);
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("all-of-them".to_owned());
        let submitter = builder.spawn_scoped(scope, || pool.execute_all([(); 5].map(|()| || ())));
        let submitter = submitter.expect("a thread");
        all_asleep("all-of-them", 1);
        assert!(!submitter.is_finished());
        latch.open();
        assert!(matches!(submitter.join().expect("it returns"), Ok(5)));
    });
}

/// Admitted, given back, and left in the iterator: together these are all jobs, each once.
#[test]
fn when_the_pool_drains_execute_all_gives_back_what_it_did_not_admit() {
    const JOBS: usize = 1_000;
    let (pool, latch) = held(1, 10);
    let log = Log::default();
    let mut jobs = (0..JOBS).map(|number| {
        let log = log.clone();
        move || log.push(number)
    });
    let refused = thread::scope(|scope| {
        let builder = thread::Builder::new().name("cut-short".to_owned());
        let submitter = builder.spawn_scoped(scope, || pool.execute_all(&mut jobs)).expect("a thread");
        all_asleep("cut-short", 1);
        pool.close();
        submitter.join().expect("it returns")
    });
    let Err(Rejected::Draining(refused)) = refused else { panic!("the queue had no room for all") };
    let refused = refused.into_inner();
    assert_eq!(pool.stats().submitted, 11, "the held job, and ten behind it");
    assert!(!refused.is_empty());
    let not_drawn = jobs.len();
    assert_eq!(10 + refused.len() + not_drawn, JOBS);
    latch.open();
    assert!(pool.wait_idle(PATIENCE));
    refused.into_iter().for_each(|job| job());
    jobs.for_each(|job| job());
    assert_eq!(log.read(), (0..JOBS).collect::<Vec<_>>());
}

// `map` and `map_unordered`

#[test]
fn map_unordered_gives_each_outcome_with_its_item_as_the_jobs_end() {
    let pool = pool_of(3, 10);
    let latches: Vec<_> = (0..3).map(|_| Latch::default()).collect();
    let waits = latches.clone();
    let mut outcomes = pool.map_unordered(0..3, move |number: usize| {
        waits[number].wait();
        if number == 2 {
            resume_unwind(Box::new("the last one panics"));
        }
        number * 10
    });
    latches[1].open();
    assert_eq!(outcomes.next(), Some((1, Ok(10))));
    latches[2].open();
    assert!(matches!(outcomes.next(), Some((2, Err(JobError::Panicked(_))))));
    latches[0].open();
    assert_eq!((outcomes.next(), outcomes.next()), (Some((0, Ok(0))), None));
}

#[test]
fn map_unordered_brings_every_item_once_and_looks_no_further_ahead_than_it_may() {
    for queue_capacity in [0, 1, 100] {
        let pool = pool_of(3, queue_capacity);
        let drawn = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&drawn);
        let items = (0..500_usize).inspect(move |_| _ = counted.fetch_add(1, Ordering::Relaxed));
        let outcomes = pool.map_unordered(items, |item| {
            (0..item * 7919 % 500).for_each(|_| std::hint::spin_loop());
            item + 1
        });
        let mut seen = vec![false; 500];
        for (taken, (item, outcome)) in outcomes.look_ahead(6).enumerate() {
            assert_eq!(outcome, Ok(item + 1));
            assert!(!std::mem::replace(&mut seen[item], true), "item {item} came twice");
            let ahead = drawn.load(Ordering::Relaxed) - taken - 1;
            assert!(ahead <= 6, "{ahead} ahead of the {taken}th");
        }
        assert!(seen.iter().all(|seen| *seen));
        assert_eq!(pool.stats().rejected_full, 0);
    }
}

#[test]
fn map_unordered_ends_after_one_error_when_the_pool_drains() {
    let pool = pool_of(2, 10);
    let mut outcomes = pool.map_unordered(0..100_usize, |item| item).look_ahead(2);
    assert!(matches!(outcomes.next(), Some((_, Ok(_)))));
    pool.close();
    let rest: Vec<_> = outcomes.collect();
    let (ended, failed): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, outcome)| outcome.is_ok());
    assert!(ended.len() <= 2, "{ended:?}");
    assert!(matches!(failed[..], [(_, Err(JobError::Draining))]), "{failed:?}");
}

#[test]
fn the_error_of_a_map_names_its_item() {
    let pool = pool_of(2, 10);
    let outcomes = pool.map(["one", "two", "three", "four"], |word| {
        if word.starts_with('t') {
            std::panic::panic_any(format!("{word} is bad"));
        }
        word.len()
    });
    let outcomes: Vec<_> = outcomes.collect();
    let said = |number: usize| match &outcomes[number] {
        Ok(length) => length.to_string(),
        Err(MapError { item, error: JobError::Panicked(panic), .. }) => {
            format!("{item}: {}", panic.message())
        }
        Err(other) => panic!("{other:?}"),
    };
    assert_eq!([0, 1, 2, 3].map(said), ["3", "1: two is bad", "2: three is bad", "4"]);
    let error = outcomes.into_iter().find_map(Result::err).expect("an error");
    let text = error.to_string();
    assert!(text.contains('1') && text.contains("two is bad"), "{text}");
    let boxed: Box<dyn Error + Send + Sync> = error.into();
    assert_eq!(boxed.to_string(), text);
}

#[test]
fn when_the_pool_drains_map_ends_after_one_error_and_gives_back_the_other_items() {
    let (pool, log) = (pool_of(1, 10), Log::default());
    let its_log = log.clone();
    let mut outcomes = pool.map(0..10_usize, move |item| its_log.push(item)).look_ahead(1);
    for _ in 0..3 {
        assert!(matches!(outcomes.next(), Some(Ok(()))));
    }
    pool.close();
    let error = outcomes.by_ref().find_map(Result::err).expect("the map reports the drain");
    assert_eq!(error.error, JobError::Draining);
    assert!(outcomes.next().is_none() && outcomes.next().is_none(), "the map goes on after the drain");
    let rest: Vec<_> = outcomes.into_rest().collect();
    assert_eq!(
        rest.first(),
        Some(&error.item),
        "the first item that was not admitted is the one of the error"
    );
    let all: Vec<_> = log.read().into_iter().chain(rest).collect();
    assert_eq!(all, (0..10).collect::<Vec<_>>(), "each item was worked on or comes back");
}

#[test]
fn into_rest_has_the_items_that_were_not_admitted() {
    let pool = pool_of(1, 10);
    let untouched: Vec<_> = pool.map(0..5, |item| item).into_rest().collect();
    assert_eq!(untouched, [0, 1, 2, 3, 4]);
    let mut all = pool.map(0..5, |item| item);
    assert_eq!(all.by_ref().filter(Result::is_ok).count(), 5);
    assert_eq!(all.into_rest().count(), 0);
    // An item that was drawn, and whose job found no room, comes back as well.
    let (pool, latch) = held(1, 2);
    let drawn = Log::default();
    let its_log = drawn.clone();
    let items = (0..10_usize).inspect(move |item| its_log.push(*item));
    let mut outcomes = pool.map(items, |item| item).look_ahead(8);
    let opener = thread::spawn(move || {
        // Two jobs fill the queue, so the job of the third item finds no room.
        eventually("the third item is drawn", || (drawn.read().len() >= 3).then_some(()));
        latch.open();
    });
    assert!(matches!(outcomes.next(), Some(Ok(0))));
    let mut taken = 1;
    opener.join().expect("the opener");
    pool.close();
    while let Some(Ok(item)) = outcomes.next() {
        assert_eq!(item, taken);
        taken += 1;
    }
    let rest: Vec<_> = outcomes.into_rest().collect();
    assert_eq!(rest, (taken..10).collect::<Vec<_>>());
}

// Cancelling a job with its handle.

#[test]
fn a_handle_that_cancels_when_dropped_cancels_its_job() {
    let (pool, latch) = held(1, 10);
    let log = Log::default();
    let its_log = log.clone();
    drop(submit(&pool, move || its_log.push(1)).cancel_on_drop());
    assert_eq!((pool.stats().cancelled, pool.stats().queue_depth), (1, 0));
    latch.open();
    // A job that runs is asked to stop.
    let (running, runs) = mpsc::channel();
    let (stopped, stops) = mpsc::channel();
    let job = submit(&pool, move || {
        let token = CancelToken::current().expect("this is a job");
        running.send(()).expect("the test waits");
        eventually("it is asked to stop", || token.is_cancelled().then_some(()));
        stopped.send(()).expect("the test waits");
    });
    let job = job.cancel_on_drop();
    runs.recv_timeout(PATIENCE).expect("it runs");
    drop(job);
    stops.recv_timeout(PATIENCE).expect("it stops");
    assert!(log.read().is_empty());
}

#[test]
fn a_handle_that_cancels_when_dropped_brings_its_outcome() {
    let pool = pool_of(1, 10);
    let joined = submit(&pool, || 1).cancel_on_drop();
    assert_eq!(in_time("the join", move || joined.join()), Ok(1));
    let awaited = submit(&pool, || 2).cancel_on_drop();
    assert_eq!(in_time("the await", move || block_on(awaited)), Ok(2));
    assert_eq!(pool.stats().cancelled, 0);
}

#[test]
fn into_handle_takes_the_cancel_back() {
    let (pool, latch) = held(1, 10);
    let job = submit(&pool, || 3).cancel_on_drop().into_handle();
    assert!(!job.is_finished());
    latch.open();
    assert_eq!(join(job), Ok(3));
    let (pool, latch) = held(1, 10);
    drop(submit(&pool, || 4).cancel_on_drop().into_handle());
    latch.open();
    assert_eq!(pool.drain(PATIENCE).stats.completed, 2);
}

/// A task that gives up drops its future, and with it the handle.
#[test]
fn a_task_that_times_out_cancels_its_job() {
    let (pool, latch) = held(1, 10);
    let job = submit(&pool, || ()).cancel_on_drop();
    let timed_out = in_time("the timeout", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let timeout = async { tokio::time::timeout(Duration::from_millis(10), job).await.is_err() };
        runtime.expect("a runtime").block_on(timeout)
    });
    assert!(timed_out);
    assert_eq!((pool.stats().cancelled, pool.stats().queue_depth), (1, 0));
    latch.open();
}

// Scoped pools.

#[test]
fn jobs_of_a_scoped_pool_may_borrow() {
    let numbers: Vec<u64> = (1..=10_000).collect();
    let (hits, mut done) = (AtomicUsize::new(0), [false; 10]);
    let total = Pool::builder("scoped").workers(3).queue_capacity(4).scoped(|pool| {
        let sums: Vec<_> = numbers
            .chunks(1_000)
            .map(|chunk| pool.submit(|| chunk.iter().sum::<u64>()).expect("the pool is not draining"))
            .collect();
        for flag in &mut done {
            pool.execute(|| {
                hits.fetch_add(1, Ordering::Relaxed);
                *flag = true;
            })
            .expect("the pool is not draining");
        }
        sums.into_iter().map(|sum| sum.join().expect("it returns")).sum::<u64>()
    });
    assert_eq!(total.expect("the threads"), 50_005_000);
    // Nobody joined these jobs. The scope has waited for them.
    assert_eq!((hits.into_inner(), done), (10, [true; 10]));
    no_thread_is_left("mill-scoped-");
}

#[test]
fn a_scoped_pool_offers_what_a_pool_does() {
    let log = Log::default();
    let stats = Pool::builder("scope").workers(1).queue_capacity(2).scoped(|pool| {
        assert_eq!((pool.name(), pool.stats().workers), ("scope", 1));
        let latch = Latch::default();
        let wait = latch.clone();
        let held = pool.submit(move || wait.wait()).expect("room");
        eventually("the worker is held", || (pool.stats().busy == 1).then_some(()));
        let queued = pool.try_submit(|| 5).expect("room");
        let cancelled = pool.submit_timeout(|| 6, PATIENCE).expect("room");
        assert!(matches!(pool.try_execute(|| ()), Err(Rejected::Full(_))));
        assert!(matches!(pool.try_submit(|| ()), Err(Rejected::Full(_))));
        assert!(matches!(pool.submit_timeout(|| (), Duration::from_millis(5)), Err(Rejected::Full(_))));
        assert!(cancelled.cancel() && cancelled.is_finished());
        assert_eq!(cancelled.join(), Err(JobError::Cancelled));
        let queued = queued.join_timeout(Duration::from_millis(5)).expect_err("the worker is held");
        assert!(!queued.is_finished() && !pool.wait_idle(Duration::from_millis(5)));
        latch.open();
        assert_eq!((block_on(held), queued.join_timeout(PATIENCE).expect("in time")), (Ok(()), Ok(5)));
        let jobs = (0..10).map(|number| {
            let log = &log;
            move || log.push(number)
        });
        assert_eq!(pool.execute_all(jobs).expect("the pool is not draining"), 10);
        assert!(pool.wait_idle(PATIENCE));
        pool.stats()
    });
    let stats = stats.expect("a thread");
    assert_eq!((stats.completed, stats.cancelled, stats.rejected_full), (12, 1, 3));
    assert_eq!(broken_law(&stats), None);
    assert_eq!(log.read(), (0..10).collect::<Vec<_>>());
}

#[test]
fn a_scope_returns_only_when_all_jobs_have_ended() {
    let ended = AtomicUsize::new(0);
    Pool::builder("after")
        .workers(2)
        .queue_capacity(100)
        .scoped(|pool| {
            for _ in 0..50 {
                let job = || {
                    thread::sleep(Duration::from_millis(1));
                    ended.fetch_add(1, Ordering::Relaxed);
                };
                pool.execute(job).expect("room");
            }
            // This handle is dropped while its job waits.
            drop(pool.submit(|| ended.fetch_add(1, Ordering::Relaxed)));
        })
        .expect("the threads");
    assert_eq!(ended.load(Ordering::Relaxed), 51);
}

#[test]
fn a_job_that_panics_in_a_scope_is_an_error_of_its_handle_alone() {
    let ran = AtomicUsize::new(0);
    let outcome = Pool::builder("boom").workers(1).queue_capacity(10).scoped(|pool| {
        let bad = pool.submit(|| -> u32 { resume_unwind(Box::new("on purpose")) }).expect("room");
        pool.execute(|| resume_unwind(Box::new("not joined"))).expect("room");
        let good = pool.submit(|| ran.fetch_add(1, Ordering::Relaxed)).expect("room");
        (bad.join().map_err(|error| error.to_string()), good.join(), pool.stats().panicked)
    });
    let expected = (Err("the job panicked: on purpose".to_owned()), Ok(0), 2);
    assert_eq!(outcome.expect("a thread"), expected);
}

#[test]
fn a_scope_whose_closure_panics_drains_and_does_not_hang() {
    let (said, ran) = in_time("the scope", || {
        let (ran, latch) = (AtomicUsize::new(0), Latch::default());
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            Pool::builder("unwinds").workers(2).queue_capacity(100).scoped(|pool| {
                for _ in 0..20 {
                    pool.execute(|| {
                        latch.wait();
                        ran.fetch_add(1, Ordering::Relaxed);
                    })
                    .expect("room");
                }
                latch.open();
                resume_unwind(Box::new("the closure"));
            })
        }));
        let payload = outcome.expect_err("the closure panicked");
        (millpond::panic_message(&*payload).to_owned(), ran.into_inner())
    });
    assert_eq!((said.as_str(), ran), ("the closure", 20));
    no_thread_is_left("mill-unwinds-");
}

#[test]
fn a_scope_may_be_opened_in_a_job_of_a_scope() {
    let words = ["one", "two", "three"];
    let lengths = Pool::builder("outer").workers(2).queue_capacity(4).scoped(|outer| {
        let rows: Vec<_> = (0..4_usize)
            .map(|row| {
                let job = move || {
                    let inner = Pool::builder("inner").workers(2).queue_capacity(1).scoped(|inner| {
                        let jobs: Vec<_> = words
                            .iter()
                            .map(|word| inner.submit(move || word.len() + row).expect("room"))
                            .collect();
                        jobs.into_iter().map(|job| job.join().expect("it returns")).sum::<usize>()
                    });
                    inner.expect("the threads")
                };
                outer.submit(job).expect("room")
            })
            .collect();
        rows.into_iter().map(|row| row.join().expect("it returns")).collect::<Vec<_>>()
    });
    assert_eq!(lengths.expect("the threads"), [11, 14, 17, 20]);
}

#[test]
fn a_scope_that_cannot_start_is_an_error_and_calls_nothing() {
    let called = AtomicBool::new(false);
    let refused = Pool::builder("none").workers(0).scoped(|_| called.store(true, Ordering::Relaxed));
    assert!(matches!(refused, Err(PoolError::Workers(0))));
    let builder = Pool::builder("none").workers(3);
    let builder = builder.on_worker_start(|number| if number == 1 { Err("no luck".into()) } else { Ok(()) });
    let refused = builder.scoped(|_| called.store(true, Ordering::Relaxed));
    assert!(matches!(refused, Err(PoolError::Init { .. })), "{refused:?}");
    assert!(!called.load(Ordering::Relaxed));
    no_thread_is_left("mill-none-");
}

// Spans.

/// The name of the span that the calling thread is in.
fn current_span() -> Option<&'static str> {
    tracing::Span::current().metadata().map(tracing::Metadata::name)
}

/// The only test that needs a subscriber, which is the whole process's.
#[test]
fn a_job_runs_in_the_span_of_its_submitter_if_the_builder_asks_for_it() {
    tracing::subscriber::set_global_default(tracing_subscriber::registry()).expect("it is the only one");
    let with = |carry: bool| {
        let builder = Pool::builder("spans").workers(1).queue_capacity(16).carry_span(carry);
        Arc::new(builder.build().expect("a thread"))
    };
    let pool = with(true);
    let inner = Arc::clone(&pool);
    let (outside, nested, executed, mapped, late) = {
        let _request = tracing::info_span!("request").entered();
        let nested = submit(&pool, move || {
            let _step = tracing::info_span!("step").entered();
            (current_span(), submit(&inner, current_span).join())
        });
        let (report, executed) = mpsc::channel();
        pool.execute(move || report.send(current_span()).expect("the test waits")).expect("room");
        let mapped: Vec<_> =
            pool.map(0..2, |_| current_span()).map(|span| span.expect("it returns")).collect();
        let late = pool.with_deadline(PATIENCE).try_submit(current_span).expect("room");
        (submit(&pool, current_span), nested, executed, mapped, late)
    };
    assert_eq!(join(outside), Ok(Some("request")));
    assert_eq!(join(nested), Ok((Some("step"), Ok(Some("step")))));
    assert_eq!(executed.recv_timeout(PATIENCE), Ok(Some("request")));
    assert_eq!(mapped, [Some("request"); 2]);
    assert_eq!(join(late), Ok(Some("request")));
    assert_eq!(join(submit(&pool, current_span)), Ok(None), "the worker has left the span");
    // A job that panics leaves its span as well.
    let bad = tracing::info_span!("bad").in_scope(|| submit(&pool, || resume_unwind(Box::new("on purpose"))));
    assert!(matches!(join::<()>(bad), Err(JobError::Panicked(_))));
    assert_eq!(join(submit(&pool, current_span)), Ok(None));
    let plain = with(false);
    let outside = tracing::info_span!("request").in_scope(|| submit(&plain, current_span));
    assert_eq!(join(outside), Ok(None));
}

// Errors.

/// A `Cell` can be sent, and cannot be shared. The errors of the closures that capture it can be shared all the same.
#[test]
fn the_question_mark_works_on_every_error_whatever_the_job_captures() {
    type Any = Box<dyn Error + Send + Sync>;
    fn all(pool: &Pool) -> Result<u32, Any> {
        let cell = || {
            let cell = Cell::new(5_u32);
            move || cell.get()
        };
        let mut sum = pool.submit(cell())?.join()?;
        sum += pool.try_submit(cell())?.join()?;
        sum += pool.submit_timeout(cell(), PATIENCE)?.join()?;
        sum += pool.with_deadline(PATIENCE).submit(cell())?.join()?;
        sum += block_on(pool.submit_async(cell()))?.join()?;
        // The same for jobs without a result.
        let plain = || {
            let read = cell();
            move || assert_eq!(read(), 5)
        };
        pool.execute(plain())?;
        pool.try_execute(plain())?;
        pool.execute_all([plain(), plain()])?;
        for outcome in pool.map([Cell::new(5)], |cell| cell.get()) {
            sum += outcome?;
        }
        sum += Pool::builder("one").workers(1).build()?.submit(cell())?.join()?;
        Ok(sum)
    }
    fn refused(pool: &Pool) -> Result<(), Any> {
        let cell = Cell::new(5_u32);
        drop(pool.submit(move || cell.get())?);
        Ok(())
    }
    let pool = pool_of(1, 10);
    assert_eq!(all(&pool).expect("nothing is refused"), 35);
    pool.close();
    assert_eq!(refused(&pool).expect_err("the pool is closed").to_string(), "the pool is draining");
}

#[test]
fn a_refusal_gives_the_job_back() {
    let (pool, latch) = held(1, 1);
    let queued = submit(&pool, || 0);
    let captured = Arc::new(());
    let job = || {
        let captured = Arc::clone(&captured);
        move || Arc::strong_count(&captured)
    };
    let Err(refused) = pool.try_submit(job()) else { panic!("there is no room") };
    assert_eq!(refused.to_string(), "the pool's queue is full");
    assert_eq!(refused.into_job()(), 2);
    let Err(refused) = pool.try_submit(job()) else { panic!("there is no room") };
    let without = refused.without_job();
    assert!(matches!(without, Rejected::Full(_)));
    assert_eq!(Arc::strong_count(&captured), 1, "the job is dropped");
    latch.open();
    assert_eq!(join(queued), Ok(0));
}

// Numbers for readers.

/// Where the numbers place the `q`-quantile: between these two limits. The second is `None` beyond the last limit.
fn place(durations: &Durations, q: f64) -> (Duration, Option<Duration>) {
    #[expect(clippy::cast_precision_loss, reason = "the counts are small")]
    let rank = q * durations.count() as f64;
    let mut below = Duration::ZERO;
    for (limit, count) in durations.cumulative() {
        #[expect(clippy::cast_precision_loss, reason = "the counts are small")]
        let count_as_float = count as f64;
        if count > 0 && count_as_float >= rank {
            return (below, Some(limit));
        }
        below = limit;
    }
    (below, None)
}

#[test]
fn means_and_quantiles_are_those_of_the_durations() {
    let pool = pool_of(1, 10);
    let none = pool.stats().job_duration;
    assert_eq!((none.mean(), none.quantile(0.5)), (None, None));
    for number in 0..50_u64 {
        let length = if number % 10 == 9 { 40 } else { 2 };
        assert_eq!(join(submit(&pool, move || thread::sleep(Duration::from_millis(length)))), Ok(()));
    }
    let durations = pool.stats().job_duration;
    let mean = durations.mean().expect("there are durations");
    let exact = durations.sum() / 50;
    assert!(mean.abs_diff(exact) <= Duration::from_nanos(1), "{mean:?}, not {exact:?}");
    let mut last = Duration::ZERO;
    for q in [0.0, 0.1, 0.5, 0.85, 0.95, 0.99, 1.0] {
        let quantile = durations.quantile(q).expect("there are durations");
        let (least, most) = place(&durations, q);
        assert!(quantile >= least && most.is_none_or(|most| quantile <= most), "{q}: {quantile:?}");
        assert!(quantile >= last, "{q}: {quantile:?} after {last:?}");
        last = quantile;
    }
    // The lengths of the jobs are known, apart from what a busy machine adds to them.
    let longest = durations.quantile(0.99).expect("there are durations");
    let shortest = durations.quantile(0.1).expect("there are durations");
    assert!(
        longest >= Duration::from_millis(20) && shortest >= Duration::from_millis(1),
        "{shortest:?}, {longest:?}"
    );
    assert!(shortest < longest, "{shortest:?}, {longest:?}");
}

#[test]
fn stats_print_as_a_table_with_means_and_quantiles() {
    let (pool, latch) = held(2, 7);
    let table = |stats: &Stats| stats.to_string();
    let jobs: Vec<_> = (0..5).map(|_| submit(&pool, || ())).collect();
    assert!(jobs.iter().take(3).all(JobHandle::cancel));
    let stats = pool.stats();
    let text = table(&stats);
    // Each of these words has its number on the same line.
    for (word, number) in [
        ("workers", stats.workers as u64),
        ("busy", stats.busy as u64),
        ("queue", stats.queue_capacity as u64),
        ("queue", stats.queue_depth),
        ("submitted", stats.submitted),
        ("cancelled", stats.cancelled),
    ] {
        let found = text.lines().any(|line| {
            let is_number = |part: &str| part == number.to_string();
            line.contains(word) && line.split(|c: char| !c.is_ascii_digit()).any(is_number)
        });
        assert!(found, "no line with {word} and {number}:\n{text}");
    }
    latch.open();
    jobs.into_iter().for_each(|job| drop(join(job)));
    assert!(pool.wait_idle(PATIENCE));
    let text = table(&pool.stats());
    for word in ["mean", "50", "99", "completed", "panicked", "expired", "aborted"] {
        assert!(text.contains(word), "no {word}:\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "lines are too long:\n{text}");
    assert!(text.lines().count() >= 5, "this is no table:\n{text}");
}
