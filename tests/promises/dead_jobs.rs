//! A job that was cancelled or has expired holds nothing: no place, no captures, no part of the numbers, no memory.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use millpond::{JobError, JobHandle, Pool, Rejected, Until, as_completed, wait};

use crate::common::pools::{all_asleep, broken_law, held, timed};
use crate::common::{PATIENCE, eventually};
use crate::{Log, Wakes, alone, in_time, join, resident_kib, submit};

/// What "in time" means on a busy machine, where a deadline is some milliseconds. The workers are stuck for longer.
const SOON: Duration = Duration::from_secs(5);

/// Two ways in which a job dies in the queue.
#[derive(Clone, Copy, Debug)]
enum Death {
    Cancelled,
    Expired,
}

impl Death {
    const ALL: [Death; 2] = [Death::Cancelled, Death::Expired];

    /// Submits a job that dies in the queue, and a step that makes it die. An expired job dies by itself.
    fn submit<T: Send + 'static>(
        self,
        pool: &Pool,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> (JobHandle<T>, impl FnOnce() + Send + 'static) {
        let deadline = match self {
            Death::Cancelled => Duration::from_secs(3600),
            Death::Expired => Duration::from_millis(20),
        };
        let job = pool.with_deadline(deadline).try_submit(job).expect("there is room");
        let token = job.cancel_token();
        let kill = move || {
            if matches!(self, Death::Cancelled) {
                assert!(token.cancel());
            }
        };
        (job, kill)
    }

    fn error(self) -> JobError {
        match self {
            Death::Cancelled => JobError::Cancelled,
            Death::Expired => JobError::Expired,
        }
    }

    /// How many jobs the pool has counted under this death.
    fn counted(self, pool: &Pool) -> u64 {
        match self {
            Death::Cancelled => pool.stats().cancelled,
            Death::Expired => pool.stats().expired,
        }
    }
}

#[test]
fn a_dead_job_frees_its_place_at_once() {
    for death in Death::ALL {
        let (pool, latch) = held(1, 2);
        let (dead, kill) = death.submit(&pool, || 1);
        let alive = submit(&pool, || 2);
        if matches!(death, Death::Cancelled) {
            assert!(matches!(pool.try_submit(|| 3), Err(Rejected::Full(_))));
        }
        kill();
        let third = eventually("there is room", || pool.try_submit(|| 3).ok());
        assert!(matches!(pool.try_submit(|| 4), Err(Rejected::Full(_))), "only one place was freed");
        assert_eq!(pool.stats().queue_depth, 2);
        latch.open();
        assert_eq!([dead, alive, third].map(join), [Err(death.error()), Ok(2), Ok(3)]);
    }
}

#[test]
fn a_cancelled_job_is_counted_before_the_cancel_returns() {
    let (pool, latch) = held(1, 100);
    let jobs: Vec<_> = (0..100).map(|_| submit(&pool, || ())).collect();
    for (number, job) in (1..).zip(&jobs) {
        assert!(job.cancel());
        let stats = pool.stats();
        assert_eq!((stats.cancelled, stats.queue_depth, broken_law(&stats)), (number, 100 - number, None));
        assert!(job.cancel(), "a second cancel changes nothing");
        assert_eq!(pool.stats().cancelled, number);
    }
    latch.open();
    assert_eq!(pool.drain(PATIENCE).cancelled, 0, "all were cancelled before the drain");
    assert_eq!((pool.stats().completed, pool.stats().cancelled), (1, 100));
}

#[test]
fn an_expired_job_is_counted_although_no_thread_waits_for_it() {
    let (pool, latch) = held(2, 100);
    let with_deadline = pool.with_deadline(Duration::from_millis(20));
    (0..50).for_each(|_| drop(with_deadline.try_submit(|| ()).expect("room")));
    let ((), took) = timed(|| eventually("all expire", || (pool.stats().expired == 50).then_some(())));
    assert!(took < SOON, "{took:?}");
    let stats = pool.stats();
    assert_eq!((stats.queue_depth, stats.busy, broken_law(&stats)), (0, 2, None));
    latch.open();
}

/// Its destructor takes a while, and then says so.
struct Slow(Arc<AtomicBool>);

impl Drop for Slow {
    fn drop(&mut self) {
        thread::sleep(Duration::from_millis(30));
        self.0.store(true, Ordering::Release);
    }
}

/// Submits a job that dies in the queue and whose captures take a while to drop. The dead job's captures must be dropped
/// when `learn` learns of the death.
fn captures_are_dropped_before<L>(how: &str, learn: impl Fn(JobHandle<()>, JobError) -> L)
where
    L: FnOnce() + Send,
{
    for death in Death::ALL {
        let (pool, latch) = held(1, 10);
        let dropped = Arc::new(AtomicBool::new(false));
        let captured = Slow(Arc::clone(&dropped));
        let (job, kill) = death.submit(&pool, move || drop(captured));
        let learn = learn(job, death.error());
        let check =
            || assert!(dropped.load(Ordering::Acquire), "{how}, {death:?}: the captures are still there");
        thread::scope(|scope| {
            let learner = scope.spawn(|| {
                learn();
                check();
            });
            kill();
            learner.join().expect("it is told in time");
        });
        assert_eq!(death.counted(&pool), 1);
        latch.open();
    }
}

#[test]
fn a_dead_jobs_captures_are_dropped_before_its_joiner_is_told() {
    captures_are_dropped_before("a join", |job, error| move || assert_eq!(join(job), Err(error)));
}

#[test]
fn a_dead_jobs_captures_are_dropped_before_a_group_is_told() {
    captures_are_dropped_before("a wait", |job, _| {
        move || assert!(wait(&mut [job], Until::FirstCompleted, PATIENCE))
    });
    captures_are_dropped_before("outcomes as they come", |job, error| {
        move || assert_eq!(as_completed([job]).next(), Some((0, Err(error))))
    });
}

#[test]
fn a_dead_jobs_captures_are_dropped_before_its_task_or_its_callback_is_told() {
    captures_are_dropped_before("an await", |job, error| {
        move || assert_eq!(in_time("the job", move || millpond::block_on(job)), Err(error))
    });
    captures_are_dropped_before("a callback", |job, error| {
        let (report, reports) = mpsc::channel();
        job.on_done(move |outcome| report.send(outcome).expect("the test waits"));
        move || assert_eq!(reports.recv_timeout(PATIENCE), Ok(Err(error)))
    });
}

#[test]
fn an_aborted_jobs_captures_are_dropped_before_its_joiner_is_told() {
    let (pool, latch) = held(1, 10);
    let dropped = Arc::new(AtomicBool::new(false));
    let captured = Slow(Arc::clone(&dropped));
    let job = submit(&pool, move || drop(captured));
    thread::scope(|scope| {
        let joiner = scope.spawn(|| {
            assert_eq!(join(job), Err(JobError::Aborted));
            assert!(dropped.load(Ordering::Acquire), "the captures are still there");
        });
        pool.abort();
        joiner.join().expect("it is told in time");
    });
    latch.open();
}

#[test]
fn a_dead_job_is_no_part_of_the_oldest_age() {
    const OLD: Duration = Duration::from_millis(300);
    for death in Death::ALL {
        let (pool, latch) = held(1, 10);
        let (dead, kill) = death.submit(&pool, || ());
        if matches!(death, Death::Cancelled) {
            eventually("it ages", || (pool.oldest_age() >= OLD).then_some(()));
        }
        let before = Instant::now();
        let alive = submit(&pool, || ());
        kill();
        assert_eq!(join(dead), Err(death.error()));
        let (age, in_stats) = (pool.oldest_age(), pool.stats().queue_oldest_age);
        // The two clocks may differ by a little.
        let limit = before.elapsed() + Duration::from_millis(10);
        assert!(age <= limit && in_stats <= limit, "{death:?}: {age:?} and {in_stats:?} after {limit:?}");
        assert!(alive.cancel());
        assert_eq!((pool.oldest_age(), pool.stats().queue_oldest_age), (Duration::ZERO, Duration::ZERO));
        latch.open();
    }
}

#[test]
fn a_dead_job_lets_a_waiting_submitter_in() {
    for death in Death::ALL {
        let (pool, latch) = held(1, 1);
        let (dead, kill) = death.submit(&pool, || 1);
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("let-in".to_owned());
            let submitter = builder.spawn_scoped(scope, || pool.submit(|| 2)).expect("a thread");
            if matches!(death, Death::Cancelled) {
                all_asleep("let-in", 1);
            }
            kill();
            let admitted = submitter.join().expect("it returns").expect("it is admitted");
            assert_eq!((pool.stats().busy, pool.stats().queue_depth), (1, 1), "the worker is still held");
            latch.open();
            assert_eq!((join(dead), join(admitted)), (Err(death.error()), Ok(2)));
        });
    }
}

#[test]
fn a_dead_job_lets_a_waiting_task_in() {
    for death in Death::ALL {
        let (pool, latch) = held(1, 1);
        let (dead, kill) = death.submit(&pool, || 1);
        let wakes = Arc::new(Wakes::default());
        let mut submission = pin!(pool.submit_async(|| 2));
        let polled = submission.as_mut().poll(&mut Context::from_waker(&wakes.waker()));
        kill();
        let admitted = match polled {
            Poll::Ready(admitted) => {
                assert!(matches!(death, Death::Expired), "there was no room");
                admitted
            }
            Poll::Pending => wakes.finish("the submission", submission),
        };
        let admitted = admitted.expect("the pool is not draining");
        latch.open();
        assert_eq!((join(dead), join(admitted)), (Err(death.error()), Ok(2)));
    }
}

/// The captures are counted as well as the memory. Ten jobs stay alive among the dead ones.
#[test]
fn a_client_that_submits_and_cancels_behind_stuck_workers_takes_no_memory() {
    const ROUNDS: usize = 400_000;
    alone("dead_jobs::a_client_that_submits_and_cancels_behind_stuck_workers_takes_no_memory", || {
        /// It makes each job larger, and counts those that are alive.
        struct Captured(Arc<AtomicUsize>, [u8; 256]);
        impl Captured {
            fn first(&self) -> u8 {
                std::hint::black_box(&self.1)[0]
            }
        }
        impl Drop for Captured {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let (pool, latch) = held(2, 100);
        let (log, alive) = (Log::default(), Arc::new(AtomicUsize::new(0)));
        let mut survivors = Vec::new();
        let mut before = 0;
        for round in 0..ROUNDS {
            if round % (ROUNDS / 10) == 0 {
                let (log, number) = (log.clone(), survivors.len());
                survivors.push(submit(&pool, move || log.push(number)));
            }
            alive.fetch_add(1, Ordering::Relaxed);
            let captured = Captured(Arc::clone(&alive), [7; 256]);
            let job = submit(&pool, move || captured.first());
            assert!(job.cancel());
            assert_eq!(alive.load(Ordering::Relaxed), 0, "the captures are dropped");
            if round == ROUNDS / 10 {
                before = resident_kib();
            }
        }
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "{grown} KiB for {ROUNDS} dead jobs");
        let stats = pool.stats();
        assert_eq!((stats.cancelled, stats.queue_depth, stats.busy), (ROUNDS as u64, 10, 2));
        latch.open();
        survivors.into_iter().for_each(|job| assert_eq!(join(job), Ok(())));
        assert_eq!(log.sorted(), (0..10).collect::<Vec<_>>());
    });
}

#[test]
fn jobs_that_expire_behind_stuck_workers_take_no_memory() {
    const ROUNDS: usize = 200_000;
    alone("dead_jobs::jobs_that_expire_behind_stuck_workers_take_no_memory", || {
        let (pool, latch) = held(1, 1_000);
        let mut before = 0;
        for round in 0..ROUNDS {
            let captured = [7_u8; 256];
            let job = move || std::hint::black_box(captured)[0];
            // The job waits for room until those before it have expired.
            let late = pool.with_deadline(Duration::from_micros(100)).submit(job).expect("room");
            if round % 1_000 == 0 {
                assert_eq!(join(late), Err(JobError::Expired));
            }
            if round == ROUNDS / 10 {
                before = resident_kib();
            }
        }
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 8 * 1024, "{grown} KiB for {ROUNDS} dead jobs");
        eventually("all expire", || (pool.stats().expired == ROUNDS as u64).then_some(()));
        assert_eq!((pool.stats().queue_depth, pool.stats().completed), (0, 0));
        latch.open();
    });
}

#[test]
fn jobs_that_survive_among_dead_ones_run_in_their_order() {
    let (pool, latch) = held(1, 2_000);
    let log = Log::default();
    let mut random = fastrand::Rng::with_seed(5);
    let jobs: Vec<_> = (0..2_000)
        .map(|number| {
            let log = log.clone();
            (number, submit(&pool, move || log.push(number)))
        })
        .collect();
    let (dead, alive): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|_| random.u32(0..4) > 0);
    assert!(dead.iter().all(|(_, job)| job.cancel()));
    latch.open();
    let survivors: Vec<_> = alive.iter().map(|(number, _)| *number).collect();
    alive.into_iter().for_each(|(_, job)| assert_eq!(join(job), Ok(())));
    assert_eq!(log.read(), survivors);
}

// Deadlines, while all workers are stuck.

#[test]
fn tasks_learn_of_a_deadline_in_time_while_all_workers_are_stuck() {
    const DEADLINE: Duration = Duration::from_millis(50);
    let (pool, latch) = held(2, 10);
    let late = pool.with_deadline(DEADLINE).try_submit(|| ()).expect("room");
    let (outcome, took) = in_time("the await", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        timed(|| runtime.block_on(late))
    });
    assert_eq!(outcome, Err(JobError::Expired));
    assert!(took < SOON, "{took:?}");
    latch.open();
}

/// The second deadline is earlier than the first one.
#[test]
fn an_earlier_deadline_is_not_kept_waiting_by_a_later_one() {
    let (pool, latch) = held(1, 10);
    let distant = pool.with_deadline(Duration::from_secs(3600)).try_submit(|| 1).expect("room");
    let (report, reports) = mpsc::channel();
    let near = pool.with_deadline(Duration::from_millis(30)).try_submit(|| 2).expect("room");
    near.on_done(move |outcome| report.send(outcome).expect("the test waits"));
    let (outcome, took) = timed(|| reports.recv_timeout(PATIENCE));
    assert_eq!(outcome, Ok(Err(JobError::Expired)));
    assert!(took < SOON, "{took:?}");
    latch.open();
    assert_eq!(join(distant), Ok(1));
}

#[test]
fn callbacks_learn_of_each_deadline_in_time_and_never_before_it() {
    const JOBS: usize = 200;
    let (pool, latch) = held(2, JOBS);
    let (report, reports) = mpsc::channel();
    let mut random = fastrand::Rng::with_seed(11);
    for _ in 0..JOBS {
        let deadline = Duration::from_millis(random.u64(0..300));
        let (report, before) = (report.clone(), Instant::now());
        let job = pool.with_deadline(deadline).try_submit(|| ()).expect("room");
        job.on_done(move |outcome| {
            report.send((outcome, deadline, before.elapsed())).expect("the test waits");
        });
    }
    for _ in 0..JOBS {
        let (outcome, deadline, after) = reports.recv_timeout(PATIENCE).expect("each is told");
        assert_eq!(outcome, Err(JobError::Expired));
        assert!(after >= deadline && after < deadline + SOON, "{after:?} for {deadline:?}");
    }
    assert_eq!(pool.stats().busy, 2, "the workers are stuck all the while");
    latch.open();
}

/// A callback may take long, and must not keep the others from their deadlines for ever.
#[test]
fn a_callback_that_panics_does_not_end_the_watch_over_deadlines() {
    let (pool, latch) = held(1, 10);
    for _ in 0..3 {
        let late = pool.with_deadline(Duration::from_millis(10)).try_submit(|| ()).expect("room");
        late.on_done(|_| std::panic::resume_unwind(Box::new("on purpose")));
        let late = pool.with_deadline(Duration::from_millis(20)).try_submit(|| ()).expect("room");
        let (outcome, took) = timed(|| millpond::block_on(late));
        assert_eq!(outcome, Err(JobError::Expired));
        assert!(took < SOON, "{took:?}");
    }
    eventually("all expire", || (pool.stats().expired == 6).then_some(()));
    latch.open();
}

#[test]
fn a_dead_job_wakes_its_task_and_keeps_no_waker() {
    for death in Death::ALL {
        let (pool, latch) = held(1, 10);
        let (mut job, kill) = death.submit(&pool, || ());
        let wakes = Arc::new(Wakes::default());
        let polled = Pin::new(&mut job).poll(&mut Context::from_waker(&wakes.waker()));
        kill();
        let outcome = match polled {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => wakes.finish("the job", Pin::new(&mut job)),
        };
        assert_eq!(outcome, Err(death.error()));
        assert_eq!(Arc::strong_count(&wakes), 1, "{death:?}: the waker is still there");
        latch.open();
    }
}
