//! A slot: one connection after another.
//!
//! A slot sends what it owes and checks what comes, as far as its socket allows now. When to begin a message, to
//! open and to give up is for `engine` to say.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::dial::Dial;
use super::report::Failure;
use super::talk::{Asked, Talk, Unexpected};

/// Bytes read or written at a time. At 64 KiB the system calls' own cost is small beside the copying.
pub(super) const PIECE: usize = 64 * 1024;

/// Bytes received from one connection before the others have their turn.
const TURN_BYTES: usize = 1024 * 1024;

/// Where a slot's connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// There is none; the next is to be opened at this time, if messages are.
    Down { open_at_ns: u64 },
    /// It is being made.
    Connecting { since_ns: u64 },
    /// It is in use, or could be.
    Open,
    /// All is sent and our side is closed; what the peer still sends is read until its end, or until this time.
    Closing { until_ns: u64 },
    /// There will be none any more.
    Over,
}

/// A place for one connection at a time.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) stage: Stage,
    stream: Option<TcpStream>,
    pub(super) talk: Talk,
    /// When a byte came last, or began to be wanted.
    pub(super) silent_since_ns: u64,
    /// Failures since the last answer.
    pub(super) failures: u32,
    /// With a schedule: the turns that have come, and those whose message was begun.
    pub(super) turns_due: u64,
    pub(super) turns_begun: u64,
    /// Stands in the engine's list of those that have more to read.
    pub(super) again: bool,
}

/// What came of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// All there is for now.
    Drained,
    /// There may be more.
    More,
    /// All there is: the peer has ended its side.
    End,
}

/// Why receiving failed.
#[derive(Debug)]
pub(super) enum Bad {
    /// Bytes that were not expected: the first so many of the buffer came, and are wrong from here on.
    Bytes {
        from: usize,
        to: usize,
    },
    Socket(Failure),
}

impl Slot {
    pub(super) fn new(seed: u64, pipeline: usize) -> Self {
        Slot {
            stage: Stage::Down { open_at_ns: 0 },
            stream: None,
            talk: Talk::new(seed, pipeline),
            silent_since_ns: 0,
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
        self.silent_since_ns = now_ns;
        let mut stream = dial.open(number).map_err(|error| Failure::of_connecting(&error))?;
        registry
            .register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|_| Failure::Other)?;
        self.stream = Some(stream);
        self.stage = Stage::Connecting { since_ns: now_ns };
        Ok(())
    }

    /// What became of the connection that was being made, when its socket says that something did.
    pub(super) fn connected(&self) -> Result<(), Failure> {
        match self.stream().take_error() {
            Ok(None) => Ok(()),
            Ok(Some(error)) | Err(error) => Err(Failure::of_connecting(&error)),
        }
    }

    /// Begins a message.
    pub(super) fn ask(&mut self, sizes: &std::ops::RangeInclusive<u64>, since_ns: u64, now_ns: u64) {
        if self.talk.waiting().is_empty() {
            self.silent_since_ns = now_ns;
        }
        self.talk.ask(sizes, since_ns);
    }

    /// Sends what is owed, as far as the kernel takes it now.
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

    /// Reads and checks until there is no more, or others have their turn. `to_the_end` when the kernel says that
    /// there is an end to be read: otherwise a short read has emptied the socket, and what comes later is
    /// reported anew. Calls `silence` with its two ends when a byte was wanted, and `answer` for each message that
    /// is whole.
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
            if !self.talk.waiting().is_empty() {
                silence(self.silent_since_ns, now_ns);
            }
            self.silent_since_ns = now_ns;
            let heard = self.talk.hear(&buffer[..received], |asked| answer(asked, now_ns));
            if let Err(Unexpected { from }) = heard {
                return Err(Bad::Bytes { from, to: received });
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

    /// Ends our side, and goes on reading until the peer ends its own.
    pub(super) fn half_close(&mut self, until_ns: u64) {
        // An error means that the connection is gone already, which the next read tells.
        let _ = self.stream().shutdown(Shutdown::Write);
        self.stage = Stage::Closing { until_ns };
    }

    /// Closes the socket.
    pub(super) fn close(&mut self, then: Stage) {
        self.stream = None;
        self.stage = then;
    }

    /// Whether something is wanted from the peer: a connection, or an answer.
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
