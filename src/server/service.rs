//! What a server does with what its clients send.

use std::net::SocketAddr;
use std::time::Duration;

/// A conversation's logic: bytes in, bytes out.
///
/// The server owns everything else: sockets, limits, timeouts, workers, metrics and the drain. One value
/// serves all connections, from all workers at once; what belongs to one conversation lives in its
/// [`Session`](Service::Session).
///
/// ```
/// use std::net::SocketAddr;
/// use millpond::{Next, Service};
///
/// /// Answers every line with its length.
/// struct Lengths;
///
/// impl Service for Lengths {
///     /// The beginning of a line whose end has not come yet.
///     type Session = Vec<u8>;
///
///     fn open(&self, _peer: SocketAddr) -> Vec<u8> {
///         Vec::new()
///     }
///
///     fn serve(&self, line: &mut Vec<u8>, bytes: &mut Vec<u8>) -> Next {
///         let mut answer = Vec::new();
///         for byte in bytes.drain(..) {
///             if byte == b'\n' {
///                 answer.extend(format!("{}\n", line.len()).into_bytes());
///                 line.clear();
///             } else {
///                 line.push(byte);
///             }
///         }
///         *bytes = answer;
///         if line.len() < 1000 { Next::KeepOpen } else { Next::Close }
///     }
/// }
/// # let mut session = Lengths.open(([127, 0, 0, 1], 9).into());
/// # let mut bytes = b"one\nthree\nfo".to_vec();
/// # assert_eq!(Lengths.serve(&mut session, &mut bytes), Next::KeepOpen);
/// # assert_eq!(bytes, b"3\n5\n");
/// # assert_eq!(session, b"fo");
/// ```
pub trait Service: Send + Sync + 'static {
    /// What is kept for one connection between its messages.
    type Session: Send + 'static;

    /// Called when a connection is accepted, on the reactor's thread: it must not block.
    fn open(&self, peer: SocketAddr) -> Self::Session;

    /// Takes what the client sent and leaves in its place what the client gets.
    ///
    /// `bytes` holds one read from the connection, at least one byte and usually no more than 64 KiB; where
    /// messages begin and end is the service's to find out. What it holds at the return is sent. The
    /// connection is read again only when that has been handed to the kernel in full, so the memory a client
    /// can make the server hold is what one call leaves behind.
    ///
    /// It runs on a worker and may block, unless [`may_block`](Service::may_block) denies it: others wait for a
    /// worker then, and the metrics show it. Calls for one connection never overlap. A panic closes the
    /// connection, with reason `panicked`, and harms nothing else.
    fn serve(&self, session: &mut Self::Session, bytes: &mut Vec<u8>) -> Next;

    /// Whether [`serve`](Service::serve) may ever block, or take longer than some microseconds. Asked once, at the start.
    ///
    /// It may, unless a service says otherwise. One that never does is served faster: the reactor, as one of the workers,
    /// serves a connection itself rather than wake another. If such a service blocks all the same, it holds up everybody.
    fn may_block(&self) -> bool {
        true
    }
}

/// What becomes of a connection after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait for the client to send more.
    KeepOpen,
    /// Close once everything has been sent. What the client still sends is discarded.
    Close,
}

/// Sends back what it gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

impl Service for Echo {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        Next::KeepOpen
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// A service with simulated work before each message: it holds its worker for a while.
///
/// It makes saturation on purpose, to try dashboards, alerts and autoscaling.
#[derive(Clone, Copy, Debug)]
pub struct Laboured<S> {
    service: S,
    work: Duration,
}

impl<S> Laboured<S> {
    /// Wraps a service so that every message holds its worker for `work` first; zero adds nothing.
    pub fn new(service: S, work: Duration) -> Self {
        Laboured { service, work }
    }
}

impl<S: Service> Service for Laboured<S> {
    type Session = S::Session;

    fn open(&self, peer: SocketAddr) -> S::Session {
        self.service.open(peer)
    }

    fn serve(&self, session: &mut S::Session, bytes: &mut Vec<u8>) -> Next {
        if !self.work.is_zero() {
            std::thread::sleep(self.work);
        }
        self.service.serve(session, bytes)
    }

    fn may_block(&self) -> bool {
        !self.work.is_zero() || self.service.may_block()
    }
}
