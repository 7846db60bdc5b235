//! The server's numbers: a cell for each thread that serves, and one reading of all of them.
//!
//! The law `accepted = sum(connections) + sum(closed)` holds in every reading by the order it is taken in:
//! first what was accepted, then what was closed. A connection that was accepted after the first step and
//! closed before the second would show as closed only; then what was closed is the truer count of what was
//! accepted, and the larger of the two is reported. Open connections are the difference. Of these, as many
//! are queued as jobs wait, and as many active as workers are busy, because a job is a connection; the
//! reactor counts those it lingers on; the rest are idle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Core;
use super::stint::Stint;
use crate::metrics::{
    Counter, LATENCY_BOUNDS_NS, LIFETIME_BOUNDS_NS, Latency, Lifetime, Page, Reading, Source,
};
use crate::pool::{Meter, Stats};

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The client closed it.
    Client,
    /// It was silent for the idle timeout.
    IdleTimeout,
    /// The client took none of its output for the write timeout.
    WriteTimeout,
    /// Reading or writing failed: as a rule, the client reset it.
    Error,
    /// The service panicked.
    Panicked,
    /// The service ended the conversation.
    Service,
    /// It was idle in a drain.
    Drained,
    /// It was cut, by the end of a drain or to make room.
    Aborted,
}

impl Reason {
    const ALL: [Reason; 8] = [
        Reason::Client,
        Reason::IdleTimeout,
        Reason::WriteTimeout,
        Reason::Error,
        Reason::Panicked,
        Reason::Service,
        Reason::Drained,
        Reason::Aborted,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Reason::Client => "client",
            Reason::IdleTimeout => "idle_timeout",
            Reason::WriteTimeout => "write_timeout",
            Reason::Error => "error",
            Reason::Panicked => "panicked",
            Reason::Service => "service",
            Reason::Drained => "drained",
            Reason::Aborted => "aborted",
        }
    }
}

/// Why a connection the kernel had accepted was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many connections are open as may be.
    Limit,
    /// The oldest waiting connection has waited too long.
    Overload,
    /// It stood in the kernel's backlog when the drain's deadline passed.
    Draining,
}

const REFUSALS: [(Refusal, &str); 3] =
    [(Refusal::Limit, "limit"), (Refusal::Overload, "overload"), (Refusal::Draining, "draining")];

/// Why `accept` failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcceptFailure {
    /// No descriptor was to be had, in the process or the system.
    FdLimit,
    /// The connection was gone before it was accepted.
    Aborted,
    /// Anything else.
    Other,
}

const ACCEPT_FAILURES: [(AcceptFailure, &str); 3] = [
    (AcceptFailure::FdLimit, "fd_limit"),
    (AcceptFailure::Aborted, "aborted"),
    (AcceptFailure::Other, "other"),
];

/// The accounts of one thread that serves or closes connections: written by it alone.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Cell {
    /// Whom the thread serves as a worker.
    pub(crate) stint: Stint,
    pub(crate) received: Counter,
    pub(crate) sent: Counter,
    closed: [Counter; Reason::ALL.len()],
    pub(crate) duration: Lifetime,
    pub(crate) first_byte: Latency,
    pub(crate) echo_latency: Latency,
}

impl Cell {
    fn new() -> Self {
        Cell {
            stint: Stint::default(),
            received: Counter::default(),
            sent: Counter::default(),
            closed: Default::default(),
            duration: Lifetime::new(&LIFETIME_BOUNDS_NS),
            first_byte: Latency::new(&LATENCY_BOUNDS_NS),
            echo_latency: Latency::new(&LATENCY_BOUNDS_NS),
        }
    }

    /// Counts a closed connection. Only the owning thread may call it.
    pub(crate) fn closed(&self, reason: Reason, lived_ns: u64) {
        self.duration.observe(lived_ns);
        self.closed[reason as usize].add(1);
    }
}

/// All accounts of a server.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// One for each worker.
    pub(crate) workers: Box<[Cell]>,
    /// The reactor's, as one that closes connections.
    pub(crate) reactor: Cell,
    /// The reactor's, as the one that accepts them.
    pub(crate) accepted: Counter,
    rejected: [Counter; REFUSALS.len()],
    accept_errors: [Counter; ACCEPT_FAILURES.len()],
    /// Half-closed connections that the reactor waits for. Written by the reactor.
    pub(crate) closing: AtomicU64,
    /// Bytes that arrived after an idle connection was half-closed. Written by the reactor.
    pub(crate) late: Counter,
}

/// What a server had done when it was asked.
#[derive(Clone, Debug)]
pub(crate) struct Totals {
    pub(crate) accepted: u64,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) late: u64,
    closed: [u64; Reason::ALL.len()],
    duration: Reading<{ LIFETIME_BOUNDS_NS.len() }>,
    first_byte: Reading<{ LATENCY_BOUNDS_NS.len() }>,
    pub(crate) echo_latency: Reading<{ LATENCY_BOUNDS_NS.len() }>,
}

/// Open connections, by state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    /// Waiting for their client.
    pub(crate) idle: u64,
    /// Waiting for a worker.
    pub(crate) queued: u64,
    /// With a worker.
    pub(crate) active: u64,
    /// Waiting for their client's end.
    pub(crate) closing: u64,
}

impl Totals {
    /// Closed connections, by the reason's name.
    pub(crate) fn closures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL.iter().map(|reason| (reason.as_str(), self.closed(*reason)))
    }

    pub(crate) fn closed(&self, reason: Reason) -> u64 {
        self.closed[reason as usize]
    }

    pub(crate) fn closed_in_all(&self) -> u64 {
        self.closed.iter().sum()
    }
}

impl Ledger {
    pub(crate) fn new(workers: usize) -> Self {
        Ledger {
            workers: (0..workers).map(|_| Cell::new()).collect(),
            reactor: Cell::new(),
            accepted: Counter::default(),
            rejected: Default::default(),
            accept_errors: Default::default(),
            closing: AtomicU64::new(0),
            late: Counter::default(),
        }
    }

    /// Counts a refused connection. Only the reactor may call it.
    pub(crate) fn rejected(&self, refusal: Refusal) {
        self.rejected[refusal as usize].add(1);
    }

    /// Counts a failed `accept`. Only the reactor may call it.
    pub(crate) fn accept_failed(&self, failure: AcceptFailure) {
        self.accept_errors[failure as usize].add(1);
    }

    /// Refused connections, by the reason's name.
    pub(crate) fn rejections(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REFUSALS.iter().map(|(refusal, reason)| (*reason, self.rejected[*refusal as usize].get()))
    }

    /// Failed `accept`s, by the kind's name.
    pub(crate) fn failed_accepts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ACCEPT_FAILURES.iter().map(|(failure, kind)| (*kind, self.accept_errors[*failure as usize].get()))
    }

    /// How many connections are open, by state. The readings were taken one after the other, so a connection that
    /// ended in between may be counted as busy and closed; the sum stays true.
    pub(crate) fn open(&self, totals: &Totals, pool: &Stats) -> Open {
        let mut idle = totals.accepted - totals.closed_in_all();
        let mut at_most = |count: u64| {
            let count = count.min(idle);
            idle -= count;
            count
        };
        let closing = at_most(self.closing.load(Ordering::Relaxed));
        let active = at_most(pool.busy as u64);
        let queued = at_most(pool.queue_depth);
        Open { idle, queued, active, closing }
    }

    /// Adds up all accounts, in the order the module explains.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals {
            accepted: self.accepted.get(),
            received: 0,
            sent: 0,
            late: self.late.get(),
            closed: [0; Reason::ALL.len()],
            duration: Reading::new(&LIFETIME_BOUNDS_NS),
            first_byte: Reading::new(&LATENCY_BOUNDS_NS),
            echo_latency: Reading::new(&LATENCY_BOUNDS_NS),
        };
        // All of sent before any of received, so that no reading shows more echoed than came in.
        totals.sent = self.workers.iter().chain([&self.reactor]).map(|cell| cell.sent.get()).sum();
        for cell in self.workers.iter().chain([&self.reactor]) {
            totals.received += cell.received.get();
            for (sum, closed) in totals.closed.iter_mut().zip(&cell.closed) {
                *sum += closed.get();
            }
            cell.duration.add_to(&mut totals.duration);
            cell.first_byte.add_to(&mut totals.first_byte);
            cell.echo_latency.add_to(&mut totals.echo_latency);
        }
        totals.accepted = totals.accepted.max(totals.closed_in_all());
        totals
    }
}

/// The server as a source of metrics.
pub(crate) struct ServerMetrics {
    pub(crate) core: Arc<Core>,
    pub(crate) pool: Arc<dyn Meter>,
}

impl Source for ServerMetrics {
    #[expect(clippy::cast_precision_loss, reason = "gauges are doubles, and these numbers are small")]
    fn read(&self, page: &mut Page) {
        let ledger = &self.core.ledger;
        let pool = self.pool.stats();
        let totals = ledger.totals();

        let Open { idle, queued, active, closing } = ledger.open(&totals, &pool);
        const CONNECTIONS: &str = "Open connections by state: idle ones wait for their client, queued ones for a worker, active ones are being served, closing ones for the client's end. Queued for long means too few workers.";
        for (state, count) in [("idle", idle), ("queued", queued), ("active", active), ("closing", closing)] {
            page.gauge("millpond_connections", CONNECTIONS, &[("state", state)], count as f64);
        }
        page.gauge(
            "millpond_connections_limit",
            "Most connections that may be open. When the sum of connections reaches it, newcomers wait in the kernel or are refused.",
            &[],
            self.core.max_connections as f64,
        );
        page.counter(
            "millpond_connections_accepted_total",
            "Connections admitted. Equals connections summed plus connections_closed_total summed; those refused are not in it.",
            &[],
            totals.accepted,
        );
        for (reason, count) in ledger.rejections() {
            page.counter(
                "millpond_connections_rejected_total",
                "Connections the kernel accepted and the server refused, by reason. Each is a client turned away.",
                &[("reason", reason)],
                count,
            );
        }
        for (reason, count) in totals.closures() {
            page.counter(
                "millpond_connections_closed_total",
                "Connections closed, by reason. write_timeout and error are the clients' or the network's doing, panicked a bug in the service, aborted work that was lost.",
                &[("reason", reason)],
                count,
            );
        }
        page.histogram(
            "millpond_connection_duration_seconds",
            "Time from accepting a connection until it was closed. Many short ones mean clients that reconnect for every message.",
            &totals.duration,
        );
        page.histogram(
            "millpond_connection_first_byte_seconds",
            "Time from accepting a connection until its first byte was sent back, the client's own delay included.",
            &totals.first_byte,
        );
        page.histogram(
            "millpond_echo_latency_seconds",
            "Time from a message being readable until its answer was with the kernel: what the server adds to each message. Compare it with pool_queue_wait_seconds to see whether waiting or working is slow.",
            &totals.echo_latency,
        );
        page.counter(
            "millpond_received_bytes_total",
            "Bytes read from clients. Flat while connections are active, clients have stopped sending.",
            &[],
            totals.received,
        );
        page.counter(
            "millpond_sent_bytes_total",
            "Bytes sent to clients. Behind received_bytes_total, clients read more slowly than they send.",
            &[],
            totals.sent,
        );
        page.counter(
            "millpond_late_bytes_total",
            "Bytes that came after the server had half-closed their connection as idle, in a drain or by the idle timeout. They were discarded; their client has to send them again on a new connection.",
            &[],
            totals.late,
        );
        for (kind, count) in ledger.failed_accepts() {
            page.counter(
                "millpond_accept_errors_total",
                "Failed accepts, by kind. fd_limit means no descriptor was left: raise the limit or lower --max-connections.",
                &[("kind", kind)],
                count,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_closed_while_it_is_read_still_balances() {
        let ledger = Ledger::new(2);
        ledger.accepted.add(3);
        ledger.workers[0].closed(Reason::Client, 1);
        ledger.workers[1].closed(Reason::Error, 1);
        ledger.reactor.closed(Reason::Drained, 1);
        // As if a fourth had been accepted and closed since the count of accepted was read.
        ledger.reactor.closed(Reason::Drained, 1);
        let totals = ledger.totals();
        assert_eq!(totals.accepted, 4);
        assert_eq!(totals.closed_in_all(), 4);
    }

    #[test]
    fn every_reason_is_counted_under_its_own_name() {
        let cell = Cell::new();
        for (times, reason) in Reason::ALL.into_iter().enumerate() {
            for _ in 0..times {
                cell.closed(reason, 1);
            }
        }
        let counts: Vec<_> = cell.closed.iter().map(Counter::get).collect();
        assert_eq!(counts, [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
