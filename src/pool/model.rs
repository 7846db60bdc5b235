//! The pool under a model checker: real workers over the real queue, in every order of their steps that matters.
//!
//! `sync/stand_in.rs` says what in a model is not what ships. Each model says what has to be true of every run; a worker or
//! a submitter that sleeps for ever is a deadlock, which the checker reports by itself. To find a lost wake-up a model waits for
//! its jobs *before* it drains the pool, because a drain wakes everybody.
//!
//! The number of forced switches between threads is bounded in each model: a switch where a thread sleeps or ends is free, one
//! where it could have gone on is not. Within the bound every run is tried. `LOOM_MAX_PREEMPTIONS` overrides the bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use loom::thread;

use super::job::{JobCell, Run, Runner, Task};
use super::{
    Drained, Handler, Job, JobError, JobHandle, Outcome, Patience, Rejected, Settings, Turn, Workers,
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
            reached = self.changed.wait(reached).expect("nobody panics with it");
        }
    }
}

/// How often each job was run, and how often handed to `abandon`.
#[derive(Default)]
struct Tally {
    ran: [AtomicUsize; 4],
    abandoned: [AtomicUsize; 4],
    /// How many have been run.
    done: Latch,
    /// What jobs wait for that meet others.
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
    fn abandon(self, count: &mut dyn FnMut(Outcome)) {
        self.tally.abandoned[self.number].fetch_add(1, Ordering::Relaxed);
        count(Outcome::Aborted);
    }
}

struct Serve;

impl Handler<Piece> for Serve {
    fn run(&mut self, piece: Piece, turn: &mut Turn<'_, Piece>) {
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
        lingers: false,
        enough_awake: None,
        init: None,
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

    /// Waits until so many jobs have been run, without waking anybody, and ends the pool in some order: how pools end, other
    /// models look into.
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
fn a_worker_that_lingers_does_what_a_woken_one_would_model() {
    check(2, || {
        let bench = Bench::start(Settings { lingers: true, ..settings(2, 2) });
        assert!(bench.submit(0, Does::Nothing, Patience::None));
        assert!(bench.submit(1, Does::Meets(2), Patience::None));
        bench.tally.done.wait_for(1);
        assert!(bench.submit(2, Does::Meets(2), Patience::None));
        bench.finish(3);
        assert_eq!(bench.tally.ran(), [1, 1, 1, 0]);
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

#[test]
fn a_worker_that_is_let_go_takes_no_wake_up_along_model() {
    check(2, || {
        let bench = Bench::start(settings(2, 2));
        let submitter = bench.spawn(|bench| {
            assert!(bench.submit(0, Does::Nothing, Patience::None));
            assert!(bench.submit(1, Does::Nothing, Patience::None));
        });
        bench.pool.resize(1).expect("it is open");
        submitter.join().expect("the submitter");
        bench.tally.done.wait_for(2);
        // One leaves, although nobody wakes it any more. Without end, if it does not.
        while bench.pool.stats().workers > 1 {
            thread::yield_now();
        }
        bench.finish(2);
        assert_eq!(bench.tally.ran(), ONCE);
    });
}

#[test]
fn a_worker_that_comes_takes_part_model() {
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
fn who_waits_for_room_is_woken_model() {
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

/// One submitter gives up at any moment; the other must not be forgotten for it.
#[test]
fn who_gives_up_waiting_for_room_takes_no_notice_along_model() {
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

/// The worker is held until the submitter is back, so that nothing but the drain can bring it back.
#[test]
fn a_drain_turns_back_who_waits_for_room_model() {
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

/// What the helper leaves, the thread runs.
#[test]
fn what_a_helper_leaves_is_run_by_a_thread_model() {
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

/// The pool's own jobs, which have handles.
struct Tasks {
    pool: Workers<Task>,
}

impl Tasks {
    fn start(workers: usize) -> Self {
        Tasks { pool: Workers::start(settings(workers, 2), |_| Runner).expect("threads") }
    }

    fn submit<T, F>(&self, expires: Option<Instant>, job: F) -> JobHandle<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let job = Arc::new(JobCell::new(job, expires));
        let task = Task::handled(Arc::clone(&job) as Arc<dyn Run>);
        assert!(self.pool.submit(task, Patience::None).is_ok(), "there is room");
        JobHandle { job, pool: self.pool.id() }
    }
}

#[test]
fn a_job_that_is_cancelled_while_it_is_taken_ends_once_model() {
    check(2, || {
        let tasks = Tasks::start(1);
        let ran = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&ran);
        let job = tasks.submit(None, move || seen.fetch_add(1, Ordering::Relaxed));
        let token = job.cancel_token();
        let canceller = thread::spawn(move || token.cancel());
        let outcome = job.join();
        let cancelled = canceller.join().expect("the canceller");
        let stats = tasks.pool.drain(Duration::MAX).stats;
        assert_eq!(outcome, if cancelled { Err(JobError::Cancelled) } else { Ok(0) });
        assert_eq!(ran.load(Ordering::Relaxed), usize::from(!cancelled));
        assert_eq!((stats.completed, stats.cancelled), (u64::from(!cancelled), u64::from(cancelled)));
    });
}

/// Its time is over when it is submitted, and its handle and a worker find that out at any moment.
#[test]
fn a_job_that_expires_while_it_is_taken_ends_once_model() {
    check(2, || {
        let tasks = Tasks::start(1);
        let job = tasks.submit(Some(Instant::now()), || unreachable!("it is too late"));
        let last = tasks.submit(None, || 7);
        assert_eq!(job.join(), Err::<(), _>(JobError::Expired));
        assert_eq!(last.join(), Ok(7), "its place in the queue is passed over");
        let stats = tasks.pool.drain(Duration::MAX).stats;
        assert_eq!((stats.completed, stats.expired), (1, 1));
    });
}
