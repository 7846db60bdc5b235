//! Staying with a connection: a worker that has served a lively one waits at its socket for the next message, instead
//! of parking it.
//!
//! To hand a message from the reactor to a worker takes a wake-up, which costs more than an echo. A worker that waits
//! at the socket is woken by the kernel itself.
//!
//! # What it guarantees
//!
//! - Only where the service [never blocks](super::Service::may_block), and only with connections whose messages follow
//!   each other within [`PATIENCE`].
//! - **The numbers stay true.** A worker that waits here counts as idle, and each message as a job that waited for
//!   nobody.
//! - **Nobody starves.** Where more want to be stayed with than may be, nobody is: those left to the reactor would
//!   share one thread among them while the others have one each. It is tried again when fewer are lively.
//! - A wait lasts [`PATIENCE`] at most and a stay [`LONGEST`], so timers, the drain and its deadline find the
//!   connection as parked as any other.
//!
//! # Why no wake-up is lost
//!
//! During a stay the socket blocks, and the poll does not know it: the kernel reports nothing to the reactor. The end
//! of a stay has three steps, in this order: the socket blocks no more; the poll is told of it; the connection is
//! parked, or queued, or handed to the reactor. Telling the poll reports whatever is ready then, as a new change. So
//! what came before the second step is reported by it, and what comes after is reported as ever. The report may reach
//! the reactor before the third step or after it: both are cases of `gate.rs`. A report from before the stay may
//! reach it during the stay; it costs a look at the end.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mio::{Interest, Registry, Token};

use super::connection::Held;

/// How long a worker waits for the next message. The kernel rounds it up to its tick, of 1 to 10 ms.
pub(crate) const PATIENCE: Duration = Duration::from_millis(10);

/// After so long a stay ends, between two messages, to begin anew.
pub(crate) const LONGEST: Duration = Duration::from_secs(1);

/// Most connections that are stayed with at once: each keeps a read buffer of 64 KiB, and this is how many of those
/// are kept anyway.
const MOST: usize = 64;

/// What is reported of a connection.
pub(crate) const INTEREST: Interest = Interest::READABLE.add(Interest::WRITABLE).add(Interest::PRIORITY);

/// The stays of one server.
#[derive(Debug)]
pub(crate) struct Stays {
    registry: Registry,
    /// How many there may be at once.
    most: usize,
    /// How many there are. Written by workers.
    open: AtomicUsize,
    /// Whether more were wanted. Raised by whoever serves, lowered by the reactor, read by workers before each wait;
    /// nothing else depends on it, so it is relaxed.
    crowded: AtomicBool,
}

impl Stays {
    /// With this many workers, of which a quarter stays free for those that are not stayed with.
    pub(crate) fn new(registry: Registry, workers: usize) -> Self {
        let most = MOST.min(workers - workers.div_ceil(4));
        Stays { registry, most, open: AtomicUsize::new(0), crowded: AtomicBool::new(false) }
    }

    /// Whether nobody is to be stayed with.
    pub(crate) fn are_off(&self) -> bool {
        self.crowded.load(Ordering::Relaxed)
    }

    /// Says that a lively connection was served by a thread that stays with none: one too many, if all stays are taken.
    pub(crate) fn pass_by(&self) {
        if self.open.load(Ordering::Relaxed) >= self.most {
            self.crowded.store(true, Ordering::Relaxed);
        }
    }

    /// Begins a stay, if it may. The holder of the connection's gate. From here on a read waits.
    pub(crate) fn begin<S>(&self, held: &mut Held<S>) -> bool {
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.open.fetch_sub(1, Ordering::Relaxed);
            self.crowded.store(true, Ordering::Relaxed);
            return false;
        }
        // The kernel has no reason to refuse either. If it does, the connection is parked like any other.
        if self.registry.deregister(held.stream_mut()).is_err() {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        held.staying = true;
        // If this fails, reads find nothing at once, and the stay ends.
        let _ = held.block_reads(PATIENCE);
        true
    }

    /// Ends a stay. The holder of the connection's gate, before it lets go of it. With a `slot`, the poll is told of
    /// the connection; one that is to be closed needs none.
    ///
    /// # Errors
    ///
    /// What the system said; the connection can then only be closed.
    pub(crate) fn end<S>(&self, held: &mut Held<S>, slot: Option<usize>) -> io::Result<()> {
        debug_assert!(held.staying, "it was begun");
        held.staying = false;
        self.open.fetch_sub(1, Ordering::Relaxed);
        held.block_no_more()?;
        slot.map_or(Ok(()), |slot| self.registry.register(held.stream_mut(), Token(slot), INTEREST))
    }

    /// The reactor says how many connections were lively lately. With room for them and a quarter more, stays may begin
    /// again.
    pub(crate) fn review(&self, lively: usize) {
        if self.are_off() && lively + lively / 4 < self.most {
            self.crowded.store(false, Ordering::Relaxed);
        }
    }
}
