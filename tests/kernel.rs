//! Work that the kernel does for the server: it probes silent clients, and keeps a listen queue.

mod common;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{Millpond, eventually, ping};
use millpond::Server;
use socket2::{SockFilter, SockRef};

/// `USER_HZ`: the units of `/proc/net/tcp` a second, on every Linux that Rust supports.
const USER_HZ: u64 = 100;

/// Makes a client vanish: a socket filter drops every packet that comes for it. So its kernel acknowledges nothing,
/// answers no probe, and sends no reset.
fn vanish(client: &TcpStream) {
    /// `BPF_RET | BPF_K`: return a constant, the number of bytes to keep.
    const RETURN: u16 = 0x06;
    SockRef::from(client).attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)]).expect("a socket option");
}

/// Starts a server as a service manager does: on two listeners with these backlogs, which are passed on to it.
fn activated(backlog: i32, variables: &[(&str, &str)]) -> Millpond {
    let listener = || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        rustix::net::listen(&listener, backlog).expect("it listens already");
        listener
    };
    let server = Millpond::activated(listener(), listener(), variables);
    eventually("it serves", || server.log().contains("serving").then_some(()));
    server
}

/// The listen backlog in force, as the server says.
fn backlog(server: &Millpond) -> u64 {
    let status: serde_json::Value = serde_json::from_str(&server.get("/status.json").body).expect("JSON");
    status["limits"]["backlog"].as_u64().expect("a number")
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
    let adopting = activated(128, &[("MILLPOND_IDLE_TIMEOUT", "0"), ("MILLPOND_KEEPALIVE", "1s")]);
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
    assert_eq!(trusting.scrape().connections("idle"), 2.0, "without probes the server does not notice");
    silent.iter_mut().for_each(|client| ping(client, b"still here"));
}

/// It had taken all output, and only the end of the stream never reaches it.
#[test]
fn an_idle_client_that_has_vanished_does_not_hold_up_a_drain() {
    let mut server = Millpond::start(&[]);
    let mut client = server.connect();
    ping(&mut client, b"hello");
    eventually("it is idle", || (server.scrape().connections("idle") == 1.0).then_some(()));
    vanish(&client);
    let start = Instant::now();
    assert_eq!(server.drain(), Some(0), "{}", server.log());
    assert!(start.elapsed() < Duration::from_secs(20), "until the deadline: {:?}", start.elapsed());
    assert!(server.log().contains("1 closed idle, 0 failed, 0 cut"), "{}", server.log());
}

#[test]
fn the_keepalive_timer_runs_on_every_connection_unless_set_otherwise() {
    let (own, adopted) = (Millpond::start(&[]), activated(128, &[]));
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

#[test]
fn a_backlog_that_the_kernel_cuts_is_warned_of() {
    let limit = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("Linux");
    let limit: u64 = limit.trim().parse().expect("a number");
    // The largest backlog that the flag allows, and one that the kernel keeps on any machine.
    for asked in [65_535, 5] {
        let server = Millpond::start(&["--backlog", &asked.to_string()]);
        let kept = asked.min(limit);
        eventually("it serves", || server.log().contains(&format!("backlog={kept} ")).then_some(()));
        assert_eq!(backlog(&server), kept);
        let log = server.log();
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        if kept < asked {
            let remedy = format!("sysctl -w net.core.somaxconn={asked}");
            let said = warnings.len() == 1 && warnings[0].contains(&format!("--backlog {asked}: "));
            assert!(said && warnings[0].contains(&remedy), "{log}");
        } else {
            assert!(warnings.is_empty(), "{log}");
        }
    }
}

#[test]
fn the_backlog_of_a_listener_that_was_passed_on_is_only_shown() {
    let server = activated(7, &[("MILLPOND_BACKLOG", "100")]);
    assert_eq!(backlog(&server), 7);
    assert!(server.log().contains("backlog=7 ") && !server.log().contains("somaxconn"), "{}", server.log());
}

#[test]
fn a_library_server_tells_the_backlog_in_force() {
    let any_port = ([127, 0, 0, 1], 0).into();
    let server =
        Server::builder("echo").workers(1).max_connections(1).backlog(3).bind(any_port).expect("a port");
    assert_eq!(server.backlog(), Some(3));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    rustix::net::listen(&listener, 4).expect("it listens already");
    let builder = Server::builder("echo").workers(1).max_connections(1).backlog(3);
    assert_eq!(builder.adopt(listener).expect("it listens").backlog(), Some(4));
}
