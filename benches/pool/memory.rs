//! The rows that measure resident memory. Each figure needs a process of its own. In a process that has measured
//! before, a pool would take memory that is resident already.

use std::sync::PoisonError;

use crate::contenders::{Contender, Countdown, GATE, Job, Kind, Work};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    what: What,
    jobs: usize,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// Bytes for each job, of a pool in whose queue this many jobs wait.
    QueuedJob,
    /// KiB of a pool whose queue is empty and has room for this many jobs.
    Room,
}

pub(crate) const ROWS: [Row; 3] = [
    Row { name: "bytes, a queued job", what: What::QueuedJob, jobs: 1_000_000 },
    Row { name: "KiB, room for 262,144", what: What::Room, jobs: 1 << 18 },
    Row { name: "KiB, room for 100,000,000", what: What::Room, jobs: 100_000_000 },
];

impl Row {
    /// Whether the pool has a figure in this row. Only pools with a bound have room. Of millpond's three, which have
    /// the same queue, one is enough.
    pub(crate) fn applies_to(&self, pool: &Contender) -> bool {
        matches!(self.what, What::QueuedJob) || matches!(pool.kind, Kind::Execute | Kind::Kanal)
    }

    /// Measures a pool with one worker, in a process that has measured nothing before.
    pub(crate) fn measure(&self, contender: &Contender, scale: usize) -> f64 {
        let jobs = self.jobs / scale;
        let before = resident_kib();
        let pool = (contender.start)(1, jobs);
        if matches!(self.what, What::Room) {
            return resident_kib() - before;
        }
        let gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
        let blocker = Countdown::of(1);
        pool.run(Job { countdown: blocker, work: Work::Gate });
        blocker.wait();
        let countdown = Countdown::of(jobs);
        (0..jobs).for_each(|_| pool.run(Job { countdown, work: Work::Nothing }));
        let bytes = (resident_kib() - before) * 1024.0 / jobs as f64;
        drop(gate);
        countdown.wait();
        bytes
    }
}

/// The resident memory of this process. The kernel counts the pages for this file, whereas the number in `statm` lags.
fn resident_kib() -> f64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").expect("Linux has it");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).expect("it has resident memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
