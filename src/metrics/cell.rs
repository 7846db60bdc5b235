//! Cells with one writer and any number of readers.
//!
//! Every cell belongs to one thread, and only that thread writes it: `add` and `observe` are a plain load and a
//! plain store, not a read-modify-write. Two writers would lose counts and break nothing else. Where several
//! threads count the same rare thing, they use an ordinary atomic instead.
//!
//! Orderings: stores are `Release` and loads `Acquire`. A reader that sees a count also sees what the writer
//! counted before it. `pool/worker.rs` builds its consistent readings on that. On x86-64 both are plain moves.
//!
//! # How far each number reaches
//!
//! A counter must not fall, so no cell may overflow in the life of a server.
//!
//! - A [`Counter`] has 64 bits: 584,000 years at a million events a second, 58 years at 10 GB a second. The sum
//!   over all cells counts what one machine did, so it has the same reach.
//! - A [`Sum`] of nanoseconds has 96 bits. In 64 bits it would overflow when the durations add up to 584 years.
//!   With 65,536 connections that is 3.3 days of each. In 96 bits they add up to 2.5 million million years, and
//!   ten million connections that live for ten years need a hundred million.
//! - A [`Reading`] adds the cells up in 128 bits.
//!
//! # Why no reading of a sum is torn
//!
//! A [`Sum`] has two words: `low` is the sum modulo 2^64, and `high` is the sum divided by 2^32, rounded down. Bits
//! 32 to 63 are in both. The writer stores `high`, then `low`. A reader loads `high`, then `low`, then `high` again,
//! and repeats that until both loads of `high` gave the same number.
//!
//! 1. Let the first load of `high` see the store of the writer's addition number i. With Release and Acquire, the
//!    load of `low` sees addition i - 1 or a later one, because the writer stored that `low` before this `high`.
//! 2. Let the load of `low` see addition j. The second load of `high` sees addition j or a later one.
//! 3. `high` only rises and both loads of it agree. So it did not change between additions i and j, or j is i - 1.
//!    In both cases the sum after addition j differs from `high` times 2^32 by one addition at most.
//! 4. One addition is a duration, and no duration comes near 2^63 ns, which is 292 years. So exactly one number
//!    within 2^63 of `high` times 2^32 has the low word that was read. That number is the sum after addition j.
//!
//! So a reading is the exact sum after one of the additions. A later reading by the same thread, or by a thread that
//! was told of the first reading, sees the same `low` or a later one: it never falls. A reader repeats only if the
//! writer has made progress. A writer that stops between its two stores holds no reader up.

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

/// A sum of nanoseconds that only rises and may exceed 2^64, written by one thread.
#[derive(Debug, Default)]
struct Sum {
    /// The sum divided by 2^32, rounded down.
    high: AtomicU64,
    /// The sum modulo 2^64.
    low: AtomicU64,
}

/// By how many bits [`Sum::high`] leaves out the end of the sum: half of a word, so that the words overlap by the
/// other half.
const HIGH_SHIFT: u32 = 32;

impl Sum {
    /// Adds a duration, which must be under 2^63 ns. Only the owning thread may call it.
    fn add(&self, ns: u64) {
        let (high, low) = (self.high.load(Ordering::Relaxed), self.low.load(Ordering::Relaxed));
        let sum = join(high, low) + u128::from(ns);
        let now_high = (sum >> HIGH_SHIFT) as u64;
        if now_high != high {
            self.high.store(now_high, Ordering::Release);
        }
        self.low.store(sum as u64, Ordering::Release);
    }

    /// Reads the sum, from any thread.
    fn get(&self) -> u128 {
        let mut high = self.high.load(Ordering::Acquire);
        loop {
            let low = self.low.load(Ordering::Acquire);
            let again = self.high.load(Ordering::Acquire);
            if again == high {
                return join(high, low);
            }
            high = again;
        }
    }
}

/// The number nearest to `high` times 2^32 whose last 64 bits are `low`.
fn join(high: u64, low: u64) -> u128 {
    let near = u128::from(high) << HIGH_SHIFT;
    let distance = low.wrapping_sub(near as u64).cast_signed();
    near.saturating_add_signed(i128::from(distance))
}

/// Counts durations by their size, written by one thread.
#[derive(Debug)]
pub(crate) struct Histogram<const BOUNDS: usize> {
    bounds_ns: &'static [u64; BOUNDS],
    counts: [Counter; BOUNDS],
    beyond: Counter,
    sum_ns: Sum,
}

impl<const BOUNDS: usize> Histogram<BOUNDS> {
    /// An empty histogram with these upper bounds, ascending, each inclusive.
    pub(crate) fn new(bounds_ns: &'static [u64; BOUNDS]) -> Self {
        Histogram {
            bounds_ns,
            counts: std::array::from_fn(|_| Counter::default()),
            beyond: Counter::default(),
            sum_ns: Sum::default(),
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
        total.sum_ns += self.sum_ns.get();
    }
}

/// What one or several histograms with the same bounds had counted when they were read.
#[derive(Clone, Debug)]
pub(crate) struct Reading<const BOUNDS: usize> {
    /// The upper bounds, ascending.
    pub(crate) bounds_ns: &'static [u64; BOUNDS],
    /// How many durations were at or under each bound and over the one before.
    pub(crate) counts: [u64; BOUNDS],
    /// How many durations were over the last bound.
    pub(crate) beyond: u64,
    /// The sum of all durations.
    pub(crate) sum_ns: u128,
}

impl<const BOUNDS: usize> Reading<BOUNDS> {
    /// An empty reading.
    pub(crate) fn new(bounds_ns: &'static [u64; BOUNDS]) -> Self {
        Reading { bounds_ns, counts: [0; BOUNDS], beyond: 0, sum_ns: 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    static BOUNDS: [u64; 3] = [10, 100, 1000];

    fn read(histogram: &Histogram<3>) -> Reading<3> {
        let mut reading = Reading::new(&BOUNDS);
        histogram.add_to(&mut reading);
        reading
    }

    #[test]
    fn a_duration_falls_into_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::new(&BOUNDS);
        for ns in [0, 10, 11, 100, 101, 1000, 1001, 5000] {
            histogram.observe(ns);
        }
        let reading = read(&histogram);
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

    /// Each observation takes the sum over the next boundary of its words.
    #[test]
    fn the_sum_of_one_writer_and_of_several_may_exceed_64_bits() {
        const HALF: u64 = 1 << 63;
        let (one, two) = (Histogram::new(&BOUNDS), Histogram::new(&BOUNDS));
        let mut expected = 0;
        for ns in [HALF - 1, 1, HALF - 1, 1, 7, (1 << 32) - 8, 1, HALF - 3, HALF - 2, 9] {
            one.observe(ns);
            expected += u128::from(ns);
            assert_eq!(read(&one).sum_ns, expected);
        }
        (0..5).for_each(|_| two.observe(HALF - 1));
        let mut reading = read(&one);
        two.add_to(&mut reading);
        assert_eq!(reading.sum_ns, expected + 5 * u128::from(HALF - 1));
    }

    /// Ten million connections of ten years each, and ten times as many again.
    #[test]
    fn one_thread_may_close_all_connections_of_the_limit_after_ten_years() {
        const TEN_YEARS_NS: u64 = 10 * 365 * 86_400 * 1_000_000_000;
        let sum = Sum::default();
        let most = 100_000_000 * u128::from(TEN_YEARS_NS);
        sum.high.store((most >> HIGH_SHIFT) as u64, Ordering::Release);
        sum.low.store(most as u64, Ordering::Release);
        assert_eq!(sum.get(), most);
        sum.add(TEN_YEARS_NS);
        assert_eq!(sum.get(), most + u128::from(TEN_YEARS_NS));
    }

    /// The states that a reader finds between the two stores of an addition.
    #[test]
    fn between_the_two_stores_of_an_addition_the_sum_is_that_before_it() {
        let days: u64 = 10 * 86_400 * 1_000_000_000;
        for before in [0, 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, (1 << 90) + 12_345] {
            for ns in [1, (1 << 32) - 1, 1 << 32, days, (1 << 63) - 1] {
                let after: u128 = before + u128::from(ns);
                assert_eq!(join((after >> HIGH_SHIFT) as u64, before as u64), before, "{ns} to {before}");
            }
        }
    }

    #[test]
    fn a_sum_never_falls_while_it_is_read_and_each_reading_is_a_sum_there_was() {
        const STEP: u64 = (1 << 63) - 1;
        const STEPS: u128 = 200_000;
        let (sum, done) = (Sum::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while !done.load(Ordering::Acquire) {
                        let now = sum.get();
                        let whole = now.is_multiple_of(u128::from(STEP));
                        assert!(now >= last && whole, "{now} after {last}");
                        last = now;
                    }
                });
            }
            (0..STEPS).for_each(|_| sum.add(STEP));
            done.store(true, Ordering::Release);
        });
        assert_eq!(sum.get(), STEPS * u128::from(STEP));
    }
}
