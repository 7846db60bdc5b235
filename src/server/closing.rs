//! How connections end: timeouts, and the wait for output that the client has not taken.
//!
//! # Guarantees
//!
//! - **No close destroys output that the client is still taking.** A connection is closed only when the client's kernel
//!   has acknowledged all output, or has acknowledged none of it for the write timeout, or when the connection has
//!   failed. That holds for idle timeouts, for the end of a drain's idle connections, for a service's close, for the
//!   client's end of stream, and for the lifetime of a request. Exceptions are counted as `aborted`: the
//!   drain's deadline, and an eviction.
//! - **A client with output to take is not idle.** If it still has some when its idle timeout ends, the timeout starts anew
//!   when it has taken all.
//! - A half-closed connection is read and discarded until the client ends its side, so that no reset destroys what the
//!   client has not read. After the client has taken all, that lasts [`LINGER`] at most.
//! - Bytes that arrive after an idle connection was half-closed are counted as late.
//!
//! # How the write timeout is measured
//!
//! The kernel counts the bytes that the client's kernel has acknowledged (`kernel.rs`). While output waits, the count is
//! compared four times in a write timeout. The first comparison may come a write timeout after the output began to wait. So a
//! stalled client is closed between one write timeout and two after its kernel acknowledged something for the last time.
//!
//! A client's kernel acknowledges in steps. With a full receive buffer it acknowledges more only when a whole piece of the
//! buffer has been read. On Linux a piece is up to 17 pages' worth of merged packets: tens of kilobytes on Ethernet, and
//! 250 to 560 kB on the loopback interface, where packets are large. So a client that reads is safe if it reads
//! such a piece within the write timeout. No server can see slower reading.
//!
//! # Reviews
//!
//! A connection has one *review* ahead of it. A review looks at the times that the connection's holder
//! left (when it was parked, since when its output waits), and closes the connection or sets the next review. So traffic
//! costs no timer operation. A review comes at least once in the shortest of the timeouts. So a stall that
//! begins just after one is seen by the next, in time to close the connection at the exact moment.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::connection::{Connection, Held};
use super::drain::IDLE_MOMENT;
use super::gate::{Readiness, Ready, Standing};
use super::metrics::Reason;
use super::reactor::{Reactor, Slot, Stage};
use super::service::Service;
use crate::clock::later;

/// The least time between two reviews of a connection, whatever the timeouts.
const SHORTEST_REVIEW: Duration = Duration::from_millis(1);

/// How long a half-closed connection whose output was taken waits for the client's end. Data that is on its way
/// arrives in less.
const LINGER: Duration = Duration::from_secs(1);

/// The shortest write timeout in force. An acknowledgement takes a round trip, and a kernel may delay it by 200 ms.
const SHORTEST_WRITE_TIMEOUT: Duration = Duration::from_millis(250);

/// How often a half-closed connection's output is looked at. The kernel reports when all is taken; this finds out what
/// it does not report: that the client takes some of it, or none.
const LINGER_LOOK: Duration = Duration::from_millis(250);

/// Looks at waiting output in one write timeout.
const LOOKS: u32 = 4;

/// Bytes of a half-closed client discarded before other connections get their turn, and the size of each read.
const DISCARDED_AT_ONCE: usize = 256 * 1024;
const DISCARD_READ: usize = DISCARDED_AT_ONCE / 16;

/// When the rest of a flood from a half-closed client is discarded. The kernel reports nothing new before the socket
/// was emptied.
const DISCARD_AGAIN: Duration = Duration::from_millis(1);

/// When output is sent again for which the kernel had no memory.
const RETRY: Duration = Duration::from_millis(10);

/// The wait for a half-closed connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Linger {
    /// The client had taken all output before the half-close, so only the end of the stream is on its way. A client that has
    /// vanished never acknowledges it, and loses nothing.
    pub(super) is_delivered: bool,
    /// When to stop waiting for the client's end; `None` while output waits to be taken.
    until_ns: Option<u64>,
    /// The client has ended its side.
    ended: bool,
}

/// How far the input of a half-closed connection was discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Discarded {
    /// All that has come.
    All,
    /// As much as one turn may discard, and more may wait.
    Share,
    /// All, and the client has ended its side.
    End,
    /// Nothing can be read any more: the connection has failed.
    Failed,
}

impl<S: Service> Reactor<S> {
    /// Begins to wait for the client of a connection that was half-closed. `is_delivered` as in [`Linger`].
    pub(super) fn begin_linger(&mut self, slot: usize, is_delivered: bool, now_ns: u64) {
        let linger = Linger { is_delivered, ..Linger::default() };
        if self.slots[slot].linger.replace(linger).is_none() {
            self.core.ledger.closing.fetch_add(1, Ordering::Relaxed);
        }
        let connection = &self.slots[slot].connection;
        connection.watch_output(connection.hold().delivery(), now_ns);
        self.linger(slot, now_ns);
    }

    /// Discards what the client of a half-closed connection has sent, and closes the connection if there is nothing left
    /// to wait for.
    pub(super) fn linger(&mut self, slot: usize, now_ns: u64) {
        // Half-closed by a worker whose note is on its way: `begin_linger` will look.
        let Some(mut linger) = self.slots[slot].linger else { return };
        let connection = Arc::clone(&self.slots[slot].connection);
        let held = connection.hold();
        let reason = held.ending.unwrap_or(Reason::Client);
        let discarded = if linger.ended { Discarded::End } else { self.discard(&held) };
        linger.ended = discarded == Discarded::End;
        let delivery = held.delivery();
        drop(held);

        let next_ns = if discarded == Discarded::Failed {
            Err(reason)
        } else if delivery.pending && !linger.is_delivered {
            if connection.has_taken_some(delivery) {
                connection.watch_output(delivery, now_ns);
            }
            let since_ns = connection.blocked_ns().unwrap_or(now_ns);
            let at_ns = later(since_ns, self.write_timeout());
            if at_ns <= now_ns {
                Err(Reason::WriteTimeout)
            } else {
                Ok(at_ns.min(later(now_ns, LINGER_LOOK)))
            }
        } else {
            connection.output_taken();
            let end_ns = later(connection.accepted_ns, self.core.limits.lifetime.unwrap_or(Duration::MAX));
            let until_ns = *linger.until_ns.get_or_insert(later(now_ns, LINGER).min(end_ns));
            if linger.ended || until_ns <= now_ns { Err(reason) } else { Ok(until_ns) }
        };
        match next_ns {
            Err(reason) => self.close(slot, reason, now_ns),
            Ok(mut at_ns) => {
                if discarded == Discarded::Share {
                    at_ns = at_ns.min(later(now_ns, DISCARD_AGAIN));
                }
                self.slots[slot].linger = Some(linger);
                self.schedule(slot, at_ns);
            }
        }
    }

    /// Reads and discards the input of a half-closed connection.
    fn discard(&self, held: &Held<S::Session>) -> Discarded {
        // The service has ended the conversation where it asked for the close. Input after any other close is late.
        let is_late = matches!(held.ending, Some(Reason::Drained | Reason::IdleTimeout));
        let mut sink = Vec::with_capacity(DISCARD_READ);
        for _ in 0..DISCARDED_AT_ONCE / DISCARD_READ {
            sink.clear();
            match held.read(&mut sink) {
                Ok(0) => return Discarded::End,
                Ok(bytes) if is_late => self.core.ledger.late.add(bytes as u64),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Discarded::All,
                Err(_) => return Discarded::Failed,
            }
        }
        Discarded::Share
    }

    /// Sets the connection's next review, in place of the one ahead of it.
    pub(super) fn schedule(&mut self, slot: usize, at_ns: u64) {
        let held = &mut self.slots[slot];
        self.reviews.remove(&(held.review_ns, slot));
        held.review_ns = at_ns;
        self.reviews.insert((at_ns, slot));
    }

    /// Reviews every connection whose time has come.
    pub(super) fn review_due(&mut self, now_ns: u64) {
        while let Some(&(at_ns, slot)) = self.reviews.first()
            && at_ns <= now_ns
        {
            self.reviews.pop_first();
            self.review(slot, now_ns);
        }
    }

    fn review(&mut self, slot: usize, now_ns: u64) {
        let held = &self.slots[slot];
        match held.connection.gate.standing() {
            // The worker that closed it has sent a note.
            Standing::Closed => {}
            Standing::Busy => self.schedule_next(slot, now_ns),
            Standing::Closing if held.linger.is_some() => self.linger(slot, now_ns),
            // The worker's note is on its way.
            Standing::Closing => self.schedule_next(slot, now_ns),
            Standing::Parked if held.retry_ns.is_some_and(|at_ns| at_ns <= now_ns) => {
                self.retry(slot, now_ns);
            }
            Standing::Parked if takes_kept_output(&held.connection, now_ns) => self.retry(slot, now_ns),
            Standing::Parked => match self.verdict(held, now_ns) {
                Err(at_ns) => self.schedule(slot, at_ns.min(self.next_review_ns(slot, now_ns))),
                Ok(reason) => self.dismiss(slot, reason, now_ns),
            },
        }
    }

    /// Has a worker's try to send repeated a little later.
    pub(super) fn retry_later(&mut self, slot: usize, now_ns: u64) {
        let at_ns = later(now_ns, RETRY);
        self.slots[slot].retry_ns = Some(at_ns);
        self.schedule(slot, at_ns.min(self.slots[slot].review_ns));
    }

    /// Has a worker send again what the kernel did not take before.
    fn retry(&mut self, slot: usize, now_ns: u64) {
        self.slots[slot].retry_ns = None;
        let report = Readiness { writable: true, ..Readiness::default() };
        if self.slots[slot].connection.gate.ready(report) == Ready::Submit {
            self.submit(slot);
        }
        self.schedule_next(slot, now_ns);
    }

    /// Why a parked connection is to be closed now, or when to ask again.
    fn verdict(&self, held: &Slot<S::Session>, now_ns: u64) -> Result<Reason, u64> {
        let (connection, limits) = (&held.connection, &self.core.limits);
        let times = match connection.blocked_ns() {
            // Nothing else counts while output is on its way to the client.
            Some(since_ns) => {
                [Some((later(since_ns, self.write_timeout()), Reason::WriteTimeout)), None, None]
            }
            None => {
                let parked_ns = connection.parked_ns();
                let lifetime = limits.lifetime.map(|it| (later(connection.accepted_ns, it), Reason::Aborted));
                let idle = limits.idle.map(|idle| (later(parked_ns, idle), Reason::IdleTimeout));
                let moment = || later(parked_ns, self.idle_moment());
                let drain = held.drain_at_ns.map(|at_ns| (at_ns.max(moment()), Reason::Drained));
                [lifetime, idle, drain]
            }
        };
        match times.into_iter().flatten().min_by_key(|(at_ns, _)| *at_ns) {
            Some((at_ns, reason)) if at_ns <= now_ns => Ok(reason),
            Some((at_ns, _)) => Err(at_ns),
            None => Err(u64::MAX),
        }
    }

    /// When a connection is to be reviewed at the latest: before the next of its times can run out, and soon
    /// if one has run out and a worker still holds the connection.
    fn next_review_ns(&self, slot: usize, now_ns: u64) -> u64 {
        let (connection, limits) = (&self.slots[slot].connection, &self.core.limits);
        let drain = matches!(self.stage, Stage::Draining(_)).then_some(IDLE_MOMENT);
        let write = self.write_timeout();
        let output = if connection.blocked_ns().is_some() { write / LOOKS } else { write };
        let longest = limits.idle.into_iter().chain(drain).fold(output, Duration::min);
        let end_ns = later(connection.accepted_ns, limits.lifetime.unwrap_or(Duration::MAX));
        let ahead_ns =
            if end_ns > now_ns { later(now_ns, longest).min(end_ns) } else { later(now_ns, longest) };
        ahead_ns.max(later(now_ns, SHORTEST_REVIEW))
    }

    fn write_timeout(&self) -> Duration {
        self.core.limits.write.max(SHORTEST_WRITE_TIMEOUT)
    }

    pub(super) fn schedule_next(&mut self, slot: usize, now_ns: u64) {
        self.schedule(slot, self.next_review_ns(slot, now_ns));
    }

    /// Ends a connection that is parked, unless its client has just sent something or has output to take.
    fn dismiss(&mut self, slot: usize, reason: Reason, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        if reason != Reason::WriteTimeout {
            let delivery = connection.hold().delivery();
            if delivery.pending {
                // From now on the write timeout counts.
                connection.watch_output(delivery, now_ns);
                return self.schedule_next(slot, now_ns);
            }
        }
        if !connection.gate.claim() {
            return self.schedule_next(slot, now_ns);
        }
        if reason != Reason::IdleTimeout && reason != Reason::Drained {
            return self.close(slot, reason, now_ns);
        }
        let mut held = connection.hold();
        if held.has_input() {
            drop(held);
            connection.gate.release_to_queue();
            self.submit(slot);
            return self.schedule(slot, later(now_ns, IDLE_MOMENT));
        }
        held.ending = Some(reason);
        held.shut_down_write();
        drop(held);
        self.begin_linger(slot, true, now_ns);
    }
}

/// Looks whether the client of a parked connection has taken some of the output that is watched. Returns `true` if it
/// has, and the server keeps more for it: the kernel reports room only when a third of its buffer is free, and may take
/// some before.
fn takes_kept_output<Session>(connection: &Connection<Session>, now_ns: u64) -> bool {
    if connection.blocked_ns().is_none() {
        return false;
    }
    let held = connection.hold();
    let delivery = held.delivery();
    if !delivery.pending && !held.owes() {
        connection.output_taken();
        connection.rest(now_ns);
        return false;
    }
    let takes = connection.has_taken_some(delivery);
    if takes {
        connection.watch_output(delivery, now_ns);
    }
    takes && held.owes()
}
