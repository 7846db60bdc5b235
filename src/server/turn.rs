//! A turn: what a worker does with a connection that is ready.
//!
//! A *turn* is one job of the pool. The worker sends the output that was kept, then reads, serves and sends. The turn
//! ends when nothing is left to read, when the client takes no more output, or when the turn has had its share. The
//! socket never blocks a worker; only the service may.
//!
//! Guarantees:
//!
//! - Input is read only when the kernel has all earlier output. So a connection holds at most what one call of the
//!   service leaves behind.
//! - While other connections wait, a turn ends after one full buffer of input or one call's output, or as soon as the
//!   socket was found empty once. If none waits, it goes on to [`TURN_BUDGET`] or [`TURN_TIME`], so that no turn looks
//!   like a stuck worker.
//! - The service is not called for a client whose reset was reported before the call.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use tracing::warn;

use super::buffers;
use super::connection::{Connection, Held, Sent};
use super::gate::Park;
use super::metrics::{Cell, Reason};
use super::service::{Next, Service};
use super::stint::Served;
use super::{Core, Note};
use crate::clock::later;
use crate::pool::{self, Handler, Identity, Turn, Unrun, panic_message, quietly};

/// Bytes after which a turn ends although no other connection waits: a few hundred microseconds of copying.
const TURN_BUDGET: usize = 1024 * 1024;

/// Time after which a turn ends, between two messages, although no other connection waits. With the budget it keeps a
/// busy connection from looking like a stuck worker.
const TURN_TIME: Duration = Duration::from_millis(10);

/// The job of a server's pool.
pub(crate) type Job<S> = Arc<Connection<<S as Service>::Session>>;

impl<Session: Send + 'static> pool::Job for Arc<Connection<Session>> {
    fn abandon(self, pool: &Identity) {
        pool.count_unrun(Unrun::Aborted);
    }
}

/// A worker of a server. It owns its cell, and a buffer while it is awake.
pub(crate) struct Attendant<S: Service> {
    core: Arc<Core>,
    service: Arc<S>,
    number: usize,
    buffer: Option<Vec<u8>>,
    /// Bytes after which a turn ends although no other connection waits.
    budget: usize,
    /// Where to drop sessions, on the reactor's thread. `None` on a worker's own thread, which drops them itself.
    sessions: Option<Sender<(S::Session, Note)>>,
}

/// How serving a connection came to a stop.
enum Stop {
    /// The client has sent nothing more.
    Idle,
    /// The client takes no more output.
    Blocked,
    /// The kernel has no memory for output.
    OutOfMemory,
    /// The turn has had its share, and there may be more to do.
    Share,
    /// The client has taken all output, and nothing is left to read. Or the connection has failed.
    Over(Reason),
    /// The kernel has all output, but the client may not have taken it, or may still be sending.
    HalfClose(Reason),
    /// The service panicked.
    Panic(Box<dyn Any + Send>),
}

impl<S: Service> Handler<Job<S>> for Attendant<S> {
    fn run(&mut self, connection: Job<S>, turn: &mut Turn<'_, Job<S>>) {
        turn.account.begin();
        if !connection.gate.begin() {
            // Cut, and closed, while it stood in the queue.
            return;
        }
        self.cell().stint.begin(&Served {
            started_ns: turn.account.started_ns(),
            connection: connection.serial,
            peer: connection.peer,
            received_before: self.cell().received.get(),
        });
        let mut clock = Stopwatch { since_ns: turn.account.submitted_ns() };
        let mut budget = self.budget;
        loop {
            let stop = self.attend(&connection, turn, &mut clock, &mut budget);
            connection.rest(clock.since_ns);
            let parked = match stop {
                Stop::Idle => connection.gate.park(false),
                Stop::Blocked => connection.gate.park(true),
                Stop::OutOfMemory => {
                    let parked = connection.gate.park(true);
                    if parked == Park::Parked {
                        self.core.notify(Note::Retry(connection.slot, connection.serial));
                    }
                    parked
                }
                Stop::Share => return self.requeue(connection, turn),
                Stop::Over(reason) => return self.close(&connection, reason, turn.account.now_ns()),
                Stop::HalfClose(reason) => {
                    return self.half_close(&connection, reason, turn.account.now_ns());
                }
                Stop::Panic(payload) => {
                    self.half_close(&connection, Reason::Panicked, turn.account.now_ns());
                    // The pool counts the panic. The panic hook has run, and does not run again.
                    resume_unwind(payload);
                }
            };
            match parked {
                Park::Parked => return,
                Park::Cut => return self.close(&connection, Reason::Aborted, turn.account.now_ns()),
                // Other connections have waited for longer than the input that came meanwhile.
                Park::Again if turn.others_wait() || is_long(turn, &clock) => {
                    return self.requeue(connection, turn);
                }
                Park::Again => clock.since_ns = turn.account.now_ns(),
            }
        }
    }

    fn rest(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.core.buffers.give_back(buffer);
        }
    }
}

/// When the message now served became readable, as far as the server knows: when the connection was
/// queued, or when the message before it was done.
struct Stopwatch {
    since_ns: u64,
}

impl<S: Service> Attendant<S> {
    pub(crate) fn new(core: Arc<Core>, service: Arc<S>, number: usize) -> Self {
        Attendant { core, service, number, buffer: None, budget: TURN_BUDGET, sessions: None }
    }

    /// The same for the reactor's thread, which has other things to do: its turns end after one full buffer.
    /// It waits for no destructor of a session, if `sessions` takes them.
    pub(crate) fn on_reactor(self, sessions: Option<Sender<(S::Session, Note)>>) -> Self {
        Attendant { budget: buffers::READ_SIZE, sessions, ..self }
    }

    fn cell(&self) -> &Cell {
        &self.core.ledger.workers[self.number]
    }

    /// Sends the output that was kept, then serves the connection until it stops.
    fn attend(
        &mut self,
        connection: &Job<S>,
        turn: &Turn<'_, Job<S>>,
        clock: &mut Stopwatch,
        budget: &mut usize,
    ) -> Stop {
        if connection.gate.is_reset() {
            return Stop::Over(Reason::Error);
        }
        let mut held = connection.hold();
        if held.owes() {
            match held.flush() {
                Err(error) => return failed(connection, "writing", &error),
                Ok((sent, bytes)) => {
                    self.cell().sent.add(bytes as u64);
                    clock.since_ns = turn.account.now_ns();
                    if let Some(stop) = stuck(sent) {
                        if bytes > 0 {
                            connection.watch_output(held.delivery(), self.core.clock.now_ns());
                        }
                        return stop;
                    }
                }
            }
        }
        connection.output_taken();
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
                // The service left another buffer in its place.
                *buffer = self.core.buffers.take();
            }
            let room = buffer.capacity();
            // A service that stopped halfway goes on before anything is read.
            let goes_on = std::mem::take(&mut held.more);
            let mut received = 0;
            if !goes_on {
                received = match held.read(buffer) {
                    Ok(0) => return ended(held),
                    Ok(received) => received,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Stop::Idle,
                    Err(error) => return failed(connection, "reading", &error),
                };
                cell.received.add(received as u64);
            }
            if connection.gate.is_reset() {
                return Stop::Over(Reason::Error);
            }

            let session = held.session();
            let next = match catch_unwind(AssertUnwindSafe(|| self.service.serve(session, buffer))) {
                Ok(next) => next,
                Err(payload) => {
                    self.report_panic(connection, &*payload, turn.account.now_ns());
                    return Stop::Panic(payload);
                }
            };

            let (sent, bytes) = match held.send(buffer) {
                Ok(outcome) => outcome,
                Err(error) => return failed(connection, "writing", &error),
            };
            let now_ns = turn.account.now_ns();
            cell.sent.add(bytes as u64);
            if !goes_on {
                // Until the first part of the answer is sent. A slow reader's own delay is not counted.
                cell.echo_latency.observe(now_ns.saturating_sub(clock.since_ns));
            }
            clock.since_ns = now_ns;
            if held.silent && bytes > 0 {
                held.silent = false;
                cell.first_byte.observe(now_ns.saturating_sub(connection.accepted_ns));
            }
            match next {
                Next::KeepOpen => {}
                Next::More => held.more = true,
                Next::Close => held.ending = Some(Reason::Service),
            }
            if let Some(stop) = stuck(sent) {
                connection.watch_output(held.delivery(), self.core.clock.now_ns());
                return stop;
            }
            if next == Next::Close {
                return Stop::HalfClose(Reason::Service);
            }
            *budget = budget.saturating_sub(received.max(bytes));
            if next == Next::KeepOpen && !goes_on && received < room && !connection.gate.read_on() {
                // A short read emptied the socket, and input that comes later is reported. See `gate`.
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
            self.close(&connection, Reason::Aborted, turn.account.now_ns());
        }
    }

    /// Closes a connection that waits for nothing: its output was taken, or it has failed.
    fn close(&self, connection: &Job<S>, reason: Reason, now_ns: u64) {
        let session = self.core.close(connection, reason, self.cell(), now_ns);
        // The note comes after the destructor, so that the connection's place is taken until then.
        let note = Note::Closed(connection.slot, connection.serial);
        match (session, &self.sessions) {
            // The thread ends only after the senders are gone.
            (Some(session), Some(sessions)) => drop(sessions.send((session, note))),
            (session, _) => {
                quietly(|| drop(session));
                self.core.notify(note);
            }
        }
    }

    /// Half-closes a connection, and leaves the rest to the reactor. Closing a socket with unread input would reset
    /// the connection and destroy the output that is on its way to the client.
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
    clock.since_ns > later(turn.account.started_ns(), TURN_TIME)
}

/// Why a turn stops if the kernel did not take all output.
fn stuck(sent: Sent) -> Option<Stop> {
    match sent {
        Sent::All => None,
        Sent::Blocked => Some(Stop::Blocked),
        Sent::OutOfMemory => Some(Stop::OutOfMemory),
    }
}

/// The client has ended its side of the stream. It may still be reading.
fn ended<Session>(held: &Held<Session>) -> Stop {
    if held.delivery().pending { Stop::HalfClose(Reason::Client) } else { Stop::Over(Reason::Client) }
}

fn failed<Session>(connection: &Connection<Session>, doing: &str, error: &io::Error) -> Stop {
    tracing::debug!(peer = %connection.peer, %error, "{doing} failed");
    Stop::Over(Reason::Error)
}
