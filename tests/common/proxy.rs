//! A TCP proxy that harms the data that passes through it, by a plan for each connection.
//!
//! Plans and the sizes of pieces come from a seed alone, and not from the timing. Connection number n of a proxy with
//! the same seed gets the same plan and the same pieces. A test that fails prints its seed, and
//! `MILLPOND_FAULT_SEED=<seed>` in the environment runs it with that one.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use slab::Slab;
use socket2::{Domain, SockRef, Socket, Type};

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

/// The size of the kernel's receive buffer for each of the proxy's sockets. It is small, so a sender soon has to wait
/// in the middle of its data.
const KERNEL_BUFFER: usize = 4096;

/// The seed of one test. It is printed when the test fails.
pub struct Seed(u64);

impl Seed {
    /// The one in `MILLPOND_FAULT_SEED`, or else a new one.
    pub fn new() -> Self {
        Seed(match std::env::var("MILLPOND_FAULT_SEED") {
            Ok(seed) => seed.parse().expect("MILLPOND_FAULT_SEED is a whole number"),
            Err(_) => fastrand::u64(..),
        })
    }

    /// Random numbers for one use of the seed: the same for the same use, and others for another.
    pub fn for_use(&self, number: u64) -> fastrand::Rng {
        // The seeds are far apart, so that neighbouring uses have nothing in common.
        fastrand::Rng::with_seed(self.0 ^ number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to run it again with the same faults: MILLPOND_FAULT_SEED={}", self.0);
        }
    }
}

/// The plan for one connection.
#[derive(Clone, Debug)]
pub struct Plan {
    pub to_server: Way,
    pub to_client: Way,
}

/// The plan for the data in one direction.
#[derive(Clone, Debug)]
pub struct Way {
    /// The sizes of the pieces that it is cut into: every order of magnitude in the range is as likely.
    pub pieces: RangeInclusive<usize>,
    /// After this many bytes both sides are reset.
    pub reset_after: Option<usize>,
}

impl Way {
    pub fn cut_into(pieces: RangeInclusive<usize>) -> Self {
        Way { pieces, reset_after: None }
    }
}

impl Plan {
    /// The same plan for both directions.
    pub fn cut_into(pieces: RangeInclusive<usize>) -> Self {
        Plan { to_server: Way::cut_into(pieces.clone()), to_client: Way::cut_into(pieces) }
    }
}

/// The counts of a proxy's work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub connections: usize,
    /// Connections that are over, in whatever way.
    pub over: usize,
    pub resets: usize,
    pub bytes_to_server: usize,
    pub pieces_to_server: usize,
    pub bytes_to_client: usize,
}

/// A proxy on a thread of its own. When it is dropped, its connections are reset.
pub struct Proxy {
    pub address: SocketAddr,
    done: Arc<Mutex<Done>>,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// `plan` gets each connection's number from 0, and random numbers of its own.
    pub fn to(
        server: SocketAddr,
        seed: &Seed,
        plan: impl Fn(usize, &mut fastrand::Rng) -> Plan + Send + 'static,
    ) -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("a socket");
        // Accepted sockets inherit the size, and the kernel must know it before a connection is made.
        listener.set_recv_buffer_size(KERNEL_BUFFER).expect("a socket option");
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
        listener.listen(4096).expect("it listens");
        let mut listener = TcpListener::from_std(listener.into());
        let address = listener.local_addr().expect("an address");
        let poll = Poll::new().expect("a poller");
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).expect("it can be watched");
        let stop = Waker::new(poll.registry(), STOP).expect("a waker");
        let done = Arc::new(Mutex::new(Done::default()));
        let seed = Seed(seed.0);
        let mut works = Works { server, listener, poll, links: Slab::new(), done: Arc::clone(&done) };
        let thread = std::thread::spawn(move || works.run(&seed, plan));
        Proxy { address, done, stop, thread: Some(thread) }
    }

    pub fn done(&self) -> Done {
        *self.done.lock().expect("the proxy's counts")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.wake().expect("it can be woken");
        let outcome = self.thread.take().expect("it runs").join();
        if !std::thread::panicking() {
            outcome.expect("the proxy ran to its end");
        }
    }
}

struct Works {
    server: SocketAddr,
    listener: TcpListener,
    poll: Poll,
    links: Slab<Link>,
    done: Arc<Mutex<Done>>,
}

/// A connection through the proxy.
struct Link {
    client: TcpStream,
    server: TcpStream,
    up: Passage,
    down: Passage,
    random: fastrand::Rng,
    /// A step may be possible that no event will report.
    lively: bool,
}

/// One direction of a link, and its progress.
struct Passage {
    way: Way,
    passed: usize,
    piece: Vec<u8>,
    /// Bytes of the piece that are sent.
    sent: usize,
    over: bool,
}

/// The result of a step.
enum Step {
    /// A piece has passed.
    Passed,
    /// No step is possible now.
    Blocked,
    /// This direction has ended.
    Over,
    /// Both sides must be reset.
    Reset,
}

impl Works {
    fn run(&mut self, seed: &Seed, plan: impl Fn(usize, &mut fastrand::Rng) -> Plan) {
        let mut events = Events::with_capacity(1024);
        loop {
            let lively = self.links.iter().any(|(_, link)| link.lively);
            let timeout = lively.then_some(Duration::ZERO);
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => outcome.expect("events"),
            }
            for event in &events {
                match event.token() {
                    STOP => {
                        self.links.drain().for_each(Link::reset);
                        return;
                    }
                    LISTENER => self.accept(seed, &plan),
                    // Two tokens for each link, one a side.
                    Token(token) => {
                        if let Some(link) = self.links.get_mut(token / 2) {
                            link.lively = true;
                        }
                    }
                }
            }
            let lively: Vec<usize> =
                self.links.iter().filter(|(_, link)| link.lively).map(|(place, _)| place).collect();
            lively.into_iter().for_each(|place| self.advance(place));
        }
    }

    fn accept(&mut self, seed: &Seed, plan: &impl Fn(usize, &mut fastrand::Rng) -> Plan) {
        loop {
            let mut client = match self.listener.accept() {
                Ok((client, _)) => client,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => panic!("the proxy cannot accept: {error}"),
            };
            let number = self.done.lock().expect("the proxy's counts").connections;
            let mut random = seed.for_use(number as u64);
            let Plan { to_server, to_client } = plan(number, &mut random);
            let socket = Socket::new(Domain::for_address(self.server), Type::STREAM, None).expect("a socket");
            socket.set_recv_buffer_size(KERNEL_BUFFER).expect("a socket option");
            socket.connect(&self.server.into()).expect("the server takes connections");
            socket.set_nonblocking(true).expect("a socket option");
            let mut server = TcpStream::from_std(socket.into());
            let place = self.links.vacant_entry();
            for (side, stream) in [&mut client, &mut server].into_iter().enumerate() {
                stream.set_nodelay(true).expect("a socket option");
                let interest = Interest::READABLE | Interest::WRITABLE;
                let token = Token(place.key() * 2 + side);
                self.poll.registry().register(stream, token, interest).expect("it can be watched");
            }
            let (up, down) = (Passage::of(to_server), Passage::of(to_client));
            place.insert(Link { client, server, up, down, random, lively: true });
            self.done.lock().expect("the proxy's counts").connections += 1;
        }
    }

    /// Takes one step of each direction of a link.
    fn advance(&mut self, place: usize) {
        let link = &mut self.links[place];
        let up = link.up.step(&mut link.client, &mut link.server, &mut link.random);
        let down = match up {
            Step::Reset => Step::Blocked,
            _ => link.down.step(&mut link.server, &mut link.client, &mut link.random),
        };
        link.lively = [&up, &down].iter().any(|step| !matches!(step, Step::Blocked | Step::Over));
        let mut done = self.done.lock().expect("the proxy's counts");
        if let Step::Passed = up {
            done.bytes_to_server += link.up.piece.len();
            done.pieces_to_server += 1;
        }
        if let Step::Passed = down {
            done.bytes_to_client += link.down.piece.len();
        }
        let reset = [&up, &down].iter().any(|step| matches!(step, Step::Reset));
        if reset || link.up.over && link.down.over {
            done.resets += usize::from(reset);
            done.over += 1;
            let link = self.links.remove(place);
            if reset {
                link.reset();
            }
        }
    }
}

impl Link {
    /// Closes both sides so that the kernel sends resets, even if data is still on its way.
    fn reset(self) {
        for stream in [&self.client, &self.server] {
            SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
        }
    }
}

impl Passage {
    fn of(way: Way) -> Self {
        Passage { way, passed: 0, piece: Vec::new(), sent: 0, over: false }
    }

    /// Passes one piece on, or the rest of it.
    fn step(&mut self, from: &mut TcpStream, to: &mut TcpStream, random: &mut fastrand::Rng) -> Step {
        if self.over {
            return Step::Over;
        }
        if self.sent == self.piece.len() {
            let room = self.way.reset_after.map_or(usize::MAX, |after| after - self.passed);
            if room == 0 {
                return Step::Reset;
            }
            let (least, most) = (*self.way.pieces.start(), *self.way.pieces.end());
            let scale = most >> random.u32(..=(most / least).ilog2());
            let size = random.usize(least..=scale.max(least));
            self.piece.resize(size.min(room), 0);
            self.sent = self.piece.len();
            match from.read(&mut self.piece) {
                Ok(0) => {
                    self.over = true;
                    let _ = to.shutdown(Shutdown::Write);
                    return Step::Over;
                }
                Ok(received) => {
                    self.piece.truncate(received);
                    self.sent = 0;
                    self.passed += received;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Blocked,
                // If one side is gone, so is the other.
                Err(_) => return Step::Reset,
            }
        }
        match to.write(&self.piece[self.sent..]) {
            Ok(sent) => self.sent += sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Blocked,
            Err(_) => return Step::Reset,
        }
        if self.sent == self.piece.len() { Step::Passed } else { Step::Blocked }
    }
}
