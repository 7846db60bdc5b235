//! The pool under a model checker: real workers over the real queue, in every order of their steps that matters.
//!
//! `sync/stand_in.rs` says what in a model is not what ships. Each model says what has to be true of every run. If a
//! worker or a submitter sleeps for ever, the checker reports a deadlock by itself. To find a lost wake-up, a model
//! waits for its jobs *before* it drains the pool, because a drain wakes all workers.
//!
//! The number of forced switches between threads is bounded in each model. A switch where a thread sleeps or ends is
//! free, one where it could have gone on is not. Within the bound every run is tried. `LOOM_MAX_PREEMPTIONS` overrides
//! the bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use loom::thread;

use super::current;
use super::job::Runner;
use super::submit::{Engine, Owned};
use super::{
    Drained, Handler, Hooks, Identity, Job, JobError, JobHandle, Patience, Rejected, Settings, Turn, Unrun,
    Workers,
};
use crate::clock::Clock;
use crate::sync::checked::{Condvar, Mutex, lock};

/// Tries every run of `model` with up to `preemptions` forced switches, and says how many there were.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let runs = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    println!("{name}: {} runs", runs.load(Ordering::Relaxed));
}

/// A count that threads wait for.
#[derive(Default)]
struct Latch {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Latch {
    fn arrive(&self) {
        *lock(&self.count) += 1;
        self.changed.notify_all();
    }

    fn wait_for(&self, count: usize) {
        let mut reached = lock(&self.count);
        while *reached < count {
            reached = self.changed.wait(reached).expect("no thread panics with it");
        }
    }
}

/// How often each job was run, and how often dropped unrun.
#[derive(Default)]
struct Tally {
    ran: [AtomicUsize; 4],
    abandoned: [AtomicUsize; 4],
    /// How many have been run.
    done: Latch,
    /// Where jobs wait that meet others.
    met: Latch,
}

impl Tally {
    fn ran(&self) -> [usize; 4] {
        self.ran.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    fn abandoned(&self) -> [usize; 4] {
        self.abandoned.each_ref().map(|count| count.load(Ordering::Relaxed))
    }
}

struct Piece {
    number: usize,
    does: Does,
    tally: Arc<Tally>,
}

/// What a job does.
#[derive(Clone, Copy)]
enum Does {
    Nothing,
    /// Waits until so many have come to this point.
    Meets(usize),
    /// Goes to the back of the queue so many times.
    Requeues(usize),
}

impl Job for Piece {
    fn abandon(self, pool: &Identity) {
        self.tally.abandoned[self.number].fetch_add(1, Ordering::Relaxed);
        pool.count_unrun(Unrun::Aborted);
    }
}

struct Serve;

impl Handler<Piece> for Serve {
    fn run(&mut self, piece: Piece, turn: &mut Turn<'_, Piece>) {
        turn.account.begin();
        let Piece { number, does, tally } = piece;
        tally.ran[number].fetch_add(1, Ordering::Relaxed);
        match does {
            Does::Nothing => {}
            Does::Meets(others) => {
                tally.met.arrive();
                tally.met.wait_for(others);
            }
            Does::Requeues(0) => {}
            Does::Requeues(times) => {
                let again = Piece { number, does: Does::Requeues(times - 1), tally: Arc::clone(&tally) };
                assert!(turn.requeue(again).is_ok(), "its place in the queue is free");
            }
        }
        tally.done.arrive();
    }
}

/// A pool of the model's jobs, and their tally.
struct Bench {
    pool: Workers<Piece>,
    tally: Arc<Tally>,
}

fn settings(workers: usize, queue_capacity: usize) -> Settings {
    Settings {
        name: "model".to_owned(),
        workers,
        queue_capacity,
        stack_size: 0,
        clock: Clock::start(),
        timed: false,
        enough_awake: None,
        hooks: Hooks::default(),
    }
}

impl Bench {
    fn start(settings: Settings) -> Arc<Self> {
        let pool = Workers::start(settings, |_| Serve).expect("threads");
        Arc::new(Bench { pool, tally: Arc::default() })
    }

    fn piece(&self, number: usize, does: Does) -> Piece {
        Piece { number, does, tally: Arc::clone(&self.tally) }
    }

    /// Submits a job; returns whether it was admitted.
    fn submit(&self, number: usize, does: Does, patience: Patience) -> bool {
        self.pool.submit(self.piece(number, does), patience).is_ok()
    }

    fn spawn<T: 'static>(
        self: &Arc<Self>,
        body: impl FnOnce(&Bench) -> T + 'static,
    ) -> thread::JoinHandle<T> {
        let bench = Arc::clone(self);
        thread::spawn(move || body(&bench))
    }

    /// Waits until so many jobs have been run, without waking a worker, and ends the pool in some order. Other models
    /// look into how pools end.
    fn finish(&self, jobs: usize) {
        self.tally.done.wait_for(jobs);
        loom::stop_exploring();
        assert!(self.pool.drain(Duration::MAX).is_clean());
    }
}

const ONCE: [usize; 4] = [1, 1, 0, 0];

#[test]
fn no_job_is_left_while_a_worker_sleeps_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let other = bench.spawn(|bench| bench.submit(0, Does::Nothing, Patience::None));
        assert!(bench.submit(1, Does::Nothing, Patience::None));
        assert!(other.join().expect("the submitter"));
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

/// The jobs meet, so that one worker cannot run both.
#[test]
fn a_woken_worker_that_leaves_more_wakes_the_next_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        assert!(bench.submit(0, Does::Meets(2), Patience::None));
        assert!(bench.submit(1, Does::Meets(2), Patience::None));
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

#[test]
fn a_drain_runs_each_admitted_job_once_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let submitter = bench.spawn(|bench| {
            [0, 1].map(|number| usize::from(bench.submit(number, Does::Nothing, Patience::None)))
        });
        let drained = bench.pool.drain(Duration::MAX);
        let [first, second] = submitter.join().expect("the submitter");
        assert!(drained.is_clean(), "{drained:?}");
        assert_eq!(bench.tally.ran(), [first, second, 0, 0]);
        assert_eq!(bench.tally.abandoned(), [0; 4]);
    });
}

#[test]
fn a_job_requeues_itself_to_its_end_although_the_pool_drains_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        assert!(bench.submit(0, Does::Requeues(2), Patience::None));
        let drained = bench.pool.drain(Duration::MAX);
        assert!(drained.is_clean(), "{drained:?}");
        assert_eq!(bench.tally.ran(), [3, 0, 0, 0]);
    });
}

#[test]
fn an_abort_leaves_each_admitted_job_run_or_abandoned_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let submitter = bench.spawn(|bench| {
            [0, 1].map(|number| usize::from(bench.submit(number, Does::Nothing, Patience::None)))
        });
        bench.pool.abort();
        let [first, second] = submitter.join().expect("the submitter");
        // The workers exit by themselves.
        let Drained { stats, .. } = bench.pool.drain(Duration::MAX);
        let (ran, abandoned) = (bench.tally.ran(), bench.tally.abandoned());
        assert_eq!([ran[0] + abandoned[0], ran[1] + abandoned[1]], [first, second]);
        let accounts = (stats.submitted, stats.completed, stats.aborted);
        assert_eq!(
            accounts,
            ((first + second) as u64, (ran[0] + ran[1]) as u64, (abandoned[0] + abandoned[1]) as u64)
        );
    });
}

#[test]
fn a_job_that_requeues_itself_is_ended_by_an_abort_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 2));
        assert!(bench.submit(0, Does::Requeues(2), Patience::None));
        bench.pool.abort();
        let Drained { stats, .. } = bench.pool.drain(Duration::MAX);
        let (ran, abandoned) = (bench.tally.ran()[0], bench.tally.abandoned()[0]);
        assert!(abandoned == 1 && ran < 3 || abandoned == 0 && ran == 3, "{ran} {abandoned}");
        assert_eq!((stats.completed, stats.aborted), (ran as u64, abandoned as u64));
    });
}

/// A job is held until the abort has returned. So only the abort can drop the other.
#[test]
fn an_abort_drops_what_is_queued_and_waits_for_no_worker_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        for number in [0, 1] {
            assert!(bench.submit(number, Does::Meets(2), Patience::None));
        }
        let aborted = bench.pool.abort().stats.aborted;
        bench.tally.met.arrive();
        loom::stop_exploring();
        bench.pool.drain(Duration::MAX);
        let (ran, abandoned) = (bench.tally.ran(), bench.tally.abandoned());
        assert_eq!([0, 1].map(|job| ran[job] + abandoned[job]), [1, 1]);
        assert_eq!((ran[0] + ran[1]) as u64 + aborted, 2, "no job is dropped after the abort");
        assert!(ran[0] + ran[1] < 2, "the worker has no more than one");
    });
}

#[test]
fn a_worker_that_leaves_loses_no_wake_up_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let submitter = bench.spawn(|bench| {
            assert!(bench.submit(0, Does::Nothing, Patience::None));
            assert!(bench.submit(1, Does::Nothing, Patience::None));
        });
        bench.pool.resize(1).expect("it is open");
        submitter.join().expect("the submitter");
        bench.tally.done.wait_for(2);
        // One leaves, although no thread wakes it any more. Without end, if it does not.
        while bench.pool.stats().workers > 1 {
            thread::yield_now();
        }
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

#[test]
fn a_new_worker_takes_jobs_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 2));
        assert!(bench.submit(0, Does::Meets(2), Patience::None));
        let submitter = bench.spawn(|bench| assert!(bench.submit(1, Does::Meets(2), Patience::None)));
        bench.pool.resize(2).expect("it is open");
        submitter.join().expect("the submitter");
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

#[test]
fn a_submitter_that_waits_for_room_is_woken_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        let other = bench.spawn(|bench| {
            assert!(bench.submit(0, Does::Nothing, Patience::Endless));
            assert!(bench.submit(1, Does::Nothing, Patience::Endless));
        });
        assert!(bench.submit(2, Does::Nothing, Patience::Endless));
        other.join().expect("the submitter");
        bench.finish(3);
        assert_eq!(bench.tally.ran(), [1, 1, 1, 0]);
    });
}

/// Both submitters wait, and the worker may make room for both before the first wakes. It is then held in the job of one
/// until the other is admitted too.
#[test]
fn a_submitter_that_leaves_room_notifies_the_next_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        assert!(bench.submit(0, Does::Nothing, Patience::None));
        assert!(bench.submit(1, Does::Nothing, Patience::None));
        let other = bench.spawn(|bench| bench.submit(2, Does::Meets(2), Patience::Endless));
        assert!(bench.submit(3, Does::Meets(2), Patience::Endless));
        assert!(other.join().expect("the submitter"));
        bench.tally.met.arrive();
        bench.finish(4);
        assert_eq!(bench.tally.ran(), [1; 4]);
    });
}

/// One submitter gives up at any moment. The other must still be notified.
#[test]
fn a_submitter_that_gives_up_loses_no_notification_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        assert!(bench.submit(0, Does::Nothing, Patience::None));
        let hasty =
            bench.spawn(|bench| usize::from(bench.submit(1, Does::Nothing, Patience::Until(Instant::now()))));
        assert!(bench.submit(2, Does::Nothing, Patience::Endless));
        let hasty = hasty.join().expect("the submitter");
        bench.finish(2 + hasty);
        assert_eq!(bench.tally.ran(), [1, hasty, 1, 0]);
    });
}

/// The worker is held until the submitter has returned, so that only the drain can make it return.
#[test]
fn a_drain_refuses_submitters_that_wait_for_room_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        let submitter = bench.spawn(|bench| {
            let admitted = [0, 1, 2].map(|number| {
                match bench.pool.submit(bench.piece(number, Does::Meets(2)), Patience::Endless) {
                    Ok(()) => 1,
                    Err(Rejected::Draining(_)) => 0,
                    Err(other) => panic!("{other:?}"),
                }
            });
            bench.tally.met.arrive();
            admitted
        });
        let drained = bench.pool.drain(Duration::MAX);
        let [first, second, third] = submitter.join().expect("the submitter");
        assert!(drained.is_clean(), "{drained:?}");
        assert_eq!(bench.tally.ran(), [first, second, third, 0]);
        assert!(first + second + third < 3, "the worker has no more than one, and the queue another");
    });
}

#[test]
fn jobs_that_a_helper_leaves_are_run_by_a_worker_model() {
    check(2, || {
        let bench = Bench::start(Settings { enough_awake: Some(1), ..settings(3, 2) });
        let mut helper = bench.pool.helper(Serve).expect("a pool of more than one");
        for number in [0, 1] {
            assert!(bench.pool.admit(bench.piece(number, Does::Nothing), Patience::None).is_ok());
        }
        helper.help(|_| true);
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

/// The worker may have run the first job and looked for the next, once or twice. Then it is held.
#[test]
fn no_more_jobs_wait_than_the_capacity_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 1));
        assert!(bench.submit(0, Does::Nothing, Patience::None));
        let submit = |number| usize::from(bench.submit(number, Does::Meets(2), Patience::None));
        let [first, second, third] = [1, 2, 3].map(submit);
        let admitted = first + second + third;
        assert!((1..=2).contains(&admitted), "the worker has no more than one, and the queue another");
        bench.tally.met.arrive();
        bench.finish(1 + admitted);
        assert_eq!(bench.tally.ran(), [1, first, second, third]);
    });
}

/// A capacity of 0 admits a job if a worker has asked for it, and no other.
#[test]
fn a_hand_over_admits_as_many_jobs_as_workers_are_free_model() {
    check(2, || {
        let bench = Bench::start(settings(1, 0));
        let other = bench.spawn(|bench| usize::from(bench.submit(0, Does::Nothing, Patience::None)));
        assert!(bench.submit(1, Does::Nothing, Patience::Endless));
        let other = other.join().expect("the submitter");
        bench.finish(1 + other);
        assert_eq!(bench.tally.ran(), [other, 1, 0, 0]);
    });
}

/// The worker may be about to sleep, asleep, or about to look when the pool is dropped.
#[test]
fn a_closed_pool_runs_what_was_admitted_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let submitter = bench.spawn(|bench| {
            [0, 1].map(|number| usize::from(bench.submit(number, Does::Nothing, Patience::None)))
        });
        bench.pool.close();
        let [first, second] = submitter.join().expect("the submitter");
        // Without end, if a worker does not leave.
        while bench.pool.stats().workers > 0 {
            thread::yield_now();
        }
        assert_eq!(bench.tally.ran(), [first, second, 0, 0]);
    });
}

#[test]
fn jobs_admitted_together_wake_as_many_workers_as_they_need_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let mut jobs = [0, 1].map(|number| bench.piece(number, Does::Meets(2))).into_iter();
        assert_eq!(bench.pool.shared().queue.admit_all(&mut || jobs.next(), 1), 2, "there is room");
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

/// The pool's own jobs, which have handles.
struct Tasks {
    engine: Engine<'static>,
}

impl Tasks {
    fn start(workers: usize, queue_capacity: usize) -> Arc<Self> {
        let workers = Workers::start(settings(workers, queue_capacity), |_| Runner).expect("threads");
        Arc::new(Tasks { engine: Engine { workers, carry_span: false } })
    }

    fn submit<T, F>(&self, expires: Option<Instant>, job: F) -> JobHandle<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let job = self.engine.admit::<Owned, F, T>(job, expires, Patience::Endless).expect("it is open");
        JobHandle::new(self.engine.handle(job))
    }

    fn drain(&self) -> Drained {
        loom::stop_exploring();
        self.engine.workers.drain(Duration::MAX)
    }
}

#[test]
fn a_join_is_told_of_the_end_model() {
    check(3, || {
        let tasks = Tasks::start(1, 2);
        assert_eq!(tasks.submit(None, || 7).join(), Ok(7));
        tasks.drain();
    });
}

#[test]
fn a_callback_is_called_once_model() {
    check(2, || {
        let tasks = Tasks::start(1, 2);
        let called = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&called);
        tasks.submit(None, || 3).on_done(move |outcome| {
            assert_eq!(outcome, Ok(3));
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(tasks.drain().stats.completed, 1);
        assert_eq!(called.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_job_that_is_cancelled_while_it_is_taken_ends_once_model() {
    check(2, || {
        let tasks = Tasks::start(1, 2);
        let ran = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&ran);
        let job = tasks.submit(None, move || seen.fetch_add(1, Ordering::Relaxed));
        let token = job.cancel_token();
        let canceller = thread::spawn(move || token.cancel());
        let outcome = job.join();
        let cancelled = canceller.join().expect("the canceller");
        let stats = tasks.drain().stats;
        assert_eq!(outcome, if cancelled { Err(JobError::Cancelled) } else { Ok(0) });
        assert_eq!(ran.load(Ordering::Relaxed), usize::from(!cancelled));
        assert_eq!((stats.completed, stats.cancelled), (u64::from(!cancelled), u64::from(cancelled)));
    });
}

/// Its time is over when it is submitted, and its handle and a worker find that out at any moment.
#[test]
fn a_job_that_expires_while_it_is_taken_ends_once_model() {
    check(2, || {
        let tasks = Tasks::start(1, 2);
        let job = tasks.submit(Some(Instant::now()), || unreachable!("it is too late"));
        let last = tasks.submit(None, || 7);
        assert_eq!(job.join(), Err::<(), _>(JobError::Expired));
        assert_eq!(last.join(), Ok(7), "its place in the queue is passed over");
        let stats = tasks.drain().stats;
        assert_eq!((stats.completed, stats.expired), (1, 1));
    });
}

/// The only worker is held, so nothing but the cancellation can make room.
#[test]
fn a_cancellation_lets_in_a_submitter_that_waits_for_room_model() {
    check(2, || {
        let tasks = Tasks::start(1, 1);
        let latch = Arc::new(Latch::default());
        let (held, opens) = (Arc::clone(&latch), Arc::clone(&latch));
        let first = tasks.submit(None, move || held.wait_for(1));
        let dead = tasks.submit(None, || unreachable!("it is cancelled"));
        let submitter = thread::spawn({
            let tasks = Arc::clone(&tasks);
            move || tasks.submit(None, || 5)
        });
        assert!(dead.cancel());
        let last = submitter.join().expect("the submitter");
        opens.arrive();
        assert_eq!((first.join(), last.join()), (Ok(()), Ok(5)));
        let stats = tasks.drain().stats;
        assert_eq!((stats.completed, stats.cancelled), (2, 1));
    });
}

/// Two workers. A job on one joins a job that the other takes, or that it runs itself.
#[test]
fn a_worker_that_joins_a_queued_job_and_a_worker_that_takes_it_run_it_once_model() {
    check(2, || {
        let tasks = Tasks::start(2, 2);
        let ran = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&ran);
        let inner = tasks.submit(None, move || seen.fetch_add(1, Ordering::Relaxed));
        let outer = tasks.submit(None, move || inner.join());
        assert_eq!(outer.join(), Ok(Ok(0)));
        let stats = tasks.drain().stats;
        assert_eq!((ran.load(Ordering::Relaxed), stats.completed, stats.submitted), (1, 2, 2));
    });
}

/// One worker, and no room: whatever a job submits, it has to run itself.
#[test]
fn a_worker_that_finds_no_room_runs_the_job_model() {
    check(2, || {
        let tasks = Tasks::start(1, 1);
        let nested = {
            let tasks = Arc::downgrade(&tasks);
            move || {
                let tasks = tasks.upgrade().expect("the model holds it");
                let both = [1, 2].map(|number| tasks.submit(None, move || number));
                both.into_iter().map(|job| job.join().expect("it returns")).sum::<i32>()
            }
        };
        let first = tasks.submit(None, nested);
        let second = thread::spawn({
            let tasks = Arc::clone(&tasks);
            move || tasks.submit(None, || 4).join()
        });
        assert_eq!((first.join(), second.join().expect("a submitter")), (Ok(3), Ok(4)));
        let stats = tasks.drain().stats;
        assert_eq!((stats.completed, stats.submitted), (4, 4));
    });
}

/// The waiting thread registers at any moment of the last job's end.
#[test]
fn a_wait_for_an_idle_pool_ends_model() {
    check(2, || {
        let tasks = Tasks::start(2, 2);
        let jobs = [1, 2].map(|number| tasks.submit(None, move || number));
        assert!(tasks.engine.workers.shared().wait_until_idle(None));
        assert!(jobs.iter().all(JobHandle::is_finished));
        tasks.drain();
    });
}

/// A sweep runs while a worker takes and a handle cancels.
#[test]
fn a_sweep_takes_no_live_job_along_model() {
    check(2, || {
        let tasks = Tasks::start(1, 4);
        let dead = [(), ()].map(|()| tasks.submit(None, || 0));
        let live = tasks.submit(None, || 7);
        let sweeper = thread::spawn({
            let tasks = Arc::clone(&tasks);
            move || tasks.engine.workers.shared().queue.sweep(Job::is_dead)
        });
        let cancelled = dead.iter().filter(|job| job.cancel()).count() as u64;
        assert_eq!(live.join(), Ok(7));
        sweeper.join().expect("the sweeper");
        let stats = tasks.drain().stats;
        assert_eq!((stats.completed, stats.cancelled), (3 - cancelled, cancelled));
    });
}

/// A job's own thread is not a worker's after it, whatever order threads end in.
#[test]
fn a_drain_by_a_job_is_answered_model() {
    check(2, || {
        let tasks = Tasks::start(2, 2);
        let inside = Arc::downgrade(&tasks);
        let drains = tasks.submit(None, move || {
            assert!(current::job().is_some());
            inside.upgrade().expect("the model holds it").engine.workers.drain(Duration::MAX).is_clean()
        });
        let other = thread::spawn({
            let tasks = Arc::clone(&tasks);
            move || tasks.engine.admit::<Owned, _, _>(|| 1, None, Patience::None).is_ok()
        });
        assert_eq!(drains.join(), Ok(true));
        let other = u64::from(other.join().expect("the submitter"));
        assert_eq!(tasks.drain().stats.completed, 1 + other);
    });
}
