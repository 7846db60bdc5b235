//! One connection: its gate, its times, and what only its holder may touch.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use mio::net::TcpStream;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::SendFlags;
use socket2::SockRef;

use super::gate::Gate;
use super::metrics::Reason;
use crate::sync::lock;

/// A connection, shared by the reactor's table and, while it is queued or served, the pool.
#[derive(Debug)]
pub(crate) struct Connection<Session> {
    pub(crate) gate: Gate,
    /// Its place in the reactor's table.
    pub(crate) slot: usize,
    /// Tells it from others that had the same place.
    pub(crate) serial: u64,
    pub(crate) peer: SocketAddr,
    pub(crate) accepted_ns: u64,
    /// When its last turn found something to do, or it was accepted. Written by its holder before it parks,
    /// read by the reactor.
    parked_ns: AtomicU64,
    /// Since when the client has taken nothing of the output that waits; 0 when none waits. Written and read
    /// as `parked_ns`.
    blocked_ns: AtomicU64,
    /// Touched only by whoever holds the gate, and by the reactor while nobody does, so the lock is never
    /// waited for; it is what makes that sound without unsafe code, at two uncontended atomic operations a
    /// turn.
    held: Mutex<Held<Session>>,
}

/// What belongs to the holder of the gate.
#[derive(Debug)]
pub(crate) struct Held<Session> {
    /// `None` once closed.
    stream: Option<TcpStream>,
    /// The service's part; it goes with the socket.
    session: Option<Session>,
    /// Output that the socket did not take, and how much of it has been sent since.
    pending: Vec<u8>,
    flushed: usize,
    /// Why the connection will be closed when `pending` is out, or why it was half-closed.
    pub(crate) ending: Option<Reason>,
    /// Nothing has been sent yet.
    pub(crate) silent: bool,
}

/// What became of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The kernel has all of it.
    All,
    /// The kernel took no more; the rest waits.
    Blocked,
}

impl<Session> Connection<Session> {
    pub(crate) fn new(
        (slot, serial): (usize, u64),
        stream: TcpStream,
        peer: SocketAddr,
        session: Session,
        now_ns: u64,
    ) -> Self {
        Connection {
            gate: Gate::new(),
            slot,
            serial,
            peer,
            accepted_ns: now_ns,
            parked_ns: AtomicU64::new(now_ns),
            blocked_ns: AtomicU64::new(0),
            held: Mutex::new(Held {
                stream: Some(stream),
                session: Some(session),
                pending: Vec::new(),
                flushed: 0,
                ending: None,
                silent: true,
            }),
        }
    }

    /// For the holder of the gate only, and for the reactor while nobody holds it.
    pub(crate) fn hold(&self) -> MutexGuard<'_, Held<Session>> {
        lock(&self.held)
    }

    /// Notes when the last turn found anything to do. By the holder, before it parks the connection.
    pub(crate) fn rest(&self, now_ns: u64) {
        self.parked_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Since when the client has been silent.
    pub(crate) fn parked_ns(&self) -> u64 {
        self.parked_ns.load(Ordering::Relaxed)
    }

    /// Since when the client has taken none of the output that waits for it; `None` when none waits.
    pub(crate) fn blocked_ns(&self) -> Option<u64> {
        Some(self.blocked_ns.load(Ordering::Relaxed)).filter(|since| *since != 0)
    }

    pub(crate) fn set_blocked(&self, since_ns: Option<u64>) {
        self.blocked_ns.store(since_ns.unwrap_or(0), Ordering::Relaxed);
    }
}

impl<Session> Held<Session> {
    /// The socket. It is there until [`close`](Held::close), and only a holder of an open connection calls
    /// this.
    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("an open connection has its socket")
    }

    /// Reads into the free room of `buffer`, once. `Ok(0)` is the end of the stream.
    pub(crate) fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.stream(), spare_capacity(buffer)) {
                Err(Errno::INTR) => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Whether something waits to be read: input, or the end of the stream.
    pub(crate) fn has_input(&self) -> bool {
        match self.stream().peek(&mut [0]) {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Whether the client's side has what was sent to it, but for a packet or two: a connection that is closed before may
    /// lose it, since a client that then speaks is answered with a reset.
    ///
    /// The kernel tells how much it still holds only to unsafe code. It also tells whether there is room, which is when
    /// what it holds fills no more than two thirds of what it may; so it may hold almost nothing for a moment.
    pub(crate) fn is_taken(&self) -> bool {
        let socket = SockRef::from(self.stream());
        let Ok(room) = socket.send_buffer_size() else { return true };
        if socket.set_send_buffer_size(0).is_err() {
            return true;
        }
        let mut asked = [PollFd::new(self.stream(), PollFlags::OUT)];
        let answers = rustix::event::poll(&mut asked, Some(&Timespec::default()));
        // What is set counts twice, for the kernel's own needs. Of what the kernel had given it by itself, only as much
        // comes back as may be set (`net.core.wmem_max`).
        let _ = socket.set_send_buffer_size(room / 2);
        // A broken connection has an answer too, and takes nothing more.
        !matches!(answers, Ok(0) | Err(Errno::INTR))
    }

    /// Sends `output` as far as the kernel takes it now, and keeps a copy of the rest. Returns also how much
    /// went out.
    pub(crate) fn send(&mut self, output: &[u8]) -> io::Result<(Sent, usize)> {
        let sent = self.write(output)?;
        if sent < output.len() {
            self.pending = output[sent..].to_vec();
            self.flushed = 0;
            return Ok((Sent::Blocked, sent));
        }
        Ok((Sent::All, sent))
    }

    /// Whether output waits for the client.
    pub(crate) fn owes(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends what waits, as far as the kernel takes it now.
    pub(crate) fn flush(&mut self) -> io::Result<(Sent, usize)> {
        let sent = self.write(&self.pending[self.flushed..])?;
        self.flushed += sent;
        if self.flushed < self.pending.len() {
            return Ok((Sent::Blocked, sent));
        }
        // Not cleared but dropped: a parked connection keeps no buffer.
        self.pending = Vec::new();
        self.flushed = 0;
        Ok((Sent::All, sent))
    }

    fn write(&self, output: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < output.len() {
            // Not `write`, which sends SIGPIPE when the client is gone, and ends a program that does not ignore that.
            match rustix::net::send(self.stream(), &output[sent..], SendFlags::NOSIGNAL) {
                Ok(more) => sent += more,
                Err(Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// Ends our side of the conversation: the client reads to the end of what was sent, and then the end.
    pub(crate) fn shut_down_write(&self) {
        // An error means that the connection is gone already, which the next read tells.
        let _ = self.stream().shutdown(Shutdown::Write);
    }

    /// The service's part of an open connection.
    pub(crate) fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("an open connection has its session")
    }

    /// Closes the socket and lets go of memory. The session comes back if it was open, to be dropped with
    /// care.
    pub(crate) fn close(&mut self) -> Option<Session> {
        self.pending = Vec::new();
        self.stream = None;
        self.session.take()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::{Duration, Instant};

    use super::*;

    /// A connection for which the kernel keeps little, and its client.
    fn tight() -> (Connection<()>, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        SockRef::from(&listener).set_send_buffer_size(1).expect("a socket option");
        let client =
            std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        client.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        SockRef::from(&client).set_recv_buffer_size(16 * 1024).expect("a socket option");
        let (stream, peer) = listener.accept().expect("a client");
        stream.set_nonblocking(true).expect("a socket option");
        (Connection::new((0, 1), TcpStream::from_std(stream), peer, (), 1), client)
    }

    #[test]
    fn output_is_taken_when_the_client_has_it_and_not_when_the_kernel_does() {
        let (connection, mut client) = tight();
        let mut held = connection.hold();
        SockRef::from(held.stream()).set_send_buffer_size(200_000).expect("a socket option");
        assert!(held.is_taken(), "nothing was sent");
        let output = vec![7; 100_000];
        assert!(matches!(held.send(&output), Ok((Sent::All, 100_000))), "the kernel takes it all");
        assert!(!held.is_taken());
        let mut left = output.len();
        let deadline = Instant::now() + Duration::from_secs(60);
        while left > 0 {
            assert!(left < 20_000 || !held.is_taken(), "{left} bytes are in neither window nor buffer");
            left -= client.read(&mut [0; 1000]).expect("it is on its way");
        }
        while !held.is_taken() {
            assert!(Instant::now() < deadline, "the client has it all");
        }
        // It can be used as before.
        assert!(matches!(held.send(&output), Ok((Sent::All, 100_000))));
        drop(client);
        while !held.is_taken() {
            assert!(Instant::now() < deadline, "the client is gone");
        }
    }

    #[test]
    fn to_ask_leaves_the_kernel_as_much_room_as_it_had() {
        let (connection, _client) = tight();
        let held = connection.hold();
        let room = || SockRef::from(held.stream()).send_buffer_size().expect("a socket option");
        SockRef::from(held.stream()).set_send_buffer_size(20_000).expect("a socket option");
        let before = room();
        assert!(held.is_taken() && held.is_taken());
        assert_eq!(room(), before);
    }

    #[test]
    fn input_and_the_end_wait_to_be_read_and_silence_does_not() {
        let (connection, mut client) = tight();
        let held = connection.hold();
        let deadline = Instant::now() + Duration::from_secs(60);
        let comes = || {
            while !held.has_input() {
                assert!(Instant::now() < deadline, "it is on its way");
            }
        };
        assert!(!held.has_input(), "silence");
        client.write_all(b"a").expect("sent");
        comes();
        let mut buffer = Vec::with_capacity(10);
        assert!(matches!(held.read(&mut buffer), Ok(1)), "to look has taken nothing");
        assert!(!held.has_input(), "it has been read");
        drop(client);
        comes();
        assert!(matches!(held.read(&mut buffer), Ok(0)), "the end");
    }

    #[test]
    fn output_goes_out_in_whatever_pieces_the_kernel_takes() {
        let (connection, mut client) = tight();
        let mut held = connection.hold();
        let mut cut_short = 0;
        for length in [1, 2, 1000, 64 * 1024, 1_000_003] {
            let output: Vec<u8> = (0..length).map(|at| (at % 251) as u8 ^ (at / 251) as u8).collect();
            let (mut outcome, mut sent) = held.send(&output).expect("the client is there");
            let (mut answer, mut piece) = (Vec::new(), vec![0; 4096]);
            for size in (1..=4096).cycle() {
                if outcome == Sent::Blocked {
                    assert!(held.owes());
                    let (now, more) = held.flush().expect("the client is there");
                    cut_short += usize::from(now == Sent::Blocked && more > 0);
                    (outcome, sent) = (now, sent + more);
                    assert!(sent <= length, "more than there is to send");
                }
                if sent > answer.len() {
                    let received = client.read(&mut piece[..size]).expect("it is on its way");
                    answer.extend_from_slice(&piece[..received]);
                }
                if outcome == Sent::All && answer.len() == length {
                    break;
                }
            }
            assert!(answer == output && sent == length && !held.owes(), "{length} bytes");
        }
        assert!(cut_short > 10, "the kernel took a part of the rest {cut_short} times");
    }
}
