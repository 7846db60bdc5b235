//! Compares pools: `cargo bench --bench pool`.
//!
//! `-- --rounds 5` is quicker and less sure, `-- --only idle` runs the rows whose name has that word in it,
//! `-- --pools execute,rayon` those pools, for a profiler.
//!
//! All pools run the same closures in the same process, one after the other, in a new order each round, so
//! that what the machine does meanwhile befalls them all. A figure is the median over the rounds, and so is a
//! ratio, which is taken within a round. `benches/README.md` says what the rows mean and what was seen.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use millpond::Pool;

/// Room for all jobs of the largest row, since the others have no bound.
const QUEUE_CAPACITY: usize = 1 << 18;

/// Jobs that count themselves down, and whoever waits for the last.
struct Countdown {
    left: AtomicUsize,
    waiter: Thread,
}

impl Countdown {
    /// For this many jobs. It is leaked, so that a job is a closure with one captured reference, and no count
    /// of references is measured with it.
    fn of(jobs: usize) -> &'static Self {
        Box::leak(Box::new(Countdown { left: AtomicUsize::new(jobs), waiter: thread::current() }))
    }

    fn done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.waiter.unpark();
        }
    }

    fn wait(&self) {
        while self.left.load(Ordering::Acquire) > 0 {
            thread::park();
        }
    }
}

/// What every pool can do: run a closure some time.
trait Runs: Send + Sync {
    fn run(&self, job: Job);
}

/// The jobs compared. An enum and not a trait object, so that each pool makes of it what it makes of any closure.
#[derive(Clone, Copy)]
struct Job {
    countdown: &'static Countdown,
    spin: Duration,
}

impl Job {
    fn run(self) {
        if !self.spin.is_zero() {
            let start = Instant::now();
            while start.elapsed() < self.spin {
                std::hint::spin_loop();
            }
        }
        self.countdown.done();
    }
}

impl Runs for Pool {
    fn run(&self, job: Job) {
        self.execute(move || job.run()).expect("it is not draining");
    }
}

/// A millpond pool whose jobs have handles, which are dropped.
struct WithHandles(Arc<Pool>);

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

impl Runs for tokio::runtime::Runtime {
    fn run(&self, job: Job) {
        drop(self.spawn_blocking(move || job.run()));
    }
}

/// The pools compared, with this many workers each.
fn pools(workers: usize) -> Vec<(&'static str, Arc<dyn Runs>)> {
    let millpond = |name, timed| {
        let builder = Pool::builder(name).workers(workers).queue_capacity(QUEUE_CAPACITY).timed(timed);
        Arc::new(builder.build().expect("threads"))
    };
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(workers).build().expect("threads");
    let tokio = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(workers)
        .thread_keep_alive(Duration::from_secs(3600))
        .build()
        .expect("a runtime");
    let rusty = rusty_pool::Builder::new().core_size(workers).max_size(workers).build();
    let timed = millpond("timed", true);
    vec![
        ("execute", Arc::clone(&timed) as Arc<dyn Runs>),
        ("submit", Arc::new(WithHandles(timed))),
        ("untimed", millpond("untimed", false)),
        ("threadpool", Arc::new(threadpool::ThreadPool::new(workers))),
        ("rusty_pool", Arc::new(rusty)),
        ("rayon", Arc::new(rayon)),
        ("tokio", Arc::new(tokio)),
    ]
}

/// What is measured.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    jobs: usize,
    producers: usize,
    spin: Duration,
    /// Whether each job is waited for before the next is submitted.
    one_at_a_time: bool,
}

const fn row(name: &'static str, jobs: usize) -> Row {
    Row { name, jobs, producers: 1, spin: Duration::ZERO, one_at_a_time: false }
}

const ROWS: [Row; 7] = [
    row("empty, 1 producer", 200_000),
    Row { producers: 4, ..row("empty, 4 producers", 200_000) },
    Row { one_at_a_time: true, ..row("one job, idle pool", 2_000) },
    Row { spin: Duration::from_micros(10), ..row("10 us jobs, saturated", 20_000) },
    Row { producers: 4, spin: Duration::from_micros(10), ..row("10 us jobs, 4 producers", 20_000) },
    row("burst of 1,000", 1_000),
    row("burst of 10,000", 10_000),
];

impl Row {
    /// Nanoseconds for each job, from the first submission to the end of the last.
    #[expect(clippy::cast_precision_loss, reason = "the counts are small")]
    fn measure(&self, pool: &dyn Runs) -> f64 {
        if self.one_at_a_time {
            return self.measure_latency(pool);
        }
        let countdown = Countdown::of(self.jobs);
        let share = self.jobs / self.producers;
        let job = Job { countdown, spin: self.spin };
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 1..self.producers {
                scope.spawn(|| (0..share).for_each(|_| pool.run(job)));
            }
            (0..share).for_each(|_| pool.run(job));
        });
        countdown.wait();
        start.elapsed().as_nanos() as f64 / self.jobs as f64
    }

    /// The median over single jobs; the pool falls asleep before each.
    #[expect(clippy::cast_precision_loss, reason = "the times are short")]
    fn measure_latency(&self, pool: &dyn Runs) -> f64 {
        let each: Vec<f64> = (0..self.jobs)
            .map(|_| {
                thread::sleep(Duration::from_micros(200));
                let countdown = Countdown::of(1);
                let start = Instant::now();
                pool.run(Job { countdown, spin: Duration::ZERO });
                countdown.wait();
                start.elapsed().as_nanos() as f64
            })
            .collect();
        median(each)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let rounds: usize = option("--rounds").map_or(11, |rounds| rounds.parse().expect("a number of rounds"));
    let only = option("--only").unwrap_or_default();
    let chosen = option("--pools");
    for workers in [8, 2] {
        let mut pools = pools(workers);
        if let Some(chosen) = &chosen {
            pools.retain(|(name, _)| chosen.split(',').any(|one| one == *name));
        }
        println!(
            "\n{workers} workers, ns a job, median of {rounds} rounds; in brackets: times the first column\n"
        );
        print!("{:24}", "");
        pools.iter().for_each(|(name, _)| print!("{name:>15}"));
        println!();
        for row in ROWS.iter().filter(|row| row.name.contains(&only)) {
            print_row(row, &pools, rounds);
        }
    }
}

fn print_row(row: &Row, pools: &[(&'static str, Arc<dyn Runs>)], rounds: usize) {
    let mut seen = vec![Vec::new(); pools.len()];
    let mut order: Vec<usize> = (0..pools.len()).collect();
    // Once to warm up, not counted.
    for (_, pool) in pools {
        row.measure(&**pool);
    }
    for _ in 0..rounds {
        fastrand::shuffle(&mut order);
        for number in &order {
            seen[*number].push(row.measure(&*pools[*number].1));
        }
    }
    print!("{:24}", row.name);
    for figures in &seen {
        let ratios = figures.iter().zip(&seen[0]).map(|(other, ours)| other / ours).collect();
        print!("{:>7.0} ({:4.2}x)", median(figures.clone()), median(ratios));
    }
    println!();
}
