//! The server's promises to its clients, tested on the wire.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::clients::Load;
use common::pools::Latch;
use common::scrape::{Guard, Scrape};
use common::{Millpond, connect, connect_with, eventually, ping, thread_states};
use millpond::{Echo, Exposition, Next, Overload, Running, Server, ServerBuilder, ServerError, Service};
use prometheus::Registry;
use socket2::SockRef;

const MIB: usize = 1024 * 1024;

#[test]
fn a_thousand_silent_clients_hold_no_worker() {
    let server = Millpond::start(&["--workers", "128"]);
    let silent: Vec<TcpStream> = (0..1000).map(|_| server.connect()).collect();
    eventually("a thousand idle connections", || {
        (server.scrape().connections("idle") == 1000.0).then_some(())
    });
    // Most answers are late on a busy machine, so one quick answer is enough.
    let mut pings = 0;
    eventually("an answer within 50 ms", || {
        pings += 1;
        let start = Instant::now();
        ping(&mut server.connect(), b"hello");
        (start.elapsed() < Duration::from_millis(50)).then_some(())
    });
    drop(silent);
    let all = 1000.0 + f64::from(pings);
    let scrape = server.scrape_after("all have left", |now| now.closed("client") == all);
    assert_eq!(scrape.broken_law(), None);
}

#[test]
fn eight_workers_serve_two_thousand_clients_at_once() {
    let server = Millpond::start(&["--workers", "8"]);
    let guard = Guard::over(server.metrics);
    let load = Load { address: server.echo, clients: 2000, bytes: 20_000, message: 1..=5000, seed: 1 };
    load.run().expect("every byte of every client comes back");
    guard.finish();
    let scrape = server.scrape_after("all have left", |now| now.closed("client") == 2000.0);
    assert_eq!(scrape.get("received_bytes_total"), 2000.0 * 20_000.0);
    assert_eq!(scrape.get("sent_bytes_total"), 2000.0 * 20_000.0);
}

#[test]
fn large_messages_come_back_whole_in_bounded_memory() {
    let server = Millpond::start(&[]);
    let guard = Guard::over(server.metrics);
    let load = Load { address: server.echo, clients: 64, bytes: 64 * MIB, message: 1..=MIB, seed: 2 };
    let mut peak = 0;
    load.run_with(|_| peak = peak.max(server.resident_mib())).expect("every byte comes back");
    guard.finish();
    assert!(peak < 100, "{peak} MiB resident");
}

#[test]
fn clients_that_never_read_are_bounded_and_closed_and_harm_nobody() {
    let server = Millpond::start(&["--workers", "4", "--write-timeout", "2s"]);
    let guard = Guard::over(server.metrics);
    // Each client sends until its kernel takes no more. Then the buffers of both kernels and of the server are full.
    let junk = vec![7; 64 * 1024];
    let mut offenders: Vec<TcpStream> = (0..200).map(|_| server.connect()).collect();
    for offender in &offenders {
        offender.set_nonblocking(true).expect("a socket option");
    }
    let mut peak = 0;
    let mut others = server.connect();
    let start = Instant::now();
    while server.scrape().closed("write_timeout") < 200.0 {
        for offender in &mut offenders {
            let _ = offender.write(&junk);
        }
        ping(&mut others, b"still served");
        peak = peak.max(server.resident_mib());
        assert!(start.elapsed() < common::PATIENCE, "{} closed", server.scrape().closed("write_timeout"));
    }
    assert!(start.elapsed() > Duration::from_secs(2), "closed before the timeout");
    // The server keeps 64 KiB for each client, 13 MiB in all. The README says so.
    assert!(peak < 40, "{peak} MiB resident");
    guard.finish();
}

/// Compares numbers that the server measured in different ways. On a busy machine each of them changes, and the laws
/// between them still hold.
#[test]
fn saturation_is_what_arithmetic_says() {
    let server = Millpond::start(&["--workers", "4", "--work", "50ms"]);
    let guard = Guard::over(server.metrics);
    let address = server.echo;
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..40)
        .map(|_| {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                let mut stream = connect(address);
                while !over.load(Ordering::Relaxed) {
                    ping(&mut stream, b"work");
                }
            })
        })
        .collect();
    eventually("the queue has its full depth", || {
        (server.scrape().pool("queue_depth") >= 30.0).then_some(())
    });
    thread::sleep(Duration::from_millis(500));

    let start = Instant::now();
    let first = server.scrape();
    let shortest = Instant::now();
    let (mut depths, mut ages, mut busy, mut scrapes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    while start.elapsed() < Duration::from_secs(3) {
        let asked = Instant::now();
        let scrape = server.scrape();
        scrapes.push(asked.elapsed());
        depths.push(scrape.pool("queue_depth"));
        ages.push(scrape.pool("queue_oldest_age_seconds"));
        busy.push(scrape.pool("workers_busy"));
        thread::sleep(Duration::from_millis(20));
    }
    let shortest = shortest.elapsed().as_secs_f64();
    let last = server.scrape();
    let longest = start.elapsed().as_secs_f64();
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("every client is served");
    }
    guard.finish();

    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let rise = |name: &str| last.pool(name) - first.pool(name);
    let jobs = rise("queue_wait_seconds_count");
    let wait = rise("queue_wait_seconds_sum") / jobs;
    // A job takes 50 ms or longer, and each of the 4 workers runs one at a time.
    assert!(jobs <= 4.0 * (longest / 0.05) + 4.0, "{jobs} jobs in {longest} s");
    // The jobs that are running at one end of the time are counted with a part of their time.
    let work = rise("busy_seconds_total") / jobs;
    assert!(work > 0.05 * (1.0 - 4.0 / jobs), "{work} s of work a job");
    let utilization = rise("busy_seconds_total") / 4.0;
    assert!(utilization <= longest * 1.001, "busy for {utilization} s of {longest} s");
    let (depth, busy) = (mean(&depths), mean(&busy));
    // Little's law: the mean depth is the rate of jobs times their mean wait. Jobs that wait at one end of the time
    // have a part of their wait on the other side of it. For each job that part is at most as long as the oldest job's
    // wait.
    let waited = |scrape: &Scrape| scrape.pool("queue_depth") * scrape.pool("queue_oldest_age_seconds");
    let least = (jobs * wait - waited(&first)) / longest;
    let most = (jobs * wait + waited(&last)) / shortest;
    assert!((least * 0.9..=most * 1.1).contains(&depth), "depth {depth}, and not {least} to {most}");
    assert!(
        (utilization * 4.0 / longest * 0.9..=utilization * 4.0 / shortest * 1.1).contains(&busy),
        "{busy} busy"
    );
    assert!(depth + busy <= 40.0, "{depth} wait and {busy} are served of 40");
    // While the queue is never empty, no worker is idle for long.
    if depths.iter().all(|depth| *depth >= 4.0) {
        assert!(busy > 3.8, "{busy} busy");
    }
    // The oldest job is the next to leave the queue, so it has waited for nearly as long as it will.
    let age = mean(&ages);
    assert!((wait * 0.6..wait * 1.5).contains(&age), "oldest {age} s, waited {wait} s");
    let rise = |name: &str| last.get(name) - first.get(name);
    let latency = rise("echo_latency_seconds_sum") / rise("echo_latency_seconds_count");
    assert!(((wait + work) * 0.85..(wait + work) * 1.15).contains(&latency), "latency {latency} s");
    // A scrape does not wait behind the jobs.
    scrapes.sort_unstable();
    let median = scrapes[scrapes.len() / 2].as_secs_f64();
    assert!(median < wait / 4.0, "half of the scrapes took {median} s and longer");
}

#[test]
fn a_silent_connection_is_closed_after_the_idle_timeout_and_not_before() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let server = Millpond::start(&["--idle-timeout", "1s"]);
    let speaks_in_time = || {
        let mut stream = server.connect();
        for _ in 0..3 {
            let spoke = Instant::now();
            thread::sleep(TIMEOUT * 6 / 10);
            if spoke.elapsed() > TIMEOUT * 8 / 10 {
                // The machine was busy with others, and this client was late.
                return false;
            }
            ping(&mut stream, b"still here");
        }
        let speaks = Instant::now();
        ping(&mut stream, b"for the last time");
        assert_eq!(stream.read(&mut [0]).expect("the end, and no reset"), 0);
        assert!(speaks.elapsed() >= TIMEOUT, "closed {:?} after it spoke", speaks.elapsed());
        true
    };
    let rounds = (1..=10).find(|_| speaks_in_time()).expect("the client speaks in time once in ten times");
    eventually("counted", || {
        (server.scrape().sum("connections_closed_total", "") == f64::from(rounds)).then_some(())
    });
    assert!(server.scrape().closed("idle_timeout") >= 1.0);
}

#[test]
fn an_idle_timeout_of_zero_is_none() {
    let server = Millpond::start(&["--idle-timeout", "0", "--write-timeout", "100ms"]);
    let mut stream = server.connect();
    thread::sleep(Duration::from_millis(500));
    ping(&mut stream, b"still here");
}

#[test]
fn a_half_closed_client_gets_everything_it_sent() {
    let server = Millpond::start(&["--workers", "2"]);
    let message: Vec<u8> = (0..3 * MIB).map(|at| (at % 251) as u8).collect();
    let mut stream = server.connect();
    let mut reader = stream.try_clone().expect("a clone");
    let all = thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).map(|_| all)
    });
    stream.write_all(&message).expect("it is taken");
    stream.shutdown(std::net::Shutdown::Write).expect("a shutdown");
    let all = all.join().expect("the reader").expect("the end, and no reset");
    assert!(all == message, "{} of {} bytes", all.len(), message.len());
}

#[test]
fn a_client_that_resets_is_counted_as_an_error() {
    let server = Millpond::start(&[]);
    let mut stream = server.connect();
    ping(&mut stream, b"hello");
    let socket = socket2::Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).expect("a socket option");
    drop(socket);
    eventually("counted", || (server.scrape().closed("error") == 1.0).then_some(()));
}

#[test]
fn at_the_limit_newcomers_wait_and_are_served_when_there_is_room() {
    let server = Millpond::start(&["--max-connections", "3"]);
    let mut inside: Vec<TcpStream> = (0..3).map(|_| server.connect()).collect();
    inside.iter_mut().for_each(|stream| ping(stream, b"in"));
    let mut waiting = server.connect();
    waiting.write_all(b"let me in").expect("the kernel takes it");
    eventually("not ready", || (server.get("/readyz").code == 503).then_some(()));
    assert!(server.get("/readyz").body.contains("limit of 3 connections"));
    let scrape = server.scrape();
    assert_eq!(scrape.sum("connections", "state="), 3.0);
    assert_eq!(scrape.sum("connections_rejected_total", "reason="), 0.0);
    waiting.set_read_timeout(Some(Duration::from_millis(200))).expect("a socket option");
    assert!(waiting.read(&mut [0; 9]).is_err(), "served over the limit");
    inside.pop();
    waiting.set_read_timeout(Some(common::PATIENCE)).expect("a socket option");
    let mut answer = [0; 9];
    waiting.read_exact(&mut answer).expect("there is room now");
    drop(inside);
    eventually("ready again", || (server.get("/readyz").code == 200).then_some(()));
}

#[test]
fn at_the_limit_newcomers_are_refused_when_asked_for() {
    let server = Millpond::start(&["--max-connections", "3", "--overload", "reject"]);
    let mut inside: Vec<TcpStream> = (0..3).map(|_| server.connect()).collect();
    inside.iter_mut().for_each(|stream| ping(stream, b"in"));
    for _ in 0..5 {
        assert_eq!(server.connect().read(&mut [0]).expect("closed"), 0);
    }
    let rejected = r#"connections_rejected_total{reason="limit"}"#;
    let scrape = server.scrape_after("counted", |now| now.get(rejected) == 5.0);
    assert_eq!(scrape.get("connections_accepted_total"), 3.0);
    inside.iter_mut().for_each(|stream| ping(stream, b"unharmed"));
    drop(inside);
    eventually("all are closed", || (server.scrape().closed("client") == 3.0).then_some(()));
    ping(&mut server.connect(), b"room again");
}

/// A server with one worker, which each message holds for a second. So the second message waits longer than 100 ms.
fn overloaded(policy: &str) -> (Millpond, Vec<TcpStream>) {
    let server = Millpond::start(&[
        "--workers",
        "1",
        "--work",
        "1s",
        "--max-queue-wait",
        "100ms",
        "--overload",
        policy,
    ]);
    let mut inside: Vec<TcpStream> = (0..3).map(|_| server.connect()).collect();
    eventually("all are accepted", || (server.scrape().connections("idle") == 3.0).then_some(()));
    for stream in &mut inside {
        stream.write_all(b"work").expect("sent");
    }
    let answer = eventually("overloaded", || Some(server.get("/readyz")).filter(|answer| answer.code == 503));
    assert!(answer.body.contains("overloaded"), "{}", answer.body);
    (server, inside)
}

#[test]
fn an_old_queue_rejects_newcomers_under_overload_reject() {
    let (server, inside) = overloaded("reject");
    assert_eq!(server.connect().read(&mut [0]).expect("closed"), 0);
    let rejected = r#"connections_rejected_total{reason="overload"}"#;
    eventually("counted", || (server.scrape().get(rejected) == 1.0).then_some(()));
    for mut stream in inside {
        stream.read_exact(&mut [0; 4]).expect("the admitted clients are served");
    }
    eventually("ready again", || (server.get("/readyz").code == 200).then_some(()));
}

#[test]
fn an_old_queue_keeps_newcomers_waiting_until_it_is_young() {
    let (server, inside) = overloaded("wait");
    let mut newcomer = server.connect();
    newcomer.write_all(b"work").expect("the kernel takes it");
    assert_eq!(server.scrape().get("connections_accepted_total"), 3.0);
    newcomer.read_exact(&mut [0; 4]).expect("served in the end");
    drop(inside);
    assert_eq!(server.scrape().sum("connections_rejected_total", "reason="), 0.0);
}

/// A service that echoes, closes the connection after "bye", and panics at "panic".
struct Fragile {
    may_block: bool,
}

impl Service for Fragile {
    type Session = usize;

    fn open(&self, _peer: std::net::SocketAddr) -> usize {
        0
    }

    fn serve(&self, served: &mut usize, bytes: &mut Vec<u8>) -> Next {
        assert!(!bytes.starts_with(b"panic"), "the marker");
        *served += 1;
        if bytes.starts_with(b"bye") { Next::Close } else { Next::KeepOpen }
    }

    fn may_block(&self) -> bool {
        self.may_block
    }
}

/// A server in this process, with its metrics.
fn in_process(workers: usize, service: impl Service) -> (Running, Exposition) {
    let any_port = ([127, 0, 0, 1], 0).into();
    let registry = Registry::new();
    let server = Server::builder("echo")
        .service(service)
        .workers(workers)
        .max_connections(500)
        .bind(any_port)
        .expect("a port");
    let running = server.start().expect("threads");
    running.register(&registry).expect("a new registry");
    let exposition = Exposition::serve(registry, any_port).expect("a port and threads");
    (running, exposition)
}

#[test]
fn a_panic_closes_its_connection_and_spares_its_worker() {
    panics_are_survived(Fragile { may_block: true });
}

/// Keeps the text that is written to the log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("the lines").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_of_a_service_is_logged_with_its_peer() {
    let lines = Lines::default();
    let writer = lines.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let (running, _exposition) = in_process(2, Fragile { may_block: true });
    let mut victim = connect(running.local_addr());
    let peer = victim.local_addr().expect("an address");
    victim.write_all(b"panic now").expect("sent");
    assert_eq!(victim.read(&mut [0]).expect("the end"), 0);
    let said = format!("the service panicked; its connection is closed peer={peer} panic=\"the marker\"");
    eventually("it is logged", || {
        String::from_utf8_lossy(&lines.0.lock().expect("the lines")).contains(&said).then_some(())
    });
}

/// The panics happen on the reactor's thread as well.
#[test]
fn a_panic_of_a_service_that_never_blocks_is_survived() {
    panics_are_survived(Fragile { may_block: false });
}

fn panics_are_survived(service: Fragile) {
    let (running, exposition) = in_process(2, service);
    let guard = Guard::over(exposition.local_addr());
    let mut bystander = connect(running.local_addr());
    for _ in 0..100 {
        let mut victim = connect(running.local_addr());
        (0..3).for_each(|_| ping(&mut victim, b"fine"));
        victim.write_all(b"panic now").expect("sent");
        assert_eq!(victim.read(&mut [0]).expect("the end, and no reset"), 0);
        ping(&mut bystander, b"unharmed");
    }
    // The reactor counts the close when the client's end has come. The worker counts the panicked job when it has
    // unwound, which may be later.
    let panicked = "pool_jobs_total{pool=\"echo\",outcome=\"panicked\"}";
    let scrape = Scrape::after(exposition.local_addr(), "counted", |now| now.closed("panicked") == 100.0);
    assert_eq!((scrape.closed("panicked"), scrape.get(panicked)), (100.0, 100.0));
    assert_eq!(scrape.pool("workers"), 2.0);
    assert_eq!(scrape.broken_law(), None);
    guard.finish();
}

#[test]
fn a_service_that_says_close_gets_its_last_word_through() {
    let (running, exposition) = in_process(2, Fragile { may_block: false });
    for _ in 0..100 {
        let mut stream = connect(running.local_addr());
        // More input follows than the server reads at a time. A close before it is read would reset the connection and
        // lose the answer.
        stream.write_all(&[b"bye".as_slice(), &[0; 100_000]].concat()).expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the end, and no reset");
        assert!(answer.starts_with(b"bye"));
    }
    // More than the reactor discards at a time.
    let mut stream = connect(running.local_addr());
    stream.write_all(&[b"bye".as_slice(), &[0; 8 * MIB]].concat()).expect("it is taken to the end");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("the end, and no reset");
    eventually("counted", || (Scrape::of(exposition.local_addr()).closed("service") == 101.0).then_some(()));
}

/// Echoes, and waits for the latch before it echoes "wait". By default, a service may block.
struct Patient(Latch);

impl Service for Patient {
    type Session = ();

    fn open(&self, _peer: std::net::SocketAddr) {}

    fn serve(&self, (): &mut (), bytes: &mut Vec<u8>) -> Next {
        if bytes.starts_with(b"wait") {
            self.0.wait();
        }
        Next::KeepOpen
    }
}

#[test]
fn a_service_that_blocks_holds_up_nobody_while_a_worker_is_free() {
    let latch = Latch::default();
    let (running, _exposition) = in_process(5, Patient(latch.clone()));
    let mut waiting: Vec<TcpStream> = (0..4).map(|_| connect(running.local_addr())).collect();
    waiting.iter_mut().for_each(|client| client.write_all(b"wait").expect("sent"));
    let mut other = connect(running.local_addr());
    (0..100).for_each(|_| ping(&mut other, b"hello"));
    latch.open();
    waiting.iter_mut().for_each(|client| client.read_exact(&mut [0; 4]).expect("served"));
}

/// Answers the first message with nothing and all others with one byte, in the smallest possible buffers.
struct Terse;

impl Service for Terse {
    type Session = bool;

    fn open(&self, _peer: std::net::SocketAddr) -> bool {
        false
    }

    fn serve(&self, spoken: &mut bool, bytes: &mut Vec<u8>) -> Next {
        *bytes = if std::mem::replace(spoken, true) { vec![b'.'] } else { Vec::new() };
        Next::KeepOpen
    }
}

#[test]
fn a_service_may_leave_any_buffer_and_the_first_byte_is_counted_once() {
    let (running, exposition) = in_process(2, Terse);
    let first_bytes = || Scrape::of(exposition.local_addr()).get("connection_first_byte_seconds_count");
    let mut client = connect(running.local_addr());
    client.write_all(b"unanswered").expect("sent");
    eventually("it is served", || {
        (Scrape::of(exposition.local_addr()).get("echo_latency_seconds_count") == 1.0).then_some(())
    });
    assert_eq!(first_bytes(), 0.0);
    for _ in 0..10 {
        client.write_all(b"answered").expect("sent");
        let mut answer = [0];
        client.read_exact(&mut answer).expect("a byte");
        assert_eq!(&answer, b".");
    }
    eventually("all are served", || {
        (Scrape::of(exposition.local_addr()).get("echo_latency_seconds_count") == 11.0).then_some(())
    });
    assert_eq!(first_bytes(), 1.0);
}

#[test]
fn a_worker_that_returns_right_after_the_deadline_is_waited_for() {
    /// Holds its worker until the drain, and for a moment longer.
    struct Late {
        begun: Latch,
        latch: Latch,
    }
    impl Service for Late {
        type Session = ();
        fn open(&self, _peer: std::net::SocketAddr) {}
        fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
            self.begun.open();
            self.latch.wait();
            thread::sleep(Duration::from_millis(50));
            Next::KeepOpen
        }
    }
    let none_is_left = || {
        let (begun, latch) = (Latch::default(), Latch::default());
        let service = Late { begun: begun.clone(), latch: latch.clone() };
        let builder = Server::builder("late").service(service).workers(2).max_connections(2);
        let bound = builder.drain_timeout(Duration::ZERO).bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let running = bound.start().expect("threads");
        let mut client = connect(running.local_addr());
        client.write_all(b"hello").expect("sent");
        begun.wait();
        running.handle().drain();
        latch.open();
        let report = running.wait().expect("it drained");
        assert_eq!((report.in_drain, report.cut), (1, 1), "{report}");
        let is_gone = thread_states("mill-late").is_empty();
        eventually("it goes", || thread_states("mill-late").is_empty().then_some(()));
        is_gone
    };
    // The server waits for 100 ms. On a busy machine the worker may need longer, so this counts most of the rounds.
    eventually("no worker is left, most times", || {
        ((0..9).filter(|_| none_is_left()).count() > 4).then_some(())
    });
}

/// A reset could overtake the answers. So the server sends none when the service, the idle timeout or the drain ends a
/// connection.
#[test]
fn a_client_that_still_sends_gets_the_end_and_no_reset() {
    let speaks_on = |mut stream: TcpStream, why: &str| {
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0, "{why}");
        for late in 0..3 {
            stream.write_all(b"too late").unwrap_or_else(|error| panic!("{why}, write {late}: {error}"));
            thread::sleep(Duration::from_millis(10));
        }
    };
    let builder = || Server::builder("echo").service(Fragile { may_block: false }).max_connections(10);
    let start = |builder: ServerBuilder<Fragile>| {
        let running = builder.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
        let stream = connect(running.local_addr());
        (running, stream)
    };
    let (_running, mut stream) = start(builder());
    ping(&mut stream, b"bye");
    speaks_on(stream, "the service");

    let (_running, stream) = start(builder().idle_timeout(Some(Duration::from_millis(50))));
    speaks_on(stream, "the idle timeout");

    let (running, mut stream) = start(builder());
    ping(&mut stream, b"hello");
    let since = Instant::now();
    running.handle().drain();
    speaks_on(stream, "the drain");
    let report = running.wait().expect("it drained");
    assert!(report.is_clean() && report.closed_idle == 1, "{report}");
    // The drain waited for the end of the client that still sent.
    assert!((Duration::from_millis(30)..since.elapsed()).contains(&report.drain), "{report}");
}

#[test]
fn a_client_that_waits_for_room_is_admitted_as_soon_as_there_is_room() {
    // The service may block, so a worker sees the client leave, and not the reactor.
    let server = Millpond::start(&["--max-connections", "1", "--work", "1ms"]);
    let mut inside = server.connect();
    ping(&mut inside, b"first");
    let mut waits: Vec<Duration> = Vec::new();
    for _ in 0..30 {
        let mut next = server.connect();
        next.write_all(b"next").expect("the kernel takes it");
        let start = Instant::now();
        drop(inside);
        next.read_exact(&mut [0; 4]).expect("served as soon as there was room");
        waits.push(start.elapsed());
        inside = next;
    }
    // Without a wake-up each client would wait until the reactor's next heartbeat, for up to a second.
    assert!(median(waits) < Duration::from_millis(500));
}

/// The median, which a few slow rounds on a busy machine do not change.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The client closes its socket in one half of the rounds, and resets the connection in the other.
#[test]
fn the_server_does_not_linger_for_a_client_that_has_gone() {
    let (running, exposition) = in_process(1, Fragile { may_block: true });
    let scrape = || Scrape::of(exposition.local_addr());
    let mut waits = Vec::new();
    for round in 0..20 {
        let mut stream = connect(running.local_addr());
        ping(&mut stream, b"bye");
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
        // On a busy machine the linger time may be over before this thread looks.
        let is_over = |now: &Scrape| now.closed("service") == f64::from(round + 1);
        eventually("the server lingers", || {
            let now = scrape();
            (now.connections("closing") == 1.0 || is_over(&now)).then_some(())
        });
        if round % 2 == 1 {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
        }
        let start = Instant::now();
        drop(stream);
        eventually("it is closed", || is_over(&scrape()).then_some(()));
        waits.push(start.elapsed());
    }
    // The server would linger for a second if the client stayed.
    assert!(median(waits) < Duration::from_millis(500));
}

/// Holds the reactor at the fourth client until the latch is open.
struct Doorman {
    clients: AtomicUsize,
    begun: Latch,
    latch: Latch,
}

impl Service for Doorman {
    type Session = ();

    fn open(&self, _peer: std::net::SocketAddr) {
        if self.clients.fetch_add(1, Ordering::Relaxed) == 3 {
            self.begun.open();
            self.latch.wait();
        }
    }

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        Next::KeepOpen
    }
}

/// A new client takes the place of the oldest silent connection. The server answers a client that has sent a message
/// before it may close that client's connection.
#[test]
fn evict_answers_a_message_before_it_closes_its_connection() {
    let (begun, latch) = (Latch::default(), Latch::default());
    let service = Doorman { clients: AtomicUsize::new(0), begun: begun.clone(), latch: latch.clone() };
    let builder = Server::builder("evict").service(service).workers(1).max_connections(4);
    let bound = builder.overload(Overload::Evict).bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let running = bound.start().expect("threads");
    let mut silent: Vec<TcpStream> = (0..3).map(|_| connect(running.local_addr())).collect();
    silent.iter_mut().for_each(|client| ping(client, b"hello"));
    let mut fourth = connect(running.local_addr());
    begun.wait();
    // The reactor sees the message and the new client only after it has admitted the fourth client. Then it has no
    // room.
    silent[0].write_all(b"the oldest").expect("sent");
    let mut newcomer = connect(running.local_addr());
    latch.open();
    silent[0].read_exact(&mut [0; 10]).expect("it is served");
    ping(&mut newcomer, b"in");
    ping(&mut fourth, b"in, too");
    silent.iter().for_each(|client| client.set_nonblocking(true).expect("a socket option"));
    eventually("one of the three was closed", || {
        silent.iter_mut().find_map(|client| client.read(&mut [0]).ok())
    });
}

/// Claims that it never blocks, and still waits for the latch.
struct Deceiver(Latch);

impl Service for Deceiver {
    type Session = ();

    fn open(&self, _peer: std::net::SocketAddr) {}

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        self.0.wait();
        Next::KeepOpen
    }

    fn may_block(&self) -> bool {
        false
    }
}

#[test]
fn a_reactor_that_is_held_up_is_not_well_and_one_that_has_ended_is_not_ill() {
    let ended = in_process(2, Echo).0;
    let ended_handle = ended.handle();
    ended_handle.drain();
    assert!(ended.wait().expect("it drained").is_clean());

    let latch = Latch::default();
    let held = in_process(2, Deceiver(latch.clone())).0;
    let handle = held.handle();
    assert_eq!(handle.health(), Ok(()));
    // One message holds the reactor, and the other the worker that the reactor wakes.
    let mut clients = [connect(held.local_addr()), connect(held.local_addr())];
    clients.iter_mut().for_each(|client| client.write_all(b"work").expect("sent"));
    let since = eventually("the server is not healthy", || handle.health().err());
    assert!(since > Duration::from_secs(5), "{since:?}");
    assert_eq!(ended_handle.health(), Ok(()), "a server that has ended has no heartbeat to miss");
    latch.open();
    clients.iter_mut().for_each(|client| client.read_exact(&mut [0; 4]).expect("served late"));
    eventually("the server is healthy again", || handle.health().ok());
}

#[test]
fn a_server_says_where_it_is_and_how_far() {
    let server = Server::builder("echo").service(Echo).workers(1).max_connections(10);
    let server = server.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let address = server.local_addr();
    assert_eq!(server.max_connections(), 10);
    assert_eq!(format!("{server:?}"), format!("Server {{ address: {address}, .. }}"));
    let running = server.start().expect("threads");
    assert_eq!(format!("{running:?}"), format!("Running {{ address: {address}, .. }}"));
    assert_eq!(format!("{:?}", running.handle()), "ServerHandle { phase: Serving, .. }");
}

#[test]
fn two_thousand_workers_fit_in_forty_mebibytes() {
    let server = Millpond::start(&["--workers", "2000"]);
    assert!(server.resident_mib() < 40, "{} MiB at the start", server.resident_mib());
    let mut clients: Vec<TcpStream> = (0..200).map(|_| server.connect()).collect();
    for size in [512, 60_000] {
        let before = server.scrape().pool("submitted_total");
        let (message, mut answer) = (vec![1; size], vec![0; size]);
        // The queue wakes sleeping workers in turn, so each of them serves before long.
        eventually("every worker has served", || {
            for client in &mut clients {
                client.write_all(&message).expect("sent");
            }
            for client in &mut clients {
                client.read_exact(&mut answer).expect("back");
            }
            (server.scrape().pool("submitted_total") > before + 20_000.0).then_some(())
        });
        assert!(server.resident_mib() < 40, "{} MiB after {size} bytes", server.resident_mib());
    }
}

#[test]
fn timeouts_longer_than_time_itself_are_none() {
    let server = Server::builder("echo")
        .service(Echo)
        .workers(1)
        .max_connections(10)
        .idle_timeout(Some(Duration::MAX))
        .write_timeout(Duration::MAX)
        .drain_timeout(Duration::MAX)
        .bind(([127, 0, 0, 1], 0).into())
        .expect("a port");
    let running = server.start().expect("threads");
    ping(&mut connect(running.local_addr()), b"hello");
    running.handle().drain();
    let report = running.wait().expect("the reactor ran to its end");
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.accepted, report.received, report.sent), (1, 5, 5));
}

/// A client that reads 200 kB/s for five seconds, and then the rest, is served to its end. One that reads nothing after
/// the five seconds is closed.
///
/// The server sees only what the client's kernel acknowledges, and that comes in steps. The kernel acknowledges more
/// when the whole piece at the head of its receive queue has been read. With a receive buffer of 16 KiB a step is at
/// most 64 KiB, and takes a third of a second.
#[test]
fn a_client_that_reads_slowly_is_not_one_that_reads_nothing() {
    const PIECE: usize = 20_000;
    const PIECES: usize = 50;
    const STEP: usize = 4;
    let message: Vec<u8> = (0..8 * MIB).map(|at| (at % 239) as u8).collect();
    let round = || {
        let server = Millpond::start(&["--write-timeout", "2s"]);
        let sends = || {
            let client = connect_with(16 * 1024, server.echo);
            let (mut writer, sent) = (client.try_clone().expect("a clone"), message.clone());
            (client, thread::spawn(move || writer.write_all(&sent)))
        };
        let ((mut client, writing), (mut quitter, in_vain)) = (sends(), sends());
        let mut answer = vec![0; message.len()];
        // Too slow for an `EPOLLOUT`, which Linux reports only when a third of the send buffer is free.
        let (slowly, rest) = answer.split_at_mut(PIECES * PIECE);
        let mut times = vec![Instant::now()];
        let mut reads = || -> std::io::Result<()> {
            for piece in slowly.chunks_mut(PIECE) {
                thread::sleep(Duration::from_millis(100));
                quitter.read_exact(piece)?;
                client.read_exact(piece)?;
                times.push(Instant::now());
            }
            SockRef::from(&client).set_recv_buffer_size(4 * MIB)?;
            client.read_exact(rest)
        };
        let outcome = reads();
        times.push(Instant::now());
        // On a busy machine this thread may be kept from reading a whole step for the timeout.
        let slowest =
            times[..PIECES.min(times.len())].windows(STEP + 1).map(|step| step[STEP] - step[0]).max();
        if outcome.is_err() && slowest > Some(Duration::from_millis(1500)) {
            return false;
        }
        outcome.expect("it comes back");
        writing.join().expect("the writer").expect("all of it is taken");
        assert!(answer == message);
        eventually("the other is closed, once it reads nothing", || {
            (server.scrape().closed("write_timeout") == 1.0).then_some(())
        });
        drop((client, quitter));
        // The kernel may have taken all of it.
        let _ = in_vain.join().expect("the writer");
        let scrape = server.scrape_after("both are closed", |now| now.closed("client") == 1.0);
        assert_eq!(scrape.broken_law(), None);
        true
    };
    assert!((0..5).any(|_| round()), "five times this machine kept the client from reading");
}

/// Once the client has read enough for all output to be sent, it may be silent for longer than the write timeout.
#[test]
fn a_client_that_was_blocked_once_is_not_blocked_for_good() {
    const MESSAGE: usize = 16 * 1024;
    let server = Millpond::start(&["--write-timeout", "2s"]);
    let received = |scrape: &Scrape| scrape.get("received_bytes_total");
    let owed = |scrape: &Scrape| received(scrape) - scrape.get("sent_bytes_total");
    // Sends a message each time the server has read the one before, until an answer is not whole. Returns the number of
    // bytes sent.
    let blocked = || {
        let mut client = connect_with(64 * 1024, server.echo);
        let (before, mut sent) = (received(&server.scrape()), 0);
        loop {
            client.write_all(&[7; MESSAGE]).expect("the server reads");
            sent += MESSAGE;
            let is_read = |now: &Scrape| received(now) == before + sent as f64;
            if owed(&server.scrape_after("it is read", is_read)) > 0.0 {
                return (client, sent);
            }
        }
    };
    let (mut client, sent) = blocked();
    let mut answer = vec![0; sent];
    // Too little for an `EPOLLOUT`.
    let (part, rest) = answer.split_at_mut(200_000);
    client.read_exact(part).expect("it comes back");
    eventually("all of it is sent", || (owed(&server.scrape()) == 0.0).then_some(()));
    let (mut another, _) = blocked();
    eventually("one is closed", || {
        let scrape = server.scrape();
        if owed(&scrape) == 0.0 {
            // On a busy machine, late acknowledgements may have let the kernel take the rest after all.
            another.write_all(&[7; MESSAGE]).expect("the server reads");
        }
        (scrape.closed("write_timeout") == 1.0).then_some(())
    });
    client.read_exact(rest).expect("it comes back");
    ping(&mut client, b"still here");
}

/// The reactor is one of the workers that serve these clients.
#[test]
fn lively_clients_are_served_and_counted_like_any_others() {
    const CLIENTS: usize = 5;
    const MESSAGES: usize = 3_000;
    for workers in ["1", "2", "8", "128"] {
        let mut server = Millpond::start(&["--workers", workers]);
        let guard = Guard::over(server.metrics);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut client = server.connect();
                    client.set_nodelay(true).expect("a socket option");
                    (0..MESSAGES).for_each(|_| ping(&mut client, b"at once"));
                });
            }
        });
        let scrape = server.scrape_after("all have left", |now| now.closed("client") == CLIENTS as f64);
        let messages = (CLIENTS * MESSAGES) as f64;
        assert_eq!(scrape.get("received_bytes_total"), messages * 7.0);
        assert_eq!(scrape.get("sent_bytes_total"), messages * 7.0);
        assert_eq!(scrape.get("echo_latency_seconds_count"), messages);
        assert_eq!(scrape.pool("workers"), workers.parse::<f64>().expect("a number"));
        // One job may serve several messages.
        let jobs = scrape.pool("submitted_total");
        assert!(jobs > messages / 2.0, "{jobs} jobs");
        assert_eq!(scrape.get("pool_jobs_total{pool=\"echo\",outcome=\"completed\"}"), jobs);
        assert_eq!(scrape.pool("queue_wait_seconds_count"), jobs);
        guard.finish();
        assert_eq!(server.drain(), Some(0));
    }
}

#[test]
fn a_crowd_of_lively_clients_is_served_evenly() {
    let server = Millpond::start(&["--workers", "8"]);
    let served: Vec<_> = (0..40).map(|_| AtomicUsize::new(0)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for served in &served {
            let (server, over) = (&server, &over);
            scope.spawn(move || {
                let mut client = server.connect();
                client.set_nodelay(true).expect("a socket option");
                while !over.load(Ordering::Relaxed) {
                    ping(&mut client, b"my turn");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let all_have = |least| served.iter().all(|served| served.load(Ordering::Relaxed) >= least);
        let enough = catch_unwind(AssertUnwindSafe(|| {
            eventually("each client has had a thousand turns", || all_have(1_000).then_some(()));
        }));
        over.store(true, Ordering::Relaxed);
        enough.expect("in time");
    });
    let served: Vec<_> = served.into_iter().map(AtomicUsize::into_inner).collect();
    let (least, most) = (served.iter().min().expect("40"), served.iter().max().expect("40"));
    assert!(most / least < 10, "{served:?}");
}

#[test]
fn a_talkative_client_does_not_look_like_a_stuck_worker() {
    let server = Millpond::start(&["--workers", "2", "--work", "10ms"]);
    let client = server.connect();
    client.set_nodelay(true).expect("a socket option");
    let start = Instant::now();
    let mut longest: f64 = 0.0;
    let mut jobs = 0.0;
    while start.elapsed() < Duration::from_secs(1) || jobs <= 20.0 {
        assert!(start.elapsed() < common::PATIENCE, "{jobs} jobs, the longest of {longest} s");
        (&client).write_all(b"more").expect("sent");
        thread::sleep(Duration::from_millis(3));
        let scrape = server.scrape();
        longest = longest.max(scrape.pool("longest_running_seconds"));
        jobs = scrape.pool("submitted_total");
    }
    // A turn that did not end by itself would be as long as the whole conversation.
    let talked = start.elapsed().as_secs_f64();
    assert!(longest < talked / 3.0, "a job of {longest} s in {talked} s");
}

#[test]
fn bytes_behind_urgent_data_are_served() {
    let server = Millpond::start(&["--workers", "1", "--work", "100ms"]);
    // Holds the worker, so that the server reads the other client's bytes when all of them have come.
    server.connect().write_all(b"busy").expect("sent");
    let mut client = server.connect();
    client.write_all(b"abc").expect("sent");
    SockRef::from(&client).send_out_of_band(b"!").expect("sent");
    client.write_all(b"def").expect("sent");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).expect("it comes back");
    assert_eq!(&answer, b"abcdef");
}

#[test]
fn a_write_timeout_of_zero_spares_clients_that_read() {
    let server =
        Server::builder("echo").service(Echo).workers(1).max_connections(10).write_timeout(Duration::ZERO);
    let running = server.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
    let _silent = connect(running.local_addr());
    ping(&mut connect(running.local_addr()), b"hello");
    thread::sleep(Duration::from_millis(100));
    ping(&mut connect(running.local_addr()), b"the reactor still comes round");
    running.handle().drain();
    assert!(running.wait().expect("the reactor ran to its end").is_clean());
}

#[test]
fn urgent_data_gives_no_client_a_worker_for_good() {
    let server = Millpond::start(&["--workers", "1", "--work", "5ms"]);
    let talker = server.connect();
    talker.set_nodelay(true).expect("a socket option");
    SockRef::from(&talker).send_out_of_band(b"!").expect("sent");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !stop.load(Ordering::Relaxed) && start.elapsed() < common::PATIENCE {
                (&talker).write_all(b"more").expect("sent");
                thread::sleep(Duration::from_millis(1));
            }
        });
        let mut other = server.connect();
        let start = Instant::now();
        (0..5).for_each(|_| ping(&mut other, b"hello"));
        let waited = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        // The other client is served while the talker talks, and the talker talks for all of that time.
        assert!(waited < common::PATIENCE / 2, "five messages took {waited:?}");
    });
}

/// A service that panics at every second new connection.
struct Touchy(AtomicUsize);

impl Service for Touchy {
    type Session = ();

    fn open(&self, _peer: std::net::SocketAddr) {
        assert!(self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(2), "a new connection");
    }

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        Next::KeepOpen
    }
}

#[test]
fn a_service_that_panics_at_a_new_connection_harms_only_that_one() {
    let (running, exposition) = in_process(2, Touchy(0.into()));
    for _ in 0..10 {
        ping(&mut connect(running.local_addr()), b"fine");
        assert_eq!(connect(running.local_addr()).read(&mut [0]).expect("closed"), 0);
    }
    let scrape = Scrape::of(exposition.local_addr());
    assert_eq!(scrape.get("connections_accepted_total"), 10.0);
    assert_eq!(scrape.get("accept_errors_total{kind=\"other\"}"), 10.0);
    running.handle().drain();
    assert!(running.wait().expect("the reactor ran to its end").is_clean());
}

/// Panics at every message, and its sessions panic when they are dropped.
struct Bomb;

struct Fuse;

impl Drop for Fuse {
    fn drop(&mut self) {
        panic!("a session's destructor");
    }
}

impl Service for Bomb {
    type Session = Fuse;

    fn open(&self, _peer: std::net::SocketAddr) -> Fuse {
        Fuse
    }

    fn serve(&self, _session: &mut Fuse, _bytes: &mut Vec<u8>) -> Next {
        panic!("a message");
    }
}

#[test]
fn sessions_that_panic_when_dropped_are_survived() {
    let (running, exposition) = in_process(2, Bomb);
    for round in 0..40 {
        let mut client = connect(running.local_addr());
        if round % 2 == 0 {
            client.write_all(b"boom").expect("sent");
            assert_eq!(client.read(&mut [0]).expect("the end, and no reset"), 0);
        }
    }
    let closed = eventually("all are closed", || {
        let scrape = Scrape::of(exposition.local_addr());
        let closed = [scrape.closed("panicked"), scrape.closed("client")];
        (closed[0] + closed[1] == 40.0).then_some(closed)
    });
    assert_eq!(closed, [20.0, 20.0]);
    let _idle = connect(running.local_addr());
    running.handle().drain();
    assert!(running.wait().expect("the reactor ran to its end").is_clean());
}

#[test]
fn the_source_of_an_error_is_not_in_its_own_words() {
    use std::error::Error;
    let beneath = |error: &ServerError| error.source().map(ToString::to_string);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let builder = || Server::builder("errors").service(Echo).workers(1).max_connections(10);
    let bind = builder().bind(address).expect_err("the port is taken");
    assert_eq!(bind.to_string(), format!("cannot listen on {address}"));
    assert!(beneath(&bind).is_some_and(|said| said.contains("in use")), "{bind:?}");

    let any_port = ([127, 0, 0, 1], 0).into();
    let pool = builder().workers(0).bind(any_port).expect_err("no worker");
    assert_eq!(pool.to_string(), "the worker pool did not start");
    assert!(beneath(&pool).is_some_and(|said| said.starts_with("0 workers asked for")), "{pool:?}");

    let limit = builder().max_connections(usize::MAX).bind(any_port).expect_err("too many");
    assert!(limit.to_string().contains("connections asked for"), "{limit}");
    assert_eq!(beneath(&limit), None);
    for refused in [ServerError::Thread, ServerError::Setup] {
        let error = refused(std::io::Error::other("the system's words"));
        assert_eq!(beneath(&error).as_deref(), Some("the system's words"));
    }
}
