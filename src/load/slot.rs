//! A slot: one connection after another.
//!
//! A slot sends what it owes and checks what comes, as far as its socket allows now. `engine` decides when to begin a
//! message, to open a connection, and to give up.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::dial::Dial;
use super::report::Failure;
use super::silence::Silence;
use super::talk::{Asked, Talk, Unexpected};

/// Bytes read or written at a time. At 64 KiB a system call costs little beside the copying.
pub(super) const PIECE: usize = 64 * 1024;

/// Bytes received from one connection before the thread reads from the others.
const TURN_BYTES: usize = 1024 * 1024;

/// The state of a slot's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// There is none. The next one may be opened from this time on.
    Down { open_at_ns: u64 },
    /// It is being made.
    Connecting { since_ns: u64 },
    /// It can be used.
    Open,
    /// All is sent and our side is closed. The slot reads what the peer still sends to its end, or until this time.
    Closing { until_ns: u64 },
    /// There is none, and no other will be opened.
    Over,
}

/// A place for one connection at a time.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) stage: Stage,
    stream: Option<TcpStream>,
    pub(super) talk: Talk,
    /// When the timeout of this connection began: when it was opened, when it began to want an answer, or when a byte
    /// came last.
    pub(super) timeout_from_ns: u64,
    /// Over all connections of the slot.
    pub(super) silence: Silence,
    /// Failures since the last answer.
    pub(super) failures: u32,
    /// With a schedule: the turns that are due, and those whose message was begun.
    pub(super) turns_due: u64,
    pub(super) turns_begun: u64,
    /// Whether the slot is in the engine's list of those that have more to read.
    pub(super) again: bool,
}

/// How receiving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// The slot has read all that has come so far.
    Drained,
    /// There may be more to read now.
    More,
    /// The slot has read everything, and the peer has ended its side.
    End,
}

/// Why receiving failed.
#[derive(Debug)]
pub(super) enum Bad {
    /// Bytes that were not expected. They stand in the buffer at `from..to`.
    Bytes { from: usize, to: usize },
    /// An error of the socket.
    Socket(Failure),
}

impl Slot {
    pub(super) fn new(seed: u64, pipeline: usize) -> Self {
        Slot {
            stage: Stage::Down { open_at_ns: 0 },
            stream: None,
            talk: Talk::new(seed, pipeline),
            timeout_from_ns: 0,
            silence: Silence::default(),
            failures: 0,
            turns_due: 0,
            turns_begun: 0,
            again: false,
        }
    }

    /// Begins to open a connection.
    pub(super) fn open(
        &mut self,
        (dial, number): (&Dial, u64),
        (registry, token): (&Registry, Token),
        now_ns: u64,
    ) -> Result<(), Failure> {
        self.talk.begin(number);
        self.timeout_from_ns = now_ns;
        self.silence.want_connection(now_ns);
        let mut stream = dial.open(number).map_err(|error| Failure::of_connecting(&error))?;
        registry
            .register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|_| Failure::Other)?;
        self.stream = Some(stream);
        self.stage = Stage::Connecting { since_ns: now_ns };
        Ok(())
    }

    /// Takes the result of connecting, once the socket is ready. Returns when the silence began, if this ends it.
    pub(super) fn connected(&mut self) -> Result<Option<u64>, Failure> {
        match self.stream().take_error() {
            Ok(None) => {}
            Ok(Some(error)) | Err(error) => return Err(Failure::of_connecting(&error)),
        }
        if is_its_own_peer(self.stream()) {
            return Err(Failure::ConnectRefused);
        }
        self.stage = Stage::Open;
        Ok(self.silence.connected())
    }

    /// Begins a message, whose latency counts from `since_ns`.
    pub(super) fn ask(&mut self, sizes: &std::ops::RangeInclusive<u64>, since_ns: u64, now_ns: u64) {
        if self.talk.waiting().is_empty() {
            self.timeout_from_ns = now_ns;
        }
        self.silence.want_answer(now_ns);
        self.talk.ask(sizes, since_ns);
    }

    /// Sends as much of the messages as the kernel takes now.
    pub(super) fn send(&mut self, buffer: &mut [u8]) -> Result<(), Failure> {
        while self.talk.owes() {
            let bytes = self.talk.outgoing(buffer);
            let mut stream = self.stream();
            match stream.write(bytes) {
                Ok(sent) => self.talk.took(sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Failure::of_talking(&error)),
            }
        }
        Ok(())
    }

    /// Reads and checks until the socket is empty, or until [`TURN_BYTES`] were read. `to_the_end` says that the kernel
    /// has reported the end of the stream. Without it, a short read means that the socket is empty, and the kernel
    /// reports what comes later. Calls `silence` with the beginning and end of a silence that a byte of an answer ends,
    /// and `answer` for each message that is whole.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
        to_the_end: bool,
        mut clock: impl FnMut() -> u64,
        mut silence: impl FnMut(u64, u64),
        mut answer: impl FnMut(Asked, u64),
    ) -> Result<Received, Bad> {
        let mut taken = 0;
        loop {
            let mut stream = self.stream.as_ref().expect("only an open connection is read");
            let received = match stream.read(buffer) {
                Ok(0) => return Ok(Received::End),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Drained),
                Err(error) => return Err(Bad::Socket(Failure::of_talking(&error))),
            };
            let now_ns = clock();
            self.timeout_from_ns = now_ns;
            let heard = self.talk.hear(&buffer[..received], |asked| answer(asked, now_ns));
            let right = heard.map_or_else(|Unexpected { from }| from, |()| received);
            if right > 0 {
                let wants_more = !self.talk.waiting().is_empty() || self.turns_begun < self.turns_due;
                if let Some(since_ns) = self.silence.heard(now_ns, wants_more) {
                    silence(since_ns, now_ns);
                }
            }
            if right < received {
                return Err(Bad::Bytes { from: right, to: received });
            }
            taken += received;
            if received < buffer.len() && !to_the_end {
                return Ok(Received::Drained);
            }
            if taken >= TURN_BYTES {
                return Ok(Received::More);
            }
        }
    }

    /// Ends our side. The slot goes on reading until the peer ends its own.
    pub(super) fn half_close(&mut self, until_ns: u64) {
        // An error means that the connection is gone already, and the next read reports that.
        let _ = self.stream().shutdown(Shutdown::Write);
        self.stage = Stage::Closing { until_ns };
    }

    /// Closes the socket.
    pub(super) fn close(&mut self, then: Stage) {
        self.stream = None;
        self.stage = then;
    }

    /// Whether the slot waits for the peer now: for a connection, or for an answer.
    pub(super) fn wants(&self) -> bool {
        match self.stage {
            Stage::Connecting { .. } => true,
            Stage::Open => !self.talk.waiting().is_empty(),
            Stage::Down { .. } | Stage::Closing { .. } | Stage::Over => false,
        }
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("there is a socket from opening to closing")
    }
}

/// Whether the socket is connected to itself. If no process listens on a local port, the kernel can choose that port as
/// the source of a connection to it. TCP then connects the socket to itself, and every byte would come back correctly.
fn is_its_own_peer(stream: &TcpStream) -> bool {
    matches!((stream.local_addr(), stream.peer_addr()), (Ok(local), Ok(peer)) if local == peer)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use mio::{Events, Poll};
    use socket2::{Domain, Socket, Type};

    use super::super::plan::Plan;
    use super::*;

    #[test]
    fn a_socket_connected_to_itself_is_no_service() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
        socket.connect(&socket.local_addr().expect("an address")).expect("it connects to itself");
        let mut slot = Slot::new(1, 1);
        slot.stream = Some(TcpStream::from_std(socket.into()));
        assert_eq!(slot.connected(), Err(Failure::ConnectRefused));
    }

    #[test]
    fn a_connection_to_a_service_is_open_and_ends_the_wait_for_it() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let plan =
            Plan { address: listener.local_addr().expect("an address"), ..super::super::plan::tests::plan() };
        let (mut poll, mut events) = (Poll::new().expect("a poll"), Events::with_capacity(1));
        let mut slot = Slot::new(1, 1);
        slot.open((&Dial::new(&plan), 1), (poll.registry(), Token(0)), 7).expect("it begins");
        poll.poll(&mut events, Some(std::time::Duration::from_secs(60))).expect("an event");
        assert_eq!(slot.connected(), Ok(Some(7)));
        assert_eq!((slot.stage, slot.wants()), (Stage::Open, false));
    }
}
