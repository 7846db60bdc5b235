//! Clients of an echo server in this process that send and read in any pieces, with pauses, and end in any way.
//!
//! Also used by the fuzzer of `fuzz/`, so it needs nothing of its neighbours.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use millpond::prometheus::Registry;
use millpond::{Running, Server, Service};

/// Long enough for anything on a loaded machine; reached only when something is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// The size of a small buffer, with which both sides write in parts. With the smallest size that it allows, the kernel
/// drops segments and repeats them ever more slowly. Then 200 kB take a minute with any server.
const NARROW: usize = 16 * 1024;

/// Bytes in one call, after a pause.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub bytes: usize,
    pub pause: Duration,
}

/// The behaviour of one client.
#[derive(Clone, Debug)]
pub struct Client {
    /// Makes its bytes differ from those of others.
    pub salt: u64,
    /// The pieces that it sends before it half-closes the connection.
    pub writes: Vec<Piece>,
    /// The sizes and pauses of its reads, which it repeats over and over.
    pub reads: Vec<Piece>,
    /// Whether the kernel's buffers have [`NARROW`] bytes.
    pub narrow: bool,
    /// Resets the connection when it has read so many bytes, if it ever does.
    pub reset_after: Option<usize>,
}

/// A server for such clients, and the totals of their traffic.
pub struct Echoes {
    running: Running,
    registry: Registry,
    clients: u64,
    bytes: u64,
    resets: u64,
}

impl Echoes {
    pub fn start(service: impl Service) -> Self {
        let server = Server::builder("echo").workers(2).service(service).bind(([127, 0, 0, 1], 0).into());
        let running = server.expect("a free port").start().expect("its threads");
        let registry = Registry::new();
        running.register(&registry).expect("the first of its name");
        Echoes { running, registry, clients: 0, bytes: 0, resets: 0 }
    }

    /// Runs these clients at the same time. Each gets all of its own bytes back, in order. Afterwards the server's
    /// metrics agree with that exactly.
    ///
    /// # Panics
    ///
    /// If a client gets other bytes, or the metrics do not agree.
    pub fn check(&mut self, clients: &[Client]) {
        let address = self.running.local_addr();
        let resets: Vec<bool> = std::thread::scope(|scope| {
            let running: Vec<_> =
                clients.iter().map(|client| scope.spawn(move || client.run(address))).collect();
            running.into_iter().map(|client| client.join().expect("every byte in its place")).collect()
        });
        self.clients += clients.len() as u64;
        self.resets += resets.iter().filter(|reset| **reset).count() as u64;
        let whole = clients.iter().zip(&resets).filter(|(_, reset)| !**reset);
        self.bytes += whole.map(|(client, _)| client.length() as u64).sum::<u64>();
        self.is_balanced();
    }

    /// Checks the metrics when all clients are gone. The server accepted every connection, and its client closed it. No
    /// job waits or runs. Except after resets, the server sent every byte that it read.
    fn is_balanced(&self) {
        let start = Instant::now();
        while self.sum("connections", "") > 0.0 || self.sum("pool_workers_busy", "") > 0.0 {
            assert!(start.elapsed() < PATIENCE, "{} connections left", self.sum("connections", ""));
            std::thread::yield_now();
        }
        assert_eq!(self.sum("connections_accepted_total", ""), self.clients as f64);
        let reasons = ["client", "error"].map(|reason| self.sum("connections_closed_total", reason));
        assert_eq!(reasons.iter().sum::<f64>(), self.clients as f64, "closed for another reason");
        assert!(reasons[1] <= self.resets as f64, "{} errors, {} resets", reasons[1], self.resets);
        assert_eq!(self.sum("pool_queue_depth", ""), 0.0);
        assert_eq!(self.sum("pool_submitted_total", ""), self.sum("pool_jobs_total", ""));
        assert_eq!(self.sum("pool_jobs_total", "completed"), self.sum("pool_jobs_total", ""));
        let (received, sent) = (self.sum("received_bytes_total", ""), self.sum("sent_bytes_total", ""));
        if self.resets == 0 {
            assert_eq!((received, sent), (self.bytes as f64, self.bytes as f64));
        }
        assert!(received >= sent && sent >= self.bytes as f64, "{received} in, {sent} out, {}", self.bytes);
    }

    /// The sum of a family's gauges or counters that have this value of a label, or of all.
    fn sum(&self, name: &str, value: &str) -> f64 {
        let families = self.registry.gather();
        let name = format!("millpond_{name}");
        let family = families.iter().find(|family| family.name() == name).expect("it is registered");
        let of_it = family.get_metric().iter().filter(|metric| {
            value.is_empty() || metric.get_label().iter().any(|label| label.value() == value)
        });
        of_it.map(|metric| metric.get_gauge().get_value() + metric.get_counter().get_value()).sum()
    }

    /// Drains. No connection is left to be cut, and the report says the same as the metrics did.
    pub fn finish(self) {
        self.running.handle().drain();
        let report = self.running.wait().expect("it drained");
        assert!(report.is_clean(), "{report}");
        assert_eq!(report.accepted, self.clients);
        assert!(report.received >= report.sent && report.sent >= self.bytes, "{report}");
    }
}

impl Client {
    fn length(&self) -> usize {
        self.writes.iter().map(|piece| piece.bytes).sum()
    }

    /// Whether it ended in a reset.
    fn run(&self, address: SocketAddr) -> bool {
        let stream = self.connect(address).expect("a connection");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| self.write(&stream));
            let reset = self.read(&stream);
            if reset {
                // Ends the writer too, if it waits for room.
                let _ = stream.shutdown(Shutdown::Both);
                let _ = writer.join().expect("the writer");
                return true;
            }
            writer.join().expect("the writer").expect("all is taken");
            false
        })
    }

    fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        if self.narrow {
            socket.set_recv_buffer_size(NARROW)?;
            socket.set_send_buffer_size(NARROW)?;
        }
        if self.reset_after.is_some() {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        socket.set_tcp_nodelay(true)?;
        socket.connect_timeout(&address.into(), PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    }

    fn write(&self, mut stream: &TcpStream) -> io::Result<()> {
        let mut at = 0;
        for piece in &self.writes {
            pause(piece.pause);
            let bytes: Vec<u8> = (at..at + piece.bytes).map(|at| byte(self.salt, at)).collect();
            stream.write_all(&bytes)?;
            at += piece.bytes;
        }
        stream.shutdown(Shutdown::Write)
    }

    /// Reads to the end, or to the offset at which it must reset the connection. Returns whether it must.
    fn read(&self, mut stream: &TcpStream) -> bool {
        let mut buffer = vec![0; self.reads.iter().map(|piece| piece.bytes).max().unwrap_or(1).max(1)];
        let mut at = 0;
        for piece in self.reads.iter().cycle() {
            pause(piece.pause);
            let read = match stream.read(&mut buffer[..piece.bytes.max(1)]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) => panic!("after {at} of {} bytes: {error}", self.length()),
            };
            for (got, at) in buffer[..read].iter().zip(at..) {
                assert!(at < self.length(), "more than was sent");
                assert_eq!(*got, byte(self.salt, at), "the byte at {at} of {}", self.length());
            }
            at += read;
            if self.reset_after.is_some_and(|most| at >= most) {
                return true;
            }
        }
        assert_eq!(at, self.length(), "the end came early");
        // Closed with the linger of a reset, but whole.
        false
    }
}

fn pause(pause: Duration) {
    if !pause.is_zero() {
        std::thread::sleep(pause);
    }
}

/// The byte at this offset of a stream. The stream's 8-byte words are all different, so a byte in the wrong place
/// shows.
fn byte(salt: u64, at: usize) -> u8 {
    let word =
        (at as u64 / 8 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (word ^ (word >> 32)).to_le_bytes()[at % 8]
}
