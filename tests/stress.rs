//! A million jobs of every kind, and hundreds of pools that end in every way: each job is accounted for exactly once, by
//! its handle, by itself, and by the numbers.
//!
//! Every random choice comes from a seed. If a test fails, it prints the seed, and `MILLPOND_STRESS_SEED=<seed>` in the
//! environment makes the same choices again. The system still decides how the threads take turns.

mod common;

use std::future::Future;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use common::pools::broken_law;
use common::{PATIENCE, eventually, thread_states};
use fastrand::Rng;
use millpond::{JobError, JobHandle, Pool, PoolError, Rejected, Stats, Until, as_completed, block_on, wait};

const PRODUCERS: u64 = 10;

/// Submissions of all producers. The drain begins when nine tenths of them have been admitted.
const JOBS: u64 = 1_200_000;
const ADMITTED_BEFORE_DRAIN: u64 = JOBS / 10 * 9;

/// Pools that end in some way, and how many jobs are submitted to each.
const POOLS: u64 = 300;
const JOBS_OF_A_POOL: usize = 300;

/// The seed of a test's choices. Printed if the test fails.
struct Seed(u64);

impl Seed {
    /// The seed in `MILLPOND_STRESS_SEED`, or else a new one.
    fn draw() -> Self {
        Seed(match std::env::var("MILLPOND_STRESS_SEED") {
            Ok(seed) => seed.parse().expect("MILLPOND_STRESS_SEED is a whole number"),
            Err(_) => fastrand::u64(..1_000_000),
        })
    }

    /// The choices of one of several threads or rounds.
    fn rng(&self, number: u64) -> Rng {
        Rng::with_seed(self.0.wrapping_mul(1_000_003).wrapping_add(number))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("to make the same choices again: MILLPOND_STRESS_SEED={}", self.0);
        }
    }
}

/// How jobs ended, as their handles report it, or the pool's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ends {
    completed: u64,
    panicked: u64,
    cancelled: u64,
    expired: u64,
    aborted: u64,
    /// Submissions that the pool refused because its queue was full, and because it was draining.
    full: u64,
    draining: u64,
}

impl Ends {
    fn count<T>(&mut self, outcome: &Result<T, JobError>) {
        match outcome {
            Ok(_) => self.completed += 1,
            Err(JobError::Panicked(_)) => self.panicked += 1,
            Err(JobError::Cancelled) => self.cancelled += 1,
            Err(JobError::Expired) => self.expired += 1,
            Err(JobError::Aborted) => self.aborted += 1,
            Err(other) => panic!("no handle of an admitted job reports this: {other:?}"),
        }
    }

    fn of(stats: &Stats) -> Self {
        Ends {
            completed: stats.completed,
            panicked: stats.panicked,
            cancelled: stats.cancelled,
            expired: stats.expired,
            aborted: stats.aborted,
            full: stats.rejected_full,
            draining: stats.rejected_draining,
        }
    }

    fn sum(self, other: Self) -> Self {
        Ends {
            completed: self.completed + other.completed,
            panicked: self.panicked + other.panicked,
            cancelled: self.cancelled + other.cancelled,
            expired: self.expired + other.expired,
            aborted: self.aborted + other.aborted,
            full: self.full + other.full,
            draining: self.draining + other.draining,
        }
    }

    /// Admitted jobs that have ended.
    fn ended(self) -> u64 {
        self.completed + self.panicked + self.cancelled + self.expired + self.aborted
    }
}

/// Reads the pool's numbers until `over`, and calls `meanwhile` between readings. Each reading keeps the laws, and no count
/// falls.
fn watch(pool: &Pool, over: &AtomicBool, mut meanwhile: impl FnMut()) {
    let mut last = pool.stats();
    while !over.load(Ordering::Acquire) {
        meanwhile();
        let stats = pool.stats();
        assert_eq!(broken_law(&stats), None);
        let in_jobs = stats.job_duration.sum();
        assert!(in_jobs <= stats.busy_time, "{in_jobs:?} in jobs, {:?} busy", stats.busy_time);
        let fell = stats.submitted < last.submitted
            || stats.completed < last.completed
            || stats.cancelled < last.cancelled
            || stats.expired < last.expired
            || stats.busy_time < last.busy_time;
        assert!(!fell, "{last:?}, then {stats:?}");
        last = stats;
        thread::sleep(Duration::from_millis(1));
    }
}

/// Which jobs were started. If two jobs have one number, or one job runs twice, `TWICE` counts it.
struct Starts(Vec<AtomicBool>);

/// The number of the next job, whichever producer submits it. So no producer ends long before the others, however unevenly
/// the machine runs them.
static NEXT: AtomicU64 = AtomicU64::new(0);

static TWICE: AtomicU64 = AtomicU64::new(0);

/// What the jobs within jobs came to. Their outer jobs add to it.
#[derive(Default)]
struct Nested {
    completed: AtomicU64,
    draining: AtomicU64,
}

/// Submits a job to the worker's own pool and joins it.
fn nest(pool: &Pool, nested: &Nested) {
    match pool.submit(|| 7) {
        Ok(inner) => {
            assert_eq!(inner.join(), Ok(7));
            nested.completed.fetch_add(1, Ordering::Relaxed);
        }
        Err(Rejected::Draining(_)) => _ = nested.draining.fetch_add(1, Ordering::Relaxed),
        Err(refused) => panic!("a worker has room on its stack: {refused:?}"),
    }
}

fn produce(pool: &Arc<Pool>, starts: &'static Starts, nested: &Arc<Nested>, mut random: Rng) -> Ends {
    let mut ends = Ends::default();
    let mut handles: Vec<JobHandle<()>> = Vec::new();
    let numbers = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed));
    for number in numbers.take_while(|number| *number < JOBS) {
        let panics = random.u32(0..100) == 0;
        let pauses = random.u32(0..40);
        let nests = (random.u32(0..20) == 0).then(|| (Arc::clone(pool), Arc::clone(nested)));
        let slot = usize::try_from(number).expect("it indexes a vector");
        let job = move || {
            if starts.0[slot].swap(true, Ordering::Relaxed) {
                TWICE.fetch_add(1, Ordering::Relaxed);
            }
            (0..pauses).for_each(|_| std::hint::spin_loop());
            if let Some((pool, nested)) = &nests {
                nest(pool, nested);
            }
            if panics {
                // Without the panic hook, which would print ten thousand lines.
                resume_unwind(Box::new("on purpose"));
            }
        };
        let submitted = match random.u32(0..10) {
            0..4 => pool.submit(job),
            4..7 => pool.try_submit(job),
            7 => pool.submit_timeout(job, Duration::from_micros(100)),
            8 => pool.with_deadline(Duration::from_micros(random.u64(0..200))).submit(job),
            _ => pool.with_deadline(PATIENCE).try_submit(job),
        };
        // A job that found no room comes back, and is submitted again with more patience.
        let submitted = submitted.or_else(|rejected| match rejected {
            Rejected::Full(job) => {
                ends.full += 1;
                pool.submit(job.into_inner())
            }
            other => Err(other),
        });
        match submitted {
            Ok(handle) => {
                if random.u32(0..8) == 0 {
                    handle.cancel();
                }
                handles.push(handle);
            }
            Err(Rejected::Draining(_)) => ends.draining += 1,
            Err(refused) => panic!("a submit without a timeout waits for room: {refused:?}"),
        }
        if handles.len() >= 256 {
            handles.drain(..).for_each(|handle| ends.count(&handle.join()));
        }
    }
    handles.drain(..).for_each(|handle| ends.count(&handle.join()));
    ends
}

#[test]
fn a_million_jobs_are_each_accounted_for_exactly_once() {
    let seed = Seed::draw();
    let registry = prometheus::Registry::new();
    let builder = Pool::builder("stress").workers(4).queue_capacity(512).registry(&registry);
    let pool = Arc::new(builder.build().expect("threads"));
    let slots = (0..JOBS).map(|_| AtomicBool::new(false)).collect();
    let starts: &'static Starts = Box::leak(Box::new(Starts(slots)));
    let (over, nested) = (AtomicBool::new(false), Arc::new(Nested::default()));
    let seen = thread::scope(|scope| {
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|number| {
                let (pool, nested, random) = (&pool, &nested, seed.rng(number));
                scope.spawn(move || produce(pool, starts, nested, random))
            })
            .collect();
        let watcher = scope.spawn(|| {
            let mut random = seed.rng(PRODUCERS);
            watch(&pool, &over, || _ = pool.resize(random.usize(1..9)));
        });
        eventually("nine tenths are admitted", || {
            let watched =
                watcher.is_finished() || producers.iter().any(thread::ScopedJoinHandle::is_finished);
            (watched || pool.stats().submitted >= ADMITTED_BEFORE_DRAIN).then_some(())
        });
        let drained = pool.drain(PATIENCE);
        assert!(drained.is_clean(), "{drained:?}");
        let seen = producers.into_iter().map(|producer| producer.join().expect("a producer"));
        let seen = seen.fold(Ends::default(), Ends::sum);
        over.store(true, Ordering::Release);
        watcher.join().expect("the watcher");
        seen
    });
    let (inner, refused) =
        (nested.completed.load(Ordering::Relaxed), nested.draining.load(Ordering::Relaxed));
    let stats = pool.stats();
    let all = Ends { completed: seen.completed + inner, draining: seen.draining + refused, ..seen };
    assert_eq!(all, Ends::of(&stats), "the handles and the numbers agree");
    let ran = starts.0.iter().filter(|started| started.load(Ordering::Relaxed)).count() as u64;
    assert_eq!((ran, TWICE.load(Ordering::Relaxed)), (seen.completed + seen.panicked, 0));
    assert_eq!((stats.submitted, seen.ended() + seen.draining), (all.ended(), JOBS));
    assert_eq!((stats.queue_depth, stats.busy, stats.aborted), (0, 0, 0));
    assert!(seen.ended() >= 1_000_000, "a million were admitted: {stats:?}");
    for (kind, count) in [
        ("panicked", seen.panicked),
        ("cancelled", seen.cancelled),
        ("expired", seen.expired),
        ("nested", inner),
    ] {
        assert!(count > 1_000, "{count} {kind}");
    }
    assert!(seen.draining > 0, "the drain came in the middle: {seen:?}");

    let (durations, ran) = (&stats.job_duration, ran + inner);
    assert_eq!((stats.queue_wait.count(), durations.count()), (ran, ran));
    assert!(durations.cumulative().is_sorted_by_key(|(limit, count)| (limit, count)));
    assert!(durations.sum() <= stats.busy_time, "{:?} in jobs, {:?} busy", durations.sum(), stats.busy_time);

    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
    let sample = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}:\n{text}"));
        line.trim().parse::<f64>().expect("a number")
    };
    let exported =
        |metric: &str, label: &str| sample(&format!("millpond_pool_{metric}{{pool=\"stress\"{label}}}"));
    let outcome = |outcome: &str| exported("jobs_total", &format!(",outcome=\"{outcome}\""));
    let scraped = ["completed", "panicked", "cancelled", "expired", "aborted"].map(outcome);
    let counted = [all.completed, all.panicked, all.cancelled, all.expired, 0];
    #[expect(clippy::cast_precision_loss, reason = "the counts are small")]
    let counted = counted.map(|count| count as f64);
    assert_eq!(scraped, counted, "the scrape agrees with the handles");
    assert_eq!(exported("submitted_total", ""), counted.iter().sum::<f64>());
    assert_eq!(exported("job_duration_seconds_count", ""), counted[0] + counted[1]);
}

/// How a pool ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Drain,
    ShortDrain,
    Abort,
    Close,
    Drop,
    DropByJob,
    DropByUnwinding,
    DrainByJob,
}

impl End {
    fn draw(random: &mut Rng) -> Self {
        let ends = [
            End::Drain,
            End::ShortDrain,
            End::Abort,
            End::Close,
            End::Drop,
            End::DropByJob,
            End::DropByUnwinding,
            End::DrainByJob,
        ];
        ends[random.usize(..ends.len())]
    }

    /// Whether jobs that wait may be dropped.
    fn may_drop_jobs(self) -> bool {
        matches!(self, End::ShortDrain | End::Abort)
    }
}

/// A job of a pool, and whether it ran.
struct Submitted {
    handle: JobHandle<u64>,
    number: u64,
    runs: Arc<AtomicU64>,
}

/// Runs up to three levels of jobs, each of which waits for the next in some way. Returns `number`.
fn work(pool: &Arc<Pool>, number: u64, mut random: Rng, depth: u32) -> u64 {
    if depth == 0 || random.u32(0..4) > 0 {
        (0..random.u32(0..300)).for_each(|_| std::hint::spin_loop());
        return number;
    }
    let deeper = |random: &mut Rng| {
        let (inner, random) = (Arc::clone(pool), random.fork());
        move || work(&inner, number, random, depth - 1)
    };
    // Each outcome is the number, unless the pool has ended meanwhile.
    let is_right =
        |outcome: &Result<u64, JobError>| matches!(outcome, Err(JobError::Aborted)) || *outcome == Ok(number);
    match random.u32(0..5) {
        0 => {
            if let Ok(job) = pool.submit(deeper(&mut random)) {
                let outcome = job.join();
                assert!(is_right(&outcome), "{outcome:?}");
            }
        }
        1 => {
            let jobs: Vec<_> = (0..2).filter_map(|_| pool.submit(deeper(&mut random)).ok()).collect();
            assert!(as_completed(jobs).all(|(_, outcome)| is_right(&outcome)));
        }
        2 => {
            let mut jobs: Vec<_> = (0..2).filter_map(|_| pool.submit(deeper(&mut random)).ok()).collect();
            assert!(wait(&mut jobs, Until::AllCompleted, PATIENCE));
            assert!(jobs.into_iter().map(JobHandle::join).all(|outcome| is_right(&outcome)));
        }
        3 => {
            let submission = pool.submit_async(deeper(&mut random));
            if let Ok(outcome) = block_on(async { Ok::<_, ()>(submission.await.map_err(drop)?.await) }) {
                assert!(is_right(&outcome), "{outcome:?}");
            }
        }
        _ => {
            let (inner, seed) = (Arc::clone(pool), random.u64(..));
            let outcomes = pool.map(0..3_u64, move |cell| {
                work(&inner, number, Rng::with_seed(seed.wrapping_add(cell)), depth - 1)
            });
            for outcome in outcomes {
                let ended = |error: &JobError| matches!(error, JobError::Aborted | JobError::Draining);
                assert!(outcome.as_ref().map_or_else(|error| ended(&error.error), |found| *found == number));
            }
        }
    }
    number
}

/// Submits jobs of every kind, until the pool refuses them because it has ended.
fn submit_to(pool: &Arc<Pool>, random: &mut Rng, jobs: usize) -> Vec<Submitted> {
    let mut submitted = Vec::new();
    for number in 0..jobs as u64 {
        let runs = Arc::new(AtomicU64::new(0));
        let (counted, inner, its_random) = (Arc::clone(&runs), Arc::clone(pool), random.fork());
        let panics = random.u32(0..30) == 0;
        let job = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            let result = work(&inner, number, its_random, 3);
            if panics {
                resume_unwind(Box::new("on purpose"));
            }
            result
        };
        let handle = match random.u32(0..8) {
            0 => pool.submit(job).map_err(drop),
            1 => pool.try_submit(job).map_err(drop),
            2 => pool.submit_timeout(job, Duration::from_micros(200)).map_err(drop),
            3 => pool.with_deadline(Duration::from_micros(random.u64(0..300))).submit(job).map_err(drop),
            4 => pool.with_deadline(PATIENCE).submit(job).map_err(drop),
            5 => block_on(pool.submit_async(job)).map_err(drop),
            6 => {
                // A task that gives up at once, unless there is room.
                let mut submission = Box::pin(pool.submit_async(job));
                match submission.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Ready(admitted) => admitted.map_err(drop),
                    Poll::Pending => Err(()),
                }
            }
            _ => {
                // Jobs without handles, which run too.
                let _ = pool.execute_all([(); 3].map(|()| || ()));
                pool.submit(job).map_err(drop)
            }
        };
        let Ok(handle) = handle else { continue };
        match random.u32(0..12) {
            0 => _ = handle.cancel(),
            1 => drop(handle.cancel_on_drop()),
            2 => drop(handle),
            _ => {
                submitted.push(Submitted { handle, number, runs });
                continue;
            }
        }
    }
    submitted
}

/// Ends the pool. Returns when the call that ends it has returned, with the pool if it still has an owner.
fn end_of(pool: Arc<Pool>, end: End, random: &mut Rng) -> Option<Arc<Pool>> {
    match end {
        End::Drain => {
            let drained = pool.drain(PATIENCE);
            assert!(drained.is_clean(), "{drained:?}");
            Some(pool)
        }
        End::ShortDrain => {
            pool.drain(Duration::from_micros(random.u64(0..2_000)));
            Some(pool)
        }
        End::Abort => {
            pool.abort();
            Some(pool)
        }
        End::Close => {
            pool.close();
            Some(pool)
        }
        End::Drop => {
            drop(pool);
            None
        }
        End::DropByJob => {
            let inner = Arc::clone(&pool);
            pool.execute(move || drop(inner)).expect("the pool is not draining");
            drop(pool);
            None
        }
        End::DropByUnwinding => {
            let unwinding = thread::spawn(move || {
                let _pool = pool;
                resume_unwind(Box::new("on purpose"));
            });
            unwinding.join().expect_err("it unwinds");
            None
        }
        End::DrainByJob => {
            let inner = Arc::clone(&pool);
            let job =
                pool.submit(move || inner.drain(PATIENCE).is_clean()).expect("the pool is not draining");
            assert_eq!(job.join_timeout(PATIENCE).expect("it ends in time"), Ok(true));
            Some(pool)
        }
    }
}

/// One pool, from its start to its end.
fn one_pool(round: u64, mut random: Rng) {
    let (workers, capacity) = (random.usize(1..6), [0, 1, 2, 16, 64][random.usize(..5)]);
    let end = End::draw(&mut random);
    let what = format!("round {round}: {workers} workers, capacity {capacity}, {end:?}");
    let builder = Pool::builder("ends").workers(workers).queue_capacity(capacity);
    let pool = Arc::new(builder.build().expect("threads"));
    let over = AtomicBool::new(false);
    let submitted: Vec<Submitted> = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut random = Rng::with_seed(round);
            watch(&pool, &over, || match pool.resize(random.usize(1..6)) {
                Ok(()) | Err(PoolError::Draining) => {}
                Err(refused) => panic!("{refused:?}"),
            });
        });
        let producers = [random.fork(), random.fork()].map(|mut random| {
            let pool = &pool;
            scope.spawn(move || submit_to(pool, &mut random, JOBS_OF_A_POOL / 2))
        });
        // Most pools end after the last submission. The others end in the middle, while the producers submit.
        if random.u32(0..3) == 0 {
            let at = random.u64(0..JOBS_OF_A_POOL as u64);
            eventually("the middle", || {
                let submitting = producers.iter().any(|producer| !producer.is_finished());
                (!submitting || pool.stats().submitted >= at).then_some(())
            });
            if end.may_drop_jobs() {
                end_of(Arc::clone(&pool), end, &mut random);
            } else {
                pool.close();
            }
        }
        let submitted: Vec<_> =
            producers.into_iter().flat_map(|producer| producer.join().expect("a producer")).collect();
        over.store(true, Ordering::Release);
        watcher.join().expect("the watcher");
        submitted
    });
    let closed = matches!(pool.resize(workers), Err(PoolError::Draining));
    let pool = if closed && matches!(end, End::DropByJob | End::DrainByJob) {
        // The job that would end the pool is not admitted any more.
        Some(pool)
    } else {
        end_of(pool, end, &mut random)
    };
    let mut ends = Ends::default();
    for Submitted { handle, number, runs } in submitted {
        let outcome =
            handle.join_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what}: job {number} has no end"));
        ends.count(&outcome);
        let expected = match &outcome {
            Ok(result) => {
                assert_eq!(*result, number, "{what}");
                1
            }
            Err(JobError::Panicked(panic)) => {
                assert_eq!(panic.message(), "on purpose", "{what}");
                1
            }
            Err(_) => 0,
        };
        assert_eq!(runs.load(Ordering::Relaxed), expected, "{what}: job {number}, {outcome:?}");
    }
    assert!(end.may_drop_jobs() || ends.aborted == 0, "{what}: {ends:?}");
    if let Some(pool) = pool {
        eventually("the workers leave", || (pool.stats().workers == 0).then_some(()));
        let stats = pool.stats();
        assert_eq!((stats.queue_depth, stats.busy, broken_law(&stats)), (0, 0, None), "{what}");
        assert!(end.may_drop_jobs() || stats.aborted == 0, "{what}: {stats:?}");
        assert!(stats.completed >= ends.completed && stats.panicked >= ends.panicked, "{what}: {stats:?}");
    }
}

#[test]
fn pools_that_end_in_any_way_lose_no_job() {
    let seed = Seed::draw();
    for round in 0..POOLS {
        let (random, (report, reports)) = (seed.rng(round), mpsc::channel());
        let runner = thread::spawn(move || {
            one_pool(round, random);
            report.send(()).expect("the test waits");
        });
        // The waits within a round fail first, and say more.
        match reports.recv_timeout(3 * PATIENCE) {
            Ok(()) => runner.join().expect("it has returned"),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("round {round} hangs"),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                resume_unwind(runner.join().expect_err("the round failed"))
            }
        }
    }
    eventually("every thread of every pool is gone", || thread_states("mill-ends").is_empty().then_some(()));
}
