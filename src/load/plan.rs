//! The plan of a run: plain values, which the parser of the flags has checked.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

/// The plan of a run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The echo service.
    pub(crate) address: SocketAddr,
    /// Connections that send, at least 1.
    pub(crate) connections: usize,
    /// Bytes of a message. Every size in the range is equally likely.
    pub(crate) sizes: RangeInclusive<u64>,
    pub(crate) until: Until,
    /// The warm-up at the start. Its messages are checked and not counted.
    pub(crate) warmup: Duration,
    /// Messages that a connection may have on their way, at least 1.
    pub(crate) pipeline: usize,
    /// Whether each message has a new connection.
    pub(crate) churn: bool,
    /// Further connections, which stay silent.
    pub(crate) idle: usize,
    /// Messages due in a second, over all connections. If `None`, they go out as fast as the answers come.
    pub(crate) rate: Option<u64>,
    /// How long a connection may take to be made, and a wanted byte may take to come.
    pub(crate) timeout: Duration,
    /// Threads that send and receive, from 1 to `connections`.
    pub(crate) threads: usize,
    /// Decides the sizes and the bytes.
    pub(crate) seed: u64,
}

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// After this long, not counting the warm-up.
    Time(Duration),
    /// When this many messages have been sent, not counting those of the warm-up.
    Count(u64),
}

impl Plan {
    /// The number of connections of one thread. The n-th of the run belongs to thread n modulo `threads`.
    pub(super) fn share(&self, thread: usize) -> usize {
        self.connections / self.threads + usize::from(thread < self.connections % self.threads)
    }

    /// The number of messages that one thread may send after the warm-up, in proportion to its connections.
    pub(super) fn messages(&self, thread: usize) -> u64 {
        let Until::Count(count) = self.until else { return u64::MAX };
        let up_to = |threads: usize| {
            let connections: usize = (0..threads).map(|thread| self.share(thread)).sum();
            let product = u128::from(count) * connections as u128 / self.connections as u128;
            u64::try_from(product).unwrap_or(u64::MAX)
        };
        up_to(thread + 1) - up_to(thread)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::load) fn plan() -> Plan {
        Plan {
            address: ([127, 0, 0, 1], 7).into(),
            connections: 5,
            sizes: 512..=512,
            until: Until::Count(11),
            warmup: Duration::ZERO,
            pipeline: 1,
            churn: false,
            idle: 0,
            rate: None,
            timeout: Duration::from_secs(30),
            threads: 2,
            seed: 1,
        }
    }

    #[test]
    fn the_threads_shares_add_up() {
        for (connections, threads, count) in [(5, 2, 11), (1, 1, 0), (50, 3, 1_000_003), (7, 7, 3)] {
            let plan = Plan { connections, threads, until: Until::Count(count), ..plan() };
            assert_eq!((0..threads).map(|thread| plan.share(thread)).sum::<usize>(), connections);
            assert_eq!((0..threads).map(|thread| plan.messages(thread)).sum::<u64>(), count);
        }
    }
}
