//! What holds for the echo however its clients cut what they send and how they read it. Each failure is made small, and
//! kept in `tests/properties.regressions` to be tried first from then on.
//!
//! The properties of private parts stand beside these, in files called `properties.rs`. `PROPTEST_CASES=10000` tries more.

mod common;

use std::time::Duration;

use millpond::{Echo, Laboured, Service};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use common::pieces::{Client, Echoes, Piece};

/// A case is some clients and some milliseconds, so there are fewer than of the properties that open no socket.
const FEWER: u32 = 8;

fn piece(bytes: std::ops::Range<usize>) -> impl Strategy<Value = Piece> {
    let pause = prop_oneof![3 => Just(0), 1 => 0..1500_u64];
    (bytes, pause).prop_map(|(bytes, pause)| Piece { bytes, pause: Duration::from_micros(pause) })
}

fn client() -> impl Strategy<Value = Client> {
    let writes = vec(prop_oneof![4 => piece(1..100), 2 => piece(1..5000), 1 => piece(1..200_000)], 0..12);
    // Small enough to be slow, and at times so large that all is read at once.
    let reads = vec(prop_oneof![piece(1000..9000), piece(1..100_000)], 1..6);
    let reset_after = prop_oneof![5 => Just(None), 1 => (1..20_000_usize).prop_map(Some)];
    (any::<u64>(), writes, reads, any::<bool>(), reset_after).prop_map(
        |(salt, writes, reads, narrow, reset_after)| Client { salt, writes, reads, narrow, reset_after },
    )
}

/// Two rounds of clients on a server of their own, and its drain.
fn every_byte_comes_back_from(service: impl Service, rounds: &[Vec<Client>]) {
    let mut server = Echoes::start(service);
    rounds.iter().for_each(|clients| server.check(clients));
    server.finish();
}

/// As many cases as the environment says or proptest does, less [`FEWER`] times.
fn config() -> ProptestConfig {
    let standard = ProptestConfig::default();
    ProptestConfig {
        cases: standard.cases.div_ceil(FEWER),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..standard
    }
}

proptest! {
    #![proptest_config(config())]

    /// Served by the reactor and the workers.
    #[test]
    fn an_echo_is_whole_however_it_is_cut(rounds in vec(vec(client(), 1..4), 1..3)) {
        every_byte_comes_back_from(Echo, &rounds);
    }

    /// Served by the workers alone, which it holds for a moment.
    #[test]
    fn an_echo_that_blocks_is_whole_however_it_is_cut(rounds in vec(vec(client(), 1..4), 1..3)) {
        every_byte_comes_back_from(Laboured::new(Echo, Duration::from_micros(50)), &rounds);
    }
}
