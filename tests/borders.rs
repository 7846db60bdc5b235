//! Tests for steps that a change could leave out without a failure of another test: a second check, a wake-up, or its
//! time. Each test here failed when its step was left out.

mod common;

use std::cell::RefCell;
use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::pools::{Latch, all_asleep, held as held_pool};
use common::scrape::Scrape;
use common::{Millpond, PATIENCE, connect, connect_with, eventually, ping, thread_states};
use millpond::{
    Echo, Exposition, Next, Overload, Phase, Pool, PoolError, Running, Server, ServerBuilder, Service,
};
use prometheus::Registry;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use socket2::SockRef;

const MIB: usize = 1024 * 1024;

/// The number of bytes that the reactor reads from a half-closed connection before others have their turn. It is the
/// same in `src/server/closing.rs`.
const DISCARDED_AT_ONCE: usize = 256 * 1024;

/// The answer of [`Swallow`], and below it the two bytes that get it.
static ANSWER: [u8; 100_000] = [7; 100_000];
const ANSWER_ME: u8 = b'?';
const CLOSE_ME: u8 = b'!';

/// Answers two bytes with [`ANSWER`] and closes after one of them. Drops all others. After [`hold`](Swallow::hold) the
/// next new connection holds up the reactor, which calls `open`.
#[derive(Clone, Default)]
struct Swallow {
    holds: Arc<AtomicBool>,
    held: Latch,
    released: Latch,
}

impl Service for Swallow {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {
        if self.holds.load(Ordering::Acquire) {
            self.held.open();
            self.released.wait();
        }
    }

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        let (answer, close) = (bytes.contains(&ANSWER_ME), bytes.contains(&CLOSE_ME));
        bytes.clear();
        if answer || close {
            bytes.extend_from_slice(&ANSWER);
        }
        if close { Next::Close } else { Next::KeepOpen }
    }
}

impl Swallow {
    /// Holds up the reactor of the server at this address. Returns the connection that holds it up.
    fn hold(&self, address: SocketAddr) -> TcpStream {
        self.holds.store(true, Ordering::Release);
        let holder = connect(address);
        self.held.wait();
        holder
    }
}

/// Starts a server in this process, and its metrics.
fn start<S: Service>(builder: ServerBuilder<S>) -> (Running, Exposition) {
    let any_port = ([127, 0, 0, 1], 0).into();
    with_metrics(builder.bind(any_port).expect("a port").start().expect("threads"))
}

/// Starts the same, with a receive buffer of this size for each connection. Accepted sockets inherit it from the
/// listener.
fn start_with<S: Service>(builder: ServerBuilder<S>, receive_buffer: usize) -> (Running, Exposition) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    SockRef::from(&listener).set_recv_buffer_size(receive_buffer).expect("a socket option");
    with_metrics(builder.adopt(listener).expect("it listens").start().expect("threads"))
}

fn with_metrics(running: Running) -> (Running, Exposition) {
    let any_port = ([127, 0, 0, 1], 0).into();
    let registry = Registry::new();
    running.register(&registry).expect("a new registry");
    let exposition = Exposition::serve(registry, any_port).expect("a port and threads");
    (running, exposition)
}

/// A server for up to ten clients, with this idle timeout.
fn for_ten<S: Service>(service: S, idle: Duration) -> ServerBuilder<S> {
    Server::builder("echo").service(service).workers(2).max_connections(10).idle_timeout(Some(idle))
}

/// Bytes that a client has sent and that the server, in this process, has not read; `None` if its socket is gone.
fn unread(server: SocketAddr, client: &TcpStream) -> Option<usize> {
    let hexadecimal = |address: SocketAddr| match address.ip() {
        // The table has an address in the machine's byte order.
        std::net::IpAddr::V4(ip) => {
            format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port())
        }
        std::net::IpAddr::V6(ip) => unreachable!("{ip} is not what the server was bound to"),
    };
    let ends = [server, client.local_addr().expect("an address")].map(hexadecimal);
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("this process");
    // "0: local remote state sending:unread ..."
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.get(1..3)? != ends.as_slice() {
            return None;
        }
        let (_, unread) = fields.get(4)?.split_once(':')?;
        usize::from_str_radix(unread, 16).ok()
    })
}

/// Sends `length` zeros while the reactor is held up. Returns whether the server's kernel has them all in time.
fn fill(server: SocketAddr, client: &mut TcpStream, length: usize) -> bool {
    client.set_nonblocking(true).expect("a socket option");
    let (zeros, start) = (vec![0; length], Instant::now());
    let mut sent = 0;
    while unread(server, client) != Some(length) && start.elapsed() < Duration::from_millis(500) {
        match client.write(&zeros[sent..]) {
            Ok(more) => sent += more,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "after {sent} bytes"),
        }
        thread::sleep(Duration::from_millis(1));
    }
    client.set_nonblocking(false).expect("a socket option");
    unread(server, client) == Some(length)
}

/// The server closes a half-closed connection after some time, whether its client has read its output or not. A close
/// with unread input would reset the connection, and the reset would destroy output that is still on its way. So the
/// reactor has to discard all input before, not only the first [`DISCARDED_AT_ONCE`] bytes. The kernel reports nothing
/// new meanwhile.
fn half_closed_clients_have_no_reset(last_word: u8, idle: Duration, receive_buffer: usize) {
    // The last check before the close discards as much again. So more than twice as much input is needed to show that a
    // check is missing. The kernel doubles a buffer's size, and by default allows no more than 208 KiB.
    let most = std::fs::read_to_string("/proc/sys/net/core/rmem_max").expect("a limit");
    let is_large = most.trim().parse::<usize>().expect("a number") >= MIB;
    let much = if is_large { 2 * DISCARDED_AT_ONCE + 1 } else { DISCARDED_AT_ONCE + 20_000 };
    let attempt = || {
        let service = Swallow::default();
        let (running, exposition) = start_with(for_ten(service.clone(), idle), MIB);
        let address = running.local_addr();
        let mut client = connect_with(receive_buffer, address);
        // A client that has sent much has the whole buffer as its window.
        client.write_all(&vec![0; 4 * MIB]).expect("it is taken to the end");
        client.write_all(&[last_word]).expect("sent");
        eventually("half-closed", || {
            (Scrape::of(exposition.local_addr()).connections("closing") == 1.0).then_some(())
        });
        let since = Instant::now();
        let holder = service.hold(address);
        let is_full = fill(address, &mut client, much);
        service.released.open();
        if !is_full || since.elapsed() > Duration::from_millis(700) {
            // The kernel has too little room. Or the machine is too slow, and the time is nearly over before the
            // reactor could have discarded anything.
            return None;
        }
        eventually("the server has read it, or has closed", || {
            unread(address, &client).is_none_or(|unread| unread == 0).then_some(())
        });
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("the end, and no reset");
        assert!(answer == ANSWER, "{} of {} bytes", answer.len(), ANSWER.len());
        // If a reset comes after the end of the stream, a read on Linux does not report it.
        assert!(client.take_error().expect("a socket option").is_none(), "a reset after the end");
        drop((client, holder));
        running.handle().drain();
        let report = running.wait().expect("it drained");
        assert_eq!((report.accepted, report.failed, report.cut), (2, 0, 0), "{report}");
        Some(())
    };
    eventually("a round in which the kernel takes enough, soon enough", attempt);
}

#[test]
fn all_input_is_discarded_after_the_service_has_closed() {
    // The client's kernel does not hold all of the answer: the rest waits in the server's.
    half_closed_clients_have_no_reset(CLOSE_ME, Duration::from_secs(300), 16 * 1024);
}

#[test]
fn all_input_is_discarded_after_the_idle_timeout() {
    // The client's kernel holds all of the answer: a client with output on its way may not count as idle.
    half_closed_clients_have_no_reset(ANSWER_ME, Duration::from_millis(300), 2 * MIB);
}

/// The same as in `src/cli/serve.rs`.
const SPARE_DESCRIPTORS: usize = 32;

/// Whether the server has closed its spare descriptors since it had `before` in all. It does so when `accept` fails.
fn is_starved(server: &Millpond, before: usize) -> bool {
    server.open_files() <= before - SPARE_DESCRIPTORS + 1
}

/// The share of a second in which a thread of this name runs or waits for a processor. On a busy machine it gets little
/// processor time even if it never sleeps.
fn running_share(server: &Millpond, name: &str) -> f64 {
    const LOOKS: u32 = 100;
    let tasks = format!("/proc/{}/task", server.pid());
    let runs = || {
        let tasks = std::fs::read_dir(&tasks).expect("the process is there").flatten();
        let mut stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        // "pid (name) S ..."
        stats.any(|stat| stat.contains(&format!("({name}) R")))
    };
    let looks = (0..LOOKS).filter(|_| {
        thread::sleep(Duration::from_millis(10));
        runs()
    });
    looks.count() as f64 / f64::from(LOOKS)
}

/// The server's first pause after a failed `accept` is 10 ms. If the reactor did not wake at its end, the client would
/// wait for the heartbeat, which comes once a second.
#[test]
fn a_pause_of_the_door_ends_when_it_is_over() {
    let server = Millpond::start(&["--workers", "2"]);
    let before = server.open_files();
    let mut waited = Duration::ZERO;
    for _ in 0..5 {
        eventually("all descriptors are as before", || (server.open_files() == before).then_some(()));
        server.limit_files(before as u64, 20_000);
        let mut client = server.connect();
        client.write_all(b"hello").expect("the kernel takes it");
        eventually("accept has failed", || is_starved(&server, before).then_some(()));
        server.limit_files(20_000, 20_000);
        let start = Instant::now();
        client.read_exact(&mut [0; 5]).expect("it is served");
        waited += start.elapsed();
    }
    assert!(waited < Duration::from_millis(2500), "five pauses lasted {waited:?}");
}

/// The server reopens all of its spare descriptors before it accepts again. While another part of the program uses one
/// of them, the server must not keep the others, and must not try again without a pause.
#[test]
fn spare_descriptors_stay_free_while_one_is_in_use() {
    let server = Millpond::start(&["--workers", "2"]);
    let before = server.open_files();
    server.limit_files(before as u64, 20_000);
    let mut client = server.connect();
    eventually("accept has failed", || is_starved(&server, before).then_some(()));
    let hold_one = || {
        let scraper = connect(server.metrics);
        eventually("the side HTTP endpoint has accepted it", || {
            (server.open_files() == before - SPARE_DESCRIPTORS + 1).then_some(())
        });
        scraper
    };
    // The endpoint closes the connection after three seconds, so the connection is open all the while.
    let scraper = hold_one();
    let share = running_share(&server, "mill-echo");
    assert!(share < 0.5, "the reactor runs {share} of the time while a descriptor is missing");
    drop(scraper);

    let scraper = hold_one();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        let asked = Instant::now();
        drop(server.scrape());
        assert!(asked.elapsed() < Duration::from_millis(700), "a scrape took {:?}", asked.elapsed());
        // The server tries again at least once a second.
        thread::sleep(Duration::from_millis(20));
    }
    drop(scraper);
    server.limit_files(20_000, 20_000);
    ping(&mut client, b"served in the end");
}

/// The reactor sleeps at most until the lame duck phase ends. If it did not ask for that time, the phase would end with
/// the heartbeat, which comes once a second.
#[test]
fn a_lame_duck_ends_on_time() {
    let start = Instant::now();
    for _ in 0..5 {
        let builder = Server::builder("lame").service(Swallow::default()).workers(1).max_connections(10);
        let builder = builder.lame_duck(Duration::from_millis(20));
        let running = builder.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
        running.handle().drain();
        assert!(running.wait().expect("it drained").is_clean());
    }
    assert!(start.elapsed() < Duration::from_millis(2500), "five times 20 ms took {:?}", start.elapsed());
}

/// Answers each message. If a message begins with `wait`, the answer comes only when the latch is open.
struct Patient(Latch);

impl Service for Patient {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        if bytes.starts_with(b"wait") {
            self.0.wait();
        }
        Next::KeepOpen
    }
}

/// A server with two workers, and a client that holds one of them until the latch opens.
fn held(name: &str, latch: &Latch, build: impl Fn(Builder) -> Builder) -> (Running, TcpStream) {
    let builder = Server::builder(name).service(Patient(latch.clone())).workers(2).max_connections(1);
    let bound = build(builder).bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let running = bound.start().expect("threads");
    let mut client = connect(running.local_addr());
    client.write_all(b"wait").expect("sent");
    (running, client)
}

type Builder = ServerBuilder<Patient>;

/// If the reactor did not ask for the time of the deadline, the next review of a connection would end the drain. Here
/// that is a quarter of a second later.
#[test]
fn a_drain_ends_at_its_deadline() {
    let timeout = Duration::from_millis(300);
    let lasted = || {
        let latch = Latch::default();
        let (running, _client) = held("deadline", &latch, |builder| builder.drain_timeout(timeout));
        eventually("it is accepted", || running.handle().readiness().is_err().then_some(()));
        running.handle().drain();
        let report = running.wait().expect("it drained");
        latch.open();
        assert_eq!(report.cut, 1, "{report}");
        report.drain
    };
    // The least of five times, because the machine may be busy. Workers are given a tenth of a second after the
    // deadline.
    let least = (0..5).map(|_| lasted()).min().expect("five");
    assert!((timeout..timeout + Duration::from_millis(190)).contains(&least), "{least:?}");
}

/// A worker that parks a connection does not wake the reactor. So the reactor checks every 10 ms for a connection to
/// evict, and not only with the heartbeat, which comes once a second.
#[test]
fn a_client_that_waits_for_one_to_evict_is_let_in_soon() {
    let mut waited = Duration::ZERO;
    for _ in 0..5 {
        let latch = Latch::default();
        let (running, mut client) = held("evict", &latch, |builder| builder.overload(Overload::Evict));
        let mut newcomer = connect(running.local_addr());
        newcomer.write_all(b"hello").expect("the kernel takes it");
        all_asleep("mill-evict", 3);
        latch.open();
        client.read_exact(&mut [0; 4]).expect("it is answered");
        let start = Instant::now();
        newcomer.read_exact(&mut [0; 5]).expect("the new client takes the other's place");
        waited += start.elapsed();
        assert_eq!(client.read(&mut [0]).expect("the end, and no reset"), 0);
        drop((client, newcomer));
        running.handle().drain();
        assert!(running.wait().expect("it drained").is_clean());
    }
    assert!(waited < Duration::from_millis(2500), "five clients waited for {waited:?}");
}

/// The idle timeout is shorter than the write timeout, which is 30 seconds here.
#[test]
fn a_silent_client_is_closed_soon_after_its_idle_timeout() {
    let (running, _exposition) = start(for_ten(Swallow::default(), Duration::from_millis(100)));
    let mut client = connect(running.local_addr());
    let start = Instant::now();
    assert_eq!(client.read(&mut [0]).expect("the end, and no reset"), 0);
    let lasted = start.elapsed();
    assert!((Duration::from_millis(90)..Duration::from_secs(5)).contains(&lasted), "{lasted:?}");
}

/// If a new worker did not take a free number, each resize would leave a number behind, with its part of the metrics.
#[test]
fn a_new_worker_has_the_number_of_one_that_has_left() {
    let numbers = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&numbers);
    let builder = Pool::builder("number").workers(2).on_worker_start(move |number| {
        seen.lock().expect("the numbers").push(number);
        Ok(())
    });
    let pool = builder.build().expect("the threads");
    for _ in 0..5 {
        pool.resize(1).expect("fewer workers need no new thread");
        eventually("one worker has left", || (thread_states("mill-number-").len() == 1).then_some(()));
        pool.resize(2).expect("a thread");
    }
    let numbers = numbers.lock().expect("the numbers");
    assert!(numbers.len() == 7 && numbers.iter().all(|number| *number < 2), "{numbers:?}");
}

/// The last thing that a thread does is to drop its thread-locals.
#[test]
fn after_a_clean_drain_the_threads_have_ended() {
    struct Slow(Arc<AtomicBool>);
    impl Drop for Slow {
        fn drop(&mut self) {
            thread::sleep(Duration::from_millis(200));
            self.0.store(true, Ordering::Release);
        }
    }
    thread_local!(static SLOW: RefCell<Option<Slow>> = const { RefCell::new(None) });
    let dropped = Arc::new(AtomicBool::new(false));
    let slow = Slow(Arc::clone(&dropped));
    let pool = Pool::builder("joined").workers(1).build().expect("a thread");
    pool.submit(move || SLOW.set(Some(slow))).expect("room").join().expect("it runs");
    assert!(pool.drain(PATIENCE).is_clean());
    assert!(dropped.load(Ordering::Acquire), "the thread still runs");
}

/// The test runs in a process of its own, because the limit that prevents the thread holds for the whole process.
#[test]
fn a_thread_that_the_system_refuses_is_no_worker() {
    const CHILD: &str = "MILLPOND_TEST_CHILD";
    const STACK: usize = 64 * MIB;
    if std::env::var_os(CHILD).is_none() {
        let itself = std::env::current_exe().expect("this program");
        let name = "a_thread_that_the_system_refuses_is_no_worker";
        let child = Command::new(itself).args(["--exact", name, "--nocapture"]).env(CHILD, "1").output();
        let Output { status, stdout, stderr } = child.expect("it runs");
        let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(status.success() && stdout.contains("1 passed"), "{status}\n{stdout}\n{stderr}");
        return;
    }
    let builder = Pool::builder("refused").workers(1).queue_capacity(4).stack_size(STACK);
    let pool = Arc::new(builder.build().expect("a thread"));
    // The allocator reserves more for a new thread than it keeps. So the thread must have allocated before the
    // measurement.
    pool.submit(|| drop(vec![1_u8; 100])).expect("room").join().expect("it runs");
    // Half of the memory that one more stack takes.
    let status = std::fs::read_to_string("/proc/self/status").expect("this process");
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB"));
    let size: u64 = size.expect("the field").trim().parse().expect("a number");
    let maximum = getrlimit(Resource::As).maximum;
    let current = Some(size * 1024 + STACK as u64 / 2);
    setrlimit(Resource::As, Rlimit { current, maximum }).expect("the limit can be lowered");
    let refused = pool.resize(2).expect_err("no room for a stack");
    assert!(matches!(refused, PoolError::Spawn { started: 0, .. }), "{refused:?}");
    assert_eq!(pool.stats().workers, 1);
    // If the pool counted on a second worker, the inner job would wait for it.
    let inner = Arc::clone(&pool);
    let outer = pool.submit(move || inner.submit(|| 1).expect("room").join()).expect("room");
    let outcome = outer.join_timeout(PATIENCE).map_err(|_| "it still waits");
    assert_eq!(outcome.expect("joined"), Ok(Ok(1)));
}

/// After the reactor has found the listen queue empty and closed the listener, it may get no other event. So it has to
/// run its loop once more at once.
#[test]
fn a_drain_without_clients_is_over_at_once() {
    let lasted = || {
        let builder = Server::builder("nobody").service(Swallow::default()).workers(1).max_connections(10);
        let running = builder.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
        running.handle().drain();
        running.wait().expect("it drained").drain
    };
    // The least of five times, because the machine may be busy.
    let least = (0..5).map(|_| lasted()).min().expect("five");
    assert!(least < Duration::from_millis(150), "{least:?}");
}

/// Echoes, and notes the address of each buffer.
#[derive(Clone, Default)]
struct Surveyor(Arc<Mutex<HashSet<usize>>>);

impl Service for Surveyor {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        self.0.lock().expect("the addresses").insert(bytes.as_ptr().addr());
        Next::KeepOpen
    }
}

/// A worker gives its buffer back before it sleeps. The messages come one after another, so few workers are awake at a
/// time, but each message goes to the worker that has slept longest.
#[test]
fn workers_that_sleep_hold_no_buffer() {
    const WORKERS: usize = 40;
    let surveyor = Surveyor::default();
    let builder = for_ten(surveyor.clone(), Duration::from_secs(300)).workers(WORKERS);
    let (running, _exposition) = start(builder);
    let mut client = connect(running.local_addr());
    for _ in 0..5 * WORKERS {
        ping(&mut client, b"hello");
    }
    let buffers = surveyor.0.lock().expect("the addresses").len();
    assert!(buffers < WORKERS / 4, "{buffers} buffers for one message at a time");
}

/// A quarter of a second after a drain began, the reactor keeps every further client out of the listen queue. It does
/// so once, and then sleeps until something happens.
#[test]
fn a_drain_that_waits_for_a_worker_does_not_spin() {
    let mut server = Millpond::start(&["--workers", "1", "--work", "3s"]);
    let mut client = server.connect();
    client.write_all(b"hello").expect("sent");
    eventually("a worker has it", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
    server.signal(Signal::INT);
    eventually("further clients are kept out", || {
        let outcome = TcpStream::connect_timeout(&server.echo, Duration::from_millis(100));
        outcome.is_err().then_some(())
    });
    let share = running_share(&server, "mill-echo");
    assert!(share < 0.5, "the reactor runs {share} of the time while nothing happens");
    client.read_exact(&mut [0; 5]).expect("it is answered");
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn clients_in_the_listen_queue_at_the_deadline_are_counted_as_refused() {
    let builder = for_ten(Echo, Duration::from_secs(300)).max_connections(1).drain_timeout(Duration::ZERO);
    let (running, exposition) = start(builder);
    let mut inside = connect(running.local_addr());
    ping(&mut inside, b"hello");
    let _waiting: Vec<TcpStream> = (0..3).map(|_| connect(running.local_addr())).collect();
    running.handle().drain();
    let report = running.wait().expect("it drained");
    assert_eq!((report.accepted, report.cut), (1, 4), "{report}");
    let scrape = Scrape::of(exposition.local_addr());
    assert_eq!(scrape.get("connections_rejected_total{reason=\"draining\"}"), 3.0);
}

/// If a worker leaves right after a job, it has not become idle before. Then its busy time must still end.
#[test]
fn a_worker_that_has_left_is_not_busy() {
    let (pool, latch) = held_pool(2, 2);
    pool.resize(1).expect("fewer workers need no new thread");
    latch.open();
    eventually("one worker has left, and the other is idle", || {
        let stats = pool.stats();
        (stats.workers == 1 && stats.busy == 0 && thread_states("mill-test-") == ['S']).then_some(())
    });
    let before = pool.stats().busy_time;
    thread::sleep(Duration::from_millis(20));
    assert_eq!(pool.stats().busy_time, before);
}

/// The server waits for a second for the end of a half-closed client. A new client does not wait as long.
#[test]
fn a_half_closed_client_is_evicted_at_once() {
    let builder = Server::builder("echo").service(Swallow::default()).workers(1).max_connections(1);
    let bound = builder.overload(Overload::Evict).bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let running = bound.start().expect("threads");
    let start = Instant::now();
    // The client's side stays open.
    let half_closed: Vec<TcpStream> = (1..=5)
        .map(|_| {
            let mut client = connect(running.local_addr());
            client.write_all(&[CLOSE_ME]).expect("sent");
            client.read_to_end(&mut Vec::new()).expect("the end, and no reset");
            client
        })
        .collect();
    assert!(start.elapsed() < Duration::from_millis(2500), "five clients took {:?}", start.elapsed());
    drop(half_closed);
    running.handle().drain();
    let report = running.wait().expect("it drained");
    assert_eq!((report.accepted, report.failed, report.cut), (5, 0, 0), "{report}");
}

/// If the worker that closes the last connection did not wake the reactor, the next review would end the drain. A
/// review comes a quarter of a second after the one before.
#[test]
fn a_drain_ends_when_a_worker_closes_the_last_connection() {
    let lasted = || {
        let latch = Latch::default();
        let (running, client) = held("close", &latch, |builder| builder);
        client.shutdown(Shutdown::Write).expect("a socket option");
        eventually("it is accepted", || running.handle().readiness().is_err().then_some(()));
        running.handle().drain();
        eventually("it drains", || (running.handle().phase() == Phase::Draining).then_some(()));
        let start = Instant::now();
        latch.open();
        assert!(running.wait().expect("it drained").is_clean());
        start.elapsed()
    };
    // The least of five times, because the machine may be busy.
    let least = (0..5).map(|_| lasted()).min().expect("five");
    assert!(least < Duration::from_millis(120), "{least:?}");
}

/// Answers with more than the kernel takes at once, and closes. It holds its worker until the latch is open.
struct LastWord(Latch);

const LAST_WORD: usize = 8 * MIB;

impl Service for LastWord {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        self.0.wait();
        *bytes = vec![7; LAST_WORD];
        Next::Close
    }
}

/// The worker has to note that the service wants to close, because another worker sends the rest of the answer.
#[test]
fn a_long_answer_is_followed_by_the_end_that_the_service_asked_for() {
    let latch = Latch::default();
    latch.open();
    let builder = for_ten(LastWord(latch), Duration::from_secs(300));
    let running = builder.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
    let mut client = connect_with(16 * 1024, running.local_addr());
    client.write_all(b"hello").expect("sent");
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("the end, and no reset");
    assert!(answer == vec![7; LAST_WORD], "{} bytes", answer.len());
    drop(client);
    running.handle().drain();
    let report = running.wait().expect("it drained");
    assert_eq!((report.accepted, report.sent, report.cut), (1, LAST_WORD as u64, 0), "{report}");
}
