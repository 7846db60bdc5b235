//! The end of a server: the stages from lame duck to stop, and the report.
//!
//! # The drain
//!
//! - Connections in the listen queue are still accepted, as there is room. When the queue is found empty, the listener
//!   is closed. A handshake that is under way at that moment is refused; the lame duck exists to avoid that. Until then the
//!   kernel lets one new connection at a time into the queue, and after [`IDLE_MOMENT`] none.
//! - A listener that others hold too is not touched. It is closed when its queue is found empty, or after
//!   [`IDLE_MOMENT`]. Later clients are served by the other holders.
//! - Connections at work go on. A connection is half-closed when nothing is left to read, its client has taken all
//!   output, and it has been silent for a moment: [`IDLE_MOMENT`], or more where many connections talk.
//! - Connections that were silent when the drain began are half-closed one after another, so that their
//!   clients do not all reconnect in the same instant: [`SPREAD_STEP`] apart, but within [`LONGEST_SPREAD`] and within
//!   half the drain timeout.
//! - At the deadline the rest is cut. A worker that is still inside the service then closes its connection afterwards,
//!   if the process lives that long. Sessions that are still being dropped are not waited for any longer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::debug;

use super::connection::Connection;
use super::door::Knock;
use super::gate::{Cut, Standing};
use super::metrics::{Reason, Refusal, Totals};
use super::reactor::{Reactor, Slot, Stage};
use super::report::Report;
use super::service::Service;
use super::{Note, kernel};
use crate::clock::{later, ns};
use crate::lifecycle::Phase;
use crate::pool::remaining;

/// How long a connection is silent in a drain before it counts as idle: longer than a client takes between
/// reading one answer and sending its next message.
pub(super) const IDLE_MOMENT: Duration = Duration::from_millis(250);

/// Where many connections talk, each is silent while the others have their turn. So the moment is this much for each of
/// them, if that is more, up to a quarter of the drain timeout.
const IDLE_SHARE: Duration = Duration::from_millis(2);

/// Between the closes of connections that were silent when the drain began.
const SPREAD_STEP: Duration = Duration::from_millis(1);

/// The most that these closes are spread over.
const LONGEST_SPREAD: Duration = Duration::from_secs(3);

/// After the deadline of a drain, the time for workers that are not stuck to close the connections that were cut.
const CUT_GRACE: Duration = Duration::from_millis(100);

/// A drain that is under way.
pub(super) struct Drain {
    started_ns: u64,
    deadline_ns: u64,
    /// The totals when it began.
    before: Totals,
    /// Connections that talked when it began.
    talking: usize,
    /// The kernel lets no new connection into the listen queue any more; see `Door::seal`.
    sealed: bool,
}

impl Drain {
    /// When the reactor has to act next on the drain itself.
    pub(super) fn next_step_ns(&self) -> u64 {
        if self.sealed { self.deadline_ns } else { self.seal_at_ns().min(self.deadline_ns) }
    }

    fn seal_at_ns(&self) -> u64 {
        later(self.started_ns, IDLE_MOMENT)
    }
}

impl<S: Service> Reactor<S> {
    /// Moves from stage to stage. Returns `true` if there is nothing left to wait for.
    pub(super) fn advance(&mut self, now_ns: u64) -> bool {
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
        let Stage::Draining(drain) = &mut self.stage else { return false };
        if !drain.sealed && now_ns >= drain.seal_at_ns() {
            drain.sealed = true;
            self.door.seal(self.poll.registry());
        }
        let is_empty = self.slots.is_empty() && self.reaper.pending() == 0 && !self.door.is_open();
        is_empty || now_ns >= drain.deadline_ns
    }

    fn begin_drain(&mut self, now_ns: u64) {
        let timeout = self.core.limits.drain;
        let deadline_ns = later(now_ns, timeout);
        self.core.lifecycle.start_drain(timeout, deadline_ns);
        let talking = self.talking(now_ns);
        self.door.stop_listening();
        self.stage = Stage::Draining(Box::new(Drain {
            started_ns: now_ns,
            deadline_ns,
            before: self.core.ledger.totals(),
            talking,
            sealed: false,
        }));
        debug!(open = self.slots.len(), talking, ?timeout, "draining");
        let spread_ns = ns(LONGEST_SPREAD.min(timeout / 2));
        let step_ns = ns(SPREAD_STEP).min(spread_ns / self.slots.len().max(1) as u64);
        let moment = self.idle_moment();
        let slots: Vec<usize> = self.slots.iter().map(|(slot, _)| slot).collect();
        for (place, slot) in slots.into_iter().enumerate() {
            let held = &mut self.slots[slot];
            let idle_at_ns = now_ns.max(later(held.connection.parked_ns(), moment));
            let drain_at_ns = idle_at_ns.saturating_add(step_ns * place as u64);
            held.drain_at_ns = Some(drain_at_ns);
            if held.linger.is_none() {
                self.schedule(slot, drain_at_ns.min(later(now_ns, IDLE_MOMENT)));
            }
        }
        // One more look at the listen queue, whether or not the kernel reports it.
        self.door.ready = true;
    }

    /// How many connections talk: those at work, those that talked within the longest moment, and those
    /// in the listen queue. A connection that has never sent anything does not talk.
    fn talking(&self, now_ns: u64) -> usize {
        let longest = self.moment_for(self.slots.len());
        let talks = |connection: &Connection<S::Session>| match connection.gate.standing() {
            Standing::Busy => true,
            Standing::Parked => !connection.is_new() && later(connection.parked_ns(), longest) > now_ns,
            Standing::Closing | Standing::Closed => false,
        };
        let open = self.slots.iter().filter(|(_, held)| talks(&held.connection)).count();
        let queue = self.door.listener().and_then(|listener| kernel::listen_queue(listener).ok());
        open + queue.map_or(0, |queue| queue.length as usize)
    }

    /// How long a connection is silent in a drain before it is closed as idle.
    pub(super) fn idle_moment(&self) -> Duration {
        match &self.stage {
            Stage::Draining(drain) => self.moment_for(drain.talking.min(self.slots.len())),
            Stage::Serving | Stage::LameDuck { .. } => IDLE_MOMENT,
        }
    }

    fn moment_for(&self, talking: usize) -> Duration {
        let talking = u32::try_from(talking).unwrap_or(u32::MAX);
        IDLE_SHARE.saturating_mul(talking).min(self.core.limits.drain / 4).max(IDLE_MOMENT)
    }

    /// Cuts what is left, ends the workers, and reports.
    pub(super) fn finish(&mut self) -> Report {
        let Stage::Draining(drain) = std::mem::replace(&mut self.stage, Stage::Serving) else {
            unreachable!("only a drain ends");
        };
        let now_ns = self.core.clock.now_ns();
        let refused = self.refuse_queue(now_ns);
        for slot in self.slots.iter().map(|(slot, _)| slot).collect::<Vec<_>>() {
            let connection = Arc::clone(&self.slots[slot].connection);
            let reason = cut_short(&self.slots[slot]);
            match connection.gate.cut() {
                Cut::Caller => self.close(slot, reason, now_ns),
                Cut::Worker | Cut::Nobody => {}
            }
        }
        self.await_notes();
        let drained = if self.slots.is_empty() { self.pool.drain(CUT_GRACE) } else { self.pool.abort() };
        debug!(?drained, "the workers have ended");

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
            late: totals.late - before.late,
            received: totals.received,
            sent: totals.sent,
            drain: Duration::from_nanos(now_ns - drain.started_ns),
            uptime: Duration::from_nanos(now_ns),
        };
        self.core.lifecycle.enter(Phase::Stopped);
        report
    }

    /// Refuses the connections in the listen queue, and closes the listener. Returns how many there were.
    fn refuse_queue(&mut self, now_ns: u64) -> u64 {
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
        refused
    }

    /// Waits a little for the connections in workers' hands, and for sessions that are being dropped. Between two system
    /// calls a worker closes a connection that was cut at once; inside the service, when that returns.
    fn await_notes(&mut self) {
        let start = Instant::now();
        while !(self.slots.is_empty() && self.reaper.pending() == 0)
            && let Ok(note) = self.inbox.recv_timeout(remaining(start, CUT_GRACE))
        {
            match note {
                Note::Closed(slot, serial) | Note::Linger(slot, serial) if self.holds(slot, serial) => {
                    self.free(slot);
                }
                Note::Dropped => self.reaper.note_dropped(),
                Note::Closed(..) | Note::Linger(..) | Note::Retry(..) => {}
            }
        }
    }
}

/// The reason to count for a connection that is closed and no longer waited for. One that was half-closed and whose
/// client has taken all output has lost nothing.
pub(super) fn cut_short<Session>(slot: &Slot<Session>) -> Reason {
    let connection = &slot.connection;
    if connection.gate.standing() != Standing::Closing {
        return Reason::Aborted;
    }
    let held = connection.hold();
    let is_delivered = slot.linger.is_some_and(|linger| linger.is_delivered) || !held.delivery().pending;
    if is_delivered { held.ending.unwrap_or(Reason::Aborted) } else { Reason::Aborted }
}
