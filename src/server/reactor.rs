//! The reactor: one thread that waits for every connection and decides what happens to each.
//!
//! In each round it reads the workers' notes, turns readiness into jobs, acts on timers (`closing.rs`), moves the drain
//! along (`drain.rs`), and lets newcomers in. It blocks only in its one wait for events.
//!
//! # Serving connections itself
//!
//! The reactor never runs a service that may block. A service that [never blocks](Service::may_block) it runs itself when
//! it has nothing else to do. It then counts as one of the workers and takes jobs out of the queue as they do. After
//! [`HELP_TIME`] it looks at the sockets again. It wakes a worker only when many jobs wait or some are left. Every
//! connection that is ready has been queued before, so depth and age stay true.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use crossbeam_channel::Receiver;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use tracing::{debug, warn};

use super::closing::Linger;
use super::connection::Connection;
use super::door::{Door, Knock, Overload};
use super::drain::{Drain, cut_short};
use super::eviction::{self, Candidate, Output, Taken};
use super::gate::{Readiness, Ready, Standing};
use super::listening::set_keepalive;
use super::metrics::{AcceptFailure, Reason, Refusal};
use super::reaper::Reaper;
use super::report::Report;
use super::service::Service;
use super::turn::{Attendant, Job};
use super::{AT_EASE, Bound, Core, FULL, HEARTBEAT, Note, STARVED};
use crate::clock::later;
use crate::pool::{Helper, Patience, Workers, panic_message, quietly};

const LISTENER: Token = Token(usize::MAX);
pub(super) const WAKER: Token = Token(usize::MAX - 1);

/// Events taken from the kernel at a time.
const EVENTS: usize = 1024;

/// New connections accepted in a round, so that the open ones get their turn again. A round also accepts at most half the
/// connection limit. So with [`Overload::Evict`], the reactor sees a new connection's first message before others take
/// its place.
const ACCEPT_BATCH: usize = 64;

/// How long the reactor serves connections before it looks for events again: some tens of messages.
const HELP_TIME: Duration = Duration::from_micros(200);

/// While new connections wait because the queue is too old, the reactor looks at its age this often.
const RECHECK: Duration = Duration::from_millis(10);

/// While new connections wait for one that can be evicted, the reactor looks for it this often. A worker that parks a
/// connection does not wake the reactor. With 16 connections, 16,000 can come and go each second.
const EVICT_RECHECK: Duration = Duration::from_millis(1);

/// While connections may have to be evicted soon, the reactor looks this often whether their clients take output. It must
/// see that before many new connections arrive at once.
const EVICT_LOOK: Duration = Duration::from_millis(5);

/// A connection's place in the reactor's table.
pub(super) struct Slot<Session> {
    pub(super) connection: Arc<Connection<Session>>,
    /// The time of its entry among the reviews.
    pub(super) review_ns: u64,
    /// Set while the reactor waits for the client of the half-closed connection.
    pub(super) linger: Option<Linger>,
    /// Not to be closed as idle before this time; set in a drain.
    pub(super) drain_at_ns: Option<u64>,
    /// When to send again; set if the kernel had no memory for output.
    pub(super) retry_ns: Option<u64>,
    /// Used only where connections are evicted.
    taken: Taken,
}

impl<Session> Slot<Session> {
    /// Whether a worker or the queue has it.
    fn is_busy(&self) -> bool {
        self.connection.gate.standing() == Standing::Busy
    }

    /// What decides whether it is evicted. `None` if a worker, the queue or a note on its way holds it.
    fn candidate(&mut self, slot: usize, now_ns: u64) -> Option<Candidate> {
        let connection = &self.connection;
        let (ended, blocked) = match connection.gate.standing() {
            Standing::Parked => (false, connection.blocked_ns().is_some()),
            Standing::Closing if self.linger.is_some() => (true, false),
            _ => return None,
        };
        let held = connection.hold();
        let output =
            if ended || blocked { self.taken.look(held.delivery(), ended, now_ns) } else { Output::None };
        let progress_ns = if held.silent { connection.accepted_ns } else { connection.parked_ns() };
        Some(Candidate { slot, serial: connection.serial, output, progress_ns })
    }
}

/// How far the end has come.
pub(super) enum Stage {
    Serving,
    LameDuck { until_ns: u64 },
    Draining(Box<Drain>),
}

pub(super) struct Reactor<S: Service> {
    pub(super) core: Arc<Core>,
    service: Arc<S>,
    pub(super) pool: Workers<Job<S>>,
    /// This thread as a worker, where the service never blocks.
    helper: Option<Helper<Job<S>, Attendant<S>>>,
    /// Whether jobs were left in the queue when this thread last served as a worker.
    jobs_wait: bool,
    pub(super) door: Door,
    pub(super) poll: Poll,
    pub(super) inbox: Receiver<Note>,
    pub(super) slots: Slab<Slot<S::Session>>,
    /// When, and which slot: one for each connection, gone when the connection is.
    pub(super) reviews: BTreeSet<(u64, usize)>,
    pub(super) reaper: Reaper<S::Session>,
    next_serial: u64,
    /// When to look next whether clients take output; see [`EVICT_LOOK`].
    look_at_ns: u64,
    pub(super) stage: Stage,
}

impl<S: Service> Reactor<S> {
    pub(super) fn new(
        bound: Bound,
        service: Arc<S>,
        pool: Workers<Job<S>>,
        reaper: Reaper<S::Session>,
    ) -> io::Result<Self> {
        let Bound { core, settings, address: _, mut door, poll, inbox } = bound;
        door.register(poll.registry(), LISTENER)?;
        // The pool has one thread fewer than workers, and this thread has the last worker's number.
        let number = settings.workers - 1;
        let attendant = Attendant::new(Arc::clone(&core), Arc::clone(&service), number);
        let helper = pool.helper(attendant.on_reactor(reaper.sender()));
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
            reaper,
            next_serial: 0,
            look_at_ns: 0,
            stage: Stage::Serving,
        })
    }

    /// Runs the server until it has drained.
    pub(super) fn run(&mut self) -> Report {
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
                        // An error makes a socket "writable": a flush finds out what happened.
                        let failed = event.is_error();
                        let report = Readiness {
                            input: event.is_readable() || event.is_read_closed() || failed,
                            writable: event.is_writable() || event.is_write_closed() || failed,
                            read_on: event.is_read_closed() || event.is_priority() || failed,
                            reset: failed,
                        };
                        self.on_ready(slot, report, now_ns);
                    }
                }
            }
            self.review_due(now_ns);
            if self.advance(now_ns) {
                return self.finish();
            }
            accept_at_ns = [self.let_in(now_ns), self.look_at_output(now_ns)].into_iter().flatten().min();
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
                Stage::Draining(drain) => Some(drain.next_step_ns()),
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
                Note::Closed(slot, serial) if self.holds(slot, serial) => self.free(slot),
                Note::Linger(slot, serial) if self.holds(slot, serial) => {
                    self.begin_linger(slot, false, now_ns);
                }
                Note::Retry(slot, serial) if self.holds(slot, serial) => self.retry_later(slot, now_ns),
                Note::Dropped => self.reaper.note_dropped(),
                // The slot is free again, or another connection's.
                Note::Closed(..) | Note::Linger(..) | Note::Retry(..) => {}
            }
        }
    }

    /// Whether the slot is still this connection's.
    pub(super) fn holds(&self, slot: usize, serial: u64) -> bool {
        self.slots.get(slot).is_some_and(|held| held.connection.serial == serial)
    }

    fn on_ready(&mut self, slot: usize, report: Readiness, now_ns: u64) {
        // A slot that was freed in this round is filled again only at its end, when all events were handled. Later
        // rounds have no events of a socket that is closed.
        let Some(held) = self.slots.get(slot) else { return };
        match held.connection.gate.ready(report) {
            Ready::Submit => self.submit(slot),
            Ready::Noted => {}
            Ready::Linger => self.linger(slot, now_ns),
        }
    }

    pub(super) fn submit(&self, slot: usize) {
        let job = Arc::clone(&self.slots[slot].connection);
        let admitted = if self.helper.is_some() {
            self.pool.admit(job, Patience::None)
        } else {
            self.pool.submit(job, Patience::None)
        };
        assert!(admitted.is_ok(), "the queue holds every connection once, and drains after the reactor");
    }

    /// Serves connections as a worker does.
    fn lend_a_hand(&mut self) {
        let Some(helper) = &mut self.helper else { return };
        let until_ns = later(self.core.clock.now_ns(), HELP_TIME);
        self.jobs_wait = helper.help(|now_ns| now_ns >= until_ns);
    }

    /// Closes a connection that no worker holds.
    pub(super) fn close(&mut self, slot: usize, reason: Reason, now_ns: u64) {
        let connection = Arc::clone(&self.slots[slot].connection);
        if let Some(session) = self.core.close(&connection, reason, &self.core.ledger.reactor, now_ns) {
            self.reaper.take(session);
        }
        self.free(slot);
    }

    pub(super) fn free(&mut self, slot: usize) {
        let held = self.slots.remove(slot);
        self.reviews.remove(&(held.review_ns, slot));
        if held.linger.is_some() {
            self.core.ledger.closing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    // Accepting.

    /// Whether no place is left. A session that is not dropped yet takes a place too, so slow destructors bound the memory.
    fn is_full(&self) -> bool {
        self.slots.len() + self.reaper.pending() >= self.core.max_connections
    }

    /// Whether sessions that are not dropped yet keep new connections out. There are never more of them than places.
    fn awaits_sessions(&self) -> bool {
        let (most, pending) = (self.core.max_connections, self.reaper.pending());
        self.is_full() && (self.slots.len() < most || pending >= most)
    }

    /// Accepts new connections, as many as a round may. Returns when to try again, unless an event will tell.
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
                // If there is room, a drain serves every connection in the listen queue.
                _ if draining && self.is_full() => return None,
                Overload::Wait if self.is_full() => return None,
                Overload::Reject if self.is_full() => Some(Refusal::Limit),
                Overload::Reject if overloaded => Some(Refusal::Overload),
                // An eviction would not shorten the queue, so with `Evict` new connections wait too.
                _ if overloaded => return Some(later(now_ns, RECHECK)),
                // An eviction would free no place: a session that is being dropped takes it.
                Overload::Evict if self.awaits_sessions() => return Some(later(now_ns, EVICT_RECHECK)),
                Overload::Evict if self.is_full() => {
                    spare = self.spare(now_ns);
                    if spare.is_none() {
                        return Some(later(now_ns, EVICT_RECHECK));
                    }
                    None
                }
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

    /// Counts a new connection that is refused. Its socket is dropped.
    fn refuse(&self, peer: SocketAddr, refusal: Refusal) {
        self.core.ledger.rejected(refusal);
        debug!(%peer, ?refusal, "refused");
    }

    fn is_overloaded(&self) -> bool {
        self.core.limits.queue_wait.is_some_and(|limit| self.pool.oldest_age() > limit)
    }

    /// Opens a new connection, in the place of the connection `spare` if there is one.
    fn admit(&mut self, mut stream: TcpStream, peer: SocketAddr, spare: Option<Candidate>, now_ns: u64) {
        // The kernel sends an answer at once, and does not wait for more to fill a packet. If this fails, answers are slower.
        let _ = stream.set_nodelay(true);
        // Without keepalive, other timeouts still close most connections of vanished clients.
        let _ = self.core.keepalive_on_accept.map(|time| set_keepalive(&stream, time));
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
        let entry = self.slots.vacant_entry();
        let slot = entry.key();
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        if let Err(error) = self.poll.registry().register(&mut stream, Token(slot), interest) {
            // Out of kernel memory, or over the user's limit of watched descriptors.
            self.core.ledger.accept_failed(AcceptFailure::Other);
            if let Some(left_out) = self.core.panic_log.allow(now_ns) {
                warn!(%peer, %error, left_out, "cannot watch a new connection; it is closed");
            }
            return self.reaper.take(session);
        }
        self.next_serial += 1;
        let connection = Arc::new(Connection::new((slot, self.next_serial), stream, peer, session, now_ns));
        debug!(%peer, "accepted");
        let draining = matches!(self.stage, Stage::Draining(_));
        entry.insert(Slot {
            connection,
            review_ns: 0,
            linger: None,
            drain_at_ns: draining.then_some(now_ns),
            retry_ns: None,
            taken: Taken::default(),
        });
        // After all steps that can fail, and before the new connection counts, so that no reading shows one too many.
        if let Some(spare) = spare {
            self.evict(spare, now_ns);
        }
        self.core.ledger.accepted.add(1);
        self.schedule_next(slot, now_ns);
    }

    /// Sees which clients take output, as long as every new connection takes another's place. Returns when to look again.
    fn look_at_output(&mut self, now_ns: u64) -> Option<u64> {
        if self.core.overload != Overload::Evict || !self.is_full() {
            return None;
        }
        if now_ns >= self.look_at_ns {
            self.look_at_ns = later(now_ns, EVICT_LOOK);
            for (slot, held) in &mut self.slots {
                let _ = held.candidate(slot, now_ns);
            }
        }
        Some(self.look_at_ns)
    }

    /// The connection to close for a new one, as [`eviction`] decides. Before a connection whose input nobody has looked at
    /// could be closed, it is queued instead.
    fn spare(&mut self, now_ns: u64) -> Option<Candidate> {
        for _ in 0..ACCEPT_BATCH {
            let candidates = self.slots.iter_mut().filter_map(|(slot, held)| held.candidate(slot, now_ns));
            let spare = eviction::choose(candidates, now_ns)?;
            // A worker is about to let go of a connection that costs its client less.
            if spare.is_taking(now_ns) && self.slots.iter().any(|(_, held)| held.is_busy()) {
                return None;
            }
            let connection = &self.slots[spare.slot].connection;
            // A parked connection stays parked until the reactor, this thread, claims or queues it.
            if spare.output != Output::None || !connection.hold().has_input() {
                return Some(spare);
            }
            if connection.gate.ready(Readiness { input: true, ..Readiness::default() }) == Ready::Submit {
                self.submit(spare.slot);
            }
        }
        None
    }

    /// Closes the connection that [`spare`](Self::spare) has chosen.
    fn evict(&mut self, spare: Candidate, now_ns: u64) {
        let connection = Arc::clone(&self.slots[spare.slot].connection);
        let mut reason = cut_short(&self.slots[spare.slot]);
        if spare.is_stuck() {
            // Otherwise the kernel would keep the output for minutes, for a client that may never read it.
            connection.hold().reset_at_close();
            reason = Reason::Aborted;
        }
        if connection.gate.standing() == Standing::Closing || connection.gate.claim() {
            self.close(spare.slot, reason, now_ns);
        }
    }

    /// Publishes to the handles why the server accepts no new connection.
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
}
