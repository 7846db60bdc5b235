//! Which connection a server with [`Overload::Evict`](super::Overload::Evict) closes to make room for a new one.
//!
//! [`choose`] decides from plain data, and touches no socket. It guarantees this order:
//!
//! 1. **Done** goes first: the server has ended its side, and the client's kernel has acknowledged everything. The close
//!    costs the client nothing.
//! 2. **Idle** goes next, and of these the connection whose last progress is longest ago: silent clients, half requests,
//!    and clients that take nothing of the output that waits for them.
//! 3. **Taking** goes last, in the same order: output waits, and the client's kernel has acknowledged more of it within
//!    [`TAKING`]. So a scraper on a slow link outlives any number of clients that never read.
//!
//! Age alone would not do: a flood of clients that never read is always younger than a scraper on a slow link. Nor would
//! received bytes count as progress: a client that sends one byte of its request each millisecond would outlive
//! everybody. So until the client has been sent something, its progress is that it connected.
//!
//! The reactor leaves out connections that a worker or the queue holds. It first serves a connection whose input no
//! worker has read. So a client whose request has arrived is answered before its connection can be closed.

use std::time::Duration;

use super::kernel::Delivery;
use crate::clock::later;

/// How long ago a client may have taken output and still count as one that reads. It takes some in each round trip, and
/// round trips are shorter.
const TAKING: Duration = Duration::from_millis(500);

/// A connection that may be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Its place in the reactor's table.
    pub(super) slot: usize,
    /// Lower for a connection that was accepted earlier.
    pub(super) serial: u64,
    pub(super) output: Output,
    /// When it last got further, apart from what [`Output::Waiting`] tells.
    pub(super) progress_ns: u64,
}

/// How far a connection's output has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// The server has sent all that it has to send, and waits for the client.
    None,
    /// The server has ended its side, and the client's kernel has acknowledged that.
    Delivered,
    /// The server has ended its side. All is on its way, and some of it is not acknowledged yet.
    InFlight,
    /// Some of it cannot be sent until the client reads.
    Waiting {
        /// When the reactor last saw that the client's kernel had acknowledged more of it.
        taken_ns: Option<u64>,
    },
}

/// In the order in which they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Done,
    Idle,
    Taking,
}

impl Candidate {
    /// Whether a close would leave the kernel with output that the client does not take.
    pub(super) fn is_stuck(&self) -> bool {
        matches!(self.output, Output::Waiting { .. })
    }

    /// Whether its client takes the output that waits.
    pub(super) fn is_taking(&self, now_ns: u64) -> bool {
        self.rank(now_ns) == Rank::Taking
    }

    fn rank(&self, now_ns: u64) -> Rank {
        match self.output {
            Output::Delivered => Rank::Done,
            Output::Waiting { taken_ns: Some(taken_ns) } if later(taken_ns, TAKING) > now_ns => Rank::Taking,
            _ => Rank::Idle,
        }
    }

    fn last_progress_ns(&self) -> u64 {
        match self.output {
            Output::Waiting { taken_ns: Some(taken_ns) } => taken_ns.max(self.progress_ns),
            _ => self.progress_ns,
        }
    }
}

/// The candidate to close, if there is any.
pub(super) fn choose(candidates: impl Iterator<Item = Candidate>, now_ns: u64) -> Option<Candidate> {
    candidates.min_by_key(|one| (one.rank(now_ns), one.last_progress_ns(), one.serial))
}

/// What the reactor has seen of the output that one client takes. Only the reactor has it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    /// Acknowledged bytes when it last looked.
    acked: Option<u64>,
    last_ns: Option<u64>,
}

impl Taken {
    /// Notes what the kernel says now. Returns what has become of the output of a connection, whose side the server has
    /// `ended` or not.
    pub(super) fn look(&mut self, delivery: Delivery, ended: bool, now_ns: u64) -> Output {
        // The first look only sets the mark: what was acknowledged before may be one receive buffer's worth, which every
        // client takes.
        if self.acked.is_some_and(|acked| delivery.acked > acked) {
            self.last_ns = Some(now_ns);
        }
        self.acked = Some(delivery.acked);
        match delivery {
            Delivery { pending: false, .. } if ended => Output::Delivered,
            Delivery { unsent: false, .. } if ended => Output::InFlight,
            _ => Output::Waiting { taken_ns: self.last_ns },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second after the start, in which all times below lie.
    const NOW_NS: u64 = 1_000_000_000;

    fn candidate(serial: u64, output: Output, progress_ns: u64) -> Candidate {
        Candidate { slot: 100 + serial as usize, serial, output, progress_ns }
    }

    fn waiting(taken_ns: impl Into<Option<u64>>) -> Output {
        Output::Waiting { taken_ns: taken_ns.into() }
    }

    /// The order in which they are closed, by serial number.
    fn order(mut candidates: Vec<Candidate>) -> Vec<u64> {
        let mut closed = Vec::new();
        while let Some(one) = choose(candidates.iter().copied(), NOW_NS) {
            candidates.retain(|other| *other != one);
            closed.push(one.serial);
        }
        closed
    }

    #[test]
    fn nobody_is_chosen_among_none() {
        assert_eq!(choose(std::iter::empty(), NOW_NS), None);
    }

    #[test]
    fn what_is_delivered_goes_before_idle_and_that_before_clients_that_read() {
        let candidates = vec![
            candidate(1, waiting(NOW_NS - 1_000_000), 1),
            candidate(2, Output::None, 2),
            candidate(3, waiting(None), 3),
            candidate(4, Output::InFlight, 4),
            candidate(5, Output::Delivered, 5),
        ];
        assert_eq!(order(candidates), [5, 2, 3, 4, 1]);
    }

    #[test]
    fn of_the_same_rank_the_longest_without_progress_goes_first() {
        for output in [Output::None, Output::Delivered, Output::InFlight, waiting(None)] {
            let candidates =
                vec![candidate(1, output, 30), candidate(2, output, 10), candidate(3, output, 20)];
            assert_eq!(order(candidates), [2, 3, 1], "{output:?}");
            // At the same moment, it is the one accepted first.
            let candidates = vec![candidate(2, output, 10), candidate(1, output, 10)];
            assert_eq!(order(candidates), [1, 2], "{output:?}");
        }
        let taking = |ago_ns| waiting(NOW_NS - ago_ns);
        let candidates = vec![candidate(1, taking(10), 1), candidate(2, taking(20), 2)];
        assert_eq!(order(candidates), [2, 1]);
    }

    #[test]
    fn a_client_that_reads_outlives_younger_ones_that_do_not() {
        let candidates = (2..50)
            .map(|serial| candidate(serial, waiting(None), NOW_NS - 1))
            .chain([candidate(1, waiting(NOW_NS - 400_000_000), 1)]);
        assert_eq!(order(candidates.collect()).last(), Some(&1));
    }

    #[test]
    fn a_client_that_has_stopped_reading_is_idle_after_a_while() {
        let ago = |ns: u64| candidate(1, waiting(NOW_NS - ns), 1).rank(NOW_NS);
        assert_eq!(ago(499_999_999), Rank::Taking);
        assert_eq!(ago(500_000_000), Rank::Idle);
        // Its progress still counts: a client that took something later stays longer.
        let candidates = vec![
            candidate(1, waiting(NOW_NS - 600_000_000), 1),
            candidate(2, waiting(NOW_NS - 700_000_000), 2),
        ];
        assert_eq!(order(candidates), [2, 1]);
    }

    #[test]
    fn only_a_rise_after_the_first_look_is_progress() {
        let delivery = |acked| Delivery { acked, pending: true, unsent: true };
        let mut taken = Taken::default();
        assert_eq!(taken.look(delivery(2000), false, 10), waiting(None), "its receive buffer");
        assert_eq!(taken.look(delivery(2000), false, 20), waiting(None));
        assert_eq!(taken.look(delivery(2001), true, 30), waiting(30));
        assert_eq!(taken.look(delivery(2001), true, 40), waiting(30));
    }

    #[test]
    fn an_ended_side_is_delivered_in_flight_or_waits_for_the_client() {
        let look =
            |pending, unsent, ended| Taken::default().look(Delivery { acked: 1, pending, unsent }, ended, 10);
        assert_eq!(look(false, false, true), Output::Delivered);
        assert_eq!(look(true, false, true), Output::InFlight);
        assert_eq!(look(true, true, true), waiting(None));
        for (pending, unsent) in [(false, false), (true, false), (true, true)] {
            assert_eq!(look(pending, unsent, false), waiting(None), "the server has more to send");
        }
    }

    #[test]
    fn only_waiting_output_is_stuck() {
        for (output, stuck) in [
            (Output::None, false),
            (Output::Delivered, false),
            (Output::InFlight, false),
            (waiting(None), true),
            (waiting(5), true),
        ] {
            assert_eq!(candidate(1, output, 1).is_stuck(), stuck, "{output:?}");
        }
    }
}
