//! The side HTTP endpoint besieged by readers that never read: scrapes and probes are still answered within a second.
//!
//! An attacker asks for a page, takes no byte of the answer beyond what its tiny receive buffer holds, and connects again
//! once the server has closed it. The answers then fill the server's send buffers. All attackers share one thread, so
//! that they compete with the server for one processor at most.

mod common;

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::victim::Victim;
use common::{eventually, http};
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, Socket, Type};

/// Scrapes and probes asked for during one siege, of each kind.
const QUESTIONS: usize = 60;

/// The promise: a scrape or a probe takes at most this long. The time in which the endpoint's threads are ready to run,
/// and others have the processors, is not counted: see [`kept_waiting`].
const PROMPT: Duration = Duration::from_secs(1);

/// A connection is given up after this long. If the kernel delivers an answer after the server has closed the
/// connection, the client that does not read does not learn of the close.
const GIVE_UP: Duration = Duration::from_millis(3100);

/// Descriptors beyond the endpoint's connections: a newly accepted connection before it takes another's place, and what
/// two scrapes open in `/proc` while they run.
const MORE_FILES: usize = 5;

/// What an attacker asks for.
const PAGE: &[&str] = &["/"];
const ALL: &[&str] = &["/", "/metrics", "/status.json"];

/// `TCP_MAXSEG` of an attacker's connections. With small segments the server's send buffer holds less than a page.
const SMALL: &[Option<u32>] = &[Some(536)];
const ANY: &[Option<u32>] = &[Some(536), Some(1460), None];

/// Between two questions. All of them together take longer than the three seconds that a connection may live.
const BETWEEN: Duration = Duration::from_millis(26);

/// Scrapes by a slow reader, which each take about 20 pieces of the answer.
const SLOW_SCRAPES: usize = 20;

/// Sieges take place one after another: each claims that a second is enough.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Attackers, all of one thread.
struct Besiegers {
    address: SocketAddr,
    poll: Poll,
    attackers: Vec<Attacker>,
    /// When each attacker has to do something by itself: to connect, or to give up.
    due: BTreeSet<(Instant, usize)>,
    siege: Siege,
}

/// How a siege is laid.
#[derive(Clone, Copy)]
struct Siege {
    attackers: usize,
    /// Between two connections of one attacker, at least.
    pause: Duration,
    segments: &'static [Option<u32>],
    paths: &'static [&'static str],
}

struct Attacker {
    stream: Option<mio::net::TcpStream>,
    request: Option<String>,
    connected: Instant,
    due: Instant,
    /// How often it has connected.
    times: usize,
}

impl Besiegers {
    fn new(address: SocketAddr, siege: Siege) -> Self {
        let now = Instant::now();
        // One after another, so that they keep the pace and do not come all at once.
        let attacker = |number: usize| {
            let due = now + siege.pause.mul_f64(number as f64 / siege.attackers as f64);
            Attacker { stream: None, request: None, connected: now, due, times: 0 }
        };
        let attackers: Vec<Attacker> = (0..siege.attackers).map(attacker).collect();
        Besiegers {
            address,
            poll: Poll::new().expect("a poller"),
            due: attackers.iter().enumerate().map(|(number, attacker)| (attacker.due, number)).collect(),
            attackers,
            siege,
        }
    }

    /// Attacks until told to stop, and counts the requests that were sent.
    fn attack(mut self, over: &AtomicBool, sent: &AtomicUsize) {
        let mut events = Events::with_capacity(1024);
        while !over.load(Ordering::Relaxed) {
            let now = Instant::now();
            while let Some(&(at, number)) = self.due.first()
                && at <= now
            {
                self.hang_up(number, now);
                self.connect(number, now);
            }
            match self.poll.poll(&mut events, Some(Duration::from_millis(2))) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => outcome.expect("events"),
            }
            for event in &events {
                let Token(number) = event.token();
                if event.is_read_closed() || event.is_error() {
                    let pause_ends = self.attackers[number].connected + self.siege.pause;
                    self.hang_up(number, pause_ends.max(Instant::now()));
                } else if event.is_writable() {
                    let attacker = &mut self.attackers[number];
                    if let (Some(stream), Some(request)) = (&mut attacker.stream, attacker.request.take()) {
                        sent.fetch_add(
                            usize::from(stream.write_all(request.as_bytes()).is_ok()),
                            Ordering::Relaxed,
                        );
                    }
                }
            }
        }
    }

    fn schedule(&mut self, number: usize, at: Instant) {
        let attacker = &mut self.attackers[number];
        self.due.remove(&(attacker.due, number));
        attacker.due = at;
        self.due.insert((at, number));
    }

    /// Closes an attacker's connection, to connect again at this time.
    fn hang_up(&mut self, number: usize, again: Instant) {
        if let Some(stream) = self.attackers[number].stream.take() {
            // A reset, so that no port of this machine stays in TIME_WAIT.
            let socket = Socket::from(OwnedFd::from(stream));
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        self.schedule(number, again);
    }

    fn connect(&mut self, number: usize, now: Instant) {
        let Siege { paths, segments, .. } = self.siege;
        let attacker = &mut self.attackers[number];
        let kind = number + attacker.times;
        attacker.times += 1;
        attacker.connected = now;
        attacker.request =
            Some(format!("GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n", paths[kind % paths.len()]));
        let stream = approach(self.address, segments[kind / paths.len() % segments.len()]);
        // Without a port or a descriptor to be had it tries again after a pause.
        let watched = stream.and_then(|mut stream| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(number), interest).map(|()| stream)
        });
        let again = now + if watched.is_ok() { GIVE_UP } else { self.siege.pause };
        self.attackers[number].stream = watched.ok();
        self.schedule(number, again);
    }
}

/// Begins a connection that has room for almost nothing.
fn approach(address: SocketAddr, segment: Option<u32>) -> io::Result<mio::net::TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_recv_buffer_size(1)?;
    if let Some(segment) = segment {
        socket.set_tcp_mss(segment)?;
    }
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
            Err(error)
        }
        _ => Ok(mio::net::TcpStream::from_std(socket.into())),
    }
}

/// How long the endpoint's threads, taken together, have been ready to run while others had the processors. The rest of
/// an answer's time is the server's own, on any machine and under any load.
fn kept_waiting(target: &Victim) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", target.server.pid())).expect("it runs");
    let waits = tasks.map(|task| {
        let read = |file| std::fs::read_to_string(task.as_ref().expect("a thread").path().join(file));
        let comm = read("comm").expect("its name");
        // "run wait slices": the two times are in nanoseconds. A kernel without these numbers has no such file.
        let schedstat = read("schedstat").unwrap_or_default();
        let wait = schedstat.split_whitespace().nth(1).map_or(0, |wait| wait.parse().expect("a number"));
        if comm.starts_with("mill-http") { Duration::from_nanos(wait) } else { Duration::ZERO }
    });
    waits.sum()
}

/// Lays a siege, and does this meanwhile.
fn besiege(siege: Siege, meanwhile: impl FnOnce(&Victim)) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Victim::start(&["--workers", "2"]);
    let address = target.server.metrics;
    let (over, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let besiegers = Besiegers::new(address, siege);
        scope.spawn(|| besiegers.attack(&over, &sent));
        let held = catch_unwind(AssertUnwindSafe(|| {
            eventually("every attacker has struck", || {
                (sent.load(Ordering::Relaxed) >= siege.attackers).then_some(())
            });
            meanwhile(&target);
        }));
        over.store(true, Ordering::Relaxed);
        held.unwrap_or_else(|panic| resume_unwind(panic));
    });
    println!("{} attackers sent {} requests", siege.attackers, sent.load(Ordering::Relaxed));
    target.unharmed();
}

/// Asks all the questions, one after another. Each is answered in time, and the endpoint has no more connections than it
/// may have.
fn ask(target: &Victim) {
    let most_files = target.files + 16 + MORE_FILES;
    let paths = ["/metrics", "/healthz", "/metrics", "/readyz"];
    let asked = paths.iter().cycle().take(2 * QUESTIONS).map(|path| {
        let (start, before) = (Instant::now(), kept_waiting(target));
        let answer = http(target.server.metrics, format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
        let (took, waited) = (start.elapsed(), kept_waiting(target) - before);
        assert_eq!(answer.code, 200, "{path}: {}", answer.body);
        let files = target.server.open_files();
        assert!(files <= most_files, "{files} descriptors, and {most_files} are expected at most");
        assert!(took < PROMPT + waited, "{path} took {took:?}, with {waited:?} of wait for a processor");
        thread::sleep(BETWEEN);
        took
    });
    let slowest = asked.max().expect("there were questions");
    println!("the slowest of {} answers took {slowest:?}", 2 * QUESTIONS);
}

/// Scrapes with a small receive buffer, and reads a piece of the answer every few milliseconds.
fn scrape_slowly(address: SocketAddr) -> io::Result<String> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(8 * 1024)?;
    socket.set_tcp_mss(536)?;
    socket.set_read_timeout(Some(common::PATIENCE))?;
    socket.connect(&address.into())?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")?;
    let (mut answer, mut piece) = (Vec::new(), [0; 1000]);
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(String::from_utf8_lossy(&answer).into_owned()),
            length => answer.extend_from_slice(&piece[..length]),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether all of an answer has arrived. An answer that was cut short must end with a reset, not like a whole one.
fn is_whole(answer: &io::Result<String>) -> bool {
    let Ok(answer) = answer else { return false };
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let length = format!("Content-Length: {}", body.len());
    assert!(head.lines().any(|line| line == length), "{} bytes: {head}", body.len());
    true
}

#[test]
fn two_dozen_readers_that_never_read_delay_no_answer() {
    besiege(Siege { attackers: 24, pause: Duration::from_millis(10), segments: SMALL, paths: PAGE }, ask);
}

#[test]
fn two_hundred_readers_that_never_read_delay_no_answer() {
    besiege(Siege { attackers: 200, pause: Duration::from_millis(50), segments: SMALL, paths: ALL }, ask);
}

#[test]
fn two_hundred_readers_with_segments_of_any_size_delay_no_answer() {
    besiege(Siege { attackers: 200, pause: Duration::from_millis(50), segments: ANY, paths: ALL }, ask);
}

#[test]
fn a_thousand_readers_that_never_read_delay_no_answer() {
    besiege(Siege { attackers: 1000, pause: Duration::from_millis(500), segments: SMALL, paths: ALL }, ask);
}

/// Two dozen attackers come and go during one answer, so its connection is soon the oldest of all. It can still lose its
/// place to a burst of attackers that arrives before it has shown that it reads. A scraper then scrapes again.
#[test]
fn a_scraper_that_reads_slowly_outlives_readers_that_never_read() {
    let siege = Siege { attackers: 24, pause: Duration::from_millis(100), segments: SMALL, paths: PAGE };
    besiege(siege, |target| {
        let whole = (0..SLOW_SCRAPES).filter(|_| is_whole(&scrape_slowly(target.server.metrics))).count();
        println!("{whole} of {SLOW_SCRAPES} slow scrapes were whole");
        // Closed by age, none of them would be whole. On an idle machine nearly all are.
        assert!(whole >= SLOW_SCRAPES / 4, "{whole} of {SLOW_SCRAPES} slow scrapes were whole");
    });
}
