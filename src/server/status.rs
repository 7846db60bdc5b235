//! The state of a server at one moment, as `/status.json` shows it.
//!
//! Counters only rise, and every time but the start's is one of a monotonic clock. Subtract two readings to get a rate: the
//! server keeps no averages. A reading takes no lock that a worker waits for. Its parts are read one after the other, so a
//! worker may take its next job after the pool's numbers are read and before its own row is.
//!
//! The names of the fields are those in the document. They end in their units; `_total` says that a number only rises.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use super::ServerHandle;
use super::metrics::{Cell, Open};
use crate::clock::seconds;
use crate::metrics::{LATENCY_BOUNDS_NS, Reading};
use crate::pool::Occupation;

/// The whole document.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    /// The server's name.
    server: String,
    /// The version of this crate, and the revision that it was built from.
    version: &'static str,
    revision: &'static str,
    /// How long ago the server was bound: now, by the clock of every `since_seconds` and `until_seconds`.
    uptime_seconds: f64,
    /// When the server was bound, in seconds since 1970. It distinguishes servers that follow one another at an address.
    started_timestamp_seconds: f64,
    /// `serving`, `lame_duck`, `draining` or `stopped`.
    phase: &'static str,
    /// When the lame duck or the drain ends at the latest; null in other phases.
    phase_until_seconds: Option<f64>,
    /// Why `/readyz` says no; null while the server takes new work.
    not_ready: Option<String>,
    /// Why `/healthz` says no; null while the reactor is alive.
    unhealthy: Option<String>,
    limits: Limits,
    /// The upper bounds of the histograms' buckets, ascending. Each bound is in its bucket; the last bucket has no bound.
    latency_bounds_seconds: Vec<f64>,
    pool: Pool,
    connections: Connections,
    /// Failed accepts, by kind.
    accept_errors_total: BTreeMap<&'static str, u64>,
    /// From when a message is readable until its answer is sent: the latency that the server adds.
    echo_latency: Histogram,
    received_bytes_total: u64,
    sent_bytes_total: u64,
    /// One row for each worker, by its number from 0. Empty when all workers have ended. Until then, a worker that has
    /// ended in a drain has a row as an idle one.
    workers: Vec<Worker>,
}

/// The limits in force. Null is no limit.
#[derive(Debug, Serialize)]
struct Limits {
    /// The workers that the server was started with.
    workers: usize,
    queue_capacity: usize,
    connections: usize,
    /// The most connections that the listen queue holds, after the kernel has cut what was asked for. Null if the kernel
    /// does not tell.
    backlog: Option<u32>,
    /// If the oldest waiting connection is older than this, the server counts as overloaded.
    queue_wait_seconds: Option<f64>,
    idle_timeout_seconds: Option<f64>,
    /// The silence after which the kernel probes a client.
    keepalive_seconds: Option<f64>,
    write_timeout_seconds: f64,
    lame_duck_seconds: f64,
    drain_timeout_seconds: f64,
    /// What happens to new connections at a limit: `wait`, `reject` or `evict`.
    overload: &'static str,
}

/// The pool's numbers, with the names of its metrics.
#[derive(Debug, Serialize)]
struct Pool {
    /// Workers that have not ended: 0 when a drain is over.
    workers: usize,
    busy: usize,
    /// Worker time spent in jobs, the running ones included.
    busy_seconds_total: f64,
    queue_depth: u64,
    /// How long the job at the head of the queue has waited.
    queue_oldest_age_seconds: f64,
    /// How long the longest-running job has run.
    longest_running_seconds: f64,
    submitted_total: u64,
    /// Jobs ended, by outcome.
    jobs_total: BTreeMap<&'static str, u64>,
    /// Jobs refused, by reason.
    rejected_total: BTreeMap<&'static str, u64>,
    /// How long jobs waited from their submission until a worker took them.
    queue_wait: Histogram,
    /// The time for which jobs held their worker.
    job_duration: Histogram,
}

/// Connections that are open now, by state, and all connections so far.
#[derive(Debug, Serialize)]
struct Connections {
    idle: u64,
    queued: u64,
    active: u64,
    closing: u64,
    accepted_total: u64,
    /// Connections that were refused, by reason.
    rejected_total: BTreeMap<&'static str, u64>,
    /// Connections that were closed, by reason.
    closed_total: BTreeMap<&'static str, u64>,
}

/// Durations counted by size. All numbers only rise.
#[derive(Debug, Serialize)]
struct Histogram {
    /// How many durations each bucket of `latency_bounds_seconds` has, not cumulative. The last number counts those that were
    /// longer than every bound.
    counts: Vec<u64>,
    sum_seconds: f64,
}

/// One worker.
#[derive(Debug, Serialize)]
struct Worker {
    /// `idle` or `busy`.
    state: &'static str,
    /// When it became so.
    since_seconds: f64,
    /// Jobs taken so far, the running one included.
    jobs: u64,
    /// The connection that a busy worker serves. It is missing for the moment until the worker has noted it.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    serves: Option<Serves>,
}

/// The connection that a busy worker serves.
#[derive(Debug, Serialize)]
struct Serves {
    /// The connection's number, in the order in which connections were accepted.
    connection: u64,
    peer: SocketAddr,
    /// Bytes read from the connection in this turn so far.
    turn_bytes: u64,
}

impl ServerHandle {
    /// The content of `/status.json`.
    pub(crate) fn status(&self) -> Status {
        let core = &self.core;
        let pool = self.pool.stats();
        let totals = core.ledger.totals();
        let Open { idle, queued, active, closing } = core.ledger.open(&totals, &pool);
        let (phase, until_ns) = core.lifecycle.phase_until_ns();
        let rows = self.pool.workers().into_iter().zip(&core.ledger.workers);
        let workers = rows.map(|((occupation, jobs), cell)| Worker::new(occupation, jobs, cell)).collect();
        Status {
            server: self.pool.name().to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            revision: env!("MILLPOND_REVISION"),
            started_timestamp_seconds: core.started.as_secs_f64(),
            phase: phase.as_str(),
            phase_until_seconds: until_ns.map(seconds),
            not_ready: self.readiness().err().map(|reason| reason.to_string()),
            unhealthy: self
                .health()
                .err()
                .map(|since| format!("the reactor has not come round for {since:.1?}")),
            limits: Limits {
                workers: core.ledger.workers.len(),
                queue_capacity: pool.queue_capacity,
                connections: core.max_connections,
                backlog: core.backlog,
                queue_wait_seconds: core.limits.queue_wait.as_ref().map(Duration::as_secs_f64),
                idle_timeout_seconds: core.limits.idle.as_ref().map(Duration::as_secs_f64),
                keepalive_seconds: core.limits.keepalive.as_ref().map(Duration::as_secs_f64),
                write_timeout_seconds: core.limits.write.as_secs_f64(),
                lame_duck_seconds: core.limits.lame_duck.as_secs_f64(),
                drain_timeout_seconds: core.limits.drain.as_secs_f64(),
                overload: core.overload.as_str(),
            },
            latency_bounds_seconds: LATENCY_BOUNDS_NS.iter().copied().map(seconds).collect(),
            pool: Pool {
                workers: pool.workers,
                busy: pool.busy,
                busy_seconds_total: pool.busy_time.as_secs_f64(),
                queue_depth: pool.queue_depth,
                queue_oldest_age_seconds: pool.queue_oldest_age.as_secs_f64(),
                longest_running_seconds: pool.longest_running.as_secs_f64(),
                submitted_total: pool.submitted,
                jobs_total: pool.ended().into(),
                rejected_total: pool.rejected().into(),
                queue_wait: pool.queue_wait.reading().into(),
                job_duration: pool.job_duration.reading().into(),
            },
            connections: Connections {
                idle,
                queued,
                active,
                closing,
                accepted_total: totals.accepted,
                rejected_total: core.ledger.rejections().collect(),
                closed_total: totals.closures().collect(),
            },
            accept_errors_total: core.ledger.failed_accepts().collect(),
            echo_latency: (&totals.echo_latency).into(),
            received_bytes_total: totals.received,
            sent_bytes_total: totals.sent,
            workers,
            // It is read last, so that no time above is later.
            uptime_seconds: seconds(core.clock.now_ns()),
        }
    }
}

impl Worker {
    fn new(occupation: Occupation, jobs: u64, cell: &Cell) -> Self {
        match occupation {
            Occupation::Idle { since_ns } => {
                Worker { state: "idle", since_seconds: seconds(since_ns), jobs, serves: None }
            }
            Occupation::Busy { since_ns } => Worker {
                state: "busy",
                since_seconds: seconds(since_ns),
                jobs,
                serves: Serves::read(cell, since_ns),
            },
        }
    }
}

impl Serves {
    /// The connection that the worker of this cell serves in the turn that started then.
    fn read(cell: &Cell, started_ns: u64) -> Option<Self> {
        // It is read before the stint, so it has no bytes of a later turn.
        let received = cell.received.get();
        let served = cell.stint.read().filter(|served| served.started_ns == started_ns)?;
        let turn_bytes = received.saturating_sub(served.received_before);
        Some(Serves { connection: served.connection, peer: served.peer, turn_bytes })
    }
}

impl<const BOUNDS: usize> From<&Reading<BOUNDS>> for Histogram {
    fn from(reading: &Reading<BOUNDS>) -> Self {
        let counts = reading.counts.iter().copied().chain([reading.beyond]).collect();
        Histogram { counts, sum_seconds: seconds(reading.sum_ns) }
    }
}
