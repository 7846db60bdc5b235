//! The server under a service manager, which keeps the listeners and receives the server's state.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Millpond, PATIENCE, connect, eventually, http, ping};
use millpond::{Echo, Exposition, Server, ServerError};
use rustix::process::Signal;

const ANY_PORT: &str = "127.0.0.1:0";

fn listener() -> TcpListener {
    TcpListener::bind(ANY_PORT).expect("a port")
}

fn copy(listener: &TcpListener) -> TcpListener {
    listener.try_clone().expect("a copy")
}

/// The listeners of a service manager, which keeps them open from one server to the next.
struct Sockets {
    echo: TcpListener,
    metrics: TcpListener,
}

impl Sockets {
    fn new() -> Self {
        Sockets { echo: listener(), metrics: listener() }
    }

    fn activate(&self, variables: &[(&str, &str)]) -> Millpond {
        let server = Millpond::activated(copy(&self.echo), copy(&self.metrics), variables);
        eventually("it serves", || server.log().contains("serving").then_some(()));
        server
    }
}

#[test]
fn clients_that_come_during_a_restart_are_served_by_the_next_server() {
    let sockets = Sockets::new();
    let mut first = sockets.activate(&[("MILLPOND_WORK", "2s")]);
    assert!(first.log().contains("not on the address of --listen"), "{}", first.log());
    let mut served = first.connect();
    served.write_all(b"hello").expect("it is sent");
    eventually("a worker has it", || (first.scrape().pool("workers_busy") == 1.0).then_some(()));
    first.signal(Signal::TERM);
    // Until the first server stops accepting, new connections are still its own.
    eventually("draining", || (first.scrape().get("phase{phase=\"draining\"}") == 1.0).then_some(()));
    let early: Vec<TcpStream> = (0..40).map(|_| first.connect()).collect();
    let mut answer = [0; 5];
    served.read_exact(&mut answer).expect("the answer");
    assert_eq!((&answer, first.wait().code()), (b"hello", Some(0)));

    let waiting: Vec<TcpStream> = (0..40).map(|_| first.connect()).collect();
    let mut second = sockets.activate(&[]);
    for mut client in waiting {
        ping(&mut client, b"waited");
    }
    // Each client that connected while the first server drained was served there to its end, or the second serves it.
    let mut ended = 0;
    for mut client in early {
        match client.write_all(b"x").and_then(|()| client.read_exact(&mut [0])) {
            Ok(()) => {}
            Err(error) => {
                assert!(
                    matches!(
                        error.kind(),
                        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
                    ),
                    "{error}"
                );
                ended += 1;
            }
        }
    }
    assert_eq!(second.scrape().get("connections_accepted_total"), f64::from(80 - ended));
    assert_eq!(http(second.metrics, "GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n").code, 200);
    assert_eq!(second.drain(), Some(0));
}

#[test]
fn a_drain_leaves_a_shared_listener_as_it_was() {
    let held = listener();
    let address = held.local_addr().expect("an address");
    for round in 0..3 {
        let server =
            Server::builder("shared").service(Echo).workers(1).adopt(copy(&held)).expect("it listens");
        assert_eq!(server.local_addr(), address);
        let running = server.start().expect("threads");
        ping(&mut connect(address), b"hello");
        running.handle().drain();
        let report = running.wait().expect("it drained");
        assert_eq!((report.accepted, report.cut), (1, 0), "round {round}");
    }
    // The listen queue holds as many connections as before, and `accept` returns each of them.
    let clients: Vec<TcpStream> = (0..100).map(|_| connect(address)).collect();
    let met =
        (0..clients.len()).filter(|_| eventually("a client", || held.accept().ok()).1.ip().is_loopback());
    assert_eq!(met.count(), 100);
}

/// If the drain's deadline comes before the server has stopped accepting, it still takes none of the next server's
/// clients.
#[test]
fn a_drain_without_time_takes_nobody_out_of_a_shared_backlog() {
    let held = listener();
    let address = held.local_addr().expect("an address");
    let builder = Server::builder("hasty").service(Echo).workers(1).max_connections(1);
    let running = builder
        .drain_timeout(Duration::ZERO)
        .adopt(copy(&held))
        .expect("it listens")
        .start()
        .expect("threads");
    let mut first = connect(address);
    ping(&mut first, b"hello");
    let _waiting: Vec<TcpStream> = (0..5).map(|_| connect(address)).collect();
    running.handle().drain();
    let report = running.wait().expect("it drained");
    assert_eq!((report.accepted, report.in_drain, report.cut), (1, 1, 1));
    for _ in 0..5 {
        eventually("a client", || held.accept().ok());
    }
}

#[test]
fn the_metrics_listener_can_be_shared_too() {
    let held = listener();
    for _ in 0..2 {
        let endpoint = Exposition::adopt(prometheus::Registry::new(), copy(&held)).expect("it listens");
        let endpoint = endpoint.start().expect("threads");
        assert_eq!(http(endpoint.local_addr(), "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").code, 200);
        endpoint.stop();
    }
    assert_eq!(held.local_addr().expect("an address").ip().to_string(), "127.0.0.1");
}

#[test]
fn a_socket_that_does_not_listen_is_refused() {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = TcpListener::from(socket.expect("a socket"));
    let refused = Server::builder("deaf").service(Echo).adopt(socket).expect_err("it does not listen");
    assert!(matches!(refused, ServerError::NotListening), "{refused:?}");
}

#[test]
fn what_has_no_use_is_named_with_the_remedy() {
    let silent =
        || rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let udp = || OwnedFd::from(UdpSocket::bind(ANY_PORT).expect("a port"));
    let tcp = || OwnedFd::from(listener());
    for (echo, metrics, names, said) in [
        (udp(), tcp(), "", "the socket passed on for echo: fd 3 is not a valid tcp socket"),
        (tcp(), udp(), "", "the socket passed on for metrics: fd 4 is not a valid tcp socket"),
        (silent().expect("a socket"), tcp(), "", "in place of --listen: the socket does not listen"),
        (tcp(), silent().expect("a socket"), "", "in place of --metrics: the socket does not listen"),
        (tcp(), tcp(), "echo:echo", "2 sockets were passed on, named echo, echo"),
        (tcp(), tcp(), "echo:admin", "2 sockets were passed on, named echo, admin"),
    ] {
        let mut server = Millpond::activated(echo, metrics, &[("LISTEN_FDNAMES", names)]);
        assert_eq!(server.wait().code(), Some(1), "{said}");
        let log = server.log();
        assert!(
            log.contains(said) && log.contains("pass on at most two TCP sockets that listen"),
            "{said}: {log}"
        );
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[test]
fn names_decide_which_listener_is_whose() {
    let sockets = Sockets::new();
    let (echo, metrics) = (copy(&sockets.echo), copy(&sockets.metrics));
    let mut server = Millpond::activated(metrics, echo, &[("LISTEN_FDNAMES", "metrics:echo")]);
    ping(&mut connect(sockets.echo.local_addr().expect("an address")), b"hello");
    assert_eq!(server.drain(), Some(0));
}

/// The socket on which a service manager receives its services' messages.
struct Ear {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Ear {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("millpond-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Ear { socket, path }
    }

    fn path(&self) -> &str {
        self.path.to_str().expect("a plain path")
    }

    /// The next message.
    fn hear(&self) -> String {
        let mut message = [0; 1024];
        let length = self.socket.recv(&mut message).expect("a message");
        String::from_utf8_lossy(&message[..length]).into_owned()
    }

    /// The next message that is not for the watchdog.
    fn hear_news(&self) -> String {
        std::iter::repeat_with(|| self.hear())
            .find(|message| message != "WATCHDOG=1\n")
            .expect("it is endless")
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn the_manager_hears_of_the_start_the_heartbeat_and_the_end() {
    let ear = Ear::new("ear");
    let mut server = Millpond::start_with(&["--drain-timeout", "20s", "--lame-duck", "1s"], |command| {
        command.env("NOTIFY_SOCKET", ear.path()).env("WATCHDOG_USEC", "100000");
    });
    let ready = ear.hear();
    let status = format!("serving on {}, metrics on http://{}/metrics", server.echo, server.metrics);
    assert_eq!(ready, format!("READY=1\nSTATUS={status}\n"));
    (0..5).for_each(|_| assert_eq!(ear.hear(), "WATCHDOG=1\n"));
    ping(&mut server.connect(), b"hello");
    server.signal(Signal::TERM);
    let stopping = "STOPPING=1\nEXTEND_TIMEOUT_USEC=26000000\nSTATUS=draining, 21s at most\n";
    assert_eq!(ear.hear_news(), stopping);
    assert_eq!(ear.hear(), "WATCHDOG=1\n", "the lame duck phase feeds the watchdog");
    let ended = ear.hear_news();
    assert_eq!(server.wait().code(), Some(0));
    assert!(ended.starts_with("STATUS=") && ended.contains(" 0 cut; drained in "), "{ended}");
}

/// Names without a file begin with `@`, as a manager in another mount namespace gives them.
#[test]
fn a_manager_without_a_file_is_told_too() {
    let name = format!("millpond-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let socket = UnixDatagram::bind_addr(&address).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut server = Millpond::start_with(&[], |command| {
        command.env("NOTIFY_SOCKET", format!("@{name}"));
    });
    let mut message = [0; 1024];
    let length = socket.recv(&mut message).expect("a message");
    assert!(message[..length].starts_with(b"READY=1\n"));
    assert_eq!(server.drain(), Some(0));
}

/// The manager's queue is full when the drain begins, and the manager reads it half a second later.
#[test]
fn news_waits_for_a_manager_that_is_late() {
    let is_told = || {
        let ear = Ear::new("late");
        let server = Millpond::start_with(&[], |command| {
            command.env("NOTIFY_SOCKET", ear.path()).env("WATCHDOG_USEC", "200");
        });
        eventually("the manager's queue is full", || {
            server.log().contains("the service manager cannot be told").then_some(())
        });
        let start = Instant::now();
        server.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(500));
        assert!(ear.hear_news().starts_with("READY=1\n"));
        if start.elapsed() > Duration::from_millis(900) {
            // The machine was busy with others. The server waits for a second and no longer.
            return false;
        }
        assert!(ear.hear_news().starts_with("STOPPING=1\n"));
        assert!(ear.hear_news().starts_with("STATUS="));
        true
    };
    assert!((0..5).any(|_| is_told()), "five times the machine kept the manager from reading");
}

#[test]
fn a_manager_that_does_not_read_holds_nothing_up() {
    let ear = Ear::new("full");
    let mut server = Millpond::start_with(&[], |command| {
        command.env("NOTIFY_SOCKET", ear.path()).env("WATCHDOG_USEC", "200");
    });
    eventually("the manager's queue is full", || {
        server.log().contains("the service manager cannot be told").then_some(())
    });
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let ear = Ear::new("other");
    let mut server = Millpond::start_with(&[], |command| {
        command.env("NOTIFY_SOCKET", ear.path()).env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    });
    assert!(ear.hear().starts_with("READY=1\n"));
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
    assert!(ear.hear().starts_with("STOPPING=1\n"), "no other message came between");
}

#[test]
fn a_manager_that_cannot_be_told_is_named_once_and_stops_nothing() {
    let mut server = Millpond::start_with(&[], |command| {
        command.env("NOTIFY_SOCKET", "/nowhere/at/all").env("WATCHDOG_USEC", "20000");
    });
    // The server feeds the watchdog every 10 ms, so it tries twenty times. Time is the subject here.
    std::thread::sleep(Duration::from_millis(200));
    ping(&mut server.connect(), b"hello");
    assert_eq!(server.drain(), Some(0));
    let log = server.log();
    assert_eq!(
        log.matches("the service manager cannot be told; NOTIFY_SOCKET names where").count(),
        1,
        "{log}"
    );
}
