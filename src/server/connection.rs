//! One connection: its gate, its times, and the part that only its holder may touch.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use mio::net::TcpStream;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::SendFlags;
use socket2::SockRef;

use super::gate::Gate;
use super::kernel::{self, Delivery};
use super::metrics::Reason;
use crate::sync::lock;

/// A connection, shared by the reactor's table and, while it is queued or served, the pool.
#[derive(Debug)]
pub(crate) struct Connection<Session> {
    pub(crate) gate: Gate,
    /// Its place in the reactor's table.
    pub(crate) slot: usize,
    /// Tells the connection from others that had the same place.
    pub(crate) serial: u64,
    pub(crate) peer: SocketAddr,
    pub(crate) accepted_ns: u64,
    /// When its last turn found something to do, or it was accepted. Its holder writes it before it parks the
    /// connection, and the reactor reads it.
    parked_ns: AtomicU64,
    /// Since when the client has taken none of its output; 0 when no output is watched. Written and read
    /// as `parked_ns`, and written by the reactor while the connection is parked or half-closed.
    blocked_ns: AtomicU64,
    /// What the client's kernel had acknowledged at `blocked_ns`. Written and read as `blocked_ns`.
    blocked_acked: AtomicU64,
    /// Only the holder of the gate touches it, or the reactor while the gate has no holder. So no thread ever waits for
    /// the lock. It makes that sound without unsafe code, at two uncontended atomic operations a turn.
    held: Mutex<Held<Session>>,
}

/// The part of a connection that belongs to the holder of the gate.
#[derive(Debug)]
pub(crate) struct Held<Session> {
    /// `None` once closed.
    stream: Option<TcpStream>,
    /// The service's part. It is there as long as the socket is.
    session: Option<Session>,
    /// Output that the socket did not take, and how much of it has been sent since.
    pending: Vec<u8>,
    flushed: usize,
    /// Why the connection will be closed when `pending` is out, or why it was half-closed.
    pub(crate) ending: Option<Reason>,
    /// Nothing has been sent yet.
    pub(crate) silent: bool,
    /// The service stopped halfway, and goes on before anything is read. See [`Next::More`](super::Next::More).
    pub(crate) more: bool,
}

/// How far output came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The kernel has all of it.
    All,
    /// The kernel took no more. The rest is kept, and the kernel reports when it takes more.
    Blocked,
    /// The kernel had no memory (ENOBUFS, ENOMEM). The rest is kept. The kernel reports nothing, so a later try is due.
    OutOfMemory,
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
            blocked_acked: AtomicU64::new(0),
            held: Mutex::new(Held {
                stream: Some(stream),
                session: Some(session),
                pending: Vec::new(),
                flushed: 0,
                ending: None,
                silent: true,
                more: false,
            }),
        }
    }

    /// For the holder of the gate, and for the reactor while the gate has no holder.
    pub(crate) fn hold(&self) -> MutexGuard<'_, Held<Session>> {
        lock(&self.held)
    }

    /// Notes when the last turn found anything to do. For the holder, before it parks the connection.
    pub(crate) fn rest(&self, now_ns: u64) {
        self.parked_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Since when the client has been silent.
    pub(crate) fn parked_ns(&self) -> u64 {
        self.parked_ns.load(Ordering::Relaxed)
    }

    /// Whether the client has never sent anything that was looked at.
    pub(crate) fn is_new(&self) -> bool {
        self.parked_ns() == self.accepted_ns
    }

    /// Since when the client has taken none of its output; `None` when no output is watched.
    pub(crate) fn blocked_ns(&self) -> Option<u64> {
        Some(self.blocked_ns.load(Ordering::Relaxed)).filter(|since| *since != 0)
    }

    /// Begins to watch output that the client has not taken, or notes that it has just taken some.
    pub(crate) fn watch_output(&self, delivery: Delivery, now_ns: u64) {
        self.blocked_acked.store(delivery.acked, Ordering::Relaxed);
        self.blocked_ns.store(now_ns, Ordering::Relaxed);
    }

    /// No output waits for the client any more.
    pub(crate) fn output_taken(&self) {
        self.blocked_ns.store(0, Ordering::Relaxed);
    }

    /// Whether the client's kernel has acknowledged more than when the output was last watched.
    pub(crate) fn has_taken_some(&self, delivery: Delivery) -> bool {
        delivery.acked > self.blocked_acked.load(Ordering::Relaxed)
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

    /// How far the output that the kernel was given has come.
    pub(crate) fn delivery(&self) -> Delivery {
        // It cannot fail on a TCP socket. If it did, the output would count as delivered, as it would without the look.
        kernel::delivery(self.stream()).unwrap_or_default()
    }

    /// Sends `output` as far as the kernel takes it now, and keeps a copy of the rest. Also returns how many bytes the
    /// kernel took.
    pub(crate) fn send(&mut self, output: &[u8]) -> io::Result<(Sent, usize)> {
        let (outcome, sent) = self.write(output)?;
        if outcome != Sent::All {
            self.pending = output[sent..].to_vec();
            self.flushed = 0;
        }
        Ok((outcome, sent))
    }

    /// Whether output is kept that the kernel has not taken.
    pub(crate) fn owes(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends the output that is kept, as far as the kernel takes it now.
    pub(crate) fn flush(&mut self) -> io::Result<(Sent, usize)> {
        let (outcome, sent) = self.write(&self.pending[self.flushed..])?;
        self.flushed += sent;
        if outcome == Sent::All {
            // Not cleared but dropped: a parked connection keeps no buffer.
            self.pending = Vec::new();
            self.flushed = 0;
        }
        Ok((outcome, sent))
    }

    fn write(&self, output: &[u8]) -> io::Result<(Sent, usize)> {
        let mut sent = 0;
        while sent < output.len() {
            // Not `write`: it raises SIGPIPE when the client is gone, which ends a program that does not ignore it.
            match rustix::net::send(self.stream(), &output[sent..], SendFlags::NOSIGNAL) {
                Ok(more) => sent += more,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok((Sent::Blocked, sent)),
                Err(Errno::NOBUFS | Errno::NOMEM) => return Ok((Sent::OutOfMemory, sent)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok((Sent::All, sent))
    }

    /// Half-closes the connection: the client reads all output, and then the end of the stream.
    pub(crate) fn shut_down_write(&self) {
        // An error means that the connection has failed already, and the next read says so.
        let _ = self.stream().shutdown(Shutdown::Write);
    }

    /// Makes the close reset the connection and drop the output that the kernel holds. The client then sees an error, and
    /// not an end that looks like a whole answer. Otherwise the kernel would keep the output for minutes.
    pub(crate) fn reset_at_close(&self) {
        if let Some(stream) = &self.stream {
            // An error means that the connection has failed already.
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// The service's part of an open connection.
    pub(crate) fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("an open connection has its session")
    }

    /// Closes the socket and frees its memory. Returns the session if the connection was open: its destructor is the
    /// service's code.
    pub(crate) fn close(&mut self) -> Option<Session> {
        self.pending = Vec::new();
        self.stream = None;
        self.session.take()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Instant;

    use socket2::{Domain, Socket, Type};

    use super::*;

    /// A connection with small kernel buffers, and its client.
    fn tight() -> (Connection<()>, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        SockRef::from(&listener).set_send_buffer_size(1).expect("a socket option");
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(16 * 1024).expect("a socket option");
        socket.connect(&listener.local_addr().expect("an address").into()).expect("it listens");
        let client = std::net::TcpStream::from(socket);
        client.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let (stream, peer) = listener.accept().expect("a client");
        stream.set_nonblocking(true).expect("a socket option");
        (Connection::new((0, 1), TcpStream::from_std(stream), peer, (), 1), client)
    }

    #[test]
    fn output_is_watched_until_the_client_has_taken_it() {
        let (connection, mut client) = tight();
        let mut held = connection.hold();
        assert_eq!(connection.blocked_ns(), None);
        let (outcome, sent) = held.send(&[7; 1_000_000]).expect("the client is there");
        assert_eq!(outcome, Sent::Blocked);
        connection.watch_output(held.delivery(), 5);
        assert_eq!(connection.blocked_ns(), Some(5));
        // The client reads everything that the kernel took.
        client.read_exact(&mut vec![0; sent]).expect("it is on its way");
        let deadline = Instant::now() + Duration::from_secs(60);
        while held.delivery().pending {
            assert!(Instant::now() < deadline, "the client has it all");
        }
        assert!(connection.has_taken_some(held.delivery()));
        connection.watch_output(held.delivery(), 6);
        assert!(!connection.has_taken_some(held.delivery()), "nothing since");
        connection.output_taken();
        assert_eq!(connection.blocked_ns(), None);
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
        assert!(matches!(held.read(&mut buffer), Ok(1)), "the look took nothing");
        assert!(!held.has_input(), "the byte has been read");
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
