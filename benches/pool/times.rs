//! The rows that measure time.

use std::thread;
use std::time::{Duration, Instant};

use crate::contenders::{Countdown, Job, Runs, Work};
use crate::table::median;

/// Room for all jobs of the largest row. So no submission waits for room, as it never does in a pool without a bound.
pub(crate) const QUEUE_CAPACITY: usize = 1 << 18;

/// With more workers than this, only the rows of empty jobs are measured. They show what many sleeping threads cost.
const FEW_WORKERS: usize = 32;

/// How long a pool rests before a burst, so that its workers sleep.
const REST: Duration = Duration::from_micros(200);

/// What is measured: the nanoseconds for each job, from the first submission to the end of the last job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    jobs: usize,
    producers: usize,
    work: Work,
    /// In how many bursts the jobs are measured. The pool rests before each, and the figure is the median. With 0 the
    /// jobs are measured once, without a rest.
    bursts: usize,
}

/// The rows for this many workers.
pub(crate) fn rows(workers: usize) -> Vec<Row> {
    let mut rows = vec![
        empty("empty, 1 producer", 200_000),
        Row { producers: 4, ..empty("empty, 4 producers", 200_000) },
    ];
    if workers <= FEW_WORKERS {
        rows.extend([
            Row { bursts: 1_000, ..empty("one job, idle pool", 1) },
            Row { work: Work::SpinUs(10), ..empty("10 us jobs, saturated", 20_000) },
            Row { work: Work::SpinUs(10), producers: 4, ..empty("10 us jobs, 4 producers", 20_000) },
            Row { work: Work::SleepUs(100), ..empty("sleep 100 us", 4_000) },
            Row { bursts: 20, ..empty("burst of 1,000", 1_000) },
            Row { bursts: 5, ..empty("burst of 10,000", 10_000) },
        ]);
    }
    rows
}

const fn empty(name: &'static str, jobs: usize) -> Row {
    Row { name, jobs, producers: 1, work: Work::Nothing, bursts: 0 }
}

impl Row {
    /// Returns the row with fewer jobs, or fewer bursts.
    pub(crate) fn scaled_down(self, scale: usize) -> Self {
        if self.bursts > 0 {
            Row { bursts: (self.bursts / scale).max(1), ..self }
        } else {
            Row { jobs: self.jobs / scale, ..self }
        }
    }

    /// Measures, and returns no figure. Afterwards the threads, the queue and the allocator have what they need.
    pub(crate) fn warm_up(self, pool: &dyn Runs) {
        Row { bursts: self.bursts.min(10), ..self }.measure(pool);
    }

    pub(crate) fn measure(self, pool: &dyn Runs) -> f64 {
        if self.bursts == 0 {
            return self.measure_once(pool);
        }
        let burst = |_| {
            thread::sleep(REST);
            self.measure_once(pool)
        };
        median((0..self.bursts).map(burst).collect())
    }

    fn measure_once(self, pool: &dyn Runs) -> f64 {
        let share = self.jobs / self.producers;
        let job = Job { countdown: Countdown::of(share * self.producers), work: self.work };
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 1..self.producers {
                scope.spawn(|| (0..share).for_each(|_| pool.run(job)));
            }
            (0..share).for_each(|_| pool.run(job));
        });
        job.countdown.wait();
        start.elapsed().as_nanos() as f64 / self.jobs as f64
    }
}
