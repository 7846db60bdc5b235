//! The service: what a server does with the bytes that its clients send.

use std::net::SocketAddr;
use std::time::Duration;

/// A conversation's logic: bytes in, bytes out.
///
/// The server owns everything else: sockets, limits, timeouts, workers, metrics and the drain. One value
/// serves all connections, from all workers at once. The state of one conversation lives in its
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
    /// The state of one connection between its messages.
    ///
    /// Its destructor may block: it runs on the worker that closes the connection, or on a thread that only drops
    /// sessions. Until it has run, the connection's place counts against
    /// [`max_connections`](crate::ServerBuilder::max_connections).
    type Session: Send + 'static;

    /// Called when a connection is accepted, on the reactor's thread: it must not block.
    fn open(&self, peer: SocketAddr) -> Self::Session;

    /// Takes the bytes that the client sent, and leaves the client's answer in their place.
    ///
    /// `bytes` holds one read from the connection, at least one byte and usually no more than 64 KiB. It is empty if the
    /// last call returned [`Next::More`]. The service finds out by itself where messages begin and end. What `bytes`
    /// holds at the return is sent. The connection is read again only when the kernel has taken all of that. So the
    /// memory that a client can make the server hold is what one call leaves behind: a service whose answer may be much
    /// longer than its input gives it in parts, with [`Next::More`].
    ///
    /// It runs on a worker and may block, unless [`may_block`](Service::may_block) denies it. While it blocks, other
    /// connections wait for a worker, and the metrics show it. Calls for one connection never overlap. If it panics, its
    /// connection is closed with reason `panicked`, and nothing else is affected.
    fn serve(&self, session: &mut Self::Session, bytes: &mut Vec<u8>) -> Next;

    /// Whether [`serve`](Service::serve) may ever block, or take longer than some microseconds. Asked once, at the start.
    ///
    /// Unless a service says otherwise, it may. A service that never blocks is served faster: the reactor counts as one
    /// of the workers, and serves a connection itself rather than wake another thread. If such a service blocks all the
    /// same, every connection waits.
    fn may_block(&self) -> bool {
        true
    }
}

/// What happens to a connection after a call of [`Service::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Waits for the client to send more.
    KeepOpen,
    /// Sends this part of the answer, and calls the service again with empty `bytes` when the kernel has taken all of
    /// it. Nothing is read from the client before. The service keeps the input that it has not answered in its session.
    ///
    /// A part of some tens of kilobytes is a good size: each costs a call and a system call. Between two parts, other
    /// connections that wait get their turn. A service that returns `More` for ever is called for ever.
    More,
    /// Closes the connection once the client has taken all output. Input that the client still sends is discarded.
    Close,
}

/// Sends back the bytes that it gets.
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

/// A service with simulated work before each message: it holds its worker for a set time.
///
/// Use it to saturate a pool on purpose, to try dashboards, alerts and autoscaling.
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
        // Without bytes the service goes on with a message whose work is done.
        if !self.work.is_zero() && !bytes.is_empty() {
            std::thread::sleep(self.work);
        }
        self.service.serve(session, bytes)
    }

    fn may_block(&self) -> bool {
        !self.work.is_zero() || self.service.may_block()
    }
}
