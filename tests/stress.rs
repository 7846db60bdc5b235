//! A million jobs of every kind, from ten producers, while the pool is resized, scraped, and at last drained
//! in the middle: each job is accounted for exactly once, by its handle, by itself, and by the numbers.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::pools::broken_law;
use common::{PATIENCE, eventually};
use millpond::{JobError, JobHandle, Pool, Rejected, Stats};

const PRODUCERS: u64 = 10;

/// Submissions in all. The drain begins when nine tenths of them have been admitted.
const JOBS: u64 = 1_200_000;
const ADMITTED_BEFORE_DRAIN: u64 = JOBS / 10 * 9;

/// What handles, or the jobs themselves, say of the ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ends {
    completed: u64,
    panicked: u64,
    cancelled: u64,
    expired: u64,
    /// Submissions that were given back for want of room, and those given back for good.
    full: u64,
    draining: u64,
}

impl Ends {
    fn count(&mut self, outcome: &Result<(), JobError>) {
        match outcome {
            Ok(()) => self.completed += 1,
            Err(JobError::Panicked(_)) => self.panicked += 1,
            Err(JobError::Cancelled) => self.cancelled += 1,
            Err(JobError::Expired) => self.expired += 1,
            Err(other) => panic!("nothing here is aborted: {other:?}"),
        }
    }

    fn of(stats: &Stats) -> Self {
        Ends {
            completed: stats.completed,
            panicked: stats.panicked,
            cancelled: stats.cancelled,
            expired: stats.expired,
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
            full: self.full + other.full,
            draining: self.draining + other.draining,
        }
    }
}

/// Which jobs were started. Two jobs of one number, or one run twice, would show.
struct Starts(Vec<AtomicBool>);

/// The number of the next job, whoever submits it: no producer is done long before the others, however
/// unevenly the machine runs them.
static NEXT: AtomicU64 = AtomicU64::new(0);

static TWICE: AtomicU64 = AtomicU64::new(0);

fn produce(pool: &Pool, starts: &'static Starts, seed: u64) -> Ends {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut ends = Ends::default();
    let mut handles: Vec<JobHandle<()>> = Vec::new();
    let numbers = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed));
    for number in numbers.take_while(|number| *number < JOBS) {
        let panics = random.u32(0..100) == 0;
        let pauses = random.u32(0..40);
        let slot = usize::try_from(number).expect("it indexes a vector");
        let job = move || {
            if starts.0[slot].swap(true, Ordering::Relaxed) {
                TWICE.fetch_add(1, Ordering::Relaxed);
            }
            (0..pauses).for_each(|_| std::hint::spin_loop());
            if panics {
                // Without the hook, which would print ten thousand lines.
                std::panic::resume_unwind(Box::new("on purpose"));
            }
        };
        let submitted = match random.u32(0..10) {
            0..4 => pool.submit(job),
            4..7 => pool.try_submit(job),
            7 => pool.submit_timeout(job, Duration::from_micros(100)),
            8 => pool.with_deadline(Duration::from_micros(random.u64(0..200))).submit(job),
            _ => pool.with_deadline(PATIENCE).try_submit(job),
        };
        // What finds no room is given back, and goes in with more patience.
        let submitted = submitted.or_else(|rejected| match rejected {
            Rejected::Full(job) => {
                ends.full += 1;
                pool.submit(job)
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
            Err(refused) => panic!("no worker submits, and patience has no end: {refused:?}"),
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
    let registry = prometheus::Registry::new();
    let builder = Pool::builder("stress").workers(4).queue_capacity(512).registry(&registry);
    let pool = builder.build().expect("threads");
    let slots = (0..JOBS).map(|_| AtomicBool::new(false)).collect();
    let starts: &'static Starts = Box::leak(Box::new(Starts(slots)));
    let over = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|seed| {
                scope.spawn({
                    let pool = &pool;
                    move || produce(pool, starts, seed)
                })
            })
            .collect();
        // Resized all the while, and read: every reading keeps the laws, and no count falls.
        let watcher = scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(99);
            let mut last = pool.stats();
            while !over.load(Ordering::Acquire) {
                let _ = pool.resize(random.usize(1..9));
                let stats = pool.stats();
                assert_eq!(broken_law(&stats), None);
                let fell = stats.submitted < last.submitted
                    || stats.completed < last.completed
                    || stats.busy_time < last.busy_time;
                assert!(!fell, "{last:?}, then {stats:?}");
                last = stats;
                thread::sleep(Duration::from_millis(1));
            }
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
    let stats = pool.stats();
    assert_eq!(seen, Ends::of(&stats), "what the handles say is what the numbers say");
    let ran = starts.0.iter().filter(|started| started.load(Ordering::Relaxed)).count() as u64;
    assert_eq!((ran, TWICE.load(Ordering::Relaxed)), (seen.completed + seen.panicked, 0));
    let ended = seen.completed + seen.panicked + seen.cancelled + seen.expired;
    assert_eq!((stats.submitted, ended + seen.draining), (ended, JOBS));
    assert_eq!((stats.queue_depth, stats.busy, stats.aborted), (0, 0, 0));
    assert!(ended >= 1_000_000, "a million were admitted: {stats:?}");
    for (kind, count) in
        [("panicked", seen.panicked), ("cancelled", seen.cancelled), ("expired", seen.expired)]
    {
        assert!(count > 1_000, "{count} {kind}");
    }
    assert!(seen.draining > 0, "the drain came in the middle: {seen:?}");

    let durations = &stats.job_duration;
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
    let counted = [seen.completed, seen.panicked, seen.cancelled, seen.expired, 0];
    #[expect(clippy::cast_precision_loss, reason = "the counts are small")]
    let counted = counted.map(|count| count as f64);
    assert_eq!(scraped, counted, "and what the scrape says");
    assert_eq!(exported("submitted_total", ""), counted.iter().sum::<f64>());
    assert_eq!(exported("job_duration_seconds_count", ""), counted[0] + counted[1]);
}
