//! Cells with one writer and any number of readers.
//!
//! Every cell belongs to one thread, which alone writes it: `add` and `observe` are a plain load and store,
//! not a read-modify-write. Two writers would lose counts but break nothing else; where several threads must
//! count the same rare thing, they use an ordinary atomic instead.
//!
//! Orderings: stores are `Release` and loads `Acquire`, so that a reader who sees a count also sees what the
//! writer counted before it. `pool/worker.rs` builds its consistent readings on that. On x86-64 both are
//! plain moves.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only rises, written by one thread.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call it.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Release);
    }

    /// Reads the number, from any thread.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Counts durations by their size, written by one thread.
#[derive(Debug)]
pub(crate) struct Histogram<const BOUNDS: usize> {
    bounds_ns: &'static [u64; BOUNDS],
    counts: [Counter; BOUNDS],
    beyond: Counter,
    sum_ns: Counter,
}

impl<const BOUNDS: usize> Histogram<BOUNDS> {
    /// An empty histogram with these upper bounds, ascending, each inclusive.
    pub(crate) fn new(bounds_ns: &'static [u64; BOUNDS]) -> Self {
        Histogram {
            bounds_ns,
            counts: std::array::from_fn(|_| Counter::default()),
            beyond: Counter::default(),
            sum_ns: Counter::default(),
        }
    }

    /// Counts one duration. Only the owning thread may call it.
    pub(crate) fn observe(&self, duration_ns: u64) {
        let bucket = self.bounds_ns.partition_point(|bound_ns| *bound_ns < duration_ns);
        self.sum_ns.add(duration_ns);
        self.counts.get(bucket).unwrap_or(&self.beyond).add(1);
    }

    /// Adds what was counted to `total`, from any thread.
    pub(crate) fn add_to(&self, total: &mut Reading<BOUNDS>) {
        for (sum, count) in total.counts.iter_mut().zip(&self.counts) {
            *sum += count.get();
        }
        total.beyond += self.beyond.get();
        total.sum_ns = total.sum_ns.wrapping_add(self.sum_ns.get());
    }
}

/// What one or several histograms with the same bounds had counted when they were read.
#[derive(Clone, Debug)]
pub(crate) struct Reading<const BOUNDS: usize> {
    /// The upper bounds, ascending.
    pub(crate) bounds_ns: &'static [u64; BOUNDS],
    /// How many fell at or under each bound and over the one before.
    pub(crate) counts: [u64; BOUNDS],
    /// How many fell over the last bound.
    pub(crate) beyond: u64,
    /// The sum of all of them.
    pub(crate) sum_ns: u64,
}

impl<const BOUNDS: usize> Reading<BOUNDS> {
    /// An empty reading.
    pub(crate) fn new(bounds_ns: &'static [u64; BOUNDS]) -> Self {
        Reading { bounds_ns, counts: [0; BOUNDS], beyond: 0, sum_ns: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static BOUNDS: [u64; 3] = [10, 100, 1000];

    #[test]
    fn a_duration_falls_into_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::new(&BOUNDS);
        for ns in [0, 10, 11, 100, 101, 1000, 1001, 5000] {
            histogram.observe(ns);
        }
        let mut reading = Reading::new(&BOUNDS);
        histogram.add_to(&mut reading);
        assert_eq!(reading.counts, [2, 2, 2]);
        assert_eq!(reading.beyond, 2);
        assert_eq!(reading.sum_ns, 10 + 11 + 100 + 101 + 1000 + 1001 + 5000);
    }

    #[test]
    fn readings_of_several_writers_add_up() {
        let (one, two) = (Histogram::new(&BOUNDS), Histogram::new(&BOUNDS));
        one.observe(5);
        two.observe(7);
        two.observe(2000);
        let mut reading = Reading::new(&BOUNDS);
        one.add_to(&mut reading);
        two.add_to(&mut reading);
        assert_eq!((reading.counts[0], reading.beyond, reading.sum_ns), (2, 1, 2012));
    }
}
