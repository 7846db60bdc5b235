//! The pool's numbers: one reading of every cell, as a plain struct and as metric families.
//!
//! # Why the numbers agree
//!
//! The pool's law is that the submitted jobs are those ended, waiting and running. The order of the reading makes it
//! hold at every moment: first the count of pushes, then the workers' cells, each consistent in itself.
//!
//! - A job pushed after the first step may already be counted as taken. Then the taken jobs are the truer count of
//!   submissions, so the larger of the two is reported. Both only rise, so the report does too.
//! - The depth is the number of submitted jobs that have not ended and that no worker runs. It is never negative.
//! - A queue takes more jobs than its capacity if workers are idle, one for each of them; see `queue.rs`, the part on
//!   the bound. Those workers have not counted the jobs as taken yet. So if the depth exceeds the capacity, the excess
//!   counts as busy. That part of `queue.rs` shows that there are as many idle workers, or as many that have just left;
//!   those count as workers until their job has ended.
//! - A worker that runs a job beside its own, which waits meanwhile, counts as one busy worker. The other of the two
//!   jobs counts as waiting. It holds a place in the queue, unless it was never in the queue; such a job is counted
//!   when it ends.
//!
//! The number of workers is read before the cells and again after them, and the larger is reported. A worker found busy
//! is in one of the two, whether workers come or leave meanwhile. So the busy workers are never more than the workers.
//!
//! # Busy time
//!
//! A reader that finds a job running adds the time until now. That job may have ended an instant before, not yet
//! accounted for, and a later reading would be lower by that instant. A counter must not fall. So the largest sum ever
//! reported is kept, and reported until the true sum has reached it.
//!
//! The sum over the workers may exceed 64 bits of nanoseconds: 10,000 busy workers take 21 days for that. It is added
//! up in 128 bits, and rounded up to microseconds, of which 64 bits hold 58 years of 10,000 busy workers. Rounding
//! keeps the order, and rounding up keeps the busy time no shorter than the sum of the jobs' durations.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::account::{Occupation, WorkerReading, busy_ns};
use super::identity::{PoolId, Unrun};
use super::shared::{Job, Shared};
use crate::clock;
use crate::metrics::{LATENCY_BOUNDS_NS, Page, Reading, Source};

/// The numbers of a pool at the time when they were read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// Worker threads that have not ended. A worker that leaves after a resize, a drain or an abort counts until its
    /// thread ends. So this is 0 when a drain is over. A server's reactor counts too while it serves as a worker.
    pub workers: usize,
    /// Workers that now run a job.
    pub busy: usize,
    /// Jobs waiting, with those that a worker has set aside to run another.
    pub queue_depth: u64,
    /// Most jobs that may wait.
    pub queue_capacity: usize,
    /// How long the job at the head of the queue has waited; zero if none waits.
    pub queue_oldest_age: Duration,
    /// How long the longest-running job has run; zero if none runs. It includes work for a job that has been counted
    /// already, because a worker may be stuck there. An example is the destructor of a result that no handle takes.
    pub longest_running: Duration,
    /// Worker time spent in jobs, the running ones included, rounded up to the microsecond. It never falls, for 58
    /// years with 10,000 busy workers.
    pub busy_time: Duration,
    /// Jobs admitted, and jobs that jobs requeued.
    pub submitted: u64,
    /// Jobs that ended by returning.
    pub completed: u64,
    /// Jobs that ended by a panic.
    pub panicked: u64,
    /// Jobs that ended unrun because they were cancelled while they waited.
    pub cancelled: u64,
    /// Jobs that ended unrun because they waited longer than their deadline.
    pub expired: u64,
    /// Jobs dropped from the queue by an abort.
    pub aborted: u64,
    /// Submissions refused because the queue was full.
    pub rejected_full: u64,
    /// Submissions refused because the pool was draining.
    pub rejected_draining: u64,
    /// The time from submission until a worker took the job, of jobs that were run.
    pub queue_wait: Durations,
    /// The time for which jobs held their worker, of jobs that have ended.
    pub job_duration: Durations,
}

impl Stats {
    /// Jobs ended, by the outcome's name.
    pub(crate) fn ended(&self) -> [(&'static str, u64); 5] {
        [
            ("completed", self.completed),
            ("panicked", self.panicked),
            ("cancelled", self.cancelled),
            ("expired", self.expired),
            ("aborted", self.aborted),
        ]
    }

    /// Submissions refused, by the reason's name.
    pub(crate) fn rejected(&self) -> [(&'static str, u64); 2] {
        [("full", self.rejected_full), ("draining", self.rejected_draining)]
    }
}

/// A table of all numbers, one line for each subject, for a log or a terminal.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stats { workers, busy, longest_running, busy_time, .. } = self;
        writeln!(
            f,
            "workers    {busy} of {workers} busy, the longest for {longest_running:.3?}; {busy_time:.3?} in jobs"
        )?;
        let Stats { queue_depth, queue_capacity, queue_oldest_age, .. } = self;
        writeln!(
            f,
            "queue      {queue_depth} waiting, the oldest for {queue_oldest_age:.3?}; capacity {queue_capacity}"
        )?;
        write!(f, "jobs       {} submitted", self.submitted)?;
        for (outcome, count) in self.ended() {
            write!(f, ", {count} {outcome}")?;
        }
        write!(f, "\nrejected  ")?;
        let reasons = self.rejected().map(|(reason, count)| format!(" {count} {reason}"));
        writeln!(f, "{}", reasons.join(","))?;
        writeln!(f, "wait       {}", self.queue_wait)?;
        write!(f, "duration   {}", self.job_duration)
    }
}

/// Durations, counted by their size.
#[derive(Clone, Debug)]
pub struct Durations(Reading<{ LATENCY_BOUNDS_NS.len() }>);

impl Durations {
    fn none() -> Self {
        Durations(Reading::new(&LATENCY_BOUNDS_NS))
    }

    pub(crate) fn reading(&self) -> &Reading<{ LATENCY_BOUNDS_NS.len() }> {
        &self.0
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.counts.iter().sum::<u64>() + self.0.beyond
    }

    /// Their sum. It never falls.
    #[must_use]
    pub fn sum(&self) -> Duration {
        clock::duration(self.0.sum_ns)
    }

    /// Their mean, `None` if none was counted.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        let count = self.count();
        (count > 0).then(|| clock::duration(self.0.sum_ns / u128::from(count)))
    }

    /// An estimate of the duration that the part `q` of all durations do not exceed, from 0 to 1: 0.5 for the median.
    /// `None` if none was counted, or if `q` is out of that range.
    ///
    /// The counts say between which two of the limits of [`cumulative`](Durations::cumulative) the duration lies. The
    /// estimate takes the durations between the two as evenly spread, as `histogram_quantile` of Prometheus does. So it
    /// is off by the distance of the two at most, which is a factor of 2 to 2.5 between 10 microseconds and 10 seconds,
    /// and 6 after that. Beyond the last limit it is that limit, a minute.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "an estimate does not need the last bits of a count")]
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 || !(0.0..=1.0).contains(&q) {
            return None;
        }
        let rank = q * count as f64;
        let mut lower = (Duration::ZERO, 0);
        for upper in self.cumulative() {
            if upper.1 as f64 >= rank && upper.1 > lower.1 {
                let part = (rank - lower.1 as f64) / (upper.1 - lower.1) as f64;
                return Some(lower.0 + (upper.0 - lower.0).mul_f64(part.clamp(0.0, 1.0)));
            }
            lower = upper;
        }
        Some(lower.0)
    }

    /// For each of some limits, ascending, from 10 microseconds to a minute: how many durations were no longer.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let limits = self.0.bounds_ns.iter().map(|ns| Duration::from_nanos(*ns));
        let counts = self.0.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        limits.zip(counts)
    }
}

impl fmt::Display for Durations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(mean) = self.mean() else { return f.write_str("none counted") };
        write!(f, "mean {mean:.3?}")?;
        for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
            write!(f, ", {name} {:.3?}", self.quantile(q).unwrap_or_default())?;
        }
        write!(f, " of {}", self.count())
    }
}

impl<J: Job> Shared<J> {
    /// How many workers there are, with the helper.
    fn workers_now(&self) -> usize {
        self.pool.crew.workers() + usize::from(self.helps.load(Ordering::Acquire))
    }

    pub(super) fn read_stats(&self) -> Stats {
        let pushed = self.queue.pushed();
        let mut stats = Stats {
            workers: self.workers_now(),
            busy: 0,
            queue_depth: 0,
            queue_capacity: self.queue.capacity(),
            queue_oldest_age: Duration::ZERO,
            longest_running: Duration::ZERO,
            busy_time: Duration::ZERO,
            submitted: 0,
            completed: 0,
            panicked: 0,
            cancelled: self.pool.unrun(Unrun::Cancelled),
            expired: self.pool.unrun(Unrun::Expired),
            aborted: self.pool.unrun(Unrun::Aborted),
            rejected_full: self.rejected_full.load(Ordering::Relaxed),
            rejected_draining: self.rejected_draining.load(Ordering::Relaxed),
            queue_wait: Durations::none(),
            job_duration: Durations::none(),
        };
        let mut busy_ns_total: u128 = 0;
        let mut started_ns = None;
        for cell in self.cells().iter().chain(&self.helper) {
            let WorkerReading { ended, busy } = cell.read();
            stats.busy += usize::from(busy);
            stats.completed += ended.completed;
            stats.panicked += ended.panicked;
            cell.queue_wait.add_to(&mut stats.queue_wait.0);
            cell.job_duration.add_to(&mut stats.job_duration.0);
            let word = cell.busy_word();
            // The clock after the word, so that a running job's start is not in the future.
            busy_ns_total += u128::from(busy_ns(word, self.watch.now_ns()));
            if let Occupation::Busy { since_ns } = cell.occupation() {
                started_ns = started_ns.into_iter().chain([since_ns]).min();
            }
        }
        let ended = stats.completed + stats.panicked + stats.cancelled + stats.expired + stats.aborted;
        let taken = ended + stats.busy as u64;
        stats.submitted = pushed.max(taken);
        let not_taken = stats.submitted - taken;
        stats.queue_depth = not_taken.min(stats.queue_capacity as u64);
        stats.busy += usize::try_from(not_taken - stats.queue_depth).unwrap_or(0);
        // Workers may have come since the first step.
        stats.workers = stats.workers.max(self.workers_now()).max(stats.busy);
        stats.queue_oldest_age = if stats.queue_depth == 0 { Duration::ZERO } else { self.read_oldest_age() };
        let now_ns = self.watch.now_ns();
        stats.longest_running =
            Duration::from_nanos(started_ns.map_or(0, |since| now_ns.saturating_sub(since)));
        let busy_us = u64::try_from(busy_ns_total.div_ceil(1000)).unwrap_or(u64::MAX);
        let reported_us = self.busy_reported_us.fetch_max(busy_us, Ordering::AcqRel);
        stats.busy_time = Duration::from_micros(busy_us.max(reported_us));
        stats
    }

    pub(super) fn read_oldest_age(&self) -> Duration {
        if !self.watch.runs {
            return Duration::ZERO;
        }
        let oldest_ns = self.queue.oldest_ns(J::is_dead);
        Duration::from_nanos(oldest_ns.map_or(0, |oldest_ns| self.watch.now_ns().saturating_sub(oldest_ns)))
    }

    /// What each worker does, and how many jobs it has taken; empty if no worker is left.
    pub(super) fn read_workers(&self) -> Vec<(Occupation, u64)> {
        if self.workers_now() == 0 {
            return Vec::new();
        }
        self.cells().iter().chain(&self.helper).map(|cell| (cell.occupation(), cell.read().taken())).collect()
    }
}

/// The numbers of a pool, without the type of its jobs.
pub(crate) trait Meter: Send + Sync {
    /// Tells the pool from others.
    fn id(&self) -> PoolId;
    /// The pool's name.
    fn name(&self) -> &str;
    /// See [`Pool::stats`](crate::Pool::stats).
    fn stats(&self) -> Stats;
    /// See [`Pool::oldest_age`](crate::Pool::oldest_age).
    fn oldest_age(&self) -> Duration;
    /// What each worker does, by its number, and how many jobs it has taken. Workers that left after a resize are among
    /// them. Takes no lock that a worker waits for.
    fn workers(&self) -> Vec<(Occupation, u64)>;
}

/// The pool as a source of metrics.
pub(super) struct PoolMetrics(pub(super) Arc<dyn Meter>);

impl Source for PoolMetrics {
    #[expect(clippy::cast_precision_loss, reason = "gauges are doubles, and these numbers are small")]
    fn read(&self, page: &mut Page) {
        let stats = self.0.stats();
        page.gauge(
            "millpond_pool_workers",
            "Worker threads of the pool. With pool_workers_busy it says how much room is left.",
            &[],
            stats.workers as f64,
        );
        page.gauge(
            "millpond_pool_workers_busy",
            "Workers running a job at this instant. At pool_workers for long, jobs wait; for utilization over time use pool_busy_seconds_total.",
            &[],
            stats.busy as f64,
        );
        page.gauge(
            "millpond_pool_queue_depth",
            "Jobs waiting for a worker. Over 0 for long, the workers are the bottleneck; how bad that is, pool_queue_oldest_age_seconds says.",
            &[],
            stats.queue_depth as f64,
        );
        page.gauge(
            "millpond_pool_queue_capacity",
            "Most jobs that may wait. When pool_queue_depth reaches it, submissions are rejected.",
            &[],
            stats.queue_capacity as f64,
        );
        page.gauge(
            "millpond_pool_queue_oldest_age_seconds",
            "Age of the job that has waited longest, 0 when none waits. Rising steadily, no worker takes anything.",
            &[],
            stats.queue_oldest_age.as_secs_f64(),
        );
        page.histogram(
            "millpond_pool_queue_wait_seconds",
            "Time from a job's submission until a worker took it. High quantiles mean too few workers for the load.",
            &stats.queue_wait.0,
        );
        page.histogram(
            "millpond_pool_job_duration_seconds",
            "Time a job held its worker. When it grows, what the jobs do has become slower, not the pool.",
            &stats.job_duration.0,
        );
        page.counter_seconds(
            "millpond_pool_busy_seconds_total",
            "Worker time spent in jobs, running jobs included. Its rate divided by pool_workers is the utilization; near 1, jobs wait.",
            &[],
            stats.busy_time.as_secs_f64(),
        );
        page.gauge(
            "millpond_pool_longest_running_seconds",
            "Age of the longest-running job, 0 when none runs. Far over the usual job duration, a worker is stuck.",
            &[],
            stats.longest_running.as_secs_f64(),
        );
        page.counter(
            "millpond_pool_submitted_total",
            "Jobs admitted to the queue. Equals pool_jobs_total summed, plus pool_queue_depth, plus pool_workers_busy.",
            &[],
            stats.submitted,
        );
        const JOBS: &str = "Jobs ended, by outcome. Anything but completed deserves a look; panicked is a bug in what the jobs run.";
        for (outcome, count) in stats.ended() {
            page.counter("millpond_pool_jobs_total", JOBS, &[("outcome", outcome)], count);
        }
        const REJECTED: &str =
            "Submissions refused, by reason. Rising full, the queue is too small or the workers too slow.";
        for (reason, count) in stats.rejected() {
            page.counter("millpond_pool_rejected_total", REJECTED, &[("reason", reason)], count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Latency;
    use crate::pool::account::WorkerCell;
    use crate::pool::{MAX_WORKERS, Pool};

    #[test]
    fn a_duration_longer_than_all_limits_is_counted_and_is_within_none() {
        let (latency, mut reading) = (Latency::new(&LATENCY_BOUNDS_NS), Reading::new(&LATENCY_BOUNDS_NS));
        [1_000, 3_600_000_000_000].into_iter().for_each(|ns| latency.observe(ns));
        latency.add_to(&mut reading);
        let durations = Durations(reading);
        assert_eq!(durations.count(), 2);
        assert_eq!(durations.cumulative().last(), Some((Duration::from_secs(60), 1)));
    }

    /// A pool of one worker, at rest, whose numbers a test sets by hand.
    fn pool_at_rest() -> Pool {
        Pool::builder("old").workers(1).build().expect("a thread")
    }

    fn text_of(pool: &Pool) -> String {
        let registry = prometheus::Registry::new();
        registry.register(pool.collector()).expect("it is the first");
        prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text")
    }

    const YEAR_NS: u64 = 365 * 86_400 * 1_000_000_000;

    /// As many cells as a pool may have workers. At each reading half of them run a job.
    #[test]
    fn the_busy_time_of_ten_thousand_workers_rises_for_ten_years_and_more() {
        let pool = pool_at_rest();
        let shared = pool.engine.workers.shared();
        let cells: Vec<_> = (0..MAX_WORKERS).map(|_| Arc::new(WorkerCell::new())).collect();
        shared.add_cells(cells.iter().cloned());
        let (mut last, mut total_ns) = (pool.stats().busy_time, 0);
        // The sum passes 2^64 ns between the first step and the second.
        for worked_ns in [YEAR_NS / 18, YEAR_NS / 300, YEAR_NS, 9 * YEAR_NS, 40 * YEAR_NS] {
            total_ns += worked_ns;
            for (number, cell) in cells.iter().enumerate() {
                cell.rest(shared.watch.now_ns());
                cell.start(0);
                cell.rest(worked_ns);
                if number % 2 == 0 {
                    cell.start(shared.watch.now_ns());
                }
            }
            let busy_time = pool.stats().busy_time;
            let least = Duration::from_nanos(total_ns) * 10_000;
            assert!(
                busy_time > last && busy_time >= least,
                "{busy_time:?} after {last:?}, {least:?} at least"
            );
            last = busy_time;
        }
        cells.iter().for_each(|cell| cell.rest(shared.watch.now_ns()));
        let seconds = pool.stats().busy_time.as_secs_f64();
        let line = format!("millpond_pool_busy_seconds_total{{pool=\"old\"}} {seconds}");
        let text = text_of(&pool);
        assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
    }

    #[test]
    fn the_sum_of_durations_over_workers_may_exceed_64_bits_of_nanoseconds() {
        let pool = pool_at_rest();
        let cells: Vec<_> = (0..MAX_WORKERS).map(|_| Arc::new(WorkerCell::new())).collect();
        cells.iter().for_each(|cell| cell.job_duration.observe(10 * YEAR_NS));
        pool.engine.workers.shared().add_cells(cells);
        let sum = Duration::from_nanos(10 * YEAR_NS) * 10_000;
        assert_eq!(pool.stats().job_duration.sum(), sum);
        let line = format!("millpond_pool_job_duration_seconds_sum{{pool=\"old\"}} {}", sum.as_secs());
        let text = text_of(&pool);
        assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
    }

    #[test]
    fn more_jobs_than_48_bits_can_count_are_counted() {
        let pool = pool_at_rest();
        let shared = pool.engine.workers.shared();
        let before = (1 << 48) - 2;
        let cell = Arc::new(WorkerCell::new());
        cell.pretend_completed(before);
        shared.add_cells([cell]);
        shared.queue.pretend_pushed(before);
        let (release, held) = std::sync::mpsc::channel::<()>();
        pool.execute(move || _ = held.recv()).expect("room");
        while pool.stats().busy == 0 {
            std::thread::yield_now();
        }
        for waiting in 1..=3 {
            pool.execute(|| {}).expect("room");
            let stats = pool.stats();
            assert_eq!((stats.submitted, stats.busy, stats.queue_depth), (before + 1 + waiting, 1, waiting));
            assert!(
                stats.queue_oldest_age > Duration::ZERO && pool.oldest_age() > Duration::ZERO,
                "{stats:?}"
            );
        }
        drop(release);
        let stats = pool.drain(Duration::from_secs(30)).stats;
        assert_eq!((stats.submitted, stats.completed, stats.queue_depth), (before + 4, before + 4, 0));
        assert!(text_of(&pool).contains("millpond_pool_submitted_total{pool=\"old\"} 281474976710658"));
    }
}
