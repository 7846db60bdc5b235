//! `millpond load` shows an outage: in the longest silence, in the latencies, and in its exit code.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use common::peers::{Peer, Ran, Run, echo, load};
use common::{Millpond, eventually};
use rustix::process::Signal;
use socket2::SockRef;

/// How long the service is away.
const OUTAGE: Duration = Duration::from_millis(700);

/// The fields of the report that are null if no message was due.
const LATENCIES: [&str; 8] = [
    "latency_mean_ns",
    "latency_p50_ns",
    "latency_p90_ns",
    "latency_p99_ns",
    "latency_p99_9_ns",
    "latency_p99_99_ns",
    "latency_max_ns",
    "latency_answered_max_ns",
];

fn ms(ran: &Ran, latency: &str) -> u64 {
    ran.number(latency) / 1_000_000
}

/// A loopback address that only these tests use. On it, no other process takes a port while its service is away.
const APART: Ipv4Addr = Ipv4Addr::new(127, 7, 7, 7);

/// A listener there. Port 0 is any free port.
fn listen_apart(port: u16) -> TcpListener {
    TcpListener::bind((APART, port)).expect("a port")
}

/// An address that no process listens on.
fn nowhere() -> SocketAddr {
    listen_apart(0).local_addr().expect("an address")
}

/// A run over an outage: SIGKILL ends the service, and after [`OUTAGE`] it is back on the same port.
fn over_an_outage(flags: &str) -> Ran {
    let mut server = Millpond::start(&["--listen", &format!("{APART}:0")]);
    let address = server.echo;
    let run = Run::start(address, flags);
    eventually("traffic", || (server.scrape().get("received_bytes_total") > 0.0).then_some(()));
    server.signal(Signal::KILL);
    server.wait();
    thread::sleep(OUTAGE);
    let _back = Millpond::start(&["--listen", &address.to_string()]);
    let ran = run.wait();
    assert_eq!(ran.code, Some(1), "{}", ran.json);
    ran
}

/// A service that reads a message on each connection, and then resets it without an answer.
fn resetting() -> Peer {
    Peer::start(|mut stream, _, _| {
        let _ = stream.read_exact(&mut [0; 512]);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("it can be set");
    })
}

/// A service that reads everything and answers nothing.
fn silent() -> Peer {
    Peer::answering(|_, _, piece| piece.clear())
}

// The longest silence.

#[test]
fn the_longest_silence_goes_on_through_an_outage() {
    for flags in ["", "--rate 400", "--churn", "--churn --rate 400"] {
        let ran = over_an_outage(&format!("-c 4 --duration 2s {flags}"));
        let silence = ran.float("longest_silence_seconds");
        assert!(silence >= OUTAGE.as_secs_f64(), "{flags}: {silence} s in {}", ran.json);
        assert!(ran.number("messages") > 0, "{flags}: {}", ran.json);
        let lost = ran.number("messages_lost") + ran.number("messages_overdue");
        assert_eq!(ran.number("latency_at_least_messages"), lost, "{flags}: {}", ran.json);
        if flags.contains("--rate") {
            // A quarter of all messages or more were due in the outage.
            assert!(ms(&ran, "latency_p90_ns") >= 350, "{flags}: {}", ran.json);
            assert!(ms(&ran, "latency_p99_ns") >= 500, "{flags}: {}", ran.json);
            assert!(ms(&ran, "latency_max_ns") >= 690, "{flags}: {}", ran.json);
        }
    }
}

#[test]
fn a_service_that_is_never_reached_is_silent_for_the_whole_run() {
    let ran = load(nowhere(), "-c 3");
    assert_eq!(ran.failed_by("connect_refused"), 30);
    let (silence, elapsed) = (ran.float("longest_silence_seconds"), ran.float("elapsed_seconds"));
    // Nine pauses of 100 ms, and then all have given up.
    assert!(silence >= 0.9 && (silence / elapsed - 1.0).abs() < 0.1, "{silence} s of {elapsed} s");
    for latency in LATENCIES {
        assert_eq!(ran.json.get(latency), Some(&serde_json::Value::Null), "{latency}");
    }
    assert_eq!((ran.number("connections_attempted"), ran.number("connections_opened")), (30, 0));
    assert_eq!((ran.number("connections_asked"), ran.number("connections_given_up")), (0, 3));
}

#[test]
fn a_connection_that_is_never_answered_is_silent_for_the_whole_run() {
    for flags in ["", "--churn", "--rate 100", "--churn --rate 100"] {
        let peer = resetting();
        let ran = load(peer.address, &format!("-c 2 --duration 800ms {flags}"));
        assert_eq!((ran.code, ran.number("messages")), (Some(1), 0), "{flags}: {}", ran.json);
        let silence = ran.float("longest_silence_seconds");
        assert!(silence >= 0.75, "{flags}: {silence} s in {}", ran.json);
    }
}

/// One connection is echoed, and the other is closed each time. Each has a thread of its own.
#[test]
fn a_connection_that_gave_up_is_silent_to_the_end_of_the_run() {
    for flags in ["", "--rate 100"] {
        let peer = Peer::start(|stream, number, seen| {
            if number == 0 {
                echo(stream, seen, |_, _| {});
            }
        });
        let ran = load(peer.address, &format!("-c 2 --threads 2 --duration 2500ms {flags}"));
        assert_eq!((ran.code, ran.number("connections_given_up")), (Some(1), 1), "{flags}: {}", ran.json);
        let silence = ran.float("longest_silence_seconds");
        assert!(silence >= 2.4, "{flags}: {silence} s in {}", ran.json);
        if flags.contains("--rate") {
            let names = ["messages", "messages_lost", "messages_overdue"];
            let due: u64 = names.map(|name| ran.number(name)).iter().sum();
            assert_eq!(due, 250, "those due after it gave up count too: {}", ran.json);
        }
    }
}

#[test]
fn a_wrong_byte_does_not_end_a_silence() {
    let peer = Peer::answering(|_, _, piece| piece.iter_mut().for_each(|byte| *byte = !*byte));
    let ran = load(peer.address, "-c 1 --duration 600ms");
    assert!(ran.failed_by("mismatch") > 1, "{}", ran.json);
    assert!(ran.float("longest_silence_seconds") >= 0.5, "{}", ran.json);
}

#[test]
fn a_connection_that_waits_for_its_next_message_is_not_silent() {
    // The service closes after each answer. The next message is due half a second later.
    let peer = Peer::start(|mut stream, _, _| {
        let mut message = [0; 512];
        if stream.read_exact(&mut message).is_ok() {
            let _ = stream.write_all(&message);
        }
    });
    let ran = load(peer.address, "-c 1 --rate 2 --duration 1400ms");
    assert_eq!(ran.number("messages"), 3, "{}", ran.json);
    assert!(ran.failed_by("closed_early") >= 2, "{}", ran.json);
    let silence = ran.float("longest_silence_seconds");
    assert!((0.1..0.45).contains(&silence), "the pause before it is opened again, not {silence} s");
}

#[test]
fn a_silence_ends_when_the_service_is_back() {
    let listener = listen_apart(0);
    let address = listener.local_addr().expect("an address");
    let service = thread::spawn(move || {
        let first = listener.accept()?;
        drop((first, listener));
        thread::sleep(Duration::from_millis(300));
        let (stream, _) = listen_apart(address.port()).accept()?;
        echo(stream, &common::peers::Seen::default(), |_, _| {});
        std::io::Result::Ok(())
    });
    let ran = load(address, "-c 1 --duration 1500ms");
    // If the run gave up before, this is the connection that ends the service.
    let _ = TcpStream::connect(address);
    service.join().expect("the thread").expect("a connection");
    assert!(ran.number("messages") > 0, "{}", ran.json);
    let silence = ran.float("longest_silence_seconds");
    assert!((0.3..1.4).contains(&silence), "{silence} s in {}", ran.json);
}

// The latencies.

#[test]
fn messages_that_are_never_answered_are_in_the_percentiles() {
    let ran = load(silent().address, "-c 1 --rate 1000 --duration 500ms");
    assert_eq!((ran.code, ran.number("messages")), (Some(1), 0), "{}", ran.json);
    assert_eq!((ran.number("messages_lost"), ran.number("messages_overdue")), (1, 499), "{}", ran.json);
    assert_eq!(ran.number("latency_at_least_messages"), 500);
    assert!((240..260).contains(&ms(&ran, "latency_p50_ns")), "{}", ran.json);
    assert!((445..460).contains(&ms(&ran, "latency_p90_ns")), "{}", ran.json);
    // The first was sent, and waited for after the end of the run.
    assert!(ms(&ran, "latency_max_ns") >= 500, "{}", ran.json);
    assert!(ran.json["latency_answered_max_ns"].is_null(), "{}", ran.json);
}

/// Two thousand messages would be due before both connections give up, and only the first hundred belong to the run.
#[test]
fn with_a_count_only_its_own_messages_are_overdue() {
    let ran = load(silent().address, "-c 2 --threads 1 --rate 1000 --count 100 --timeout 50ms");
    assert_eq!((ran.failed_by("answer_timeout"), ran.number("connections_given_up")), (20, 2));
    assert_eq!((ran.number("messages_lost"), ran.number("messages_overdue")), (20, 80), "{}", ran.json);
    // All were due in the first 100 ms, and the ten tries of a connection take 900 ms or more.
    assert!(ms(&ran, "latency_p50_ns") >= 800, "{}", ran.json);
}

#[test]
fn a_service_that_stops_answering_is_in_the_percentiles_and_not_only_its_answers() {
    // The service gives fifty answers, and then none.
    let peer = Peer::answering(|_, offset, piece| {
        if offset >= 50 * 512 {
            piece.clear();
        }
    });
    let ran = load(peer.address, "-c 1 --rate 100 --duration 1s");
    assert_eq!((ran.code, ran.number("messages")), (Some(1), 50), "{}", ran.json);
    assert!(ms(&ran, "latency_p90_ns") >= 350, "{}", ran.json);
    assert!(ms(&ran, "latency_max_ns") >= 500, "{}", ran.json);
    assert!(ran.number("latency_answered_max_ns") < ran.number("latency_max_ns"), "{}", ran.json);
}

#[test]
fn in_a_closed_loop_a_starved_connection_is_in_the_latencies() {
    let peer = Peer::start(|stream, number, seen| match number {
        0 => echo(stream, seen, |_, _| {}),
        _ => echo(stream, seen, |_, piece| piece.clear()),
    });
    let ran = load(peer.address, "-c 2 --duration 500ms");
    assert_eq!(ran.failed_by("unanswered"), 1);
    assert_eq!((ran.number("messages_lost"), ran.number("latency_at_least_messages")), (1, 1));
    assert!(ms(&ran, "latency_max_ns") >= 500, "{}", ran.json);
    assert!(ran.number("latency_answered_max_ns") < ran.number("latency_max_ns"), "{}", ran.json);
}

#[test]
fn a_message_lost_in_a_reset_has_waited_to_the_end_of_the_run() {
    // The first connection is reset, and the others are echoed.
    let peer = Peer::start(|mut stream, number, seen| {
        if number > 0 {
            return echo(stream, seen, |_, _| {});
        }
        let _ = stream.read_exact(&mut [0; 512]);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("it can be set");
    });
    let ran = load(peer.address, "-c 1 --duration 600ms");
    assert_eq!((ran.failed_by("reset"), ran.number("messages_lost")), (1, 1));
    assert!(ms(&ran, "latency_max_ns") >= 590, "{}", ran.json);
    assert!(ms(&ran, "latency_p50_ns") < 300, "{}", ran.json);
}

// What was not measured.

#[test]
fn a_run_that_measured_nothing_has_no_numbers_and_is_no_success() {
    let peer = Peer::right();
    let run = Run::start(peer.address, "-c 2 --warmup 1h");
    eventually("traffic", || (peer.seen.bytes.load(Ordering::Relaxed) > 51_200).then_some(()));
    run.signal(Signal::INT);
    let ran = run.wait();
    assert_eq!((ran.code, ran.number("errors"), ran.number("messages")), (Some(1), 0, 0), "{}", ran.json);
    for name in
        LATENCIES.into_iter().chain(["messages_per_second", "bytes_per_second", "longest_silence_seconds"])
    {
        assert_eq!(ran.json.get(name), Some(&serde_json::Value::Null), "{name} in {}", ran.json);
    }
}

#[test]
fn the_table_has_no_good_number_of_a_service_that_is_not_there() {
    let output = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
        let output =
            command.args(["load", &nowhere().to_string(), "-c2"]).args(flags).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stdout).expect("text")
    };
    let table = output(&[]);
    for line in [
        "latency          none: no message was due after the warm-up\n",
        "never answered   no message went out on any connection\n",
        "given up         2 of 2 connections, after 10 failures in a row, which ended the run\n",
        "  connect_refused 20   (no process listens there)\n",
    ] {
        assert!(table.contains(line), "no {line:?} in {table}");
    }
    let table = output(&["--rate=100"]);
    for words in
        ["messages without an answer count as waiting to the end of the run\n", "p99.99", "overdue  "]
    {
        assert!(table.contains(words), "no {words:?} in {table}");
    }
}

#[test]
fn silent_connections_that_were_closed_are_not_open_at_the_end() {
    let (close, open) = (10, 40);
    let peer = Peer::start(move |stream, number, seen| {
        if number >= close {
            echo(stream, seen, |_, _| {});
        }
    });
    let ran = load(peer.address, "-c 2 --idle 50 --duration 300ms");
    assert_eq!((ran.failed_by("idle_closed"), ran.number("connections_idle_kept")), (close, open));
    let all = load(Peer::right().address, "-c 2 --idle 50 --count 10");
    assert_eq!((all.code, all.number("connections_idle_kept")), (Some(0), 50), "{}", all.json);
}
