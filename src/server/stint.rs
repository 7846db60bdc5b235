//! Which connection a worker serves, for readers on other threads.
//!
//! At the start of each turn a worker notes which connection it serves, in a [`Stint`] that only this worker writes.
//! Any thread may read it at any time, and gets the whole of one turn's note or nothing. Writing costs some plain
//! stores: no lock, no read-modify-write, no allocation.
//!
//! # Why no reading is torn
//!
//! It is a sequence lock, after Hans-J. Boehm, "Can Seqlocks Get Along With Programming Language Memory Models?"
//! (2012). `sequence` is odd while the words are being written. A reader loads it, then the words, then loads it again.
//! It keeps the words only if both loads gave the same even number.
//!
//! - The words are not older than the sequence. The sequence was stored with Release after them, and is loaded with
//!   Acquire before them.
//! - The words are not newer. Suppose that a word were of the next turn. Then its load (Acquire) would have read its
//!   store (Release), which came after the store of the odd number. So the second load of the sequence would have found
//!   that number, or a later one.
//!
//! `model`, below, checks this with loom over every interleaving with up to three preemptions.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::sync::atomic::{AtomicU64, Ordering};

/// A worker's note of the turn it is in, or was in last.
#[derive(Debug, Default)]
pub(crate) struct Stint {
    sequence: AtomicU64,
    words: [AtomicU64; 6],
}

/// A [`Stint`]'s note of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Served {
    /// When the turn started, by the server's clock.
    pub(crate) started_ns: u64,
    /// The connection's number, in the order in which they were accepted.
    pub(crate) connection: u64,
    pub(crate) peer: SocketAddr,
    /// The bytes that the worker had read from all connections when the turn started.
    pub(crate) received_before: u64,
}

/// The bit in the word of a peer's port that marks an IPv4 address.
const V4: u64 = 1 << 16;

impl Stint {
    /// Notes the turn that starts. Only the owning worker may call it.
    pub(crate) fn begin(&self, served: &Served) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        for (word, value) in self.words.iter().zip(to_words(served)) {
            word.store(value, Ordering::Release);
        }
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Reads the note, on any thread. Returns `None` before the first note, or if the worker was writing a new one at
    /// each look of the reader.
    pub(crate) fn read(&self) -> Option<Served> {
        // The writer may be between two stores. It is done within a few looks, unless it was stopped just there.
        const LOOKS: usize = 8;
        (0..LOOKS).find_map(|_| self.look())
    }

    fn look(&self) -> Option<Served> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let words = self.words.each_ref().map(|word| word.load(Ordering::Acquire));
        let whole = sequence != 0 && sequence & 1 == 0 && self.sequence.load(Ordering::Relaxed) == sequence;
        whole.then(|| from_words(words))
    }
}

fn to_words(served: &Served) -> [u64; 6] {
    let port = u64::from(served.peer.port());
    let (high, low, port) = match served.peer.ip() {
        IpAddr::V4(ip) => (0, u64::from(ip.to_bits()), port | V4),
        IpAddr::V6(ip) => ((ip.to_bits() >> 64) as u64, ip.to_bits() as u64, port),
    };
    [served.started_ns, served.connection, high, low, port, served.received_before]
}

fn from_words([started_ns, connection, high, low, port, received_before]: [u64; 6]) -> Served {
    let ip = match port & V4 {
        0 => IpAddr::V6(Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low))),
        _ => IpAddr::V4((low as u32).into()),
    };
    Served { started_ns, connection, peer: SocketAddr::new(ip, port as u16), received_before }
}

#[cfg(test)]
fn served(turn: u64, peer: &str) -> Served {
    let peer = peer.parse().expect("an address");
    Served { started_ns: turn, connection: turn, peer, received_before: turn }
}

#[cfg(all(test, not(millpond_loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_back() {
        let stint = Stint::default();
        assert_eq!(stint.read(), None);
        for (turn, peer) in
            [(1, "127.0.0.1:65535"), (u64::MAX, "[fe80::1:2:3:4]:1"), (3, "0.0.0.0:0"), (4, "[::]:9")]
        {
            stint.begin(&served(turn, peer));
            assert_eq!(stint.read(), Some(served(turn, peer)));
        }
    }
}

#[cfg(all(test, millpond_loom))]
mod model {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_reading_is_of_one_turn() {
        let mut model = loom::model::Builder::new();
        // A torn reading needs two preemptions, one of the writer and one of the reader.
        model.preemption_bound = Some(3);
        model.check(|| {
            let stint = Arc::new(Stint::default());
            let writer = {
                let stint = Arc::clone(&stint);
                loom::thread::spawn(move || {
                    stint.begin(&served(1, "127.0.0.1:1"));
                    stint.begin(&served(2, "[::2]:2"));
                })
            };
            let seen = stint.look();
            let possible = [None, Some(served(1, "127.0.0.1:1")), Some(served(2, "[::2]:2"))];
            assert!(possible.contains(&seen), "{seen:?}");
            writer.join().expect("the writer ends");
            assert_eq!(stint.look(), Some(served(2, "[::2]:2")));
        });
    }
}
