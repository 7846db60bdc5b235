//! The report of a server that has drained.

use std::fmt;
use std::time::Duration;

/// How a server's life ended.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections that were open when the drain began, or were accepted from the listen queue after it.
    pub in_drain: u64,
    /// Of these, the ones that ended as their client or the service wished.
    pub served: u64,
    /// Of these, the ones that were idle and were closed by the server.
    pub closed_idle: u64,
    /// Of these, the ones that ended by a failure of the connection or a panic of the service.
    pub failed: u64,
    /// Of these, the ones that were cut: at the deadline, those still in the listen queue included, or
    /// because the client took none of its output for the write timeout.
    pub cut: u64,
    /// Bytes that clients sent in the drain after the server had half-closed their connection as idle. They were
    /// discarded unanswered. A client that had nothing in flight at that moment has lost nothing.
    pub late: u64,
    /// Bytes read from clients since the start.
    pub received: u64,
    /// Bytes sent to clients since the start.
    pub sent: u64,
    /// How long the drain took.
    pub drain: Duration,
    /// How long the server ran in all.
    pub uptime: Duration,
}

impl Report {
    /// Whether nothing was cut. It does not look at [`late`](Report::late): any close can meet a message on its way.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.cut == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections at the drain: {} served to their end, {} closed idle, {} failed, {} cut; \
             drained in {:.3} s; {} connections, {} bytes in and {} bytes out, {} bytes late, in {:.3} s of uptime",
            self.in_drain,
            self.served,
            self.closed_idle,
            self.failed,
            self.cut,
            self.drain.as_secs_f64(),
            self.accepted,
            self.received,
            self.sent,
            self.late,
            self.uptime.as_secs_f64(),
        )
    }
}
