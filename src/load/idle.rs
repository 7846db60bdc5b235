//! Connections that stay open and silent beside the load, on a thread of their own.
//!
//! Each is opened once. It fails if it cannot be opened, if its peer closes it, or if a byte comes on it.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use mio::{Events, Poll, Token};

use super::dial::Dial;
use super::engine::later;
use super::plan::Plan;
use super::report::{Failure, Tally};
use super::slot::{Bad, PIECE, Received, Slot, Stage};
use super::{Live, Shared};

/// Connections that are being made at a time. A listen queue usually holds 128 or more.
const CONNECTS_AT_ONCE: usize = 64;

/// The time between two looks at the timeouts, and at whether the run is over.
const SWEEP: Duration = Duration::from_millis(100);

/// The silent connections of a run.
pub(super) struct Idle<'run> {
    plan: &'run Plan,
    shared: &'run Shared<'run>,
    dial: &'run Dial,
    live: &'run Live,
    poll: Poll,
    slots: Vec<Slot>,
    /// The first slot that was not opened yet, and the number of connections that are being made.
    next: usize,
    connecting: usize,
    buffer: Box<[u8]>,
    tally: Tally,
}

impl<'run> Idle<'run> {
    pub(super) fn new(plan: &'run Plan, shared: &'run Shared<'run>, dial: &'run Dial) -> io::Result<Self> {
        Ok(Idle {
            plan,
            shared,
            dial,
            live: &shared.live[plan.threads],
            poll: Poll::new()?,
            slots: std::iter::repeat_with(|| Slot::new(plan.seed, 0)).take(plan.idle).collect(),
            next: 0,
            connecting: 0,
            buffer: vec![0; PIECE].into_boxed_slice(),
            tally: Tally::new(),
        })
    }

    /// Opens all, sends on `open` when that is done, and watches them until `until` is closed.
    pub(super) fn run(mut self, open: &Sender<()>, until: &Receiver<()>) -> io::Result<Tally> {
        let mut events = Events::with_capacity(1024);
        let mut told = false;
        loop {
            while self.connecting < CONNECTS_AT_ONCE && self.next < self.slots.len() {
                self.open_next();
            }
            if !told && (self.connecting == 0 || self.shared.stopped()) {
                told = true;
                // If another thread could not be started, the receiver is gone.
                let _ = open.send(());
            }
            match self.poll.poll(&mut events, Some(SWEEP)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => events.clear(),
                outcome => outcome?,
            }
            for event in &events {
                let Token(place) = event.token();
                if matches!(self.slots[place].stage, Stage::Connecting { .. }) {
                    self.connected(place);
                }
                if event.is_readable() || event.is_read_closed() || event.is_error() {
                    self.look(place);
                }
            }
            self.sweep();
            if until.try_recv() == Err(TryRecvError::Disconnected) {
                let open = self.slots.iter().filter(|slot| slot.stage == Stage::Open);
                self.tally.idle_kept = open.count() as u64;
                return Ok(self.tally);
            }
        }
    }

    fn open_next(&mut self) {
        let place = self.next;
        self.next += 1;
        self.connecting += 1;
        let registry = self.poll.registry();
        let dial = (self.dial, self.shared.number());
        if let Err(failure) = self.slots[place].open(dial, (registry, Token(place)), self.shared.now_ns()) {
            self.connecting -= 1;
            self.fail(place, failure);
        }
    }

    fn connected(&mut self, place: usize) {
        self.connecting -= 1;
        match self.slots[place].connected() {
            Ok(_) => self.tally.opened += 1,
            Err(failure) => self.fail(place, failure),
        }
    }

    /// Reads from a connection on which no byte and no end is expected.
    fn look(&mut self, place: usize) {
        let slot = &mut self.slots[place];
        if slot.stage != Stage::Open {
            return;
        }
        match slot.receive(&mut self.buffer, true, || 0, |_, _| {}, |_, _| {}) {
            Ok(Received::Drained | Received::More) => {}
            Ok(Received::End) | Err(Bad::Socket(_)) => self.fail(place, Failure::IdleClosed),
            Err(Bad::Bytes { from, to }) => {
                let attempted = self.shared.attempted.load(Ordering::Relaxed);
                self.tally.mismatch(slot.talk.explain(&self.buffer[from..to], attempted));
                self.fail(place, Failure::Mismatch);
            }
        }
    }

    fn fail(&mut self, place: usize, failure: Failure) {
        self.tally.fail(failure);
        self.slots[place].close(Stage::Over);
    }

    fn sweep(&mut self) {
        let now_ns = self.shared.now_ns();
        let mut open = 0;
        for place in 0..self.next {
            match self.slots[place].stage {
                Stage::Connecting { since_ns } if now_ns >= later(since_ns, self.plan.timeout) => {
                    self.connecting -= 1;
                    self.fail(place, Failure::ConnectTimeout);
                }
                Stage::Open => open += 1,
                _ => {}
            }
        }
        self.live.open.store(open, Ordering::Relaxed);
        self.live.failures.store(self.tally.failed(), Ordering::Relaxed);
    }
}
