//! Nested use: a job may submit jobs to its own pool and wait for them, also if all workers do so at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use millpond::{JobError, JobHandle, Pool, Rejected, Until, as_completed, block_on, wait};

use crate::common::pools::{Latch, all_asleep, held, pool_of, timed};
use crate::common::{PATIENCE, eventually};
use crate::{Log, in_time, join, named, scraped, submit};

/// Runs a job on a pool of one worker, and gives the job that pool.
fn on_one_worker<T: Send + 'static>(
    queue_capacity: usize,
    job: impl FnOnce(&Arc<Pool>) -> T + Send + 'static,
) -> T {
    let pool = Arc::new(pool_of(1, queue_capacity));
    let inner = Arc::clone(&pool);
    scraped(&pool.clone(), "the job", move || pool.submit(move || job(&inner)).expect("room").join())
        .expect("the job returns")
}

#[test]
fn a_map_within_a_map_has_every_result() {
    for (workers, queue_capacity) in [(1, 0), (1, 1), (1, 16), (4, 0), (4, 1), (4, 16)] {
        let pool = Arc::new(pool_of(workers, queue_capacity));
        let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
        let results: Vec<Vec<u64>> = scraped(&pool, "the outer map", move || {
            let rows = outer.map(0..8_u64, move |row| {
                let cells = inner.map(0..4, move |cell| row * 10 + cell);
                cells.map(|cell| cell.expect("no job fails")).collect::<Vec<_>>()
            });
            rows.map(|row| row.expect("no job fails")).collect()
        });
        let expected: Vec<Vec<_>> = (0..8).map(|row| (0..4).map(|cell| row * 10 + cell).collect()).collect();
        assert_eq!(results, expected, "{workers} workers, capacity {queue_capacity}");
        eventually("all are counted", || (pool.stats().completed == 8 + 32).then_some(()));
    }
}

/// A site, and the pages that a crawler has found and visited. Each page is reached from page 0.
struct Site {
    found: Vec<AtomicBool>,
    visited: AtomicUsize,
    /// If so, pages link to others all over the site, and a worker that visits links depth first goes deep.
    tangled: bool,
}

impl Site {
    const PAGES: usize = 400;

    fn new(tangled: bool) -> Arc<Self> {
        let found = (0..Self::PAGES).map(|page| AtomicBool::new(page == 0)).collect();
        Arc::new(Site { found, visited: AtomicUsize::new(0), tangled })
    }

    /// Visits a page, and returns the links that no one has found before.
    fn visit(&self, page: usize) -> impl Iterator<Item = usize> {
        self.visited.fetch_add(1, Ordering::Relaxed);
        let shortcut = if self.tangled { page * 7919 % Self::PAGES } else { page / 4 };
        let links = [page / 2, 2 * page + 1, 2 * page + 2, shortcut].into_iter();
        links.filter(|link| *link < Self::PAGES && !self.found[*link].swap(true, Ordering::Relaxed))
    }

    fn visited(&self) -> usize {
        self.visited.load(Ordering::Relaxed)
    }
}

/// Crawls a site with small queues, from page 0 on. `visit` is the job for one page.
fn crawl(tangled: bool, visit: fn(&Arc<Pool>, &Arc<Site>, usize)) {
    for workers in [1, 2, 4] {
        for queue_capacity in [0, 1, 16] {
            let (pool, site) = (Arc::new(pool_of(workers, queue_capacity)), Site::new(tangled));
            let (outer, crawled) = (Arc::clone(&pool), Arc::clone(&site));
            let idle = scraped(&pool, "the crawl", move || {
                let inner = Arc::clone(&outer);
                outer.execute(move || visit(&inner, &crawled, 0)).expect("room");
                outer.wait_idle(PATIENCE)
            });
            let what = format!("{workers} workers, capacity {queue_capacity}");
            assert_eq!((idle, site.visited()), (true, Site::PAGES), "{what}");
            assert!(tangled || pool.stats().completed == Site::PAGES as u64, "{what}: {:?}", pool.stats());
        }
    }
}

#[test]
fn a_crawler_whose_jobs_submit_jobs_visits_400_of_400_pages() {
    fn visit(pool: &Arc<Pool>, site: &Arc<Site>, page: usize) {
        for link in site.visit(page) {
            let (inner, its_site) = (Arc::clone(pool), Arc::clone(site));
            let job = move || visit(&inner, &its_site, link);
            pool.execute(job).expect("a worker that finds no room runs the job itself");
        }
    }
    crawl(false, visit);
}

/// Depth first, the path through this site is 273 pages long. A job that comes back is a page for the loop of its submitter.
#[test]
fn a_crawler_of_a_deep_site_visits_400_of_400_pages() {
    fn visit(pool: &Arc<Pool>, site: &Arc<Site>, page: usize) {
        let mut pages = vec![page];
        while let Some(page) = pages.pop() {
            for link in site.visit(page) {
                let (inner, its_site) = (Arc::clone(pool), Arc::clone(site));
                match pool.execute(move || visit(&inner, &its_site, link)) {
                    Ok(()) => {}
                    Err(Rejected::Full(_)) => pages.push(link),
                    Err(refused) => panic!("the pool is not draining: {refused:?}"),
                }
            }
        }
    }
    crawl(true, visit);
}

#[test]
fn a_recursion_to_depth_50_returns() {
    fn depth(pool: &Arc<Pool>, left: u32) -> u32 {
        if left == 0 {
            return 0;
        }
        let inner = Arc::clone(pool);
        let job = pool.submit(move || depth(&inner, left - 1)).expect("it is admitted or run");
        job.join().expect("it returns") + 1
    }
    for workers in [1, 2, 4] {
        for queue_capacity in [0, 1, 16] {
            let pool = Arc::new(pool_of(workers, queue_capacity));
            let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
            let reached = scraped(&pool, "the recursion", move || {
                outer.submit(move || depth(&inner, 50)).expect("room").join()
            });
            assert_eq!(reached, Ok(50), "{workers} workers, capacity {queue_capacity}");
        }
    }
}

#[test]
fn a_sum_by_halves_is_right() {
    fn sum(pool: &Arc<Pool>, from: u64, to: u64) -> u64 {
        if to - from <= 4 {
            return (from..to).sum();
        }
        let (inner, middle) = (Arc::clone(pool), from.midpoint(to));
        let left = pool.submit(move || sum(&inner, from, middle)).expect("it is admitted or run");
        let right = sum(pool, middle, to);
        left.join().expect("it returns") + right
    }
    for workers in [1, 2, 4] {
        for queue_capacity in [0, 2, 1024] {
            let pool = Arc::new(pool_of(workers, queue_capacity));
            let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
            let total = scraped(&pool, "the sum", move || {
                outer.submit(move || sum(&inner, 0, 2_000)).expect("room").join()
            });
            assert_eq!(total, Ok(1_999_000), "{workers} workers, capacity {queue_capacity}");
        }
    }
}

// Each kind of wait, on the only worker of the pool.

#[test]
fn the_only_worker_may_join_a_job_of_its_pool() {
    let outcomes = on_one_worker(16, |pool| {
        let thread = || thread::current().id();
        let (queued, failing) = (submit(pool, thread), submit(pool, || -> u32 { panic!("on purpose") }));
        // The last job is joined first.
        let last = submit(pool, || 3);
        (last.join(), failing.join().map_err(|error| error.to_string()), queued.join() == Ok(thread()))
    });
    assert_eq!(outcomes, (Ok(3), Err("the job panicked: on purpose".to_owned()), true));
}

#[test]
fn the_only_worker_may_join_a_job_of_its_pool_with_a_timeout() {
    let outcome = on_one_worker(16, |pool| {
        let log = Log::default();
        let its_log = log.clone();
        let job = submit(pool, move || its_log.push(1));
        let job = job.join_timeout(Duration::ZERO).expect_err("a join without time runs nothing");
        assert!(log.read().is_empty() && !job.is_finished());
        let outcome = job.join_timeout(PATIENCE).expect("it ends in time");
        (outcome, log.read())
    });
    assert_eq!(outcome, (Ok(()), vec![1]));
}

#[test]
fn the_only_worker_may_take_outcomes_as_they_come() {
    let outcomes = on_one_worker(16, |pool| {
        let jobs: Vec<_> = (0..5).map(|number| submit(pool, move || number)).collect();
        jobs[2].cancel();
        let mut outcomes: Vec<_> = as_completed(jobs).collect();
        outcomes.sort_by_key(|(number, _)| *number);
        outcomes
    });
    let expected: Vec<_> =
        (0..5).map(|n| (n, if n == 2 { Err(JobError::Cancelled) } else { Ok(n) })).collect();
    assert_eq!(outcomes, expected);
}

#[test]
fn the_only_worker_may_wait_for_jobs_of_its_pool() {
    on_one_worker(16, |pool| {
        let mut jobs = [submit(pool, || 1), submit(pool, || 2), submit(pool, || 3)];
        assert!(!wait(&mut jobs, Until::FirstCompleted, Duration::ZERO), "a wait without time runs nothing");
        assert!(jobs.iter().all(|job| !job.is_finished()));
        assert!(wait(&mut jobs, Until::FirstCompleted, PATIENCE));
        assert!(jobs.iter().any(JobHandle::is_finished));
        assert!(wait(&mut jobs, Until::AllCompleted, Duration::MAX));
        assert_eq!(jobs.map(JobHandle::join), [Ok(1), Ok(2), Ok(3)]);
        let mut jobs = [submit(pool, || ()), submit(pool, || panic!("on purpose"))];
        assert!(wait(&mut jobs, Until::FirstFailed, PATIENCE));
        assert!(jobs[1].is_finished());
    });
}

#[test]
fn the_only_worker_may_block_on_a_job_of_its_pool() {
    let outcome = on_one_worker(16, |pool| {
        let (one, two) = (submit(pool, || 1), submit(pool, || 2));
        block_on(async { (two.await, one.await) })
    });
    assert_eq!(outcome, (Ok(2), Ok(1)));
}

#[test]
fn the_only_worker_may_block_on_a_future_that_awaits_several_jobs_at_once() {
    let outcomes = on_one_worker(16, |pool| {
        let mut jobs: Vec<_> = (0..5).map(|number| submit(pool, move || number)).collect();
        let mut outcomes = vec![None; jobs.len()];
        block_on(poll_fn(|context| {
            for (job, outcome) in jobs.iter_mut().zip(&mut outcomes) {
                if outcome.is_none()
                    && let Poll::Ready(ended) = Pin::new(job).poll(context)
                {
                    *outcome = Some(ended);
                }
            }
            if outcomes.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
        }));
        outcomes
    });
    assert_eq!(outcomes, (0..5).map(|number| Some(Ok(number))).collect::<Vec<_>>());
}

#[test]
fn block_on_waits_for_whatever_wakes_its_future() {
    // On a thread that is no worker, the jobs of a pool end as usual.
    let pool = pool_of(2, 16);
    let job = submit(&pool, || 4);
    assert_eq!(in_time("the job", move || block_on(job)), Ok(4));
    // On a worker, another thread's wake-up ends the wait too.
    let woken = on_one_worker(16, |_| {
        let (give, mut given) = (mpsc::channel(), false);
        let (sender, receiver) = give;
        let waker = thread::spawn(move || {
            let waker: std::task::Waker = receiver.recv().expect("a waker");
            waker.wake();
        });
        block_on(poll_fn(|context| {
            if given {
                return Poll::Ready(());
            }
            given = true;
            sender.send(context.waker().clone()).expect("the thread waits");
            Poll::Pending
        }));
        waker.join().is_ok()
    });
    assert!(woken);
    // A job that another worker runs ends the wait as well.
    let (pool, latch) = held(1, 16);
    pool.resize(2).expect("a thread");
    let pool = Arc::new(pool);
    let (wait, (give, given)) = (latch.clone(), mpsc::channel::<JobHandle<u32>>());
    let awaits = submit(&pool, move || block_on(given.recv().expect("a handle")));
    eventually("both workers are busy", || (pool.stats().busy == 2).then_some(()));
    // The first worker runs this job when the latch opens, or the second does, which awaits it.
    let job = submit(&pool, move || {
        wait.wait();
        6
    });
    give.send(job).expect("the job waits");
    latch.open();
    assert_eq!(join(awaits), Ok(Ok(6)));
}

#[test]
fn a_callback_may_join_a_job_of_its_pool() {
    let pool = Arc::new(pool_of(1, 16));
    let (report, reports) = mpsc::channel();
    let (latch, inner) = (Latch::default(), Arc::clone(&pool));
    let wait = latch.clone();
    submit(&pool, move || wait.wait()).on_done(move |_| {
        report.send(submit(&inner, || 7).join()).expect("the test waits");
    });
    latch.open();
    assert_eq!(reports.recv_timeout(PATIENCE), Ok(Ok(7)));
}

#[test]
fn a_worker_that_joins_a_late_job_does_not_run_it() {
    let outcome = on_one_worker(16, |pool| {
        let log = Log::default();
        let its_log = log.clone();
        let late = pool.with_deadline(Duration::from_millis(5)).try_submit(move || its_log.push(1));
        thread::sleep(Duration::from_millis(10));
        (late.expect("room").join(), log.read())
    });
    assert_eq!(outcome, (Err(JobError::Expired), vec![]));
}

/// The worker runs the job that it joins, and leaves the jobs before it in the queue.
#[test]
fn a_worker_runs_the_job_that_it_joins_and_no_other() {
    let (log, after) = on_one_worker(16, |pool| {
        let log = Log::default();
        let jobs = [0, 1, 2].map(|number| {
            let log = log.clone();
            submit(pool, move || log.push(number))
        });
        let [first, second, third] = jobs;
        assert_eq!(third.join(), Ok(()));
        let after = log.read();
        assert_eq!((first.join(), second.join()), (Ok(()), Ok(())));
        (log.read(), after)
    });
    assert_eq!((log, after), (vec![2, 0, 1], vec![2]));
}

#[test]
fn while_its_joiner_waits_a_job_runs_exactly_once() {
    let pool = Arc::new(pool_of(4, 64));
    let runs = Arc::new(AtomicUsize::new(0));
    let (outer, counted) = (Arc::clone(&pool), Arc::clone(&runs));
    scraped(&pool, "the joins", move || {
        let inner = Arc::clone(&outer);
        let pairs = outer.map(0..5_000_usize, move |number| {
            let runs = Arc::clone(&counted);
            let job = inner.submit(move || {
                runs.fetch_add(1, Ordering::Relaxed);
                number
            });
            job.expect("it is admitted or run").join()
        });
        assert!(pairs.enumerate().all(|(number, joined)| joined.is_ok_and(|joined| joined == Ok(number))));
    });
    assert_eq!(runs.load(Ordering::Relaxed), 5_000);
}

// Full queues.

#[test]
fn a_worker_that_finds_the_queue_full_runs_the_job_that_it_submits() {
    for queue_capacity in [0, 1, 3] {
        let outcome = on_one_worker(queue_capacity, |pool| {
            let submitted: Vec<_> = (0..100).map(|number| pool.submit(move || number)).collect();
            let handles = submitted.into_iter().map(|handle| handle.expect("it is admitted or run"));
            handles.map(JobHandle::join).collect::<Result<Vec<_>, _>>()
        });
        assert_eq!(outcome, Ok((0..100).collect()), "capacity {queue_capacity}");
    }
}

#[test]
fn execute_execute_all_map_and_submit_async_never_hang_on_a_full_queue_of_the_workers_own_pool() {
    on_one_worker(1, |pool| {
        let log = Log::default();
        let job = |number| {
            let log = log.clone();
            move || log.push(number)
        };
        for number in 0..10 {
            pool.execute(job(number)).expect("it is admitted or run");
        }
        assert_eq!(pool.execute_all((10..20).map(job)).expect("they are admitted or run"), 10);
        let asynchronous = block_on(async {
            let mut handles = Vec::new();
            for number in 20..30 {
                handles.push(pool.submit_async(job(number)).await.expect("it is admitted or run"));
            }
            handles
        });
        assert!(asynchronous.into_iter().all(|handle| handle.join() == Ok(())));
        let its_log = log.clone();
        let mapped = pool.map(30..40, move |number| its_log.push(number));
        assert!(mapped.into_iter().all(|outcome| outcome.is_ok()));
        assert!(pool.wait_idle(PATIENCE));
        assert_eq!(log.sorted(), (0..40).collect::<Vec<_>>());
    });
}

#[test]
fn try_submit_and_submit_timeout_run_nothing_on_a_full_queue() {
    on_one_worker(1, |pool| {
        let queued = submit(pool, || 1);
        let refused = pool.try_submit(|| 2);
        let Err(Rejected::Full(job)) = refused else { panic!("it was admitted or run") };
        assert_eq!(job.into_inner()(), 2);
        let (refused, took) = timed(|| pool.submit_timeout(|| 3, Duration::from_millis(20)));
        assert!(took >= Duration::from_millis(20), "{took:?}");
        let Err(Rejected::Full(job)) = refused else { panic!("it was admitted or run") };
        assert_eq!(job.into_inner()(), 3);
        assert_eq!(queued.join(), Ok(1));
    });
}

/// Each job submits the next one to a full queue, so each runs on the stack of the one before.
#[test]
fn when_half_of_the_stack_is_used_a_full_queue_gives_the_job_back() {
    fn dive(pool: &Arc<Pool>, depth: usize) -> usize {
        let inner = Arc::clone(pool);
        match pool.submit(move || dive(&inner, depth + 1)) {
            Ok(deeper) => deeper.join().expect("it returns"),
            Err(Rejected::Full(_)) => depth,
            Err(refused) => panic!("the pool is not draining: {refused:?}"),
        }
    }
    let builder = Pool::builder("diver").workers(1).queue_capacity(1).stack_size(1024 * 1024);
    let pool = Arc::new(builder.build().expect("a thread"));
    let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
    let depth = scraped(&pool, "the dive", move || {
        let job = outer.submit(move || {
            // This job fills the queue, and the only worker is busy.
            inner.execute(|| ()).expect("room");
            dive(&inner, 0)
        });
        job.expect("room").join().expect("it returns")
    });
    assert!(depth >= 20, "only {depth} jobs fit on half of a stack of 1 MiB");
    assert!(pool.stats().rejected_full >= 1);
}

#[test]
fn a_worker_waits_for_room_in_another_pool_as_any_thread_does() {
    let (other, latch) = held(1, 1);
    let (other, pool) = (Arc::new(other), named("waiter", 1, 1));
    let queued = submit(&other, || 1);
    let inner = Arc::clone(&other);
    let waits = submit(&pool, move || inner.submit(|| thread::current().name().map(str::to_owned)));
    all_asleep("mill-waiter-0", 1);
    assert!(!waits.is_finished(), "there is no room");
    latch.open();
    let admitted = join(waits).expect("it returns").expect("it is admitted");
    assert_eq!((join(queued), join(admitted)), (Ok(1), Ok(Some("mill-test-0".to_owned()))));
}

/// A job that another worker runs is waited for. The waiting worker runs none of the jobs behind it meanwhile.
#[test]
fn a_worker_waits_for_a_job_that_another_worker_runs() {
    let (pool, latch) = (Arc::new(named("pair", 2, 16)), Latch::default());
    let (wait, inner) = (latch.clone(), Arc::clone(&pool));
    let (started, has_started) = mpsc::channel();
    let outer = submit(&pool, move || {
        let job = submit(&inner, move || {
            started.send(()).expect("the outer job waits");
            wait.wait();
            8
        });
        has_started.recv().expect("the other worker runs it");
        job.join()
    });
    eventually("both workers are busy", || (pool.stats().busy == 2).then_some(()));
    all_asleep("mill-pair-", 2);
    latch.open();
    assert_eq!(join(outer), Ok(Ok(8)));
}

#[test]
fn nested_use_goes_on_while_the_pool_is_resized() {
    let pool = Arc::new(pool_of(4, 8));
    let (outer, inner) = (Arc::clone(&pool), Arc::clone(&pool));
    let resizer = Arc::clone(&pool);
    let over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let resizing = thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(7);
        while !stop.load(Ordering::Acquire) {
            resizer.resize(random.usize(1..6)).expect("threads");
            thread::yield_now();
        }
    });
    let total: u64 = scraped(&pool, "the nested maps", move || {
        let rows = outer.map(0..300_u64, move |row| {
            inner.map(0..4, move |cell| row + cell).map(|cell| cell.expect("no job fails")).sum::<u64>()
        });
        rows.map(|row| row.expect("no job fails")).sum()
    });
    over.store(true, Ordering::Release);
    resizing.join().expect("the resizer");
    assert_eq!(total, (0..300).map(|row| 4 * row + 6).sum::<u64>());
}
