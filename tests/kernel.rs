//! What the server has the kernel do for it: probe silent clients, and keep a listen queue.

mod common;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{Millpond, eventually, ping};
use socket2::{SockFilter, SockRef};

/// `USER_HZ`: the units of `/proc/net/tcp` a second, on every Linux that Rust supports.
const USER_HZ: u64 = 100;

/// Makes a client vanish: a socket filter drops every packet that comes for it. So its kernel acknowledges nothing, answers no
/// probe, and sends no reset.
fn vanish(client: &TcpStream) {
    /// `BPF_RET | BPF_K`: return a constant, the number of bytes to keep.
    const RETURN: u16 = 0x06;
    SockRef::from(client).attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)]).expect("a socket option");
}

/// A server on listeners that the test holds too, as a service manager does.
fn activated(variables: &[(&str, &str)]) -> Millpond {
    let listener = || TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = Millpond::activated(listener(), listener(), variables);
    eventually("it serves", || server.log().contains("serving").then_some(()));
    server
}

/// How long until the kernel probes the server's connection with this client; `None` while no keepalive timer runs.
fn until_probed(server: SocketAddr, client: &TcpStream) -> Option<Duration> {
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("this process");
    let ends =
        [server.port(), client.local_addr().expect("an address").port()].map(|port| format!("{port:04X}"));
    // "0: 0100007F:3A98 0100007F:C350 01 00000000:00000000 02:000000C8 ...": 02 is the keepalive timer.
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|row| {
        let port = |field: &str| field.rsplit(':').next().expect("a port").to_owned();
        row.len() > 5 && ends == [port(row[1]), port(row[2])]
    })?;
    let left = row[5].strip_prefix("02:")?;
    Some(Duration::from_millis(u64::from_str_radix(left, 16).expect("a number") * 1000 / USER_HZ))
}

#[test]
fn a_vanished_client_is_closed_and_counted_unless_keepalive_is_off() {
    let probing = Millpond::start(&["--idle-timeout", "0", "--keepalive", "1s"]);
    let adopting = activated(&[("MILLPOND_IDLE_TIMEOUT", "0"), ("MILLPOND_KEEPALIVE", "1s")]);
    let trusting = Millpond::start(&["--idle-timeout", "0", "--keepalive", "0"]);
    let servers = [&probing, &adopting, &trusting];
    let mut silent = servers.map(Millpond::connect);
    let mut vanished = servers.map(Millpond::connect);
    silent.iter_mut().chain(&mut vanished).for_each(|client| ping(client, b"hello"));
    let start = Instant::now();
    vanished.iter().for_each(vanish);
    for server in [&probing, &adopting] {
        eventually("the vanished client is closed", || {
            (server.scrape().closed("error") == 1.0).then_some(())
        });
    }
    // One second of silence, and five probes a second apart.
    assert!(start.elapsed() > Duration::from_secs(5), "closed after {:?}", start.elapsed());
    assert_eq!(trusting.scrape().closed("error"), 0.0);
    assert_eq!(trusting.scrape().connections("idle"), 2.0, "it does not know");
    silent.iter_mut().for_each(|client| ping(client, b"still here"));
}

#[test]
fn the_keepalive_timer_runs_on_every_connection_unless_set_otherwise() {
    let (own, adopted) = (Millpond::start(&[]), activated(&[]));
    for server in [&own, &adopted] {
        let mut client = server.connect();
        ping(&mut client, b"hello");
        let left = eventually("the timer runs", || until_probed(server.echo, &client));
        assert!((Duration::from_secs(60)..=Duration::from_secs(120)).contains(&left), "{left:?}");
    }
    let without = Millpond::start(&["--keepalive", "0"]);
    let mut client = without.connect();
    ping(&mut client, b"hello");
    assert_eq!(until_probed(without.echo, &client), None);
}

/// The kernel does not probe while it has output to send.
#[test]
fn a_client_that_vanishes_with_output_waiting_is_closed_by_the_write_timeout() {
    let server = Millpond::start(&["--idle-timeout", "0", "--keepalive", "1s", "--write-timeout", "1s"]);
    let mut client = server.connect();
    client.set_nonblocking(true).expect("a socket option");
    let piece = [7; 64 * 1024];
    eventually("the server has output that the kernel does not take", || {
        while client.write(&piece).is_ok() {}
        let scrape = server.scrape();
        let waits = scrape.get("received_bytes_total") > scrape.get("sent_bytes_total");
        (waits && scrape.connections("idle") == 1.0).then_some(())
    });
    vanish(&client);
    eventually("closed", || (server.scrape().closed("write_timeout") == 1.0).then_some(()));
}
