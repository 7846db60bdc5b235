//! `millpond load` reports a correct service as correct, and sees each fault of another. Outages are in `outages.rs`.

mod common;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::peers::{Peer, Run, echo, load};
use common::{Millpond, eventually};
use rustix::process::Signal;
use socket2::{Domain, SockRef, Socket, Type};

// A service that is correct.

#[test]
fn a_correct_service_is_reported_as_correct_and_the_numbers_add_up() {
    let peer = Peer::right();
    let ran = load(peer.address, "-c 8 --count 5000");
    assert_eq!(ran.code, Some(0), "{}", ran.json);
    assert_eq!((ran.number("messages"), ran.number("bytes")), (5000, 5000 * 512));
    assert_eq!(peer.seen.bytes.load(Ordering::Relaxed), 5000 * 512);
    assert_eq!((ran.number("connections_opened"), ran.number("connections_asked")), (8, 8));
    for zero in ["errors", "messages_lost", "messages_overdue", "connections_never_answered"] {
        assert_eq!(ran.number(zero), 0, "{zero}");
    }
    assert!(ran.mismatches().is_empty());
    let elapsed = ran.float("elapsed_seconds");
    for (total, rate) in [("messages", "messages_per_second"), ("bytes", "bytes_per_second")] {
        assert!((ran.float(total) / elapsed / ran.float(rate) - 1.0).abs() < 1e-6, "{}", ran.json);
    }
    let names = ["p50", "p90", "p99", "p99_9", "p99_99", "max"];
    let latencies = names.map(|name| ran.number(&format!("latency_{name}_ns")));
    assert!(latencies[0] > 0 && latencies.is_sorted(), "{latencies:?}");
    // No connection can be silent for longer than the run.
    assert!(ran.float("longest_silence_seconds") <= elapsed, "{}", ran.json);
}

#[test]
fn every_connection_is_read_to_its_end_and_none_is_reset() {
    let peer = Peer::right();
    assert_eq!(load(peer.address, "-c 8 --duration 200ms").code, Some(0));
    eventually("ends", || (peer.seen.ended.load(Ordering::Relaxed) == 8).then_some(()));
}

#[test]
fn the_count_is_exact_for_any_number_of_connections_and_threads() {
    for flags in ["-c 7 --threads 3 --count 1001", "-c 50 --count 3", "-c 5 --pipeline 7 --count 1001"] {
        let peer = Peer::right();
        let ran = load(peer.address, &format!("{flags} --size 100"));
        let count = ran.number("count");
        assert_eq!((ran.code, ran.number("messages")), (Some(0), count), "{flags}: {}", ran.json);
        assert_eq!(peer.seen.bytes.load(Ordering::Relaxed), 100 * count);
    }
}

#[test]
fn sizes_are_drawn_from_their_range_and_by_the_seed() {
    let bytes_of = |seed: u32| {
        let peer = Peer::right();
        let ran = load(peer.address, &format!("-c 1 --size 64..4KiB --count 500 --seed {seed}"));
        assert_eq!((ran.code, ran.number("messages")), (Some(0), 500));
        let bytes = ran.number("bytes");
        assert_eq!(peer.seen.bytes.load(Ordering::Relaxed), bytes);
        bytes
    };
    let bytes = bytes_of(1);
    assert!((500 * 1500..500 * 2660).contains(&bytes), "{bytes} in 500 messages");
    assert_eq!(bytes_of(1), bytes, "the same seed, the same sizes");
    assert_ne!(bytes_of(2), bytes);
}

#[test]
fn large_messages_go_out_and_come_back_at_the_same_time() {
    // The echo takes nothing more while it cannot send. A client that reads only after it has sent everything would
    // wait for ever.
    let peer = Peer::right();
    let ran = load(peer.address, "-c 2 --size 16MiB --count 4");
    assert_eq!((ran.code, ran.number("bytes")), (Some(0), 4 << 24), "{}", ran.json);
}

#[test]
fn the_pipeline_is_as_long_as_its_flag_says() {
    // The service answers four messages at a time. With three on their way it would wait for ever.
    let gather = || {
        let held = Mutex::new(Vec::new());
        Peer::answering(move |_, _, piece| {
            let mut held = held.lock().expect("held");
            held.append(piece);
            let whole = held.len() / 400 * 400;
            piece.extend(held.drain(..whole));
        })
    };
    let ran = load(gather().address, "-c 1 --size 100 --pipeline 4 --count 400");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 400), "{}", ran.json);
    let ran = load(gather().address, "-c 1 --size 100 --pipeline 3 --count 400 --timeout 100ms");
    assert_eq!((ran.code, ran.number("messages")), (Some(1), 0), "{}", ran.json);
}

#[test]
fn churn_opens_a_connection_for_every_message_from_several_addresses() {
    let peer = Peer::right();
    let ran = load(peer.address, "-c 4 --churn --count 300");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 300), "{}", ran.json);
    assert_eq!((ran.number("connections_opened"), ran.number("connections_asked")), (300, 300));
    assert_eq!(peer.seen.connections.load(Ordering::Relaxed), 300);
    eventually("ends", || (peer.seen.ended.load(Ordering::Relaxed) == 300).then_some(()));
    let addresses: HashSet<_> =
        peer.seen.addresses.lock().expect("addresses").iter().map(SocketAddr::ip).collect();
    assert!(addresses.len() > 200, "{} source addresses", addresses.len());
}

#[test]
fn the_warm_up_is_sent_and_not_counted() {
    let peer = Peer::right();
    let ran = load(peer.address, "-c 2 --warmup 200ms --count 100");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 100), "{}", ran.json);
    assert!(peer.seen.bytes.load(Ordering::Relaxed) > 100 * 512);
}

// Wrong bytes.

/// The service flips a bit of one byte in a million, and remembers where.
#[test]
fn a_byte_flipped_in_a_million_is_seen_where_it_was_flipped() {
    type Flips = Arc<Mutex<HashSet<(u64, u8, u8)>>>;
    let (flips, random) = (Flips::default(), Mutex::new(fastrand::Rng::with_seed(5)));
    let noted = Arc::clone(&flips);
    let peer = Peer::answering(move |_, offset, piece| {
        let mut random = random.lock().expect("random");
        for (place, byte) in piece.iter_mut().enumerate() {
            if random.u32(..1_000_000) == 0 {
                let right = *byte;
                *byte ^= 1 << random.u8(..8);
                noted.lock().expect("flips").insert((offset + place as u64, right, *byte));
            }
        }
    });
    let ran = load(peer.address, "-c 4 --size 1KiB --count 8000");
    let found = ran.failed_by("mismatch");
    let flips = flips.lock().expect("flips");
    assert_eq!(found, flips.len() as u64, "one mismatch for each flip: {}", ran.json);
    assert!((3..10).contains(&found), "{found} of eight million");
    for mismatch in ran.mismatches() {
        let first = |name: &str| {
            let hex = mismatch[name].as_str().expect("hexadecimal");
            u8::from_str_radix(&hex[..2], 16).expect("hexadecimal")
        };
        let offset = mismatch["offset_bytes"].as_u64().expect("an offset");
        let flip = (offset, first("expected_hex"), first("got_hex"));
        assert!(flips.contains(&flip), "{flip:?} is none of {flips:?}");
        assert!(
            (1..=ran.number("connections_opened")).contains(&mismatch["connection"].as_u64().expect("one"))
        );
    }
    assert_eq!(ran.number("messages") + ran.number("messages_lost"), 8000);
}

/// The only mismatch of a run. The peer spoils the piece that holds byte 1000 of its first connection.
fn mismatch(spoil: impl Fn(usize, &mut Vec<u8>) + Send + Sync + 'static) -> serde_json::Value {
    let peer = Peer::answering(move |number, offset, piece| {
        let end = offset + piece.len() as u64;
        if number == 0 && (offset..end).contains(&1000) {
            let place = usize::try_from(1000 - offset).expect("within the piece");
            spoil(place, piece);
        }
    });
    // With some other seeds, the first wrong byte happens to have the right value.
    let ran = load(peer.address, "-c 1 --size 2000 --count 3 --seed 1");
    assert_eq!(ran.failed_by("mismatch"), 1);
    assert_eq!((ran.number("messages"), ran.number("messages_lost")), (2, 1));
    let mismatch = ran.mismatches()[0].clone();
    assert_eq!(mismatch["connection"], 1);
    mismatch
}

#[test]
fn lost_bytes_are_seen() {
    let mismatch = mismatch(|place, piece| drop(piece.drain(place..place + 7)));
    assert_eq!(
        (&mismatch["offset_bytes"], &mismatch["origin"]),
        (&1000.into(), &"7 bytes are missing".into())
    );
}

#[test]
fn repeated_bytes_are_seen() {
    let mismatch = mismatch(|place, piece| {
        let again = piece[place - 100..place].to_vec();
        piece.splice(place..place, again);
    });
    let origin = "the bytes from offset 900 again";
    assert_eq!((&mismatch["offset_bytes"], &mismatch["origin"]), (&1000.into(), &origin.into()));
}

#[test]
fn reordered_bytes_are_seen() {
    let mismatch = mismatch(|place, piece| piece[place..place + 200].rotate_left(100));
    let origin = "100 bytes are missing";
    assert_eq!((&mismatch["offset_bytes"], &mismatch["origin"]), (&1000.into(), &origin.into()));
}

#[test]
fn bytes_after_the_last_answer_are_seen() {
    // The service holds them back until the client has ended its side.
    let last = Mutex::new(Vec::new());
    let peer = Peer::answering(move |_, _, piece| {
        if piece.is_empty() {
            piece.append(&mut last.lock().expect("the last"));
        } else {
            *last.lock().expect("the last") = piece[piece.len() - 20..].to_vec();
        }
    });
    for flags in ["-c 1 --count 5", "-c 1 --count 1 --churn"] {
        let ran = load(peer.address, flags);
        assert_eq!(ran.failed_by("mismatch"), 1, "{flags}");
        let mismatch = &ran.mismatches()[0];
        assert_eq!(mismatch["offset_bytes"], ran.number("bytes"), "{mismatch}");
        assert_eq!((&mismatch["expected_hex"], ran.number("messages_lost")), (&"".into(), 0));
    }
}

#[test]
fn another_connections_bytes_are_seen() {
    // The service sends each of two connections the other's answers.
    let streams: Mutex<Vec<TcpStream>> = Mutex::default();
    let peer = Peer::start(move |stream, _, _| {
        let mut pair = {
            let mut streams = streams.lock().expect("streams");
            streams.push(stream);
            if streams.len() < 2 {
                return;
            }
            std::mem::take(&mut *streams)
        };
        let mut messages = [[0; 512]; 2];
        for (stream, message) in pair.iter_mut().zip(&mut messages) {
            stream.read_exact(message).expect("a message");
        }
        for (stream, message) in pair.iter_mut().zip(messages.iter().rev()) {
            stream.write_all(message).expect("the client reads");
        }
    });
    let ran = load(peer.address, "-c 2 --count 2 --seed 1");
    assert_eq!(ran.failed_by("mismatch"), 2);
    let mut origins: Vec<_> =
        ran.mismatches().iter().map(|mismatch| mismatch["origin"].to_string()).collect();
    origins.sort();
    let of = |connection: u32| format!("\"the bytes of connection {connection} from its offset 0\"");
    assert_eq!(origins, [of(1), of(2)]);
}

#[test]
fn mismatches_beyond_those_shown_are_counted() {
    let peer = Peer::answering(|_, _, piece| piece.iter_mut().for_each(|byte| *byte = !*byte));
    let ran = load(peer.address, "-c 5 --duration 10s");
    // Each of the five connections gives up after ten failures.
    assert_eq!(ran.failed_by("mismatch"), 50);
    assert_eq!(ran.mismatches().len(), 10);
}

// Connections that fail.

#[test]
fn a_connection_closed_early_is_counted_and_opened_anew() {
    let peer = Peer::start(|mut stream, _, _| {
        let mut message = [0; 512];
        for _ in 0..5 {
            stream.read_exact(&mut message).expect("a message");
            stream.write_all(&message).expect("the client reads");
        }
        let _ = stream.read_exact(&mut message);
    });
    let ran = load(peer.address, "-c 1 --count 20");
    // Three times five answers and a lost message, and then two answers.
    assert_eq!(ran.failed_by("closed_early"), 3);
    assert_eq!((ran.number("messages"), ran.number("messages_lost")), (17, 3));
    assert_eq!((ran.number("connections_opened"), ran.number("connections_never_answered")), (4, 0));
}

#[test]
fn a_reset_and_a_close_are_counted_apart() {
    let peer = Peer::start(|mut stream, _, _| {
        let _ = stream.read_exact(&mut [0; 512]);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("it can be set");
    });
    let ran = load(peer.address, "-c 1 --count 2");
    assert_eq!(ran.failed_by("reset"), 2);
    assert_eq!(ran.number("connections_never_answered"), 2);
}

#[test]
fn a_connection_that_is_never_made_times_out() {
    // No process accepts, and the listen queue is full, so the kernel drops further connects.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    socket.listen(0).expect("it listens");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("an address");
    let _first = TcpStream::connect(address).expect("room for one");
    let ran = load(address, "-c 3 --timeout 100ms --duration 300ms");
    assert!(ran.failures("connect_timeout") >= 3, "{}", ran.json);
    assert_eq!((ran.code, ran.number("messages"), ran.number("connections_asked")), (Some(1), 0, 0));
}

#[test]
fn an_answer_that_never_comes_times_out_or_is_missing_at_the_end() {
    let silent = || {
        Peer::start(|mut stream, _, _| {
            let mut bytes = [0; 4096];
            while stream.read(&mut bytes).is_ok_and(|received| received > 0) {}
        })
    };
    let ran = load(silent().address, "-c 3 --count 3 --timeout 200ms");
    assert_eq!(ran.failed_by("answer_timeout"), 3);
    assert_eq!((ran.number("messages_lost"), ran.number("connections_never_answered")), (3, 3));

    let ran = load(silent().address, "-c 3 --duration 200ms");
    assert_eq!(ran.failed_by("unanswered"), 3);
    assert_eq!((ran.number("messages_lost"), ran.number("connections_never_answered")), (3, 3));
    let silence = ran.float("longest_silence_seconds");
    assert!(silence >= 0.2, "{silence}");
}

// Connections that wait.

#[test]
fn the_starved_connections_of_a_thread_pool_are_counted() {
    // Each of four threads serves a connection to its end, as many echo servers do.
    let (give, take) = mpsc::channel::<TcpStream>();
    let (give, take) = (Mutex::new(give), Arc::new(Mutex::new(take)));
    for _ in 0..4 {
        let take = Arc::clone(&take);
        thread::spawn(move || {
            let next = || take.lock().expect("the queue").recv();
            while let Ok(stream) = next() {
                echo(stream, &common::peers::Seen::default(), |_, _| {});
            }
        });
    }
    let peer =
        Peer::start(move |stream, _, _| give.lock().expect("the queue").send(stream).expect("threads"));
    let ran = load(peer.address, "-c 8 --duration 500ms");
    assert_eq!(ran.failed_by("unanswered"), 4);
    assert_eq!((ran.number("connections_asked"), ran.number("connections_never_answered")), (8, 4));
    assert_eq!(ran.number("messages_lost"), 4);
    let silence = ran.float("longest_silence_seconds");
    assert!(silence >= 0.5, "silent for the whole run, not {silence} s");

    // Four workers of millpond serve all eight.
    let server = Millpond::start(&["--workers", "4"]);
    let ran = load(server.echo, "-c 8 --duration 500ms");
    assert_eq!((ran.code, ran.number("connections_never_answered")), (Some(0), 0), "{}", ran.json);
    assert_eq!(ran.number("connections_asked"), 8);
}

/// Starts a service that stalls once, for half a second, after its hundredth message.
fn stalling() -> Peer {
    let stalled = AtomicBool::new(false);
    Peer::answering(move |_, offset, _| {
        if offset >= 51_200 && !stalled.swap(true, Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(500));
        }
    })
}

#[test]
fn with_a_rate_a_stall_counts_for_all_messages_that_were_due_in_it() {
    let peer = stalling();
    let ran = load(peer.address, "-c 1 --rate 1000 --count 1500");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 1500), "{}", ran.json);
    // 500 of 1500 messages were due in the stall, so a tenth of all waited for 350 ms or more.
    let ms = |name: &str| ran.number(name) / 1_000_000;
    assert!(ms("latency_p90_ns") >= 300, "{}", ran.json);
    assert!(ms("latency_p99_ns") >= 450, "{}", ran.json);
    assert!(ms("latency_max_ns") >= 490, "{}", ran.json);
    assert!(ran.float("elapsed_seconds") >= 1.499, "{}", ran.json);
}

#[test]
fn without_a_rate_a_stall_is_a_single_slow_message() {
    let peer = stalling();
    let ran = load(peer.address, "-c 1 --count 1500");
    let ms = |name: &str| ran.number(name) / 1_000_000;
    assert!(ms("latency_p99_ns") < 300 && ms("latency_max_ns") >= 490, "{}", ran.json);
    assert!(ran.float("longest_silence_seconds") >= 0.49, "{}", ran.json);
}

#[test]
fn messages_that_were_due_and_never_sent_are_counted_and_no_success() {
    // An answer takes ten milliseconds, and a message is due every millisecond.
    let peer = Peer::answering(|_, _, _| thread::sleep(Duration::from_millis(10)));
    let ran = load(peer.address, "-c 1 --rate 1000 --duration 500ms");
    assert_eq!((ran.code, ran.number("errors")), (Some(1), 0), "{}", ran.json);
    assert_eq!(ran.number("messages") + ran.number("messages_overdue"), 500, "{}", ran.json);
    assert!(ran.number("messages_overdue") > 400, "{}", ran.json);
    assert_eq!(ran.number("latency_at_least_messages"), ran.number("messages_overdue"), "{}", ran.json);
}

#[test]
fn a_rate_can_open_a_connection_for_every_message() {
    let peer = Peer::right();
    let ran = load(peer.address, "-c 10 --churn --rate 500 --count 200");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 200), "{}", ran.json);
    assert!(ran.float("elapsed_seconds") >= 0.398, "{}", ran.json);
    assert_eq!(peer.seen.connections.load(Ordering::Relaxed), 200);
}

#[test]
fn idle_connections_stay_open_and_silent() {
    let peer = Peer::right();
    let ran = load(peer.address, "-c 2 --idle 100 --count 200");
    assert_eq!((ran.code, ran.number("messages")), (Some(0), 200), "{}", ran.json);
    assert_eq!((ran.number("connections_opened"), ran.number("connections_asked")), (102, 2));
    eventually("ends", || (peer.seen.ended.load(Ordering::Relaxed) == 102).then_some(()));
    assert_eq!(peer.seen.connections.load(Ordering::Relaxed), 102);
    assert_eq!(peer.seen.bytes.load(Ordering::Relaxed), 200 * 512);
}

#[test]
fn an_idle_connection_that_is_closed_or_gets_a_byte_is_counted() {
    // The peer closes ten at once, writes to the next ten, and echoes the rest.
    let peer = Peer::start(|mut stream, number, seen| match number {
        0..10 => {}
        10..20 => {
            let _ = stream.write_all(b"hello");
            let _ = stream.read(&mut [0]);
        }
        _ => echo(stream, seen, |_, _| {}),
    });
    let ran = load(peer.address, "-c 2 --idle 50 --duration 300ms");
    assert_eq!((ran.code, ran.number("errors")), (Some(1), 20), "{}", ran.json);
    assert_eq!((ran.failures("idle_closed"), ran.failures("mismatch")), (10, 10));
    assert_eq!(ran.number("connections_idle_kept"), 30);
    assert_eq!(ran.mismatches()[0]["got_hex"], "68656c6c6f");
}

// The program.

#[test]
fn a_signal_ends_it_early_with_its_report() {
    for signal in [Signal::INT, Signal::TERM] {
        let peer = Peer::right();
        let run = Run::start(peer.address, "-c 3 --duration 1h");
        eventually("traffic", || (peer.seen.bytes.load(Ordering::Relaxed) > 51_200).then_some(()));
        run.signal(signal);
        let ran = run.wait();
        assert_eq!((ran.code, &ran.json["ended_by_signal"]), (Some(0), &true.into()), "{}", ran.json);
        assert!(ran.number("messages") >= 100, "{}", ran.json);
    }
}

#[test]
fn two_signals_at_once_end_it_early_with_its_report() {
    for (first, second) in [(Signal::INT, Signal::TERM), (Signal::TERM, Signal::HUP)] {
        let peer = Peer::right();
        let run = Run::start(peer.address, "-c 3 --duration 1h");
        eventually("traffic", || (peer.seen.bytes.load(Ordering::Relaxed) > 51_200).then_some(()));
        run.signal(first);
        run.signal(second);
        let ran = run.wait();
        assert_eq!((ran.code, &ran.json["ended_by_signal"]), (Some(0), &true.into()), "{}", ran.json);
    }
}

#[test]
fn a_signal_a_second_after_the_first_ends_it_at_once() {
    let released = Arc::new((Mutex::new(false), Condvar::new()));
    let held = Arc::clone(&released);
    let peer = Peer::start(move |stream, _, _| {
        // The service reads nothing, and keeps the connection open until the test is over.
        let over = held.1.wait_while(held.0.lock().expect("a lock"), |over| !*over);
        drop((over, stream));
    });
    let mut run = Run::start(peer.address, "-c 3 --duration 1h --timeout 1h");
    eventually("clients", || (peer.seen.connections.load(Ordering::Relaxed) == 3).then_some(()));
    // Without another signal, the run ends two seconds after the first: it waits a second for the last answers, and a
    // second for the ends of the connections.
    let start = Instant::now();
    eventually("it ends", || {
        if run.has_exited() {
            return Some(());
        }
        run.signal(Signal::INT);
        None
    });
    assert!(start.elapsed() >= Duration::from_secs(1), "ended by signals of one stop: {:?}", start.elapsed());
    let ran = run.wait();
    assert_eq!((ran.code, ran.json), (Some(130), serde_json::Value::Null), "without a report");
    *released.0.lock().expect("a lock") = true;
    released.1.notify_all();
}

fn program(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_millpond")).args(args).output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_table_is_for_a_person() {
    let peer = Peer::right();
    let (code, stdout, stderr) = program(&["load", &peer.address.to_string(), "-c2", "--count=1234"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.starts_with(&format!("{}: 2 connections, 512 B, ", peer.address)), "{stdout}");
    for line in ["messages         1,234   ", "bytes each way   631,808   ", "errors           0\n"] {
        assert!(stdout.contains(line), "no {line:?} in {stdout}");
    }
    for words in ["p99.99", "longest silence", "never answered   0 of 2 connections"] {
        assert!(stdout.contains(words), "no {words:?} in {stdout}");
    }

    let wrong = Peer::answering(|_, _, piece| piece.iter_mut().for_each(|byte| *byte = 0));
    let (code, stdout, _) = program(&["load", &wrong.address.to_string(), "-c1", "--count=20", "--seed=1"]);
    assert_eq!(code, Some(1));
    assert!(stdout.contains("  mismatch       10\n"), "{stdout}");
    assert!(
        stdout.contains("connection 1, offset 0: expected ") && stdout.contains(", got 00 00"),
        "{stdout}"
    );
}

#[test]
fn an_error_in_a_flag_prints_one_line_with_the_remedy() {
    for (args, parts) in [
        (&["load"] as &[&str], ["ADDR", "millpond load --help"]),
        (&["load", "localhost:7"], ["ADDR", "127.0.0.1:15000"]),
        (&["load", "127.0.0.1:7", "-c", "0"], ["--connections", "from 1 to 1000000"]),
        (&["load", "127.0.0.1:7", "--size", "32MiB"], ["--size", "16MiB"]),
        (&["load", "127.0.0.1:7", "--size", "9..3"], ["--size", "64..4KiB"]),
        (&["load", "127.0.0.1:7", "--rate", "0.5"], ["--rate", "whole number"]),
        (&["load", "127.0.0.1:7", "--durations", "5s"], ["--durations", "'--duration'"]),
        (&["load", "127.0.0.1:7", "--duration", "5"], ["--duration", "30s"]),
        (&["load", "127.0.0.1:7", "--duration", "5s", "--count", "1"], ["--duration", "--count"]),
        (&["load", "127.0.0.1:7", "--churn", "--pipeline", "2"], ["--churn", "--pipeline"]),
    ] {
        let (code, stdout, stderr) = program(args);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1), "{args:?}: {stderr}");
        assert!(stderr.starts_with("millpond: "), "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "no {part:?} in {stderr}");
        }
    }
}

#[test]
fn more_connections_than_descriptors_are_refused_before_the_run() {
    let script = "ulimit -n 200; exec \"$0\" load 127.0.0.1:7 -c 100 --idle 37";
    let mut command = Command::new("sh");
    let output = command.args(["-c", script, env!("CARGO_BIN_EXE_millpond")]).output().expect("a shell");
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    for part in ["--connections", "--idle", "137", "136", "ulimit -n"] {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
}

#[test]
fn help_names_both_commands_and_every_flag() {
    let (code, general, _) = program(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(general.contains("millpond [serve] [FLAGS]") && general.contains("millpond load ADDR [FLAGS]"));
    for args in [["load", "--help"], ["load", "-h"]] {
        let (code, stdout, stderr) = program(&args);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        for flag in
            "connections size pipeline rate churn idle duration count warmup timeout threads seed json"
                .split(' ')
        {
            assert!(stdout.contains(&format!("--{flag}")), "no --{flag} in {stdout}");
        }
    }
}
