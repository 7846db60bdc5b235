//! What the pool promises, to whoever builds on it alone.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, eventually};
use millpond::{Handler, MAX_WORKERS, Pool, PoolError, Rejected, Stats, Turn};

/// Holds whoever waits at it until it is opened.
#[derive(Clone, Default)]
struct Latch(Arc<(Mutex<bool>, Condvar)>);

impl Latch {
    fn open(&self) {
        *self.0.0.lock().expect("the latch") = true;
        self.0.1.notify_all();
    }

    fn wait(&self) {
        let open = self.0.0.lock().expect("the latch");
        drop(self.0.1.wait_while(open, |open| !*open).expect("the latch"));
    }
}

/// A job that is any closure.
type Task = Box<dyn FnOnce() + Send>;

fn pool_of(workers: usize, queue_capacity: usize) -> Pool<Task> {
    let builder = Pool::builder("test").workers(workers).queue_capacity(queue_capacity);
    builder.start(|_| |task: Task| task()).expect("the threads")
}

/// A pool of one worker, held until the latch opens.
fn held(queue_capacity: usize) -> (Pool<Task>, Latch) {
    let (pool, latch) = (pool_of(1, queue_capacity), Latch::default());
    let wait = latch.clone();
    submit(&pool, move || wait.wait());
    eventually("the worker is held", || (pool.stats().busy == 1).then_some(()));
    (pool, latch)
}

fn submit(pool: &Pool<Task>, task: impl FnOnce() + Send + 'static) {
    assert!(pool.try_submit(Box::new(task)).is_ok(), "the queue is full, or drains");
}

fn broken_law(stats: &Stats) -> Option<String> {
    let ended = stats.completed + stats.panicked + stats.aborted;
    let holds = stats.submitted == ended + stats.queue_depth + stats.busy as u64
        && stats.busy <= stats.workers
        && stats.queue_depth <= stats.queue_capacity as u64;
    (!holds).then(|| format!("{stats:?}"))
}

#[test]
fn a_full_queue_gives_the_job_back() {
    let (pool, latch) = held(2);
    submit(&pool, || {});
    submit(&pool, || {});
    let refused = pool.try_submit(Box::new(|| {}));
    assert!(matches!(refused, Err(Rejected::Full(_))));
    assert_eq!((pool.stats().queue_depth, pool.stats().rejected_full), (2, 1));
    latch.open();
    eventually("room again", || pool.try_submit(Box::new(|| {})).ok());
}

#[test]
fn jobs_start_in_the_order_of_their_admission() {
    let (pool, latch) = held(1000);
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
fn a_payload_that_panics_when_dropped_is_survived() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("a payload's destructor");
        }
    }
    let pool = pool_of(1, 10);
    submit(&pool, || std::panic::panic_any(Bomb));
    submit(&pool, || {});
    let drained = pool.drain(PATIENCE);
    assert_eq!((drained.stats.completed, drained.stats.panicked), (1, 1));
}

#[test]
fn a_drain_finishes_what_was_admitted_and_admits_nothing_more() {
    let (pool, latch) = held(100);
    let done = Arc::new(AtomicU64::new(0));
    for _ in 0..100 {
        let done = Arc::clone(&done);
        submit(&pool, move || {
            done.fetch_add(1, Ordering::Relaxed);
        });
    }
    thread::scope(|scope| {
        let drain = scope.spawn(|| pool.drain(PATIENCE));
        eventually("it drains", || match pool.try_submit(Box::new(|| {})) {
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
fn a_drain_that_runs_out_of_time_says_what_is_left() {
    let (pool, latch) = held(100);
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

#[test]
fn an_abort_drops_what_waits_and_lets_the_running_job_end() {
    let (pool, latch) = held(100);
    let dropped = Arc::new(());
    for _ in 0..5 {
        let witness = Arc::clone(&dropped);
        submit(&pool, move || drop(witness));
    }
    assert_eq!(Arc::strong_count(&dropped), 6);
    let aborted = pool.abort();
    assert_eq!((aborted.running, aborted.dropped), (1, 5));
    assert_eq!(Arc::strong_count(&dropped), 1, "a dropped job is dropped at once");
    latch.open();
    assert!(pool.drain(PATIENCE).running == 0);
}

#[test]
fn dropping_a_pool_drains_it() {
    let (pool, latch) = held(10);
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    submit(&pool, move || seen.store(true, Ordering::Release));
    latch.open();
    drop(pool);
    assert!(done.load(Ordering::Acquire));
}

#[test]
fn what_cannot_be_started_is_refused_with_no_thread_left() {
    let start = |workers, capacity| {
        let builder = Pool::builder("test").workers(workers).queue_capacity(capacity);
        builder.start(|_| |task: Task| task()).err()
    };
    assert!(matches!(start(0, 1), Some(PoolError::Workers(0))));
    assert!(matches!(start(MAX_WORKERS + 1, 1), Some(PoolError::Workers(_))));
    assert!(matches!(start(1, 0), Some(PoolError::QueueCapacity(0))));
    assert!(matches!(start(1, usize::MAX), Some(PoolError::QueueCapacity(usize::MAX))));
    // A stack that no address space has room for.
    let builder = Pool::builder("huge").workers(3).queue_capacity(1).stack_size(1 << 60);
    let refused = builder.start(|_| |task: Task| task()).err();
    assert!(matches!(refused, Some(PoolError::Spawn { started: 0, .. })), "{refused:?}");
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
    let pool = builder
        .start(|_| {
            let (names, all) = (Arc::clone(&names), Arc::clone(&all));
            move |(): ()| {
                all.wait();
                names.lock().expect("names").push(thread::current().name().expect("a name").to_owned());
                // 5,000 frames of over a kilobyte each: more than the default stack.
                assert_eq!(depth(5_000), 5_000);
            }
        })
        .expect("the threads");
    (0..3).for_each(|_| pool.try_submit(()).expect("room"));
    let drained = pool.drain(PATIENCE);
    assert_eq!(drained.stats.completed, 3);
    let mut names = names.lock().expect("names").clone();
    names.sort();
    assert_eq!(names, ["mill-deep-0", "mill-deep-1", "mill-deep-2"]);
}

#[test]
fn ages_and_busy_time_rise_although_nothing_ends() {
    let (pool, latch) = held(10);
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

/// Requeues its job, a number, until it is 0.
struct Countdown;

impl Handler<u32> for Countdown {
    fn run(&mut self, job: u32, turn: &mut Turn<'_, u32>) {
        if job > 0 {
            turn.requeue(job - 1).expect("its place in the queue is free");
        }
    }
}

#[test]
fn a_job_may_requeue_itself_to_its_end_although_the_pool_drains() {
    let pool = Pool::builder("test").workers(4).queue_capacity(100).start(|_| Countdown).expect("threads");
    (0..50).for_each(|_| pool.try_submit(1000).expect("room"));
    let drained = pool.drain(PATIENCE);
    assert!(drained.is_clean(), "{drained:?}");
    assert_eq!(drained.stats.completed, 50 * 1001);
}

#[test]
fn a_job_that_requeues_itself_for_ever_is_ended_by_an_abort() {
    struct Endless;
    impl Handler<()> for Endless {
        fn run(&mut self, (): (), turn: &mut Turn<'_, ()>) {
            let _ = turn.requeue(());
        }
    }
    let pool = Pool::builder("test").workers(4).queue_capacity(100).start(|_| Endless).expect("threads");
    (0..50).for_each(|_| pool.try_submit(()).expect("room"));
    pool.drain(Duration::from_millis(50));
    eventually("all ended", || {
        let stats = pool.stats();
        assert_eq!(broken_law(&stats), None);
        (stats.busy == 0 && stats.queue_depth == 0).then_some(())
    });
    let stats = pool.stats();
    assert_eq!(stats.submitted, stats.completed + stats.aborted);
}

/// A worker that sleeps is woken for every job: a job that is left lying with an idle worker beside it never
/// ends here.
#[test]
fn no_wake_up_is_lost_however_submissions_fall() {
    let pool = Arc::new(
        Pool::builder("test")
            .workers(8)
            .queue_capacity(64)
            .start(|_| {
                |done: Arc<AtomicUsize>| {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
            .expect("threads"),
    );
    let producers: Vec<_> = (0..4)
        .map(|seed| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for round in 0..5_000 {
                    let (done, burst) = (Arc::new(AtomicUsize::new(0)), random.usize(1..12));
                    let mut admitted = 0;
                    while admitted < burst {
                        admitted += usize::from(pool.try_submit(Arc::clone(&done)).is_ok());
                    }
                    // Waits for its own, so that all workers fall asleep again and again.
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
    producers.into_iter().for_each(|producer| producer.join().expect("no job was left lying"));
    assert_eq!(pool.stats().submitted, pool.stats().completed);
}

#[test]
fn every_admitted_job_ends_whenever_the_drain_comes() {
    for round in 0..300 {
        let done = Arc::new(AtomicU64::new(0));
        let pool = Pool::builder("test")
            .workers(3)
            .queue_capacity(16)
            .start(|_| {
                let done = Arc::clone(&done);
                move |(): ()| {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
            .expect("threads");
        let start = Barrier::new(4);
        let admitted: u64 = thread::scope(|scope| {
            let submitters: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        let mut admitted = 0;
                        loop {
                            match pool.try_submit(()) {
                                Ok(()) => admitted += 1,
                                Err(Rejected::Full(())) => {}
                                Err(Rejected::Draining(())) => return admitted,
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
    let builder = Pool::builder("test").workers(6).queue_capacity(1);
    let pool = builder.start(|_| |(): ()| std::hint::black_box(())).expect("threads");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = pool.try_submit(());
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
