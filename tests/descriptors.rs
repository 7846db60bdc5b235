//! What happens when file descriptors run out: no spin, no silence, and recovery.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

use common::scrape::Guard;
use common::{Millpond, connect, eventually, ping};

/// The program under `ulimit -n 256`, soft and hard.
fn with_256_files(flags: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("ulimit -n 256; exec \"$0\" --listen 127.0.0.1:0 --metrics 127.0.0.1:0 {flags}");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_millpond")]);
    command
}

#[test]
fn more_clients_than_descriptors_wait_and_are_served_in_turn() {
    let server = Millpond::spawn(&mut with_256_files(""));
    let limit = server.scrape().get("connections_limit");
    assert!((150.0..=256.0 - 64.0).contains(&limit), "limit {limit}");
    let mut clients: Vec<TcpStream> = (0..400).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.write_all(b"hello").expect("the kernel takes it"));
    eventually("full", || (server.scrape().sum("connections", "state=") == limit).then_some(()));
    let share = server.processor_share();
    assert!(share < 0.05, "{share} of a processor while stuck");
    assert_eq!(server.get("/readyz").code, 503);
    // Each that goes makes room for one that waits.
    for mut client in clients {
        std::io::Read::read_exact(&mut client, &mut [0; 5]).expect("served in the end");
    }
    eventually("ready again", || (server.get("/readyz").code == 200).then_some(()));
    assert_eq!(
        server.scrape().sum("accept_errors_total", "kind="),
        0.0,
        "the limit is below the descriptors"
    );
}

#[test]
fn when_descriptors_run_out_scrapes_go_on_and_service_recovers() {
    let mut server = Millpond::start(&["--workers", "4"]);
    let mut early = server.connect();
    ping(&mut early, b"hello");
    // Lowered behind its back, as an operator or a container engine may.
    server.limit_files(256, 20_000);
    let clients: Vec<TcpStream> = (0..400).map(|_| server.connect()).collect();
    let failed = "accept_errors_total{kind=\"fd_limit\"}";
    eventually("counted", || (server.scrape().get(failed) >= 1.0).then_some(()));
    let refusal = eventually("not ready", || Some(server.get("/readyz")).filter(|answer| answer.code == 503));
    assert_eq!(refusal.body, "out of file descriptors\n");

    let share = server.processor_share();
    assert!(share < 0.05, "{share} of a processor while stuck");
    let errors = server.scrape().get(failed);
    assert!(errors < 50.0, "{errors} failed accepts: it spins");
    ping(&mut early, b"still served");
    assert!(server.scrape().names().any(|name| name == "process_open_fds"), "/proc can be read");

    let guard = Guard::over(server.metrics);
    drop(clients);
    let mut late = server.connect();
    ping(&mut late, b"served again");
    eventually("ready again", || (server.get("/readyz").code == 200).then_some(()));
    guard.finish();
    drop((early, late));
    assert_eq!(server.drain(), Some(0));
}

#[test]
fn the_soft_limit_is_raised_to_the_hard_one() {
    let mut command = Command::new("sh");
    let script =
        "ulimit -Sn 200; exec \"$0\" --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --max-connections 300";
    command.args(["-c", script, env!("CARGO_BIN_EXE_millpond")]);
    let server = Millpond::spawn(&mut command);
    let mut clients: Vec<TcpStream> = (0..300).map(|_| connect(server.echo)).collect();
    clients.iter_mut().for_each(|client| ping(client, b"hello"));
}
