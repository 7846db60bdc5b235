//! What a worker does with a connection that is ready.
//!
//! A *turn* is one job of the pool: send what is owed, then read, serve and send until the client has nothing
//! more to read, or takes no more output, or the turn has had its share. The socket never blocks a worker;
//! only the service may.
//!
//! Guarantees: input is read only when all earlier output is with the kernel, so a connection holds at most
//! what one call to the service leaves behind. While others wait, a turn ends after one full buffer, or as
//! soon as the socket was found empty once; with nobody waiting it goes on to [`TURN_BUDGET`] or
//! [`TURN_TIME`], so that no turn looks like a stuck one.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::buffers;
use super::connection::{Connection, Held, Sent};
use super::gate::Park;
use super::metrics::{Cell, Reason};
use super::service::{Next, Service};
use super::stint::Served;
use super::{Core, Note};
use crate::clock::later;
use crate::pool::{self, Handler, Outcome, Turn, panic_message};

/// Bytes after which a turn ends though nobody waits: a few hundred microseconds of copying.
const TURN_BUDGET: usize = 1024 * 1024;

/// Time after which a turn ends, between two messages, though nobody waits. With the budget it keeps a
/// talkative connection from looking like a stuck worker.
const TURN_TIME: Duration = Duration::from_millis(10);

/// The job of a server's pool.
pub(crate) type Job<S> = Arc<Connection<<S as Service>::Session>>;

impl<Session: Send + 'static> pool::Job for Arc<Connection<Session>> {
    fn abandon(self, count: &mut dyn FnMut(Outcome)) {
        count(Outcome::Aborted);
    }
}

/// A worker of a server: owns its cell, and a buffer while it is awake.
pub(crate) struct Attendant<S> {
    core: Arc<Core>,
    service: Arc<S>,
    number: usize,
    buffer: Option<Vec<u8>>,
    /// Bytes after which a turn ends though nobody waits.
    budget: usize,
}

/// How serving a connection came to a stop.
enum Stop {
    /// The client has sent nothing more.
    Idle,
    /// The client takes no more output.
    Blocked,
    /// The turn has had its share, and there may be more to read.
    Share,
    /// Nothing is left to send or to be read.
    Over(Reason),
    /// Nothing is left to send, but the client may still be sending.
    HalfClose(Reason),
    /// The service panicked.
    Panic(Box<dyn Any + Send>),
}

impl<S: Service> Handler<Job<S>> for Attendant<S> {
    fn run(&mut self, connection: Job<S>, turn: &mut Turn<'_, Job<S>>) {
        turn.begin();
        if !connection.gate.begin() {
            // Cut, and closed, while it stood in the queue.
            return;
        }
        self.cell().stint.begin(&Served {
            started_ns: turn.started_ns(),
            connection: connection.serial,
            peer: connection.peer,
            received_before: self.cell().received.get(),
        });
        let mut clock = Stopwatch { since_ns: turn.submitted_ns() };
        let mut budget = self.budget;
        loop {
            let stop = self.attend(&connection, turn, &mut clock, &mut budget);
            connection.rest(clock.since_ns);
            let parked = match stop {
                Stop::Idle => connection.gate.park(false),
                Stop::Blocked => connection.gate.park(true),
                Stop::Share => return self.requeue(connection, turn),
                Stop::Over(reason) => return self.close(&connection, reason, turn.now_ns()),
                Stop::HalfClose(reason) => return self.half_close(&connection, reason, turn.now_ns()),
                Stop::Panic(payload) => {
                    self.half_close(&connection, Reason::Panicked, turn.now_ns());
                    // On to the pool, which counts it; the hook has run and does not run again.
                    resume_unwind(payload);
                }
            };
            match parked {
                Park::Parked => return,
                Park::Cut => return self.close(&connection, Reason::Aborted, turn.now_ns()),
                // What came meanwhile stands behind those who waited before it came.
                Park::Again if turn.others_wait() || is_long(turn, &clock) => {
                    return self.requeue(connection, turn);
                }
                Park::Again => clock.since_ns = turn.now_ns(),
            }
        }
    }

    fn rest(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.core.buffers.give_back(buffer);
        }
    }
}

/// When the message now served became readable, as far as the server can tell: when the connection was
/// queued, or the message before it was done.
struct Stopwatch {
    since_ns: u64,
}

impl<S: Service> Attendant<S> {
    pub(crate) fn new(core: Arc<Core>, service: Arc<S>, number: usize) -> Self {
        Attendant { core, service, number, buffer: None, budget: TURN_BUDGET }
    }

    /// The same for a thread that has other things to do: its turns end after one full buffer.
    pub(crate) fn in_passing(self) -> Self {
        Attendant { budget: buffers::READ_SIZE, ..self }
    }

    fn cell(&self) -> &Cell {
        &self.core.ledger.workers[self.number]
    }

    /// Sends what is owed, then serves the connection until it stops.
    fn attend(
        &mut self,
        connection: &Job<S>,
        turn: &Turn<'_, Job<S>>,
        clock: &mut Stopwatch,
        budget: &mut usize,
    ) -> Stop {
        let mut held = connection.hold();
        if held.owes() {
            match held.flush() {
                Err(error) => return failed(connection, "writing", &error),
                Ok((sent, bytes)) => {
                    self.cell().sent.add(bytes as u64);
                    clock.since_ns = turn.now_ns();
                    if sent == Sent::Blocked {
                        if bytes > 0 {
                            connection.set_blocked(Some(clock.since_ns));
                        }
                        return Stop::Blocked;
                    }
                    connection.set_blocked(None);
                }
            }
        }
        if let Some(reason) = held.ending {
            return Stop::HalfClose(reason);
        }
        let mut buffer = self.buffer.take().unwrap_or_else(|| self.core.buffers.take());
        let stop = self.converse(connection, &mut held, &mut buffer, turn, clock, budget);
        self.buffer = Some(buffer);
        stop
    }

    /// Reads, serves and sends until there is a reason to stop.
    fn converse(
        &self,
        connection: &Job<S>,
        held: &mut Held<S::Session>,
        buffer: &mut Vec<u8>,
        turn: &Turn<'_, Job<S>>,
        clock: &mut Stopwatch,
        budget: &mut usize,
    ) -> Stop {
        let cell = self.cell();
        loop {
            buffer.clear();
            if !buffers::fits(buffer) {
                // The service left another in its place.
                *buffer = self.core.buffers.take();
            }
            let room = buffer.capacity();
            let received = match held.read(buffer) {
                Ok(0) => return Stop::Over(Reason::Client),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Stop::Idle,
                Err(error) => return failed(connection, "reading", &error),
            };
            cell.received.add(received as u64);

            let session = held.session();
            let next = match catch_unwind(AssertUnwindSafe(|| self.service.serve(session, buffer))) {
                Ok(next) => next,
                Err(payload) => {
                    self.report_panic(connection, &*payload, turn.now_ns());
                    return Stop::Panic(payload);
                }
            };

            let (sent, bytes) = match held.send(buffer) {
                Ok(outcome) => outcome,
                Err(error) => return failed(connection, "writing", &error),
            };
            let now_ns = turn.now_ns();
            cell.sent.add(bytes as u64);
            // A client that takes no more has had all that the server could do for it: its own delay is not
            // counted.
            cell.echo_latency.observe(now_ns.saturating_sub(clock.since_ns));
            clock.since_ns = now_ns;
            if held.silent && bytes > 0 {
                held.silent = false;
                cell.first_byte.observe(now_ns.saturating_sub(connection.accepted_ns));
            }
            if next == Next::Close {
                held.ending = Some(Reason::Service);
            }
            if sent == Sent::Blocked {
                connection.set_blocked(Some(now_ns));
                return Stop::Blocked;
            }
            if next == Next::Close {
                return Stop::HalfClose(Reason::Service);
            }
            *budget = budget.saturating_sub(received);
            if received < room && !connection.gate.read_on() {
                // A short read emptied the socket; what comes later is reported anew. See `gate`.
                return Stop::Idle;
            }
            if *budget == 0 || turn.others_wait() || is_long(turn, clock) {
                return Stop::Share;
            }
        }
    }

    fn requeue(&self, connection: Job<S>, turn: &Turn<'_, Job<S>>) {
        if connection.gate.requeue() {
            let pushed = turn.requeue(connection);
            assert!(pushed.is_ok(), "the queue holds every connection once");
        } else {
            self.close(&connection, Reason::Aborted, turn.now_ns());
        }
    }

    /// Closes a connection on which nothing is left to read.
    fn close(&self, connection: &Job<S>, reason: Reason, now_ns: u64) {
        self.core.close(connection, reason, self.cell(), now_ns);
        self.core.notify(Note::Closed(connection.slot, connection.serial));
    }

    /// Ends our side, and leaves the client's to the reactor: closing a socket with unread input would reset
    /// the connection and destroy what is still on its way to the client.
    fn half_close(&self, connection: &Job<S>, reason: Reason, now_ns: u64) {
        {
            let mut held = connection.hold();
            held.ending = Some(reason);
            held.shut_down_write();
        }
        if connection.gate.linger() {
            self.core.notify(Note::Linger(connection.slot, connection.serial));
        } else {
            self.close(connection, Reason::Aborted, now_ns);
        }
    }

    fn report_panic(&self, connection: &Job<S>, payload: &(dyn Any + Send), now_ns: u64) {
        if let Some(left_out) = self.core.panic_log.allow(now_ns) {
            let panic = panic_message(payload);
            warn!(peer = %connection.peer, panic, left_out, "the service panicked; its connection is closed");
        }
    }
}

/// Whether the turn has lasted longer than it may.
fn is_long<J>(turn: &Turn<'_, J>, clock: &Stopwatch) -> bool {
    clock.since_ns > later(turn.started_ns(), TURN_TIME)
}

fn failed<Session>(connection: &Connection<Session>, doing: &str, error: &io::Error) -> Stop {
    tracing::debug!(peer = %connection.peer, %error, "{doing} failed");
    Stop::Over(Reason::Error)
}
