//! A client that has gone must not end a program that does not ignore SIGPIPE.
//!
//! Rust's `main` ignores the signal. Programs that start in C do not, and some programs restore it so that `| head` ends
//! them. This test has its own file because a signal handler belongs to the whole process.

mod common;

use std::io::Write;
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use millpond::{Next, Server, Service};
use signal_hook::consts::SIGPIPE;

use common::pools::Latch;
use common::{connect, eventually};

/// Echoes when the latch is open, and counts the messages that wait for it.
#[derive(Clone, Default)]
struct Held {
    latch: Latch,
    waiting: Arc<AtomicUsize>,
}

impl Service for Held {
    type Session = ();

    fn open(&self, _peer: SocketAddr) {}

    fn serve(&self, (): &mut (), _bytes: &mut Vec<u8>) -> Next {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.latch.wait();
        Next::KeepOpen
    }
}

/// Counts the open connections that this process's network has with this local port.
fn connections_of(port: u16) -> usize {
    // "0: 0100007F:3A98 0100007F:D431 08 ...": the port is in hexadecimal. 0A is the state of a listener, and 06 is
    // TIME_WAIT, in which connections of other programs with the same port stay for a minute.
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel's table");
    let local = format!(":{port:04X}");
    let is_open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(1).is_some_and(|address| address.ends_with(&local))
            && !matches!(fields.get(3), Some(&"0A" | &"06"))
    };
    table.lines().filter(is_open).count()
}

/// The client half-closes and resets while the service works, so the server sends the answer to a closed connection.
#[test]
fn a_client_that_is_gone_sends_the_program_no_signal() {
    const CLIENTS: usize = 4;
    let signalled = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGPIPE, Arc::clone(&signalled)).expect("it can be caught");
    let service = Held::default();
    let server = Server::builder("echo").workers(CLIENTS).service(service.clone());
    let server = server.bind(([127, 0, 0, 1], 0).into()).expect("a port").start().expect("threads");
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = connect(server.local_addr());
            client.write_all(b"an answer, please").expect("sent");
            client
        })
        .collect();
    eventually("all are being served", || (service.waiting.load(Ordering::Relaxed) == CLIENTS).then_some(()));
    for client in clients {
        client.shutdown(Shutdown::Write).expect("a half-close");
        socket2::Socket::from(client).set_linger(Some(Duration::ZERO)).expect("a socket option");
    }
    // The kernel may deliver a reset a moment after the client has sent it.
    let port = server.local_addr().port();
    eventually("every reset has come", || (connections_of(port) == 0).then_some(()));
    service.latch.open();
    server.handle().drain();
    let report = server.wait().expect("it drained");
    assert_eq!((report.accepted, report.sent), (CLIENTS as u64, 0), "{report}");
    assert!(!signalled.load(Ordering::Relaxed), "SIGPIPE, which would have ended the program");
}
