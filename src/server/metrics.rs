//! The server's numbers: a cell for each thread that serves, and one reading of all of them.
//!
//! The law `accepted = sum(connections) + sum(closed)` holds in every reading because of the order of the reading: first
//! the accepted connections, then the closed ones. A connection that was accepted after the first step and closed before
//! the second is counted as closed only. Then the closed connections are the truer count of accepted ones, and the larger
//! of the two is reported. Open connections are the difference. As many of them are queued as jobs wait, and as many are
//! active as workers are busy, because a job is a connection. The reactor counts those it lingers on. The rest are idle.
//!
//! # How far the numbers reach
//!
//! A counter must not fall. `metrics/cell.rs` says how far each kind of cell reaches. The connection durations need the
//! most: one thread, the reactor, may close ten million connections of ten years each. Their sum has 96 bits in the cell
//! and 128 bits in [`Totals`]. Bytes have 64 bits, which is 58 years at 10 GB a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::Registry;
use prometheus::core::Collector;

use super::stint::Stint;
use super::{Core, ServerHandle};
use crate::lifecycle::LifecycleMetrics;
use crate::metrics::{
    Counter, LATENCY_BOUNDS_NS, LIFETIME_BOUNDS_NS, Latency, Lifetime, Page, Reading, Source, collector,
    together,
};
use crate::pool::{self, Meter, Stats};

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The client closed the connection.
    Client,
    /// The connection was silent for the idle timeout.
    IdleTimeout,
    /// The client took none of its output for the write timeout.
    WriteTimeout,
    /// Reading or writing failed. As a rule, the client had reset the connection.
    Error,
    /// The service panicked.
    Panicked,
    /// The service ended the conversation.
    Service,
    /// The connection was idle in a drain.
    Drained,
    /// The server cut the connection, at the end of a drain or to make room.
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

/// Why the server refused a connection that the kernel had accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many connections are open as may be.
    Limit,
    /// The oldest waiting connection has waited too long.
    Overload,
    /// The connection was in the kernel's listen queue when the drain's deadline passed.
    Draining,
}

const REFUSALS: [(Refusal, &str); 3] =
    [(Refusal::Limit, "limit"), (Refusal::Overload, "overload"), (Refusal::Draining, "draining")];

/// Why `accept` failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcceptFailure {
    /// The process or the system had no descriptor left.
    FdLimit,
    /// The client had closed the connection before it was accepted.
    Aborted,
    /// Any other error.
    Other,
}

const ACCEPT_FAILURES: [(AcceptFailure, &str); 3] = [
    (AcceptFailure::FdLimit, "fd_limit"),
    (AcceptFailure::Aborted, "aborted"),
    (AcceptFailure::Other, "other"),
];

/// The counts of one thread that serves or closes connections. Written by that thread alone.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Cell {
    /// The connection that the thread serves as a worker.
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

/// All counts of a server.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// One for each worker.
    pub(crate) workers: Box<[Cell]>,
    /// The reactor's, for the connections that it closes.
    pub(crate) reactor: Cell,
    /// Connections admitted. Written by the reactor.
    pub(crate) accepted: Counter,
    rejected: [Counter; REFUSALS.len()],
    accept_errors: [Counter; ACCEPT_FAILURES.len()],
    /// Half-closed connections that the reactor waits for. Written by the reactor.
    pub(crate) closing: AtomicU64,
    /// Bytes that arrived after an idle connection was half-closed. Written by the reactor.
    pub(crate) late: Counter,
}

/// What a server had done when it was read.
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
    /// Connections that wait for their client.
    pub(crate) idle: u64,
    /// Connections that wait for a worker.
    pub(crate) queued: u64,
    /// Connections that a worker serves.
    pub(crate) active: u64,
    /// Connections whose output side is closed, and that wait for the client to close its side.
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

    /// How many connections are open, by state. The readings are taken one after the other. So a connection that ends
    /// in between may be counted as busy and as closed. The sum stays true.
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

    /// Adds up all cells, in the order that the module explains.
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
        // All of `sent` before any of `received`, so that no reading has more bytes sent than received.
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

impl ServerHandle {
    /// A collector of every metric of the server, its phase and its pool.
    pub(crate) fn collector(&self) -> Box<dyn Collector> {
        let ServerHandle { core, pool } = self.clone();
        together(vec![
            collector(LifecycleMetrics(Arc::clone(&core.lifecycle)), &[]),
            collector(ServerMetrics { core, pool: Arc::clone(&pool) }, &[]),
            pool::collector(pool),
        ])
    }

    /// Takes the metrics that [`Running::register`](super::Running::register) put into a registry out of it again, all
    /// together. Then the registry drops what it holds of the server, and takes the next server.
    ///
    /// It works at any time, also after the server has drained. A registry knows metrics by their names and labels. So
    /// this takes out those of a second server with the same name too, if that server is in the registry instead.
    ///
    /// ```
    /// use millpond::{Echo, Server};
    ///
    /// let registry = millpond::prometheus::Registry::new();
    /// let start = || Server::builder("echo").service(Echo).workers(2).bind(([127, 0, 0, 1], 0).into())?.start();
    /// let first = start()?;
    /// first.register(&registry)?;
    /// let handle = first.handle();
    /// handle.drain();
    /// first.wait();
    /// handle.unregister(&registry)?;
    /// let second = start()?;
    /// second.register(&registry)?;
    /// # second.handle().drain();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the metrics are not in the registry. Then the registry stays as it is.
    pub fn unregister(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.unregister(self.collector())
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
    use std::time::Duration;

    use super::*;
    use crate::server::{Echo, Running, Server};

    #[test]
    fn a_connection_closed_while_it_is_read_still_balances() {
        let ledger = Ledger::new(2);
        ledger.accepted.add(3);
        ledger.workers[0].closed(Reason::Client, 1);
        ledger.workers[1].closed(Reason::Error, 1);
        ledger.reactor.closed(Reason::Drained, 1);
        // As if a fourth connection had been accepted and closed after the count of accepted ones was read.
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

    /// A server without clients, so that a test may write its cells. It is drained when the test ends.
    struct Idle(Running);

    impl Idle {
        fn start() -> Self {
            let any_port = ([127, 0, 0, 1], 0).into();
            let server = Server::builder("old").service(Echo).workers(2).max_connections(4).bind(any_port);
            Idle(server.expect("a port").start().expect("threads"))
        }
    }

    impl Drop for Idle {
        fn drop(&mut self) {
            self.0.handle().drain();
            let _ = self.0.finished().recv_timeout(Duration::from_secs(30));
        }
    }

    /// Each step closes connections of a great age, in one cell and in several, and takes the sum over the next power of
    /// two, from 2^63 ns on.
    #[test]
    fn sums_of_durations_rise_beyond_64_bits_in_the_registry_and_in_the_status() {
        const YEAR_NS: u64 = 365 * 86_400 * 1_000_000_000;
        let server = Idle::start();
        let (handle, registry) = (server.0.handle(), Registry::new());
        server.0.register(&registry).expect("the registry is new");
        let ledger = &handle.core.ledger;
        let value = |name: &str| -> f64 {
            let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} "))).expect("a line");
            line.parse().expect("a number")
        };
        let (mut years, mut last) = (0, 0.0);
        for lived in [290, 1, 2, 290, 1, 290, 10_u64] {
            ledger.reactor.closed(Reason::Drained, lived * YEAR_NS);
            ledger.workers[0].closed(Reason::Client, lived * YEAR_NS);
            ledger.workers[1].echo_latency.observe(lived * YEAR_NS);
            ledger.workers[1].first_byte.observe(lived * YEAR_NS);
            years += lived;
            let one = (years * 365 * 86_400) as f64;
            assert_eq!(value("millpond_connection_duration_seconds_sum"), 2.0 * one);
            assert_eq!(value("millpond_echo_latency_seconds_sum"), one);
            assert_eq!(value("millpond_connection_first_byte_seconds_sum"), one);
            let status = serde_json::to_value(handle.status()).expect("JSON");
            assert_eq!(status["echo_latency"]["sum_seconds"].as_f64(), Some(one));
            assert!(one > last);
            last = one;
        }
    }
}
