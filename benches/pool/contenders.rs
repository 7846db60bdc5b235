//! The pools that are compared, and the job that all of them run.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use executors::Executor;
use millpond::Pool;

/// A pool that is compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// Starts it with this many workers. If its queue has a bound, the queue has room for this many jobs.
    pub(crate) start: fn(usize, usize) -> Box<dyn Runs>,
}

/// Which final columns of a table read this pool's figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `Pool::execute`, which every other pool is compared with.
    Execute,
    /// `Pool::execute` on a pool that measures no time.
    Untimed,
    /// `Pool::submit`.
    Submit,
    /// A pool of another crate. None has a bound.
    Crate,
    /// The plainest pool on a kanal channel.
    Kanal,
}

pub(crate) const CONTENDERS: [Contender; 10] = [
    Contender { name: "execute", kind: Kind::Execute, start: |workers, room| millpond(workers, room, true) },
    Contender { name: "submit", kind: Kind::Submit, start: submit },
    Contender { name: "untimed", kind: Kind::Untimed, start: |workers, room| millpond(workers, room, false) },
    other("threadpool", |workers, _| Box::new(threadpool::ThreadPool::new(workers))),
    other("rusty_pool", |workers, _| {
        Box::new(rusty_pool::Builder::new().core_size(workers).max_size(workers).build())
    }),
    other("rayon", |workers, _| {
        Box::new(rayon::ThreadPoolBuilder::new().num_threads(workers).build().expect("threads"))
    }),
    other("tokio", tokio),
    other("executors", |workers, _| {
        Box::new(Executors(executors::crossbeam_channel_pool::ThreadPool::new(workers)))
    }),
    other("uvth", |workers, _| Box::new(uvth::ThreadPoolBuilder::new().num_threads(workers).build())),
    Contender { name: "kanal", kind: Kind::Kanal, start: kanal },
];

const fn other(name: &'static str, start: fn(usize, usize) -> Box<dyn Runs>) -> Contender {
    Contender { name, kind: Kind::Crate, start }
}

/// What every pool can do: run a job at some time.
pub(crate) trait Runs: Send + Sync {
    fn run(&self, job: Job);
}

/// The job that all pools run. Each pool gets a closure of its own that captures one job, so nothing is boxed before
/// the pool decides to box it.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) countdown: &'static Countdown,
    pub(crate) work: Work,
}

/// A closure that captures a reference and two words.
const _: () = assert!(size_of::<Job>() == 24);

/// What a job does before it counts itself down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    Nothing,
    /// Keeps a processor busy for this many microseconds.
    SpinUs(u64),
    /// Sleeps for this many microseconds.
    SleepUs(u64),
    /// Waits for [`GATE`], after it has counted itself down.
    Gate,
}

/// If a thread holds it, a job with [`Work::Gate`] keeps its worker busy.
pub(crate) static GATE: Mutex<()> = Mutex::new(());

impl Job {
    fn run(self) {
        match self.work {
            Work::Nothing => {}
            Work::SpinUs(us) => {
                let (start, time) = (Instant::now(), Duration::from_micros(us));
                while start.elapsed() < time {
                    std::hint::spin_loop();
                }
            }
            Work::SleepUs(us) => thread::sleep(Duration::from_micros(us)),
            Work::Gate => {
                self.countdown.done();
                drop(GATE.lock().unwrap_or_else(PoisonError::into_inner));
                return;
            }
        }
        self.countdown.done();
    }
}

/// Counts jobs down, and wakes the thread that made it after the last of them.
pub(crate) struct Countdown {
    left: AtomicUsize,
    waiter: Thread,
}

impl Countdown {
    /// For this many jobs. It is leaked, so a job captures a plain reference, and the benchmark counts no references.
    pub(crate) fn of(jobs: usize) -> &'static Self {
        Box::leak(Box::new(Countdown { left: AtomicUsize::new(jobs), waiter: thread::current() }))
    }

    fn done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.waiter.unpark();
        }
    }

    /// Blocks until every job has counted itself down.
    pub(crate) fn wait(&self) {
        while self.left.load(Ordering::Acquire) > 0 {
            thread::park();
        }
    }
}

fn build(workers: usize, room: usize, timed: bool) -> Pool {
    Pool::builder("bench").workers(workers).queue_capacity(room).timed(timed).build().expect("threads")
}

fn millpond(workers: usize, room: usize, timed: bool) -> Box<dyn Runs> {
    Box::new(build(workers, room, timed))
}

impl Runs for Pool {
    fn run(&self, job: Job) {
        self.execute(move || job.run()).expect("it is not draining");
    }
}

/// A millpond pool whose jobs have handles, which are dropped.
struct WithHandles(Pool);

fn submit(workers: usize, room: usize) -> Box<dyn Runs> {
    Box::new(WithHandles(build(workers, room, true)))
}

impl Runs for WithHandles {
    fn run(&self, job: Job) {
        drop(self.0.submit(move || job.run()).expect("it is not draining"));
    }
}

impl Runs for threadpool::ThreadPool {
    fn run(&self, job: Job) {
        self.execute(move || job.run());
    }
}

impl Runs for rusty_pool::ThreadPool {
    fn run(&self, job: Job) {
        self.execute(move || job.run());
    }
}

impl Runs for rayon::ThreadPool {
    fn run(&self, job: Job) {
        self.spawn(move || job.run());
    }
}

/// Tokio's threads for blocking code. They live as long as the runtime, as those of the other pools do.
fn tokio(workers: usize, _room: usize) -> Box<dyn Runs> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(workers)
        .thread_keep_alive(Duration::from_secs(3600))
        .build();
    Box::new(runtime.expect("a runtime"))
}

impl Runs for tokio::runtime::Runtime {
    fn run(&self, job: Job) {
        drop(self.spawn_blocking(move || job.run()));
    }
}

/// A pool of the crate `executors`. If it is dropped without a shutdown, its workers panic.
struct Executors(executors::crossbeam_channel_pool::ThreadPool);

impl Drop for Executors {
    fn drop(&mut self) {
        self.0.shutdown_borrowed().expect("no job is left");
    }
}

impl Runs for Executors {
    fn run(&self, job: Job) {
        self.0.execute(move || job.run());
    }
}

impl Runs for uvth::ThreadPool {
    fn run(&self, job: Job) {
        self.execute(move || job.run());
    }
}

/// The plainest pool on a bounded channel: threads that receive closures and run them.
struct Kanal(kanal::Sender<Box<dyn FnOnce() + Send>>);

fn kanal(workers: usize, room: usize) -> Box<dyn Runs> {
    let (sender, receiver) = kanal::bounded::<Box<dyn FnOnce() + Send>>(room);
    for _ in 0..workers {
        let receiver = receiver.clone();
        thread::spawn(move || receiver.for_each(|job| job()));
    }
    Box::new(Kanal(sender))
}

impl Runs for Kanal {
    fn run(&self, job: Job) {
        self.0.send(Box::new(move || job.run())).expect("its threads receive");
    }
}
