//! The reactor: one thread that waits for every connection and decides what happens to each.
//!
//! Each time round it reads the workers' notes, turns readiness into jobs, acts on timers, moves the drain
//! along, and lets newcomers in. It never blocks but in its one wait.
//!
//! # Lending a hand
//!
//! It never runs a service that may block. One that [does not](Service::may_block) it runs itself when it has nothing
//! else to do: it is then one of the workers, takes jobs out of the queue as they do, for [`HELP_TIME`] at most
//! before it looks at the sockets again, and wakes another only when many wait or some are left. Every connection
//! that is ready has been queued before, so depth and age are as true as ever.
//!
//! # Timers
//!
//! A connection has one *review* ahead of it. A review looks at the times the connection's holder
//! left (when it was parked, since when it is blocked) and closes it or sets the next review, so that traffic
//! costs no timer operation. A review comes at least once in the shortest of the timeouts, so a stall that
//! begins just after one is seen by the next, in time to close the connection at the exact moment.
//!
//! # Drain
//!
//! Who stands in the backlog is accepted as there is room; when it is found empty, the listener is closed, and a
//! handshake under way at that moment is refused (which is what the lame duck is for). Until then the kernel is told to
//! let no more than one at a time into it, and after [`IDLE_MOMENT`] nobody. A listener that others hold too is not
//! touched: it is closed when its backlog is found empty, or after [`IDLE_MOMENT`], and who comes later is theirs. Connections at work go on. A connection is closed when nothing is left to read and it
//! has been silent for [`IDLE_MOMENT`]; those silent at the start are closed one after another,
//! [`SPREAD_STEP`] apart, but within half the drain timeout, so that their clients do not all reconnect in
//! the same instant. At the deadline the rest is cut. A worker still inside the service then closes its
//! connection afterwards, if the process lives that long.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use tracing::{debug, warn};

use super::connection::{Connection, Sent};
use super::door::{Door, Knock, Overload};
use super::gate::{Cut, Readiness, Ready, Standing};
use super::metrics::{AcceptFailure, Reason, Refusal, Totals};
use super::service::Service;
use super::turn::{Attendant, Job};
use super::{AT_EASE, Bound, Core, FULL, HEARTBEAT, Note, STARVED};
use crate::clock::{later, ns};
use crate::lifecycle::Phase;
use crate::pool::{Helper, Patience, Workers, panic_message, quietly, remaining};

const LISTENER: Token = Token(usize::MAX);
pub(super) const WAKER: Token = Token(usize::MAX - 1);

/// Events taken from the kernel at a time.
const EVENTS: usize = 1024;

/// Newcomers let in before the connections there are get their turn again. It is also at most half the
/// connection limit, so that with [`Overload::Evict`] a newcomer's first message is seen before others push
/// it out.
const ACCEPT_BATCH: usize = 64;

/// How long a connection is silent in a drain before it counts as idle: longer than a client takes between
/// reading one answer and sending its next message.
const IDLE_MOMENT: Duration = Duration::from_millis(250);

/// How long the reactor serves connections before it looks for events again: some tens of messages.
const HELP_TIME: Duration = Duration::from_micros(200);

/// In a drain with many connections it is this much for each that is open, up to a quarter of the drain
/// timeout: where many talk at once, each is silent while the others have their turn.
const IDLE_SHARE: Duration = Duration::from_millis(2);

/// The least time between two reviews of a connection, whatever the timeouts.
const SHORTEST_REVIEW: Duration = Duration::from_millis(1);

/// Between the closes of connections that were silent when the drain began.
const SPREAD_STEP: Duration = Duration::from_millis(1);

/// How long a half-closed connection waits for the client's end. Data on its way either way arrives in less,
/// or is not going to.
const LINGER: Duration = Duration::from_secs(1);

/// Bytes of a lingering client discarded before others get their turn.
const DISCARDED_AT_ONCE: usize = 256 * 1024;

/// With newcomers waiting for the queue to grow younger, or for a connection that can be evicted, these are
/// looked at this often.
const RECHECK: Duration = Duration::from_millis(10);

/// After the deadline of a drain, the time for workers that are not stuck to close what was cut.
const CUT_GRACE: Duration = Duration::from_millis(100);

/// How a server's life ended.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections open when the drain began, or taken from the backlog after it.
    pub in_drain: u64,
    /// Of these, the ones that ended as their client or the service wished.
    pub served: u64,
    /// Of these, the ones that were idle and were closed by the server.
    pub closed_idle: u64,
    /// Of these, the ones that ended by a failure of the connection or a panic of the service.
    pub failed: u64,
    /// Of these, the ones that were cut: at the deadline, newcomers then still in the backlog included, or
    /// because the client did not take its output within the write timeout.
    pub cut: u64,
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
    /// Whether nothing was cut.
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
             drained in {:.3} s; {} connections, {} bytes in and {} bytes out in {:.3} s of uptime",
            self.in_drain,
            self.served,
            self.closed_idle,
            self.failed,
            self.cut,
            self.drain.as_secs_f64(),
            self.accepted,
            self.received,
            self.sent,
            self.uptime.as_secs_f64(),
        )
    }
}

/// A connection's place in the reactor's table.
struct Slot<Session> {
    connection: Arc<Connection<Session>>,
    /// The time of its entry among the reviews.
    review_ns: u64,
    /// When to stop waiting for the client's end; set while the connection is closing.
    linger_until_ns: Option<u64>,
    /// Not to be closed as idle before this time; set in a drain.
    drain_at_ns: Option<u64>,
}

/// How far the end has come.
enum Stage {
    Serving,
    LameDuck { until_ns: u64 },
    Draining(Box<Drain>),
}

struct Drain {
    started_ns: u64,
    deadline_ns: u64,
    /// The totals when it began.
    before: Totals,
    /// Nobody new gets into the backlog any more; see [`Door::seal`].
    sealed: bool,
}

pub(super) struct Reactor<S: Service> {
    core: Arc<Core>,
    service: Arc<S>,
    pool: Workers<Job<S>>,
    /// This thread as a worker, where the service never blocks.
    helper: Option<Helper<Job<S>, Attendant<S>>>,
    /// Whether jobs waited when it last lent a hand.
    jobs_wait: bool,
    door: Door,
    poll: Poll,
    inbox: Receiver<Note>,
    slots: Slab<Slot<S::Session>>,
    /// When, and which slot: one for each connection, gone when the connection is.
    reviews: BTreeSet<(u64, usize)>,
    next_serial: u64,
    stage: Stage,
}

impl<S: Service> Reactor<S> {
    pub(super) fn new(bound: Bound, service: Arc<S>, pool: Workers<Job<S>>) -> io::Result<Self> {
        let Bound { core, settings, address: _, mut door, poll, inbox } = bound;
        door.register(poll.registry(), LISTENER)?;
        // Its number is that of the worker thread there is not.
        let number = settings.workers - 1;
        let attendant = Attendant::new(Arc::clone(&core), Arc::clone(&service), number);
        let helper = pool.helper(attendant.in_passing());
        Ok(Reactor {
            core,
            service,
            pool,
            helper,
            jobs_wait: false,
            door,
            poll,
            inbox,
            slots: Slab::new(),
            reviews: BTreeSet::new(),
            next_serial: 0,
            stage: Stage::Serving,
        })
    }

    /// Runs the server until it has drained.
    pub(super) fn run(mut self) -> Report {
        let mut events = Events::with_capacity(EVENTS);
        let mut accept_at_ns = Some(0);
        loop {
            self.wait(&mut events, accept_at_ns);
            let now_ns = self.core.clock.now_ns();
            self.core.heartbeat_ns.store(now_ns, Ordering::Relaxed);
            self.read_notes(now_ns);
            for event in &events {
                match event.token() {
                    LISTENER => self.door.ready = true,
                    WAKER => {}
                    Token(slot) => {
                        // Errors and a reset make a socket "writable": a flush learns what happened.
                        let report = Readiness {
                            input: event.is_readable() || event.is_read_closed() || event.is_error(),
                            writable: event.is_writable() || event.is_error() || event.is_write_closed(),
                            read_on: event.is_read_closed() || event.is_error() || event.is_priority(),
                        };
                        self.on_ready(slot, report, now_ns);
                    }
                }
            }
            self.review_due(now_ns);
            if self.advance(now_ns) {
                return self.finish();
            }
            accept_at_ns = self.let_in(now_ns);
            self.publish_strain();
            self.lend_a_hand();
        }
    }

    /// Sleeps until something happens or is due.
    fn wait(&mut self, events: &mut Events, accept_at_ns: Option<u64>) {
        let draining = matches!(self.stage, Stage::Draining(_));
        // See `Core::notify`: raise the flag, then look for notes once more, then sleep.
        let wants_notes = draining || self.is_full();
        self.core.wants_notes.store(wants_notes, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let now_ns = self.core.clock.now_ns();
        let timeout = if self.jobs_wait || wants_notes && !self.inbox.is_empty() {
            Duration::ZERO
        } else {
            let stage_ns = match &self.stage {
                Stage::Serving => None,
                Stage::LameDuck { until_ns } => Some(*until_ns),
                Stage::Draining(drain) if !drain.sealed => {
                    Some(later(drain.started_ns, IDLE_MOMENT).min(drain.deadline_ns))
                }
                Stage::Draining(drain) => Some(drain.deadline_ns),
            };
            let review_ns = self.reviews.first().map(|(at_ns, _)| *at_ns);
            [stage_ns, review_ns, accept_at_ns, self.door.paused_until_ns()]
                .into_iter()
                .flatten()
                .map(|at_ns| Duration::from_nanos(at_ns.saturating_sub(now_ns)))
                .fold(HEARTBEAT, Duration::min)
        };
        if let Err(error) = self.poll.poll(events, Some(timeout)) {
            events.clear();
            assert!(error.kind() == io::ErrorKind::Interrupted, "waiting for events failed: {error}");
        }
    }

    fn read_notes(&mut self, now_ns: u64) {
        while let Ok(note) = self.inbox.try_recv() {
            match note {
                Note::Closed(slot, serial) => {
                    if self.holds(slot, serial) {
                        self.free(slot);
                    }
                }
                Note::Linger(slot, serial) => {
                    if self.holds(slot, serial) {
                        self.begin_linger(slot, now_ns);
                    }
                }
            }
        }
    }

    /// Whether the slot is still this connection's.
    fn holds(&self, slot: usize, serial: u64) -> bool {
        self.slots.get(slot).is_some_and(|held| held.connection.serial == serial)
    }

    fn on_ready(&mut self, slot: usize, report: Readiness, now_ns: u64) {
        // An event may be older than the slot's connection. Reported to the wrong one, it costs a look.
        let Some(held) = self.slots.get(slot) else { return };
        match held.connection.gate.ready(report) {
            Ready::Submit => self.submit(slot),
            Ready::Noted => {}
            Ready::Linger => self.linger(slot, now_ns),
        }
    }

    fn submit(&self, slot: usize) {
        let job = Arc::clone(&self.slots[slot].connection);
        let admitted = if self.helper.is_some() {
            self.pool.admit(job, Patience::None)
        } else {
            self.pool.submit(job, Patience::None)
        };
        assert!(admitted.is_ok(), "the queue holds every connection once, and drains after the reactor");
    }

    /// Serves connections, or has them served.
    fn lend_a_hand(&mut self) {
        let Some(helper) = &mut self.helper else { return };
        let until_ns = later(self.core.clock.now_ns(), HELP_TIME);
        self.jobs_wait = helper.help(|now_ns| now_ns >= until_ns);
    }

    // Closing.

    /// Waits for the client's end of a connection whose write side is shut down.
    fn begin_linger(&mut self, slot: usize, now_ns: u64) {
        let lifetime = self.core.limits.lifetime.unwrap_or(Duration::MAX);
        let until_ns = later(now_ns, LINGER).min(later(self.slots[slot].connection.accepted_ns, lifetime));
        if self.slots[slot].linger_until_ns.replace(until_ns).is_none() {
            self.core.ledger.closing.fetch_add(1, Ordering::Relaxed);
        }
        self.schedule(slot, until_ns.max(now_ns));
        self.linger(slot, now_ns);
    }

    /// Discards what a half-closed client still sends, and closes the connection at its end.
    fn linger(&mut self, slot: usize, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        let mut sink = Vec::with_capacity(DISCARDED_AT_ONCE / 16);
        let mut held = connection.hold();
        for _ in 0..16 {
            sink.clear();
            match held.read(&mut sink) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => {
                    let reason = held.ending.take();
                    drop(held);
                    return self.close(slot, reason.unwrap_or(Reason::Client), now_ns);
                }
            }
        }
        drop(held);
        // The kernel reports nothing new before the socket was emptied. The deadline ends it in any case.
        self.schedule(slot, later(now_ns, Duration::from_millis(1)));
    }

    /// Closes a connection that nobody else holds.
    fn close(&mut self, slot: usize, reason: Reason, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        self.core.close(&connection, reason, &self.core.ledger.reactor, now_ns);
        self.free(slot);
    }

    fn free(&mut self, slot: usize) {
        let held = self.slots.remove(slot);
        self.reviews.remove(&(held.review_ns, slot));
        if held.linger_until_ns.is_some() {
            self.core.ledger.closing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    // Timers.

    /// Sets the connection's next review, in place of the one ahead of it.
    fn schedule(&mut self, slot: usize, at_ns: u64) {
        let held = &mut self.slots[slot];
        self.reviews.remove(&(held.review_ns, slot));
        held.review_ns = at_ns;
        self.reviews.insert((at_ns, slot));
    }

    fn review_due(&mut self, now_ns: u64) {
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
            Standing::Closing => match held.linger_until_ns {
                Some(until_ns) if now_ns >= until_ns => {
                    let reason = held.connection.hold().ending;
                    self.close(slot, reason.unwrap_or(Reason::Client), now_ns);
                }
                Some(until_ns) => {
                    self.schedule(slot, until_ns);
                    self.linger(slot, now_ns);
                }
                // The worker's note is on its way.
                None => self.schedule_next(slot, now_ns),
            },
            Standing::Parked => match self.verdict(held, now_ns) {
                Err(at_ns) => self.schedule(slot, at_ns.min(self.next_review_ns(slot, now_ns))),
                Ok(reason) => self.dismiss(slot, reason, now_ns),
            },
        }
    }

    /// Why a parked connection is to be closed now, or when to ask again.
    fn verdict(&self, held: &Slot<S::Session>, now_ns: u64) -> Result<Reason, u64> {
        let (accepted_ns, parked_ns) = (held.connection.accepted_ns, held.connection.parked_ns());
        let lifetime =
            self.core.limits.lifetime.map(|lifetime| (later(accepted_ns, lifetime), Reason::Aborted));
        let blocked_ns = held.connection.blocked_ns();
        let timeout = match blocked_ns {
            Some(since_ns) => Some((later(since_ns, self.core.limits.write), Reason::WriteTimeout)),
            None => self.core.limits.idle.map(|idle| (later(parked_ns, idle), Reason::IdleTimeout)),
        };
        // Blocked output is still on its way to the client: that is not idle.
        let drain = held
            .drain_at_ns
            .filter(|_| blocked_ns.is_none())
            .map(|at_ns| (at_ns.max(later(parked_ns, self.idle_moment())), Reason::Drained));
        match [lifetime, timeout, drain].into_iter().flatten().min_by_key(|(at_ns, _)| *at_ns) {
            Some((at_ns, reason)) if at_ns <= now_ns => Ok(reason),
            Some((at_ns, _)) => Err(at_ns),
            None => Err(u64::MAX),
        }
    }

    /// When a connection is to be reviewed at the latest: before the next of its times can run out, and soon
    /// when one has and a worker still holds it.
    fn next_review_ns(&self, slot: usize, now_ns: u64) -> u64 {
        let drain = matches!(self.stage, Stage::Draining(_)).then_some(IDLE_MOMENT);
        let longest =
            self.core.limits.idle.into_iter().chain(drain).fold(self.core.limits.write, Duration::min);
        let end_ns = later(
            self.slots[slot].connection.accepted_ns,
            self.core.limits.lifetime.unwrap_or(Duration::MAX),
        );
        later(now_ns, longest).min(end_ns).max(later(now_ns, SHORTEST_REVIEW))
    }

    fn schedule_next(&mut self, slot: usize, now_ns: u64) {
        self.schedule(slot, self.next_review_ns(slot, now_ns));
    }

    /// How long a connection is silent in a drain before it is closed as idle.
    fn idle_moment(&self) -> Duration {
        let open = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        IDLE_SHARE.saturating_mul(open).min(self.core.limits.drain / 4).max(IDLE_MOMENT)
    }

    /// Closes a connection that was parked a moment ago, unless its client has just sent something.
    fn dismiss(&mut self, slot: usize, reason: Reason, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        // Silent, and still to receive what it was sent: it reads slowly, and is waited for until the deadline. The kernel
        // does not say whether it takes anything, so the write timeout is not for it.
        let draining = matches!(self.stage, Stage::Draining(_));
        if draining
            && matches!(reason, Reason::Drained | Reason::IdleTimeout)
            && !connection.hold().is_taken()
        {
            return self.schedule(slot, later(now_ns, self.idle_moment()));
        }
        if !connection.gate.claim() {
            return self.schedule_next(slot, now_ns);
        }
        let mut held = connection.hold();
        match reason {
            Reason::IdleTimeout | Reason::Drained if held.has_input() => {
                drop(held);
                connection.gate.release_to_queue();
                self.submit(slot);
                self.schedule(slot, later(now_ns, IDLE_MOMENT));
            }
            Reason::WriteTimeout => match held.flush() {
                // The kernel reports room only when a good part of its buffer is free. A slow reader may have
                // made some, and is no stalled one.
                Ok((sent, bytes)) if bytes > 0 => {
                    self.core.ledger.reactor.sent.add(bytes as u64);
                    connection.set_blocked((sent == Sent::Blocked).then_some(now_ns));
                    drop(held);
                    connection.gate.release_to_queue();
                    self.submit(slot);
                    self.schedule_next(slot, now_ns);
                }
                outcome => {
                    drop(held);
                    self.close(slot, if outcome.is_ok() { reason } else { Reason::Error }, now_ns);
                }
            },
            Reason::IdleTimeout | Reason::Drained => {
                held.ending = Some(reason);
                held.shut_down_write();
                drop(held);
                self.begin_linger(slot, now_ns);
            }
            // A connection that has outlived its time is not waited for.
            _ => {
                drop(held);
                self.close(slot, reason, now_ns);
            }
        }
    }

    // The door.

    fn is_full(&self) -> bool {
        self.slots.len() >= self.core.max_connections
    }

    /// Lets newcomers in, as many as may. Returns when to try again, if that is not for an event to say.
    fn let_in(&mut self, now_ns: u64) -> Option<u64> {
        let draining = matches!(self.stage, Stage::Draining(_));
        let batch = ACCEPT_BATCH.min(self.core.max_connections.div_ceil(2));
        let mut overloaded = None;
        for _ in 0..batch {
            if !self.door.may_accept(now_ns) {
                return None;
            }
            let overloaded = !draining && *overloaded.get_or_insert_with(|| self.is_overloaded());
            let mut spare = None;
            let refusal = match self.core.overload {
                // A drain serves whomever it finds in the backlog, when there is room.
                _ if draining && self.is_full() => return None,
                Overload::Wait if self.is_full() => return None,
                Overload::Reject if self.is_full() => Some(Refusal::Limit),
                Overload::Reject if overloaded => Some(Refusal::Overload),
                // Closing silent connections would not shorten the queue, so with `Evict` newcomers wait too.
                _ if overloaded => return Some(later(now_ns, RECHECK)),
                Overload::Evict if self.is_full() => match self.spare() {
                    Some(slot) => {
                        spare = Some(slot);
                        None
                    }
                    None => return Some(later(now_ns, RECHECK)),
                },
                _ => None,
            };
            match self.door.accept(&self.core.ledger, now_ns) {
                Knock::Newcomer(stream, peer) => match refusal {
                    None => self.admit(stream, peer, spare, now_ns),
                    Some(refusal) => self.refuse(peer, refusal),
                },
                Knock::Vanished => {}
                Knock::Nobody if draining => {
                    self.door.close(self.poll.registry());
                    return Some(now_ns);
                }
                Knock::Nobody | Knock::Paused => return None,
            }
        }
        Some(now_ns)
    }

    /// Counts a newcomer whose socket is dropped.
    fn refuse(&self, peer: SocketAddr, refusal: Refusal) {
        self.core.ledger.rejected(refusal);
        debug!(%peer, ?refusal, "refused");
    }

    fn is_overloaded(&self) -> bool {
        self.core.limits.queue_wait.is_some_and(|limit| self.pool.oldest_age() > limit)
    }

    /// Takes a newcomer in, in the place of the connection `spare` where there is one.
    fn admit(&mut self, mut stream: TcpStream, peer: SocketAddr, spare: Option<usize>, now_ns: u64) {
        // An answer goes out at once, not when more of it could fill a packet. Failing that, it is slower.
        let _ = stream.set_nodelay(true);
        let service = &self.service;
        let session = match catch_unwind(AssertUnwindSafe(|| service.open(peer))) {
            Ok(session) => session,
            Err(payload) => {
                self.core.ledger.accept_failed(AcceptFailure::Other);
                if let Some(left_out) = self.core.panic_log.allow(now_ns) {
                    let panic = panic_message(&*payload);
                    warn!(%peer, panic, left_out, "the service panicked at a new connection; it is closed");
                }
                return quietly(|| drop(payload));
            }
        };
        if let Some(slot) = spare {
            self.evict(slot, now_ns);
        }
        let entry = self.slots.vacant_entry();
        let slot = entry.key();
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        if let Err(error) = self.poll.registry().register(&mut stream, Token(slot), interest) {
            // Out of kernel memory, or over the user's limit of watched descriptors.
            self.core.ledger.accept_failed(AcceptFailure::Other);
            if let Some(left_out) = self.core.panic_log.allow(now_ns) {
                warn!(%peer, %error, left_out, "cannot watch a new connection; it is closed");
            }
            return quietly(|| drop(session));
        }
        self.next_serial += 1;
        let connection = Arc::new(Connection::new((slot, self.next_serial), stream, peer, session, now_ns));
        debug!(%peer, "accepted");
        let draining = matches!(self.stage, Stage::Draining(_));
        entry.insert(Slot {
            connection,
            review_ns: 0,
            linger_until_ns: None,
            drain_at_ns: draining.then_some(now_ns),
        });
        self.core.ledger.accepted.add(1);
        self.schedule_next(slot, now_ns);
    }

    /// The oldest connection that can be spared for a newcomer: no worker has it, and nothing waits to be
    /// sent to it. One whose client has said something that was not looked at yet is not spared, and is
    /// looked at first.
    fn spare(&self) -> Option<usize> {
        for _ in 0..ACCEPT_BATCH {
            let candidates = self.slots.iter().filter(|(_, held)| match held.connection.gate.standing() {
                Standing::Parked => held.connection.blocked_ns().is_none(),
                Standing::Closing => held.linger_until_ns.is_some(),
                _ => false,
            });
            let (slot, held) = candidates.min_by_key(|(_, held)| held.connection.serial)?;
            let gate = &held.connection.gate;
            // A parked connection stays so until the reactor, this thread, makes it something else.
            if gate.standing() == Standing::Closing || !held.connection.hold().has_input() {
                return Some(slot);
            }
            if gate.ready(Readiness { input: true, ..Readiness::default() }) == Ready::Submit {
                self.submit(slot);
            }
        }
        None
    }

    /// Closes the connection that [`spare`](Self::spare) named.
    fn evict(&mut self, slot: usize, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        let reason = cut_short(&connection);
        if reason != Reason::Aborted || connection.gate.claim() {
            self.close(slot, reason, now_ns);
        }
    }

    /// Says to handles what keeps newcomers out.
    fn publish_strain(&self) {
        let strain = if self.door.is_starved() {
            STARVED
        } else if self.is_full() && self.core.overload != Overload::Evict {
            FULL
        } else {
            AT_EASE
        };
        self.core.strain.store(strain, Ordering::Relaxed);
    }

    // The end.

    /// Moves from stage to stage. `true` when there is nothing left to wait for.
    fn advance(&mut self, now_ns: u64) -> bool {
        if let Stage::Serving = self.stage
            && self.core.lifecycle.drain_requested()
        {
            let until_ns = later(now_ns, self.core.limits.lame_duck);
            self.core.lifecycle.start_lame_duck(until_ns);
            debug!(lame_duck = ?self.core.limits.lame_duck, "not ready for new work, and still taking it");
            self.stage = Stage::LameDuck { until_ns };
        }
        if let Stage::LameDuck { until_ns } = self.stage
            && now_ns >= until_ns
        {
            self.begin_drain(now_ns);
        }
        match &mut self.stage {
            Stage::Draining(drain) => {
                if !drain.sealed && now_ns >= later(drain.started_ns, IDLE_MOMENT) {
                    drain.sealed = true;
                    self.door.seal(self.poll.registry());
                }
                (self.slots.is_empty() && !self.door.is_open()) || now_ns >= drain.deadline_ns
            }
            _ => false,
        }
    }

    fn begin_drain(&mut self, now_ns: u64) {
        let deadline_ns = later(now_ns, self.core.limits.drain);
        self.core.lifecycle.start_drain(self.core.limits.drain, deadline_ns);
        self.door.stop_listening();
        self.stage = Stage::Draining(Box::new(Drain {
            started_ns: now_ns,
            deadline_ns,
            before: self.core.ledger.totals(),
            sealed: false,
        }));
        debug!(open = self.slots.len(), timeout = ?self.core.limits.drain, "draining");
        let step_ns = ns(SPREAD_STEP).min(ns(self.core.limits.drain) / 2 / self.slots.len().max(1) as u64);
        let moment = self.idle_moment();
        let slots: Vec<usize> = self.slots.iter().map(|(slot, _)| slot).collect();
        for (place, slot) in slots.into_iter().enumerate() {
            let held = &mut self.slots[slot];
            let idle_at_ns = now_ns.max(later(held.connection.parked_ns(), moment));
            let drain_at_ns = idle_at_ns.saturating_add(step_ns * place as u64);
            held.drain_at_ns = Some(drain_at_ns);
            if held.linger_until_ns.is_none() {
                self.schedule(slot, drain_at_ns.min(later(now_ns, IDLE_MOMENT)));
            }
        }
        // One more look at the backlog, whether or not the kernel reports it.
        self.door.ready = true;
    }

    /// Cuts what is left, sends the workers home, and reports.
    fn finish(mut self) -> Report {
        let Stage::Draining(drain) = std::mem::replace(&mut self.stage, Stage::Serving) else {
            unreachable!("only a drain ends");
        };
        let now_ns = self.core.clock.now_ns();
        let mut refused = 0;
        self.door.seal(self.poll.registry());
        loop {
            match self.door.accept(&self.core.ledger, now_ns) {
                Knock::Newcomer(..) => {
                    self.core.ledger.rejected(Refusal::Draining);
                    refused += 1;
                }
                Knock::Vanished => {}
                Knock::Nobody | Knock::Paused => break,
            }
        }
        self.door.close(self.poll.registry());
        for slot in self.slots.iter().map(|(slot, _)| slot).collect::<Vec<_>>() {
            let connection = Arc::clone(&self.slots[slot].connection);
            let reason = cut_short(&connection);
            match connection.gate.cut() {
                Cut::Caller => self.close(slot, reason, now_ns),
                Cut::Worker | Cut::Nobody => {}
            }
        }
        // Those in a worker's hands: between two system calls it lets go at once; inside a service, when that
        // returns.
        let start = Instant::now();
        while !self.slots.is_empty()
            && let Ok(note) = self.inbox.recv_timeout(remaining(start, CUT_GRACE))
        {
            let (Note::Closed(slot, serial) | Note::Linger(slot, serial)) = note;
            if self.holds(slot, serial) {
                self.free(slot);
            }
        }
        let drained = if self.slots.is_empty() { self.pool.drain(CUT_GRACE) } else { self.pool.abort() };
        debug!(?drained, "workers sent home");

        let now_ns = self.core.clock.now_ns();
        let (before, totals) = (&drain.before, self.core.ledger.totals());
        let since = |reasons: &[Reason]| -> u64 {
            reasons.iter().map(|reason| totals.closed(*reason) - before.closed(*reason)).sum()
        };
        let stuck = totals.accepted - totals.closed_in_all();
        let report = Report {
            accepted: totals.accepted,
            in_drain: totals.accepted - before.closed_in_all() + refused,
            served: since(&[Reason::Client, Reason::Service]),
            closed_idle: since(&[Reason::Drained, Reason::IdleTimeout]),
            failed: since(&[Reason::Error, Reason::Panicked]),
            cut: since(&[Reason::Aborted, Reason::WriteTimeout]) + stuck + refused,
            received: totals.received,
            sent: totals.sent,
            drain: Duration::from_nanos(now_ns - drain.started_ns),
            uptime: Duration::from_nanos(now_ns),
        };
        self.core.lifecycle.enter(Phase::Stopped);
        report
    }
}

/// Why a connection is closed that is not waited for: one that was lingered on has had everything, and the
/// end.
fn cut_short<Session>(connection: &Connection<Session>) -> Reason {
    match connection.gate.standing() {
        Standing::Closing => connection.hold().ending.unwrap_or(Reason::Aborted),
        _ => Reason::Aborted,
    }
}
