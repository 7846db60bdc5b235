//! The drain, from the signal to the exit: no byte is lost, and the exit code says how it ended.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::clients::Load;
use common::pools::Latch;
use common::report::{Report, report};
use common::scrape::{Guard, Scrape};
use common::{Millpond, PATIENCE, connect_with, eventually, ping};
use rustix::process::Signal;

const MIB: usize = 1024 * 1024;

#[test]
fn a_signal_in_the_middle_loses_no_byte_of_any_client() {
    assert!((0..5).any(|_| signal_in_the_middle()), "five times the machine kept the clients from talking");
}

/// Returns whether every client got every byte. If the machine kept the clients from running for a second, the server
/// may have seen idle ones among the 500. Then it promises nothing, and this returns `false`.
fn signal_in_the_middle() -> bool {
    const BYTES: usize = MIB;
    let mut server = Millpond::start(&["--drain-timeout", "50s"]);
    let guard = Guard::over(server.metrics);
    let load = Load { address: server.echo, clients: 500, bytes: BYTES, message: 1..=16 * 1024, seed: 3 };
    let (signalled, mut was_signalled, mut longest) = (Latch::default(), false, Duration::ZERO);
    let (outcome, scrape) = thread::scope(|scope| {
        // On a thread of its own, because the clients' thread must go on.
        let observer = scope.spawn(|| {
            signalled.wait();
            eventually("draining", || {
                (server.scrape().get("phase{phase=\"draining\"}") == 1.0).then_some(())
            });
            let ready = server.get("/readyz");
            assert_eq!((ready.code, ready.body.as_str()), (503, "draining\n"));
            server.scrape()
        });
        let mut last = Instant::now();
        let outcome = load.run_with(|slowest| {
            if was_signalled {
                longest = longest.max(last.elapsed());
            } else if slowest > BYTES / 8 {
                server.signal(Signal::INT);
                signalled.open();
                was_signalled = true;
            }
            last = Instant::now();
        });
        if !was_signalled {
            server.signal(Signal::INT);
            signalled.open();
        }
        (outcome, observer.join().expect("a scrape in the drain"))
    });
    let code = server.wait().code();
    guard.finish();
    if outcome.is_err() && was_signalled && longest > Duration::from_millis(300) {
        return false;
    }
    outcome.expect("every byte of every client comes back");
    assert!(was_signalled && code == Some(0), "{code:?}");

    let started = scrape.get("drain_started_timestamp_seconds");
    assert!(started > 1.6e9 && scrape.get("drain_deadline_timestamp_seconds") - started == 50.0);
    let report = report(&server);
    let bytes = 500 * BYTES as u64;
    assert_eq!((report.bytes_in, report.bytes_out), (bytes, bytes), "{}", server.log());
    assert_eq!(report.cut, 0);
    assert_eq!(report.in_drain, report.served + report.closed_idle);
    assert!(report.in_drain > 400, "{report:?}: the signal came when most were done");
    true
}

#[test]
fn idle_clients_are_told_the_end_one_after_another() {
    let spread = || {
        let mut server = Millpond::start(&[]);
        let mut clients: Vec<TcpStream> = (0..300).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| ping(client, b"hello"));
        let start = Instant::now();
        server.signal(Signal::TERM);
        let ends: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                thread::spawn(move || {
                    assert_eq!(client.read(&mut [0]).expect("the end, and no reset"), 0);
                    start.elapsed()
                })
            })
            .collect();
        let mut ends: Vec<Duration> = ends.into_iter().map(|end| end.join().expect("a clean end")).collect();
        assert_eq!(server.wait().code(), Some(0));
        ends.sort();
        assert_eq!(report(&server).closed_idle, 300);
        ends[299] - ends[0]
    };
    // On a busy machine the first clients may see their end late.
    let spreads: Vec<_> =
        (0..5).map_while(|_| Some(spread()).filter(|spread| *spread <= Duration::from_millis(250))).collect();
    assert!(spreads.len() < 5, "all 300 within {spreads:?}");
}

#[test]
fn a_client_that_never_finishes_is_cut_at_the_deadline() {
    let is_cut = || {
        let mut server = Millpond::start(&["--drain-timeout", "1s"]);
        let mut client = server.connect();
        ping(&mut client, b"hello");
        let start = Instant::now();
        server.signal(Signal::INT);
        // The client is never silent for long enough to be idle, unless the machine is busy with others.
        let mut talk = Talk::new();
        while client.write_all(b"more").and_then(|()| client.read_exact(&mut [0; 4])).is_ok() {
            talk.pauses();
        }
        talk.pauses();
        let (code, report) = (server.wait().code(), report(&server));
        if talk.was_silent && report.closed_idle == 1 {
            return false;
        }
        assert_eq!(code, Some(3));
        assert!(start.elapsed() >= Duration::from_secs(1), "cut before the deadline");
        assert_eq!((report.cut, report.served), (1, 0));
        true
    };
    assert!((0..5).any(|_| is_cut()), "five times the machine kept the client from talking");
}

/// The pauses between the messages of a client that must not be idle.
struct Talk {
    spoke: Instant,
    /// Whether one of them was so long that the server may have seen an idle client.
    was_silent: bool,
}

impl Talk {
    fn new() -> Self {
        Talk { spoke: Instant::now(), was_silent: false }
    }

    fn pauses(&mut self) {
        thread::sleep(Duration::from_millis(20));
        self.was_silent |= self.spoke.elapsed() > Duration::from_millis(150);
        self.spoke = Instant::now();
    }
}

#[test]
fn clients_that_never_fall_silent_are_cut_at_the_deadline() {
    let mut server = Millpond::start(&["--workers", "8", "--drain-timeout", "1s"]);
    let talked = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            let mut client = server.connect();
            client.set_nodelay(true).expect("a socket option");
            let talked = &talked;
            scope.spawn(move || {
                let mut answer = [0; 4];
                while client.write_all(b"more").and_then(|()| client.read_exact(&mut answer)).is_ok() {
                    talked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        eventually("they talk", || (talked.load(Ordering::Relaxed) > 3_000).then_some(()));
        server.signal(Signal::INT);
        assert_eq!(server.wait().code(), Some(3));
    });
    let report = report(&server);
    // On a busy machine, a client may have waited for the processor so long that it was silent.
    assert_eq!((report.in_drain, report.cut + report.closed_idle), (3, 3));
    assert!(report.cut > 0);
    assert_eq!(report.bytes_in, report.bytes_out);
}

#[test]
fn a_worker_stuck_in_its_service_does_not_hold_up_the_exit() {
    let mut server = Millpond::start(&["--work", "1h", "--drain-timeout", "300ms", "--workers", "2"]);
    let mut clients: Vec<TcpStream> = (0..5).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"stuck").expect("sent"));
    eventually("two stuck, three queued", || (server.scrape().connections("queued") == 3.0).then_some(()));
    let start = Instant::now();
    assert_eq!(server.drain(), Some(3));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(report(&server).cut, 5);
}

/// If signals come this soon after the first, they belong to the same stop. The server says so in its log.
const ONE_STOP: Duration = Duration::from_secs(1);

/// One stop often comes as two signals: of `timeout`, of a terminal that closes, of process runners, of systemd.
#[test]
fn two_signals_at_once_are_one_stop() {
    for (first, second) in
        [(Signal::INT, Signal::TERM), (Signal::TERM, Signal::HUP), (Signal::HUP, Signal::INT)]
    {
        let mut server = Millpond::start(&["-v", "--work", "400ms"]);
        let mut client = server.connect();
        client.write_all(b"hello").expect("it can be sent");
        eventually("a worker has it", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
        server.signal(first);
        server.signal(second);
        let mut answer = [0; 5];
        client.read_exact(&mut answer).expect("the answer comes");
        drop(client);
        let code = server.wait().code();
        assert_eq!((&answer, code, report(&server).cut), (b"hello", Some(0), 0), "{first:?}, {second:?}");
        let log = server.log();
        let of = |level, text| log.lines().filter(|line| line.contains(level) && line.contains(text)).count();
        assert_eq!((of(" INFO ", "signal: draining"), of("DEBUG ", "the same stop")), (1, 1), "{log}");
    }
}

#[test]
fn a_signal_a_second_after_the_first_abandons_at_once() {
    at_once(|| {
        let mut server = Millpond::start(&["--work", "1h", "--drain-timeout", "1h"]);
        server.connect().write_all(b"stuck").expect("sent");
        eventually("stuck", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
        server.signal(Signal::INT);
        server.signal(Signal::TERM);
        eventually("draining", || {
            server
                .log()
                .contains("another signal abandons at once if it comes 1s or more after")
                .then_some(())
        });
        // The server logs after it has taken the time of the signal, so its second is over no later than this one.
        thread::sleep(ONE_STOP);
        assert!(!server.has_exited(), "the two signals are one stop");
        let start = Instant::now();
        server.signal(Signal::INT);
        assert_eq!(server.wait().code(), Some(130));
        let took = start.elapsed();
        let log = server.log();
        assert!(log.lines().last().is_some_and(|line| line.contains("abandoned")), "{log}");
        took
    });
}

/// Expects that `step` takes less than a second, in one of five rounds: the machine may be busy with others.
fn at_once(step: impl Fn() -> Duration) {
    let late: Vec<_> =
        (0..5).map_while(|_| Some(step()).filter(|took| *took >= Duration::from_secs(1))).collect();
    assert!(late.len() < 5, "{late:?}");
}

#[test]
fn clients_in_the_listen_queue_at_the_signal_are_served() {
    let mut server = Millpond::start(&["--max-connections", "2"]);
    let mut inside: Vec<TcpStream> = (0..2).map(|_| server.connect()).collect();
    inside.iter_mut().for_each(|client| ping(client, b"hello"));
    let mut waiting: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    for (number, client) in waiting.iter_mut().enumerate() {
        client.write_all(&[number as u8; 1000]).expect("the kernel takes it");
    }
    server.signal(Signal::INT);
    eventually("draining", || (server.get("/readyz").code == 503).then_some(()));
    for (number, client) in waiting.iter_mut().enumerate() {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("the end, and no reset");
        assert_eq!(answer, [number as u8; 1000]);
    }
    assert_eq!(server.wait().code(), Some(0));
    let report = report(&server);
    assert_eq!((report.in_drain, report.cut, report.bytes_in, report.bytes_out), (22, 0, 20_010, 20_010));
}

#[test]
fn a_client_that_comes_after_the_listener_has_closed_is_refused_and_does_not_wait() {
    let mut server = Millpond::start(&["--workers", "1", "--work", "4s"]);
    let mut served = server.connect();
    served.write_all(b"hello").expect("it is sent");
    eventually("a worker has it", || {
        (server.scrape().get("pool_workers_busy{pool=\"echo\"}") == 1.0).then_some(())
    });
    server.signal(Signal::INT);
    eventually("refused", || {
        let outcome = TcpStream::connect_timeout(&server.echo, Duration::from_millis(100));
        matches!(outcome, Err(error) if error.kind() == ErrorKind::ConnectionRefused).then_some(())
    });
    assert!(!server.has_exited(), "refused because the server is gone");
    let mut answer = [0; 5];
    served.read_exact(&mut answer).expect("the answer");
    assert_eq!((&answer, server.wait().code()), (b"hello", Some(0)));
}

#[test]
fn connections_in_the_listen_queue_at_the_deadline_are_counted() {
    let mut server = Millpond::start(&["--max-connections", "1", "--work", "1h", "--drain-timeout", "500ms"]);
    let mut inside = server.connect();
    inside.write_all(b"stuck").expect("sent");
    eventually("stuck", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
    let _waiting: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    assert_eq!(server.drain(), Some(3));
    assert_eq!(report(&server).cut, 5, "{}", server.log());
}

#[test]
fn a_lame_duck_still_accepts_and_says_it_is_not_ready() {
    let mut server = Millpond::start(&["--lame-duck", "3s"]);
    let start = Instant::now();
    server.signal(Signal::HUP);
    eventually("the lame duck phase", || (server.get("/readyz").body == "lame_duck\n").then_some(()));
    assert_eq!(server.get("/healthz").code, 200);
    assert_eq!(server.scrape().get("phase{phase=\"lame_duck\"}"), 1.0);
    ping(&mut server.connect(), b"still accepted");
    assert_eq!(server.wait().code(), Some(0));
    assert!(start.elapsed() >= Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn a_drain_timeout_of_zero_cuts_at_once() {
    let mut server = Millpond::start(&["--drain-timeout", "0s"]);
    let mut client = server.connect();
    ping(&mut client, b"hello");
    assert_eq!(server.drain(), Some(3));
    assert_eq!(report(&server).cut, 1);
}

#[test]
fn a_drain_with_nobody_there_is_over_at_once() {
    let nothing = Report {
        in_drain: 0,
        served: 0,
        closed_idle: 0,
        failed: 0,
        cut: 0,
        accepted: 0,
        bytes_in: 0,
        bytes_out: 0,
    };
    at_once(|| {
        let mut server = Millpond::start(&[]);
        let start = Instant::now();
        assert_eq!(server.drain(), Some(0));
        let took = start.elapsed();
        assert_eq!(report(&server), nothing);
        took
    });
}

#[test]
fn an_ignored_sigint_is_caught_all_the_same() {
    // A shell without job control does this to a program that it starts with `&`.
    let mut command = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_millpond");
    command.args(["-c", "trap '' INT HUP; exec \"$0\" --listen 127.0.0.1:0 --metrics 127.0.0.1:0", program]);
    let mut server = Millpond::spawn(&mut command);
    assert_eq!(server.drain(), Some(0));
}

/// Connects a client whose answers are in the kernel's buffers, and which reads none of them. Returns it with the
/// answers.
fn unread(server: &Millpond) -> (TcpStream, Vec<u8>) {
    let mut client = connect_with(16 * 1024, server.echo);
    let message: Vec<u8> = (0..150_000).map(|at| u8::try_from(at % 251).expect("small")).collect();
    client.write_all(&message).expect("it is sent");
    eventually("all is sent back, as far as the server sees", || {
        (server.scrape().get("sent_bytes_total") == 150_000.0).then_some(())
    });
    (client, message)
}

/// Lets the client send once more, `late` after the signal, and asserts that it gets all of its answers.
fn speaks_late(mut server: Millpond, (mut client, mut message): (TcpStream, Vec<u8>), late: Duration) {
    server.signal(Signal::INT);
    eventually("draining", || (server.get("/readyz").body == "draining\n").then_some(()));
    thread::sleep(late);
    client.write_all(b"!").expect("the connection stands");
    message.push(b'!');
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("the end comes after all of it");
    assert!(answer == message, "{} of {} bytes", answer.len(), message.len());
    drop(client);
    assert_eq!((server.wait().code(), report(&server).cut), (Some(0), 0));
}

#[test]
fn unread_answers_are_not_lost_when_the_client_sends_again() {
    let server = Millpond::start(&[]);
    let client = unread(&server);
    // That is longer than the server waits for an idle client and then lingers.
    speaks_late(server, client, Duration::from_millis(1500));
}

/// The server closes so many idle clients before this one that the idle timeout comes first.
#[test]
fn unread_answers_are_not_lost_by_the_idle_timeout_of_a_drain() {
    let server = Millpond::start(&["--idle-timeout", "2s"]);
    let _others: Vec<TcpStream> = (0..900).map(|_| server.connect()).collect();
    let client = unread(&server);
    // That is longer than the idle timeout and the time the server lingers.
    speaks_late(server, client, Duration::from_millis(3500));
}

#[test]
fn unread_answers_at_the_deadline_are_cut_and_counted() {
    let mut server = Millpond::start(&["--drain-timeout", "1s"]);
    let client = unread(&server);
    assert_eq!((server.drain(), report(&server).cut), (Some(3), 1), "{}", server.log());
    drop(client);
}

#[test]
fn a_drain_that_waits_for_a_client_uses_next_to_no_processor_time() {
    let mut server = Millpond::start(&[]);
    let (mut client, message) = unread(&server);
    server.signal(Signal::INT);
    eventually("draining", || (server.get("/readyz").body == "draining\n").then_some(()));
    let share = server.processor_share();
    assert!(share < 0.2, "{share} of a processor while nothing happens");
    client.read_exact(&mut vec![0; message.len()]).expect("it is all there");
    drop(client);
    assert_eq!((server.wait().code(), report(&server).cut), (Some(0), 0));
}

#[test]
fn a_slow_reader_gets_all_of_its_answer_in_the_drain() {
    let mut server = Millpond::start(&[]);
    let mut client = server.connect();
    // The kernel's buffers hold less than this, so some of it waits in the server.
    let message: Vec<u8> = (0..16 * MIB).map(|at| (at % 253) as u8).collect();
    let mut writer = client.try_clone().expect("a clone");
    let sent = message.clone();
    let writing = thread::spawn(move || writer.write_all(&sent));
    eventually("blocked", || {
        let received = server.scrape().get("received_bytes_total");
        thread::sleep(Duration::from_millis(200));
        (received > 0.0 && server.scrape().get("received_bytes_total") == received).then_some(())
    });
    server.signal(Signal::INT);
    eventually("draining", || (server.get("/readyz").code == 503).then_some(()));
    let mut answer = vec![0; message.len()];
    for piece in answer.chunks_mut(MIB) {
        // The client is silent for longer than an idle client may be, while output waits for it.
        thread::sleep(Duration::from_millis(100));
        client.read_exact(piece).expect("it comes back");
    }
    writing.join().expect("the writer").expect("all of it is taken");
    assert!(answer == message);
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(report(&server).bytes_out, message.len() as u64);
}

#[test]
fn silent_clients_are_closed_as_idle_although_every_worker_is_stuck() {
    let mut server = Millpond::start(&["--workers", "1", "--work", "1h", "--drain-timeout", "2s"]);
    let mut stuck = server.connect();
    stuck.write_all(b"stuck").expect("sent");
    let silent: Vec<TcpStream> = (0..5).map(|_| server.connect()).collect();
    let scrape = eventually("all in, and one at work", || {
        Some(server.scrape())
            .filter(|now| now.get("connections_accepted_total") == 6.0 && now.pool("workers_busy") == 1.0)
    });
    let states = ["idle", "queued", "active"].map(|state| scrape.connections(state));
    assert_eq!((states, scrape.pool("queue_depth")), ([5.0, 0.0, 1.0], 0.0), "a silent client causes no job");
    server.signal(Signal::INT);
    for mut client in silent {
        assert_eq!(client.read(&mut [0]).expect("the end, and no reset"), 0);
    }
    assert_eq!(server.wait().code(), Some(3));
    assert_eq!((report(&server).closed_idle, report(&server).cut), (5, 1));
}

#[test]
fn output_that_a_client_never_takes_makes_the_drain_unclean() {
    let mut server = Millpond::start(&["--write-timeout", "500ms"]);
    let client = server.connect();
    client.set_nonblocking(true).expect("a socket option");
    let junk = vec![1; MIB];
    eventually("blocked", || {
        while (&client).write(&junk).is_ok() {}
        let [before, now] = [server.scrape(), server.scrape()];
        // With a worker on it, bytes that have been read may only be on their way out. A scrape reads the pool first.
        // If nothing was read between the two scrapes and the second shows no job, then there was none in between.
        let received = |scrape: &Scrape| scrape.get("received_bytes_total");
        let owed = received(&now) > now.get("sent_bytes_total");
        (owed && received(&before) == received(&now) && now.is_quiet()).then_some(())
    });
    assert_eq!(server.drain(), Some(3));
    let report = report(&server);
    assert_eq!((report.served, report.cut), (0, 1), "{}", server.log());
    assert!(report.bytes_in > report.bytes_out);
}

#[test]
fn a_client_that_got_everything_is_not_counted_as_cut() {
    // The server half-closes the connection and the client does not, so the deadline comes while the server lingers.
    let mut server = Millpond::start(&["--drain-timeout", "600ms"]);
    let mut client = server.connect();
    ping(&mut client, b"hello");
    assert_eq!(server.drain(), Some(0));
    assert_eq!((report(&server).closed_idle, report(&server).cut), (1, 0));
}

#[test]
fn nobody_gets_in_after_the_signal_while_the_backlog_waits_for_room() {
    let nobody_gets_in = || {
        let mut server = Millpond::start(&["--max-connections", "1"]);
        let mut inside = server.connect();
        ping(&mut inside, b"hello");
        let mut waiting = server.connect();
        waiting.write_all(b"served").expect("the kernel takes it");
        let talking = AtomicBool::new(true);
        thread::scope(|scope| {
            // From before the signal on, this client is never silent for long enough to be idle.
            let talker = scope.spawn(|| {
                let mut talk = Talk::new();
                while talking.load(Ordering::Relaxed) {
                    let mut answer = [0; 4];
                    let spoke = inside.write_all(b"busy").and_then(|()| inside.read_exact(&mut answer));
                    talk.pauses();
                    if talk.was_silent {
                        return false;
                    }
                    spoke.expect("it is served");
                }
                true
            });
            server.signal(Signal::INT);
            eventually("draining", || {
                let is_draining = server.get("/readyz").body == "draining\n";
                (is_draining || talker.is_finished()).then_some(())
            });
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(1) && !talker.is_finished() {
                let outcome = TcpStream::connect_timeout(&server.echo, Duration::from_millis(100));
                assert!(outcome.is_err() || talker.is_finished(), "a new connection was accepted");
            }
            talking.store(false, Ordering::Relaxed);
            talker.join().expect("it is served")
        })
        .then(|| {
            drop(inside);
            waiting.read_exact(&mut [0; 6]).expect("the client in the listen queue is served");
            drop(waiting);
            assert_eq!(server.wait().code(), Some(0));
            assert_eq!((report(&server).in_drain, report(&server).cut), (2, 0));
        })
    };
    assert!(
        (0..5).any(|_| nobody_gets_in().is_some()),
        "five times the machine kept the client from talking"
    );
}

/// The server is full, and its listen queue is empty. No event wakes the server meanwhile.
#[test]
fn no_client_gets_in_a_moment_after_the_signal_and_then_waits_for_room() {
    let mut server = Millpond::start(&["--max-connections", "1", "--workers", "1", "--work", "2s"]);
    let mut inside = server.connect();
    inside.write_all(b"hello").expect("it is sent");
    eventually("a worker has it", || (server.scrape().pool("workers_busy") == 1.0).then_some(()));
    server.signal(Signal::INT);
    thread::sleep(Duration::from_millis(500));
    TcpStream::connect_timeout(&server.echo, Duration::from_millis(500)).expect_err("the listener is closed");
    inside.read_exact(&mut [0; 5]).expect("the answer");
    drop(inside);
    assert_eq!((server.wait().code(), report(&server).cut), (Some(0), 0));
}

/// This holds for every policy for new connections beyond the limit.
#[test]
fn a_client_that_comes_at_the_signal_is_served_when_there_is_room() {
    for overload in ["wait", "reject"] {
        let newcomer_is_served = || {
            let mut server = Millpond::start(&["--max-connections", "1", "--overload", overload]);
            let mut inside = server.connect();
            ping(&mut inside, b"hello");
            server.signal(Signal::INT);
            eventually("draining", || (server.get("/readyz").body == "draining\n").then_some(()));
            // The listener stays open for a quarter of a second. A busy machine may miss that.
            let mut newcomer = TcpStream::connect_timeout(&server.echo, Duration::from_millis(100)).ok()?;
            newcomer.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            newcomer.write_all(b"in time").ok()?;
            ping(&mut inside, b"not pushed out");
            drop(inside);
            newcomer.read_exact(&mut [0; 7]).expect("served");
            drop(newcomer);
            assert_eq!((server.wait().code(), report(&server).cut), (Some(0), 0));
            Some(())
        };
        assert!((0..10).any(|_| newcomer_is_served().is_some()), "{overload}: not once in ten times");
    }
}

/// The server closes idle clients one millisecond apart, and faster if that would take too long.
#[test]
fn three_thousand_idle_clients_are_gone_before_a_deadline_of_two_seconds() {
    let mut server = Millpond::start(&["--drain-timeout", "2s"]);
    let clients: Vec<TcpStream> = (0..3000).map(|_| server.connect()).collect();
    eventually("all are in", || (server.scrape().connections("idle") == 3000.0).then_some(()));
    assert_eq!((server.drain(), report(&server).closed_idle), (Some(0), 3000));
    drop(clients);
}
