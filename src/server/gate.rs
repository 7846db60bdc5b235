//! The state machine between the reactor and the workers: it says which thread may touch a connection.
//!
//! A connection is in one of these states, held in one atomic:
//!
//! | state | holder of the connection | what the connection does |
//! | --- | --- | --- |
//! | parked | none; the reactor may claim it | waits for the client to send |
//! | parked-for-write | none; the reactor may claim it | waits for the client to read |
//! | queued | none | waits in the pool's queue, exactly once |
//! | active | a worker | is served |
//! | again | a worker | is served, and became ready meanwhile |
//! | closing | the reactor | the server's side is shut down; the client's input is discarded |
//! | cut | the thread that held it when it was cut | must be closed without sending more |
//! | closed | none, for good | the socket is closed |
//!
//! ```text
//!               ready                 begin                 finish
//!   parked ───────────────▶ queued ───────────────▶ active ─────────▶ closed
//!    │ ▲                      ▲     requeue          │ │ ▲               ▲
//!    │ └──────────────────────┼──────────────────────┘ │ │ park finds    │
//!    │          park          └──────── active, again ─┤ │ `again`       │
//!    │ claim                                    linger │ └───── again    │
//!    ▼                                                 ▼                 │
//!   closing ◀──────────────────────────────────────────┘   finish ───────┘
//! ```
//!
//! # Why no wake-up is lost
//!
//! Readiness is edge-triggered: the kernel reports a change once, to the reactor, which calls
//! [`Gate::ready`]. The claim is that after every report a worker looks at the socket. The argument goes by the
//! state that the report's read-modify-write finds:
//!
//! 1. *parked*, and the report tells of input: the connection becomes queued. The reactor submits it, and the
//!    worker that takes it looks.
//! 2. *queued*: a worker will take it and look. The read-modify-write is a Release, and `begin` is a later Acquire on
//!    the same atomic. So the look comes after the report, and after the data.
//! 3. *active*: it becomes `again`. The worker can leave that state in three ways. `park` finds `again` and
//!    sends the worker to look once more. After `requeue` a worker looks. Or the connection is closed.
//! 4. *again*: as 3; the look that is owed has not begun.
//! 5. *parked*, and the report tells only of writability, as it does once for every new
//!    connection: no look is owed, and a silent client makes no job.
//! 6. *parked-for-write*, and the report does not tell of writability: no look is owed. The socket took no
//!    more output, so the kernel will report when it does. The worker that then flushes goes on to read
//!    until it finds nothing.
//!
//! A worker may stop after a *short read*, without reading until "would block". It relies on one more fact:
//! data that arrives after that read is a new change, and is reported. Two cases need care. The end of the stream may
//! have arrived before the read, reported in one event with the data. A read also stops short at urgent data.
//! An event that tells of either raises [`Gate::read_on`] before the state changes, and a worker that sees it reads
//! until nothing comes.
//!
//! A *reset* is reported too. It raises [`Gate::is_reset`] in the same way, so a worker that takes the connection from
//! the queue afterwards does not run the service for a client that is gone.
//!
//! `model`, below, checks all this over every interleaving with loom; `tests/run` runs it.

use crate::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const PARKED: u8 = 0;
const PARKED_FOR_WRITE: u8 = 1;
const QUEUED: u8 = 2;
const ACTIVE: u8 = 3;
const AGAIN: u8 = 4;
const CLOSING: u8 = 5;
const CUT: u8 = 6;
const CLOSED: u8 = 7;

/// The state of one connection. Every method names its callers.
#[derive(Debug)]
pub(crate) struct Gate {
    state: AtomicU8,
    /// See [`Readiness::read_on`]. The reactor raises it before the state changes and never lowers it. Workers that
    /// hold the connection read it.
    read_on: AtomicBool,
    /// See [`Readiness::reset`]. Written and read as `read_on`.
    reset: AtomicBool,
}

/// What the kernel reported of a socket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Readiness {
    /// There is something to read: bytes, the end of the stream, or an error.
    pub(crate) input: bool,
    /// The socket takes output, or will never take output again. In both cases a flush finds out.
    pub(crate) writable: bool,
    /// A short read no longer means that the socket is empty: the end of the stream, an error or urgent data
    /// follows the bytes that are read first.
    pub(crate) read_on: bool,
    /// The connection has failed, as a rule by the client's reset: nothing more can be sent.
    pub(crate) reset: bool,
}

/// What a readiness report asks of the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// Submit the connection to the pool.
    Submit,
    /// Nothing: a worker will look, or no look is owed.
    Noted,
    /// The reactor holds the connection, half-closed: discard its input and look for its end.
    Linger,
}

/// How a worker's attempt to park ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Park {
    /// The worker no longer holds the connection.
    Parked,
    /// The connection became ready meanwhile: the worker still holds it, and must look again.
    Again,
    /// The connection was cut: the worker still holds it, and must close it.
    Cut,
}

/// Which thread closes a connection that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The caller, now.
    Caller,
    /// The worker that holds it, at the end of its job.
    Worker,
    /// It is closed already.
    Nobody,
}

/// The state of a connection, as far as a thread that does not hold it may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Parked, of either kind: [`Gate::claim`] may succeed.
    Parked,
    /// In the queue or with a worker.
    Busy,
    /// Half-closed, and held by the reactor.
    Closing,
    /// The socket is closed.
    Closed,
}

impl Gate {
    /// A connection that waits for its client to send.
    pub(crate) fn new() -> Self {
        Gate { state: AtomicU8::new(PARKED), read_on: AtomicBool::new(false), reset: AtomicBool::new(false) }
    }

    /// Reactor: the kernel reported readiness.
    pub(crate) fn ready(&self, report: Readiness) -> Ready {
        // The Release below, which every path executes, makes both visible.
        if report.read_on {
            self.read_on.store(true, Ordering::Relaxed);
        }
        if report.reset {
            self.reset.store(true, Ordering::Relaxed);
        }
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            let (next, answer) = match state {
                PARKED if report.input => (QUEUED, Ready::Submit),
                PARKED_FOR_WRITE if report.writable => (QUEUED, Ready::Submit),
                ACTIVE => (AGAIN, Ready::Noted),
                CLOSING => (CLOSING, Ready::Linger),
                // A state that stays is written again all the same, so that the worker's next step acquires this
                // report.
                same => (same, Ready::Noted),
            };
            match self.state.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return answer,
                Err(found) => state = found,
            }
        }
    }

    /// Worker, holding the connection: whether to read until nothing comes, because a short read proves nothing.
    pub(crate) fn read_on(&self) -> bool {
        self.read_on.load(Ordering::Relaxed)
    }

    /// Worker, holding the connection: whether the kernel has reported that the connection failed.
    pub(crate) fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// Worker: takes the connection from the queue. `false`: it was cut while it waited, and is closed.
    pub(crate) fn begin(&self) -> bool {
        self.state.compare_exchange(QUEUED, ACTIVE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Worker: lets go of the connection until the client sends, or with `for_write` until it reads.
    /// Everything the worker wrote to the connection is visible to its next holder.
    pub(crate) fn park(&self, for_write: bool) -> Park {
        let parked = if for_write { PARKED_FOR_WRITE } else { PARKED };
        match self.state.compare_exchange(ACTIVE, parked, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Park::Parked,
            Err(AGAIN) => {
                match self.state.compare_exchange(AGAIN, ACTIVE, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => Park::Again,
                    Err(_) => Park::Cut,
                }
            }
            Err(_) => Park::Cut,
        }
    }

    /// Worker: lets go of the connection and promises to put it in the queue, now. `false`: it was cut; the
    /// worker still holds it, and must close it.
    pub(crate) fn requeue(&self) -> bool {
        self.leave_active(QUEUED)
    }

    /// Worker: hands the connection to the reactor to linger on. `false` as for [`requeue`](Gate::requeue).
    pub(crate) fn linger(&self) -> bool {
        self.leave_active(CLOSING)
    }

    fn leave_active(&self, next: u8) -> bool {
        let mut state = ACTIVE;
        loop {
            match self.state.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(found @ (ACTIVE | AGAIN)) => state = found,
                Err(_) => return false,
            }
        }
    }

    /// Reactor: takes a parked connection, to close it. Returns `false` when it is not parked any more.
    pub(crate) fn claim(&self) -> bool {
        [PARKED, PARKED_FOR_WRITE].into_iter().any(|parked| {
            self.state.compare_exchange(parked, CLOSING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// Reactor, holding a claimed connection: puts it back into the queue. The caller submits it to the pool.
    pub(crate) fn release_to_queue(&self) {
        self.state.store(QUEUED, Ordering::Release);
    }

    /// Reactor: the connection must end now, whichever thread holds it.
    pub(crate) fn cut(&self) -> Cut {
        match self.state.swap(CUT, Ordering::AcqRel) {
            ACTIVE | AGAIN => Cut::Worker,
            CLOSED => {
                self.state.store(CLOSED, Ordering::Release);
                Cut::Nobody
            }
            // Cut before: the worker that held it then still holds it.
            CUT => Cut::Worker,
            _ => Cut::Caller,
        }
    }

    /// Holder of the connection: its socket is closed.
    pub(crate) fn finish(&self) {
        self.state.store(CLOSED, Ordering::Release);
    }

    /// The connection's state at this instant.
    pub(crate) fn standing(&self) -> Standing {
        match self.state.load(Ordering::Acquire) {
            PARKED | PARKED_FOR_WRITE => Standing::Parked,
            CLOSING => Standing::Closing,
            CLOSED => Standing::Closed,
            _ => Standing::Busy,
        }
    }
}

#[cfg(all(test, not(millpond_loom)))]
mod tests {
    use super::*;

    const SILENT: Readiness = Readiness { input: false, writable: false, read_on: false, reset: false };
    const INPUT: Readiness = Readiness { input: true, ..SILENT };
    const WRITABLE: Readiness = Readiness { writable: true, ..SILENT };

    #[test]
    fn a_ready_connection_is_queued_once() {
        let gate = Gate::new();
        assert_eq!(gate.ready(INPUT), Ready::Submit);
        assert_eq!(gate.ready(INPUT), Ready::Noted);
        assert!(gate.begin());
        assert_eq!(gate.park(false), Park::Parked);
        assert_eq!(gate.ready(INPUT), Ready::Submit);
    }

    #[test]
    fn readiness_while_active_makes_the_worker_look_again() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert!(gate.begin());
        assert_eq!(gate.ready(INPUT), Ready::Noted);
        assert_eq!(gate.park(false), Park::Again);
        assert_eq!(gate.park(false), Park::Parked);
    }

    #[test]
    fn a_silent_connection_is_not_queued_for_being_writable() {
        let gate = Gate::new();
        assert_eq!(gate.ready(WRITABLE), Ready::Noted);
        assert_eq!(gate.standing(), Standing::Parked);
        assert_eq!(gate.ready(INPUT), Ready::Submit);
    }

    #[test]
    fn a_connection_that_waits_to_write_is_not_woken_by_input() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert!(gate.begin());
        assert_eq!(gate.park(true), Park::Parked);
        assert_eq!(gate.ready(INPUT), Ready::Noted);
        assert_eq!(gate.ready(WRITABLE), Ready::Submit);
    }

    #[test]
    fn the_end_of_the_stream_is_remembered_in_every_state() {
        for writable in [false, true] {
            let gate = Gate::new();
            gate.ready(INPUT);
            assert!(gate.begin());
            gate.ready(Readiness { writable, read_on: true, ..INPUT });
            assert!(gate.read_on());
            assert!(!gate.is_reset(), "an end is no reset");
        }
    }

    #[test]
    fn a_reset_in_the_queue_is_seen_by_the_worker_that_begins() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert_eq!(gate.ready(Readiness { reset: true, read_on: true, ..INPUT }), Ready::Noted);
        assert!(gate.begin());
        assert!(gate.is_reset());
    }

    #[test]
    fn only_a_parked_connection_can_be_claimed() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert!(!gate.claim(), "queued");
        assert!(gate.begin());
        assert!(!gate.claim(), "active");
        assert_eq!(gate.park(true), Park::Parked);
        assert!(gate.claim());
        assert_eq!(gate.standing(), Standing::Closing);
        assert_eq!(gate.ready(INPUT), Ready::Linger);
        gate.release_to_queue();
        assert!(gate.begin());
    }

    #[test]
    fn a_cut_is_left_to_the_worker_that_holds_the_connection() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert!(gate.begin());
        assert_eq!(gate.cut(), Cut::Worker);
        assert_eq!(gate.cut(), Cut::Worker, "the worker still holds it");
        assert_eq!(gate.park(false), Park::Cut);
        assert!(!gate.requeue());
        assert!(!gate.linger());
        gate.finish();
        assert_eq!(gate.cut(), Cut::Nobody);
        assert_eq!(gate.standing(), Standing::Closed);
    }

    #[test]
    fn a_connection_cut_in_the_queue_is_not_begun() {
        let gate = Gate::new();
        gate.ready(INPUT);
        assert_eq!(gate.cut(), Cut::Caller);
        assert!(!gate.begin());
    }
}

/// Every interleaving of a client, the reactor and two workers around one gate.
///
/// The socket is modelled by one atomic: bytes that wait, and whether the client has sent its end. The
/// reactor reports each arrival after it happened, as the kernel does; a worker reads all there is, and stops
/// after a short read as `turn.rs` does.
#[cfg(all(test, millpond_loom))]
mod model {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use loom::thread;

    use super::*;

    const END: usize = 1 << 8;

    struct World {
        gate: Gate,
        socket: AtomicUsize,
        served: AtomicUsize,
        saw_end: AtomicBool,
        queued: AtomicUsize,
    }

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(World {
                gate: Gate::new(),
                socket: AtomicUsize::new(0),
                served: AtomicUsize::new(0),
                saw_end: AtomicBool::new(false),
                queued: AtomicUsize::new(0),
            })
        }

        /// The client sends, then the kernel reports it to the reactor.
        fn arrive(&self, what: usize) {
            self.socket.fetch_add(what, Ordering::Relaxed);
            self.report(Readiness { input: true, read_on: what & END != 0, ..Readiness::default() });
        }

        fn report(&self, report: Readiness) {
            if self.gate.ready(report) == Ready::Submit {
                self.enqueue();
            }
        }

        fn enqueue(&self) {
            assert_eq!(self.queued.fetch_add(1, Ordering::SeqCst), 0, "in the queue twice");
        }

        fn take(&self) -> bool {
            self.queued.compare_exchange(1, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        }

        /// A worker that finds the queue empty ends. No look may be owed when all workers have ended.
        fn work(&self) {
            while self.take() && self.gate.begin() {
                loop {
                    let found = self.socket.fetch_and(END, Ordering::Relaxed);
                    self.served.fetch_add(found & !END, Ordering::Relaxed);
                    if found == END {
                        self.saw_end.store(true, Ordering::Relaxed);
                        self.gate.finish();
                        return;
                    }
                    if found != 0 && self.gate.read_on() {
                        continue;
                    }
                    match self.gate.park(false) {
                        Park::Parked => break,
                        Park::Again => {}
                        Park::Cut => return,
                    }
                }
            }
        }
    }

    #[test]
    fn no_arrival_is_left_unserved() {
        loom::model(|| {
            let world = World::new();
            let worker = {
                let world = Arc::clone(&world);
                world.arrive(1);
                thread::spawn(move || world.work())
            };
            world.arrive(1);
            world.arrive(1);
            worker.join().expect("the worker");
            // The pool would have another worker for what is queued now.
            world.work();
            assert_eq!(world.served.load(Ordering::Relaxed), 3);
        });
    }

    #[test]
    fn the_end_of_the_stream_is_seen_although_it_came_with_the_data() {
        loom::model(|| {
            let world = World::new();
            world.arrive(1);
            let worker = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.work())
            };
            world.arrive(1 + END);
            worker.join().expect("the worker");
            world.work();
            assert_eq!(world.served.load(Ordering::Relaxed), 2);
            assert!(world.saw_end.load(Ordering::Relaxed));
        });
    }

    /// A reset is reported while the connection is with a worker: the worker sees it before it looks again.
    #[test]
    fn a_worker_that_is_sent_to_look_again_sees_the_reset() {
        loom::model(|| {
            let world = World::new();
            world.arrive(1);
            let worker = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    while world.take() && world.gate.begin() {
                        while world.gate.park(false) == Park::Again {
                            assert!(world.gate.is_reset(), "no other report can have come");
                        }
                    }
                })
            };
            world.report(Readiness { input: true, read_on: true, reset: true, ..Readiness::default() });
            worker.join().expect("the worker");
            assert!(world.gate.is_reset());
        });
    }

    #[test]
    fn output_that_waits_is_flushed_when_the_socket_takes_it() {
        loom::model(|| {
            let world = World::new();
            world.report(Readiness { input: true, ..Readiness::default() });
            let flushed = Arc::new(AtomicBool::new(false));
            let writable = Arc::new(AtomicBool::new(false));
            let worker = {
                let (world, flushed, writable) =
                    (Arc::clone(&world), Arc::clone(&flushed), Arc::clone(&writable));
                move || {
                    while world.queued.compare_exchange(1, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                        if !world.gate.begin() {
                            return;
                        }
                        loop {
                            let done = writable.load(Ordering::Relaxed);
                            flushed.store(done, Ordering::Relaxed);
                            if world.gate.park(!done) == Park::Parked {
                                break;
                            }
                        }
                    }
                }
            };
            let thread = thread::spawn(worker.clone());
            writable.store(true, Ordering::Relaxed);
            world.report(Readiness { writable: true, ..Readiness::default() });
            thread.join().expect("the worker");
            worker();
            assert!(flushed.load(Ordering::Relaxed));
        });
    }

    #[test]
    fn exactly_one_side_closes_a_connection_that_is_cut() {
        loom::model(|| {
            let world = World::new();
            world.report(Readiness { input: true, ..Readiness::default() });
            let closed = Arc::new(AtomicUsize::new(0));
            let worker = {
                let (world, closed) = (Arc::clone(&world), Arc::clone(&closed));
                thread::spawn(move || {
                    if world.gate.begin() && world.gate.park(false) == Park::Cut {
                        closed.fetch_add(1, Ordering::SeqCst);
                        world.gate.finish();
                    }
                })
            };
            if world.gate.cut() == Cut::Caller {
                closed.fetch_add(1, Ordering::SeqCst);
                world.gate.finish();
            }
            worker.join().expect("the worker");
            assert_eq!(closed.load(Ordering::SeqCst), 1);
        });
    }

    /// A worker gives way after its first read, and another goes on.
    #[test]
    fn a_connection_that_gives_way_is_in_the_queue_once_and_served_to_its_end() {
        loom::model(|| {
            let world = World::new();
            world.arrive(1);
            let worker = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    assert!(world.take() && world.gate.begin());
                    let found = world.socket.swap(0, Ordering::Relaxed);
                    world.served.fetch_add(found, Ordering::Relaxed);
                    assert!(world.gate.requeue());
                    world.enqueue();
                    world.work();
                })
            };
            world.arrive(1);
            world.arrive(1);
            worker.join().expect("the worker");
            world.work();
            assert_eq!(world.served.load(Ordering::Relaxed), 3);
        });
    }

    #[test]
    fn exactly_one_side_closes_a_connection_that_gives_way_and_is_cut() {
        loom::model(|| {
            let world = World::new();
            world.report(Readiness { input: true, ..Readiness::default() });
            let closed = Arc::new(AtomicUsize::new(0));
            let worker = {
                let (world, closed) = (Arc::clone(&world), Arc::clone(&closed));
                thread::spawn(move || {
                    for _ in 0..2 {
                        if !world.take() || !world.gate.begin() {
                            return;
                        }
                        if world.gate.requeue() {
                            world.enqueue();
                        } else {
                            closed.fetch_add(1, Ordering::SeqCst);
                            world.gate.finish();
                        }
                    }
                })
            };
            world.arrive(1);
            if world.gate.cut() == Cut::Caller {
                closed.fetch_add(1, Ordering::SeqCst);
                world.gate.finish();
            }
            assert_ne!(world.gate.cut(), Cut::Caller, "no thread is asked to close it twice");
            worker.join().expect("the worker");
            assert!(!world.take() || !world.gate.begin(), "it stays in the queue, and no worker serves it");
            assert_eq!(closed.load(Ordering::SeqCst), 1);
        });
    }

    /// The connection's own data needs no other order than the gate's.
    #[test]
    fn the_next_holder_of_a_connection_sees_what_the_last_one_did_to_it() {
        for lingers in [false, true] {
            loom::model(move || {
                let world = World::new();
                world.report(Readiness { input: true, ..Readiness::default() });
                let worker = {
                    let world = Arc::clone(&world);
                    thread::spawn(move || {
                        assert!(world.take() && world.gate.begin());
                        world.served.store(1, Ordering::Relaxed);
                        if lingers {
                            assert!(world.gate.linger());
                        } else {
                            while world.gate.park(true) == Park::Again {}
                        }
                    })
                };
                let holds = if lingers {
                    world.gate.ready(Readiness { input: true, ..Readiness::default() }) == Ready::Linger
                } else {
                    world.gate.claim()
                };
                if holds {
                    assert_eq!(world.served.load(Ordering::Relaxed), 1);
                }
                worker.join().expect("the worker");
            });
        }
    }

    #[test]
    fn a_claim_and_a_report_never_both_win() {
        loom::model(|| {
            let world = World::new();
            world.report(Readiness { input: true, ..Readiness::default() });
            let worker = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.work())
            };
            world.arrive(1);
            // The reactor claims after its own report, as it does when a timer runs out.
            if world.gate.claim() {
                let unread = world.socket.load(Ordering::Relaxed);
                assert_eq!(unread, 0, "claimed with input that was reported and not read");
            }
            worker.join().expect("the worker");
        });
    }
}
