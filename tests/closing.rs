//! How connections end: no close destroys output that a client is still reading, and no close holds up another client.

mod common;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::pools::Latch;
use common::proxy::Seed;
use common::scrape::Scrape;
use common::{Millpond, connect, connect_with, eventually, http, ping};
use millpond::{Echo, Exposition, Next, Running, Server, ServerBuilder, Service};
use socket2::SockRef;

/// A server in this process, with its metrics.
struct Subject {
    running: Running,
    exposition: Exposition,
}

impl Subject {
    fn start<S: Service>(service: S, set: impl FnOnce(ServerBuilder<S>) -> ServerBuilder<S>) -> Self {
        let any_port = ([127, 0, 0, 1], 0).into();
        let builder = Server::builder("echo").service(service).workers(2).max_connections(500);
        let running = set(builder).bind(any_port).expect("a port").start().expect("threads");
        let registry = prometheus::Registry::new();
        running.register(&registry).expect("a new registry");
        Subject { running, exposition: Exposition::serve(registry, any_port).expect("an endpoint") }
    }

    fn connect(&self) -> TcpStream {
        connect(self.running.local_addr())
    }

    /// Does not use `Scrape::of`, which checks a law of the echo alone: the server sends no more than it receives.
    fn scrape(&self) -> Scrape {
        Scrape::parse(&http(self.exposition.local_addr(), "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").body)
    }

    /// Drains, and returns the report.
    fn end(self) -> millpond::Report {
        self.running.handle().drain();
        let report = self.running.wait().expect("the reactor ran to its end");
        self.exposition.stop();
        report
    }
}

/// A client that reads at a steady rate.
struct Reader<'a> {
    client: &'a TcpStream,
    /// Bytes a second.
    rate: usize,
    received: usize,
}

impl Reader<'_> {
    /// Reads until this many bytes have come. Returns the end of the stream or the error that came before.
    fn read_until(&mut self, most: usize) -> Option<io::Result<()>> {
        let mut piece = vec![0; (self.rate / 50).max(1)];
        let (start, before) = (Instant::now(), self.received);
        while self.received < most {
            match self.client.read(&mut piece) {
                Ok(0) => return Some(Ok(())),
                Ok(bytes) => self.received += bytes,
                Err(error) => return Some(Err(error)),
            }
            // The rate is the subject here. A client that is behind does not sleep.
            let due = Duration::from_secs_f64((self.received - before) as f64 / self.rate as f64);
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
        None
    }
}

/// Reads at this rate until the end of the stream or an error. Returns how much came.
fn read_slowly(client: &TcpStream, rate: usize) -> (usize, io::Result<()>) {
    let mut reader = Reader { client, rate, received: 0 };
    let outcome = reader.read_until(usize::MAX).expect("there is no end of bytes");
    (reader.received, outcome)
}

/// Sends on a thread of its own, as fast as the server reads. Returns an error if the server closes the connection.
fn send_all(client: &TcpStream, size: usize) -> thread::JoinHandle<io::Result<()>> {
    let mut writer = client.try_clone().expect("a clone");
    thread::spawn(move || writer.write_all(&vec![7; size]))
}

/// Does the same, and then ends the client's side.
fn send_all_and_end(client: &TcpStream, size: usize) -> thread::JoinHandle<io::Result<()>> {
    let (writing, ender) = (send_all(client, size), client.try_clone().expect("a clone"));
    thread::spawn(move || {
        writing.join().expect("the writer")?;
        ender.shutdown(Shutdown::Write)
    })
}

#[test]
fn a_client_with_output_to_take_is_not_idle() {
    const SIZE: usize = 1_500_000;
    let subject = Subject::start(Echo, |server| server.idle_timeout(Some(Duration::from_secs(1))));
    let client = connect_with(64 * 1024, subject.running.local_addr());
    let writing = send_all(&client, SIZE);
    // The client reads for five seconds. In the middle it sends again, and a closed connection would answer with a
    // reset.
    let mut writer = client.try_clone().expect("a clone");
    let speaker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(2600));
        writer.write_all(b"!").expect("sent");
    });
    let (received, outcome) = read_slowly(&client, 300_000);
    assert!(outcome.is_ok() && received == SIZE + 1, "{received} bytes, then {outcome:?}");
    writing.join().expect("the writer").expect("all is read");
    speaker.join().expect("it spoke");
    // Then the client was silent for the idle timeout.
    drop(client);
    eventually("it is counted", || (subject.scrape().closed("idle_timeout") == 1.0).then_some(()));
}

/// Answers any input with this many bytes, and closes.
struct Lavish(usize);

impl Service for Lavish {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        bytes.clear();
        bytes.resize(self.0, 7);
        Next::Close
    }
}

#[test]
fn a_service_that_closes_has_its_answer_delivered_although_the_client_still_sends() {
    const SIZE: usize = 2_000_000;
    let subject = Subject::start(Lavish(SIZE), |server| server.idle_timeout(Some(Duration::from_secs(1))));
    let client = connect_with(64 * 1024, subject.running.local_addr());
    (&client).write_all(b"go").expect("sent");
    // More than any buffer holds: the server discards it for as long as the client takes its answer.
    let mut writer = client.try_clone().expect("a clone");
    let flood = thread::spawn(move || {
        while writer.write_all(&[1; 4096]).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    let mut received = 0;
    let mut piece = [0; 8000];
    while received < SIZE {
        let bytes = (&client).read(&mut piece).expect("no reset before the answer has come");
        assert!(bytes > 0, "cut after {received} bytes");
        received += bytes;
        // About 800 kB/s, so that it takes longer than the time for the client's end.
        thread::sleep(Duration::from_millis(10));
    }
    client.shutdown(Shutdown::Both).expect("the client ends");
    flood.join().expect("the flood ends");
    eventually("it is counted", || (subject.scrape().closed("service") == 1.0).then_some(()));
}

#[test]
fn a_client_that_ends_its_side_first_still_gets_its_output() {
    const SIZE: usize = 1_500_000;
    let subject = Subject::start(Echo, |server| server.write_timeout(Duration::from_secs(1)));
    let client = connect_with(64 * 1024, subject.running.local_addr());
    let writing = send_all_and_end(&client, SIZE);
    let (received, outcome) = read_slowly(&client, 600_000);
    assert!(outcome.is_ok() && received == SIZE, "{received} bytes, then {outcome:?}");
    writing.join().expect("the writer").expect("all is read");
    eventually("it is counted", || (subject.scrape().closed("client") == 1.0).then_some(()));
}

#[test]
fn a_client_that_ends_its_side_and_reads_nothing_is_closed_by_the_write_timeout() {
    let subject = Subject::start(Echo, |server| server.write_timeout(Duration::from_secs(1)));
    let client = connect_with(4 * 1024, subject.running.local_addr());
    let writing = send_all_and_end(&client, 100_000);
    writing.join().expect("the writer").expect("the server's kernel has room for it");
    eventually("it is counted", || (subject.scrape().closed("write_timeout") == 1.0).then_some(()));
    assert_eq!(subject.scrape().closed("client"), 0.0);
}

/// A hundred clients with random sizes, rates, buffers, timeouts, pauses and ways to end. Each gets every byte, or its
/// connection is counted under `write_timeout`.
#[test]
fn a_slow_reader_gets_every_byte_or_is_counted_under_write_timeout() {
    const AT_A_TIME: usize = 50;
    let seed = Seed::new();
    let cut = AtomicUsize::new(0);
    for round in 0..2 {
        thread::scope(|scope| {
            for number in 0..AT_A_TIME {
                let (mut random, cut) = (seed.for_use((round * AT_A_TIME + number) as u64), &cut);
                scope.spawn(move || {
                    if !slow_reader_case(&mut random) {
                        cut.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
    }
    let cut = cut.load(Ordering::Relaxed);
    println!("{cut} of 100 were closed by the write timeout");
    assert!(
        (1..60).contains(&cut),
        "some pause for too long, and most read fast enough: {cut} of 100 were cut"
    );
}

/// Whether the client got every byte.
fn slow_reader_case(random: &mut fastrand::Rng) -> bool {
    let millis = |random: &mut fastrand::Rng, range| Duration::from_millis(random.u64(range));
    let size = random.usize(50_000..2_000_000);
    // Three seconds at most, for the sake of the test's own time.
    let rate = random.usize(size / 3..size * 3);
    let (idle, write) = (millis(random, 100..1500), millis(random, 250..1500));
    // A third of them pause once, for up to three times the write timeout.
    let pause = if random.u32(0..3) == 0 { millis(random, 0..4500).min(write * 3) } else { Duration::ZERO };
    let pause_at = random.usize(0..size);
    let receive_buffer = 1 << random.u32(12..18);
    let way = random.u32(0..3);
    let story = format!(
        "{size} bytes at {rate}/s, idle {idle:?}, write {write:?}, buffer {receive_buffer}, pause {pause:?}, way {way}"
    );
    let subject = match way {
        // The service closes, and the client goes on to send.
        0 => Subject::start(Lavish(size), |server| server.idle_timeout(Some(idle)).write_timeout(write)),
        // The client sends one more byte and is otherwise silent, or it ends its side.
        _ => Subject::start(Echo, |server| server.idle_timeout(Some(idle)).write_timeout(write)),
    };
    let client = connect_with(receive_buffer, subject.running.local_addr());
    let _writing = match way {
        0 => send_all(&client, 1),
        1 => send_all(&client, size),
        _ => send_all_and_end(&client, size),
    };
    let mut reader = Reader { client: &client, rate, received: 0 };
    reader.read_until(pause_at);
    thread::sleep(pause);
    if way != 2 {
        // If the server had closed the connection too early, this byte would cause a reset that destroys the output on
        // its way. In the echo it is one more byte, if it is not late.
        let _ = (&client).write_all(b"!");
    }
    let outcome = reader.read_until(usize::MAX);
    let received = reader.received;
    drop(client);
    // On a busy machine, a client may be silent for the idle timeout before it has sent all.
    let read = subject.scrape().get("received_bytes_total");
    let owed = if way == 0 && read > 0.0 { size as f64 } else { read };
    if received as f64 == owed && matches!(outcome, Some(Ok(()))) {
        return true;
    }
    eventually(&format!("counted: {story}: {received} bytes, {outcome:?}"), || {
        (subject.scrape().closed("write_timeout") == 1.0).then_some(())
    });
    false
}

/// A session whose destructor waits until the latch is opened.
struct Lingering(Latch);

impl Drop for Lingering {
    fn drop(&mut self) {
        self.0.wait();
    }
}

/// Echoes, with sessions that wait in their destructors. The service itself never blocks.
struct SlowToDrop(Latch);

impl Service for SlowToDrop {
    type Session = Lingering;

    fn open(&self, _peer: SocketAddr) -> Lingering {
        Lingering(self.0.clone())
    }

    fn serve(&self, _session: &mut Lingering, _bytes: &mut Vec<u8>) -> Next {
        Next::KeepOpen
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// The reactor serves such a service, and closes its connections, as one of the workers.
#[test]
fn a_destructor_that_blocks_after_the_clients_end_holds_up_no_other_client() {
    let latch = Latch::default();
    let subject = Subject::start(SlowToDrop(latch.clone()), |server| server);
    let mut clients: Vec<TcpStream> = (0..20).map(|_| subject.connect()).collect();
    clients.iter_mut().for_each(|client| ping(client, b"hello"));
    let mut other = subject.connect();
    for client in clients {
        drop(client);
        ping(&mut other, b"still served");
    }
    eventually("all are closed", || (subject.scrape().closed("client") == 20.0).then_some(()));
    assert_eq!(subject.running.handle().health(), Ok(()));
    latch.open();
    drop(other);
    assert!(subject.end().is_clean());
}

#[test]
fn a_session_whose_destructor_blocks_holds_up_no_other_client() {
    let latch = Latch::default();
    let subject = Subject::start(SlowToDrop(latch.clone()), |server| {
        server.idle_timeout(Some(Duration::from_millis(300))).max_connections(7)
    });
    let mut idle: Vec<TcpStream> = (0..6).map(|_| subject.connect()).collect();
    for client in &mut idle {
        assert_eq!(client.read(&mut [0]).expect("the end"), 0, "closed as idle");
    }
    drop(idle);
    eventually("six are closed", || (subject.scrape().closed("idle_timeout") == 6.0).then_some(()));
    // Their destructors are running or waiting. The last place is free, and served.
    let mut other = subject.connect();
    ping(&mut other, b"hello");
    assert_eq!(subject.running.handle().health(), Ok(()));
    // Their places are taken, so that sessions behind a stuck destructor have a bound.
    let mut newcomer = subject.connect();
    newcomer.write_all(b"waits").expect("sent");
    eventually("the server is full", || subject.running.handle().readiness().err());
    assert_eq!(subject.scrape().get("connections_accepted_total"), 7.0);
    latch.open();
    newcomer.read_exact(&mut [0; 5]).expect("it is served when there is room");
    drop((other, newcomer));
    assert!(subject.end().is_clean());
}

#[test]
fn a_drain_waits_for_sessions_that_are_being_dropped() {
    let latch = Latch::default();
    let subject = Subject::start(SlowToDrop(latch.clone()), |server| server);
    let mut client = subject.connect();
    eventually("it is accepted", || (subject.scrape().connections("idle") == 1.0).then_some(()));
    subject.running.handle().drain();
    assert_eq!(client.read(&mut [0]).expect("the end"), 0);
    drop(client);
    eventually("it is closed", || (subject.scrape().closed("drained") == 1.0).then_some(()));
    assert!(subject.running.finished().is_empty(), "its destructor has not returned");
    latch.open();
    assert!(subject.end().is_clean());
}

/// A service whose own destructor panics.
struct Brittle;

impl Drop for Brittle {
    fn drop(&mut self) {
        panic!("the service is dropped");
    }
}

impl Service for Brittle {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        Next::KeepOpen
    }
}

#[test]
fn a_service_whose_destructor_panics_still_has_its_report() {
    for may_block in [false, true] {
        let any_port = ([127, 0, 0, 1], 0).into();
        let server = Server::builder("echo").service(Brittle).workers(1 + usize::from(may_block));
        let running = server.bind(any_port).expect("a port").start().expect("threads");
        ping(&mut connect(running.local_addr()), b"hello");
        running.handle().drain();
        let report = running.wait().expect("a report");
        assert!(report.is_clean() && report.received == 5, "{report}");
    }
}

#[test]
fn input_that_meets_the_half_close_of_a_drain_is_counted() {
    let subject = Subject::start(Echo, |server| server);
    let mut clients: Vec<TcpStream> = (0..3).map(|_| subject.connect()).collect();
    clients.iter_mut().for_each(|client| ping(client, b"hello"));
    subject.running.handle().drain();
    for client in &mut clients {
        assert_eq!(client.read(&mut [0]).expect("the end"), 0);
        client.write_all(b"too late").expect("sent");
    }
    eventually("it is counted", || (subject.scrape().get("late_bytes_total") == 24.0).then_some(()));
    drop(clients);
    let report = subject.end();
    assert_eq!((report.late, report.received, report.sent), (24, 15, 15));
    assert!(report.to_string().contains("24 bytes late"), "{report}");
}

#[test]
fn input_that_meets_the_half_close_of_an_idle_timeout_is_counted() {
    let subject = Subject::start(Echo, |server| server.idle_timeout(Some(Duration::from_millis(100))));
    let mut client = subject.connect();
    assert_eq!(client.read(&mut [0]).expect("the end"), 0);
    client.write_all(b"too late").expect("sent");
    eventually("it is counted", || (subject.scrape().get("late_bytes_total") == 8.0).then_some(()));
    drop(client);
    assert_eq!(subject.end().late, 0, "not in the drain");
}

/// Counts its calls, and holds its worker at the first until the latch is opened.
struct Held {
    latch: Latch,
    calls: Arc<AtomicUsize>,
}

impl Service for Held {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        if self.calls.fetch_add(1, Ordering::SeqCst) == 0 {
            self.latch.wait();
        }
        Next::KeepOpen
    }
}

#[test]
fn a_client_that_resets_while_it_is_queued_costs_no_call_of_the_service() {
    let (latch, calls) = (Latch::default(), Arc::new(AtomicUsize::new(0)));
    let service = Held { latch: latch.clone(), calls: Arc::clone(&calls) };
    let subject = Subject::start(service, |server| server.workers(1));
    let mut first = subject.connect();
    first.write_all(b"holds the worker").expect("sent");
    eventually("the worker is held", || (calls.load(Ordering::SeqCst) == 1).then_some(()));
    let queued: Vec<TcpStream> = (0..5).map(|_| subject.connect()).collect();
    queued.iter().for_each(|mut client| client.write_all(b"in vain").expect("sent"));
    eventually("they are queued", || (subject.scrape().connections("queued") == 5.0).then_some(()));
    for client in queued {
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("a socket option");
    }
    // The reactor has handled their resets when it has accepted a later client.
    let _later = subject.connect();
    eventually("it is accepted", || {
        (subject.scrape().get("connections_accepted_total") == 7.0).then_some(())
    });
    latch.open();
    first.read_exact(&mut [0; 16]).expect("it comes back");
    eventually("they are counted", || (subject.scrape().closed("error") == 5.0).then_some(()));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

/// Answers each byte with parts of 10,000 bytes, as many as the byte says.
struct InParts {
    calls: Arc<AtomicUsize>,
}

impl InParts {
    const PART: usize = 10_000;
}

impl Service for InParts {
    /// Input that is not answered yet, and the number of parts already sent of the answer to its first byte.
    type Session = (Vec<u8>, u8);

    fn open(&self, _peer: SocketAddr) -> (Vec<u8>, u8) {
        Default::default()
    }

    fn serve(&self, (asked, given): &mut (Vec<u8>, u8), bytes: &mut Vec<u8>) -> Next {
        self.calls.fetch_add(1, Ordering::SeqCst);
        assert!(asked.is_empty() || bytes.is_empty(), "nothing is read before the answer is given");
        asked.append(bytes);
        let Some(parts) = asked.first() else { return Next::KeepOpen };
        bytes.resize(InParts::PART, *given);
        *given += 1;
        if *given == *parts {
            asked.remove(0);
            *given = 0;
        }
        if asked.is_empty() { Next::KeepOpen } else { Next::More }
    }
}

/// The answer to these bytes.
fn in_parts(asked: &[u8]) -> Vec<u8> {
    let parts = asked.iter().flat_map(|parts| 0..*parts);
    parts.flat_map(|part| [part; InParts::PART]).collect()
}

#[test]
fn a_service_that_stops_halfway_is_called_again_until_it_is_done() {
    let calls = Arc::new(AtomicUsize::new(0));
    let subject = Subject::start(InParts { calls: Arc::clone(&calls) }, |server| server.workers(1));
    let mut client = subject.connect();
    for asked in [&[1][..], &[3], &[200, 1, 7], &[5; 40]] {
        client.write_all(asked).expect("sent");
        let expected = in_parts(asked);
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).expect("it comes");
        assert!(answer == expected, "{asked:?}");
    }
    assert_eq!(calls.load(Ordering::SeqCst), 1 + 3 + 208 + 200);
    // The latency of an answer in many parts is counted once.
    let observed = subject.scrape().get("echo_latency_seconds_count");
    assert!((4.0..=44.0).contains(&observed), "{observed} messages");
    drop(client);
    assert!(subject.end().is_clean());
}

#[test]
fn a_service_that_stops_halfway_is_not_called_while_its_client_does_not_read() {
    const ASKED: [u8; 20] = [250; 20];
    let calls = Arc::new(AtomicUsize::new(0));
    let subject = Subject::start(InParts { calls: Arc::clone(&calls) }, |server| server.workers(1));
    let client = connect_with(64 * 1024, subject.running.local_addr());
    (&client).write_all(&ASKED).expect("sent");
    // It stops when the kernel takes no more, long before 50 MB.
    eventually("the client is blocked", || {
        let scrape = subject.scrape();
        let is_at_rest = scrape.pool("workers_busy") + scrape.pool("queue_depth") == 0.0;
        (is_at_rest && calls.load(Ordering::SeqCst) > 0).then_some(())
    });
    let blocked_at = calls.load(Ordering::SeqCst);
    assert!(blocked_at < 2500, "{blocked_at} calls");
    // Others are served meanwhile, and more input of this client waits.
    ping_in_parts(&mut subject.connect());
    (&client).write_all(&[1]).expect("sent");
    let expected = in_parts(&[&ASKED[..], &[1]].concat());
    let mut answer = vec![0; expected.len()];
    (&client).read_exact(&mut answer).expect("it comes");
    assert!(answer == expected);
    drop(client);
    assert!(subject.end().is_clean());
}

fn ping_in_parts(client: &mut TcpStream) {
    client.write_all(&[1]).expect("sent");
    client.read_exact(&mut [0; InParts::PART]).expect("it comes");
}

#[test]
fn a_drain_finishes_an_answer_in_parts() {
    let calls = Arc::new(AtomicUsize::new(0));
    let subject = Subject::start(InParts { calls: Arc::clone(&calls) }, |server| server.workers(1));
    let client = connect_with(64 * 1024, subject.running.local_addr());
    (&client).write_all(&[250; 4]).expect("sent");
    eventually("the service is called", || (calls.load(Ordering::SeqCst) > 0).then_some(()));
    subject.running.handle().drain();
    let (received, outcome) = read_slowly(&client, 10_000_000);
    assert!(outcome.is_ok() && received == 4 * 250 * InParts::PART, "{received} bytes, then {outcome:?}");
    drop(client);
    let report = subject.end();
    assert!(report.is_clean() && report.in_drain == 1, "{report}");
}

/// These clients were accepted just before the drain and have never sent anything.
#[test]
fn thousands_of_new_silent_connections_are_gone_in_a_few_seconds_of_a_drain() {
    const CLIENTS: usize = 5_000;
    let mut server = Millpond::start(&["--workers", "2"]);
    let limit = millpond::raise_descriptor_limit().expect("the limit can be raised");
    let clients = CLIENTS.min(usize::try_from(limit).unwrap_or(CLIENTS).saturating_sub(200));
    let _silent: Vec<TcpStream> = (0..clients).map(|_| server.connect()).collect();
    eventually("all are open", || (server.scrape().connections("idle") == clients as f64).then_some(()));
    let start = Instant::now();
    assert_eq!(server.drain(), Some(0));
    // The server spreads the closes over three seconds, and waits one second for each client's end. By their number
    // alone the drain would take twice as long.
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    assert!(server.log().contains(&format!("{clients} closed idle")), "{}", server.log());
}
