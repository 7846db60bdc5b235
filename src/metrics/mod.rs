//! Cells that threads count in without sharing, and the Prometheus families made of them.
//!
//! - [`Counter`] and [`Histogram`] are cells with **one writer each**. A worker owns its cells, so counting costs a
//!   load and a store on a cache line that no other thread writes. A scrape reads all cells and adds them up. A
//!   number is complete the moment it is counted: nothing is flushed later, and nothing is lost with a thread.
//! - [`Source`] and [`collector`] turn readings into metric families. A module that measures implements `Source` once.
//!   Its names and help texts are there and nowhere else. [`together`] registers several as one, and [`identified`]
//!   makes one that is not taken for another.
//!
//! What it leaves to others: the registry and the text format (the `prometheus` crate), and the meaning of the
//! numbers.

mod cell;
mod page;

pub(crate) use cell::{Counter, Histogram, Reading};
pub(crate) use page::{Page, Source, collector, identified, together};

/// Upper bounds of the latency histograms, in nanoseconds: 10 us to 60 s in steps of about 2.5.
///
/// They begin at the time of an echo over loopback and end above the default write timeout. 50 ms is one of them
/// because alert rules need it: every version of Prometheus spells a bound that is not a whole number alike.
pub(crate) const LATENCY_BOUNDS_NS: [u64; 20] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    60_000_000_000,
];

/// Upper bounds of the connection duration histogram, in nanoseconds: 1 ms to a day.
pub(crate) const LIFETIME_BOUNDS_NS: [u64; 12] = [
    1_000_000,
    10_000_000,
    100_000_000,
    1_000_000_000,
    5_000_000_000,
    10_000_000_000,
    60_000_000_000,
    300_000_000_000,
    900_000_000_000,
    3_600_000_000_000,
    14_400_000_000_000,
    86_400_000_000_000,
];

/// A histogram of waits and run times.
pub(crate) type Latency = Histogram<{ LATENCY_BOUNDS_NS.len() }>;
/// A histogram of how long connections lived.
pub(crate) type Lifetime = Histogram<{ LIFETIME_BOUNDS_NS.len() }>;
